"""Unpickling by allow-list. Checkpoints and cluster-members files are pickles, which can name any function to call.
Here only classes and functions that construct data are allowed, and everything else is refused by name, so that loading
a file cannot run code, and a small file cannot fill the memory (`pickle_calls` checks the arguments of every call). Old
module names of NumPy, SciPy, Python 2 and fairseq are understood."""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import copyreg
import os
import pickle
import struct
import types
from collections.abc import Hashable, Iterator
from typing import IO, Any, ClassVar

import numpy as np
import torch

from fairseq.errors import BadFile, MissingFile, UserError, unreadable
from fairseq.files.inputs import open_input
from fairseq.files.pickle_calls import call_checks, is_key, is_state


class RefusedGlobal(UserError):
    """A pickle that names something which is not on the allow-list."""

    def __init__(self, file: str, name: str) -> None:
        name = name if name.isprintable() else ascii(name)
        self.file, self.name = file, name
        super().__init__(
            f"{file}: found the Python object {name} inside, expected plain data only; loading it could run code, so "
            "it is refused: use a file from a source you trust, written by this package or fairseq"
        )


class Inert:
    """Replaces objects of old classes whose content is not needed (fairseq.meters in checkpoints of 2018 and 2019)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accepts and ignores all arguments of the old class."""


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

CALLS = call_checks(
    _latin1,
    ALLOWED["copyreg", "_reconstructor"],
    ALLOWED["numpy.core.multiarray", "_reconstruct"],
    ALLOWED["numpy.core.multiarray", "scalar"],
    ALLOWED["numpy.core.numeric", "_frombuffer"],
)
PYTHON2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
PYTHON2_NAMES = {("builtins", "long"): "int", ("builtins", "unicode"): "str"}
STUBBED_MODULES = ("fairseq.meters", "fairseq.logging.meters")
CSR_MODULES = ("scipy.sparse", "scipy.sparse.csr", "scipy.sparse._csr")
CSR_CLASSES = ("csr_matrix", "csr_array")


