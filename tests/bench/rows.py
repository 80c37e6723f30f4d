"""The rows: what is done with each contender, and what of it goes into the table."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import loads, network, texts
from .contenders import Running, Target

MB = 1_000_000


@dataclass(frozen=True)
class Sizes:
    """How much of everything, in the full mode."""

    seconds: int = 2  # of each run of wrk, which knows whole seconds only; of WebSockets and events half of it
    download: int = 600 * MB
    upload: int = 300 * MB
    settle: float = 2.0  # seconds until a transfer's rate counts
    beside: float = 8.0  # seconds of small requests beside a download
    json: int = 21 * MB
    text: int = 4 * MB  # of HTML, and of JavaScript
    clients: int = 1000


SHORT = Sizes(
    seconds=1, download=200 * MB, upload=100 * MB, settle=1.0, beside=2.5, json=3 * MB, text=1 * MB, clients=250
)
PAUSE = 0.05  # seconds before each small request: so many leave a download beside them 99 % of 20 Mbit/s
PATIENCE = 20.0  # seconds that a contender may go on sending what nobody wants any more, or growing
STEADY, LOOK = 6, 0.15  # looks, and seconds between two, in which memory may grow by 1 % to count as steady


class Value(NamedTuple):
    """What one run has shown."""

    label: str
    unit: str
    value: float
    less: bool = False  # whether less is better


Measure = Callable[[Running, Sizes, Path], Iterator[Value]]


# ---------------------------------------------------------------------------------------- One machine


def _wrk(label: str, path: str, connections: int, *fields: str, varied: bool = False) -> Measure:
    """Requests, as many as go."""

    def measure(running: Running, sizes: Sizes, _: Path) -> Iterator[Value]:
        found = loads.wrk(running.files, path, connections, sizes.seconds, *fields, varied=varied)
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


def _websockets(label: str, connections: int, in_flight: int) -> Measure:
    """Small messages there and back, so many under way on each connection."""

    def measure(running: Running, sizes: Sizes, _: Path) -> Iterator[Value]:
        yield Value(label, "messages/s", loads.websockets(running.app, sizes.seconds / 2, connections, in_flight))

    return measure


def _event(running: Running, sizes: Sizes, _: Path) -> Iterator[Value]:
    found = loads.events(running.app, sizes.seconds / 2)
    yield Value("an event, from the local service to the visitor: p50", "ms", statistics.median(found), True)


def _tcp_connect(running: Running, sizes: Sizes, _: Path) -> Iterator[Value]:
    """New connections, each with one small request and its answer; the tunnel does not know that this is HTTP."""
    if running.tcp:
        found = loads.wrk(running.tcp[0], "/small", 32, sizes.seconds, "Connection: close")
        yield Value("TCP: new connections, 32 at a time", "connections/s", found.rate)
        yield Value("TCP: new connections, 32 at a time: p50", "ms", found.p50, True)


def _tcp_download(running: Running, sizes: Sizes, _: Path) -> Iterator[Value]:
    if running.tcp:
        yield Value("TCP: one download", "MB/s", loads.transfer(running.tcp[0], "/large"))


def _tcp_upload(running: Running, sizes: Sizes, directory: Path) -> Iterator[Value]:
    if running.tcp:
        yield Value("TCP: one upload", "MB/s", loads.transfer(running.tcp[1], "/upload", directory / "upload"))


LOOPBACK: dict[str, Measure] = {
    "small-1": _wrk("1 KB JSON, 1 connection", "/small", 1),
    "small-32": _wrk("1 KB JSON, 32 connections", "/small", 32),
    "small-256": _wrk("1 KB JSON, 256 connections", "/small", 256),
    "varied": _wrk("1 KB JSON, 32 connections, no two heads alike", "/varied", 32, varied=True),
    "new": _wrk("1 KB JSON, a new connection each, 32 at a time", "/small", 32, "Connection: close"),
    "64k": _wrk("64 KiB, 32 connections", "/64k", 32),
    "download": _download,
    "downloads": _downloads,
    "upload": _upload,
    "ws-1": _websockets("WebSocket there and back, 1 connection, 64 under way", 1, 64),
    "ws-32": _websockets("WebSocket there and back, 32 connections, 1 under way on each", 32, 1),
    "event": _event,
    "tcp-connect": _tcp_connect,
    "tcp-download": _tcp_download,
    "tcp-upload": _tcp_upload,
}

# ---------------------------------------------------------------------------------------- Memory


def _idle(running: Running, sizes: Sizes, _: Path) -> Iterator[Value]:
    for side, now in _memory(running).items():
        yield Value(f"memory of the {side}, idle", "MiB", now, True)


def _tunnels(running: Running, sizes: Sizes, _: Path) -> Iterator[Value]:
    """What a server needs for each client that does nothing: of those that are a process each, some are enough."""
    if running.more is None:
        return
    count = sizes.clients if running.is_pytunnel else sizes.clients // 50
    before = _memory(running)["server"]
    running.more(count)
    grown = _steady(running)["server"] - before
    label = f"memory of the server, each idle tunnel ({sizes.clients:,} clients; else {sizes.clients // 50})"
    yield Value(label, "KiB", grown * 1024 / count, True)


def _streams(running: Running, sizes: Sizes, _: Path) -> Iterator[Value]:
    """What an open event stream needs on which nothing happens."""
    yield from _grown(running, running.app, "/quiet", 200, "each of 200 open streams", "KiB", 1024 / 200)


def _stalled(running: Running, sizes: Sizes, _: Path) -> Iterator[Value]:
    """What visitors cost who ask for 1 GiB each and read only the head."""
    yield from _grown(
        running, running.files, "/gib", 100, "with 100 stalled readers of 1 GiB, more than idle", "MiB", 1
    )


def _grown(
    running: Running, target: Target, path: str, count: int, label: str, unit: str, scale: float
) -> Iterator[Value]:
    before = _memory(running)
    with loads.holding(target, path, count):
        after = _steady(running)
    for side, now in after.items():
        yield Value(f"memory of the {side}, {label}", unit, max(0.0, now - before[side]) * scale, True)


def _memory(running: Running) -> dict[str, float]:
    """MiB of the processes on each side."""
    sides = {"server": running.server, "client": running.client}
    return {side: loads.memory(process.pid) for side, process in sides.items() if process}


def _steady(running: Running) -> dict[str, float]:
    """The same, once it has stopped growing."""
    deadline = time.monotonic() + PATIENCE
    seen: list[float] = []
    while True:
        now = _memory(running)
        seen.append(sum(now.values()))
        if (len(seen) > STEADY and seen[-1] < 1.01 * seen[-STEADY]) or time.monotonic() > deadline:
            return now
        time.sleep(LOOK)


MEMORY: dict[str, Measure] = {
    "mem-idle": _idle,
    "mem-tunnels": _tunnels,
    "mem-streams": _streams,
    "mem-stalled": _stalled,
}


# ---------------------------------------------------------------------------------------- Home uplink


def _alone(running: Running, sizes: Sizes, _: Path) -> Iterator[Value]:
    """Small requests one after another."""
    found = loads.requests(running.files, "/small", sizes.beside / 2, PAUSE)
    yield Value("1 KB JSON, one after another, alone: p50", "ms", statistics.median(found), True)


def _beside(running: Running, sizes: Sizes, directory: Path) -> Iterator[Value]:
    """Small requests one after another while a download is under way, and how much of the link that one gets."""
    into = directory / "visitor"
    with loads.downloading(running.files, "/large", into):
        time.sleep(sizes.settle)
        before, began = into.stat().st_size, time.monotonic()
        found = loads.requests(running.files, "/small", sizes.beside, PAUSE)
        rate = (into.stat().st_size - before) * 8 / (time.monotonic() - began)
    yield Value("1 KB JSON, one after another, beside a download: p50", "ms", statistics.median(found), True)
    yield Value(
        "1 KB JSON, one after another, beside a download: p90", "ms", statistics.quantiles(found, n=10)[-1], True
    )
    yield Value("the download meanwhile", "% of the link", 100 * rate / network.UPLINK)
    _drain(running)


def _drain(running: Running, round_trip: float = 0.0) -> None:
    """Return when a contender has sent what it had in its buffers; `round_trip` is the path's, in milliseconds."""
    deadline = time.monotonic() + PATIENCE
    while min(loads.requests(running.files, "/small", 0.1, 0.02)) > round_trip + 20.0 and time.monotonic() < deadline:
        pass


