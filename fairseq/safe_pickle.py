"""Unpickling by allow-list. Checkpoints and cluster-members files are pickles, which may name any function to call;
here only classes and functions that do nothing but hold data are reachable, and everything else is refused by name:
nothing loaded may run code. Old NumPy, SciPy, Python 2 and fairseq module names are understood."""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import copyreg
import os
import pickle
import types
from collections.abc import Iterator
from typing import IO, Any, ClassVar

import numpy as np
import torch

from fairseq.errors import BadFile, MissingFile, UserError


class RefusedGlobal(UserError):
    """A pickle that names something which is not on the allow-list."""

    def __init__(self, file: str, name: str) -> None:
        self.file, self.name = file, name
        super().__init__(
            f"{file}: found the Python object {name} inside, expected plain data only; loading it could run code, so "
            "it is refused: use a file from a source you trust, written by this package or fairseq"
        )


class Inert:
    """Stands for an object of an old class whose content is not needed (fairseq.meters of 2018-2019 checkpoints)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accepts and forgets whatever the old class was made from."""


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Bytes as protocol-2 pickles of Python 3 spell them."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
    return text.encode("latin1")


_BUILTINS = "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple"
_NUMPY = "ndarray dtype bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 longlong"
_TORCH_DTYPES = "bfloat16 bool float16 float32 float64 int8 int16 int32 int64 uint8"
_STORAGES = "BFloat16 Bool Byte Char Double Float Half Int Long Short"

ALLOWED: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("collections", "deque"): collections.deque,
    ("collections", "Counter"): collections.Counter,
    ("_codecs", "encode"): _latin1,
    ("copyreg", "_reconstructor"): getattr(copyreg, "_reconstructor"),  # noqa: B009  (typeshed does not know it)
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
}
for _name in _BUILTINS.split():
    ALLOWED["builtins", _name] = getattr(builtins, _name)
for _name in _NUMPY.split():
    ALLOWED["numpy", _name] = getattr(np, _name)
for _name in _TORCH_DTYPES.split():
    ALLOWED["torch", _name] = getattr(torch, _name)
for _name in _STORAGES.split():
    ALLOWED["torch", _name + "Storage"] = getattr(torch, _name + "Storage")
_ARRAY, _SCALAR = np.zeros(1), np.float64(0)
for _core in ("numpy.core", "numpy._core"):  # NumPy 2 moved its internals; files of either version are read by either
    ALLOWED[_core + ".multiarray", "_reconstruct"] = _ARRAY.__reduce__()[0]
    ALLOWED[_core + ".multiarray", "scalar"] = _SCALAR.__reduce__()[0]
    ALLOWED[_core + ".numeric", "_frombuffer"] = _ARRAY.__reduce_ex__(5)[0]

PYTHON2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
PYTHON2_NAMES = {("builtins", "long"): "int", ("builtins", "unicode"): "str"}
STUBBED_MODULES = ("fairseq.meters", "fairseq.logging.meters")
CSR_MODULES = ("scipy.sparse", "scipy.sparse.csr", "scipy.sparse._csr")
CSR_CLASSES = ("csr_matrix", "csr_array")


def allowed_global(file: str, module: str, name: str) -> Any:
    """What a pickle in `file` may mean by `module.name`; RefusedGlobal for everything off the list."""
    module = PYTHON2_MODULES.get(module, module)
    name = PYTHON2_NAMES.get((module, name), name)
    if (module, name) in ALLOWED:
        return ALLOWED[module, name]
    if module in STUBBED_MODULES:
        return type(name, (Inert,), {"__module__": module})
    if module in CSR_MODULES and name in CSR_CLASSES:
        import scipy.sparse  # only members files need it

        return getattr(scipy.sparse, name)
    raise RefusedGlobal(file, f"{module}.{name}")


class SafeUnpickler(pickle._Unpickler):
    """An unpickler whose globals come from `allowed_global` alone.

    It extends the Python implementation, because only there the BUILD instruction can be kept from setting attributes
    of classes and functions. Files hold few objects and large buffers, so speed does not suffer."""

    filename = "<stream>"
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """The allowed object of that name."""
        return allowed_global(self.filename, module, name)

    def load_build(self) -> None:
        """Restores an object's state, unless the "object" is itself a class or function."""
        target = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(target, type | types.FunctionType | types.BuiltinFunctionType | types.ModuleType):
            raise RefusedGlobal(self.filename, f"{getattr(target, '__name__', target)} (with changed attributes)")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def unpickler_for(file: str | os.PathLike[str]) -> type[SafeUnpickler]:
    """A SafeUnpickler class that names `file` in its refusals."""
    return type("SafeUnpickler", (SafeUnpickler,), {"filename": os.fspath(file)})


def pickle_module_for(file: str | os.PathLike[str]) -> Any:
    """What `torch.load(pickle_module=...)` needs, with a SafeUnpickler inside."""
    unpickler = unpickler_for(file)
    module = types.ModuleType("safe_pickle")
    module.Unpickler = unpickler  # type: ignore[attr-defined]
    module.load = lambda stream, **kwargs: unpickler(stream, **kwargs).load()  # type: ignore[attr-defined]
    return module


@contextlib.contextmanager
def pickle_errors(file: str | os.PathLike[str], expected: str) -> Iterator[None]:
    """Turns what a damaged pickle makes Python raise into a BadFile about `file`."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MissingFile(file) from error
    except OSError as error:
        raise BadFile(file, f"a file that cannot be read ({error.strerror})", expected, "check the path") from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        AssertionError,
        RuntimeError,
        OverflowError,
        MemoryError,
    ) as error:
        detail = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise BadFile(
            file, f"damaged or foreign content ({detail})", expected, "copy or make the file again"
        ) from error


def load_stream(stream: IO[bytes], file: str | os.PathLike[str]) -> Any:
    """The object pickled in `stream`, which errors call `file`."""
    with pickle_errors(file, "a pickle of plain data"):
        return unpickler_for(file)(stream).load()


def load(path: str | os.PathLike[str]) -> Any:
    """The object pickled in the file `path`: RefusedGlobal for code, MissingFile, or BadFile when damaged.

    Arrays inside are not checked against each other (CSR indices may be out of range): the reader must."""
    with pickle_errors(path, "a pickle of plain data"), open(path, "rb") as stream:
        return unpickler_for(path)(stream).load()
