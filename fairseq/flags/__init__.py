"""The declarations of the commands' flags, and the groups in which `--help` shows them (`layouts`)."""
