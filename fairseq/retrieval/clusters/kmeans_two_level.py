"""k-means that compares a key with neighbouring centroids only, not with all: `kmeans.py --algorithm two-level`.

The first half of the iterations computes centroids on two levels: about sqrt(K) cells, then the clusters of each cell
separately. The second half corrects assignments at the borders of cells: centroids form groups of about two, and a key
is compared with the centroids nearest to the group of its present centroid. An iteration therefore costs NEIGHBOURS
distances per key, independently of K, and the result is as good as that of k-means over all centroids
(`benchmarks/kmeans.py`). The first centroid of a key is found by an inverted file of centroids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fairseq.retrieval.clusters.kmeans_state import KMeansState
from fairseq.retrieval.faiss_import import require_faiss

GROUP = 2  # centroids in a group, on average
NEIGHBOURS = 128  # centroids that a key is compared with in an iteration
REGROUP = 4  # number of iterations after which groups are formed again
GROUP_ITERATIONS = 5  # of the small k-means runs that form groups
ROWS = 2048  # keys multiplied at a time, so that their scores fit in the processor's cache
EXHAUSTIVE = 1 << 31  # pairs up to which the centroids nearest to groups are searched exhaustively
CELLS_PROBED = {"first": 4, "final": 8}  # of 2 sqrt(K); 8 find the nearest centroid for 998 of 1000 keys
SEARCHED_AT_ONCE = 1 << 16
SPLIT = 1 / 1024  # relative distance between the two centroids of a split cluster, as in FAISS

Advance = Callable[[int], Any]


def lloyd(points: NDArray[np.float32], count: int, iterations: int, seed: int, **more: Any) -> NDArray[np.float32]:
    """(count, D) float32: centroids of `points` (n, D) by FAISS's k-means, on a GPU when FAISS has one.

    more: `init_centroids` (count, D), the initial centroids."""
    faiss = require_faiss()
    gpu = hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0
    settings = {"niter": iterations, "seed": seed, "gpu": gpu, "min_points_per_centroid": 1}  # the last only warns
    kmeans = faiss.Kmeans(points.shape[1], count, **settings)
    kmeans.train(points, **more)
    centroids: NDArray[np.float32] = kmeans.centroids
    return centroids


def train(
    sample: NDArray[np.float32], clusters: int, iterations: int, seed: int, state: KMeansState, verbose: bool
) -> None:
    """Computes centroids (clusters, D) float32 of `sample` (n, D) into state.arrays["centroids"], continuing from
    `state`.

    The state is saved between cells and between iterations."""
    hidden = None if verbose else True
    first = iterations // 2
    if "centroids" not in state.arrays:
        _two_levels(sample, clusters, first, seed, state, hidden)
    keys = torch.from_numpy(sample)
    done = int(state.arrays.get("iteration", 0))
    total = (iterations - first) * len(sample)
    bar = tqdm(total=total, initial=done * len(sample), unit="keys", unit_scale=True, desc="refining", disable=hidden)
    with bar:
        centroids = torch.from_numpy(state.arrays["centroids"])
        if done == 0:
            assigned = torch.from_numpy(InvertedFile(state.arrays["centroids"], seed, "first").nearest(sample))
            graph = Graph(centroids, seed)
        else:
            assigned = torch.from_numpy(state.arrays["assigned"]).long()
            graph = Graph(centroids, seed, torch.from_numpy(state.arrays["group_of"]))
        for iteration in range(done, iterations - first):
            if iteration % REGROUP == 0 and iteration:
                graph = Graph(graph.centroids, seed)
            graph.move(refine(keys, graph, assigned, bar.update))
            state.update(
                centroids=graph.centroids, assigned=assigned.int(), group_of=graph.group_of, iteration=iteration + 1
            )


def _two_levels(
    sample: NDArray[np.float32], clusters: int, iterations: int, seed: int, state: KMeansState, hidden: bool | None
) -> None:
    """The first half of the iterations: both levels, resumable after each cell."""
    if "cell" not in state.arrays:
        centroids = lloyd(sample, max(1, round(clusters**0.5)), iterations, seed)
        state.update(cells=len(centroids), cell=nearest(sample, centroids).astype(np.int32), parts=sample[:0], next=0)
    cells, cell, next_cell = int(state.arrays["cells"]), state.arrays["cell"], int(state.arrays["next"])
    parts = [state.arrays["parts"]]
    by_cell = Cells(cell, cells, clusters)
    begun = int(by_cell.bounds[next_cell])
    with tqdm(total=len(sample), initial=begun, unit="keys", unit_scale=True, desc="clustering", disable=hidden) as bar:
        for number in range(next_cell, cells):
            parts.append(by_cell.clusters_of(sample, number, iterations, seed))
            bar.update(int(by_cell.bounds[number + 1] - by_cell.bounds[number]))
            if state.due:
                parts = [np.concatenate(parts)]
                state.update(cells=cells, cell=cell, parts=parts[0], next=number + 1)
    state.update(centroids=np.concatenate(parts))


def nearest(keys: NDArray[Any], centroids: NDArray[np.float32]) -> NDArray[np.int64]:
    """(n,): number of the nearest of all `centroids` (K, D) for each of `keys` (n, D)."""
    index = require_faiss().IndexFlatL2(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids, np.float32))
    return _search_first(index, keys)


def _search_first(index: Any, keys: NDArray[Any]) -> NDArray[np.int64]:
    found = np.empty(len(keys), np.int64)
    for start in range(0, len(keys), SEARCHED_AT_ONCE):
        some = np.ascontiguousarray(keys[start : start + SEARCHED_AT_ONCE], np.float32)
        found[start : start + len(some)] = index.search(some, 1)[1][:, 0]
    return found


class InvertedFile:
    """An index of centroids (K, D) with 2 sqrt(K) cells, of which a search visits the nearest few. purpose: a key of
    CELLS_PROBED, which gives their number."""

    def __init__(self, centroids: NDArray[np.float32], seed: int, purpose: str) -> None:
        faiss = require_faiss()
        width, cells = centroids.shape[1], max(1, min(len(centroids), round(2 * len(centroids) ** 0.5)))
        self._quantizer = faiss.IndexFlatL2(width)  # FAISS holds no reference to it
        self._quantizer.add(lloyd(centroids, cells, 10, seed))
        self._index = faiss.IndexIVFFlat(self._quantizer, width, cells)
        self._index.is_trained = True
        self._index.nprobe = CELLS_PROBED[purpose]
        self._index.add(np.ascontiguousarray(centroids))
        self._centroids = centroids

    def nearest(self, keys: NDArray[Any]) -> NDArray[np.int64]:
        """(n,): the nearest centroid, with few exceptions, for each of `keys` (n, D)."""
        found = _search_first(self._index, keys)
        missing = np.flatnonzero(found < 0)  # every cell probed was empty
        found[missing] = nearest(np.asarray(keys)[missing], self._centroids)
        return found


@dataclass
class Cells:
    """The first level. order (n,): points sorted by cell; bounds (cells + 1,): cell c has order[bounds[c]:bounds[c +
    1]]; shares (cells,): number of clusters of each cell."""

    order: NDArray[np.int64]
    bounds: NDArray[np.int64]
    shares: NDArray[np.int64]

    def __init__(self, cell: NDArray[Any], cells: int, clusters: int) -> None:
        sizes = np.bincount(cell, minlength=cells)
        self.order = np.argsort(cell, kind="stable")
        self.bounds = np.concatenate([[0], np.cumsum(sizes)])
        self.shares = apportion(sizes, clusters)

    def clusters_of(self, points: NDArray[np.float32], number: int, iterations: int, seed: int) -> NDArray[np.float32]:
        """The second level for one cell: its centroids, (shares[number], D)."""
        members = points[self.order[self.bounds[number] : self.bounds[number + 1]]]
        share = int(self.shares[number])
        if share in (0, len(members)):
            return members[:share]
        return lloyd(members, share, iterations, seed)


def apportion(sizes: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Distributes `total` clusters over groups in proportion to their sizes, by largest remainders, but at most one
    cluster per point of a group. `total` must not exceed the sum of sizes."""
    exact = sizes * (total / sizes.sum())
    shares = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(-(exact - shares), kind="stable")
    shares[by_remainder[: total - shares.sum()]] += 1
    shares = np.minimum(shares, sizes)
    missing = total - shares.sum()
    free = np.cumsum(sizes - shares)  # clusters that did not fit in full groups go to the first groups with free points
    return shares + np.diff(np.minimum(free, missing), prepend=0)


