"""Flags of `fairseq-interactive`: how prompts are read, and how they are continued."""

from __future__ import annotations

import argparse
from typing import Any

from fairseq.flag_types import any_int, finite_float, natural_float, natural_int, positive_int

READ_STANDARD_INPUT = "-"


def add_generation_args(parser: argparse.ArgumentParser) -> Any:
    """How the next token is chosen, under fairseq's names."""
    group = parser.add_argument_group("Generation")
    add = group.add_argument
    add("--beam", type=positive_int, default=1, metavar="N", help="width of the beam; with --sampling: samples")
    add("--nbest", type=positive_int, default=1, metavar="N", help="continuations to print for each prompt")
    add("--max-len-a", type=natural_float, default=0.0, metavar="A", help="adds A tokens for each one of the prompt")
    add("--max-len-b", type=natural_int, default=200, metavar="B", help="most new tokens")
    add("--min-len", type=natural_int, default=1, metavar="N", help="least new tokens, the end included")
    add("--lenpen", type=finite_float, default=1.0, metavar="P", help="beams are ranked by sum / length ** P")
    add("--unnormalized", action="store_true", help="beams are ranked by the sum of their log-probabilities")
    add("--unkpen", type=finite_float, default=0.0, metavar="X", help="subtracted from <unk>'s log-probability")
    add("--no-repeat-ngram-size", type=natural_int, default=0, metavar="N", help="no N tokens twice (0: allowed)")
    add("--sampling", action="store_true", help="draw tokens instead of taking the likeliest")
    add("--sampling-topk", type=any_int, default=-1, metavar="K", help="draw from the K likeliest tokens (-1: all)")
    add("--sampling-topp", type=finite_float, default=-1.0, metavar="P",
        help="draw from the fewest likeliest tokens with probability P in all (-1: all)")
    add("--temperature", type=finite_float, default=1.0, metavar="T", help="divides log-probabilities")
    add("--prefix-size", type=natural_int, default=0, metavar="N", help="read only N tokens of each prompt (0: all)")
    add("--draft", type=natural_int, default=0, metavar="L",
        help="let one pass of the model verify up to L tokens of the text after retrieved entries (0: none)")
    return group


def add_interactive_args(parser: argparse.ArgumentParser) -> Any:
    """Where prompts come from, and what is printed."""
    group = parser.add_argument_group("Prompts")
    add = group.add_argument
    add("--input", default=READ_STANDARD_INPUT, metavar="FILE", help="prompts, one a line (-: standard input)")
    add("--buffer-size", type=positive_int, default=1, metavar="N", help="prompts to read before they are continued")
    add("--json", action="store_true", help="print a JSON object a continuation, with what is known of each token")
    return group
