"""Who may know whom: the table of docs/architecture.md, checked against every import in the code, those inside
functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fairseq", "fairseq_cli")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Rooms that know nothing of language models and of retrieval; what they may import of ours.
GROUND: dict[str, set[str]] = {
    "errors": set(),
    "sizes": set(),
    "scored_sequences": set(),
    "tokenizer": set(),
    "fingerprint": set(),
    "refusals": {"errors", "sizes"},
    "pickle_calls": set(),
    "atomic_io": {"errors", "refusals", "sizes"},
    "safe_pickle": {"errors", "pickle_calls"},
    "flag_types": {"errors"},
    "registry": {"errors"},
    "distributed_utils": {"errors"},
    "meters": {"errors"},
    "metrics": {"errors", "meters"},
    "provenance": {"atomic_io", "errors", "refusals"},
}
LM_WING = {"binarizer", "data", "modules", "models", "criterions", "optim", "tasks"}
LM_TOP = {"trainer", "options", "checkpoint_utils", "checkpoint_saving", "sequence_scorer", "hub_utils", "lm_scoring"}
FLOOR = set(GROUND)

ALLOWED: dict[str, set[str]] = {
    **GROUND,
    "data": FLOOR | {"binarizer", "utils"},
    "binarizer": FLOOR | {"data"},
    "modules": FLOOR | {"utils"},
    "utils": FLOOR | {"modules"},
    "models": FLOOR | {"modules", "data", "utils"},
    "criterions": FLOOR | {"modules", "utils"},
    "optim": FLOOR | {"modules", "utils"},
    "tasks": FLOOR | {"data", "models", "criterions", "utils"},
    "retrieval": {
        "errors", "flag_types", "atomic_io", "safe_pickle", "registry", "scored_sequences", "provenance", "fingerprint",
        "refusals", "sizes",
    },
    "target_foss": {"knnlm", "retrieval", "scored_sequences", "errors"},
    "sweep": {"knnlm", "retrieval", "scored_sequences", "errors", "atomic_io", "fingerprint"},
    "sweep_figures": {"errors", "atomic_io"},
    "knnlm": {"retrieval", "scored_sequences", "errors"},
    "sequence_scorer": FLOOR | LM_WING | {"utils"},
    "trainer": FLOOR | LM_WING | LM_TOP | {"utils", "progress_bar"},
    "checkpoint_utils": FLOOR | LM_WING | LM_TOP | {"utils"},
    "lm_scoring": FLOOR | LM_WING | LM_TOP | {"utils"},
}
TORCH_FREE = ("errors", "refusals", "atomic_io", "fingerprint", "tokenizer")


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


def room(name: str) -> str | None:
    """`fairseq.retrieval.index` -> `retrieval`; None for what is not ours or is the bare package."""
    parts = name.split(".")
    if parts[0] == "fairseq_cli":
        return "fairseq_cli"
    return parts[1] if parts[0] == "fairseq" and len(parts) > 1 else None


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports(path: Path) -> None:
    own = room(module_name(path))
    for name in imports(path):
        other = room(name)
        if other is None or other == own or own == "fairseq_cli":
            continue
        assert other != "fairseq_cli", f"{name}: the library must not import its commands"
        if own in ALLOWED:
            assert other in ALLOWED[own], f"{name}: {own} must not import {other}"
        else:
            assert own is not None
            knows_retrieval = own in ("knnlm", "options", "datastore_pass", "doctor")  # flags, writing, and looking
            assert knows_retrieval or other not in ("retrieval", "knnlm"), f"{name}: {own} is of the LM's wing"


def test_the_wings_do_not_meet() -> None:
    """Directly or through others, retrieval reaches nothing of the language model's side."""
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        own = room(module_name(path))
        if own is not None:
            graph.setdefault(own, set()).update(filter(None, map(room, imports(path))))
    reached, todo = set(), ["retrieval"]
    while todo:
        now = todo.pop()
        if now not in reached:
            reached.add(now)
            todo += graph.get(now, set())
    assert not reached & (LM_WING | LM_TOP | {"utils", "knnlm"})


def test_models_use_the_dictionary_only() -> None:
    for path in sorted((ROOT / "fairseq" / "models").rglob("*.py")):
        for name in imports(path):
            if room(name) == "data":
                assert name in ("fairseq.data.Dictionary", "fairseq.data.dictionary.Dictionary"), f"{path.name}: {name}"


@pytest.mark.parametrize("name", TORCH_FREE)
def test_small_rooms_are_light(name: str) -> None:
    assert not {imported.split(".")[0] for imported in imports(ROOT / "fairseq" / f"{name}.py")} & {"torch", "faiss"}


def test_faiss_has_one_door() -> None:
    """A run without faiss must say what to install, so nothing imports it but the function that says so."""
    importing = {module_name(path) for path in SOURCES if any(name.split(".")[0] == "faiss" for name in imports(path))}
    assert importing == {"fairseq.retrieval.faiss_import"}


def test_the_table_names_every_room() -> None:
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
