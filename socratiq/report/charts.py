"""Small charts as inline SVG: lines over steps, histograms, dots with intervals. No library, no script needed.

Colours are CSS variables ("ppo" means var(--ppo)), so that a page's light and dark themes reach into the pictures. All
text is escaped here. Drawn for a width of 340 units, which is a phone's: text stays readable there.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 22  # margins around the plot
DROP = 10  # how far a dot hangs below the one that it would hide
MOST_POINTS = 240  # more are averaged in groups before they are drawn


class Line(NamedTuple):
    """One curve: points (step, value) in the order of steps. Held-out figures are few: they are drawn with dots."""

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    dots: bool = False


class Scale(NamedTuple):
    """A straight map from data to drawing: (low, high) -> (start, end)."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, x: float) -> float:
        return self.start + (self.end - self.start) * (x - self.low) / ((self.high - self.low) or 1)


def line_chart(lines: Sequence[Line], name: str, band=None, mark=None, floor=None, unit: str = "step") -> str:
    """Curves over steps. A curve with many points is drawn faint, with its moving average on top.

    band: (low, high), shaded as the healthy range; either may be infinite
    mark: (value, label), a dashed line to compare with
    floor: a value that the axis should reach if the data do not lie far away, such as 0
    """
    lines = [line._replace(points=thinned(finite(line.points))) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return f'<p class="empty">{escape(name)}: nothing logged yet</p>'
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    low, high = limits(values, [*(band or ()), *([mark[0]] if mark else []), *([floor] if floor is not None else [])])
    x = Scale(min(steps), max(max(steps), min(steps) + 1), LEFT, WIDTH - RIGHT)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = []
    if band and band[0] < high and band[1] > low:
        top, bottom = y(min(band[1], high)), y(max(band[0], low))
        parts.append(
            f'<rect class="band" x="{LEFT}" y="{top:.1f}" width="{WIDTH - RIGHT - LEFT}" height="{bottom - top:.1f}"/>'
        )
    for tick in ticks(low, high, 5):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(text(LEFT - 5, y(tick) + 3.5, number(tick), "end"))
    for tick in ticks(x.low, x.high, 5, whole=True):
        parts.append(text(x(tick), HEIGHT - 7, number(tick), "middle"))
    parts.append(text(LEFT - 8, HEIGHT - 7, unit, "end", "note"))
    if mark and low <= mark[0] <= high:
        at = y(mark[0])
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    for line in lines:
        noisy = is_noisy(line)
        style = f'style="--c:var(--{line.color})"'
        parts.append(path(line.points, x, y, "raw" if noisy else "curve", style))
        if noisy:
            parts.append(path(smooth(line.points), x, y, "curve", style))
        if line.dots or len(line.points) == 1:
            parts += [f'<circle class="dot" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.8" {style}/>' for a, b in line.points]
    if mark and low <= mark[0] <= high:  # on top of the curves
        parts.append(text(WIDTH - RIGHT - 2, at - 4 if at > TOP + 14 else at + 11, mark[1], "end", "note"))
    data = [[line.label, line.color, [[a, float(f"{b:.4g}")] for a, b in line.points]] for line in lines]
    frame = [x.low, x.high, LEFT, WIDTH - RIGHT]
    return svg(parts, name, f' data-lines="{escape(json.dumps(data))}" data-x="{escape(json.dumps(frame))}"')


def histogram(values: Sequence[float], name: str, color: str, bins: int = 20) -> str:
    """How often each tenth or twentieth of 0..1 occurs, with the mean as a line. Narrow: several stand in a row."""
    width, height, bottom = 172, 92, 18
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int(value * bins)))] += 1
    x = Scale(0, 1, 8, width - 8)
    y = Scale(0, max(1, *counts), height - bottom, 14)
    parts = []
    for i, count in enumerate(counts):
        left, top = x(i / bins) + 0.6, y(count)
        wide = x((i + 1) / bins) - 0.6 - left
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{y(0) - top:.1f}" '
            f'style="--c:var(--{color})"><title>{i / bins:.2f} to {(i + 1) / bins:.2f}: {count}</title></rect>'
        )
    parts.append(f'<line class="axis" x1="8" x2="{width - 8}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>')
    parts += [text(x(tick), height - 5, number(tick), "middle") for tick in (0, 0.5, 1)]
    if values:
        average = sum(values) / len(values)
        at = x(average)
        parts.append(f'<line class="mean" x1="{at:.1f}" x2="{at:.1f}" y1="2" y2="{y(0):.1f}"/>')
        side, anchor = (at + 4, "start") if average < 0.6 else (at - 4, "end")
        parts.append(text(side, 10, f"mean {average:.2f}", anchor, "note"))
    return svg(parts, name, width=width, height=height, kind="chart small")


class Dot(NamedTuple):
    """A value in 0..1 with its interval, if it has one."""

    label: str
    value: float
    color: str
    low: float | None = None
    high: float | None = None


