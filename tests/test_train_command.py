"""`train.py` on the golden text: the loss falls, log lines are fairseq's, it stops at the given limits, and after a
kill it continues to the same result."""

import json
import re
import shlex
import shutil

import pytest
import torch

from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from fairseq.trainer import Trainer

TINY = shlex.split(
    "--task language_modeling --arch transformer_lm_wiki103 --decoder-embed-dim 16 --decoder-input-dim 16 "
    "--decoder-output-dim 16 --decoder-ffn-embed-dim 32 --decoder-layers 1 --decoder-attention-heads 2 "
    "--adaptive-input-cutoff 300,900 --adaptive-softmax-cutoff 300,900 --dropout 0.1 --criterion adaptive_loss "
    "--tokens-per-sample 64 --max-tokens 512 --ddp-backend no_c10d --num-workers 0 --no-progress-bar --cpu "
    "--log-interval 10 --seed 1 --skip-invalid-size-inputs-valid-test"
)
COSINE = shlex.split(
    "--optimizer nag --lr 0.0001 --max-lr 0.5 --lr-scheduler cosine --lr-period-updates 60 --warmup-updates 10 "
    "--warmup-init-lr 1e-7 --clip-norm 0.1"
)
ADAM = shlex.split(
    "--optimizer adam --lr 0.002 --lr-scheduler inverse_sqrt --warmup-updates 10 --update-freq 2 --clip-norm 0"
)
SGD = ["--optimizer", "sgd", "--lr-scheduler", "fixed"]


@pytest.fixture
def train(run_cli, golden, tmp_path):
    def run(*flags, recipe=COSINE, save_dir=None):
        save = ["--save-dir", save_dir or tmp_path / "ckpt"]
        return run_cli("train", [golden / "data-bin", *TINY, *recipe, *save, *flags])

    return run


def finished(done):
    assert done.status == 0, done.stdout + done.stderr
    return done.stdout


def test_going_on_as_another_model_is_said(train) -> None:
    """The same weights with another number of heads, or dropout, are another model."""
    finished(train("--max-update", 2))
    done = train("--max-update", 3, "--decoder-attention-heads", 1, "--dropout", 0.3)
    said = [line for line in finished(done).splitlines() if "so the model is another one" in line]
    assert len(said) == 2 and "--decoder-attention-heads" in said[0] and "--dropout" in said[1]
    assert "another one" not in finished(train("--max-update", 4, "--decoder-attention-heads", 1, "--dropout", 0.3))


def test_it_learns_and_reports(train, tmp_path) -> None:
    flags = ("--max-update", 60, "--save-interval-updates", 30, "--results-json", tmp_path / "out.json")
    out = finished(train(*flags))
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| INFO \| train \| epoch 001:      9 / 34 loss=\d", out)
    keys = shlex.split("loss ppl wps ups wpb bsz num_updates lr gnorm clip oom train_wall wall")
    line = next(text for text in out.splitlines() if "| train | epoch 001 |" in text)
    assert [part.split()[0] for part in line.split(" | ")[4:]] == keys
    valid = re.findall(r"INFO \| valid \| epoch 00\d \| valid on 'valid' subset \| loss ([\d.]+) \| ppl", out)
    assert len(valid) == 3 and float(valid[-1]) < float(valid[0]) < 9
    assert re.search(r"num. model params: \d+ \(num. trained: \d+\)", out)
    assert "model transformer_lm_wiki103, criterion AdaptiveLoss" in out
    assert "done training in" in out and "plan: " in out
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["num_updates"] == 60 and results["valid"]["valid"]["loss"] == float(valid[-1]) == results["best"]
    names = {path.stem.removeprefix("checkpoint") for path in (tmp_path / "ckpt").iterdir()}
    assert names == {"1", "_1_30", "_2_60", "_best", "_last"}
    check_contents(tmp_path / "ckpt" / "checkpoint_last.pt", float(valid[-1]))


def check_contents(path, best: float) -> None:
    """The layout that fairseq 0.9 reads."""
    state = torch.load(path, weights_only=False)
    assert set(state) == {"args", "model", "optimizer_history", "extra_state", "last_optimizer_state"}
    (entry,) = state["optimizer_history"]
    assert entry["criterion_name"] == "AdaptiveLoss" and entry["optimizer_name"] == "FairseqNAG"
    assert entry["num_updates"] == 60 and set(entry["lr_scheduler_state"]) == {"best"}
    extra = state["extra_state"]
    assert extra["train_iterator"] == {"epoch": 2, "iterations_in_epoch": 26, "shuffle": True}
    assert extra["val_loss"] == extra["best"] == best
    kinds = {key: kind for _, key, kind, _ in extra["metrics"]["default"]}
    assert kinds["loss"] == "AverageMeter" and kinds["wps"] == "TimeMeter" and kinds["wall"] == "StopwatchMeter"
    (group,) = state["last_optimizer_state"]["param_groups"]
    assert set(group) == {"lr", "lr_old", "momentum", "weight_decay", "params"}
    assert all(set(s) == {"momentum_buffer"} for s in state["last_optimizer_state"]["state"].values())
    assert state["args"].arch == "transformer_lm_wiki103" and state["args"].max_lr == 0.5


