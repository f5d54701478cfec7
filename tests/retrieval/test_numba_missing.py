"""Results do not depend on whether compiled loops can be used: no writable cache folder, a damaged cache, a numba that
is too old or that cannot be imported."""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

import pytest

from fairseq.retrieval import kernels

needs_numba = pytest.mark.skipif(not kernels.AVAILABLE, reason="needs numba")


@pytest.fixture(autouse=True)
def fresh_warnings() -> Any:
    kernels._warn_once.cache_clear()
    yield
    kernels._warn_once.cache_clear()


def double(number: int) -> int:
    return 2 * number


@needs_numba
def test_no_place_for_a_cache(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = kernels.numba.njit

    def njit(cache: bool = False, **settings: Any) -> Any:
        def decorate(function: Any) -> Any:
            if cache:
                raise RuntimeError(f"cannot cache function {function.__name__!r}: no locator available")
            return real(**settings)(function)

        return decorate

    monkeypatch.setattr(kernels.numba, "njit", njit)
    with caplog.at_level(logging.WARNING):
        functions = [kernels.compiled(double), kernels.compiled(double)]
    assert [function(21) for function in functions] == [42, 42]
    assert len(caplog.records) == 1 and "cannot be kept" in caplog.text


@needs_numba
@pytest.mark.parametrize("action", ["load_overload", "save_overload"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), EOFError("Ran out of input")])
def test_a_cache_that_fails(action: str, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        cache_path = "/somewhere"

        def load_overload(self, *arguments: Any) -> Any:
            if action == "load_overload":
                raise error

        def save_overload(self, *arguments: Any) -> None:
            if action == "save_overload":
                raise OSError(28, "No space left on device")

    function = kernels.compiled(lambda number: 3 * number)
    function._cache = kernels._ForgivingCache(Broken())
    with caplog.at_level(logging.WARNING):
        assert function(5) == 15
    assert len(caplog.records) == 1 and "/somewhere" in caplog.text


def stub(version: str = "0.61.2", disabled: bool = False) -> types.ModuleType:
    module = types.ModuleType("numba")
    module.__dict__.update(__version__=version, config=types.SimpleNamespace(DISABLE_JIT=disabled))
    for name in ("extending", "types", "core"):
        setattr(module, name, types.ModuleType(f"numba.{name}"))
    module.core.__dict__.update(caching=None, cgutils=None)
    return module


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (stub("0.56.4"), "version 0.56.4, where 0.61 is needed"),
        (stub(disabled=True), "NUMBA_DISABLE_JIT is set"),
        (None, None),
    ],
)
def test_what_cannot_be_used_is_left_out(
    module: Any, says: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llvmlite = types.ModuleType("llvmlite")
    llvmlite.__dict__.update(binding=None, ir=None)
    monkeypatch.setitem(sys.modules, "llvmlite", llvmlite)
    for name in list(sys.modules):
        if name.startswith("numba."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", module)
    if module is not None:
        monkeypatch.setitem(sys.modules, "numba.core", module.core)
    with caplog.at_level(logging.WARNING):
        assert kernels._import_numba() is None
    assert len(caplog.records) == (says is not None)  # None: not installed, which is nothing to say
    assert says is None or says in caplog.text


def test_a_numba_that_raises_on_import(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Raising:
        def find_spec(self, name: str, *more: Any) -> None:
            if name == "numba":
                raise OSError("Could not find/load shared object file")

    monkeypatch.delitem(sys.modules, "numba", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Raising(), *sys.meta_path])
    with caplog.at_level(logging.WARNING):
        assert kernels._import_numba() is None
    assert "OSError: Could not find/load shared object file" in caplog.text
