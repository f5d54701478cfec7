"""Checkpoints of both generations and containers, old files' upgrades, defaults and overrides."""

import argparse
import os
import pickle
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq import checkpoint_utils, models
from fairseq.data import Dictionary
from fairseq.errors import BadFile, MissingFile, UserError
from fairseq.models import ArchitectureMismatch
from fairseq.tasks.language_modeling import LanguageModelingTask

PAD = 1
MODEL_OPTIONS = {
    "decoder_layers": 2,
    "decoder_embed_dim": 16,
    "decoder_ffn_embed_dim": 24,
    "decoder_attention_heads": 2,
}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data-bin"
    folder.mkdir()
    dictionary = Dictionary()
    for i in range(28):
        dictionary.add_symbol(f"w{i}", 28 - i)
    dictionary.save(folder / "dict.txt")
    return folder


def old_args(data, **options):
    args = argparse.Namespace(
        arch="transformer_lm",
        task="language_modeling",
        data=str(data),
        tokens_per_sample=20,
        dropout=0.1,
        **MODEL_OPTIONS,
    )
    for key, value in options.items():
        setattr(args, key, value)
    return args


def make_model(args):
    filled = argparse.Namespace(**vars(args))
    models.ARCH_CONFIG_REGISTRY[args.arch](filled)
    torch.manual_seed(3)
    return models.build_model(filled, LanguageModelingTask.setup_task(filled)).eval()


def save(path, zipped=True, **content):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return str(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_flat_args_in_both_containers(tmp_path, data, zipped):
    args = old_args(data)
    source = make_model(args)
    path = save(
        tmp_path / "a.pt",
        zipped,
        args=args,
        model=source.state_dict(),
        extra_state={"val_loss": np.float64(4.5), "train_iterator": {"epoch": 3}},
        optimizer_history=[{"optimizer_name": "FairseqAdam", "num_updates": 7, "lr_scheduler_state": {}}],
    )
    loaded, found, task = checkpoint_utils.load_model_ensemble_and_task([path], {"knn_keytype": "last_ffn_input"})
    tokens = torch.tensor([[5, 6, 7, 8]])
    output = loaded[0].eval()(tokens)
    torch.testing.assert_close(output[0], source(tokens)[0])
    assert output[1]["last_ffn_input"].shape == (4, 1, 16)
    assert len(task.dictionary) == 32
    assert found.knn_keytype == "last_ffn_input"
    assert (found.decoder_layerdrop, found.output_dictionary_size, found.lmbda) == (0, -1, 0.0)
    assert found.max_target_positions == 20
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    assert state["extra_state"]["train_iterator"] == {"epoch": 3}
    assert getattr(state["args"], "knn_keytype", None) is None


def newer_cfg(data):
    return {
        "_name": None,
        "common": {"_name": None, "seed": 5, "fp16": False, "user_dir": None},
        "distributed_training": {"ddp_backend": "legacy_ddp", "distributed_world_size": 1},
        "dataset": {"batch_size": 4, "max_tokens": 512, "num_workers": 0},
        "optimization": {"lr": [0.001], "max_update": 10, "stop_min_lr": 1e-9, "clip_norm": 0.1},
        "checkpoint": {"save_dir": "c"},
        "model": {"_name": "transformer_lm_gpt", "activation_fn": "gelu", "dropout": 0.25, **MODEL_OPTIONS},
        "task": {
            "_name": "language_modeling",
            "data": str(data),
            "tokens_per_sample": 20,
            "shorten_method": "truncate",
        },
        "criterion": {"_name": "cross_entropy", "sentence_avg": False},
        "optimizer": {"_name": "adam", "adam_betas": "(0.9, 0.98)", "lr": [0.001]},
        "lr_scheduler": {"_name": "inverse_sqrt", "warmup_updates": 4},
        "bpe": None,
        "tokenizer": None,
    }


def test_nested_configuration_is_flattened(tmp_path, data):
    args = old_args(data, arch="transformer_lm_gpt")
    source = make_model(args)
    parameters = dict(source.state_dict())
    # newer files name the output matrix differently and have no dummy buffer for positions
    parameters["decoder.output_projection.weight"] = parameters.pop("decoder.embed_out")
    del parameters["decoder.embed_positions._float_tensor"]
    path = save(
        tmp_path / "n.pt",
        args=None,
        cfg=newer_cfg(data),
        model=parameters,
        criterion=None,
        optimizer_history=[{"optimizer_name": "FairseqAdam", "num_updates": 1, "lr_scheduler_state": {}}],
        task_state={},
        extra_state={"train_iterator": {"epoch": 1}},
    )
    loaded, found, _ = checkpoint_utils.load_model_ensemble_and_task([path], {"dropout": 0.5})
    tokens = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded[0].eval()(tokens)[0], source(tokens)[0])
    assert (found.arch, found.task, found.criterion) == ("transformer_lm_gpt", "language_modeling", "cross_entropy")
    assert (found.optimizer, found.lr_scheduler, found.bpe) == ("adam", "inverse_sqrt", None)
    assert (found.max_sentences, found.min_lr, found.ddp_backend) == (4, 1e-9, "no_c10d")
    assert found.truncate_sequence is True
    assert found.dropout == 0.5
    assert found.seed == 5
    assert found.data == str(data)
    assert not hasattr(found, "_name")


