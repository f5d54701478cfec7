"""A datastore with its settings, opened once, for any number of models."""

from __future__ import annotations

import argparse
import logging
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from fairseq import options, refusals, utils
from fairseq.attached_retrieval.attachment import Attachment, require_free
from fairseq.checkpoint_utils import weights_fingerprint
from fairseq.data.token_ids import TokenIds
from fairseq.errors import BadFlag, MissingFile, UserError
from fairseq.flag_types import Parser
from fairseq.flags.layouts import EVALUATION
from fairseq.key_types import DEFAULT as DEFAULT_KEY_TYPE
from fairseq.key_types import keys_of
from fairseq.knnlm import KNNLM, build_knnlm
from fairseq.models.huggingface import Collector, wrapped
from fairseq.retrieval.datastore import values_path
from fairseq.retrieval.datastore.provenance import check_query_model
from fairseq.retrieval.flag_conflicts import flag, strategy_name
from fairseq.retrieval.open_stores import require_stores
from fairseq.retrieval.retrievers import RETRIEVER_REGISTRY
from fairseq.retrieval_steps import RetrievalSteps

logger = logging.getLogger(__name__)

GROUPS = ("Retrieval", "Datastore", "Search index", "Pointers of RetoMaton")  # of eval_lm's flags
OTHERS = ("--knn-module", "--seed", "--force", "--user-dir")
NOT_HERE = ("--knnlm", "--lockstep-tokens", "--index-recall", "--target-foss-subset", "--target-foss-tokens")


