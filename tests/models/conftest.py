"""A task with a made-up dictionary of any size, and small models on it."""

import argparse

import pytest
import torch

from fairseq import models
from fairseq.data import Dictionary
from fairseq.tasks.language_modeling import LanguageModelingTask

SMALL = {
    "arch": "transformer_lm",
    "task": "language_modeling",
    "decoder_layers": 3,
    "decoder_embed_dim": 16,
    "decoder_ffn_embed_dim": 24,
    "decoder_attention_heads": 2,
    "tokens_per_sample": 20,
    "dropout": 0.0,
}
SMALL_ADAPTIVE = {
    **SMALL,
    "arch": "transformer_lm_wiki103",
    "adaptive_input_cutoff": "10,20",
    "adaptive_softmax_cutoff": "10,20",
}


def make_task(size):
    dictionary = Dictionary()
    for i in range(size - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    return LanguageModelingTask(argparse.Namespace(), dictionary)


def make_model(size=32, *, adaptive=False, **options):
    args = argparse.Namespace(**{**(SMALL_ADAPTIVE if adaptive else SMALL), **options})
    models.ARCH_CONFIG_REGISTRY[args.arch](args)
    torch.manual_seed(7)
    return models.build_model(args, make_task(size)).eval()


@pytest.fixture(name="make_task", scope="session")
def make_task_fixture():
    return make_task


@pytest.fixture(name="make_model", scope="session")
def make_model_fixture():
    return make_model
