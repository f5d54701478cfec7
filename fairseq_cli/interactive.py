"""`fairseq-interactive`: continues prompts, a line each, with a language model, alone or with retrieval."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch import Tensor

from fairseq import options
from fairseq.errors import BadFile, BadFlag, UserError
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.files.inputs import open_input
from fairseq.files.outputs import claimed
from fairseq.files.provenance import write_results
from fairseq.flags.generation import READ_STANDARD_INPUT
from fairseq.generation.beam_search import beam_search
from fairseq.generation.choice import ChoiceSettings
from fairseq.generation.drafts import DraftedWriting
from fairseq.generation.lm_steps import LMSteps
from fairseq.generation.positions import Positions
from fairseq.generation.texts import texts_of
from fairseq.generation.writing import Written, write
from fairseq.knnlm import build_knnlm
from fairseq.retrieval.flag_conflicts import check_flags
from fairseq.retrieval.open_stores import open_stores
from fairseq.retrieval_steps import RetrievalSteps
from fairseq_cli.entry import cli_entry, log_start

logger = logging.getLogger("fairseq_cli.interactive")


class Interactive:
    """Model, datastore and settings that continue any number of prompts; adds up what it did."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.settings = args, _settings(args)
        args.knn_keytype = args.knn_keytype if args.knnlm else None  # no queries without retrieval
        scoring = LMScoring.of_models(args)
        self.texts = texts_of(scoring.task.source_dictionary, _encoder_args(args, scoring))
        retrieval = None
        if args.knnlm:
            device = scoring.device if args.knnlm_gpu else torch.device("cpu")
            vocabulary = len(scoring.task.target_dictionary)
            self.stores = open_stores(args, scoring.key_dimension, device, vocabulary)
            retrieval = RetrievalSteps(build_knnlm(args, scoring.key_dimension, device, self.stores))
        needs = frozenset() if retrieval is None else retrieval.retriever.needs
        lm = LMSteps(
            scoring.models, self.texts.symbols.pad, self.texts.start, scoring.scorer.key_type, needs, scoring.device
        )
        self.positions = Positions(lm, retrieval)
        self.drafted = None
        if args.draft:
            self.drafted = DraftedWriting(self.positions, self.settings, self.texts.symbols, args.draft, args.json)
        self.prompts = self.tokens = 0
        self.seconds = 0.0

    def encode(self, line: str, number: int) -> Tensor:
        """The tokens of a prompt; BadFlag for one without any, or longer than the model can read."""
        tokens = self.texts.encode(line)
        if self.args.prefix_size:
            tokens = tokens[: self.args.prefix_size]
        if not len(tokens):
            raise BadFlag("--input", f"prompt {number} without a word", "at least one word a line", "remove the line")
        if len(tokens) + 1 >= self.positions.lm.longest:
            found, most = f"prompt {number} of {len(tokens)} tokens", self.positions.lm.longest - 2
            remedy = "shorten it, or read its beginning with --prefix-size"
            raise BadFlag("--input", found, f"at most {most}: the model has {most + 2} positions", remedy)
        return tokens

    def continuations(self, prompts: list[Tensor], first: int) -> list[list[Written]]:
        """For each prompt its best continuations, best first; first: number of the first prompt."""
        started = time.perf_counter()
        results = self._continuations(prompts, first)
        self.seconds += time.perf_counter() - started
        self.prompts += len(prompts)
        self.tokens += sum(len(written.tokens) for of_prompt in results for written in of_prompt)
        return [sorted(of_prompt, key=lambda w: -w.score)[: self.args.nbest] for of_prompt in results]

    def _continuations(self, prompts: list[Tensor], first: int) -> list[list[Written]]:
        args, symbols, numbers = self.args, self.texts.symbols, range(first, first + len(prompts))
        if args.beam > 1 and not args.sampling:
            penalty = 0.0 if args.unnormalized else args.lenpen
            return [
                beam_search(
                    self.positions, p, args.beam, self.settings, symbols, penalty, number=n, traced=args.json
                )
                for p, n in zip(prompts, numbers, strict=True)
            ]
        if self.drafted is not None:
            return [
                [self.drafted.write(p, n, sample) for sample in range(args.beam)]
                for p, n in zip(prompts, numbers, strict=True)
            ]
        return write(self.positions, prompts, self.settings, symbols, args.beam, list(numbers), args.json)

    def lines(self, number: int, prompt: str, tokens: Tensor, written: Written) -> list[str]:
        """A continuation as it is printed: fairseq's H- and P- lines, or a JSON object."""
        text = self.texts.decode([*tokens.tolist(), *written.tokens])
        if not self.args.json:
            scores = " ".join(f"{log_prob:.4f}" for log_prob in written.log_probs)
            return [f"H-{number}\t{written.score:.6f}\t{_one_line(text)}", f"P-{number}\t{scores}"]
        facts = [
            {"id": token, "token": self.texts.name(token), **known, **self._named(known)}
            for token, known in zip(written.tokens, written.trace, strict=True)
        ]
        own = {"prompt": number, "sample": written.sample, "text": text, "score": written.score}
        return [json.dumps({**own, "prompt_text": prompt, "ended": written.ended, "tokens": facts}, ensure_ascii=False)]

    def _named(self, known: dict[str, Any]) -> dict[str, Any]:
        """The entries that voted, with their token as text."""
        if "entries" not in known:
            return {}
        named = [{**entry, "text": self.texts.name(entry["token"])} for entry in known["entries"]]
        return {"entries": named}

    def report(self) -> dict[str, Any]:
        """Counts and times, which are logged."""
        rate = self.tokens / self.seconds if self.seconds else float("inf")
        logger.info("%d prompts, %d new tokens in %.1fs (%.2f tokens/s)", self.prompts, self.tokens, self.seconds, rate)
        results: dict[str, Any] = {"prompts": self.prompts, "new_tokens": self.tokens, "seconds": self.seconds}
        results["tokens_per_second"] = rate
        retrieval = self.positions.retrieval
        if retrieval is not None and retrieval.steps:
            share = 100 * (1 - retrieval.searches / retrieval.steps)
            logger.info("Searches saved: %.2f%% of %d tokens, prompts included", share, retrieval.steps)
            results |= {"searches": retrieval.searches, "retrieved_tokens": retrieval.steps}
        if self.drafted is not None and self.drafted.counts.passes:
            counts = self.drafted.counts
            logger.info(
                "Drafts: %d of %d tokens accepted, %.2f new tokens a pass of the model",
                counts.accepted, counts.drafted, counts.tokens / counts.passes,
            )
            results |= {"drafts": vars(counts)}
        return results


