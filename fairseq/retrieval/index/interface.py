"""The interface of indexes: `search` (the nearest entries of a query) and `distances` (from a query to given entries).

`@register_index("name")` makes a class available as `--index name`; docs/extending.md has a complete one."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fairseq.errors import BadFlag, UserError
from fairseq.registry import class_registrar, is_built_in, unknown_name
from fairseq.retrieval.datastore import Datastore


class Index(Protocol):
    """What retrieval needs of an index. Distances are squared L2 distances (smaller is nearer) or inner products
    (larger is nearer). exact: whether distances are those of the keys themselves, also when not all nearest entries are
    found; size: number of entries of the datastore; count: number of entries of the index."""

    size: int
    count: int
    device: torch.device
    dimension: int
    inner_product: bool
    exact: bool

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(distances (B, k) float32, ids (B, k) int64), nearest first; padded with ids of -1 when fewer were found."""

    def distances(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """(n,) float32: the distance of `queries[rows[i]]` to entry `ids[i]`. queries (B, D), rows and ids (n,)."""

    def describe(self) -> str:
        """One line for the log, which describes the index and the search."""


class NamedIndex(Index, Protocol):
    """An index that `--index NAME` opens. needs_keys: whether it reads the datastore's keys; takes_file: whether
    `--indexfile` names its file or files."""

    needs_keys: bool
    takes_file: bool

    @staticmethod
    def add_args(parser: Any) -> None:
        """Declares flags of its own, which `open` finds in `args`; may be left out."""

    @classmethod
    def open(cls, args: argparse.Namespace, datastore: Datastore, device: torch.device | str) -> Index:
        """The index that the flags describe; UserError where it cannot be opened."""


PARTS = (
    "size", "count", "device", "dimension", "inner_product", "exact", "needs_keys", "takes_file", "search", "distances",
    "describe",
)
INDEX_REGISTRY: dict[str, type[NamedIndex]] = {}
register_index = class_registrar("--index", INDEX_REGISTRY, interface=NamedIndex)


def named_index(name: str) -> type[NamedIndex]:
    """The class that is registered for `--index name`; BadFlag when there is none."""
    if name not in INDEX_REGISTRY:
        raise unknown_name("--index", name, INDEX_REGISTRY)
    return INDEX_REGISTRY[name]


def open_named(name: str, args: argparse.Namespace, datastore: Datastore, device: torch.device | str) -> Index:
    """Opens the index that is registered under `name`; BadFlag when what its class gives lacks a part of an Index. The
    results of a user's index are checked at every search, whoever calls it."""
    index = named_index(name).open(args, datastore, device)
    missing = [part for part in PARTS if not hasattr(index, part)]
    if missing:
        found, expected = f"{type(index).__name__} without {', '.join(missing)}", f"an index with {', '.join(PARTS)}"
        raise BadFlag(f"--index {name}", found, expected, "add them to its class")
    if not is_built_in(type(index)):
        setattr(index, "search", functools.partial(_checked_search, index, index.search))  # noqa: B010
    return index


def _checked_search(
    index: Index, search: Callable[[Tensor, int], tuple[Tensor, Tensor]], queries: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The result of `search`; UserError, which names the class, for another shape or type, and for ids outside the
    datastore, which would be read from foreign memory."""
    distances, ids = search(queries, k)
    shape = (len(queries), k)
    if tuple(ids.shape) != shape or tuple(distances.shape) != shape or ids.dtype != torch.int64:
        found = f"distances of shape {tuple(distances.shape)} and {ids.dtype} ids of shape {tuple(ids.shape)}"
        expected = f"float32 distances and int64 ids of shape {shape}"
        raise UserError(f"{type(index).__name__}.search: found {found}, expected {expected}")
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < index.size:
        found = f"entries from {int(ids.min())} to {int(ids.max())}"
        raise UserError(f"{type(index).__name__}.search: found {found}, expected -1 to {index.size - 1}")
    return distances, ids


def index_needs_keys(name: str | None) -> bool:
    """Whether the index that `--index` names reads the datastore's keys."""
    return name is not None and bool(getattr(named_index(name), "needs_keys", False))


def add_index_arg(parser: Any) -> None:
    """`--index NAME`."""
    text = "an index by name: exact compares with every key and needs no --indexfile and no build; or one of --user-dir"
    parser.add_argument("--index", metavar="NAME", help=text)
