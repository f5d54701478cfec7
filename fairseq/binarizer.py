"""fairseq's name for what turns lines of text into ids; `fairseq.data.binarization` has it."""

from fairseq.data.binarization import Binarizer

__all__ = ["Binarizer"]
