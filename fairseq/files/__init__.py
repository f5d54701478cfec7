"""Files: written whole or not at all, recognised by digests and sidecars, read without running anything they hold."""
