"""Results of earlier runs on disk: scored sequences, and the search results of an index."""