def _settings(args: argparse.Namespace) -> ChoiceSettings:
    """The flags of generation; BadFlag for what contradicts."""
    if args.nbest > args.beam:
        raise BadFlag("--nbest", args.nbest, f"at most --beam {args.beam}", f"give --beam {args.nbest}")
    if args.draft and not args.knnlm:
        raise BadFlag("--draft", "it alone", "--knnlm and a datastore beside it, whose texts are the drafts")
    if args.draft and args.beam > 1 and not args.sampling:
        raise BadFlag("--draft", f"--beam {args.beam} beside it", "one continuation, or samples", "drop one of them")
    names = ChoiceSettings.__dataclass_fields__
    return ChoiceSettings(**{name: getattr(args, name) for name in names})


def _encoder_args(args: argparse.Namespace, scoring: LMScoring) -> argparse.Namespace:
    own = argparse.Namespace(**vars(args))
    own.add_bos_token = getattr(scoring.effective_args, "add_bos_token", False)
    return own


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r")


def prompts_in(stream: IO[bytes], name: str) -> Iterator[str]:
    """The lines of a text in UTF-8, as they come."""
    for number, line in enumerate(stream):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            found = f"bytes in prompt {number} that are no UTF-8 ({error.reason})"
            raise BadFile(name, found, "text in UTF-8", "convert it, with iconv for example") from None


def buffers(lines: Iterator[str], size: int) -> Iterator[list[str]]:
    """Lines in lists of at most `size`."""
    held: list[str] = []
    for line in lines:
        held.append(line)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Continues all prompts and prints what it wrote; returns the figures for `--results-json`."""
    log_start(logger, args)
    check_flags(args)
    batch = args.max_sentences or 1
    if args.buffer_size < batch:
        args.buffer_size = batch
    with claimed("--results-json", args.results_json):
        interactive = Interactive(args)
        first = 0
        if args.input == READ_STANDARD_INPUT:
            logger.info("reading prompts, a line each, from standard input")
            first = _continue_all(interactive, prompts_in(sys.stdin.buffer, "standard input"), batch)
        else:
            with open_input(args.input) as stream:
                first = _continue_all(interactive, prompts_in(stream, args.input), batch)
        if not first:
            raise UserError(f"--input {args.input}: found no prompt, expected one a line; give some text")
        results = interactive.report()
        if args.results_json is not None:
            write_results(args.results_json, results, args)
    return results


def _continue_all(interactive: Interactive, lines: Iterator[str], batch: int) -> int:
    """Prints what follows each line; gives the number of lines."""
    first = 0
    for held in buffers(lines, interactive.args.buffer_size):
        encoded = [interactive.encode(line, first + i) for i, line in enumerate(held)]
        for start in range(0, len(held), batch):
            prompts = encoded[start : start + batch]
            for i, found in enumerate(interactive.continuations(prompts, first + start), start):
                if not interactive.args.json:
                    sys.stdout.write(f"S-{first + i}\t{held[i]}\n")
                for written in found:
                    for line in interactive.lines(first + i, held[i], encoded[i], written):
                        sys.stdout.write(line + "\n")
            sys.stdout.flush()
        first += len(held)
    return first


def cli_main() -> None:
    """Console entry point; the log goes to standard error."""
    cli_entry(lambda: main(options.parse_args_and_arch(options.get_interactive_parser())), sys.stderr)


if __name__ == "__main__":
    cli_main()
