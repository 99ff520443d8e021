"""Line plots as SVG, without a library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN = 360, 260, 48  # px, of a plot
COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d6a9f", "#e08e00", "#444444")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """lines: name -> (x, y) in the order of x."""

    title: str
    x_title: str
    lines: Mapping[str, Points]
    log_x: bool = False


def draw(plots: Sequence[Plot]) -> str:
    """The plots side by side, each with its legend below."""
    most = max(len(plot.lines) for plot in plots)
    height = HEIGHT + 16 * most
    body = [f'<g transform="translate({WIDTH * nth},0)">{_plot(plot)}</g>' for nth, plot in enumerate(plots)]
    size = f'width="{WIDTH * len(plots)}" height="{height}"'
    style = 'font-family="sans-serif" font-size="11"'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', paper, *body, "</svg>\n"])


def _plot(plot: Plot) -> str:
    points = [point for line in plot.lines.values() for point in line]
    parts = [_text(WIDTH / 2, 18, plot.title, "middle"), _text(WIDTH / 2, HEIGHT - 8, plot.x_title, "middle")]
    if not points:
        return "".join(parts)
    xs, ys = sorted({x for x, _ in points}), [y for _, y in points]
    left, right = _along(xs[0], plot), _along(xs[-1], plot)
    low, high = min(ys), max(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (_along(x, plot) - left) / (right - left or 1)
        up = (y - low) / (high - low or 1)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    for value in (low, (low + high) / 2, high):
        _, y = place(xs[0], value)
        parts.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        parts.append(_text(MARGIN - 4, y + 4, f"{value:.3g}", "end"))
    for value in xs if len(xs) <= 6 else (xs[0], xs[len(xs) // 2], xs[-1]):
        parts.append(_text(place(value, low)[0], HEIGHT - MARGIN + 16, f"{value:g}", "middle"))
    for nth, (name, line) in enumerate(plot.lines.items()):
        colour = COLOURS[nth % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<path d="M{MARGIN} {HEIGHT + 16 * nth}h16" stroke="{colour}" stroke-width="3"/>')
        parts.append(_text(MARGIN + 22, HEIGHT + 16 * nth + 4, name, "start"))
    return "".join(parts)


def _along(x: float, plot: Plot) -> float:
    return math.log(x) if plot.log_x else x


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
