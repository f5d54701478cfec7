"""Door to `fairseq_cli.train`: train a language model (fairseq-train)."""

from fairseq_cli.train import cli_main

if __name__ == "__main__":
    cli_main()
