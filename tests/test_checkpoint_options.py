"""Options in a checkpoint: each that a model or a task reads must be a value that its flag could have given, and those
that change what is evaluated are said or refused."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest

from fairseq import checkpoint_utils, options
from fairseq.checkpoint_saving import torch_persistent_save
from fairseq.checkpoint_utils import check_options
from fairseq.errors import BadFile, BadFlag
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.option_checks import actions_of, expected_instead, old_options
from fairseq.tasks.language_modeling import LanguageModelingTask

ACTIONS = old_options() | actions_of([TransformerLanguageModel, LanguageModelingTask])


def stored(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(arch="transformer_lm", task="language_modeling", **changes)


def kind_of(name: str) -> str:
    action = ACTIONS[name]
    if action.nargs == 0:
        return "switch"
    if action.choices is not None:
        return "choice"
    return getattr(action.type, "__name__", "text")


REFUSED = {
    "switch": ("x", "", b"x", {}, [], 1, -7, 0.5),
    "choice": ("x", "", b"x", {}, [], True, 1),
    "text": (b"x", {}, ["x"], True, 1, 0.5),
    "positive_int": ("x", "3", b"x", {}, [], ["x"], True, -7, 0, 0.5, float("nan"), 10**30),
    "natural_int": ("x", "3", b"x", {}, [], True, -7, 0.5, 10**30),
    "any_int": ("x", "3", b"x", {}, [], True, 0.5, 10**30),
    "row_count": ("x", "3", b"x", {}, [], True, 0, 0.5, 10**30),
    "unit_float": ("x", "0.1", b"x", {}, [], True, -7, 2, float("nan"), float("inf")),
    "finite_float": ("x", "0.1", b"x", {}, [], True, float("nan"), float("inf")),
    "positive_float": ("x", "1.0", b"x", {}, [], True, 0, -7, float("nan")),
}


@pytest.mark.parametrize("name", sorted(name for name, action in ACTIONS.items() if action.option_strings))
def test_every_option_is_checked_like_its_flag(name: str) -> None:
    for value in REFUSED[kind_of(name)]:  # no kind may be missing
        assert expected_instead(ACTIONS[name], value) is not None, value
    with pytest.raises(BadFile, match="found the option") as caught:
        check_options("a.pt", stored(**{name: REFUSED[kind_of(name)][0]}))
    assert "\n" not in str(caught.value)


def test_an_override_is_not_blamed_on_the_file() -> None:
    with pytest.raises(BadFlag, match="overrides.*dropout 'x'"):
        check_options("a.pt", stored(dropout="x"), {"dropout": "x"})


def test_what_training_stores_is_accepted(golden: Path) -> None:
    for arch in ("transformer_lm", "transformer_lm_wiki103", "transformer_lm_gbw", "transformer_lm_gpt2_tiny"):
        parser = options.get_training_parser()
        check_options("a.pt", options.parse_args_and_arch(parser, ["d", "--task", "language_modeling", "-a", arch]))
    state = checkpoint_utils.load_checkpoint_to_cpu(golden / "checkpoints" / "checkpoint_best.pt")
    check_options("a.pt", state["args"])


def test_values_that_a_flag_cannot_give_but_older_versions_stored() -> None:
    check_options("a.pt", stored(dropout=0, adaptive_input_cutoff=[4, 8], max_target_positions=None, dstore_size=None))
    for name in ("dropout", "decoder_layers", "tokens_per_sample", "activation_fn", "no_scale_embedding"):
        with pytest.raises(BadFile, match=f"{name} None, expected a value"):
            check_options("a.pt", stored(**{name: None}))


def test_types_of_a_users_package_are_not_called() -> None:
    def users_own(text: str) -> str:
        raise AssertionError("called")

    action = argparse.ArgumentParser().add_argument("--own", type=users_own)
    assert expected_instead(action, "x") is None


@pytest.fixture
def changed(golden: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> LMScoring:
        state = checkpoint_utils.read_torch_file(golden / "checkpoints" / "checkpoint_best.pt")
        for name, value in changes.items():
            setattr(state["args"], name, value)
        torch_persistent_save(state, str(tmp_path / "a.pt"))
        words = [golden / "data-bin", "--path", tmp_path / "a.pt", "--gen-subset", "valid", "--cpu"]
        return LMScoring(options.parse_args_and_arch(options.get_eval_lm_parser(), list(map(str, words))))

    return make


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"dropout": "x"}, "the option dropout 'x', expected what --dropout accepts"),
        ({"exclude_self_target": "x"}, "exclude_self_target 'x', expected True or False"),
        ({"self_target": True}, "evaluated by its option self_target, expected future_target alone"),
        ({"past_target": True}, "its option past_target"),
        ({"self_target": True, "future_target": True}, "its option self_target and future_target"),
    ],
)
def test_an_evaluation_refuses(changed: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BadFile, match=says):
        changed(**changes)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"add_bos_token": True}, "the checkpoint's add_bos_token True counts"),
        ({"future_target": True}, None),
        ({"decoder_layers_to_keep": "0"}, "only the layers 0 are used"),
    ],
)
def test_an_evaluation_says(changed: Any, changes: dict[str, Any], says: str | None, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        changed(**changes)
    assert "counts" not in caplog.text if says is None else says in caplog.text
