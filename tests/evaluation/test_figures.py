"""Figures: size of the text, no overlapping elements, the same bytes from the same results."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fairseq.evaluation.curve_figure import CurveFigure, styles_of
from fairseq.evaluation.figure_files import FORMATS, new_figure, text_width, wrapped
from fairseq.evaluation.heat_maps import HeatMaps, Panel
from fairseq.evaluation.sweep_curves import Curve
from fairseq.evaluation.sweep_figures import PAPER_FILE, draw_figures

matplotlib = pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = json.loads(PAPER_FILE.read_text())
LONG = "a strategy with a very long name, chain-power 0.25, gate-foss 0.125, adaptret-checkpoint somewhere.pt"


def curve(label: str, end: float = 80.0, low: float = 100.0, high: float = 110.0, kind: str = "") -> Curve:
    return Curve(label, [0.0, end / 2, end], [low, low, high], kind or label)


def panel(rows: int, columns: int, label: str = "RetoMaton, always searching", scale: float = 100.0) -> Panel:
    cells = [[scale + abs(row - 1) + column * 7.77 for column in range(columns)] for row in range(rows)]
    return Panel(label, [0.05 * (row + 1) for row in range(rows)], [1 + column / 3 for column in range(columns)], cells)


FIVE = [curve(f"{name}", low=100.0 + 0.01 * i) for i, name in enumerate(("kNN-LM", "AdaptRet", "RetoMaton", "a", "b"))]
FIGURES: dict[str, Any] = {
    "one": lambda column: CurveFigure([curve("kNN-LM")], column=column),
    "ends at one place": lambda column: CurveFigure(FIVE, {"LM alone": 110.0}, title="WikiText", column=column),
    "published": lambda column: CurveFigure(FIVE, {}, PUBLISHED["wikitext103"]["methods"], column=column),
    "published, all others": lambda column: CurveFigure(FIVE, {}, PUBLISHED["wikitext103"]["clusters"], column=column),
    "logarithmic": lambda column: CurveFigure([curve("RetoMaton", high=900.0)], {"LM alone": 2909.0}, column=column),
    "decades": lambda column: CurveFigure([curve("RetoMaton", low=3, high=3e9)], column=column),
    "close together": lambda column: CurveFigure([curve("a", low=1e4, high=1e4 + 1e-3)], column=column),
    "long names": lambda column: CurveFigure([curve(LONG), curve("x" * 200)], title=LONG * 2, column=column),
    "many": lambda column: CurveFigure([curve(f"curve {i}") for i in range(25)], column=column),
    "little saved": lambda column: CurveFigure([curve("a", end=0.0)], column=column),
    "dollars": lambda column: CurveFigure([curve("a$_b"), curve("c$^")], title="$\\", column=column),
    "heat map": lambda column: HeatMaps([panel(3, 4)], "A title", column),
    "heat maps": lambda column: HeatMaps([panel(9, 7, scale=s) for s in (10, 100, 1000)], LONG, column),
    "wide heat maps": lambda column: HeatMaps([panel(2, 30), panel(2, 30, LONG)], column=column),
    "a lambda": lambda column: HeatMaps([panel(1, 5)], column=column),
    "a temperature": lambda column: HeatMaps([panel(15, 1)], column=column),
}


def texts_of(figure: Any) -> list[Any]:
    """The texts that are seen: not those of ticks beyond the ends of their axis."""
    from matplotlib.text import Text

    figure.canvas.draw()
    beyond = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        beyond |= {id(label) for t in ticks if not low <= t.get_loc() <= high for label in (t.label1, t.label2)}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in texts if id(text) not in beyond]


def overlap(one: Any, other: Any) -> bool:
    """More than by the rounding of a pixel."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width > 1 and height > 1


@pytest.mark.parametrize("column", [False, True], ids=["page", "column"])
@pytest.mark.parametrize("name", FIGURES)
def test_texts_neither_touch_nor_leave_the_figure(name: str, column: bool) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    made = FIGURES[name](column)
    assert made.size().width == (3.3 if column else 7.2)
    with new_figure(made.size()) as figure:
        canvas = FigureCanvasAgg(figure)
        made.draw(figure)
        boxes = [(text, text.get_window_extent(canvas.get_renderer())) for text in texts_of(figure)]
        for text, box in boxes:
            inside = box.x0 > -1 and box.y0 > -1 and box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1
            assert inside, (text.get_text(), box, figure.bbox)
        for (one, first), (other, second) in itertools.combinations(boxes, 2):
            assert not overlap(first, second), (one.get_text(), other.get_text())
        assert {text.get_fontsize() for text, _ in boxes} == {8.0 if column else 9.5}