def _text(name: str, label: str) -> Measure:
    """What compresses, by how much faster than the link a visitor gets it."""

    def measure(running: Running, sizes: Sizes, directory: Path) -> Iterator[Value]:
        if (directory / name).stat().st_size:
            yield Value(label, "× the link", loads.transfer(running.files, f"/{name}") * 8e6 / network.UPLINK)

    return measure


UPLINK: dict[str, Measure] = {"uplink-alone": _alone, "uplink-beside": _beside}
TEXTS: dict[str, Measure] = {
    "uplink-json": _text("answer.json", "JSON"),
    "uplink-html": _text("page.html", "HTML"),
    "uplink-js": _text("script.js", "JavaScript"),
}

# ---------------------------------------------------------------------------------------- Long path


def _long_download(running: Running, sizes: Sizes, directory: Path) -> Iterator[Value]:
    into = directory / "visitor"
    with loads.downloading(running.files, "/large", into):
        rate = _rate(lambda: into.stat().st_size, sizes)
    yield Value("one download", "% of the link", 100 * rate / network.LONG_PATH)
    _drain(running, 2000 * network.LONG_DELAY)


def _long_upload(label: str) -> Measure:
    """Nothing is measured before it in its session, or downloads are: TCP remembers what it saw of the path."""

    def measure(running: Running, sizes: Sizes, directory: Path) -> Iterator[Value]:
        with loads.uploading(running.app, directory / "upload"):
            rate = _rate(lambda: loads.received(running.origin), sizes)
        yield Value(label, "% of the link", 100 * rate / network.LONG_PATH)
        _drain(running, 2000 * network.LONG_DELAY)

    return measure


