"""The link and its WebSocket, with a transport that does nothing: what is read and written when, and what ends it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import sliced

import pytunnel
from pytunnel import (
    MAX_FIELDS,
    MAX_FRAMES,
    MAX_WOKEN,
    SEND_BUFFER,
    FrameDecoder,
    FrameType,
    Kind,
    Link,
    MessageDecoder,
    Opcode,
    ProtocolError,
    RequestHead,
    Session,
    Target,
    TunnelRegistry,
    WebSocket,
    encode_frame,
    encode_message_frame,
)


class FakeTransport(asyncio.Transport):
    """Keeps what is written, and whether anything would be read."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.reading = True
        self.aborted = False
        self.unsent: Iterator[int] = itertools.repeat(1)  # bytes, each time that somebody looks

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None: ...
    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def abort(self) -> None:
        self.aborted = True

    def get_write_buffer_size(self) -> int:
        return next(self.unsent)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))


def websocket() -> WebSocket:
    """A client's end."""
    return WebSocket(FakeTransport(), asyncio.Protocol(), is_server=False)


HEAD = RequestHead(b"GET", b"/", []).encode()
CLOSE = encode_message_frame(Opcode.CLOSE, b"\x03\xe8bye")  # 1000
PING = encode_message_frame(Opcode.PING, b"x")
TEXT = encode_message_frame(Opcode.TEXT, b"{}")


def binary(payload: bytes) -> bytes:
    return encode_message_frame(Opcode.BINARY, payload)


def sent(ws: WebSocket) -> list[tuple[int, bytes]]:
    """What was sent since it was asked for last: opcodes and payloads."""
    written = ws.transport.written  # type: ignore[attr-defined]
    parts = MessageDecoder(masked=True).feed(b"".join(written))
    assert len(parts) == len(written), "each is a whole message, written at once"
    written.clear()
    return [(part.opcode, bytes(part.data)) for part in parts]


def sent_frames(ws: WebSocket) -> list[list[FrameType]]:
    """The types of the frames in each message."""
    return [[FrameType(frame.type) for frame in FrameDecoder().feed(payload)] for _, payload in sent(ws)]


def reading(ws: WebSocket) -> bool:
    return ws.transport.reading  # type: ignore[attr-defined]


@contextlib.asynccontextmanager
async def linked(ws: WebSocket, *, is_server: bool = False) -> AsyncIterator[tuple[Link, asyncio.Future[str]]]:
    """A link that runs over `ws`, and its run."""
    link = Link(Session(is_server=is_server))
    running = asyncio.ensure_future(link.run(ws, 0))
    try:
        await turns(2)
        async with asyncio.timeout(5):
            yield link, running
    finally:
        link.lose("done")
        ws.connection_lost(None)
        await asyncio.gather(running, return_exceptions=True)


async def turns(n: int) -> None:
    """Let so many turns of the event loop pass."""
    for _ in range(n):
        await asyncio.sleep(0)


# The handshake


async def test_what_comes_before_a_link_starts_is_passed_on() -> None:
    ws, peer, heads = websocket(), Session(is_server=True), []
    peer.resume(0, 0.0)
    for _ in range(3):
        peer.open_stream(0, Kind.HTTP, HEAD, end=True)
    message = binary(peer.data_to_send())
    ws.data_received(TEXT + message[:-5])
    assert await ws.receive_message()
    assert not reading(ws), "nobody asks for more"
    link = Link(Session(is_server=False))
    link.on_stream = lambda stream: heads.append(stream.head)
    running = asyncio.ensure_future(link.run(ws, 0))
    await turns(2)
    assert heads == [HEAD] * 2 and reading(ws)
    ws.data_received(message[-5:])
    assert heads == [HEAD] * 3
    link.lose("done")
    assert await running == "done"


