"""Options from checkpoints, overrides and data folders in evaluation: each model of an ensemble has its own sizes,
overrides are checked like flags, only one folder is accepted."""

import logging
import shutil

import pytest

from fairseq import checkpoint_utils, options
from fairseq.checkpoint_saving import torch_persistent_save
from fairseq.errors import BadFile, BadFlag, UserError
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.retrieval.datastore.writer import DatastoreWriter

NARROW = (
    "--task language_modeling --arch transformer_lm --decoder-layers 1 --decoder-embed-dim 16 "
    "--decoder-ffn-embed-dim 16 --decoder-attention-heads 2 --tokens-per-sample 96 --max-tokens 2048 --num-workers 0 "
    "--cpu --max-update 1 --disable-validation --no-epoch-checkpoints --optimizer adam"
).split()


@pytest.fixture(scope="module")
def narrow(run_cli, golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    done = run_cli("train", [golden / "data-bin", *NARROW, "--save-dir", folder])
    assert done.status == 0, done.stderr
    return folder / "checkpoint_last.pt"


@pytest.fixture
def score(golden):
    def make(path, *flags, data=None):
        words = [data or golden / "data-bin", "--path", path, "--gen-subset", "valid", "--cpu", *flags]
        return LMScoring(options.parse_args_and_arch(options.get_eval_lm_parser(), list(map(str, words))))

    return make


def test_keys_are_as_wide_as_the_model_that_gives_them(score, golden, narrow, caplog) -> None:
    wide = golden / "checkpoints" / "checkpoint_best.pt"
    for path, width in ((f"{narrow}:{wide}", 16), (f"{wide}:{narrow}", 32)):
        scoring = score(path, "--save-knnlm-dstore")
        assert scoring.key_dimension == width
        assert scoring.keys(next(scoring.batches()))[0][2].shape[1] == width
    assert "the models have tokens_per_sample" in caplog.text


def test_the_writer_refuses_keys_of_another_width(tmp_path) -> None:
    import numpy as np

    writer = DatastoreWriter(str(tmp_path / "d"), 4, 8, False, {})
    with pytest.raises(UserError, match="8 numbers each"):
        writer.append(np.zeros((2, 4), np.float32), np.zeros(2, np.int64))
    writer.close()


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{'knn_keytype': 'first_ffn_output'}", "--knn-keytype: found first_ffn_output"),
        ("{'tokens_per_sample': -3}", "tokens_per_sample -3"),
        ("{'tokens_per_sample': 'many'}", "tokens_per_sample 'many'"),
        ("{'sample_break_mode': 'never'}", "sample_break_mode 'never'"),
        ("{'decoder_layers': 'x'}", "decoder_layers 'x'"),
        ("{'no_decoder_final_norm': 3}", "True or False"),
        ("{3: 4}", "names of options"),
    ],
)
def test_an_override_is_refused_as_the_flag_is(score, golden, text, sentence) -> None:
    with pytest.raises(BadFlag, match=sentence.replace("(", "[(]")):
        score(golden / "checkpoints" / "checkpoint_best.pt", "--model-overrides", text)


def test_an_override_and_its_flag_must_not_differ(score, narrow) -> None:
    with pytest.raises(BadFlag, match="is given too"):
        score(narrow, "--knn-keytype", "last_ffn_input", "--model-overrides", "{'knn_keytype': 'other'}")


@pytest.mark.parametrize(
    "text, said",
    [
        ("{'tokens_per_sampel': 32}", "'tokens_per_sampel' is not an option"),
        ("{'sample_break_mode': 'eos'}", "sample_break_mode 'eos' has no effect"),
        ("{'knn_keytype': 'last_ffn_input', 'tokens_per_sample': 32, 'dropout': 0.0}", None),
    ],
)
def test_an_override_without_effect_is_said(score, narrow, caplog, text, said) -> None:
    with caplog.at_level(logging.WARNING):
        score(narrow, "--model-overrides", text)
    if said is None:
        assert "overrides" not in caplog.text
    else:
        assert said in caplog.text


def test_a_checkpoint_without_a_usable_length_is_refused(score, narrow, tmp_path) -> None:
    state = checkpoint_utils.read_torch_file(narrow)
    state["args"].tokens_per_sample = "x"
    torch_persistent_save(state, str(tmp_path / "a.pt"))
    with pytest.raises(BadFile, match="tokens_per_sample 'x'"):
        score(tmp_path / "a.pt")


def test_several_folders_and_further_parts_are_said(score, golden, narrow, tmp_path, caplog) -> None:
    with pytest.raises(BadFlag, match="found 2 folders"):
        score(narrow, data=f"{golden / 'data-bin'}:{tmp_path}")
    shutil.copytree(golden / "data-bin", tmp_path / "B")
    for ending in ("bin", "idx"):
        shutil.copy(tmp_path / "B" / f"valid.{ending}", tmp_path / "B" / f"train1.{ending}")
    score(narrow, "--gen-subset", "train", data=tmp_path / "B")
    assert "train1: training read it and its further parts as one text" in caplog.text
