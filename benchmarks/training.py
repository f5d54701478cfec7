"""Training: compares updates of `train.py` (gradient clipping, optimiser, schedule, statistics) with bare forward and
backward passes of the same model and criterion over the same batches, alternately.

Takes the flags of train.py, for instance

    python benchmarks/training.py data-bin --task language_modeling --arch transformer_lm_wiki103 --max-tokens 1024 \\
        --criterion adaptive_loss --optimizer nag --lr 0.0001 --tokens-per-sample 256
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from timing import conditions, run, side_by_side, table

from fairseq import metrics, options, tasks
from fairseq.trainer import Trainer


def main() -> None:
    """Times both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=10)
    own, flags = parser.parse_known_args()
    torch.set_num_threads(own.threads)
    logging.disable()
    args = options.parse_args_and_arch(options.get_training_parser(), flags)
    task = tasks.setup_task(args)
    trainer = Trainer(args, task, task.build_model(args), task.build_criterion(args))
    iterator = trainer.get_train_iterator(0).next_epoch_itr(shuffle=False)
    batches = list(itertools.islice(iterator, own.batches))
    seconds = side_by_side(ways(trainer, batches), own.repeats)
    tokens = sum(batch["ntokens"] for batch in batches)
    bare = next(iter(seconds.values()))
    rows = [
        {"what": name, "tokens/s": tokens / spent, "of the bare passes": bare / spent}
        for name, spent in seconds.items()
    ]
    parameters = sum(parameter.numel() for parameter in trainer.get_model().parameters())
    print(conditions(), f"; {own.threads} thread(s), {tokens} tokens, {parameters / 1e6:.1f} M parameters", sep="")
    print(table(rows))


def ways(trainer: Trainer, batches: list[dict[str, Any]]) -> dict[str, Callable[[], object]]:
    """The functions to time, over all batches."""
    model, criterion = trainer.get_model(), trainer.get_criterion()

    def bare() -> None:
        model.train()
        for batch in batches:
            model.zero_grad()
            loss, *_ = criterion(model, batch)
            loss.backward()

    def updates() -> None:
        with metrics.aggregate("train"):
            for batch in batches:
                trainer.train_step([batch])

    return {"forward and backward": bare, "train.py": updates}


if __name__ == "__main__":
    run(main)
