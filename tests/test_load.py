"""Size and number: large bodies in little memory, readers who have stopped, visitors who leave, many at once.

Nothing here measures speed; the machine that runs it may be slow and busy. `acceptance.py` does that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from support import (
    NO_DEBUG,
    PatternChecker,
    Process,
    RawOrigin,
    RawRequest,
    RawVisitor,
    Tunnel,
    WaitFailed,
    chunk,
    eventually,
    pattern,
    response,
    with_limits,
)

import pytunnel

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter

MIB = 1024 * 1024
SIZE = 128 * MIB
PIECE = 256 * 1024
GROWTH = 32 * MIB  # resident bytes that a transfer of any size may add to a process
READ = 256 * 1024  # bytes that one read of asyncio's transports may bring
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(autouse=True)
async def no_debug_mode() -> None:
    """Gigabytes pass through this process in pieces of some kilobytes: the notes of debug mode would take minutes."""
    asyncio.get_running_loop().set_debug(False)


def stalled_growth(streams: int) -> int:
    """Resident bytes that streams may add to a process while nobody reads what they carry: just below 1 MiB each.

    The client has, for each of them, in the connection to the local service READ_BUFFER and the read that went over
    it; the read under way to the session; SEND_BUFFER there and the read that went over it. The server has less:
    its window, the piece under way and the transport's buffer. Once per process come what the log keeps, the frames
    kept for resume, and the interpreter's own share.
    """
    each = pytunnel.READ_BUFFER + READ + READ + pytunnel.SEND_BUFFER + READ
    log = min(2 * streams * pytunnel.MAX_PREFIX, pytunnel.MAX_LOG)
    return streams * each + log + pytunnel.MAX_UNACKED + 8 * MIB


def head_of(size: int, chunked: bool) -> bytes:
    """What frames a body of that size."""
    return CHUNKED if chunked else b"Content-Length: %d\r\n\r\n" % size


def pieces(size: int, chunked: bool) -> Iterator[bytes]:
    """The body in pieces, framed."""
    for offset in range(0, size, PIECE):
        piece = pattern(offset, min(PIECE, size - offset))
        yield chunk(piece) if chunked else piece
    if chunked:
        yield chunk(b"")


class LargeOrigin:
    """Serves `pattern` at /cl and /chunked, and checks what is sent to it; `ok` at any other place."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.written = 0
        self.origin = RawOrigin(self.handle, record_limit=0)

    async def handle(self, request: RawRequest, reader: Reader, writer: Writer) -> None:
        if request.framing:
            checker = PatternChecker()
            async for piece in self.origin.iter_body(request, reader):
                checker.feed(piece)
            writer.write(response(b"%d" % checker.offset, headers=[(b"Connection", b"close")]))
        elif request.target in (b"/cl", b"/chunked"):
            chunked = request.target == b"/chunked"
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + head_of(self.size, chunked))
            for piece in pieces(self.size, chunked):
                writer.write(piece)
                await writer.drain()
                self.written += len(piece)
        else:
            writer.write(response(b"ok", headers=[(b"Connection", b"close")]))
        await writer.drain()
        writer.close()


class Footprint:
    """What the processes of a tunnel occupy, compared with a moment when they had nothing to do."""

    def __init__(self, tunnel: Tunnel) -> None:
        self.processes = {"server": tunnel.server, "client": tunnel.client}
        self.rss = {name: process.rss() for name, process in self.processes.items()}
        self.descriptors = {name: process.fd_count() for name, process in self.processes.items()}

    def check_memory(self, growth: int) -> None:
        """Fail when a process has ever been larger than it was by more than that."""
        for name, process in self.processes.items():
            grown = process.peak_rss() - self.rss[name]
            assert grown < growth, f"the {name} grew by {grown / MIB:.1f} MiB"

    async def descriptors_return(self, timeout: float = 10.0) -> None:
        """Wait until no process has more descriptors open than it had."""

        def excess() -> dict[str, int]:
            counts = {name: process.fd_count() - self.descriptors[name] for name, process in self.processes.items()}
            return {name: count for name, count in counts.items() if count > 0}

        try:
            await eventually(lambda: not excess(), timeout)
        except WaitFailed:
            raise AssertionError(f"descriptors more than before, after {timeout} s: {excess()}") from None


def files_open(process: Process) -> list[str]:
    """Regular files that a process has open, those that are deleted already included."""
    found = []
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISREG(descriptor.stat().st_mode):
                found.append(os.readlink(descriptor))
    return found


def bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@contextlib.asynccontextmanager
async def tunnel_to(origin: RawOrigin, directory: Path) -> AsyncIterator[Tunnel]:
    """A tunnel whose processes keep state and temporary files in one directory, warm from some requests.

    Not in debug mode: it remembers where each task and each callback was made, and here memory is measured.
    """
    (directory / "tmp").mkdir()
    env = {"TMPDIR": str(directory / "tmp"), "PYTUNNEL_STATE_DIR": str(directory / "state"), **NO_DEBUG}
    async with Tunnel(origin.port, env=env) as t:
        for _ in range(3):
            assert (await t.get(b"/warm")).status == 200
        await origin.wait_for(lambda: not origin.open_connections)
        yield t


# ---------------------------------------------------------------------------------------- Large bodies


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
@pytest.mark.parametrize("direction", ["down", "up"])
async def test_a_large_body_is_equal_and_passes_through_little_memory(
    direction: str, chunked: bool, tmp_path: Path
) -> None:
    large = LargeOrigin(SIZE)
    async with large.origin as origin, tunnel_to(origin, tmp_path) as t, t.visitor(timeout=30) as visitor:
        before = Footprint(t)
        if direction == "down":
            checker = PatternChecker()
            await visitor.send(t.request("GET", b"/chunked" if chunked else b"/cl"))
            answer = await visitor.read_response(sink=checker.feed)
            assert (answer.status, answer.clean, checker.offset) == (200, True, SIZE)
        else:
            await visitor.send(b"POST /up HTTP/1.1\r\nHost: %b\r\n" % t.host + head_of(SIZE, chunked))
            for piece in pieces(SIZE, chunked):
                await visitor.send(piece)
            answer = await visitor.read_response("POST")
            assert (answer.status, answer.body) == (200, b"%d" % SIZE)
        before.check_memory(GROWTH)
        assert files_open(t.server) == files_open(t.client) == []
        assert bytes_below(tmp_path) < 4096, "names and the like; no body"


async def test_large_bodies_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    large = LargeOrigin(16 * MIB)
    async with large.origin as origin, tunnel_to(origin, tmp_path) as t:
        before = Footprint(t)

        async def download(path: bytes) -> int:
            checker = PatternChecker()
            async with t.visitor(timeout=30) as visitor:
                await visitor.send(t.request("GET", path))
                assert (await visitor.read_response(sink=checker.feed)).clean
            return checker.offset

        async def upload(chunked: bool) -> int:
            async with t.visitor(timeout=30) as visitor:
                await visitor.send(b"PUT / HTTP/1.1\r\nHost: %b\r\n" % t.host + head_of(large.size, chunked))
                for piece in pieces(large.size, chunked):
                    await visitor.send(piece)
                return int((await visitor.read_response("PUT")).body)

        work = [download(b"/cl"), download(b"/chunked"), upload(False), upload(True)]
        assert await asyncio.gather(*work) == [large.size] * 4
        before.check_memory(2 * GROWTH)


# ---------------------------------------------------------------------------------------- Readers who have stopped


async def stopped(progress: Callable[[], object]) -> None:
    """Wait until something has stayed the same for a while."""
    last: list[object] = []

    def unchanged() -> bool:
        last.append(progress())
        return len(last) > 25 and len(set(last[-25:])) == 1

    await eventually(unchanged, 30.0, "everything to come to rest")


async def test_readers_who_have_stopped_cost_their_own_windows_and_nothing_else(tmp_path: Path) -> None:
    large = LargeOrigin(64 * MIB)
    async with large.origin as origin, tunnel_to(origin, tmp_path) as t:
        before = Footprint(t)
        async with contextlib.AsyncExitStack() as stack:
            visitors = [await stack.enter_async_context(t.visitor(rcvbuf=8192)) for _ in range(100)]
            for visitor in visitors:
                await visitor.send(t.request("GET", b"/cl"))
            heads = await asyncio.gather(*(visitor.read_head() for visitor in visitors))
            assert {head.status for head in heads} == {200}
            await stopped(lambda: large.written)
            assert origin.open_connections == 100
            assert large.written < 100 * large.size // 2, "what the kernel's buffers take, but not the whole bodies"
            for _ in range(5):
                assert (await t.get(b"/new")).body == b"ok"
            answer = await t.fetch("POST", b"/new", body=pattern(0, MIB))
            assert answer.body == b"%d" % MIB
            before.check_memory(stalled_growth(100))
            assert files_open(t.server) == files_open(t.client) == []

            checker = PatternChecker()  # one of them reads again, and gets all of it
            async for piece in visitors[0].iter_body(heads[0]):
                checker.feed(piece)
            assert checker.offset == large.size
        await origin.wait_for(lambda: not origin.open_connections, what="the local connections to end")
        await before.descriptors_return()
        assert (await t.get(b"/after")).body == b"ok"


