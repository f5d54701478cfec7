"""Every named architecture: shapes, defaults, state names and parameter counts, without memory."""

import argparse

import pytest
import torch

from fairseq import models, options
from fairseq.errors import BadFlag, UserError
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_INV_REGISTRY, ARCH_MODEL_REGISTRY, transformer_lm
from fairseq.models.transformer_lm import TransformerLanguageModel

# name: layers, width, feed-forward width, heads, dropout, attention dropout, activation dropout, activation, final norm
TABLE = {
    "transformer_lm": (6, 512, 2048, 8, 0.1, 0.0, 0, "relu", True),
    "transformer_lm_big": (12, 1024, 4096, 16, 0.1, 0.0, 0, "relu", True),
    "transformer_lm_wiki103": (16, 1024, 4096, 8, 0.3, 0.1, 0.1, "relu", False),
    "transformer_lm_baevski_wiki103": (16, 1024, 4096, 8, 0.3, 0.1, 0.1, "relu", False),
    "transformer_lm_gbw": (12, 512, 4096, 16, 0.1, 0.1, 0, "relu", False),
    "transformer_lm_baevski_gbw": (12, 512, 4096, 16, 0.1, 0.1, 0, "relu", False),
    "transformer_lm_gpt": (12, 768, 3072, 12, 0.1, 0.1, 0, "gelu", True),
    "transformer_lm_gpt2_small": (24, 1024, 4096, 16, 0.1, 0.1, 0, "gelu", True),
    "transformer_lm_gpt2_medium": (36, 1280, 5120, 20, 0.1, 0.1, 0, "gelu", True),
    "transformer_lm_gpt2_big": (48, 1600, 6400, 25, 0.1, 0.1, 0, "gelu", True),
    "transformer_lm_gpt2_tiny": (2, 64, 64, 1, 0.1, 0.1, 0, "gelu", True),
    "transformer_lm_gpt2_big_wide": (24, 2048, 8192, 32, 0.1, 0.1, 0, "gelu", True),
    "transformer_lm_gpt2_bigger": (48, 2048, 8192, 32, 0.1, 0.1, 0, "gelu", True),
    "transformer_lm_gpt3_small": (12, 768, 3072, 12, 0, 0, 0, "gelu", True),
    "transformer_lm_gpt3_medium": (24, 1024, 4096, 16, 0, 0, 0, "gelu", True),
    "transformer_lm_gpt3_large": (24, 1536, 6144, 16, 0, 0, 0, "gelu", True),
    "transformer_lm_gpt3_xl": (24, 2048, 8192, 32, 0, 0, 0, "gelu", True),
    "transformer_lm_gpt3_2_7": (32, 2560, 10240, 32, 0, 0, 0, "gelu", True),
    "transformer_lm_gpt3_6_7": (32, 4096, 16384, 32, 0, 0, 0, "gelu", True),
    "transformer_lm_gpt3_13": (40, 5120, 20480, 40, 0, 0, 0, "gelu", True),
    "transformer_lm_gpt3_175": (96, 12288, 49152, 96, 0, 0, 0, "gelu", True),
}
SIZE = 70_000  # above the cutoffs of wiki103


@pytest.fixture(scope="module")
def big_task(make_task):
    return make_task(SIZE)


def build_on_meta(task, arch, **options):
    args = argparse.Namespace(arch=arch, **options)
    ARCH_CONFIG_REGISTRY[arch](args)
    with torch.device("meta"):
        return models.build_model(args, task), args


