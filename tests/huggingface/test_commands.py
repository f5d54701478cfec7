"""The commands with a Hugging Face model: text to tokens, perplexity in each convention, a datastore saved, indexed and
used, runs that go on; and one sentence for whatever does not fit."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.files.sidecar import read_sidecar
from tests.huggingface.conftest import GOLDEN_HF, QUIET

EXPECTED = json.loads((GOLDEN_HF / "expected.json").read_text())


# -- text


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_ids_are_the_tokenizers_own(binarised: Any, golden_hf: Path, model: str) -> None:
    from transformers import AutoTokenizer

    folder = binarised(golden_hf / model)
    dataset = MMapIndexedDataset(str(folder / "valid"))
    tokenizer = AutoTokenizer.from_pretrained(golden_hf / model)
    lines = (golden_hf / "text/wiki.valid.txt").read_text().splitlines(keepends=True)
    assert [dataset[i].tolist() for i in range(117)] == [tokenizer(line)["input_ids"] for line in lines]
    assert dataset.dtype == np.uint16
    text = read_sidecar(str(folder / "valid"), "text", {})["text"]  # type: ignore[index]
    assert text["bytes"] == (golden_hf / "text/wiki.valid.txt").stat().st_size == 5582
    assert (text["documents"], text["tokens"]) == (117, {"gpt2": 1801, "llama": 1917}[model])
    assert text["words"] == sum(len(line.split()) for line in lines)
    assert text["bos_added"] == {"gpt2": None, "llama": 1}[model] and text["eos_added"] is None
    first = EXPECTED["tokenisation"][model]["validation"]["first_ids"]
    assert dataset.tokens[: len(first)].tolist() == first


def test_documents_are_lines_or_files(binarised: Any, golden_hf: Path) -> None:
    gpt2 = golden_hf / "gpt2"
    lines = MMapIndexedDataset(str(binarised(gpt2, "line", "document") / "valid"))
    assert len(lines) == 117 and {int(line[-1]) for line in lines} == {0}  # type: ignore[attr-defined]
    whole = MMapIndexedDataset(str(binarised(gpt2, "file", "none") / "valid"))
    assert (len(whole), len(whole[0])) == (1, 1801)


def test_the_tokenizer_lies_beside_the_text(binarised: Any, golden_hf: Path) -> None:
    folder = binarised(golden_hf / "llama")
    assert (folder / "tokenizer/tokenizer.json").read_bytes() == (golden_hf / "llama/tokenizer.json").read_bytes()
    known = read_sidecar(str(folder / "tokens"), "tokenizer", {"size": int, "begin": int})
    assert known is not None and (known["size"], known["begin"], known["eos"]) == (1000, 1, 2)


# -- perplexity


def test_measures_belong_together(binarised: Any, golden_hf: Path, evaluate: Any) -> None:
    data = binarised(golden_hf / "gpt2", "line", "document")
    results = evaluate(data, golden_hf / "gpt2", "--gen-subset", "valid", "--context-window", 64)
    found = results["perplexities"]
    assert found["token_perplexity"] == pytest.approx(results["perplexity"])
    assert found["word_perplexity"] == pytest.approx(math.exp(found["nats"] / found["words"]))
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / found["bytes"] / math.log(2))
    assert found["convention"]["context"] == 65 and found["convention"]["first_token"] == "scored"


def test_batches_are_small_unless_asked_for(
    binarised: Any, golden_hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --max-tokens a batch has at most the model's default, or one sample that is longer."""
    from fairseq import options
    from fairseq.evaluation.lm_scoring import LMScoring
    from fairseq.models.huggingface.language_model import HuggingFaceLM

    def widths(*flags: str) -> list[int]:
        words = [str(binarised(golden_hf / "gpt2")), "--path", str(golden_hf / "gpt2"), "--gen-subset", "valid", *flags]
        args = options.parse_args_and_arch(options.get_eval_lm_parser(), [*words, *QUIET])
        return [batch["ntokens"] for batch in LMScoring(args).batches()]

    cut = ["--tokens-per-sample", "64"]
    assert widths(*cut) == [1801]
    monkeypatch.setattr(HuggingFaceLM, "default_max_tokens", 200)
    assert widths(*cut) == [9 + 2 * 64, *[192] * 8, 128]
    assert widths(*cut, "--max-tokens", "640") == [9 + 9 * 64, 640, 576]
    monkeypatch.setattr(HuggingFaceLM, "default_max_tokens", 20)
    assert widths(*cut) == [9, *[64] * 28]
    assert widths("--max-length", "128", "--stride", "64")[:2] == [63, 64]


