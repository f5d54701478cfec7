"""Sidecars changed on purpose: without their own digest, by which every change would be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def edit_description(path: Path, *removed: str, **changed: Any) -> None:
    """Changes fields of a sidecar, and removes some."""
    fields = {**json.loads(path.read_text()), **changed}
    for name in ("digest", *removed):
        fields.pop(name, None)
    path.write_text(json.dumps(fields))
