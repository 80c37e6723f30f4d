"""WebSockets and other upgrades through the tunnel: after the 101 a pipe of bytes that nobody on the way understands.

Some tests use aiohttp at both ends, as applications do; those about bytes use none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from support import (
    Header,
    PatternChecker,
    RawRequest,
    RawVisitor,
    Truncated,
    Tunnel,
    pattern,
    reset,
    response,
)
from test_fidelity import (
    CLOSE,
    HOST,
    Play,
    answering,
    assert_quiet,
    assert_untouched,
    forwarded,
    head,
    problem,
    served,
    without_date,
)

import pytunnel
from pytunnel import ErrorCode

KiB = 1024
MiB = 1024 * KiB
STEP = 5.0  # seconds in which what is said on one side must be heard on the other; it takes a millisecond

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter

# ---------------------------------------------------------------------------------------- With aiohttp

Talk = Callable[[web.WebSocketResponse, web.Request], Awaitable[None]]


class Both:
    """A tunnel to an aiohttp application that talks WebSocket at every path, and an aiohttp visitor."""

    def __init__(self, tunnel: Tunnel, session: aiohttp.ClientSession) -> None:
        self.tunnel, self.session = tunnel, session
        self.handshakes: list[web.Request] = []
        self.errors: list[BaseException] = []

    async def connect(self, path: str = "/", **options: Any) -> aiohttp.ClientWebSocketResponse:
        """The visitor's end of a new WebSocket."""
        headers = {"Host": f"{self.tunnel.host.decode()}:{self.tunnel.port}", **options.pop("headers", {})}
        url = f"http://127.0.0.1:{self.tunnel.port}{path}"
        async with asyncio.timeout(STEP):
            return await self.session.ws_connect(url, headers=headers, max_msg_size=0, **options)


@contextlib.asynccontextmanager
async def talking(talk: Talk, **options: Any) -> AsyncIterator[Both]:
    """Serve WebSockets with `talk`; what it raises is raised again at the end."""
    both: Both

    async def handle(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(max_msg_size=0, **options)
        await ws.prepare(request)
        both.handshakes.append(request)
        try:
            await talk(ws, request)
        except BaseException as error:
            both.errors.append(error)
            raise
        return ws

    runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0.1)  # type: ignore[arg-type]
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        async with Tunnel(port) as tunnel, aiohttp.ClientSession() as session:
            both = Both(tunnel, session)
            yield both
            assert_quiet(tunnel.server)
            assert_quiet(tunnel.client)
    finally:
        await runner.cleanup()
    assert both.errors == []


async def echo(ws: web.WebSocketResponse, request: web.Request) -> None:
    async for message in ws:
        if message.type is aiohttp.WSMsgType.TEXT:
            await ws.send_str(message.data)
        else:
            await ws.send_bytes(message.data)


MESSAGES: list[str | bytes] = [
    "", b"", "a", b"\0", "žluťoučký kůň 🐎", bytes(range(256)), "x" * 125, "x" * 126, b"y" * 65535, b"y" * 65536,
    "z" * MiB, pattern(0, MiB), pattern(7, 16 * MiB),
]  # fmt: skip


@pytest.mark.parametrize("compress", [0, 15], ids=["plain", "deflate"])
async def test_messages_of_every_size_come_back(compress: int) -> None:
    """With permessage-deflate the two ends have agreed on it; nobody on the way unpacks anything."""
    async with talking(echo, compress=bool(compress)) as both, await both.connect(compress=compress) as ws:
        assert ws.compress == compress
        for message in MESSAGES[: -1 if compress else None]:
            sent = ws.send_str(message) if isinstance(message, str) else ws.send_bytes(message)
            async with asyncio.timeout(2 * STEP):
                got, _ = await asyncio.gather(ws.receive(), sent)
            assert type(got.data) is type(message)
            assert got.data == message