@pytest.mark.parametrize(
    ("data", "reason"),
    [(CLOSE, "the connection was closed"), (b"", "the connection broke: reset"), (b"\xff\xff", "begins with 0xff"),
     (TEXT, "a text message after the handshake")],
)  # fmt: skip
async def test_what_ended_a_link_before_it_starts_ends_it_at_once(data: bytes, reason: str) -> None:
    ws = websocket()
    if data:
        ws.data_received(data)
    else:
        ws.connection_lost(OSError("reset"))
    async with linked(ws) as (_, running):
        if "connection" in reason:
            assert await running == reason
        else:
            ws.connection_lost(None)  # it has read our last word
            with pytest.raises(ProtocolError, match=reason):
                await running


async def test_nothing_is_read_while_nobody_asks_for_a_handshake_message() -> None:
    ws = websocket()
    ws.data_received(TEXT[:1])
    assert reading(ws), "there is no message yet"
    ws.data_received(TEXT[1:] + TEXT)
    for _ in range(2):
        assert not reading(ws)
        await ws.receive_message()
    asking = asyncio.ensure_future(ws.receive_message())
    await turns(1)
    assert reading(ws) and not asking.done()
    ws.data_received(TEXT)
    assert not reading(ws)
    await asking


async def test_nothing_is_read_in_the_handshake_while_there_is_more_of_what_was() -> None:
    """Else a peer's tiny messages would fill the memory as fast as they come."""
    ws = websocket()
    ws.data_received(PING * (3 * MAX_FRAMES) + TEXT)
    asking, answered = asyncio.ensure_future(ws.receive_message()), 0
    async with asyncio.timeout(5):
        while not asking.done():
            assert not reading(ws)
            await turns(1)
            if pongs := len(ws.transport.written):  # type: ignore[attr-defined]
                answered += pongs
                assert pongs <= MAX_FRAMES, "others have their turn"
                ws.transport.written.clear()  # type: ignore[attr-defined]
        await asking
    assert answered == 3 * MAX_FRAMES


# What is read


def frames_at_once() -> dict[str, bytes]:
    """More than are taken in one turn, of an answer on stream 1, in one message and in several."""
    head = encode_frame(FrameType.HEAD, 0, 1, b"200\0OK")
    kinds = {
        "data": encode_frame(FrameType.DATA, 0, 1, b"x"),
        "window": encode_frame(FrameType.WINDOW, 0, 1, b"\0\0\0\1"),
        "ack": encode_frame(FrameType.ACK, 0, 0, bytes(8)),
    }
    found = {}
    for name, frame in kinds.items():
        found[f"{name} in one"] = binary(head + frame * 5 * MAX_FRAMES)
        found[f"{name} in some"] = binary(head) + binary(frame * (MAX_FRAMES - 1)) * 5 + binary(frame * 5)
        found[f"{name} in many"] = binary(head) + binary(frame) * 5 * MAX_FRAMES
    return found


@pytest.mark.parametrize("name", frames_at_once())
async def test_many_frames_at_once_leave_others_their_turn(name: str) -> None:
    ws = websocket()
    async with linked(ws, is_server=True) as (link, _):
        link.open(0, Kind.HTTP, RequestHead(b"GET", b"/", []), end=True, waited=0.0)
        work, passed = [link.session.work], 0
        ws.data_received(frames_at_once()[name])
        work.append(link.session.work)
        while not reading(ws):
            await turns(1)
            work.append(link.session.work)
            passed += 1
        assert max(after - before for before, after in itertools.pairwise(work)) < 2 * MAX_FRAMES
        assert passed >= 3
        assert work[-1] > 5 * MAX_FRAMES, "and all of them are taken"
        ws.data_received(binary(encode_frame(FrameType.DATA, 1, 1, b"")))
        assert not link.session.streams, "and so is what follows"


async def test_a_ping_is_answered_when_there_is_room() -> None:
    ws = websocket()
    async with linked(ws):
        ws.data_received(PING + encode_message_frame(Opcode.PING, b"y" * 125))
        assert sent(ws) == [(Opcode.PONG, b"x"), (Opcode.PONG, b"y" * 125)]
        ws.pause_writing()
        ws.data_received(PING * 5)
        ws.resume_writing()
        await turns(2)
        assert sent(ws) == []
        ws.data_received(PING)
        assert sent(ws) == [(Opcode.PONG, b"x")]


