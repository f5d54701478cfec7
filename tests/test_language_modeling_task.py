"""The language modelling task: lines cut to length before they are blocked, interactive lines, and the options of old
checkpoints."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import make_builder
from fairseq.tasks.language_modeling import LanguageModelingTask

LINES = [[4, 5, 6, 7, 8, 2], [5, 2], [6, 7, 8, 9, 2]]


@pytest.fixture(name="folder")
def folder_fixture(tmp_path):
    dictionary = Dictionary()
    for number in range(12):
        dictionary.add_symbol(f"w{number}")
    dictionary.save(tmp_path / "dict.txt")
    builder = make_builder(str(tmp_path / "train.bin"), "mmap", len(dictionary))
    for line in LINES:
        builder.add_item(torch.tensor(line))
    builder.finalize(str(tmp_path / "train.idx"))
    return tmp_path


def task_on(folder, **options):
    """What a checkpoint of 2018 and the command line leave in args."""
    filled = {"data": str(folder), "dataset_impl": None, "sample_break_mode": "eos", "tokens_per_sample": 3, **options}
    return LanguageModelingTask.setup_task(Namespace(**filled))


def test_lines_are_cut_to_length(folder):
    task = task_on(folder, truncate_sequence=True)
    task.load_dataset("train")
    targets = [task.dataset("train")[number]["target"].tolist() for number in range(3)]
    assert targets == [[4, 5, 6], [5, 2], [6, 7, 8]]


def test_old_options_are_enough(folder):
    task = task_on(folder)
    task.load_dataset("train")
    targets = [task.dataset("train")[number]["target"].tolist() for number in range(3)]
    assert targets == LINES


def test_lines_for_inference(folder):
    task = task_on(folder)
    lines = [torch.tensor([4, 5, 2]), torch.tensor([7, 2])]
    dataset = task.build_dataset_for_inference(lines, [3, 2])
    assert np.asarray(dataset.sizes).tolist() == [3, 2]
    assert dataset[0]["source"].tolist() == [2, 4, 5]
    assert dataset[0]["target"].tolist() == [4, 5, 2]
    assert dataset[1]["source"].tolist() == [2, 7]
