"""What `--path` names: checkpoints of this package and fairseq, or model folders of transformers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from fairseq import checkpoint_utils, utils
from fairseq.data.token_ids import TokenIds
from fairseq.errors import BadFile, BadFlag
from fairseq.files.fingerprint import file_fingerprint
from fairseq.models import huggingface


@dataclass
class OpenedModels:
    """Models; the options of each; names of the options that their files hold; whatever tells the files from others;
    replaceable: the only options that `--model-overrides` can replace, None for those of checkpoints."""

    models: list[Any]
    options: list[argparse.Namespace]
    stored: set[str]
    paths: list[str]
    fingerprints: list[Any] | None = None
    replaceable: tuple[str, ...] | None = None

    def files(self) -> list[Any]:
        """Fingerprints of the models' files, made when they are asked for."""
        return self.fingerprints or [file_fingerprint(path) for path in self.paths]


def open_models(args: argparse.Namespace, overrides: dict[str, Any], task: Any) -> OpenedModels:
    """Opens all that `--path` names; UserError for what does not exist, does not fit, or is of two kinds."""
    paths, dictionary = utils.split_paths(args.path), task.source_dictionary
    folders = [huggingface.is_model_name(path) for path in paths]
    if all(folders):
        huggingface.check_flags(args)
        opened = [huggingface.open_language_model(path, dictionary, args.data, args, overrides) for path in paths]
        models, stored, files = (list(column) for column in zip(*opened))
        return OpenedModels(models, stored, set(overrides), paths, files, huggingface.REPLACEABLE)
    if any(folders):
        raise BadFlag("--path", args.path, "models of one kind: checkpoints, or model folders")
    if isinstance(dictionary, TokenIds):
        found, remedy = "a text of a tokenizer", "preprocess it without --hf-tokenizer, or give --path a model folder"
        raise BadFile(args.data, found, "one of words (dict.txt), as a checkpoint needs it", remedy)
    models, options, names, _ = checkpoint_utils.load_ensemble(paths, arg_overrides=overrides, task=task)
    return OpenedModels(models, options, names, paths)
