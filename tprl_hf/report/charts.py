"""Charts as SVG inside HTML: they load nothing, follow light and dark, and tell each point under the pointer."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tprl_hf.style import PALETTE

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 12, 26
MARKERS = ("circle", "square", "diamond", "triangle")
DASHES = ("", "6 4")  # of the first run of a page and of the second
MOST_POINTS = 400  # of a curve; longer ones are averaged
MOST_MARKED = 40  # of a curve whose points have markers
LEVEL = '<svg viewBox="0 0 26 10"><line class="zero" stroke-dasharray="5 4" x1="0" x2="26" y1="5" y2="5"/></svg>'

CHART_CSS = f"""
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.4rem; }}
.chart {{ min-width: 0; }}
.chart b {{ display: block; }} .chart .axis {{ color: var(--grey); font-size: .8rem; }}
.chart .below {{ text-align: center; }}
.chart svg.plot {{ display: block; width: 100%; height: auto; max-width: 34rem; }}
.chart text {{ font: 11px system-ui, sans-serif; fill: var(--grey); }}
.grid {{ stroke: var(--grid); stroke-width: 1; }} .zero {{ stroke: var(--grey); stroke-width: 1; }}
.curve {{ fill: none; stroke-width: 1.8; stroke-linejoin: round; }}
.legend {{ list-style: none; margin: .2rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem .9rem;
  font-size: .8rem; overflow-wrap: anywhere; }}
.legend svg {{ width: 26px; height: 10px; margin-right: .3rem; vertical-align: middle; }}
.hollow {{ fill: none; stroke-width: 1.5; }}
.band {{ fill: var(--grid); }} .box-middle {{ fill: var(--bar); stroke: var(--c0); }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; }}
th, td {{ text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--rim);
  vertical-align: top; }}
th {{ color: var(--grey); font-weight: 600; white-space: nowrap; }} td.number {{ white-space: nowrap; }}
td.bar {{ min-width: 5.5rem; padding-left: .3rem; white-space: nowrap; border-right: 6px solid var(--card);
  background-clip: padding-box; }}
