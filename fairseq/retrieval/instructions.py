"""Processor instructions that the compiled loops need and that Python has no words for, as functions that numba
replaces by them: reading halves and what FAISS keeps, fetching memory ahead, looking up 32 codes of 4 bits at once."""

from __future__ import annotations

import platform
from typing import Any

from fairseq.retrieval.kernels import numba

READS_HALVES = LOOKS_UP = False  # whether the processor has what `as_single` and `scan_block` need

if numba is not None:
    from llvmlite import binding, ir
    from numba import extending, types
    from numba.core import cgutils

    instruction: Any = extending.intrinsic
    if numba.config.CPU_NAME is None:  # else numba compiles for another processor, of which we know nothing
        _features = binding.get_host_cpu_features()
        READS_HALVES = platform.machine() in ("aarch64", "arm64") or bool(_features.get("f16c"))
        LOOKS_UP = bool(_features.get("avx2"))
    _INT = ir.IntType(32)
    _HALVES = [ir.Constant(ir.VectorType(_INT, 16), [*range(n, n + 8), *range(n + 16, n + 24)]) for n in (0, 8)]
    _BYTES, _WORDS = ir.VectorType(ir.IntType(8), 32), ir.VectorType(ir.IntType(16), 16)

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

    @instruction
    def integer_at(_: Any, address: Any) -> Any:
        """The int64 at an address."""

        def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))

        return types.int64(types.int64), generate

    @instruction
    def prefetch(_: Any, address: Any) -> Any:
        """Has the cache line at an address read, for which nothing waits; the address may be anything."""

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            pointer = ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [pointer, _INT, _INT, _INT])
            function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
            reading, often, data = _INT(0), _INT(3), _INT(1)
            builder.call(function, [builder.inttoptr(arguments[0], pointer), reading, often, data])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    def _vector(kind: Any, number: int) -> Any:
        return ir.Constant(kind, [number] * kind.count)

    def _place(builder: Any, kind: Any, address: Any, offset: Any) -> Any:
        return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

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
