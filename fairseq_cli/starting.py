"""The first moments of a command, while torch and FAISS are loaded: Ctrl-C ends it at once (nothing was written yet),
and libraries that find no memory are one sentence. Nothing of this happens in a program that only imports a command."""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType

PROGRAMS = ("preprocess.py", "train.py", "eval_lm.py", "build_dstore.py", "kmeans.py")
OUT_OF_MEMORY = "the memory that this process may have (ulimit -v, a container's limit, the machine's) does not suffice"
OUT_OF_MEMORY += "; raise the limit, or lower batch sizes, --k or the number of threads (OMP_NUM_THREADS)"
NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "CUDA out of memory",
    "bad_alloc",
    "Cannot allocate memory",
    "can't start new thread",
    "Resource temporarily unavailable",
    "failed to map segment",
)


def is_program() -> bool:
    """Whether this process is one of the commands: a script of the repository, an installed one, or `python -m`."""
    words = sys.orig_argv
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    module = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    return name in PROGRAMS or name.startswith("fairseq-") or any(word.startswith("fairseq_cli.") for word in module)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the system had no memory, or no threads, to give; Python, torch and FAISS say so in ways of their own."""
    said = str(error)
    return isinstance(error, MemoryError) or any(words in said for words in NO_MEMORY)


def prepare() -> None:
    """For the time until `cli_entry` takes over; nothing where this process is another program."""
    if not is_program() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    program = os.path.basename(sys.argv[0]) if sys.argv[0] != "-m" else "fairseq"

    def stop(number: int, frame: object) -> None:
        os.write(2, f"{program}: error: interrupted; nothing was done yet\n".encode())
        os._exit(130)

    report = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not is_out_of_memory(error):
            report(kind, error, trace)
            return
        os.write(2, f"{program}: error: {OUT_OF_MEMORY}\n".encode())
        os._exit(2)

    signal.signal(signal.SIGINT, stop)
    sys.excepthook = hook
