"""Exceptions for users' mistakes. The message of each is one sentence that says where the mistake is, what was found,
what was expected and what to do. The commands print that sentence and exit with status 2 (see `fairseq_cli.entry`)."""

from __future__ import annotations

import os


class UserError(ValueError):
    """A mistake in a flag, a file or the environment, described in one sentence."""


class BadFile(UserError):
    """A file whose content cannot be used."""

    def __init__(self, file: str | os.PathLike[str], found: str, expected: str, remedy: str = "") -> None:
        self.file, self.found, self.expected, self.remedy = os.fspath(file), found, expected, remedy
        super().__init__(f"{self.file}: found {found}, expected {expected}" + (f"; {remedy}" if remedy else ""))


class BadFlag(UserError):
    """A command-line flag whose value cannot be used."""

    def __init__(self, flag: str, found: object, expected: str, remedy: str = "") -> None:
        self.flag, self.found, self.expected, self.remedy = flag, found, expected, remedy
        super().__init__(f"{flag}: found {found}, expected {expected}" + (f"; {remedy}" if remedy else ""))


class MissingFile(UserError, FileNotFoundError):
    """A file that should exist and does not, or is a folder."""

    def __init__(self, file: str | os.PathLike[str], remedy: str = "") -> None:
        self.file, self.remedy = os.fspath(file), remedy
        found = "a folder, not a file" if os.path.isdir(file) else "no such file"
        super().__init__(f"{self.file}: {found}" + (f"; {remedy}" if remedy else ""))


class MissingDependency(UserError, ImportError):
    """An optional library that the requested feature needs."""

    def __init__(self, module: str, feature: str, install: str) -> None:
        self.module, self.feature, self.install = module, feature, install
        super().__init__(f"{feature} needs the Python module {module}, which is not installed; run: {install}")
