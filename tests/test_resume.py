"""A link that is lost: what runs goes on where it stopped, and what cannot go on never looks complete.

Cuts are triggered by progress, that is by bytes seen, and never by the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from support import (
    CHUNK,
    Cut,
    PatternChecker,
    RawOrigin,
    RawRequest,
    RawVisitor,
    Relay,
    Signal,
    Truncated,
    Tunnel,
    chunk,
    eventually,
    pattern,
    response,
)

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter

MIB = 1024 * 1024

# For a longer run: 1024 MiB each way and 20 cuts, with `-o timeout=0 -s`; -s shows the measured figures.
DOWNLOAD = 64 * MIB
UPLOAD = 64 * MIB
CUTS: tuple[Cut, ...] = ("reset", "close", "reset", "close", "silence", "reset", "close", "reset")
ECHO = 4096  # bytes of one round of the echo
EVENT_STEP = 4 * MIB  # bytes of progress between two events
PATIENCE = 90.0  # seconds without any progress: a silence (25 s) and the longest delay between dials (30 s), with room

KINDS: tuple[Cut, ...] = ("reset", "close")  # cuts that both ends see at once
HOWS = pytest.mark.parametrize("how", KINDS)
AWAY = 20.0  # seconds within which a client is back whose connections were cut a few times in a row

SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-WebSocket-Version", b"13")]
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def length_head(length: int) -> bytes:
    """A response's head that announces so many bytes."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length


async def write_pattern(writer: Writer, size: int, offset: int = 0) -> None:
    """Write a piece of the pattern as fast as it is taken."""
    for start in range(offset, offset + size, CHUNK):
        writer.write(pattern(start, min(CHUNK, offset + size - start)))
        await writer.drain()


async def lose(tunnel: Tunnel, how: Cut = "reset", *, back: bool = True) -> None:
    """Cut the link and return when the client has noticed, with `back` when it is connected again."""
    assert await tunnel.relay.cut(how) == 1
    await tunnel.client.event("disconnected")
    if back:
        assert (await tunnel.client.event("reconnected", timeout=AWAY))["resumed"] is True


class Gate:
    """A local service whose handler answers in steps: each step is written when the test opens it."""

    def __init__(self, *steps: bytes) -> None:
        self.steps = steps
        self.opened = 0
        self.signal = Signal()

    def open(self) -> None:
        """Let the next step be written."""
        self.opened += 1
        self.signal.notify()

    async def __call__(self, _: RawRequest, reader: Reader, writer: Writer) -> None:
        for number, step in enumerate(self.steps):
            await self.signal.wait_for(lambda number=number: self.opened > number)  # type: ignore[misc]
            writer.write(step)
            await writer.drain()


@contextlib.asynccontextmanager
async def gated(
    *steps: bytes, read_body: bool = False, serve_args: tuple[str, ...] = ()
) -> AsyncIterator[tuple[Tunnel, RawOrigin, Gate]]:
    """A tunnel over a relay to a service that answers in steps."""
    gate = Gate(*steps)
    async with (
        RawOrigin(gate, read_body=read_body) as origin,
        Tunnel(origin.port, relay=True, serve_args=serve_args) as tunnel,
    ):
        yield tunnel, origin, gate


# ---------------------------------------------------------------------------------------- All at once