@pytest.mark.parametrize(("published", "low", "high"), [({}, 30, 32), ({"b": [[0, 1], [0.81, 2]]}, 81, 84)])
def test_the_axis_ends_with_the_data(published: dict[str, list[list[float]]], low: float, high: float) -> None:
    made = CurveFigure([curve("a", end=30.0)], {}, published)
    with new_figure(made.size()) as figure:
        made.draw(figure)
        assert low < figure.axes[0].get_xlim()[1] < high


def test_files_have_the_size_of_a_column_and_the_same_bytes_again(tmp_path: Path) -> None:
    """Also under other settings of matplotlib, with which an earlier figure was drawn."""
    figure = CurveFigure(FIVE, {"LM alone": 111.0}, PUBLISHED["wikitext103"]["methods"], "A title", column=True)
    for name, settings in {"one": {}, "two": {"font.size": 20.0, "axes.grid": True, "savefig.bbox": "tight"}}.items():
        with matplotlib.rc_context(settings):
            figure.save(str(tmp_path / name))
        assert not settings or matplotlib.rcParams["font.size"] != 20.0
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}.{f}" for n in ("one", "two") for f in FORMATS}
    for suffix in FORMATS:
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes(), suffix
    pdf = (tmp_path / "one.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ ?0 0 ([0-9.]+) ([0-9.]+) ?\]", pdf)
    assert box is not None and float(box[1]) == pytest.approx(3.3 * 72)
    assert b"CreationDate" not in pdf and b"/Type3" not in pdf
    svg = (tmp_path / "one.svg").read_text()
    assert "<dc:date>" not in svg and set(re.findall(r"font-size: ([0-9.]+)px", svg)) == {"8"}
    assert (tmp_path / "one.png").read_bytes()[16:20] == (990).to_bytes(4, "big")


def test_curves_can_be_told_apart_without_colour() -> None:
    styles = styles_of(["kNN-LM", "AdaptRet", "RetoMaton", "RetoMaton without clusters", *["x"] * 20, "RetoMaton"])
    assert len({(str(line), marker) for _, line, marker in styles}) == len(styles)
    assert len({marker for *_, marker in styles[:15]}) == 15
    assert styles[0] == styles_of(["x", "kNN-LM"])[1]  # the paper's methods look the same in every figure


def test_lines_break_at_spaces_but_not_before_numbers() -> None:
    width = text_width("with chains, pool", 8)
    assert wrapped("with chains, pool 1024", 8, width + 1) == "with chains,\npool 1024"
    assert all(text_width(line, 8) <= 50 for line in wrapped("x" * 99, 8, 50).split("\n"))
    assert wrapped("", 8, 50) == ""


def test_results_without_points_of_their_own_kind(tmp_path: Path) -> None:
    """Results of an earlier version, which do not say which flags save; and infinite perplexities alone."""
    point = {
        "strategy": "retomaton", "series": "retomaton", "members": None, "min_knns": 1, "k": 8, "lmbda": 0.2,
        "knn_temp": 1, "searches_saved_percent": 10.0, "perplexity": 9.0,
    }  # fmt: skip
    draw_figures({"points": [point], "lm": {"perplexity": float("inf")}}, str(tmp_path / "f"))
    assert (tmp_path / "f-methods.pdf").exists()
    draw_figures({"points": [point | {"perplexity": float("inf")}], "lm": {"perplexity": 9.0}}, str(tmp_path / "g"))
    assert not list(tmp_path.glob("g*"))


def test_files_that_are_read_are_packaged() -> None:
    """Every file in the packages that is no source is in the wheel."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    globs = [(ROOT / package.replace(".", "/"), glob) for package, globs in data.items() for glob in globs]
    packaged = {path for folder, glob in globs for path in folder.glob(glob)}
    others = [path for folder in ("fairseq", "fairseq_cli") for path in (ROOT / folder).rglob("*") if path.is_file()]
    others = [path for path in others if path.suffix not in (".py", ".pyc", ".nbi", ".nbc")]
    assert PAPER_FILE in others and set(others) <= packaged
