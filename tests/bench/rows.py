"""The rows: what is done with each contender, and what of it goes into the table."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import loads
from .contenders import Running

MB = 1_000_000


@dataclass(frozen=True)
class Sizes:
    """How much of everything, in the full mode."""

    seconds: float = 3.0  # of each run of wrk
    download: int = 600 * MB
    upload: int = 300 * MB


SHORT = Sizes(seconds=1.0, download=200 * MB, upload=100 * MB)


class Value(NamedTuple):
    """What one run has shown."""

    label: str
    unit: str
    value: float
    less: bool = False  # whether less is better


Measure = Callable[[Running, Sizes, Path], Iterator[Value]]


def _wrk(label: str, path: str, connections: int, *fields: str) -> Measure:
    """Requests, as many as go."""

    def measure(running: Running, sizes: Sizes, _: Path) -> Iterator[Value]:
        found = loads.wrk(running.files, path, connections, sizes.seconds, *fields)
        yield Value(label, "requests/s", found.rate)
        yield Value(f"{label}: p50", "ms", found.p50, True)
        yield Value(f"{label}: p99", "ms", found.p99, True)

    return measure


def _download(running: Running, sizes: Sizes, _: Path) -> Iterator[Value]:
    yield Value("one large download", "MB/s", loads.transfer(running.files, "/large"))


def _downloads(running: Running, sizes: Sizes, _: Path) -> Iterator[Value]:
    yield Value("8 downloads at once, total", "MB/s", loads.transfers(running.files, "/quarter", 8))


def _upload(running: Running, sizes: Sizes, directory: Path) -> Iterator[Value]:
    yield Value("one large upload", "MB/s", loads.transfer(running.app, "/upload", directory / "upload"))


LOOPBACK: dict[str, Measure] = {
    "small-1": _wrk("1 KB JSON, 1 connection", "/small", 1),
    "small-32": _wrk("1 KB JSON, 32 connections", "/small", 32),
    "small-256": _wrk("1 KB JSON, 256 connections", "/small", 256),
    "new": _wrk("1 KB JSON, a new connection each, 32 at a time", "/small", 32, "Connection: close"),
    "64k": _wrk("64 KiB, 32 connections", "/64k", 32),
    "download": _download,
    "downloads": _downloads,
    "upload": _upload,
}


def make_files(directory: Path, sizes: Sizes) -> dict[str, Path]:
    """Write what the origin serves; random, so that nobody gains by compressing it."""
    block = random.Random(1).randbytes(16 * MB)
    files = {"64k": 64 * 1024, "large": sizes.download, "quarter": sizes.download // 4, "upload": sizes.upload}
    for name, size in files.items():
        with (directory / name).open("wb") as file:
            for start in range(0, size, len(block)):
                file.write(block[: size - start])
    return {name: directory / name for name in files}
