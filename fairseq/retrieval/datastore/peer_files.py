"""The files of knn-transformers, named after model type, size and width: `dstore_gpt2_17662_32_keys.npy` and
`_vals.npy` (raw float16 and int32), `index_gpt2_17662_32.indexed`, `members_gpt2_17662_32_SAMPLE_CLUSTERS.pkl`."""

from __future__ import annotations

import argparse
import glob
import logging
import os
import re

from fairseq.errors import BadFlag
from fairseq.files.inputs import regular_size

logger = logging.getLogger(__name__)

FLAG = "--dstore-dir"
VALUES = re.compile(r"dstore_(.+_(\d+)_\d+)_vals\.npy")


def name_peer_files(args: argparse.Namespace) -> None:
    """Sets the flags that name a datastore, its size, index and clusters to the files of `--dstore-dir`, except those
    that are given. BadFlag unless the folder holds one datastore."""
    folder = args.dstore_dir
    if args.dstore_filename is not None:
        raise BadFlag(FLAG, "--dstore-filename beside it", "one of them", "drop the other")
    if not os.path.isdir(folder):
        raise BadFlag(FLAG, folder, "a folder with the files of a datastore")
    found = sorted(filter(None, map(VALUES.fullmatch, os.listdir(folder))), key=lambda match: match[0])
    if len(found) != 1:
        names = ", ".join(match[0] for match in found[:4]) or "no dstore_MODEL_SIZE_WIDTH_vals.npy"
        raise BadFlag(FLAG, f"{names} in {folder}", "the values of one datastore", "or name its files by their flags")
    name, size = found[0][1], int(found[0][2])
    args.dstore_filename = os.path.join(folder, f"dstore_{name}")
    stored = regular_size(args.dstore_filename + "_vals.npy")
    if stored not in (2 * size, 4 * size, 8 * size):
        expected = f"{4 * size} (int32) for {size} entries"
        raise BadFlag(FLAG, f"{stored} bytes in {found[0][0]}", expected, "copy it again")
    args.dstore_size = size if args.dstore_size is None else args.dstore_size
    index = os.path.join(folder, f"index_{name}.indexed")
    if args.indexfile is None and args.index is None and os.path.isfile(index):
        args.indexfile = index
    members = sorted(glob.glob(os.path.join(glob.escape(folder), f"members_{glob.escape(name)}_*.pkl")))
    if args.members is None and members:
        if len(members) > 1:
            others = ", ".join(map(os.path.basename, members[:4]))
            raise BadFlag(FLAG, f"{others} in {folder}", "one file of clusters", "name one by --members")
        args.members = members[0]
    logger.info("%s %s: %s, index %s, clusters %s", FLAG, folder, args.dstore_filename, args.indexfile, args.members)
