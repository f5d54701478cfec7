"""Door to `fairseq_cli.eval_lm`: evaluate a language model, save a datastore, retrieve (fairseq-eval-lm)."""

from fairseq_cli.eval_lm import cli_main

if __name__ == "__main__":
    cli_main()