# -- a datastore


def test_save_index_use_and_go_on(
    binarised: Any, golden_hf: Path, tmp_path: Path, evaluate: Any, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = golden_hf / "llama", binarised(golden_hf / "llama", "line", "document")
    store, how = tmp_path / "d", ["--context-window", 32, "--tokens-per-sample", 96, "--max-sentences", 4]
    save = ["--gen-subset", "train", "--save-knnlm-dstore", "--dstore-mmap", store, "--dstore-fp16", *how]
    from fairseq.retrieval.datastore.writer import DatastoreWriter

    whole = DatastoreWriter.append
    calls = []

    def stop_in_the_middle(self: Any, *rows: Any) -> None:
        calls.append(rows)
        if len(calls) == 12:
            raise KeyboardInterrupt
        whole(self, *rows)

    monkeypatch.setattr(DatastoreWriter, "append", stop_in_the_middle)
    monkeypatch.setattr("fairseq.retrieval.datastore.writer.SAFE_POINT_SECONDS", 0.0)
    assert run_cli("eval_lm", [data, "--path", model, *QUIET, *save]).status != 0
    monkeypatch.setattr(DatastoreWriter, "append", whole)
    saved = evaluate(data, model, *save)
    evaluate(data, model, *save[:3], "--dstore-mmap", tmp_path / "once", *save[5:])
    for part in ("keys", "vals"):
        assert (tmp_path / f"d_{part}.npy").read_bytes() == (tmp_path / f"once_{part}.npy").read_bytes()
    tokens = MMapIndexedDataset(str(data / "train")).tokens
    assert np.array_equal(np.fromfile(tmp_path / "d_vals.npy", np.int32), tokens[96:].astype(np.int32)) or saved
    index = tmp_path / "i.index"
    built = run_cli(
        "build_dstore",
        ["--dstore_mmap", store, "--faiss_index", index, "--ncentroids", 16, "--code_size", 8, "--no-progress-bar"],
    )
    assert built.status == 0, built.stderr
    use = ["--gen-subset", "valid", *how, "--knnlm", "--dstore-filename", store, "--indexfile", index, "--k", 32]
    use += ["--lmbda", 0.3, "--knn-sim-func", "do_not_recomp_l2", "--no-load-keys"]
    alone = evaluate(data, model, "--gen-subset", "valid", *how)
    mixed = evaluate(data, model, *use, "--no-pointer")
    assert mixed["perplexity"] < alone["perplexity"]
    assert evaluate(data, model, *use)["searches_saved_percent"] > 20
    doctor = run_cli("doctor", [data, "--path", model, *QUIET, *use])
    assert doctor.status == 0, doctor.stdout + doctor.stderr
    evaluate(data, model, "--gen-subset", "valid", *how, "--save-scores", tmp_path / "scores", "--save-features")
    gate = ["--scores", tmp_path / "scores", "--save", tmp_path / "gate.pt", "--data", data, "--epochs", 1, "--k", 32]
    gate += ["--dstore-filename", store, "--indexfile", index, "--knn-sim-func", "do_not_recomp_l2", "--no-load-keys"]
    trained = run_cli("adaptret", [*gate, "--no-progress-bar"])
    assert trained.status == 0 and (tmp_path / "gate.pt").exists(), trained.stderr
    other = run_cli("eval_lm", [data, "--path", model, *QUIET, *use, "--knn-keytype", "final_hidden"])
    assert "key type" in other.error
    gpt2 = run_cli("eval_lm", [binarised(golden_hf / "gpt2"), "--path", golden_hf / "gpt2", *QUIET, *use])
    assert "weights" in gpt2.error


# -- one sentence


def copied(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model folder; changes: names of JSON files (without ending) and what is set in them, or None."""
    shutil.copytree(source, target)
    for path in target.iterdir():
        path.chmod(0o644)
    for name, values in changes.items():
        path = target / f"{name}.json"
        content = json.loads(path.read_text())
        content.update(values)
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return target


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def replaced(folder: Path, model: Any) -> None:
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def as_encoder(folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    replaced(folder, BertLMHeadModel(BertConfig(vocab_size=1000, max_position_embeddings=128, **sizes)))


def with_small_head(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
    replaced(folder, GPT2LMHeadModel(GPT2Config(vocab_size=900, bos_token_id=0, eos_token_id=0, **sizes)))


def in_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def with_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def encoded(encoding: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / "config.json").read_text(encoding="utf-8")
        (folder / "config.json").write_bytes(text.encode(encoding))

    return damage


def unchanged(folder: Path) -> None:
    pass


class Code:
    """What a pickle runs when it is loaded: it would write a file into this folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return open, (str(self.folder / "was-run"), "w")


def as_pickle_with_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Code(folder)}, protocol=2))


