"""A compact fairseq for retrieval-augmented language modelling: its names, flags and file formats, on today's
PyTorch."""

__version__ = "0.9.0+retomaton.1"
