"""Measures pytunnel beside what people use instead, on this machine and in one run; prints a Markdown table.

    python tests/bench                             all rows
    python tests/bench --short                     all rows in less than two minutes
    python tests/bench --only small-32 upload      these rows; a part of a name stands for all that begin with it
    python tests/bench --only uplink --repeat 1    small requests beside a download, where an uplink is the bottleneck

To judge a change of pytunnel:

    python tests/bench --pytunnel ../other/pytunnel.py --contenders ssh,pytunnel --only uplink-beside
    python tests/bench --contenders uvloop --only uplink-beside --set ACK_DELAY=0.02 --congestion cubic

A cell is the median of the runs and how far they lie from it at most. The last columns tell how many times better
than `ssh -R` something is, by the medians: 2.00 × is twice the rate, or half the time or memory. All contenders run
at the same time and are measured in turns. `straight` is the origin itself, without a tunnel; over the home uplink
and the long path it is what a single TCP connection gets.

All is measured in network namespaces; without root the rows of one machine are measured as it is, and the others
are not. On one machine the congestion control is cubic unless a program asks for another one. Over the home uplink and
the long path the route forces it on all connections: a program that asks for another one gets EPERM.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import functools
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent.parent
sys.path[0] = str(TESTS)  # not this directory: its modules are those of a package
sys.path.insert(1, str(TESTS.parent))

from bench import contenders, loads, network, report, rows  # noqa: E402
from bench.contenders import Side  # noqa: E402

BEGAN = time.monotonic()
Sides = Callable[[], AbstractContextManager[tuple[Side, Side]]]
HERE = tuple(name for name in contenders.CONTENDERS if name != "ssh -C -R")
TUNNELS = ("straight", "ssh -R", "frp", "pytunnel, uvloop")  # where the network is the bottleneck, and not the program


class Place(NamedTuple):
    """Rows that are measured in one network."""

    prefix: str  # of their labels
    rows: dict[str, rows.Measure]
    sides: Sides
    contenders: Sequence[str]
    fresh: bool = False  # whether all is started anew for each run


@contextlib.contextmanager
def this_machine() -> Iterator[tuple[Side, Side]]:
    """Both sides are here: where we may, in a network namespace that no setting of this machine touches."""
    with network.one_machine() if os.geteuid() == 0 else contextlib.nullcontext((Side(), Side())) as sides:
        yield sides


def places(congestion: Sequence[str], delay: float) -> Iterator[Place]:
    """All of them, in the order of the table. What congestion control changes little in is measured with one only."""
    yield Place("", rows.LOOPBACK, this_machine, HERE)
    yield Place("", rows.MEMORY, this_machine, HERE[1:], fresh=True)
    for name in congestion:
        yield Place(f"home uplink, {name}: ", rows.UPLINK, functools.partial(network.uplink, name, delay), TUNNELS)
    last = congestion[-1]
    compressing = (*TUNNELS, "ssh -C -R")
    yield Place(f"home uplink, {last}: ", rows.TEXTS, functools.partial(network.uplink, last, delay), compressing)
    for some in (rows.LONG_UPLOAD, rows.LONG):
        yield Place(f"long path, {last}: ", some, functools.partial(network.long_path, last), TUNNELS)


def note(text: str) -> None:
    """Tell on stderr what goes on, after how many seconds."""
    print(f"{time.monotonic() - BEGAN:4.0f} s  {text}", file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line; what is missing on this machine ends the program."""
    names = [*rows.LOOPBACK, *rows.MEMORY, *rows.UPLINK, *rows.TEXTS, *rows.LONG_UPLOAD, *rows.LONG]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="less of everything")
    parser.add_argument("--repeat", type=int, metavar="N", help="runs of each row; default: 3, or 1 with --short")
    parser.add_argument("--only", nargs="+", metavar="ROW", default=[""], help=", ".join(names))
    parser.add_argument("--contenders", metavar="LIST", default="", help="only these, by parts of their names")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the ratios, too")
    source = os.environ.get("BENCH_PYTUNNEL", TESTS.parent / "pytunnel.py")
    parser.add_argument(
        "--pytunnel", type=Path, default=source, metavar="FILE", help="default: $BENCH_PYTUNNEL, or ours"
    )
    parser.add_argument("--set", action="append", default=[], metavar="LIMIT=N", help="another number in its limits")
    parser.add_argument("--congestion", metavar="NAME", help="bbr or cubic; default: both, or cubic with --short")
    parser.add_argument("--uplink-delay", type=float, default=0.0, metavar="MS", help="of the home uplink, each way")
    options = parser.parse_args()
    options.limits = {key: ast.literal_eval(value) for key, _, value in (text.partition("=") for text in options.set)}
    options.names = [name for name in names if name.startswith(tuple(options.only))]
    if not options.names:
        parser.error(f"no such row; there are {', '.join(names)}")
    if missing := contenders.missing_packages():
        sys.exit(f"error: programs are missing: apt-get install {' '.join(missing)}")
    here = [*rows.LOOPBACK, *rows.MEMORY]
    if os.geteuid() and not {*options.names} <= {*here}:
        sys.exit(f"error: network namespaces take root; without: --only {' '.join(here)}")
    return options


