"""The package as a project outside of it uses it: a `--user-dir` plug-in with one of everything, from training to
retrieval, and what the registries refuse."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq import checkpoint_utils, criterions, models, optim, tasks
from fairseq.data import encoders
from fairseq.optim import lr_scheduler
from fairseq.retrieval import retrievers

PLUG_IN = Path(__file__).parent / "fixtures" / "outside_ideas"
TRAIN = (
    "data-bin --task polite_language_modeling --greeting hello --arch average_lm_small --criterion mean_nll "
    "--optimizer signs --lr-scheduler halving --halve-every 4 --lr 0.02 --clip-norm 0 --max-update 12 --max-tokens 512 "
    "--tokens-per-sample 64 --no-progress-bar --log-interval 1 --no-epoch-checkpoints --seed 3"
)


@pytest.fixture(scope="module")
def trained(run_cli: Any, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(checkpoint, log) of a training in which everything is the plug-in's."""
    folder = tmp_path_factory.mktemp("outside")
    words = [*shlex.split(TRAIN), "--save-dir", folder, "--user-dir", PLUG_IN]
    done = run_cli("train", words, cwd=golden)
    assert done.status == 0, done.stdout + done.stderr
    return folder / "checkpoint_last.pt", done.stdout


def test_training(trained: tuple[Path, str]) -> None:
    path, log = trained
    assert "hello, epoch 1" in log
    assert "model average_lm_small, criterion MeanNLL" in log
    rates = [float(rate) for rate in re.findall(r" lr=([\d.e-]+),", log)]
    assert {0.02, 0.01, 0.005} <= set(rates)
    losses = [float(loss) for loss in re.findall(r"\d / \d+ loss=([\d.]+)", log)]
    assert losses[-1] < losses[0]
    state = torch.load(path, weights_only=False)
    validated = [float(loss) for loss in re.findall(r"'valid' subset \| loss ([\d.]+)", log)]
    assert state["optimizer_history"][-1] == {
        "criterion_name": "MeanNLL",
        "optimizer_name": "SignsOptimizer",
        "lr_scheduler_state": {"best": pytest.approx(min(validated), abs=1e-3)},
        "num_updates": 12,
    }
    assert state["args"].decoder_embed_dim == 16 and state["args"].halve_every == 4


def test_going_on(run_cli: Any, golden: Path, trained: tuple[Path, str]) -> None:
    flags = shlex.split(TRAIN.replace("--max-update 12", "--max-update 13"))
    words = [*flags, "--restore-file", trained[0], "--no-save", "--user-dir", PLUG_IN]
    done = run_cli("train", words, cwd=golden)
    assert done.status == 0, done.stderr
    assert "(epoch 1 @ 12 updates)" in done.stdout and "num_updates 13" in done.stdout


def test_from_its_datastore_to_its_strategy(
    run_cli: Any, golden: Path, trained: tuple[Path, str], tmp_path: Path
) -> None:
    """Any model that returns its key under the key type's name can be retrieved with."""
    flags = ["data-bin", "--path", trained[0], "--user-dir", PLUG_IN, "--task", "polite_language_modeling"]
    flags += shlex.split("--gen-subset valid --sample-break-mode none --max-tokens 512 --no-progress-bar")
    keys = shlex.split("--knn-keytype last_ffn_input --model-overrides \"{'knn_keytype': 'last_ffn_input'}\"")
    save = ["--save-knnlm-dstore", "--dstore-mmap", tmp_path / "dstore"]
    dstore = ["--dstore_mmap", tmp_path / "dstore", "--faiss_index", tmp_path / "index"]
    build = [*dstore, *shlex.split("--ncentroids 8 --code_size 4")]
    knn = ["--knnlm", "--dstore-filename", tmp_path / "dstore", "--indexfile", tmp_path / "index", "--results-json"]
    knn += [tmp_path / "results.json", *shlex.split("--lmbda 0.5 --k 16 --knn-sim-func do_not_recomp_l2")]
    for command, words in (
        ("eval_lm", [*flags, "--results-json", tmp_path / "alone.json"]),
        ("eval_lm", [*flags, *keys, *save]),
        ("build_dstore", build),
        ("eval_lm", [*flags, *keys, *knn, "--strategy", "every_other"]),
    ):
        done = run_cli(command, words, cwd=golden)
        assert done.status == 0, done.stderr
    alone, figures = (
        {**results, **results.get("results", {})}
        for results in (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "results"))
    )
    assert figures["searches_saved_percent"] == pytest.approx(50, abs=2)
    assert figures["perplexity"] < alone["perplexity"]  # the text is its own datastore


