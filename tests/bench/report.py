"""What was measured, as a Markdown table and as a plot. Nothing here runs anything."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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
