"""Command-line programs: each file parses, calls and reports; no algorithm lives here."""
