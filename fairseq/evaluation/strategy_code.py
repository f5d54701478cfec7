"""Which code a strategy is: a digest of the sources that decide its results, so that a saved point of a sweep is not
taken for one of changed code. They are the retrieval package, the mixing of the probabilities, and the packages (or
files) of the strategy's class and its bases, plug-ins of `--user-dir` included."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

from fairseq import knnlm, retrieval

OWN = Path(retrieval.__file__).parent


def strategy_code(strategy: Any) -> str:
    """Hex digest of the sources of the class `strategy`, as they were when first asked for."""
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
    """The files of the top-level package that `module` is in; of this package, and of Python, only the file itself."""
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None)
    folders = [Path(folder) for folder in getattr(sys.modules.get(top), "__path__", [])]
    if file is None or top in sys.stdlib_module_names:
        return set()
    if top == "fairseq" or not folders:
        return {Path(file)}
    return {path for folder in folders for path in folder.rglob("*.py")}