async def test_many_messages_keep_their_order_both_ways() -> None:
    count = 2000

    async def chat(ws: web.WebSocketResponse, request: web.Request) -> None:
        async def talk() -> None:
            for number in range(count):
                await ws.send_str(f"s{number}")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(talk())
            for number in range(count):
                assert await ws.receive_str() == f"v{number}"
        await ws.send_str("done")

    async with talking(chat) as both, await both.connect() as ws, asyncio.timeout(4 * STEP):

        async def talk() -> None:
            for number in range(count):
                await ws.send_str(f"v{number}")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(talk())
            for number in range(count):
                assert await ws.receive_str() == f"s{number}"
        assert await ws.receive_str() == "done"


CLOSES = [(1000, ""), (1000, "bye"), (1001, "going away"), (3000, "čau"), (4999, "r" * 123)]


async def test_close_codes_and_reasons_arrive(subtests: pytest.Subtests) -> None:
    heard: asyncio.Queue[tuple[int, str]] = asyncio.Queue()

    async def close(ws: web.WebSocketResponse, request: web.Request) -> None:
        if request.path == "/visitor":
            message = await ws.receive()
            assert message.type is aiohttp.WSMsgType.CLOSE
            heard.put_nowait((message.data, message.extra or ""))
        else:
            code, reason = CLOSES[int(request.path[1:])]
            await ws.close(code=code, message=reason.encode())

    async with talking(close) as both, asyncio.timeout(4 * STEP):
        for number, (code, reason) in enumerate(CLOSES):
            with subtests.test(f"{code} {reason[:10]} by the visitor"):
                async with await both.connect("/visitor") as ws:
                    await ws.close(code=code, message=reason.encode())
                assert await heard.get() == (code, reason)
            with subtests.test(f"{code} {reason[:10]} by the service"):
                async with await both.connect(f"/{number}") as ws:
                    message = await ws.receive()
                assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, code)
                assert (message.extra or "") == reason


async def test_the_service_chooses_the_subprotocol() -> None:
    async with talking(echo, protocols=("second", "third")) as both:
        async with await both.connect(protocols=("first", "second", "third"), origin="http://elsewhere") as ws:
            assert ws.protocol == "second"
            await ws.send_str("x")
            assert await ws.receive_str(timeout=STEP) == "x"
        (handshake,) = both.handshakes
        assert handshake.headers["Sec-WebSocket-Protocol"] == "first,second,third"
        assert handshake.headers["Origin"] == "http://elsewhere"
        assert handshake.host == f"web.localhost:{both.tunnel.port}"


@pytest.mark.parametrize("who", ["visitor", "service"])
async def test_a_lost_connection_is_lost_for_the_other_end(who: str) -> None:
    """Without a close frame the other end sees 1006, as it would without a tunnel."""
    lost: asyncio.Queue[int | None] = asyncio.Queue()

    async def talk(ws: web.WebSocketResponse, request: web.Request) -> None:
        await ws.send_str("hello")
        if who == "service":
            assert request.transport is not None
            request.transport.abort()
        else:
            await ws.receive()
            lost.put_nowait(ws.close_code)

    async with talking(talk) as both, asyncio.timeout(2 * STEP):
        ws = await both.connect()
        assert await ws.receive_str() == "hello"
        if who == "service":
            assert (await ws.receive()).type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING)
            assert ws.close_code == 1006
        else:
            connection = ws._response.connection
            assert connection is not None
            assert connection.transport is not None
            connection.transport.abort()
            assert await lost.get() == 1006
        await ws.close()


# ---------------------------------------------------------------------------------------- Bytes