@pytest.mark.parametrize(
    "recipe, flags, kills",
    [
        (COSINE, ["--save-interval-updates", 10], [15, 40]),
        (ADAM, ["--save-interval-updates", 7, "--bf16"], [9, 20]),
        ([*SGD, "--lr", "0.5,0.3,0.1"], ["--save-interval-updates", 20], [25]),
    ],
    ids=["nag-cosine", "adam-bf16-grouped", "sgd-epoch-rates"],
)
def test_a_killed_run_continues_bit_for_bit(train, tmp_path, monkeypatch, recipe, flags, kills) -> None:
    flags = [*flags, "--max-update", 45, "--disable-validation"]
    finished(train(*flags, recipe=recipe, save_dir=tmp_path / "whole"))
    step = Trainer.train_step
    for kill in kills:

        def dying_step(self, samples, kill=kill):
            if self.get_num_updates() == kill:
                raise KeyboardInterrupt
            return step(self, samples)

        monkeypatch.setattr(Trainer, "train_step", dying_step)
        assert train(*flags, recipe=recipe).status == 130
    monkeypatch.setattr(Trainer, "train_step", step)
    out = finished(train(*flags, recipe=recipe))
    assert re.search(r"loaded checkpoint \S+checkpoint_last.pt \(epoch \d @ \d+ updates\)", out)
    whole, parts = (load_checkpoint_to_cpu(tmp_path / name / "checkpoint_last.pt") for name in ("whole", "ckpt"))
    assert whole["optimizer_history"][-1]["num_updates"] == 45 == parts["optimizer_history"][-1]["num_updates"]
    assert whole["extra_state"]["train_iterator"] == parts["extra_state"]["train_iterator"]
    for key, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][key]), key
    losses = [
        {key: state for _, key, _, state in run["extra_state"]["metrics"]["default"]}["loss"] for run in (whole, parts)
    ]
    assert losses[0] == losses[1]


def test_finished_runs_have_nothing_to_do_and_longer_ones_go_on(train) -> None:
    finished(train("--max-update", 5, "--disable-validation"))
    again = finished(train("--max-update", 5, "--disable-validation"))
    assert "| train | epoch 001 |" not in again and "done training" in again
    longer = finished(train("--max-update", 8, "--disable-validation"))
    assert "(epoch 1 @ 5 updates)" in longer and "num_updates 8" in longer


def test_epochs_patience_and_smallest_rate_end_the_training(train) -> None:
    common = ("--no-save", "--max-tokens", 4096)
    out = finished(train("--max-epoch", 2, *common))
    assert "epoch 002 |" in out and "epoch 003" not in out
    out = finished(train("--patience", 1, *common, recipe=[*SGD, "--lr", "1e-30"]))
    assert "early stop since valid performance hasn't improved for last 1 runs" in out
    assert "epoch 003 | valid" in out and "epoch 004" not in out
    falling = [*SGD, "--lr", "0.1", "--force-anneal", 1, "--min-lr", 0.02]
    assert "epoch 002" not in finished(train(*common, recipe=falling))


def test_json_lines(train) -> None:
    out = finished(train("--log-format", "json", "--max-epoch", 1, "--no-save"))
    found = [json.loads(text) for text in re.findall(r"\| (?:train|valid) \| (\{.*\})", out)]
    inside, end, valid = found[0], found[-2], found[-1]
    assert inside["epoch"] == 1 and inside["update"] == round(9 / 34, 3) and "loss" in inside and "eta" in inside
    assert "train_loss" in end and "train_wall" in end and "update" not in end
    assert {"epoch", "valid_loss", "valid_ppl", "valid_num_updates"} <= set(valid)


