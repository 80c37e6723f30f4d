"""Feeds the parsers what nobody has thought of, guided by coverage: `python tests/fuzz.py frames --minutes 10`.

The promise of each target: it parses, or raises the protocol's own error; nothing else. Needs `pip install
".[fuzz]"`. Inputs that reached new code are kept in --seed-dir and are where the next run begins; one that broke the
promise is written there as `crash-...` and belongs into test_fuzz.py, which runs all seeds without atheris.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["pytunnel"]):
        import pytunnel
else:
    import pytunnel

import test_session  # noqa: E402

from pytunnel import (  # noqa: E402
    FrameDecoder,
    MessageError,
    Origin,
    ProtocolError,
    Refused,
    RequestHead,
    ResponseEncoder,
    ResponseHead,
    ResponseParser,
    encode_frame,
    encode_message,
)


def sliced(data: bytes, how: int) -> list[bytes]:
    """`data` whole, byte by byte, or in pieces whose sizes come from its own bytes."""
    if how % 3 == 0:
        return [data]
    if how % 3 == 1:
        return [data[i : i + 1] for i in range(len(data))]
    pieces, start = [], 0
    while start < len(data):
        size = 1 + data[start] % 37
        pieces.append(data[start : start + size])
        start += size
    return pieces


# Frames and sessions

CONTROL_ROOM = 100 * 1024  # bytes of replies that a few KiB of frames may cause


def frames(data: bytes) -> None:
    """One byte of choices, then what a peer sends to a session that is in the midst of things."""
    choices, data = data[0] if data else 0, data[1:]
    is_server = bool(choices & 1)
    session = (test_session.busy if choices & 2 else test_session.listener)(is_server=is_server)
    test_session.consume_everything(session, sliced(data, choices >> 2))
    for stream in session._streams.values():
        assert 0 <= stream.receive.unread <= stream.receive.size
        assert 0 <= stream.send.credit <= pytunnel.MAX_WINDOW
        assert stream.buffered == sum(map(len, stream.pending))
    assert set(session._credits) <= set(session._streams)
    assert session._control_bytes == sum(map(len, session._control)) < CONTROL_ROOM
    assert session._unacked_bytes == sum(len(part) for frame in session._unacked for part in frame)
    assert session._decoder.buffered <= pytunnel.FRAME_HEADER.size + pytunnel.MAX_DATA
    try:
        parsed = FrameDecoder().feed(data)
    except ProtocolError:
        return
    assert FrameDecoder().feed(b"".join(encode_frame(*frame) for frame in parsed)) == parsed


def frames_seeds() -> Iterator[bytes]:
    for is_server in (False, True):
        conversation = b"".join(test_session.recorded()[is_server])
        for how in range(3):
            yield bytes([is_server | how << 2]) + conversation
    for role, message, _ in test_session.HOSTILE.values():
        yield bytes([(role == "server") | 2]) + message
    for role, message in test_session.IGNORED.values():
        yield bytes([(role == "server") | 2]) + test_session.reset() + message


# A local service's response

METHODS = (b"GET", b"HEAD", b"POST", b"CONNECT")


class Reading:
    """What a parser makes of a response that comes in pieces."""

    def __init__(self, method: bytes, pieces: list[bytes]) -> None:
        self.parser = ResponseParser(method)
        self.heads: list[ResponseHead] = []
        self.content = b""
        self.end = "open"
        try:
            for piece in pieces:
                for event in self.parser.receive_data(piece):
                    if isinstance(event, ResponseHead):
                        assert not self.content
                        self.heads.append(event)
                    else:
                        assert event
                        self.content += event
            self.done_early = self.parser.done
            self.parser.receive_eof()
            self.end = "complete"
        except MessageError:
            self.end = "invalid"
        except ConnectionError:
            self.end = "cut short"


def response(data: bytes) -> None:
    """One byte of choices, then what a local service sends until it closes the connection."""
    choices, data = data[0] if data else 0, data[1:]
    method = METHODS[choices % len(METHODS)]
    whole, *others = (Reading(method, sliced(data, how)) for how in range(3))
    for other in others:
        assert other.end == whole.end, (other.end, whole.end)
        if whole.end == "invalid":  # where the error came with something good in one piece, that is lost
            assert other.heads[: len(whole.heads)] == whole.heads
            assert other.content.startswith(whole.content)
        else:
            assert (other.heads, other.content) == (whole.heads, whole.content)
            assert (other.parser.excess, other.parser.keep_alive) == (whole.parser.excess, whole.parser.keep_alive)
    if whole.end == "complete":
        deliver(method, whole, keep_alive=bool(choices & 4), http11=bool(choices & 8))


def deliver(method: bytes, reading: Reading, *, keep_alive: bool, http11: bool) -> None:
    """Frame a response for a visitor, as the server does; another parser must read the same, to the last byte."""
    encoder = ResponseEncoder(method, http11=http11, keep_alive=keep_alive)
    wire = b""
    try:
        for head in reading.heads:
            decoded = ResponseHead.decode(head.encode())
            assert decoded == head
            wire += encoder.head(decoded, b"Thu, 01 Jan 1970 00:00:00 GMT")
        wire += encoder.data(reading.content) + encoder.end()
    except MessageError:
        return
    if (status := reading.heads[-1].status) == 101:
        return
    canary = b"HTTP/1.1 204 No Content\r\n\r\n"
    visitor = Reading(method, [wire if encoder.until_close else wire + canary])
    assert visitor.end == "complete", visitor.end
    assert visitor.heads[-1].status == status
    assert visitor.content == (reading.content if reading.heads[-1].has_body(method) else b"")
    assert encoder.until_close or visitor.parser.excess == canary, visitor.parser.excess


RESPONSES = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end",
    b"HTTP/1.0 200\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\n\r\nold",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
    b'HTTP/1.1 304 Not Modified\r\nETag: "x"\r\nContent-Length: 42\r\n\r\n',
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n\x81\x05hello",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\nexcess",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\n\r\nx",
    b"HTTP/1.1 200 OK\r\nConnection: keep-alive, content-length\r\nContent-Length: 1\r\n\r\nx",
    b"HTTP/1.1 200 \x01\x1b[31m\r\nX:\ty\xff \r\n\r\n",
    b"HTTP/1.1 200 OK\nX: bare\n\n",
    b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\n\r\n",
)


def response_seeds() -> Iterator[bytes]:
    for text in RESPONSES:
        for choices in (12, 13, 4, 0):
            yield bytes([choices]) + text


# The handshake

TOKEN, NONCE, SIGNATURE = "token", "nonce", b"signature"
PROOF = base64.b64encode(bytes(32)).decode()
NOWHERE = ROOT / ".cache" / "fuzz" / "nowhere"


class Said:
    """A WebSocket on which the peer says these texts, and nothing more."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts[::-1]

    async def receive_message(self) -> pytunnel.Message:
        if not self._texts:
            raise ConnectionResetError
        return pytunnel.Message(self._texts.pop())

    def send_message(self, text: str) -> None:
        assert text.isascii()


