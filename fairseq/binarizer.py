"""fairseq's import path of `Binarizer`; see `fairseq.data.binarization`."""

from fairseq.data.binarization import Binarizer

__all__ = ["Binarizer"]
