"""The decoder's forward pass: scores, masks, keys, incremental decoding."""

import pytest
import torch
import torch.nn.functional as F

from fairseq.errors import BadFlag
from fairseq.key_types import KEY_TYPES, Activations, MissingActivation, keys_of

PAD = 1
VARIANTS = {
    "plain": {},
    "shared": {"share_decoder_input_output_embed": True},
    "adaptive": {"adaptive": True},
    "projections": {"decoder_input_dim": 12, "decoder_output_dim": 8},
    "learned positions": {"decoder_learned_pos": True, "layernorm_embedding": True},
}


@pytest.fixture(params=VARIANTS)
def model(request, make_model):
    return make_model(**VARIANTS[request.param])


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randint(4, 32, (3, 11))


def test_fast_scores_equal_gathered_probabilities(model, tokens):
    target = tokens.roll(-1, dims=1)
    target[1, 7:] = PAD
    output = model(tokens)
    slow = model.get_normalized_probs(output, True, {"target": target}).gather(2, target.unsqueeze(2)).squeeze(2)
    for result in (output, model(tokens, features_only=True)):
        fast = model.get_target_log_probs(result, target, PAD)
        assert fast.dtype == torch.float32
        torch.testing.assert_close(fast, slow.masked_fill(target == PAD, 0), atol=1e-6, rtol=0)


def test_probabilities_sum_to_one(model, tokens):
    output = model(tokens)
    torch.testing.assert_close(model.get_normalized_probs(output, False, None).sum(-1), torch.ones(3, 11))


def test_the_future_is_invisible(model, tokens):
    changed = tokens.clone()
    changed[:, 6:] = 5
    torch.testing.assert_close(model(changed)[0][:, :6], model(tokens)[0][:, :6], atol=1e-5, rtol=0)


def test_pads_on_the_right_change_no_real_position(model, tokens):
    padded = F.pad(tokens, (0, 4), value=PAD)
    torch.testing.assert_close(model(padded)[0][:, :11], model(tokens)[0], atol=1e-5, rtol=0)


def test_pads_on_the_left_change_no_real_position(model, tokens):
    padded = F.pad(tokens, (4, 0), value=PAD)
    torch.testing.assert_close(model(padded)[0][:, 4:], model(tokens)[0], atol=1e-5, rtol=0)


def test_short_rows_beside_long_ones(model, tokens):
    mixed = tokens.clone()
    mixed[2, 5:] = PAD
    torch.testing.assert_close(model(mixed)[0][2, :5], model(tokens[2:, :5])[0][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(mixed)[0][:2], model(tokens)[0][:2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [[1] * 11, [4, 1, 6], [11]])
def test_incremental_decoding_gives_the_same(model, tokens, steps):
    whole = model(tokens)[0]
    state, parts, seen = {}, [], 0
    for step in steps:
        seen += step
        parts.append(model(tokens[:, :seen], incremental_state=state)[0])
        assert parts[-1].size(1) == step
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


def test_incremental_state_follows_a_reordering(model, tokens):
    state = {}
    model(tokens[:, :5], incremental_state=state)
    order = torch.tensor([2, 0, 0])
    model.decoder.reorder_incremental_state(state, order)
    step = model(tokens[order, :6], incremental_state=state)[0]
    torch.testing.assert_close(step, model(tokens[order, :6])[0][:, -1:], atol=1e-5, rtol=0)


def test_extra_holds_every_level_time_first(model, tokens):
    extra = model(tokens)[1]
    assert extra["attn"] == [None]
    assert len(extra["inner_states"]) == 4
    assert {tuple(x.shape) for x in extra["inner_states"]} == {(11, 3, 16)}
    assert "last_ffn_input" not in extra


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"decoder_output_dim": 8}])
def test_the_key_is_the_input_of_the_last_fc1(make_model, tokens, options):
    model = make_model(knn_keytype="last_ffn_input", **options)
    seen = []
    model.decoder.layers[-1].fc1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    key = model(tokens)[1]["last_ffn_input"]
    assert key.shape == (11, 3, 16)
    assert torch.equal(key, seen[0])


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"decoder_output_dim": 8}])
@pytest.mark.parametrize("first_needed", [0, 4])
def test_each_key_type_is_the_activation_that_hooks_see(make_model, tokens, options, first_needed):
    model = make_model(knn_keytype="final_hidden", **options)
    output, extra = model(tokens, features_only=True, first_needed=first_needed)
    whole = model(tokens)[1]
    expected = {
        "last_ffn_input": whole["last_ffn_input"],
        "last_ffn_output": whole["inner_states"][-1],
        "final_hidden": model(tokens, features_only=True)[0].transpose(0, 1),
    }
    assert set(expected) == set(KEY_TYPES)
    for name, value in expected.items():
        torch.testing.assert_close(keys_of(name, extra, *output.shape[:2]), value[first_needed:])
    layers = Activations(extra, output.shape[1])
    torch.testing.assert_close(layers.layer_output(0), whole["inner_states"][0][first_needed:])
    with pytest.raises(MissingActivation, match="layer 9"):
        layers.layer_output(9)


