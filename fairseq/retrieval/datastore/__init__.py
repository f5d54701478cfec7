"""The datastore: keys and values on disk, what their bytes are, their writer, and which artefacts were made from which
datastore."""

from fairseq.retrieval.datastore.layout import keys_path, values_path, weights_path
from fairseq.retrieval.datastore.raw_arrays import KEY_DTYPES, VALUE_DTYPES
from fairseq.retrieval.datastore.reader import (
    KIND,
    Datastore,
    count_filled_rows,
    read_keys,
    read_weights,
    value_range,
)

__all__ = [
    "KEY_DTYPES",
    "KIND",
    "VALUE_DTYPES",
    "Datastore",
    "count_filled_rows",
    "keys_path",
    "read_keys",
    "read_weights",
    "value_range",
    "values_path",
    "weights_path",
]
