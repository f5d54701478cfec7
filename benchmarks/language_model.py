"""The language model: compares `eval_lm.py` and `eval_lm.py --save-knnlm-dstore` with bare forward passes of the same
batches, alternately. The forward pass is measured without and with the output layer (the targets' log-probabilities;
with a Hugging Face model, transformers' own logits).

`--memory` compares their peak memory instead, above that of the process with the model loaded: each runs once, in a
process of its own.

Takes the flags of eval_lm.py. A model of WikiText-103's shape with random weights comes from

    python tests/full_size/random_checkpoint.py wiki103 args /tmp/wiki103
    python benchmarks/language_model.py /tmp/wiki103/data-bin --path /tmp/wiki103/checkpoint.pt --gen-subset valid \\
        --sample-break-mode complete --context-window 2560 --max-tokens 3072

and a Hugging Face model is a folder:

    python benchmarks/language_model.py data-bin/law --path MODEL --hf-dtype float32 --gen-subset test \\
        --tokens-per-sample 1024
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import conditions, run, side_by_side, table

from fairseq import options
from fairseq.evaluation.datastore_pass import save_datastore
from fairseq.evaluation.lm_scoring import LMScoring


def main() -> None:
    """Measures the four ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="compare peak memory instead of time")
    own, flags = parser.parse_known_args()
    torch.set_num_threads(own.threads)
    logging.disable()
    scoring = LMScoring(parsed(flags))
    with tempfile.TemporaryDirectory() as folder:
        saving = parsed([*flags, "--save-knnlm-dstore", "--dstore-fp16", "--dstore-mmap", str(Path(folder) / "d")])
        compared = ways(scoring, LMScoring(saving), saving)
        if own.memory:
            rows = [{"what": name, "MB": peak_of(way) / 1e6} for name, way in compared.items()]
        else:
            rows = times(side_by_side(compared, own.repeats), scoring.expected_tokens)
    parameters = sum(parameter.numel() for parameter in scoring.models[0].parameters())
    size = f"{scoring.expected_tokens} tokens, {parameters / 1e6:.1f} M parameters"
    print(conditions(), f"; {own.threads} thread(s), {size}", sep="")
    print(table(rows))


def times(seconds: dict[str, float], tokens: int) -> list[dict[str, Any]]:
    """Rows of the table, from the seconds that each way took for `tokens` tokens."""
    forward, scored, *_ = seconds.values()
    return [
        {
            "what": name,
            "ms/token": spent / tokens * 1e3,
            "over the forward pass": spent / forward,
            "over it and the scores": spent / scored,
        }
        for name, spent in seconds.items()
    ]


def peak_of(way: Callable[[], object]) -> int:
    """Peak memory in bytes of one run in a copy of this process, above what the copy has when it starts (Linux)."""

    def child() -> None:
        before = status("VmRSS")
        way()
        sender.send(status("VmHWM") - before)

    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    finally:
        process.join()


def status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def parsed(flags: list[str]) -> argparse.Namespace:
    """eval_lm's options."""
    return options.parse_args_and_arch(options.get_eval_lm_parser(), [*flags, "--no-progress-bar"])


def ways(scoring: LMScoring, saver: LMScoring, saving: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The functions to time. For the bare passes, batches are collated beforehand; the commands collate their own."""
    model, pad = scoring.models[0], scoring.scorer.pad
    batches = list(scoring.batches())

    network = getattr(model.decoder, "network", None)  # transformers' own, with none of this package's code

    @torch.no_grad()
    def forward(batch: dict[str, Any]) -> Any:
        if network is not None:
            return network.base_model(input_ids=batch["net_input"]["src_tokens"].clamp(min=0), use_cache=False)
        return model(**batch["net_input"], features_only=True)

    @torch.no_grad()
    def scored(batch: dict[str, Any]) -> Any:
        if network is not None:
            return network(input_ids=batch["net_input"]["src_tokens"].clamp(min=0), use_cache=False).logits
        return model.get_target_log_probs(forward(batch), batch["target"], pad)

    def save() -> None:
        for file in Path(saving.dstore_mmap).parent.glob("d*"):
            file.unlink()
        save_datastore(saver, saving)

    return {
        "forward pass": lambda: [forward(batch)[0].shape for batch in batches],
        "forward pass and target scores": lambda: [scored(batch).shape for batch in batches],
        "eval_lm.py": lambda: [scoring.score(batch) for batch in scoring.batches()],
        "eval_lm.py --save-knnlm-dstore": save,
    }


if __name__ == "__main__":
    run(main)