def dot_chart(rows: Sequence[tuple[str, Sequence[Dot]]], name: str, mark=None, spread: bool = False) -> str:
    """Rows of dots on an axis from 0 to 1: (title, dots). `mark` (value, label) is a dashed line across all rows.

    With `spread` every dot has a line of its own, label to the left, interval drawn; else a row's dots share a line,
    and those that would hide another hang below it.
    """
    left = 74 if spread else 10
    x = Scale(0, 1, left, WIDTH - 14)
    top = 16 if mark else 6
    lines = [(title, [dot]) for title, dots in rows for dot in dots] if spread else list(rows)
    drops = [[0] * len(dots) if spread else below([x(dot.value) for dot in dots]) for _, dots in lines]
    starts = [top]  # of each line, and where the last one ends
    for drop in drops:
        starts.append(starts[-1] + (30 if spread else 38 + DROP * max(drop, default=0)))
    height = starts[-1] + 18
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{height - 18}"/>')
        parts.append(text(x(tick), height - 5, f"{tick:.0%}", "middle"))
    if mark:
        parts.append(text(x(mark[0]), 11, mark[1], "middle", "note"))
    for i, (title, dots) in enumerate(lines):
        at = starts[i] + (18 if spread else 25)
        if mark:
            ends = f'y1="{at - 6:.1f}" y2="{at + 8:.1f}"'
            parts.append(f'<line class="mark" x1="{x(mark[0]):.1f}" x2="{x(mark[0]):.1f}" {ends}/>')
        if spread:
            parts.append(text(left - 10, at + 4, dots[0].label, "end", "label"))
        else:
            parts.append(text(left, at - 10, title, "start", "label"))
            ends = [x(dot.value) for dot in dots]
            parts.append(
                f'<line class="thread" x1="{min(ends):.1f}" x2="{max(ends):.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
            )
        for dot, drop in zip(dots, drops[i], strict=True):
            style = f'style="--c:var(--{dot.color})"'
            if spread and dot.low is not None and dot.high is not None:
                ends = f'x1="{x(dot.low):.1f}" x2="{x(dot.high):.1f}" y1="{at:.1f}" y2="{at:.1f}"'
                parts.append(f'<line class="span" {ends} {style}/>')
            said = escape(f"{dot.label} {half_up(100 * dot.value)}%")
            where = f'cx="{x(dot.value):.1f}" cy="{at + DROP * drop:.1f}" r="4.5"'
            parts.append(f'<circle class="dot" {where} {style}><title>{said}</title></circle>')
            if spread:
                parts.append(text(x(dot.value), at - 8, f"{half_up(100 * dot.value)}%", "middle", "value"))
    return svg(parts, name, height=height)


def below(places: Sequence[float]) -> list[int]:
    """How many dots lie above each dot, where dots at these places would otherwise hide one another."""
    drops: list[int] = []
    for i, place in enumerate(places):
        taken = {drops[k] for k in range(i) if abs(places[k] - place) < 5}
        drops.append(next(drop for drop in range(i + 1) if drop not in taken))
    return drops


def half_up(x: float) -> int:
    """The nearest whole number; a half goes up."""
    return math.floor(x + 0.5 + 1e-9)


# --- the pieces -----------------------------------------------------------------------------------------------------


def svg(
    parts: Sequence[str], name: str, more: str = "", width: int = WIDTH, height: int = HEIGHT, kind: str = "chart"
) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}"{more}>'
        f"{''.join(parts)}</svg>"
    )


def text(x: float, y: float, said: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def path(points, x: Scale, y: Scale, kind: str, style: str) -> str:
    drawn = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
    return f'<path class="{kind}" d="M{drawn}" {style}/>'


def finite(points) -> list[tuple[float, float]]:
    """The points that can be drawn: no missing value, no NaN, nothing so large that it stands for infinity."""

    def drawable(z) -> bool:
        return isinstance(z, int | float) and not isinstance(z, bool) and abs(z) < 1e12  # False for NaN

    return [(a, b) for a, b in points if drawable(a) and drawable(b)]


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: neighbours are averaged."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A moving average over about a tenth of the curve, half of it before and half of it after each point."""
    reach = max(1, len(points) // 20)
    around = [[value for _, value in points[max(0, i - reach) : i + reach + 1]] for i in range(len(points))]
    return [(step, sum(near) / len(near)) for (step, _), near in zip(points, around, strict=True)]


def is_noisy(line: Line) -> bool:
    return len(line.points) > 12 and not line.dots


def start(line: Line) -> float:
    """Where the curve begins; of a noisy one, its moving average: the first batch alone says little."""
    points = thinned(finite(line.points))
    return (smooth(points) if is_noisy(line._replace(points=points)) else points)[0][1]


def limits(values: Sequence[float], wanted: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest of the axis: all values, and whatever else is wanted and does not crush the curve."""
    low, high = min(values), max(values)
    room = 1.6 * max(high - low, 1e-3 * abs(high), 1e-9)
    for value in wanted:
        if math.isfinite(value) and low - room <= value <= high + room:
            low, high = min(low, value), max(high, value)
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    margin = 0.04 * (high - low)
    return (low - margin if low else 0.0), high + margin


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) between low and high."""
    span = (high - low) / max(1, count) * (1 - 1e-9)
    power = 10.0 ** math.floor(math.log10(span))
    apart = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span)
    if whole:
        apart = max(1.0, apart)
    first = math.ceil(low / apart - 1e-9)
    return [i * apart for i in range(first, math.floor(high / apart + 1e-9) + 1)]


def number(x: float) -> str:
    """A short number: 0.25, 12, 3.4e-05, 12k."""
    if abs(x) >= 10_000:
        return f"{x / 1000:,.0f}k"
    return f"{x:.0f}" if abs(x) >= 1000 or x == 0 else f"{x:.3g}" if abs(x) >= 1e-3 else f"{x:.1g}"
