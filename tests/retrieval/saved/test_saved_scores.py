"""Scores and searches on disk: what was written is read again, bit for bit; what is unfinished or does not fit is
refused; a search that was killed is continued."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairseq.errors import BadFile, BadFlag, MissingFile, UserError
from fairseq.files.array_stream import ArrayStream, open_array
from fairseq.retrieval.saved import searches
from fairseq.retrieval.saved.scores import ScoreCache, ScoreWriter
from fairseq.retrieval.saved.searches import SearchCache, saved_searches
from fairseq.scored_sequences import ScoredSequence, lockstep_groups
from tests.descriptions import edit_description

LENGTHS = {7: 3, 2: 1, 4: 0, 9: 5}  # by sample, in the order of evaluation
TOKENS = sum(LENGTHS.values())


def sequences(dtype: torch.dtype = torch.float32) -> list[ScoredSequence]:
    torch.manual_seed(0)
    return [
        ScoredSequence(sample, torch.randn(n, 4).to(dtype), torch.randint(0, 70000, (n,)), -torch.rand(n))
        for sample, n in LENGTHS.items()
    ]


def write(folder: Path, dtype: torch.dtype = torch.float32) -> list[ScoredSequence]:
    writer = ScoreWriter(str(folder))
    for sequence in sequences(dtype):
        writer.add(sequence, np.arange(len(sequence)) % 2 == 0)
    writer.finish({"models": ["abc"], "vocabulary": 70000})
    return sequences(dtype)


class CountingIndex:
    """Entry i is at distance |q_0 - i|; counts the queries and fails after `limit` calls."""

    size, dimension, inner_product = 50, 4, False

    def __init__(self, limit: int = 99) -> None:
        self.asked, self.calls, self.limit = 0, 0, limit

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        if self.calls > self.limit:
            raise KeyboardInterrupt
        self.asked += len(queries)
        distances = (queries[:, :1] - torch.arange(self.size)).abs()
        return torch.topk(distances, k, largest=False)

    def distances(self, queries: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return (queries[rows, 0] - ids).abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_was_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    written = write(tmp_path / "s", dtype)
    cache = ScoreCache.open(str(tmp_path / "s"))
    assert len(cache) == TOKENS and cache.dimension == 4 and cache.words == 6
    assert cache.info["vocabulary"] == 70000
    for one, other in zip(cache.sequences(), written, strict=True):
        assert one.sample_id == other.sample_id
        assert one.queries.dtype == dtype
        for name in ("queries", "targets", "lm_log_probs"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert not list((tmp_path / "s").glob("*.tmp"))
    assert np.load(tmp_path / "s" / "queries.npy", mmap_mode="r").shape == (TOKENS, 4)


def test_unfinished_scores_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "s")
    writer = ScoreWriter(str(tmp_path / "s"))
    writer.add(sequences()[0], np.ones(3, bool))
    with pytest.raises(BadFile, match=r"no scores\.json"):
        ScoreCache.open(str(tmp_path / "s"))


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sequences"):
        ScoreWriter(str(tmp_path / "s")).finish({})
    (tmp_path / "file").touch()
    with pytest.raises(BadFile, match="a file"):
        ScoreWriter(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("targets", np.zeros(TOKENS - 1, "<i4")),
        ("targets", np.zeros(TOKENS, "<i8")),
        ("queries", np.zeros((TOKENS, 3), "<f4")),
        ("lengths", np.array([1, 1, 1, 1])),
        ("lengths", np.array([-1, 1, 1, TOKENS - 1])),
        ("sample_ids", np.array([7, 7, 4, 9])),
        ("lm_log_probs", np.array([None] * TOKENS)),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, name: str, array: np.ndarray) -> None:
    write(tmp_path / "s")
    np.save(tmp_path / "s" / f"{name}.npy", array, allow_pickle=True)
    with pytest.raises(BadFile, match=name):
        ScoreCache.open(str(tmp_path / "s"))


def test_searches_in_memory() -> None:
    index: Any = CountingIndex()
    cache = SearchCache.of(sequences(), index, 5)
    sample_ids, positions = torch.tensor([9, 7, 9]), torch.tensor([4, 0, 0])
    queries = torch.stack([sequences()[3].queries[4], sequences()[0].queries[0], sequences()[3].queries[0]])
    for k in (5, 2):
        distances, ids = cache.look_up(sample_ids, positions, k)
        expected = index.search(queries, k)
        assert torch.equal(ids, expected[1]) and torch.equal(distances, expected[0])
    with pytest.raises(BadFlag, match="--k"):
        cache.look_up(sample_ids, positions, 6)


def test_searches_on_disk_are_made_once(tmp_path: Path) -> None:
    write(tmp_path / "s")
    scores, index = ScoreCache.open(str(tmp_path / "s")), CountingIndex()
    first = saved_searches(scores, index, 5, {"index": "a"}, show_progress=False)
    assert index.asked == TOKENS
    saved_searches(scores, index, 3, {"index": "a"}, show_progress=False)
    assert index.asked == TOKENS
    saved_searches(scores, index, 5, {"index": "b"}, show_progress=False)  # another index has its own
    saved_searches(scores, index, 6, {"index": "a"}, show_progress=False)  # and more neighbours need another search
    assert index.asked == 3 * TOKENS
    in_memory = SearchCache.of(sequences(), index, 5)
    np.testing.assert_array_equal(first.ids, in_memory.ids)
    np.testing.assert_array_equal(first.distances, in_memory.distances)


def test_searches_of_other_scores_are_made_again(tmp_path: Path) -> None:
    index = CountingIndex()
    for model in ("abc", "def"):
        write(tmp_path / "s")
        edit_description(tmp_path / "s" / "scores.json", models=[model])
        saved_searches(ScoreCache.open(str(tmp_path / "s")), index, 5, {}, show_progress=False)
    assert index.asked == 2 * TOKENS


def test_a_killed_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searches, "CHUNK_NUMBERS", 10)  # two tokens a call
    monkeypatch.setattr(searches, "SAFE_POINT_SECONDS", -1)
    write(tmp_path / "s")
    scores, killed, again = ScoreCache.open(str(tmp_path / "s")), CountingIndex(limit=2), CountingIndex()
    with pytest.raises(KeyboardInterrupt):
        saved_searches(scores, killed, 5, {}, show_progress=False)
    (folder,) = (tmp_path / "s").glob("searches-*")
    assert not (folder / "searches.json").exists() and not (folder / "ids.npy").exists()
    found = saved_searches(scores, again, 5, {}, show_progress=False)
    assert (killed.asked, again.asked) == (4, TOKENS - 4)
    np.testing.assert_array_equal(found.ids, SearchCache.of(sequences(), again, 5).ids)
    assert sorted(path.name for path in folder.iterdir()) == ["distances.npy", "ids.npy", "searches.json"]


def test_searches_of_another_datastore_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "s")
    scores, index = ScoreCache.open(str(tmp_path / "s")), CountingIndex()
    saved_searches(scores, index, 5, {}, show_progress=False)
    index.size = 2
    with pytest.raises(BadFile, match="ids from -1 to 1"):
        saved_searches(scores, index, 5, {}, show_progress=False)


def test_array_stream_continues_and_checks(tmp_path: Path) -> None:
    path = str(tmp_path / "a.npy")
    stream = ArrayStream(path, "<i4", (2,))
    stream.append(np.arange(6).reshape(3, 2))
    stream.close()
    digest = hashlib.blake2b(np.arange(4, dtype="<i4").tobytes(), digest_size=16).hexdigest()
    again = ArrayStream(path, "<i4", (2,), rows=2, digest=digest)
    again.append(np.array([[8, 9]]))
    again.finish()
    np.testing.assert_array_equal(np.load(path), [[0, 1], [2, 3], [8, 9]])
    with pytest.raises(BadFile, match="3 rows"):
        ArrayStream(path, "<i4", (2,), rows=3)
    with pytest.raises(MissingFile):
        open_array(str(tmp_path / "b.npy"), ("<i4",), (1,))


def test_groups_that_advance_together() -> None:
    grouped = [[len(sequence) for sequence in group] for group in lockstep_groups(sequences(), 4)]
    assert grouped == [[3, 1, 0], [5]]
    assert list(lockstep_groups([], 4)) == []
