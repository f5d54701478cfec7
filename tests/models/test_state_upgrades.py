"""State dicts of other versions, pruning, and strict loading."""

import argparse

import pytest
import torch

from fairseq.errors import BadFlag
from fairseq.models import ArchitectureMismatch

TOKENS = torch.tensor([[5, 6, 7, 8]])


def fused(state):
    """The same state with q, k and v in one matrix, as in 2018."""
    for key in [key for key in state if ".q_proj." in key]:
        parts = [state.pop(key.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[key.replace(".q_proj.", ".in_proj_").replace("in_proj_.", "in_proj_")] = torch.cat(parts)
    return state


def test_fused_projections_and_numbered_norms(make_model):
    source, target = make_model(), make_model(dropout=0.0)
    state = fused(source.state_dict())
    assert "decoder.layers.0.self_attn.in_proj_weight" in state
    for key in [key for key in state if "_layer_norm." in key]:
        number = 0 if "self_attn_layer_norm" in key else 2
        state[
            key.replace("self_attn_layer_norm", "layer_norms.0").replace("final_layer_norm", f"layer_norms.{number}")
        ] = state.pop(key)
    for parameter in target.parameters():
        torch.nn.init.zeros_(parameter)
    target.load_state_dict(state)
    torch.testing.assert_close(target(TOKENS)[0], source(TOKENS)[0])


def test_stored_position_table_and_missing_dummy_buffer(make_model):
    model = make_model()
    state = model.state_dict()
    del state["decoder.embed_positions._float_tensor"]
    state["decoder.embed_positions.weights"] = torch.zeros(9, 16)
    before = model(TOKENS)[0]
    model.load_state_dict(state)
    torch.testing.assert_close(model(TOKENS)[0], before)  # a stored table is not used: positions are computed


@pytest.mark.parametrize("version", [None, 1.0, 2.0])
def test_old_decoder_versions_have_no_final_norm(make_model, version):
    model = make_model()
    state = {key: value for key, value in model.state_dict().items() if "decoder.layer_norm." not in key}
    del state["decoder.version"]
    if version is not None:
        state["decoder.version"] = torch.tensor([version])
    model.load_state_dict(state)
    assert model.decoder.layer_norm is None
    assert model.decoder.version.tolist() == [1.0]


def test_current_version_keeps_the_final_norm(make_model):
    model = make_model()
    model.load_state_dict(model.state_dict())
    assert model.decoder.layer_norm is not None


def test_output_projection_of_newer_files(make_model):
    own = make_model()
    state = own.state_dict()
    matrix = state.pop("decoder.embed_out")
    state["decoder.output_projection.weight"] = matrix + 1
    expected = matrix + 1
    own.load_state_dict(state)
    assert torch.equal(own.decoder.embed_out, expected)
    shared = make_model(share_decoder_input_output_embed=True)
    state = shared.state_dict()
    state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    shared.load_state_dict(state)


@pytest.mark.parametrize("reverse", [False, True])
def test_pruning_keeps_listed_layers_in_order(make_model, reverse):
    full = make_model(decoder_layers=4)
    small = make_model(decoder_layers_to_keep="3,1")
    args = argparse.Namespace(decoder_layers_to_keep="3,1")
    assert len(small.decoder.layers) == 2
    state = fused(full.state_dict())
    small.load_state_dict(dict(reversed(state.items())) if reverse else state, args=args)
    for new, old in ((0, 1), (1, 3)):
        for a, b in zip(small.decoder.layers[new].parameters(), full.decoder.layers[old].parameters()):
            assert torch.equal(a, b)
    assert args.decoder_layers_to_keep is None


@pytest.mark.parametrize("listed", ["a,b", "0,0", "1,", "-1"])
def test_layers_to_keep_are_distinct_numbers(make_model, listed):
    with pytest.raises(BadFlag, match="--decoder-layers-to-keep"):
        make_model(decoder_layers_to_keep=listed)


def test_mismatches_are_named_in_one_sentence_and_change_nothing(make_model):
    model = make_model()
    before = model.decoder.layers[0].fc1.weight.clone()
    state = {key: value + 1 for key, value in make_model(decoder_layers=2).state_dict().items()}
    state["decoder.stranger"] = torch.zeros(1)
    with pytest.raises(ArchitectureMismatch) as caught:
        model.load_state_dict(state)
    message = str(caught.value)
    assert message.startswith("architectures do not match: missing: decoder.layers.2.fc1.bias")
    assert "and 13 more" in message
    assert "unexpected: decoder.stranger" in message
    assert "\n" not in message
    assert torch.equal(model.decoder.layers[0].fc1.weight, before)


def test_a_wrong_dictionary_is_told_by_shapes(make_model):
    with pytest.raises(ArchitectureMismatch, match=r"embed_tokens.weight \[40, 16\] where the model has \[32, 16\]"):
        make_model().load_state_dict(make_model(size=40).state_dict())


def test_a_model_without_memory_takes_the_tensors_and_keeps_ties(make_model):
    source = make_model(adaptive=True)
    with torch.device("meta"):
        model = make_model(adaptive=True)
    state = {key: value.clone().half() for key, value in source.state_dict().items()}  # separate copies, half precision
    state["decoder.adaptive_softmax.version"] = torch.tensor([1])
    model.load_state_dict(state)
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    decoder = model.decoder
    assert decoder.adaptive_softmax.head.word_proj.weight is decoder.embed_tokens.embeddings[0][0].weight
    assert decoder.adaptive_softmax.tail[1][0].weight is decoder.embed_tokens.embeddings[2][1].weight
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in source.parameters())
    torch.testing.assert_close(model(TOKENS)[0], source(TOKENS)[0], atol=0.05, rtol=0.05)
    state["decoder.layers.0.fc1.weight"].zero_()
    assert decoder.layers[0].fc1.weight.abs().max() > 0
