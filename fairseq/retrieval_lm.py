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
from fairseq.errors import UserError
from fairseq.evaluation.lm_scoring import LMScoring
from fairseq.files.odd_characters import warn_of_odd_characters
from fairseq.hub_utils import sample_word
from fairseq.key_types import keys_of
from fairseq.knnlm import KNNLM, build_knnlm
from fairseq.retrieval.retrievers import Candidates, Step
from fairseq.retrieval.voting import count_votes
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

    @classmethod
    def open(cls, path: str, data: str, **settings: Any) -> RetrievalLM:
        """The model in the checkpoint `path` with the dictionary of the folder `data`, and the datastore that the
        settings name. UserError (one sentence) for files that do not exist, do not fit together or belong to another
        model, and for invalid settings.

        settings: `eval_lm.py`'s flags, such as dstore_filename, indexfile, index="exact", members, k, lmbda, knn_temp,
        min_knns, max_knns, strategy and its own flags, probe, knn_sim_func, context_window, max_tokens, user_dir, cpu.
        """
        retrieves = settings.get("dstore_filename") is not None
        words = [data, "--path", path, *(["--knnlm"] if retrieves else []), *options.as_words(settings)]
        utils.import_user_module(argparse.Namespace(user_dir=settings.get("user_dir")))
        parser = options.get_eval_lm_parser()
        parser.prog = "eval_lm.py"  # whose --help an error names
        args = options.parse_args_and_arch(parser, words)
        scoring = LMScoring.of_models(args)
        if not retrieves:
            return cls(scoring, None)
        device = scoring.device if args.knnlm_gpu else torch.device("cpu")
        return cls(scoring, build_knnlm(args, scoring.key_dimension, device))

    def score_text(self, text: str) -> ScoredText:
        """Scores a text as `preprocess.py` and `eval_lm.py` would: words separated by spaces, each line with its end.
        Unknown words are `<unk>`. UserError for a text without a word."""
        sequences = [sequence for sequence in self._scored(self._lines(text)) if len(sequence)]
        results = None if self.knnlm is None else self.knnlm.score(sequences)
        targets = torch.cat([sequence.targets for sequence in sequences])
        lm = torch.cat([sequence.lm_log_probs for sequence in sequences]).numpy()
        symbols = [self.dictionary[token] for token in targets.tolist()]
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
        next."""
        knnlm = self._with_datastore("neighbours")
        query = self._prompt(text)[1][-1:]
        distances, ids = knnlm.index.search(query.float().to(knnlm.device), min(k, knnlm.index.count))
        return [
            Neighbour(entry, distance, self._text(entry, entry + 1), self._text(max(0, entry - CONTEXT), entry))
            for entry, distance in zip(ids[0].tolist(), distances[0].tolist(), strict=True)
            if entry >= 0
        ]

    @torch.no_grad()
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
        """The text with at most `max_len_b` further tokens, until the line ends: the most likely ones of the mixture,
        or sampled from it. Retrieval follows the text and what is generated, as in an evaluation."""
        random = torch.Generator()
        if seed is not None:
            random.manual_seed(seed)
        tokens, queries, state, log_probs = self._prompt(text)
        mixture = _Mixture(self.knnlm) if self.knnlm is not None else None
        if mixture is not None:
            for query, token in zip(queries[:-1], tokens, strict=True):
                mixture.next_log_probs(query, None)
                mixture.observe(int(token))
        words, query = list(tokens.tolist()), queries[-1]
        room = min(max_len_b, self._longest() - len(words) - 1)
        for _ in range(room):
            log_probs[self.dictionary.pad()] = -math.inf
            mixed = log_probs if mixture is None else mixture.next_log_probs(query, log_probs)
            word = sample_word(mixed, sampling_topk, sampling_topp, temperature, random) if sampling else mixed.argmax()
            if int(word) == self.dictionary.eos():
                break
            words.append(int(word))
            if mixture is not None:
                mixture.observe(words[-1])
            query, log_probs = self._forward(torch.tensor([self._start(), *words]), state)
            query = query[-1]
        return str(self.dictionary.string(torch.tensor(words, dtype=torch.int64)))

    # -- what these are made of

    def _lines(self, text: str) -> list[Tensor]:
        if not text.split():
            raise UserError(f"text: found {text!r}, expected at least one word; give a text")
        warn_of_odd_characters("text", text)
        lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
        return [self.dictionary.encode_line(line, add_if_not_exist=False) for line in lines]

    def _scored(self, lines: list[Tensor]) -> list[ScoredSequence]:
        scoring = self.scoring.on_text(lines)
        scoring.warn_of_skipped()
        sequences = [sequence for batch in scoring.batches() for sequence in scoring.score(batch)]
        return sorted(sequences, key=lambda sequence: sequence.sample_id)

    def _text(self, first: int, end: int) -> str:
        values = self._with_datastore("its text").values[first:end].cpu().tolist()
        return " ".join(self.dictionary[value] for value in values)

    def _with_datastore(self, what: str) -> KNNLM:
        if self.knnlm is None:
            raise UserError(f"{what}: this model was opened without a datastore; give dstore_filename and indexfile")
        return self.knnlm

    def _start(self) -> int:
        add_bos = getattr(self.scoring.effective_args, "add_bos_token", False)
        return int(self.dictionary.bos() if add_bos else self.dictionary.eos())

    def _longest(self) -> int:
        return int(self.scoring.models[0].max_positions())

    def _prompt(self, text: str) -> tuple[Tensor, Tensor, dict[str, Any], Tensor]:
        """A prompt's token ids (T,), the queries (T + 1, D) for them and for the token after, the model's state, and
        its log-probabilities (V,) of the token after. An empty prompt has the start alone."""
        if len(self.scoring.models) > 1:
            raise UserError("path: found several models, expected one to look at prompts; name one checkpoint")
        warn_of_odd_characters("text", text, lines=False)
        tokens = self.dictionary.encode_line(" ".join(text.split()), add_if_not_exist=False, append_eos=False).long()
        if len(tokens) + 1 > self._longest():
            found = f"{len(tokens)} tokens"
            raise UserError(f"text: found {found}, expected at most the model's {self._longest() - 1}; shorten it")
        state: dict[str, Any] = {}
        queries, log_probs = self._forward(torch.cat([torch.tensor([self._start()]), tokens]), state)
        return tokens, queries, state, log_probs

    @torch.no_grad()
    def _forward(self, words: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Queries (n, D) of the words not seen before, and the log-probabilities (V,) of the token after the last."""
        model = self.scoring.models[0]
        output, extra = model(words.unsqueeze(0).to(self.scoring.device), incremental_state=state)
        log_probs = model.get_normalized_probs((output[:, -1:], extra), True, None)[0, 0].float().cpu()
        positions, key_type = output.shape[1], self.scoring.scorer.key_type
        queries = output.new_zeros(positions, 0) if key_type is None else keys_of(key_type, extra, 1, positions)[:, 0]
        return queries.float().cpu(), log_probs


