"""Exact search through products of int8 numbers: `Int8Search`, where `use_int8` says so. Nothing outside imports more.

Keys and queries are rotated and rounded to int8; products of these estimate all distances; a bound on what rounding
changed says which keys may be among the k nearest; only of those is the distance itself computed. So results are those
of computing every distance. docs/int8.md explains the method, the layout in memory and the instructions.

    layout        sizes of tiles, and what the bytes mean
    instructions  numba intrinsics in LLVM IR
    loops         compiled loops around them
    rounding      rotation, rounding, estimates, for arrays
    search        the search itself, and the switch FAIRSEQ_INT8
    in_numpy      what instructions and loops compute, which the tests compare them with"""

from fairseq.retrieval.kernels.int8.search import Found, Int8Search, use_int8

__all__ = ["Found", "Int8Search", "use_int8"]
