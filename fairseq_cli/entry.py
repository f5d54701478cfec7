"""The frame around every command: log format, and the promise that a user's mistake ends in one sentence and status
2."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TextIO

from fairseq.errors import UserError

LOG_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"


def setup_logging(stream: TextIO) -> None:
    """Sends log lines to `stream` in fairseq's form: `YYYY-mm-dd HH:MM:SS | INFO | name | message`."""
    level = os.environ.get("LOGLEVEL", "INFO").upper()
    logging.basicConfig(format=LOG_FORMAT, datefmt=DATE_FORMAT, level=level, stream=stream, force=True)


def cli_entry(main: Callable[[], object], stream: TextIO | None = None) -> None:
    """Runs `main` as a command-line program: exit status 0, 2 for a user's mistake, 130 for Ctrl-C."""
    setup_logging(stream if stream is not None else sys.stdout)
    program = os.path.basename(sys.argv[0])
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(_say(program, str(error), 2))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_say(program, f"{where}{error.strerror or error}", 2))
    except KeyboardInterrupt:
        sys.exit(_say(program, "interrupted; run the same command again to go on", 130))


def _say(program: str, sentence: str, status: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"{program}: error: {' '.join(sentence.split())}\n")
    return status
