"""The link's own timing, with a transport that does nothing: what happens when two things end it at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import pytunnel
from pytunnel import (
    MAX_FIELDS,
    Kind,
    Link,
    Opcode,
    RequestHead,
    Session,
    Target,
    TunnelRegistry,
    WebSocket,
    encode_message_frame,
)


class FakeTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None: ...
    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def get_write_buffer_size(self) -> int:
        return 1

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))


def websocket() -> WebSocket:
    """A client's end."""
    return WebSocket(FakeTransport(), asyncio.Protocol(), is_server=False)


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
