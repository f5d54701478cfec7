"""Registries: a command-line flag whose choices are the names under which classes were registered.

`setup_registry("--optimizer", ...)` gives a build function, a decorator and the name -> class map. Options are parsed
in two passes (see `fairseq.options`): the first finds the chosen names, whose classes then add their own flags."""

from __future__ import annotations

import argparse
import difflib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from fairseq.errors import BadFlag

logger = logging.getLogger(__name__)


@dataclass
class Registry:
    """One flag's choices. `default` is the flag's default; `classes` maps registered names to classes."""

    flag: str
    default: str | None
    classes: dict[str, Any] = field(default_factory=dict)


REGISTRIES: dict[str, Registry] = {}
FLAGS_OF_CLASSES: set[str] = set()  # each flag whose values are names of registered classes


def setup_registry(
    flag: str, base_class: type | None = None, default: str | None = None
) -> tuple[Callable[..., Any], Callable[[str], Callable[[type], type]], dict[str, Any]]:
    """Creates the registry behind `flag` ("--lr-scheduler"). The args attribute is the flag with underscores.

    Returns (build, register, classes). `build(args, ...)` makes the class that args name, through its classmethod
    `build_<registry name>` when it has one (fairseq's convention), else through its constructor; None when unset."""
    if not flag.startswith("--"):
        raise ValueError(f"a registry's flag starts with two dashes: {flag}")
    name = flag[2:].replace("-", "_")
    if name in REGISTRIES:
        raise ValueError(f"the registry for {flag} exists already")
    registry = REGISTRIES[name] = Registry(flag, default)

    def build(args: argparse.Namespace, *extra: Any, **kwargs: Any) -> Any:
        choice = getattr(args, name, None)
        if choice is None:
            return None
        if choice not in registry.classes:
            raise unknown_name(flag, choice, registry.classes)
        cls = registry.classes[choice]
        set_defaults(args, cls)
        return getattr(cls, "build_" + name, cls)(args, *extra, **kwargs)

    return build, class_registrar(flag, registry.classes, base_class), registry.classes


def class_registrar(
    flag: str, classes: dict[str, Any], base_class: type | None = None, interface: type | None = None
) -> Callable[[str], Callable[[type], type]]:
    """A class decorator that takes a name and fills `classes`, the choices of `flag`. ValueError for a name or class
    used twice, and for a class that does not extend `base_class`; a warning for what `misspelt_names` finds, compared
    with `interface` (default: `base_class`)."""
    FLAGS_OF_CLASSES.add(flag)

    def register(choice: str) -> Callable[[type], type]:
        def decorate(cls: type) -> type:
            if choice in classes:
                raise ValueError(f"cannot register {choice} for {flag} twice")
            if any(cls.__name__ == other.__name__ for other in classes.values()):
                raise ValueError(f"cannot register a second class named {cls.__name__} for {flag}")
            if base_class is not None and not issubclass(cls, base_class):
                raise ValueError(f"{cls.__name__} must extend {base_class.__name__} to be registered for {flag}")
            for name, meant in misspelt_names(cls, interface or base_class):
                logger.warning(
                    "%s %s: the class %s defines %s, which nothing calls, and not %s; rename it if %s is meant, or let "
                    "its name begin with an underscore", flag, choice, cls.__name__, name, meant, meant,
                )  # fmt: skip
            classes[choice] = cls
            return cls

        return decorate

    return register


def misspelt_names(cls: type, interface: type | None) -> list[tuple[str, str]]:
    """(name, name that may be meant) for each public method or attribute of a user's class that resembles one which the
    interface, or a class of this package that it extends, has and the user's class does not define."""
    if is_built_in(cls):
        return []
    package = cls.__module__.partition(".")[0]
    known: set[str] = set()
    for one in (*cls.__mro__, *(interface.__mro__ if interface is not None else ())):
        if is_built_in(one):
            known |= _public_names(one)
    own = set().union(*(_public_names(one) for one in cls.__mro__ if one.__module__.partition(".")[0] == package))
    meant = {_plain(name): name for name in known - own}
    close = {name: difflib.get_close_matches(_plain(name), meant, 1, cutoff=0.8) for name in sorted(own - known)}
    return [(name, meant[found[0]]) for name, found in close.items() if found]


def _public_names(cls: type) -> set[str]:
    return {name for name in (*vars(cls), *vars(cls).get("__annotations__", ())) if not name.startswith("_")}


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def unknown_name(flag: str, name: object, names: Collection[str]) -> BadFlag:
    """The error for a name under which no class is registered, which may be one that a user's package registers."""
    close = difflib.get_close_matches(str(name), names, 1)
    expected = "one of " + ", ".join(sorted(names)) + (f" (perhaps {close[0]})" if close else "")
    return BadFlag(flag, name, expected, "if it is your own, give --user-dir with the folder of its package")


def declared_actions(cls: Any) -> list[argparse.Action]:
    """The flags that `cls.add_args(parser)` declares."""
    if not hasattr(cls, "add_args"):
        return []
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    cls.add_args(parser)
    return [action for action in parser._actions if action.dest is not argparse.SUPPRESS]


def is_built_in(cls: type | None) -> bool:
    """Whether a class is one of this package, not one that a user's package registered."""
    return getattr(cls, "__module__", "").startswith("fairseq.")


def declared_defaults(cls: Any) -> dict[str, Any]:
    """The explicit defaults of those flags."""
    return {
        action.dest: action.default for action in declared_actions(cls) if action.default is not argparse.SUPPRESS
    }


def set_defaults(args: argparse.Namespace, cls: Any) -> None:
    """Fills into `args` what `cls` declares and `args` lacks; never overwrites."""
    for key, value in declared_defaults(cls).items():
        if not hasattr(args, key):
            setattr(args, key, value)
