"""Language model and datastore as one Python object: score a text, look at a token's neighbours, continue a prompt.

    lm = RetrievalLM.open("checkpoint_best.pt", "data-bin", dstore_filename="dstore/dstore16", indexfile="knn.index")
    lm.score_text("the same words as ever").perplexity

Settings are keyword arguments with the names of `eval_lm.py`'s flags, and the same files are opened as by the
command."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairseq import options, utils
from fairseq.data.token_ids import TokenIds
from fairseq.errors import UserError
from fairseq.evaluation.datastore_pass import check_source
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.files.odd_characters import warn_of_odd_characters
from fairseq.generation.choice import ChoiceSettings, is_number
from fairseq.generation.lm_steps import LMSteps
from fairseq.generation.positions import Positions
from fairseq.generation.texts import checked_text, texts_of
from fairseq.generation.writing import write
from fairseq.knnlm import KNNLM, build_knnlm
from fairseq.retrieval_steps import RetrievalSteps
from fairseq.scored_sequences import ScoredSequence

CONTEXT = 20  # tokens of an entry's text that a Neighbour shows


@dataclass(frozen=True)
class ScoredText:
    """A text's tokens and their log-probabilities; arrays are (T,), logarithms in nats.

    log_probs: of the mixture; lm_log_probs: of the model; knn_log_probs: of retrieval (-10000 where no candidate has
    the right value, minus infinity without candidates); lmbda: retrieval's weight; searched: whether the index was
    searched. Without a datastore log_probs are the model's, and lmbda is zero."""

    tokens: list[str]
    log_probs: NDArray[np.float32]
    lm_log_probs: NDArray[np.float32]
    knn_log_probs: NDArray[np.float32]
    lmbda: NDArray[np.float32]
    searched: NDArray[np.bool_]

    @property
    def perplexity(self) -> float:
        """Perplexity per token, the end of each line included."""
        return math.exp(-float(self.log_probs.astype(np.float64).mean()))

    @property
    def lm_perplexity(self) -> float:
        """Perplexity per token of the model alone."""
        return math.exp(-float(self.lm_log_probs.astype(np.float64).mean()))

    @property
    def searches_saved(self) -> float:
        """The fraction of saved searches (FoSS)."""
        return 1 - float(self.searched.mean())


@dataclass(frozen=True)
class Neighbour:
    """A datastore entry near a context: its number, its distance, the token that followed it, and the text before
    that."""

    entry: int
    distance: float
    token: str
    context: str


