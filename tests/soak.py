"""Runs mixed traffic over a network that fails every minute, for as long as asked, and prints what it cost as Markdown.

    python tests/soak.py --minutes 30
    python tests/soak.py --minutes 30 --uvloop         server and client on uvloop, else on asyncio's own loop
    python tests/soak.py --minutes 30 --restarts       the client is stopped and started again now and then, too
    python tests/soak.py --minutes 30 --streams 200    beside so many open streams on which little happens

Every answer is checked to the byte. The exit status is 1 when something was lost, or when memory, descriptors or
tasks grow. The load is paced, so that it takes about one core of two with all processes together.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import functools
import itertools
import math
import os
import random
import signal
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from acceptance import (
    MIB,
    PATIENCE,
    PIECE,
    TOKEN,
    WEBSOCKET_KEY,
    Row,
    Service,
    equal,
    head_of,
    lateness,
    on_time,
    percentile,
    read_metrics,
)
from support import (
    Cut,
    PatternChecker,
    Process,
    RawRequest,
    RawVisitor,
    Tunnel,
    WaitFailed,
    chunk,
    pattern,
    response,
)

KIB = 1024
SLOPE = 1.0  # MB an hour that a process may grow by
JUDGED = 600.0  # seconds from which on a slope tells anything: a process keeps a MiB more or less for later
WARM = 300.0  # seconds after which memory counts, the first sixth when that is less
LOSSES: tuple[Cut, ...] = ("reset", "silence", "close")
LARGEST = 2 * MIB  # bytes of a body
SETTLE = 6.0  # seconds after which kept local connections are gone: LOCAL_IDLE, and some


class Echoing(Service):
    """The local service: acceptance's, and /echo/NONCE, which answers with the nonce and the content that came."""

    async def _small(self, request: RawRequest, _: dict[str, str], reader: Any, writer: Any) -> None:
        content = await reader.readexactly(int(request.value(b"Content-Length") or 0))
        request.complete = True
        writer.write(response(request.target.rpartition(b"/")[2] + b" " + content))


