"""Measures at full size what a release must show, and prints it as a Markdown table.

    python tests/acceptance.py                        everything, with 1 GiB; takes some minutes
    python tests/acceptance.py --size 256             with 256 MiB
    python tests/acceptance.py --only transfer events

The exit status is 1 when a bound is not met. Server, client, local service and every visitor are processes of
their own; all of them share this machine's cores, and all but the first two are Python too, so the figures tell
what the tunnel does at least. A row beside it without the tunnel shows what the generator could do alone.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import functools
import hashlib
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import stat
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support import (
    DEBUG,
    PROGRAM,
    PatternChecker,
    Process,
    RawOrigin,
    RawRequest,
    RawVisitor,
    Relay,
    Tunnel,
    chunk,
    eventually,
    pattern,
    request,
    response,
)

from pytunnel import HEAD_TIMEOUT, MAX_STREAMS

DEBUG.clear()  # it takes time and memory, and these are measured here

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter

MIB = 1024 * 1024
PIECE = 256 * 1024
LONG = 1800.0  # seconds; what is waited for in a transfer, at most
PATIENCE = 150.0  # seconds a visitor waits for one more byte: longer than a link that has fallen silent takes
TOKEN = "acceptance-token-0123456789abcdef01234567"
LAG = 0.1  # seconds that the server's event loop may be late, but for a hundredth of the time
WEBSOCKET_KEY = b"dGhlIHNhbXBsZSBub25jZQ=="


@dataclass
class Row:
    """One line of the table; without a bound it is information only."""

    what: str
    figure: str
    bound: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        verdict = {None: "", True: "yes", False: "**NO**"}[self.met]
        return f"| {self.what} | {self.figure} | {self.bound} | {verdict} |"


def below(what: str, value: float, bound: float, unit: str, digits: int = 1) -> Row:
    """A row for a value that has to be less than its bound."""
    return Row(what, f"{value:.{digits}f} {unit}", f"< {bound:g} {unit}", value < bound)


def equal(what: str, figure: object, expected: object) -> Row:
    """A row for a value that has to be a certain one."""
    return Row(what, str(figure), str(expected), figure == expected)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of all values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def lateness(before: dict[str, float], after: dict[str, float]) -> float:
    """The bucket, in seconds, of the p99 of how late the server's event loop was between two readings of metrics."""
    counts = {}
    for key, count in after.items():
        if match := re.fullmatch(r'pytunnel_event_loop_lag_seconds_bucket\{le="(.+)"\}', key):
            counts[float(match[1])] = count - before.get(key, 0.0)
    return min(bound for bound, count in counts.items() if count >= 0.99 * counts[math.inf])


def on_time(what: str, lag: float) -> Row:
    """A row for that bucket. 50 ms is what the server should keep to, which has to share its core here."""
    bound = f"<= {1000 * LAG:.0f} ms"
    return Row(f"{what}: the server's event loop was late by, p99", f"<= {1000 * lag:.0f} ms", bound, lag <= LAG)


def head_of(size: int, chunked: bool) -> bytes:
    return b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: %d\r\n\r\n" % size


def emit(event: str, **fields: Any) -> None:
    """What a worker process tells the one that has started it."""
    print(json.dumps({"event": event, **fields}), flush=True)


def now() -> float:
    """Seconds of a clock that all processes of this machine share."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


# ---------------------------------------------------------------------------------------- The local service


class Service:
    """The worker `origin`: large bodies, event streams, a WebSocket's echo, nonces, small answers."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.most_open = 0  # connections at a time

    async def run(self, ports: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            origins = []
            for _ in range(ports):
                origin = self.origin = RawOrigin(self._handle, record_limit=0)
                origins.append(await stack.enter_async_context(origin))
            emit("listening", ports=[origin.port for origin in origins])
            await asyncio.Event().wait()

    async def _handle(self, request: RawRequest, reader: Reader, writer: Writer) -> None:
        parts = urlsplit(request.target.decode())
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        handler = {
            "/down": self._down, "/up": self._up, "/events": self._events, "/ws": self._websocket, "/stop": self._stop,
            "/nonce": self._nonce, "/wait": self._wait, "/most": self._most,
        }.get(parts.path, self._small)  # fmt: skip
        await handler(request, query, reader, writer)

    async def _small(self, request: RawRequest, _: dict[str, str], reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello, world")

    async def _wait(self, request: RawRequest, _: dict[str, str], reader: Reader, writer: Writer) -> None:
        """Answer half, and then nothing, until the visitor leaves."""
        self.origin.connections[:] = [each for each in self.origin.connections if each.open]
        self.most_open = max(self.most_open, len(self.origin.connections))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello,")
        await reader.read()

    async def _most(self, request: RawRequest, _: dict[str, str], reader: Reader, writer: Writer) -> None:
        writer.write(response(b"%d" % self.most_open))

    async def _stop(self, request: RawRequest, query: dict[str, str], reader: Reader, writer: Writer) -> None:
        self.stopping.set()
        await self._small(request, query, reader, writer)

    async def _nonce(self, request: RawRequest, query: dict[str, str], reader: Reader, writer: Writer) -> None:
        await asyncio.sleep(random.random() / 5)
        port = writer.get_extra_info("sockname")[1]
        writer.write(response(f"{query['n']} {(request.value(b'Host') or b'').decode()} {port}".encode()))

    async def _down(self, request: RawRequest, query: dict[str, str], reader: Reader, writer: Writer) -> None:
        size, chunked = int(query["size"]), query["framing"] == "chunked"
        writer.write(b"HTTP/1.1 200 OK\r\n" + head_of(size, chunked))
        for offset in range(0, size, PIECE):
            piece = pattern(offset, min(PIECE, size - offset))
            writer.write(chunk(piece) if chunked else piece)
            await writer.drain()
        if chunked:
            writer.write(chunk(b""))

    async def _up(self, request: RawRequest, _: dict[str, str], reader: Reader, writer: Writer) -> None:
        checker, wrong = PatternChecker(), ""
        body = _iter_body(request, reader)
        async for piece in body:
            if not wrong:
                try:
                    checker.feed(piece)
                except AssertionError as error:
                    wrong = str(error)
        writer.write(response(json.dumps({"bytes": checker.offset, "wrong": wrong}).encode()))

    async def _events(self, request: RawRequest, query: dict[str, str], reader: Reader, writer: Writer) -> None:
        """Numbered events with the time at which they were written; the last one, when asked to stop, is `end`."""
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        limit = int(query.get("count", 10**9))
        number = 0
        while number < limit and not self.stopping.is_set():
            writer.write(chunk(b"data: %d %.9f\n\n" % (number, now())))
            await writer.drain()
            number += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), float(query["every"]))
        writer.write(chunk(b"data: end %d\n\n" % number) + chunk(b""))

    async def _websocket(self, request: RawRequest, _: dict[str, str], reader: Reader, writer: Writer) -> None:
        """Echo text messages (RFC 6455) shorter than 126 bytes, until a Close comes."""
        key = request.value(b"Sec-WebSocket-Key") or b""
        digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
        )
        while True:
            first, length = await reader.readexactly(2)
            mask = await reader.readexactly(4)
            data = bytes(a ^ mask[i % 4] for i, a in enumerate(await reader.readexactly(length & 127)))
            writer.write(struct.pack("BB", first, len(data)) + data)
            await writer.drain()
            if first == 0x88:
                writer.close()
                return