# What is written


def request(link: Link) -> None:
    link.open(0, Kind.HTTP, RequestHead(b"GET", b"/", []), end=True, waited=0.0)


async def test_the_only_request_goes_out_at_once_and_others_together() -> None:
    ws = websocket()
    async with linked(ws, is_server=True) as (link, _):
        request(link)
        assert sent_frames(ws) == [[FrameType.OPEN]]
        await turns(2)
        for _ in range(3):
            request(link)
        assert sent_frames(ws) == []
        await turns(1)
        assert sent_frames(ws) == [[FrameType.OPEN] * 3]
        await turns(3)
        assert sent_frames(ws) == []


async def test_what_is_followed_by_more_waits_for_it() -> None:
    ws = websocket()
    async with linked(ws, is_server=True) as (link, _):
        for _ in range(2):
            link.session.open_stream(0, Kind.HTTP, HEAD, end=True)
            link.wake()
        assert sent_frames(ws) == []
        await turns(1)
        assert sent_frames(ws) == [[FrameType.OPEN] * 2]


async def test_a_message_does_not_wait_for_the_end_of_the_turn_when_much_was_added() -> None:
    ws = websocket()
    async with linked(ws, is_server=True) as (link, _):
        request(link)
        request(link)
        await turns(2)
        sent(ws)
        for _ in range(2):  # the count begins anew
            for _ in range(MAX_WOKEN - 1):
                request(link)
            assert sent_frames(ws) == []
            request(link)
            assert sent_frames(ws) == [[FrameType.OPEN] * MAX_WOKEN]
        request(link)
        await turns(1)
        assert sent_frames(ws) == [[FrameType.OPEN]]


async def test_nothing_is_written_without_room() -> None:
    ws = websocket()
    async with linked(ws, is_server=True) as (link, _):
        ws.pause_writing()
        for _ in range(2 * MAX_WOKEN):
            request(link)
        await turns(3)
        assert sent_frames(ws) == []
        ws.resume_writing()
        await turns(1)
        assert sent_frames(ws) == [[FrameType.OPEN] * 2 * MAX_WOKEN]


@pytest.mark.parametrize("before", [False, True], ids=["while it runs", "before"])
@pytest.mark.parametrize("unsent", [[9, 9], [9, 10], [9, 8, 7, 7], [9, 8, 8]], ids=str)
async def test_a_transport_that_takes_nothing_loses_the_link(
    monkeypatch: pytest.MonkeyPatch, unsent: list[int], before: bool
) -> None:
    """Only after a time in which nothing was taken at all; each look here is one such time after the other."""
    monkeypatch.setattr(pytunnel, "WRITE_TIMEOUT", 0.001)
    ws, looks = websocket(), iter(unsent)
    ws.transport.unsent = looks  # type: ignore[attr-defined]
    if before:
        ws.pause_writing()
    async with linked(ws) as (_, running):
        if not before:
            ws.pause_writing()
        assert await running == "nothing could be written for 0.001 s"
        assert list(looks) == []


async def test_a_transport_that_has_room_again_keeps_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytunnel, "WRITE_TIMEOUT", 0.001)
    ws, later = websocket(), asyncio.Event()
    async with linked(ws) as (_, running):
        ws.pause_writing()
        ws.resume_writing()
        asyncio.get_running_loop().call_later(0.003, later.set)
        await later.wait()
        await turns(3)
        assert not running.done()


# The end


