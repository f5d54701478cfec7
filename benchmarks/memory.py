"""Peak memory of an evaluation, compared with the size of what it has to keep in memory: index, values, clusters, the
model, and 1 GB.

Takes the flags of eval_lm.py, runs it in a separate process, and adds up the sizes of the files that the flags name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import conditions, run, table

from fairseq import options


def main() -> None:
    """Runs the command once."""
    args = options.parse_args_and_arch(options.get_eval_lm_parser(), sys.argv[1:])
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        command = [sys.executable, str(root / "eval_lm.py"), *sys.argv[1:], "--results-json", str(results)]
        done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8")
        if done.returncode:
            sys.stderr.write(done.stderr)
            sys.exit(done.returncode)
        peak = json.loads(results.read_text(encoding="utf-8"))["peak_memory_bytes"]
    sizes = required_bytes(args)
    limit = sum(sizes.values()) + 1e9
    print(conditions())
    row = {name: f"{size / 1e9:.3f} GB" for name, size in sizes.items()}
    print(table([{**row, "limit": f"{limit / 1e9:.3f} GB", "peak": f"{peak / 1e9:.3f} GB"}]))


def required_bytes(args: argparse.Namespace) -> dict[str, int]:
    """Bytes of the files that an evaluation has to have in memory."""
    sizes = {"model": os.path.getsize(args.path)}
    if args.knnlm:
        sizes["index"] = os.path.getsize(args.indexfile)
        sizes["values"] = os.path.getsize(args.dstore_filename + "_vals.npy")
    if args.members:
        path = Path(args.members)
        sizes["clusters"] = (
            sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else os.path.getsize(path)
        )
    return sizes


if __name__ == "__main__":
    run(main)
