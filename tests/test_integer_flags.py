"""What types of integer flags say of a wrong text: what is wrong with it, and no bound that nobody meant."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from fairseq.flag_types import LARGEST, any_int, natural_int, positive_int

NONE = ["6.5", "x", "1e3", "nan", "64 64", "0x10"]


@pytest.mark.parametrize(
    "kind, least, said",
    [(positive_int, 1, " of at least 1"), (natural_int, 0, " of at least 0"), (any_int, -LARGEST, "")],
)
def test_texts_that_are_no_integer(kind: Callable[[str], int], least: int, said: str) -> None:
    for text in NONE:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(text)
        assert str(error.value) == f"found {text!r}, expected an integer{said}"
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected an integer of at least {least}$"):
        kind(str(least - 1))
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected an integer of at most {LARGEST}$"):
        kind(str(LARGEST + 1))
    assert (kind(str(least)), kind(str(LARGEST))) == (least, LARGEST)
