"""Processor instructions that the compiled loops of `exact_kernels` need and that Python has no words for, as functions
that numba replaces by them: reading half-precision numbers, and fetching memory ahead."""

from __future__ import annotations

import platform
from typing import Any

from fairseq.retrieval.kernels import numba

READS_HALVES = False

if numba is not None:
    from llvmlite import binding, ir
    from numba import extending, types

    instruction: Any = extending.intrinsic

    def _converts_halves() -> bool:
        """Whether the processor that numba compiles for does; LLVM would call a function that numba lacks."""
        if numba.config.CPU_NAME is not None:
            return False
        return platform.machine() in ("aarch64", "arm64") or bool(binding.get_host_cpu_features().get("f16c"))

    READS_HALVES = _converts_halves()

    @instruction
    def as_single(_: Any, number: Any) -> Any:
        """The float32 that a number is: a float32 itself, or the half whose bits a uint16 holds."""

        def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if signature.args[0] == types.float32:
                return arguments[0]
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

        return types.float32(number), generate

    @instruction
    def prefetch(_: Any, address: Any) -> Any:
        """Has the cache line at an address read, for which nothing waits; the address may be anything."""

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            word, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
            function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
            reading, often, data = word(0), word(3), word(1)
            builder.call(function, [builder.inttoptr(arguments[0], pointer), reading, often, data])
            return context.get_dummy_value()

        return types.void(types.int64), generate
