"""Checkpoints of a resumed training whose state was damaged or crafted: for each part, each kind of wrong value is one
sentence; what other versions leave out is filled in."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from fairseq import options, tasks, training_state
from fairseq.checkpoint_saving import load_checkpoint
from fairseq.checkpoint_utils import read_torch_file
from fairseq.errors import BadFile, UserError
from fairseq.trainer import Trainer

FLAGS = (
    "--task language_modeling --arch transformer_lm --decoder-layers 1 --decoder-embed-dim 8 --decoder-ffn-embed-dim 8 "
    "--decoder-attention-heads 2 --tokens-per-sample 64 --max-tokens 2048 --num-workers 0 --cpu --lr 0.01 "
    "--disable-validation --no-epoch-checkpoints --optimizer adam --lr-scheduler reduce_lr_on_plateau --max-update 2"
).split()
WRONG = {
    "none": None,
    "text": "abc",
    "list": [1],
    "dictionary": {"a": 1},
    "negative": -1,
    "fraction": 1.5,
    "nan": math.nan,
    "infinite": math.inf,
    "huge": 1 << 70,
    "tensor": torch.zeros(3),
    "bool": True,
    "bytes": b"x",
}
ITERATOR, HISTORY, LAST = ("extra_state", "train_iterator"), ("optimizer_history", -1), ("last_optimizer_state",)
GROUP, ENTRY = (*LAST, "param_groups", 0), (*LAST, "state", 0)
METER = ("extra_state", "metrics", "default", 0)
# Where a value stands, and which of the wrong ones are right there.
PLACES = {
    ("model",): "",
    ("model", "decoder.layer_norm.weight"): "",
    ("optimizer_history",): "",
    HISTORY: "",
    (*HISTORY, "num_updates"): "",
    (*HISTORY, "optimizer_name"): "",
    (*HISTORY, "criterion_name"): "",
    (*HISTORY, "lr_scheduler_state"): "dictionary",
    (*HISTORY, "lr_scheduler_state", "best"): "none negative fraction infinite huge",
    (*HISTORY, "lr_scheduler_state", "last_epoch"): "",
    (*HISTORY, "lr_scheduler_state", "num_bad_epochs"): "",
    ("extra_state",): "dictionary",  # nothing is known of the position
    ITERATOR: "",
    (*ITERATOR, "epoch"): "",
    (*ITERATOR, "iterations_in_epoch"): "",
    ("extra_state", "iterated"): "",
    ("extra_state", "iterated", "batches"): "",
    ("extra_state", "iterated", "digest"): "text",
    ("extra_state", "best"): "none negative fraction infinite huge",
    ("extra_state", "val_loss"): "none negative fraction infinite huge",
    ("extra_state", "patience"): "",
    ("extra_state", "patience", "runs"): "",
    ("extra_state", "previous_training_time"): "fraction huge",
    ("extra_state", "metrics"): "",
    ("extra_state", "metrics", "default"): "",
    METER: "",
    (*METER, 3): "dictionary",
    LAST: "none",  # as --no-save-optimizer-state leaves it
    (*LAST, "state"): "",
    (*LAST, "param_groups"): "",
    GROUP: "",
    (*GROUP, "lr"): "fraction huge",
    (*GROUP, "betas"): "",
    (*GROUP, "eps"): "fraction huge",
    (*GROUP, "weight_decay"): "negative fraction huge",
    (*GROUP, "amsgrad"): "none",
    (*GROUP, "params"): "",
    ENTRY: "",
    (*ENTRY, "step"): "",
    (*ENTRY, "exp_avg"): "",
    (*ENTRY, "exp_avg_sq"): "",
}
CELLS = [
    pytest.param(place, kind, id=f"{'.'.join(map(str, place))}-{kind}")
    for place, right in PLACES.items()
    for kind in WRONG
    if kind not in right.split()
]


@pytest.fixture(scope="module")
def run(run_cli, golden, tmp_path_factory):
    """The flags, task and state of two updates."""
    folder = tmp_path_factory.mktemp("run")
    words = [str(golden / "data-bin"), *FLAGS, "--save-dir", str(folder)]
    done = run_cli("train", words)
    assert done.status == 0, done.stderr
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    state = read_torch_file(folder / "checkpoint_last.pt")
    state["extra_state"]["patience"] = {"best": 1.0, "runs": 0}
    task = tasks.setup_task(args)
    model, criterion = task.build_model(args), task.build_criterion(args)
    return SimpleNamespace(args=args, task=task, model=model, criterion=criterion, state=state, folder=folder)


def trainer_for(run, state):
    torch.save(state, run.folder / "checkpoint_last.pt")
    return Trainer(run.args, run.task, run.model, run.criterion)


def resume(run, state):
    """What `train.py` does with the file before its first update."""
    trainer = trainer_for(run, state)
    extra, itr = load_checkpoint(run.args, trainer)
    return trainer, extra, itr


def put(state, place, value) -> dict:
    """A copy of `state` with `value` at `place`; tuples on the way become lists."""
    state = copy.deepcopy(state)
    target = state
    for key in place[:-1]:
        if isinstance(target[key], tuple):
            target[key] = list(target[key])
        target = target[key]
    target[place[-1]] = value
    return state


@pytest.mark.parametrize("place, kind", CELLS)
def test_a_wrong_value_is_one_sentence(run, place, kind) -> None:
    trainer = trainer_for(run, put(run.state, place, WRONG[kind]))
    with pytest.raises(UserError) as error:
        trainer.load_checkpoint(run.folder / "checkpoint_last.pt")
    sentence = str(error.value)
    assert sentence.startswith(str(run.folder / "checkpoint_last.pt")) and "found" in sentence and len(sentence) < 600


def test_the_unchanged_state_is_resumed(run) -> None:
    trainer, extra, itr = resume(run, run.state)
    assert trainer.get_num_updates() == 2 and extra["patience"]["runs"] == 0 and itr.next_epoch_idx == 1


@pytest.mark.parametrize(
    "place, value",
    [
        ((*ENTRY, "exp_avg"), torch.full((1504, 8), math.nan)),
        ((*ENTRY, "exp_avg_sq"), torch.zeros(1504, 9)),
        ((*GROUP, "betas"), (0.9, 1.0)),
        ((*GROUP, "amsgrad"), True),
        ((*GROUP, "params"), [0]),
        ((*LAST, "param_groups"), []),
        ((*LAST, "state"), {}),
        ((*METER, 3), {"val": "abc"}),
        ((*METER, 0), "first"),
        (("model", "decoder.layer_norm.weight"), torch.full((8,), math.inf)),
        (("optimizer_history",), []),
    ],
)
def test_other_shapes_and_numbers_are_too(run, place, value) -> None:
    with pytest.raises(BadFile, match=r"checkpoint_last\.pt: found"):
        resume(run, put(run.state, place, value))


def test_no_position_in_the_data_is_said(run, caplog) -> None:
    _, _, itr = resume(run, put(run.state, ("extra_state",), {}))
    assert itr.next_epoch_idx == 1 and "does not say" in caplog.text


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_a_missing_moment_is(run, key) -> None:
    state = copy.deepcopy(run.state)
    del state["last_optimizer_state"]["state"][0][key]
    with pytest.raises(BadFile, match=f"no {key} for parameter 0"):
        resume(run, state)


def test_what_other_versions_leave_out_is_filled_in(run) -> None:
    state = copy.deepcopy(run.state)
    state["optimizer_history"][-1]["lr_scheduler_state"] = {}
    for name in ("patience", "metrics", "best", "previous_training_time"):
        state["extra_state"].pop(name, None)
    del state["last_optimizer_state"]["param_groups"][0]["amsgrad"]
    trainer, _, _ = resume(run, state)
    trainer.train_step([next(trainer.get_train_iterator(0).next_epoch_itr())])
    assert trainer.get_num_updates() == 3


def test_numbers_of_other_libraries_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    values = [numpy.float32(2.5), torch.tensor(2.5), numpy.array(2.5), numpy.array([2.5])]
    assert {training_state.plain_number(value) for value in values} == {2.5}
    assert training_state.plain_number(True) is None and training_state.plain_number(numpy.bool_(True)) is None
