"""Finds the entries whose 4-bit codes are nearest to a query, unsorted: the search of an index built by
`build_dstore.py --preset fast`. FAISS finds the same entries, but spends most of the time on sorting them, which is
wasted because `refined` sorts them again by other distances.

Codes are stored in blocks of 32 entries, as FAISS packs them: 32 bytes for each pair of sub-quantisers, 16 bytes for
each of the two. The low four bits of even bytes are the codes of entries 0 to 7, those of odd bytes the codes of
entries 8 to 15; the high four bits are the codes of the entry whose number is larger by 16. One instruction looks up 32
codes in the table of distances of a pair, for which these must be bytes (André, Kermarrec and Le Scouarnec 2015, "Cache
locality is not enough")."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairseq.retrieval import kernels
from fairseq.retrieval.faiss_import import require_faiss
from fairseq.retrieval.kernels import compiled, intrinsics

if kernels.AVAILABLE:
    from fairseq.retrieval.kernels.intrinsics import integer_at, scan_block

BLOCK = 32  # entries
SIZES = 16  # number of values of a 4-bit code
MOST_PARTS = 256  # most sub-quantisers for which the sum of their distances of one byte fits in two bytes


class FastScan:
    """Scans `core`, an IndexIVFPQFastScan. Its memory is read by address, so it must not be freed before this
    object."""

    def __init__(self, core: Any) -> None:
        faiss = require_faiss()
        self.core = core
        self.codebook = faiss.vector_to_array(core.pq.centroids).reshape(core.M, SIZES, -1).transpose(0, 2, 1).copy()
        lists, numbers = core.invlists, range(core.nlist)
        self.lists = np.zeros((core.nlist + 1, 3), np.int64)  # the last one is an empty list, for padding: see `scan`
        self.lists[:-1, 0] = [lists.list_size(number) for number in numbers]
        self.lists[:-1, 1] = [int(lists.get_codes(number) or 0) for number in numbers]
        self.lists[:-1, 2] = [int(lists.get_ids(number) or 0) for number in numbers]

    @staticmethod
    def can(core: Any) -> bool:
        """Whether `core` is an index that this class can scan, and the processor has the instruction."""
        faiss = require_faiss()
        return (
            intrinsics.HAS_AVX2
            and isinstance(core, faiss.IndexIVFPQFastScan)
            and core.metric_type == faiss.METRIC_L2
            and not core.by_residual
            and core.bbs == BLOCK
            and core.M == core.M2 <= MOST_PARTS
        )

    def search(self, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """(B, k): the entries nearest to queries (B, D) by their codes, unsorted; padded with ids of -1."""
        assert k > 0
        visited = self.core.quantizer.search(queries, self.core.nprobe)[1]
        visited[visited < 0] = self.core.nlist
        ids = np.empty((len(queries), k), np.int64)
        scan(queries, visited, self.lists, self.codebook, ids)
        return ids


@compiled
def measure_codes(query: np.ndarray, codebook: np.ndarray, exact: np.ndarray, table: np.ndarray) -> None:
    """Fills table (M, 16) uint8 with the squared distances of a query's M parts to the centroids of each code, minus
    the smallest distance of the part, scaled so that the largest is 255. exact (M, 16) float32 is a work array."""
    parts, width, sizes = codebook.shape
    largest = np.float32(0)
    for m in range(parts):
        line = exact[m]
        line[:] = 0
        for d in range(width):
            for code in range(sizes):
                difference = query[m * width + d] - codebook[m, d, code]
                line[code] += difference * difference
        least = line[0]
        for code in range(sizes):
            least = min(least, line[code])
        for code in range(sizes):
            line[code] -= least
            largest = max(largest, line[code])
    scale = np.float32(255) / largest if largest > 0 else np.float32(0)
    for m in range(parts):
        for code in range(sizes):
            table[m, code] = np.uint8(exact[m, code] * scale + np.float32(0.5))


@compiled
def kth_smallest(numbers: np.ndarray, k: int) -> int:
    """The k-th smallest of uint16 numbers; 65535 when there are fewer than k."""
    low, high = 0, (1 << 16) - 1
    while low < high:
        middle = (low + high) // 2
        bound, count = np.uint16(middle), 0
        for place in range(len(numbers)):
            count += numbers[place] <= bound
        if count < k:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def scan(queries: np.ndarray, visited: np.ndarray, lists: np.ndarray, codebook: np.ndarray, ids: np.ndarray) -> None:
    """Writes the k entries with the smallest table distances of each query to ids (B, k) int64, padded with -1.

    queries (B, D) float32; visited (B, P): list numbers to scan; lists (L, 3) int64: the size of each list, and the
    addresses of its blocks of codes and of its entry ids; codebook (M, D / M, 16)."""
    pairs, most = len(codebook) // 2, 0
    for row in range(len(queries)):
        most = max(most, lists[visited[row], 0].sum())
    distances = np.empty(most + BLOCK, np.uint16)
    exact = np.empty((2 * pairs, SIZES), np.float32)
    table = np.empty((2 * pairs, SIZES), np.uint8)
    for row in range(len(queries)):
        measure_codes(queries[row], codebook, exact, table)
        count = 0
        for number in visited[row]:
            size, codes, _ = lists[number]
            for first in range(0, size, BLOCK):  # the last block may write beyond the list; the next list overwrites it
                place = distances.ctypes.data + 2 * (count + first)
                scan_block(codes + first * pairs, table.ctypes.data, pairs, place)
            count += size
        nearest, filled = ids[row], 0
        limit = kth_smallest(distances[:count], len(nearest))
        position = 0
        for number in visited[row]:
            size, _, entries = lists[number]
            for address in range(entries, entries + 8 * size, 8):
                nearest[filled] = integer_at(address)
                filled += distances[position] < limit
                position += 1
        position = 0
        for number in visited[row]:
            size, _, entries = lists[number]
            for address in range(entries, entries + 8 * size, 8):
                if distances[position] == limit and filled < len(nearest):
                    nearest[filled] = integer_at(address)
                    filled += 1
                position += 1
        nearest[filled:] = -1
