"""Building an IVFPQ index of a datastore's keys, resumably.

After training, keys are encoded chunk by chunk and the codes are appended to a file, from which a later run can
continue; at the end the inverted lists are filled from this file. A build therefore writes the codes once and the index
once, and needs memory for one chunk of keys and the index."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fairseq.errors import BadFile, BadFlag, UserError
from fairseq.files.array_stream import RowDigest
from fairseq.files.atomic_io import (
    delay_interrupts,
    discard,
    leftovers,
    open_temporary,
    publish,
    require_free_space,
    require_replaceable,
    sync,
    take_over_temporary,
    temporary_path,
    writing,
)
from fairseq.files.checksums import check_opened, describe_content, sample_digest
from fairseq.files.inputs import open_input
from fairseq.files.number_checks import require_range
from fairseq.files.output_lock import exclusive
from fairseq.files.outputs import check_files, index_files
from fairseq.files.progress import read_progress, rows_noted, warn_of_other_run, write_progress
from fairseq.files.sidecar import read_sidecar, remove_sidecar, sidecar_path, write_sidecar
from fairseq.refusals import require_memory
from fairseq.retrieval.datastore import Datastore, keys_path, read_keys, values_path
from fairseq.retrieval.datastore.provenance import datastore_files, datastore_identity
from fairseq.retrieval.faiss_import import require_faiss
from fairseq.retrieval.index.faiss_files import read_faiss_index, reason
from fairseq.sizes import size_text

logger = logging.getLogger(__name__)

KIND = "index"
CODE_SIZE = 64  # unless --code_size says another
LEAST_A_LIST = 39  # training vectors per list, below which FAISS's k-means warns
TRAINING_SAMPLE = 1_000_000
SAFE_POINT_SECONDS = 30.0
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EROFS)
REFINE = 1.3
CODE_BITS, FAST_BITS = 8, 4  # of a sub-quantiser, as published and for fast scans
ROTATION_ITERATIONS = 15
TRAIN_AGAIN = "delete this file to train again"


@dataclass(frozen=True)
class IndexRecipe:
    """The settings that determine an index's bytes. ncentroids: number of inverted lists; code_size: bytes per vector
    (8-bit sub-quantisers); pca: number of dimensions after a rotated PCA, 0 for none; probe: the nprobe that is stored;
    seed: of the training sample.

    fast: codes of the same size, with twice as many 4-bit sub-quantisers of the keys themselves (no residuals), after a
    rotation trained for them (OPQ, unless there is a PCA); FAISS scans such codes in registers. Their recall is lower,
    so a search takes `REFINE` times k entries, and the keys decide which are nearest (`refined`)."""

    ncentroids: int
    code_size: int
    probe: int
    seed: int
    pca: int = 0
    fast: bool = False

    def identity(self) -> dict[str, Any]:
        """The fields that are stored in an index's sidecar."""
        fields = asdict(self)
        return fields | {"refine": REFINE} if fields.pop("fast") else fields


