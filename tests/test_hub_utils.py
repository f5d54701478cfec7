"""`from_pretrained` on the golden bundle: text in, scores and continuations out."""

import shutil

import pytest
import torch

from fairseq.attached_retrieval import Retrieval
from fairseq.errors import MissingFile, UserError
from fairseq.files.sidecar import write_sidecar
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.retrieval_lm import RetrievalLM

pytest.importorskip("fairseq.data.encoders")


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shutil.copyfile(golden / "checkpoints" / "checkpoint_best.pt", folder / "model.pt")
    shutil.copyfile(golden / "data-bin" / "dict.txt", folder / "dict.txt")
    return folder


@pytest.fixture(scope="module")
def hub(folder):
    return TransformerLanguageModel.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def text(golden):
    lines = (golden / "text" / "wiki.valid.tokens").read_text().splitlines()
    return next(line for line in lines if len(line.split()) > 6).strip()


def test_text_to_ids_and_back(hub, text):
    tokens = hub.encode(text)
    assert tokens[-1] == hub.src_dict.eos()
    assert tokens.dtype == torch.int64
    known = " ".join(word for word in text.split() if hub.src_dict.index(word) != hub.src_dict.unk())
    assert hub.decode(hub.encode(known)) == known


def test_scores_are_the_models_log_probabilities(hub, text):
    result = hub.score(text)
    tokens = hub.encode(text)
    assert torch.equal(result["tokens"], tokens)
    source = torch.cat([torch.tensor([hub.src_dict.eos()]), tokens[:-1]])
    model = hub.models[0]
    with torch.no_grad():
        probs = model.get_normalized_probs(model(source[None]), True, None)[0]
    expected = probs.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(result["positional_scores"], expected, atol=1e-5, rtol=0)
    assert result["score"].item() == pytest.approx(expected.mean().item(), abs=1e-5)
    assert len(hub.score([text, text])) == 2


def test_an_ensemble_averages_probabilities(folder, hub, text):
    shutil.copyfile(folder / "model.pt", folder / "second.pt")
    both = TransformerLanguageModel.from_pretrained(str(folder), "model.pt:second.pt")
    assert len(both.models) == 2
    torch.testing.assert_close(both.score(text)["positional_scores"], hub.score(text)["positional_scores"])


def test_greedy_continuation_follows_the_most_likely_words(hub, text):
    prefix = hub.encode(" ".join(text.split()[:4]))[:-1]
    found = hub.generate(prefix, max_len_b=6)[0]
    new = found["tokens"][len(prefix) :]
    assert torch.equal(found["tokens"][: len(prefix)], prefix)
    assert 0 < len(new) <= 6
    model, words = hub.models[0], torch.cat([torch.tensor([hub.src_dict.eos()]), prefix])
    for word, score in zip(new, found["positional_scores"]):
        with torch.no_grad():
            log_probs = model.get_normalized_probs(model(words[None]), True, None)[0, -1]
        assert log_probs.argmax() == word
        torch.testing.assert_close(score, log_probs[word], atol=1e-4, rtol=0)
        words = torch.cat([words, word[None]])
    assert isinstance(hub.sample(text, max_len_b=2), str)


def test_sampling_is_repeatable_and_limited(hub):
    prefix = hub.encode("the")[:-1]
    first, second = (hub.generate(prefix, beam=2, sampling=True, max_len_b=5, seed=3) for _ in range(2))
    assert [r["tokens"].tolist() for r in first] == [r["tokens"].tolist() for r in second]


def test_beam_search(hub):
    prefix = hub.encode("the")[:-1]
    found = hub.generate(prefix, beam=3, max_len_b=5)
    scores = [row["score"].item() for row in found]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert all(torch.equal(row["tokens"][: len(prefix)], prefix) for row in found)


def retrieval_of(golden, **settings):
    files = golden / "checkpoints"
    own = {"k": 64, "lmbda": 0.4, "knn_sim_func": "do_not_recomp_l2", "no_load_keys": True, **settings}
    return Retrieval.open(str(files / "dstore16"), indexfile=str(files / "knn16.index"), dstore_fp16=True, **own)