async def test_a_close_is_answered_and_ends_the_link() -> None:
    ws = websocket()
    async with linked(ws) as (_, running):
        ws.data_received(CLOSE)
        assert await running == "the connection was closed"
        assert sent(ws) == [(Opcode.CLOSE, b"\x03\xe8")]
        await ws.close()
        assert sent(ws) == [], "once is enough"


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("error", [b"\xff\xff", TEXT, binary(b"\0\0\0\x7f\0\0\0\0\1"), binary(b"short")])
async def test_what_follows_an_error_is_ignored(error: bytes, together: bool) -> None:
    ws, peer, streams = websocket(), Session(is_server=True), []
    peer.resume(0, 0.0)
    peer.open_stream(0, Kind.HTTP, HEAD, end=True)
    fine = binary(peer.data_to_send())
    async with linked(ws) as (link, running):
        link.on_stream = streams.append
        for data in [error + fine] if together else [error, fine]:
            ws.data_received(data)
        await turns(3)
        ws.data_received(fine)
        goaway, close = sent(ws)
        assert FrameDecoder().feed(goaway[1])[0].type == FrameType.GOAWAY
        assert close == (Opcode.CLOSE, b"\x03\xea")  # 1002
        assert not streams and not link.session.received and reading(ws)
        ws.connection_lost(None)
        with pytest.raises(ProtocolError):
            await running


def read_into(ws: WebSocket, data: bytes) -> None:
    """As an event loop does it, in as few reads as there can be; the buffer is every WebSocket's."""
    for piece in sliced(data, [len(ws.get_buffer(-1))]):
        buffer = ws.get_buffer(-1)
        buffer[: len(piece)] = piece
        ws.buffer_updated(len(piece))
        buffer[:] = b"\xff" * len(buffer)


async def test_the_buffer_is_free_as_soon_as_it_has_been_looked_at() -> None:
    """However much of it waits for another turn, and whether it is a link that gets it or a handshake."""
    ws, peer, streams = websocket(), Session(is_server=True), []
    hello = b'{"type": "hello", "names": "%b"}' % (b"x" * 20_000)
    read_into(ws, encode_message_frame(Opcode.TEXT, hello) * 5)
    for _ in range(5):
        assert (await ws.receive_message()).get("type", str) == "hello"
    ws = websocket()
    peer.resume(0, 0.0)
    async with linked(ws) as (link, _):
        link.on_stream = streams.append
        id_ = peer.open_stream(0, Kind.HTTP, HEAD)
        read_into(ws, binary(peer.data_to_send()))
        content = bytes(range(251)) * 800
        frames = [encode_frame(FrameType.DATA, 0, id_, piece) for piece in sliced(content, [100])]
        assert len(frames) > 2 * MAX_FRAMES, "they take several turns"
        read_into(ws, b"".join(map(binary, frames)))
        await turns(10)
        got = b""
        while len(got) < len(content):
            got += await streams[0].read()
        assert got == content


@pytest.mark.parametrize(("module", "writes"), [("uvloop.loop", 2), ("asyncio.selector_events", 1)])
def test_only_uvloop_gets_a_large_message_in_pieces(module: str, writes: int) -> None:
    """Not every asyncio tells who writes them that there is no more room."""

    class Transport(FakeTransport):
        def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
            for data in list_of_data:
                self.write(data)

    Transport.__module__, payload = module, bytes(SEND_BUFFER + 1)
    ws = WebSocket(Transport(), asyncio.Protocol(), is_server=True)
    ws.send(Opcode.BINARY, payload)
    written = ws.transport.written  # type: ignore[attr-defined]
    assert b"".join(written) == binary(payload)
    assert len(written) == writes


ENDS: dict[str, Callable[[WebSocket], object]] = {
    "its close": lambda ws: ws.data_received(CLOSE),
    "its close after much else": lambda ws: ws.data_received(PING * (3 * MAX_FRAMES) + TEXT + CLOSE),
    "the end of its bytes": lambda ws: ws.eof_received(),
    "a reset": lambda ws: ws.connection_lost(ConnectionResetError()),
}


@pytest.mark.parametrize("end", ENDS)
async def test_a_close_waits_for_the_peers_and_ignores_what_still_comes(end: str) -> None:
    ws = websocket()
    ws.data_received(TEXT * 2)
    closing = asyncio.ensure_future(ws.close())
    await turns(2)
    assert sent(ws) == [(Opcode.CLOSE, b"\x03\xe8")]
    for data in (TEXT, PING, binary(b"anything"), TEXT[:1], TEXT[1:]):
        assert reading(ws)
        ws.data_received(data)
        await turns(2)
        assert not ws._parts, "nothing of it is kept"
    assert not closing.done()
    ENDS[end](ws)
    async with asyncio.timeout(5):
        await closing
    assert sent(ws) == [], "a closed end answers nothing"


