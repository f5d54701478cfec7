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
from fairseq.errors import MissingFile
from fairseq.files.odd_characters import warn_of_odd_characters
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
    ) -> list[dict[str, Any]]:
        """Continues token ids (T,) until eos or `max_len_b` new tokens: greedily, by beam search or by sampling.

        Sampling draws from the `sampling_topk` most likely words, or from the fewest words that hold the probability
        `sampling_topp`. Returns [{"tokens", "positional_scores"}] with the prefix in tokens: the `beam` best ones (see
        `fairseq.sequence_generator`), or as many independent samples."""
        if beam > 1 and not sampling:
            limit = len(tokens) + max_len_b
            generator = SequenceGenerator(self.tgt_dict, beam, max_len_b=limit, temperature=temperature)
            prefix = tokens.to(self.device).unsqueeze(0)
            return generator.generate(list(self.models), {}, prefix, self._start())[0]
        random = torch.Generator(device=self.device)
        if seed is not None:
            random.manual_seed(seed)
        return [
            self._continue(
                tokens.to(self.device), max_len_b, sampling, sampling_topk, sampling_topp, temperature, random
            )
            for _ in range(beam)
        ]

    def _continue(
        self,
        prefix: Tensor,
        max_len: int,
        sampling: bool,
        topk: int,
        topp: float,
        temperature: float,
        generator: torch.Generator,
    ) -> dict[str, Any]:
        words = torch.cat([prefix.new_tensor([self._start()]), prefix]).unsqueeze(0)
        states: list[dict[str, Any]] = [{} for _ in self.models]
        scores: list[Tensor] = []
        limit = min(model.max_positions() for model in self.models)
        for _ in range(min(max_len, limit - words.size(1))):
            log_probs = self._next_log_probs(words, states)
            if sampling:
                word = sample_word(log_probs, topk, topp, temperature, generator)
            else:
                word = log_probs.argmax().view(1)
            words = torch.cat([words, word.view(1, 1)], dim=1)
            scores.append(log_probs[word])
            if int(word) == self.tgt_dict.eos():
                break
        new = torch.cat(scores) if scores else torch.zeros(0)
        return {"tokens": words[0, 1:].cpu(), "positional_scores": new.cpu()}

    def _next_log_probs(self, words: Tensor, states: list[dict[str, Any]]) -> Tensor:
        """Log-probabilities (V,) of the word after `words` (1, T), averaged over the models; pad is impossible."""
        per_model = []
        for model, state in zip(self.models, states):
            features, extra = model(words, incremental_state=state)
            per_model.append(model.get_normalized_probs((features[:, -1:], extra), True, None)[0, 0].float())
        log_probs = torch.stack(per_model).logsumexp(dim=0) - math.log(len(per_model))
        log_probs[self.tgt_dict.pad()] = -torch.inf
        return log_probs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as `generate`."""
        return self.generate(*args, **kwargs)

    def clone(self) -> GeneratorHubInterface:
        """An independent copy."""
        return copy.deepcopy(self)


def sample_word(log_probs: Tensor, topk: int, topp: float, temperature: float, generator: torch.Generator) -> Tensor:
    """One word id (1,) drawn from log_probs (V,) within the given limits."""
    probs = torch.softmax(log_probs / temperature, dim=0)
    values, words = probs.topk(min(topk, probs.numel()) if topk > 0 else probs.numel())
    if topp > 0:
        values = values.masked_fill(values.cumsum(0) - values >= topp, 0.0)
    return words[torch.multinomial(values, 1, generator=generator)]