async def to_server(texts: list[str]) -> None:
    """What a client says: hello and proof; the proof counts as good."""
    with mock.patch.object(pytunnel.Verifier, "accepts", lambda *_: True):
        server = pytunnel.TunnelServer(tokens=[], state=NOWHERE)
        server._registry = pytunnel.TunnelRegistry(NOWHERE / "names.json", grace=1.0, hold=1.0)
        server._registry._save = lambda: None  # type: ignore[method-assign]
        hello, key, _ = await server._handshake(Said(texts), pytunnel.Caller())  # type: ignore[arg-type]
        origin = Origin.from_url(hello.get("server", str))
        session, _ = await server._session_for(hello, key)
    for name in session.names:
        assert pytunnel.tunnel_name(f"{name}.{origin.zone}", [origin.zone]) == name


async def to_client(texts: list[str]) -> None:
    """What a server says: challenge and ready; the signature counts as good when it is SIGNATURE."""
    target = SimpleNamespace(text="target", tcp=False)
    tunnel: Any = SimpleNamespace(name="web", target=target, open=list, access=pytunnel.EVERYBODY)
    client = pytunnel.TunnelClient("http://localhost", TOKEN, [tunnel])
    with (
        mock.patch.object(pytunnel.secrets, "token_urlsafe", lambda _: NONCE),
        mock.patch.object(pytunnel, "client_proof", lambda *_: (bytes(32), SIGNATURE)),
    ):
        ready = await client._handshake(Said(texts))  # type: ignore[arg-type]
    link = await client._enter_session(ready)
    link.session.resume(ready.number("received", 0, 2**63), 0.0)
    assert client.url.isprintable() and len(client.url) <= 200
    assert link.session.max_streams <= pytunnel.MAX_STREAMS


