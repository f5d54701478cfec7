"""A saved result of a sweep is reused only with the code that computed it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from fairseq.evaluation import strategy_code as module
from fairseq.evaluation.strategy_code import strategy_code
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY

PLUG_IN = "from fairseq.retrieval.retrievers.knnlm import {base}\nfrom own_ideas import helper\n"
PLUG_IN += "class Mine({base}):\n    number = helper.NUMBER\n"


def digest() -> str:
    module._digest.cache_clear()
    return strategy_code(sys.modules["own_ideas"].Mine)


@pytest.mark.parametrize("changed", ["__init__.py", "helper.py"])
def test_a_plug_in_and_what_it_imports(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "own_ideas"
    folder.mkdir()
    base = RETRIEVER_REGISTRY["knnlm"].__name__
    (folder / "helper.py").write_text("NUMBER = 1\n")
    (folder / "__init__.py").write_text(PLUG_IN.format(base=base))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("own_ideas")
    try:
        before = digest()
        assert digest() == before
        (folder / changed).write_text((folder / changed).read_text() + "# another thought\n")
        assert digest() != before
    finally:
        for name in [name for name in sys.modules if name.startswith("own_ideas")]:
            del sys.modules[name]


def test_bases_and_the_retrieval_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module._digest.cache_clear()
    before = strategy_code(RETRIEVER_REGISTRY["retomaton"])
    assert strategy_code(RETRIEVER_REGISTRY["knnlm"]) == before, "both are of the retrieval package"
    (tmp_path / "voting.py").write_text("# another way to vote\n")
    monkeypatch.setattr(module, "OWN", tmp_path)
    module._digest.cache_clear()
    assert strategy_code(RETRIEVER_REGISTRY["retomaton"]) != before
    module._digest.cache_clear()