class Graph:
    """Centroids (K, D) float32 in small groups of near ones, and the centroids nearest to each group.

    group_of (K,) int64: the group of each centroid, computed unless given; neighbours (G, NEIGHBOURS) int64."""

    def __init__(self, centroids: Tensor, seed: int, group_of: Tensor | None = None) -> None:
        self.count = -(-len(centroids) // GROUP)
        self.group_of = self._groups(centroids.numpy(), seed) if group_of is None else group_of
        self.move(centroids)

    def _groups(self, points: NDArray[np.float32], seed: int) -> Tensor:
        cells = max(1, round(self.count**0.5))
        cell = nearest(points, lloyd(points, cells, GROUP_ITERATIONS, seed))
        by_cell = Cells(cell, cells, self.count)
        group_of = np.empty(len(points), np.int64)
        begin = 0
        for number in range(cells):  # groups are formed within cells, since comparing all pairs would be too expensive
            inside = by_cell.order[by_cell.bounds[number] : by_cell.bounds[number + 1]]
            centres = by_cell.clusters_of(points, number, GROUP_ITERATIONS, seed)
            if len(inside):
                group_of[inside] = begin + (nearest(points[inside], centres) if len(centres) else 0)
            begin += len(centres)
        return torch.from_numpy(np.minimum(group_of, self.count - 1))

    def move(self, centroids: Tensor) -> None:
        """Replaces the centroids by moved ones; groups keep their members, and neighbours are searched again."""
        self.centroids = centroids
        sizes = torch.bincount(self.group_of, minlength=self.count)
        sums = centroids.new_zeros(self.count, centroids.shape[1]).index_add_(0, self.group_of, centroids)
        centres = sums / sizes.clamp(min=1)[:, None]
        self.neighbours = _nearest_lists(centroids, centres, min(NEIGHBOURS, len(centroids)))


def _nearest_lists(vectors: Tensor, queries: Tensor, count: int) -> Tensor:
    """(queries, count) int64: the nearest of `vectors` to each query, by approximate search when there are very
    many."""
    faiss = require_faiss()
    width = vectors.shape[1]
    index = faiss.IndexFlatL2(width)
    if len(vectors) * len(queries) > EXHAUSTIVE:
        quantizer, lists = index, round(len(vectors) ** 0.5)
        index = faiss.IndexIVFFlat(quantizer, width, lists)
        index.nprobe = 2 * CELLS_PROBED["final"]
        index.train(vectors.numpy())
    index.add(vectors.numpy())
    found = torch.from_numpy(index.search(queries.numpy(), count)[1])
    return torch.where(found < 0, found[:, :1], found)


def refine(keys: Tensor, graph: Graph, assigned: Tensor, advance: Advance | None = None) -> Tensor:
    """One iteration: every key (n, D) goes to the nearest of its group's neighbours, `assigned` (n,) int64 being
    updated, and every centroid to the mean of its keys. Returns the new centroids (K, D).

    One matrix product per group; needs memory for a block of keys at a time besides its arguments."""
    centroids = graph.centroids
    sums = torch.zeros_like(centroids)
    groups = graph.group_of[assigned]
    order = torch.argsort(groups, stable=True)
    ends = torch.cumsum(torch.bincount(groups, minlength=graph.count), 0)
    offsets = centroids.square().sum(1).mul_(-0.5)  # the largest of <x, c> - |c|^2 / 2 is the nearest
    start = 0
    for group, end in enumerate(ends.tolist()):
        if start == end:
            continue
        candidates = graph.neighbours[group]
        matrix, offset = centroids[candidates].T, offsets[candidates]
        for some in order[start:end].split(ROWS):
            block = keys[some]
            found = candidates[torch.addmm(offset, block, matrix).argmax(1)]
            assigned[some] = found
            sums.index_add_(0, found, block)
        if advance is not None:
            advance(end - start)
        start = end
    counts = torch.bincount(assigned, minlength=len(centroids))
    moved = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
    return _split_largest(moved, counts)


def _split_largest(centroids: Tensor, counts: Tensor) -> Tensor:
    """Moves centroids without keys next to those of the largest clusters, which are so split in halves."""
    empty = (counts == 0).nonzero().squeeze(1)
    if len(empty):
        sizes, largest = counts.topk(len(empty))
        largest = largest[sizes > 1]
        empty = empty[: len(largest)]
        signs = torch.ones(centroids.shape[1])
        signs[1::2] = -1
        centroids[empty] = centroids[largest] * (1 + SPLIT * signs)
        centroids[largest] *= 1 - SPLIT * signs
    return centroids
