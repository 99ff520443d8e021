"""Line charts as SVG: axes, ticks, intervals, a legend. Colours are the page's: --c0 ... --c5, --random, --supervised.

A point at x = inf stands at the right end, past the scale; the line to it is dotted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, PLOT_HEIGHT = 460, 230
LEFT, RIGHT, TOP, BELOW = 56, 14, 12, 44  # margins of the plot
LEGEND_LINE, CHARACTER = 18, 6.6  # px, of 12 px text
NUM_COLOURS = 6
MOST_POINTS, MOST_MARKS = 400, 40  # of a series
MARKS = (
    "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0",  # circle
    "M-3,-3h6v6h-6z",  # square
    "M0,-4l4,7h-8z",  # triangle
    "M0,-4.5l4.5,4.5l-4.5,4.5l-4.5,-4.5z",  # diamond
)


@dataclass(frozen=True)
class Point:
    """spread: half of the interval, None for none."""

    x: float
    y: float
    spread: float | None = None


@dataclass(frozen=True)
class Series:
    """colour: a name of the page's colours. number: chooses the mark."""

    name: str
    points: Sequence[Point]
    colour: str
    number: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """From values to px."""

    low: float
    high: float
    first_px: float
    last_px: float
    log: bool = False

    def px(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.first_px + (value - low) / (high - low) * (self.last_px - self.first_px)


def chart(title: str, x_name: str, y_name: str, series: Sequence[Series], *, log_x: bool = False) -> str:
    """An <svg> that scales with its column. log_x: for x > 0; its ticks are the values there are."""
    series = [Series(s.name, thinned(s.points), s.colour, s.number, s.dashed) for s in series]
    points = [point for s in series for point in s.points if math.isfinite(point.y)]
    xs = sorted({point.x for point in points if math.isfinite(point.x)})
    has_end = any(math.isinf(point.x) for point in points)
    x = _x_axis(xs, log_x, has_end)
    y = _y_axis(points)
    bottom = TOP + PLOT_HEIGHT
    parts = [f"<title>{escape(title)}</title>", *_y_ticks(y), *_x_ticks(x, xs, has_end)]
    parts.append(f'<path class="axis" d="M{LEFT},{TOP}V{bottom}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{bottom + 36}" class="mid">{escape(x_name)}</text>')
    middle = TOP + PLOT_HEIGHT / 2
    parts.append(f'<text transform="translate(13,{middle:.0f}) rotate(-90)" class="mid">{escape(y_name)}</text>')
    parts += [_drawn(s, x, y) for s in series]
    legend, height = _legend(series, bottom + BELOW)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join([*parts, *legend])
        + "</svg>"
    )


def thinned(points: Sequence[Point]) -> list[Point]:
    """Every k-th point and the last, at most about MOST_POINTS."""
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = list(points[::stride])
    return kept if not points or kept[-1] is points[-1] else [*kept, points[-1]]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], at most `most`."""
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(k * power for k in (1, 2, 5, 10, 20) if math.floor(high / k / power) - low / k / power < most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _x_axis(xs: list[float], log: bool, has_end: bool) -> Axis:
    low, high = (xs[0], xs[-1]) if xs else (1.0, 1.0)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
    pad = 10 if log else 0
    return Axis(low, high, LEFT + pad, WIDTH - RIGHT - pad - (54 if has_end else 0), log)


def _y_axis(points: list[Point]) -> Axis:
    ends = [point.y + sign * (point.spread or 0) for point in points for sign in (-1, 1)] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    pad = (high - low) * 0.06 or abs(low) * 0.1 or 1.0
    return Axis(low - pad, high + pad, TOP + PLOT_HEIGHT, TOP)


def _y_ticks(y: Axis) -> list[str]:
    parts = []
    for value in ticks(y.low, y.high):
        px = y.px(value)
        parts.append(f'<path class="grid" d="M{LEFT},{px:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{px + 4:.1f}" class="end">{value:.6g}</text>')
    return parts


def _x_ticks(x: Axis, xs: list[float], has_end: bool) -> list[str]:
    """Ticks that would stand in the way of the one before are left out."""
    places = [(x.px(value), f"{value:,.6g}") for value in (xs if x.log else ticks(x.low, x.high))]
    if has_end:
        places.append((_end_px(x), "all"))
    parts, free_from = [], 0.0
    for px, text in places:
        half = len(text) * CHARACTER / 2
        if px - half >= free_from:
            free_from = px + half + 6
            parts.append(f'<path class="axis" d="M{px:.1f},{TOP + PLOT_HEIGHT}v4"/>')
            parts.append(f'<text x="{px:.1f}" y="{TOP + PLOT_HEIGHT + 18}" class="mid">{text}</text>')
    return parts


def _end_px(x: Axis) -> float:
    return WIDTH - RIGHT - (x.first_px - LEFT)


def _drawn(series: Series, x: Axis, y: Axis) -> str:
    """Line, intervals, marks; a value that is no number is a gap."""
    line, dotted, marks = "", "", ""
    before: tuple[float, float] | None = None
    for point in series.points:
        if not math.isfinite(point.y):
            before = None
            continue
        at = (_end_px(x) if math.isinf(point.x) else x.px(point.x), y.px(point.y))
        step = f"{at[0]:.1f},{at[1]:.1f}"
        if math.isinf(point.x) and before:
            dotted = f"M{before[0]:.1f},{before[1]:.1f}L{step}"
        else:
            line += f"{'L' if before else 'M'}{step}"
        before = at
        if point.spread:
            line += f"M{at[0]:.1f},{y.px(point.y - point.spread):.1f}V{y.px(point.y + point.spread):.1f}M{step}"
        if len(series.points) <= MOST_MARKS:
            marks += _mark(series, point, at)
    dash = ' stroke-dasharray="6 4"' if series.dashed else ""
    return (
        f'<g style="--c:var(--{series.colour})"><path class="line" d="{line}"{dash}/>'
        + (f'<path class="line" d="{dotted}" stroke-dasharray="1 5"/>' if dotted else "")
        + f"{marks}</g>"
    )


def _mark(series: Series, point: Point, at: tuple[float, float]) -> str:
    amount = "all" if math.isinf(point.x) else f"{point.x:,.6g}"
    spread = "" if point.spread is None else f" ± {point.spread:.4g}"
    return (
        f'<path class="mark" transform="translate({at[0]:.1f},{at[1]:.1f})" d="{MARKS[series.number % len(MARKS)]}" '
        f'data-series="{escape(series.name)}" data-x="{amount}" data-y="{point.y!r}">'
        f"<title>{escape(series.name)}, {amount}: {point.y:.4g}{spread}</title></path>"
    )


def _legend(series: Sequence[Series], top: float) -> tuple[list[str], float]:
    """Entries side by side as far as they fit, and the height of the whole."""
    parts, left, baseline = [], float(LEFT), top + 14
    for s in series:
        width = 30 + len(s.name) * CHARACTER + 14
        if left > LEFT and left + width > WIDTH:
            left, baseline = float(LEFT), baseline + LEGEND_LINE
        dash = ' stroke-dasharray="6 4"' if s.dashed else ""
        mark = MARKS[s.number % len(MARKS)] if len(s.points) <= MOST_MARKS else ""
        parts.append(
            f'<g style="--c:var(--{s.colour})" transform="translate({left:.1f},{baseline:.0f})">'
            f'<path class="line" d="M0,-4h24"{dash}/>'
            + (f'<path class="mark" transform="translate(12,-4)" d="{mark}"/>' if mark else "")
            + f'<text x="30">{escape(s.name)}</text></g>'
        )
        left += width
    return parts, baseline + 8
