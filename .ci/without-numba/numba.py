"""Stands before numba on the path where tests are to run as if it were not installed."""

raise ImportError("numba is hidden from this run")
