"""Which package may import which: the table of docs/architecture.md, checked against every import in the code,
including those inside functions."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fairseq", "fairseq_cli")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Modules and packages that know nothing of language models and of retrieval; what they may import of ours.
BASE: dict[str, set[str]] = {
    "errors": set(),
    "sizes": set(),
    "scored_sequences": set(),
    "tokenizer": set(),
    "refusals": {"errors", "sizes"},
    "files": {"errors", "refusals", "sizes"},
    "flag_help": set(),
    "flag_types": {"errors", "files", "flag_help", "registry"},
    "registry": {"errors"},
    "distributed_utils": {"errors"},
    "option_checks": {"flag_types", "registry"},
    "key_types": {"errors", "registry"},
    "training_state": {"errors"},
    "training_flags": {"errors"},
    "meters": {"errors"},
    "metrics": {"errors", "meters"},
}
LM_PACKAGES = {"binarizer", "data", "modules", "models", "criterions", "optim", "tasks"}
LM_MODULES = {"trainer", "options", "flags", "checkpoint_utils", "checkpoint_saving", "sequence_scorer", "hub_utils"}
ANY_BASE = set(BASE)
ANY_LM = ANY_BASE | LM_PACKAGES | LM_MODULES | {"utils"}

ALLOWED: dict[str, set[str]] = {
    **BASE,
    "data": ANY_BASE | {"utils"},
    "binarizer": ANY_BASE | {"data"},
    "modules": ANY_BASE,
    "utils": ANY_BASE | {"modules"},
    "models": ANY_BASE | {"modules", "data", "utils"},
    "criterions": ANY_BASE | {"modules", "utils"},
    "optim": ANY_BASE | {"modules", "utils"},
    "tasks": ANY_BASE | {"data", "models", "criterions", "utils"},
    "flags": ANY_BASE | LM_PACKAGES | {"retrieval"},
    "retrieval": {"errors", "flag_types", "files", "registry", "scored_sequences", "refusals", "sizes"},
    "knnlm": {"retrieval", "scored_sequences", "errors"},
    "retrieval_steps": {"knnlm", "retrieval"},
    "sequence_scorer": ANY_BASE | LM_PACKAGES | {"utils"},
    "trainer": ANY_LM | {"progress_bar"},
    "checkpoint_utils": ANY_LM,
    "retrieval_lm": ANY_LM | {"knnlm", "retrieval_steps", "retrieval", "evaluation", "generation"},
    "attached_retrieval": ANY_LM | {"knnlm", "retrieval_steps", "retrieval", "evaluation"},
    "generation": ANY_LM | {"knnlm", "retrieval_steps", "retrieval"},
    "evaluation": ANY_LM | {"knnlm", "retrieval"},
}
# Within retrieval: each of its modules and sub-packages imports only those that stand before it.
RETRIEVAL_ORDER = [
    "faiss_import", "entries", "kernels", "datastore", "index", "clusters", "saved", "similarity", "voting",
    "tie_order", "automaton", "retrievers", "flag_conflicts", "lockstep", "parallel", "open_stores",
]
TORCH_FREE = ("errors", "refusals", "sizes", "tokenizer", "files/atomic_io", "files/fingerprint")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it, relative ones resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def unit(name: str) -> str | None:
    """`fairseq.retrieval.index` -> `retrieval`; None for what is not ours or is the bare package."""
    parts = name.split(".")
    if parts[0] == "fairseq_cli":
        return "fairseq_cli"
    return parts[1] if parts[0] == "fairseq" and len(parts) > 1 else None


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports(path: Path) -> None:
    own = unit(module_name(path))
    for name in imports(path):
        other = unit(name)
        if other is None or other == own or own == "fairseq_cli":
            continue
        assert other != "fairseq_cli", f"{name}: the library must not import its commands"
        if own in ALLOWED:
            assert other in ALLOWED[own], f"{name}: {own} must not import {other}"
        else:
            allowed = own == "options" or other not in ("retrieval", "knnlm")
            assert allowed, f"{name}: {own} is of the language model's side"


def test_retrieval_reaches_no_language_model() -> None:
    """Directly or through others, retrieval reaches nothing of the language model's side."""
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        own = unit(module_name(path))
        if own is not None:
            graph.setdefault(own, set()).update(filter(None, map(unit, imports(path))))
    reached, todo = set(), ["retrieval"]
    while todo:
        now = todo.pop()
        if now not in reached:
            reached.add(now)
            todo += graph.get(now, set())
    assert not reached & (LM_PACKAGES | LM_MODULES | {"utils", "knnlm"})


def retrieval_part(name: str) -> str | None:
    """`fairseq.retrieval.index.recall` -> `index`; None outside of retrieval."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["fairseq", "retrieval"] and len(parts) > 2 else None


@pytest.mark.parametrize("path", [path for path in SOURCES if retrieval_part(module_name(path))], ids=module_name)
def test_retrieval_imports_only_point_down(path: Path) -> None:
    own = retrieval_part(module_name(path))
    assert own in RETRIEVAL_ORDER, f"{own}: say in RETRIEVAL_ORDER what it may import"
    for name in imports(path):
        other = retrieval_part(name)
        if other is not None:
            assert RETRIEVAL_ORDER.index(other) <= RETRIEVAL_ORDER.index(own), f"{name}: stands above {own}"


def test_no_circles() -> None:
    """Packages and top-level modules import each other in no circle."""
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        own = unit(module_name(path))
        if own not in (None, "fairseq_cli"):
            graph.setdefault(own, set()).update(filter(None, map(unit, imports(path))))
    with_order = graphlib.TopologicalSorter({own: others - {own} for own, others in graph.items()})
    with_order.prepare()  # raises CycleError, which names the circle


def test_models_use_the_dictionary_only() -> None:
    for path in sorted((ROOT / "fairseq" / "models").rglob("*.py")):
        if path.parent.name == "huggingface":  # it writes texts of a model's own tokens too
            continue
        for name in imports(path):
            if unit(name) == "data":
                assert name in ("fairseq.data.Dictionary", "fairseq.data.dictionary.Dictionary"), f"{path.name}: {name}"


@pytest.mark.parametrize("name", TORCH_FREE)
def test_small_modules_are_light(name: str) -> None:
    assert not {imported.split(".")[0] for imported in imports(ROOT / "fairseq" / f"{name}.py")} & {"torch", "faiss"}


def test_faiss_is_imported_in_one_place() -> None:
    """A run without faiss must say what to install, so nothing imports it but the function that says so."""
    importing = {module_name(path) for path in SOURCES if any(name.split(".")[0] == "faiss" for name in imports(path))}
    assert importing == {"fairseq.retrieval.faiss_import"}


def test_the_table_names_every_package() -> None:
    table = [line for line in (ROOT / "docs" / "architecture.md").read_text().splitlines() if line.startswith("| `")]
    first_cells = " ".join(line.split("|")[1] for line in table)
    for folder in sorted((ROOT / "fairseq").iterdir()):
        if (folder / "__init__.py").exists():
            assert f"`fairseq/{folder.name}/`" in first_cells, f"docs/architecture.md has no row for {folder.name}"


def test_the_checker_sees_imports_inside_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    probe = tmp_path / "fairseq" / "retrieval" / "retrievers" / "probe.py"
    probe.parent.mkdir(parents=True)
    probe.write_text("def f():\n    from ..index import FaissIndex\n    import fairseq.models\n")
    assert list(imports(probe)) == ["fairseq.retrieval.index.FaissIndex", "fairseq.models"]
    with pytest.raises(AssertionError, match="retrieval must not import models"):
        test_imports(probe)
