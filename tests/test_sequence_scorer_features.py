"""Scoring makes no tensor of batch x length x vocabulary: a model that can gives features, and the output layer sees a
few rows at a time. The numbers are those of the whole distribution."""

import pytest
import torch

from fairseq import models, utils
from fairseq.data import Dictionary
from fairseq.models import fairseq_model
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture
from fairseq.modules import adaptive_softmax
from fairseq.sequence_scorer import SequenceScorer
from fairseq.tasks.language_modeling import LanguageModelingTask

VOCABULARY, BATCH, LENGTH = 64, 3, 20


@pytest.fixture(name="model")
def model_fixture():
    from argparse import Namespace

    dictionary = Dictionary()
    for number in range(VOCABULARY - 4):
        dictionary.add_symbol(f"w{number}")
    args = Namespace(
        arch="transformer_lm",
        task="language_modeling",
        decoder_layers=2,
        decoder_embed_dim=16,
        decoder_output_dim=8,
        decoder_attention_heads=2,
        decoder_ffn_embed_dim=24,
        tokens_per_sample=32,
        knn_keytype="last_ffn_input",
    )
    base_lm_architecture(args)
    torch.manual_seed(2)
    return models.build_model(args, LanguageModelingTask(args, dictionary)).eval(), dictionary, args


def batch():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    target = tokens[:, 1:].clone()
    target[1, 15:] = 1
    return {"net_input": {"src_tokens": tokens[:, :-1], "src_lengths": None}, "target": target}


@pytest.mark.parametrize("features_only", [True, False])
def test_scores_and_the_largest_tensor(model, features_only, monkeypatch):
    model, dictionary, args = model
    sample = batch()
    reference = model(**sample["net_input"])
    whole = model.get_normalized_probs(reference, log_probs=True)
    wanted = whole.gather(2, sample["target"].unsqueeze(2)).squeeze(2)
    shapes = []
    original = model.decoder.output_layer

    def output_layer(features, **kwargs):
        logits = original(features, **kwargs)
        shapes.append(tuple(logits.shape))
        return logits

    monkeypatch.setattr(model.decoder, "output_layer", output_layer)
    monkeypatch.setattr(adaptive_softmax, "CHUNK_ELEMENTS", 10 * VOCABULARY)
    monkeypatch.setattr(type(model), "supports_features_only", features_only)
    scorer = SequenceScorer(dictionary, args=args)
    scores, activations = scorer.score_targets([model], sample)
    real = sample["target"] != 1
    torch.testing.assert_close(scores[real], wanted[real])
    assert not scores[~real].any()
    torch.testing.assert_close(activations, reference[1]["last_ffn_input"])
    if features_only:
        assert max(rows for rows, _ in shapes) == 10
        assert sum(rows for rows, _ in shapes) == int(real.sum())
    else:
        assert shapes == [(BATCH, LENGTH, VOCABULARY)]


@pytest.mark.parametrize("pads", ["none", "right", "left"])
@pytest.mark.parametrize("starts", [[8, 5, 8], [0, 6, 3], [19, 19, 19]])
def test_positions_that_only_give_context_are_left_out_of_the_last_layer(model, starts, pads, monkeypatch):
    model, dictionary, args = model
    sample = batch()
    tokens, target = sample["net_input"]["src_tokens"], sample["target"]
    target[:] = tokens.roll(-1, 1)
    if pads == "right":
        tokens[1, 15:], target[1, 15:] = 1, 1
        starts = [min(start, 14) for start in starts]
    if pads == "left":
        tokens[1, :4] = 1
    for row, start in enumerate(starts):
        target[row, :start] = 1
    sample["start_indices"] = starts
    scorer = SequenceScorer(dictionary, args=args)
    widths = []
    model.decoder.layers[-1].fc1.register_forward_hook(lambda _, inputs, __: widths.append(len(inputs[0])))

    found, keys = scorer.generate([model], sample), scorer.keys([model], sample)

    assert widths == [LENGTH - min(starts)] * 2
    scores, activations = scorer.score_targets([model], sample)
    for row, (hypotheses, key) in enumerate(zip(found, keys, strict=True)):
        wanted = target[row] != 1
        torch.testing.assert_close(hypotheses[0]["tokens"], target[row][wanted])
        torch.testing.assert_close(hypotheses[0]["positional_scores"], scores[row][wanted])
        torch.testing.assert_close(hypotheses[0]["queries"], activations[wanted, row])
        torch.testing.assert_close(key, activations[wanted, row])
        assert hypotheses[0]["start_idx"] == starts[row]


def test_who_says_that_it_can():
    assert TransformerLanguageModel.supports_features_only
    assert not fairseq_model.FairseqLanguageModel.supports_features_only


def test_activation_functions_under_their_public_name():
    x = torch.linspace(-2, 2, 5)
    assert torch.equal(utils.get_activation_fn("relu")(x), x.clamp(min=0))
    torch.testing.assert_close(utils.get_activation_fn("gelu")(x), torch.nn.functional.gelu(x))
