"""The command-line surface, frozen: the flags of each program with the WikiText-103 recipe's choices, and the defaults
that the original documents. A change here is a change for everybody's scripts: make it a decision."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

import pytest

from fairseq import options
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from fairseq_cli import build_dstore, kmeans, sweep

RECIPE = (
    "data --task language_modeling --arch transformer_lm_wiki103 --criterion adaptive_loss --optimizer nag "
    "--lr-scheduler cosine"
)

EVERYWHERE = """
--all-gather-list-size --bf16 --bpe --cpu --criterion --dataset-impl --empty-cache-freq --force --fp16
--fp16-init-scale --fp16-no-flatten-grads --fp16-scale-tolerance --fp16-scale-window --help --log-format
--log-interval --lr-scheduler --memory-efficient-fp16 --min-loss-scale --no-progress-bar --optimizer --seed --task
--tensorboard-logdir --threshold-loss-scale --tokenizer --user-dir -h
"""
TRAIN_AND_EVAL = """
--add-bos-token --batch-size --dstore-filename --dstore-fp16 --dstore-size --faiss-metric-type --future-target
--indexfile --k --knn-keytype --knn-sim-func --lmbda --lr-shrink --max-sentences --max-target-positions --max-tokens
--momentum --move-dstore-to-mem --no-load-keys --num-workers --output-dictionary-size --past-target --probe
--required-batch-size-multiple --results-json --sample-break-mode --self-target --skip-invalid-size-inputs-valid-test
--tokens-per-sample --truncate-sequence --warmup-updates --wd --weight-decay
"""
PREPROCESS = """
--document-separator --hf-documents --hf-eos --hf-tokenizer --name-field --text-field
--align-suffix --alignfile --destdir --dict-only --joined-dictionary --nwordssrc --nwordstgt --only-source
--padding-factor --source-lang --srcdict --target-lang --testpref --tgtdict --thresholdsrc --thresholdtgt --trainpref
--validpref --workers -s -t
"""
TRAIN = """
--activation-dropout --activation-fn --adaptive-input --adaptive-input-cutoff --adaptive-input-factor
--adaptive-softmax-cutoff --adaptive-softmax-dropout --adaptive-softmax-factor --arch --attention-dropout
--batch-size-valid --best-checkpoint-metric --broadcast-buffers --bucket-cap-mb --char-embedder-highway-layers
--character-embedding-dim --character-embeddings --character-filters --clip-norm --curriculum --ddp-backend
--decoder-attention-heads --decoder-embed-dim --decoder-ffn-embed-dim --decoder-input-dim --decoder-layerdrop
--decoder-layers --decoder-layers-to-keep --decoder-learned-pos --decoder-normalize-before --decoder-output-dim
--device-id --disable-validation --distributed-backend --distributed-init-method --distributed-no-spawn
--distributed-port --distributed-rank --distributed-world-size --dropout --fast-stat-sync --find-unused-parameters
--finetune-from-model --fix-batches-to-gpus --fixed-validation-seed --keep-best-checkpoints --keep-interval-updates
--keep-last-epochs --layernorm-embedding --learning-rate --local_rank --lr --lr-period-updates --max-epoch --max-lr
--max-sentences-valid --max-tokens-valid --max-update --maximize-best-checkpoint-metric --me --min-lr --mu
--no-decoder-final-norm --no-epoch-checkpoints --no-last-checkpoints --no-save --no-save-optimizer-state
--no-scale-embedding --no-token-positional-embeddings --optimizer-overrides --patience --relu-dropout
--reset-dataloader --reset-lr-scheduler --reset-meters --reset-optimizer --restore-file --save-dir --save-interval
--save-interval-updates --sentence-avg --share-decoder-input-output-embed --stop-min-lr --t-mult --tie-adaptive-proj
--tie-adaptive-weights --torch-compile --train-subset --update-freq --use-bmuf --valid-subset --validate-interval
--validate-interval-updates --warmup-init-lr -a
"""
EVAL_LM = """
--check --check-strategy --context-window --dstore-mmap --dstore-weights --fa --force-anneal --gen-subset --index
--index-recall --knn-temp --knnlm --knnlm-gpu
--lm-eval --local --lockstep-tokens --ls --max-knns --members --min-knns --model-overrides --no-pointer --num-shards
--output-word-probs --output-word-stats --path --post-process --quiet --remove-bpe --results-path --save-features
--save-knnlm-dstore --save-scores --save-searches --shard-id --softmax-batch --strategy --target-foss
--target-foss-subset --target-foss-tokens
--drop-remainder --dstore-dir --group-documents --hf-device-map --hf-dtype --knn-module --max-length --rolling --stride
--tie-order
"""
BUILD_DSTORE = """
--force --actual-dstore-size --actual_dstore_size --code-size --code_size --dimension --dstore-fp16 --dstore-mmap
--dstore-size --dstore_fp16 --dstore_mmap --dstore_size --faiss-index --faiss_index --help --ncentroids
--no-progress-bar --num-keys-to-add-at-a-time --num_keys_to_add_at_a_time --pca --preset --probe --recall-queries
--results-json --seed --starting-point --starting_point -h
"""
KMEANS = """
--memory-gb --force --algorithm --batch-size --dim --dimension --dstore --dstore-size --help --iterations
--no-progress-bar --num-clusters --results-json --sample --save --seed -h
"""
SWEEP = """
--column --force --dstore-dir --dstore-filename --dstore-fp16 --dstore-size --faiss-metric-type --figure --help --index
--indexfile --k --knn-sim-func --knn-temp --knnlm-gpu --label --lmbda --lockstep-tokens --max-knns --members --min-knns
--move-dstore-to-mem --no-load-keys --no-progress-bar --output --paper --probe --scores --seed --strategy --title
--user-dir -h
"""


def training_parser() -> argparse.ArgumentParser:
    """With the flags that the recipe's choices add."""
    parser = options.get_training_parser()
    options.parse_args_and_arch(parser, RECIPE.split())
    return parser


