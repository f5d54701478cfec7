"""Numbers that the instructions, the loops and the array code of int8 search agree on. docs/int8.md explains
them."""

from __future__ import annotations

import numpy as np

TILE_QUERIES, TILE_KEYS = 8, 48  # a tile's rows and columns: 24 registers of sums, of 32 that there are
LANES = 16  # numbers of 32 bits in a register
FOUR = 4  # bytes whose products one instruction sums into one lane
TRANSFORM = 64  # the least length of a Hadamard transform: four registers

STEPS = 127  # the largest multiple of the step that int8 holds; what lies beyond is clipped
ZERO = 128  # the byte that stands for 0 in keys, whose bytes have no sign
CLIP = (np.float32(ZERO), np.float32(ZERO - STEPS), np.float32(ZERO + STEPS))  # what is 0, the least, the largest

HALF_SQUARE, ERROR, NORM = 0, 1, 2  # rows of an array of norms
