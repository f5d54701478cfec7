"""Door to `fairseq_cli.build_dstore`: build the search index of a datastore (fairseq-build-dstore)."""

from fairseq_cli.build_dstore import cli_main

if __name__ == "__main__":
    cli_main()