def _rate(count: Callable[[], int], sizes: Sizes) -> float:
    """Bits a second that a growing count of bytes shows, once the transfer has found its rate."""
    time.sleep(sizes.settle)
    before, began = count(), time.monotonic()
    time.sleep(sizes.beside / 2)
    return (count() - before) * 8 / (time.monotonic() - began)


def _long_start(running: Running, sizes: Sizes, directory: Path) -> Iterator[Value]:
    """How fast a transfer finds its rate."""
    began = time.monotonic()
    loads.transfer(running.files, "/10mb")
    yield Value("10 MB, from the request on", "s", time.monotonic() - began, True)


LONG_UPLOAD: dict[str, Measure] = {"long-upload": _long_upload("one upload")}
LONG: dict[str, Measure] = {
    "long-download": _long_download,
    "long-start": _long_start,
    "long-after": _long_upload("one upload, after the downloads and over the same connection"),
}

# ---------------------------------------------------------------------------------------- Files


def make_files(directory: Path, sizes: Sizes) -> None:
    """Write what the origin serves. What is not text is random, so that nobody gains by compressing it."""
    block = random.Random(1).randbytes(16 * MB)
    lengths = {"64k": 64 * 1024, "10mb": 10 * MB, "large": sizes.download, "quarter": sizes.download // 4}
    for name, size in {**lengths, "upload": sizes.upload}.items():
        with (directory / name).open("wb") as file:
            for start in range(0, size, len(block)):
                file.write(block[: size - start])
    with (directory / "gib").open("wb") as file:
        file.truncate(2**30)
    (directory / "answer.json").write_bytes(texts.api_answer(sizes.json))
    (directory / "page.html").write_bytes(texts.page(sizes.text))
    (directory / "script.js").write_bytes(texts.script(sizes.text))