async def test_a_local_service_that_has_stopped_reading_holds_its_uploads_back(tmp_path: Path) -> None:
    released = asyncio.Event()

    async def swallow(request: RawRequest, reader: Reader, writer: Writer) -> None:
        if request.framing:
            await released.wait()
            return
        writer.write(response(b"ok", headers=[(b"Connection", b"close")]))
        await writer.drain()
        writer.close()

    async with RawOrigin(swallow, rcvbuf=8192, limit=8192, record_limit=0) as origin, tunnel_to(origin, tmp_path) as t:
        before = Footprint(t)
        sent = [0]

        async def upload(visitor: RawVisitor) -> None:
            await visitor.send(b"PUT / HTTP/1.1\r\nHost: %b\r\n" % t.host + head_of(64 * MIB, False))
            with contextlib.suppress(WaitFailed, ConnectionError):
                for piece in pieces(64 * MIB, False):
                    await visitor.send(piece)
                    sent[0] += len(piece)

        async with contextlib.AsyncExitStack() as stack:
            visitors = [await stack.enter_async_context(t.visitor(timeout=60, sndbuf=8192)) for _ in range(50)]
            uploads = [asyncio.create_task(upload(visitor)) for visitor in visitors]
            await origin.wait_for(lambda: len(origin.requests) >= 50 + 3, 20)
            await stopped(lambda: (sent[0], origin.bytes_received))
            assert not any(task.done() for task in uploads)
            assert sent[0] < 50 * 64 * MIB // 2, "what the kernel's buffers take, but not the whole bodies"
            assert (await t.get(b"/new")).body == b"ok"
            before.check_memory(stalled_growth(50))
            for visitor in visitors:
                visitor.close()
            await asyncio.gather(*uploads)
            released.set()  # who does not read cannot see anybody leave either, so it is the service that ends them
        await origin.wait_for(lambda: not origin.open_connections, what="the local connections to end")
        await before.descriptors_return()


# ---------------------------------------------------------------------------------------- Visitors who leave


async def test_visitors_who_leave_leave_nothing_behind(tmp_path: Path) -> None:
    """500 of them, in five ways: before the local service sees them, while it thinks, in a download, an upload, …"""

    async def handle(request: RawRequest, reader: Reader, writer: Writer) -> None:
        if request.target == b"/warm":
            writer.write(response(b"ok", headers=[(b"Connection", b"close")]))
            await writer.drain()
            writer.close()
        elif request.target == b"/download":
            writer.write(b"HTTP/1.1 200 OK\r\n" + head_of(SIZE, False))
            for piece in pieces(SIZE, False):
                writer.write(piece)
                await writer.drain()
        elif request.target == b"/ws":
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        await reader.read()

    async with RawOrigin(handle, record_limit=0) as origin, tunnel_to(origin, tmp_path) as t:
        before = Footprint(t)

        async def leave(number: int) -> None:
            async with t.visitor(rcvbuf=8192) as visitor:
                if number % 5 == 0:
                    await visitor.send(t.request("GET", b"/at-once"))
                elif number % 5 == 1:
                    path = b"/think-%d" % number
                    await visitor.send(t.request("GET", path))
                    await origin.wait_for(lambda: any(r.target == path for r in origin.requests), 20)
                elif number % 5 == 2:
                    await visitor.send(t.request("GET", b"/download"))
                    await visitor.read_exactly(1000)
                elif number % 5 == 3:
                    upload = b"PUT /up HTTP/1.1\r\nHost: %b\r\n" % t.host
                    await visitor.send(upload + head_of(SIZE, bool(number & 1)))
                    await visitor.send(chunk(bytes(1000)) if number & 1 else bytes(1000))
                else:
                    headers = [(b"Connection", b"upgrade"), (b"Upgrade", b"x")]
                    await visitor.send(t.request("GET", b"/ws", headers))
                    assert (await visitor.read_head()).status == 101
                    await visitor.send(b"some bytes")
                if number & 2:
                    visitor.abort()

        for batch in range(10):
            await asyncio.gather(*(leave(number) for number in range(batch * 50, batch * 50 + 50)))
        await origin.wait_for(lambda: not origin.open_connections, 10, "the local connections to end")
        await before.descriptors_return()
        before.check_memory(stalled_growth(50))
        assert (await t.get(b"/warm")).body == b"ok"
        seen = len(origin.requests)
        await eventually(lambda: sum(event["event"] == "request" for event in t.client.events) >= seen)