def as_archive_with_code(folder: Path) -> None:
    import torch

    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": torch.zeros(1000, 32), "a": Code(folder)}, folder / "pytorch_model.bin")


CANNOT_USE = "a configuration that transformers cannot use ("
BAD_MODELS: dict[str, tuple[dict[str, Any], Callable[[Path], None], list[Any], str]] = {
    "no configuration": ({}, without("config.json"), [], "config.json: no such file"),
    "no weights": ({}, without("model.safetensors"), [], "found no weights"),
    "weights cut short": ({}, cut, [], "transformers cannot open"),
    "code of its own": (
        {"config": {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.M"}}}, lambda f: None, [],
        "trust_remote_code stays off",
    ),
    "unknown type": ({"config": {"model_type": "mine"}}, lambda f: None, [], "the model type mine"),
    "more layers than weights": (
        {"config": {"n_layer": 3}}, lambda f: None, [],
        "found no weights for transformer.h.2.attn.c_attn.bias (and 11 more parameters), expected those of all",
    ),
    "one array without weights": (
        {"config": {"tie_word_embeddings": False}}, lambda f: None, [],
        "found no weights for lm_head.weight, expected those of all parameters that config.json asks for",
    ),
    "another vocabulary": (
        {"config": {"vocab_size": 900}}, lambda f: None, [],
        "weights of the shape 1000 x 32 for transformer.wte.weight, expected the shape 900 x 32 that config.json asks",
    ),
    "other positions": (
        {"config": {"n_positions": 64}}, lambda f: None, [],
        "weights of the shape 128 x 32 for transformer.wpe.weight, expected the shape 64 x 32 that config.json asks",
    ),
    "another width inside": (
        {"config": {"n_inner": 64}}, lambda f: None, [], "transformer.h.0.mlp.c_fc.bias (and 5 more parameters)",
    ),
    **{
        f"config.json: {name}": (changes, damage, [], f"/config.json: found {sentence}")
        for name, (changes, damage, sentence) in {
            "UTF-16": ({}, encoded("utf-16"), "no JSON in UTF-8"),
            "UTF-32": ({}, encoded("utf-32-le"), "no JSON in UTF-8"),
            "a byte order mark": ({}, encoded("utf-8-sig"), "no JSON in UTF-8"),
            "a number as text": (
                {"config": {"n_layer": "2"}}, unchanged,
                "a configuration that transformers cannot use (StrictDataclassFieldValidationError: "
                "Validation error for field 'n_layer'",
            ),
            "a fraction": ({"config": {"n_embd": 32.5}}, unchanged, CANNOT_USE),
            "a list": ({"config": {"n_head": [2]}}, unchanged, CANNOT_USE),
            "no such dtype": ({"config": {"dtype": "float99"}}, unchanged, CANNOT_USE),
        }.items()
    },
    "too long samples": ({}, lambda f: None, ["--tokens-per-sample", 200], "the model has no more positions"),
    "too long windows": ({}, lambda f: None, ["--max-length", 129], "at most the 128 positions"),
    "a context that leaves no room": ({}, lambda f: None, ["--context-window", 128], "no more positions"),
    "a stride alone": ({}, lambda f: None, ["--stride", 4], "--max-length beside it"),
    "a stride beyond the window": ({}, lambda f: None, ["--max-length", 8, "--stride", 9], "at most --max-length 8"),
    "windows and context": ({}, lambda f: None, ["--max-length", 8, "--context-window", 4], "--max-length"),
    "pieces of words": ({}, lambda f: None, ["--remove-bpe"], "nothing with a Hugging Face model"),
    "a type that is no causal model": ({"config": {"model_type": "t5"}}, lambda f: None, [], "the model type t5"),
    "an encoder": ({}, as_encoder, [], "in which a position sees those after it"),
    "a head smaller than the vocabulary": ({}, with_small_head, [], "1000 token ids, expected at most the 900"),
    "a file of the index is missing": ({}, in_shards, [], "model-00002-of-00002.safetensors: no such file"),
    "an index of nothing": ({}, with_index, [], "found no weight_map"),
    "code in a pickle": ({}, as_pickle_with_code, [], "tensors alone: code in a file is never run"),
    "code among tensors": ({}, as_archive_with_code, [], "tensors alone: code in a file is never run"),
    "no such device map": ({}, lambda f: None, ["--hf-device-map", "all"], "--hf-device-map: found all"),
    "no such module": ({}, lambda f: None, ["--knn-module", "h.9", "--save-knnlm-dstore"], "--knn-module: found h.9"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_does_not_fit(binarised: Any, golden_hf: Path, tmp_path: Path, run_cli: Any, case: str) -> None:
    changes, damage, flags, sentence = BAD_MODELS[case]
    model = copied(golden_hf / "gpt2", tmp_path / "model", **changes)
    damage(model)
    flags = [*flags, "--dstore-mmap", tmp_path / "d"] if "--save-knnlm-dstore" in flags else flags
    done = run_cli("eval_lm", [binarised(golden_hf / "gpt2"), "--path", model, "--gen-subset", "valid", *QUIET, *flags])
    assert sentence in done.error
    assert not list(tmp_path.glob("d*")) and not (model / "was-run").exists()


def test_code_of_a_folder_is_not_run(binarised: Any, golden_hf: Path, tmp_path: Path, evaluate: Any) -> None:
    """A folder of a known type that names code of its own: the library's class is used, and its file is not run."""
    auto = {"config": {"auto_map": {"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"}}}
    auto["tokenizer_config"] = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    model = copied(golden_hf / "gpt2", tmp_path / "model", **auto)
    (model / "own.py").write_text(f"open({str(model / 'was-run')!r}, 'w')\n")
    data, flags = binarised(golden_hf / "gpt2"), ["--gen-subset", "valid"]
    assert evaluate(data, model, *flags)["loss_base2"] == evaluate(data, golden_hf / "gpt2", *flags)["loss_base2"]
    assert not (model / "was-run").exists()


@pytest.mark.parametrize("how", ["pytorch_model.bin", "shards", "--hf-device-map cpu", "--hf-device-map auto"])
def test_weights_in_every_form(
    how: str, binarised: Any, golden_hf: Path, tmp_path: Path, evaluate: Any
) -> None:
    """The same results from an archive of tensors, from several files, and with a device map."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = copied(golden_hf / "gpt2", tmp_path / "model")
    flags = ["--gen-subset", "valid"]
    if how.startswith("--"):
        pytest.importorskip("accelerate")
        flags += how.split()
    else:
        (model / "model.safetensors").unlink()
        if how == "shards":
            AutoModelForCausalLM.from_pretrained(golden_hf / "gpt2").save_pretrained(model, max_shard_size="100KB")
            assert len(list(model.glob("model-*.safetensors"))) > 1
        else:
            torch.save(load_file(golden_hf / "gpt2/model.safetensors"), model / how)
    found = evaluate(binarised(golden_hf / "gpt2"), model, *flags)
    assert found["loss_base2"] == evaluate(binarised(golden_hf / "gpt2"), golden_hf / "gpt2", *flags[:2])["loss_base2"]


def test_a_model_that_is_spread_over_devices_stays_there(golden_hf: Path) -> None:
    """The device of the evaluation does not take back what a device map has spread; hooks of accelerate survive."""
    pytest.importorskip("accelerate")
    import torch
    from accelerate import hooks
    from transformers import AutoModelForCausalLM

    from fairseq.data.token_ids import TokenIds
    from fairseq.models.huggingface.language_model import HuggingFaceDecoder, HuggingFaceLM

    network = AutoModelForCausalLM.from_pretrained(golden_hf / "gpt2", dtype=torch.float32).eval()
    tokens = torch.arange(12)[None]
    expected = network(tokens).logits
    calls = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    hooks.add_hook_to_module(network.transformer, Hook())
    spread = HuggingFaceLM(HuggingFaceDecoder(network, TokenIds(1000, "", 0, ""), "last_ffn_input"))
    network.hf_device_map = {"transformer.wte": "cpu", "lm_head": "meta"}
    assert spread.to(torch.device("meta")) is spread
    for _ in range(2):
        calls.clear()
        torch.testing.assert_close(spread.decoder(tokens)[0], expected)
        assert calls


MODES = ["none", "complete", "complete_doc", "eos"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [0, 32])
def test_documents_longer_than_the_model_reads(
    mode: str, context: int, binarised: Any, golden_hf: Path, evaluate: Any, run_cli: Any
) -> None:
    """One document of 1,802 tokens, a model of 128 positions: divided into blocks, or refused."""
    data = binarised(golden_hf / "gpt2", "file", "document")
    flags = ["--gen-subset", "valid", "--sample-break-mode", mode, "--context-window", context]
    if mode == "none":
        assert evaluate(data, golden_hf / "gpt2", *flags)["scored_tokens"] == 1802
        return
    done = run_cli("eval_lm", [data, "--path", golden_hf / "gpt2", *QUIET, *flags])
    found = f"{mode}, with 1 samples of more than 128 tokens (the longest: 1802)"
    assert f"--sample-break-mode: found {found}" in done.error
    assert "--max-length N --rolling --group-documents 1" in done.error
    rolled = ["--gen-subset", "valid", "--max-length", 128, "--rolling", "--group-documents", 1]
    assert evaluate(data, golden_hf / "gpt2", *rolled)["scored_tokens"] == 1802


def test_another_tokenizer_is_refused(binarised: Any, golden_hf: Path, run_cli: Any) -> None:
    flags = ["--path", golden_hf / "gpt2", "--gen-subset", "valid", *QUIET]
    done = run_cli("eval_lm", [binarised(golden_hf / "llama"), *flags])
    assert "the tokenizer of" in done.error and "--hf-tokenizer" in done.error


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


TOKENS = ("tokens.json", "copy the folder again, or preprocess the text again with --hf-tokenizer")
BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no description": (lambda f: (f / "tokens.json").unlink(), ("tokens.json: no such file", *TOKENS)),
    "a folder": (lambda f: as_folder(f / "tokens.json"), ("tokens.json",)),
    "a FIFO": (lambda f: as_fifo(f / "tokens.json"), ("tokens.json",)),
    "a link to nothing": (
        lambda f: ((f / "tokens.json").unlink(), (f / "tokens.json").symlink_to("gone")),
        ("tokens.json: a link to a file that does not exist", *TOKENS),
    ),
    "another tokenizer": (
        lambda f: shutil.copyfile(GOLDEN_HF / "llama/tokenizer.json", f / "tokenizer/tokenizer.json"),
        ("found a text of another tokenizer of 1000 token ids", "tokenizer/tokenizer.json", "--hf-tokenizer"),
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_what_lies_beside_a_text_of_tokens(
    binarised: Any, golden_hf: Path, tmp_path: Path, run_cli: Any, case: str
) -> None:
    """Sentences about a tokenizer's files speak of these, not of a dictionary of words."""
    change, words = BAD_FOLDERS[case]
    shutil.copytree(binarised(golden_hf / "gpt2"), tmp_path / "data")
    change(tmp_path / "data")
    done = run_cli("eval_lm", [tmp_path / "data", "--path", golden_hf / "gpt2", "--gen-subset", "valid", *QUIET])
    assert all(word in done.error for word in words), done.error
    assert "dict.txt" not in done.error and "--srcdict" not in done.error


def test_preprocess_names_the_configuration_too(golden_hf: Path, tmp_path: Path, run_cli: Any) -> None:
    """The tokenizer's class reads config.json, but is not to blame for it."""
    model = copied(golden_hf / "gpt2", tmp_path / "model", config={"n_layer": "2"})
    (tmp_path / "text").write_text("some text\n")
    flags = ["--only-source", "--trainpref", tmp_path / "text", "--destdir", tmp_path / "bin"]
    done = run_cli("preprocess", [*flags, "--hf-tokenizer", model])
    assert "/config.json: found a configuration that transformers cannot use" in done.error


def test_text_and_model_are_of_one_kind(binarised: Any, golden: Path, golden_hf: Path, run_cli: Any) -> None:
    words = run_cli("eval_lm", [golden / "data-bin", "--path", golden_hf / "gpt2", "--gen-subset", "valid", *QUIET])
    assert "preprocess the text with --hf-tokenizer" in words.error
    checkpoint = golden / "checkpoints/checkpoint_best.pt"
    tokens = run_cli("eval_lm", [binarised(golden_hf / "gpt2"), "--path", checkpoint, "--gen-subset", "valid", *QUIET])
    assert "a text of a tokenizer" in tokens.error


def test_a_name_that_is_not_here(binarised: Any, golden_hf: Path, run_cli: Any) -> None:
    done = run_cli("eval_lm", [binarised(golden_hf / "gpt2"), "--path", "nobody/no-such-model", *QUIET])
    assert "nobody/no-such-model is no folder here and cannot be had from the Hub" in done.error


BAD_TEXTS: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "no EOS": ({"tokenizer_config": {"eos_token": None}}, [], "a tokenizer without EOS"),
    "languages": ({}, ["-s", "de"], "--only-source, and no language"),
    "a dictionary": ({}, ["--srcdict", "dict.txt"], "--srcdict"),
    "another format": ({}, ["--dataset-impl", "raw"], "mmap with --hf-tokenizer"),
    "alignments": ({}, ["--align-suffix", "a"], "--align-suffix"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_text_that_cannot_be_cut(golden_hf: Path, tmp_path: Path, run_cli: Any, case: str) -> None:
    changes, flags, sentence = BAD_TEXTS[case]
    model = copied(golden_hf / "gpt2", tmp_path / "model", **changes)
    text = tmp_path / "text"
    text.write_text("two lines\nof text\n")
    common = ["--only-source", "--hf-tokenizer", model, "--trainpref", text, "--destdir", tmp_path / "bin"]
    assert sentence in run_cli("preprocess", [*common, *flags]).error
    assert not (tmp_path / "bin/train.bin").exists()


def test_bytes_that_are_no_text(golden_hf: Path, tmp_path: Path, run_cli: Any) -> None:
    (tmp_path / "text").write_bytes(b"fine\n\xff\xfe\n")
    flags = ["--only-source", "--trainpref", tmp_path / "text", "--destdir", tmp_path / "bin"]
    done = run_cli("preprocess", [*flags, "--hf-tokenizer", golden_hf / "gpt2"])
    assert "byte 0xff at offset 5, which is not UTF-8" in done.error and not (tmp_path / "bin/train.bin").exists()


def test_a_folder_holds_texts_of_one_tokenizer(golden_hf: Path, tmp_path: Path, run_cli: Any) -> None:
    (tmp_path / "text").write_text("some text\n")
    flags = ["--only-source", "--destdir", tmp_path / "bin", "--trainpref", tmp_path / "text", "--hf-tokenizer"]
    assert run_cli("preprocess", [*flags, golden_hf / "gpt2"]).status == 0
    assert "another tokenizer" in run_cli("preprocess", [*flags, golden_hf / "llama"]).error


def test_a_missing_extra_is_one_sentence(
    golden_hf: Path, binarised: Any, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = binarised(golden_hf / "gpt2")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    done = run_cli("eval_lm", [data, "--path", golden_hf / "gpt2", "--gen-subset", "valid", *QUIET])
    assert "needs the Python module transformers" in done.error and ".[hf]" in done.error


def test_a_tokenizer_with_neither_beginning_nor_end(golden_hf: Path, tmp_path: Path, run_cli: Any) -> None:
    """Nothing can stand before a text: windows are scored, other samples are refused, prompts begin with nothing."""
    nothing = {"eos_token": None, "bos_token": None}
    model = copied(golden_hf / "gpt2", tmp_path / "model", tokenizer_config=nothing)
    data = tmp_path / "bin"
    text = ["--testpref", golden_hf / "text/wiki.valid.txt", "--destdir", data]
    done = run_cli("preprocess", ["--only-source", "--hf-tokenizer", model, "--hf-eos", "none", *text])
    assert done.status == 0, done.stderr
    assert json.loads((data / "tokens.json").read_text())["begin"] is None
    flags = [data, "--path", model, "--gen-subset", "test", *QUIET]
    windows = run_cli("eval_lm", [*flags, "--max-length", "64", "--results-json", tmp_path / "r.json"])
    assert windows.status == 0, windows.stderr
    assert "neither BOS nor EOS" in run_cli("eval_lm", flags).error
    (tmp_path / "p").write_text("The\nof the\n")
    both = [data, "--path", model, "--cpu", "--input", tmp_path / "p", "--max-len-b", "4"]
    together = run_cli("interactive", [*both, "--batch-size", "2"])
    assert together.status == 0, together.stderr
    texts = [[line.split("\t")[2] for line in done.stdout.splitlines() if line.startswith("H-")] for done in
             (together, run_cli("interactive", both))]
    assert texts[0] == texts[1] and len(texts[0]) == 2