def test_data_folders_take_turns_also_after_a_restart(train, golden, tmp_path, run_cli) -> None:
    other = shutil.copytree(golden / "data-bin", tmp_path / "other")
    for kind in ("bin", "idx"):
        shutil.copy(other / f"valid.{kind}", other / f"train.{kind}")
    both = f"{golden / 'data-bin'}:{other}"
    base = [both, *TINY, *COSINE, "--save-dir", tmp_path / "turns"]
    base += ["--disable-validation", "--save-interval-updates", 36]

    def updates_per_epoch(out: str) -> list[tuple[str, str]]:
        return re.findall(r"epoch (\d+) \|.*num_updates (\d+)", out)

    whole = finished(run_cli("train", [*base, "--max-epoch", 3]))
    assert updates_per_epoch(whole) == [("001", "34"), ("002", "37"), ("003", "71")]
    for path in (tmp_path / "turns").iterdir():
        if path.name != "checkpoint_1_36.pt":
            path.rename(path.with_name("checkpoint_last.pt")) if path.name == "checkpoint_2_36.pt" else path.unlink()
    rest = finished(run_cli("train", [*base, "--max-epoch", 3]))
    assert updates_per_epoch(rest) == [("002", "37"), ("003", "71")]


def test_new_starts_from_old_weights(train, tmp_path) -> None:
    finished(train("--max-update", 3, "--disable-validation"))
    old = tmp_path / "ckpt" / "checkpoint_last.pt"
    flags = ("--max-update", 2, "--disable-validation", "--no-save")
    out = finished(train("--finetune-from-model", old, *flags, save_dir=tmp_path / "new"))
    assert "(epoch 1 @ 0 updates)" in out and "num_updates 2" in out
    out = finished(train("--restore-file", old, "--reset-optimizer", *flags, save_dir=tmp_path / "new"))
    assert "(epoch 1 @ 0 updates)" in out
    out = finished(train("--restore-file", tmp_path / "nothing.pt", *flags, save_dir=tmp_path / "new"))
    assert "no existing checkpoint found" in out and "WARNING" in out and "starts from scratch" in out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--fp16"], ["--fp16", "GPU"]),
        (["--distributed-world-size", "2"], ["--distributed-world-size", "use one process"]),
        (["--distributed-rank", "1"], ["--distributed-rank", "only rank 0 saves"]),
        (["--distributed-rank", "-1"], ["--distributed-rank", "only rank 0 saves"]),
        (["--best-checkpoint-metric", "bleu"], ["--best-checkpoint-metric", "loss, ppl"]),
        (["--save-dir", "/dev/null/x"], ["--save-dir", "/dev/null/x"]),
        (["--train-subset", "nothing"], ["nothing"]),
        (["--optimizer-overrides", "__import__('os')"], ["--optimizer-overrides"]),
    ],
)
def test_mistakes_are_one_sentence(train, flags, words) -> None:
    error = train("--max-update", 1, *flags).error
    assert all(word in error for word in words), error


def test_a_checkpoint_of_something_else_is_refused(train, tmp_path) -> None:
    finished(train("--max-update", 1, "--disable-validation"))
    wider = train("--max-update", 2, "--decoder-ffn-embed-dim", 48).error
    assert "checkpoint_last.pt" in wider and "architecture" in wider
    other = train("--max-update", 2, recipe=ADAM).error
    assert "FairseqNAG" in other and "--reset-optimizer" in other


def test_the_genuine_checkpoint_can_be_trained_further(run_cli, golden, tmp_path) -> None:
    flags = shlex.split("--decoder-embed-dim 32 --decoder-input-dim 32 --decoder-output-dim 32")
    flags += ["--decoder-ffn-embed-dim", 64, "--decoder-layers", 2, "--tokens-per-sample", 128, "--restore-file"]
    flags += [golden / "checkpoints" / "checkpoint_best.pt", "--max-update", 610, "--no-save"]
    out = finished(run_cli("train", [golden / "data-bin", *TINY, *COSINE, *flags]))
    assert "(epoch 18 @ 600 updates)" in out
    loss = float(re.search(r"valid on 'valid' subset \| loss ([\d.]+)", out)[1])
    assert loss < 5.0


def test_a_loss_that_is_no_number_stops_the_training_before_anything_is_saved(train, tmp_path) -> None:
    flags = ("--max-update", 12, "--log-interval", 1000, "--clip-norm", 0)
    recipe = ["--optimizer", "adam", "--lr", "1e30", "--lr-scheduler", "fixed"]
    for more in (["--validate-interval-updates", 4], ["--save-interval-updates", 4], []):
        error = train(*flags, *more, recipe=recipe).error
        assert "the training loss is nan after" in error and "lower the learning rate" in error
        assert not (tmp_path / "ckpt").exists()


def test_a_split_without_text(run_cli, golden, tmp_path) -> None:
    shutil.copytree(golden / "data-bin", tmp_path / "bin")
    (tmp_path / "empty").write_text("")
    flags = ["--only-source", "--validpref", tmp_path / "empty", "--srcdict", golden / "data-bin" / "dict.txt"]
    assert run_cli("preprocess", [*flags, "--destdir", tmp_path / "bin"]).status == 0
    error = run_cli("train", [tmp_path / "bin", *TINY, *SGD, "--save-dir", tmp_path / "c", "--max-update", 1]).error
    assert "bin/valid: found a split without any text, expected at least one token" in error
    assert not (tmp_path / "c").exists()


