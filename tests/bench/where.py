"""Measures where the microseconds go: what each step of one request costs each end; prints Markdown tables.

    python tests/bench/where.py

Requests, as many as share a message when there are many at a time, and then chunks of a download are led through both
ends by hand, in one process and through the program's own functions. A number is the median of many rounds.
Below the sum stands what each process takes in a real run, with wrk and curl, which has the event loop, its tasks
and its callbacks as well.

The README's section has these tables, and a test compares their steps.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import inspect
import os
import platform
import re
import socket
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NamedTuple

TESTS = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(TESTS)  # not this directory: its modules are those of a package
    sys.path.insert(1, str(TESTS.parent))

import aiohttp  # noqa: E402
from aiohttp.http_parser import HttpRequestParser  # noqa: E402

import pytunnel  # noqa: E402
from bench import contenders, loads, network  # noqa: E402
from bench.contenders import Side  # noqa: E402

SIDES = ("server", "client")
AT_ONCE = pytunnel.MAX_WOKEN  # small requests that share a message, as they do when there are many at a time
ROUNDS = 1000  # of so many small requests, and of a chunk; the first tenth fills caches and does not count
SECONDS = 5  # of the real run
CHUNK = 256 * 1024
HOST = "files.example.com"
REQUEST = f"""\
GET /small?page=2 HTTP/1.1
Host: {HOST}
Connection: keep-alive
sec-ch-ua-platform: "Linux"
User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/143.0.0.0 Safari/537.36
sec-ch-ua: "Chromium";v="143", "Not A(Brand";v="24"
sec-ch-ua-mobile: ?0
Accept: application/json, text/plain, */*
Sec-Fetch-Site: same-origin
Sec-Fetch-Mode: cors
Sec-Fetch-Dest: empty
Referer: http://{HOST}/list
Accept-Encoding: gzip, deflate, br, zstd
Accept-Language: en-GB,en;q=0.9
Cookie: session=8c5f2b1d9e7a4c60b3f1; theme=dark
"""
RESPONSE = """\
HTTP/1.1 200 OK
Server: nginx/1.26.3
Date: Mon, 05 Jan 2026 12:00:00 GMT
Content-Type: application/json
Content-Length: {}
Connection: keep-alive
Cache-Control: no-cache
ETag: "5f3c-1a2b3c4d"
Vary: Accept-Encoding
"""

# ---------------------------------------------------------------------------------------- Steps


class Step(NamedTuple):
    """What is done, and the functions of pytunnel.py that do most of it; none where it is the kernel."""

    name: str
    functions: tuple[str, ...]


KERNEL = Step("send and receive on the sockets of loopback, with nobody to wake", ())
MESSAGE = Step("make a message of what is queued", ("Session.frames_to_send", "message_frame"))
READ = Step("read a message and its frames", ("MessageDecoder.feed", "FrameDecoder.feed", "Session.receive_data"))
HAND = Step("hand the frames to their streams", ("Link._dispatch", "Stream.feed"))
LOCAL = Step("take what the local service sent", ("Connection.buffer_updated", "Connection.read"))

PARSE = Step("aiohttp parses the request's head", ("_visitor_server",))
LOOK = Step(
    "see who asks for what, and whether that may be",
    ("Visitor", "check_framing", "split_target", "parse_host", "TunnelRegistry.tunnel_name"),
)
FIELDS = Step(
    "the request's fields as they go on", ("TunnelServer._request_head", "remembered", "end_to_end", "forwarded")
)
OPEN = Step("encode its head and open a stream", ("RequestHead.encode", "Session.open_stream", "Link.open"))
CHECK = Step("decode and check the request's head", ("RequestHead.decode", "split_target"))
NOTE = Step("note the exchange", ("Exchange", "ExchangeLog.begin", "ExchangeLog.send", "ExchangeLog.finish"))
WRITE = Step("write the request's head", ("Forwarding", "RequestHead.to_wire"))
PARSE_RESPONSE = Step("parse the response", ("ResponseParser.receive_data",))
ANSWER = Step(
    "encode its head, queue head and content",
    ("ResponseHead.encode", "ExchangeLog.respond", "Forwarding._write_head", "Stream.write"),
)
TELL = Step("the console's line", ("Exchange.summary", "one_line", "Console.emit"))
DECODE = Step("read and check the response's head", ("ResponseHead.decode", "Stream.read_head"))
ENCODE = Step("write the response", ("ResponseEncoder.head", "ResponseEncoder.data", "Stream.read"))

SMALL = (
    KERNEL, PARSE, LOOK, FIELDS, OPEN, MESSAGE, READ, HAND, CHECK, NOTE, WRITE, LOCAL, PARSE_RESPONSE, ANSWER, TELL,
    DECODE, ENCODE,
)  # fmt: skip

PIECE = Step("cut the content out", ("ResponseParser.receive_data",))
RECORD = Step("note its size", ("ExchangeLog.send",))
QUEUE = Step("queue it", ("Session.send_data",))
FRAME = Step("make a frame, its header and the chunk as it is", ("Session.frames_to_send",))
MASK = Step("make a message, masked: one copy", ("mask_payload", "message_frame"))
UNMASK = Step("read the message, unmasked: one copy", ("mask_payload", "MessageDecoder.feed"))
JOIN = Step("read its frame: one copy", ("FrameDecoder.feed", "Session.receive_data"))
GRANT = Step("hand it over, and give credit for it", ("Stream.feed", "Stream.read"))
PASS = Step("pass it on", ("ResponseEncoder.data",))
COPY = Step("take it from the buffer: one copy", ("Connection.buffer_updated", "Connection.read"))
ACK = Step("credit and acknowledgement, there and back", ("Session.frames_to_send", "Session.receive_data"))

DOWNLOAD = (KERNEL, COPY, PIECE, RECORD, QUEUE, FRAME, MASK, UNMASK, JOIN, GRANT, PASS, ACK)


def function(name: str) -> Any:
    """What a step names, in pytunnel.py. Raises AttributeError when it is not there."""
    return functools.reduce(getattr, name.split("."), pytunnel)


@functools.cache
def section(name: str) -> str:
    """The section of pytunnel.py in which something is defined."""
    line = inspect.getsourcelines(function(name))[1]
    lines = Path(pytunnel.__file__).read_text(encoding="utf-8").splitlines()[:line]
    return next(match[1] for text in reversed(lines) if (match := re.fullmatch(r"# ---- (.+?) -+", text)))


def place(step: Step) -> str:
    """Where a step is done: its sections, in the order of the file's functions named here."""
    sections = dict.fromkeys(section(name) for name in step.functions)
    if not sections:
        return "the kernel"
    named = ((one, [f"`{name}`" for name in step.functions if section(name) == one]) for one in sections)
    return "; ".join(f"{one}: {', '.join(names)}" for one, names in named)


# ---------------------------------------------------------------------------------------- Stopwatch


class Stopwatch:
    """Adds up what each step of a round takes each side."""

    def __init__(self) -> None:
        self.rounds: dict[tuple[str, Step], list[float]] = defaultdict(list)  # seconds
        self._round: dict[tuple[str, Step], float] = {}
        self._own = 0.0  # what a lap takes itself
        self._own = statistics.median(self._nothing() for _ in range(1000))
        self.start()

    def start(self) -> None:
        """What was before this does not count."""
        self._last = perf_counter()

    def lap(self, side: str, step: Step) -> None:
        """The time since the last call was this step's."""
        spent = perf_counter() - self._last - self._own
        self._round[side, step] = self._round.get((side, step), 0.0) + spent
        self._last = perf_counter()

    def _nothing(self) -> float:
        self.start()
        self.lap("", KERNEL)
        return self._round.pop(("", KERNEL))

    def end(self, count: int = 1) -> None:
        """A round of so many requests is over."""
        for key, spent in self._round.items():
            self.rounds[key].append(spent / count)
        self._round = {}

    def microseconds(self) -> dict[tuple[str, Step], float]:
        """The median of the rounds."""
        return {key: 1e6 * statistics.median(spent[len(spent) // 10 :]) for key, spent in self.rounds.items()}


# ---------------------------------------------------------------------------------------- Both ends


class Connection:
    """As much of aiohttp's protocol and of a transport as the steps look at."""

    ssl_context = transport = None
    address, no_content = "127.0.0.1", aiohttp.EMPTY_PAYLOAD

    def __init__(self, gate: pytunnel.Gate) -> None:
        self.caller = gate.callers["127.0.0.1"]

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


def _sockets(stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = stack.enter_context(socket.create_connection(listener.getsockname()))
        other = stack.enter_context(listener.accept()[0])
    for sock in (one, other):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(10.0)
    return one, other


class Ends:
    """A server and a client, their sessions and their sockets, in one process; no event loop stands between them."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path) -> None:
        """Takes a running event loop, in which nothing happens."""
        self.loop = asyncio.get_running_loop()
        self.watch = Stopwatch()
        self.visitor, self.to_visitor = _sockets(stack)
        self.link = dict(zip(SIDES, _sockets(stack), strict=True))
        self.to_local, self.origin = _sockets(stack)
        wide = 64 * CHUNK  # what a reader who keeps up has as its window
        self.sessions = {
            "server": pytunnel.Session(is_server=True, receive_window=wide),
            "client": pytunnel.Session(is_server=False, send_window=wide),
        }
        self.decoders = {side: pytunnel.MessageDecoder(masked=side == "server") for side in SIDES}
        self.server = pytunnel.TunnelServer(tokens=[], state=directory)
        self.gate = self.server._gate
        self.registry = self.server._registry = pytunnel.TunnelRegistry(directory / "names.json", grace=1, hold=1)
        self.registry.zones = ["example.com"]
        self.registration = pytunnel.Registration("key", ["files"], self.sessions["server"])
        self.links = {"server": self.registration.link, "client": pytunnel.Link(self.sessions["client"])}
        self.arrived: list[pytunnel.Stream] = []  # at the client
        self.links["client"].on_stream = self.arrived.append
        tunnels = [pytunnel.Tunnel("files", pytunnel.Target.parse("3000"))]
        self.client = pytunnel.TunnelClient("http://example.com", "", tunnels)
        self.connection = Connection(self.gate)
        limits = {"max_line_size": 8190, "max_field_size": 8190, "auto_decompress": False}
        self.parser = HttpRequestParser(self.connection, self.loop, 65536, **limits)  # type: ignore[arg-type]
        self.local = pytunnel.Connection()
        self.local.connection_made(self.connection)  # type: ignore[arg-type]
        options = argparse.Namespace(json=False, run=None)
        self.console = stack.enter_context(contextlib.closing(pytunnel.Console(options)))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, nowhere)
        output = stack.enter_context(contextlib.closing(pytunnel.Output(nowhere)))
        self.console.say = output.write
        for session in self.sessions.values():
            session.resume(0, monotonic())

    def move(self, side: str, message: Sequence[bytes | bytearray]) -> list[bytes]:
        """Bring a message over the link, and return in which pieces it came."""
        other, came, rest = SIDES[side == "server"], [], [memoryview(piece) for piece in message]
        missing = sum(map(len, rest))
        while missing:
            if rest:
                sent = self.link[side].sendmsg(rest)
                while rest and sent >= len(rest[0]):
                    sent -= len(rest.pop(0))
                if sent:
                    rest[0] = rest[0][sent:]
                self.watch.lap(side, KERNEL)
            came.append(self.link[other].recv(pytunnel.LINK_BUFFER))
            missing -= len(came[-1])
            self.watch.lap(other, KERNEL)
        return came

    def cross(self, side: str) -> None:
        """Send what one side has queued, and hand it over on the other side."""
        other, lap = SIDES[side == "server"], self.watch.lap
        key = os.urandom(4) if side == "client" else b""
        flight = self.sessions[side]._in_flight
        flight.turn, flight.limit = CHUNK, 64 * CHUNK  # as on a link that is as fast as this one
        self.watch.start()
        frames = self.sessions[side].frames_to_send(now=monotonic())
        assert self.sessions[side].is_flushed, "one message has it all"
        message = pytunnel.message_frame(pytunnel.Opcode.BINARY, frames, key)
        lap(side, MESSAGE)
        for piece in self.move(side, message):
            arrived = []
            for part in self.decoders[other].feed(_as_read(piece)):
                arrived += self.sessions[other].receive_data(part.data, monotonic())
            lap(other, READ)
            for frame in arrived:
                self.links[other]._dispatch(frame)
            lap(other, HAND)

    def take(self, data: bytes) -> None:
        """Let the local service send something, and the client receive it."""
        self.origin.sendall(data)
        self.watch.start()
        size = self.to_local.recv_into(self.local.get_buffer(-1))
        self.watch.lap("client", KERNEL)
        self.local.buffer_updated(size)

    async def begin(self) -> tuple[pytunnel.Visitor, pytunnel.Stream]:
        """A visitor's request, until it is on its way to the client."""
        server, lap = self.server, self.watch.lap
        self.visitor.sendall(REQUEST_HEAD)
        self.watch.start()
        data = self.to_visitor.recv(CHUNK)
        lap("server", KERNEL)
        [(message, payload)] = self.parser.feed_data(data)[0]
        lap("server", PARSE)
        visitor = pytunnel.Visitor(message, payload, self.connection, self.gate, keep_alive=True)
        pytunnel.check_framing(visitor.headers, visitor.version)
        visitor.target, host = pytunnel.split_target(visitor.method, visitor.target, visitor.headers)
        visitor.host = pytunnel.parse_host(host.decode("latin-1"))[0]
        name = self.registry.tunnel_name(visitor.host) or ""
        server._check_load(visitor, monotonic())
        server._check_access(visitor, self.registration, name)
        lap("server", LOOK)
        head = server._request_head(visitor, host, self.registration.access.get(name, pytunnel.EVERYBODY))
        lap("server", FIELDS)
        stream = self.links["server"].open(0, pytunnel.Kind.HTTP, head, end=True, waited=0.0)
        lap("server", OPEN)
        return visitor, stream

    async def forward(self, stream: pytunnel.Stream) -> tuple[pytunnel.Exchange, pytunnel.Forwarding]:
        """The same request at the client, until it is on its way to the local service."""
        lap = self.watch.lap
        head = pytunnel.RequestHead.decode(stream.head)
        pytunnel.split_target(head.method, head.target, head.headers)
        lap("client", CHECK)
        exchange = self.client._exchange_of(0, head, stream.head, waited=stream.waited)
        self.client.log.begin(exchange)
        lap("client", NOTE)
        forwarding = self.client._forward(stream, 0, head, exchange)
        wire = forwarding._wire_head()
        lap("client", WRITE)
        self.to_local.send(wire)
        lap("client", KERNEL)
        self.origin.recv(CHUNK)
        return exchange, forwarding

    async def small(self) -> None:
        """So many small requests and their responses as one message carries."""
        asked = [await self.begin() for _ in range(AT_ONCE)]
        self.cross("server")
        for stream in self.arrived:
            await self._answer(stream)
        self.arrived.clear()
        self.cross("client")
        for visitor, stream in asked:
            await self._deliver(visitor, stream)
        self.watch.end(AT_ONCE)

    async def _answer(self, stream: pytunnel.Stream) -> None:
        """What the client does for one of them."""
        lap = self.watch.lap
        exchange, forwarding = await self.forward(stream)
        self.take(SMALL_RESPONSE)
        data = await self.local.read(stream.room)
        lap("client", LOCAL)
        head, content = forwarding._parser.receive_data(data)
        lap("client", PARSE_RESPONSE)
        forwarding._write_head(head, end=False)  # type: ignore[arg-type]
        lap("client", ANSWER)
        self.client.log.send(exchange, content, self.loop.time())  # type: ignore[arg-type]
        lap("client", NOTE)
        await stream.write(content, end=True)  # type: ignore[arg-type]
        stream.close()
        lap("client", ANSWER)
        self.client.log.finish(exchange, self.loop.time())
        lap("client", NOTE)
        self.console.emit("request", exchange=exchange)
        lap("client", TELL)

    async def _deliver(self, visitor: pytunnel.Visitor, stream: pytunnel.Stream) -> None:
        """What the server does with its response."""
        lap = self.watch.lap
        head = await visitor._read_head(stream)
        lap("server", DECODE)
        out = visitor.encoder.head(head, pytunnel._date(), end=stream.at_eof)
        out += visitor.encoder.data(await stream.read())
        out += visitor.encoder.end()
        stream.close()
        lap("server", ENCODE)
        self.to_visitor.send(out)
        lap("server", KERNEL)
        received = self.visitor.recv(CHUNK)
        assert received.endswith(JSON), "the visitor gets what the local service sent"
        self.watch.start()

    async def download(self, rounds: int) -> None:
        """One request whose response has so many chunks."""
        visitor, asked = await self.begin()
        self.cross("server")
        stream = self.arrived.pop()
        exchange, forwarding = await self.forward(stream)
        self.take(_wire(RESPONSE.format(rounds * CHUNK)))
        head = forwarding._parser.receive_data(await self.local.read())[0]
        forwarding._write_head(head, end=False)  # type: ignore[arg-type]
        self.cross("client")
        visitor.encoder.head(await visitor._read_head(asked), pytunnel._date())
        self.watch = Stopwatch()
        for _ in range(rounds):
            await self._chunk(visitor, asked, forwarding, exchange, stream)
        await stream.write(b"", end=True)
        stream.close()
        self.cross("client")
        asked.close()

    async def _chunk(self, visitor: Any, asked: Any, forwarding: Any, exchange: Any, stream: Any) -> None:
        watch, lap = self.watch, self.watch.lap
        server, client = self.sessions["server"], self.sessions["client"]
        client._in_flight.turn, client._in_flight.limit = CHUNK, 64 * CHUNK  # as on a link that is as fast as this one
        view, missing, pieces = memoryview(BLOCK), CHUNK, []
        while missing:
            view = view[self.origin.send(view) :] if view else view
            watch.start()
            size = self.to_local.recv_into(self.local.get_buffer(-1))
            lap("client", KERNEL)
            self.local.buffer_updated(size)
            pieces.append(await self.local.read(CHUNK))
            lap("client", COPY)
            missing -= size
        for piece in pieces:
            [content] = forwarding._parser.receive_data(piece)
            lap("client", PIECE)
            self.client.log.send(exchange, content, self.loop.time())
            lap("client", RECORD)
            client.send_data(stream.id, content)
            lap("client", QUEUE)
        while queued := client.frames_to_send(now=monotonic()):
            lap("client", FRAME)
            message = pytunnel.message_frame(pytunnel.Opcode.BINARY, queued, os.urandom(4))
            lap("client", MASK)
            for slice_ in self.move("client", message):
                await self._arrive(slice_, visitor, asked)
        while queued := server.frames_to_send(now=monotonic()):
            message = pytunnel.message_frame(pytunnel.Opcode.BINARY, queued)
            lap("server", ACK)
            for slice_ in self.move("server", message):
                for part in self.decoders["client"].feed(_as_read(slice_)):
                    client.receive_data(part.data, monotonic())
                lap("client", ACK)
        watch.end()

    async def _arrive(self, data: bytes, visitor: Any, asked: Any) -> None:
        watch, lap = self.watch, self.watch.lap
        for part in self.decoders["server"].feed(_as_read(data)):
            lap("server", UNMASK)
            frames = self.sessions["server"].receive_data(part.data, monotonic())
            lap("server", JOIN)
            for frame in frames:
                self.links["server"]._dispatch(frame)
                content = await asked.read()
                lap("server", GRANT)
                view = memoryview(visitor.encoder.data(content))
                lap("server", PASS)
                while view:
                    view = view[self.to_visitor.send(view[:CHUNK]) :]
                    lap("server", KERNEL)
                    self.visitor.recv(CHUNK)
                    watch.start()


def _as_read(data: bytes) -> bytes | memoryview:
    """What is large is looked at where it was read."""
    return memoryview(data) if len(data) > pytunnel.SEND_BUFFER else data


def _wire(text: str) -> bytes:
    return text.replace("\n", "\r\n").encode() + b"\r\n"


JSON = contenders.small_json().encode()
REQUEST_HEAD = _wire(REQUEST)
SMALL_RESPONSE = _wire(RESPONSE.format(len(JSON))) + JSON
BLOCK = os.urandom(CHUNK)


async def measure(rounds: int) -> tuple[Stopwatch, Stopwatch]:
    """Lead so many rounds of small requests, and as many chunks of a download, through both ends."""
    with contextlib.ExitStack() as stack:
        ends = Ends(stack, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-where-"))))
        for _ in range(rounds):
            await ends.small()
        small = ends.watch
        await ends.download(rounds)
        return small, ends.watch


# ---------------------------------------------------------------------------------------- A real run


class Cost(NamedTuple):
    """Microseconds of a process for each request or chunk."""

    user: float
    system: float


def processor(pid: int) -> Cost:
    """Microseconds that a process has taken so far, with all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    tick = 1e6 / os.sysconf("SC_CLK_TCK")
    return Cost(int(fields[11]) * tick, int(fields[12]) * tick)


@contextlib.contextmanager
def counting(running: contenders.Running) -> Iterator[dict[str, Cost]]:
    """What both processes take in this block; it is there when the block has ended."""
    pids = {"server": running.server.pid, "client": running.client.pid}  # type: ignore[union-attr]
    before = {side: processor(pid) for side, pid in pids.items()}
    taken: dict[str, Cost] = {}
    yield taken
    for side, pid in pids.items():
        now = processor(pid)
        taken[side] = Cost(now.user - before[side].user, now.system - before[side].system)


Run = dict[str, dict[str, Cost]]  # by the event loop's name, then by side


def real_run() -> tuple[Run, Run]:
    """What whole processes take for a small request of 32 at a time, and for a chunk of one download."""
    small, download = {}, {}
    fields = [line for line in REQUEST.splitlines()[2:] if not line.startswith("Connection")]
    with contextlib.ExitStack() as stack:
        one_machine = os.geteuid() == 0
        sides = stack.enter_context(network.one_machine()) if one_machine else (Side(), Side())
        files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-files-")))
        with (files / "large").open("wb") as file:
            file.truncate(4000 * CHUNK)
        stage = stack.enter_context(contenders.Stage(*sides, TESTS.parent / "pytunnel.py", {}))
        contenders.start_origin(stage, files)
        for running in contenders.start_contenders(stage, ["pytunnel, asyncio", "pytunnel, uvloop"]):
            name = running.name.removeprefix("pytunnel, ")
            loads.wrk(running.files, "/small", 32, 1, *fields)
            with counting(running) as taken:
                count = SECONDS * loads.wrk(running.files, "/small", 32, SECONDS, *fields).rate
            small[name] = {side: Cost(cost.user / count, cost.system / count) for side, cost in taken.items()}
            with counting(running) as taken:
                loads.transfer(running.files, "/large")
            download[name] = {side: Cost(cost.user / 4000, cost.system / 4000) for side, cost in taken.items()}
    return small, download


# ---------------------------------------------------------------------------------------- Table


def table(steps: Sequence[Step], watch: Stopwatch, run: Run) -> str:
    """The Markdown table of some steps, their sum, and the real run."""
    spent = watch.microseconds()
    rows = [["step", "where in pytunnel.py", *(f"µs on the {side}" for side in SIDES)], ["---", "---", "--:", "--:"]]
    for step in steps:
        cells = [f"{spent[side, step]:.1f}" if (side, step) in spent else "" for side in SIDES]
        rows.append([step.name, place(step), *cells])
    sums = [sum(value for (where, _), value in spent.items() if where == side) for side in SIDES]
    rows.append(["**all of these**", "", *(f"**{value:.0f}**" for value in sums)])
    for name, costs in run.items():
        cells = [f"{costs[side].user:.0f} + {costs[side].system:.0f}" for side in SIDES]
        rows.append([f"**a whole process, {name}**", "in the program + in the kernel", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    if missing := contenders.missing_packages():
        sys.exit(f"error: programs are missing: apt-get install {' '.join(missing)}")
    versions = [f"Linux {platform.release()}", f"Python {platform.python_version()}", f"aiohttp {aiohttp.__version__}"]
    print(f"{os.cpu_count()} CPUs, {', '.join(versions)}, pytunnel {pytunnel.__version__}\n", flush=True)
    gc.freeze()  # and with the thresholds of the program
    gc.set_threshold(10_000, 20, 50)
    small, download = asyncio.run(measure(ROUNDS))
    run_small, run_download = real_run()
    print(f"One small request:\n\n{table(SMALL, small, run_small)}\n")
    print(f"256 KiB of a download:\n\n{table(DOWNLOAD, download, run_download)}")


if __name__ == "__main__":
    main()