class Soak:
    """The traffic, what it has seen, and what the processes needed meanwhile."""

    def __init__(
        self, tunnel: Tunnel, seconds: float, loss_every: float, *, restarts: bool = False, streams: int = 0
    ) -> None:
        self.tunnel, self.seconds, self.loss_every = tunnel, seconds, loss_every
        self.restarts, self.streams = restarts, streams
        self.done: collections.Counter[str] = collections.Counter()  # operations, by kind
        self.losses: collections.Counter[str] = collections.Counter()
        self.bytes = 0
        self.failures: list[str] = []
        self.interrupted = 0  # by a restart of the client, which is not a failure
        self.latencies: list[tuple[float, float]] = []  # seconds since the start, milliseconds
        self.memory: dict[str, list[tuple[float, float]]] = {"server": [], "client": []}  # seconds, bytes
        self.open: list[float] = []  # streams, each second
        self.chance = random.Random(1)
        self._began = 0.0
        self._restarted = float("-inf")
        self._stopping = asyncio.Event()

    @property
    def now(self) -> float:
        return time.monotonic() - self._began

    async def run(self) -> None:
        """All of it for so many seconds; returns when the last operation has ended."""
        self._began = time.monotonic()
        work: list[tuple[str, float, Callable[[], Awaitable[None]]]] = [
            *[("small requests", 0.0, self._small)] * 6,
            ("downloads", 0.7, self._download),
            ("uploads", 0.7, self._upload),
            ("slow downloads", 0.5, self._slow_download),
            ("event streams", 0.5, self._events),
            *[("WebSockets", 0.5, self._websocket)] * 2,
            *[("aborts", 0.5, self._abort)] * 2,
        ]
        quiet: list[tuple[str, float, Callable[[], Awaitable[None]]]] = [
            ("quiet event streams", 0.5, functools.partial(self._events, 2.0)),
            ("quiet WebSockets", 0.5, functools.partial(self._websocket, 5.0)),
            ("very slow downloads", 0.5, functools.partial(self._slow_download, 1.0, 64 * MIB)),
        ]
        work += itertools.islice(itertools.cycle(quiet), self.streams)
        async with asyncio.TaskGroup() as tasks:
            sampling = tasks.create_task(self._sample())
            losing = tasks.create_task(self._lose())
            visitors = [tasks.create_task(self._repeat(*kind)) for kind in work]
            await asyncio.sleep(self.seconds)
            self._stopping.set()
            await asyncio.wait([*visitors, losing])
            sampling.cancel()

    async def _repeat(self, kind: str, pause: float, operation: Callable[[], Awaitable[None]]) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                await operation()
                self.done[kind] += kind != "small requests"
            except Exception as error:
                if began <= self._restarted + 1.0:
                    self.interrupted += 1
                else:
                    self.failures.append(f"{self.now:.0f} s, {kind}: {type(error).__name__}: {str(error)[:300]}")
            await self._pause(pause * self.chance.uniform(0.5, 1.5))

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    # What visitors do

    def _visitor(self, **options: Any) -> RawVisitor:
        return self.tunnel.visitor(timeout=PATIENCE, **options)

    async def _small(self) -> None:
        """A hundred requests with nonces on one connection, 25 a second."""
        async with self._visitor() as visitor:
            for _ in range(100):
                nonce, content = b"%x" % self.chance.getrandbits(64), b"x" * self.chance.randrange(200)
                began = time.monotonic()
                body = content if self.chance.random() < 0.5 else None
                await visitor.send(self.tunnel.request("PUT" if body else "GET", b"/echo/" + nonce, body=body))
                answer = await visitor.read_response()
                assert (answer.status, answer.body) == (200, nonce + b" " + (body or b"")), answer
                seconds = time.monotonic() - began
                self.latencies.append((self.now, 1000 * seconds))
                self.done["small requests"] += 1
                self.bytes += len(answer.body) + len(body or b"")
                if self._stopping.is_set():
                    return
                await self._pause(0.04 - seconds)

    def _target(self, size: int) -> bytes:
        return b"/down?size=%d&framing=%b" % (size, self.chance.choice((b"length", b"chunked")))

    async def _download(self) -> None:
        size, checker = self.chance.randrange(LARGEST), PatternChecker()
        async with self._visitor() as visitor:
            await visitor.send(self.tunnel.request(target=self._target(size)))
            answer = await visitor.read_response(sink=checker.feed)
            assert (answer.status, answer.clean, checker.offset) == (200, True, size), answer
        self.bytes += size

    async def _slow_download(self, pause: float = 0.1, largest: int = LARGEST) -> None:
        """A visitor who reads 16 KiB, and then thinks."""
        size, checker = largest - self.chance.randrange(LARGEST), PatternChecker()
        async with self._visitor(rcvbuf=8 * KIB) as visitor:
            await visitor.send(self.tunnel.request(target=self._target(size)))
            async for piece in visitor.iter_body(await visitor.read_head()):
                checker.feed(piece)
                if self._stopping.is_set():
                    break
                await self._pause(pause)
            assert checker.offset == size or self._stopping.is_set()
        self.bytes += checker.offset

    def _put(self, size: int, chunked: bool) -> Iterator[bytes]:
        yield b"PUT /up HTTP/1.1\r\nHost: %b\r\n" % self.tunnel.host + head_of(size, chunked)
        for offset in range(0, size, PIECE):
            piece = pattern(offset, min(PIECE, size - offset))
            yield chunk(piece) if chunked else piece
        if chunked:
            yield chunk(b"")

    async def _upload(self) -> None:
        size = self.chance.randrange(LARGEST)
        async with self._visitor() as visitor:
            for piece in self._put(size, self.chance.random() < 0.5):
                await visitor.send(piece)
            answer = await visitor.read_response("PUT")
            assert (answer.status, answer.body) == (200, b'{"bytes": %d, "wrong": ""}' % size), answer
        self.bytes += size

    async def _events(self, every: float = 0.1) -> None:
        """Numbered events, up to three hundred, as its last one says how many there were."""
        count = self.chance.randrange(50, 300)
        async with self._visitor() as visitor:
            await visitor.send(self.tunnel.request(target=b"/events?every=%g&count=%d" % (every, count)))
            head, text = await visitor.read_head(), b""
            async for piece in visitor.iter_body(head):
                text += piece
                if self._stopping.is_set():
                    break
            numbers = [event.split()[1] for event in text.split(b"\n\n")[:-1]]
            expected = [*(b"%d" % number for number in range(count)), b"end"]
            assert numbers == expected[: len(numbers)], numbers[-3:]
            assert len(numbers) == len(expected) or self._stopping.is_set(), f"{len(numbers)} of {count} events"

    async def _websocket(self, pause: float = 0.1) -> None:
        """Numbered messages, each of which has to come back, after a pause, before the next one."""
        upgrade = [
            (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-WebSocket-Version", b"13"),
            (b"Sec-WebSocket-Key", WEBSOCKET_KEY),
        ]  # fmt: skip
        async with self._visitor() as visitor:
            await visitor.send(self.tunnel.request(target=b"/ws", headers=upgrade))
            assert (await visitor.read_head()).status == 101
            for number in range(self.chance.randrange(50, 300)):
                data = b"message %d" % number
                await visitor.send(struct.pack("BB4s", 0x81, 0x80 | len(data), b"\0\0\0\0") + data)
                echo = await visitor.read_exactly(2 + len(data))
                assert echo[2:] == data, echo
                self.done["WebSocket messages"] += 1
                if self._stopping.is_set():
                    break
                await self._pause(pause)
            await visitor.send(b"\x88\x80\0\0\0\0")
            assert await visitor.read_exactly(2) == b"\x88\0"

    async def _abort(self) -> None:
        """Leave in the middle of a download or an upload, with FIN or RST."""
        size = self.chance.randrange(LARGEST)
        offset = self.chance.randrange(size + 1)
        async with self._visitor(rcvbuf=32 * KIB) as visitor:
            if self.chance.random() < 0.5:
                await visitor.send(self.tunnel.request(target=self._target(size)))
                taken = 0
                while taken < offset and (piece := await visitor.read_some()):
                    taken += len(piece)
            else:
                left = offset
                for piece in self._put(size, self.chance.random() < 0.5):
                    await visitor.send(piece[:left])
                    left -= len(piece)
                    if left <= 0:
                        break
            if self.chance.random() < 0.5:
                visitor.abort()

    # What happens to them

    async def _lose(self) -> None:
        for number, how in enumerate(itertools.cycle(LOSSES), 1):
            await self._pause(self.loss_every)
            if self._stopping.is_set():
                return
            if self.restarts and number % 5 == 0:
                await self._restart()
            client = self.tunnel.client
            await self.tunnel.relay.cut(how)
            try:
                await client.event("disconnected", timeout=PATIENCE)
                assert (await client.event("reconnected", timeout=PATIENCE))["resumed"] is True
                self.losses[how] += 1
            except (AssertionError, WaitFailed) as error:
                self.failures.append(f"{self.now:.0f} s, after {how}: {str(error)[:300]}")

    async def _restart(self) -> None:
        self._restarted = float("inf")
        self.tunnel.client.send_signal(signal.SIGTERM)
        await self.tunnel.client.wait(30)
        await (await self.tunnel.start_client()).event("ready", timeout=30)
        self._restarted = time.monotonic()
        self.losses["client restart"] += 1

    async def _sample(self) -> None:
        """Note what the processes need, every second; forget what they have said of single requests."""
        while True:
            for name, process in (("server", self.tunnel.server), ("client", self.tunnel.client)):
                with contextlib.suppress(OSError, AssertionError):  # between the end of a client and the next one
                    self.memory[name].append((self.now, process.rss()))
                process.events[:] = [event for event in process.events if event["event"] != "request"]
                process.stdout.clear()
            self.open.append((await read_metrics(self.tunnel))["pytunnel_streams"])
            await asyncio.sleep(1.0)


async def resources(tunnel: Tunnel) -> dict[str, float]:
    """Descriptors of both processes, and what the server tells of its tasks and streams."""
    metrics = await read_metrics(tunnel)
    found = {f"{name} descriptors": float(process.fd_count()) for name, process in
             (("server", tunnel.server), ("client", tunnel.client))}  # fmt: skip
    return found | {name: metrics[name] for name in ("pytunnel_tasks", "pytunnel_streams")}


def slope(samples: list[tuple[float, float]]) -> tuple[float, float]:
    """MB an hour, by least squares, and twice its standard error; what is like the moment before counts for less."""
    seconds, sizes = zip(*samples, strict=True)
    line = statistics.linear_regression(seconds, sizes)
    rest = [size - line.intercept - line.slope * at for at, size in samples]
    alike = sum(a * b for a, b in itertools.pairwise(rest)) / (sum(a * a for a in rest) or 1.0)
    error = statistics.pstdev(rest) / statistics.pstdev(seconds) * math.sqrt((1 + alike) / (1 - alike) / len(samples))
    return line.slope * 3600 / 1e6, 2 * error * 3600 / 1e6


async def report(soak: Soak, before: dict[str, float], cpu: dict[str, float], lag: float) -> list[Row]:
    """What was measured, once the traffic is over."""
    rows = [Row(f"{kind}", str(number)) for kind, number in soak.done.items()]
    requests = sum(number for kind, number in soak.done.items() if kind != "WebSocket messages")
    rows.insert(0, Row("requests", f"{requests} ({requests / soak.seconds:.0f}/s), {soak.bytes / MIB:.0f} MiB checked"))
    lost = ", ".join(f"{number} x {how}" for how, number in soak.losses.items())
    rows.append(Row("links lost", lost or "none"))
    rows.append(Row("streams open, median / most", f"{statistics.median(soak.open):.0f} / {max(soak.open):.0f}"))
    if soak.restarts:
        rows.append(Row("interrupted by a restart of the client", str(soak.interrupted)))
    rows.append(equal("failures: something lost, repeated or wrong", len(soak.failures), 0))

    warm = min(WARM, soak.seconds / 6)
    for name, samples in soak.memory.items():
        late = [sample for sample in samples if sample[0] >= warm]
        sizes = " -> ".join(f"{statistics.median(b for _, b in part) / MIB:.1f}" for part in (late[:30], late[-30:]))
        what = f"memory of the {name}, MB an hour after {warm:.0f} s ({sizes} MiB)"
        if name == "client" and soak.losses["client restart"]:
            rows.append(Row(what, "not judged: it was restarted"))
            continue
        growth, error = slope(late)
        figure = f"{growth:.2f} ± {error:.2f} MB/h"
        if soak.seconds < JUDGED:
            rows.append(Row(what, figure, "not judged: too short a time"))
        else:  # what a run cannot tell from nothing is no growth; half an hour tells about half a MB/h
            rows.append(Row(what, figure, f"< {SLOPE:g} MB/h within the error", growth - error < SLOPE))

    for _ in range(40):
        after = await resources(soak.tunnel)
        if all(after[name] <= value for name, value in before.items()):
            break
        await asyncio.sleep(0.5)
    for name, value in before.items():
        rows.append(Row(f"{name}, start -> end", f"{value:.0f} -> {after[name]:.0f}", "no more", after[name] <= value))

    sixth = soak.seconds / 6
    parts = {"first": (0.0, sixth), "last": (5 * sixth, 6 * sixth)}
    for part, (start, end) in parts.items():
        times = [ms for at, ms in soak.latencies if start <= at < end] or [math.nan]
        p50, p99 = percentile(times, 0.5), percentile(times, 0.99)
        rows.append(Row(f"small requests, {part} sixth: p50 / p99", f"{p50:.1f} / {p99:.1f} ms of {len(times)}"))
    rows.append(on_time("all the time", lag))
    rows += [Row(f"processor: {name}", f"{used / soak.seconds * 100:.0f} % of a core") for name, used in cpu.items()]
    return rows


async def soak(options: argparse.Namespace) -> bool:
    """Run it and print the report; whether all bounds are met."""
    seconds = options.minutes * 60
    loss_every = options.loss_every or min(60.0, seconds / 9)
    env = {} if options.uvloop else {"PYTUNNEL_LOOP": "asyncio"}
    worker = [sys.executable, __file__, "worker"]
    with tempfile.TemporaryDirectory(prefix="pytunnel-soak-") as directory:
        env |= {"TMPDIR": directory}
        async with await Process.start(command=worker) as origin:
            port = (await origin.event("listening"))["ports"][0]
            crowd = ["--max-per-address", str(100 + options.streams)]  # all of them come from one address
            async with Tunnel(port, relay=True, env=env, token=TOKEN, serve_args=crowd) as tunnel:
                for _ in range(20):
                    assert (await tunnel.get(b"/echo/warm")).body == b"warm "
                await asyncio.sleep(SETTLE)
                before = await resources(tunnel)
                running = Soak(tunnel, seconds, loss_every, restarts=options.restarts, streams=options.streams)
                processes = {"server": tunnel.server, "client": tunnel.client, "local service": origin}
                cpu = {name: process.cpu_seconds() for name, process in processes.items()}
                own = time.process_time()
                metrics = await read_metrics(tunnel)
                await running.run()
                lag = lateness(metrics, await read_metrics(tunnel))
                if options.restarts:
                    del processes["client"]
                used = {name: process.cpu_seconds() - cpu[name] for name, process in processes.items()}
                used["visitors and network"] = time.process_time() - own
                rows = await report(running, before, used, lag)
                logs = [line for line in tunnel.server.stderr if "Traceback" in line or "never retrieved" in line]
                rows.append(equal("tracebacks in the server's log", len(logs), 0))
    loop, cores = "uvloop" if options.uvloop else "asyncio", len(os.sched_getaffinity(0))
    load = f"{options.streams} quiet streams, a loss every {loss_every:.0f} s"
    print(f"{options.minutes:g} minutes, {loop}, {load}, {cores} cores, Python {sys.version.split()[0]}\n")
    print("| what | measured | bound | met |\n|---|---|---|---|", *rows, sep="\n")
    for failure in running.failures[:50]:
        print(f"\n- {failure}")
    met = all(row.met is not False for row in rows)
    print(f"\n{'All bounds are met.' if met else 'Not all bounds are met.'}")
    return met


async def serve() -> None:
    """The worker: the local service."""
    await Echoing().run(1)


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        asyncio.run(serve())
        return 0
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="default: 30")
    parser.add_argument("--uvloop", action="store_true", help="run server and client on uvloop")
    parser.add_argument("--restarts", action="store_true", help="restart the client after every fifth loss")
    parser.add_argument("--streams", type=int, default=0, metavar="N", help="quiet ones beside the load; default: 0")
    parser.add_argument("--loss-every", type=float, metavar="SECONDS", help="default: 60, less in short runs")
    return 0 if asyncio.run(soak(parser.parse_args())) else 1


if __name__ == "__main__":
    sys.exit(main())
