"""Curves as one SVG picture, drawn by hand: lines, bands around them, and rings at single measurements."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 340, 56, 16, 60, 40
COLOURS = ("#1f6feb", "#d1570a", "#1a7f37", "#8250df", "#cf222e")
BLOCKS = "▁▂▃▄▅▆▇█"
Number = int | float


@dataclass(frozen=True)
class Curve:
    """One colour of the picture: `points` (x, y) are joined, `band` holds (x, low, high), `rings` stand alone."""

    name: str
    points: Sequence[tuple[Number, Number]]
    band: Sequence[tuple[Number, Number, Number]] = ()
    rings: Sequence[tuple[Number, Number]] = ()


def draw(title: str, curves: Sequence[Curve]) -> str:
    """The picture. Its axes begin at step 0 and take in everything that is drawn; what is not finite is left out."""
    xs = [x for curve in curves for x, *_ in (*curve.points, *curve.band, *curve.rings)]
    ys = [y for curve in curves for _, *values in (*curve.points, *curve.band, *curve.rings) for y in values]
    across, up = ticks(0.0, max(xs, default=1.0), 6), ticks(*bounds(ys), 5)
    right, low, high = max(xs, default=1.0) or 1.0, up[0], up[-1]

    def place(x: Number, y: Number) -> str:
        share = (y - low) / (high - low)
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * x / right:.1f},{TOP + (HEIGHT - TOP - BOTTOM) * (1 - share):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20">{escape(title)}</text>',
    ]
    names = [
        f'<tspan fill="{COLOURS[index % len(COLOURS)]}" dx="{16 if index else 0}">{escape(curve.name)}</tspan>'
        for index, curve in enumerate(curves)
    ]
    parts.append(f'<text x="{LEFT}" y="42">{"".join(names)}</text>')  # above the curves, so that it hides none
    for tick in up:
        x, y = map(float, place(0, tick).split(","))
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in (each for each in across if each <= right):
        x, y = map(float, place(tick, low).split(","))
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tick:g}</text>')
    for index, curve in enumerate(curves):
        colour = COLOURS[index % len(COLOURS)]
        band = [(x, one, other) for x, one, other in curve.band if math.isfinite(one) and math.isfinite(other)]
        outline = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        parts.append(
            f'<polygon points="{joined(outline, place)}" fill="{colour}" fill-opacity="0.18"/>' if band else ""
        )
        parts.append(
            f'<polyline points="{joined(curve.points, place)}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        for centre in (place(*each).split(",") for each in curve.rings if math.isfinite(each[1])):
            x_y = f'cx="{centre[0]}" cy="{centre[1]}"'
            parts.append(f'<circle {x_y} r="5" fill="none" stroke="{colour}" stroke-width="2"/>')
    return "\n".join([*(part for part in parts if part), "</svg>", ""])


def joined(points: Sequence[tuple[Number, Number]], place: Callable[[Number, Number], str]) -> str:
    """The points as SVG wants them."""
    return " ".join(place(x, y) for x, y in points if math.isfinite(y))


def bounds(values: Sequence[Number]) -> tuple[Number, Number]:
    """The least and the greatest finite value, never the same."""
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def ticks(low: Number, high: Number, about: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about so many.

    >>> ticks(0.13, 0.97, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / about or 1.0
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(math.log(factor * unit / raw)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def sparkline(values: Sequence[Number], *, low: Number, high: Number, width: int = 24) -> str:
    """The course of some values in one line of text, between `low` and `high`; neighbours are averaged to fit.

    >>> sparkline([0.0, 0.5, 1.0], low=0.0, high=1.0)
    '▁▅█'
    """
    count = min(width, len(values))
    parts = [values[index * len(values) // count : (index + 1) * len(values) // count] for index in range(count)]
    means = [sum(part) / len(part) for part in parts]
    shares = [(mean - low) / (high - low) if high > low else 0.0 for mean in means]
    return "".join(BLOCKS[round(min(max(share, 0.0), 1.0) * (len(BLOCKS) - 1))] for share in shares)
