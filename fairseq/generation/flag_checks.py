"""Flags of `fairseq-interactive` that contradict each other, or ask for what it does not do, which are refused, and
those that have no effect on what is written, of which a warning tells: `eval_lm.py` has most of them, and its command
lines are used again with prompts."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping

from fairseq.errors import BadFlag
from fairseq.generation.choice import ChoiceSettings
from fairseq.retrieval.flag_conflicts import flag

logger = logging.getLogger(__name__)

_OF_EVALUATIONS = "an evaluation's flag", "eval_lm.py does that"
# Flags that would write, choose or change something: what was found, and what to do.
REFUSED = {
    "remove_bpe": ("it here", "give --bpe with the name of the code, which also joins words of prompts' continuations"),
    **dict.fromkeys(
        "output_word_probs output_word_stats index_recall target_foss target_foss_subset save_knnlm_dstore dstore_mmap "
        "save_scores save_searches save_features results_path check max_length stride rolling drop_remainder "
        "group_documents".split(),
        _OF_EVALUATIONS,
    ),
    "num_shards": ("parts of a text", "divide the file of prompts"),
    "shard_id": ("parts of a text", "divide the file of prompts"),
    "output_dictionary_size": _OF_EVALUATIONS,
}
# Flags that say how a text is read and scored, which changes nothing here.
IDLE = """gen_subset dataset_impl context_window sample_break_mode truncate_sequence max_tokens num_workers
    lockstep_tokens target_foss_tokens tokens_per_sample max_target_positions softmax_batch
    skip_invalid_size_inputs_valid_test required_batch_size_multiple""".split()


def check_generation_flags(args: argparse.Namespace, defaults: Mapping[str, object]) -> None:
    """BadFlag for what cannot be done, a warning for what has no effect. defaults: of all flags, by name."""
    for name in sorted(given(args, defaults) & set(REFUSED)):
        found, remedy = REFUSED[name]
        raise BadFlag(flag(name), found, "a flag that says how prompts are continued", remedy)
    idle = given(args, defaults) & set(IDLE)
    if idle:
        logger.warning("%s: nothing here reads it, as prompts are continued", ", ".join(map(flag, sorted(idle))))
    for name, when in _without_effect(args):
        if name in given(args, defaults):
            logger.warning("%s has no effect %s", flag(name), when)


def given(args: argparse.Namespace, defaults: Mapping[str, object]) -> set[str]:
    """Names of the flags whose values differ from the defaults."""
    return {name for name, value in vars(args).items() if name in defaults and value != defaults[name]}


def _without_effect(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Flags that these settings make meaningless, and why."""
    searches = args.beam > 1 and not args.sampling
    idle = [] if searches else [("lenpen", "without beam search"), ("unnormalized", "without beam search")]
    if not searches and not args.sampling:
        idle.append(("temperature", "on the likeliest token; add --sampling, or --beam above 1"))
    if searches and args.unnormalized:
        idle.append(("lenpen", "with --unnormalized"))
    if searches or args.draft:
        idle.append(("max_sentences", "with --beam and --draft, which continue one prompt after the other"))
    return idle


def choice_settings(args: argparse.Namespace) -> ChoiceSettings:
    """The flags of generation; BadFlag for what contradicts."""
    if args.nbest > args.beam:
        raise BadFlag("--nbest", args.nbest, f"at most --beam {args.beam}", f"give --beam {args.nbest}")
    if args.draft and not args.knnlm:
        raise BadFlag("--draft", "it alone", "--knnlm and a datastore beside it, whose texts are the drafts")
    if args.draft and args.beam > 1 and not args.sampling:
        raise BadFlag("--draft", f"--beam {args.beam} beside it", "one continuation, or samples", "drop one of them")
    if not args.max_len_a and args.min_len > max(args.max_len_b, 1):
        raise BadFlag("--min-len", args.min_len, f"at most --max-len-b {args.max_len_b}", "lower it, or raise that")
    names = ChoiceSettings.__dataclass_fields__
    return ChoiceSettings(**{name: getattr(args, name) for name in names})