def test_the_checkpoint_opens_in_python(trained: tuple[Path, str], golden: Path) -> None:
    overrides = {"data": str(golden / "data-bin")}
    (model,), args, task = checkpoint_utils.load_model_ensemble_and_task([str(trained[0])], overrides)
    assert type(model).__name__ == "AverageLM" and args.arch == "average_lm_small"
    assert type(task).__name__ == "PoliteLanguageModelingTask"


def test_an_unknown_name_without_the_plug_in_is_one_sentence(run_door: Any, golden: Path) -> None:
    done = run_door("train.py", ["data-bin", "--task", "language_modeling", "--arch", "average_lm_small"], cwd=golden)
    assert "average_lm_small" in done.error


@pytest.mark.parametrize("where", ["nothing", "broken"])
def test_a_plug_in_that_cannot_be_imported(run_cli: Any, golden: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("import a_module_that_nobody_has\n")
    done = run_cli("eval_lm", ["data-bin", "--path", "x", "--user-dir", tmp_path / where], cwd=golden)
    assert where in done.error


# ---------------------------------------------------------------------------------------------------------------------
# What registries refuse


class Named:
    """Something that extends nothing."""


def subclass(base: type, name: str) -> type:
    return type(name, (base,), {})


REGISTERED = [
    (models.register_model, "transformer_lm", models.BaseFairseqModel),
    (tasks.register_task, "language_modeling", tasks.FairseqTask),
    (criterions.register_criterion, "adaptive_loss", criterions.FairseqCriterion),
    (optim.register_optimizer, "nag", optim.FairseqOptimizer),
    (lr_scheduler.register_lr_scheduler, "cosine", lr_scheduler.FairseqLRScheduler),
    (retrievers.register_retriever, "retomaton", retrievers.Retriever),
    (encoders.register_bpe, "fastbpe", None),
    (encoders.register_tokenizer, "moses", None),
]
IDS = [str(register.__name__) + "-" + name for register, name, _ in REGISTERED]


@pytest.mark.parametrize("register, name, base", REGISTERED, ids=IDS)
def test_a_name_is_used_once(register: Any, name: str, base: Any) -> None:
    with pytest.raises(ValueError, match=name):
        register(name)(subclass(base or object, "QuiteAnother"))


@pytest.mark.parametrize("register, name, base", [row for row in REGISTERED if row[2] is not None])
def test_classes_extend_their_base(register: Any, name: str, base: Any) -> None:
    with pytest.raises(ValueError, match=base.__name__):
        register("quite_another")(Named)


@pytest.mark.parametrize(
    "register, class_name",
    [
        (tasks.register_task, "LanguageModelingTask"),
        (criterions.register_criterion, "AdaptiveLoss"),
        (optim.register_optimizer, "FairseqNAG"),
    ],
)
def test_a_class_name_is_used_once(register: Any, class_name: str) -> None:
    base = {row[0]: row[2] for row in REGISTERED}[register]
    with pytest.raises(ValueError, match=class_name):
        register("quite_another")(subclass(base, class_name))


def test_architectures_belong_to_a_model_and_are_used_once() -> None:
    with pytest.raises(ValueError, match="no model named"):
        models.register_model_architecture("no_such_model", "x")(lambda args: None)
    with pytest.raises(ValueError, match="transformer_lm_wiki103"):
        models.register_model_architecture("transformer_lm", "transformer_lm_wiki103")(lambda args: None)
    with pytest.raises(ValueError, match="function"):
        models.register_model_architecture("transformer_lm", "x")(None)  # type: ignore[arg-type]


def test_public_maps() -> None:
    assert models.ARCH_MODEL_REGISTRY["transformer_lm_wiki103"] is models.MODEL_REGISTRY["transformer_lm"]
    assert "transformer_lm_gbw" in models.ARCH_MODEL_INV_REGISTRY["transformer_lm"]
    assert callable(models.ARCH_CONFIG_REGISTRY["transformer_lm_wiki103"])
    assert tasks.TASK_REGISTRY["language_modeling"].__name__ == "LanguageModelingTask"
    assert criterions.CRITERION_REGISTRY["adaptive_loss"].__name__ == "AdaptiveLoss"
    assert optim.OPTIMIZER_REGISTRY["nag"].__name__ == "FairseqNAG"
    assert "cosine" in lr_scheduler.LR_SCHEDULER_REGISTRY
    assert sys.modules["fairseq.models"].MODEL_REGISTRY is models.MODEL_REGISTRY
