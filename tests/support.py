"""The end-to-end harness: a local service, a visitor, a bad network and real processes.

    RawVisitor -> [server] <- Relay <- [client] -> RawOrigin

Everything runs on 127.0.0.1 and on ports chosen by the kernel. "Raw" means that bytes are written and
recorded exactly as they are: no HTTP library repairs, reorders or completes anything on the way.
Nothing here sleeps to wait for something: a wait is a condition with a deadline, and a deadline that
passes raises `WaitFailed`, which says what was waited for. Only the relay keeps time, because delay and
rate are what it is for.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import itertools
import json
import os
import random
import re
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar
from urllib.parse import urlsplit

import pytunnel

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "pytunnel.py"

TIMEOUT = 10.0  # seconds; a test that works needs a fraction of it, one that fails should not take long
CHUNK = 64 * 1024  # bytes taken from a socket at once
TCP_PORTS = 20  # of a server for TCP tunnels
LINE_LIMIT = 16 * 1024 * 1024  # bytes in one line of a process's output

Header = tuple[bytes, bytes]
T = TypeVar("T")


def sliced(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """Cut `data` into pieces of these sizes, over and over."""
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(data):
            return
        yield data[start : start + size]
        start += size


class WaitFailed(AssertionError):
    """A condition was not met before its deadline, or can no longer be met."""


class BadMessage(AssertionError):
    """Bytes that are not what RFC 9112 allows at this place."""


class Truncated(AssertionError):
    """The connection ended inside a message. `data` is what came of it, `ended` is "fin" or "reset"."""

    def __init__(self, what: str, data: bytes, ended: str | None) -> None:
        super().__init__(f"{what} cut short by {ended} after {len(data)} bytes: {data[-200:]!r}")
        self.data = data
        self.ended = ended


# ---------------------------------------------------------------------------------------- Waiting


class Signal:
    """A condition variable whose `notify` may be called from a callback (there is no lock to hold)."""

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    def notify(self) -> None:
        """Let every waiter look at its predicate again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_for(
        self,
        predicate: Callable[[], T],
        timeout: float | None = None,
        what: str | Callable[[], str] = "condition",
    ) -> T:
        """Return the predicate's value as soon as it is true; raise WaitFailed after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not (value := predicate()):
                    await self._notified()
                return value
        except TimeoutError:
            text = what if isinstance(what, str) else what()
            raise WaitFailed(f"not within {timeout} s: {text}") from None

    async def _notified(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            self._waiters.remove(waiter)


async def eventually(predicate: Callable[[], T], timeout: float = 5.0, what: str = "condition") -> T:
    """Poll for what sends no signal (a file, /proc) until it is true; raise WaitFailed at the deadline."""
    deadline = time.monotonic() + timeout
    while True:
        looked = time.monotonic()  # before: a look that the machine stalls in is not the last one
        if value := predicate():
            return value
        if looked >= deadline:
            raise WaitFailed(f"not within {timeout} s: {what}")
        await asyncio.sleep(0.02)


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_ports = (10_100 + _WORKER % 10 * 180 + n % 180 for n in itertools.count(random.SystemRandom().randrange(180)))


def free_port() -> int:
    """A port on which nothing listens now, that no connection gets, nor another worker, and that Chromium takes."""
    for port in _ports:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("", port))
            return port
    raise AssertionError


def keep_port(host: str = "127.0.0.1") -> socket.socket:
    """A socket that keeps a port from whoever wants any, until it is closed; who names the port may listen on it."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, 0))
    return sock


def listens(port: int) -> bool:
    """Whether something accepts connections on a port of loopback."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


# ---------------------------------------------------------------------------------------- Patterns

_BLOCK = 1024 * 1024


@functools.cache
def _base_block() -> bytes:
    return random.Random(20240229).randbytes(_BLOCK)


@functools.lru_cache(maxsize=4)
def _pattern_block(number: int) -> bytes:
    mixed = _base_block().translate(bytes(value ^ (number & 255) for value in range(256)))
    return number.to_bytes(8, "big") + mixed[8:]


def pattern(offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size) of an endless deterministic stream in which every place differs.

    Any piece that is lost, repeated or moved by less than 256 MiB changes what is read.
    """
    pieces = []
    while size > 0:
        number, start = divmod(offset, _BLOCK)
        piece = _pattern_block(number)[start : start + size]
        pieces.append(piece)
        offset, size = offset + len(piece), size - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class PatternChecker:
    """Verifies `pattern` bytes as they arrive, in pieces of any size; `offset` is how many were right."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset

    def feed(self, data: bytes) -> None:
        """Raise AssertionError with the place of the first wrong byte."""
        expected = pattern(self.offset, len(data))
        if data != expected:
            good = next(i for i, (a, b) in enumerate(zip(data, expected, strict=True)) if a != b)
            where = self.offset + good
            raise AssertionError(f"wrong byte at {where}: {data[good:][:16]!r}, not {expected[good:][:16]!r}")
        self.offset += len(data)


# ---------------------------------------------------------------------------------------- Messages


class BodyReader(Protocol):
    """What a body is read from: an asyncio.StreamReader, or the visitor's own buffer."""

    async def read(self, n: int = ..., /) -> bytes: ...
    async def readexactly(self, n: int, /) -> bytes: ...
    async def readuntil(self, separator: bytes = ..., /) -> bytes: ...