async def _iter_body(request: RawRequest, reader: Reader) -> AsyncIterator[bytes]:
    if request.framing != "chunked":
        remaining = request.framing
        while remaining:
            piece = await reader.read(min(remaining, PIECE))
            if not piece:
                raise asyncio.IncompleteReadError(b"", remaining)
            remaining -= len(piece)
            yield piece
    else:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
    request.complete = True


# ---------------------------------------------------------------------------------------- Visitors


@dataclass
class Place:
    """Where a visitor goes: the port, and the host to ask for there."""

    port: int
    host: str

    def request(self, method: str, target: str, **more: Any) -> bytes:
        return request(method, target.encode(), self.host.encode(), **more)


async def visit_transfer(place: Place, direction: str, framing: str, size: int) -> dict[str, Any]:
    """One large body; how many bytes were right, and what was wrong."""
    started, wrong, checker = now(), "", PatternChecker()
    chunked = framing == "chunked"
    try:
        async with RawVisitor(place.port, timeout=PATIENCE) as visitor:
            if direction == "down":
                await visitor.send(place.request("GET", f"/down?size={size}&framing={framing}"))
                answer = await visitor.read_response(sink=checker.feed)
                received = checker.offset
                if not answer.clean or answer.status != 200:
                    wrong = f"status {answer.status}, ended by {answer.ended}"
            else:
                await visitor.send(b"POST /up HTTP/1.1\r\nHost: %b\r\n" % place.host.encode() + head_of(size, chunked))
                for offset in range(0, size, PIECE):
                    piece = pattern(offset, min(PIECE, size - offset))
                    await visitor.send(chunk(piece) if chunked else piece)
                if chunked:
                    await visitor.send(chunk(b""))
                answer = await visitor.read_response("POST")
                result: dict[str, Any] = (
                    json.loads(answer.body) if answer.status == 200 else {"bytes": 0, "wrong": str(answer.head)}
                )
                received, wrong = result["bytes"], result["wrong"]
    except Exception as error:
        received, wrong = checker.offset, f"{type(error).__name__}: {error}"
    return {"bytes": received, "wrong": wrong, "seconds": now() - started}


async def visit_transfers(place: Place, count: int, size: int) -> dict[str, Any]:
    """So many large downloads at once."""
    return {"each": await asyncio.gather(*(visit_transfer(place, "down", "length", size) for _ in range(count)))}


async def visit_small(place: Place, count: int, until_signal: bool = False) -> dict[str, Any]:
    """Small requests one after another on one connection; milliseconds of each."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    times: list[float] = []
    wrong = 0
    data = place.request("GET", "/small")
    async with RawVisitor(place.port, timeout=PATIENCE) as visitor:
        emit("started")
        while len(times) < count and not (until_signal and stop.is_set()):
            started = now()
            await visitor.send(data)
            answer = await visitor.read_response()
            times.append((now() - started) * 1000)
            wrong += answer.status != 200 or answer.body != b"hello, world"
    return {"times": times, "wrong": wrong}


async def visit_stall(place: Place, count: int) -> dict[str, Any]:
    """Begin large downloads and stop reading, until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            visitor = await stack.enter_async_context(RawVisitor(place.port, rcvbuf=16384))
            await visitor.send(place.request("GET", f"/down?size={1024 * MIB}&framing=length"))
            await visitor.read_head()
        emit("stalled")
        await stop.wait()
    return {}