async def test_local_connections_that_are_not_used_again_are_closed(tmp_path: Path) -> None:
    """A burst leaves kept connections behind; they go when their time is over."""
    arrived = [0]
    everybody = asyncio.Event()

    async def handle(request: RawRequest, reader: Reader, writer: Writer) -> None:
        if request.target == b"/warm":
            writer.write(response(b"ok", headers=[(b"Connection", b"close")]))
            await writer.drain()
            writer.close()
            return
        arrived[0] += 1
        if arrived[0] == 40:
            everybody.set()
        await everybody.wait()
        writer.write(response(b"ok"))

    async with RawOrigin(handle) as origin, tunnel_to(origin, tmp_path) as t:
        before = Footprint(t)
        answers = await asyncio.gather(*(t.get(b"/") for _ in range(40)))
        assert {answer.status for answer in answers} == {200}
        await before.descriptors_return(8)
        await eventually(lambda: not origin.open_connections, what="the end of the last one, seen here, too")


@pytest.mark.parametrize("when", ["at once", "later"])
async def test_a_kept_local_connection_that_its_service_closes_is_closed_too(when: str) -> None:
    """Long before its time is over; at once is with the response, which does not say so."""
    writers = []

    async def handle(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(response(b"ok"))
        writers.append(writer)
        if when == "at once":
            writer.write_eof()

    async with RawOrigin(handle) as origin, Tunnel(origin.port, command=with_limits(LOCAL_IDLE=60.0)) as t:
        assert (await t.get()).body == b"ok"
        if when == "later":
            writers[0].write_eof()
        await origin.wait_for(lambda: not origin.open_connections, what="the client to close it")


# ---------------------------------------------------------------------------------------- Many at once


async def test_everybody_gets_the_answer_to_their_own_question() -> None:
    """200 at the same time, answered in another order once all of them are there."""
    visitors = 200
    order = random.Random(7)
    waiting: list[asyncio.Event] = []

    async def handle(request: RawRequest, reader: Reader, writer: Writer) -> None:
        body = b"".join([piece async for piece in origin.iter_body(request, reader)]) if request.framing else b""
        turn = asyncio.Event()
        waiting.append(turn)
        if len(waiting) == visitors:
            order.shuffle(waiting)
            for event in waiting:
                event.set()
        await turn.wait()
        nonce = request.value(b"X-Nonce") or b""
        writer.write(response(b"%b %b %b" % (request.target, nonce, body), headers=[(b"X-Nonce", nonce)]))

    async with RawOrigin(handle) as origin, Tunnel(origin.port) as t:

        async def ask(number: int) -> None:
            nonce = b"%x" % (number * 7919)
            path = b"/" + nonce
            body = pattern(number * 1000, 3000) if number % 2 else None
            answer = await t.fetch("POST" if body else "GET", path, [(b"X-Nonce", nonce)], body, timeout=30)
            assert (answer.status, answer.value(b"X-Nonce")) == (200, nonce)
            assert answer.body == b"%b %b %b" % (path, nonce, body or b"")

        await asyncio.gather(*map(ask, range(visitors)))
        assert len(waiting) == visitors


async def test_answers_do_not_mix_on_kept_connections() -> None:
    """Twenty visitors, each with one connection for many requests to two tunnels of one client."""

    async def handle(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(response((request.value(b"Host") or b"") + request.target))

    async with RawOrigin(handle) as origin, Tunnel(origin.port) as t:
        other = await t.start_client(name="other")
        await other.event("ready")
        hosts = [t.host, t.host.replace(b"web", b"other")]

        async def ask(number: int) -> None:
            async with t.visitor() as visitor:
                for turn in range(25):
                    host = hosts[(number + turn) % 2]
                    target = b"/%d/%d" % (number, turn)
                    await visitor.send(b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (target, host))
                    assert (await visitor.read_response()).body == host + target

        await asyncio.gather(*map(ask, range(20)))
