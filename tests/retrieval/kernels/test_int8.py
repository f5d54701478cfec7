"""Int8 search: each instruction and loop against what `in_numpy` says it computes, that against mathematics, and the
switch. Where the processor lacks the two AVX-512 instructions, the loops use other instructions for the same; whether
the compiler makes the right ones of the intrinsics is then seen in what it writes for a processor that has them."""

from __future__ import annotations

import ast
import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg

from fairseq.errors import BadFlag
from fairseq.retrieval import kernels
from fairseq.retrieval.index.exact_index import ExactIndex
from fairseq.retrieval.kernels import intrinsics
from fairseq.retrieval.kernels.int8 import in_numpy, loops, search, use_int8
from fairseq.retrieval.kernels.int8.layout import CLIP, ERROR, HALF_SQUARE, LANES, NORM, TILE_QUERIES, ZERO
from fairseq.retrieval.kernels.int8.rounding import Rounding, estimates, likely_furthest

compiled_only = pytest.mark.skipif(not kernels.AVAILABLE, reason="needs numba")
reads_float16 = pytest.mark.skipif(
    not intrinsics.READS_FLOAT16, reason="needs numba, compiling for a processor known to read float16"
)
PACKAGE = Path(search.__file__).parent


def call(name: str, *arguments: Any) -> Any:
    """Calls an intrinsic: arrays become addresses, as the loops give them."""
    from fairseq.retrieval.kernels.int8 import instructions

    intrinsic = getattr(instructions, name)
    names = [f"a{number}" for number in range(len(arguments))]
    scope: dict[str, Any] = {"intrinsic": intrinsic}
    exec(f"def function({', '.join(names)}):\n    return intrinsic({', '.join(names)})", scope)
    addresses = [each.ctypes.data if isinstance(each, np.ndarray) else each for each in arguments]
    return kernels.numba.njit(scope["function"])(*addresses)