async def visit_slow_heads(place: Place, count: int, source: str) -> dict[str, Any]:
    """Begin requests and go on with a byte a second; seconds until each was hung up on, and its status."""

    async def one() -> tuple[float, int]:
        async with RawVisitor(place.port, timeout=PATIENCE, source=source) as visitor:
            started = now()
            await visitor.send(b"GET / HTTP/1.1\r\nX-Slow: ")
            begun.append(None)
            if len(begun) == count:
                emit("started")
            answer = asyncio.ensure_future(visitor.read_until_close())
            while not answer.done():
                with contextlib.suppress(ConnectionError):
                    await visitor.send(b"x")
                await asyncio.wait([answer], timeout=1.0)
            return now() - started, int(answer.result().split()[1])

    begun: list[None] = []
    ended = await asyncio.gather(*(one() for _ in range(count)))
    return {"seconds": [seconds for seconds, _ in ended], "statuses": [status for _, status in ended]}


async def visit_slow_readers(place: Place, count: int, source: str) -> dict[str, Any]:
    """Begin large downloads and take a KiB of each a second, until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        visitors = []
        for _ in range(count):
            visitor = await stack.enter_async_context(RawVisitor(place.port, rcvbuf=4096, source=source))
            await visitor.send(place.request("GET", f"/down?size={1024 * MIB}&framing=length"))
            await visitor.read_head()
            visitors.append(visitor)
        emit("started")
        while not stop.is_set():
            for visitor in visitors:
                await visitor.read_some(1024)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await stop.wait()
    return {}


async def visit_aborts(place: Place, count: int, sources: Sequence[str]) -> dict[str, Any]:
    """Open connections, ask, and leave in three ways, 50 at a time; how many got an answer of which status."""
    statuses: dict[str, int] = {}

    async def leave(number: int) -> None:
        async with RawVisitor(place.port, timeout=PATIENCE, source=sources[number % len(sources)]) as visitor:
            await visitor.send(place.request("GET", "/wait"))
            if number % 3:
                status = str((await visitor.read_head()).status)
                statuses[status] = statuses.get(status, 0) + 1
            if number % 3 == 2:
                visitor.abort()

    for start in range(0, count, 50):
        await asyncio.gather(*(leave(number) for number in range(start, min(start + 50, count))))
    return {"statuses": statuses}


async def visit_fresh(place: Place, count: int) -> dict[str, Any]:
    """Small requests one after another, each on a connection of its own; milliseconds of each."""
    times = []
    for _ in range(count):
        started = now()
        async with RawVisitor(place.port) as visitor:
            await visitor.send(place.request("GET", "/small"))
            assert (await visitor.read_response()).body == b"hello, world"
        times.append((now() - started) * 1000)
    return {"times": times}


async def visit_events(place: Place, query: str) -> dict[str, Any]:
    """Read an event stream to its end; milliseconds from write to read, and numbers that were lost or repeated."""
    delays, wrong, expected = [], 0, 0
    try:
        async with RawVisitor(place.port, timeout=PATIENCE) as visitor:
            await visitor.send(place.request("GET", f"/events?{query}"))
            head = await visitor.read_head()
            emit("started")
            text = b""
            async for piece in visitor.iter_body(head):
                arrived = now()
                text += piece
                *events, text = text.split(b"\n\n")
                for event in events:
                    number, written = event.removeprefix(b"data: ").split()
                    if number == b"end":
                        wrong += int(written) != expected
                        expected = -1
                        break
                    wrong += int(number) != expected
                    expected = int(number) + 1
                    delays.append((arrived - float(written)) * 1000)
        wrong += expected != -1
        return {"delays": delays, "wrong": wrong, "error": ""}
    except Exception as error:
        return {"delays": delays, "wrong": wrong, "error": f"{type(error).__name__}: {error}"}


async def visit_websocket(place: Place, per_second: float) -> dict[str, Any]:
    """Numbered messages at that rate until SIGTERM; how many came back, and how many lost or repeated."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    sent, received, wrong, slowest = [0], 0, 0, 0.0
    written: dict[int, float] = {}
    try:
        async with RawVisitor(place.port, timeout=PATIENCE) as visitor:
            upgrade = [
                (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-WebSocket-Version", b"13"),
                (b"Sec-WebSocket-Key", WEBSOCKET_KEY),
            ]  # fmt: skip
            await visitor.send(place.request("GET", "/ws", headers=upgrade))
            head = await visitor.read_head()
            if head.status != 101:
                return {"sent": 0, "received": 0, "wrong": 0, "slowest": 0, "error": f"status {head.status}"}
            emit("started")

            async def talk() -> None:
                due = loop.time()
                while not stop.is_set():
                    data = b"message %d" % sent[0]
                    written[sent[0]] = now()
                    sent[0] += 1
                    await visitor.send(struct.pack("BB4s", 0x81, 0x80 | len(data), b"\0\0\0\0") + data)
                    due += 1 / per_second
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(stop.wait(), max(0, due - loop.time()))
                await visitor.send(b"\x88\x80\0\0\0\0")

            talking = asyncio.create_task(talk())
            while (header := await visitor.read_exactly(2))[0] == 0x81:
                data = await visitor.read_exactly(header[1])
                wrong += data != b"message %d" % received
                slowest = max(slowest, now() - written.pop(received, 0))
                received += 1
            await talking
        error = "" if header == b"\x88\0" else f"ended by {header!r}"
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    return {"sent": sent[0], "received": received, "wrong": wrong, "slowest": slowest, "error": error}


async def visit_nonces(port: int, tunnels: dict[str, int], count: int) -> dict[str, Any]:
    """That many requests at once, spread over the tunnels (host: local port); how many got another one's answer."""

    async def ask(number: int) -> bool:
        host, local = list(tunnels.items())[number % len(tunnels)]
        nonce = random.randbytes(16).hex()
        async with RawVisitor(port, timeout=60) as visitor:
            await visitor.send(request("GET", f"/nonce?n={nonce}".encode(), host.encode()))
            answer = await visitor.read_response()
        return answer.status == 200 and answer.body.decode() == f"{nonce} {host} {local}"

    results = await asyncio.gather(*map(ask, range(count)), return_exceptions=True)
    return {"right": sum(result is True for result in results)}


async def visit_load(place: Place, connections: int, seconds: float) -> dict[str, Any]:
    """Requests on kept connections as fast as answers come; how many a second, and milliseconds of each."""
    times: list[float] = []
    data = place.request("GET", "/small")
    deadline = now() + seconds

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", place.port)
        while now() < deadline:
            started = now()
            writer.write(data)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = re.search(rb"content-length: *(\d+)", head, re.I)
            assert length
            await reader.readexactly(int(length[1]))
            times.append((now() - started) * 1000)
        writer.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return {"times": times, "rate": len(times) / seconds}


WORKERS: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
    "transfer": visit_transfer,
    "transfers": visit_transfers,
    "small": visit_small,
    "stall": visit_stall,
    "slow-heads": visit_slow_heads,
    "slow-readers": visit_slow_readers,
    "aborts": visit_aborts,
    "fresh": visit_fresh,
    "events": visit_events,
    "websocket": visit_websocket,
    "nonces": visit_nonces,
    "load": visit_load,
}


