"""Pictures for the page: curves over a run, intervals side by side. matplotlib draws; colours are left to the page.

Every picture is an inline SVG whose styles are classes, so that a strict content-security policy, dark paper and print
can decide how it looks. Plain numbers in; nothing is measured or judged here.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PAINTS = ("train", "held", "twin", "steps", "run4", "run5")  # of runs side by side, in this order
WIDE, NARROW = 940, 370  # CSS pixels: a desk, a telephone
# stand-ins that the page's style sheet gives their colours, light and dark
_PAINT = {
    "#010101": "ink", "#020202": "faint", "#030303": "paper", "#040401": "train", "#040402": "held",
    "#040403": "twin", "#040404": "base", "#040405": "steps", "#040406": "run4", "#040407": "run5", "#050501": "ok",
    "#050502": "watch", "#050503": "overfit", "#050504": "undertrained", "#050505": "underpowered",
}  # fmt: skip
_COLOUR = {name: colour for colour, name in _PAINT.items()}
_MARKS = {"train": "o", "held": "s", "twin": "^", "base": "", "steps": "d", "run4": "D", "run5": "v"}
_DASHES: Mapping[str, Any] = {"base": (0, (1, 2)), "twin": (0, (5, 2)), "run4": (0, (3, 1, 1, 1))}
_COLUMNS = {True: 2, False: 6}  # of a legend; narrow or not
_STYLE = re.compile(r' style="([^"]*)"')
_ID = re.compile(r'<g id="[^"]*"')
_FONT = re.compile(r"font: ([\d.]+)px [^;]+")
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Curve:
    """One line. `paint`: a colour's name; `whiskers`: (x, low, high). `thin`: behind the others, without marks."""

    label: str
    paint: str
    points: Sequence[tuple[float, float]]
    whiskers: Sequence[tuple[float, float, float]] = ()
    thin: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over one axis. `level`: (label, y) of a line across; `share`: y runs from 0 to 1 and is read in %."""

    unit: str
    curves: Sequence[Curve]
    level: tuple[str, float] | None = None
    share: bool = False


@dataclass(frozen=True)
class Strip:
    """What runs along below: looks as (x, full), verdicts as (from, to, word)."""

    looks: Sequence[tuple[float, bool]] = ()
    verdicts: Sequence[tuple[float, float, str]] = ()


@dataclass(frozen=True)
class Bar:
    """A value with its bounds, None where there are none. `mark`: a colour's name."""

    label: str
    value: float
    low: float | None
    high: float | None
    paint: str


@dataclass(frozen=True)
class Picture:
    """`svg` to be put into a page as it is, and the style `rules` it needs, by class."""

    svg: str
    rules: Mapping[str, str] = field(default_factory=dict)


