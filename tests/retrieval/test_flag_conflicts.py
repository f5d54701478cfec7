"""Flags that contradict each other or do nothing: each retrieval flag without --knnlm, and pairs of the others."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fairseq import options
from fairseq.errors import BadFlag
from fairseq.retrieval.flag_conflicts import (
    OF_RETRIEVAL,
    check_flags,
    check_strategy_flags,
    flag,
    strategy_name,
)
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY

VALUES = {"index": "exact", "strategy": "knnlm", "faiss_metric_type": "ip", "knn_sim_func": "dot"}
BARE = {"dstore_weights", "knnlm_gpu", "move_dstore_to_mem", "no_load_keys", "no_pointer"}


def parsed(*words: str) -> Any:
    return options.parse_args_and_arch(options.get_eval_lm_parser(), ["data", "--path", "m.pt", *words])


def warnings(caplog: pytest.LogCaptureFixture, *words: str) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        args = parsed(*words)
        check_flags(args)
        if args.knnlm:
            check_strategy_flags(args)
    return [record.getMessage() for record in caplog.records]


def test_defaults_are_those_of_the_parser() -> None:
    args = parsed()
    assert {name: getattr(args, name) for name in OF_RETRIEVAL} == OF_RETRIEVAL


@pytest.mark.parametrize("name", OF_RETRIEVAL)
def test_without_knnlm(name: str, caplog: pytest.LogCaptureFixture) -> None:
    words = [flag(name)] if name in BARE else [flag(name), VALUES.get(name, "1" if name != "lmbda" else "0.25")]
    words = [*words[:1], "2"] if name in ("min_knns", "knn_temp") else words
    for more in ([], ["--save-knnlm-dstore", "--dstore-mmap", "d"]):
        assert warnings(caplog, *words, *more) == [f"--knnlm is missing, without which nothing reads {flag(name)}"]
    assert not any("--knnlm is missing" in line for line in warnings(caplog, *words, "--knnlm"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--knnlm --index exact --probe 32", "--probe is not used with --index exact"),
        ("--knnlm --dstore-filename d --dstore-mmap d", "--dstore-mmap is only used with --save-knnlm-dstore"),
        ("--knnlm --target-foss-subset valid", "--target-foss-subset is only used with --target-foss"),
        ("--knnlm --no-pointer --members m", "--members is not used with --no-pointer"),
        ("--knnlm --strategy knnlm --members m", "--members is not used with --strategy knnlm"),
        ("--knnlm --strategy knnlm --min-knns 5", "--min-knns is not used with --strategy knnlm"),
        ("--knnlm --no-pointer --max-knns 5", "--max-knns is not used with --no-pointer"),
    ],
)
def test_flags_that_do_nothing(words: str, says: str, caplog: pytest.LogCaptureFixture) -> None:
    (said,) = warnings(caplog, *words.split())
    assert said.startswith(says)


@pytest.mark.parametrize("name", sorted(RETRIEVER_REGISTRY))
def test_no_pointer_beside_a_strategy(name: str) -> None:
    args = parsed("--knnlm", "--no-pointer", "--strategy", name)
    if not RETRIEVER_REGISTRY[name].sequential:
        assert strategy_name(args) == name
        return
    with pytest.raises(BadFlag, match=f"--strategy: found {name}, which follows pointers, beside --no-pointer"):
        strategy_name(args)


def test_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    for words in ("", "--knnlm --no-pointer --lmbda 0.25", "--knnlm --members m --min-knns 9 --k 64"):
        assert warnings(caplog, *words.split()) == []