async def work(role: str, arguments: dict[str, Any]) -> None:
    """The main function of a worker process."""
    if role == "origin":
        await Service().run(**arguments)
        return
    if "place" in arguments:
        arguments["place"] = Place(*arguments["place"])
    emit("result", **await WORKERS[role](**arguments))


async def start_worker(role: str, **arguments: Any) -> Process:
    if "place" in arguments:
        arguments["place"] = [arguments["place"].port, arguments["place"].host]
    return await Process.start("worker", role, json.dumps(arguments), command=[sys.executable, __file__])


async def result_of(role: str, **arguments: Any) -> dict[str, Any]:
    """Run a worker to its end."""
    async with await start_worker(role, **arguments) as worker:
        return await worker.event("result", timeout=LONG)


# ---------------------------------------------------------------------------------------- Measurements


@dataclass
class Stage:
    """A local service and a tunnel to it, each process of its own, and a directory for what they may write."""

    tunnel: Tunnel
    origin: Process
    ports: list[int]
    directory: Path

    @property
    def through(self) -> Place:
        return Place(self.tunnel.port, self.tunnel.host.decode())

    @property
    def straight(self) -> Place:
        return Place(self.ports[0], "localhost")

    def memory(self) -> dict[str, int]:
        """Start to measure: reset each process's high-water mark, and return its resident bytes."""
        processes = {"server": self.tunnel.server, "client": self.tunnel.client}
        for process in processes.values():
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        return {name: process.rss() for name, process in processes.items()}

    def grown(self, before: dict[str, int]) -> dict[str, float]:
        """MiB that each process has had more than then, at its largest."""
        processes = {"server": self.tunnel.server, "client": self.tunnel.client}
        return {name: (process.peak_rss() - before[name]) / MIB for name, process in processes.items()}

    def spooled(self) -> int:
        """Bytes in files, deleted ones included, that the tunnel's processes have written."""
        size = sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file())
        for process in (self.tunnel.server, self.tunnel.client):
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    status = descriptor.stat()
                    size += status.st_size if stat.S_ISREG(status.st_mode) else 0
        return size


@contextlib.asynccontextmanager
async def stage(*, relay: bool = False, ports: int = 1, serve_args: Sequence[str] = ()) -> AsyncIterator[Stage]:
    """Start all of it, and warm it up."""
    with tempfile.TemporaryDirectory(prefix="pytunnel-acceptance-") as name:
        directory = Path(name)
        env = {"TMPDIR": str(directory), "PYTUNNEL_STATE_DIR": str(directory / "state")}
        async with await start_worker("origin", ports=ports) as origin:
            listening = await origin.event("listening")
            tunnel = Tunnel(listening["ports"][0], relay=relay, env=env, token=TOKEN, serve_args=serve_args)
            async with tunnel:
                for _ in range(20):
                    assert (await tunnel.get(b"/small")).body == b"hello, world"
                yield Stage(tunnel, origin, listening["ports"], directory)


