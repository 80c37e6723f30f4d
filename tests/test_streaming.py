"""Bodies that take their time: nothing is held back, and who does not read holds up nobody else.

"At once" is shown by lock-step: the side that writes does not write on before the other side has what came before, so
a tunnel that waits for more waits for ever. "Blocked" is shown by a writer that stays where it is through whole other
exchanges, and by how much it had written.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
from support import (
    NO_DEBUG,
    Header,
    PatternChecker,
    Process,
    RawOrigin,
    RawRequest,
    RawResponse,
    RawVisitor,
    Tunnel,
    chunk,
    pattern,
    request,
    response,
    with_limits,
)
from test_fidelity import CHUNKED, CLOSE, MiB, answering, assert_quiet, head, served
from test_load import stalled_growth

KiB = 1024
STEP = 5.0  # seconds in which one step of a lock-step must be done; it takes about a millisecond

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter


# ---------------------------------------------------------------------------------------- At once


class LockStep:
    """Writes a response piece by piece, each when the visitor has the one before."""

    def __init__(self, start: bytes, pieces: list[bytes], *, end: bytes = b"") -> None:
        self.start, self.pieces, self.end = start, pieces, end
        self.received = asyncio.Semaphore(0)

    async def __call__(self, request: RawRequest, reader: Reader, writer: Writer) -> None:
        for piece in (self.start, *self.pieces):
            writer.write(piece)
            async with asyncio.timeout(STEP):
                await self.received.acquire()
        writer.write(self.end)
        if not self.end:
            writer.close()

    async def watch(self, visitor: RawVisitor, contents: list[bytes]) -> RawResponse:
        """Read the response: its head, then each of these, and only then release the next piece."""
        got = await visitor.read_head()
        self.received.release()
        body = visitor.iter_body(got)
        for content in contents:
            arrived = b""
            while len(arrived) < len(content):
                arrived += await anext(body)
            assert arrived == content
            self.received.release()
        assert [piece async for piece in body] == []
        return got


EVENTS = [b": hello\n\n", b"data: 1\n\n", b"id: 2\nevent: x\n", b"data: y\n\n", b"data: " + b"z" * 5000 + b"\n\n"]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_each_event_arrives_before_the_next_one_is_written(method: str, subtests: pytest.Subtests) -> None:
    """Whatever its type says: the tunnel does not have to know that it is an event stream."""
    framings: dict[str, tuple[list[Header], Callable[[bytes], bytes], bytes]] = {
        "chunked": ([CHUNKED], chunk, chunk(b"")),
        "until close": ([CLOSE], bytes, b""),
        "length": ([(b"Content-Length", b"%d" % sum(map(len, EVENTS)))], bytes, b""),
    }
    types = (b"text/event-stream", b"text/event-stream; charset=utf-8", None, b"text/html", b"application/json")
    plays = {
        b"/%s/%s" % (name.encode(), kind or b"none"): LockStep(
            head(b"HTTP/1.1 200 OK", *([(b"Content-Type", kind)] if kind else []), *fields),
            [wrap(event) for event in EVENTS],
            end=end,
        )
        for name, (fields, wrap, end) in framings.items()
        for kind in types
    }
    plays = {target.replace(b" ", b"_"): play for target, play in plays.items()}
    async with served(answering(dict(plays)), read_body=True) as (_, tunnel):
        for target, play in plays.items():
            with subtests.test(target.decode()):
                async with tunnel.visitor(timeout=STEP) as visitor:
                    accept = (b"Accept-Encoding", b"gzip, br, zstd")
                    await visitor.send(tunnel.request(method, target, [accept], b"{}" if method == "POST" else None))
                    got = await play.watch(visitor, EVENTS)
                    assert got.status == 200
                    assert not got.values(b"content-encoding")


async def test_compressed_events_arrive_one_by_one() -> None:
    """What the service compressed and flushed is not unpacked and packed again on the way."""
    packed = [gzip.compress(event) for event in EVENTS]  # members may be joined (RFC 1952, 2.2)
    fields = [(b"Content-Type", b"text/event-stream"), (b"Content-Encoding", b"gzip"), CHUNKED]
    play = LockStep(head(b"HTTP/1.1 200 OK", *fields), [chunk(piece) for piece in packed], end=chunk(b""))
    async with served(play) as (_, tunnel), tunnel.visitor(timeout=STEP) as visitor:
        await visitor.send(tunnel.request())
        await play.watch(visitor, packed)


async def test_single_bytes_are_not_held_back() -> None:
    text = [bytes([byte]) for byte in b"<html><body>" + bytes(range(256))]
    fields = [(b"Content-Type", b"text/html"), CHUNKED]
    play = LockStep(head(b"HTTP/1.1 200 OK", *fields), [chunk(byte) for byte in text], end=chunk(b""))
    async with served(play) as (_, tunnel), tunnel.visitor(timeout=STEP) as visitor:
        await visitor.send(tunnel.request())
        await play.watch(visitor, text)


async def test_a_chunk_is_passed_on_before_it_is_whole() -> None:
    raw = [b"5\r", b"\nh", b"el", b"lo\r", b"\n6;x=1", b"\r\n world", b"\r\n"]
    play = LockStep(head(b"HTTP/1.1 200 OK", CHUNKED), [], end=b"")

    async def dribble(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(play.start)
        for piece, content in zip(raw, [b"", b"h", b"el", b"lo", b"", b" world", b""], strict=True):
            writer.write(piece)
            if content:
                async with asyncio.timeout(STEP):
                    await play.received.acquire()
        writer.write(chunk(b""))

    async with served(dribble) as (_, tunnel), tunnel.visitor(timeout=STEP) as visitor:
        await visitor.send(tunnel.request())
        body = visitor.iter_body(await visitor.read_head())
        for content in (b"h", b"el", b"lo", b" world"):
            assert await anext(body) == content
            play.received.release()
        assert [piece async for piece in body] == []


async def test_an_upload_is_not_held_back(subtests: pytest.Subtests) -> None:
    """The service has each piece before the visitor sends the next one."""
    arrived: asyncio.Queue[bytes] = asyncio.Queue()
    origin: RawOrigin

    async def take(request: RawRequest, reader: Reader, writer: Writer) -> None:
        arrived.put_nowait(b"")
        async for piece in origin.iter_body(request, reader):
            arrived.put_nowait(piece)
        writer.write(response(b"done"))

    async with served(take) as (origin, tunnel):
        for name, fields, wrap, end in (
            ("chunked", [CHUNKED], chunk, chunk(b"")),
            ("length", [(b"Content-Length", b"100")], bytes, b""),
        ):
            with subtests.test(name):
                async with tunnel.visitor(timeout=STEP) as visitor, asyncio.timeout(10 * STEP):
                    await visitor.send(tunnel.request("POST", b"/", fields))
                    assert await arrived.get() == b"", "the head comes before any content"
                    for number in range(100):
                        await visitor.send(wrap(bytes([number])))
                        assert await arrived.get() == bytes([number])
                    await visitor.send(end)
                    assert (await visitor.read_response()).body == b"done"


async def test_both_directions_flow_at_once() -> None:
    """An echo of an upload that goes on, in lock-step, and the upload's end ends the response."""
    origin: RawOrigin

    async def echo(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(head(b"HTTP/1.1 200 OK", CHUNKED))
        async for piece in origin.iter_body(request, reader):
            writer.write(chunk(piece))
            await writer.drain()
        writer.write(chunk(b""))

    async with served(echo) as (origin, tunnel), tunnel.visitor(timeout=STEP) as visitor:
        await visitor.send(tunnel.request("POST", b"/", [CHUNKED]))
        body = visitor.iter_body(await visitor.read_head())
        for number in range(50):
            sent = pattern(number * 1000, 1 + number * 700)
            await visitor.send(chunk(sent))
            got = b""
            while len(got) < len(sent):
                got += await anext(body)
            assert got == sent
        await visitor.send(chunk(b""))
        assert [piece async for piece in body] == []


async def test_both_directions_at_full_speed() -> None:
    """Neither side reads before it has written a window's worth; nobody waits for the other for ever."""
    size = 24 * MiB
    origin: RawOrigin

    async def echo(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(head(b"HTTP/1.1 200 OK", CHUNKED))
        async for piece in origin.iter_body(request, reader):
            writer.write(chunk(piece))
            await writer.drain()
        writer.write(chunk(b""))

    async with served(echo, record_limit=0) as (origin, tunnel), tunnel.visitor() as visitor:

        async def upload() -> None:
            await visitor.send(tunnel.request("POST", b"/", [(b"Content-Length", b"%d" % size)]))
            for offset in range(0, size, MiB):
                await visitor.send(pattern(offset, MiB))

        checker = PatternChecker()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(upload())
            tasks.create_task(visitor.read_response("POST", sink=checker.feed))
        assert checker.offset == size


async def test_a_response_may_come_much_later_than_its_request() -> None:
    """A long poll: other requests are answered meanwhile, on other connections and on the same tunnel."""
    answer = asyncio.Event()

    async def poll(request: RawRequest, reader: Reader, writer: Writer) -> None:
        await answer.wait()
        writer.write(response(b"news"))

    async with served(answering({b"/poll": poll})) as (origin, tunnel), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request(target=b"/poll"))
        await origin.wait_requests(1)
        for _ in range(20):
            assert (await tunnel.get()).body == b"real"
        answer.set()
        assert (await visitor.read_response()).body == b"news"


# ---------------------------------------------------------------------------------------- Blocked

SIZE = 96 * MiB  # of what is stalled
HELD = 48 * MiB  # what the window and the kernel's buffers on the way may take (tcp_rmem allows 32); seen 6 to 14


@dataclass
class Stalled:
    """How far a writer has come, and whether it waits."""

    done: int = 0
    waits: bool = False

    async def write(self, pieces: AsyncIterator[Awaitable[None]], size: int) -> None:
        """Do what each of the pieces is, counting."""
        async for piece in pieces:
            self.waits = True
            await piece
            self.waits = False
            self.done += size


async def assert_blocked(others: Callable[[], Awaitable[None]], *writers: Stalled) -> None:
    """The writers come to a halt that outlasts other exchanges, each after a bounded number of bytes.

    `others` is a round of exchanges through the same tunnel. The halt is where three rounds change nothing.
    """
    unchanged, before = 0, [0]
    for _ in range(60):
        await others()
        done = [stalled.done for stalled in writers]
        unchanged = unchanged + 1 if all(stalled.waits for stalled in writers) and before == done else 0
        if unchanged == 3:
            break
        before = done
    assert unchanged == 3, f"not blocked after {done} bytes"
    assert all(0 < each < HELD for each in done)


async def sending(writer: Writer, piece: int) -> AsyncIterator[Awaitable[None]]:
    for offset in range(0, SIZE, piece):
        writer.write(pattern(offset, piece))
        yield writer.drain()


async def test_a_stalled_download_holds_up_nobody_else() -> None:
    stalled = Stalled()

    async def download(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(head(b"HTTP/1.1 200 OK", (b"Content-Length", b"%d" % SIZE)))
        await stalled.write(sending(writer, 64 * KiB), 64 * KiB)

    answers = {b"/stalled": download, b"/other": response(pattern(0, MiB))}
    async with served(answering(answers), sndbuf=64 * KiB) as (_, tunnel), tunnel.visitor(rcvbuf=16 * KiB) as visitor:
        await visitor.send(tunnel.request(target=b"/stalled"))
        got = await visitor.read_head()

        async def others() -> None:
            for other in await asyncio.gather(*(tunnel.get(b"/other") for _ in range(4))):
                assert other.body == pattern(0, MiB)

        await assert_blocked(others, stalled)
        checker = PatternChecker()
        async for piece in visitor.iter_body(got):
            checker.feed(piece)
        assert checker.offset == SIZE == stalled.done


async def test_many_stalled_downloads_hold_up_nobody_else() -> None:
    """And what is held for all of them is bounded, in the server and in the client."""

    async def download(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(head(b"HTTP/1.1 200 OK", (b"Content-Length", b"%d" % SIZE)))
        with contextlib.suppress(ConnectionError):
            async for piece in sending(writer, 64 * KiB):
                await piece

    async with contextlib.AsyncExitStack() as stack:
        stalled = served(answering({b"/stalled": download}), sndbuf=16 * KiB, env=NO_DEBUG)  # it takes memory itself
        origin, tunnel = await stack.enter_async_context(stalled)
        await tunnel.get()
        processes = {"server": tunnel.server, "client": tunnel.client}
        before = {name: process.rss() for name, process in processes.items()}
        for _ in range(60):
            visitor = await stack.enter_async_context(tunnel.visitor(rcvbuf=4 * KiB))
            await visitor.send(tunnel.request(target=b"/stalled"))
            assert (await visitor.read_head()).status == 200
        for _ in range(100):
            assert (await tunnel.get()).body == b"real"
        assert origin.open_connections >= 60
        for name, process in processes.items():
            grown = process.rss() - before[name]
            assert grown < stalled_growth(60), f"{grown / MiB:.0f} MiB in the {name} for 60 visitors who do not read"


async def test_a_stalled_upload_holds_up_nobody_else() -> None:
    stalled, release = Stalled(), asyncio.Event()
    checker = PatternChecker()
    origin: RawOrigin

    async def upload(request: RawRequest, reader: Reader, writer: Writer) -> None:
        await release.wait()
        async for piece in origin.iter_body(request, reader):
            checker.feed(piece)
        writer.write(response(b"done"))

    async def take(request: RawRequest, reader: Reader, writer: Writer) -> None:
        got = b"".join([piece async for piece in origin.iter_body(request, reader)])
        writer.write(response(b"%d" % len(got)))

    answers = {b"/stalled": upload, b"/other": take}
    small = {"limit": 64 * KiB, "rcvbuf": 128 * KiB}
    async with served(answering(answers), **small) as (origin, tunnel), tunnel.visitor(sndbuf=256 * KiB) as visitor:

        async def pieces() -> AsyncIterator[Awaitable[None]]:
            for offset in range(0, SIZE, 64 * KiB):
                yield visitor.send(pattern(offset, 64 * KiB))

        async def others() -> None:
            bodies = [tunnel.fetch("POST", b"/other", body=pattern(0, MiB)) for _ in range(4)]
            for other in await asyncio.gather(*bodies):
                assert other.body == b"%d" % MiB

        visitor.timeout = 60.0  # for room to send, which is the point
        await visitor.send(tunnel.request("POST", b"/stalled", [(b"Content-Length", b"%d" % SIZE)]))
        writing = asyncio.create_task(stalled.write(pieces(), 64 * KiB))
        await origin.wait_for(lambda: origin.requests)
        await assert_blocked(others, stalled)
        assert not writing.done()
        assert not checker.offset
        release.set()
        await writing
        assert (await visitor.read_response()).body == b"done"
        assert checker.offset == SIZE


SMALL = 32 * KiB  # bytes of a socket's buffers
SMALL_SOCKETS = f"""
import socket
class Small(socket.socket):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.family == socket.AF_INET:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, {SMALL})
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, {SMALL})
socket.socket = Small
"""


async def test_exchanges_whose_ends_both_write_before_they_read_come_to_their_end() -> None:
    """Sixteen at once: all is full in both directions before the visitors begin to read, and the service after them."""
    count, size, step = 16, 2 * MiB, 64 * KiB
    bodies = [memoryview(pattern(0, size + 2 * count))[number : number + size] for number in range(2 * count)]
    downloads, uploads = ([Stalled() for _ in range(count)] for _ in range(2))
    right: list[int] = []  # uploads
    origin: RawOrigin

    async def write_first(request: RawRequest, reader: Reader, writer: Writer) -> None:
        number = int(request.target[1:])

        async def pieces() -> AsyncIterator[Awaitable[None]]:
            for offset in range(0, size, step):
                writer.write(bodies[number][offset : offset + step])
                yield writer.drain()

        writer.write(head(b"HTTP/1.1 200 OK", (b"Content-Length", b"%d" % size)))
        await downloads[number].write(pieces(), step)
        if b"".join([piece async for piece in origin.iter_body(request, reader)]) == bodies[count + number]:
            right.append(number)

    async def upload(visitor: RawVisitor, number: int) -> None:
        async def pieces() -> AsyncIterator[Awaitable[None]]:
            for offset in range(0, size, step):
                yield visitor.send(bodies[count + number][offset : offset + step].tobytes())

        await uploads[number].write(pieces(), step)

    async def download(visitor: RawVisitor, number: int) -> None:
        got = await visitor.read_response("POST")
        assert (got.status, got.clean, got.body == bodies[number]) == (200, True, True)

    async def others() -> None:
        for other in await asyncio.gather(*(tunnel.get(b"/other") for _ in range(4))):
            assert other.body == b"real"

    service = answering({b"/%d" % number: write_first for number in range(count)})
    *start, program = with_limits()
    async with (
        RawOrigin(service, limit=SMALL, rcvbuf=SMALL, sndbuf=SMALL, record_limit=0) as origin,
        Tunnel(origin.port, command=[*start, SMALL_SOCKETS + program], env={"PYTUNNEL_LOOP": "asyncio"}) as tunnel,
        contextlib.AsyncExitStack() as stack,
    ):
        visitors = []
        for number in range(count):
            visitor = await stack.enter_async_context(tunnel.visitor(timeout=30.0, rcvbuf=SMALL, sndbuf=SMALL))
            await visitor.send(tunnel.request("POST", b"/%d" % number, [(b"Content-Length", b"%d" % size)]))
            visitors.append(visitor)
        async with asyncio.TaskGroup() as tasks:
            for number, visitor in enumerate(visitors):
                tasks.create_task(upload(visitor, number))
            await assert_blocked(others, *downloads, *uploads)
            for number, visitor in enumerate(visitors):
                tasks.create_task(download(visitor, number))
        await origin.wait_for(lambda: sorted(right) == [*range(count)], 10.0, "sixteen uploads")


async def test_a_paused_visitor_gets_every_byte_when_it_reads_on() -> None:
    """Pausing again and again, at odd places, over a chunked body."""
    size = 16 * MiB

    async def download(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(head(b"HTTP/1.1 200 OK", CHUNKED))
        for offset in range(0, size, 128 * KiB):
            writer.write(chunk(pattern(offset, 128 * KiB)))
            await writer.drain()
        writer.write(chunk(b""))

    async with served(answering({b"/big": download})) as (_, tunnel), tunnel.visitor(rcvbuf=64 * KiB) as visitor:
        await visitor.send(tunnel.request(target=b"/big"))
        got = await visitor.read_head()
        checker, pause_at = PatternChecker(), 1
        async for piece in visitor.iter_body(got):
            checker.feed(piece)
            if checker.offset >= pause_at:
                pause_at = checker.offset * 3
                assert (await tunnel.get()).body == b"real"
        assert checker.offset == size


# ---------------------------------------------------------------------------------------- Never mixed


async def test_answers_go_to_whoever_asked() -> None:
    """200 requests at a time, to 20 tunnels of three clients; each carries a nonce, and so does its answer."""
    held: dict[str, list[asyncio.Event]] = {}

    def service(name: str) -> RawOrigin:
        async def echo(request: RawRequest, reader: Reader, writer: Writer) -> None:
            turn = held.setdefault(name, [])
            turn.append(mine := asyncio.Event())
            if len(turn) == 10:  # all of them are here: answer in the opposite order
                turn[-1].set()
            await mine.wait()
            turn.pop()
            proof = b"|".join([name.encode(), request.target, request.value(b"x-nonce") or b"", request.body])
            writer.write(head(b"HTTP/1.1 200 OK", (b"X-Nonce", request.value(b"x-nonce") or b""), CHUNKED))
            for start in range(0, len(proof), 10_000):
                writer.write(chunk(proof[start : start + 10_000]))
                await writer.drain()
            writer.write(chunk(b""))
            if turn:
                turn[-1].set()

        return RawOrigin(echo, read_body=True)

    async def ask(tunnel: Tunnel, name: str, number: int) -> None:
        nonce = secrets.token_hex(16).encode()
        target, body = b"/%d/%b" % (number, nonce), nonce * secrets.randbelow(3000)
        async with tunnel.visitor(timeout=30) as visitor:
            await visitor.send(request("POST", target, f"{name}.localhost".encode(), [(b"X-Nonce", nonce)], body))
            got = await visitor.read_response()
        assert got.status == 200, got
        assert got.value(b"x-nonce") == nonce
        assert got.body == b"|".join([name.encode(), target, nonce, body])

    async with contextlib.AsyncExitStack() as stack:
        _, tunnel = await stack.enter_async_context(served(response(b"real")))
        names = [f"n{number}" for number in range(20)]
        origins = {name: await stack.enter_async_context(service(name)) for name in names}
        clients = []
        for few in (names[:8], names[8:16], names[16:]):
            targets = [f"{name}={origins[name].port}" for name in few]
            args = ["connect", *targets, "--server", tunnel.server_url, "--token", tunnel.token, "--json"]
            client = await stack.enter_async_context(await Process.start(*args))
            for _ in few:
                await client.event("ready")
            clients.append(client)
        for _ in range(2):
            async with asyncio.TaskGroup() as tasks:
                for number in range(10):
                    for name in names:
                        tasks.create_task(ask(tunnel, name, number))
        for client in clients:
            assert_quiet(client)
