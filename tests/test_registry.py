"""Classes that users register: misspelt parts of an interface are named, and so is `--user-dir` for unknown names."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fairseq import options
from fairseq.criterions import FairseqCriterion
from fairseq.errors import BadFlag, UserError
from fairseq.key_types import KeyType, keys_of
from fairseq.models import FairseqLanguageModel
from fairseq.optim import FairseqOptimizer
from fairseq.registry import class_registrar, is_built_in, misspelt_names
from fairseq.retrieval.index.interface import INDEX_REGISTRY, NamedIndex
from fairseq.retrieval.retrievers import Retriever
from fairseq.retrieval.retrievers.retomaton import RetomatonRetriever
from fairseq.retrieval.saved.searches import search_identity
from fairseq.tasks import FairseqTask
from fairseq_cli import adaptret, sweep

MISSPELT = [
    (Retriever, "wiegh", "weigh"),
    (Retriever, "obsrve", "observe"),
    (Retriever, "strat", "start"),
    (Retriever, "proposes", "propose"),
    (Retriever, "need", "needs"),
    (Retriever, "twins", "twin"),
    (Retriever, "addArgs", "add_args"),
    (Retriever, "saving_flag", "saving_flags"),
    (RetomatonRetriever, "weight", "weigh"),
    (NamedIndex, "serach", "search"),
    (NamedIndex, "distance", "distances"),
    (NamedIndex, "need_keys", "needs_keys"),
    (NamedIndex, "openn", "open"),
    (KeyType, "key", "keys"),
    (KeyType, "need", "needs"),
    (FairseqTask, "load_dataest", "load_dataset"),
    (FairseqCriterion, "reduce_metric", "reduce_metrics"),
    (FairseqOptimizer, "optimizer_confg", "optimizer_config"),
    (FairseqLanguageModel, "max_position", "max_positions"),
]


def users_class(base: type, **parts: Any) -> type:
    return type("Own", (base,) if base is not NamedIndex else (), {"__module__": "my_ideas", **parts})


@pytest.mark.parametrize(("base", "name", "meant"), MISSPELT)
def test_a_misspelt_part_of_an_interface_is_named(
    base: type, name: str, meant: str, caplog: pytest.LogCaptureFixture
) -> None:
    register = class_registrar("--own", {}, None if base is NamedIndex else base, base)
    with caplog.at_level(logging.WARNING):
        register("mine")(users_class(base, **{name: None}))
    (warning,) = caplog.messages
    assert f"--own mine: the class Own defines {name}, which nothing calls, and not {meant};" in warning


@pytest.mark.parametrize(
    ("base", "parts"),
    [
        (Retriever, {"propose": None, "weigh": None, "weights": None}),  # weigh is there, so weights is another thing
        (Retriever, {"propose": None, "_wiegh": None, "network": None, "confidence": None}),
        (RetomatonRetriever, {"observe": None, "saving_flags": ()}),
        (NamedIndex, {"search": None, "searches": None, "distances": None, "parts": None}),
        (FairseqLanguageModel, {"build_model": None, "train": None, "parameter": None, "encode": None}),
    ],
)
def test_names_of_ones_own_are_nothing_to_say_about(base: type, parts: dict[str, Any]) -> None:
    assert misspelt_names(users_class(base, **parts), base) == []
    assert is_built_in(RetomatonRetriever) and misspelt_names(RetomatonRetriever, Retriever) == []


def test_a_misspelling_that_is_inherited_from_a_users_class_is_named() -> None:
    common = users_class(Retriever, wiegh=None)
    assert misspelt_names(users_class(common, propose=None), Retriever) == [("wiegh", "weigh")]


EVAL = "data --path x --knnlm"
UNKNOWN = [
    ("eval_lm", f"{EVAL} --strategy retomatn", "--strategy", "(perhaps retomaton)"),
    ("eval_lm", f"{EVAL} --index exct", "--index", "(perhaps exact)"),
    ("eval_lm", f"{EVAL} --task mine", "--task", ""),
    ("train", "data --task language_modeling --arch transformer_ml", "--arch", "(perhaps transformer_lm)"),
    ("train", "data --task language_modeling --optimizer addam", "--optimizer", "(perhaps adam)"),
    ("train", "data --task language_modeling --criterion mine", "--criterion", ""),
    ("train", "data --task language_modeling --lr-scheduler mine", "--lr-scheduler", ""),
    ("preprocess", "--only-source --destdir d --bpe mine", "--bpe", ""),
    ("sweep", "--strategy mine --help", "--strategy", ""),
    ("sweep", "--scores s --output o --dstore-filename d --index mine", "--index", ""),
    ("adaptret", "--scores s --save g --dstore-filename d --index mine", "--index", ""),
]


@pytest.mark.parametrize(("command", "words", "flag", "near"), UNKNOWN)
def test_an_unknown_name_asks_for_user_dir(
    command: str, words: str, flag: str, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [command, *words.split()])
    parse = {
        "eval_lm": lambda: options.parse_args_and_arch(options.get_eval_lm_parser()),
        "train": lambda: options.parse_args_and_arch(options.get_training_parser()),
        "preprocess": options.parse_preprocessing_args,
        "sweep": sweep.parse_args,
        "adaptret": lambda: options.parse_with_extensions(adaptret.get_parser()),
    }
    with pytest.raises(BadFlag) as caught:
        parse[command]()
    assert caught.value.flag == flag
    assert f"{near}; if it is your own, give --user-dir" in str(caught.value)


def test_a_method_that_every_class_needs_is_named_when_it_lacks() -> None:
    with pytest.raises(UserError, match="Own: found no method propose"):
        users_class(Retriever)(None, None).propose(None)
    with pytest.raises(UserError, match="Own: found no method keys"):
        users_class(KeyType)().keys(None)


def _flat(states: torch.Tensor) -> torch.Tensor:
    return states.flatten(0, 1)


WRONG_KEYS = {
    "flat": (_flat, r"torch.float32 of shape \(15, 4\)"),
    "turned": (lambda states: states.transpose(0, 1), r"torch.float32 of shape \(3, 5, 4\)"),
    "pooled": (lambda states: states.mean(0, keepdim=True), r"torch.float32 of shape \(1, 3, 4\)"),
    "narrow": (lambda states: states[..., :0], r"torch.float32 of shape \(5, 3, 0\)"),
    "rounded": (lambda states: states.long(), "torch.int64 of shape"),
    "array": (lambda states: states.numpy(), "ndarray"),
    "nothing": (lambda states: None, "NoneType"),
}


@pytest.mark.parametrize("kind", WRONG_KEYS)
def test_keys_of_a_wrong_shape_name_their_type(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, found = WRONG_KEYS[kind]
    monkeypatch.setattr("fairseq.key_types.KEY_TYPES", types := {})
    class_registrar("--knn-keytype", types, KeyType)("mine")(
        users_class(KeyType, keys=lambda self, activations: change(activations.layer_output(-1)))
    )
    expected = rf"found mine, for which its method keys returns {found}.* expected .* \(5, 3, width\)"
    with pytest.raises(BadFlag, match=expected):
        keys_of("mine", {"inner_states": [torch.zeros(5, 3, 4)]}, 3, 5)


class IndexWithFlags:
    """Stands for an index of a user that is opened from files of its own flags."""

    @staticmethod
    def add_args(parser: Any) -> None:
        parser.add_argument("--shards", nargs="+")
        parser.add_argument("--visits", type=int)


def test_saved_searches_belong_to_the_values_and_files_of_an_indexs_own_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(INDEX_REGISTRY, "own", IndexWithFlags)
    shards = [tmp_path / "first", tmp_path / "second"]
    for shard in shards:
        shard.write_bytes(b"123")

    def identity(**changes: Any) -> dict[str, Any]:
        flags = {"index": "own", "dstore_filename": str(tmp_path / "d"), "indexfile": None, "probe": 8, "visits": 3}
        flags |= {"shards": [str(shard) for shard in shards]}
        return search_identity(argparse.Namespace(**{**flags, **changes}), SimpleNamespace(size=9))  # type: ignore[arg-type]

    before = identity()
    assert before == identity() and before != identity(visits=4)
    joined = identity(indexfile=f"{shards[0]}:{shards[1]}", shards=None)
    shards[1].write_bytes(b"124")
    assert before != identity()
    assert joined != identity(indexfile=f"{shards[0]}:{shards[1]}", shards=None)
