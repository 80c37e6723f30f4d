"""The load, and what it shows: wrk and curl where much happens, lean sockets where they are not what is measured."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contenders import Target, end, tree

_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}  # milliseconds


@dataclass(frozen=True)
class Wrk:
    """What wrk reports."""

    rate: float  # requests a second
    p50: float  # milliseconds
    p99: float
    failed: int  # connections and requests that came to nothing, answers other than 2xx and 3xx


def parse_wrk(text: str) -> Wrk:
    """Read the report of `wrk --latency`. Raises ValueError when it is none."""
    rate = re.search(r"Requests/sec: +([\d.]+)", text)
    latency = {mark: float(value) * _UNITS[unit] for mark, value, unit in re.findall(r"(\d+)% +([\d.]+)([a-z]+)", text)}
    if rate is None or not {"50", "99"} <= latency.keys():
        raise ValueError(f"not a report of wrk: {text[:500]!r}")
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    failed = sum(map(int, errors.groups())) if errors else 0
    return Wrk(float(rate[1]), latency["50"], latency["99"], failed + (int(refused[1]) if refused else 0))


def run(target: Target, *words: str) -> str:
    """Run a program on the visitors' side and return what it prints; the benchmark ends when it fails."""
    done = subprocess.run([*target.side.prefix, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(words)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


_VARIED = Path(__file__).with_name("varied.lua")


def wrk(target: Target, path: str, connections: int, seconds: int, *fields: str, varied: bool = False) -> Wrk:
    """Requests as fast as they are answered; `varied`: none is like another."""
    heads = [word for text in (f"Host: {target.authority}", *fields) for word in ("-H", text)]
    words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "20s", *heads]
    words += ["-s", str(_VARIED)] * varied
    found = parse_wrk(run(target, *words, target.url(path)))
    if found.failed:
        sys.exit(f"error: {found.failed} requests failed: {' '.join(words)} {target.url(path)}")
    return found


def _curl(target: Target, path: str, *words: str, into: str = "/dev/null") -> subprocess.Popen[str]:
    report = "%{size_download} %{size_upload} %{time_total}"
    head = ["curl", "-sSf", "-o", into, "-w", report, "-H", f"Host: {target.authority}"]
    argv = [*target.side.prefix, *head, *words, target.url(path)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)


def _finish(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Bytes and seconds, when curl is done; without the time that curl takes to start."""
    out = process.communicate()[0]
    if process.returncode:
        sys.exit(f"error: {' '.join(process.args)}: exit status {process.returncode}")  # type: ignore[arg-type]
    down, up, seconds = map(float, out.split())
    return down + up, seconds


def transfer(target: Target, path: str, upload: Path | None = None) -> float:
    """MB/s of one download, or of the upload of a file."""
    words = [] if upload is None else ["-H", "Expect:", "-T", str(upload)]
    size, seconds = _finish(_curl(target, path, *words))
    return size / 1e6 / seconds


def transfers(target: Target, path: str, at_once: int) -> float:
    """MB/s of so many downloads at a time, together, from the first one's start to the last one's end."""
    began = time.monotonic()
    running = [_curl(target, path) for _ in range(at_once)]
    total = sum(_finish(process)[0] for process in running)
    return total / 1e6 / (time.monotonic() - began)


@contextlib.contextmanager
def downloading(target: Target, path: str, into: Path) -> Iterator[None]:
    """A download into a file that is given up in the end."""
    into.write_bytes(b"")
    with _given_up(_curl(target, path, into=str(into))):
        yield


@contextlib.contextmanager
def uploading(target: Target, file: Path) -> Iterator[None]:
    """An upload that is given up in the end."""
    with _given_up(_curl(target, "/upload", "-H", "Expect:", "-T", str(file))):
        yield


@contextlib.contextmanager
def _given_up(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
        if process.poll() is not None:
            sys.exit(f"error: {' '.join(process.args)}: exit status {process.returncode}, before its time")  # type: ignore[arg-type]
    finally:
        end(process)


def received(origin: Target) -> int:
    """Bytes of uploads that the origin has received so far."""
    return int(run(origin, "curl", "-sS", origin.url("/received")))


def requests(target: Target, path: str, seconds: float, pause: float) -> list[float]:
    """Milliseconds of requests one after another, with a pause before each."""
    return _visitor("requests", target, path, seconds, pause)


def events(target: Target, seconds: float) -> list[float]:
    """Milliseconds from the local service's write of an event to the visitor."""
    return _visitor("events", target, seconds)


def websockets(target: Target, seconds: float, connections: int, in_flight: int) -> float:
    """WebSocket messages a second, there and back, with so many under way on each connection."""
    return _visitor("websockets", target, seconds, connections, in_flight)


@contextlib.contextmanager
def holding(target: Target, path: str, count: int) -> Iterator[None]:
    """So many visitors who have read an answer's head and read no further."""
    words = _words("hold", target, path, count)
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        if process.stdout is None or process.stdout.readline() != b"held\n":
            sys.exit(f"error: {' '.join(words)}: exit status {process.wait()}")
        yield
    finally:
        end(process)


def _visitor(what: str, target: Target, *arguments: object) -> Any:
    return json.loads(run(target, *_words(what, target, *arguments)[len(target.side.prefix) :]))


def _words(what: str, target: Target, *arguments: object) -> list[str]:
    program = [sys.executable, str(Path(__file__).with_name("visitor.py")), what]
    return [*target.side.prefix, *program, target.address, str(target.port), target.authority, *map(str, arguments)]


# ---------------------------------------------------------------------------------------- Processes


def memory(pid: int) -> float:
    """MiB of a process and all that it has started: each shared page counts as its share (PSS)."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{each}/smaps_rollup").read_text(), re.M)
            total += int(found[1]) if found else 0
    return total / 1024


def lag(target: Target) -> dict[float, int]:
    """How late the event loop of a pytunnel server was: seconds -> how often it was so late at most."""
    text = run(target, "curl", "-sSf", target.url("/metrics"))
    found = re.findall(r'^pytunnel_event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\d+)$', text, re.M)
    return {float(bound): int(count) for bound, count in found}
