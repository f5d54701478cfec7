"""Files: atomic writing, locks, checksums and sidecars, and reading without executing anything in a file."""
