"""The language model: compares `eval_lm.py` and `eval_lm.py --save-knnlm-dstore` with bare forward passes of the same
batches, alternately. The forward pass is measured without and with the output layer (the targets' log-probabilities).

Takes the flags of eval_lm.py. A model of WikiText-103's shape with random weights comes from

    python tests/full_size/random_checkpoint.py wiki103 args /tmp/wiki103
    python benchmarks/language_model.py /tmp/wiki103/data-bin --path /tmp/wiki103/checkpoint.pt --gen-subset valid \\
        --sample-break-mode complete --context-window 2560 --max-tokens 3072
"""

from __future__ import annotations

import argparse
import logging
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
    """Times the four ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    own, flags = parser.parse_known_args()
    torch.set_num_threads(own.threads)
    logging.disable()
    scoring = LMScoring(parsed(flags))
    with tempfile.TemporaryDirectory() as folder:
        saving = parsed([*flags, "--save-knnlm-dstore", "--dstore-fp16", "--dstore-mmap", str(Path(folder) / "d")])
        seconds = side_by_side(ways(scoring, LMScoring(saving), saving), own.repeats)
    tokens = scoring.expected_tokens
    forward, scored, *_ = seconds.values()
    rows = [
        {
            "what": name,
            "ms/token": spent / tokens * 1e3,
            "over the forward pass": spent / forward,
            "over it and the scores": spent / scored,
        }
        for name, spent in seconds.items()
    ]
    parameters = sum(parameter.numel() for parameter in scoring.models[0].parameters())
    print(conditions(), f"; {own.threads} thread(s), {tokens} tokens, {parameters / 1e6:.1f} M parameters", sep="")
    print(table(rows))


def parsed(flags: list[str]) -> argparse.Namespace:
    """eval_lm's options."""
    return options.parse_args_and_arch(options.get_eval_lm_parser(), [*flags, "--no-progress-bar"])


def ways(scoring: LMScoring, saver: LMScoring, saving: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The functions to time. For the bare passes, batches are collated beforehand; the commands collate their own."""
    model, pad = scoring.models[0], scoring.scorer.pad
    batches = list(scoring.batches())

    @torch.no_grad()
    def forward(batch: dict[str, Any]) -> Any:
        return model(**batch["net_input"], features_only=True)

    @torch.no_grad()
    def scored(batch: dict[str, Any]) -> Any:
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
