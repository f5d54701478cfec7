"""`Model.from_pretrained(folder)` and the object it returns, which scores and continues text. Folders are local;
nothing is downloaded or unpacked."""

from __future__ import annotations

import argparse
import copy
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from fairseq import checkpoint_utils
from fairseq.errors import MissingFile, UserError
from fairseq.files.odd_characters import warn_of_odd_characters
from fairseq.generation.choice import ChoiceSettings, Symbols
from fairseq.generation.lm_steps import LMSteps
from fairseq.generation.positions import Positions
from fairseq.generation.writing import write
from fairseq.sequence_generator import SequenceGenerator

BPE_FILES = {"code": "bpe_codes", "bpecodes": "bpe_codes", "sentencepiece.bpe.model": "sentencepiece_vocab"}


def from_pretrained(
    model_name_or_path: str,
    checkpoint_file: str = "model.pt",
    data_name_or_path: str = ".",
    archive_map: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Loads models from a folder: {"args", "task", "models"}.

    `checkpoint_file` may name several files of the folder, joined by the path separator. `data_name_or_path` holds
    dict.txt; when it starts with a dot it is relative to the folder. `kwargs` override the checkpoint's args. BPE codes
    in the folder are found by their usual names."""
    folder = model_name_or_path
    if not os.path.isdir(folder):
        archive = f"; the archive {(archive_map or {}).get(folder)} holds it" if folder in (archive_map or {}) else ""
        raise MissingFile(folder, f"download and unpack the model, then give its folder{archive}")
    overrides = dict(kwargs)
    data = data_name_or_path
    overrides["data"] = os.path.abspath(os.path.join(folder, data)) if data.startswith(".") else data
    for file, option in BPE_FILES.items():
        path = os.path.join(folder, file)
        if os.path.exists(path):
            overrides.setdefault(option, path)
    paths = [os.path.join(folder, name) for name in checkpoint_file.split(os.pathsep)]
    models, args, task = checkpoint_utils.load_model_ensemble_and_task(paths, overrides)
    return {"args": args, "task": task, "models": models}


class GeneratorHubInterface(nn.Module):
    """Models of one task with their tokenizer and BPE: encode, score, sample."""

    models: Any
    _float_tensor: Tensor

    def __init__(self, args: argparse.Namespace, task: Any, models: list[Any]) -> None:
        from fairseq.data import encoders

        super().__init__()
        self.args = args
        self.task = task
        self.models = nn.ModuleList(models)
        self.src_dict = task.source_dictionary
        self.tgt_dict = task.target_dictionary
        self.tokenizer = encoders.build_tokenizer(args)
        self.bpe = encoders.build_bpe(args)
        for model in self.models:
            model.make_generation_fast_()
        # tells the device; not a parameter, so that it counts for nothing
        self.register_buffer("_float_tensor", torch.zeros(1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self._float_tensor.device

    def tokenize(self, sentence: str) -> str:
        """Words separated by spaces."""
        return sentence if self.tokenizer is None else self.tokenizer.encode(sentence)

    def detokenize(self, sentence: str) -> str:
        """The inverse of `tokenize`."""
        return sentence if self.tokenizer is None else self.tokenizer.decode(sentence)

    def apply_bpe(self, sentence: str) -> str:
        """Words cut into pieces."""
        return sentence if self.bpe is None else self.bpe.encode(sentence)

    def remove_bpe(self, sentence: str) -> str:
        """The inverse of `apply_bpe`."""
        return sentence if self.bpe is None else self.bpe.decode(sentence)

    def binarize(self, sentence: str) -> Tensor:
        """Token ids (T,) int64 of a tokenized sentence, with eos."""
        return self.src_dict.encode_line(sentence, add_if_not_exist=False, append_eos=True).long()

    def string(self, tokens: Tensor) -> str:
        """The symbols of token ids, separated by spaces, without eos."""
        return self.tgt_dict.string(tokens)

    def encode(self, sentence: str) -> Tensor:
        """Raw text -> token ids (T,) with eos; a warning counts characters that are hardly ever intended."""
        warn_of_odd_characters("the text", sentence, lines=False)
        return self.binarize(self.apply_bpe(self.tokenize(sentence)))

    def decode(self, tokens: Tensor) -> str:
        """Token ids -> raw text."""
        return self.detokenize(self.remove_bpe(self.string(tokens)))

    def _start(self) -> int:
        """The token that precedes a text: bos for models trained with it, else eos."""
        return self.src_dict.bos() if getattr(self.args, "add_bos_token", False) else self.src_dict.eos()

    @torch.no_grad()
    def score(self, sentence: str | list[str], **kwargs: Any) -> Any:
        """Scores text without context: {"tokens" (T,), "positional_scores" (T,) in nats, "score": their mean}.

        Every token, the final eos included, is a target. Models are averaged in probability. A list gives a list."""
        if isinstance(sentence, list):
            return [self.score(one, **kwargs) for one in sentence]
        target = self.encode(sentence).to(self.device)
        source = torch.cat([target.new_tensor([self._start()]), target[:-1]])
        pad = self.tgt_dict.pad()
        per_model = []
        for model in self.models:
            output = model(source.unsqueeze(0), src_lengths=None, features_only=True)
            per_model.append(model.get_target_log_probs(output, target.unsqueeze(0), pad)[0])
        scores = torch.stack(per_model).logsumexp(dim=0) - math.log(len(per_model))
        return {"tokens": target.cpu(), "positional_scores": scores.cpu(), "score": scores.mean().cpu()}

    def sample(self, sentences: str | list[str], **kwargs: Any) -> Any:
        """Continues text; `kwargs` as in `generate`. The result starts with the given text. A list gives a list."""
        if isinstance(sentences, list):
            return [self.sample(one, **kwargs) for one in sentences]
        prefix = self.encode(sentences)[:-1]
        return self.decode(self.generate(prefix, **kwargs)[0]["tokens"])

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        beam: int = 1,
        max_len_b: int = 200,
        sampling: bool = False,
        sampling_topk: int = -1,
        sampling_topp: float = -1.0,
        temperature: float = 1.0,
        seed: int | None = None,
        retrieval: Any = None,
    ) -> list[dict[str, Any]]:
        """Continues token ids (T,) until eos or `max_len_b` new tokens: greedily, by beam search or by sampling.

        Sampling draws from the `sampling_topk` most likely words, or from the fewest words that hold the probability
        `sampling_topp`; without `seed` each call draws others. retrieval: what
        `fairseq.attached_retrieval.Retrieval.open` gives, with which the models are mixed; None for the models alone.
        Returns [{"tokens", "positional_scores", "score"}] with the prefix in tokens: the `beam` best ones, whose scores
        are the prefix's too (see `fairseq.sequence_generator`), or as many independent samples, with scores of new
        tokens alone."""
        pad = self.tgt_dict.pad()
        positions = self._positions(retrieval)
        if beam > 1 and not sampling:
            generator = SequenceGenerator(
                self.tgt_dict, beam, max_len_b=len(tokens) + max_len_b, temperature=temperature
            )
            return generator.search(positions, tokens.to(self.device))
        chance = int(torch.randint(1 << 31, (1,))) if seed is None else seed
        settings = ChoiceSettings(
            sampling, sampling_topk if sampling else -1, sampling_topp if sampling else -1.0, temperature,
            min_len=0, max_len_b=max_len_b, seed=chance,
        )
        symbols = Symbols((self.tgt_dict.eos(),), pad, self.tgt_dict.unk())
        (found,) = write(positions, [tokens], settings, symbols, samples=beam)
        return [
            {
                "tokens": torch.cat([tokens.cpu(), torch.tensor(written.tokens).to(tokens.cpu())]),
                "positional_scores": torch.tensor(written.log_probs),
                "score": torch.tensor(written.score),
            }
            for written in found
        ]

    def _positions(self, retrieval: Any) -> Positions:
        """Texts that the models write, with retrieval or alone; UserError for what is no retrieval for these models."""
        models, steps, key_type = list(self.models), None, None
        if retrieval is not None:
            if not hasattr(retrieval, "steps_of"):
                found, expected = type(retrieval).__name__, "what fairseq.attached_retrieval.Retrieval.open gives"
                raise UserError(f"retrieval: found a {found}, expected {expected}")
            key_type = retrieval.key_type
            steps = retrieval.steps_of(models, len(self.tgt_dict), self.device)
        needs = frozenset() if steps is None else steps.retriever.needs
        return Positions(LMSteps(models, self.tgt_dict.pad(), self._start(), key_type, needs, self.device), steps)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as `generate`."""
        return self.generate(*args, **kwargs)

    def clone(self) -> GeneratorHubInterface:
        """An independent copy."""
        return copy.deepcopy(self)
