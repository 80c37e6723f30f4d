"""Peers that break the protocol, towards a session and towards real processes: a hostile client, a hostile server.

The rule: the connection ends within a second with a GOAWAY that says why and close code 1002, and the session with it;
or the frame is ignored. In both cases nothing else notices, memory stays bounded, and nothing looks like a traceback.
Both hostile ends are made of pytunnel's own pure functions; much of what they say is in test_session's HOSTILE.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import test_session
from aiohttp import web
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support import (
    Process,
    RawOrigin,
    RawRequest,
    RawVisitor,
    Tunnel,
    WaitFailed,
    eventually,
    request,
    response,
    with_limits,
)
from test_security import TOKEN, Peer, assert_calm, dialled, for_each

import pytunnel
from pytunnel import (
    END,
    FIRST_EXTENSION,
    INITIAL_WINDOW,
    ITERATIONS,
    LINK_PATH,
    MAX_CONTROL,
    MAX_DATA,
    MAX_FIELD,
    MAX_FIELDS,
    MAX_FRAMES,
    MAX_HEAD,
    MAX_HELLO,
    MAX_INTERIM,
    MAX_MESSAGE,
    MAX_PENDING,
    MAX_STREAMS,
    MAX_UNACKED_FRAMES,
    OPEN_HEADER,
    SUBPROTOCOL,
    ErrorCode,
    Frame,
    FrameDecoder,
    FrameType,
    Kind,
    Link,
    Message,
    ProtocolError,
    Session,
    Stream,
    StreamReset,
    Verifier,
    decode_reason,
    encode_frame,
    encode_message,
)

MiB = 1024 * 1024
SMALL = test_session.SMALL  # bytes of the window that a hostile peer grants
Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter

PROTOCOL, SIZE, FLOW = ErrorCode.PROTOCOL, ErrorCode.FRAME_SIZE, ErrorCode.FLOW_CONTROL
head, data, open_, reset, window = (
    test_session.head, test_session.data, test_session.open_, test_session.reset, test_session.window,
)  # fmt: skip
WINDOW = 4096  # bytes, of a stream, so small that what fills it is read in one go
FULL = data(1, bytes(WINDOW))

# What is wrong with one message, or the frame in it: name -> the message, what the error is called
MALFORMED: dict[str, tuple[str | bytes, ErrorCode]] = {
    "text_message": ("hello", PROTOCOL),
    "empty_message": (b"", PROTOCOL),
    "part_of_a_header": (window()[:5], PROTOCOL),
    "truncated_frame": (window()[:-1], PROTOCOL),
    "trailing_garbage": (window() + b"\0", PROTOCOL),
    "noise": (b"\xa5" * 1000, PROTOCOL),
    "unknown_type": (encode_frame(77, 0, 0), PROTOCOL),
    "last_type_before_extensions": (encode_frame(FIRST_EXTENSION - 1, 0, 0), PROTOCOL),
    "long_extension": (encode_frame(FIRST_EXTENSION, 0, 0, bytes(MAX_CONTROL + 1)), PROTOCOL),
    "unknown_flag": (data(1, b"x", 0x80), PROTOCOL),
    "end_on_a_reset": (encode_frame(FrameType.RESET, END, 1, bytes(2)), PROTOCOL),
    "stream_zero": (data(0), PROTOCOL),
    "ping_on_a_stream": (encode_frame(FrameType.PING, 0, 1, bytes(8)), PROTOCOL),
    "stream_id_of_32_bits": (encode_frame(FrameType.DATA, 0, 2**31, b"x"), PROTOCOL),
    "control_too_long": (encode_frame(FrameType.RESET, 0, 1, bytes(MAX_CONTROL + 1)), SIZE),
    "goaway_without_code": (encode_frame(FrameType.GOAWAY, 0, 0), SIZE),
    "short_window": (encode_frame(FrameType.WINDOW, 0, 1, b"\1"), SIZE),
    "empty_head": (encode_frame(FrameType.HEAD, 0, 1), SIZE),
    "head_too_long": (encode_frame(FrameType.HEAD, 0, 1, bytes(MAX_HEAD + 1)), SIZE),
    "data_too_long": (encode_frame(FrameType.DATA, 0, 1, bytes(MAX_DATA + 1)), SIZE),
    "frame_of_16_mib": (bytes.fromhex("ffffff 00 00 00000001"), SIZE),
}
# Who is attacked, with stream 1 open and both its directions, by what
BROKEN: dict[str, tuple[str, str | bytes, ErrorCode]] = {
    **{name: case for name, case in test_session.HOSTILE.items() if "past_window" not in name},
    "data_past_window": ("client", FULL + data(), FLOW),
    "data_past_window_with_end": ("client", FULL + data(1, b"x", END), FLOW),
    "first_data_past_window": ("client", open_(2) + data(2, bytes(WINDOW)) + data(2), FLOW),
    "response_past_window": ("server", head() + FULL + data(), FLOW),
    "open_without_a_head": ("client", encode_frame(FrameType.OPEN, 0, 2, bytes(6)), SIZE),
    **{f"{name}_to_the_{role}": (role, *case) for name, case in MALFORMED.items() for role in ("server", "client")},
}


def assert_bounded(before: int, process: Process, limit: int = 24 * MiB) -> None:
    grown = process.rss() - before
    assert grown < limit, f"{grown / MiB:.1f} MiB"


async def last_words(peer: Peer) -> tuple[ErrorCode, str, int | None]:
    """Return the code and reason of the other side's GOAWAY, and its close code; all that comes within a second."""
    code, reason, frames = ErrorCode.NO_ERROR, "", FrameDecoder()
    async with asyncio.timeout(5):  # a second, on a machine that has nothing else to do
        while (message := await peer.ws.receive()).type is aiohttp.WSMsgType.BINARY:
            for frame in frames.feed(message.data):
                if frame.type == FrameType.GOAWAY:
                    code, reason = decode_reason(frame.payload)
    assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED), message
    return code, reason, peer.ws.close_code


async def say(peer: Peer, message: str | bytes) -> None:
    await (peer.ws.send_str(message) if isinstance(message, str) else peer.ws.send_bytes(message))


# ---------------------------------------------------------------------------------------- A hostile client


@contextlib.asynccontextmanager
async def linked(port: int, **fields: Any) -> AsyncIterator[Peer]:
    """A client of our own making, with a tunnel and these fields in its hello."""
    async with dialled(port) as peer:
        await peer.shake_hands(tunnels=["hostile"], **fields)
        yield peer