async def read_metrics(tunnel: Tunnel) -> dict[str, float]:
    """What the server tells of itself, by name and labels."""
    async with tunnel.visitor(timeout=PATIENCE) as visitor:
        await visitor.send(request(target=b"/metrics"))
        lines = (await visitor.read_response()).body.decode().splitlines()
    return {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


async def measure_transfer(size: int) -> AsyncIterator[Row]:
    """(a) One large body, each way and in each framing."""
    async with stage() as s:
        for direction in ("down", "up"):
            for framing in ("length", "chunked"):
                what = f"{size // MIB} MiB {direction}, {'chunked' if framing == 'chunked' else 'Content-Length'}"
                arguments = {"direction": direction, "framing": framing, "size": size}
                straight = await result_of("transfer", place=s.straight, **arguments)
                before = s.memory()
                through = await result_of("transfer", place=s.through, **arguments)
                rates = [size / MIB / result["seconds"] for result in (through, straight)]
                yield equal(f"{what}: bytes right", through["bytes"], size)
                if through["wrong"]:
                    yield equal(f"{what}: wrong", through["wrong"], "")
                yield Row(f"{what}: rate", f"{rates[0]:.0f} MiB/s (straight {rates[1]:.0f} MiB/s)")
                for name, grown in s.grown(before).items():
                    yield below(f"{what}: the {name} grew by", grown, 32, "MiB")
        yield below("after them: bytes in files", s.spooled(), 4096, "bytes", 0)


async def measure_parallel(size: int) -> AsyncIterator[Row]:
    """(m) Twenty downloads at once, each of a tenth of the size."""
    count, size = 20, size // 10
    async with stage() as s:
        before, metrics, started = s.memory(), await read_metrics(s.tunnel), now()
        each = (await result_of("transfers", place=s.through, count=count, size=size))["each"]
        rate = count * size / MIB / (now() - started)
        lag = lateness(metrics, await read_metrics(s.tunnel))
        what = f"{count} x {size // MIB} MiB at once"
        figures = {f"{result['bytes']} {result['wrong']}".strip() for result in each}
        yield equal(f"{what}: bytes right in each", ", ".join(figures), str(size))
        yield Row(f"{what}: rate of all", f"{rate:.0f} MiB/s")
        for name, grown in s.grown(before).items():
            yield below(f"{what}: the {name} grew by", grown, 64, "MiB")
        yield on_time(what, lag)


async def measure_beside(size: int) -> AsyncIterator[Row]:
    """(b) Small requests beside a large download."""
    async with stage() as s:
        alone = (await result_of("small", place=s.through, count=500))["times"]
        async with await start_worker("small", place=s.through, count=10**9, until_signal=True) as small:
            await small.event("started")
            download = await result_of("transfer", place=s.through, direction="down", framing="length", size=size)
            small.send_signal(signal.SIGTERM)
            beside = await small.event("result")
        times = beside["times"]
        yield Row("small requests alone: p50 / p99", f"{percentile(alone, 0.5):.1f} / {percentile(alone, 0.99):.1f} ms")
        what = f"beside a {size // MIB} MiB download"
        yield Row(f"{what}: p50 of {len(times)}", f"{percentile(times, 0.5):.1f} ms")
        yield below(f"{what}: p99", percentile(times, 0.99), 50, "ms")
        yield Row(f"{what}: slowest", f"{max(times):.1f} ms")
        yield equal(f"{what}: wrong answers, bytes right", (beside["wrong"], download["bytes"]), (0, size))


async def measure_stalled(_: int) -> AsyncIterator[Row]:
    """(c) New requests beside a hundred readers who have stopped."""
    async with stage() as s:
        before = s.memory()
        descriptors = [process.fd_count() for process in (s.tunnel.server, s.tunnel.client)]
        async with await start_worker("stall", place=s.through, count=100) as stalled:
            await stalled.event("stalled", timeout=60)
            await at_rest(s.tunnel.server, s.tunnel.client, s.origin)
            times = (await result_of("fresh", place=s.through, count=100))["times"]
            yield Row("beside 100 stopped readers: p50 of 100 new requests", f"{percentile(times, 0.5):.1f} ms")
            yield below("beside 100 stopped readers: the slowest", max(times), 100, "ms")
            for name, grown in s.grown(before).items():
                yield below(f"100 stopped readers: the {name} grew by", grown, 96, "MiB")
            stalled.send_signal(signal.SIGTERM)
            await stalled.wait()
        started = now()
        await eventually(
            lambda: [p.fd_count() for p in (s.tunnel.server, s.tunnel.client)] <= descriptors, 10, "descriptors"
        )
        yield Row("after they left: descriptors back after", f"{now() - started:.1f} s", "< 10 s", True)


async def measure_slow(_: int) -> AsyncIterator[Row]:
    """(k) Honest requests beside 500 connections whose head does not end and 100 readers of a KiB a second."""
    async with stage() as s, contextlib.AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(await start_worker(role, place=s.through, count=count, source=source))
            for role, count, source in (
                ("slow-readers", 100, "127.0.0.4"), ("slow-heads", 250, "127.0.0.2"), ("slow-heads", 250, "127.0.0.3"),
            )
        ]  # fmt: skip
        for worker in workers:
            await worker.event("started", timeout=60)
        times = (await result_of("small", place=s.through, count=1000))["times"]
        fresh = (await result_of("fresh", place=s.through, count=200))["times"]
        what = "beside 500 slow heads and 100 slow readers"
        yield Row(f"{what}: p50 of 1,000 requests", f"{percentile(times, 0.5):.1f} ms")
        yield below(f"{what}: p99", percentile(times, 0.99), 200, "ms")
        yield below(f"{what}: p99 of 200 new connections", percentile(fresh, 0.99), 200, "ms")
        results = [await worker.event("result", timeout=60) for worker in workers[1:]]
        seconds = [each for result in results for each in result["seconds"]]
        yield below("slow heads were hung up on after, at the latest", max(seconds), HEAD_TIMEOUT + 2, "s")
        yield equal("with status", {status for result in results for status in result["statuses"]}, {408})


