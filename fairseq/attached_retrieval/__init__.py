"""Retrieval for a causal language model of transformers that is a Python object already: while it is attached, the
model's logits are the log-probabilities of the mixture, in its own forward pass, its loss and its `generate`.

    retrieval = Retrieval.open(dstore_filename="law/dstore16", indexfile="law/knn.index", k=1024, lmbda=0.25)
    with retrieval.attached_to(lm):
        loss = lm(input_ids, labels=input_ids).loss"""

from __future__ import annotations

from fairseq.attached_retrieval.attachment import Attachment
from fairseq.attached_retrieval.retrieval import Retrieval

__all__ = ["Attachment", "Retrieval"]
