"""What was measured, as a Markdown table and as a plot. Nothing here runs anything."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

BASE = "ssh -R"  # what ratios are against


@dataclass
class Line:
    """One line of the table: what each contender's runs have shown."""

    label: str
    unit: str
    less: bool = False  # whether less is better
    values: dict[str, list[float]] = field(default_factory=dict)  # contender -> one value of each run

    def median(self, contender: str) -> float | None:
        """The median of a contender's runs, None without any."""
        values = self.values.get(contender)
        return statistics.median(values) if values else None

    def ratio(self, contender: str, base: str = BASE) -> float | None:
        """How many times better than `base` the contender is, by their medians; None where one of them is missing."""
        better, worse = self.median(contender), self.median(base)
        if self.less:
            better, worse = worse, better
        return better / worse if better is not None and worse else None


class Results:
    """All lines, in the order in which they came."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        self.lag: dict[str, Counter[float]] = defaultdict(Counter)  # contender -> the histogram of its event loop

    def add(self, contender: str, label: str, unit: str, value: float, *, less: bool = False) -> None:
        """Note one run's value."""
        line = self.lines.setdefault(label, Line(label, unit, less))
        line.values.setdefault(contender, []).append(value)


def quantile(buckets: Mapping[float, int], share: float) -> float:
    """The bound below which so large a share of a histogram's samples lies."""
    total = max(buckets.values())
    return min(bound for bound, count in buckets.items() if count >= share * total)


def number(value: float) -> str:
    """Three digits, or all that stand before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cell(values: Sequence[float]) -> str:
    """The median, and how far the runs lie from it at most, in per cent."""
    median = statistics.median(values)
    if len(values) == 1 or not median:
        return number(median)
    return f"{number(median)} ±{max(abs(value - median) for value in values) / abs(median):.0%}"


def times(ratio: float | None) -> str:
    """A ratio as the table shows it."""
    return "" if ratio is None else f"{ratio:.2f} ×" if ratio < 10 else f"{ratio:.0f} ×"


def table(lines: Iterable[Line], contenders: Sequence[str], judged: Sequence[str], absent: Mapping[str, str]) -> str:
    """A Markdown table: a column for each contender, then how much better than BASE each of `judged` is.

    `absent` tells why a contender has no values.
    """
    heads = ["", "unit", *contenders, *(f"{name} : {BASE}" for name in judged)]
    rows = [heads, ["---", "---", *["--:"] * (len(heads) - 2)]]
    for line in lines:
        cells = [cell(line.values[name]) if name in line.values else absent.get(name, "") for name in contenders]
        rows.append([line.label, line.unit, *cells, *(times(line.ratio(name)) for name in judged)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ---------------------------------------------------------------------------------------- Plot

COLOURS = ("#9aa5b1", "#2f81b7", "#1f4e79")  # of what is judged, the last one strongest
LABELS, BARS, BAR, GAP = 470, 400, 11, 12  # pixels: the labels' and the bars' width, a bar's height, between two lines
TICKS = (0.01, 0.1, 0.25, 0.5, 1, 2, 4, 10, 100, 1000)


def plot(lines: Iterable[Line], judged: Sequence[str], title: str) -> str:
    """An SVG: how many times better than BASE each of `judged` is in each line, on a logarithmic scale."""
    drawn = [line for line in lines if any(line.ratio(name) for name in judged)]
    ratios = [ratio for line in drawn for name in judged if (ratio := line.ratio(name))]
    low, high = min([0.5, *ratios]) / 1.6, max([2.0, *ratios]) * 1.1  # a text stands below the least
    colours = dict(zip(judged, COLOURS[-len(judged) :] if judged else (), strict=False))

    def x(ratio: float) -> float:
        return LABELS + BARS * math.log(ratio / low) / math.log(high / low)

    top, step = 62, BAR * len(judged) + GAP
    bottom = top + step * len(drawn)
    parts = [_text(12, 22, title, size=15, weight="bold")]
    for number, (name, colour) in enumerate(colours.items()):
        left = 12 + 190 * number
        parts += [_rectangle(left, 34, 11, 11, colour), _text(left + 17, 44, name)]
    for tick in (tick for tick in TICKS if low <= tick <= high):
        colour = "#57606a" if tick == 1 else "#d8dee4"
        parts.append(f'<line x1="{x(tick):.1f}" y1="{top - 4}" x2="{x(tick):.1f}" y2="{bottom}" stroke="{colour}"/>')
        parts.append(_text(x(tick), bottom + 14, f"{tick:g} ×", anchor="middle"))
    parts.append(_text(x(1), top - 8, BASE, anchor="middle"))
    for row, line in enumerate(drawn):
        y = top + step * row
        parts.append(_text(LABELS - 12, y + step / 2 - GAP / 2 + 4, line.label, anchor="end"))
        shown = [(colours[name], ratio) for name in judged if (ratio := line.ratio(name))]
        y += BAR * (len(judged) - len(shown)) / 2
        for number, (colour, ratio) in enumerate(shown):
            left, right = sorted((x(1), x(ratio)))
            parts.append(_rectangle(left, y + BAR * number, max(right - left, 1), BAR - 1, colour))
            at, anchor = (right + 4, "start") if ratio >= 1 else (left - 4, "end")
            parts.append(_text(at, y + BAR * number + 9, times(ratio), size=9, anchor=anchor))
    width, height = LABELS + BARS + 60, bottom + 26
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return "\n".join([head, _rectangle(0, 0, width, height, "#ffffff"), *parts, "</svg>\n"])


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start", weight: str = "normal") -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="#1f2328"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