def fields(data: bytes) -> None:
    """The small parsers that a request passes on its way through a server: target, host, addresses."""
    first, *lines = data.split(b"\n")
    method, _, target = first.partition(b" ")
    text = target.decode("latin-1")
    for parse in (Origin.from_url, pytunnel.parse_host, pytunnel.check_name):
        try:
            parse(text)
        except (MessageError, Refused):
            pass
    headers = [(name, value) for name, _, value in (line.partition(b":") for line in lines)]
    pytunnel.visitor_address("127.0.0.1", headers, [pytunnel.ipaddress.ip_network("127.0.0.0/8")])
    try:
        pytunnel.check_framing(headers)
        path, host = pytunnel.split_target(method, target, headers)
        assert path == b"*" or path.startswith(b"/")
        name = pytunnel.tunnel_name(pytunnel.parse_host(host.decode("latin-1"))[0], ["localhost"])
        assert name is None or "." not in name
        headers = pytunnel.forwarded(pytunnel.end_to_end(headers), "::1", "http", host, trusted=False)
        decoded = RequestHead.decode(RequestHead(method, path, headers).encode())
    except (MessageError, ProtocolError):
        return
    wire = decoded.to_wire(chunked=False, upgrade=False)
    assert wire.count(b"\n") == wire.count(b"\r") == len(decoded.headers) + 2


loop = functools.cache(asyncio.new_event_loop)


def handshake(data: bytes) -> None:
    """One byte that tells who is spoken to, then texts, one a line."""
    choices, data = data[0] if data else 0, data[1:]
    if choices % 3 == 0:
        return fields(data)
    texts = data.decode("utf-8", "replace").split("\n")
    try:
        loop().run_until_complete((to_server if choices % 3 == 1 else to_client)(texts))
    except (ProtocolError, Refused, MessageError, ConnectionError):
        pass


def handshake_seeds() -> Iterator[bytes]:
    hello = encode_message(
        "hello", version=1, key="key", nonce=NONCE, server="https://t.example.com:8443", tunnels=["web", "api"],
        session="", received=0, window=1, streams=1, agent="x", tcp={"api": 20000},
    )  # fmt: skip
    yield b"\1" + "\n".join([hello, encode_message("proof", proof=PROOF)]).encode()
    yield b"\1" + "\n".join([hello.replace("t.example.com", "[::1]"), encode_message("proof", proof="AA==")]).encode()
    salt = base64.b64encode(b"salt").decode()
    challenge = encode_message("challenge", nonce=NONCE + "x", salt=salt, iterations=pytunnel.ITERATIONS)
    ready = encode_message(
        "ready", signature=base64.b64encode(SIGNATURE).decode(), session="id", resumed=False, received=0,
        tunnels=[{"name": "web", "url": "http://web.localhost"}], window=1, streams=1, agent="x",
    )  # fmt: skip
    yield b"\2" + "\n".join([challenge, ready]).encode()
    yield b"\2" + "\n".join([challenge, encode_message("refused", code="token", reason="no", retry=False)]).encode()
    for deep in ("[" * 2000, '{"a":' * 2000, "9" * 3000, '{"type":NaN,"type":1e999}'):
        yield b"\1" + deep.encode()
    yield b"\0GET /a?b=c\nHost: web.localhost:80\nX-Forwarded-For: 1.2.3.4, ::1\nConnection: close, X"
    yield b"\0GET http://u@[::1]:80/a\nHost: a\nTransfer-Encoding: chunked"
    yield b"\0OPTIONS *\nHost: a.localhost."
    yield b"\0x https://[fe80::1%25eth0]:99999/\nHost: xn--a.localhost"


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], Iterator[bytes]]]] = {
    "frames": (frames, frames_seeds),
    "response": (response, response_seeds),
    "handshake": (handshake, handshake_seeds),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed-dir", type=Path, help="where inputs are kept (.cache/fuzz/TARGET)")
    options = parser.parse_args()
    run, seeds = TARGETS[options.target]
    directory = (options.seed_dir or ROOT / ".cache" / "fuzz" / options.target).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (directory / f"seed-{number}").write_bytes(seed)
    seconds = round(60 * options.minutes)
    atheris.Setup(
        [sys.argv[0], str(directory), f"-artifact_prefix={directory}/", f"-max_total_time={seconds}", "-max_len=4096",
         "-timeout=10", "-print_final_stats=1"],
        run,
    )  # fmt: skip
    atheris.Fuzz()


if __name__ == "__main__":
    main()