td.words {{ overflow-wrap: anywhere; min-width: 9rem; }}
{"".join(f".s{n} {{ stroke: var(--c{n}); }} .f{n} {{ fill: var(--c{n}); }} " for n in range(len(PALETTE)))}
"""


@dataclass(frozen=True)
class Series:
    """
    One curve.

    Args:
        name (`str`): Under the pointer.
        points (`Sequence[tuple[float, float]]`): x and y.
        colour (`int`): Place in [`PALETTE`].
        marker (`int`): Which of the markers; only curves of few points have them.
        dash (`str`): SVG's `stroke-dasharray`; empty for a whole line.
        intervals (`Sequence[tuple[float, float]]`, *optional*): Low and high of each point.
        label (`str`, *optional*): In the legend, where equal ones stand once; by default the name.
        is_hollow (`bool`): Its markers are outlines, over which those of another curve show.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    marker: int = 0
    dash: str = ""
    intervals: Sequence[tuple[float, float]] | None = None
    label: str = ""
    is_hollow: bool = False

    @property
    def mark(self) -> str:
        """The class of its markers."""
        return f"hollow s{self.colour}" if self.is_hollow else f"f{self.colour}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """
    Round numbers between two.

    Example:

    ```python
    >>> ticks(0, 97), ticks(0.12, 0.31)
    ([0, 20, 40, 60, 80], [0.15, 0.2, 0.25, 0.3])
    ```
    """
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    digits = max(0, 1 - math.floor(math.log10(step)))
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, digits) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """
    A number as an axis has it.

    Example:

    ```python
    >>> short(12500), short(2e6), short(0.25), short(-3.0), short(0.00025)
    ('12.5k', '2M', '0.25', '-3', '2.5e-4')
    ```
    """
    if 0 < abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-") if abs(value) < 1e-4 else f"{value * 1e4:.3g}e-4"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most [`MOST_POINTS`] points, each the mean of its neighbours."""
    group = math.ceil(len(points) / MOST_POINTS)
    if group <= 1:
        return list(points)
    parts = [points[start : start + group] for start in range(0, len(points), group)]
    return [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    x_from_zero: bool = True,
    bands: Sequence[tuple[float, float, float, str]] = (),
) -> str:
    """
    Curves over a common axis.

    Args:
        title (`str`): The line above.
        series (`Sequence[Series]`): The curves; points that are not finite are left out.
        x_label, y_label (`str`): What the axes are, with their units.
        x_from_zero (`bool`): Whether the x axis begins at 0.
        bands (`Sequence[tuple]`): Levels of comparison: low, value, high and name, drawn over the whole width.

    Returns:
        `str`: A `<figure>`; empty where there is nothing to draw.
    """
    finite = []
    for one in series:
        where = [number for number, point in enumerate(one.points) if all(map(math.isfinite, point))]
        points = [one.points[number] for number in where]
        intervals = None if one.intervals is None else [one.intervals[number] for number in where]
        if points:
            finite.append((one, points if intervals else thinned(points), intervals))
    if not finite:
        return ""
    xs = [x for _, points, _ in finite for x, _ in points] + ([0.0] if x_from_zero else [])
    ys = [y for _, points, _ in finite for _, y in points]
    ys += [y for _, _, intervals in finite for pair in intervals or () for y in pair]
    ys += [level for low, _, high, _ in bands for level in (low, high)]
    x_low, x_high = padded(min(xs), max(xs), 0.0)
    y_low, y_high = padded(min(ys), max(ys), 0.06)

    def x_of(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    drawn = []
    for tick in ticks(y_low, y_high):
        place = y_of(tick)
        kind = "zero" if tick == 0 else "grid"
        drawn.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(x_low, x_high):
        place = x_of(tick)
        drawn.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        drawn.append(f'<text x="{place:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(tick)}</text>')
    for low, value, high, name in bands:
        top, bottom = y_of(high), y_of(low)
        drawn.append(
            f'<rect class="band" x="{LEFT}" width="{WIDTH - LEFT - RIGHT}" y="{top:.1f}" '
            f'height="{max(bottom - top, 0.5):.1f}"/><line class="zero" stroke-dasharray="5 4" x1="{LEFT}" '
            f'x2="{WIDTH - RIGHT}" y1="{y_of(value):.1f}" y2="{y_of(value):.1f}">'
            f"<title>{html.escape(name)}: {value:.4g}</title></line>"
        )
    for one, points, intervals in finite:
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        dash = f' stroke-dasharray="{one.dash}"' if one.dash else ""
        drawn.append(f'<polyline class="curve s{one.colour}" points="{path}"{dash}/>')
        for (x, _), (low, high) in zip(points, intervals or (), strict=False):
            drawn.append(
                f'<line class="s{one.colour}" x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{y_of(low):.1f}" '
                f'y2="{y_of(high):.1f}"/>'
            )
        if len(points) <= MOST_MARKED:
            for x, y in points:
                tip = f"{html.escape(one.name)}: {short(x)} → {y:.4g}"
                drawn.append(marker(one.marker, x_of(x), y_of(y), one.mark, tip))
    # reversed twice: of equal labels the first one's picture stays
    pictures = {one.label or one.name: swatch(one, len(points) <= MOST_MARKED) for one, points, _ in reversed(finite)}
    names = [*reversed(pictures.items()), *((name, LEVEL) for *_, name in bands)]
    return (
        f'<figure class="chart"><b>{html.escape(title)}</b>{legend(names)}'
        f'<div class="axis">{html.escape(y_label)}</div>'
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'{"".join(drawn)}</svg><div class="axis below">{html.escape(x_label)}</div></figure>'
    )


def padded(low: float, high: float, share: float) -> tuple[float, float]:
    """Ends of an axis that holds `low` to `high`, with room around them; never of one point."""
    if low == high:
        room = abs(low) * 0.1 or 0.5
        return (low - room if low < 0 else max(low - room, 0.0)), high + room
    room = share * (high - low)
    return low - room, high + room


def marker(kind: int, x: float, y: float, colour: str, tip: str = "") -> str:
    """A mark of a point, which tells `tip` (HTML) under the pointer."""
    name, size = MARKERS[kind % len(MARKERS)], 3.4
    inside = f"<title>{tip}</title>" if tip else ""
    if name == "circle":
        return f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{size}">{inside}</circle>'
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "diamond": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        "triangle": ((0, -1.3), (1.3, 1.1), (-1.3, 1.1)),
    }[name]
    path = " ".join(f"{x + size * right:.1f},{y + size * down:.1f}" for right, down in corners)
    return f'<polygon class="{colour}" points="{path}">{inside}</polygon>'