class Everything:
    """A download, an upload, an event stream and an echo through one tunnel at the same time."""

    def __init__(self) -> None:
        self.progress = Signal()
        self.downloaded = PatternChecker()
        self.uploaded = PatternChecker()
        self.echoed = PatternChecker()
        self.events_written = self.events_read = 0
        self.transfers_done = False

    @property
    def total(self) -> int:
        return self.downloaded.offset + self.uploaded.offset

    # The local service

    async def serve(self, request: RawRequest, reader: Reader, writer: Writer) -> None:
        await {b"/download": self._send, b"/upload": self._receive, b"/events": self._tell, b"/echo": self._echo}[
            request.target
        ](request, reader, writer)

    async def _send(self, request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(length_head(DOWNLOAD))
        await write_pattern(writer, DOWNLOAD)

    async def _receive(self, request: RawRequest, reader: Reader, writer: Writer) -> None:
        assert request.framing == "chunked"
        left = UPLOAD
        while left:
            line = await reader.readuntil(b"\r\n")
            data = await reader.readexactly(int(line, 16) + 2)
            self.uploaded.feed(data[:-2])
            left -= len(data) - 2
            self.progress.notify()
        assert await reader.readexactly(5) == b"0\r\n\r\n"
        request.complete = True
        writer.write(response(b"%d" % self.uploaded.offset))

    async def _tell(self, request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(SSE_HEAD)
        while not self.transfers_done:
            due = (self.events_written + 1) * EVENT_STEP
            await self.progress.wait_for(lambda due=due: self.total >= due or self.transfers_done)  # type: ignore[misc]
            writer.write(chunk(b"data: %d\n\n" % self.events_written))
            self.events_written += 1
            await writer.drain()
        writer.write(chunk(b""))

    async def _echo(self, request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(SWITCH)
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()

    # The visitors

    async def download(self, visitor: RawVisitor, tunnel: Tunnel) -> None:
        def take(data: bytes) -> None:
            self.downloaded.feed(data)
            self.progress.notify()

        await visitor.send(tunnel.request(target=b"/download"))
        got = await visitor.read_response(sink=take)
        assert (got.status, got.clean, self.downloaded.offset) == (200, True, DOWNLOAD)

    async def upload(self, visitor: RawVisitor, tunnel: Tunnel) -> None:
        await visitor.send(tunnel.request("POST", b"/upload", [(b"Transfer-Encoding", b"chunked")]))
        for start in range(0, UPLOAD, CHUNK):
            await visitor.send(chunk(pattern(start, min(CHUNK, UPLOAD - start))))
        await visitor.send(chunk(b""))
        got = await visitor.read_response("POST")
        assert (got.status, got.body) == (200, b"%d" % UPLOAD)

    async def watch(self, visitor: RawVisitor, tunnel: Tunnel) -> None:
        text = bytearray()

        def take(data: bytes) -> None:
            text.extend(data)
            self.events_read = text.count(b"\n\n")

        await visitor.send(tunnel.request(target=b"/events"))
        got = await visitor.read_response(sink=take)
        assert (got.status, got.clean) == (200, True)
        assert text == b"".join(b"data: %d\n\n" % number for number in range(self.events_written))

    async def talk(self, visitor: RawVisitor, tunnel: Tunnel) -> None:
        await visitor.send(tunnel.request(target=b"/echo", headers=UPGRADE))
        assert (await visitor.read_response()).status == 101
        while not self.transfers_done:
            await visitor.send(pattern(self.echoed.offset, ECHO))
            self.echoed.feed(await visitor.read_exactly(ECHO))
        assert visitor.ended is None
        assert not visitor.buffered

    async def run(self, tunnel: Tunnel, cut: Callable[[], Awaitable[None]]) -> None:
        """Run all four to their ends while `cut` does its work."""
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:

            async def start(work: Callable[[RawVisitor, Tunnel], Awaitable[None]]) -> asyncio.Task[None]:
                visitor = await stack.enter_async_context(tunnel.visitor(timeout=PATIENCE))
                return tasks.create_task(_run(work(visitor, tunnel)))

            await start(self.watch)
            await start(self.talk)
            transfers = [await start(self.download), await start(self.upload), tasks.create_task(_run(cut()))]
            await asyncio.wait(transfers, return_when=asyncio.FIRST_EXCEPTION)
            self.transfers_done = True
            self.progress.notify()


async def _run(work: Awaitable[None]) -> None:
    await work


async def test_everything_survives_many_cuts_and_idle_links_a_silence() -> None:
    """Two tunnels side by side, because the keepalive takes its half minute to notice a silence."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(cut_everything())
        tasks.create_task(silence_an_idle_link())


async def cut_everything() -> None:
    """Cut all the traffic of one tunnel, one kind of cut after another."""
    everything, figures = Everything(), list[str]()
    async with (
        RawOrigin(everything.serve, record_limit=0) as origin,
        Tunnel(origin.port, relay=True) as tunnel,
    ):

        async def cut_by_progress() -> None:
            for number, how in enumerate(CUTS, 1):
                due = number * (DOWNLOAD + UPLOAD) // (len(CUTS) + 1)
                await everything.progress.wait_for(
                    lambda due=due: everything.total >= due,  # type: ignore[misc]
                    PATIENCE,
                    lambda due=due: f"{due} bytes, have {everything.total}",  # type: ignore[misc]
                )
                began = time.monotonic()
                assert await tunnel.relay.cut(how) == 1
                await tunnel.client.event("disconnected", timeout=PATIENCE)
                noticed = time.monotonic() - began
                assert (await tunnel.client.event("reconnected", timeout=PATIENCE))["resumed"] is True
                figures.append(f"{how}: noticed {noticed:.1f} s, back {time.monotonic() - began:.1f} s")

        began = time.monotonic()
        await everything.run(tunnel, cut_by_progress)
        figures.append(f"{everything.total // MIB} MiB, {everything.echoed.offset} bytes echoed")
        print(f"\n{time.monotonic() - began:.1f} s;", "; ".join(figures))

        assert tunnel.relay.accepted == len(CUTS) + 1, "each cut costs one dial, and nothing else does"
        assert everything.uploaded.offset == UPLOAD
        assert everything.events_read == everything.events_written >= (DOWNLOAD + UPLOAD) // EVENT_STEP
        assert everything.echoed.offset >= 2 * ECHO
        assert sorted(request.target for request in origin.requests) == [b"/download", b"/echo", b"/events", b"/upload"]


async def silence_an_idle_link() -> None:
    """A connection that just stops is noticed by the keepalive; a request that it swallowed is sent again."""
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port, relay=True) as tunnel:
        began = time.monotonic()
        assert await tunnel.relay.cut("silence") == 1
        got = await tunnel.fetch("POST", body=b"swallowed", timeout=PATIENCE)
        seconds = time.monotonic() - began
        print(f"\na request into a silent link: answered after {seconds:.1f} s")
        assert (got.status, got.body, len(origin.requests)) == (200, b"hello", 1)
        assert (await tunnel.client.event("reconnected"))["resumed"] is True
        assert seconds < 15 + 10 + 5, "PING_INTERVAL, PING_TIMEOUT and a redial"


# ---------------------------------------------------------------------------------------- A cut in each phase


async def test_cuts_while_the_client_dials_and_shakes_hands() -> None:
    """After so many bytes of each new connection: none, the GET, the 101 and the messages after it."""
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port, relay=True) as tunnel:
        relay = tunnel.relay
        await relay.cut("reset")
        for due in (0, 1, 300, 500, 800):
            before = relay.accepted, relay.bytes_up + relay.bytes_down
            await relay.wait_for(
                lambda due=due, before=before: (  # type: ignore[misc]
                    relay.accepted > before[0] and relay.bytes_up + relay.bytes_down >= before[1] + due
                ),
                AWAY,
                f"{due} bytes of a new connection",
            )
            assert await relay.cut("reset") == 1
        assert (await tunnel.client.event("reconnected", timeout=AWAY))["resumed"] is True
        assert (await tunnel.get()).body == b"hello"
        assert len(origin.requests) == 1


async def test_cuts_before_the_first_link_is_there() -> None:
    relay = Relay(0)
    relay.refuse = True

    async def cut_some() -> None:
        await eventually(lambda: relay.accepted >= 2, AWAY, "two dials")
        relay.refuse = False
        for due in (1, 300, 600):
            before = relay.bytes_up + relay.bytes_down
            await relay.wait_for(
                lambda due=due, before=before: relay.bytes_up + relay.bytes_down >= before + due,  # type: ignore[misc]
                AWAY,
            )
            assert await relay.cut("reset") == 1

    async with RawOrigin(response(b"hello")) as origin:
        cutting = asyncio.create_task(cut_some())
        async with Tunnel(origin.port, relay=relay) as tunnel:
            await cutting
            got = await tunnel.get()
            assert (got.status, got.body) == (200, b"hello")
            assert len(origin.requests) == 1


@HOWS
async def test_a_cut_of_an_idle_link(how: Cut) -> None:
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port, relay=True) as tunnel:
        assert (await tunnel.get()).body == b"hello"
        began = time.monotonic()
        await lose(tunnel, how)
        print(f"\n{how}: back after {time.monotonic() - began:.2f} s")
        assert (await tunnel.get()).body == b"hello"
        assert len(origin.requests) == 2


@HOWS
async def test_a_cut_between_open_and_head(how: Cut) -> None:
    async with gated(response(b"at last"), read_body=True) as (tunnel, origin, gate), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request("POST", body=b"once"))
        await origin.wait_requests()
        await lose(tunnel, how)
        gate.open()
        got = await visitor.read_response()
        assert (got.status, got.body) == (200, b"at last")
        assert len(origin.requests) == 1


async def test_a_head_that_is_written_while_the_link_is_away() -> None:
    async with gated(length_head(4), b"body") as (tunnel, origin, gate), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request())
        await origin.wait_requests()
        tunnel.relay.refuse = True
        await lose(tunnel, back=False)
        gate.open()
        gate.open()
        await tunnel.relay.wait_for(lambda: tunnel.relay.refused >= 2)
        tunnel.relay.refuse = False
        got = await visitor.read_response()
        assert (got.status, got.body, got.clean) == (200, b"body", True)


@HOWS
@pytest.mark.parametrize("framing", ["content-length", "chunked"])
async def test_a_cut_in_the_middle_of_an_upload(how: Cut, framing: str) -> None:
    size = 4 * MIB
    chunked = framing == "chunked"
    async with gated(response(b"taken"), read_body=True) as (tunnel, origin, gate), tunnel.visitor() as visitor:
        gate.open()
        field = (b"Transfer-Encoding", b"chunked") if chunked else (b"Content-Length", b"%d" % (2 * size))
        await visitor.send(tunnel.request("POST", headers=[field]))

        async def send(start: int) -> None:
            for offset in range(start, start + size, CHUNK):
                piece = pattern(offset, CHUNK)
                await visitor.send(chunk(piece) if chunked else piece)

        await send(0)
        await origin.wait_for(lambda: origin.bytes_received >= size // 2)
        await lose(tunnel, how, back=False)
        await send(size)
        if chunked:
            await visitor.send(chunk(b""))
        got = await visitor.read_response()
        assert (got.status, got.body) == (200, b"taken")
        assert len(origin.requests) == 1
        assert origin.requests[0].body == pattern(0, 2 * size)


@HOWS
async def test_a_cut_between_head_and_body(how: Cut) -> None:
    async with gated(length_head(4), b"body") as (tunnel, _, gate), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request())
        gate.open()
        head = await visitor.read_head()
        await lose(tunnel, how)
        gate.open()
        assert b"".join([piece async for piece in visitor.iter_body(head)]) == b"body"


@HOWS
async def test_a_cut_in_the_middle_of_a_body(how: Cut) -> None:
    half = 4 * MIB
    steps = length_head(2 * half) + pattern(0, half), pattern(half, half)
    async with gated(*steps) as (tunnel, _, gate), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request())
        gate.open()
        checker = PatternChecker()
        head = await visitor.read_head()
        cut = False
        async for piece in visitor.iter_body(head):
            checker.feed(piece)
            if not cut and checker.offset >= half // 2:
                cut = True
                await lose(tunnel, how)
                gate.open()
        assert checker.offset == 2 * half


async def test_five_losses_in_a_row() -> None:
    """Each as soon as the client is back; what runs goes on, and each loss costs one connection."""
    async with gated(length_head(12), b"the ", b"whole ", b"of") as (tunnel, origin, gate), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request())
        gate.open()
        head = await visitor.read_head()
        began = time.monotonic()
        for _ in range(5):
            await lose(tunnel)
        print(f"\nfive losses: {time.monotonic() - began:.1f} s")
        for _ in range(3):
            gate.open()
        assert b"".join([piece async for piece in visitor.iter_body(head)]) == b"the whole of"
        assert tunnel.relay.accepted == 6
        assert len(origin.requests) == 1


# ---------------------------------------------------------------------------------------- While the link is away


@contextlib.asynccontextmanager
async def away(tunnel: Tunnel) -> AsyncIterator[None]:
    """Within the block the client has no way to the server."""
    tunnel.relay.refuse = True
    await lose(tunnel, back=False)
    await tunnel.relay.wait_for(lambda: tunnel.relay.refused >= 1, what="a redial")  # the server has noticed, too
    yield
    tunnel.relay.refuse = False


async def test_a_post_while_the_link_is_away_waits_and_is_executed_once() -> None:
    async with (
        RawOrigin(response(b"done"), read_body=True) as origin,
        Tunnel(origin.port, relay=True) as tunnel,
        tunnel.visitor() as visitor,
    ):
        async with away(tunnel):
            await visitor.send(tunnel.request("POST", b"/order", body=b"one"))
            refused = tunnel.relay.refused
            await tunnel.relay.wait_for(lambda: tunnel.relay.refused > refused + 1)
            assert not origin.requests
            assert not visitor.buffered
        got = await visitor.read_response("POST")
        assert (got.status, got.body) == (200, b"done")
        assert [(request.target, request.body) for request in origin.requests] == [(b"/order", b"one")]
        assert (await tunnel.get()).status == 200
        assert len(origin.requests) == 2


async def test_posts_are_executed_once_however_the_link_is_cut_under_them() -> None:
    """The cut comes while OPEN, body, HEAD or END is on its way: nothing is left out and nothing repeated."""
    async with (
        RawOrigin(response(b"done"), read_body=True) as origin,
        Tunnel(origin.port, relay=True) as tunnel,
    ):
        relay, posts = tunnel.relay, 12
        for due in (1, 200, 400, 600, 1200):
            start = relay.bytes_up + relay.bytes_down
            answers = [
                asyncio.create_task(tunnel.fetch("POST", b"/%d/%d" % (due, number), body=b"x" * 50, timeout=AWAY))
                for number in range(posts)
            ]
            await relay.wait_for(lambda start=start, due=due: relay.bytes_up + relay.bytes_down >= start + due)  # type: ignore[misc]
            await lose(tunnel)
            assert [(got.status, got.body) for got in await asyncio.gather(*answers)] == [(200, b"done")] * posts
        targets = [request.target for request in origin.requests]
        assert len(targets) == len(set(targets)) == 5 * posts


async def test_requests_wait_no_longer_than_the_hold() -> None:
    async with (
        RawOrigin(response(b"hello")) as origin,
        Tunnel(origin.port, relay=True, serve_args=["--hold", "1"]) as tunnel,
    ):
        async with away(tunnel):
            began = time.monotonic()
            got = await tunnel.fetch("POST", body=b"never")
            waited = time.monotonic() - began
            print(f"\nheld for {waited:.2f} s")
            assert (got.status, got.value(b"X-Pytunnel-Error")) == (503, b"tunnel-offline")
            retry_after = got.value(b"Retry-After")
            assert retry_after is not None
            assert int(retry_after) > 0
            assert waited >= 0.9
        await tunnel.client.event("reconnected", timeout=AWAY)
        assert (await tunnel.get()).body == b"hello"
        assert [request.method for request in origin.requests] == [b"GET"]


# ---------------------------------------------------------------------------------------- Past the grace


BODIES = pytest.mark.parametrize(
    "begin", [length_head(8) + b"half", SSE_HEAD + chunk(b"half")], ids=["length", "chunked"]
)


async def test_past_the_grace_a_request_without_a_head_gets_502() -> None:
    async with gated(response(b"late"), read_body=True, serve_args=("--grace", "1")) as (tunnel, origin, _):
        async with tunnel.visitor() as visitor:
            await visitor.send(tunnel.request("POST", body=b"once"))
            await origin.wait_requests()
            began = time.monotonic()
            async with away(tunnel):
                got = await visitor.read_response("POST")
            print(f"\n502 after {time.monotonic() - began:.2f} s")
            assert (got.status, got.value(b"X-Pytunnel-Error")) == (502, b"link-lost")
        await eventually(lambda: not origin.open_connections, AWAY, "the local request is given up")
        event = await tunnel.client.event("reconnected", timeout=AWAY)
        assert event == {"event": "reconnected", "resumed": False, "lost": 1}
        assert len(origin.requests) == 1, "it is not executed again"


@BODIES
async def test_past_the_grace_a_body_is_cut_short(begin: bytes) -> None:
    async with gated(begin, serve_args=("--grace", "1")) as (tunnel, origin, gate), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request())
        gate.open()
        head = await visitor.read_head()
        async with away(tunnel):
            with pytest.raises(Truncated):
                _ = [piece async for piece in visitor.iter_body(head)]
        await eventually(lambda: not origin.open_connections, AWAY, "the local request is given up")


async def test_past_the_grace_an_upgraded_connection_ends() -> None:
    async def pipe(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(SWITCH)
        while data := await reader.read(CHUNK):
            writer.write(data)

    async with (
        RawOrigin(pipe) as origin,
        Tunnel(origin.port, relay=True, serve_args=["--grace", "1"]) as tunnel,
        tunnel.visitor() as visitor,
    ):
        await visitor.send(tunnel.request(headers=UPGRADE))
        assert (await visitor.read_response()).status == 101
        await visitor.send(b"ping")
        assert await visitor.read_exactly(4) == b"ping"
        async with away(tunnel):
            assert await visitor.read_until_close() == b""
        await eventually(lambda: not origin.open_connections, AWAY, "the local connection is given up")


async def test_past_the_grace_the_tunnel_works_again_at_once() -> None:
    async with (
        gated(response(b"hello"), read_body=True, serve_args=("--grace", "0.1")) as (tunnel, origin, gate),
        tunnel.visitor() as visitor,
    ):
        await visitor.send(tunnel.request("POST", body=b"once"))
        await origin.wait_requests()
        async with away(tunnel):
            assert (await visitor.read_response("POST")).status == 502  # with which its session is over
            await visitor.send(tunnel.request())  # held for the client all the same
        gate.open()
        assert (await tunnel.client.event("reconnected", timeout=AWAY))["resumed"] is False
        assert (await visitor.read_response()).body == b"hello"
        assert len(origin.requests) == 2


async def test_past_the_grace_a_response_on_its_way_is_told_as_lost_once() -> None:
    async with (
        RawOrigin(response(b"hello")) as origin,
        Tunnel(origin.port, relay=True, serve_args=["--grace", "0.1"]) as tunnel,
        tunnel.visitor() as visitor,
    ):
        tunnel.relay.set_mode("half-blackhole", "up")
        await visitor.send(tunnel.request())
        assert (await tunnel.client.event("request"))["status"] == 200  # for the client it is over
        async with away(tunnel):
            assert (await visitor.read_response()).status == 502
            tunnel.relay.set_mode("pass")
        event = await tunnel.client.event("reconnected", timeout=AWAY)
        assert event == {"event": "reconnected", "resumed": False, "lost": 1}
        await lose(tunnel, back=False)
        assert (await tunnel.client.event("reconnected", timeout=AWAY))["lost"] == 0


# ---------------------------------------------------------------------------------------- A clean goodbye


@pytest.mark.parametrize("patience", ["patient", "impatient", "two-signals-at-once"])
async def test_a_goodbye_ends_what_still_runs(patience: str) -> None:
    """By the second signal, or when GOODBYE is over: 502 before the head, an aborted body after it."""

    async def serve(request: RawRequest, reader: Reader, writer: Writer) -> None:
        if request.target == b"/reading":
            writer.write(SSE_HEAD + chunk(b"half"))
        await asyncio.Event().wait()

    async with (
        RawOrigin(serve, read_body=True) as origin,
        Tunnel(origin.port) as tunnel,
        tunnel.visitor() as waiting,
        tunnel.visitor() as reading,
    ):
        await waiting.send(tunnel.request("POST", b"/waiting", body=b"x"))
        await reading.send(tunnel.request(target=b"/reading"))
        head = await reading.read_head()
        body = reading.iter_body(head)
        assert await anext(body) == b"half"
        await origin.wait_requests(2)
        tunnel.client.send_signal(signal.SIGINT)
        if patience == "two-signals-at-once":
            tunnel.client.send_signal(signal.SIGTERM)
        await tunnel.client.stderr_line("finishing what still runs (2)")
        if patience == "impatient":
            tunnel.client.send_signal(signal.SIGINT)
        began = time.monotonic()
        got = await waiting.read_response("POST")
        assert (got.status, got.value(b"X-Pytunnel-Error")) == (502, b"link-lost")
        with pytest.raises(Truncated):
            await anext(body)
        seconds = time.monotonic() - began
        print(f"\n{patience}: ended after {seconds:.2f} s")
        assert seconds < (9 if patience == "patient" else 3), "neither the grace nor, when told twice, GOODBYE"
        assert await tunnel.client.wait() == 0
        assert len(origin.requests) == 2
