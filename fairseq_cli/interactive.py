"""`fairseq-interactive`: continues prompts, a line each, with a language model, alone or with retrieval."""

from __future__ import annotations

import argparse
import io
import itertools
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
from fairseq.evaluation.datastore_pass import check_source
from fairseq.evaluation.entry_texts import EntryTexts, StoredDocuments
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.files.inputs import open_input, regular_size
from fairseq.files.odd_characters import odd_sentences
from fairseq.files.outputs import claimed
from fairseq.files.provenance import write_results
from fairseq.flags.generation import READ_STANDARD_INPUT
from fairseq.generation.beam_search import beam_search
from fairseq.generation.drafts import DraftedWriting
from fairseq.generation.flag_checks import check_generation_flags, choice_settings
from fairseq.generation.lm_steps import LMSteps
from fairseq.generation.positions import Positions
from fairseq.generation.texts import SPECIAL, texts_of
from fairseq.generation.writing import Written, write
from fairseq.knnlm import build_knnlm
from fairseq.retrieval.flag_conflicts import check_flags
from fairseq.retrieval.open_stores import open_stores, require_stores
from fairseq.retrieval_steps import RetrievalSteps
from fairseq_cli.entry import cli_entry, log_start

logger = logging.getLogger("fairseq_cli.interactive")

Prompt = tuple[str, Tensor]  # a line, and its token ids (T,)


class Interactive:
    """Model, datastore and settings that continue any number of prompts; adds up what it did."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.settings = args, choice_settings(args)
        args.knn_keytype = args.knn_keytype if args.knnlm else None  # no queries without retrieval
        scoring = LMScoring.of_models(args)
        self.texts = texts_of(scoring.task.source_dictionary, _encoder_args(args, scoring))
        retrieval = None
        if args.unkpen and self.texts.symbols.unk < 0:
            logger.warning("--unkpen has no effect with a tokenizer that has no unknown words")
        self.entries: EntryTexts | None = None
        if args.knnlm:
            check_source(scoring, args)
            device = scoring.device if args.knnlm_gpu else torch.device("cpu")
            vocabulary = len(scoring.task.target_dictionary)
            self.stores = open_stores(args, scoring.key_dimension, device, vocabulary)
            retrieval = RetrievalSteps(build_knnlm(args, scoring.key_dimension, device, self.stores))
            if args.json:
                self.entries = self._entry_texts(vocabulary)
        needs = frozenset() if retrieval is None else retrieval.retriever.needs
        lm = LMSteps(
            scoring.models, self.texts.symbols.pad, self.texts.start, scoring.scorer.key_type, needs, scoring.device
        )
        self.positions = Positions(lm, retrieval)
        self.drafted = None
        if args.draft:
            self.drafted = DraftedWriting(self.positions, self.settings, self.texts.symbols, args.draft, args.json)
        self.prompts = self.tokens = self.prompt_tokens = self.unknown = 0
        self.seconds = 0.0

    def _entry_texts(self, vocabulary: int) -> EntryTexts:
        """What can be said of the datastore's entries."""
        args, values = self.args, self.stores.datastore.values
        documents = StoredDocuments.of_datastore(args.dstore_filename, args.data, vocabulary)
        return EntryTexts(None if args.dstore_weights else values, self.texts.decode, documents)

    def encode(self, line: str, number: int) -> Tensor:
        """The tokens of a prompt; BadFlag for one without any, or longer than the model can read."""
        tokens = self.texts.encode(line)
        if self.args.prefix_size:
            tokens = tokens[: self.args.prefix_size]
        if not len(tokens):
            raise BadFlag("--input", f"prompt {number} without a word", "at least one word a line", "remove the line")
        self.prompt_tokens += len(tokens)
        if self.texts.symbols.unk >= 0:
            self.unknown += int((tokens == self.texts.symbols.unk).sum())
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
            return [f"H-{number}\t{written.score:.6f}\t{one_line(text)}", f"P-{number}\t{scores}"]
        facts = [
            {"id": token, "token": self.texts.name(token), **known, **self._named(known)}
            for token, known in zip(written.tokens, written.trace, strict=True)
        ]
        own = {"prompt": number, "sample": written.sample, "text": text, "score": written.score}
        line = json.dumps({**own, "prompt_text": prompt, "ended": written.ended, "tokens": facts}, ensure_ascii=False)
        return ["".join(f"\\u{ord(char):04x}" if char in LINE_ENDS else char for char in line)]

    def _named(self, known: dict[str, Any]) -> dict[str, Any]:
        """The entries that voted, with their token as text, what is before them, and where they come from."""
        if self.entries is None or "entries" not in known:
            return {}
        of_entry = self.entries.of_entry
        return {
            "entries": [
                {**entry, "text": self.texts.name(entry["token"]), **of_entry(entry["entry"])}
                for entry in known["entries"]
            ]
        }

    def report(self) -> dict[str, Any]:
        """Counts and times, which are logged."""
        for sentence in odd_sentences(self.texts.odd):
            logger.warning("--input: found %s", sentence)
        if spelt := self.texts.odd[SPECIAL]:
            logger.warning("--input: found %d %s", spelt, SPECIAL)
        if self.unknown:
            said = "--input: %d of %d tokens are not in the dictionary, and were read as <unk>"
            logger.warning(said, self.unknown, self.prompt_tokens)
        rate = self.tokens / self.seconds if self.seconds else 0.0
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


