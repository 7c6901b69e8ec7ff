"""Small line charts as SVG text. They take the colours of the page, or their own in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from repnoise.report.records import Point

WIDTH, HEIGHT = 340, 230
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 12, 38

STYLE = (
    ".plot{--ink:#1d2733;--soft:#5b6876;--grid:#dde3e9;--undefended:#b3400e;--defended:#0b5fa5;"
    "--ignorant:#4d5964;--random:#7a6a9b}"
    ".plot text{font:11px system-ui,sans-serif;fill:var(--soft)}"
    ".plot .grid{stroke:var(--grid);stroke-width:1}.plot .axis{stroke:var(--soft);stroke-width:1}"
    ".plot .line{fill:none;stroke-width:2.2;stroke-linejoin:round}.plot .band{opacity:.16;stroke:none}"
    ".plot .undefended{stroke:var(--undefended);fill:var(--undefended)}"
    ".plot .defended,.plot .term{stroke:var(--defended);fill:var(--defended)}"
    ".plot .ignorant{stroke:var(--ignorant);fill:var(--ignorant)}"
    ".plot .random{stroke:var(--random);fill:var(--random)}"
    ".plot .line{fill:none}.plot .undefended.line{stroke-dasharray:none}"
    ".plot .ignorant.line{stroke-dasharray:6 4}.plot .random.line{stroke-dasharray:2 3}"
)

Line = Sequence[Point]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `wanted` of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / max(wanted - 1, 1)
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(
    lines: Mapping[str, Line],
    *,
    title: str,
    x_label: str = "attack steps",
    y_range: tuple[float, float] | None = None,
    line_class: str | None = None,
) -> str:
    """One panel. The keys of `lines` are the CSS classes of the lines (or `line_class` for all)."""
    points = [point for line in lines.values() for point in line]
    right = max((float(p.step) for p in points), default=1.0) or 1.0
    left = min((float(p.step) for p in points), default=0.0)
    left = 0.0 if left < right / 4 else left
    if y_range is None:
        values = [float(v) for p in points for v in (p.mean, p.lo, p.hi) if v is not None] or [
            0.0,
            1.0,
        ]
        margin = (max(values) - min(values)) * 0.06 or abs(values[0]) * 0.1 or 1.0
        y_range = (min(values) - margin, max(values) + margin)
    bottom, top = y_range

    def x(step: float) -> float:
        return LEFT + (step - left) / ((right - left) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        clipped = min(max(value, bottom), top)
        return TOP + (top - clipped) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    words = escape(describe(title, lines))
    out = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">']
    for tick in ticks(bottom, top):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(left, right):
        out.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    out.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    for name, line in lines.items():
        style = line_class or name
        band = [(p.step, p.lo, p.hi) for p in line if p.lo is not None and p.hi is not None]
        if len(band) > 1:
            edge = [(x(step), y(hi)) for step, _, hi in band] + [(x(step), y(lo)) for step, lo, _ in band[::-1]]
            out.append(f'<polygon class="band {style}" points="{_points(edge)}"/>')
        path = [(x(p.step), y(p.mean)) for p in line]
        out.append(f'<polyline class="line {style}" points="{_points(path)}"/>')
        if len(line) <= 20:
            out += [f'<circle class="{style}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in path]
    return "".join(out) + "</svg>"


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in pairs)


def describe(title: str, lines: Mapping[str, Line]) -> str:
    """The chart in words, for readers who do not see it."""
    ends = [f"{name} ends at {line[-1].mean:.2f}" for name, line in lines.items() if line]
    return f"{title}: {', '.join(ends) or 'no points'}"


def standalone(svg: str) -> str:
    """The same chart as a file of its own."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * HEIGHT}"'
    start, rest = svg.split(">", 1)
    paper = f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
    return f"{head}{start.removeprefix('<svg')}>{paper}{rest}\n"


def thin(line: Line, most: int = 200) -> Line:
    """At most `most` points, each the mean of its stretch of the line."""
    if len(line) <= most:
        return line
    size = math.ceil(len(line) / most)
    chunks = [line[start : start + size] for start in range(0, len(line), size)]
    return [Point(c[-1].step, sum(p.mean for p in c) / len(c)) for c in chunks]
