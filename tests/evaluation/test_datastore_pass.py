"""Saving a datastore: which tokens, in which order, the golden bundle's own keys and values, continuing after a kill,
and the sentence mode with subwords."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq.evaluation.datastore_pass import stored_rows
from fairseq.evaluation.lm_scoring import LMScoring

ENTRIES, DIMENSION = 16938, 32
SAVE = shlex.split(
    "--path checkpoints/checkpoint_best.pt --sample-break-mode none --max-tokens 128 --softmax-batch 1024 "
    "--batch-size 2 --gen-subset train --context-window 64 --tokens-per-sample 64 --knn-keytype last_ffn_input "
    "--save-knnlm-dstore --dstore-fp16 --no-progress-bar"
)


def blocks(tokens: int, size: int) -> np.ndarray:
    """Lengths of the samples of `--sample-break-mode none`."""
    return np.diff(np.append(np.arange(0, tokens, size), tokens))


@pytest.mark.parametrize(
    ("tokens", "window", "block", "entries"),
    [
        (103_227_021, 1536, 1536, 103_225_485),  # WikiText-103: 67,205 full blocks and one of 141, less the first
        (17_002, 64, 64, ENTRIES),  # the golden bundle
        (100, 0, 32, 100),
        (100, 32, 32, 68),
        (100, 48, 16, 52),  # three blocks are needed to fill the window
        (100, 16, 32, 68),
        (30, 32, 32, 0),
    ],
)
def test_published_sizes(tokens: int, window: int, block: int, entries: int) -> None:
    rows = stored_rows(blocks(tokens, block), window, block)
    assert rows.sum() == entries
    stored = np.flatnonzero(rows)
    np.testing.assert_array_equal(stored, np.arange(len(rows))[len(rows) - len(stored) :])  # contiguous, to the end


def test_without_a_window_every_token_is_stored() -> None:
    lengths = np.array([3, 900, 1])
    np.testing.assert_array_equal(stored_rows(lengths, 0, 10), lengths)


def test_overlong_samples_have_no_full_context() -> None:
    np.testing.assert_array_equal(stored_rows(np.array([10, 10, 11, 10]), 10, 10), [0, 10, 0, 10])


@pytest.fixture(scope="module")
def saved(run_cli: Any, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden datastore, saved again by the original command."""
    folder = tmp_path_factory.mktemp("saved")
    flags = ["--dstore-mmap", folder / "dstore16", "--dstore-size", ENTRIES]
    done = run_cli("eval_lm", ["data-bin", *SAVE, *flags], cwd=golden)
    assert done.status == 0, done.stderr
    return folder


def test_golden_values(saved: Path, golden: Path) -> None:
    ours = (saved / "dstore16_vals.npy").read_bytes()
    assert ours == (golden / "checkpoints" / "dstore16_vals.npy").read_bytes()


def test_golden_keys(saved: Path, golden: Path) -> None:
    """Equal but for the last bit of a few: float32 results on two sides of a rounding border."""
    ours = np.fromfile(saved / "dstore16_keys.npy", "<f2").reshape(ENTRIES, DIMENSION)
    theirs = np.fromfile(golden / "checkpoints" / "dstore16_keys.npy", "<f2").reshape(ENTRIES, DIMENSION)
    different = ours != theirs
    assert different.mean() < 1e-3
    apart = np.abs(ours.astype(np.float32) - theirs.astype(np.float32))
    assert (apart <= np.maximum(np.spacing(np.abs(theirs)), np.spacing(np.abs(ours))).astype(np.float32)).all()


def test_description(saved: Path) -> None:
    description = json.loads((saved / "dstore16.json").read_text())
    assert description["kind"] == "datastore"
    assert (description["rows"], description["filled_rows"], description["dimension"]) == (ENTRIES, ENTRIES, DIMENSION)
    assert description["key_type"] == "last_ffn_input"
    assert sorted(path.name for path in saved.iterdir()) == ["dstore16.json", "dstore16_keys.npy", "dstore16_vals.npy"]


