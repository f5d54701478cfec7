"""A model of lm-evaluation-harness (0.4.13): its own Hugging Face model, to which retrieval is attached.

This module imports lm_eval; nothing else of the package does."""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from fairseq.attached_retrieval.retrieval import Retrieval, is_setting
from fairseq.errors import UserError

NAME = "hf-retrieval"  # as --model of the command


@register_model(NAME)
class RetrievalHFLM(HFLM):
    """`HFLM` whose probabilities, and texts, are those of the mixture. Each request is a text of its own: retrieval
    begins anew with its first token.

    pretrained: a model folder, a name on the Hub, or a model object; retrieval: what to attach to it. Without it, the
    keyword arguments that are settings of `Retrieval.open` open it; all others go to `HFLM`. UserError for a datastore
    of another model, and for models that are no causal language models."""

    def __init__(self, pretrained: Any, retrieval: Retrieval | None = None, **settings: Any) -> None:
        if settings.get("trust_remote_code"):
            found, expected = "trust_remote_code", "a model of the transformers library itself"
            raise UserError(f"{NAME}: found {found}, expected {expected}; code of a model's folder is never run")
        own = {name: value for name, value in settings.items() if is_setting(name)}
        if retrieval is not None and own:
            raise UserError(f"{NAME}: found {', '.join(own)} beside retrieval, expected one of the two")
        self.retrieval = Retrieval.open(**own) if retrieval is None else retrieval
        super().__init__(pretrained, **{name: value for name, value in settings.items() if name not in own})
        if self.backend != "causal":
            raise UserError(f"{NAME}: found a model with an encoder, expected a causal language model")
        self.attachment = self.retrieval.attached_to(self.model)

    def detach(self) -> None:
        """Takes retrieval off the model, which stays usable without it."""
        self.attachment.detach()