def test_a_stop_in_mid_epoch_is_noted_by_the_schedule_as_in_the_original(train, tmp_path) -> None:
    flags = ("--max-update", 8, "--no-epoch-checkpoints")
    finished(train(*flags, recipe=[*SGD, "--lr", "0.5,0.25"]))
    state = load_checkpoint_to_cpu(tmp_path / "ckpt" / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["lr_scheduler_state"] == {"best": state["extra_state"]["val_loss"]}
    assert state["last_optimizer_state"]["param_groups"][0]["lr"] == 0.25  # the next epoch's, until a restart


def test_nothing_in_the_folder_is_taken_away(train, tmp_path) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "dummy").write_text("mine")
    finished(train("--max-update", 1, "--disable-validation"))
    assert (tmp_path / "ckpt" / "dummy").read_text() == "mine"


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--max-tokens", 256], "--max-tokens 512, now 256"),
        (["--seed", 2], "--seed 1, now 2"),
        (["--tokens-per-sample", 32], "--tokens-per-sample 64, now 32"),
        (["--train-subset", "valid"], "--train-subset train, now valid"),
    ],
)
def test_a_place_in_other_batches_is_none_so_the_epoch_starts_again(train, tmp_path, flags, reason) -> None:
    first = ("--max-update", 5, "--disable-validation")
    finished(train(*first))
    out = finished(train("--max-update", 6, "--disable-validation", *flags))
    assert f"after 5 batches of epoch 1, which were others ({reason}" in out and "; epoch 1 starts again" in out
    extra = load_checkpoint_to_cpu(tmp_path / "ckpt" / "checkpoint_last.pt")["extra_state"]
    assert extra["train_iterator"]["epoch"] == 1 and extra["train_iterator"]["iterations_in_epoch"] == 1


def test_so_it_does_with_another_text_and_with_a_file_of_fairseq(train, golden, tmp_path) -> None:
    finished(train("--max-update", 5, "--disable-validation"))
    path = tmp_path / "ckpt" / "checkpoint_last.pt"
    state = load_checkpoint_to_cpu(path)
    state["extra_state"]["iterated"]["digest"] = "another"
    torch.save(state, path)
    out = finished(train("--max-update", 6, "--disable-validation"))
    assert "which were others (the text is another); epoch 1 starts again" in out
    del state["extra_state"]["iterated"]
    torch.save(state, path)
    out = finished(train("--max-update", 6, "--disable-validation"))
    assert "starts again" not in out
    torch.save(state, path)
    assert "(--seed 1, now 3)" in finished(train("--max-update", 6, "--disable-validation", "--seed", 3))


def test_a_complete_epoch_is_not_repeated_with_other_batches(train) -> None:
    finished(train("--max-epoch", 1, "--max-tokens", 4096, "--disable-validation"))
    out = finished(train("--max-epoch", 2, "--max-tokens", 2048, "--disable-validation"))
    assert "starts again" not in out and "epoch 001 |" not in out and "epoch 002 |" in out


def test_a_data_folder_of_a_later_epoch_is_looked_at_before_the_first(run_cli, golden, tmp_path) -> None:
    shutil.copytree(golden / "data-bin", tmp_path / "B")
    words = (tmp_path / "B" / "dict.txt").read_text().splitlines(keepends=True)
    flags = [*TINY, *COSINE, "--no-save", "--max-update", 1, "--disable-validation"]
    for folder, sentence in (("nowhere", "nowhere/train.idx: no such file"), ("B", "found another dictionary")):
        (tmp_path / "B" / "dict.txt").write_text("".join([words[1], words[0], *words[2:]]))
        done = run_cli("train", [f"{golden / 'data-bin'}:{tmp_path / folder}", *flags])
        assert sentence in done.error and "epoch 001" not in done.stdout


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--disable-validation", "--patience", 2], "--patience has no effect"),
        (["--disable-validation", "--keep-best-checkpoints", 2], "--keep-best-checkpoints has no effect"),
        (["--keep-interval-updates", 2, "--disable-validation"], "--keep-interval-updates has no effect"),
        (["--no-save", "--save-interval-updates", 1, "--disable-validation"], "--save-interval-updates has no effect"),
    ],
)
def test_flags_that_have_no_effect_beside_others_are_said(train, flags, said) -> None:
    assert said in finished(train("--max-update", 1, *flags))


def test_a_training_of_which_nothing_would_be_kept_is_refused(train) -> None:
    flags = ("--no-epoch-checkpoints", "--no-last-checkpoints", "--disable-validation", "--max-update", 1)
    assert "or say --no-save" in train(*flags).error
    finished(train(*flags, "--no-save"))
