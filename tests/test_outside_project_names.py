"""The Python entry points that research code imports, used by hand the way fairseq's users do: the names exist, and
give the numbers that the commands give."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.binarizer import Binarizer
from fairseq.data import (
    Dictionary,
    IdDataset,
    LMContextWindowDataset,
    MonolingualDataset,
    NestedDictionaryDataset,
    NumelDataset,
    NumSamplesDataset,
    PadDataset,
    TokenBlockDataset,
    TruncatedDictionary,
    data_utils,
    indexed_dataset,
    iterators,
)
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.sequence_scorer import SequenceScorer
from fairseq.tokenizer import tokenize_line
from fairseq.trainer import Trainer

NAMES = """
fairseq.checkpoint_utils load_checkpoint_to_cpu load_model_ensemble load_model_ensemble_and_task checkpoint_paths
fairseq.checkpoint_utils save_checkpoint
fairseq.data Dictionary TruncatedDictionary TokenBlockDataset MonolingualDataset LMContextWindowDataset ConcatDataset
fairseq.data PadDataset LeftPadDataset RightPadDataset PrependTokenDataset AppendTokenDataset StripTokenDataset
fairseq.data IdDataset NumelDataset NestedDictionaryDataset iterators data_utils indexed_dataset encoders FairseqDataset
fairseq.data.data_utils load_indexed_dataset collate_tokens batch_by_size numpy_seed
fairseq.data.indexed_dataset MMapIndexedDataset IndexedDataset make_builder make_dataset infer_dataset_impl
fairseq.tasks setup_task register_task FairseqTask
fairseq.options get_preprocessing_parser get_training_parser get_eval_lm_parser parse_args_and_arch
fairseq.utils move_to_cuda make_positions strip_pad resolve_max_positions import_user_module get_activation_fn item
fairseq.sequence_scorer SequenceScorer
fairseq.sequence_generator SequenceGenerator
fairseq.trainer Trainer
fairseq.binarizer Binarizer
fairseq.tokenizer tokenize_line
fairseq.modules AdaptiveInput AdaptiveSoftmax MultiheadAttention LayerNorm PositionalEmbedding TransformerDecoderLayer
fairseq.models BaseFairseqModel FairseqLanguageModel FairseqDecoder FairseqIncrementalDecoder register_model
fairseq.models register_model_architecture MODEL_REGISTRY ARCH_MODEL_REGISTRY
fairseq.models ARCH_CONFIG_REGISTRY ARCH_MODEL_INV_REGISTRY
fairseq.models.transformer TransformerDecoder Embedding Linear
fairseq.models.transformer_lm TransformerLanguageModel base_lm_architecture
fairseq.metrics aggregate log_scalar log_derived log_speed reset_meters get_smoothed_values
fairseq.meters AverageMeter TimeMeter StopwatchMeter
fairseq.progress_bar build_progress_bar
fairseq.logging.metrics log_scalar
fairseq.logging.meters AverageMeter
fairseq.logging.progress_bar build_progress_bar
fairseq.distributed_utils is_master get_rank get_world_size all_gather_list
fairseq.criterions FairseqCriterion register_criterion build_criterion CRITERION_REGISTRY
fairseq.optim FairseqOptimizer register_optimizer build_optimizer OPTIMIZER_REGISTRY
fairseq.optim.lr_scheduler FairseqLRScheduler register_lr_scheduler build_lr_scheduler LR_SCHEDULER_REGISTRY
fairseq.data.encoders register_tokenizer register_bpe build_tokenizer build_bpe
fairseq.hub_utils from_pretrained GeneratorHubInterface
fairseq_cli.preprocess cli_main main
fairseq_cli.train cli_main main
fairseq_cli.eval_lm cli_main main
"""


@pytest.mark.parametrize("line", NAMES.strip().splitlines())
def test_names(line: str) -> None:
    path, *names = line.split()
    module = importlib.import_module(path)
    for name in names:
        found = getattr(module, name, None)
        assert callable(found) or isinstance(found, dict | ModuleType), name


def test_both_homes_of_metrics_are_one() -> None:
    assert importlib.import_module("fairseq.logging.metrics") is importlib.import_module("fairseq.metrics")


# ---------------------------------------------------------------------------------------------------------------------
# Data by hand


@pytest.fixture(scope="module")
def dictionary(golden: Path) -> Dictionary:
    return Dictionary.load(str(golden / "data-bin" / "dict.txt"))


def test_text_to_binary_and_back(golden: Path, dictionary: Dictionary, tmp_path: Path) -> None:
    builder = indexed_dataset.make_builder(str(tmp_path / "x.bin"), impl="mmap", vocab_size=len(dictionary))
    text = golden / "text" / "wiki.test.tokens"
    counts = Binarizer.binarize(str(text), dictionary, lambda ids: builder.add_item(ids), tokenize_line)
    builder.finalize(str(tmp_path / "x.idx"))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"x.{kind}").read_bytes() == (golden / "data-bin" / f"test.{kind}").read_bytes()
    assert (counts["nseq"], counts["ntok"]) == (47, 510)
    assert indexed_dataset.infer_dataset_impl(str(tmp_path / "x")) == "mmap"
    dataset = data_utils.load_indexed_dataset(str(tmp_path / "x"), dictionary)
    lines = text.read_text().splitlines()
    known = [" ".join(word if word in dictionary.indices else "<unk>" for word in line.split()) for line in lines]
    assert [dictionary.string(dataset[i]) for i in range(len(dataset))] == known


def test_blocks_and_batches(golden: Path, dictionary: Dictionary) -> None:
    tokens = data_utils.load_indexed_dataset(str(golden / "data-bin" / "valid"), dictionary)
    blocks = TokenBlockDataset(
        tokens,
        tokens.sizes,
        32,
        pad=dictionary.pad(),
        eos=dictionary.eos(),
        break_mode="none",
        include_targets=True,
    )
    lm = MonolingualDataset(
        blocks,
        blocks.sizes,
        dictionary,
        dictionary,
        add_eos_for_other_targets=False,
        shuffle=False,
        targets=["future"],
        add_bos_token=False,
    )
    batch = lm.collater([lm[0], lm[1], lm[len(lm) - 1]])
    stream = torch.cat([tokens[i] for i in range(len(tokens))])
    assert torch.equal(batch["target"][0], stream[:32])
    assert torch.equal(batch["net_input"]["src_tokens"][1], stream[31:63])
    assert batch["nsentences"] == 3 and batch["ntokens"] == 64 + len(stream) % 32
    windows = LMContextWindowDataset(lm, 32, 16, dictionary.pad())
    wide = windows.collater([windows[0], windows[1]])
    assert wide["net_input"]["src_tokens"].shape == (2, 48) and wide["start_indices"] == [0, 16]
    batches = data_utils.batch_by_size(lm.ordered_indices(), lm.num_tokens, max_tokens=128)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lm)))
    epoch_itr = iterators.EpochBatchIterator(lm, lm.collater, batches, seed=2)
    seen = [sample["id"] for sample in iterators.GroupedIterator(epoch_itr.next_epoch_itr(), 1) for sample in sample]
    assert sorted(torch.cat(seen).tolist()) == list(range(len(lm)))


def test_a_batch_from_nested_wrappers(golden: Path, dictionary: Dictionary) -> None:
    """The way tasks outside this package put a batch together."""
    lines = data_utils.load_indexed_dataset(str(golden / "data-bin" / "test"), dictionary)
    nested = NestedDictionaryDataset(
        {
            "id": IdDataset(),
            "net_input": {
                "src_tokens": PadDataset(lines, pad_idx=dictionary.pad(), left_pad=False),
                "src_lengths": NumelDataset(lines, reduce=False),
            },
            "nsentences": NumSamplesDataset(),
            "ntokens": NumelDataset(lines, reduce=True),
        },
        sizes=[lines.sizes],
    )
    batch = nested.collater([nested[i] for i in (0, 2)])
    assert batch["id"].tolist() == [0, 2] and batch["nsentences"] == 2
    assert batch["ntokens"] == sum(batch["net_input"]["src_lengths"].tolist()) == int(lines.sizes[[0, 2]].sum())
    assert torch.equal(utils.strip_pad(batch["net_input"]["src_tokens"][1], dictionary.pad()), lines[2])


def test_a_truncated_dictionary(dictionary: Dictionary) -> None:
    short = TruncatedDictionary(dictionary, 100)
    assert len(short) == 100 and short[100] == "<unk>" and short.pad() == dictionary.pad()


# ---------------------------------------------------------------------------------------------------------------------
# Models by hand


@pytest.fixture(scope="module")
def loaded(golden: Path) -> Any:
    overrides = {"data": str(golden / "data-bin"), "knn_keytype": "last_ffn_input"}
    path = str(golden / "checkpoints" / "checkpoint_best.pt")
    return checkpoint_utils.load_model_ensemble_and_task([path], overrides)


def test_scoring_gives_what_the_original_got(loaded: Any, golden: Path) -> None:
    """Setting a of the golden bundle, from the parts: blocks, windows, scorer."""
    (model,), args, task = loaded
    model.eval()
    expected = json.loads((golden / "expected.json").read_text())["a_base"]
    args.tokens_per_sample, args.sample_break_mode = 128 - 96, "complete"
    args.lm_eval = True
    task.load_dataset("valid")
    dataset = LMContextWindowDataset(task.dataset("valid"), 32, 96, task.source_dictionary.pad())
    itr = task.get_batch_iterator(dataset, max_tokens=128, max_sentences=2).next_epoch_itr(shuffle=False)
    scorer = SequenceScorer(task.target_dictionary, 1024)
    found = []
    for sample in itr:
        for (hypothesis,) in scorer.generate([model], sample):
            assert len(hypothesis["tokens"]) == len(hypothesis["positional_scores"])
            assert hypothesis["score"].item() == pytest.approx(hypothesis["positional_scores"].mean().item(), abs=1e-5)
            found.append(hypothesis["positional_scores"])
    scores = torch.cat(found)
    assert len(scores) == expected["count"]
    assert -scores.double().mean().item() / np.log(2) == pytest.approx(expected["loss_base2"], abs=5e-5)


def test_the_models_interface(loaded: Any, golden: Path) -> None:
    (model,), _, task = loaded
    tokens = task.source_dictionary.encode_line("the old harbour", add_if_not_exist=False).long()[None]
    sample = {"net_input": {"src_tokens": tokens, "src_lengths": None}, "target": tokens}
    with torch.no_grad():
        output = model(**sample["net_input"])
        log_probs = model.get_normalized_probs(output, log_probs=True)
        probs = model.get_normalized_probs(output, log_probs=False)
        features, _ = model.extract_features(tokens)
    assert output[1]["last_ffn_input"].shape == (4, 1, 32)
    assert log_probs.shape == (1, 4, len(task.target_dictionary))
    torch.testing.assert_close(probs.sum(-1), torch.ones(1, 4))
    torch.testing.assert_close(model.output_layer(features), output[0])
    assert model.decoder.adaptive_softmax is not None and model.supported_targets == {"future"}
    assert torch.equal(model.get_targets(sample, output), tokens)
    assert utils.resolve_max_positions(task.max_positions(), model.max_positions()) == 128


def test_a_model_from_a_folder(golden: Path) -> None:
    hub = TransformerLanguageModel.from_pretrained(
        str(golden / "checkpoints"), checkpoint_file="checkpoint_best.pt", data_name_or_path=str(golden / "data-bin")
    )
    words = " ".join(hub.src_dict.symbols[number] for number in (10, 30, 20, 50))
    ids = hub.encode(words)
    assert ids.tolist() == [10, 30, 20, 50, hub.src_dict.eos()] and hub.decode(ids) == words
    score = hub.score(words)
    assert torch.equal(score["tokens"], ids)
    assert score["positional_scores"].mean().item() == pytest.approx(score["score"].item(), abs=1e-6)
    assert hub.sample(words, max_len_b=3).startswith(words)


def test_an_ensemble_and_its_overrides(golden: Path) -> None:
    path = str(golden / "checkpoints" / "checkpoint_best.pt")
    overrides = {"data": str(golden / "data-bin"), "dropout": 0.7}
    models, args = checkpoint_utils.load_model_ensemble([path, path], overrides)
    assert len(models) == 2 and args.dropout == 0.7 and args.arch == "transformer_lm_wiki103"
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    assert state["args"].dropout == 0.1 and "decoder.version" in state["model"]


def test_a_training_step_by_hand(golden: Path) -> None:
    words = (
        "--task language_modeling --arch transformer_lm --decoder-embed-dim 8 --decoder-ffn-embed-dim 8 "
        "--decoder-layers 1 --decoder-attention-heads 1 --optimizer adam --lr 0.01 --max-tokens 256 "
        "--tokens-per-sample 64 --cpu"
    )
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, [str(golden / "data-bin"), *shlex.split(words)])
    task = tasks.setup_task(args)
    trainer = Trainer(args, task, task.build_model(args), task.build_criterion(args))
    epoch_itr = trainer.get_train_iterator(epoch=0)
    losses = []
    for samples in iterators.GroupedIterator(epoch_itr.next_epoch_itr(shuffle=True), 1):
        output = trainer.train_step(samples)
        losses.append(float(output["loss"]) / output["ntokens"])
        if len(losses) == 30:
            break
    assert trainer.get_num_updates() == 30
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


def test_checkpoint_paths_newest_first(tmp_path: Path) -> None:
    for name in ("checkpoint2.pt", "checkpoint10.pt", "checkpoint_best.pt"):
        (tmp_path / name).touch()
    found = checkpoint_utils.checkpoint_paths(str(tmp_path))
    assert [Path(path).name for path in found] == ["checkpoint10.pt", "checkpoint2.pt"]