def test_configuration_kept_as_a_namespace(data):
    cfg = newer_cfg(data)
    cfg["model"] = argparse.Namespace(arch="transformer_lm_big", dropout=0.2)
    cfg["task"]["data"] = ["first", "second"]
    args = checkpoint_utils.flatten_cfg(cfg)
    assert (args.arch, args.dropout) == ("transformer_lm_big", 0.2)
    assert args.data == os.pathsep.join(["first", "second"])


def test_training_state_of_the_oldest_files():
    args = argparse.Namespace(arch="transformer_lm", max_positions=99, raw_text=True)
    state = {
        "args": args,
        "model": {},
        "optimizer": {"o": 1},
        "best_loss": 3.5,
        "epoch": 4,
        "batch_offset": 20,
        "val_loss": 5,
    }
    checkpoint_utils.upgrade_state(state)
    assert state["last_optimizer_state"] == {"o": 1}
    assert state["optimizer_history"] == [
        {
            "criterion_name": "CrossEntropyCriterion",
            "optimizer_name": "FairseqNAG",
            "lr_scheduler_state": {"best": 3.5},
            "num_updates": 0,
        }
    ]
    assert state["extra_state"]["train_iterator"] == {"epoch": 4, "iterations_in_epoch": 20}
    assert state["extra_state"]["val_loss"] == 5
    assert (args.max_source_positions, args.max_target_positions) == (99, 99)
    assert (args.task, args.dataset_impl) == ("translation", "raw")
    assert "optimizer" not in state


def test_optimizer_in_the_history_moves_out():
    history = [{"optimizer": {"old": 1}}, {"optimizer": {"new": 1}, "best_loss": 2.0, "optimizer_name": "FairseqAdam"}]
    state = {"args": argparse.Namespace(task="none", lazy_load=True), "model": {}, "optimizer_history": history}
    checkpoint_utils.upgrade_state(state)
    assert state["last_optimizer_state"] == {"new": 1}
    assert not any("optimizer" in entry for entry in history)
    assert history[1]["optimizer_name"] == "FairseqAdam"
    assert history[1]["lr_scheduler_state"] == {"best": 2.0}
    assert state["args"].dataset_impl == "lazy"


def test_defaults_fill_gaps_and_never_overwrite():
    args = argparse.Namespace(task="language_modeling", arch="transformer_lm", sample_break_mode="eos", optimizer="nag")
    checkpoint_utils.upgrade_state({"args": args, "model": {}}, {"k": 7, "novel": "x"})
    assert (args.sample_break_mode, args.k, args.novel) == ("eos", 7, "x")
    assert args.output_dictionary_size == -1
    assert hasattr(args, "momentum")
    assert not hasattr(args, "decoder_layers")  # no declared default: the architecture fills it when building