class Retrieval:
    """What `open` opened: the settings, and the files once a model tells the width of its keys."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.key_type: str = args.knn_keytype or DEFAULT_KEY_TYPE
        self._opened: dict[tuple[int, int, str], KNNLM] = {}

    @classmethod
    def open(cls, dstore_filename: str | None = None, **settings: Any) -> Retrieval:
        """The datastore with the prefix `dstore_filename`, or in the folder `dstore_dir`, and how to use it.

        settings: `eval_lm.py`'s flags of retrieval, such as indexfile or index="exact", members, k, lmbda, knn_temp,
        min_knns, max_knns, strategy and its own flags, probe, knn_sim_func, knn_keytype, knn_module. UserError (one
        sentence) for files that do not exist and for invalid settings."""
        if dstore_filename is not None:
            settings["dstore_filename"] = dstore_filename
        refusals.reset()
        utils.import_user_module(argparse.Namespace(user_dir=settings.get("user_dir")))
        _refuse_others(settings)
        parser = options.get_eval_lm_parser()
        parser.prog = "eval_lm.py"  # whose --help an error names
        args = options.parse_args_and_arch(parser, [".", "--knnlm", *options.as_words(settings)])
        require_stores(args)
        for path in (values_path(args.dstore_filename), args.indexfile, args.members):
            if path is not None and not os.path.exists(path):
                raise MissingFile(path, "check dstore_filename, indexfile and members")
        return cls(args)

    def attached_to(self, model: Any) -> Attachment:
        """Retrieval in the passes of `model`, a causal language model of transformers, until the end of a `with`
        statement, or until `detach`: its logits are then log-probabilities of the mixture (float32, nats), its loss
        and `generate` follow from them. Rows of a batch have states of their own; where attention_mask is 0 there is
        neither retrieval nor state.

        UserError for a model in training mode, of a kind that is not understood, or for which the datastore was not
        saved, as far as its sidecar says."""
        if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
            found = type(model).__name__
            raise UserError(f"attached_to: found a {found}, expected a causal language model of transformers")
        if model.training:
            raise UserError("attached_to: found a model in training mode, expected one in evaluation mode; call eval()")
        require_free(model)
        collector, width, vocabulary = self._look_at(model)
        return Attachment(model, self._knnlm(width, vocabulary, model.device), self.key_type, collector)

    @torch.no_grad()
    def steps_of(self, models: Sequence[Any], vocabulary: int, device: torch.device) -> RetrievalSteps:
        """Retrieval that follows what models of this package write, of which the first makes the queries, and whose
        dictionary has `vocabulary` words; fairseq's hub interface uses it. UserError for a datastore of other models,
        as far as its sidecar says."""
        refusals.reset(self.args.force)
        query_model = {
            "weights": [_fingerprint(model, model) for model in models],
            "vocabulary": vocabulary, "key_type": self.key_type, "precision": _precision(models[0]),
        }
        places = ["this model", "this model", "this model", "knn_keytype", "knn_module"]
        compared = check_query_model(self.args.dstore_filename, query_model, places)
        RETRIEVER_REGISTRY[strategy_name(self.args)].check_query_model(self.args, query_model, places)
        self._warn_of_unknown_source(compared)
        models[0].decoder.knn_keytype = self.key_type  # whose activations it gives from now on
        tokens = torch.full((1, 1), models[0].decoder.dictionary.eos(), device=device)
        width = keys_of(self.key_type, models[0](tokens)[1], 1, 1).shape[-1]
        return RetrievalSteps(self._knnlm(width, vocabulary, device))

    def _warn_of_unknown_source(self, compared: Sequence[str]) -> None:
        if "weights" not in compared:
            said = "%s: whether it was saved with this model is not known, as it has no sidecar that tells"
            logger.warning(said, self.args.dstore_filename)

    @torch.no_grad()
    def _look_at(self, model: Any) -> tuple[Collector, int, int]:
        """Its activations, the width of its keys, the size of its vocabulary; refuses a model of another datastore."""
        refusals.reset(self.args.force)
        lm = wrapped(model, TokenIds(0, "", -1, ""), self.key_type, self.args.knn_module)
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        collector = lm.decoder.collector
        query_model = {
            "weights": [_fingerprint(model, lm)], "key_type": self.key_type, "key_module": collector.module,
            "precision": _precision(model),
        }
        module = "knn_module" if self.args.knn_module is not None else f"{name}, found without knn_module"
        places = [str(name), str(name), str(name), "knn_keytype", module]
        compared = check_query_model(self.args.dstore_filename, query_model, places)
        RETRIEVER_REGISTRY[strategy_name(self.args)].check_query_model(self.args, query_model, places)
        self._warn_of_unknown_source(compared)
        tokens = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        with collector.collecting() as collected:
            logits = model(input_ids=tokens).logits
        return collector, keys_of(self.key_type, collector.extra(collected, 1, 1), 1, 1).shape[-1], logits.shape[-1]

    def _knnlm(self, width: int, vocabulary: int, device: torch.device) -> KNNLM:
        """The open files, for queries of this width and values below `vocabulary`."""
        where = str(device) if self.args.knnlm_gpu else "cpu"
        key = (width, vocabulary, where)
        if key not in self._opened:
            self._opened[key] = build_knnlm(self.args, width, where, vocabulary=vocabulary)
        return self._opened[key]


_digests: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def _fingerprint(model: Any, lm: Any) -> str:
    """The digest of the weights, computed again when a parameter has changed."""
    versions = [(tensor.data_ptr(), tensor._version) for tensor in model.state_dict().values()]
    if model not in _digests or _digests[model][0] != versions:
        _digests[model] = versions, weights_fingerprint(lm)
    return _digests[model][1]


def _precision(model: Any) -> str:
    """The numbers that a model computes with, as sidecars name them."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def is_setting(name: str, strategy: str | None = None) -> bool:
    """Whether `Retrieval.open` knows a setting of this name; strategy: the chosen one, which may have its own (of any
    strategy without it)."""
    known = {*" ".join(EVALUATION.groups[group] for group in GROUPS).split(), *OTHERS} - {*NOT_HERE}
    parser = Parser(add_help=False, conflict_handler="resolve")
    for chosen, cls in RETRIEVER_REGISTRY.items():
        if strategy in (None, chosen):
            cls.add_args(parser)
    return flag(name) in known | {option for action in parser._actions for option in action.option_strings}


def _refuse_others(settings: dict[str, Any]) -> None:
    """BadFlag for a setting that has nothing to do with retrieval."""
    for name in settings:
        if not is_setting(name, settings.get("strategy") or "retomaton"):
            raise BadFlag(flag(name), "it here", "a setting of retrieval", "see docs/python.md")
