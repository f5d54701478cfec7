"""The transformer language model and its named architectures: flags, defaults, construction.

An architecture fills in what the user left out. `transformer_lm_wiki103` is the model of the kNN-LM and RetoMaton
papers (Baevski & Auli 2019, with 8 heads as in fairseq's code)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from fairseq import utils
from fairseq.errors import BadFlag, UserError
from fairseq.flag_types import any_int, natural_int, positive_float, positive_int, unit_float
from fairseq.models import register_model, register_model_architecture
from fairseq.models.fairseq_model import FairseqLanguageModel
from fairseq.models.transformer import Embedding, TransformerDecoder
from fairseq.modules import AdaptiveInput
from fairseq.modules.gelu import ACTIVATIONS

DEFAULT_MAX_TARGET_POSITIONS = 1024
CHARACTER_FILTERS = "[(1, 64), (2, 128), (3, 192), (4, 256), (5, 256), (6, 256), (7, 256)]"


@register_model("transformer_lm")
class TransformerLanguageModel(FairseqLanguageModel):
    """A decoder-only transformer."""

    supports_features_only = True

    @staticmethod
    def add_args(parser: Any) -> None:
        """Adds the model's flags. Those without a default here leave no trace in args unless typed."""
        add = parser.add_argument
        add("--activation-fn", choices=sorted(ACTIVATIONS), help="activation function")
        add("--dropout", type=unit_float, metavar="D", help="dropout probability")
        add("--attention-dropout", type=unit_float, metavar="D", help="dropout probability for attention weights")
        add(
            "--activation-dropout",
            "--relu-dropout",
            type=unit_float,
            metavar="D",
            help="dropout probability after the activation in the feed-forward sublayer",
        )
        add("--decoder-embed-dim", type=positive_int, metavar="N", help="width of the layers")
        add("--decoder-output-dim", type=positive_int, metavar="N", help="width of the output")
        add("--decoder-input-dim", type=positive_int, metavar="N", help="width of the token embeddings")
        add("--decoder-ffn-embed-dim", type=positive_int, metavar="N", help="width inside the feed-forward sublayer")
        add("--decoder-layers", type=natural_int, metavar="N", help="number of layers")
        add("--decoder-attention-heads", type=positive_int, metavar="N", help="number of attention heads")
        add("--decoder-normalize-before", action="store_true", help="always so")
        add("--no-decoder-final-norm", action="store_true", help="no layer norm after the last layer")
        add(
            "--adaptive-softmax-cutoff", metavar="EXPR", help="first word ids of the tail clusters, such as 20000,60000"
        )
        add("--adaptive-softmax-dropout", type=unit_float, metavar="D", help="dropout in the adaptive softmax")
        add("--adaptive-softmax-factor", type=positive_float, metavar="N", help="by which the tails' widths shrink")
        add("--no-token-positional-embeddings", action="store_true", help="no position embeddings")
        add("--share-decoder-input-output-embed", action="store_true", help="output matrix = token embeddings")
        add("--character-embeddings", action="store_true", help="not supported; accepted to say so")
        add("--character-filters", metavar="LIST", default=CHARACTER_FILTERS, help="of character embeddings")
        add("--character-embedding-dim", type=any_int, metavar="N", default=4, help="of character embeddings")
        add("--char-embedder-highway-layers", type=any_int, metavar="N", default=2, help="of character embeddings")
        add("--adaptive-input", action="store_true", help="token embeddings in bands of falling width")
        add("--adaptive-input-factor", type=positive_float, metavar="N", help="by which the bands' widths shrink")
        add("--adaptive-input-cutoff", metavar="EXPR", help="first word ids of the bands after the first")
        add("--tie-adaptive-weights", action="store_true", help="adaptive softmax uses the adaptive input's matrices")
        add("--tie-adaptive-proj", action="store_true", help="and its projections")
        add("--decoder-learned-pos", action="store_true", help="learned positions instead of sinusoids")
        add(
            "--decoder-layerdrop",
            type=unit_float,
            metavar="D",
            default=0,
            help="probability of skipping a layer in training",
        )
        add("--decoder-layers-to-keep", default=None, help="layers that a pruned model keeps, such as 0,2,4")
        add("--layernorm-embedding", action="store_true", help="layer norm after the embeddings")
        add("--no-scale-embedding", action="store_true", help="do not multiply embeddings by sqrt(width)")

    @classmethod
    def hub_models(cls) -> dict[str, Any]:
        """fairseq's published language models by name; the values are the archives' file names, not downloaded here."""
        return {
            "transformer_lm.gbw.adaptive_huge": "adaptive_lm_gbw_huge.tar.bz2",
            "transformer_lm.wiki103.adaptive": "adaptive_lm_wiki103.v2.tar.bz2",
            "transformer_lm.wmt19.en": "wmt19.en.tar.bz2",
            "transformer_lm.wmt19.de": "wmt19.de.tar.bz2",
            "transformer_lm.wmt19.ru": "wmt19.ru.tar.bz2",
        }

    @classmethod
    def build_model(cls, args: argparse.Namespace, task: Any) -> TransformerLanguageModel:
        """The model for `args`, which are completed in place, on the task's dictionaries."""
        base_lm_architecture(args)  # checkpoints of older versions lack some options
        if args.decoder_layers_to_keep:
            kept = str(args.decoder_layers_to_keep).split(",")
            if not all(layer.strip().isdigit() for layer in kept) or len(set(kept)) < len(kept):
                raise BadFlag("--decoder-layers-to-keep", args.decoder_layers_to_keep, "layer numbers such as 0,2,4")
            args.decoder_layers = len(kept)
        if getattr(args, "max_target_positions", None) is None:
            args.max_target_positions = getattr(args, "tokens_per_sample", None) or DEFAULT_MAX_TARGET_POSITIONS
        if args.character_embeddings:
            raise UserError(
                "--character-embeddings: character convolutions are not supported; use token embeddings or "
                "--adaptive-input"
            )
        if args.tie_adaptive_weights:
            _check_tying(args)
        dictionary = task.source_dictionary
        embed_tokens: Any
        if args.adaptive_input:
            embed_tokens = AdaptiveInput(
                len(dictionary),
                dictionary.pad(),
                args.decoder_input_dim,
                args.adaptive_input_factor,
                args.decoder_embed_dim,
                utils.eval_str_list(args.adaptive_input_cutoff, int, "--adaptive-input-cutoff") or [],
            )
        else:
            embed_tokens = Embedding(len(dictionary), args.decoder_input_dim, dictionary.pad())
        return cls(TransformerDecoder(args, task.target_dictionary, embed_tokens, no_encoder_attn=True))