class _Mixture:
    """The retrieval step while a text is generated: probabilities of all tokens, then `observe` with the chosen
    token."""

    def __init__(self, knnlm: KNNLM) -> None:
        self.knnlm, self.retriever, self.position = knnlm, knnlm.retriever.twin(), 0
        if self.retriever.needs:
            raise UserError("--strategy: this one needs features of the model, which are not computed while writing")
        self.retriever.start()

    def next_log_probs(self, query: Tensor, lm_log_probs: Tensor | None) -> Tensor:
        """log(lmbda p_kNN + (1 - lmbda) p_LM) of all tokens (V,), nats; empty when the model's are not given."""
        device = self.knnlm.device
        number = torch.zeros(1, dtype=torch.int64, device=device)
        self.step = Step(number, number + self.position, query.view(1, -1).to(device), {})
        self.retrieved = self.knnlm.retrieve(self.step, self.retriever)
        if lm_log_probs is None:
            return torch.zeros(0)
        proposal, searched, given = self.retrieved
        candidates = Candidates.of(1, searched, given, self.knnlm.values, self.knnlm.temperature)
        lmbda = self.knnlm.lmbda if proposal.lmbda is None else float(proposal.lmbda[0])
        _, values, probabilities = candidates.distribution()
        mixed = (1 - lmbda) * lm_log_probs.exp()
        mixed[values.cpu()] += lmbda * probabilities.cpu()
        return mixed.log()

    def observe(self, token: int) -> None:
        """Takes the token that was chosen."""
        _, searched, given = self.retrieved
        target = torch.tensor([token], device=self.knnlm.device)
        outcome = count_votes(searched, given, self.knnlm.values, target, self.knnlm.inverse_temperatures)
        self.retriever.observe(self.step, outcome.matched)
        self.position += 1


__all__ = ["Neighbour", "RetrievalLM", "ScoredText"]