def test_overrides_come_before_defaults():
    args = argparse.Namespace(task="language_modeling", arch="transformer_lm")
    checkpoint_utils.upgrade_state({"args": args, "model": {}}, {"optimizer": "adam"})
    assert hasattr(args, "adam_betas")


def test_models_of_an_ensemble_share_one_task(tmp_path, data):
    args = old_args(data)
    first, second = make_model(args), make_model(old_args(data, decoder_layers=1))
    paths = [
        save(tmp_path / "1.pt", args=args, model=first.state_dict()),
        save(tmp_path / "2.pt", args=old_args("/nowhere", decoder_layers=1), model=second.state_dict()),
    ]
    task = LanguageModelingTask.setup_task(args)
    loaded, found = checkpoint_utils.load_model_ensemble(paths, task=task)
    assert [len(model.decoder.layers) for model in loaded] == [2, 1]
    assert found.decoder_layers == 1


def test_loaded_parameters_do_not_depend_on_the_file(tmp_path, data):
    args = old_args(data)
    path = save(tmp_path / "a.pt", args=args, model=make_model(args).state_dict())
    model = checkpoint_utils.load_model_ensemble([path])[0][0].eval()
    before = model(torch.tensor([[5, 6]]))[0].clone()
    with open(path, "r+b") as stream:
        stream.truncate(0)
    assert torch.equal(model(torch.tensor([[5, 6]]))[0], before)


def test_wrong_dictionary_or_options_are_one_sentence(tmp_path, data):
    args = old_args(data)
    path = save(tmp_path / "a.pt", args=args, model=make_model(args).state_dict())
    with pytest.raises(ArchitectureMismatch, match=r"a\.pt: architectures do not match: missing: .*layers\.2"):
        checkpoint_utils.load_model_ensemble([path], {"decoder_layers": 3})
    with open(data / "dict.txt", "a", encoding="utf-8") as stream:
        stream.write("extra 1\n")
    with pytest.raises(ArchitectureMismatch, match=r"\[32, 16\] where the model has \[33, 16\].*dict\.txt"):
        checkpoint_utils.load_model_ensemble([path])


def test_layers_to_keep_by_override(tmp_path, data):
    args = old_args(data)
    source = make_model(args)
    path = save(tmp_path / "a.pt", args=args, model=source.state_dict())
    model = checkpoint_utils.load_model_ensemble([path], {"decoder_layers_to_keep": "1"})[0][0]
    assert len(model.decoder.layers) == 1
    assert torch.equal(model.decoder.layers[0].fc1.weight, source.decoder.layers[1].fc1.weight)


def test_a_model_that_computes_when_built_is_loaded_too(tmp_path, data, monkeypatch):
    args = old_args(data)
    path = save(tmp_path / "a.pt", args=args, model=make_model(args).state_dict())
    original = LanguageModelingTask.build_model

    def build(self, args):
        model = original(self, args)
        model.table = torch.arange(3)  # neither parameter nor buffer
        return model

    monkeypatch.setattr(LanguageModelingTask, "build_model", build)
    model = checkpoint_utils.load_model_ensemble([path])[0][0]
    assert model.table.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "torch.save did not write"),
        (b"PK\x03\x04 broken", "damaged zip"),
        (pickle.dumps({"model": 1}), "torch.save did not write"),
    ],
)
def test_foreign_files_are_one_sentence(tmp_path, content, message):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=message):
        checkpoint_utils.load_checkpoint_to_cpu(path)