def test_size_may_be_left_out(saved: Path, run_cli: Any, golden: Path, tmp_path: Path) -> None:
    done = run_cli("eval_lm", ["data-bin", *SAVE, "--dstore-mmap", tmp_path / "dstore16"], cwd=golden)
    assert done.status == 0, done.stderr
    for name in ("dstore16_keys.npy", "dstore16_vals.npy"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


class Killed(BaseException):
    """Something that no program expects."""


@pytest.mark.parametrize("batches", [1, 50, 131])
def test_going_on_after_a_kill(
    batches: int, saved: Path, run_cli: Any, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again: the same bytes, and what was stored is not computed again."""
    arguments = ["data-bin", *SAVE, "--dstore-mmap", tmp_path / "dstore16", "--dstore-size", ENTRIES]
    keys = LMScoring.keys
    calls = 0

    def failing(self: LMScoring, sample: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > batches:
            raise Killed
        return keys(self, sample)

    monkeypatch.setattr(LMScoring, "keys", failing)
    with pytest.raises(Killed):
        run_cli("eval_lm", arguments, cwd=golden)
    assert not (tmp_path / "dstore16_keys.npy").exists()
    first, calls = calls - 1, -10_000
    done = run_cli("eval_lm", arguments, cwd=golden)
    assert done.status == 0, done.stderr
    assert first + (calls + 10_000) in (133, 134)  # the batch without entries before the first safe row may be repeated
    for path in saved.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(("size", "kept"), [(20_000, ENTRIES), (5_000, 5_000)])
def test_another_size_than_the_text_has(
    size: int, kept: int, saved: Path, run_cli: Any, golden: Path, tmp_path: Path
) -> None:
    """Too large: the tail stays zero, as in the original. Too small: the first entries."""
    flags = ["--dstore-mmap", tmp_path / "dstore16", "--dstore-size", size]
    done = run_cli("eval_lm", ["data-bin", *SAVE, *flags], cwd=golden)
    assert done.status == 0, done.stderr
    assert "WARNING" in done.stderr
    values = np.fromfile(tmp_path / "dstore16_vals.npy", "<i8")
    assert len(values) == size
    np.testing.assert_array_equal(values[:kept], np.fromfile(saved / "dstore16_vals.npy", "<i8")[:kept])
    assert not values[kept:].any()


@pytest.fixture(scope="module")
def pieces(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden folder with some words renamed to subwords that continue ("the@@")."""
    folder = tmp_path_factory.mktemp("pieces")
    shutil.copytree(golden / "data-bin", folder / "data-bin")
    lines = (folder / "data-bin" / "dict.txt").read_text().splitlines()
    renamed = [line.replace(" ", "@@ ", 1) if number % 5 == 0 else line for number, line in enumerate(lines)]
    (folder / "data-bin" / "dict.txt").write_text("\n".join(renamed) + "\n")
    return folder


def test_sentence_mode_with_pieces_of_words(pieces: Path, run_cli: Any, golden: Path, tmp_path: Path) -> None:
    """`--sample-break-mode eos --remove-bpe`, where the original could not save: one entry per token, sentences in
    ascending order of length; then an index, and an evaluation per word."""
    common = ["--path", golden / "checkpoints" / "checkpoint_best.pt", "--sample-break-mode", "eos", "--remove-bpe"]
    common += ["--max-tokens", 512, "--no-progress-bar"]
    prefix = tmp_path / "law"
    save = ["--save-knnlm-dstore", "--dstore-mmap", prefix, "--dstore-fp16", "--gen-subset", "train"]
    done = run_cli("eval_lm", ["data-bin", *common, *save], cwd=pieces)
    assert done.status == 0, done.stderr
    values = np.fromfile(tmp_path / "law_vals.npy", "<i8")
    assert len(values) == 17_002
    ends = np.flatnonzero(values == 2)
    lengths = np.diff(np.concatenate([[-1], ends]))
    assert len(ends) == 1548
    assert (np.diff(lengths) >= 0).all()

    build = ["--dstore_mmap", prefix, "--ncentroids", 32, "--code_size", 8, "--faiss_index", tmp_path / "law.index"]
    done = run_cli("build_dstore", [*build, "--no-progress-bar"], cwd=pieces)
    assert done.status == 0, done.stderr

    counts, losses = [], []
    use = ["--knnlm", "--dstore-filename", prefix, "--indexfile", tmp_path / "law.index", "--k", 64, "--lmbda", 0.25]
    for flags in ([], [*use, "--knn-sim-func", "do_not_recomp_l2"], [*use, "--no-pointer"]):
        results = tmp_path / "results.json"
        words = ["data-bin", *common, "--gen-subset", "valid", "--results-json", results, *flags]
        done = run_cli("eval_lm", words, cwd=pieces)
        assert done.status == 0, done.stderr
        content = json.loads(results.read_text())
        figures = next(part for part in (content, *content.values()) if isinstance(part, dict) and "loss_base2" in part)
        assert figures["unit"] == "word"
        counts.append(figures["count"])
        losses.append(figures["loss_base2"])
    assert len(set(counts)) == 1
    assert 117 < counts[0] < 1243  # at least a word for each sentence's end, fewer than there are tokens
    assert losses[1] < losses[0]
    assert losses[2] < losses[0]