async def measure_aborts(_: int) -> AsyncIterator[Row]:
    """(l) 10,000 requests that are opened and aborted, from many addresses and from one."""
    async with stage() as s:
        processes = {"server": s.tunnel.server, "client": s.tunnel.client}

        async def settled() -> dict[str, float]:
            """The server's gauges, once its streams and visitors are gone."""
            deadline = now() + 10
            while True:
                found = await read_metrics(s.tunnel)
                if (found["pytunnel_streams"], found["pytunnel_visitors"]) == (0, 2) or now() > deadline:
                    return found

        many = [f"127.1.0.{number}" for number in range(1, 101)]
        await result_of("aborts", place=s.through, count=1000, sources=many)  # memory that a process gets once
        before, memory = await settled(), {name: process.rss() for name, process in processes.items()}
        files = {name: process.fd_count() for name, process in processes.items()}
        answers = (await result_of("aborts", place=s.through, count=10_000, sources=many))["statuses"]
        after = await settled()
        yield Row("10,000 aborts of 100 addresses: answers", str(answers))
        for name in ("pytunnel_tasks", "pytunnel_streams", "pytunnel_visitors"):
            yield equal(f"after them: {name}", after[name], before[name])
        for name, process in processes.items():
            yield below(f"after them: the {name} has grown by", (process.rss() - memory[name]) / MIB, 8, "MiB")
            await eventually(lambda p=process, n=files[name]: p.fd_count() <= n, 10, f"the {name}'s descriptors")
        most = float((await s.tunnel.get(b"/most")).body)
        yield below("the local service's connections at a time", most, MAX_STREAMS, "", 0)
        answers = (await result_of("aborts", place=s.through, count=2000, sources=["127.0.0.2"]))["statuses"]
        yield Row("2,000 aborts of one address: answers", str(answers), "429 among them", "429" in answers)
        fresh = await result_of("fresh", place=s.through, count=20)
        yield below("another address meanwhile: the slowest of 20", max(fresh["times"]), 200, "ms")


async def at_rest(*processes: Process) -> None:
    """Wait until these processes have used no time for half a second."""
    history: list[float] = []

    def resting() -> bool:
        history.append(sum(process.cpu_seconds() for process in processes))
        return len(history) > 25 and history[-1] - history[-25] < 0.02

    await eventually(resting, 60, "the processes to come to rest")


async def measure_cuts(size: int, cuts: int = 20) -> AsyncIterator[Row]:
    """(d) A relay that cuts again and again under everything at once."""
    async with contextlib.AsyncExitStack() as stack:
        s = await stack.enter_async_context(stage(relay=True))
        relay = s.tunnel.relay
        started = now()
        before = s.memory()

        async def worker(role: str, **arguments: Any) -> Process:
            return await stack.enter_async_context(await start_worker(role, place=s.through, **arguments))

        events = await worker("events", query="every=0.05")
        websocket = await worker("websocket", per_second=100)
        await asyncio.gather(events.event("started"), websocket.event("started"))
        down = await worker("transfer", direction="down", framing="length", size=size)
        up = await worker("transfer", direction="up", framing="length", size=size)
        transfers = [asyncio.create_task(p.event("result", timeout=LONG)) for p in (down, up)]
        cutting = asyncio.create_task(cut_repeatedly(relay, s.tunnel.client, cuts, 2 * size))
        results = await asyncio.gather(*transfers)
        seconds = now() - started
        done = await cutting
        assert (await s.tunnel.get(b"/stop")).status == 200
        websocket.send_signal(signal.SIGTERM)
        streamed = await events.event("result", timeout=PATIENCE)
        echoed = await websocket.event("result", timeout=PATIENCE)
        what = f"{cuts} cuts"
        yield equal(f"{what}: made (reset, close, silence in turn)", done, cuts)
        for name, result in zip(("download", "upload"), results, strict=True):
            figure = f"{result['bytes']} right{', ' + result['wrong'] if result['wrong'] else ''}"
            yield equal(f"{what}: bytes of the {size // MIB} MiB {name}", figure, f"{size} right")
        yield equal(f"{what}: events lost or repeated of {len(streamed['delays'])}", streamed["wrong"], 0)
        lost = echoed["sent"] - echoed["received"] + echoed["wrong"]
        yield equal(f"{what}: WebSocket messages lost or repeated of {echoed['sent']}", lost, 0)
        errors = [result["error"] for result in (streamed, echoed) if result["error"]]
        yield equal(f"{what}: visitors' errors", len(errors), 0)
        for error in errors:
            yield Row(f"{what}: error", error.replace("\n", " ")[:200])
        for name, grown in s.grown(before).items():
            yield below(f"{what}: the {name} grew by", grown, 64, "MiB")
        yield Row(f"{what}: time for both transfers", f"{seconds:.0f} s")
        worst = max(streamed["delays"] or [0]) / 1000
        yield Row(f"{what}: latest event / echo", f"{worst:.1f} / {echoed['slowest']:.1f} s")


async def cut_repeatedly(relay: Relay, client: Process, cuts: int, total: int) -> int:
    """Cut each time another share of all bytes has passed and the link is up; return how many cuts there were."""

    def passed(target: int) -> bool:
        return relay.bytes_up + relay.bytes_down >= target

    base = relay.bytes_up + relay.bytes_down
    for number in range(cuts):
        target = base + total * (number + 1) // (cuts + 2)
        await relay.wait_for(functools.partial(passed, target), LONG, "bytes to pass")
        await relay.wait_for(lambda: relay.connections, LONG, "a link to cut")
        await relay.cut(("reset", "close", "silence")[number % 3])
        await client.event("disconnected", timeout=60)
        await client.event("reconnected", timeout=120, resumed=True)
    return cuts


