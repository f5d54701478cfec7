"""Processor instructions that the compiled loops need and that Python has no words for, as functions that numba
replaces by them: reading halves and what FAISS keeps, fetching memory ahead, looking up 32 codes of 4 bits at once,
multiplying numbers of 8 bits, Hadamard transforms."""

from __future__ import annotations

import platform
from typing import Any

from fairseq.retrieval.kernels import numba

READS_HALVES = LOOKS_UP = MULTIPLIES = False  # whether the processor can `as_single`, `scan_block`, `multiply_tile`
TILE_ROWS, TILE_COLUMNS = 8, 48  # products that `multiply_tile` makes, which fill the registers
VECTOR = 16  # numbers of 32 bits that a register holds

if numba is not None:
    from llvmlite import binding, ir
    from numba import extending, types
    from numba.core import cgutils

    instruction: Any = extending.intrinsic
    if numba.config.CPU_NAME is None:  # else numba compiles for another processor, of which we know nothing
        _features = binding.get_host_cpu_features()
        READS_HALVES = platform.machine() in ("aarch64", "arm64") or bool(_features.get("f16c"))
        LOOKS_UP = bool(_features.get("avx2"))
        MULTIPLIES = bool(_features.get("avx512vnni"))
    _INT = ir.IntType(32)
    _LONG = ir.IntType(64)
    _HALVES = [ir.Constant(ir.VectorType(_INT, 16), [*range(n, n + 8), *range(n + 16, n + 24)]) for n in (0, 8)]
    _BYTES, _WORDS = ir.VectorType(ir.IntType(8), 32), ir.VectorType(ir.IntType(16), 16)
    _SIXTEEN, _SINGLES = ir.VectorType(_INT, 16), ir.VectorType(ir.FloatType(), 16)
    _HALVES_READ = ir.VectorType(ir.HalfType(), 16)

    def _vector(kind: Any, number: Any) -> Any:
        return ir.Constant(kind, [number] * kind.count)

    def _spread(builder: Any, kind: Any, number: Any) -> Any:
        """A vector of 16, all of them the number."""
        one = builder.insert_element(_vector(kind, ir.Undefined), number, _INT(0))
        return builder.shuffle_vector(one, one, _vector(_SIXTEEN, 0))

    def _sixteen(builder: Any, address: Any, place: Any, halves: Any) -> Any:
        """16 float32 numbers from a place on in an array of halves, or of float32."""
        offset = builder.mul(place, _LONG(2 if halves else 4))
        read = builder.load(_place(builder, _HALVES_READ if halves else _SINGLES, address, offset), align=1)
        return builder.fpext(read, _SINGLES) if halves else read

    def _add_product(builder: Any, total: Any, left: Any, right: Any) -> Any:
        return builder.fadd(total, builder.fmul(left, right, flags=["contract"]), flags=["contract"])

    def _place(builder: Any, kind: Any, address: Any, offset: Any) -> Any:
        return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

    @instruction
    def as_single(_: Any, number: Any) -> Any:
        """The float32 that a number is: a float32 itself, or the half whose bits a uint16 holds."""

        def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if signature.args[0] == types.float32:
                return arguments[0]
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

        return types.float32(number), generate

    @instruction
    def single_of_bits(_: Any, bits: Any) -> Any:
        """The float32 whose bits an int32 holds."""

        def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], ir.FloatType())

        return types.float32(types.int32), generate

    def _loop(builder: Any, times: Any, firsts: list[Any], body: Any) -> list[Any]:
        """What becomes of the values `firsts` when `body` makes the next of them, `times` times; it is given a number
        from 0 on and the values, which stay in registers."""
        before, head, inside, after = builder.block, *(builder.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        number, values = builder.phi(_LONG), [builder.phi(first.type) for first in firsts]
        builder.cbranch(builder.icmp_unsigned("<", number, times), inside, after)
        builder.position_at_end(inside)
        following = [builder.add(number, _LONG(1)), *body(number, values)]
        for phi, first, last in zip([number, *values], [_LONG(0), *firsts], following, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(last, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return values

    def _sum_of_all(builder: Any, vectors: list[Any]) -> Any:
        """The sum of the numbers of all vectors."""
        while len(vectors) > 1:
            vectors = [builder.fadd(*pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
        add_up = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _SINGLES])
        function = cgutils.get_or_insert_function(builder.module, add_up, "llvm.vector.reduce.fadd.v16f32")
        return builder.call(function, [ir.Constant(ir.FloatType(), 0.0), vectors[0]], fastmath=["reassoc"])

    @instruction
    def squares_apart(_: Any, this: Any, that: Any, fours: Any, kind: Any) -> Any:
        """The squared L2 distance, in float32, of vectors of 64 times `fours` numbers at two addresses: the first is
        float32, the second as `kind`, which is float32 or the uint16 bits of halves."""

        def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            halves = signature.args[3] == types.uint16

            def add_four(group: Any, sums: list[Any]) -> list[Any]:
                added = []
                for number, total in enumerate(sums):
                    place = builder.add(builder.mul(group, _LONG(64)), _LONG(16 * number))
                    own = builder.load(_place(builder, _SINGLES, arguments[0], builder.mul(place, _LONG(4))), align=1)
                    far = builder.fsub(own, _sixteen(builder, arguments[1], place, halves))
                    added.append(_add_product(builder, total, far, far))
                return added

            return _sum_of_all(builder, _loop(builder, arguments[2], [_vector(_SINGLES, 0.0)] * 4, add_four))

        return types.float32(types.int64, types.int64, types.int64, kind), generate

    @instruction
    def integer_at(_: Any, address: Any) -> Any:
        """The int64 at an address."""

        def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))

        return types.int64(types.int64), generate

    def _fetch(builder: Any, address: Any) -> None:
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _INT, _INT, _INT])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        reading, often, data = _INT(0), _INT(3), _INT(1)
        builder.call(function, [builder.inttoptr(address, pointer), reading, often, data])

    @instruction
    def prefetch(_: Any, address: Any) -> Any:
        """Has the cache line at an address read, for which nothing waits; the address may be anything."""

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            _fetch(builder, arguments[0])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    @instruction
    def scan_block(_: Any, codes: Any, table: Any, pairs: Any, sums: Any) -> Any:
        """Adds up, for each of 32 vectors, what the table says of its 4-bit codes; `fast_scan` tells how codes lie. All
        but `pairs` are addresses: of the codes, of 32 bytes for each pair of sub-quantisers, of 32 uint16 sums."""

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            codes, table, pairs, sums = arguments
            kind = ir.FunctionType(_BYTES, [_BYTES, _BYTES])
            look_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pshuf.b")
            totals = [cgutils.alloca_once_value(builder, _vector(_WORDS, 0)) for _ in range(4)]
            with cgutils.for_range(builder, pairs) as loop:
                offset = builder.mul(loop.index, pairs.type(32))
                read = builder.load(_place(builder, _BYTES, codes, offset), align=1)
                lines = builder.load(_place(builder, _BYTES, table, offset), align=1)
                low, high = builder.and_(read, _vector(_BYTES, 15)), builder.lshr(read, _vector(_BYTES, 4))
                for number, half in enumerate((low, high)):
                    both = builder.bitcast(builder.call(look_up, [lines, half]), _WORDS)  # an even and an odd byte
                    odd = builder.lshr(both, _vector(_WORDS, 8))
                    for total, term in ((totals[2 * number], both), (totals[2 * number + 1], odd)):
                        builder.store(builder.add(builder.load(total), term), total)
            for number in range(2):
                both, odd = builder.load(totals[2 * number]), builder.load(totals[2 * number + 1])
                even = builder.sub(both, builder.shl(odd, _vector(_WORDS, 8)))
                one, other = (builder.shuffle_vector(even, odd, places) for places in _HALVES)  # sub-quantisers
                builder.store(builder.add(one, other), _place(builder, _WORDS, sums, sums.type(32 * number)), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), generate

    @instruction
    def multiply_tile(_: Any, asked: Any, known: Any, groups: Any, products: Any) -> Any:
        """Products of 8 rows with 48 columns of numbers of 8 bits, `groups` times 4 numbers each. All but `groups` are
        addresses: of signed numbers [groups][8][4]; of unsigned ones [3][groups][16][4]; of int32 sums [8][48]."""

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            asked, known, groups, products = arguments
            kind = ir.FunctionType(_SIXTEEN, [_SIXTEEN] * 3)
            add_products = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")

            def add_group(group: Any, sums: list[Any]) -> list[Any]:
                left = builder.add(asked, builder.mul(group, _LONG(4 * TILE_ROWS)))
                rights = [builder.mul(builder.add(builder.mul(groups, _LONG(n)), group), _LONG(64)) for n in range(3)]
                columns = [builder.load(_place(builder, _SIXTEEN, known, right), align=1) for right in rights]
                for right in rights:
                    _fetch(builder, builder.add(known, builder.add(right, _LONG(512))))
                added: list[Any] = []
                for row in range(TILE_ROWS):
                    four = builder.load(_place(builder, _INT, left, _LONG(4 * row)), align=1)
                    same = _spread(builder, _SIXTEEN, four)
                    for column in columns:
                        added.append(builder.call(add_products, [sums[len(added)], column, same]))
                return added

            sums = _loop(builder, groups, [_vector(_SIXTEEN, 0)] * (TILE_ROWS * TILE_COLUMNS // VECTOR), add_group)
            for number, total in enumerate(sums):
                builder.store(total, _place(builder, _SIXTEEN, products, _LONG(64 * number)), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), generate

    def _mixed(builder: Any, four: Any) -> list[Any]:
        """Sums and differences of four vectors: their Hadamard transform, which is not normalised."""
        a, b, c, d = four
        this, that = ([builder.fadd(x, y), builder.fsub(x, y)] for x, y in ((a, b), (c, d)))
        pairs = list(zip(this, that, strict=True))
        return [builder.fadd(x, y) for x, y in pairs] + [builder.fsub(x, y) for x, y in pairs]

    def _mixed_64(builder: Any, four: list[Any]) -> list[Any]:
        """The same of the 64 numbers of four vectors."""
        vectors = list(four)
        for stride in (1, 2, 4, 8):
            others = ir.Constant(_SIXTEEN, [n ^ stride for n in range(16)])
            signs = ir.Constant(_SINGLES, [-1.0 if n & stride else 1.0 for n in range(16)])
            for n, vector in enumerate(vectors):
                other = builder.shuffle_vector(vector, vector, others)
                vectors[n] = _add_product(builder, other, vector, signs)
        return _mixed(builder, vectors)

    @instruction
    def mix_64(_: Any, address: Any) -> Any:
        """Replaces 64 float32 numbers at an address by their Hadamard transform."""

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            places = [_place(builder, _SINGLES, arguments[0], _LONG(64 * n)) for n in range(4)]
            vectors = [builder.load(place, align=1) for place in places]
            for place, vector in zip(places, _mixed_64(builder, vectors), strict=True):
                builder.store(vector, place, align=1)
            return context.get_dummy_value()

        return types.void(types.int64), generate

    @instruction
    def scale_and_mix(_: Any, vector: Any, centre: Any, scale: Any, groups: Any, out: Any, kind: Any) -> Any:
        """Of each of `groups` of 64 numbers: those of a vector less those of the centre, times the scale, and of these
        the Hadamard transform. Returns the sum of the squares of the differences. Addresses: of the vector, as `kind`
        says (see `squares_apart`); of float32 centre, scale and result."""

        def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vector, centre, scale, groups, out, _ = arguments
            halves = signature.args[5] == types.uint16

            def mix_group(group: Any, sums: list[Any]) -> list[Any]:
                places = [builder.add(builder.mul(group, _LONG(64)), _LONG(16 * n)) for n in range(4)]
                numbers, added = [], []
                for total, place in zip(sums, places, strict=True):
                    own, middle = _sixteen(builder, vector, place, halves), _sixteen(builder, centre, place, False)
                    apart = builder.fsub(own, middle)
                    added.append(_add_product(builder, total, apart, apart))
                    numbers.append(builder.fmul(apart, _sixteen(builder, scale, place, False)))
                for place, mixed in zip(places, _mixed_64(builder, numbers), strict=True):
                    builder.store(mixed, _place(builder, _SINGLES, out, builder.mul(place, _LONG(4))), align=1)
                return added

            return _sum_of_all(builder, _loop(builder, groups, [_vector(_SINGLES, 0.0)] * 4, mix_group))

        return types.float32(types.int64, types.int64, types.int64, types.int64, types.int64, kind), generate

    @instruction
    def round_numbers(_: Any, numbers: Any, groups: Any, limits: Any, out: Any) -> Any:
        """Rounds 16 numbers for each of `groups` to bytes, and returns the sum of the squares of what that took.
        Addresses: of float32 numbers, and of the result. limits: a tuple of float32: what stands for 0; the least and
        the largest number that a byte is to hold."""

        def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            numbers, groups, limits, out = arguments
            zero, low, high = (_spread(builder, _SINGLES, one) for one in cgutils.unpack_tuple(builder, limits))
            bytes_of = ir.VectorType(ir.IntType(8), 16)

            def round_group(group: Any, sums: list[Any]) -> list[Any]:
                place = builder.mul(group, _LONG(16))
                number = builder.fadd(_sixteen(builder, numbers, place, False), zero)
                near = builder.select(builder.fcmp_ordered(">", number, low), number, low)
                near = builder.select(builder.fcmp_ordered("<", near, high), near, high)
                whole = builder.fptosi(builder.fadd(near, _vector(_SINGLES, 0.5)), _SIXTEEN)  # rounds down: positive
                left = builder.fsub(number, builder.sitofp(whole, _SINGLES))
                builder.store(builder.trunc(whole, bytes_of), _place(builder, bytes_of, out, place), align=1)
                return [_add_product(builder, sums[0], left, left)]

            return _sum_of_all(builder, _loop(builder, groups, [_vector(_SINGLES, 0.0)], round_group))

        return types.float32(types.int64, types.int64, limits, types.int64), generate

    @instruction
    def mix_four(_: Any, address: Any, stride: Any) -> Any:
        """The same of each four of 64 numbers: 16 at an address, 16 at `stride` bytes after it, and so on."""

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            places = [_place(builder, _SINGLES, arguments[0], builder.mul(arguments[1], _LONG(n))) for n in range(4)]
            vectors = [builder.load(place, align=1) for place in places]
            for place, vector in zip(places, _mixed(builder, vectors), strict=True):
                builder.store(vector, place, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    @instruction
    def transpose_16(_: Any, rows: Any, stride: Any, out: Any) -> Any:
        """Writes 16 rows of 16 numbers of 32 bits, each `stride` bytes after the one before, as 16 columns."""

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            rows, stride, out = arguments
            places = (_place(builder, _SIXTEEN, rows, builder.mul(stride, _LONG(n))) for n in range(16))
            vectors = [builder.load(place, align=1) for place in places]
            for apart in (1, 2, 4, 8):  # exchanges the quarters that are off the diagonal, of ever larger squares
                upper = [lane + 16 - apart if lane & apart else lane for lane in range(16)]
                lower = [lane + 16 if lane & apart else lane + apart for lane in range(16)]
                for n in range(16):
                    if not n & apart:
                        pair = vectors[n], vectors[n + apart]
                        for place, lanes in ((n, upper), (n + apart, lower)):
                            vectors[place] = builder.shuffle_vector(*pair, ir.Constant(_SIXTEEN, lanes))
            for n, vector in enumerate(vectors):
                builder.store(vector, _place(builder, _SIXTEEN, out, _LONG(64 * n)), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    @instruction
    def near_columns(_: Any, products: Any, facts: Any, stride: Any, numbers: Any, start: Any, out: Any) -> Any:
        """Writes start + j for those of 48 columns j of which

            a[j] - numbers[0] b[j] - numbers[1] c[j] - numbers[2] (products[j] - numbers[4]) <= numbers[3],

        and returns how many they are. Addresses: of int32 products; of float32 a, from which b is `stride` bytes away,
        and c twice that; of int32 results, with room for 16 more. numbers: a tuple of float32, the last int32."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            products, facts, stride, numbers, start, out = arguments
            kind = ir.FunctionType(_SIXTEEN, [_SIXTEEN, _SIXTEEN, ir.VectorType(ir.IntType(1), 16)])
            move_together = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.compress.v16i32")
            first = builder.add(_spread(builder, _SIXTEEN, start), ir.Constant(_SIXTEEN, list(range(16))))
            *factors, limit, shift = cgutils.unpack_tuple(builder, numbers)
            *factors, limit = [_spread(builder, _SINGLES, number) for number in (*factors, limit)]
            shift, count = _spread(builder, _SIXTEEN, shift), _LONG(0)
            for column in range(0, TILE_COLUMNS, 16):
                product = builder.load(_place(builder, _SIXTEEN, products, _LONG(4 * column)), align=1)
                product = builder.sitofp(builder.sub(product, shift), _SINGLES)
                places = [builder.add(facts, builder.mul(stride, _LONG(n))) for n in range(3)]
                value, *others = (
                    builder.load(_place(builder, _SINGLES, place, _LONG(4 * column)), align=1) for place in places
                )
                for other, factor in zip([*others, product], factors, strict=True):
                    value = builder.fsub(value, builder.fmul(other, factor, flags=["contract"]), flags=["contract"])
                near = builder.fcmp_ordered("<=", value, limit)
                columns = builder.add(first, _vector(_SIXTEEN, column))
                moved = builder.call(move_together, [columns, _vector(_SIXTEEN, 0), near])
                builder.store(moved, _place(builder, _SIXTEEN, out, builder.mul(count, _LONG(4))), align=1)
                number = builder.ctpop(builder.bitcast(near, ir.IntType(16)))
                count = builder.add(count, builder.zext(number, _LONG))
            return count

        return types.int64(types.int64, types.int64, types.int64, numbers, types.int32, types.int64), generate
