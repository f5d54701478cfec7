"""`from_pretrained` on the golden bundle: text in, scores and continuations out."""

import shutil

import pytest
import torch

from fairseq.errors import MissingFile
from fairseq.hub_utils import sample_word
from fairseq.models.transformer_lm import TransformerLanguageModel

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


def test_top_k_and_top_p_keep_the_likely_words():
    log_probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def seen(topk, topp):
        return {int(sample_word(log_probs, topk, topp, 1.0, generator)) for _ in range(300)}

    assert seen(2, -1) == {0, 1}
    assert seen(-1, 0.6) == {0, 1}
    assert seen(-1, 0.5) == {0}
    assert seen(-1, -1) == {0, 1, 2, 3}


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
