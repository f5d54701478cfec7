"""The datastore: keys and values on disk, detection of their types, their writer, and the record of which datastore an
artefact was made from."""

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
