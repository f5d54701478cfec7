"""Damage for the fuzzers: bytes changed as bit rot, cut copies and malice change them, from a seed, so that every
failure can be repeated with its number."""

from __future__ import annotations

import random
import struct

EXTREMES = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
TOKENS = (b"\x00", b"\xff" * 8, b" ", b"\n", b"-1", b"1e999", b"nan", b"null", b"{}", b"[]", b"../", b"9" * 20)


def mutate(seed: int, original: bytes) -> bytes:
    """`original` with one to six changes that follow from `seed`."""
    generator = random.Random(seed)
    data = bytearray(original)
    # Headers are small beside the payload, and it is them that readers believe: every second change hits the start.
    for _ in range(generator.choice((1, 1, 1, 2, 4, 6))):
        end = len(data) if generator.random() < 0.5 else min(len(data), 256)
        _change(generator, data, generator.randrange(end + 1) if end else 0, original)
    return bytes(data)


def _change(generator: random.Random, data: bytearray, at: int, original: bytes) -> None:
    kind = generator.randrange(8)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << generator.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = generator.randrange(256)
    elif kind == 2:
        width, letter = generator.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
        number = generator.choice(EXTREMES) & ((1 << (8 * width)) - 1)
        data[at : at + width] = struct.pack("<" + letter, number)
    elif kind == 3:
        del data[at : at + generator.choice((1, 2, 4, 8, 64, 1024))]
    elif kind == 4:
        data[at:at] = generator.choice(TOKENS)
    elif kind == 5:
        start = generator.randrange(len(original) or 1)
        length = generator.choice((1, 4, 8, 64, 512))
        data[at:at] = original[start : start + length]
    elif kind == 6:
        del data[at:]
    else:
        data[at : at + generator.choice((1, 4, 8, 32))] = bytes(generator.randrange(256) for _ in range(4))