async def test_nothing_is_passed_on_once_it_closes() -> None:
    ws, peer = websocket(), Session(is_server=True)
    peer.resume(0, 0.0)
    peer.open_stream(0, Kind.HTTP, HEAD, end=True)
    async with linked(ws) as (link, _):
        closing = asyncio.ensure_future(ws.close())
        await turns(1)
        ws.data_received(binary(peer.data_to_send()))
        ws.eof_received()
        await closing
        assert not link.session.received


async def test_an_error_does_not_keep_a_closing_end_from_seeing_the_end() -> None:
    ws = websocket()
    closing = asyncio.ensure_future(ws.close())
    await turns(1)
    ws.data_received(PING * MAX_FRAMES + b"\xff\xff")
    await turns(5)
    assert reading(ws), "what is not looked at is read, and so is the end"
    ws.eof_received()
    await closing


async def test_a_close_that_has_come_already_is_not_waited_for() -> None:
    """Both ends close after a refusal: they must not wait for each other."""
    ws = websocket()
    ws.data_received(TEXT + CLOSE)
    assert await ws.receive_message()
    async with asyncio.timeout(5):
        await ws.close()
    assert sent(ws) == [(Opcode.CLOSE, b"\x03\xe8")]


async def test_nothing_is_read_while_it_closes_and_there_is_more_of_what_was() -> None:
    ws = websocket()
    closing = asyncio.ensure_future(ws.close())
    await turns(1)
    ws.data_received(PING * (5 * MAX_FRAMES))
    for _ in range(2):
        assert not reading(ws)
        await turns(1)
    async with asyncio.timeout(5):
        while not reading(ws):
            await turns(1)
    ws.connection_lost(None)
    await closing


# Links that end


@pytest.mark.parametrize("turns", range(6))
async def test_a_link_that_is_cancelled_while_it_is_given_up_can_be_detached(turns: int) -> None:
    """The server's handler is cancelled when the connection ends, also while a newer link takes over."""
    link = Link(Session(is_server=True))
    running = asyncio.ensure_future(link.run(websocket(), 0))
    await asyncio.sleep(0)
    link.lose("another link took over")
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    async with asyncio.timeout(5):
        await link.detach("once more")
        ws = websocket()
        ws.data_received(encode_message_frame(Opcode.CLOSE, b""))
        assert await link.run(ws, 0) == "the connection was closed"


async def test_an_ack_that_cannot_be_written_does_not_keep_the_loop_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytunnel, "ACK_DELAY", 0.0)
    calls = 0
    session = Session(is_server=False)
    handle_timeout = session.handle_timeout

    def counted(now: float) -> bool:
        nonlocal calls
        calls += 1
        return handle_timeout(now)

    monkeypatch.setattr(session, "handle_timeout", counted)
    peer = Session(is_server=True)
    peer.resume(0, 0.0)
    link, ws = Link(session), websocket()
    ws.pause_writing()
    running = asyncio.ensure_future(link.run(ws, 0))
    head = RequestHead(b"GET", b"/", []).encode()
    for _ in range(3):
        peer.open_stream(0, Kind.HTTP, head, end=True)
        ws.data_received(encode_message_frame(Opcode.BINARY, peer.data_to_send()))
        for _ in range(200):
            await asyncio.sleep(0)
    assert calls < 20
    link.lose("done")
    assert await running == "done"


async def registry(path: Path) -> TunnelRegistry:
    names = TunnelRegistry(path / "names.json", grace=60.0, hold=60.0)
    verifier = pytunnel.Verifier(b"", 1, b"", b"")
    grants = [pytunnel.Grant(key, key, verifier) for key in ("key", "other")]
    names.admit([*grants, pytunnel.Grant("stranger", "stranger", verifier, (), 64, 512)])  # one with a label
    return names


