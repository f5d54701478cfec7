"""Numba intrinsics in LLVM IR for int8 search. `in_numpy` says in NumPy what each of them computes.

Two of them use an AVX-512 instruction. Where the processor lacks it, ordinary vector operations compute the same: more
slowly, so that `use_int8` says no, but any processor can test these loops."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from fairseq.retrieval.kernels import intrinsics
from fairseq.retrieval.kernels.int8.layout import LANES, TILE_KEYS, TILE_QUERIES
from fairseq.retrieval.kernels.intrinsics import INT32, INT64, constant_vector, emit_prefetch, instruction, pointer_to

WITH_AVX512 = intrinsics.HAS_VNNI
INTS, SINGLES = ir.VectorType(INT32, LANES), ir.VectorType(ir.FloatType(), LANES)
FLOAT16S = ir.VectorType(ir.HalfType(), LANES)


def _splat(builder: Any, kind: Any, number: Any) -> Any:
    """A vector of 16 whose elements are all the number."""
    one = builder.insert_element(constant_vector(kind, ir.Undefined), number, INT32(0))
    return builder.shuffle_vector(one, one, constant_vector(INTS, 0))


def _load_singles(builder: Any, address: Any, place: Any, float16: Any) -> Any:
    """16 float32 numbers, read from place `place` on of an array of float16 or of float32."""
    offset = builder.mul(place, INT64(2 if float16 else 4))
    read = builder.load(pointer_to(builder, FLOAT16S if float16 else SINGLES, address, offset), align=1)
    return builder.fpext(read, SINGLES) if float16 else read


def _add_product(builder: Any, total: Any, left: Any, right: Any) -> Any:
    return builder.fadd(total, builder.fmul(left, right, flags=["contract"]), flags=["contract"])


def _loop(builder: Any, times: Any, firsts: list[Any], body: Any) -> list[Any]:
    """The values after `body` has run `times` times, starting from `firsts`: it is given the number of the pass and the
    values so far, and returns the next ones. They stay in registers, which `cgutils.for_range` does not promise."""
    before, head, inside, after = builder.block, *(builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    number, values = builder.phi(INT64), [builder.phi(first.type) for first in firsts]
    builder.cbranch(builder.icmp_unsigned("<", number, times), inside, after)
    builder.position_at_end(inside)
    following = [builder.add(number, INT64(1)), *body(number, values)]
    for phi, first, last in zip([number, *values], [INT64(0), *firsts], following, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


def _sum_of_all(builder: Any, vectors: list[Any]) -> Any:
    """The sum of the numbers of all vectors."""
    while len(vectors) > 1:
        vectors = [builder.fadd(*pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    add_up = ir.FunctionType(ir.FloatType(), [ir.FloatType(), SINGLES])
    function = cgutils.get_or_insert_function(builder.module, add_up, "llvm.vector.reduce.fadd.v16f32")
    return builder.call(function, [ir.Constant(ir.FloatType(), 0.0), vectors[0]], fastmath=["reassoc"])


@instruction
def squared_distance(_: Any, this: Any, that: Any, groups: Any, kind: Any) -> Any:
    """The squared L2 distance, in float32, of two vectors of 64 times `groups` numbers at two addresses: the first
    vector is float32, the second as `kind`, which is float32 or uint16 for the bits of float16."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        float16 = signature.args[3] == types.uint16

        def add_four(group: Any, sums: list[Any]) -> list[Any]:
            added = []
            for number, total in enumerate(sums):
                place = builder.add(builder.mul(group, INT64(64)), INT64(16 * number))
                own = builder.load(pointer_to(builder, SINGLES, arguments[0], builder.mul(place, INT64(4))), align=1)
                difference = builder.fsub(own, _load_singles(builder, arguments[1], place, float16))
                added.append(_add_product(builder, total, difference, difference))
            return added

        return _sum_of_all(builder, _loop(builder, arguments[2], [constant_vector(SINGLES, 0.0)] * 4, add_four))

    return types.float32(types.int64, types.int64, types.int64, kind), generate