def _check_tying(args: argparse.Namespace) -> None:
    """--tie-adaptive-weights needs input and output of one shape."""
    pairs = (
        ("adaptive_input_factor", "adaptive_softmax_factor"),
        ("adaptive_input_cutoff", "adaptive_softmax_cutoff"),  # compared as they were written
        ("decoder_input_dim", "decoder_output_dim"),
    )
    broken = [f"--{a} = --{b}".replace("_", "-") for a, b in pairs if getattr(args, a) != getattr(args, b)]
    if args.adaptive_softmax_cutoff is None:
        broken.insert(0, "--adaptive-softmax-cutoff")
    if not args.adaptive_input:
        broken.insert(0, "--adaptive-input")
    if broken:
        raise UserError(f"--tie-adaptive-weights needs {', '.join(broken)}; set these or leave the weights untied")


# ---------------------------------------------------------------------------------------------------------------------
# Architectures

BASE: dict[str, Any] = {
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "activation_fn": "relu",
    "decoder_layers": 6,
    "decoder_embed_dim": 512,
    "decoder_ffn_embed_dim": 2048,
    "decoder_attention_heads": 8,
    "decoder_learned_pos": False,
    "decoder_layerdrop": 0,
    "decoder_layers_to_keep": None,
    "adaptive_softmax_cutoff": None,
    "adaptive_softmax_dropout": 0,
    "adaptive_softmax_factor": 4,
    "no_token_positional_embeddings": False,
    "share_decoder_input_output_embed": False,
    "character_embeddings": False,
    "no_decoder_final_norm": False,
    "adaptive_input": False,
    "adaptive_input_factor": 4,
    "adaptive_input_cutoff": None,
    "tie_adaptive_weights": False,
    "tie_adaptive_proj": False,
    "no_scale_embedding": False,
    "layernorm_embedding": False,
}


