"""The start of a command, while torch and FAISS are imported: Ctrl-C ends it at once (nothing has been written yet),
and a library that cannot allocate memory ends it with one sentence. In a program that only imports a command, nothing
of this is done."""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType

from fairseq.errors import is_out_of_memory

PROGRAMS = ("preprocess.py", "train.py", "eval_lm.py", "build_dstore.py", "kmeans.py")
OUT_OF_MEMORY = "the memory that this process may have (ulimit -v, a container's limit, the machine's) does not suffice"
OUT_OF_MEMORY += "; raise the limit, or lower batch sizes, --k or the number of threads (OMP_NUM_THREADS)"


def is_program() -> bool:
    """Whether this process is one of the commands: a script of the repository, an installed one, or `python -m`."""
    words = sys.orig_argv
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    module = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    return name in PROGRAMS or name.startswith("fairseq-") or any(word.startswith("fairseq_cli.") for word in module)


def prepare() -> None:
    """Installs these handlers until `cli_entry` installs its own; does nothing where this process is another
    program."""
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