def test_truncated_checkpoints_are_one_sentence(tmp_path):
    for zipped in (True, False):
        path = save(tmp_path / "x.pt", zipped, args=argparse.Namespace(), model={"w": torch.ones(5000)})
        with open(path, "r+b") as stream:
            stream.truncate(os.path.getsize(path) // 2)
        with pytest.raises(BadFile) as caught:
            checkpoint_utils.load_checkpoint_to_cpu(path)
        assert "\n" not in str(caught.value)


def test_missing_or_empty_requests(tmp_path):
    with pytest.raises(MissingFile, match=r"none\.pt: no such file"):
        checkpoint_utils.load_model_ensemble([str(tmp_path / "none.pt")])
    with pytest.raises(MissingFile):
        checkpoint_utils.load_checkpoint_to_cpu(tmp_path / "none.pt")
    with pytest.raises(UserError, match="--path"):
        checkpoint_utils.load_model_ensemble([])
    path = save(tmp_path / "tensor.pt", only=torch.ones(1))
    with pytest.raises(BadFile, match="no model with its options"):
        checkpoint_utils.load_checkpoint_to_cpu(path)


def test_unknown_architecture_is_named(tmp_path, data):
    args = old_args(data)
    path = save(tmp_path / "a.pt", args=args, model=make_model(args).state_dict())
    with pytest.raises(UserError, match="--arch: found hf_gpt2"):
        checkpoint_utils.load_model_ensemble([path], {"arch": "hf_gpt2"})


def test_checkpoint_paths_are_sorted_by_number(tmp_path):
    for name in (
        "checkpoint2.pt",
        "checkpoint10.pt",
        "checkpoint_best.pt",
        "checkpoint_3_500.pt",
        "checkpoint_1_90.pt",
    ):
        (tmp_path / name).touch()
    names = [os.path.basename(path) for path in checkpoint_utils.checkpoint_paths(str(tmp_path))]
    assert names == ["checkpoint10.pt", "checkpoint2.pt"]
    mid_epoch = checkpoint_utils.checkpoint_paths(str(tmp_path), r"checkpoint_\d+_(\d+)\.pt")
    assert [os.path.basename(path) for path in mid_epoch] == ["checkpoint_3_500.pt", "checkpoint_1_90.pt"]


def test_saving_functions_are_found_under_fairseqs_name():
    from fairseq import checkpoint_saving

    assert checkpoint_utils.save_checkpoint is checkpoint_saving.save_checkpoint
    with pytest.raises(AttributeError, match="no attribute nonsense"):
        _ = checkpoint_utils.nonsense


def resident_bytes():
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_loading_needs_little_more_memory_than_the_weights(tmp_path, data):
    args = old_args(data, decoder_embed_dim=768, decoder_ffn_embed_dim=3072, decoder_layers=8)
    model = make_model(args)
    weights = sum(p.numel() for p in model.parameters()) * 4
    optimizer = {i: {"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for i, p in enumerate(model.parameters())}
    path = save(tmp_path / "a.pt", args=args, model=model.state_dict(), last_optimizer_state={"state": optimizer})
    del model, optimizer
    peak, done, start = [0], threading.Event(), resident_bytes()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident_bytes() - start)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = checkpoint_utils.load_model_ensemble([path])[0][0]
    done.set()
    watcher.join()
    assert sum(p.numel() for p in loaded.parameters()) * 4 == weights
    assert peak[0] < 2.5 * weights  # the file holds three times the weights; mapped pages and the copy count


@pytest.mark.parametrize("change", ["inserted", "removed", "doubled"])
def test_a_container_whose_bytes_are_shifted_is_refused(change: str, golden: Path, tmp_path: Path) -> None:
    """The directory at the end of a zip file points to places where parts no longer begin."""
    content = (golden / "checkpoints" / "checkpoint_best.pt").read_bytes()
    for place in (100, len(content) // 3, len(content) // 2, len(content) - 900):
        one = content[place : place + 1]
        middle = {"inserted": b"x" + one, "removed": b"", "doubled": one + content[place : place + 40]}[change]
        path = tmp_path / f"{place}.pt"
        path.write_bytes(content[:place] + middle + content[place + 1 :])
        for mmap in (True, False):
            with pytest.raises(UserError, match=re.escape(str(path))):
                checkpoint_utils.read_torch_file(path, mmap)
        with pytest.raises(UserError):
            checkpoint_utils.load_model_ensemble([str(path)])