async def test_a_name_goes_to_the_newest_session_even_after_the_older_one_is_over(tmp_path: Path) -> None:
    names = await registry(tmp_path)
    older, newer = (pytunnel.Registration("key", ["web"], Session(is_server=True)) for _ in range(2))
    names.bind(older, previous="")
    names.end(older, pytunnel.StreamReset(pytunnel.ErrorCode.LINK_LOST))
    names.bind(newer, previous="")
    assert older.id in names.replaced["key"], "its client slept past the grace, and must not take the name back"
    again = pytunnel.Registration("key", ["web"], Session(is_server=True))
    names.bind(again, previous=newer.id)
    assert newer.id not in names.replaced["key"], "the same client, whose session could not be resumed"


async def test_what_a_session_saved_is_counted_once_when_it_is_over(tmp_path: Path) -> None:
    names = await registry(tmp_path)
    session = pytunnel.Registration("key", ["web"], Session(is_server=True))
    names.bind(session, previous="")
    session.link.session.saved = 5
    for _ in range(2):
        names.end(session, pytunnel.StreamReset(pytunnel.ErrorCode.LINK_LOST))
    assert names.saved == 5


async def test_names_that_are_unused_the_longest_make_room(tmp_path: Path) -> None:
    names = await registry(tmp_path)
    for number in range(pytunnel.MAX_NAMES):
        names.claim("key", [f"web{number}"])
    names.claim("other", ["theirs"])
    names.claim("key", ["web0"])  # used again
    names.claim("key", ["one-more"])
    again = await registry(tmp_path)
    again.claim("stranger", ["web1"])
    for name in ("web0", "web2", "one-more", "theirs"):
        with pytest.raises(pytunnel.Refused):
            again.claim("stranger", [name])


class Counted(dict[str, Any]):
    """How often it was gone through."""

    times = 0

    def __iter__(self) -> Iterator[str]:
        self.times += 1
        return super().__iter__()


async def test_a_claim_goes_through_all_names_a_few_times_however_many_there_are(tmp_path: Path) -> None:
    names = await registry(tmp_path)
    names._tunnels = Counted({f"web{number}": None for number in range(50)})
    for number in range(pytunnel.MAX_NAMES + 50):
        names._tunnels.times = 0
        names.claim("key", [f"web{number}"])
        assert names._tunnels.times <= 2


async def test_nothing_is_kept_of_names_that_made_room(tmp_path: Path) -> None:
    """Else a client that takes new names for ever would fill the server's memory."""
    names = await registry(tmp_path)
    for number in range(3 * pytunnel.MAX_NAMES):
        session = pytunnel.Registration("key", [f"web{number}"], Session(is_server=True))
        names.claim("key", session.names)
        names.bind(session, previous="")
        names.disconnected(session)
        names.end(session, pytunnel.StreamReset(pytunnel.ErrorCode.LINK_LOST))
    for kept in (names._owners, names._latest, names._last_seen):
        assert len(kept) <= pytunnel.MAX_NAMES


async def test_who_has_a_token_with_a_label_brings_no_host_names(tmp_path: Path) -> None:
    """Nobody makes a tunnel's host the server's own, a server's host a tunnel, or somebody's site a zone."""
    names = await registry(tmp_path)
    names.learn_zone("t.example.com", "key")
    names.claim("key", ["web"])
    names.learn_zone("t.example.com", "stranger")
    for host in ("web.t.example.com", "later.t.example.com", "example.com", "example.org", "app.1-2-3-4.sslip.io"):
        with pytest.raises(pytunnel.Refused, match=f"no tunnels below {host}; start it with serve --domain {host}"):
            names.learn_zone(host, "stranger")
    for host in ("web.t.example.com", "web.localhost"):
        with pytest.raises(pytunnel.Refused):
            names.learn_zone(host, "key")
    for zone in ("203-0-113-7.sslip.io", "2001-db8--1.sslip.io", "localhost"):
        names.learn_zone(zone, "stranger")
        assert names.tunnel_name(f"web.{zone}") == "web"
        assert names.tunnel_name(zone) is None
        assert names.tunnel_name(f"x.web.{zone}") is None
    assert names.zones == ["t.example.com"]
    assert names.tunnel_name("web.t.example.com") == "web"
    assert (await registry(tmp_path)).zones == names.zones
    with pytest.raises(pytunnel.Refused) as refused:
        names.learn_zone("t.example.com", "nobody")
    assert refused.value.code == "token"
    names.by_address = False
    assert names.tunnel_name("web.localhost") is None