@dataclass
class Message:
    """A message's head: its exact bytes up to and including the blank line, and the fields in order."""

    head: bytes
    headers: list[Header]

    def values(self, name: bytes) -> list[bytes]:
        """The values of every field of that name (in any case), in order."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def value(self, name: bytes) -> bytes | None:
        """The value of the field, None without one; AssertionError when there are several."""
        values = self.values(name)
        assert len(values) <= 1, f"{len(values)} fields named {name!r}"
        return values[0] if values else None


@dataclass
class RawRequest(Message):
    """A request as the local service saw it. `complete` turns true when its whole body was read."""

    method: bytes
    target: bytes
    body: bytes = b""
    trailers: list[Header] = field(default_factory=list)
    complete: bool = False
    connection: int = 0  # index into RawOrigin.connections

    @property
    def framing(self) -> int | Literal["chunked"]:
        if any(value.lower().endswith(b"chunked") for value in self.values(b"transfer-encoding")):
            return "chunked"
        return int(self.value(b"content-length") or 0)


@dataclass
class RawResponse(Message):
    """A response as the visitor saw it.

    `clean` is false when the connection ended inside the body, a missing last chunk included; `ended`
    then tells how ("fin" or "reset"). A close-delimited body is clean when it ends with FIN.
    """

    version: bytes
    status: int
    reason: bytes
    body: bytes = b""
    trailers: list[Header] = field(default_factory=list)
    interim: list[RawResponse] = field(default_factory=list)
    clean: bool = True
    ended: str | None = None

    def framing(self, method: str = "GET") -> int | Literal["chunked", "close"]:
        """How the body of the response to `method` ends (RFC 9112, 6.3); BadMessage when it may not be so."""
        lengths, codings = self.values(b"content-length"), self.values(b"transfer-encoding")
        _check(len(lengths) + len(codings) <= 1, f"framed twice: {lengths} {codings}")
        _check(not lengths or re.fullmatch(rb"[0-9]+", lengths[0]), f"Content-Length {lengths}")
        _check(not codings or codings[0].lower() == b"chunked", f"Transfer-Encoding {codings}")
        if self.status < 200 or self.status == 204:
            _check(not lengths and not codings, f"a {self.status} with {lengths or codings} (RFC 9110, 8.6)")
        if method == "HEAD" or self.status < 200 or self.status in (204, 304):
            return 0
        if codings:
            return "chunked"
        return int(lengths[0]) if lengths else "close"


_STATUS_LINE = re.compile(rb"(HTTP/1\.[01]) ([1-9][0-9][0-9]) ([\t\x20-\x7e\x80-\xff]*)")
_FIELD_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")


def _check(condition: object, message: str) -> None:
    if not condition:
        raise BadMessage(message)


def _parse_field(line: bytes) -> Header:
    match = _FIELD_LINE.fullmatch(line)
    if match is None:
        raise BadMessage(f"field line {line[:200]!r}")
    return match[1], match[2].rstrip(b" \t")


def parse_response_head(head: bytes) -> RawResponse:
    """Parse one response head strictly; BadMessage for anything RFC 9112 does not allow."""
    lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    match = _STATUS_LINE.fullmatch(lines[0])
    if match is None:
        raise BadMessage(f"status line {lines[0][:200]!r}")
    headers = [_parse_field(line) for line in lines[1:]]
    return RawResponse(head, headers, version=match[1], status=int(match[2]), reason=match[3])


def _parse_request_head(head: bytes) -> RawRequest:
    """Parse one request head leniently: what came is to be seen, right or wrong."""
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    method, _, rest = first.partition(b" ")
    fields = [(name, value.strip(b" \t")) for name, _, value in (line.partition(b":") for line in lines)]
    return RawRequest(head, fields, method=method, target=rest.rpartition(b" ")[0])


async def _iter_length(reader: BodyReader, length: int) -> AsyncIterator[bytes]:
    while length:
        piece = await reader.read(min(length, CHUNK))
        if not piece:
            raise asyncio.IncompleteReadError(b"", length)
        length -= len(piece)
        yield piece


async def _iter_chunked(reader: BodyReader, trailers: list[Header]) -> AsyncIterator[bytes]:
    while True:
        line = (await reader.readuntil(b"\r\n"))[:-2]
        _check(re.fullmatch(rb"[0-9A-Fa-f]{1,16}(;[\t\x20-\x7e\x80-\xff]*)?", line), f"chunk size {line!r}")
        size = int(line.partition(b";")[0], 16)
        if not size:
            break
        async for piece in _iter_length(reader, size):
            yield piece
        end = await reader.readexactly(2)
        _check(end == b"\r\n", f"{end!r} after a chunk")
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        trailers.append(_parse_field(line[:-2]))


def _iter_framed(
    reader: BodyReader, framing: int | Literal["chunked"], trailers: list[Header]
) -> AsyncIterator[bytes]:
    return _iter_chunked(reader, trailers) if framing == "chunked" else _iter_length(reader, framing)


def request(
    method: str = "GET",
    target: bytes = b"/",
    host: bytes = b"localhost",
    headers: Iterable[Header] = (),
    body: bytes | None = None,
) -> bytes:
    """A request's bytes: Host, the headers as given, and Content-Length when there is a body."""
    fields = [(b"Host", host), *headers]
    if body is not None:
        fields.append((b"Content-Length", b"%d" % len(body)))
    return _message(method.encode() + b" " + target + b" HTTP/1.1", fields, body or b"")


def response(
    body: bytes = b"", status: int = 200, headers: Iterable[Header] = (), reason: bytes = b"OK"
) -> bytes:
    """A response's bytes: the headers as given and Content-Length."""
    fields = [*headers, (b"Content-Length", b"%d" % len(body))]
    return _message(b"HTTP/1.1 %d %b" % (status, reason), fields, body)


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body; chunk(b"") is the last one, without trailers."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _message(first: bytes, fields: Iterable[Header], body: bytes) -> bytes:
    return b"".join([first, b"\r\n", *(b"%b: %b\r\n" % pair for pair in fields), b"\r\n", body])


# ---------------------------------------------------------------------------------------- Sockets


class RawSocket:
    """A non-blocking socket from which nothing is read unless asked for; cancelling loses no byte.

    One task may wait to read and one to write at a time. Closing wakes both with ConnectionAbortedError.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self._reading: asyncio.Future[None] | None = None
        self._writing: asyncio.Future[None] | None = None

    @property
    def closed(self) -> bool:
        return self.sock.fileno() < 0

    async def readable(self) -> None:
        """Return when recv_now would return something, the end included."""
        self._require_open()
        assert self._reading is None, "two tasks read from one socket"
        self._reading = self._loop.create_future()
        self._loop.add_reader(self.sock.fileno(), _wake, self._reading)
        try:
            await self._reading
        finally:
            self._reading = None
            if not self.closed:
                self._loop.remove_reader(self.sock.fileno())

    async def writable(self) -> None:
        """Return when send_now would take something."""
        self._require_open()
        assert self._writing is None, "two tasks write to one socket"
        self._writing = self._loop.create_future()
        self._loop.add_writer(self.sock.fileno(), _wake, self._writing)
        try:
            await self._writing
        finally:
            self._writing = None
            if not self.closed:
                self._loop.remove_writer(self.sock.fileno())

    async def recv(self, limit: int = CHUNK) -> bytes:
        """At least one byte, b"" at FIN; ConnectionError on RST."""
        while True:
            await self.readable()
            with contextlib.suppress(BlockingIOError):
                return self.sock.recv(limit)

    async def send(self, data: bytes) -> None:
        """Hand all of `data` to the kernel."""
        view = memoryview(data)
        while view:
            await self.writable()
            with contextlib.suppress(BlockingIOError):
                view = view[self.sock.send(view) :]

    def write_eof(self) -> None:
        """Send FIN; reading goes on."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close; idempotent. The kernel sends FIN, or RST when bytes were left unread."""
        if self.closed:
            return
        self._loop.remove_reader(self.sock.fileno())
        self._loop.remove_writer(self.sock.fileno())
        self.sock.close()
        for waiter in (self._reading, self._writing):
            if waiter is not None and not waiter.done():
                waiter.set_exception(ConnectionAbortedError("closed by the test"))

    def abort(self) -> None:
        """Close with RST; idempotent."""
        if not self.closed:
            _linger_zero(self.sock)
        self.close()

    def _require_open(self) -> None:
        if self.closed:
            raise ConnectionAbortedError("closed by the test")


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _linger_zero(sock: Any) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _set_buffers(sock: socket.socket, rcvbuf: int | None, sndbuf: int | None) -> None:
    if rcvbuf is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    if sndbuf is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)


async def _dial(
    port: int, host: str, rcvbuf: int | None = None, sndbuf: int | None = None, source: str | None = None
) -> RawSocket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setblocking(False)
        if source is not None:
            sock.bind((source, 0))
        _set_buffers(sock, rcvbuf, sndbuf)
        await asyncio.get_running_loop().sock_connect(sock, (host, port))
        if sock.getsockname()[:2] == (host, port):  # what TCP makes of a dead ephemeral port, now and then
            raise ConnectionRefusedError(f"nothing listens on {host}:{port}, the socket met itself")
    except BaseException:
        sock.close()
        raise
    return RawSocket(sock)


# ---------------------------------------------------------------------------------------- Visitor


