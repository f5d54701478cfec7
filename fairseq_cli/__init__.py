"""Command-line entry points. In a process that is one of the commands, importing this package installs the handlers for
Ctrl-C and for missing memory before the large libraries are imported."""

from fairseq_cli.starting import prepare

prepare()
