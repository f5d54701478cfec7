"""Flags that later versions of fairseq renamed: either name, the same run (the 0.9 names come first)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fairseq import options

TASK = "data --task language_modeling --arch transformer_lm_wiki103 --optimizer adam --lr-scheduler cosine "


def parsed(get_parser: Callable[[], Any], flags: str) -> dict[str, Any]:
    return vars(options.parse_args_and_arch(get_parser(), shlex.split(flags)))


@pytest.mark.parametrize(
    "old, new",
    [
        ("--max-sentences 4", "--batch-size 4"),
        ("--max-sentences-valid 4", "--batch-size-valid 4"),
        ("--weight-decay 0.1", "--wd 0.1"),
        ("--max-update 5 --max-epoch 2", "--mu 5 --me 2"),
        ("--lr 0.1", "--learning-rate 0.1"),
        ("--lr 0.1,0.2", "--lr [0.1,0.2]"),
        ("--update-freq 2", "--update-freq [2]"),
        ("--device-id 1", "--local_rank 1"),
        ("--ddp-backend=no_c10d", "--ddp-backend no_c10d"),
        ("--activation-dropout 0.2", "--relu-dropout 0.2"),
    ],
)
def test_training_aliases(old: str, new: str) -> None:
    both = [parsed(options.get_training_parser, TASK + flags) for flags in (old, new)]
    assert both[0] == both[1]
    assert both[0] != parsed(options.get_training_parser, TASK)


@pytest.mark.parametrize(
    "old, new",
    [
        ("--remove-bpe", "--post-process"),
        ("--remove-bpe '@@ '", "--post-process '@@ '"),
        ("--remove-bpe subword_nmt", "--post-process subword_nmt"),
        ("--max-sentences 4", "--batch-size 4"),
    ],
)
def test_evaluation_aliases(old: str, new: str) -> None:
    both = [parsed(options.get_eval_lm_parser, f"data --path x {flags} --quiet") for flags in (old, new)]
    assert both[0] == both[1]
    assert both[0] != parsed(options.get_eval_lm_parser, "data --path x --quiet")


def test_the_newer_bare_flag_counts_the_same_words(run_cli: Any, golden: Any) -> None:
    """The bare `--post-process` of later versions means subword_nmt, the older `--remove-bpe` "@@ ": one marker."""
    losses = set()
    for flag in (["--remove-bpe"], ["--post-process"], ["--post-process", "subword_nmt"], ["--remove-bpe", "@@"]):
        words = ["data-bin", "--path", "checkpoints/checkpoint_best.pt", "--sample-break-mode", "eos", *flag]
        done = run_cli("eval_lm", words, cwd=golden)
        losses |= set(re.findall(r"Loss \(base 2\): (\S+),", done.stderr))
    assert len(losses) == 1


SMALL = (
    "--task language_modeling --arch transformer_lm_wiki103 --decoder-embed-dim 16 --decoder-input-dim 16 "
    "--decoder-output-dim 16 --decoder-ffn-embed-dim 32 --decoder-layers 1 --decoder-attention-heads 2 "
    "--adaptive-input-cutoff 300,900 --adaptive-softmax-cutoff 300,900 --criterion adaptive_loss --optimizer nag "
    "--lr-scheduler cosine --t-mult 2 --lr-period-updates 4 --lr-shrink 0.75 --warmup-updates 2 --warmup-init-lr 1e-07 "
    "--clip-norm 0.1 --max-tokens 256 --tokens-per-sample 64 --max-update 8 --disable-validation --no-progress-bar "
    "--sample-break-mode none --skip-invalid-size-inputs-valid-test --no-epoch-checkpoints --log-interval 1 "
)
OLDER = "--lr 0.0001 --max-lr 1.0 --min-lr 1e-09 --ddp-backend=no_c10d"
NEWER = "--lr 1.0 --min-lr 0.0001 --stop-min-lr 1e-09 --ddp-backend=legacy_ddp"


def test_the_recipe_in_both_spellings_gives_one_model(run_cli: Any, golden: Any, tmp_path: Any) -> None:
    weights, rates = [], []
    for name, flags in (("older", OLDER), ("newer", NEWER)):
        words = [golden / "data-bin", *shlex.split(SMALL + flags), "--save-dir", tmp_path / name]
        done = run_cli("train", words)
        assert done.status == 0, done.stderr
        rates.append(re.findall(r" lr=([\d.e-]+),", done.stdout))
        state = torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=False)
        weights.append(state["model"])
    assert rates[0] == rates[1] and len(set(rates[0])) > 4
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


def test_the_newer_spelling_stops_at_its_own_flag(run_cli: Any, golden: Any, tmp_path: Any) -> None:
    """With --lr as the peak, --min-lr is cosine's smallest rate and does not end the training; --stop-min-lr does."""
    for stop, updates in (("1e-9", 8), ("0.9", 0)):
        words = shlex.split(SMALL + NEWER.replace("--stop-min-lr 1e-09", f"--stop-min-lr {stop}") + " --no-save")
        done = run_cli("train", [golden / "data-bin", *words, "--save-dir", tmp_path / stop])
        assert done.status == 0, done.stderr
        found = re.findall(r"num_updates (\d+)", done.stdout)
        assert (int(found[-1]) if found else 0) == updates
