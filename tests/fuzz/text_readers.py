"""What language models read, under fuzzing: texts and their sidecars, the stored options of checkpoints as a whole
evaluation reads them, and folders of transformers (where it is installed)."""

from __future__ import annotations

import importlib.util
import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq import checkpoint_utils, options
from fairseq.data import Dictionary, data_utils
from fairseq.data.token_ids import TokenIds
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq_cli import preprocess

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
TEXT = "the quick brown fox jumps\nover the lazy dog\n\nthe end\n" * 3
ODD = (-1, 0, 3, 10**6, 10**30, 0.5, float("nan"), None, "", "x", "1,2", [], {}, [10**9], True, False, b"", (1, 2))


def _preprocess(folder: Path, *flags: str) -> None:
    (folder / "text").write_text(TEXT)
    words = ["--only-source", "--trainpref", str(folder / "text"), "--destdir", str(folder / "bin"), *flags]
    preprocess.main(options.parse_preprocessing_args(words))
    (folder / "bin" / "preprocess.log").unlink()


def prepare_text(folder: Path) -> list[Path]:
    _preprocess(folder)
    return [folder / "bin" / name for name in ("dict.txt", "train.idx", "train.bin", "train.json")]


def _items(path: str, dictionary: Any) -> bytes:
    dataset = data_utils.load_indexed_dataset(path, dictionary)
    assert dataset is not None
    return b"|".join(np.asarray(dataset[number]).tobytes() for number in range(len(dataset)))


def read_text(folder: Path) -> bytes:
    dictionary = Dictionary.load(str(folder / "bin" / "dict.txt"))
    return _items(str(folder / "bin" / "train"), dictionary) + "\n".join(dictionary.symbols).encode()


def prepare_tokens(folder: Path) -> list[Path]:
    _preprocess(folder, "--hf-tokenizer", str(FIXTURES / "golden-hf" / "gpt2"))
    return [folder / "bin" / name for name in ("tokens.json", "train.idx", "train.bin", "train.json")]


def read_tokens(folder: Path) -> bytes:
    tokens = TokenIds.load(str(folder / "bin"))
    return _items(str(folder / "bin" / "train"), tokens) + f"{len(tokens)} {tokens.begin} {tokens.tokenizer}".encode()


def prepare_symbols(folder: Path) -> list[Path]:
    prepare_tokens(folder)
    return sorted((folder / "bin" / "tokenizer").iterdir())


def read_symbols(folder: Path) -> object:
    return len(TokenIds.load(str(folder / "bin")).symbols)


def _scores(model: Path, data: Path, split: str) -> object:
    files = [str(data), "--path", str(model), "--gen-subset", split]
    words = [*files, "--cpu", "--no-progress-bar", "--max-tokens", "128"]
    scoring = LMScoring(options.parse_args_and_arch(options.get_eval_lm_parser(), words))
    return [len(scoring.score(batch)) for batch in itertools.islice(scoring.batches(), 1)]


def prepare_folder(folder: Path) -> list[Path]:
    prepare_tokens(folder)
    (folder / "model").mkdir()
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    for name in names:
        shutil.copy(FIXTURES / "golden-hf" / "gpt2" / name, folder / "model")
    return [folder / "model" / name for name in names]


def read_folder(folder: Path) -> object:
    return _scores(folder / "model", folder / "bin", "train")


def prepare_options(folder: Path) -> list[Path]:
    (folder / "choice").write_bytes(b"which options are replaced follows from these bytes")
    return [folder / "choice"]


def read_options(folder: Path) -> object:
    """Evaluates a checkpoint of which up to two options have other values, or are missing."""
    choice = (folder / "choice").read_bytes()
    generator = random.Random(choice)
    state = checkpoint_utils.read_torch_file(FIXTURES / "golden" / "checkpoints" / "checkpoint_best.pt")
    options_of = vars(state["args"])
    names = [] if choice.startswith(b"which options") else sorted(options_of)
    for name in generator.sample(names, min(len(names), 2)):
        if generator.random() < 0.2:
            del options_of[name]
        else:
            options_of[name] = generator.choice(ODD)
    torch.save(state, folder / "model.pt")
    return _scores(folder / "model.pt", FIXTURES / "golden" / "data-bin", "valid")


Part = tuple[Callable[[Path], list[Path]], Callable[[Path], Any], bool]
# The last item says whether the files have digests, so that what is read is refused or as it was.
TEXTS: dict[str, Part] = {
    "text": (prepare_text, read_text, True),
    "options, evaluated": (prepare_options, read_options, False),
}
if importlib.util.find_spec("transformers") is not None:
    TEXTS |= {
        "text of a tokenizer": (prepare_tokens, read_tokens, True),
        "tokenizer of a text": (prepare_symbols, read_symbols, False),
        "model folder": (prepare_folder, read_folder, False),
    }
