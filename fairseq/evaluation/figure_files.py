"""Writing figures to files: their sizes, text that fits, and bytes that depend only on what is drawn (no dates, no
settings of the user's matplotlib)."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fairseq.errors import MissingDependency
from fairseq.files.atomic_io import atomic_write

logger = logging.getLogger(__name__)

FORMATS = ("png", "svg", "pdf")
NO_DATES: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
POINTS = 72  # points per inch
LINE = 1.3  # height of a line of text, in units of its font's size


@dataclass(frozen=True)
class Size:
    """A figure's width and height in inches, its font in points, and the dots per inch of its PNG."""

    width: float
    height: float
    font: float
    dpi: int

    def with_lines(self, lines: float) -> Size:
        """The same size, higher by so many lines of text."""
        return Size(self.width, self.height + lines * LINE * self.font / POINTS, self.font, self.dpi)


WIDE = Size(7.2, 4.0, 9.5, 200)  # a page, a screen
COLUMN = Size(3.3, 2.4, 8.0, 300)  # one of a paper's two columns


def require_matplotlib() -> None:
    """MissingDependency without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency("matplotlib", "a figure", "pip install -e '.[plot]'")


@contextmanager
def new_figure(size: Size) -> Iterator[Any]:
    """A matplotlib figure, with these settings while it is drawn and saved: all text has the size's font; dollar signs
    do not start formulas; PDF embeds its fonts as TrueType, as publishers require."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    sizes = ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    style: dict[Any, Any] = dict.fromkeys(sizes, size.font)
    style |= {"text.parse_math": False, "svg.hashsalt": "retomaton", "svg.fonttype": "none", "pdf.fonttype": 42}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield Figure(figsize=(size.width, size.height), layout="constrained")


def save_figure(path: str, size: Size, draw: Callable[[Any], None]) -> None:
    """Draws on a fresh figure of this size and writes it as path.png, path.svg and path.pdf."""
    with new_figure(size) as figure:
        draw(figure)
        logging.getLogger("fontTools").setLevel(logging.WARNING)  # its account of a font's tables is longer than ours
        for suffix in FORMATS:
            with atomic_write(f"{path}.{suffix}") as stream:
                figure.savefig(stream, format=suffix, dpi=size.dpi, metadata=NO_DATES[suffix])
            logger.info("wrote %s.%s", path, suffix)


@lru_cache(maxsize=4096)
def text_width(text: str, font: float, bold: bool = False) -> float:
    """The width of a line of text in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    face = FontProperties(family="DejaVu Sans", size=font, weight="bold" if bold else "normal")
    width, *_ = text_to_path.get_text_width_height_descent(text, face, ismath=False)
    return float(width)


def wrapped(text: str, font: float, width: float, bold: bool = False) -> str:
    """The text in lines of at most `width` points, broken at spaces, but not before a number, and within words that are
    longer than a line."""
    lines = [""]
    for word in re.split(r" +(?![0-9])", text.strip()):
        joined = f"{lines[-1]} {word}".strip()
        if text_width(joined, font, bold) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for character in word:
            if lines[-1] and text_width(lines[-1] + character, font, bold) > width:
                lines.append("")
            lines[-1] += character
    return "\n".join(line.strip() for line in lines if line)
