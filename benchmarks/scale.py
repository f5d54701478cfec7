"""Time and memory for N entries: datastore, index, clusters and retrieval of synthetic text whose nearest neighbours
are known, from a million entries to the 103 million of WikiText-103, with keys small enough for an ordinary disk.

Entry i belongs to a cluster c(i); its key is that cluster's centre plus a little noise, and its value is determined by
the cluster. A query is a stored key with a little noise, so its nearest neighbour is known: it must be found at any
offset of the files, and following pointers from it must lead through the text that it was taken from. A step is skipped
when its files exist; delete the folder to start from the beginning. Times are processor time of all threads.

    python benchmarks/scale.py --entries 1000000 --folder /tmp/scale
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from timing import conditions, run, table

from fairseq import options
from fairseq.files.atomic_io import read_json, write_json
from fairseq.knnlm import Stores, build_knnlm, open_stores
from fairseq.retrieval.clusters import Clusters, load_clusters, save_clusters
from fairseq.retrieval.datastore import Datastore, keys_path
from fairseq.retrieval.datastore.writer import DatastoreWriter
from fairseq.retrieval.index.build_index import IndexBuilder, IndexRecipe
from fairseq.scored_sequences import ScoredSequence

CHUNK_NUMBERS = 1 << 24  # coordinates of keys that are made at a time
SPREAD = 0.3  # of keys around their cluster's centre, whose coordinates have variance 1
MOVED = 0.01  # of queries from the keys they were taken from
WORDS = 50_000
LENGTH = 64  # tokens of a sequence of queries
FAR = 1 << 31  # bytes


class Text:
    """Clusters and keys of the synthetic entries, by chunk, the same at each call."""

    def __init__(self, entries: int, dimension: int) -> None:
        self.entries, self.dimension, self.clusters = entries, dimension, max(1, entries // 100)
        self.chunk_rows = CHUNK_NUMBERS // dimension
        generator = np.random.default_rng(0)
        self.centres = generator.standard_normal((self.clusters, dimension), np.float32)

    def chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(n,) int32 clusters and (n, D) float16 keys of entries number * chunk_rows onwards."""
        count = min(self.chunk_rows, self.entries - number * self.chunk_rows)
        generator = np.random.default_rng([1, number])
        cluster = generator.integers(0, self.clusters, count, dtype=np.int32)
        keys = self.centres[cluster] + SPREAD * generator.standard_normal((count, self.dimension), np.float32)
        return cluster, keys.astype(np.float16)

    def assignment(self) -> np.ndarray:
        """(N,) int32: the cluster of each entry."""
        numbers = range(-(-self.entries // self.chunk_rows))
        return np.concatenate([self.chunk(number)[0] for number in numbers])


class Scale:
    """The steps; each adds its measurements to `figures`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.text = args, Text(args.entries, args.dimension)
        self.folder = Path(args.folder) / str(args.entries)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.prefix, self.index, self.members = (str(self.folder / name) for name in ("dstore16", "index", "clusters"))
        self.noted = self.folder / "figures.json"
        self.figures: dict[str, Any] = read_json(self.noted) if self.noted.exists() else {}

    def note(self, **figures: Any) -> None:
        """Stores figures, and the peak memory of the process so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.figures |= figures
        self.figures["peak GB"] = max(peak / 1e9, self.figures.get("peak GB", 0.0))
        write_json(self.noted, self.figures)

    def write(self) -> None:
        """The datastore."""
        writer = DatastoreWriter(self.prefix, self.text.entries, self.text.dimension, True, {"synthetic": True})
        started, done, rows = time.process_time(), writer.written, self.text.chunk_rows
        for number in range(done // rows, -(-self.text.entries // rows)):
            cluster, keys = self.text.chunk(number)
            skip = max(0, done - number * rows)
            writer.append(keys[skip:], (cluster % WORDS)[skip:])
        writer.finish({})
        self.note(**{"write us/entry": (time.process_time() - started) / max(1, self.text.entries - done) * 1e6})

    def build(self) -> None:
        """The index."""
        datastore = Datastore.open(self.prefix)
        recipe = IndexRecipe(self.args.lists, self.args.code_size, self.args.probe, 1)
        started = time.process_time()
        IndexBuilder(datastore, self.index, recipe, self.text.entries, self.text.chunk_rows).build()
        seconds = time.process_time() - started
        self.note(**{"build us/entry": seconds / self.text.entries * 1e6})

    def cluster(self) -> None:
        """Cluster arrays and members, by one sort."""
        started = time.process_time()
        clusters = Clusters.from_assignment(self.text.assignment())
        sorted_ = time.process_time()
        save_clusters(self.members, clusters, {})
        self.note(**{"sort us/entry": (sorted_ - started) / self.text.entries * 1e6})

    def planted(self) -> tuple[np.ndarray, list[ScoredSequence], np.ndarray]:
        """(S,) first entries, S sequences, and (S * LENGTH,) the entry that each query was taken from."""
        generator = np.random.default_rng(2)
        starts = np.sort(generator.choice(self.text.entries - LENGTH, self.args.sequences, replace=False))
        starts[-1] = self.text.entries - LENGTH  # the very end of the files
        datastore = Datastore.open(self.prefix)
        keys = datastore.require_keys("queries")
        sequences = []
        for number, start in enumerate(starts.tolist()):
            queries = keys[start : start + LENGTH].astype(np.float32)
            queries += MOVED * generator.standard_normal(queries.shape, np.float32)
            targets = torch.from_numpy(datastore.values[start : start + LENGTH].astype(np.int64))
            lm = torch.full((LENGTH,), float(-np.log(WORDS)))
            sequences.append(ScoredSequence(number, torch.from_numpy(queries), targets, lm))
        return starts, sequences, (starts[:, None] + np.arange(LENGTH)).reshape(-1)

    def evaluate(self) -> None:
        """Searches and pointer steps, and whether the known neighbours are found."""
        starts, sequences, origin = self.planted()
        started = time.process_time()
        load_clusters(self.members, self.text.entries)
        opened = time.process_time() - started
        stores = open_stores(self._flags("--no-pointer"), self.text.dimension)
        started = time.process_time()
        stores.index.code_table()  # type: ignore[attr-defined]
        self.note(**{"open members s": opened, "code table us/entry": self._per_entry(started)})
        queries = torch.cat([sequence.queries for sequence in sequences])
        started = time.process_time()
        _, ids = stores.index.search(queries, self.args.k)
        searched = time.process_time() - started
        found = float((ids.numpy() == origin[:, None]).any(1).mean())
        beyond = origin * (2 * self.text.dimension) > FAR
        far = float((ids.numpy()[beyond] == origin[beyond, None]).any(1).mean()) if beyond.any() else None
        steps = self._pointer_step(stores, queries)
        retomaton = build_knnlm(self._flags("--min-knns", "1", "--members", self.members), 0, stores=stores)
        started = time.process_time()
        results = retomaton.score(sequences)
        spent = time.process_time() - started
        saved = 1 - float(np.mean(np.concatenate([result.searched for result in results])))
        self._check(starts)
        loss = -float(torch.cat([result.log_probs for result in results]).mean())
        self.note(
            **{
                "tokens": len(origin),
                "planted found": found,
                "beyond 2^31 bytes": far,
                "search ms/token": searched / len(origin) * 1e3,
                "pointer step of 1,024 us": steps * 1e6,
                "RetoMaton ms/token": spent / len(origin) * 1e3,
                "saved": saved,
                "RetoMaton nats/token": loss,
                "index bytes/entry": Path(self.index).stat().st_size / self.text.entries,
                "table bytes/entry": stores.index.code_table().records.shape[1],  # type: ignore[attr-defined]
            }
        )

    def _flags(self, *more: str) -> argparse.Namespace:
        flags = f"unused --knnlm --dstore-filename {self.prefix} --indexfile {self.index} --k {self.args.k}"
        flags += f" --probe {self.args.probe} --lmbda 0.25 --knn-sim-func do_not_recomp_l2 --no-load-keys"
        return options.parse_args_and_arch(options.get_eval_lm_parser(), [*flags.split(), *more])

    def _per_entry(self, started: float) -> float:
        return (time.process_time() - started) / self.text.entries * 1e6

    def _pointer_step(self, stores: Stores, queries: torch.Tensor) -> float:
        """Median seconds for the distances of one query to 1,024 random entries."""
        generator = torch.Generator().manual_seed(3)
        sampled = queries[:256]
        rows = torch.arange(len(sampled)).repeat_interleave(1024)
        seconds = []
        for _ in range(5):
            ids = torch.randint(self.text.entries, (len(rows),), generator=generator)
            started = time.process_time()
            stores.index.distances(sampled, rows, ids)
            seconds.append((time.process_time() - started) / len(sampled))
        return float(np.median(seconds))

    def _check(self, starts: np.ndarray) -> None:
        """Checks that the files have the generated keys and values at the positions of the queries."""
        stored = np.memmap(keys_path(self.prefix), np.float16, "r").reshape(-1, self.text.dimension)
        for start in (int(starts[0]), int(starts[-1])):
            number, row = divmod(start, self.text.chunk_rows)
            assert np.array_equal(stored[start], self.text.chunk(number)[1][row])


def main() -> None:
    """Runs the steps that are missing and prints one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--dimension", type=int, default=16)
    parser.add_argument("--code-size", type=int, default=8)
    parser.add_argument("--lists", type=int, default=4096)
    parser.add_argument("--probe", type=int, default=32)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    scale = Scale(args)
    steps = {"dstore16.json": scale.write, "index.json": scale.build, "clusters/clusters.json": scale.cluster}
    for file, step in steps.items():
        if not (scale.folder / file).exists():
            step()
    scale.evaluate()
    print(conditions())
    print(table([{"N": args.entries, **scale.figures}]))


if __name__ == "__main__":
    run(main)
