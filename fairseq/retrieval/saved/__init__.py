"""What earlier runs found, kept on disk: scored sequences and the answers of an index."""