class IndexBuilder:
    """Builds the index `path` from the first `size` keys of `datastore`, adding `chunk` keys at a time."""

    def __init__(self, datastore: Datastore, path: str, recipe: IndexRecipe, size: int, chunk: int) -> None:
        self.datastore, self.path, self.recipe, self.size, self.chunk = datastore, path, recipe, size, chunk
        self.keys = datastore.require_keys("building an index")[:size]
        self.dimension = self.keys.shape[1]
        self.trained_path = path + ".trained"
        self.codes_path = path + ".codes"
        self.progress_path = path + ".progress.json"
        self.identity = {**recipe.identity(), "size": size, "dimension": self.dimension}
        self.identity["datastore"] = datastore_identity(datastore)
        self._refuse_to_replace_others()
        if recipe.pca > self.dimension:
            raise BadFlag("--pca", recipe.pca, f"at most the keys' dimension {self.dimension}")
        self._check_code_size(recipe.pca or self.dimension)
        self._check_enough_keys()

    def _check_code_size(self, width: int) -> None:
        size, parts = self.recipe.code_size, 2 if self.recipe.fast else 1  # sub-quantisers a byte
        if width % (size * parts):
            found = f"{size} (the default)" if size == CODE_SIZE else size
            fitting = [smaller for smaller in range(1, size) if width % (smaller * parts) == 0]
            remedy = f"give --code_size {fitting[-1]}" if fitting else "leave out --preset fast"
            raise BadFlag("--code_size", found, f"a divisor of {'half ' * (parts == 2)}the dimension {width}", remedy)

    def _check_enough_keys(self) -> None:
        """BadFlag when FAISS could not train on so few keys, or would end the process."""
        recipe, size = self.recipe, self.size
        without = "or do without an index: eval_lm.py --index exact"
        if min(size, TRAINING_SAMPLE) < recipe.ncentroids:
            expected = f"at most the datastore's {size} entries" if size <= TRAINING_SAMPLE else str(TRAINING_SAMPLE)
            raise BadFlag("--ncentroids", recipe.ncentroids, expected, f"lower it, {without}")
        if size < recipe.pca:
            raise BadFlag("--pca", recipe.pca, f"at most the datastore's {size} entries", f"lower it, {without}")
        bits, rotated = (FAST_BITS, not recipe.pca) if recipe.fast else (CODE_BITS, False)
        least = max(1 << bits, self.dimension if rotated else 0)
        if size < least:
            why = f"at least {least}, to train codes of {bits} bits" + (" and their rotation" if rotated else "")
            remedy = "leave out --preset fast, " if recipe.fast and size >= 1 << CODE_BITS else "store more text, "
            raise BadFile(keys_path(self.datastore.prefix), f"{size} keys", why, remedy + without)

    def _refuse_to_replace_others(self) -> None:
        """BadFlag when a file would replace one of another kind: never the datastore's, others with --force."""
        prefix = self.datastore.prefix
        own = {os.path.realpath(path) for path in (keys_path(prefix), values_path(prefix), sidecar_path(prefix))}
        if os.path.realpath(self.path) in own:
            raise BadFlag("--faiss_index", f"{self.path}, which the datastore consists of", "another file")
        check_files("--faiss_index", index_files(self.path))

    def build(self, show_progress: bool = True) -> Any:
        """Trains (or reads the trained index of an earlier run), adds all keys, writes the index and its sidecar, and
        returns the FAISS index."""
        with exclusive(self.path):
            return self._build(show_progress)

    def _build(self, show_progress: bool) -> Any:
        started = time.perf_counter()
        for path in (self.path, self.trained_path):
            require_replaceable(path)
        self._log_plan()
        index = self._trained_index()
        trained = time.perf_counter()
        self._encode(index, show_progress)
        self._fill(index)
        index = self._finished(index)
        self._publish(index)
        logger.info(
            "wrote %s: %d entries, %.1f MB; training %.1f s, adding %.1f s",
            self.path,
            index.ntotal,
            os.path.getsize(self.path) / 1e6,
            trained - started,
            time.perf_counter() - trained,
        )
        return index

    def _log_plan(self) -> None:
        recipe, sample = self.recipe, min(self.size, TRAINING_SAMPLE)
        index_bytes = self.size * (recipe.code_size + 8)
        memory = index_bytes + max(sample, min(self.chunk, self.size)) * self.dimension * 4
        logger.info(
            "index of %d keys x %d: %d lists, %d bytes a code%s; %s on disk, about %s of memory",
            self.size,
            self.dimension,
            recipe.ncentroids,
            recipe.code_size,
            f", PCA to {recipe.pca}" if recipe.pca else "",
            size_text(index_bytes),
            size_text(memory),
        )
        require_free_space(self.path, 2 * index_bytes, "the index")
        require_memory(memory, "building the index", "lower --num_keys_to_add_at_a_time or --code_size")

    # Training

    def _trained_index(self) -> Any:
        if os.path.exists(self.trained_path) and self._trained_for_this():
            check_opened(self.trained_path, {"index": self.trained_path}, whole=True, remedy=TRAIN_AGAIN)
            try:
                index = read_faiss_index(self.trained_path)
            except BadFile as error:
                raise BadFile(error.file, error.found, error.expected, TRAIN_AGAIN) from error
            self._check_trained(index)
            ivf = require_faiss().extract_index_ivf(index)
            ivf.nprobe = self.recipe.probe
            logger.info("using the trained index %s", self.trained_path)
            return index
        discard([temporary_path(self.codes_path), *leftovers(self.codes_path)])
        discard([Path(self.progress_path), Path(self.trained_path)])
        index = self._new_index()
        sample = self._training_sample()
        logger.info("training on %d keys", len(sample))
        lists = self.recipe.ncentroids
        if len(sample) < LEAST_A_LIST * lists:
            logger.warning(
                "--ncentroids %d: %.1f training keys a list, fewer than FAISS asks for (%d); %d lists would have them",
                lists,
                len(sample) / lists,
                LEAST_A_LIST,
                max(1, len(sample) // LEAST_A_LIST),
            )
        try:
            index.train(sample)
        except RuntimeError as error:
            raise UserError(f"{self.path}: FAISS could not train the index ({reason(error)})") from error
        temporary = self._write(index, self.trained_path)
        content = {"index": describe_content(temporary)}
        # The sidecar is written first, so that the file never exists without it.
        write_sidecar(self.trained_path, KIND, {**self.identity, "content": content})
        publish(temporary, self.trained_path)
        return index

    def _trained_for_this(self) -> bool:
        """Whether an earlier run trained for the same datastore and recipe (except for the probe, which does not affect
        training). A trained index without a sidecar is used, as in the original."""
        described = read_sidecar(self.trained_path, KIND, {})
        if described is None:
            said = "%s: no sidecar describes it; assumed to be trained on these keys, and undamaged"
            logger.warning(said, self.trained_path)
            return True
        other = ("kind", "format_version", "probe", "content")
        stored, wanted = (
            {name: value for name, value in fields.items() if name not in other}
            for fields in (described, json.loads(json.dumps(self.identity)))
        )
        if stored == wanted:
            return True
        logger.warning("%s was trained for another datastore or recipe; training again", self.trained_path)
        return False

    def _new_index(self) -> Any:
        faiss = require_faiss()
        recipe = self.recipe
        width = recipe.pca or self.dimension
        parts, bits = (2 * recipe.code_size, FAST_BITS) if recipe.fast else (recipe.code_size, CODE_BITS)
        ivfpq = faiss.IndexIVFPQ(faiss.IndexFlatL2(width), width, recipe.ncentroids, parts, bits)
        ivfpq.by_residual = not recipe.fast  # without residuals, one look-up table is valid for all lists of a query
        ivfpq.nprobe = recipe.probe
        if recipe.pca:
            return faiss.IndexPreTransform(faiss.PCAMatrix(self.dimension, recipe.pca, 0, True), ivfpq)
        if not recipe.fast:
            return ivfpq
        rotation = faiss.OPQMatrix(width, parts)
        rotation.niter = ROTATION_ITERATIONS
        coder = faiss.ProductQuantizer(width, parts, bits)
        rotation.pq = coder  # the quantiser used in training the rotation; FAISS holds no reference to it
        index = faiss.IndexPreTransform(rotation, ivfpq)
        index.referenced_objects = [*getattr(index, "referenced_objects", []), coder]
        return index

    def _training_sample(self) -> NDArray[np.float32]:
        """At most a million distinct keys, in the original's random order, so that the index equals the original's to
        the byte (FAISS's k-means draws its own sample from them). They are read in the file's order."""
        count = min(self.size, TRAINING_SAMPLE)
        chosen = np.random.RandomState(self.recipe.seed).permutation(self.size)[:count]
        places = np.argsort(chosen)
        sample = np.empty((count, self.dimension), np.float32)
        for start in range(0, count, self.chunk):
            some = places[start : start + self.chunk]
            sample[some] = self._read_keys(chosen[some])
        return sample

    def _read_keys(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        return read_keys(self.keys, rows, keys_path(self.datastore.prefix))

    def _check_trained(self, index: Any) -> None:
        faiss = require_faiss()
        ivf = faiss.try_extract_index_ivf(index)
        found = (index.d, getattr(ivf, "nlist", None), getattr(ivf, "code_size", None))
        expected = (self.dimension, self.recipe.ncentroids, self.recipe.code_size)
        if found != expected or (index.ntotal != 0):
            raise BadFile(
                self.trained_path,
                f"dimension, lists and code size {found} with {index.ntotal} entries",
                f"{expected} and no entries",
                TRAIN_AGAIN,
            )

    # Adding

    def _encode(self, index: Any, show_progress: bool) -> None:
        """Appends list number and code of every key to the codes file, continuing after those of an earlier run."""
        width = index.sa_code_size()
        done, digest = self._resume_point(width)
        if not done and os.path.exists(self.progress_path):
            os.unlink(self.progress_path)  # of another build, which must not continue from this build's codes
        hidden = None if show_progress else True
        with (
            writing(self.codes_path),
            open_temporary(self.codes_path, "r+b" if done else "w+b") as stream,
            tqdm(total=self.size, initial=done, unit="keys", unit_scale=True, disable=hidden) as bar,
        ):
            stream.truncate(done * width)
            stream.seek(0, os.SEEK_END)
            safe = time.monotonic()
            for start in range(done, self.size, self.chunk):
                keys = self._read_keys(slice(start, start + self.chunk))
                codes = index.sa_encode(keys)
                stream.write(codes)
                digest.add(codes.data)
                bar.update(len(keys))
                if time.monotonic() - safe > SAFE_POINT_SECONDS:
                    self._safe_point(stream, start + len(keys), digest)
                    safe = time.monotonic()
            self._safe_point(stream, self.size, digest)

    def _safe_point(self, stream: Any, done: int, digest: RowDigest) -> None:
        stream.flush()
        os.fsync(stream.fileno())
        state = {**self._codes_identity(), "encoded": done, "digest": digest.text()}
        write_progress(self.progress_path, state)

    def _codes_identity(self) -> dict[str, Any]:
        """Identifies what codes are made from: the keys, the recipe, and the trained index."""
        return {"identity": self.identity, "trained": sample_digest(self.trained_path)}

    def _resume_point(self, width: int) -> tuple[int, RowDigest]:
        """The number of keys that an unfinished run with the same identity has encoded, and the digest of their codes,
        for which the codes are read once; 0 when they differ from what was written."""
        nothing = 0, RowDigest()
        if not take_over_temporary(self.codes_path):
            return nothing
        progress = read_progress(self.progress_path)
        wanted = json.loads(json.dumps(self._codes_identity()))
        done, digest = rows_noted(progress, "encoded"), RowDigest()
        if not 0 < done <= self.size or {**progress, **wanted} != progress:
            warn_of_other_run(self.progress_path, progress)
            return nothing
        with open_input(temporary_path(self.codes_path)) as stream:
            digest.add_from(stream, done * width)
        if digest.text() != progress.get("digest"):
            logger.warning("%s: the codes differ from those that were written; encoding again", self.codes_path)
            return nothing
        logger.info("continuing after %d of %d keys", done, self.size)
        return done, digest

    def _fill(self, index: Any) -> None:
        """Fills the inverted lists from the codes file; ids are row numbers."""
        faiss = require_faiss()
        width = index.sa_code_size()
        ivf = faiss.extract_index_ivf(index)
        codes = np.memmap(temporary_path(self.codes_path), np.uint8, "r", shape=(self.size, width))
        for start in range(0, self.size, self.chunk):
            part = np.ascontiguousarray(codes[start : start + self.chunk])
            require_range(self.codes_path, _list_numbers(part, ivf), 0, ivf.nlist, "lists", "delete it and build again")
            ivf.add_sa_codes(part, np.arange(start, start + len(part), dtype=np.int64))
        index.ntotal = ivf.ntotal

    def _finished(self, index: Any) -> Any:
        """The index to write; for `fast`, converted to the class whose codes are in the order for fast scans."""
        if not self.recipe.fast:
            return index
        faiss = require_faiss()
        codes = faiss.IndexIVFPQFastScan(faiss.downcast_index(index.index))
        finished = faiss.IndexPreTransform(index.chain.at(0), codes)
        # `index` owns the centroids and the transform.
        finished.referenced_objects = [*getattr(finished, "referenced_objects", []), codes, index]
        return finished

    def _write(self, index: Any, path: str) -> str:
        """Writes the index to the temporary name of `path`, and returns that name."""
        faiss = require_faiss()
        temporary = str(temporary_path(path))
        with writing(path):
            open_temporary(path).close()
        try:
            faiss.write_index(index, temporary)
        except RuntimeError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise UserError(f"{path}: {_why_not_written(error)}; free some space, then run again") from error
        return temporary

    def _publish(self, index: Any) -> None:
        temporary = self._write(index, self.path)
        content = {"index": describe_content(temporary)}
        origin = {"datastore_files": datastore_files(self.datastore), "content": content}
        sync(temporary)  # takes time, so it is done before the old sidecar is removed
        with delay_interrupts():
            remove_sidecar(self.path)
            publish(temporary, self.path)
            write_sidecar(self.path, KIND, {**self.identity, **origin, "entries": int(index.ntotal)})
        discard([temporary_path(self.codes_path), Path(self.progress_path)])


def _why_not_written(error: RuntimeError) -> str:
    """The operating system's reason why FAISS could not write; the rest of FAISS's message is not useful to users."""
    said = next((os.strerror(number) for number in WRITE_ERRORS if os.strerror(number) in str(error)), None)
    return "cannot be written" if said is None else f"cannot be written ({said})"


def _list_numbers(codes: NDArray[np.uint8], ivf: Any) -> NDArray[np.int64]:
    """(n,): the list number at the start of each of `codes`, which has as many bytes as the number of lists needs."""
    width = int(ivf.coarse_code_size())
    numbers = np.zeros((len(codes), 8), np.uint8)
    numbers[:, :width] = codes[:, :width]
    return numbers.view("<i8")[:, 0]