class RetrievalLM:
    """A language model with a datastore, or without one. Made by `open`."""

    def __init__(self, scoring: LMScoring, knnlm: KNNLM | None) -> None:
        self.scoring, self.knnlm = scoring, knnlm
        self.dictionary = scoring.task.source_dictionary
        own = argparse.Namespace(**{**vars(scoring.args), "tokenizer": None, "bpe": None})  # words, tokenised already
        own.add_bos_token = getattr(scoring.effective_args, "add_bos_token", False)
        self.texts = texts_of(self.dictionary, own)
        key_type, needs = scoring.scorer.key_type, frozenset() if knnlm is None else knnlm.retriever.needs
        start, pad = self.texts.start, self.dictionary.pad()
        self._lm = LMSteps(scoring.models, pad, start, key_type, needs, scoring.device)

    @classmethod
    def open(cls, path: str, data: str, **settings: Any) -> RetrievalLM:
        """The model in the checkpoint, or the Hugging Face model folder, `path` with the dictionary, or the tokenizer,
        of the folder `data`, and the datastore that the settings name. UserError (one sentence) for files that do not
        exist, do not fit together or belong to another model, and for invalid settings.

        settings: `eval_lm.py`'s flags, such as dstore_filename, indexfile, index="exact", members, k, lmbda, knn_temp,
        min_knns, max_knns, strategy and its own flags, probe, knn_sim_func, context_window, max_tokens, user_dir, cpu.
        """
        retrieves = any(settings.get(name) is not None for name in ("dstore_filename", "dstore_dir"))
        words = [data, "--path", path, *(["--knnlm"] if retrieves else []), *options.as_words(settings)]
        utils.import_user_module(argparse.Namespace(user_dir=settings.get("user_dir")))
        parser = options.get_eval_lm_parser()
        parser.prog = "eval_lm.py"  # whose --help an error names
        args = options.parse_args_and_arch(parser, words)
        scoring = LMScoring.of_models(args)
        if not retrieves:
            return cls(scoring, None)
        device = scoring.device if args.knnlm_gpu else torch.device("cpu")
        check_source(scoring, args)
        vocabulary = len(scoring.task.target_dictionary)
        return cls(scoring, build_knnlm(args, scoring.key_dimension, device, vocabulary=vocabulary))

    def score_text(self, text: str) -> ScoredText:
        """Scores a text as `preprocess.py` and `eval_lm.py` would: words separated by spaces, each line with its end.
        Unknown words are `<unk>`. With a Hugging Face model any text, spaces and special tokens included, as one
        document without an end. UserError for a text without a word (there: without a token)."""
        sequences = [sequence for sequence in self._scored(self._lines(text)) if len(sequence)]
        results = None if self.knnlm is None else self.knnlm.score(sequences)
        targets = torch.cat([sequence.targets for sequence in sequences])
        lm = torch.cat([sequence.lm_log_probs for sequence in sequences]).numpy()
        symbols = [self.texts.name(token) for token in targets.tolist()]
        if results is None:
            nothing = np.zeros(len(lm), np.float32)
            return ScoredText(symbols, lm, lm, nothing - np.inf, nothing, nothing.astype(bool))

        def joined(name: str) -> NDArray[Any]:
            return np.concatenate([np.asarray(getattr(result, name)) for result in results])

        parts = (joined(name) for name in ("log_probs", "knn_log_probs", "lmbda", "searched"))
        log_probs, knn, lmbda, searched = parts
        return ScoredText(symbols, log_probs, lm, knn, lmbda, searched)

    def neighbours(self, text: str, k: int = 8) -> list[Neighbour]:
        """The `k` entries nearest to the end of a text, nearest first: what retrieval finds for the token that comes
        next. UserError for a `k` that is no integer of at least 1; all entries for one that is larger."""
        knnlm = self._with_datastore("neighbours")
        if not is_number("int", k) or k < 1:
            raise UserError(f"k: found {repr(k)[:80]}, expected an integer of at least 1")
        query = self._lm.begin([self._prompt(text)]).queries[0, -1:]
        distances, ids = knnlm.index.search(query.float().to(knnlm.device), min(int(k), knnlm.index.count))
        return [
            Neighbour(entry, distance, self._token(entry), self._text(max(0, entry - CONTEXT), entry))
            for entry, distance in zip(ids[0].tolist(), distances[0].tolist(), strict=True)
            if entry >= 0
        ]

    def continue_text(
        self,
        text: str,
        max_len_b: int = 50,
        sampling: bool = False,
        sampling_topk: int = -1,
        sampling_topp: float = -1.0,
        temperature: float = 1.0,
        seed: int | None = None,
    ) -> str:
        """The text with at most `max_len_b` further tokens, until it ends: the most likely ones of the mixture, or
        sampled from it. Retrieval follows the text and what is generated, as in an evaluation."""
        chance = int(torch.randint(1 << 31, (1,))) if seed is None else seed
        settings = ChoiceSettings(
            sampling, sampling_topk, sampling_topp, temperature, min_len=0, max_len_b=max_len_b, seed=chance
        )
        prompt = self._prompt(text)
        positions = Positions(self._lm, None if self.knnlm is None else RetrievalSteps(self.knnlm))
        written = write(positions, [prompt], settings, self.texts.symbols)[0][0]
        return self.texts.decode([*prompt.tolist(), *written.tokens])

    # -- what these are made of

    def _lines(self, text: str) -> list[Tensor]:
        if isinstance(self.dictionary, TokenIds):
            tokens = self.texts.encode(text)
            if not len(tokens):
                raise UserError(f"text: found {text!r}, expected at least one token; give a text")
            return [tokens]
        if not checked_text(text).split():
            raise UserError(f"text: found {text!r}, expected at least one word; give a text")
        warn_of_odd_characters("text", text)
        lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
        return [self.dictionary.encode_line(line, add_if_not_exist=False) for line in lines]

    def _scored(self, lines: list[Tensor]) -> list[ScoredSequence]:
        scoring = self.scoring.on_text(lines)
        scoring.warn_of_skipped()
        sequences = [sequence for batch in scoring.batches() for sequence in scoring.score(batch)]
        return sorted(sequences, key=lambda sequence: sequence.sample_id)

    def _token(self, entry: int) -> str:
        return self.texts.name(int(self._with_datastore("its text").values[entry]))

    def _text(self, first: int, end: int) -> str:
        values = self._with_datastore("its text").values[first:end].cpu().tolist()
        if isinstance(self.dictionary, TokenIds):
            return self.texts.decode(values)
        return " ".join(self.dictionary[value] for value in values)

    def _with_datastore(self, what: str) -> KNNLM:
        if self.knnlm is None:
            raise UserError(f"{what}: this model was opened without a datastore; give dstore_filename and indexfile")
        return self.knnlm

    def _prompt(self, text: str) -> Tensor:
        """A prompt's token ids (T,); UserError for one that the model cannot read."""
        if not isinstance(self.dictionary, TokenIds):
            warn_of_odd_characters("text", checked_text(text), lines=False)
        tokens = self.texts.encode(text)
        if self.texts.start < 0 and not len(tokens):
            raise UserError("text: found no token, expected one: the tokenizer has neither BOS nor EOS to begin with")
        most = self._lm.longest - 1
        if len(tokens) > most:
            raise UserError(f"text: found {len(tokens)} tokens, expected at most the model's {most}; shorten it")
        return tokens


__all__ = ["Neighbour", "RetrievalLM", "ScoredText"]
