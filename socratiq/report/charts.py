"""Curves over steps as inline SVG. Colours are the CSS variables of report.css, so that light and dark reach in."""

import html
import math
from collections.abc import Sequence

import numpy as np

from socratiq.report.metrics import Metric

MOST_POINTS = 240  # more are averaged in groups
LEFT, RIGHT, TOP, BOTTOM = 44, 333, 8, 167  # where the axes end; 340 wide: a phone shows a unit as a pixel

Points = Sequence[tuple[float, float]]  # (step, value)


def draw(curves: Sequence[tuple[str, Points, str]], row: Metric) -> str:
    """One SVG of curves (name, points, colour). Names that begin with eval/ are drawn with dots.

    A curve of many points is drawn faint, with its moving average on top. The row of the table says which range is
    shaded and where a dashed line is drawn.
    """
    thin = [thinned(points) for _, points, _ in curves]
    dotted = [name.startswith("eval/") or len(points) == 1 for name, points, _ in curves]
    calm = [xy if dots or len(xy) <= 12 else smooth(xy) for xy, dots in zip(thin, dotted, strict=True)]
    (first, lowest), (last, highest) = np.concatenate(thin).min(0), np.concatenate(thin).max(0)
    scale = calm[0][0, 1] if row.relative else 1
    band = sorted(limit if math.isinf(limit) else limit * scale for limit in row.band)
    low, high = limits([lowest, highest], [0, *band, *row.mark[:1]])

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * (step - first) / (last - first or 1)

    def y(value: float) -> float:
        return BOTTOM + (TOP - BOTTOM) * (value - low) / (high - low)

    def line(xy: np.ndarray, kind: str) -> str:
        places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in xy)
        return f'<polyline class="{kind}" points="{places}"/>'

    drawn = [f'<text class="note" x="{LEFT - 10}" y="{BOTTOM + 17}">step</text>']
    if band and band[0] < high and band[1] > low:
        top, bottom = y(min(band[1], high)), y(max(band[0], low))
        drawn.append(f'<path style="fill:var(--band);stroke:none" d="M{LEFT} {top:.1f}H{RIGHT}V{bottom:.1f}H{LEFT}"/>')
    for value in ticks(low, high):
        drawn.append(f'<path d="M{LEFT} {y(value):.1f}H{RIGHT}"/>')
        drawn.append(f'<text class="value" x="{LEFT - 5}" y="{y(value) + 4:.1f}">{value:.5g}</text>')
    for step in ticks(first, last, whole=True):
        drawn.append(f'<text class="step" x="{x(step):.1f}" y="{BOTTOM + 17}">{step:.5g}</text>')
    if row.mark and low <= row.mark[0] <= high:
        height, said = y(row.mark[0]), html.escape(row.mark[1])
        drawn.append(f'<path class="mark" d="M{LEFT} {height:.1f}H{RIGHT}"/>')
        drawn.append(f'<text class="note" x="{RIGHT - 2}" y="{height - 4:.1f}">{said}</text>')
    for (_, _, color), raw, xy, dots in zip(curves, thin, calm, dotted, strict=True):
        faint = line(raw, "raw") if xy is not raw else ""
        circles = "".join(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>' for step, value in xy if dots)
        drawn.append(f'<g style="--c:var(--{color})">{faint}{line(xy, "curve")}{circles}</g>')
    return f'<svg class="chart" viewBox="0 0 340 190">{"".join(drawn)}</svg>'


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """At most six round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    least = max((high - low) / 5, 1 if whole else 1e-12)
    power = 10.0 ** math.floor(math.log10(least))
    apart = next(times * power for times in (1, 2, 5, 10) if times * power >= 0.999 * least)
    return [i * apart for i in range(math.ceil(low / apart), math.floor(high / apart) + 1)]


def thinned(points: Points) -> np.ndarray:
    """(N, 2), at most MOST_POINTS points: neighbours are averaged."""
    groups = np.array_split(np.array(points, float), min(len(points), MOST_POINTS))
    return np.array([group.mean(0) for group in groups])


def smooth(xy: np.ndarray) -> np.ndarray:
    """The points (N, 2) as a moving average over about a tenth of them, half of it before and half after each point."""
    window = np.ones(2 * max(1, len(xy) // 20) + 1)
    sums, counts = (np.convolve(values, window, "same") for values in (xy[:, 1], np.ones(len(xy))))
    return np.column_stack([xy[:, 0], sums / counts])


def limits(values: Sequence[float], wanted: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest of the axis: all values, and those wanted ones that do not crush the curve."""
    low, high = min(values), max(values)
    room = max(0.5 * (high - low), 1e-3 * abs(high), 1e-9)
    near = [value for value in wanted if low - room <= value <= high + room]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.04 * (high - low) or 0.5 * (abs(low) or 1)
    return low - margin if low else low, high + margin