def allowed_global(file: str, module: str, name: str) -> Any:
    """The object for `module.name` in a pickle in `file`; RefusedGlobal for everything that is not on the list."""
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
    """An unpickler whose globals come from `allowed_global` alone, and whose calls and keys are checked.

    It extends the Python implementation, because only there single instructions can be replaced. Files hold few objects
    and large buffers, so speed does not suffer."""

    filename = "<stream>"
    record_sizes: ClassVar[dict[str, int] | None] = None  # bytes of each tensor in a zip container, by its key
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(self, file: IO[bytes], **kwargs: Any) -> None:
        """Reads from `file`, but never requests more bytes than it has, which would allocate memory for them."""
        super().__init__(file, **kwargs)
        position = file.tell()
        end = file.seek(0, os.SEEK_END)
        file.seek(position)
        self.bytes_in_file = end

        def read(count: int) -> bytes:
            left = end - file.tell()
            if count > left:
                raise EOFError(f"{count} bytes announced where {left} are left")
            return file.read(count)

        self._file_read = read

    def find_class(self, module: str, name: str) -> Any:
        """The allowed object of that name."""
        return allowed_global(self.filename, module, name)

    def refuse(self, what: Any, how: str) -> RefusedGlobal:
        """The error for a call or a change of an object that the allow-list contains only as a name."""
        return RefusedGlobal(self.filename, f"{getattr(what, '__name__', type(what).__name__)} ({how})")

    def check_call(self, function: Any, args: Any) -> None:
        """RefusedGlobal unless this call is one of those in `pickle_calls`."""
        if not isinstance(args, tuple):
            raise self.refuse(function, "called with no list of arguments")
        if isinstance(function, type) and issubclass(function, Inert):
            return
        check = CALLS.get(function) if isinstance(function, Hashable) else None
        if check is None or not check(*args):
            raise self.refuse(function, "called in an unusual way")

    def load_reduce(self) -> None:
        """Calls a function."""
        self.check_call(self.stack[-2], self.stack[-1])
        super().load_reduce()  # type: ignore[misc]

    def load_newobj(self) -> None:
        """Makes an instance; only of classes whose `__new__` takes nothing."""
        cls, args = self.stack[-2], self.stack[-1]
        if not isinstance(cls, type) or args != ():
            self.check_call(cls, args)
        super().load_newobj()  # type: ignore[misc]

    def load_newobj_ex(self) -> None:
        """Refuses instances from named arguments, which no supported file has."""
        raise self.refuse(self.stack[-3], "called with named arguments")

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.check_call(klass, tuple(args))
        super()._instantiate(klass, args)  # type: ignore[misc]

    def load_build(self) -> None:
        """Restores an object's state: an array's or dtype's own, or the attributes of a plain instance."""
        target, state = self.stack[-2], self.stack[-1]
        if not is_state(target, state):
            raise self.refuse(target, "with an unusual state")
        super().load_build()  # type: ignore[misc]

    def check_keys(self, keys: Any) -> None:
        """UnpicklingError for keys whose hash could take for ever."""
        if not all(map(is_key, keys)):
            raise pickle.UnpicklingError("a dictionary key or set item that is not plain")

    def load_setitem(self) -> None:
        """One entry of a dictionary."""
        self.check_keys(self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        """Entries of a dictionary."""
        self.check_keys(self.stack[::2])
        super().load_setitems()  # type: ignore[misc]

    def load_dict(self) -> None:
        """A dictionary in the oldest protocol."""
        self.check_keys(self.stack[::2])
        super().load_dict()  # type: ignore[misc]

    def load_additems(self) -> None:
        """Items of a set."""
        self.check_keys(self.stack)
        super().load_additems()  # type: ignore[misc]

    def load_frozenset(self) -> None:
        """A frozen set."""
        self.check_keys(self.stack)
        super().load_frozenset()  # type: ignore[misc]

    def load_bytearray8(self) -> None:
        """A byte array; its length is checked against the file before memory is taken."""
        (length,) = struct.unpack("<Q", self.read(8))  # type: ignore[attr-defined]
        self.append(bytearray(self.read(length)))  # type: ignore[attr-defined]

    def load_binpersid(self) -> None:
        """A tensor's storage, which must be as large in the file as announced."""
        self._check_storage(self.stack[-1])
        super().load_binpersid()  # type: ignore[misc]

    def load_persid(self) -> None:
        """Refuses references in text form to objects outside the pickle, which no supported file has."""
        raise pickle.UnpicklingError("a reference to something outside the file")

    def _check_storage(self, reference: Any) -> None:
        good = isinstance(reference, tuple) and len(reference) >= 5 and reference[0] in ("storage", b"storage")
        dtype = getattr(reference[1], "dtype", None) if good else None
        count = reference[4] if good else None
        if not isinstance(dtype, torch.dtype) or not isinstance(count, int):
            raise pickle.UnpicklingError("a reference that is not a tensor storage")
        sizes = self.record_sizes
        have = self.bytes_in_file if sizes is None else sizes.get(str(reference[2]), -1)
        if not 0 <= count * dtype.itemsize <= have:
            raise pickle.UnpicklingError(f"a tensor of {count} elements that the file does not hold")

    for _instruction, _method in (
        (pickle.REDUCE, load_reduce),
        (pickle.NEWOBJ, load_newobj),
        (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.BUILD, load_build),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict),
        (pickle.ADDITEMS, load_additems),
        (pickle.FROZENSET, load_frozenset),
        (pickle.BYTEARRAY8, load_bytearray8),
        (pickle.BINPERSID, load_binpersid),
        (pickle.PERSID, load_persid),
    ):
        dispatch[_instruction[0]] = _method


def unpickler_for(
    file: str | os.PathLike[str], record_sizes: dict[str, int] | None = None
) -> type[SafeUnpickler]:
    """A SafeUnpickler class that names `file` in its refusals; `record_sizes`: see `pickle_module_for`."""
    return type("SafeUnpickler", (SafeUnpickler,), {"filename": os.fspath(file), "record_sizes": record_sizes})


def pickle_module_for(file: str | os.PathLike[str], record_sizes: dict[str, int] | None = None) -> Any:
    """A module for `torch.load(pickle_module=...)` with a SafeUnpickler. record_sizes: size in bytes of each tensor of
    a zip container, by its key; in a legacy container sizes are limited by the file."""
    unpickler = unpickler_for(file, record_sizes)
    module = types.ModuleType("safe_pickle")
    module.Unpickler = unpickler  # type: ignore[attr-defined]
    module.load = lambda stream, **kwargs: unpickler(stream, **kwargs).load()  # type: ignore[attr-defined]
    return module


@contextlib.contextmanager
def pickle_errors(file: str | os.PathLike[str], expected: str) -> Iterator[None]:
    """Turns the exceptions that Python raises for a damaged pickle into a BadFile about `file`."""
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
        found = f"damaged or foreign content ({detail})"
        raise unreadable(file, error, found, expected, "copy or make the file again") from error


def load(path: str | os.PathLike[str]) -> Any:
    """The object pickled in the file `path`: RefusedGlobal for code, MissingFile, or BadFile when damaged.

    The arrays in it are not compared with each other (CSR indices may be out of range); the caller must do so."""
    with pickle_errors(path, "a pickle of plain data"), open_input(path) as stream:
        return unpickler_for(path)(stream).load()