class RawVisitor:
    """A visitor on a bare socket: writes what it is told, reads strictly, and only when it is asked to.

    Between two reads it takes nothing from the kernel, so a visitor that does not call read is a slow
    one (use `rcvbuf` to make the kernel's share small). `timeout` bounds each wait for more bytes or
    for room to send, not the whole message. `ended` is None, "fin" or "reset". `source` is its own address.
    """

    def __init__(
        self,
        port: int,
        *,
        host: str = "127.0.0.1",
        timeout: float = TIMEOUT,
        rcvbuf: int | None = None,
        sndbuf: int | None = None,
        source: str | None = None,
    ) -> None:
        self.port = port
        self.timeout = timeout
        self.ended: str | None = None
        self._address, self._source = host, source
        self._buffers = (rcvbuf, sndbuf)
        self._buffer = bytearray()
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._socket: RawSocket | None = None

    async def __aenter__(self) -> Self:
        async with asyncio.timeout(self.timeout):
            self._socket = await _dial(self.port, self._address, *self._buffers, source=self._source)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    # --- sending and ending

    @property
    def socket(self) -> RawSocket:
        assert self._socket is not None, "use `async with`"
        return self._socket

    async def send(self, data: bytes) -> None:
        """Hand all bytes to the kernel; ConnectionError when the peer is gone."""
        for start in range(0, len(data), CHUNK):
            await self._in_time(self.socket.send(data[start : start + CHUNK]), "room to send")

    def write_eof(self) -> None:
        """Half-close: FIN, reading goes on."""
        self.socket.write_eof()

    def close(self) -> None:
        """Close the connection; FIN, or RST if bytes were left unread."""
        if self._socket is not None:
            self._socket.close()

    def abort(self) -> None:
        """Close the connection with RST."""
        self.socket.abort()

    def stop_reading(self) -> None:
        """Make a read that is under way, and every later one, wait for start_reading()."""
        self._may_read.clear()

    def start_reading(self) -> None:
        """Let reads go on."""
        self._may_read.set()

    # --- bytes

    @property
    def buffered(self) -> bytes:
        """What was received and not yet read."""
        return bytes(self._buffer)

    async def read_some(self, limit: int = CHUNK) -> bytes:
        """Between one and `limit` bytes, or b"" when the connection has ended (see `ended`)."""
        if not self._buffer:
            await self._fill()
        data = bytes(self._buffer[:limit])
        del self._buffer[:limit]
        return data

    async def read_exactly(self, n: int) -> bytes:
        """Exactly n bytes; Truncated when the connection ends before."""
        while len(self._buffer) < n:
            if not await self._fill():
                raise Truncated(f"{n} bytes", bytes(self._buffer), self.ended)
        return await self.read_some(n) if n else b""

    async def read_until(self, separator: bytes) -> bytes:
        """The bytes up to and including the separator; Truncated when the connection ends before."""
        searched = 0
        while (found := self._buffer.find(separator, searched)) < 0:
            searched = max(0, len(self._buffer) - len(separator) + 1)
            if not await self._fill():
                raise Truncated(f"up to {separator!r}", bytes(self._buffer), self.ended)
        return await self.read_exactly(found + len(separator))

    async def read_until_close(self) -> bytes:
        """Everything up to the end of the connection, FIN or RST (see `ended`)."""
        data = bytearray()
        while piece := await self.read_some():
            data += piece
        return bytes(data)

    # --- responses

    async def read_head(self) -> RawResponse:
        """One response head, interim or final, without its body; Truncated when it is not whole."""
        return parse_response_head(await self.read_until(b"\r\n\r\n"))

    async def iter_body(self, head: RawResponse, method: str = "GET") -> AsyncIterator[bytes]:
        """The body's content as it arrives, without chunk framing; Truncated at an unclean end."""
        framing = head.framing(method)
        incoming = _VisitorReader(self)
        try:
            if framing == "close":
                while piece := await self.read_some():
                    yield piece
                if self.ended == "reset":
                    raise asyncio.IncompleteReadError(b"", None)
                return
            async for piece in _iter_framed(incoming, framing, head.trailers):
                yield piece
        except asyncio.IncompleteReadError:
            raise Truncated("body", b"", self.ended) from None

    async def read_response(
        self, method: str = "GET", *, sink: Callable[[bytes], object] | None = None
    ) -> RawResponse:
        """One whole response to `method`; interim responses before it are in `.interim`.

        With a sink the content goes there, piece by piece, and `.body` stays empty. A body cut short is
        returned with `clean` false; a head cut short raises Truncated, a wrong message BadMessage. The
        final response to an upgrade is the 101: what follows it is for read_some and its kin.
        """
        interim: list[RawResponse] = []
        while (head := await self.read_head()).status < 200 and head.status != 101:
            head.framing()
            interim.append(head)
        head.interim = interim
        body = bytearray()
        take = sink if sink is not None else body.extend
        try:
            async for piece in self.iter_body(head, method):
                take(piece)
        except Truncated:
            head.clean = False
        head.body, head.ended = bytes(body), self.ended
        return head

    async def _fill(self) -> bool:
        if self.ended is not None:
            return False
        try:
            data = await self._in_time(self._receive(), "bytes to read")
        except ConnectionAbortedError:
            raise
        except ConnectionError:
            self.ended = "reset"
            return False
        if not data:
            self.ended = "fin"
        self._buffer += data
        return bool(data)

    async def _receive(self) -> bytes:
        while True:
            await self._may_read.wait()
            await self.socket.readable()
            if self._may_read.is_set():
                with contextlib.suppress(BlockingIOError):
                    return self.socket.sock.recv(4 * CHUNK)

    async def _in_time(self, work: Awaitable[T], what: str) -> T:
        try:
            async with asyncio.timeout(self.timeout):
                return await work
        except TimeoutError:
            text = f"no {what} within {self.timeout} s; buffered: {self.buffered[-500:]!r}"
            raise WaitFailed(text) from None


class _VisitorReader:
    """The visitor's buffer under a StreamReader's names, so that one body reader serves both ends."""

    def __init__(self, visitor: RawVisitor) -> None:
        self._visitor = visitor

    async def read(self, n: int = CHUNK, /) -> bytes:
        return await self._visitor.read_some(n)

    async def readexactly(self, n: int, /) -> bytes:
        try:
            return await self._visitor.read_exactly(n)
        except Truncated as error:
            raise asyncio.IncompleteReadError(error.data, n) from None

    async def readuntil(self, separator: bytes = b"\n", /) -> bytes:
        try:
            return await self._visitor.read_until(separator)
        except Truncated as error:
            raise asyncio.IncompleteReadError(error.data, None) from None


# ---------------------------------------------------------------------------------------- Origin