def measure(place: Place, options: argparse.Namespace, files: Path, results: report.Results) -> None:
    """Run the chosen rows of one place."""
    repeat = options.repeat or (1 if options.short else 3)
    if any(name in options.names for name in place.rows):
        for _ in range(repeat if place.fresh else 1):
            _measure(place, 1 if place.fresh else repeat, options, files, results)


def _measure(place: Place, repeat: int, options: argparse.Namespace, files: Path, results: report.Results) -> None:
    """Start all contenders of a place, and take turns with them."""
    sizes = rows.SHORT if options.short else rows.Sizes()
    wanted = [name for name in place.contenders if any(part in name for part in options.contenders.split(","))]
    with place.sides() as sides, contenders.Stage(*sides, options.pytunnel.resolve(), options.limits) as stage:
        contenders.start_origin(stage, files)
        running = contenders.start_contenders(stage, wanted)
        for name in (name for name in place.rows if name in options.names):
            note(f"{place.prefix}{name}")
            for each in [*running] * repeat:
                for value in place.rows[name](each, sizes, files):
                    label = place.prefix + value.label
                    results.add(each.name, label, value.unit, value.value, less=value.less)
        for each in running:
            if each.is_pytunnel:
                plain = each.files._replace(host="")
                results.lag[each.name].update(loads.lag(plain))
        if place.prefix:
            found = collections.Counter(network.used(sides[0], sides[1].address))
            note(f"connections between home and server: {dict(found)}")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended by SIGTERM"))  # not without what was started
    options = parse_arguments()
    results = report.Results()
    print(f"{os.cpu_count()} CPUs, Linux {platform.release()}, {contenders.versions(options.pytunnel)}\n", flush=True)
    congestion = [options.congestion] if options.congestion else network.available()[-1 if options.short else 0 :]
    with tempfile.TemporaryDirectory(prefix="bench-files-") as directory:
        rows.make_files(Path(directory), rows.SHORT if options.short else rows.Sizes())
        try:
            for place in places(congestion, options.uplink_delay / 1000):
                measure(place, options, Path(directory), results)
        finally:  # what was measured until then is worth something
            show(results, options.plot)


def show(results: report.Results, plot: Path | None) -> None:
    """Print the table, and draw the plot when it is asked for."""
    for name, buckets in results.lag.items():
        late = 1000 * report.quantile(buckets, 0.99)
        results.add(name, "how late the server's event loop is during all of it: p99, at most", "ms", late, less=True)
    seen = {name for line in results.lines.values() for name in line.values}
    columns = [name for name in contenders.CONTENDERS if name in seen or name == "frp"]
    judged = [name for name in columns if name in seen and name.startswith(("frp", "pytunnel"))]
    absent = {} if "frp" in seen else {"frp": "not found" if contenders.find("frps") is None else ""}
    print(report.table(results.lines.values(), columns, judged, absent))
    if plot:
        title = f"Times better than {report.BASE}"
        plot.write_text(report.plot(results.lines.values(), judged, title), encoding="utf-8")


if __name__ == "__main__":
    main()