def course(
    name: str,
    panels: Sequence[Panel],
    unit: str,
    width: int,
    strip: Strip = Strip(),
    chosen: float | None = None,
    falling: bool = False,
) -> Picture:
    """Panels above each other over one axis, `width` CSS pixels wide. `falling`: the axis runs from high to low."""
    with _quietly():
        narrow = width < 600
        heights = [*(180 if narrow else 220 for _ in panels), *([34] if strip.verdicts or strip.looks else [])]
        heads = [_legend_lines(panel, narrow) * 17 + 12 for panel in panels]
        axes = _stacked(width, heights, [*heads, 10])
        figure = axes[0].figure
        for axis, panel in zip(axes, panels, strict=False):
            _panel(axis, panel, narrow)
        if len(heights) > len(panels):
            _strip(axes[-1], strip)
        for axis in axes[: len(panels)] if chosen is not None else ():
            axis.axvline(chosen, color=_COLOUR["ink"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        if chosen is not None:
            place = {"xytext": (4, -2), "textcoords": "offset points", "va": "top", "fontsize": 10}
            axes[0].annotate("chosen", (chosen, 1), xycoords=("data", "axes fraction"), color=_COLOUR["ink"], **place)
        axes[-1].set_xlabel(unit, color=_COLOUR["ink"])
        if falling:
            axes[-1].invert_xaxis()
        return _drawn(figure, name)


def intervals(name: str, groups: Sequence[tuple[str, Sequence[Bar]]], unit: str, width: int) -> Picture:
    """Values below one another, each with its bounds; groups are set apart by a heading."""
    with _quietly():
        rows: list[str | Bar] = []
        for head, bars in groups:
            rows += [head, *bars] if bars else []
        left = 12 + 6.6 * max((len(one.label if isinstance(one, Bar) else one) for one in rows), default=0)
        (axis,) = _stacked(width, [26 * len(rows)], [8], left=min(left, width / 2))
        figure = axis.figure
        for y, one in enumerate(rows):
            if isinstance(one, Bar):
                _bar(axis, y, one)
        labels = [one.label if isinstance(one, Bar) else one for one in rows]
        axis.set_yticks(range(len(rows)), labels)
        for tick, one in zip(axis.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("normal" if isinstance(one, Bar) else "bold")
        axis.axvline(0, color=_COLOUR["ink"], linewidth=1)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid(axis="x", color=_COLOUR["faint"], linewidth=0.6)
        axis.set_xlabel(unit, color=_COLOUR["ink"])
        return _drawn(figure, name)


def _bar(axis: Any, y: int, one: Bar) -> None:
    paint = _COLOUR[one.paint]
    if one.low is not None and one.high is not None:
        axis.plot([one.low, one.high], [y, y], color=paint, linewidth=2.2, solid_capstyle="butt")
        for end in (one.low, one.high):
            axis.plot([end, end], [y - 0.16, y + 0.16], color=paint, linewidth=2.2)
    axis.plot([one.value], [y], marker=_MARKS[one.paint] or "o", color=paint, markersize=7)


def _panel(axis: Any, panel: Panel, narrow: bool) -> None:
    for one in panel.curves:
        _curve(axis, one, narrow)
    if panel.level is not None:
        axis.axhline(panel.level[1], color=_COLOUR["base"], linewidth=1.4, linestyle=_DASHES["base"], zorder=1)
        axis.plot([], [], color=_COLOUR["base"], linewidth=1.4, linestyle=_DASHES["base"], label=panel.level[0])
    axis.set_ylabel(panel.unit, color=_COLOUR["ink"])
    axis.grid(axis="y", color=_COLOUR["faint"], linewidth=0.6)
    axis.set_axisbelow(True)
    if panel.share:
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g} %")
    if axis.get_legend_handles_labels()[0]:
        columns = _COLUMNS[narrow]
        where: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.3}
        kept = axis.legend(ncols=columns, frameon=False, fontsize=10, handlelength=2.2, columnspacing=1.2, **where)
        for text in kept.get_texts():
            text.set_color(_COLOUR["ink"])


def _curve(axis: Any, one: Curve, narrow: bool) -> None:
    if not one.points:
        return
    paint = _COLOUR[one.paint]
    xs, ys = zip(*one.points, strict=True)
    dashes = (0, (4, 2)) if one.dashed else _DASHES.get(one.paint, "-")
    marks = "" if one.thin else _MARKS[one.paint]
    size = 4 if narrow or len(xs) > 25 else 5
    every = max(1, len(xs) // (15 if narrow else 30))
    axis.plot(
        xs, ys, color=paint, label=one.label, linestyle=dashes, marker=marks, markersize=size, markevery=every,
        linewidth=1.0 if one.thin else 1.8, zorder=2 if one.thin else 3,
    )  # fmt: skip
    for x, low, high in one.whiskers:
        axis.plot([x, x], [low, high], color=paint, linewidth=1.0, alpha=0.7, zorder=2)


def _strip(axis: Any, strip: Strip) -> None:
    """Verdicts as bands with their names, looks as ticks above them: tall ones are full."""
    for begin, end, word in _joined(strip.verdicts):
        axis.axvspan(begin, end, 0, 0.62, facecolor=_COLOUR.get(word, _COLOUR["base"]), edgecolor=_COLOUR["paper"])
    for number, full in enumerate((False, True)):
        some = [x for x, kind in strip.looks if kind is full]
        axis.vlines(some, 0.7, 1.0 if full else 0.85, color=_COLOUR["ink"], linewidth=0.8 + 0.4 * number)
    low, high = axis.get_xlim()
    for begin, end, word in _joined(strip.verdicts):
        if (end - begin) / max(high - low, 1e-12) > 0.014 * len(word) + 0.01:
            axis.text((begin + end) / 2, 0.3, word, ha="center", va="center", fontsize=10, color=_COLOUR["paper"])
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)


def _joined(bands: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    found: list[tuple[float, float, str]] = []
    for begin, end, word in bands:
        if found and found[-1][2] == word:
            found[-1] = (found[-1][0], end, word)
        else:
            found.append((begin, end, word))
    return found


# matplotlib


class _quietly(warnings.catch_warnings):
    """With our settings, and without its remarks on letters that its own font lacks: the page has other fonts."""

    def __enter__(self) -> None:
        import matplotlib

        super().__enter__()
        warnings.simplefilter("ignore")
        self._settings = matplotlib.rc_context(_SETTINGS)
        self._settings.__enter__()

    def __exit__(self, *about: Any) -> None:
        self._settings.__exit__(*about)
        super().__exit__(*about)


def _stacked(width: int, heights: Sequence[int], heads: Sequence[int], left: float = 60) -> list[Any]:
    """Axes below one another, sizes in pixels, over one x; `heads`: room above each. Layout engines cost more time."""
    from matplotlib.figure import Figure

    whole = sum(heights) + sum(heads[: len(heights)]) + 44
    figure = Figure(figsize=(width / 72, whole / 72), dpi=72)
    axes: list[Any] = []
    top = whole
    for height, head in zip(heights, heads, strict=False):
        top -= head + height
        place = (left / width, top / whole, (width - left - 14) / width, height / whole)
        axes.append(figure.add_axes(place, sharex=axes[0] if axes else None))
    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False)
    return axes


def _legend_lines(panel: Panel, narrow: bool) -> int:
    return -(-(len(panel.curves) + (panel.level is not None)) // _COLUMNS[narrow])


def _drawn(figure: Any, name: str) -> Picture:
    """As SVG: without ids nobody refers to, colours and styles as classes, other ids salted: pictures may meet."""
    import io

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    for axis in figure.axes:
        axis.tick_params(colors=_COLOUR["ink"])
        axis.set_facecolor("none")
        for spine in axis.spines.values():
            spine.set_edgecolor(_COLOUR["ink"])
    figure.patch.set_visible(False)
    for axis in figure.axes:
        axis.patch.set_visible(False)
    matplotlib.rcParams["svg.hashsalt"] = name
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _classed(file.getvalue())


def _classed(svg: str) -> Picture:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    size = re.search(r'viewBox="([^"]*)"', svg)
    svg = re.sub(r"<svg[^>]*>", f'<svg class="plot" viewBox="{size[1] if size else ""}">', svg, count=1)
    svg = _ID.sub("<g", svg).replace("xlink:href", "href")
    rules: dict[str, str] = {}

    def named(found: re.Match[str]) -> str:
        style = _FONT.sub(r"font-size: \1px", found[1])
        for colour, paint in _PAINT.items():
            style = style.replace(colour, f"var(--{paint})")
        name = "p" + hashlib.sha256(style.encode()).hexdigest()[:7]
        rules[name] = style
        return f' class="{name}"'

    svg = re.sub(r">\s+<", "><", _STYLE.sub(named, svg))
    return Picture(svg.strip(), rules)
