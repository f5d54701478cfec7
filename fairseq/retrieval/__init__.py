"""Retrieval: datastore, index, clusters, automaton and strategies. It imports nothing of the language model's side;
what it knows of language models is `fairseq.scored_sequences`."""
