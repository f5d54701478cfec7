"""Where fairseq silently does something surprising on which published numbers depend, this package does the same, with
a warning; where no numbers depend on it, a meaningless run is refused."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

LM = "data-bin --path checkpoints/checkpoint_best.pt --gen-subset test --max-tokens 512 --no-progress-bar "
KNN = (
    LM + "--sample-break-mode complete --context-window 96 --knnlm --dstore-filename checkpoints/dstore16 "
    "--dstore-fp16 --dstore-size 16938 --indexfile checkpoints/knn16.index --k 32 --knn-sim-func do_not_recomp_l2 "
    "--no-load-keys "
)
TRAIN = (
    "data-bin --task language_modeling --arch transformer_lm --decoder-embed-dim 8 --decoder-ffn-embed-dim 8 "
    "--decoder-layers 1 --decoder-attention-heads 1 --lr 0.1 --clip-norm 1 --max-update 1 --no-save --no-progress-bar "
    "--disable-validation --required-batch-size-multiple 1 "
)


def warnings(run_cli: Any, golden: Any, command: str, flags: str) -> list[str]:
    """The warnings of a command that ends well."""
    done = run_cli(command, shlex.split(flags), cwd=golden)
    assert done.status == 0, done.stderr
    return re.findall(r" \| WARNING \| \S+ \| (.*)", done.stdout + done.stderr)


def test_long_blocks_are_skipped_in_evaluation(run_cli: Any, golden: Any) -> None:
    overrides = "--model-overrides \"{'tokens_per_sample': 8, 'max_target_positions': 8}\" --sample-break-mode eos"
    said, counted = warnings(run_cli, golden, "eval_lm", LM + overrides)
    assert re.match(r"\d+ samples have invalid sizes and will be skipped, max_positions=8, first few", said)
    assert re.match(r"36 samples \(483 tokens\) are skipped", counted)


def test_long_blocks_are_skipped_in_a_datastore(run_cli: Any, golden: Any, tmp_path: Any) -> None:
    overrides = "--model-overrides \"{'tokens_per_sample': 8, 'max_target_positions': 8}\" --sample-break-mode eos "
    flags = f"--save-knnlm-dstore --dstore-mmap {tmp_path}/d --dstore-fp16"
    said = warnings(run_cli, golden, "eval_lm", LM + overrides + flags)
    assert any(re.match(r"36 samples \(483 tokens\) are skipped", line) for line in said)


def test_long_blocks_are_skipped_in_training(run_cli: Any, golden: Any) -> None:
    flags = TRAIN + "--sample-break-mode eos --max-tokens 64 --tokens-per-sample 8"
    (said,) = warnings(run_cli, golden, "train", flags)
    assert re.match(r"\d+ samples have invalid sizes and will be skipped, max_positions=", said)


def test_long_blocks_in_validation_are_refused_unless_told(run_cli: Any, golden: Any) -> None:
    flags = TRAIN.replace("--disable-validation", "") + "--sample-break-mode eos --max-tokens 64 --tokens-per-sample 8"
    assert "--skip-invalid-size-inputs-valid-test" in run_cli("train", shlex.split(flags), cwd=golden).error


@pytest.mark.parametrize(
    "flags, warned",
    [
        ("--tokens-per-sample 64", True),
        ("--tokens-per-sample 128", False),  # the checkpoint's
        ("--tokens-per-sample 32 --context-window 96", False),  # what remains of the checkpoint's
        ("--tokens-per-sample 64 --context-window 96", True),
    ],
)
def test_tokens_per_sample_is_the_checkpoints(run_cli: Any, golden: Any, flags: str, warned: bool) -> None:
    said = warnings(run_cli, golden, "eval_lm", LM + flags)
    assert len(said) == warned
    if warned:
        assert "--tokens-per-sample 64 is ignored" in said[0] and "--model-overrides" in said[0]


def test_a_missing_checkpoint_means_a_new_training(run_cli: Any, golden: Any, tmp_path: Any) -> None:
    flags = TRAIN + f"--max-tokens 512 --tokens-per-sample 64 --save-dir {tmp_path} "
    assert warnings(run_cli, golden, "train", flags) == []  # checkpoint_last.pt: the usual first start
    (said,) = warnings(run_cli, golden, "train", flags + "--restore-file nothing.pt")
    assert "found no file at nothing.pt" in said and "from scratch" in said


def test_a_weight_of_zero_says_that_retrieval_does_nothing(run_cli: Any, golden: Any) -> None:
    """--lmbda is 0 unless given."""
    (said,) = warnings(run_cli, golden, "eval_lm", KNN + "--no-pointer")
    assert "--lmbda" in said and "no weight" in said
    assert warnings(run_cli, golden, "eval_lm", KNN + "--no-pointer --lmbda 0.25") == []


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--min-knns 0", "--min-knns 0: the index is never searched"),
        ("--min-knns 64 --max-knns 16", "--max-knns 16 is below --min-knns 64"),
        ("--no-pointer --members checkpoints/kmeans_s40000000_k400_members.pkl", "--members is not used"),
    ],
)
def test_pointer_flags_that_defeat_each_other(run_cli: Any, golden: Any, flags: str, said: str) -> None:
    found = warnings(run_cli, golden, "eval_lm", KNN + "--lmbda 0.25 " + flags)
    assert len(found) == 1 and said in found[0]


def test_shards_would_break_the_context(run_cli: Any, golden: Any) -> None:
    flags = LM + "--context-window 96 --num-shards 2"
    assert "--num-shards" in run_cli("eval_lm", shlex.split(flags), cwd=golden).error


def test_a_window_that_leaves_no_room_is_refused(run_cli: Any, golden: Any) -> None:
    assert "--context-window" in run_cli("eval_lm", shlex.split(LM + "--context-window 128"), cwd=golden).error


def test_more_lists_than_there_are(run_cli: Any, golden: Any) -> None:
    said = warnings(run_cli, golden, "eval_lm", KNN + "--lmbda 0.25 --probe 999")
    assert any(re.match(r"--probe 999: \S+ has \d+ lists, and all of them are searched", line) for line in said)


def test_no_weight_for_the_model(run_cli: Any, golden: Any) -> None:
    said = warnings(run_cli, golden, "eval_lm", KNN + "--lmbda 1")
    assert "--lmbda 1: the model has no weight, so words that retrieval does not find are impossible" in said
