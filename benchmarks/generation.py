"""Writing text: tokens per second of the model alone, of kNN-LM, of RetoMaton, and of each with drafts, side by side
for one prompt after the other; and of transformers' own `generate`, with and without its prompt lookup, for Hugging
Face models.

Takes the flags of fairseq-interactive, for instance

    python benchmarks/generation.py data-bin/law --path MODEL --input prompts.txt --prefix-size 128 --max-len-b 64 \\
        --dstore-filename law/dstore16 --indexfile law/knn.index --k 64 --lmbda 0.25 --draft 8
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
from collections.abc import Callable
from typing import Any

import faiss
import torch
from timing import clock, conditions, run, table

from fairseq import options
from fairseq.files.inputs import open_input
from fairseq.generation.choice import Symbols
from fairseq.generation.drafts import DraftedWriting
from fairseq.generation.positions import Positions
from fairseq.generation.writing import write
from fairseq.knnlm import build_knnlm
from fairseq.retrieval_steps import RetrievalSteps
from fairseq_cli.interactive import Interactive, prompts_in

BASE = "the model, step by step"
STRATEGIES = {
    "kNN-LM": {"strategy": None, "no_pointer": True},
    "RetoMaton": {"strategy": None, "no_pointer": False},
    "RetoMaton with chains": {"strategy": "retomaton_chains", "no_pointer": False},
}


WriteOne = Callable[[torch.Tensor, int], list[int]]


class Way:
    """One way of writing: what it took for each prompt, and what it did."""

    def __init__(self, write_one: WriteOne, counts: Callable[[], dict[str, Any]]) -> None:
        self.write_one, self.counts = write_one, counts
        self.seconds: list[float] = []
        self.texts: list[list[int]] = []

    def run(self, prompt: torch.Tensor, number: int, timed: bool) -> None:
        """Writes one continuation."""
        started = clock()
        tokens = self.write_one(prompt, number)
        if timed:
            self.seconds.append((clock() - started) / max(1, len(tokens)))
            self.texts.append(tokens)


def main() -> None:
    """Continues the prompts in every way, alternately, `--repeats` times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=10, help="so many of the input")
    own, flags = parser.parse_known_args()
    torch.set_num_threads(own.threads)
    faiss.omp_set_num_threads(own.threads)
    logging.disable()
    words = [*flags, "--knnlm", "--strategy", "retomaton_chains"]  # so that its flags are there
    args = options.parse_args_and_arch(options.get_interactive_parser(), words)
    interactive = Interactive(args)
    interactive.texts.symbols = symbols = Symbols((), interactive.texts.symbols.pad, interactive.texts.symbols.unk)
    with open_input(args.input) as stream:
        lines = [line for line in prompts_in(stream, args.input) if line.split()][: own.prompts]
    prompts = [interactive.encode(line, number) for number, line in enumerate(lines)]
    ways = _ways(interactive, args, symbols)
    for _ in range(own.repeats):
        for number, prompt in enumerate(prompts):
            for way in ways.values():
                if not way.seconds:
                    way.run(prompt, number, timed=False)  # compiles what is compiled at first use
                way.run(prompt, number, timed=True)
    print(f"{conditions()}; {own.threads} thread(s), {len(prompts)} prompts of {[len(p) for p in prompts]} tokens, "
          f"{interactive.positions.retrieval.knnlm.index.count} entries")
    print(table([_row(name, way, ways) for name, way in ways.items()]))


def _ways(interactive: Interactive, args: argparse.Namespace, symbols: Symbols) -> dict[str, Way]:
    lm, settings, stores = interactive.positions.lm, interactive.settings, interactive.positions.retrieval.knnlm
    ways: dict[str, Way] = {}

    def step_by_step(name: str, positions: Positions) -> None:
        def one(prompt: torch.Tensor, number: int) -> list[int]:
            return write(positions, [prompt], settings, symbols, numbers=[number])[0][0].tokens

        ways[name] = Way(one, lambda: _searches(positions.retrieval))

    def drafted(name: str, positions: Positions) -> None:
        writing = DraftedWriting(positions, settings, symbols, args.draft)

        def counts() -> dict[str, Any]:
            done = writing.counts
            return {**_searches(positions.retrieval), "tokens a pass": done.tokens / max(1, done.passes)}

        ways[name] = Way(lambda prompt, number: writing.write(prompt, number).tokens, counts)

    def retrieval(lmbda: float, **changed: Any) -> RetrievalSteps:
        own = copy.copy(args)
        vars(own).update(changed, lmbda=lmbda)
        built = build_knnlm(own, stores.index.dimension, stores=interactive.stores)
        return RetrievalSteps(built)

    step_by_step(BASE, Positions(lm))
    if args.draft:
        drafted("the model, drafts", Positions(lm, retrieval(0.0, **STRATEGIES["RetoMaton"])))
    for name, changed in STRATEGIES.items():
        step_by_step(f"{name}, step by step", Positions(lm, retrieval(args.lmbda, **changed)))
        if args.draft:
            drafted(f"{name}, drafts", Positions(lm, retrieval(args.lmbda, **changed)))
    network = getattr(lm.models[0].decoder, "network", None)
    if network is not None:
        ways |= _of_transformers(network, lm.start, settings.max_len_b)
    return ways


def _of_transformers(network: Any, start: int, length: int) -> dict[str, Way]:
    def generate(**flags: Any) -> WriteOne:
        def one(prompt: torch.Tensor, number: int) -> list[int]:
            words = torch.cat([torch.tensor([start]), prompt])[None]
            with torch.no_grad():
                found = network.generate(
                    words, attention_mask=torch.ones_like(words), max_new_tokens=length, min_new_tokens=length,
                    do_sample=False, pad_token_id=0, **flags,
                )
            return found[0, words.shape[1] :].tolist()

        return one

    return {
        "transformers' generate": Way(generate(), dict),
        "transformers' prompt lookup (10)": Way(generate(prompt_lookup_num_tokens=10), dict),
    }


def _searches(retrieval: RetrievalSteps | None) -> dict[str, Any]:
    """Of all runs, prompts included."""
    return {} if retrieval is None else {"searches a token": retrieval.searches / max(1, retrieval.steps)}


def _row(name: str, way: Way, ways: dict[str, Way]) -> dict[str, Any]:
    """Medians over the prompts; "times the model" is the median of the ratios prompt by prompt."""
    ratios = [base / own for base, own in zip(ways[BASE].seconds, way.seconds)]
    of_same_kind = ways.get(name.replace("drafts", "step by step"), way)
    counts = way.counts()
    same = sum(a == b for a, b in zip(way.texts, of_same_kind.texts))
    return {
        "way": name,
        "ms a token": statistics.median(way.seconds) * 1e3,
        "tokens/s": 1 / statistics.median(way.seconds),
        "times the model": statistics.median(ratios),
        "from ... to": f"{min(ratios):.2f} ... {max(ratios):.2f}",
        "tokens a pass": counts.get("tokens a pass", "-"),
        "searches a token": counts.get("searches a token", "-"),
        "same text as step by step": f"{same} of {len(way.texts)}",
    }


if __name__ == "__main__":
    run(main)
