"""The datastore: keys and values on disk, their writer, and which artefacts were made from which datastore."""

from fairseq.retrieval.datastore.reader import (
    KEY_DTYPES,
    KIND,
    VALUE_DTYPES,
    Datastore,
    count_filled_rows,
    keys_path,
    read_weights,
    values_path,
    weights_path,
)

__all__ = [
    "KEY_DTYPES",
    "KIND",
    "VALUE_DTYPES",
    "Datastore",
    "count_filled_rows",
    "keys_path",
    "read_weights",
    "values_path",
    "weights_path",
]