Handler = Callable[[RawRequest, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Received(bytearray):
    """What one connection to the origin received, raw (up to the origin's `record_limit`), and its state."""

    def __init__(self) -> None:
        super().__init__()
        self.peer: object = None  # the address of whoever connected
        self.total = 0  # bytes received, recorded or not
        self.eof = False  # the peer has sent FIN
        self.lost = False  # the socket is closed, by either side
        self.kept = False  # between two requests: whoever connected may keep it for another one
        self.reset = False  # ... and it ended with an error, usually the peer's RST

    @property
    def open(self) -> bool:
        """Whether neither side has ended the connection so far."""
        return not (self.eof or self.lost)


class RawOrigin:
    """A local service on bare sockets that records what it receives.

    The handler is called once per request and writes raw bytes; a str or bytes stands for a handler that
    writes just these. Afterwards the connection waits for the next request, unless the handler closed
    it, `keep_alive` is false, a canned response says `Connection: close`, or the request's body was not
    read to its end. With `read_body` the body is read (and decoded) before the handler is called;
    without, the handler reads it, by `iter_body(request, reader)` or in its own way. A handler that
    does not read holds the sender back: little more than 2 x `limit` is buffered. An exception in a
    handler, other than a lost connection, is raised again when the origin is closed.
    """

    running: ClassVar[dict[int, RawOrigin]] = {}  # by port

    def __init__(
        self,
        handler: Handler | bytes | str,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        read_body: bool = False,
        keep_alive: bool = True,
        limit: int = 256 * 1024,
        record_limit: int = 64 * 1024 * 1024,
        rcvbuf: int | None = None,
        sndbuf: int | None = None,
    ) -> None:
        self.port = port
        self.connections: list[Received] = []
        self.requests: list[RawRequest] = []
        self.errors: list[Exception] = []
        self.read_body = read_body
        self.keep_alive = keep_alive
        self.limit = limit
        self.record_limit = record_limit
        self._handler = handler if callable(handler) else _canned(handler)
        self._host = host
        self._buffers = (rcvbuf, sndbuf)
        self._signal = Signal()
        self._tasks: set[asyncio.Task[None]] = set()
        self._transports: set[asyncio.BaseTransport] = set()
        self._server: asyncio.Server | None = None
        self._kept: socket.socket | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        if not self.port:
            self._kept = keep_port(self._host)  # nobody else listens there when this origin has closed
            self.port = self._kept.getsockname()[1]
        sock = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _set_buffers(sock, *self._buffers)
            sock.bind((self._host, self.port))
            self._server = await loop.create_server(lambda: _OriginProtocol(self), sock=sock, backlog=1024)
        except BaseException:
            sock.close()
            if self._kept is not None:
                self._kept.close()
            raise
        self.running[self.port] = self
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        if self._kept is not None:
            self._kept.close()
        await self.aclose()
        if error is None and self.errors:
            raise self.errors[0]

    async def aclose(self) -> None:
        """Stop listening, end every connection and every handler; idempotent."""
        if self._server is not None:
            self._server.close()
            self.running.pop(self.port, None)
        self.abort_connections()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
        await self.wait_for(lambda: not self._transports)

    def abort_connections(self) -> None:
        """End every connection at once, with RST."""
        for transport in list(self._transports):
            _reset_transport(transport)

    # --- what was seen

    @property
    def open_connections(self) -> int:
        """Connections that neither side has ended (a FIN received ends one, as far as this counts)."""
        return sum(received.open for received in self.connections)

    @property
    def bytes_received(self) -> int:
        return sum(received.total for received in self.connections)

    async def wait_for(self, predicate: Callable[[], T], timeout: float = 5.0, what: str = "") -> T:
        """Return the predicate's value once it is true; it is asked again after whatever the origin sees."""
        return await self._signal.wait_for(predicate, timeout, lambda: f"{what or 'condition'}; {self!r}")

    async def wait_requests(self, n: int = 1, timeout: float = 5.0) -> list[RawRequest]:
        """Return the requests once n of them are complete (body included)."""
        await self.wait_for(lambda: sum(r.complete for r in self.requests) >= n, timeout, f"{n} requests")
        return self.requests

    async def iter_body(self, request: RawRequest, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        """The request's decoded content as it arrives; asyncio.IncompleteReadError when it is cut short."""
        async for piece in _iter_framed(reader, request.framing, request.trailers):
            yield piece
        request.complete = True
        self._signal.notify()

    def __repr__(self) -> str:
        return (
            f"<RawOrigin {len(self.connections)} connections, {self.open_connections} open, "
            f"{self.bytes_received} bytes, {[(r.method, r.target, r.complete) for r in self.requests[-5:]]}>"
        )

    # --- connections

    def _start(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._serve_request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except Exception as error:
            self.errors.append(error)
        finally:
            writer.close()
            self._signal.notify()

    async def _serve_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        assert isinstance(reader, _RecordingReader)
        request = _parse_request_head(await reader.readuntil(b"\r\n\r\n"))
        reader.received.kept = False
        request.connection = reader.index
        request.complete = request.framing == 0
        self.requests.append(request)
        self._signal.notify()
        if self.read_body and not request.complete:
            request.body = b"".join([piece async for piece in self.iter_body(request, reader)])
        await self._handler(request, reader, writer)
        if not writer.is_closing():
            await writer.drain()
        reader.received.kept = self.keep_alive and request.complete and not writer.is_closing()
        return reader.received.kept


class _RecordingReader(asyncio.StreamReader):
    """A StreamReader that records each byte when it comes from the socket."""

    def __init__(self, origin: RawOrigin, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=origin.limit, loop=loop)
        self.received = Received()
        self.index = len(origin.connections)
        self._origin = origin
        origin.connections.append(self.received)

    def feed_data(self, data: Iterable[Any]) -> None:
        data = bytes(data)
        self.received += data[: max(0, self._origin.record_limit - len(self.received))]
        self.received.total += len(data)
        super().feed_data(data)
        self._origin._signal.notify()


class _OriginProtocol(asyncio.StreamReaderProtocol):
    """Tells the origin when a connection opens, half-closes and ends."""

    def __init__(self, origin: RawOrigin) -> None:
        loop = asyncio.get_running_loop()
        self._recording = _RecordingReader(origin, loop)
        self._origin = origin
        self._own_transport: asyncio.BaseTransport | None = None
        super().__init__(self._recording, origin._start, loop=loop)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._own_transport = transport
        self._recording.received.peer = transport.get_extra_info("peername")
        self._origin._transports.add(transport)
        super().connection_made(transport)
        self._origin._signal.notify()

    def eof_received(self) -> bool:
        self._recording.received.eof = True
        self._origin._signal.notify()
        return bool(super().eof_received())

    def connection_lost(self, exc: Exception | None) -> None:
        self._recording.received.lost = True
        self._recording.received.reset = exc is not None
        if self._own_transport is not None:
            self._origin._transports.discard(self._own_transport)
        super().connection_lost(exc)
        self._origin._signal.notify()


def _canned(answer: bytes | str) -> Handler:
    data = answer.encode("latin-1") if isinstance(answer, str) else answer
    head = data.partition(b"\r\n\r\n")[0].lower()

    async def respond(_: RawRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if re.search(rb"\r\nconnection:[ \t]*close", head):
            writer.close()

    return respond


def reset(writer: asyncio.StreamWriter) -> None:
    """End a handler's connection with RST."""
    _reset_transport(writer.transport)


def _reset_transport(transport: asyncio.BaseTransport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        _linger_zero(sock)
    if isinstance(transport, asyncio.WriteTransport):
        transport.abort()
    else:
        transport.close()


# ---------------------------------------------------------------------------------------- Relay

Mode = Literal["pass", "blackhole", "half-blackhole"]
Direction = Literal["up", "down"]
Cut = Literal["reset", "close", "silence"]

DELAY_BOUND = 16 * 1024 * 1024  # bytes that may be under way in a direction with a delay: 1 Gbit/s x 128 ms
PACE_STEP = 0.05  # seconds after which a paced direction looks at its rate again


class TokenBucket:
    """Paces bytes: at any time no more than `burst + rate x elapsed` bytes have been granted."""

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self.burst = max(1.0, rate / 100)  # what the rate lets pass in 10 ms
        self._tokens = self.burst
        self._updated = now

    def take(self, want: int, now: float) -> int:
        """Bytes that may pass now, at most `want`; 0 means to ask again after `wait(want)` seconds."""
        self._tokens = min(self.burst, self._tokens + (now - self._updated) * self.rate)
        self._updated = now
        if self._tokens < self._least(want):
            return 0
        granted = min(want, int(self._tokens))
        self._tokens -= granted
        return granted

    def give_back(self, n: int) -> None:
        """Return what was taken and not used."""
        self._tokens += n

    def wait(self, want: int) -> float:
        """Seconds from the last `take` until it is worth asking again, never more than PACE_STEP."""
        missing = self._least(want) - self._tokens
        return min(PACE_STEP, missing / self.rate) if self.rate > 0 else PACE_STEP

    def _least(self, want: int) -> float:
        return min(want, max(1.0, self.burst / 2))


class Way:
    """One direction of a relay, over all its connections; `delay` and `rate` may be set at any time."""

    def __init__(self, delay: float = 0.0, rate: float | None = None) -> None:
        self.delay = delay  # seconds
        self.blocked = False
        self.bytes = 0  # forwarded
        self._bucket: TokenBucket | None = None
        self.rate = rate

    @property
    def rate(self) -> float | None:
        """Bytes per second, None without a limit; 0 lets nothing pass."""
        return self._bucket.rate if self._bucket is not None else None

    @rate.setter
    def rate(self, rate: float | None) -> None:
        self._bucket = TokenBucket(rate, time.monotonic()) if rate is not None else None

    @property
    def bound(self) -> int:
        """Bytes a connection may hold in this direction; the kernel's buffers come on top."""
        return DELAY_BOUND if self.delay else 4 * CHUNK

    def take(self, want: int) -> int:
        return want if self._bucket is None else self._bucket.take(want, time.monotonic())

    def give_back(self, n: int) -> None:
        if self._bucket is not None:
            self._bucket.give_back(n)

    def wait(self, want: int) -> float:
        return 0.0 if self._bucket is None else self._bucket.wait(want)


class _Pair:
    """One relayed connection: the socket to the client, the socket to the server."""

    def __init__(self, near: RawSocket) -> None:
        self.near = near
        self.far: RawSocket | None = None
        self.silent = False
        self.pumps: list[_Pump] = []
        self.task: asyncio.Task[None] | None = None

    @property
    def sockets(self) -> list[RawSocket]:
        return [self.near] if self.far is None else [self.near, self.far]

    def close(self, *, abort: bool = False) -> None:
        for sock in self.sockets:
            sock.abort() if abort else sock.close()


class _Pump:
    """One direction of one connection: reads up to the way's bound, holds for the delay, paces, writes."""

    def __init__(
        self, relay: Relay, pair: _Pair, source: RawSocket, sink: RawSocket, way: Way, back: Way
    ) -> None:
        self._relay, self._pair = relay, pair
        self._source, self._sink = source, sink
        self._way, self._back = way, back
        self._queue: collections.deque[tuple[float, bytes]] = collections.deque()
        self.held = 0
        self._signal = Signal()

    async def read(self) -> None:
        """Queue what comes, b"" for FIN at the end. A black hole leaves the bytes in the kernel."""
        data = b"x"
        while data:
            await self._signal.wait_for(lambda: self.held < self._way.bound)
            await self._source.readable()
            await self._relay._open(self._way, self._pair)
            try:
                data = self._source.sock.recv(CHUNK)
            except BlockingIOError:
                continue
            self._queue.append((time.monotonic() + self._way.delay, data))
            self.held += len(data)
            self._signal.notify()

    async def write(self) -> None:
        """Forward the queue, each piece when it is due."""
        while True:
            await self._signal.wait_for(lambda: self._queue)
            due, data = self._queue[0]
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            if not data:
                await self._relay._open(self._way, self._pair)
                self._sink.write_eof()
                return
            await self._forward(memoryview(data))
            self._queue.popleft()
            self.held -= len(data)
            self._signal.notify()

    async def _forward(self, view: memoryview) -> None:
        while view:
            await self._sink.writable()
            await self._relay._open(self._way, self._pair)
            granted = self._way.take(len(view))
            if not granted:
                await asyncio.sleep(self._way.wait(len(view)))
                continue
            sent = await self._send(view[:granted])
            self._way.give_back(granted - sent)
            self._way.bytes += sent
            self._relay._signal.notify()
            view = view[sent:]

    async def _send(self, view: memoryview) -> int:
        try:
            return self._sink.sock.send(view)
        except BlockingIOError:
            return 0
        except ConnectionError:
            await self._relay._open(self._back, self._pair)  # news of a reset travels the other way
            raise


class Relay:
    """The network between client and server: `up` is towards `target_port`, `down` is back.

    It keeps back-pressure: what the far side does not take is, beyond a bound, not read from the near
    side. FIN and RST are passed on. In a black hole nothing is read or forwarded, nor noticed, in the
    blocked direction; what is under way stays and goes on when the mode is "pass" again. A connection
    made in a black hole, whole or half, is accepted and reaches the server when the mode is "pass".
    """

    def __init__(
        self,
        target_port: int,
        *,
        delay_up: float = 0.0,
        delay_down: float = 0.0,
        rate_up: float | None = None,
        rate_down: float | None = None,
        buffer: int | None = None,
    ) -> None:
        self.target_port = target_port
        self.port = 0
        self.refuse = False  # accept and reset at once; the dialler sees it in connect or in its first read
        self.accepted = 0  # connections ever accepted, refused ones included
        self.refused = 0
        self.up = Way(delay_up, rate_up)
        self.down = Way(delay_down, rate_down)
        self._buffer = buffer
        self._mode: Mode = "pass"
        self._signal = Signal()
        self._pairs: set[_Pair] = set()
        self._ending: set[_Pair] = set()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        listener = socket.socket()
        _set_buffers(listener, self._buffer, self._buffer)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop listening and end every connection with RST; idempotent."""
        pairs = [*self._pairs, *self._ending]
        tasks = [task for task in (self._accepting, *(pair.task for pair in pairs)) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pair in pairs:
            pair.close(abort=True)
        if self._listener is not None:
            self._listener.close()

    # --- control

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self.set_mode(mode)

    def set_mode(self, mode: Mode, direction: Direction = "up") -> None:
        """Switch all connections, present and future; `direction` is what a half-blackhole swallows."""
        assert mode in ("pass", "blackhole", "half-blackhole"), mode
        self._mode = mode
        half = mode == "half-blackhole"
        self.up.blocked = mode == "blackhole" or (half and direction == "up")
        self.down.blocked = mode == "blackhole" or (half and direction == "down")
        self._signal.notify()

    async def cut(self, how: Cut) -> int:
        """End the present connections and return how many there were; later ones are not affected.

        "reset" sends RST to both sides, "close" sends FIN to both and reads on until they close too,
        "silence" keeps the sockets open and never reads or writes them again.
        """
        assert how in ("reset", "close", "silence"), how
        pairs = [pair for pair in self._pairs if not pair.silent]
        for pair in pairs:
            if how == "silence":
                pair.silent = True
            else:
                await self._end(pair, how)
        self._signal.notify()
        return len(pairs)

    # --- what was seen

    @property
    def connections(self) -> int:
        """Connections that are neither ended nor cut."""
        return sum(not pair.silent for pair in self._pairs)

    @property
    def silenced(self) -> int:
        """Connections cut by "silence" whose sockets are still held."""
        return sum(pair.silent for pair in self._pairs)

    @property
    def bytes_up(self) -> int:
        """Bytes forwarded to the server."""
        return self.up.bytes

    @property
    def bytes_down(self) -> int:
        """Bytes forwarded to the client."""
        return self.down.bytes

    @property
    def buffered(self) -> int:
        """Bytes read from one side and not yet forwarded, over all connections and both ways."""
        return sum(pump.held for pair in self._pairs for pump in pair.pumps)

    async def wait_for(self, predicate: Callable[[], T], timeout: float = TIMEOUT, what: str = "") -> T:
        """Return the predicate's value once it is true; asked again when anything here changes."""
        return await self._signal.wait_for(predicate, timeout, lambda: f"{what or 'condition'}; {self!r}")

    async def wait_accepted(self, n: int, timeout: float = TIMEOUT) -> None:
        """Return once n connections were accepted since the start, refused ones included."""
        await self.wait_for(lambda: self.accepted >= n, timeout, f"{n} connections accepted")

    def __repr__(self) -> str:
        return (
            f"<Relay {self._mode} accepted={self.accepted} refused={self.refused} connections="
            f"{self.connections} silenced={self.silenced} up={self.bytes_up} down={self.bytes_down}>"
        )

    # --- connections

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            self.accepted += 1
            near = RawSocket(sock)
            if self.refuse:
                self.refused += 1
                near.abort()
            else:
                pair = _Pair(near)
                self._pairs.add(pair)
                pair.task = asyncio.create_task(self._run(pair))
            self._signal.notify()

    async def _run(self, pair: _Pair) -> None:
        """Relay one connection to its end. A cancelled one keeps its sockets: who cancels closes them."""
        try:
            await self._open(self.up, pair)
            await self._open(self.down, pair)
            pair.far = await _dial(self.target_port, "127.0.0.1", self._buffer, self._buffer)
            await self._pump(pair, pair.far)
            pair.close()
        except* OSError:
            pair.close(abort=True)
        self._pairs.discard(pair)
        self._signal.notify()

    async def _pump(self, pair: _Pair, far: RawSocket) -> None:
        up = _Pump(self, pair, pair.near, far, self.up, self.down)
        down = _Pump(self, pair, far, pair.near, self.down, self.up)
        pair.pumps = [up, down]
        async with asyncio.TaskGroup() as tasks:
            for work in (up.read(), up.write(), down.read(), down.write()):
                tasks.create_task(work)

    async def _open(self, way: Way, pair: _Pair) -> None:
        """Return when this way lets bytes of this connection pass."""
        if way.blocked or pair.silent:
            await self._signal.wait_for(lambda: not way.blocked and not pair.silent)

    async def _end(self, pair: _Pair, how: Cut) -> None:
        assert pair.task is not None
        pair.task.cancel()
        await asyncio.gather(pair.task, return_exceptions=True)
        self._pairs.discard(pair)
        if how == "reset":
            pair.close(abort=True)
            return
        for sock in pair.sockets:
            sock.write_eof()
        self._ending.add(pair)
        pair.task = asyncio.create_task(self._drain(pair))

    async def _drain(self, pair: _Pair) -> None:
        """Discard what still comes, so that closing sends FIN and not RST."""
        await asyncio.gather(*(_discard(sock) for sock in pair.sockets))
        pair.close()
        self._ending.discard(pair)
        self._signal.notify()


async def _discard(sock: RawSocket) -> None:
    with contextlib.suppress(ConnectionError):
        while await sock.recv():
            pass


# ---------------------------------------------------------------------------------------- Processes

DEBUG = {"PYTHONASYNCIODEBUG": "1", "PYTHONWARNINGS": "default::ResourceWarning"}
NO_DEBUG = dict.fromkeys(DEBUG, "")  # `env` of a test that measures: debug mode takes time and memory

_COMPLAINT = re.compile(
    r"Traceback \(most recent call last\)|was never (awaited|retrieved)|Task was destroyed|ResourceWarning|Unclosed"
)
_SLOW = re.compile(r"Executing <.+ took \d+\.\d{3} seconds")  # debug mode's; it tells of a busy machine


def with_limits(root: Path = ROOT, **limits: float) -> list[str]:
    """The command of the program (of the checkout `root`) with other numbers in its section `Limits and defaults`."""
    for name in limits:
        assert hasattr(pytunnel, name), name
    settings = "".join(f"pytunnel.{name} = {value!r}; " for name, value in limits.items())
    path = f"import sys; sys.path.insert(0, {str(root)!r}); import pytunnel; "
    return [sys.executable, "-c", f"{path}{settings}sys.exit(pytunnel.main())"]


class Process:
    """A real process of the program, with its output drained at all times.

    `async with await Process.start("serve", "--json") as server:` kills what is left of it (its own process
    group, nothing else) and reaps it. Every failed wait tells the output so far.

    It runs in asyncio's debug mode. A block that ends well fails all the same when stderr has a traceback, or tells
    of something never awaited, retrieved or closed; a test that means to see this says so in `expected_complaint`.
    """

    def __init__(self, args: Sequence[str], process: asyncio.subprocess.Process) -> None:
        self.args = list(args)
        self.pid = process.pid
        self.stdout: list[str] = []  # lines without their ends
        self.stderr: list[str] = []
        self.events: list[dict[str, Any]] = []  # JSON events that nobody has taken yet
        self.expected_complaint = ""  # a pattern of what a test provokes
        self._process = process
        self._signal = Signal()
        self._seen = {"stdout": 0, "stderr": 0}
        self._owned = contextlib.ExitStack()
        assert process.stdout is not None
        assert process.stderr is not None
        self._drains = [
            asyncio.create_task(self._drain(process.stdout, self.stdout)),
            asyncio.create_task(self._drain(process.stderr, self.stderr)),
        ]

    @classmethod
    async def start(
        cls,
        *args: str,
        env: Mapping[str, str] | None = None,
        home: Path | None = None,
        command: Sequence[str] | None = None,
    ) -> Process:
        """Run `command` (the program under this interpreter) with `args`.

        The environment is PATH, HOME, PYTUNNEL_STATE_DIR, DEBUG and `env`; nothing is inherited beside PATH. HOME
        is `home`, which a later process may share, or a fresh directory that lives as long as the process;
        it is the working directory too.
        """
        owned = contextlib.ExitStack()
        if home is None:
            home = Path(owned.enter_context(tempfile.TemporaryDirectory(prefix="pytunnel-test-")))
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(home),
            "PYTUNNEL_STATE_DIR": str(home / "state"),
            **DEBUG,
            **(env or {}),
        }
        argv = [*(command or with_limits()), *args]  # imported: a program's own file is compiled at each start
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                cwd=home,
                limit=LINE_LIMIT,
                start_new_session=True,
            )
        except BaseException:
            owned.close()
            raise
        started = cls(argv, process)
        started._owned = owned
        return started

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(self.output())
        await self.aclose()
        if error is None:
            self.check_complaints()

    async def aclose(self) -> None:
        """Kill the process group if the process still runs, reap, and stop the drains; idempotent."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        try:
            await self.wait()
        finally:
            for task in self._drains:
                task.cancel()
            await asyncio.gather(*self._drains, return_exceptions=True)
            self._process._transport.close()  # type: ignore[attr-defined]
            self._owned.close()

    # --- output

    async def event(self, name: str, /, timeout: float = TIMEOUT, **fields: object) -> dict[str, Any]:
        """Take the oldest event of that name (and with these fields) out of `events`, waiting for it."""
        what = f"event {name!r} {fields or ''}"
        return await self._expect(lambda: self._take_event(name, fields), what, timeout)

    async def stdout_line(self, substring: str, timeout: float = TIMEOUT) -> str:
        """The next line of stdout that has the substring; later calls look after it only."""
        return await self._line("stdout", self.stdout, substring, timeout)

    async def stderr_line(self, substring: str, timeout: float = TIMEOUT) -> str:
        """The next line of stderr that has the substring; later calls look after it only."""
        return await self._line("stderr", self.stderr, substring, timeout)

    def check_complaints(self) -> None:
        """Fail when stderr tells of what is a bug wherever it comes from."""
        expected = re.compile(self.expected_complaint or r"\b\B")
        found = [line for line in self.stderr if _COMPLAINT.search(line) and not expected.search(line)]
        assert not found, f"on stderr: {found[0]}\n{self.output()}"

    def output(self) -> str:
        """Command, state and everything that the process has written."""
        status = self._process.returncode
        state = "running" if status is None else f"exit status {status}"
        parts = [f"--- {' '.join(self.args)} (pid {self.pid}, {state})"]
        for name, lines in (("stdout", self.stdout), ("stderr", self.stderr)):
            parts += [f"--- {name}, {len(lines)} lines", *lines[-200:]]
        return "\n".join(parts)

    # --- life and resources

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def send_signal(self, signal_number: int) -> None:
        """Signal the process itself, not its children."""
        self._process.send_signal(signal_number)

    async def wait(self, timeout: float = TIMEOUT) -> int:
        """The exit status (negative: killed by that signal), with all output drained by then."""
        try:
            async with asyncio.timeout(timeout):
                status = await self._process.wait()
                await asyncio.wait(self._drains)
                return status
        except TimeoutError:
            raise WaitFailed(f"no exit within {timeout} s\n{self.output()}") from None

    def rss(self) -> int:
        """Resident bytes now."""
        return self._memory("VmRSS")

    def peak_rss(self) -> int:
        """The most resident bytes so far."""
        return self._memory("VmHWM")

    def fd_count(self) -> int:
        """Open file descriptors now."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def cpu_seconds(self) -> float:
        """User and system time used so far (to show that nothing spins)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))

    # --- inside

    def _memory(self, name: str) -> int:
        match = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert match is not None, f"no {name}: the process has ended\n{self.output()}"
        return int(match[1]) * 1024

    async def _drain(self, stream: asyncio.StreamReader, lines: list[str]) -> None:
        while raw := await stream.readline():
            line = raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
            if lines is self.stderr and _SLOW.search(line):
                continue
            lines.append(line)
            if lines is self.stdout and line.startswith("{"):
                self._note_event(line)
            self._signal.notify()
        asyncio.get_running_loop().call_soon(self._signal.notify)  # once this task counts as done

    def _note_event(self, line: str) -> None:
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(line)
            if "event" in value:
                self.events.append(value)

    def _take_event(self, name: str, fields: Mapping[str, object]) -> dict[str, Any] | None:
        for index, event in enumerate(self.events):
            if event["event"] == name and all(event.get(key) == value for key, value in fields.items()):
                return self.events.pop(index)
        return None

    async def _line(self, name: str, lines: list[str], substring: str, timeout: float) -> str:
        def take() -> str | None:
            for index in range(self._seen[name], len(lines)):
                if substring in lines[index]:
                    self._seen[name] = index + 1
                    return lines[index]
            return None

        return await self._expect(take, f"{substring!r} on {name}", timeout)

    async def _expect(self, take: Callable[[], T | None], what: str, timeout: float) -> T:
        """Wait for take() to return something; fail early when the output has ended."""

        def taken() -> tuple[T] | None:
            found = take()
            if found is not None:
                return (found,)
            if all(task.done() for task in self._drains):
                raise WaitFailed(f"output ended without {what}\n{self.output()}")
            return None

        result = await self._signal.wait_for(taken, timeout, lambda: f"{what}\n{self.output()}")
        assert result is not None
        return result[0]


# ---------------------------------------------------------------------------------------- Rest

REST = 2.0  # seconds in which everything is gone that a test has used, in its own process and in those it has started

Address = tuple[str, int]


@dataclass(frozen=True)
class Connection:
    """A TCP connection of a process. `held` tells whether some process still has its other end open."""

    local: Address
    remote: Address
    held: bool

    def __str__(self) -> str:
        return f"{self.local[0]}:{self.local[1]} to {self.remote[0]}:{self.remote[1]}"


def _address(text: str) -> Address:
    """An address in /proc/net/tcp and tcp6: the kernel's words in hexadecimal digits."""
    host, _, port = text.partition(":")
    words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
    packed = b"".join(words).removeprefix(bytes(10) + b"\xff\xff")
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed), int(port, 16)


def _links(pid: int) -> set[tuple[str, str]]:
    """A process's descriptors, and what each leads to."""
    found = set()
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add((number, os.readlink(f"/proc/{pid}/fd/{number}")))
    return found


def open_descriptors(pid: int) -> tuple[collections.Counter[str], list[Connection]]:
    """What a process has open: TCP connections one by one, all else by kind (files by name)."""
    opened = _links(pid)
    tables = [Path(f"/proc/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
    rows = [line.split() for line in itertools.chain.from_iterable(tables) if " 06 " not in line]  # no TIME-WAIT
    inodes = {(row[1][-13:], row[2][-13:]): row[9] for row in rows}  # the tail: an IPv4 address may be mapped, or not
    ends = {row[9]: row for row in rows if not row[2].endswith(":0000")}
    kinds: collections.Counter[str] = collections.Counter()
    connections = []
    for _, name in sorted(opened & _links(pid)):  # what was closed meanwhile may be in the tables no more
        kind, _, inode = name.partition(":[")
        if kind == "socket" and (row := ends.get(inode.rstrip("]"))):
            held = inodes.get((row[2][-13:], row[1][-13:]), "0") != "0"
            connections.append(Connection(_address(row[1]), _address(row[2]), held))
        else:
            kinds[kind if kind in ("socket", "pipe") else name] += 1
    return kinds, connections


# ---------------------------------------------------------------------------------------- Tunnel


class Tunnel:
    """A server, a client and, if asked for, a relay between them, all real and ready for visitors.

    Server and clients keep their state directories while the tunnel lives, so that a restart is one.
    When the block ends with an exception, the output of every process is added to it. When it ends well, each
    process that still runs must be back at rest: what it has open is what it had when the tunnel was ready, and
    beside that only what somebody else keeps open: visitors who are still there, and connections between two
    requests to a local service. `settles=False` is for a test whose point is that something hangs on.
    """

    def __init__(
        self,
        origin_port: int,
        *,
        name: str | None = "web",
        relay: bool | Relay = False,
        serve_args: Sequence[str] = (),
        connect_args: Sequence[str] = (),
        token: str = "test-token-0123456789abcdef0123456789abcdef",
        env: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
        settles: bool = True,
        secure: bool = False,
        tcp: bool = False,
    ) -> None:
        self.scheme = "https" if secure else "http"  # that clients dial
        self.origin_port = origin_port
        self.name = name
        self.token = token
        self.port = 0  # the server's
        self.host = b""  # what visitors put in Host, without a port
        self.ready: dict[str, Any] = {}  # the first client's event
        self.clients: list[Process] = []
        self.serve_args = list(serve_args)
        self._scheme = "tcp:" if tcp else ""
        if tcp:  # the server takes those that are free; more tests run at the same time, and dial from above 32,768
            first = random.randrange(12_000, 32_000, TCP_PORTS)
            self.serve_args += ["--tcp-ports", f"127.0.0.1:{first}-{first + TCP_PORTS - 1}"]
        self.connect_args = list(connect_args)
        self._env = env
        self._command = command
        self._wants_relay = relay
        self._relay: Relay | None = None
        self._servers: list[Process] = []
        self._stack = contextlib.AsyncExitStack()
        self._home = Path()
        self._settles = settles
        self._at_rest: dict[str, tuple[collections.Counter[str], list[Connection]]] = {}
        self._gauges: dict[str, float] = {}

    async def __aenter__(self) -> Self:
        self._home = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pytunnel-test-")))
        self.port = self._stack.enter_context(keep_port()).getsockname()[1]  # also while no server is there
        try:
            await self.start_server()
            if self._wants_relay:
                relay = self._wants_relay if isinstance(self._wants_relay, Relay) else Relay(0)
                relay.target_port = self.port
                self._relay = await self._stack.enter_async_context(relay)
            await self._start_first_client()
            self._at_rest = {"server": open_descriptors(self.server.pid), "client": open_descriptors(self.client.pid)}
            self._gauges = await self._read_gauges()
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        processes = [*self._servers, *self.clients]
        try:
            if error is None and self._settles:
                await self.settle()
        except BaseException as failure:
            error = failure
            raise
        finally:
            if error is not None:
                for process in processes:
                    error.add_note(process.output())
            await self._stack.aclose()
        if error is None:
            for process in processes:
                process.check_complaints()

    # --- the parts

    @property
    def server(self) -> Process:
        """The server process that was started last."""
        return self._servers[-1]

    @property
    def client(self) -> Process:
        """The client process that was started last."""
        return self.clients[-1]

    @property
    def relay(self) -> Relay:
        """The relay that the clients dial; only with `relay=True` or a Relay of the test's own making."""
        assert self._relay is not None, "this tunnel has no relay"
        return self._relay

    @property
    def server_url(self) -> str:
        """What clients dial: the relay when there is one, else the server."""
        host = "localhost" if self.scheme == "https" else "127.0.0.1"  # what the certificate is for
        return f"{self.scheme}://{host}:{self._relay.port if self._relay else self.port}"

    async def start_server(self, *args: str) -> Process:
        """Start the server, on the same port and with the same state as before if there was one."""
        server = await self._start(
            "server", "serve", "--listen", f"127.0.0.1:{self.port}", "--token", self.token, "--json",
            *self.serve_args, *args,
        )  # fmt: skip
        self._servers.append(server)
        self.port = int((await server.event("listening"))["port"])
        return server

    async def stop_server(self, signal_number: int = signal.SIGTERM, timeout: float = TIMEOUT) -> int:
        """Signal the server and return its exit status."""
        self.server.send_signal(signal_number)
        return await self.server.wait(timeout)

    async def restart_server(self, signal_number: int = signal.SIGTERM, timeout: float = TIMEOUT) -> Process:
        """Stop the server with that signal and start another on the same port."""
        await self.stop_server(signal_number, timeout)
        return await self.start_server()

    async def start_client(
        self,
        *args: str,
        name: str | None = None,
        origin_port: int | None = None,
        token: str | None = None,
        home: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Start one more client, and do not wait for its events. Clients of the same `home` share state."""
        name = name if name is not None else self.name
        client = await self._start(
            home or "client", "connect", f"{self._scheme}{origin_port or self.origin_port}",
            "--server", self.server_url, "--token", token or self.token, *(("--name", name) if name else ()), "--json",
            *self.connect_args, *args, env=env,
        )  # fmt: skip
        self.clients.append(client)
        return client

    # --- rest

    async def settle(self) -> None:
        """Return when server and clients are back at rest; WaitFailed with what is still there after 2 seconds."""
        started = looked = time.monotonic()
        while excess := self._excess() or await self._gauges_up():
            # A local service that is not RawOrigin cannot tell which of its connections are between two requests.
            patience = REST + (pytunnel.LOCAL_IDLE if all(" to a local service" in text for text in excess) else 0.0)
            if looked - started > patience:
                raise WaitFailed(f"not at rest after {patience:g} s: {', '.join(excess)}")
            await asyncio.sleep(0.02)
            looked = time.monotonic()

    def _excess(self) -> list[str]:
        """What the processes that still run have open and should not."""
        found = []
        for role, processes in (("server", self._servers), ("client", self.clients)):
            for process in processes:
                if process.returncode is not None:
                    continue
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended just now
                    kinds, connections = open_descriptors(process.pid)
                    more = [*(kinds - self._at_rest[role][0]).elements()]
                    more += [f"{c}, whose other end is gone" for c in connections if not c.held]
                    if role == "client":
                        more += self._excess_dialled([c for c in connections if c.held])
                    found += [f"{role} {process.pid}: {text}" for text in more]
        return found

    def _excess_dialled(self, connections: list[Connection]) -> list[str]:
        """Of a client's connections: all links but one, and those to a local service that are in use."""
        links = [c for c in connections if c.remote[1] == urlsplit(self.server_url).port]
        found = [f"{link}, a second link" for link in links[1:]]
        for c in connections:
            origin = RawOrigin.running.get(c.remote[1])
            if origin is not None:
                if not any(received.peer == c.local and received.kept for received in origin.connections):
                    found.append(f"{c} in use")
            elif c.remote[1] == self.origin_port:
                found.append(f"{c} to a local service")
        return found

    async def _gauges_up(self) -> list[str]:
        """The server's gauges that differ from what they were; visitors who are still there make them differ."""
        if self.server.returncode is not None:
            return []
        try:
            if len(open_descriptors(self.server.pid)[1]) != len(self._at_rest["server"][1]):
                return []
            gauges = await self._read_gauges()
        except (FileNotFoundError, ConnectionError, Truncated):
            return []  # it is ending
        more = {name: now for name, now in gauges.items() if now > self._gauges[name]}
        return [f"{name} {now:g}, not {self._gauges[name]:g}" for name, now in more.items()]

    async def _read_gauges(self) -> dict[str, float]:
        """What the server says of itself, where it does."""
        names = ("pytunnel_streams", "pytunnel_visitors", "pytunnel_tasks")
        async with self.visitor() as visitor:
            await visitor.send(request("GET", b"/metrics", b"127.0.0.1:%d" % self.port, [(b"Connection", b"close")]))
            answer = await visitor.read_response()
        if answer.status != 200:
            return {}
        values = dict(line.rsplit(" ", 1) for line in answer.body.decode().splitlines() if " " in line)
        return {name: float(values[name]) for name in names if name in values}

    # --- visitors

    def visitor(
        self,
        *,
        timeout: float = TIMEOUT,
        rcvbuf: int | None = None,
        sndbuf: int | None = None,
        source: str | None = None,
    ) -> RawVisitor:
        """A visitor who goes straight to the server's port: `async with t.visitor() as v:`."""
        return RawVisitor(self.port, timeout=timeout, rcvbuf=rcvbuf, sndbuf=sndbuf, source=source)

    def tcp_visitor(self, *, timeout: float = TIMEOUT, rcvbuf: int | None = None) -> RawVisitor:
        """A visitor of the TCP tunnel's port."""
        return RawVisitor(urlsplit(self.ready["url"]).port or 0, timeout=timeout, rcvbuf=rcvbuf)

    def request(
        self,
        method: str = "GET",
        target: bytes = b"/",
        headers: Iterable[Header] = (),
        body: bytes | None = None,
    ) -> bytes:
        """A request's bytes with the tunnel's Host; Content-Length only when there is a body."""
        return request(method, target, self.host, headers, body)

    async def get(self, path: bytes = b"/", headers: Iterable[Header] = ()) -> RawResponse:
        """One GET on a connection of its own."""
        return await self.fetch("GET", path, headers)

    async def fetch(
        self,
        method: str = "GET",
        target: bytes = b"/",
        headers: Iterable[Header] = (),
        body: bytes | None = None,
        *,
        timeout: float = TIMEOUT,
    ) -> RawResponse:
        """One request on a connection of its own."""
        async with self.visitor(timeout=timeout) as visitor:
            await visitor.send(self.request(method, target, headers, body))
            return await visitor.read_response(method)

    # --- inside

    async def _start_first_client(self) -> None:
        client = await self.start_client()
        self.ready = await client.event("ready")
        hostname = urlsplit(self.ready["url"]).hostname
        assert hostname is not None, self.ready
        self.host = hostname.encode()

    async def _start(self, home: str, *args: str, env: Mapping[str, str] | None = None) -> Process:
        directory = self._home / home
        directory.mkdir(exist_ok=True)
        environment = {**(self._env or {}), **(env or {})}
        process = await Process.start(*args, env=environment, home=directory, command=self._command)
        self._stack.push_async_callback(process.aclose)
        return process