def _dot_bytes(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """In each of 16 lanes: total + the four products of the lane's four unsigned with its four signed bytes
    (`vpdpbusd`)."""
    if WITH_AVX512:
        kind = ir.FunctionType(INTS, [INTS] * 3)
        add_products = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(add_products, [total, unsigned, signed])
    for bit in (0, 8, 16, 24):
        left = builder.and_(builder.lshr(unsigned, constant_vector(INTS, bit)), constant_vector(INTS, 255))
        right = builder.ashr(builder.shl(signed, constant_vector(INTS, 24 - bit)), constant_vector(INTS, 24))
        total = builder.add(total, builder.mul(left, right))
    return total


def _compress(builder: Any, numbers: Any, chosen: Any) -> Any:
    """The chosen ones of 16 int32 numbers moved together to the front, zeros behind them (`vpcompressd`)."""
    if WITH_AVX512:
        kind = ir.FunctionType(INTS, [INTS, INTS, ir.VectorType(ir.IntType(1), LANES)])
        compress = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.compress.v16i32")
        return builder.call(compress, [numbers, constant_vector(INTS, 0), chosen])
    result, count = constant_vector(INTS, 0), INT32(0)
    for lane in range(LANES):
        is_chosen = builder.extract_element(chosen, INT32(lane))
        number = builder.select(is_chosen, builder.extract_element(numbers, INT32(lane)), INT32(0))
        result = builder.insert_element(result, number, count)
        count = builder.add(count, builder.zext(is_chosen, INT32))
    return result


@instruction
def multiply_tile(_: Any, queries: Any, keys: Any, groups: Any, products: Any) -> Any:
    """Scalar products of 8 queries with 48 keys of 4 times `groups` bytes. All but `groups` are addresses: of int8
    numbers [groups][8][4]; of uint8 numbers [3][groups][16][4]; of int32 sums [8][48], which are written."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        queries, keys, groups, products = arguments

        def add_group(group: Any, sums: list[Any]) -> list[Any]:
            left = builder.add(queries, builder.mul(group, INT64(4 * TILE_QUERIES)))
            rights = [builder.mul(builder.add(builder.mul(groups, INT64(n)), group), INT64(64)) for n in range(3)]
            columns = [builder.load(pointer_to(builder, INTS, keys, right), align=1) for right in rights]
            for right in rights:
                emit_prefetch(builder, builder.add(keys, builder.add(right, INT64(512))))
            added: list[Any] = []
            for query in range(TILE_QUERIES):
                four = builder.load(pointer_to(builder, INT32, left, INT64(4 * query)), align=1)
                same = _splat(builder, INTS, four)
                for column in columns:
                    added.append(_dot_bytes(builder, sums[len(added)], column, same))
            return added

        sums = _loop(builder, groups, [constant_vector(INTS, 0)] * (TILE_QUERIES * TILE_KEYS // LANES), add_group)
        for number, total in enumerate(sums):
            builder.store(total, pointer_to(builder, INTS, products, INT64(64 * number)), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def _butterfly(builder: Any, four: Any) -> list[Any]:
    """Sums and differences of four vectors: two steps of a Hadamard transform, not normalised."""
    a, b, c, d = four
    this, that = ([builder.fadd(x, y), builder.fsub(x, y)] for x, y in ((a, b), (c, d)))
    pairs = list(zip(this, that, strict=True))
    return [builder.fadd(x, y) for x, y in pairs] + [builder.fsub(x, y) for x, y in pairs]


def _hadamard_64(builder: Any, four: list[Any]) -> list[Any]:
    """The Hadamard transform, not normalised, of the 64 numbers of four vectors."""
    vectors = list(four)
    for stride in (1, 2, 4, 8):
        partners = ir.Constant(INTS, [n ^ stride for n in range(16)])
        signs = ir.Constant(SINGLES, [-1.0 if n & stride else 1.0 for n in range(16)])
        for n, vector in enumerate(vectors):
            partner = builder.shuffle_vector(vector, vector, partners)
            vectors[n] = _add_product(builder, partner, vector, signs)
    return _butterfly(builder, vectors)


@instruction
def hadamard_64(_: Any, address: Any) -> Any:
    """Replaces 64 float32 numbers at an address by their Hadamard transform, not normalised."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        pointers = [pointer_to(builder, SINGLES, arguments[0], INT64(64 * n)) for n in range(4)]
        vectors = [builder.load(pointer, align=1) for pointer in pointers]
        for pointer, vector in zip(pointers, _hadamard_64(builder, vectors), strict=True):
            builder.store(vector, pointer, align=1)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@instruction
def butterfly(_: Any, address: Any, stride: Any) -> Any:
    """Two further steps of the transform, for 16 columns of a matrix of 4 rows: replaces them by their Hadamard
    transform of length 4. The rows begin at an address and `stride`, twice and three times `stride` bytes after it."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        offsets = [builder.mul(arguments[1], INT64(n)) for n in range(4)]
        pointers = [pointer_to(builder, SINGLES, arguments[0], offset) for offset in offsets]
        vectors = [builder.load(pointer, align=1) for pointer in pointers]
        for pointer, vector in zip(pointers, _butterfly(builder, vectors), strict=True):
            builder.store(vector, pointer, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@instruction
def scale_and_transform(_: Any, vector: Any, centre: Any, scale: Any, groups: Any, out: Any, kind: Any) -> Any:
    """Of each of `groups` of 64 numbers, the Hadamard transform of (vector - centre) * scale; returns the sum of
    (vector - centre)^2. Addresses: of the vector, as `kind` (see `squared_distance`); of the float32 centre, scale and
    result."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, centre, scale, groups, out, _ = arguments
        float16 = signature.args[5] == types.uint16

        def transform_group(group: Any, sums: list[Any]) -> list[Any]:
            places = [builder.add(builder.mul(group, INT64(64)), INT64(16 * n)) for n in range(4)]
            numbers, added = [], []
            for total, place in zip(sums, places, strict=True):
                own = _load_singles(builder, vector, place, float16)
                middle = _load_singles(builder, centre, place, False)
                difference = builder.fsub(own, middle)
                added.append(_add_product(builder, total, difference, difference))
                numbers.append(builder.fmul(difference, _load_singles(builder, scale, place, False)))
            for place, transformed in zip(places, _hadamard_64(builder, numbers), strict=True):
                target = pointer_to(builder, SINGLES, out, builder.mul(place, INT64(4)))
                builder.store(transformed, target, align=1)
            return added

        return _sum_of_all(builder, _loop(builder, groups, [constant_vector(SINGLES, 0.0)] * 4, transform_group))

    return types.float32(types.int64, types.int64, types.int64, types.int64, types.int64, kind), generate


@instruction
def round_to_bytes(_: Any, numbers: Any, groups: Any, limits: Any, out: Any) -> Any:
    """Adds `zero` to 16 float32 numbers for each of `groups`, clips the sums to `least` and `largest`, rounds them to
    bytes, and returns the sum of the squared differences between the sums and their bytes, clipping included. limits:
    the tuple (zero, least, largest) of float32. Addresses: of the numbers; of the bytes, which are written."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        numbers, groups, limits, out = arguments
        zero, least, largest = (_splat(builder, SINGLES, one) for one in cgutils.unpack_tuple(builder, limits))
        byte_vector = ir.VectorType(ir.IntType(8), LANES)

        def round_group(group: Any, sums: list[Any]) -> list[Any]:
            place = builder.mul(group, INT64(16))
            number = builder.fadd(_load_singles(builder, numbers, place, False), zero)
            clipped = builder.select(builder.fcmp_ordered(">", number, least), number, least)  # `least` for NaN
            clipped = builder.select(builder.fcmp_ordered("<", clipped, largest), clipped, largest)
            # Converting to int32 rounds towards 0, and all numbers here are positive.
            rounded = builder.fptosi(builder.fadd(clipped, constant_vector(SINGLES, 0.5)), INTS)
            error = builder.fsub(number, builder.sitofp(rounded, SINGLES))
            builder.store(builder.trunc(rounded, byte_vector), pointer_to(builder, byte_vector, out, place), align=1)
            return [_add_product(builder, sums[0], error, error)]

        return _sum_of_all(builder, _loop(builder, groups, [constant_vector(SINGLES, 0.0)], round_group))

    return types.float32(types.int64, types.int64, limits, types.int64), generate


@instruction
def transpose_16(_: Any, rows: Any, stride: Any, out: Any) -> Any:
    """Transposes a 16 x 16 matrix of 32-bit numbers, whose rows are `stride` bytes apart, into `out` without gaps."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        rows, stride, out = arguments
        pointers = (pointer_to(builder, INTS, rows, builder.mul(stride, INT64(n))) for n in range(16))
        vectors = [builder.load(pointer, align=1) for pointer in pointers]
        for size in (1, 2, 4, 8):  # exchanges the off-diagonal quarters of all squares of twice this size
            upper = [lane + 16 - size if lane & size else lane for lane in range(16)]
            lower = [lane + 16 if lane & size else lane + size for lane in range(16)]
            for n in range(16):
                if not n & size:
                    pair = vectors[n], vectors[n + size]
                    for place, lanes in ((n, upper), (n + size, lower)):
                        vectors[place] = builder.shuffle_vector(*pair, ir.Constant(INTS, lanes))
        for n, vector in enumerate(vectors):
            builder.store(vector, pointer_to(builder, INTS, out, INT64(64 * n)), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@instruction
def near_columns(_: Any, products: Any, norms: Any, stride: Any, numbers: Any, start: Any, out: Any) -> Any:
    """Writes start + j for those of a tile's 48 keys j for which

        a[j] - numbers[0] b[j] - numbers[1] c[j] - numbers[2] (products[j] - numbers[4]) <= numbers[3],

    in ascending order, and returns how many there are. Addresses: of int32 products; of float32 a, from which b is
    `stride` bytes away, and c twice that; of int32 results, 16 more of which may be overwritten. numbers: a tuple of
    four float32 and an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        products, norms, stride, numbers, start, out = arguments
        first = builder.add(_splat(builder, INTS, start), ir.Constant(INTS, list(range(16))))
        *factors, limit, shift = cgutils.unpack_tuple(builder, numbers)
        *factors, limit = [_splat(builder, SINGLES, number) for number in (*factors, limit)]
        shift, count = _splat(builder, INTS, shift), INT64(0)
        for column in range(0, TILE_KEYS, LANES):
            product = builder.load(pointer_to(builder, INTS, products, INT64(4 * column)), align=1)
            product = builder.sitofp(builder.sub(product, shift), SINGLES)
            addresses = [builder.add(norms, builder.mul(stride, INT64(n))) for n in range(3)]
            value, *others = (
                builder.load(pointer_to(builder, SINGLES, address, INT64(4 * column)), align=1) for address in addresses
            )
            for other, factor in zip([*others, product], factors, strict=True):
                value = builder.fsub(value, builder.fmul(other, factor, flags=["contract"]), flags=["contract"])
            near = builder.fcmp_ordered("<=", value, limit)
            columns = builder.add(first, constant_vector(INTS, column))
            moved = _compress(builder, columns, near)
            builder.store(moved, pointer_to(builder, INTS, out, builder.mul(count, INT64(4))), align=1)
            number = builder.ctpop(builder.bitcast(near, ir.IntType(16)))
            count = builder.add(count, builder.zext(number, INT64))
        return count

    return types.int64(types.int64, types.int64, types.int64, numbers, types.int32, types.int64), generate