@contextlib.asynccontextmanager
async def hostile_client(port: int, **fields: Any) -> AsyncIterator[tuple[Peer, RawVisitor]]:
    """A client that has stream 1, and the visitor whose request it is, which has not ended."""
    async with linked(port, **fields) as peer, RawVisitor(port) as visitor:
        await visitor.send(b"POST / HTTP/1.1\r\nHost: hostile.localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert (await peer.opened())[0] == 1
        yield peer, visitor


@contextlib.asynccontextmanager
async def honest_tunnel(*words: str, **limits: float) -> AsyncIterator[tuple[Tunnel, Callable[[], Awaitable[None]]]]:
    """A tunnel that hostile clients share the server with, and a check that it has not noticed anything.

    `words` are for `serve`.
    """
    release, served = asyncio.Event(), b"honest" * 1000

    async def serve(head: RawRequest, reader: Reader, writer: Writer) -> None:
        if head.target == b"/quick":
            writer.write(response(b"quick"))
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(served) + served[:10])
        await release.wait()
        writer.write(served[10:])

    command = with_limits(**limits) if limits else None
    async with (
        RawOrigin(serve) as origin,
        Tunnel(origin.port, command=command, serve_args=words) as tunnel,
        tunnel.visitor() as slow,
    ):
        await slow.send(tunnel.request())
        begun = await slow.read_head()

        async def check() -> None:
            assert (await tunnel.get(b"/quick")).body == b"quick"
            assert {event["event"] for event in tunnel.client.events} <= {"request"}, "its link was lost"
            assert tunnel.client.returncode is None
            assert_calm(tunnel.server)

        yield tunnel, check
        await check()
        release.set()  # what ran all the time has its end, too
        assert b"".join([piece async for piece in slow.iter_body(begun)]) == served


async def test_a_client_that_breaks_the_protocol_is_told_so_and_cut() -> None:
    cases = {name: case[1:] for name, case in BROKEN.items() if case[0] == "server"}
    async with honest_tunnel(INITIAL_WINDOW=WINDOW) as (tunnel, check):

        async def attack(name: str) -> None:
            message, code = cases[name]
            async with hostile_client(tunnel.port, window=SMALL) as (peer, visitor):
                await say(peer, message)
                got, reason, closed_with = await last_words(peer)
                assert (got, closed_with) == (code, aiohttp.WSCloseCode.PROTOCOL_ERROR), reason
                assert reason.isprintable() and reason
                answer = await visitor.read_response()
                assert answer.status == 502 or (answer.status, answer.clean) == (200, False)
            await tunnel.server.stderr_line("hostile: refused: ")
            await check()

        before = tunnel.server.rss()
        await for_each(cases, attack)
        assert_bounded(before, tunnel.server)


async def test_a_client_may_say_what_was_on_its_way_when_a_stream_ended() -> None:
    """And a little more: extensions, ACKs and GOAWAYs as often as it likes."""
    harmless = {name: message for name, (role, message) in test_session.IGNORED.items() if role == "server"}
    harmless["reset_twice"] = reset()
    harmless["extension"] = encode_frame(FIRST_EXTENSION, 255, 2**32 - 1, bytes(MAX_CONTROL))
    harmless["ack_again"] = test_session.ack(0) * 3
    harmless["pings_up_to_the_limit"] = test_session.ping() * pytunnel.MAX_PENDING_PONGS
    harmless["goaway_twice"] = test_session.goaway() * 2
    async with honest_tunnel() as (tunnel, check):

        async def attack(name: str) -> None:
            async with hostile_client(tunnel.port) as (peer, visitor):
                await peer.ws.send_bytes(reset())
                assert (await visitor.read_response()).status >= 400
                await peer.ws.send_bytes(harmless[name])
                await peer.synchronise()
            await check()

        await for_each(harmless, attack)