def _encoder_args(args: argparse.Namespace, scoring: LMScoring) -> argparse.Namespace:
    own = argparse.Namespace(**vars(args))
    own.add_bos_token = getattr(scoring.effective_args, "add_bos_token", False)
    return own


LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # what ends a line for one program or another


def one_line(text: str) -> str:
    """A text that every program reads as one line: line ends become escapes."""
    return "".join(char.encode("unicode_escape").decode() if char in LINE_ENDS else char for char in text)


def prompts_in(stream: IO[bytes], name: str) -> Iterator[str]:
    """The lines of a text in UTF-8, as they come."""
    for number, line in enumerate(stream):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            found = f"bytes in prompt {number} that are no UTF-8 ({error.reason})"
            raise BadFile(name, found, "text in UTF-8", "convert it, with iconv for example") from None


def buffers(prompts: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Prompts in lists of at most `size`."""
    while held := list(itertools.islice(prompts, size)):
        yield held


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Continues all prompts and prints what it wrote; returns the figures for `--results-json`."""
    log_start(logger, args)
    check_flags(args)
    check_generation_flags(args, vars(options.parse_args_and_arch(options.get_interactive_parser(), [args.data])))
    if sys.stdout is None:
        raise UserError("standard output: it is closed, expected a place to print to; redirect it to a file")
    if isinstance(sys.stdout, io.TextIOWrapper):  # prompts are UTF-8, and so is what follows them
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    if args.knnlm:
        require_stores(args)
    if args.input != READ_STANDARD_INPUT:
        regular_size(args.input, "check --input")
    with claimed("--results-json", args.results_json):
        interactive = Interactive(args)
        if not _continue_all(interactive, _prompts(interactive)):
            raise UserError(f"--input {args.input}: found no prompt, expected one a line; give some text")
        results = interactive.report()
        if args.results_json is not None:
            write_results(args.results_json, results, args)
    return results


def _prompts(interactive: Interactive) -> Iterator[Prompt]:
    """Those of standard input as they come; those of a file when all of them have been looked at, so that a mistake in
    one is found before anything is printed."""
    path = interactive.args.input
    if path == READ_STANDARD_INPUT:
        if sys.stdin is None:
            raise UserError("standard input: it is closed, expected prompts; give them, or --input FILE")
        logger.info("reading prompts, a line each, from standard input")
        lines = prompts_in(sys.stdin.buffer, "standard input")
        return ((line, interactive.encode(line, number)) for number, line in enumerate(lines))
    with open_input(path) as stream:
        return iter([(line, interactive.encode(line, n)) for n, line in enumerate(prompts_in(stream, path))])


def _continue_all(interactive: Interactive, prompts: Iterator[Prompt]) -> int:
    """Prints what follows each prompt; gives their number."""
    batch = interactive.args.max_sentences or 1
    first = 0
    for held in buffers(prompts, max(batch, interactive.args.buffer_size)):
        for start in range(0, len(held), batch):
            some = held[start : start + batch]
            found = interactive.continuations([tokens for _, tokens in some], first)
            for number, ((text, tokens), of_prompt) in enumerate(zip(some, found, strict=True), first):
                if not interactive.args.json:
                    sys.stdout.write(f"S-{number}\t{one_line(text)}\n")
                for written in of_prompt:
                    sys.stdout.writelines(line + "\n" for line in interactive.lines(number, text, tokens, written))
            sys.stdout.flush()
            first += len(some)
    return first


def cli_main() -> None:
    """Console entry point; the log goes to standard error."""
    cli_entry(lambda: main(options.parse_args_and_arch(options.get_interactive_parser())), sys.stderr)


if __name__ == "__main__":
    cli_main()
