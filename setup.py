"""For tools that still ask for a `setup.py`; names, dependencies and scripts stand in pyproject.toml."""

from setuptools import setup

setup()