async def measure_restarts(_: int) -> AsyncIterator[Row]:
    """(e) Either process is killed and started again."""

    async def kill_server(tunnel: Tunnel) -> tuple[float, float]:
        killed = now()
        await tunnel.stop_server(signal.SIGKILL)
        await tunnel.start_server()
        listening = now()
        await tunnel.client.event("reconnected", timeout=60)
        back = now() - listening
        assert (await tunnel.get(b"/small")).status == 200
        return back, now() - killed

    server_times, client_times = [], []
    for _round in range(5):
        async with stage() as s:
            server_times.append(await kill_server(s.tunnel))
            s.tunnel.client.send_signal(signal.SIGKILL)
            await s.tunnel.client.wait()
            killed = now()
            waiting = asyncio.create_task(s.tunnel.get(b"/small"))  # it is held until the client is back
            await s.tunnel.start_client()
            assert (await waiting).body == b"hello, world"
            client_times.append(now() - killed)
    async with stage() as s:
        in_a_row = [(await kill_server(s.tunnel))[1] for _ in range(8)]
    back, served = (max(times) for times in zip(*server_times, strict=True))
    yield below("server killed: client back after the new one listens, worst of 5", back, 3, "s", 2)
    yield below("server killed: until a request is served, worst of 5", served, 3, "s", 2)
    yield Row("server killed 8 times in a row: until served, each", " ".join(f"{t:.1f}" for t in in_a_row) + " s")
    yield below("client killed: until the waiting request is served, worst of 5", max(client_times), 3, "s", 2)


async def measure_events(_: int) -> AsyncIterator[Row]:
    """(f) From the local service's write of an event to the visitor's read."""
    async with stage() as s:
        for place, what in ((s.straight, "straight"), (s.through, "through the tunnel")):
            result = await result_of("events", place=place, query="every=0.01&count=500")
            assert not result["error"] and not result["wrong"], result
            delays = result["delays"]
            if place == s.through:
                yield Row(f"event delay {what}: p50", f"{percentile(delays, 0.5):.2f} ms")
                yield below(f"event delay {what}: slowest of {len(delays)}", max(delays), 100, "ms")
            else:
                yield Row(f"event delay {what}: p50 / slowest", f"{percentile(delays, 0.5):.2f} / {max(delays):.1f} ms")


async def measure_start(_: int) -> AsyncIterator[Row]:
    """(g) How soon a command is there."""
    async with stage() as s:
        help_times: list[float] = []
        connect_times: list[float] = []
        python_times: list[float] = []
        for _round in range(10):
            for times, command in (
                (python_times, [sys.executable, "-c", ""]),
                (help_times, [sys.executable, str(PROGRAM), "--help"]),
            ):
                started = now()
                async with await Process.start(command=command) as process:
                    assert await process.wait() == 0
                times.append(now() - started)
            started = now()
            arguments = ["connect", str(s.ports[0]), "--server", s.tunnel.server_url, "--token", TOKEN]
            async with await Process.start(*arguments) as client:
                await client.stdout_line("http://")
                connect_times.append(now() - started)
        yield Row("python itself: median of 10", f"{statistics.median(python_times):.2f} s")
        yield below("--help: median of 10", statistics.median(help_times), 0.3, "s", 2)
        yield below("connect, from start to the URL: median of 10", statistics.median(connect_times), 1, "s", 2)


async def measure_nonces(_: int) -> AsyncIterator[Row]:
    """(h) Everybody gets the answer to their own question."""
    async with stage(ports=20, serve_args=["--max-per-address", "1000"]) as s:
        targets = [f"n{number}={port}" for number, port in enumerate(s.ports)]
        arguments = ["connect", *targets, "--server", s.tunnel.server_url, "--token", TOKEN, "--json"]
        async with await Process.start(*arguments) as client:
            tunnels = {}
            for _target in targets:
                ready = await client.event("ready")
                tunnels[str(urlsplit(ready["url"]).hostname)] = int(ready["target"])
            right = [
                (await result_of("nonces", port=s.tunnel.port, tunnels=tunnels, count=200))["right"]
                for _round in range(3)
            ]
        yield equal("3 x 200 nonces at once over 20 tunnels: right answers", right, [200, 200, 200])


async def measure_rate(_: int) -> AsyncIterator[Row]:
    """(i) Requests per second; for information."""
    seconds = 5.0
    async with stage() as s:
        wrk = shutil.which("wrk")
        for place, what in ((s.straight, "straight"), (s.through, "through the tunnel")):
            one = await result_of("load", place=place, connections=1, seconds=seconds)
            p50, p99 = (percentile(one["times"], share) for share in (0.5, 0.99))
            yield Row(f"{what}, 1 connection: p50 / p99", f"{p50:.2f} / {p99:.2f} ms ({one['rate']:.0f}/s)")
            if wrk:
                rate = await wrk_rate(wrk, place, seconds)
                yield Row(f"{what}, 32 connections (wrk)", f"{rate:.0f}/s")
            else:
                many = await result_of("load", place=place, connections=32, seconds=seconds)
                p99 = percentile(many["times"], 0.99)
                yield Row(f"{what}, 32 connections (in Python)", f"{many['rate']:.0f}/s, p99 {p99:.1f} ms")