def shapes(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_the_table_is_complete():
    assert set(TABLE) == {name for name in ARCH_MODEL_REGISTRY if name.startswith("transformer_lm")}
    assert set(ARCH_MODEL_INV_REGISTRY["transformer_lm"]) == set(TABLE)


@pytest.mark.parametrize("arch", TABLE)
def test_architecture_parses_builds_and_has_its_shapes(arch, big_task):
    layers, width, ffn, heads, dropout, attention_dropout, activation_dropout, activation, norm = TABLE[arch]
    parser = options.get_training_parser("language_modeling")
    args = options.parse_args_and_arch(parser, ["data", "--arch", arch])
    assert (args.dropout, args.attention_dropout, args.activation_dropout) == (
        dropout,
        attention_dropout,
        activation_dropout,
    )
    assert args.decoder_normalize_before is True
    with torch.device("meta"):
        decoder = models.build_model(args, big_task).decoder
    assert len(decoder.layers) == layers
    assert decoder.layers[-1].fc1.weight.shape == (ffn, width)
    assert decoder.layers[0].self_attn.num_heads == heads
    assert args.activation_fn == activation
    assert (decoder.layer_norm is not None) == norm
    is_gpt3 = "gpt3" in arch
    assert args.decoder_learned_pos == args.share_decoder_input_output_embed == is_gpt3
    assert (decoder.embed_out is None) == (is_gpt3 or "wiki103" in arch)
    assert args.max_target_positions == 1024


def test_what_the_user_typed_wins(big_task):
    model, args = build_on_meta(
        big_task, "transformer_lm_wiki103", decoder_layers=2, dropout=0.05, tokens_per_sample=99
    )
    assert (len(model.decoder.layers), args.dropout, args.attention_dropout) == (2, 0.05, 0.1)
    assert args.max_target_positions == 99
    assert model.max_positions() == 99


def test_flags_leave_no_trace_unless_typed():
    parser = argparse.ArgumentParser()
    group = parser.add_argument_group("model", argument_default=argparse.SUPPRESS)
    TransformerLanguageModel.add_args(group)
    assert set(vars(parser.parse_args([]))) == {
        "character_filters",
        "character_embedding_dim",
        "char_embedder_highway_layers",
        "decoder_layerdrop",
        "decoder_layers_to_keep",
    }
    assert parser.parse_args(["--relu-dropout", "0.5"]).activation_dropout == 0.5


def test_wikitext_model_has_the_published_parameters(make_task):
    model, _ = build_on_meta(make_task(267_744), "transformer_lm_wiki103", tokens_per_sample=3072)
    assert sum(p.numel() for p in model.parameters()) == 246_933_504
    expected = {
        "decoder.version": (1,),
        "decoder.embed_tokens._float_tensor": (1,),
        "decoder.embed_tokens.embeddings.0.0.weight": (20000, 1024),
        "decoder.embed_tokens.embeddings.0.1.weight": (1024, 1024),
        "decoder.embed_tokens.embeddings.1.0.weight": (40000, 256),
        "decoder.embed_tokens.embeddings.1.1.weight": (1024, 256),
        "decoder.embed_tokens.embeddings.2.0.weight": (207744, 64),
        "decoder.embed_tokens.embeddings.2.1.weight": (1024, 64),
        "decoder.embed_positions._float_tensor": (1,),
        "decoder.adaptive_softmax.version": (1,),
        "decoder.adaptive_softmax.head._float_tensor": (1,),
        "decoder.adaptive_softmax.head.word_proj.weight": (20000, 1024),
        "decoder.adaptive_softmax.head.class_proj.weight": (2, 1024),
        "decoder.adaptive_softmax.tail.0.0.weight": (1024, 256),
        "decoder.adaptive_softmax.tail.0.2.weight": (40000, 256),
        "decoder.adaptive_softmax.tail.1.0.weight": (1024, 64),
        "decoder.adaptive_softmax.tail.1.2.weight": (207744, 64),
    }
    for i in range(16):
        for name in "kvq":
            expected[f"decoder.layers.{i}.self_attn.{name}_proj.weight"] = (1024, 1024)
            expected[f"decoder.layers.{i}.self_attn.{name}_proj.bias"] = (1024,)
        expected[f"decoder.layers.{i}.self_attn.out_proj.weight"] = (1024, 1024)
        expected[f"decoder.layers.{i}.self_attn.out_proj.bias"] = (1024,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            expected[f"decoder.layers.{i}.{name}.weight"] = expected[f"decoder.layers.{i}.{name}.bias"] = (1024,)
        expected[f"decoder.layers.{i}.fc1.weight"] = (4096, 1024)
        expected[f"decoder.layers.{i}.fc1.bias"] = (4096,)
        expected[f"decoder.layers.{i}.fc2.weight"] = (1024, 4096)
        expected[f"decoder.layers.{i}.fc2.bias"] = (1024,)
    assert shapes(model) == expected


def test_wmt19_model_has_projections_and_an_output_matrix(make_task):
    model, args = build_on_meta(
        make_task(5000),
        "transformer_lm_gbw",
        decoder_embed_dim=1536,
        decoder_input_dim=1024,
        decoder_output_dim=1024,
        decoder_layers=2,
        decoder_ffn_embed_dim=6144,
        knn_keytype="last_ffn_input",
    )
    found = shapes(model)
    assert found["decoder.embed_tokens.weight"] == (5000, 1024)
    assert found["decoder.project_in_dim.weight"] == (1536, 1024)
    assert found["decoder.project_out_dim.weight"] == (1024, 1536)
    assert found["decoder.embed_out"] == (5000, 1024)
    assert "decoder.layer_norm.weight" not in found
    assert model.decoder.embed_scale == pytest.approx(1536**0.5)
    assert args.decoder_attention_heads == 16


def test_names_of_optional_parts(make_task):
    learned = shapes(
        build_on_meta(
            make_task(50),
            "transformer_lm",
            decoder_learned_pos=True,
            layernorm_embedding=True,
            tokens_per_sample=30,
            share_decoder_input_output_embed=True,
        )[0]
    )
    assert learned["decoder.embed_positions.weight"] == (32, 512)
    assert learned["decoder.layernorm_embedding.bias"] == learned["decoder.layer_norm.weight"] == (512,)
    assert not any("embed_out" in key or "output_projection" in key for key in learned)
    untied = shapes(build_on_meta(make_task(50), "transformer_lm", adaptive_softmax_cutoff="10,20")[0])
    assert untied["decoder.adaptive_softmax.head.weight"] == (12, 512)
    assert untied["decoder.adaptive_softmax.tail.1.0.weight"] == (32, 512)
    bare = build_on_meta(make_task(50), "transformer_lm", no_token_positional_embeddings=True)[0]
    assert not any("embed_positions" in key for key in shapes(bare))
    assert bare.max_positions() == 1024


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ({"no_tie_adaptive_proj": False}, (True, True)),
        ({"no_tie_adaptive_proj": True}, (True, False)),
        ({"decoder_final_norm": True}, (False, False)),
        ({"decoder_final_norm": False}, (True, False)),
    ],
)
def test_options_of_old_checkpoints(old, expected):
    args = argparse.Namespace(**old)
    transformer_lm.base_lm_architecture(args)
    assert (args.no_decoder_final_norm, args.tie_adaptive_proj) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptive_input_cutoff": "5,9"}, "adaptive-input-cutoff = --adaptive-softmax-cutoff"),
        ({"adaptive_input_factor": 2}, "adaptive-input-factor"),
        ({"decoder_output_dim": 512}, "decoder-input-dim = --decoder-output-dim"),
        ({"adaptive_input": False}, "needs --adaptive-input;"),
    ],
)
def test_tying_needs_equal_shapes(big_task, options, message):
    with pytest.raises(UserError, match=message):
        build_on_meta(big_task, "transformer_lm_wiki103", **options)


def test_unsupported_choices_are_one_sentence(make_task):
    with pytest.raises(UserError, match="character"):
        build_on_meta(make_task(50), "transformer_lm", character_embeddings=True)
    with pytest.raises(BadFlag, match="--knn-keytype: found first_ffn_input"):
        build_on_meta(make_task(50), "transformer_lm", knn_keytype="first_ffn_input")
    with pytest.raises(BadFlag, match="--arch: found fconv_lm"):
        models.build_model(argparse.Namespace(arch="fconv_lm"), make_task(50))


def test_registration_refuses_what_is_taken():
    with pytest.raises(ValueError, match="cannot register transformer_lm for --arch twice"):
        models.register_model("transformer_lm")(TransformerLanguageModel)
    with pytest.raises(ValueError, match="second architecture"):
        models.register_model_architecture("transformer_lm", "transformer_lm_big")(lambda args: None)
    with pytest.raises(ValueError, match="no model named"):
        models.register_model_architecture("nobody", "nobody_big")(lambda args: None)
    with pytest.raises(ValueError, match="must extend"):
        models.register_model("plain")(dict)
