"""Measures pytunnel beside what people use instead, on this machine and in one run; prints a Markdown table.

    python tests/bench                          all rows
    python tests/bench --short                  all rows in less than two minutes
    python tests/bench --only small-32 upload   these rows
    python tests/bench --pytunnel ../other/pytunnel.py --contenders ssh,pytunnel

A cell is the median of the runs and how far they lie from it at most. The last columns tell how many times better
than `ssh -R` something is, by the medians: 2.00 × is twice the rate, or half the time or memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[0] = str(TESTS)  # not this directory: its modules are those of a package
sys.path.insert(1, str(TESTS.parent))

from bench import contenders, report, rows  # noqa: E402


def note(text: str) -> None:
    """Tell on stderr what goes on."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="less of everything")
    parser.add_argument("--repeat", type=int, metavar="N", help="runs of each row; default: 5, or 2 with --short")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=[*rows.LOOPBACK], help=", ".join(rows.LOOPBACK))
    parser.add_argument("--contenders", metavar="LIST", default="", help="only these, by parts of their names")
    default = os.environ.get("BENCH_PYTUNNEL", TESTS.parent / "pytunnel.py")
    parser.add_argument("--pytunnel", type=Path, default=default, metavar="FILE", help="of another checkout")
    options = parser.parse_args()
    if missing := contenders.missing_packages():
        sys.exit(f"error: programs are missing; apt-get install {' '.join(missing)}")
    wanted = options.contenders.split(",")
    makers = {name: make for name, make in contenders.CONTENDERS.items() if any(part in name for part in wanted)}
    sizes = rows.SHORT if options.short else rows.Sizes()
    repeat = options.repeat or (2 if options.short else 5)
    results = report.Results()
    absent: dict[str, str] = {}
    print(f"{os.cpu_count()} CPUs, Linux {platform.release()}, {contenders.versions(options.pytunnel)}\n")
    with contenders.Stage(pytunnel=options.pytunnel.resolve()) as stage:
        files = rows.make_files(stage.directory, sizes)
        contenders.start_origin(stage, files)
        running = []
        for name, make in makers.items():
            started = make(stage)
            if started is None:
                absent[name] = "not found"
            else:
                running.append(contenders.wait_until_ready(stage, started))
        for key in options.only or rows.LOOPBACK:
            note(key)
            for _ in range(repeat):
                for each in running:
                    for value in rows.LOOPBACK[key](each, sizes, stage.directory):
                        results.add(each.name, value.label, value.unit, value.value, less=value.less)
    judged = [name for name in makers if name.startswith(("frp", "pytunnel")) and name not in absent]
    print(report.table(results.lines.values(), list(makers), judged, absent))


if __name__ == "__main__":
    main()