def test_retrieval_beside_the_models(golden, folder, hub, text, caplog):
    """Text is that of `RetrievalLM`, and scores are those of its evaluation; without weight it is the models'."""
    lm = RetrievalLM.open(
        str(folder / "model.pt"), str(folder), dstore_filename=str(golden / "checkpoints/dstore16"),
        indexfile=str(golden / "checkpoints/knn16.index"), dstore_fp16=True, k=64, lmbda=0.4,
        knn_sim_func="do_not_recomp_l2", no_load_keys=True, cpu=True,
    )
    words, retrieval = " ".join(text.split()[:4]), retrieval_of(golden)
    assert hub.sample(words, max_len_b=8, retrieval=retrieval) == lm.continue_text(words, max_len_b=8)
    assert hub.sample(words, max_len_b=8, retrieval=retrieval) != hub.sample(words, max_len_b=8)
    assert "whether it was saved with this model is not known" in caplog.text
    assert hub.sample(words, max_len_b=8, retrieval=retrieval_of(golden, lmbda=0.0)) == hub.sample(words, max_len_b=8)
    prefix = hub.encode(words)[:-1]
    best = hub.generate(prefix, beam=3, max_len_b=5, retrieval=retrieval)
    for found in best:
        assert found["tokens"][-1] == hub.tgt_dict.eos()
        expected = lm.score_text(hub.string(found["tokens"])).log_probs
        torch.testing.assert_close(found["positional_scores"], torch.from_numpy(expected), atol=1e-4, rtol=0)
    drawn = {"sampling": True, "beam": 3, "max_len_b": 5, "seed": 3, "retrieval": retrieval}
    first, second = (hub.generate(prefix, **drawn) for _ in range(2))
    assert [r["tokens"].tolist() for r in first] == [r["tokens"].tolist() for r in second]


def test_what_is_no_retrieval_for_the_models(golden, hub, tmp_path):
    with pytest.raises(UserError, match=r"retrieval: found a str, expected .*Retrieval\.open"):
        hub.sample("the", retrieval="dstore16")
    for name in ("dstore16_keys.npy", "dstore16_vals.npy"):
        (tmp_path / name).symlink_to(golden / "checkpoints" / name)
    own = {"rows": 16938, "dimension": 32, "key_dtype": "<f2", "value_dtype": "<i2", "weights": ["0" * 32]}
    write_sidecar(str(tmp_path / "dstore16"), "datastore", own)
    other = Retrieval.open(str(tmp_path / "dstore16"), index="exact")
    with pytest.raises(UserError, match="saved with the weights 0000"):
        hub.sample("the", retrieval=other)


def test_the_datastore_of_the_same_weights(golden, folder, hub, run_cli, tmp_path, caplog):
    prefix = tmp_path / "own"
    flags = f"--gen-subset valid --save-knnlm-dstore --dstore-mmap {prefix} --cpu --no-progress-bar".split()
    assert run_cli("eval_lm", [golden / "data-bin", "--path", folder / "model.pt", *flags]).status == 0
    hub.sample("the", max_len_b=2, retrieval=Retrieval.open(str(prefix), index="exact", k=8, lmbda=0.4))
    assert "is not known" not in caplog.text


def test_a_missing_folder_says_what_to_do():
    with pytest.raises(MissingFile, match=r"transformer_lm\.wmt19\.en: no such file.*wmt19\.en\.tar"):
        TransformerLanguageModel.from_pretrained("transformer_lm.wmt19.en")


def test_odd_characters_are_said(hub, caplog):
    for use in (hub.score, lambda text: hub.sample(text, max_len_b=1)):
        caplog.clear()
        use("the\u200b word\0")
        assert "found 1 zero-width spaces" in caplog.text and "found 1 NUL bytes" in caplog.text
    caplog.clear()
    hub.score("the\r\nword\rthe")
    assert "found" not in caplog.text
