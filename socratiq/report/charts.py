"""Curves over steps as inline SVG, drawn by matplotlib. Colours are CSS variables, so that light and dark reach in."""

import io
import math
import re
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from socratiq.report.metrics import Metric

MOST_POINTS = 240  # more are averaged in groups
# matplotlib knows no CSS variables: each colour of report.css is drawn as a code, which becomes var(--name) in the SVG.
COLORS = ("sft", "dpo", "ppo", "human", "held", "second", "card", "muted", "grid", "band")
CODES = {name: f"#ab{number:04x}" for number, name in enumerate(COLORS)}

Points = Sequence[tuple[float, float]]  # (step, value)


def draw(curves: Sequence[tuple[str, Points, str]], row: Metric, run: str) -> str:
    """One SVG of curves (name, points, colour). Names that begin with eval/ are drawn with dots.

    A curve of many points is drawn faint, with its moving average on top. docs/metrics.md says which range is
    shaded and where a dashed line is drawn. Row and run keep the ids of the charts on a page apart.
    """
    salt = f"{run} {row.names}"
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 11}):
        figure = Figure(figsize=(340 / 72, 190 / 72))  # 340 wide: a phone shows a unit as a pixel
        axes = figure.add_axes((0.13, 0.12, 0.85, 0.84), frameon=False)
        axes.tick_params(length=0, labelcolor=CODES["muted"])
        axes.grid(axis="y", color=CODES["grid"])
        axes.margins(x=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=axis is axes.xaxis))
            axis.set_major_formatter("{x:.5g}")
        note = {"ha": "right", "style": "italic", "color": CODES["muted"]}
        axes.annotate("step", (0, 0), (-10, -17), "axes fraction", "offset points", **note)
        values, start = [], None
        for curve, points, color in curves:
            x, y = thinned(points).T
            values += [*y]
            dots = curve.startswith("eval/") or len(x) == 1
            style = {"color": CODES[color], "clip_on": False, "solid_capstyle": "round"}
            if len(x) > 12 and not dots:
                axes.plot(x, y, lw=1, alpha=0.32, **style)
                y = smooth(y)
            axes.plot(x, y, lw=2.2, marker="o" if dots else None, ms=6, mec=CODES["card"], **style)
            start = y[0] if start is None else start  # of the first curve
        scale = start if row.relative else 1
        band = sorted(limit if math.isinf(limit) else limit * scale for limit in row.band)
        low, high = limits(values, [0, *band, *row.mark[:1]])
        axes.set_ylim(low, high)
        if band and band[0] < high and band[1] > low:
            axes.axhspan(max(band[0], low), min(band[1], high), color=CODES["band"], lw=0)
        if row.mark and low <= row.mark[0] <= high:
            axes.axhline(row.mark[0], color=CODES["muted"], lw=1, ls=(0, (4, 4)))
            axes.annotate(row.mark[1], (1, row.mark[0]), (-2, 4), ("axes fraction", "data"), "offset points", **note)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True)
    svg = re.sub(r' id="[a-z2.]+_\d+"| font-family: [^;"]+;?|<style.*?</style>', "", drawn.getvalue(), flags=re.DOTALL)
    for color, code in CODES.items():
        svg = svg.replace(code, f"var(--{color})")
    return '<svg class="chart" viewBox="0 0 340 190">' + svg.partition("</metadata>")[2]


def thinned(points: Points) -> np.ndarray:
    """(N, 2), at most MOST_POINTS points: neighbours are averaged."""
    groups = np.array_split(np.array(points, float), min(len(points), MOST_POINTS))
    return np.array([group.mean(0) for group in groups])


def smooth(values: np.ndarray) -> np.ndarray:
    """A moving average over about a tenth of the curve, half of it before and half of it after each point."""
    window = np.ones(2 * max(1, len(values) // 20) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def limits(values: Sequence[float], wanted: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest of the axis: all values, and those wanted ones that do not crush the curve."""
    low, high = min(values), max(values)
    room = max(0.5 * (high - low), 1e-3 * abs(high), 1e-9)
    near = [value for value in wanted if low - room <= value <= high + room]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.04 * (high - low) or 0.5 * (abs(low) or 1)
    return low - margin if low else low, high + margin
