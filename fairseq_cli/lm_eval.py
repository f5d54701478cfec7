"""`fairseq-lm-eval`: the command of lm-evaluation-harness, with a model more: `--model hf-retrieval`."""

from __future__ import annotations

import importlib
import sys

from fairseq.errors import MissingDependency
from fairseq_cli.entry import cli_entry

INSTALL = "pip install -c constraints.txt --editable '.[cpu,fast,hf,lm-eval]'"


def main() -> None:
    """Runs lm-evaluation-harness with the words of the command line; MissingDependency where it is not installed."""
    for module in ("lm_eval", "transformers", "accelerate"):
        try:
            importlib.import_module(module)
        except ImportError:
            raise MissingDependency(module, "lm-evaluation-harness", INSTALL) from None
    importlib.import_module("fairseq.attached_retrieval.harness")  # makes the model known by its name
    importlib.import_module("lm_eval.__main__").cli_evaluate()


def cli_main() -> None:
    """Console entry point; the log goes to standard error."""
    cli_entry(main, sys.stderr)


if __name__ == "__main__":
    cli_main()
