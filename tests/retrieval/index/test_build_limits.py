"""Builds that FAISS could not do, or in which it would end the process: one sentence before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq.errors import BadFile, UserError
from fairseq.retrieval.clusters.kmeans import ALGORITHMS, KMeansRecipe, cluster_keys
from fairseq.retrieval.datastore import Datastore
from fairseq.retrieval.index.build_index import IndexBuilder, IndexRecipe

WIDTH = 32


def datastore(folder: Path, rows: int, **changes: Any) -> Datastore:
    keys = np.random.default_rng(0).standard_normal((rows, WIDTH)).astype(np.float32)
    for row, number in changes.items():
        keys[int(row.removeprefix("row")), 0] = number
    keys.tofile(folder / "d_keys.npy")
    np.full(rows, 5).tofile(folder / "d_vals.npy")
    return Datastore.open(str(folder / "d"), rows, WIDTH)


@pytest.mark.parametrize(
    ("rows", "flags", "says"),
    [
        (255, {}, r"found 255 keys, expected at least 256, .*--index exact"),
        (10, {}, r"found 10 keys, expected at least 256"),
        (15, {"fast": True, "pca": 8, "code_size": 4}, r"found 15 keys, expected at least 16"),
        (20, {"fast": True}, r"found 20 keys, expected at least 32, .* and their rotation"),
        (300, {"ncentroids": 301}, r"--ncentroids: found 301, expected at most the datastore's 300 entries; .*--index"),
        (20, {"pca": 24}, r"--pca: found 24, expected at most the datastore's 20 entries"),
        (300, {"pca": 33}, r"--pca: found 33, expected at most the keys' dimension 32"),
        (300, {"code_size": 7}, r"--code_size: found 7, expected a divisor of the dimension 32; give --code_size 4"),
        (300, {"code_size": 32, "fast": True}, r"--code_size: found 32, expected a divisor of half the dimension"),
    ],
)
def test_too_little_for_training(rows: int, flags: dict[str, Any], says: str, tmp_path: Path) -> None:
    fields = {"ncentroids": 1, "code_size": 8, "probe": 1, "seed": 1, **flags}
    store = datastore(tmp_path, rows)
    with pytest.raises(UserError, match=says):
        IndexBuilder(store, str(tmp_path / "i"), IndexRecipe(**fields), rows, 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d_keys.npy", "d_vals.npy"]


@pytest.mark.parametrize("fast", [False, True])
def test_just_enough(tmp_path: Path, fast: bool) -> None:
    rows = WIDTH if fast else 256
    recipe = IndexRecipe(1, 8, 1, 1, fast=fast)
    index = IndexBuilder(datastore(tmp_path, rows), str(tmp_path / "i"), recipe, rows, 1000).build(False)
    assert index.ntotal == rows


@pytest.mark.parametrize("number", [np.nan, np.inf, 3e38, -3e38])
@pytest.mark.parametrize("row", [0, 299])
@pytest.mark.parametrize("fast", [False, True])
def test_keys_that_are_no_numbers_are_not_indexed(tmp_path: Path, number: float, row: int, fast: bool) -> None:
    store = datastore(tmp_path, 300, **{f"row{row}": number})
    builder = IndexBuilder(store, str(tmp_path / "i"), IndexRecipe(2, 8, 1, 1, fast=fast), 300, 100)
    with pytest.raises(BadFile, match=f"d_keys.npy: found the key of row {row},"):
        builder.build(False)


@pytest.mark.parametrize("number", [np.nan, np.inf, 3e38, -3e38])
@pytest.mark.parametrize("sample", [40, 300])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_keys_that_are_no_numbers_are_not_clustered(
    tmp_path: Path, number: float, sample: int, algorithm: str
) -> None:
    store = datastore(tmp_path, 300, row17=number)
    recipe = KMeansRecipe(10, sample, 2, 1, algorithm)
    with pytest.raises(BadFile, match="d_keys.npy: found the key of row 17,"):
        cluster_keys(store.require_keys("this"), recipe, 90, False, source=str(tmp_path / "d_keys.npy"))