def evaluation_parser() -> argparse.ArgumentParser:
    """With the flags of the task."""
    parser = options.get_eval_lm_parser()
    options.parse_args_and_arch(parser, ["data"])
    return parser


@pytest.mark.parametrize(
    "get_parser, frozen",
    [
        (options.get_preprocessing_parser, EVERYWHERE + PREPROCESS),
        (training_parser, EVERYWHERE + TRAIN_AND_EVAL + TRAIN),
        (evaluation_parser, EVERYWHERE + TRAIN_AND_EVAL + EVAL_LM),
        (build_dstore.get_parser, BUILD_DSTORE),
        (kmeans.get_parser, KMEANS),
        (sweep.get_parser, SWEEP),
    ],
    ids=["preprocess", "train", "eval_lm", "build_dstore", "kmeans", "sweep"],
)
def test_flags(get_parser: Callable[[], argparse.ArgumentParser], frozen: str) -> None:
    flags = {flag for action in get_parser()._actions for flag in action.option_strings}
    expected = set(frozen.split())
    assert (sorted(flags - expected), sorted(expected - flags)) == ([], []), "added, removed"


def test_positionals() -> None:
    for get_parser in (training_parser, evaluation_parser):
        assert [action.dest for action in get_parser()._actions if not action.option_strings] == ["data"]
    for get_parser in (build_dstore.get_parser, kmeans.get_parser, options.get_preprocessing_parser):
        assert [action.dest for action in get_parser()._actions if not action.option_strings] == []


