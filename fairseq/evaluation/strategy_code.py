"""A digest of the source code that determines a strategy's results, so that a sweep does not reuse results of other
code. The sources are the retrieval package, `knnlm.py`, and the packages (or files) of the strategy's class and its
bases, including those of `--user-dir`."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

from fairseq import knnlm, retrieval

OWN = Path(retrieval.__file__).parent


def strategy_code(strategy: Any) -> str:
    """Hex digest of the sources of the class `strategy`, as they were at the first call."""
    return _digest(tuple(kind.__module__ for kind in strategy.__mro__))


@functools.cache
def _digest(modules: tuple[str, ...]) -> str:
    files = {*OWN.rglob("*.py"), Path(knnlm.__file__)}
    for module in modules:
        files |= _sources(module)
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _sources(module: str) -> set[Path]:
    """All files of the top-level package of `module`; for modules of fairseq only the module's file, and for those of
    Python's standard library none."""
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None)
    folders = [Path(folder) for folder in getattr(sys.modules.get(top), "__path__", [])]
    if file is None or top in sys.stdlib_module_names:
        return set()
    if top == "fairseq" or not folders:
        return {Path(file)}
    return {path for folder in folders for path in folder.rglob("*.py")}