def random_bytes(generator: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Signed or unsigned ones: any, or the extreme ones, whose products a saturating instruction would not sum."""
    least, largest = (-128, 127) if kind.startswith("signed") else (0, 255)
    if kind.endswith("extreme"):
        return generator.choice([least, largest], shape)
    return generator.integers(least, largest + 1, shape)


@compiled_only
@pytest.mark.parametrize("groups, kind", list(itertools.product([1, 3, 16], ["any", "extreme"])))
def test_multiply_tile(groups: int, kind: str) -> None:
    generator = np.random.default_rng(groups)
    queries = random_bytes(generator, (groups, 8, 4), f"signed {kind}").astype(np.int8)
    padded = np.zeros(3 * groups * 64 + 1024, np.uint8)  # prefetching reads ahead, which is allowed of any address
    keys = padded[: 3 * groups * 64].reshape(3, groups, 16, 4)
    keys[:] = random_bytes(generator, keys.shape, f"unsigned {kind}")
    products = np.empty((8, 48), np.int32)
    call("multiply_tile", queries, keys, groups, products)
    np.testing.assert_array_equal(products, in_numpy.multiply_tile(queries, keys))
    by_key = keys.swapaxes(1, 2).reshape(48, -1).astype(int)  # the layout undone: one row a vector
    np.testing.assert_array_equal(products, queries.swapaxes(0, 1).reshape(8, -1).astype(int) @ by_key.T)


@compiled_only
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_near_columns(share: float) -> None:
    generator = np.random.default_rng(0)
    products = generator.integers(-(1 << 20), 1 << 20, 48, np.int32)
    norms = generator.random((3, 50), np.float32)[:, :48]  # rows farther apart than they are long
    numbers = (np.float32(0.5), np.float32(0.25), np.float32(2**-20), np.float32(0), np.int32(1000))
    exact = norms[0] - 0.5 * norms[1] - 0.25 * norms[2] - 2.0**-20 * (products - 1000)
    limit = {0: -np.inf, 1: np.inf}.get(share, np.quantile(exact, share))
    numbers = (*numbers[:3], np.float32(limit), numbers[4])
    out = np.empty(48 + 16, np.int32)
    count = call("near_columns", products, norms, norms.strides[0], numbers, np.int32(7), out)
    np.testing.assert_array_equal(out[:count], in_numpy.near_columns(products, norms, numbers, 7))
    if share in (0, 1):
        assert count == 48 * share


@compiled_only
def test_near_columns_at_the_edge() -> None:
    """As near as the limit is near; what is not a number is not."""
    norms = np.zeros((3, 48), np.float32)
    norms[0, ::3], norms[0, 1::3] = 4, np.nan
    numbers = (np.float32(1), np.float32(1), np.float32(1), np.float32(3), np.int32(5))
    products = np.full(48, 6, np.int32)
    products[6] = 5
    out = np.empty(48 + 16, np.int32)
    count = call("near_columns", products, norms, norms.strides[0], numbers, np.int32(0), out)
    assert out[:count].tolist() == [column for column in range(48) if column % 3 != 1 and column != 6]
    assert in_numpy.near_columns(products, norms, numbers, 0).tolist() == out[:count].tolist()


@pytest.mark.parametrize("length", [1, 4, 64, 512])
def test_the_transform_is_hadamards(length: int) -> None:
    numbers = np.random.default_rng(0).integers(-9, 9, (3, length)).astype(np.float32)
    np.testing.assert_array_equal(in_numpy.hadamard(numbers), numbers @ scipy.linalg.hadamard(length))


@compiled_only
@pytest.mark.parametrize("length", [64, 128, 256, 512, 1024])
def test_hadamard(length: int) -> None:
    """To the last bit, since additions are in the same order."""
    numbers = np.random.default_rng(0).standard_normal(length).astype(np.float32)
    expected = in_numpy.hadamard(numbers)
    whole, begun = numbers.copy(), numbers.copy()
    loops.hadamard(whole, 0)
    np.testing.assert_array_equal(whole, expected)
    begun[:64] = in_numpy.hadamard(numbers[:64])
    loops.hadamard(begun, 64)
    np.testing.assert_array_equal(begun, expected)


@compiled_only
def test_parts_of_the_transform() -> None:
    numbers = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    one = numbers.copy()
    call("hadamard_64", one)
    np.testing.assert_array_equal(one, in_numpy.hadamard(numbers))
    rows = np.random.default_rng(1).standard_normal((4, 40)).astype(np.float32)
    expected = rows.copy()
    expected[:, :16] = in_numpy.butterfly(rows[:, :16])
    call("butterfly", rows, rows.strides[0])
    np.testing.assert_array_equal(rows, expected)


@reads_float16
@pytest.mark.parametrize("groups, dtype", list(itertools.product([1, 3], [np.float16, np.float32])))
def test_scale_and_transform(groups: int, dtype: type) -> None:
    generator = np.random.default_rng(groups)
    vector = (generator.standard_normal(64 * groups) * 100).astype(dtype)
    vector[5] = 6e-8  # of float16, a subnormal number
    centre, scale = (generator.standard_normal(64 * groups).astype(np.float32) for _ in range(2))
    out = np.empty(64 * groups, np.float32)
    kind = np.uint16(0) if dtype == np.float16 else np.float32(0)
    square = call("scale_and_transform", vector, centre, scale, groups, out, kind)
    transformed, expected = in_numpy.scale_and_transform(vector, centre, scale)
    np.testing.assert_array_equal(out, transformed)
    np.testing.assert_allclose(square, expected, rtol=1e-6)


@compiled_only
def test_round_to_bytes() -> None:
    numbers = np.random.default_rng(0).normal(0, 60, 16 * 20).astype(np.float32)
    edges = [0, 0.5, -0.5, 1.5, 126.4, 126.5, 127, 127.5, 128, 1e9, np.inf, -126.5, -127, -127.5, -1e9, -np.inf, 0.49]
    numbers[: len(edges)] = edges
    out = np.empty(len(numbers), np.uint8)
    call("round_to_bytes", numbers, len(numbers) // 16, CLIP, out)
    expected, _ = in_numpy.round_to_bytes(numbers, CLIP)
    np.testing.assert_array_equal(out, expected)
    assert out[[8, 9, 10]].tolist() == [255] * 3 and out[[13, 14, 15]].tolist() == [1] * 3
    finite = numbers[16 * 2 :].copy()
    error = call("round_to_bytes", finite, len(finite) // 16, CLIP, out)
    np.testing.assert_allclose(error, in_numpy.round_to_bytes(finite, CLIP)[1], rtol=1e-5)
    apart = finite - (out[: len(finite)].astype(float) - ZERO)
    np.testing.assert_allclose(error, np.square(apart).sum(), rtol=1e-4)
    unknown = np.full(16, np.nan, np.float32)
    assert np.isnan(call("round_to_bytes", unknown, 1, CLIP, out)) and (out[:16] == 1).all()


@compiled_only
def test_transpose_16() -> None:
    matrix = np.random.default_rng(0).integers(0, 1 << 32, (16, 40), np.uint32)
    out = np.empty((16, 16), np.uint32)
    call("transpose_16", matrix, matrix.strides[0], out)
    np.testing.assert_array_equal(out, in_numpy.transpose_16(matrix[:, :16]))


@reads_float16
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_squared_distance(dtype: type) -> None:
    generator = np.random.default_rng(0)
    this, that = generator.standard_normal(192).astype(np.float32), generator.standard_normal(192).astype(dtype)
    kind = np.uint16(0) if dtype == np.float16 else np.float32(0)
    found = call("squared_distance", this, that, 3, kind)
    np.testing.assert_allclose(found, in_numpy.squared_distance(this, that), rtol=1e-6)
    that[7] = np.inf
    assert call("squared_distance", this, that, 3, kind) == np.inf


@reads_float16
@pytest.mark.parametrize(
    "width, dtype, are_queries", list(itertools.product([3, 64, 200, 1100], [np.float16, np.float32], [False, True]))
)
def test_round_vectors(width: int, dtype: type, are_queries: bool) -> None:
    generator = np.random.default_rng(width)
    vectors = (generator.standard_normal((77, width)) * generator.random(width) + 3).astype(dtype)
    vectors[5] *= 30  # clipped
    some = vectors[:50].astype(np.float32)
    rounding = Rounding(some, some.mean(0))
    rounded = rounding.rounded(vectors.view(np.uint16) if dtype == np.float16 else vectors, are_queries)
    rotated = in_numpy.rotate(vectors, *rounding.parameters[:3])
    numbers, _ = in_numpy.round_to_bytes(rotated, CLIP)
    signed = numbers.astype(np.int32) - ZERO
    tiles = in_numpy.tiled(signed.astype(np.int8).view(np.uint8) if are_queries else numbers, 8 if are_queries else 16)
    found = rounded.tiles[: len(tiles)].view(np.int8 if are_queries else np.uint8).astype(int)
    apart = np.abs(found - tiles.view(np.int8 if are_queries else np.uint8))
    apart[-1].reshape(-1, tiles.shape[2], 4)[:, 77 % tiles.shape[2] :] = 0  # no vectors
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3  # where the last bit decides
    exact = vectors.astype(float) - rounding.centre
    np.testing.assert_allclose(rounded.norms[HALF_SQUARE], np.square(exact).sum(1) / 2, rtol=1e-5)
    errors = np.sqrt(np.square(rotated.astype(float) - signed).sum(1)) * float(rounding.step)
    np.testing.assert_allclose(rounded.norms[ERROR], errors, rtol=1e-3)
    if are_queries:
        np.testing.assert_allclose(rounded.shifts, signed.sum(1) * ZERO, atol=ZERO * 3)
        np.testing.assert_allclose(rounded.norms[NORM], np.linalg.norm(signed, axis=1) * rounding.step, rtol=1e-3)


@pytest.mark.parametrize("width", [64, 200, 1100])
def test_the_rotation_changes_no_product(width: int) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((20, width)).astype(np.float32)
    rounding = Rounding(vectors, np.zeros(width, np.float32))
    rotated = in_numpy.rotate(vectors, *rounding.parameters[:3]).astype(float) * float(rounding.step)
    np.testing.assert_allclose(rotated @ rotated.T, vectors.astype(float) @ vectors.T, rtol=1e-5, atol=1e-4)


@compiled_only
@pytest.mark.parametrize("values", [[np.nan], [np.inf], [3e38], [1e18, np.nan]], ids=str)
def test_vectors_that_cannot_be_rounded_are_marked(values: list[float]) -> None:
    vectors = np.ones((17, 5), np.float32)
    rounding = Rounding(vectors[:3], np.zeros(5, np.float32))
    vectors[16, : len(values)] = values
    norms = rounding.rounded(vectors, False).norms
    assert np.isfinite(norms[:, :16]).all() and np.isnan(norms[HALF_SQUARE, 16])
    assert norms[ERROR, 16] == -1 if np.isfinite(values).all() else np.isnan(norms[ERROR, 16])


@reads_float16
@pytest.mark.parametrize("width, dtype", list(itertools.product([40, 128, 200, 1100], [np.float16, np.float32])))
def test_bounds_hold_whatever_the_keys(width: int, dtype: type) -> None:
    """Also for coordinates far beyond what int8 covers of them."""
    generator = np.random.default_rng(0)
    keys = (generator.standard_normal((400, width)) / np.arange(1, width + 1)).astype(dtype)
    some = keys[:100].astype(np.float32)
    rounding = Rounding(some, some.mean(0))
    keys[::7] *= 20
    queries = (generator.standard_normal((9, width)) / np.arange(1, width + 1)).astype(np.float32)
    queries[3] *= 50
    asked = rounding.rounded(queries, are_queries=True)
    known = rounding.rounded(keys.view(np.uint16) if dtype == np.float16 else keys, are_queries=False)
    estimated = asked.norms[HALF_SQUARE][:, None] + estimates(asked, known, float(rounding.step))
    norms = np.sqrt(2 * known.norms[HALF_SQUARE])
    errors = np.outer(asked.norms[NORM], known.norms[ERROR]) + np.outer(asked.norms[ERROR], norms)
    half = np.square(queries[:, None].astype(np.float64) - keys).sum(2) / 2
    assert (np.abs(estimated - half) <= errors * 1.001 + half * 1e-5).all()
    assert np.median(errors) < 0.1 * np.median(half)


@compiled_only
def test_estimates_are_products_of_what_was_rounded() -> None:
    generator = np.random.default_rng(0)
    keys, queries = (generator.standard_normal((n, 70)).astype(np.float32) for n in (61, 19))
    rounding = Rounding(keys, keys.mean(0))
    asked, known = rounding.rounded(queries, True), rounding.rounded(keys, False)

    def rows(tiles: np.ndarray, tile: int, kind: Any, count: int) -> np.ndarray:
        return tiles.view(kind).reshape(len(tiles), -1, tile, 4).swapaxes(1, 2).reshape(-1, 128)[:count].astype(int)

    products = rows(asked.tiles, TILE_QUERIES, np.int8, 19) @ (rows(known.tiles, LANES, np.uint8, 61) - ZERO).T
    expected = known.norms[HALF_SQUARE] - float(rounding.step) ** 2 * products
    np.testing.assert_allclose(estimates(asked, known, float(rounding.step)), expected, rtol=1e-5, atol=1e-4)


@compiled_only
def test_a_sample_says_how_far_entries_likely_are() -> None:
    generator = np.random.default_rng(0)
    keys, queries = (generator.standard_normal((n, 20)).astype(np.float32) for n in (20000, 30))
    rounding = Rounding(keys[:4000], keys[:4000].mean(0))
    asked, sample = rounding.rounded(queries, True), rounding.rounded(keys[::5], False)
    chosen = keys[::5][likely_furthest(asked, sample, float(rounding.step), 1 / 40)]
    limits = np.square(queries - chosen).sum(1)
    nearer = (np.square(queries[:, None] - keys).sum(2) < limits[:, None]).sum(1)
    assert (nearer >= 500).all() and nearer.mean() < 1000
    assert not len(likely_furthest(asked, sample, float(rounding.step), 0.99))


@pytest.mark.parametrize(
    "switch, has, expected", [(None, True, True), ("1", True, True), ("0", True, False), (None, False, False)]
)
def test_the_switch(monkeypatch: pytest.MonkeyPatch, switch: str | None, has: bool, expected: bool) -> None:
    monkeypatch.setattr(intrinsics, "HAS_VNNI", has)
    monkeypatch.setattr(intrinsics, "READS_FLOAT16", has)
    monkeypatch.delenv("FAIRSEQ_INT8", raising=False)
    if switch is not None:
        monkeypatch.setenv("FAIRSEQ_INT8", switch)
    assert use_int8(1024) == expected
    assert not use_int8((1 << 16) + 1)  # sums of products might exceed int32
    if kernels.AVAILABLE:
        index = ExactIndex(np.ones((4, 3), np.float32))
        assert (index.int8 is not None) == expected
        assert ("int8" in index.describe()) == expected


@pytest.mark.parametrize("switch", ["", "off", "2", "true"])
def test_another_value_of_the_switch_is_refused(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    monkeypatch.setenv("FAIRSEQ_INT8", switch)
    with pytest.raises(BadFlag, match=f"FAIRSEQ_INT8: found '{switch}', expected 0 .* or 1"):
        ExactIndex(np.ones((4, 3), np.float32))


WRITE_ASSEMBLY = """
import numba
from numba import types
from fairseq.retrieval.kernels import intrinsics
intrinsics.HAS_VNNI = True
from fairseq.retrieval.kernels.int8.instructions import multiply_tile, near_columns
@numba.njit
def tile(a, b, c, d):
    multiply_tile(a, b, c, d)
@numba.njit
def near(a, b, c, d, e, f):
    return near_columns(a, b, c, d, e, f)
one = types.int64
tile.compile((one,) * 4)
numbers = types.Tuple([types.float32] * 4 + [types.int32])
near.compile((one, one, one, numbers, types.int32, one))
for function in (tile, near):
    print(*function.inspect_asm().values(), "=" * 9, sep="\\n")
"""


@compiled_only
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX-512 is of x86")
def test_the_compiler_makes_the_avx512_instructions(root: Path, tmp_path: Path) -> None:
    """Compiled for a processor with these instructions, whatever this one has; the code is not run."""
    target = {"NUMBA_CPU_NAME": "icelake-server", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", WRITE_ASSEMBLY]
    done = subprocess.run(command, env=os.environ | target, cwd=root, capture_output=True, text=True, check=True)
    tile, near, _ = done.stdout.split("=" * 9)

    def lines(text: str, instruction: str, register: str) -> int:
        return sum(instruction in line and register in line for line in text.splitlines())

    assert lines(tile, "vpdpbusd", "%zmm") == 24  # one for each register of sums
    assert lines(tile, "prefetcht0", "") == 3
    assert lines(near, "vpcompressd", "%zmm") == 3  # one for each 16 keys


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fairseq.retrieval.kernels"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_the_package_has_one_entry_point(root: Path) -> None:
    inside = "fairseq.retrieval.kernels.int8."
    allowed = {inside + name for name in ("Found", "Int8Search", "use_int8")}
    outside = [path for path in (root / "fairseq").rglob("*.py") if PACKAGE not in path.parents]
    for path in [*outside, *(root / "fairseq_cli").rglob("*.py"), *(root / "benchmarks").rglob("*.py")]:
        found = {name for name in imported_modules(path) if name.startswith(inside)}
        assert found <= allowed, f"{path.name} imports {sorted(found - allowed)}"


def documented(names: Callable[[str], bool]) -> set[str]:
    text = (PACKAGE / "in_numpy.py").read_text(encoding="utf-8")
    return {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and names(node.name)}


@compiled_only
def test_every_instruction_has_a_statement_in_numpy() -> None:
    tree = ast.parse((PACKAGE / "instructions.py").read_text(encoding="utf-8"))
    public = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
    stated = documented(lambda name: True) | {"hadamard_64"}  # `hadamard` of 64 numbers
    assert public <= stated