async def wrk_rate(wrk: str, place: Place, seconds: float) -> float:
    url = f"http://127.0.0.1:{place.port}/small"
    arguments = ["-t1", "-c32", f"-d{seconds:.0f}s", "-H", f"Host: {place.host}", url]
    async with await Process.start(*arguments, command=[wrk]) as process:
        await process.wait(seconds + 20)
        match = re.search(r"Requests/sec: +([0-9.]+)", "\n".join(process.stdout))
        assert match, process.output()
        return float(match[1])


@contextlib.asynccontextmanager
async def watched_client(s: Stage) -> AsyncIterator[tuple[int, Place]]:
    """A client on a terminal, which shows its view, and its inspector's page in a browser; its process id and place."""
    import fcntl
    import termios

    from playwright.async_api import async_playwright

    state = s.directory / "watched"
    arguments = ["connect", str(s.ports[0]), "--server", s.tunnel.server_url, "--token", TOKEN, "--name", "seen"]
    env = {"PATH": os.environ["PATH"], "PYTUNNEL_STATE_DIR": str(state), "HOME": str(state), "TERM": "xterm-256color"}
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    loop, shown = asyncio.get_running_loop(), bytearray()
    loop.add_reader(near, lambda: shown.extend(os.read(near, 65536)))
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), *arguments, stdin=far, stdout=far, stderr=far, env=env, start_new_session=True
    )
    try:
        notes = await eventually(lambda: list(state.glob("run/*.json")), 10.0, "the client's note of itself")
        note = json.loads(notes[0].read_text())
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = await browser.new_page()
            await page.goto(note["inspector"])
            place = Place(s.tunnel.port, "seen.localhost")
            async with RawVisitor(place.port) as visitor:
                await visitor.send(request("GET", b"/small", host=place.host.encode()))
                await visitor.read_response()
            await page.get_by_text("/small").first.wait_for()
            yield process.pid, place
            assert b"requests" in shown, "the terminal view shows nothing"
            assert await page.get_by_text("/small").count(), "the page shows nothing"
            await browser.close()
    finally:
        process.terminate()
        await process.wait()
        loop.remove_reader(near)
        os.close(near)
        os.close(far)


async def measure_watched(size: int) -> AsyncIterator[Row]:
    """(j) Traffic while the terminal view and the inspector's page show it, and the memory that this takes."""
    async with stage() as s, watched_client(s) as (pid, watched):
        rates: dict[str, list[float]] = {"without": [], "with": []}
        plain = [str(s.ports[0]), "--server", s.tunnel.server_url, "--token", TOKEN, "--name", "plain", "--url-file"]
        async with await Process.start("connect", *plain, str(s.directory / "live")):
            await eventually((s.directory / "live").exists, 10.0, "the plain client")
            for _ in range(5):
                rates["without"].append(await wrk_rate("wrk", Place(watched.port, "plain.localhost"), 4.0))
                rates["with"].append(await wrk_rate("wrk", watched, 4.0))
        without, both = (statistics.median(rates[name]) for name in ("without", "with"))
        every = ", ".join(f"{a:.0f}/{b:.0f}" for a, b in zip(rates["without"], rates["with"], strict=True))
        yield Row("small requests without / with view and page", f"{without:.0f} / {both:.0f} /s ({every})")
        yield below("view and page make it slower by", 100 * (1 - both / without), 10, "%")
        before = resident(pid)
        for direction in ("down", "up"):
            what = f"{size // MIB} MiB {direction}, watched: bytes right"
            result = await result_of("transfer", place=watched, direction=direction, framing="length", size=size)
            yield equal(what, result["bytes"], size)
        yield below("after them the client has grown by", (resident(pid) - before) / MIB, 64, "MiB")


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


MEASUREMENTS: dict[str, Callable[[int], AsyncIterator[Row]]] = {
    "transfer": measure_transfer,
    "parallel": measure_parallel,
    "beside": measure_beside,
    "stalled": measure_stalled,
    "restarts": measure_restarts,
    "events": measure_events,
    "start": measure_start,
    "nonces": measure_nonces,
    "rate": measure_rate,
    "cuts": measure_cuts,
    "watched": measure_watched,
    "slow": measure_slow,
    "aborts": measure_aborts,
}


async def measure(names: Sequence[str], size: int) -> bool:
    """Print the table, line by line as it comes about; return whether all bounds are met."""
    cores = len(os.sched_getaffinity(0))
    print(f"{size // MIB} MiB, {cores} cores, Python {sys.version.split()[0]}\n")
    print("| what | measured | bound | met |\n|---|---|---|---|", flush=True)
    met = True
    for name in names:
        try:
            async for row in MEASUREMENTS[name](size):
                print(row, flush=True)
                met = met and row.met is not False
        except Exception as error:
            met = False
            print(Row(name, f"{type(error).__name__}: {error}".replace("\n", " ")[:500], "no error", False), flush=True)
            print("\n".join([str(error), *getattr(error, "__notes__", [])]), file=sys.stderr)
    print(f"\n{'All bounds are met.' if met else 'Not all bounds are met.'}")
    return met


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        asyncio.run(work(sys.argv[2], json.loads(sys.argv[3])))
        return 0
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the large bodies; default: 1024")
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), metavar="NAME", help=", ".join(MEASUREMENTS))
    options = parser.parse_args()
    return 0 if asyncio.run(measure(options.only or list(MEASUREMENTS), options.size * MIB)) else 1


if __name__ == "__main__":
    sys.exit(main())