def swatch(one: Series, marked: bool) -> str:
    dash = f' stroke-dasharray="{one.dash}"' if one.dash else ""
    mark = marker(one.marker, 13, 5, one.mark) if marked else ""
    return (
        f'<svg viewBox="0 0 26 10"><line class="curve s{one.colour}" x1="0" x2="26" y1="5" y2="5"{dash}/>{mark}</svg>'
    )


def legend(names: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<li>{picture}{html.escape(name)}</li>" for name, picture in names)
    return f'<ul class="legend">{items}</ul>'


def box_chart(title: str, boxes: Mapping[str, Sequence[float]], x_label: str, x_high: float) -> str:
    """
    Distributions beside each other, over an axis from 0.

    Args:
        title (`str`): The line above.
        boxes (`Mapping[str, Sequence[float]]`): By name, least, quartile, median, quartile and greatest.
        x_label (`str`): What the axis is, with its unit.
        x_high (`float`): Where the axis ends.
    """
    if not boxes:
        return ""
    line, left, bottom = 24, 96, 22
    height = line * len(boxes) + bottom

    def x_of(x: float) -> float:
        return left + x / x_high * (WIDTH - left - RIGHT)

    drawn = []
    for tick in ticks(0, x_high):
        place = x_of(tick)
        kind = "zero" if tick == 0 else "grid"
        drawn.append(f'<line class="{kind}" x1="{place:.1f}" x2="{place:.1f}" y1="0" y2="{height - bottom}"/>')
        drawn.append(f'<text x="{place:.1f}" y="{height - 6}" text-anchor="middle">{short(tick)}</text>')
    for number, (name, (least, low, middle, high, most)) in enumerate(boxes.items()):
        y = line * number + line / 2
        said = f"{name}: {least:g} to {most:g}, middle half {low:g} to {high:g}, median {middle:g}"
        label = name if len(name) <= 14 else f"{name[:13]}…"
        drawn.append(
            f"<g><title>{html.escape(said)}</title>"
            f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{html.escape(label)}</text>'
            f'<line class="s0" x1="{x_of(least):.1f}" x2="{x_of(most):.1f}" y1="{y}" y2="{y}"/>'
            f'<rect class="box-middle" x="{x_of(low):.1f}" width="{max(x_of(high) - x_of(low), 1):.1f}" y="{y - 7}" '
            f'height="14"/><line class="curve s1" x1="{x_of(middle):.1f}" x2="{x_of(middle):.1f}" y1="{y - 7}" '
            f'y2="{y + 7}"/></g>'
        )
    return (
        f'<figure class="chart"><b>{html.escape(title)}</b>'
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">'
        f'{"".join(drawn)}</svg><div class="axis below">{html.escape(x_label)}</div></figure>'
    )


def bar_cell(text: str, share: float) -> str:
    """A cell of a table with a bar behind its number, from 0 at the left to 1 at the right."""
    filled = 100 * min(max(share, 0.0), 1.0)
    style = f"background: linear-gradient(90deg, var(--bar) {filled:.1f}%, transparent {filled:.1f}%)"
    return f'<td class="bar" style="{style}">{html.escape(text)}</td>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    A table that scrolls where it is wider than the page.

    Args:
        header (`Sequence[str]`): Texts.
        rows (`Sequence[Sequence[str]]`): Cells as HTML, from [`cell`] and [`bar_cell`].
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(text: str, kind: str = "") -> str:
    """A cell; `kind` is a class of [`CHART_CSS`]."""
    return f"<td{f' class={kind}' if kind else ''}>{html.escape(text)}</td>"
