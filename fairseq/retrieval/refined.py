"""An index whose search returns more entries than asked for, of which the stored keys choose: what
`build_dstore.py --preset fast` makes. Short codes that are quick to scan lose little of the true neighbours if half as
many again come back; their distances are then those of the keys."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq.retrieval.exact import UNFOUND, nearest_items, packed_items
from fairseq.retrieval.index import FaissIndex, key_distances


class RefinedIndex(FaissIndex):
    """A FaissIndex refined by `keys` (N, D): a search asks it for `factor` times k entries. Runs on the CPU; results
    are on `device`."""

    exact = True

    def __init__(
        self,
        path: str,
        size: int,
        probe: int | None,
        device: torch.device | str,
        keys: NDArray[np.floating],
        factor: float,
    ) -> None:
        super().__init__(path, size, probe, "cpu")
        self.keys, self.factor, self.results = keys, factor, torch.device(device)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Index.search`; of entries equally far, the first in the datastore are nearer."""
        queries = queries.cpu()
        _, ids = super().search(queries, max(k, min(math.ceil(self.factor * k), self.count)))
        rows = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
        distances = key_distances(self.keys, queries, rows, ids.clamp(min=0).flatten(), inner_product=False)
        distances = distances.view(ids.shape).masked_fill(ids < 0, UNFOUND)
        best, chosen = nearest_items(packed_items(distances.numpy(), ids.numpy()), k)
        return torch.from_numpy(best).to(self.results), torch.from_numpy(chosen).to(self.results)

    def distances(self, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See `Index.distances`: from the keys."""
        return key_distances(self.keys, queries, rows, ids, inner_product=False)

    def describe(self) -> str:
        """One line for the log."""
        return f"{super().describe()}, the best {self.factor:g} k of which the keys choose from"