def _fill(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    for key, value in defaults.items():
        if not hasattr(args, key):
            setattr(args, key, value)


@register_model_architecture("transformer_lm", "transformer_lm")
def base_lm_architecture(args: argparse.Namespace) -> None:
    """The defaults that all architectures have in common; also converts options of older checkpoints."""
    if hasattr(args, "no_tie_adaptive_proj"):
        args.no_decoder_final_norm = True
        if args.no_tie_adaptive_proj is False:
            args.tie_adaptive_proj = True
    if hasattr(args, "decoder_final_norm"):
        args.no_decoder_final_norm = not args.decoder_final_norm
    _fill(args, BASE)
    _fill(args, {"decoder_input_dim": args.decoder_embed_dim, "decoder_output_dim": args.decoder_embed_dim})
    args.decoder_normalize_before = True  # as in fairseq, language models are pre-norm whatever the flag says


def _architecture(name: str, *aliases: str, **defaults: Any) -> Callable[[argparse.Namespace], None]:
    """Registers an architecture that differs from the base by `defaults`."""

    def fill(args: argparse.Namespace) -> None:
        _fill(args, defaults)
        base_lm_architecture(args)

    fill.__name__ = fill.__qualname__ = name
    for arch in (name, *aliases):
        register_model_architecture("transformer_lm", arch)(fill)
    return fill


def _size(layers: int, width: int, heads: int, ffn: int | None = None) -> dict[str, int]:
    return {
        "decoder_layers": layers,
        "decoder_embed_dim": width,
        "decoder_ffn_embed_dim": 4 * width if ffn is None else ffn,
        "decoder_attention_heads": heads,
    }


transformer_lm_big = _architecture("transformer_lm_big", **_size(12, 1024, 16))
transformer_lm_baevski_wiki103 = _architecture(
    "transformer_lm_baevski_wiki103",
    "transformer_lm_wiki103",
    **_size(16, 1024, 8),
    dropout=0.3,
    attention_dropout=0.1,
    activation_dropout=0.1,
    adaptive_input=True,
    tie_adaptive_weights=True,
    tie_adaptive_proj=True,
    adaptive_input_cutoff="20000,60000",
    adaptive_softmax_cutoff="20000,60000",
    adaptive_softmax_dropout=0.2,
    no_decoder_final_norm=True,
)
transformer_lm_baevski_gbw = _architecture(
    "transformer_lm_baevski_gbw",
    "transformer_lm_gbw",
    **_size(12, 512, 16, ffn=4096),
    attention_dropout=0.1,
    no_decoder_final_norm=True,
)


def _gpt(
    name: str, layers: int, width: int, heads: int, ffn: int | None = None
) -> Callable[[argparse.Namespace], None]:
    """GPT and GPT-2 shapes (Radford et al. 2018, 2019), with fairseq's names for the sizes."""
    return _architecture(name, **_size(layers, width, heads, ffn), attention_dropout=0.1, activation_fn="gelu")


transformer_lm_gpt = _gpt("transformer_lm_gpt", 12, 768, 12)
transformer_lm_gpt2_small = _gpt("transformer_lm_gpt2_small", 24, 1024, 16)  # the size others call GPT-2 medium
transformer_lm_gpt2_tiny = _gpt("transformer_lm_gpt2_tiny", 2, 64, 1, ffn=64)
transformer_lm_gpt2_medium = _gpt("transformer_lm_gpt2_medium", 36, 1280, 20)
transformer_lm_gpt2_big = _gpt("transformer_lm_gpt2_big", 48, 1600, 25)
transformer_lm_gpt2_big_wide = _gpt("transformer_lm_gpt2_big_wide", 24, 2048, 32)
transformer_lm_gpt2_bigger = _gpt("transformer_lm_gpt2_bigger", 48, 2048, 32)


def _gpt3(name: str, layers: int, width: int, heads: int) -> Callable[[argparse.Namespace], None]:
    """GPT-3 shapes (Brown et al. 2020): learned positions, shared embeddings, no dropout."""
    return _architecture(
        name,
        **_size(layers, width, heads),
        dropout=0.0,
        activation_fn="gelu",
        decoder_learned_pos=True,
        share_decoder_input_output_embed=True,
    )


transformer_lm_gpt3_small = _gpt3("transformer_lm_gpt3_small", 12, 768, 12)
transformer_lm_gpt3_medium = _gpt3("transformer_lm_gpt3_medium", 24, 1024, 16)
transformer_lm_gpt3_large = _gpt3("transformer_lm_gpt3_large", 24, 1536, 16)
transformer_lm_gpt3_xl = _gpt3("transformer_lm_gpt3_xl", 24, 2048, 32)
transformer_lm_gpt3_2_7 = _gpt3("transformer_lm_gpt3_2_7", 32, 2560, 32)
transformer_lm_gpt3_6_7 = _gpt3("transformer_lm_gpt3_6_7", 32, 4096, 32)
transformer_lm_gpt3_13 = _gpt3("transformer_lm_gpt3_13", 40, 5120, 40)
transformer_lm_gpt3_175 = _gpt3("transformer_lm_gpt3_175", 96, 12288, 96)
