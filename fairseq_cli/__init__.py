"""Command-line entry points. Where this package is imported as a program, it is ready for Ctrl-C, and for memory that
does not suffice, before the large libraries are loaded."""

from fairseq_cli.starting import prepare

prepare()