KEY = (b"Sec-WebSocket-Key", b"dGhlIHNhbXBsZSBub25jZQ==")
ACCEPT = (b"Sec-WebSocket-Accept", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
UPGRADE: list[Header] = [(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")]
ASKING = [*UPGRADE, KEY, (b"Sec-WebSocket-Version", b"13")]
SWITCHING = head(b"HTTP/1.1 101 Switching Protocols", *UPGRADE, ACCEPT)


def frame(opcode: int, payload: bytes, *, fin: bool = True, masked: bool = True) -> bytes:
    """One WebSocket frame (RFC 6455, 5.2)."""
    length = len(payload)
    if length < 126:
        size = bytes([length | masked << 7])
    else:
        size = bytes([126 | masked << 7]) + struct.pack(">H", length)
    start = bytes([fin << 7 | opcode]) + size
    if not masked:
        return start + payload
    mask = os.urandom(4)
    return start + mask + bytes(byte ^ mask[i & 3] for i, byte in enumerate(payload))


def piping(pipe: Play, *, start: bytes = SWITCHING) -> Play:
    """Answer with the 101, then let `pipe` have the connection, and close it."""

    async def play(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(start)
        await pipe(request, reader, writer)
        writer.close()

    return play


async def loop_back(_: RawRequest, reader: Reader, writer: Writer) -> None:
    while data := await reader.read(64 * KiB):
        writer.write(data)
        await writer.drain()


async def upgraded(
    visitor: RawVisitor, tunnel: Tunnel, target: bytes = b"/", fields: Iterable[Header] = ASKING
) -> None:
    """Take the visitor through the handshake."""
    await visitor.send(tunnel.request(target=target, headers=fields))
    got = await visitor.read_head()
    assert got.status == 101, got.head


async def test_the_handshake_is_passed_on_whole() -> None:
    asked = [
        (b"sec-websocket-extensions", b'permessage-deflate; client_max_window_bits, x-other;a="b c"'),
        (b"Sec-WebSocket-Protocol", b"a, b"),
        (b"Sec-WebSocket-Protocol", b"c"),
        (b"Cookie", b"session=1"),
        (b"Origin", b"http://web.localhost"),
        KEY,
        (b"SEC-WEBSOCKET-VERSION", b"13"),
    ]
    answered = [
        (b"Sec-WebSocket-Extensions", b"permessage-deflate;server_no_context_takeover ; client_max_window_bits=10"),
        (b"sec-websocket-protocol", b"c"),
        ACCEPT,
        (b"Set-Cookie", b"a=1"),
        (b"Set-Cookie", b"b=2"),
    ]
    hop = [(b"Connection", b"keep-alive, upgrade, X-Hop"), (b"X-Hop", b"1"), (b"Keep-Alive", b"1")]
    upgrade, connection = (b"UPGRADE", b"WebSocket"), (b"Connection", b"Upgrade")
    start = head(b"HTTP/1.1 101 Whatever", *hop, (b"uPgrade", b"websocket"), *answered)
    async with served(piping(loop_back, start=start)) as (origin, tunnel), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request(target=b"/chat?x=%zz", headers=[upgrade, *hop, *asked]))
        got = await visitor.read_head()
        seen = origin.requests[0]
        assert seen.head == head(b"GET /chat?x=%zz HTTP/1.1", HOST, upgrade, *asked, *forwarded(), connection)
        assert got.head == head(b"HTTP/1.1 101 Whatever", (b"uPgrade", b"websocket"), *answered, connection)


async def test_frames_are_not_touched() -> None:
    """Fragments, pings between them, reserved bits and opcodes, wrong masks: the ends know what these mean."""
    visitor_says = [
        frame(1, b"first", fin=False),
        frame(9, b"ping in between"),
        *[frame(0, bytes([i & 255]) * (i % 200), fin=False) for i in range(1000)],
        frame(0, b"last"),
        frame(10, b"unasked pong"),
        b"\xf3" + frame(2, b"reserved bits")[1:],
        frame(0xB, b"reserved opcode"),
        frame(1, b"not masked", masked=False),
        frame(2, b"", fin=True),
        frame(1, b"\xff\xfe not UTF-8"),
        b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff a length beyond everything",
    ]
    service_says = [frame(9, b"p", masked=False), frame(2, pattern(0, 60_000), masked=False), b"\x00" * 50]
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def talk(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(b"".join(service_says))
        heard.put_nowait(await reader.readexactly(sum(map(len, visitor_says))))

    async with served(piping(talk)) as (_, tunnel), tunnel.visitor(timeout=STEP) as visitor:
        await upgraded(visitor, tunnel)
        for piece in visitor_says:
            await visitor.send(piece)
        async with asyncio.timeout(STEP):
            assert await heard.get() == b"".join(visitor_says)
        assert await visitor.read_until_close() == b"".join(service_says)
        assert visitor.ended == "fin"


async def test_every_piece_is_passed_on_at_once() -> None:
    """In lock-step: a byte there, a byte back."""
    async with served(piping(loop_back)) as (_, tunnel), tunnel.visitor(timeout=STEP) as visitor:
        await upgraded(visitor, tunnel)
        for number in range(256):
            await visitor.send(bytes([number]))
            assert await visitor.read_exactly(1) == bytes([number])


OTHER: list[Header] = [(b"Connection", b"Upgrade"), (b"Upgrade", b"foo/1")]
LIKE_HTTP = b"GET /smuggled HTTP/1.1\r\nHost: web.localhost\r\n\r\n"


async def test_any_protocol_is_a_pipe(subtests: pytest.Subtests) -> None:
    """The service's first bytes come with its 101, the visitor's at once, and both look like HTTP."""
    first = response(b"not a response") + b"\r\n\r\n0\r\n\r\n\xff\0"
    protocols = (b"websocket", b"foo/1", b"tcp", b"TLS/1.0", b"foo, bar/2")
    asked = {b"/%d" % i: [(b"Upgrade", p), (b"Connection", b"Upgrade")] for i, p in enumerate(protocols)}
    answers: dict[bytes, bytes | Play] = {
        target: piping(loop_back, start=head(b"HTTP/1.1 101 Switching Protocols", *fields) + first)
        for target, fields in asked.items()
    }
    async with served(answering(answers)) as (origin, tunnel):
        for target, fields in asked.items():
            with subtests.test(fields[0][1].decode()):
                async with tunnel.visitor(timeout=STEP) as visitor:
                    await upgraded(visitor, tunnel, target, fields)
                    assert origin.requests[-1].headers[1:2] == fields[:1]
                    assert await visitor.read_exactly(len(first)) == first
                    post = b"POST / HTTP/1.1\r\nContent-Length: 9\r\n"
                    for sent in (LIKE_HTTP, b"\r\n", b"\0\xff" * 1000, LIKE_HTTP * 2000, post):
                        await visitor.send(sent)
                        assert await visitor.read_exactly(len(sent)) == sent
                await assert_untouched(origin, tunnel, target)


async def test_bytes_sent_before_the_101_are_the_pipes() -> None:
    """A visitor that knows what it will get may not wait for the answer."""
    async with (
        served(answering({b"/pipe": piping(loop_back)})) as (origin, tunnel),
        tunnel.visitor(timeout=STEP) as visitor,
    ):
        await visitor.send(tunnel.request(target=b"/pipe", headers=ASKING) + frame(1, b"early") + LIKE_HTTP)
        assert (await visitor.read_head()).status == 101
        got = await visitor.read_until(LIKE_HTTP)
        assert len(got) == len(frame(1, b"early") + LIKE_HTTP)
        await assert_untouched(origin, tunnel, b"/pipe")


async def test_a_pipe_carries_much_both_ways_at_once() -> None:
    size = 24 * MiB

    async def push(_: RawRequest, reader: Reader, writer: Writer) -> None:
        async def take() -> None:
            checker = PatternChecker()
            while checker.offset < size:
                checker.feed(await reader.read(64 * KiB))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(take())
            for offset in range(0, size, 256 * KiB):
                writer.write(pattern(offset, 256 * KiB))
                await writer.drain()

    async with served(piping(push), record_limit=0) as (_, tunnel), tunnel.visitor() as visitor:
        await upgraded(visitor, tunnel)

        async def send() -> None:
            for offset in range(0, size, 256 * KiB):
                await visitor.send(pattern(offset, 256 * KiB))

        checker = PatternChecker()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send())
            while checker.offset < size:
                checker.feed(await visitor.read_some())
        assert await visitor.read_until_close() == b""


@pytest.mark.parametrize("stalled", [True, False])
async def test_what_a_visitor_sent_before_it_left_is_waited_for_but_not_for_ever(
    stalled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is behind bytes that the local service does not take would never come: a reset does not wait for them."""
    monkeypatch.setattr(pytunnel, "LINGER", 0.05)
    resets: list[tuple[ErrorCode, bool]] = []
    reading = asyncio.Event()

    class Silent:
        async def read(self) -> bytes:
            reading.set()
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

        def abort(self, code: ErrorCode, reason: str = "", *, flush: bool = False) -> None:
            resets.append((code, flush))

    upload = asyncio.get_running_loop().create_future()
    if not stalled:
        upload.set_result(None)
    visitor: Any = object.__new__(pytunnel.Visitor)
    piping = asyncio.ensure_future(visitor._pipe(Silent(), upload))
    await reading.wait()
    piping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await piping
    assert resets == [(ErrorCode.CANCEL, False) if stalled else (ErrorCode.NO_ERROR, True)]


async def test_a_stalled_pipe_holds_the_sender_back_and_nobody_else(subtests: pytest.Subtests) -> None:
    """Who does not read makes the other side wait; when it reads, every byte is there."""
    # At most 16 MiB are in the session's windows, the rest of the bound is what kernels take; seen: 6 to 13 MiB.
    size, bound = 64 * MiB, 32 * MiB
    written, release = 0, asyncio.Event()
    checker = PatternChecker()

    async def push(_: RawRequest, reader: Reader, writer: Writer) -> None:
        nonlocal written
        for _ in range(0, size, 64 * KiB):
            writer.write(pattern(written, 64 * KiB))
            await writer.drain()
            written += 64 * KiB

    async def pull(_: RawRequest, reader: Reader, writer: Writer) -> None:
        await release.wait()
        while checker.offset < size:
            checker.feed(await reader.read(64 * KiB))
        writer.write(b"done")

    async def assert_blocked(tunnel: Tunnel) -> None:
        unchanged = 0
        for _ in range(1000):
            before = written
            assert (await tunnel.get(b"/other")).body == b"real"
            unchanged = unchanged + 1 if before == written > 0 else 0
            if unchanged == 20:
                break
        assert unchanged == 20, f"not blocked after {written} bytes"
        assert written < bound

    answers: dict[bytes, bytes | Play] = {b"/push": piping(push), b"/pull": piping(pull)}
    options = {"sndbuf": 128 * KiB, "rcvbuf": 128 * KiB, "limit": 64 * KiB}
    async with served(answering(answers), **options) as (_, tunnel):
        with subtests.test("the visitor does not read"):
            async with tunnel.visitor(rcvbuf=128 * KiB) as visitor:
                await upgraded(visitor, tunnel, b"/push")
                await assert_blocked(tunnel)
                reading = PatternChecker()
                while reading.offset < size:
                    reading.feed(await visitor.read_some())
                assert await visitor.read_until_close() == b""
        with subtests.test("the service does not read"):
            written = 0
            async with tunnel.visitor(sndbuf=256 * KiB, timeout=60) as visitor:
                await upgraded(visitor, tunnel, b"/pull")

                async def send() -> None:
                    nonlocal written
                    for _ in range(0, size, 64 * KiB):
                        await visitor.send(pattern(written, 64 * KiB))
                        written += 64 * KiB

                sending = asyncio.create_task(send())
                await assert_blocked(tunnel)
                release.set()
                await sending
                assert await visitor.read_until_close() == b"done"


# ---------------------------------------------------------------------------------------- Ends


async def test_the_local_service_sees_the_visitor_go(subtests: pytest.Subtests) -> None:
    async with served(piping(loop_back)) as (origin, tunnel):
        for how in ("abort", "close", "write_eof"):
            with subtests.test(how):
                async with tunnel.visitor(timeout=STEP) as visitor:
                    await upgraded(visitor, tunnel)
                    await visitor.send(b"x")
                    assert await visitor.read_exactly(1) == b"x"
                    assert origin.open_connections == 1
                    getattr(visitor, how)()
                    await origin.wait_for(lambda: not origin.open_connections, STEP)
                    if how == "write_eof":
                        assert await visitor.read_until_close() == b""


async def test_the_visitor_sees_the_local_service_go(subtests: pytest.Subtests) -> None:
    visitor_done = asyncio.Event()

    async def leave(request: RawRequest, reader: Reader, writer: Writer) -> None:
        assert await reader.readexactly(1) == b"x"
        if request.target == b"/reset":
            reset(writer)
        elif request.target == b"/half":
            writer.write_eof()
            await visitor_done.wait()

    async with served(piping(leave)) as (_, tunnel):
        for target in (b"/reset", b"/close", b"/half"):
            with subtests.test(target.decode()):
                async with tunnel.visitor(timeout=STEP) as visitor:
                    await upgraded(visitor, tunnel, target)
                    await visitor.send(b"x")
                    assert await visitor.read_until_close() == b""
                visitor_done.set()


async def test_last_words_are_heard(subtests: pytest.Subtests) -> None:
    """What was said right before a FIN arrives in whole: it may be the close frame."""
    words = pattern(0, 3 * MiB) + frame(8, struct.pack(">H", 3000) + b"bye")

    async def speak(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(words)
        await writer.drain()

    async def listen(_: RawRequest, reader: Reader, writer: Writer) -> None:
        await reader.read()

    answers: dict[bytes, bytes | Play] = {b"/speak": piping(speak), b"/listen": piping(listen)}
    async with served(answering(answers)) as (origin, tunnel):
        with subtests.test("by the service"):
            async with tunnel.visitor(timeout=STEP) as visitor:
                await upgraded(visitor, tunnel, b"/speak")
                assert await visitor.read_until_close() == words
                assert visitor.ended == "fin"
        for how in ("close", "write_eof"):
            with subtests.test(f"by the visitor, {how}"):
                origin.requests.clear()
                async with tunnel.visitor(timeout=STEP) as visitor:
                    await upgraded(visitor, tunnel, b"/listen")
                    connection = origin.connections[origin.requests[0].connection]
                    await visitor.send(words)
                    getattr(visitor, how)()
                    await origin.wait_for(lambda c=connection: not c.open, STEP, "the end of the pipe")
                    assert bytes(connection).partition(b"\r\n\r\n")[2] == words


async def test_a_close_frame_without_a_code_stays_without_one() -> None:
    closes = {False: frame(8, b"", masked=False), True: frame(8, b"")}

    async def answer(_: RawRequest, reader: Reader, writer: Writer) -> None:
        assert await reader.readexactly(len(closes[True])) == closes[True]
        writer.write(closes[False])

    async with served(piping(answer)) as (_, tunnel), tunnel.visitor(timeout=STEP) as visitor:
        await upgraded(visitor, tunnel)
        await visitor.send(closes[True])
        assert await visitor.read_until_close() == closes[False]
        assert visitor.ended == "fin"


@pytest.mark.parametrize("takeover", [True, False], ids=["one context", "a context each"])
async def test_compressed_messages_are_the_two_ends_business(takeover: bool) -> None:
    """With context takeover a message can only be read by who has read all before it, in the same order."""

    def packer() -> tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]:
        deflate, inflate = zlib.compressobj(wbits=-15), zlib.decompressobj(wbits=-15)

        def pack(data: bytes) -> bytes:
            nonlocal deflate
            if not takeover:
                deflate = zlib.compressobj(wbits=-15)
            return (deflate.compress(data) + deflate.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\0\0\xff\xff")

        def unpack(data: bytes) -> bytes:
            nonlocal inflate
            if not takeover:
                inflate = zlib.decompressobj(wbits=-15)
            return inflate.decompress(data + b"\0\0\xff\xff")

        return pack, unpack

    async def next_message(read: Callable[[int], Awaitable[bytes]]) -> bytes:
        start = await read(2)
        assert start[0] == 0xC1, "a whole text message, compressed (RFC 7692, 6)"
        length = start[1] & 127
        length = struct.unpack(">H", await read(2))[0] if length == 126 else length
        mask = await read(4) if start[1] & 128 else bytes(4)
        return bytes(byte ^ mask[i & 3] for i, byte in enumerate(await read(length)))

    def message(data: bytes, *, masked: bool) -> bytes:
        return b"\xc1" + frame(1, data, masked=masked)[1:]

    async def shout(_: RawRequest, reader: Reader, writer: Writer) -> None:
        pack, unpack = packer()
        for _ in texts:
            said = unpack(await next_message(reader.readexactly))
            writer.write(message(pack(said.upper()), masked=False))

    texts = [b"the same words again, number %d" % (i // 2) * (1 + i * 10) for i in range(40)]
    terms = b"permessage-deflate" + b"; server_no_context_takeover; client_no_context_takeover" * (not takeover)
    start = head(b"HTTP/1.1 101 Switching Protocols", *UPGRADE, ACCEPT, (b"Sec-WebSocket-Extensions", terms))
    async with served(piping(shout, start=start)) as (_, tunnel), tunnel.visitor(timeout=STEP) as visitor:
        await upgraded(visitor, tunnel, fields=[*ASKING, (b"Sec-WebSocket-Extensions", terms)])
        pack, unpack = packer()
        for text in texts:
            await visitor.send(message(pack(text), masked=True))
            assert unpack(await next_message(visitor.read_exactly)) == text.upper()


# ---------------------------------------------------------------------------------------- No upgrade


async def test_a_refused_upgrade_is_an_ordinary_response(subtests: pytest.Subtests) -> None:
    refusals = {
        b"/200": (b"HTTP/1.1 200 OK", []),
        b"/401": (b"HTTP/1.1 401 Unauthorized", [(b"WWW-Authenticate", b"Basic")]),
        b"/403": (b"HTTP/1.1 403 Forbidden", []),
        b"/426": (b"HTTP/1.1 426 Upgrade Required", [(b"Sec-WebSocket-Version", b"13")]),
    }
    length = (b"Content-Length", b"5")
    answers: dict[bytes, bytes | Play] = {t: head(s, *fields, length) + b"sorry" for t, (s, fields) in refusals.items()}
    async with served(answering(answers)) as (origin, tunnel), tunnel.visitor(timeout=STEP) as visitor:
        for fields in (ASKING, OTHER):
            for target, (start, kept) in refusals.items():
                with subtests.test(f"{target.decode()} {dict(fields)[b'Upgrade'].decode()}"):
                    await visitor.send(tunnel.request(target=target, headers=fields))
                    got = await visitor.read_response()
                    hop = [(b"Connection", b"Upgrade")] if target == b"/426" else []
                    assert without_date(got) == head(start, *kept, length, *hop)
                    assert got.body == b"sorry"
                    await visitor.send(tunnel.request(target=b"/next"))
                    assert (await visitor.read_response()).body == b"real"
                    assert not origin.requests[-1].values(b"upgrade")


async def test_a_101_that_does_not_fit_the_handshake_is_a_502(subtests: pytest.Subtests) -> None:
    """RFC 6455, 4.1, has the visitor refuse it; here the developer is told, and the connection is no pipe."""
    wrong = {
        b"/missing": [],
        b"/other": [(ACCEPT[0], b"s3pPLMBiTxaQ9kYGzzhZRbK+xOO=")],
        b"/key": [(ACCEPT[0], KEY[1])],
        b"/empty": [(ACCEPT[0], b"")],
        b"/case": [(ACCEPT[0], ACCEPT[1].lower())],
        b"/twice": [ACCEPT, ACCEPT],
    }
    starts = {target: head(b"HTTP/1.1 101 Switching Protocols", *UPGRADE, *fields) for target, fields in wrong.items()}
    answers: dict[bytes, bytes | Play] = {target: piping(loop_back, start=start) for target, start in starts.items()}
    async with served(answering(answers)) as (origin, tunnel), tunnel.visitor(timeout=STEP) as visitor:
        for target in answers:
            with subtests.test(target.decode()):
                await visitor.send(tunnel.request(target=target, headers=ASKING))
                got = await visitor.read_response()
                assert problem(got) == (502, b"local-invalid")
                assert not got.values(b"upgrade")
                seen = next(seen for seen in origin.requests if seen.target == target)
                await origin.wait_for(lambda seen=seen: not origin.connections[seen.connection].open)
                await visitor.send(tunnel.request(target=b"/next"))
                assert (await visitor.read_response()).body == b"real"


async def test_an_upgrade_that_fails_is_a_502(subtests: pytest.Subtests) -> None:
    async def break_off(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.close()

    answers: dict[bytes, bytes | Play] = {b"/broken": break_off, b"/invalid": b"HTTP/1.1 1O1 x\r\n\r\n"}
    async with served(answering(answers)) as (origin, tunnel):
        for target, code in {b"/broken": b"local-reset", b"/invalid": b"local-invalid"}.items():
            with subtests.test(code.decode()):
                assert problem(await tunnel.get(target, ASKING)) == (502, code)
        with subtests.test("local-refused"):
            await origin.aclose()
            assert problem(await tunnel.get(b"/", ASKING)) == (502, b"local-refused")


async def test_h2c_is_never_forwarded(subtests: pytest.Subtests) -> None:
    """It would let a visitor talk past every check (and past the tunnel's framing) on the local connection."""
    settings = (b"HTTP2-Settings", b"AAMAAABkAARAAAAAAAIAAAAA")
    async with served(response(b"real"), read_body=True) as (origin, tunnel), tunnel.visitor(timeout=STEP) as visitor:
        for fields in (
            [(b"Connection", b"Upgrade, HTTP2-Settings"), (b"Upgrade", b"h2c"), settings],
            [(b"Connection", b"Upgrade"), (b"Upgrade", b"h2c"), settings],
            [(b"Connection", b"upgrade"), (b"Upgrade", b"H2C")],
            [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket, h2c"), settings],
            [(b"Connection", b"Upgrade"), (b"Upgrade", b"foo"), (b"Upgrade", b"h2c")],
            [(b"Upgrade", b"websocket")],  # and what Connection does not name is for nobody
        ):
            with subtests.test(f"{fields}"):
                await visitor.send(tunnel.request(headers=fields))
                assert (await visitor.read_response()).body == b"real"
                assert origin.requests[-1].head == head(b"GET / HTTP/1.1", HOST, *forwarded())
                await visitor.send(tunnel.request("POST", headers=fields, body=b"a form"))  # as curl --http2 does
                assert (await visitor.read_response()).body == b"real"
                length = (b"Content-Length", b"6")
                assert origin.requests[-1].head == head(b"POST / HTTP/1.1", HOST, length, *forwarded())
                assert origin.requests[-1].body == b"a form"


async def test_an_upgrade_is_for_a_request_without_content() -> None:
    """What came after the head would be content for one side and the pipe's first bytes for the other."""
    async with served(response(b"real")) as (origin, tunnel):
        for extra in ((b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked")):
            async with tunnel.visitor(timeout=STEP) as visitor:
                await visitor.send(tunnel.request("POST", headers=[*ASKING, extra]))
                assert (await visitor.read_response()).status == 400
            await assert_untouched(origin, tunnel)


async def test_an_upgrade_under_http_1_0_is_none() -> None:
    async with served(response(b"real")) as (origin, tunnel), tunnel.visitor(timeout=STEP) as visitor:
        await visitor.send(head(b"GET / HTTP/1.0", HOST, *UPGRADE))
        assert (await visitor.read_response()).body == b"real"
        assert not origin.requests[-1].values(b"upgrade")


async def test_a_cut_before_the_101_is_whole_is_no_upgrade() -> None:
    async def half(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(SWITCHING[:-2])
        writer.close()

    async with served(half) as (_, tunnel), tunnel.visitor(timeout=STEP) as visitor:
        await visitor.send(tunnel.request(headers=[*ASKING, CLOSE]))
        with contextlib.suppress(Truncated):
            assert problem(await visitor.read_response()) == (502, b"local-reset")
