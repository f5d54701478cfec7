"""The files of knn-transformers, named after model type, size and width: `dstore_gpt2_17662_32_keys.npy` and
`_vals.npy` (raw float16 and int32), `index_gpt2_17662_32.indexed`, `members_gpt2_17662_32_SAMPLE_CLUSTERS.pkl`."""

from __future__ import annotations

import argparse
import logging
import os
import re

from fairseq.errors import BadFlag
from fairseq.files.inputs import regular_size

logger = logging.getLogger(__name__)

FLAG = "--dstore-dir"
VALUES = re.compile(r"dstore_(.+_(\d+)_\d+)_vals\.npy")


def name_datastore(args: argparse.Namespace) -> None:
    """For a command that needs a datastore: names the files of `--dstore-dir`, if that is given; BadFlag where neither
    it nor `--dstore-filename` is."""
    if args.dstore_dir is not None:
        name_peer_files(args)
    if args.dstore_filename is None:
        raise BadFlag("--dstore-filename", "nothing", f"the prefix of a datastore's files, or {FLAG} DIR")


def name_peer_files(args: argparse.Namespace) -> None:
    """Sets the flags that name a datastore, its size, index and clusters to the files of `--dstore-dir`, except those
    that are given. Of several datastores the newest is taken, by the time of its values, and of several files of its
    clusters the newest; a warning says which. BadFlag where there is none, or where two are equally new."""
    folder = args.dstore_dir
    if args.dstore_filename is not None:
        raise BadFlag(FLAG, "--dstore-filename beside it", "one of them", "drop the other")
    if not os.path.isdir(folder):
        raise BadFlag(FLAG, folder, "a folder with the files of a datastore")
    values = [name for name in os.listdir(folder) if VALUES.fullmatch(name)]
    if not values:
        found = f"no dstore_MODEL_SIZE_WIDTH_vals.npy in {folder}"
        raise BadFlag(FLAG, found, "the values of one datastore", "or name its files by their flags")
    chosen = _newest(folder, values, "datastores", "--dstore-filename")
    match = VALUES.fullmatch(chosen)
    assert match is not None
    name, size = match[1], int(match[2])
    args.dstore_filename = os.path.join(folder, f"dstore_{name}")
    stored = regular_size(args.dstore_filename + "_vals.npy")
    if stored not in (2 * size, 4 * size, 8 * size):
        expected = f"{4 * size} (int32) for {size} entries"
        raise BadFlag(FLAG, f"{stored} bytes in {chosen}", expected, "copy it again")
    args.dstore_size = size if args.dstore_size is None else args.dstore_size
    index = os.path.join(folder, f"index_{name}.indexed")
    if args.indexfile is None and args.index is None and os.path.isfile(index):
        args.indexfile = index
    pattern = re.compile(rf"members_{re.escape(name)}_\d+_\d+\.pkl")
    members = [found for found in os.listdir(folder) if pattern.fullmatch(found)]
    if members and getattr(args, "members", ()) is None:
        args.members = os.path.join(folder, _newest(folder, members, "files of clusters", "--members"))
    clusters = getattr(args, "members", None)
    logger.info("%s %s: %s, index %s, clusters %s", FLAG, folder, args.dstore_filename, args.indexfile, clusters)


def _newest(folder: str, names: list[str], kind: str, flag: str) -> str:
    """The one of `names` that was changed last; `flag` names another."""
    times = {name: os.stat(os.path.join(folder, name)).st_mtime_ns for name in sorted(names)}
    newest = [name for name, time in times.items() if time == max(times.values())]
    if len(newest) > 1:
        found = f"{' and '.join(newest[:4])}, equally new, in {folder}"
        raise BadFlag(FLAG, found, "one that is newest", f"name one by {flag}")
    if len(times) > 1:
        others = ", ".join(name for name in times if name != newest[0])
        logger.warning("%s: %s has %d %s; the newest is taken, %s, and not %s (%s names another)",
                       FLAG, folder, len(times), kind, newest[0], others, flag)
    return newest[0]
