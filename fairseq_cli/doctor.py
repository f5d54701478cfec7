"""`fairseq-doctor`: with eval_lm.py's flags, says what is wrong or suspicious about the files that they name; with
`verify FILE...`, compares every byte of artefacts with the digests in their sidecars."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable
from typing import Any

from fairseq import options
from fairseq.evaluation.datastore_checks import OK, SUSPICIOUS, UNKNOWN, WRONG, Finding, verify_artefact
from fairseq.evaluation.doctor import examine
from fairseq.files.outputs import claimed
from fairseq.files.provenance import write_results
from fairseq.flag_help import Layout
from fairseq.flag_types import Parser, output_file
from fairseq.flags.layouts import DOCTOR
from fairseq_cli.entry import cli_entry

logger = logging.getLogger("fairseq_cli.doctor")

VERIFY = "verify"
VERIFY_EXAMPLE = "%(prog)s dstore index members.pkl data-bin/valid"
USAGE = """fairseq-doctor data --path FILE [flags of eval_lm.py]
       fairseq-doctor verify ARTEFACT..."""
EXAMINING = """Looks at checkpoint, dictionary, text, datastore, index and clusters as an evaluation with these flags of
eval_lm.py would use them, and says in plain sentences what is wrong or suspicious: files that do not belong together,
keys that are no numbers or that the model does not reproduce, values outside the dictionary, an index that misses
entries or finds few of the true neighbours, clusters that miss entries, evaluated text that the datastore holds, a
weight that makes it worse, a model that is worse than word frequencies. What nothing was compared with is "not known".
Reads samples. --knnlm is implied by --dstore-filename, and named when it is missing.
Exit status: 0, 1 when something is wrong, 2 when a flag is."""
VERIFYING = """Reads every byte of artefacts and compares it with the digests in their descriptions (NAME.json); says
which part of which file differs. Exit status: 0, 1 when something differs or is not described, 2 when a flag is
wrong."""


def get_verify_parser() -> argparse.ArgumentParser:
    """Parser of `fairseq-doctor verify`."""
    parser = Parser(prog=f"fairseq-doctor {VERIFY}", description=VERIFYING, layout=Layout({}, example=VERIFY_EXAMPLE))
    parser.add_argument("artefact", nargs="+", help="a datastore's prefix, an index, members, clusters, DATA/SPLIT")
    parser.add_argument("--results-json", type=output_file, metavar="FILE", help="write the findings here")
    return parser


def report(findings: Iterable[Finding], args: argparse.Namespace) -> int:
    """Logs findings as they come; returns the exit status: 1 when something is wrong."""
    found = []
    for finding in findings:
        level = {OK: logging.INFO, UNKNOWN: logging.INFO, WRONG: logging.ERROR}.get(finding.level, logging.WARNING)
        logger.log(level, "%s: %s", finding.level, finding.text)
        found.append({"level": finding.level, "text": finding.text})
    counts = {level: sum(finding["level"] == level for finding in found) for level in (WRONG, SUSPICIOUS, UNKNOWN, OK)}
    logger.info("%d wrong, %d suspicious, %d not known, %d fine", *counts.values())
    if args.results_json:
        figures = {level.replace(" ", "_"): count for level, count in counts.items()}
        write_results(args.results_json, {"findings": found, **figures}, args)
    return 1 if counts[WRONG] else 0


def verify(artefacts: list[str]) -> Iterable[Finding]:
    """Compares every byte of the artefacts with their digests; returns the exit status."""
    for artefact in artefacts:
        yield from verify_artefact(artefact)


def main(words: list[str]) -> int:
    """Runs the doctor; returns the exit status."""
    if words[:1] == [VERIFY]:
        args = get_verify_parser().parse_args(words[1:])
        with claimed("--results-json", args.results_json):
            return report(verify(args.artefact), args)
    parser: Any = options.get_eval_lm_parser()
    parser.prog, parser.usage, parser.description = "fairseq-doctor", USAGE, EXAMINING
    parser.layout = DOCTOR
    return run(options.parse_args_and_arch(parser, words))


def run(args: argparse.Namespace) -> int:
    """Examines what eval_lm.py's flags name; returns the exit status."""
    args.knnlm_missing = not args.knnlm and args.dstore_filename is not None
    args.knnlm = args.knnlm or args.dstore_filename is not None
    with claimed("--results-json", args.results_json):
        return report(examine(args), args)


def cli_main() -> None:
    """Console entry point."""
    status = 0

    def run() -> None:
        nonlocal status
        status = main(sys.argv[1:])

    cli_entry(run, sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    cli_main()