# Defaults as the original documents them; sizes that files know by themselves have none here.
DEFAULTS = {
    training_parser: {
        "adaptive_input_cutoff": "20000,60000", "adaptive_softmax_cutoff": "20000,60000",
        "adaptive_softmax_dropout": 0.2,
        "arch": "transformer_lm_wiki103", "attention_dropout": 0.1, "best_checkpoint_metric": "loss", "clip_norm": 25.0,
        "curriculum": 0, "ddp_backend": "c10d", "decoder_attention_heads": 8, "decoder_embed_dim": 1024,
        "decoder_ffn_embed_dim": 4096, "decoder_layers": 16, "dropout": 0.3, "lr": [0.25], "lr_period_updates": -1,
        "lr_shrink": 0.1, "log_interval": 1000, "max_epoch": 0, "max_lr": None, "max_tokens": None, "max_update": 0,
        "min_lr": -1.0, "momentum": 0.99, "required_batch_size_multiple": 8, "restore_file": "checkpoint_last.pt",
        "sample_break_mode": None, "save_dir": "checkpoints", "save_interval": 1, "seed": 1, "sentence_avg": False,
        "t_mult": 1.0, "tokens_per_sample": 1024, "train_subset": "train", "update_freq": [1], "valid_subset": "valid",
        "warmup_init_lr": -1.0, "warmup_updates": 0, "weight_decay": 0.0,
    },
    evaluation_parser: {
        "context_window": 0, "dstore_filename": None, "dstore_fp16": False, "dstore_mmap": None, "dstore_size": None,
        "faiss_metric_type": "l2", "gen_subset": "test", "indexfile": None, "k": 1024, "knn_keytype": None,
        "knn_sim_func": None, "knnlm": False, "knnlm_gpu": False, "lmbda": 0.0, "log_interval": 1000, "max_knns": None,
        "max_sentences": None, "max_tokens": None, "members": None, "min_knns": 1, "model_overrides": "{}",
        "move_dstore_to_mem": False, "no_load_keys": False, "no_pointer": False, "num_shards": 1, "probe": 8,
        "remove_bpe": None, "sample_break_mode": None, "save_knnlm_dstore": False, "shard_id": 0,
        "tokens_per_sample": 1024,
    },
    options.get_preprocessing_parser: {
        "dataset_impl": "mmap", "destdir": "data-bin", "nwordssrc": -1, "nwordstgt": -1, "only_source": False,
        "padding_factor": 8, "srcdict": None, "thresholdsrc": 0, "thresholdtgt": 0, "workers": 1,
    },
    build_dstore.get_parser: {
        "code_size": 64, "dstore_fp16": False, "ncentroids": 4096, "num_keys_to_add_at_a_time": 1000000, "probe": 8,
        "seed": 1, "starting_point": 0,
    },
    kmeans.get_parser: {"batch_size": 500000, "seed": 1},
}
REQUIRED = {
    build_dstore.get_parser: ["--dstore_mmap", "p", "--faiss_index", "i"],
    kmeans.get_parser: ["--dstore", "p", "--num-clusters", "2", "--sample", "3"],
}


@pytest.mark.parametrize("get_parser", DEFAULTS, ids=["train", "eval_lm", "preprocess", "build_dstore", "kmeans"])
def test_defaults(get_parser: Callable[[], argparse.ArgumentParser]) -> None:
    if get_parser is training_parser:
        args = options.parse_args_and_arch(options.get_training_parser(), RECIPE.split())
    elif get_parser is evaluation_parser:
        args = options.parse_args_and_arch(options.get_eval_lm_parser(), ["data"])
    else:
        args = get_parser().parse_args(REQUIRED.get(get_parser, []))
    expected = DEFAULTS[get_parser]
    assert {name: getattr(args, name) for name in expected} == expected


def test_nothing_may_be_abbreviated() -> None:
    with pytest.raises(ValueError, match="--dstore-file"):
        options.parse_args_and_arch(options.get_eval_lm_parser(), ["data", "--dstore-file", "x"])


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Each command's parser, with the flags of the language model's task and of every choice."""
    found: dict[str, argparse.ArgumentParser] = {}
    for name, parser in (
        ("train", options.get_training_parser("language_modeling")),
        ("eval_lm", options.get_eval_lm_parser()),
        ("preprocess", options.get_preprocessing_parser()),
    ):
        TASK_REGISTRY["language_modeling"].add_args(parser)
        if name == "train":
            ARCH_MODEL_REGISTRY["transformer_lm"].add_args(parser)
        found[name] = parser
    for name in ("build_dstore", "kmeans", "greedy_merge", "adaptret", "sweep"):
        found[name] = importlib.import_module(f"fairseq_cli.{name}").get_parser()
    return found


def test_integers_have_bounds() -> None:
    """No flag takes an integer that its use cannot hold: NumPy, torch and FAISS count in 64 bits, some in 32."""
    checked = 0
    for command, parser in parsers().items():
        for action in parser._actions:
            name = getattr(action.type, "__name__", "")
            if not (name == "row_count" or "int" in name):
                continue
            checked += 1
            for text in ("99999999999999999999", "9" * 5000, str(1 << 63)):
                with pytest.raises(argparse.ArgumentTypeError):
                    print(command, action.option_strings, action.type(text))  # type: ignore[operator]
    assert checked > 80
