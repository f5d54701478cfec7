"""Scoring a text with a model, saving a datastore, sweeps of settings, the doctor, and counting of words and
searches."""