@pytest.mark.parametrize("host", ["0.113.7", "7", "0.0.1", "x.7", "1.2.3.4.5"])
def test_what_ends_in_a_number_is_an_address_or_nothing(host: str) -> None:
    with pytest.raises(pytunnel.MessageError, match="neither a host name nor an address"):
        pytunnel.Origin.from_url(f"http://{host}")
    assert pytunnel.tunnel_name("203.0.113.7", ["0.113.7", "113.7", "7"]) is None


async def test_no_token_makes_a_server_forget_which_sessions_of_others_were_replaced(tmp_path: Path) -> None:
    names = await registry(tmp_path)
    older, newer = (pytunnel.Registration("key", ["web"], Session(is_server=True)) for _ in range(2))
    names.bind(older, previous="")
    names.bind(newer, previous="")
    for _ in range(2 * pytunnel.MAX_REPLACED):
        names.bind(pytunnel.Registration("stranger", ["mine"], Session(is_server=True)), previous="")
    assert older.id in names.replaced["key"]
    assert len(names.replaced["stranger"]) == pytunnel.MAX_REPLACED


def test_a_head_with_what_a_proxy_adds_keeps_to_the_limit() -> None:
    fields = [(b"X-%d" % number, b"") for number in range(MAX_FIELDS)]
    RequestHead(b"GET", b"/", fields).encode()
    with pytest.raises(pytunnel.MessageError) as caught:
        RequestHead(b"GET", b"/", [*fields, (b"X-Forwarded-For", b"::1")]).encode()
    assert caught.value.status == 431


@pytest.mark.parametrize(
    ("text", "loopback"),
    [("3000", True), ("127.1.2.3:80", True), ("[::1]:80", True),
     ("127.0.0.1.evil.com:80", False), ("10.0.0.1:1", False)],
)
def test_what_is_loopback(text: str, loopback: bool) -> None:
    assert Target.parse(text).is_loopback is loopback


async def test_a_link_that_is_closed_says_what_the_peer_said() -> None:
    ws, link = websocket(), Link(Session(is_server=False))
    running = asyncio.ensure_future(link.run(ws, 0))
    await asyncio.sleep(0)
    goaway = pytunnel.encode_frame(FrameType.GOAWAY, 0, 0, pytunnel.encode_reason(pytunnel.ErrorCode.PROTOCOL, "why"))
    ws.data_received(encode_message_frame(Opcode.BINARY, goaway) + encode_message_frame(Opcode.CLOSE, b""))
    assert await running == "the connection was closed: why"


async def test_what_has_shown_no_token_sends_so_much_and_no_more() -> None:
    """However small its messages are: each would take its time."""
    transport = FakeTransport()
    ws = WebSocket(transport, asyncio.Protocol(), is_server=True)
    pong = encode_message_frame(Opcode.PONG, b"", bytes(4))
    for _ in range(3 * pytunnel.MAX_HELLO // len(pong)):
        ws.data_received(pong)
    assert not transport.aborted
    ws.data_received(pong)
    assert transport.aborted
    transport.aborted = False
    ws = WebSocket(transport, asyncio.Protocol(), is_server=True)
    ws.start(Link(Session(is_server=True)))
    for _ in range(4 * pytunnel.MAX_HELLO // len(pong)):
        ws.data_received(pong)
    assert not transport.aborted
