"""Writing text with a language model, alone or with retrieval: greedily, by sampling, by beam search, with drafts."""
