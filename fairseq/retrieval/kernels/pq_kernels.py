"""Compiled loops of distances from IVFPQ codes (`pq_codes`). They need numba (`kernels`)."""

from __future__ import annotations

import numpy as np

from fairseq.retrieval import kernels
from fairseq.retrieval.kernels import compiled, compiled_in_order

if kernels.AVAILABLE:
    from fairseq.retrieval.kernels.intrinsics import prefetch

AHEAD = 16  # number of records by which prefetching is ahead of copying
CODE_WORDS = 2  # words of a record before its code: list number and constant term


@compiled
def residual_l2_distances(
    first_row: int,
    last_row: int,
    bounds: np.ndarray,
    queries: np.ndarray,
    ids: np.ndarray,
    records: np.ndarray,
    coarse: np.ndarray,
    codebook: np.ndarray,
    words: tuple[int, ...],
    out: np.ndarray,
) -> None:
    """Squared L2 distance of query b to entries ids[bounds[b]:bounds[b + 1]], into out (n,) float32, for a range of b.

    queries (B, D); records (N, 2 + W) uint32, an entry's list number, the bits of its constant ||r||^2 + 2<c, r> and
    its code of 4 W bytes; coarse (L, D) list centroids; codebook (M, D / M, 256), M <= 4 W, in this order so that the
    inner loop reads consecutive numbers; words: any tuple of length W. A tuple's length is part of its type and so a
    constant for the compiler, which therefore unrolls the loop over a code; this is three times as fast.

    Records are at random places in memory, so each is prefetched well before it is copied."""
    sub_quantisers, width, size = codebook.shape
    record_words = records.shape[1]
    longest = 0
    for row in range(first_row, last_row):
        longest = max(longest, bounds[row + 1] - bounds[row])
    local = np.empty((longest, record_words), np.uint32)
    table = np.zeros(4 * len(words) * size, np.float32)
    to_list = np.empty(len(coarse), np.float32)
    start, stride, end = records.ctypes.data, records.strides[0], bounds[last_row]
    for row in range(first_row, last_row):
        first, count = bounds[row], bounds[row + 1] - bounds[row]
        if count == 0:
            continue
        query = queries[row]
        to_list[:] = -1  # ||q - c||^2 of the lists that occur
        for position in range(count):
            if first + position + AHEAD < end:
                address = start + ids[first + position + AHEAD] * stride
                prefetch(address)
                prefetch(address + stride - 1)
            record = records[ids[first + position]]
            for word in range(record_words):
                local[position, word] = record[word]
        for position in range(count):
            number = local[position, 0]
            if to_list[number] < 0:
                total = np.float32(0)
                for d in range(len(query)):
                    difference = query[d] - coarse[number, d]
                    total += difference * difference
                to_list[number] = total
        for m in range(sub_quantisers):  # -2 <q, r> by sub-quantiser and code
            line = table[m * size : (m + 1) * size]
            line[:] = 0
            for d in range(width):
                factor = np.float32(-2) * query[m * width + d]
                part = codebook[m, d]
                for k in range(size):
                    line[k] += factor * part[k]
        _sums_of_records(local[:count], words, size, table, to_list, out[first : first + count])


@compiled_in_order
def _sums_of_records(
    records: np.ndarray, words: tuple[int, ...], size: int, table: np.ndarray, to_list: np.ndarray, out: np.ndarray
) -> None:
    """out[i] = to_list of the list of record i, plus its constant, plus the sum over m of table[m * size + code m]. A
    word contains four codes."""
    constants = records.view(np.float32)
    byte, one, two, three = np.uint64(255), np.uint64(size), np.uint64(2 * size), np.uint64(3 * size)
    for position in range(len(records)):
        total = to_list[records[position, 0]] + constants[position, 1]
        line = np.uint64(0)
        for word in range(len(words)):
            four = np.uint64(records[position, CODE_WORDS + word])
            first = table[line + (four & byte)]
            second = table[line + one + (four >> np.uint64(8) & byte)]
            third = table[line + two + (four >> np.uint64(16) & byte)]
            fourth = table[line + three + (four >> np.uint64(24))]
            total += (first + second) + (third + fourth)
            line += np.uint64(4 * size)
        out[position] = total


@compiled
def constant_terms(
    centroid: np.ndarray, codebook: np.ndarray, norms: np.ndarray, codes: np.ndarray, out: np.ndarray
) -> None:
    """out[i] = ||r||^2 + 2<c, r> for codes (n, M) of entries of a list with centroid c (D,); codebook as above, norms
    (M, 256): squared norms of the codes' centroids."""
    sub_quantisers, width, size = codebook.shape
    table = norms.copy()
    for m in range(sub_quantisers):
        line = table[m]
        for d in range(width):
            factor, part = np.float32(2) * centroid[m * width + d], codebook[m, d]
            for k in range(size):
                line[k] += factor * part[k]
    for entry in range(len(codes)):
        total = np.float32(0)
        for m in range(sub_quantisers):
            total += table[m, codes[entry, m]]
        out[entry] = total


@compiled
def write_records(
    number: int, ids: np.ndarray, codes: np.ndarray, constants: np.ndarray, records: np.ndarray
) -> None:
    """Writes the records (N, 8 + S or more) uint8 of the entries of list `number`, without those that have no place:
    ids (n,), codes (n, S), constants (n,) float32."""
    words = records.view(np.uint32)
    bits = constants.view(np.uint32)
    for entry in range(len(ids)):
        place = ids[entry]
        if 0 <= place < len(records):
            words[place, 0], words[place, 1] = number, bits[entry]
            record = records[place, 4 * CODE_WORDS :]
            for byte in range(codes.shape[1]):
                record[byte] = codes[entry, byte]
