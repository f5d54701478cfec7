"""Numba intrinsics in LLVM IR that the compiled loops use: reading float16 numbers and FAISS's memory, prefetching,
looking up 32 codes of 4 bits with one instruction. Those of int8 search are in `int8/instructions.py`."""

from __future__ import annotations

import platform
from typing import Any

from fairseq.retrieval.kernels import numba

READS_FLOAT16 = HAS_AVX2 = HAS_VNNI = False  # features of the processor for which numba compiles

if numba is not None:
    from llvmlite import binding, ir
    from numba import extending, types
    from numba.core import cgutils

    instruction: Any = extending.intrinsic
    # If numba is told to compile for another processor, its features are unknown.
    if numba.config.CPU_NAME is None and numba.config.CPU_FEATURES is None and numba.config.ENABLE_AVX:
        _features = binding.get_host_cpu_features()
        READS_FLOAT16 = platform.machine() in ("aarch64", "arm64") or bool(_features.get("f16c"))
        HAS_AVX2 = bool(_features.get("avx2"))
        HAS_VNNI = bool(_features.get("avx512vnni"))
    INT32 = ir.IntType(32)
    INT64 = ir.IntType(64)
    _UNPACKED = [ir.Constant(ir.VectorType(INT32, 16), [*range(n, n + 8), *range(n + 16, n + 24)]) for n in (0, 8)]
    _BYTES, _WORDS = ir.VectorType(ir.IntType(8), 32), ir.VectorType(ir.IntType(16), 16)

    def constant_vector(kind: Any, number: Any) -> Any:
        """A vector constant whose elements are all `number`."""
        return ir.Constant(kind, [number] * kind.count)

    def pointer_to(builder: Any, kind: Any, address: Any, offset: Any) -> Any:
        """A pointer to a `kind` at an int64 address plus an offset in bytes."""
        return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

    @instruction
    def as_single(_: Any, number: Any) -> Any:
        """Converts to float32: from float32 (unchanged), or from the bits of a float16 in a uint16."""

        def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if signature.args[0] == types.float32:
                return arguments[0]
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

        return types.float32(number), generate

    @instruction
    def single_of_bits(_: Any, bits: Any) -> Any:
        """The float32 with the bits of an int32."""

        def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], ir.FloatType())

        return types.float32(types.int32), generate

    @instruction
    def integer_at(_: Any, address: Any) -> Any:
        """The int64 at an address."""

        def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
            return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))

        return types.int64(types.int64), generate

    def emit_prefetch(builder: Any, address: Any) -> None:
        """IR that prefetches the cache line at an address for reading."""
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, INT32, INT32, INT32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        reading, often, data = INT32(0), INT32(3), INT32(1)
        builder.call(function, [builder.inttoptr(address, pointer), reading, often, data])

    @instruction
    def prefetch(_: Any, address: Any) -> Any:
        """Prefetches the cache line at an address, which may be any number: an invalid one is ignored."""

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            emit_prefetch(builder, arguments[0])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    @instruction
    def scan_block(_: Any, codes: Any, table: Any, pairs: Any, sums: Any) -> Any:
        """Sums, for each of 32 vectors, the table's entries for its 4-bit codes; `fast_scan` describes the layout. All
        but `pairs` are addresses: of the codes, of 32 bytes for each pair of sub-quantisers, of 32 uint16 sums."""

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            codes, table, pairs, sums = arguments
            kind = ir.FunctionType(_BYTES, [_BYTES, _BYTES])
            look_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pshuf.b")
            totals = [cgutils.alloca_once_value(builder, constant_vector(_WORDS, 0)) for _ in range(4)]
            with cgutils.for_range(builder, pairs) as loop:
                offset = builder.mul(loop.index, pairs.type(32))
                read = builder.load(pointer_to(builder, _BYTES, codes, offset), align=1)
                lines = builder.load(pointer_to(builder, _BYTES, table, offset), align=1)
                low, high = (
                    builder.and_(read, constant_vector(_BYTES, 15)),
                    builder.lshr(read, constant_vector(_BYTES, 4)),
                )
                for number, part in enumerate((low, high)):
                    both = builder.bitcast(builder.call(look_up, [lines, part]), _WORDS)  # an even and an odd byte
                    odd = builder.lshr(both, constant_vector(_WORDS, 8))
                    for total, term in ((totals[2 * number], both), (totals[2 * number + 1], odd)):
                        builder.store(builder.add(builder.load(total), term), total)
            for number in range(2):
                both, odd = builder.load(totals[2 * number]), builder.load(totals[2 * number + 1])
                even = builder.sub(both, builder.shl(odd, constant_vector(_WORDS, 8)))
                one, other = (builder.shuffle_vector(even, odd, lanes) for lanes in _UNPACKED)  # sub-quantisers
                target = pointer_to(builder, _WORDS, sums, sums.type(32 * number))
                builder.store(builder.add(one, other), target, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), generate
