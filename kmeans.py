"""Door to `fairseq_cli.kmeans`: cluster a datastore's keys (fairseq-kmeans)."""

from fairseq_cli.kmeans import cli_main

if __name__ == "__main__":
    cli_main()