async def test_a_message_that_is_too_long_breaks_the_protocol() -> None:
    async with honest_tunnel() as (tunnel, check):
        before = tunnel.server.rss()
        async with hostile_client(tunnel.port) as (peer, _):
            with contextlib.suppress(ConnectionError):
                await peer.ws.send_bytes(encode_frame(FIRST_EXTENSION, 0, 0) * (MAX_MESSAGE // 9 + 10))
            code, reason, closed_with = await last_words(peer)
            assert (code, closed_with) == (ErrorCode.FRAME_SIZE, aiohttp.WSCloseCode.PROTOCOL_ERROR), reason
            await check()
        assert_bounded(before, tunnel.server)


FLOODS = {
    "window": window(1, 1),
    "data_for_a_closed_stream": data(1),
    "reset_of_a_closed_stream": reset(),
    "extension": encode_frame(FIRST_EXTENSION, 0, 0),
    "ack": test_session.ack(0),
    "goaway": test_session.goaway(),
}


async def test_a_flood_of_frames_that_cost_the_peer_as_much_is_taken_and_others_have_their_turn() -> None:
    """No error: the work is in proportion to what the peer sends, and nothing of it is kept."""
    async with honest_tunnel() as (tunnel, check):
        before = tunnel.server.rss()

        async def flood(name: str) -> None:
            many = FLOODS[name] * (MAX_MESSAGE // 4 // len(FLOODS[name]))
            async with hostile_client(tunnel.port) as (peer, _):
                if "closed" in name:
                    await peer.ws.send_bytes(reset())
                for _ in range(2):
                    await peer.ws.send_bytes(many)
                    await check()
                await peer.synchronise()
            assert_bounded(before, tunnel.server)

        await for_each(FLOODS, flood)


async def test_pings_are_answered_as_fast_as_they_are_read() -> None:
    async with honest_tunnel() as (tunnel, check), hostile_client(tunnel.port) as (peer, _):
        before = tunnel.server.rss()
        for _ in range(200):
            await peer.ws.send_bytes(test_session.ping() * pytunnel.MAX_PENDING_PONGS)
            for _ in range(pytunnel.MAX_PENDING_PONGS):
                await peer.frame(FrameType.PONG)
        await check()
        assert_bounded(before, tunnel.server, 8 * MiB)


async def stalled(tunnel: Tunnel, stack: contextlib.AsyncExitStack) -> Peer:
    """A hostile client that has granted much credit, and does not read what a visitor sends it."""
    peer = await stack.enter_async_context(linked(tunnel.port, window=2**31 - 1))
    transport = peer.ws.get_extra_info("socket")
    transport.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    visitor = await stack.enter_async_context(RawVisitor(tunnel.port))
    await visitor.send(b"POST / HTTP/1.1\r\nHost: hostile.localhost\r\nContent-Length: 100000000\r\n\r\n")
    await peer.opened()
    peer.ws._conn.transport.pause_reading()  # type: ignore[union-attr]

    sent: list[int] = []  # what has been sent, each time that somebody looks
    total = 0

    async def upload() -> None:
        nonlocal total
        with contextlib.suppress(ConnectionError, WaitFailed):
            while total < 30 * MiB:
                await visitor.send(bytes(64 * 1024))
                total += 64 * 1024

    def still() -> bool:
        sent.append(total)
        return total > 0 and len(sent) > 10 and len(set(sent[-10:])) == 1

    uploading = asyncio.ensure_future(upload())
    stack.push_async_callback(pytunnel.end_tasks, uploading)
    await eventually(still, 10.0, "the upload to come to rest")
    return peer


async def test_a_client_that_does_not_read_loses_its_link_and_others_notice_nothing() -> None:
    """Its visitor's upload ends with the session: until then nothing of it is read, and nobody sees them leave."""
    serving = honest_tunnel("--grace", "0.5", WRITE_TIMEOUT=3.0)
    async with serving as (tunnel, check), contextlib.AsyncExitStack() as stack:
        before = tunnel.server.rss()
        await stalled(tunnel, stack)
        await check()
        await tunnel.server.stderr_line("hostile: nothing was acknowledged for 3 s")
        assert_bounded(before, tunnel.server)


async def test_a_client_that_breaks_the_protocol_and_does_not_read_is_cut_all_the_same() -> None:
    async with honest_tunnel(LAST_WORD=0.2) as (tunnel, check), contextlib.AsyncExitStack() as stack:
        peer = await stalled(tunnel, stack)
        await say(peer, data(0))
        await tunnel.server.stderr_line("hostile: refused: DATA on stream 0", 5.0)  # what blocks gives up after 10
        await check()


async def test_a_client_that_refuses_streams_is_busy_and_its_link_lives() -> None:
    async with honest_tunnel() as (tunnel, check), linked(tunnel.port) as peer:
        for number in range(1, 4):
            async with RawVisitor(tunnel.port) as visitor:
                await visitor.send(request(host=b"hostile.localhost"))
                assert (await peer.opened())[0] == number
                await peer.ws.send_bytes(reset(number, ErrorCode.REFUSED))
                answer = await visitor.read_response()
                assert (answer.status, answer.value(b"X-Pytunnel-Error")) == (503, b"busy")
                assert answer.value(b"Retry-After")
        await peer.synchronise()
        await check()


async def test_visitors_past_the_limit_of_streams_are_told_to_come_back() -> None:
    async with (
        honest_tunnel(MAX_STREAMS=3) as (tunnel, check),
        linked(tunnel.port) as peer,
        contextlib.AsyncExitStack() as stack,
    ):
        visitors = [await stack.enter_async_context(RawVisitor(tunnel.port)) for _ in range(4)]
        for visitor in visitors[:3]:
            await visitor.send(request(host=b"hostile.localhost"))
            await peer.opened()
        await visitors[3].send(request(host=b"hostile.localhost"))
        answer = await visitors[3].read_response()
        assert (answer.status, answer.value(b"X-Pytunnel-Error")) == (503, b"busy")
        assert answer.value(b"Retry-After")
        await check()


async def test_a_session_whose_ids_are_used_up_is_followed_by_another_and_no_request_is_lost() -> None:
    most, total = 25, 200
    async with (
        RawOrigin(response(b"hello")) as origin,
        Tunnel(origin.port, command=with_limits(MAX_STREAM_ID=most, STABLE=0.0)) as tunnel,
    ):
        waiting = asyncio.Semaphore(10)

        async def get(number: int) -> bytes:
            async with waiting:
                return (await tunnel.get(b"/%d" % number)).body

        assert await asyncio.gather(*(get(number) for number in range(total))) == [b"hello"] * total
        assert {seen.target for seen in origin.requests} == {b"/%d" % number for number in range(total)}
        assert len(origin.requests) == total, "none of them twice"
        lost = [event for event in tunnel.client.events if event["event"] == "disconnected"]
        assert len(lost) >= total // most - 1
        assert {event["reason"] for event in lost} == {"stream ids are used up"}


@pytest.mark.parametrize("small", ["server", "client"])
async def test_a_smaller_window_on_one_side_only_is_kept_to(small: str) -> None:
    body = os.urandom(300_000)

    async def echo(head: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(response(head.body))

    command = with_limits(INITIAL_WINDOW=1000)
    command[-1] = command[-1].replace(  # a default argument has its value already
        "sys.exit", "pytunnel.Session.__init__.__kwdefaults__.update(receive_window=1000); sys.exit"
    )
    serve = ("serve", "--listen", "127.0.0.1:0", "--token", TOKEN, "--json")
    async with (
        RawOrigin(echo, read_body=True) as origin,
        await Process.start(*serve, command=command if small == "server" else None) as server,
    ):
        port = (await server.event("listening"))["port"]
        connect = (
            "connect",
            f"{origin.port}",
            "--server",
            f"http://127.0.0.1:{port}",
            "--token",
            TOKEN,
            "--name",
            "web",
        )
        async with await Process.start(*connect, "--json", command=command if small == "client" else None) as client:
            await client.event("ready")
            async with RawVisitor(port) as visitor:
                await visitor.send(request("POST", host=b"web.localhost", body=body))
                assert (await visitor.read_response()).body == body
            assert {event["event"] for event in client.events} <= {"request"}


# ---------------------------------------------------------------------------------------- A hostile server


class ServerPeer(Peer):
    """The server's end of a link, after its handshake."""

    def __init__(self, ws: Any, port: int, transport: asyncio.Transport, hello: Message) -> None:
        super().__init__(ws, port)
        self.transport, self.hello = transport, hello
        self.done = asyncio.Event()

    async def open(self, stream_id: int, target: bytes = b"/", *, end: bool = True, tunnel: int = 0) -> None:
        await self.ws.send_bytes(opening(stream_id, target, end=end, tunnel=tunnel))


def opening(
    stream_id: int, target: bytes = b"/", *, end: bool = True, tunnel: int = 0, method: bytes = b"GET"
) -> bytes:
    payload = OPEN_HEADER.pack(tunnel, Kind.HTTP, 0) + b"\0".join([method, target, b"Host", b"web.localhost"])
    return encode_frame(FrameType.OPEN, END if end else 0, stream_id, payload)


class HostileServer:
    """Shakes hands like pytunnel's own server, but for what the test changes, and hands over each link."""

    def __init__(self) -> None:
        self.links: asyncio.Queue[ServerPeer] = asyncio.Queue()
        self.said: list[str] = []  # by clients, in handshakes
        self.first_words: list[str] = []  # before the challenge
        self.scheme = "http"  # of the tunnels' URLs
        self.lies: list[tuple[str, dict[str, Any]]] = []  # one for each dial: the message, and what is wrong in it
        self._peers: list[ServerPeer] = []

    async def __aenter__(self) -> HostileServer:
        app = web.Application()
        app.router.add_get(LINK_PATH, self._link)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        for peer in self._peers:
            peer.done.set()
            peer.transport.abort()
        await self._runner.cleanup()

    async def link(self) -> ServerPeer:
        async with asyncio.timeout(10):
            return await self.links.get()

    async def _link(self, http: web.Request) -> web.StreamResponse:
        ws = web.WebSocketResponse(protocols=(SUBPROTOCOL,), compress=False, timeout=1.0)
        await ws.prepare(http)
        hello = Message(await ws.receive_str())
        told, lie = self.lies.pop(0) if self.lies else ("", {})
        self.said.append(hello.text)
        for text in self.first_words:
            await ws.send_str(text)
        verifier = Verifier.from_token(TOKEN, b"salt")
        salt = base64.b64encode(verifier.salt).decode()
        fields = {"nonce": hello.get("nonce", str) + "x", "salt": salt, "iterations": ITERATIONS}
        challenge = encode_message("challenge", **{**fields, **(lie if told == "challenge" else {})})
        await ws.send_str(challenge)
        message = await ws.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            return ws
        self.said.append(message.data)
        signature = verifier.signature(f"{hello.text}\n{challenge}".encode())
        names = hello.get("tunnels", list)
        fields = {
            "signature": base64.b64encode(signature).decode(), "session": "its-id", "resumed": False, "received": 0,
            "tunnels": [{"name": name, "url": f"{self.scheme}://{name}.localhost:{self.port}"} for name in names],
            "window": SMALL, "streams": 1000,
        }  # fmt: skip
        await ws.send_str(encode_message("ready", **{**fields, **(lie if told == "ready" else {})}))
        if told:
            async for _ in ws:
                pass
            return ws
        assert http.transport
        peer = ServerPeer(ws, self.port, http.transport, hello)
        self._peers.append(peer)
        self.links.put_nowait(peer)
        await peer.done.wait()
        return ws


@contextlib.asynccontextmanager
async def dialling(server: HostileServer, target: object, *args: str, **limits: float) -> AsyncIterator[Process]:
    """A client of that server, which is back at once after each loss of its link."""
    command = with_limits(**{"STABLE": 0.0, **limits})
    url = f"http://127.0.0.1:{server.port}"
    async with await Process.start(
        "connect", f"{target}", "--server", url, "--token", TOKEN, "--name", "web", "--json", *args, command=command
    ) as client:
        yield client


async def ask(peer: ServerPeer, stream_id: int, target: bytes = b"/", **options: Any) -> tuple[Frame, bytes]:
    """Send a request as a server does, and return the head's frame, or the reset's, and the content."""
    await peer.open(stream_id, target, **options)
    frame = await peer.frame_of(stream_id)
    content = b""
    while not frame.flags & END and frame.type != FrameType.RESET:
        more = await peer.frame_of(stream_id)
        content += more.payload
        if more.type == FrameType.RESET or more.flags & END:
            break
        await peer.send(FrameType.WINDOW, 0, stream_id, max(1, len(more.payload)).to_bytes(4, "big"))
    return frame, content


def assert_calm_client(client: Process) -> None:
    assert client.returncode is None, client.output()
    assert "Traceback" not in "\n".join(client.stderr), client.output()
    assert "a request failed" not in "\n".join(client.stderr), client.output()


async def silent(_: RawRequest, reader: Reader, writer: Writer) -> None:
    """A local service that does not answer."""
    await reader.read(1)


async def test_a_server_that_breaks_the_protocol_is_told_so_and_dialled_anew() -> None:
    cases = {name: case[1:] for name, case in BROKEN.items() if case[0] == "client"}
    async with (
        HostileServer() as server,
        RawOrigin(silent) as origin,
        dialling(server, origin.port, INITIAL_WINDOW=WINDOW) as client,
    ):
        peer = await server.link()
        before = client.rss()

        async def attack(name: str) -> None:
            nonlocal peer
            message, code = cases[name]
            await peer.open(1, end=False)
            await say(peer, message)
            got, reason, closed_with = await last_words(peer)
            assert (got, closed_with) == (code, aiohttp.WSCloseCode.PROTOCOL_ERROR), reason
            peer.done.set()
            lost = await client.event("disconnected")
            assert lost["reason"] == f"the server broke the protocol: {reason}"
            peer = await server.link()
            assert peer.hello.get("session", str) == "", "the session is over"

        await for_each(cases, attack)
        assert_calm_client(client)
        assert_bounded(before, client)


async def test_a_server_may_say_what_was_on_its_way_when_a_stream_ended() -> None:
    harmless = {name: message for name, (role, message) in test_session.IGNORED.items() if role == "client"}
    async with (
        HostileServer() as server,
        RawOrigin(response(b"hello")) as origin,
        dialling(server, origin.port) as client,
    ):
        peer = await server.link()
        for number, (name, message) in enumerate(harmless.items()):
            await peer.open(number + 1, end=False)
            await peer.ws.send_bytes(encode_frame(FrameType.RESET, 0, number + 1, bytes(2)))
            header = pytunnel.FRAME_HEADER.unpack_from(message)
            await peer.ws.send_bytes(pytunnel.FRAME_HEADER.pack(header[0], header[1], number + 1) + message[9:])
            await peer.synchronise()
            assert_calm_client(client), name
        got, content = await ask(peer, 100)
        assert (got.type, content) == (FrameType.HEAD, b"hello")


CHALLENGES: dict[str, tuple[dict[str, Any], str]] = {
    "one_iteration": ({"iterations": 1}, "'iterations' is not within 4096 to"),
    "an_iteration_less": ({"iterations": ITERATIONS - 1}, "'iterations' is not within 4096 to"),
    "iterations_for_hours": ({"iterations": 10**9}, "'iterations' is not within 4096 to"),
    "nonce_of_another_login": ({"nonce": "another"}, "the server's nonce is not ours"),
    "salt_that_is_none": ({"salt": "!"}, "'salt' is not base64"),
    "pad": ({"pad": "x" * MAX_HELLO}, "a handshake message over"),
}
READIES: dict[str, tuple[dict[str, Any], str]] = {
    "no_tunnels": ({"tunnels": []}, "0 tunnels, asked for were 1"),
    "many_tunnels": ({"tunnels": [{"url": "http://a"}] * 300}, "300 tunnels, asked for were 1"),
    "tunnels_that_are_text": ({"tunnels": "x" * 10_000}, "'tunnels' is not list"),
    "window_past_its_maximum": ({"window": 2**31}, "'window' is not within"),
    "window_of_nothing": ({"window": 0}, "'window' is not within"),
    "no_streams": ({"streams": 0}, "'streams' is not within"),
    "session_that_is_a_number": ({"session": 7}, "'session' is not str"),
    "resumed_that_is_text": ({"resumed": "yes"}, "'resumed' is not bool"),
    "received_less_than_nothing": ({"received": -1}, "'received' is not within"),
    "pad": ({"pad": "x" * MAX_HELLO}, "a handshake message over"),
    "pad_past_a_message": ({"pad": "x" * 2 * MAX_MESSAGE}, "a message over 1048576 bytes"),
}
AT_ONCE = {"BACKOFF_MIN": 0.01, "BACKOFF_MAX": 0.01}  # seconds between dials


async def test_a_server_gets_no_proof_on_its_own_terms() -> None:
    """A proof for one iteration, or for a salt and a nonce of its choice alone, is one to try tokens on."""
    async with HostileServer() as server, dialling(server, 1, **AT_ONCE) as client:
        server.lies = [("challenge", fields) for fields, _ in CHALLENGES.values()]
        for _, reason in CHALLENGES.values():
            assert reason in (await client.event("disconnected"))["reason"]
        assert all('"type":"hello"' in text for text in server.said[: len(CHALLENGES)])
        assert TOKEN not in "".join(server.said)
        await client.event("ready")
        assert_calm_client(client)


async def test_a_server_whose_ready_makes_no_sense_is_no_server() -> None:
    async with HostileServer() as server, dialling(server, 1, **AT_ONCE) as client:
        before = client.rss()
        server.lies = [("ready", fields) for fields, _ in READIES.values()]
        for _, reason in READIES.values():
            assert reason in (await client.event("disconnected"))["reason"]
        await client.event("ready")
        await (await server.link()).synchronise()
        assert client.events == [], "reconnected: it was ready before, with a server that was none"
        assert_calm_client(client)
        assert_bounded(before, client, 48 * MiB)  # most of it is what a first dial loads


async def test_a_server_that_does_not_know_the_token_is_the_wrong_one() -> None:
    async with HostileServer() as server, dialling(server, 1) as client:
        server.lies = [("ready", {"signature": base64.b64encode(bytes(32)).decode()})]
        assert await client.wait() == 3
        assert len(client.stderr) == 1 and "is this the right server?" in client.stderr[0]


async def test_a_ready_that_goes_back_on_what_was_received_is_a_broken_link() -> None:
    async with HostileServer() as server, dialling(server, 1, **AT_ONCE) as client:
        server.lies = [("ready", {"received": 1})]
        assert "the server broke the protocol: ACK of 1 frames" in (await client.event("disconnected"))["reason"]
        await client.event("reconnected")
        assert_calm_client(client)


async def test_texts_without_end_in_the_handshake_are_not_waited_for() -> None:
    async with HostileServer() as server, dialling(server, 1, "--max-retries", "0") as client:
        server.first_words = ["{}"] * 1000
        assert await client.wait() == 5
        assert len(client.stderr) == 1 and client.stderr[0].startswith("error: "), client.output()


async def test_a_fragmented_message_without_end_is_cut_and_not_kept() -> None:
    async with (
        HostileServer() as server,
        RawOrigin(response(b"hello")) as origin,
        dialling(server, origin.port) as client,
    ):
        peer = await server.link()
        before = client.rss()
        fine = encode_frame(FIRST_EXTENSION, 0, 0, bytes(991)) * 65
        piece = len(fine).to_bytes(2, "big") + fine
        peer.transport.write(b"\x02\x7e" + piece)  # binary, not the last one
        for _ in range(MAX_MESSAGE // len(fine)):  # no more than it takes: a reset eats the last word
            peer.transport.write(b"\x00\x7e" + piece)  # nor is any of these
        code, reason, closed_with = await last_words(peer)
        assert (code, closed_with) == (ErrorCode.FRAME_SIZE, aiohttp.WSCloseCode.PROTOCOL_ERROR), reason
        peer.done.set()
        await server.link()
        assert_bounded(before, client, 12 * MiB)
        assert_calm_client(client)


async def test_a_server_that_sends_fragments_of_nothing_is_dead() -> None:
    """They are no sign of life: nothing of the protocol gets through between them."""
    limits = {"PING_INTERVAL": 0.3, "PING_TIMEOUT": 0.3}
    async with HostileServer() as server, RawOrigin(b"") as origin, dialling(server, origin.port, **limits) as client:
        peer = await server.link()
        before = client.rss()
        peer.transport.write(b"\x02\x00")

        async def dribble() -> None:
            while not peer.transport.is_closing():
                peer.transport.write(b"\x00\x00" * 100)
                await asyncio.sleep(0.01)

        dribbling = asyncio.ensure_future(dribble())
        assert "no answer for" in (await client.event("disconnected"))["reason"]
        peer.done.set()
        await pytunnel.end_tasks(dribbling)
        assert_bounded(before, client, 8 * MiB)


async def test_a_frame_that_comes_byte_by_byte_takes_no_more_than_it_is_long() -> None:
    async with (
        HostileServer() as server,
        RawOrigin(response(b"hello"), read_body=True) as origin,
        dialling(server, origin.port) as client,
    ):
        peer = await server.link()
        before = client.rss()
        peer.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await peer.open(1, end=False)
        body = os.urandom(64 * 1024)
        frame = encode_frame(FrameType.DATA, END, 1, body)
        for byte in b"\x82\x7f" + len(frame).to_bytes(8, "big") + frame:
            peer.transport.write(bytes([byte]))
        assert (await peer.frame(FrameType.HEAD)).stream_id == 1
        assert origin.requests[0].body == body
        assert_bounded(before, client, 8 * MiB)


async def test_a_body_of_one_byte_frames_arrives_and_takes_no_more_than_its_window() -> None:
    gate = asyncio.Event()

    async def serve(head: RawRequest, reader: Reader, writer: Writer) -> None:
        await gate.wait()
        while await reader.read(65536):
            pass

    async with (
        HostileServer() as server,
        RawOrigin(serve, limit=1024) as origin,
        dialling(server, origin.port) as client,
    ):
        peer = await server.link()
        await peer.open(1, end=False)
        before = client.rss()
        for _ in range(16):
            await peer.ws.send_bytes(data(1) * (INITIAL_WINDOW // 64))
        await peer.synchronise()
        assert_bounded(before, client, 12 * MiB)
        gate.set()
        assert_calm_client(client)


# Streams


@pytest.mark.parametrize("resets", ["at once", "later"])
async def test_a_flood_of_requests_that_are_reset_keeps_to_the_limit_at_the_local_service(resets: str) -> None:
    most, count = 20, 2000
    async with (
        HostileServer() as server,
        RawOrigin(silent) as origin,
        dialling(server, origin.port, MAX_STREAMS=most) as client,
    ):
        peer = await server.link()
        before, highest = client.rss(), 0
        for first in range(1, count, 100):
            ids = range(first, first + 100)
            code = bytes(2) if first % 200 == 1 else b"\0\x08"  # NO_ERROR lingers, CANCEL does not
            undone = [encode_frame(FrameType.RESET, 0, id_, code) for id_ in ids]
            if resets == "at once":
                await peer.ws.send_bytes(
                    b"".join(opening(id_, end=False) + undo for id_, undo in zip(ids, undone, strict=True))
                )
            else:
                await peer.ws.send_bytes(b"".join(opening(id_, end=False) for id_ in ids))
                await peer.synchronise()
                highest = max(highest, sum(connection.open for connection in origin.connections))
                await peer.ws.send_bytes(b"".join(undone))
            await peer.synchronise()
            highest = max(highest, sum(connection.open for connection in origin.connections))
        assert highest <= most
        assert_calm_client(client)
        assert_bounded(before, client, 16 * MiB)


async def test_requests_that_linger_count_and_leave_room_for_others() -> None:
    """Their visitors have left, and what these sent before is being delivered; for half of the limit, at the most."""
    async with (
        HostileServer() as server,
        RawOrigin(silent) as origin,
        dialling(server, origin.port, MAX_STREAMS=6) as client,
    ):
        peer = await server.link()

        async def leave(*ids: int) -> None:
            await peer.ws.send_bytes(b"".join(reset(id_, ErrorCode.NO_ERROR) for id_ in ids))

        async def connected(count: int) -> None:
            await origin.wait_for(lambda: sum(connection.open for connection in origin.connections) == count)

        await peer.ws.send_bytes(b"".join(opening(id_, end=False) for id_ in (1, 2, 3)))
        await connected(3)
        await leave(1, 2, 3)
        await peer.ws.send_bytes(b"".join(opening(id_, end=False) for id_ in range(4, 10)))
        assert {(await peer.frame(FrameType.RESET)).stream_id for _ in range(3)} == {7, 8, 9}
        await connected(6)
        await leave(4, 5, 6)
        await connected(3)
        await peer.ws.send_bytes(b"".join(opening(id_, end=False) for id_ in (10, 11, 12)))
        await connected(6)
        assert_calm_client(client)


async def test_requests_past_the_limit_are_refused_and_the_others_go_on() -> None:
    release = asyncio.Event()

    async def serve(_: RawRequest, reader: Reader, writer: Writer) -> None:
        await release.wait()
        writer.write(response(b"late"))

    async with (
        HostileServer() as server,
        RawOrigin(serve) as origin,
        dialling(server, origin.port, MAX_STREAMS=3) as client,
    ):
        peer = await server.link()
        await peer.ws.send_bytes(b"".join(opening(id_) for id_ in range(1, 6)))
        for id_ in (4, 5):
            refused = await peer.frame(FrameType.RESET)
            assert (refused.stream_id, decode_reason(refused.payload)[0]) == (id_, ErrorCode.REFUSED)
        release.set()
        assert {(await peer.frame(FrameType.HEAD)).stream_id for _ in range(3)} == {1, 2, 3}
        assert_calm_client(client)


NONSENSE: dict[str, bytes] = {
    "no_head": b"",
    "half_a_head": b"GET",
    "no_target": b"GET\0",
    "method_with_a_space": b"G T\0/",
    "target_with_a_line_break": b"GET\0/ HTTP/1.1\r\nX: y",
    "target_with_a_space": b"GET\0/a b",
    "field_without_a_value": b"GET\0/\0Host",
    "name_with_a_colon": b"GET\0/\0a:b\0c",
    "value_with_a_line_break": b"GET\0/\0a\0b\r\nc: d",
    "many_fields": b"GET\0/" + b"\0a\0b" * (MAX_FIELDS + 1),
}


async def test_a_request_that_makes_no_sense_is_reset_and_never_reaches_the_local_service() -> None:
    async with (
        HostileServer() as server,
        RawOrigin(response(b"hello")) as origin,
        dialling(server, origin.port) as client,
    ):
        peer = await server.link()
        for number, payload in enumerate(NONSENSE.values(), 1):
            await peer.send(FrameType.OPEN, END, number, OPEN_HEADER.pack(0, Kind.HTTP, 0) + payload)
            answer = await peer.frame(FrameType.RESET)
            assert (answer.stream_id, decode_reason(answer.payload)[0]) == (number, ErrorCode.PROTOCOL)
        for tunnel in (1, 65535):
            await peer.open(100 + tunnel, tunnel=tunnel)
            answer = await peer.frame(FrameType.RESET)
            assert (answer.stream_id, decode_reason(answer.payload)[0]) == (100 + tunnel, ErrorCode.PROTOCOL)
        assert not origin.connections
        got, content = await ask(peer, 10**6)
        assert (got.type, content) == (FrameType.HEAD, b"hello")
        assert_calm_client(client)


async def test_a_server_that_asks_and_does_not_read_is_cut() -> None:
    """Its requests make no sense: each is answered by a RESET, which waits for it."""
    async with HostileServer() as server, dialling(server, 1, MAX_UNACKED_FRAMES=2000, WRITE_TIMEOUT=60.0) as client:
        peer = await server.link()
        before = client.rss()
        peer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.transport.pause_reading()

        async def flood() -> None:
            bad = OPEN_HEADER.pack(0, Kind.HTTP, 0) + b"?"
            for first in range(1, 2**24, 1000):
                frames = [encode_frame(FrameType.OPEN, END, id_, bad) for id_ in range(first, first + 1000)]
                await peer.ws.send_bytes(b"".join(frames))

        flooding = asyncio.ensure_future(flood())
        lost = await client.event("disconnected", timeout=30)
        assert "2000" in lost["reason"] and "the server broke the protocol" in lost["reason"]
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        peer.done.set()
        assert_bounded(before, client)
        assert_calm_client(client)


# What the client dials and reads


ELSEWHERE = (
    (b"GET", b"http://127.0.0.1:%d/"),
    (b"GET", b"//127.0.0.1:%d/"),
    (b"GET", b"https://127.0.0.1:%d/x"),
    (b"CONNECT", b"127.0.0.1:%d"),
    (b"GET", b"127.0.0.1:%d"),
    (b"GET", b"/@127.0.0.1:%d"),
)


async def test_a_request_cannot_make_the_client_dial_anything_else() -> None:
    async with (
        RawOrigin(response(b"elsewhere")) as elsewhere,
        RawOrigin(response(b"moved", 302, [(b"Location", b"http://127.0.0.1:%d/" % elsewhere.port)])) as origin,
        HostileServer() as server,
        dialling(server, origin.port) as client,
    ):
        peer = await server.link()
        for number, (method, form) in enumerate(ELSEWHERE, 1):
            target = form % elsewhere.port
            await peer.ws.send_bytes(opening(number, target, method=method))
            answer = await peer.frame_of(number)
            if target.startswith(b"/"):
                assert answer.type == FrameType.HEAD and answer.payload.startswith(b"302\0"), "passed on, not followed"
            else:
                assert answer.type == FrameType.RESET, target
        host = b"\0".join([b"GET", b"/", b"Host", b"127.0.0.1:%d" % elsewhere.port, b"X-Forwarded-Host", b"evil"])
        await peer.send(FrameType.OPEN, END, 99, OPEN_HEADER.pack(0, Kind.HTTP, 0) + host)
        assert (await peer.frame_of(99)).type == FrameType.HEAD
        assert not elsewhere.connections
        assert {seen.target[:1] for seen in origin.requests} == {b"/"}
        assert_calm_client(client)


@pytest.mark.parametrize("tcp", [False, True])
async def test_a_stream_of_another_kind_than_the_tunnel_s_is_refused(tcp: bool) -> None:
    async with RawOrigin(response(b"ok")) as origin, HostileServer() as server:
        server.scheme = "tcp" if tcp else "http"
        http, raw = b"GET\0/\0Host\0web.localhost", b"TCP\x00192.0.2.1:1"
        wrong = [(Kind.HTTP, raw), (Kind.UPGRADE, raw), (Kind.TCP, http), (Kind.HTTP, http) if tcp else (Kind.TCP, raw)]
        async with dialling(server, f"{'tcp:' * tcp}{origin.port}") as client:
            peer = await server.link()
            assert peer.hello.get("tcp", dict) == ({"web": 0} if tcp else {})
            for number, (kind, head) in enumerate(wrong, 1):
                await peer.send(FrameType.OPEN, 0, number, OPEN_HEADER.pack(0, kind, 0) + head)
                frame = await peer.frame_of(number)
                assert frame.type == FrameType.RESET and decode_reason(frame.payload)[0] is ErrorCode.PROTOCOL
            assert not origin.connections
            right = OPEN_HEADER.pack(0, Kind.TCP, 0) + raw if tcp else OPEN_HEADER.pack(0, Kind.HTTP, 0) + http
            await peer.send(FrameType.OPEN, 0, 99, right)
            assert (await peer.frame_of(99)).type == FrameType.HEAD
            assert_calm_client(client)


OUTSIDE = (
    b"/../secret", b"/%2e%2e/secret", b"/%2E%2E%2Fsecret", b"/..%2fsecret", b"/a/../../secret", b"//../secret",
    b"/..\\secret", b"/%5c..%5csecret", b"/%00/../secret", b"/.../secret", b"/..;/secret", b"/%252e%252e/secret",
    b"/%c0%ae%c0%ae/secret", b"/link", b"/link-to-folder/secret", b"/.env", b"/%2eenv", b"/a/.git/config",
    b"file:///%b", b"/%b", b"//%b", b"/proc/self/environ", b"/?../secret", b"/a/%2e%2e/.env", b"/a/..",
)  # fmt: skip


async def test_a_server_reads_no_file_but_those_of_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "secret"
    (folder / "a" / ".git").mkdir(parents=True)
    for path in (outside, folder / ".env", folder / "a" / ".git" / "config"):
        path.write_text("TOP SECRET")
    (folder / "index.html").write_text("public")
    (folder / "link").symlink_to(outside)
    (folder / "link-to-folder").symlink_to(tmp_path)
    async with HostileServer() as server, dialling(server, folder) as client:
        peer = await server.link()
        for number, form in enumerate(OUTSIDE, 1):
            target = form.replace(b"%b", os.fsencode(outside).lstrip(b"/"))
            answer, content = await ask(peer, number, target)
            assert b"SECRET" not in content and b"SECRET" not in answer.payload, target
        answer, content = await ask(peer, 1000)
        assert content == b"public"
        # what its web server takes for no HTTP is no reason for a traceback; what a visitor may send, it takes
        for number, size, status in ((1001, MAX_FIELD - 10, b"200\0"), (1002, MAX_FIELD + 10, b"400\0")):
            long = b"\0".join([b"GET", b"/", b"Host", b"a", b"X", b"x" * size])
            await peer.send(FrameType.OPEN, END, number, OPEN_HEADER.pack(0, Kind.HTTP, 0) + long)
            assert (await peer.frame_of(number)).payload.startswith(status)
        await ask(peer, 1003)
        assert_calm_client(client)


# ---------------------------------------------------------------------------------------- Without a network


def feeding(count: int, payload: bytes = b"x") -> Stream:
    """A stream that nobody reads, which `count` frames have come for."""
    stream = Stream(Link(Session(is_server=False)), 1, 0, Kind.HTTP, b"", ended=False)
    for _ in range(count):
        stream.feed(Frame(FrameType.DATA, 0, 1, payload))
    return stream


async def test_a_small_frame_adds_to_what_waits_and_does_not_copy_it() -> None:
    stream = feeding(2)
    waiting = stream._chunks[-1]
    for _ in range(1000):
        stream.feed(Frame(FrameType.DATA, 0, 1, b"x"))
    assert stream._chunks[-1] is waiting and len(stream._chunks) == 1
    assert await stream.read() == b"x" * 1002


async def test_a_large_frame_is_handed_on_as_it_is() -> None:
    payload = bytes(MAX_DATA)
    stream = feeding(2, payload)
    assert await stream.read() is payload


def test_many_frames_of_one_message_come_in_turns() -> None:
    session = test_session.client_with_stream()
    message = data(1) * (2 * MAX_FRAMES + 1)
    sizes = [len(session.receive_data(message, 0.0))]
    while session.has_more:
        assert not session.between_frames
        sizes.append(len(session.receive_data(b"", 0.0)))
    assert sizes == [MAX_FRAMES, MAX_FRAMES, 1] and session.between_frames


@pytest.mark.parametrize("how", ["stalled", "away"])
def test_an_honest_server_may_have_all_streams_answered_while_nothing_gets_through(how: str) -> None:
    """Ten early hints and a head on each of all its streams, then RESETs: none of it is what ends a session."""
    session = test_session.connected(is_server=False)
    ids = range(1, MAX_STREAMS + 1)
    for id_ in ids:
        session.receive_data(open_(id_), 0.0)
    if how == "away":
        session.suspend()
    for id_ in ids:
        for _ in range(MAX_INTERIM):
            session.send_head(id_, b"103\0" + b"x" * 2000, interim=True)
        session.send_head(id_, b"200\0" + b"x" * 2000)
        session.send_reset(id_, ErrorCode.LOCAL_RESET)
    assert session._control_bytes > 10 * MiB
    if how == "away":
        session.resume(0, 0.0)
    assert session.receive_data(test_session.ping() + open_(MAX_STREAMS + 1), 0.0)
    sent = 0
    while message := session.data_to_send():
        sent += len(FrameDecoder().feed(message))
    assert sent > MAX_STREAMS * (MAX_INTERIM + 2)


def test_past_the_limit_of_what_waits_requests_are_refused_and_not_the_session() -> None:
    session = test_session.connected(is_server=False)
    id_ = 0
    while session._control_bytes <= MAX_PENDING:
        id_ += 1
        session.receive_data(open_(id_, END), 0.0)
        session.send_head(id_, b"200\0" + b"x" * (MAX_HEAD - 10), end=True)
    assert session.receive_data(open_(id_ + 1, END), 0.0) == []
    while session.data_to_send():
        session.receive_data(test_session.ack(len(session._unacked) + session._acked), 0.0)
    assert session.receive_data(open_(id_ + 2, END), 0.0)


def test_replies_that_nobody_reads_end_the_session_before_they_take_much() -> None:
    session = test_session.connected(is_server=False)
    with pytest.raises(ProtocolError, match="not read"):
        for id_ in range(1, 3 * MAX_UNACKED_FRAMES):
            if session.receive_data(open_(id_, END), 0.0):
                session.send_reset(id_, ErrorCode.LOCAL_REFUSED, "cannot connect to localhost:3000: connection refused")
    assert len(session._control) == MAX_UNACKED_FRAMES + 1
    assert session._control_bytes < 8 * MiB


# Random peers


class HostilePeer(RuleBasedStateMachine):
    """A peer that says anything, to an application that reads, writes and resets as it likes.

    What it says parses or raises ProtocolError, after which it starts a new session; nothing else is raised.
    """

    @initialize(is_server=st.booleans())
    def begin(self, is_server: bool) -> None:
        self.is_server, self.now = is_server, 0.0
        self.recorded = test_session.recorded()[is_server]
        self.renew()

    def renew(self) -> None:
        self.session = test_session.busy(is_server=self.is_server)
        self.unread: dict[int, int] = {}

    def receive(self, message: bytes) -> None:
        try:
            for event in self.session.receive_data(message, self.now):
                if event.type == FrameType.DATA:
                    self.unread[event.stream_id] = self.unread.get(event.stream_id, 0) + len(event.payload)
                assert event.type in (
                    FrameType.OPEN, FrameType.HEAD, FrameType.DATA, FrameType.RESET, FrameType.GOAWAY,
                )  # fmt: skip
        except ProtocolError as error:
            assert str(error).isprintable() and len(str(error)) < 200
            self.renew()

    @rule(frames=st.lists(test_session.likely_frames(), min_size=1, max_size=4))
    def say_what_is_likely(self, frames: list[bytes]) -> None:
        self.receive(b"".join(frames))

    @rule(start=st.integers(0, 30), count=st.integers(1, 6), data=st.data())
    def say_what_was_recorded(self, start: int, count: int, data: st.DataObject) -> None:
        """With some bits turned over, and cut anywhere."""
        said = bytearray(b"".join(self.recorded[start % len(self.recorded) :][:count]))
        for _ in range(data.draw(st.integers(0, 2))):
            said[data.draw(st.integers(0, len(said) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        self.receive(bytes(said[: data.draw(st.integers(1, len(said)))]))

    @rule(noise=st.binary(min_size=1, max_size=40))
    def say_noise(self, noise: bytes) -> None:
        self.receive(noise)

    @rule(received=st.integers(0, 20))
    def come_back(self, received: int) -> None:
        self.session.suspend()
        try:
            self.session.resume(received, self.now)
        except ProtocolError:
            self.renew()

    @rule(stream_id=st.integers(1, 5), size=st.integers(0, 300), end=st.booleans())
    def write(self, stream_id: int, size: int, end: bool) -> None:
        stream = self.session._streams.get(stream_id)
        if stream and not stream.ending and (stream.state, pytunnel.Input.SEND) in pytunnel.TRANSITIONS:
            self.session.send_data(stream_id, bytes(size), end=end)

    @rule(stream_id=st.integers(1, 5))
    def read(self, stream_id: int) -> None:
        self.session.acknowledge_received_data(stream_id, self.unread.pop(stream_id, 0))

    @rule(stream_id=st.integers(1, 5), flush=st.booleans())
    def reset(self, stream_id: int, flush: bool) -> None:
        self.session.send_reset(stream_id, ErrorCode.CANCEL, flush=flush)

    @rule(end=st.booleans())
    def open(self, end: bool) -> None:
        if self.is_server:
            with contextlib.suppress(StreamReset):
                self.session.open_stream(0, Kind.HTTP, test_session.REQUEST, end=end)

    @rule(limit=st.sampled_from([1, 100, 2000]))
    def send(self, limit: int) -> None:
        FrameDecoder().feed(self.session.data_to_send(limit))

    @rule(seconds=st.sampled_from([0.1, 10.0, 15.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.session.handle_timeout(self.now)

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "session"):
            return
        session = self.session
        assert session.streams <= session.max_streams
        for stream in session._streams.values():
            assert 0 <= stream.receive.unread <= stream.receive.size
            assert 0 <= stream.send.credit <= pytunnel.MAX_WINDOW
            assert stream.interims <= MAX_INTERIM
        assert sum(stream.receive.widened for stream in session._streams.values()) <= pytunnel.MAX_WIDENED
        assert len(session._pings) <= pytunnel.MAX_PENDING_PONGS + 1
        assert set(session._credits) <= set(session._streams)
        assert session._decoder.buffered <= pytunnel.FRAME_HEADER.size + MAX_DATA
        assert session._control_bytes == sum(map(len, session._control))


TestHostilePeer = HostilePeer.TestCase
TestHostilePeer.settings = settings(max_examples=80, stateful_step_count=30)