def test_a_model_without_an_activation_says_which_key_types_it_has():
    extra = {"inner_states": [torch.zeros(3, 1, 2)]}
    with pytest.raises(BadFlag, match="last_ffn_input, for which .* expected one of last_ffn_output"):
        keys_of("last_ffn_input", extra, 1, 3)
    with pytest.raises(BadFlag, match="found nonsense, expected one of final_hidden, last_ffn_input, last_ffn_output"):
        keys_of("nonsense", extra, 1, 3)
    assert keys_of("last_ffn_input", {"last_ffn_input": extra["inner_states"][0]}, 1, 3).shape == (3, 1, 2)


def test_embeddings_are_scaled_by_the_layer_width_before_the_projection(make_model, tokens):
    model = make_model(decoder_input_dim=12, no_token_positional_embeddings=True)
    decoder = model.decoder
    expected = decoder.project_in_dim(4.0 * decoder.embed_tokens(tokens)).transpose(0, 1)
    torch.testing.assert_close(model(tokens)[1]["inner_states"][0], expected)
    unscaled = make_model(no_scale_embedding=True, no_token_positional_embeddings=True)
    torch.testing.assert_close(
        unscaled(tokens)[1]["inner_states"][0], unscaled.decoder.embed_tokens(tokens).transpose(0, 1)
    )


def test_layerdrop_skips_layers_in_training_only(make_model, tokens):
    model = make_model(decoder_layerdrop=0.5)
    assert len(model(tokens)[1]["inner_states"]) == 4
    model.train()
    torch.manual_seed(0)
    depths = {len(model(tokens)[1]["inner_states"]) for _ in range(30)}
    assert min(depths) < 4
    assert max(depths) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_scores_in_float32(make_model, tokens, dtype):
    model = make_model(adaptive=True, knn_keytype="last_ffn_input")
    expected = model.get_target_log_probs(model(tokens), tokens, PAD)
    half = make_model(adaptive=True, knn_keytype="last_ffn_input").to(dtype)
    output = half(tokens)
    assert output[0].dtype == output[1]["last_ffn_input"].dtype == dtype
    scores = half.get_target_log_probs(output, tokens, PAD)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=0.2, rtol=0.05)


def test_prepared_for_inference_cannot_be_trained(make_model):
    model = make_model()
    model.prepare_for_inference_(None)
    model.make_generation_fast_()
    assert not model.training
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.train()


def test_supported_targets_and_limits(make_model):
    model = make_model()
    assert model.supported_targets == {"future"}
    assert model.max_positions() == model.max_decoder_positions() == 20
    assert model.adaptive_softmax is None
    assert make_model(adaptive=True).adaptive_softmax is not None


def test_gradients_reach_every_parameter(model, tokens):
    model.train()
    output = model(tokens)
    (-model.get_target_log_probs(output, tokens.roll(-1, 1), PAD).sum()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
