"""Names, conditions, deletion and contents of checkpoints; files are whole or absent."""

import argparse
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fairseq import checkpoint_saving
from fairseq.checkpoint_saving import checkpoint_names, save_checkpoint, to_cpu
from fairseq.errors import UserError

ARGS = {
    "no_save": False,
    "no_epoch_checkpoints": False,
    "no_last_checkpoints": False,
    "save_interval": 1,
    "save_interval_updates": 0,
    "keep_interval_updates": -1,
    "keep_last_epochs": -1,
    "keep_best_checkpoints": -1,
    "best_checkpoint_metric": "loss",
    "maximize_best_checkpoint_metric": False,
    "distributed_rank": 0,
}


class Itr:
    def __init__(self, epoch: int, end: bool) -> None:
        self.epoch, self.end = epoch, end

        self.identity = {"batches": 9, "digest": "0"}

    def end_of_epoch(self) -> bool:
        return self.end

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "iterations_in_epoch": 0, "shuffle": True}


class FakeTrainer:
    def __init__(self) -> None:
        self.best_score, self.updates = None, 0

    def get_num_updates(self) -> int:
        return self.updates

    def save_checkpoint(self, path: str, extra_state: dict) -> None:
        checkpoint_saving.torch_persistent_save({"extra_state": extra_state, "updates": self.updates}, path)


def args_with(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{**ARGS, **changes})


@pytest.mark.parametrize(
    "epoch, end, updates, loss, better, flags, expected",
    [
        (2, True, 9, 1.0, True, {}, ["checkpoint2.pt", "checkpoint_best.pt", "checkpoint_last.pt"]),
        (2, True, 9, 1.0, False, {"save_interval": 3}, ["checkpoint_last.pt"]),
        (2, False, 10, None, False, {"save_interval_updates": 5}, ["checkpoint_2_10.pt", "checkpoint_last.pt"]),
        (2, False, 11, None, False, {"save_interval_updates": 5}, ["checkpoint_last.pt"]),
        (2, True, 10, None, False, {"save_interval_updates": 5, "no_epoch_checkpoints": True}, ["checkpoint_last.pt"]),
        (
            1,
            True,
            5,
            4.828,
            True,
            {"keep_best_checkpoints": 2, "no_last_checkpoints": True, "no_epoch_checkpoints": True},
            ["checkpoint_best.pt", "checkpoint.best_loss_4.83.pt"],
        ),
    ],
)
def test_names(epoch, end, updates, loss, better, flags, expected) -> None:
    assert checkpoint_names(args_with(**flags), Itr(epoch, end), updates, loss, better) == expected


def test_best_takes_equal_values_and_either_direction() -> None:
    assert checkpoint_saving.is_better(args_with(), 1.0, None)
    assert checkpoint_saving.is_better(args_with(), 1.0, 1.0)
    assert not checkpoint_saving.is_better(args_with(), 1.1, 1.0)
    assert checkpoint_saving.is_better(args_with(maximize_best_checkpoint_metric=True), 1.1, 1.0)
    assert not checkpoint_saving.is_better(args_with(), None, None)


def test_duplicates_share_one_file_and_later_saves_leave_them_alone(tmp_path) -> None:
    trainer, args = FakeTrainer(), args_with(save_dir=str(tmp_path))
    trainer.updates = 10
    paths = save_checkpoint(args, trainer, Itr(1, True), 2.0)
    assert [os.path.basename(p) for p in paths] == ["checkpoint1.pt", "checkpoint_best.pt", "checkpoint_last.pt"]
    assert len({os.stat(p).st_ino for p in paths}) == 1
    trainer.updates = 20
    save_checkpoint(args, trainer, Itr(2, True), 3.0)
    updates = {p.name: torch.load(p)["updates"] for p in tmp_path.iterdir()}
    expected = {"checkpoint1.pt": 10, "checkpoint2.pt": 20, "checkpoint_best.pt": 10, "checkpoint_last.pt": 20}
    assert updates == expected
    assert torch.load(tmp_path / "checkpoint_last.pt")["extra_state"]["best"] == 2.0


def test_copies_where_links_are_impossible(tmp_path, monkeypatch) -> None:
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    trainer = FakeTrainer()
    paths = save_checkpoint(args_with(save_dir=str(tmp_path)), trainer, Itr(1, True), 2.0)
    assert len({os.stat(p).st_ino for p in paths}) == 3
    assert len({Path(p).read_bytes() for p in paths}) == 1


def test_keep_flags_delete_the_rest(tmp_path) -> None:
    args = args_with(
        save_dir=str(tmp_path),
        save_interval_updates=5,
        keep_interval_updates=2,
        keep_last_epochs=1,
        keep_best_checkpoints=2,
    )
    trainer = FakeTrainer()
    for updates, end, loss in ((5, False, 9.0), (10, False, 3.0), (15, False, 4.0), (18, True, 5.0), (20, False, 6.0)):
        trainer.updates = updates
        save_checkpoint(args, trainer, Itr(1 + (updates > 18), end), loss)
    trainer.updates = 36
    save_checkpoint(args, trainer, Itr(2, True), 7.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint.best_loss_3.00.pt",
        "checkpoint.best_loss_4.00.pt",
        "checkpoint2.pt",
        "checkpoint_1_15.pt",
        "checkpoint_2_20.pt",
        "checkpoint_best.pt",
        "checkpoint_last.pt",
    ]


def test_a_failing_save_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "checkpoint_last.pt"
    checkpoint_saving.torch_persistent_save({"updates": 1}, str(path))
    with pytest.raises(Exception, match="pickle"):
        checkpoint_saving.torch_persistent_save({"updates": lambda: None}, str(path))
    assert torch.load(path) == {"updates": 1} and list(tmp_path.iterdir()) == [path]


def test_to_cpu_keeps_ties_and_types() -> None:
    weight = torch.ones(2, 2, dtype=torch.bfloat16)
    state = to_cpu({"a": weight, "b": [weight, torch.tensor(3)], "c": "text"}, torch.float32)
    assert state["a"] is state["b"][0] and state["a"].dtype == torch.float32
    assert state["b"][1].dtype == torch.int64 and state["c"] == "text"


def test_save_dir_is_probed(tmp_path) -> None:
    checkpoint_saving.verify_checkpoint_directory(str(tmp_path / "new" / "folder"))
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="--save-dir"):
        checkpoint_saving.verify_checkpoint_directory(str(blocked))


def test_finetune_plan(tmp_path) -> None:
    flags = dict.fromkeys(("reset_optimizer", "reset_lr_scheduler", "reset_meters", "reset_dataloader"), False)
    source = tmp_path / "source.pt"
    source.write_text("")
    args = SimpleNamespace(
        restore_file="checkpoint_last.pt", save_dir=str(tmp_path), finetune_from_model=str(source), **flags
    )
    path, resets = checkpoint_saving._restore_plan(args)
    assert path == str(source) and all(resets.values())
    (tmp_path / "checkpoint_last.pt").write_text("")
    path, resets = checkpoint_saving._restore_plan(args)
    assert path.endswith("checkpoint_last.pt") and not any(resets.values())
