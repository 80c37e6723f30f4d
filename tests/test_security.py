"""Strangers, thieves, hostile clients and odd networks: what they must not get.

The hostile client here is made of pytunnel's own pure functions, so that it gets through the handshake and
can then say whatever it likes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import pty
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support import (
    ROOT,
    Header,
    Process,
    RawOrigin,
    RawRequest,
    RawVisitor,
    Truncated,
    Tunnel,
    eventually,
    free_port,
    request,
    response,
    with_limits,
)
from test_doctor import certificate

from pytunnel import (
    END,
    HANDSHAKE_TIMEOUT,
    INTERIM,
    LINK_PATH,
    MAX_DATA,
    MAX_HANDSHAKES_EACH,
    MAX_HELLO,
    MAX_INTERIM,
    MAX_MESSAGE,
    MAX_TUNNELS,
    OPEN_HEADER,
    PROTOCOL_VERSION,
    SUBPROTOCOL,
    ZSTD,
    Frame,
    FrameDecoder,
    FrameType,
    Message,
    RequestHead,
    TunnelServer,
    client_proof,
    compress,
    encode_frame,
    encode_message,
    key_id,
)

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter

TOKEN = "test-token-0123456789abcdef0123456789abcdef"
OTHER_TOKEN = "another-token-0123456789abcdef0123456789"
LINK_HEADERS: list[Header] = [
    (b"Connection", b"Upgrade"),
    (b"Upgrade", b"websocket"),
    (b"Sec-WebSocket-Version", b"13"),
    (b"Sec-WebSocket-Key", base64.b64encode(bytes(16))),
]
PROTOCOL = (b"Sec-WebSocket-Protocol", SUBPROTOCOL.encode())
PATIENCE = 25.0  # seconds, for what takes ten


@contextlib.asynccontextmanager
async def serving(*args: str, tokens: Iterable[str] = (TOKEN,)) -> AsyncIterator[tuple[Process, int]]:
    """A server and its port."""
    given = [word for token in tokens for word in ("--token", token)]
    async with await Process.start("serve", "--listen", "127.0.0.1:0", *given, "--json", *args) as server:
        yield server, (await server.event("listening"))["port"]


def assert_calm(server: Process) -> None:
    """The server runs, and what happened was no surprise to it."""
    assert server.returncode is None
    text = "\n".join(server.stderr)
    assert "Traceback" not in text, text
    assert "a request failed" not in text, text


async def for_each(cases: Iterable[str], check: Callable[[str], Awaitable[None]]) -> None:
    """Check all cases against one server, and raise what failed with the case's name."""
    errors: list[Exception] = []
    for case in cases:
        try:
            await check(case)
        except (AssertionError, OSError) as error:  # TimeoutError and ConnectionError are OSErrors
            error.add_note(f"case: {case}")
            errors.append(error)
    if errors:
        raise ExceptionGroup(f"{len(errors)} cases: {', '.join(error.__notes__[-1] for error in errors)}", errors)


# ---------------------------------------------------------------------------------------- A client of our own


class Peer:
    """A client that shakes hands like pytunnel's own, and then sends what it is told to."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse, port: int) -> None:
        self.ws, self.port = ws, port
        self.session = ""
        self.resumed = False
        self._decoder = FrameDecoder()
        self._frames: list[Frame] = []

    # The handshake, in steps

    async def hello(self, token: str = TOKEN, **fields: Any) -> Message:
        """Send a hello, with fields of choice, and return what is answered."""
        self.token = token
        usual: dict[str, object] = {
            "version": PROTOCOL_VERSION,
            "key": key_id(token),
            "nonce": "nonce",
            "server": f"http://127.0.0.1:{self.port}",
            "tunnels": ["web"],
            "session": "",
            "received": 0,
        }
        self.said = encode_message("hello", **{**usual, **fields})
        return await self.say(self.said)

    async def prove(self, challenge: Message) -> None:
        """Send the right proof."""
        auth_message = f"{self.said}\n{challenge.text}".encode()
        iterations = challenge.number("iterations", 1, 10**6)
        proof, _ = client_proof(self.token, challenge.bytes("salt"), iterations, auth_message)
        await self.ws.send_str(encode_message("proof", proof=base64.b64encode(proof).decode()))

    async def answer(self) -> Message:
        """Return the server's next text."""
        async with asyncio.timeout(PATIENCE):
            message = await self.ws.receive()
        assert message.type is aiohttp.WSMsgType.TEXT, message
        return Message(message.data)

    async def say(self, text: str) -> Message:
        """Send a text and return what is answered."""
        await self.ws.send_str(text)
        return await self.answer()

    async def shake_hands(self, **fields: Any) -> Message:
        """Do all of it and return the ready."""
        await self.prove(await self.hello(**fields))
        ready = await self.answer()
        assert ready.get("type", str) == "ready", ready.text
        self.session, self.resumed = ready.get("session", str), ready.get("resumed", bool)
        return ready

    # Frames

    async def send(self, type_: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> None:
        """Send one frame, right or wrong."""
        await self.ws.send_bytes(encode_frame(type_, flags, stream_id, payload))

    async def head(self, stream_id: int, *parts: bytes, flags: int = 0) -> None:
        """Send a HEAD: status, reason, name, value, ..."""
        await self.send(FrameType.HEAD, flags, stream_id, b"\0".join(parts))

    async def data(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        """Send a DATA."""
        await self.send(FrameType.DATA, END if end else 0, stream_id, data)

    async def frame(self, type_: FrameType) -> Frame:
        """Return the next frame of that type."""
        return await self._next(lambda frame: frame.type == type_)

    async def frame_of(self, stream_id: int) -> Frame:
        """Return the next frame of that stream that tells something about its exchange."""
        told = (FrameType.HEAD, FrameType.DATA, FrameType.RESET)
        return await self._next(lambda frame: frame.stream_id == stream_id and frame.type in told)

    async def _next(self, fits: Callable[[Frame], bool]) -> Frame:
        async with asyncio.timeout(PATIENCE):
            while True:
                for index, frame in enumerate(self._frames):
                    if fits(frame):
                        return self._frames.pop(index)
                message = await self.ws.receive()
                assert message.type is aiohttp.WSMsgType.BINARY, message
                self._frames += self._decoder.feed(message.data)

    async def synchronise(self) -> None:
        """Return when the server has dealt with all that was sent."""
        await self.send(FrameType.PING, payload=bytes(8))
        await self.frame(FrameType.PONG)

    async def opened(self) -> tuple[int, RequestHead]:
        """Return the next stream's id and request."""
        frame = await self.frame(FrameType.OPEN)
        return frame.stream_id, RequestHead.decode(frame.payload[OPEN_HEADER.size :])

    async def closed(self, timeout: float = 5.0) -> None:
        """Return when the server has ended the connection."""
        async with asyncio.timeout(timeout):
            while (await self.ws.receive()).type not in (
                aiohttp.WSMsgType.CLOSE,
                aiohttp.WSMsgType.CLOSING,
                aiohttp.WSMsgType.CLOSED,
                aiohttp.WSMsgType.ERROR,
            ):
                pass


@contextlib.asynccontextmanager
async def dialled(port: int) -> AsyncIterator[Peer]:
    """A Peer that has not said anything yet."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(
            f"http://127.0.0.1:{port}{LINK_PATH}",
            protocols=[SUBPROTOCOL],
            compress=0,
            timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
        ) as ws,
    ):
        yield Peer(ws, port)


@contextlib.asynccontextmanager
async def linked(port: int, name: str = "web", token: str = TOKEN) -> AsyncIterator[Peer]:
    """A Peer that has a tunnel."""
    async with dialled(port) as peer:
        await peer.shake_hands(token=token, tunnels=[name])
        yield peer


async def assert_logins_work(port: int, name: str = "honest") -> None:
    async with linked(port, name):
        pass


# ---------------------------------------------------------------------------------------- Tokens


@pytest.mark.parametrize("stdout", ["json", "text"])
async def test_a_wrong_token_exits_with_3_and_one_line(stdout: str) -> None:
    async with serving() as (server, port):
        args = ["--json"] if stdout == "json" else []
        async with await Process.start(
            "connect", "1", "--server", f"http://127.0.0.1:{port}", "--token", OTHER_TOKEN, *args
        ) as client:
            assert await client.wait() == 3
            assert len(client.stderr) == 1
            assert client.stderr[0].startswith("error: ")
            assert OTHER_TOKEN not in client.stderr[0] + "".join(client.stdout)
            assert [json.loads(line)["code"] for line in client.stdout] == (["token"] if args else [])
        assert_calm(server)
        await assert_logins_work(port)


async def test_an_unknown_key_and_a_wrong_proof_look_the_same() -> None:
    async def attempt(port: int, key: str, proof: bytes) -> tuple[list[object], str, str]:
        async with dialled(port) as peer:
            challenge = await peer.hello(key=key)
            salt, nonce = challenge.get("salt", str), challenge.get("nonce", str)
            refused = await peer.say(encode_message("proof", proof=base64.b64encode(proof).decode()))
            await peer.closed()
            shape = [*json.loads(challenge.text), len(nonce), challenge.get("iterations", int), len(salt)]
            return shape, salt, refused.text

    async with serving() as (server, port):
        known = [await attempt(port, key_id(TOKEN), bytes(32)) for _ in range(2)]
        unknown = [await attempt(port, key_id(OTHER_TOKEN), bytes(32)) for _ in range(2)]
        assert known[0] == known[1]
        assert unknown[0] == unknown[1], "a salt that changes tells that the key is made up"
        stranger = await attempt(port, "0123456789abcdef", bytes(32))
        assert len({known[0][1], unknown[0][1], stranger[1]}) == 3, "a salt that keys share tells the same"
        assert known[0][0] == unknown[0][0]
        assert known[0][2] == unknown[0][2]
        assert json.loads(known[0][2])["code"] == "token"
        for proof in (b"", bytes(31), bytes(33), bytes(4000)):
            assert (await attempt(port, key_id(TOKEN), proof))[2] == known[0][2]
        assert_calm(server)


@contextlib.asynccontextmanager
async def serving_here(state: Path, *tokens: str) -> AsyncIterator[int]:
    """A server in this process, and its port."""
    server = TunnelServer(tokens=tokens, state=state, listen=[("127.0.0.1", 0)])
    await server.start()
    try:
        yield server.port
    finally:
        await server.close()


async def test_every_guess_costs_the_same_and_is_compared_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not measured but counted: the same steps over the same lengths, whatever was guessed, and one comparison."""
    guesses = {
        "no token": (key_id(""), b""),
        "a short one": (key_id("x"), b"x"),
        "another one": (key_id(OTHER_TOKEN), bytes(32)),
        "the beginning of the right one": (key_id(TOKEN[:-1]), bytes(32)),
        "no key": ("", bytes(32)),
        "a key that is none": ("x" * 1000, bytes(32)),
        "the right key, and no proof": (key_id(TOKEN), b""),
        "the right key, and half a proof": (key_id(TOKEN), bytes(31)),
        "the right key, and too much of a proof": (key_id(TOKEN), bytes(4000)),
        "the right key, and a wrong proof": (key_id(TOKEN), bytes(32)),
    }
    steps: list[tuple[object, ...]] = []

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def watched(*args: Any, **options: Any) -> Any:
            steps.append((name, *(len(arg) for arg in args if name == "compare_digest")))
            return real(*args, **options)

        monkeypatch.setattr(module, name, watched)

    async def guess(port: int, key: str, proof: bytes) -> tuple[str, list[tuple[object, ...]]]:
        async with dialled(port) as peer:
            steps.clear()
            await peer.hello(key=key)
            refused = await peer.say(encode_message("proof", proof=base64.b64encode(proof).decode()))
            return refused.text, list(steps)

    async with serving_here(tmp_path, TOKEN) as port:
        for module, name in ((hmac, "compare_digest"), (hmac, "digest"), (hashlib, "pbkdf2_hmac")):
            watch(module, name)
        outcomes = {name: await guess(port, key, proof) for name, (key, proof) in guesses.items()}
        (refused,) = {refused for refused, _ in outcomes.values()}
        assert json.loads(refused)["code"] == "token"
        for name, (_, taken) in outcomes.items():
            assert taken == outcomes["the right key, and a wrong proof"][1], name
            assert [step for step in taken if step[0] == "compare_digest"] == [("compare_digest", 32, 32)], name
        for answer, code in ((False, "refused"), (True, "ready")):  # it is what decides, for the right token and wrong
            monkeypatch.setattr(hmac, "compare_digest", lambda *_, answer=answer: answer)
            async with dialled(port) as peer:
                challenge = await peer.hello()
                await peer.prove(challenge)
                assert (await peer.answer()).get("type", str) == code
            async with dialled(port) as peer:
                await peer.hello()
                proof = base64.b64encode(bytes(32)).decode()
                assert (await peer.say(encode_message("proof", proof=proof))).get("type", str) == code


async def test_a_proof_is_good_for_one_challenge_only() -> None:
    """A recorded login cannot be played again."""
    async with serving() as (server, port):
        async with dialled(port) as peer:
            challenge = await peer.hello()
            auth_message = f"{peer.said}\n{challenge.text}".encode()
            proof, _ = client_proof(TOKEN, challenge.bytes("salt"), challenge.get("iterations", int), auth_message)
        recorded = encode_message("proof", proof=base64.b64encode(proof).decode())
        async with dialled(port) as thief:
            await thief.hello()
            assert (await thief.say(recorded)).get("code", str) == "token"
        assert_calm(server)


@pytest.mark.parametrize(
    "flags", [["--json"], [], ["--debug"], ["--verbose", "--json"]], ids=lambda flags: " ".join(flags)
)
async def test_the_token_is_never_printed_where_it_is_kept(tmp_path: Path, flags: list[str]) -> None:
    """Not by serve, which makes one, nor by connect, which finds it; stderr is a pipe."""
    async with RawOrigin(response(b"hello")) as origin:
        port = free_port()
        async with await Process.start("serve", "--listen", f"127.0.0.1:{port}", *flags, home=tmp_path) as server:
            await (server.event("listening") if "--json" in flags else server.stderr_line("listening"))
            token = (tmp_path / "state" / "token").read_text().strip()
            assert len(token) >= 22, "128 bits"
            url = f"http://127.0.0.1:{port}"
            async with await Process.start(
                "connect", f"{origin.port}", "--server", url, "--name", "web", *flags, home=tmp_path
            ) as client:
                await client.stdout_line("http://web.localhost")
                async with RawVisitor(port) as visitor:
                    await visitor.send(request(host=b"web.localhost"))
                    assert (await visitor.read_response()).body == b"hello"
                client.send_signal(2)
                assert await client.wait() == 0
            server.send_signal(2)
            assert await server.wait() == 0
            for process in (server, client):
                assert token not in process.output()


async def test_the_token_is_printed_on_a_terminal(tmp_path: Path) -> None:
    """The counterpart: there it is what the user has to paste."""
    master, slave = pty.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(ROOT / "pytunnel.py"), "serve", "--listen", "127.0.0.1:0",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=slave,
            env={"PATH": os.environ["PATH"], "PYTUNNEL_STATE_DIR": str(tmp_path)}, start_new_session=True,
        )  # fmt: skip
        try:
            os.set_blocking(master, False)
            text = bytearray()

            def printed() -> bool:
                with contextlib.suppress(BlockingIOError):
                    text.extend(os.read(master, 65536))
                return b"PYTUNNEL_TOKEN=" in text and text.endswith(b"\n")

            await eventually(printed, 10, "the line to paste")
            assert (tmp_path / "token").read_text().strip() in text.decode()
        finally:
            process.kill()
            await process.wait()
            process._transport.close()  # type: ignore[attr-defined]
    finally:
        os.close(master)
        os.close(slave)


async def test_what_is_kept_is_private(tmp_path: Path) -> None:
    port = free_port()
    async with (
        RawOrigin(response(b"hello")) as origin,
        await Process.start("serve", "--listen", f"127.0.0.1:{port}", "--json", home=tmp_path) as server,
    ):
        await server.event("listening")
        url = f"http://127.0.0.1:{port}"
        async with await Process.start("connect", f"{origin.port}", "--server", url, "--json", home=tmp_path) as client:
            await client.event("ready")
            found = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
            files = {path.name: path.stat().st_mode & 0o777 for path in found if path.is_file()}
            assert {"token", "names.json", "client.json"} <= set(files)
            assert set(files.values()) == {0o600}, files
            assert {path.stat().st_mode & 0o777 for path in found if path.is_dir()} == {0o700}


async def test_a_token_that_is_given_is_not_kept_by_the_server(tmp_path: Path) -> None:
    async with await Process.start(
        "serve", "--listen", "127.0.0.1:0", "--token", TOKEN, "--json", home=tmp_path
    ) as server:
        port = (await server.event("listening"))["port"]
        await assert_logins_work(port)
        for path in (tmp_path / "state").iterdir():
            assert TOKEN not in path.read_text()


# ---------------------------------------------------------------------------------------- Who may open a link


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([*LINK_HEADERS, PROTOCOL, (b"Origin", b"https://evil.example")], 403),
        ([*LINK_HEADERS, PROTOCOL, (b"Origin", b"null")], 403),
        (LINK_HEADERS, 426),
        ([*LINK_HEADERS, (b"Sec-WebSocket-Protocol", b"pytunnel.2")], 426),
        ([*LINK_HEADERS, (b"Sec-WebSocket-Protocol", b"pytunnel.10")], 426),
        ([*LINK_HEADERS, (b"Sec-WebSocket-Protocol", b"not-pytunnel.1")], 426),
        ([PROTOCOL], 426),
        ([], 426),
    ],
    ids=["origin", "origin-null", "no-protocol", "pytunnel.2", "pytunnel.10", "not-pytunnel.1", "no-upgrade", "bare"],
)
async def test_a_link_that_is_refused(headers: list[Header], status: int) -> None:
    async with serving() as (server, port):
        async with RawVisitor(port) as visitor:
            await visitor.send(request(target=LINK_PATH.encode(), headers=headers))
            assert (await visitor.read_response()).status == status
        await assert_logins_work(port)
        assert_calm(server)


async def test_a_link_to_a_tunnels_host_is_the_local_services_business() -> None:
    headers = [*LINK_HEADERS, PROTOCOL]
    async with RawOrigin(response(b"mine", 404)) as origin, Tunnel(origin.port) as tunnel:
        for extra in ([], headers):
            got = await tunnel.get(LINK_PATH.encode(), extra)
            assert (got.status, got.body) == (404, b"mine")
        assert origin.requests[1].value(b"Sec-WebSocket-Protocol") == SUBPROTOCOL.encode()
        assert tunnel.client.returncode is None


async def test_half_handshakes_are_dropped_and_do_not_keep_others_out() -> None:
    """200 sockets that stop after the 101; of one address only some get that far, of another one comes in meanwhile."""
    sockets = 200

    async def stop_half_way(port: int, stack: contextlib.AsyncExitStack) -> tuple[int, RawVisitor]:
        visitor = await stack.enter_async_context(RawVisitor(port, timeout=PATIENCE, source="127.0.0.2"))
        await visitor.send(request(target=LINK_PATH.encode(), headers=[*LINK_HEADERS, PROTOCOL]))
        head = await visitor.read_head()
        if head.status != 101:
            _ = [piece async for piece in visitor.iter_body(head)]
        return head.status, visitor

    async with serving() as (server, port), contextlib.AsyncExitStack() as stack:
        before = server.fd_count()
        began = time.monotonic()
        answers = await asyncio.gather(*(stop_half_way(port, stack) for _ in range(sockets)))
        statuses = [status for status, _ in answers]
        assert (statuses.count(101), statuses.count(429)) == (MAX_HANDSHAKES_EACH, sockets - MAX_HANDSHAKES_EACH)
        await assert_logins_work(port)
        async with RawVisitor(port) as visitor:
            await visitor.send(request(target=b"/healthz"))
            assert (await visitor.read_response()).status == 200
        half_open = [visitor for status, visitor in answers if status == 101]
        await asyncio.gather(*(visitor.read_until_close() for visitor in half_open))
        seconds = time.monotonic() - began
        print(f"\n{len(half_open)} half-handshakes dropped after {seconds:.1f} s")
        assert seconds < HANDSHAKE_TIMEOUT + 5
        await assert_logins_work(port)
        await stack.aclose()
        await eventually(lambda: server.fd_count() <= before, 5, "no descriptor is left behind")
        assert_calm(server)


# ---------------------------------------------------------------------------------------- Words out of place

DEEP = "[" * 8000 + "]" * 8000
HELLOS: dict[str, str] = {
    "empty": "",
    "not JSON": "hello",
    "an array": "[]",
    "a number": "1",
    "nested too deeply": '{"type":"hello","version":' + DEEP + "}",
    "too long": json.dumps({"type": "hello", "version": 1, "pad": "x" * MAX_HELLO}),
    "an endless number": '{"type":"hello","version":' + "9" * 5000 + "}",
    "NaN": '{"type":"hello","version":NaN}',
    "no version": '{"type":"hello"}',
    "another version": '{"type":"hello","version":2}',
    "true for a version": '{"type":"hello","version":true}',
    "no key": '{"type":"hello","version":1,"nonce":"n"}',
    "a key that is a number": '{"type":"hello","version":1,"key":1,"nonce":"n"}',
    "a nonce that is null": '{"type":"hello","version":1,"key":"k","nonce":null}',
}


async def test_a_hello_that_makes_no_sense_is_refused() -> None:
    async with serving() as (server, port):

        async def check(name: str) -> None:
            async with dialled(port) as peer:
                refused = await peer.say(HELLOS[name])
                assert refused.get("type", str) == "refused"
                assert refused.get("retry", bool) is False
                await peer.closed()

        await for_each(HELLOS, check)
        assert_calm(server)


async def test_names_that_no_encoding_can_hold_are_refused_like_others() -> None:
    """JSON can say half of a surrogate pair, UTF-8 cannot."""
    async with serving() as (server, port):
        for field in ("key", "nonce"):
            async with dialled(port) as peer:
                refused = await peer.hello(**{field: "\ud800"})
                assert (refused.get("type", str), refused.get("code", str)) == ("refused", "protocol")
        for field in ("server", "session", "agent"):
            async with dialled(port) as peer:
                await peer.prove(await peer.hello(**{field: "\ud800"}))
                assert (await peer.answer()).get("type", str) in ("ready", "refused")
        assert_calm(server)


WISHES: dict[str, dict[str, Any]] = {
    "tunnels that are no list": {"tunnels": "web"},
    "one name twice": {"tunnels": ["web", "web"]},
    "too many tunnels": {"tunnels": [f"web{n}" for n in range(MAX_TUNNELS + 1)]},
    "null for a name": {"tunnels": [None]},
    "a name with a dot": {"tunnels": ["a.b"]},
    "a reserved name": {"tunnels": ["www"]},
    "a hyphen for a name": {"tunnels": ["-"]},
    "half a surrogate pair": {"tunnels": ["\ud800"]},
    "a name of 64 characters": {"tunnels": ["x" * 64]},
    "an escape sequence": {"tunnels": ["\x1b[31m"]},
    "another scheme": {"server": "gopher://x"},
    "a host with a space": {"server": "http://a b"},
    "half an address": {"server": "http://[::1"},
    "no window": {"window": 0},
    "a window without end": {"window": 2**40},
    "less than no streams": {"streams": -1},
    "a session that is a number": {"session": 7},
}


async def test_a_client_with_a_token_may_not_ask_for_anything() -> None:
    """It is told so, in a way that ends it: a client that is just cut off would dial for ever."""
    async with serving() as (server, port):

        async def check(wish: str) -> None:
            async with dialled(port) as peer:
                await peer.prove(await peer.hello(**WISHES[wish]))
                refused = await peer.answer()
                assert refused.get("type", str) == "refused"
                assert refused.get("retry", bool) is False
                assert refused.get("reason", str).isprintable()
                await peer.closed()

        await for_each(WISHES, check)
        await assert_logins_work(port)
        assert_calm(server)


async def test_a_handshake_in_binary_is_refused() -> None:
    async with serving() as (server, port):
        async with dialled(port) as peer:
            await peer.ws.send_bytes(b"\0" * 100)
            assert (await peer.answer()).get("type", str) == "refused"
            await peer.closed()
        assert_calm(server)


GARBAGE: dict[str, str | bytes] = {
    "text": "hello",
    "noise": b"\xa5" * 1000,
    "half a header": encode_frame(FrameType.DATA, 0, 1, b"x")[:5],
    "a frame cut short": encode_frame(FrameType.ACK, 0, 0, bytes(8))[:-1],
    "an unknown type": encode_frame(77, 0, 0),
    "a frame that is too long": encode_frame(FrameType.RESET, 0, 1, bytes(5000)),
    "DATA on stream 0": encode_frame(FrameType.DATA, 0, 0, b"x"),
    "DATA on a stream that is not open": encode_frame(FrameType.DATA, 0, 99, b"x"),
    "HEAD on a stream that is not open": encode_frame(FrameType.HEAD, 0, 1, b"200\0OK"),
    "an OPEN": encode_frame(FrameType.OPEN, 0, 1, OPEN_HEADER.pack(0, 0, 0) + b"GET\0/"),
    "an ACK of what was never sent": encode_frame(FrameType.ACK, 0, 0, (10**6).to_bytes(8, "big")),
    "a message that is too long": encode_frame(200, 0, 0, bytes(1000)) * (MAX_MESSAGE // 1000 + 10),
}


async def test_garbage_ends_the_link_and_nothing_else() -> None:
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port) as tunnel:

        async def check(name: str) -> None:
            async with linked(tunnel.port, "hostile") as peer:
                data = GARBAGE[name]
                await (peer.ws.send_str(data) if isinstance(data, str) else peer.ws.send_bytes(data))
                await peer.closed()
            assert (await tunnel.get()).body == b"hello"

        await for_each(GARBAGE, check)
        assert tunnel.client.returncode is None
        assert {event["event"] for event in tunnel.client.events} == {"request"}, "its link was never lost"
        assert_calm(tunnel.server)


# ---------------------------------------------------------------------------------------- A client that lies

FAKE = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
HONEST = (b"200", b"OK", b"Content-Length", b"6")

Lie = Callable[[Peer, int], Any]


def lie(*parts: bytes, body: bytes = FAKE, flags: int = 0) -> Lie:
    """A HEAD and a body that do not belong together."""

    async def tell(peer: Peer, stream_id: int) -> None:
        await peer.head(stream_id, *parts, flags=flags)
        await peer.data(stream_id, body, end=True)

    return tell


async def two_heads(peer: Peer, stream_id: int) -> None:
    await peer.head(stream_id, *HONEST)
    await peer.head(stream_id, *HONEST)
    await peer.data(stream_id, b"poison", end=True)


async def a_final_head_called_interim(peer: Peer, stream_id: int) -> None:
    await peer.head(stream_id, *HONEST, flags=INTERIM)
    await peer.head(stream_id, *HONEST)
    await peer.data(stream_id, b"poison", end=True)


async def a_101_called_interim(peer: Peer, stream_id: int) -> None:
    await peer.head(stream_id, b"101", b"Switching Protocols", b"Upgrade", b"websocket", flags=INTERIM)
    await peer.data(stream_id, FAKE, end=True)


async def eleven_interim_heads(peer: Peer, stream_id: int) -> None:
    for _ in range(MAX_INTERIM + 1):
        await peer.head(stream_id, b"103", b"Early Hints", flags=INTERIM)
    await peer.head(stream_id, *HONEST)
    await peer.data(stream_id, b"poison", end=True)


async def more_than_announced_in_pieces(peer: Peer, stream_id: int) -> None:
    await peer.head(stream_id, *HONEST)
    for data in (b"honest", FAKE):
        await peer.data(stream_id, data)
        await peer.synchronise()
    await peer.data(stream_id, b"", end=True)


async def data_for_the_next_stream(peer: Peer, stream_id: int) -> None:
    await peer.data(stream_id + 1, FAKE)
    await peer.head(stream_id, *HONEST)


async def data_before_the_head(peer: Peer, stream_id: int) -> None:
    await peer.data(stream_id, FAKE)
    await peer.head(stream_id, *HONEST)


async def data_after_the_end(peer: Peer, stream_id: int) -> None:
    await peer.head(stream_id, *HONEST)
    await peer.data(stream_id, b"honest", end=True)
    await peer.data(stream_id, FAKE)


async def past_the_window(peer: Peer, stream_id: int) -> None:
    """In one packet, so that the server's reader has no time to consume and to grant more."""
    await peer.head(stream_id, b"200", b"OK")
    frame = encode_frame(FrameType.DATA, ZSTD, stream_id, compress(bytes(MAX_DATA)))
    await peer.ws.send_bytes(2 * frame)


LIES: dict[str, Lie] = {
    "a 204 with content": lie(b"204", b"No Content"),
    "a 204 with content and a length": lie(b"204", b"No Content", b"Content-Length", b"%d" % len(FAKE)),
    "a 304 with content": lie(b"304", b"Not Modified"),
    "more than Content-Length": lie(*HONEST, body=b"honest" + FAKE),
    "more than Content-Length, in pieces": more_than_announced_in_pieces,
    "less than Content-Length": lie(b"200", b"OK", b"Content-Length", b"1000"),
    "nothing of Content-Length": lie(b"200", b"OK", b"Content-Length", b"1000", body=b""),
    "two Content-Lengths": lie(b"200", b"OK", b"Content-Length", b"6", b"Content-Length", b"%d" % len(FAKE)),
    "a Content-Length with a sign": lie(b"200", b"OK", b"Content-Length", b"+6"),
    "chunked": lie(b"200", b"OK", b"Transfer-Encoding", b"chunked", body=b"0\r\n\r\n" + FAKE),
    "chunked and a length": lie(
        *(b"200", b"OK", b"Transfer-Encoding", b"chunked", b"Content-Length", b"%d" % (5 + len(FAKE))),
        body=b"0\r\n\r\n" + FAKE,
    ),
    "Connection": lie(
        b"200", b"OK", b"Connection", b"keep-alive, content-length", b"Content-Length", b"6", body=b"honest"
    ),
    "a header that ends the head": lie(b"200", b"OK", b"X", b"y\r\n\r\n" + FAKE),
    "a header name that ends the head": lie(b"200", b"OK", b"X: y\r\n\r\n" + FAKE, b"y"),
    "a reason that ends the head": lie(b"200", b"OK\r\n\r\n" + FAKE),
    **{f"a status that is none, {v!r}": lie(v, b"OK") for v in (b"2000", b"20", b"99", b"099", b"600", b"999", b"")},
    **{
        f"{c!r} in a {part}": lie(b"200", c if part == "reason" else b"OK", b"X", c if part == "field" else b"y")
        for part in ("reason", "field")
        for c in (b"\x01", b"\x7f", b"\x1b[2J", b"\r", b"\n")
    },
    "an interim head that is a 101": a_101_called_interim,
    "a length for a 204, and that much": lie(b"204", b"No Content", b"Content-Length", b"6", body=b"poison"),
    "eleven interim heads": eleven_interim_heads,
    "a 101 that nobody asked for": lie(b"101", b"Switching Protocols", b"Upgrade", b"websocket"),
    "a 100 that is final": lie(b"100", b"Continue"),
    "a 103 with content": lie(b"103", b"Early Hints"),
    "a head of nothing": lie(b"\0"),
    "two heads": two_heads,
    "a final head called interim": a_final_head_called_interim,
    "data for a stream that is not open": data_for_the_next_stream,
    "data before the head": data_before_the_head,
    "data after the end": data_after_the_end,
    "data past the window": past_the_window,
}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_lying_client_gives_the_visitor_one_response_at_most(method: str) -> None:
    """Two requests on one connection: what the client makes of the first must not pass for an answer to the second."""

    async def check(name: str) -> None:
        async with linked(port) as peer, RawVisitor(port, timeout=5) as visitor:
            await visitor.send(request(method, b"/lie", b"web.localhost"))
            stream_id, _ = await peer.opened()
            with contextlib.suppress(ConnectionError):
                await LIES[name](peer, stream_id)
            try:
                got = await visitor.read_response(method)
            except Truncated as error:
                assert error.data == b""
                return
            assert b"poison" not in got.head
            if visitor.ended or not got.clean or got.value(b"Connection") == b"close":
                assert b"HTTP/1." not in await visitor.read_until_close()
                return
            await ask_for_the_truth(peer, visitor)

    async with serving("--hold", "0.2") as (server, port):
        await for_each(LIES, check)
        assert_calm(server)


async def ask_for_the_truth(peer: Peer, visitor: RawVisitor) -> None:
    """A second request on the visitor's connection, to which the client's answer, if it still has a link, is honest."""
    with contextlib.suppress(ConnectionError):  # the server may have ended the connection by now
        await visitor.send(request(target=b"/honest", host=b"web.localhost"))
    second = asyncio.ensure_future(visitor.read_response())
    opened = asyncio.ensure_future(peer.opened())
    await asyncio.wait({second, opened}, return_when=asyncio.FIRST_COMPLETED)
    if opened.done() and opened.exception() is None:
        assert not second.done(), "answered before the client was asked"
        stream_id, head = opened.result()
        assert head.target == b"/honest"
        await peer.head(stream_id, *HONEST)
        await peer.data(stream_id, b"honest", end=True)
        got = await second
        assert (got.status, got.body) == (200, b"honest")
        return
    opened.cancel()
    with contextlib.suppress(Truncated):  # its link is gone: an error, or the end of the connection
        assert (await second).status in (502, 503)
    await asyncio.gather(opened, return_exceptions=True)


async def test_a_lying_client_never_reaches_a_stream_of_another_session() -> None:
    """Stream ids are the session's own: what it says of ids that are open elsewhere stays with it."""
    release = asyncio.Event()

    async def serve(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhon")
        await release.wait()
        writer.write(b"est")

    async with RawOrigin(serve) as origin, Tunnel(origin.port) as tunnel:
        for said in (
            encode_frame(FrameType.DATA, END, 1, b"poison"),
            encode_frame(FrameType.HEAD, 0, 1, b"200\0OK"),
            encode_frame(FrameType.RESET, 0, 1, b"\0\0"),
            encode_frame(FrameType.WINDOW, 0, 1, b"\0\0\0\1"),
        ):
            release.clear()
            async with tunnel.visitor() as visitor, linked(tunnel.port, "hostile") as peer:
                await visitor.send(tunnel.request())
                head = await visitor.read_head()
                await peer.ws.send_bytes(said)
                await peer.closed()
                release.set()
                assert b"".join([piece async for piece in visitor.iter_body(head)]) == b"honest"
        assert_calm(tunnel.server)


# ---------------------------------------------------------------------------------------- Sessions

TWO_TOKENS = f"""
import asyncio, json, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import pytunnel

async def serve():
    state = pathlib.Path(sys.argv[1])
    server = pytunnel.TunnelServer(tokens=[{TOKEN!r}, {OTHER_TOKEN!r}], state=state, listen=[("127.0.0.1", 0)])
    await server.start()
    print(json.dumps({{"event": "listening", "port": server.port}}), flush=True)
    await asyncio.Event().wait()

asyncio.run(serve())
"""


async def test_a_session_is_resumed_by_its_own_token_only(tmp_path: Path) -> None:
    async with await Process.start(f"{tmp_path}", command=[sys.executable, "-c", TWO_TOKENS]) as server:
        port = (await server.event("listening"))["port"]
        async with linked(port) as owner, RawVisitor(port) as visitor:
            await visitor.send(request(host=b"web.localhost"))
            stream_id, _ = await owner.opened()
            async with dialled(port) as thief:
                await thief.shake_hands(token=OTHER_TOKEN, tunnels=["own"], session=owner.session)
                assert not thief.resumed
                assert thief.session != owner.session
            async with dialled(port) as thief:
                await thief.prove(await thief.hello(token=OTHER_TOKEN, session=owner.session))
                assert (await thief.answer()).get("code", str) == "name"
            await owner.head(stream_id, *HONEST)
            await owner.data(stream_id, b"honest", end=True)
            assert (await visitor.read_response()).body == b"honest"
        assert_calm(server)


async def test_another_token_s_tunnel_can_be_neither_taken_nor_ended_nor_looked_into(tmp_path: Path) -> None:
    """All a server offers a client is its own session: there is no more to refuse than names and sessions."""

    async def assert_owned(owner: Peer) -> None:
        async with RawVisitor(port) as visitor:
            await visitor.send(request(host=b"web.localhost"))
            stream_id, _ = await owner.opened()
            await owner.head(stream_id, *HONEST)
            await owner.data(stream_id, b"honest", end=True)
            assert (await visitor.read_response()).body == b"honest"

    async with serving_here(tmp_path, TOKEN, OTHER_TOKEN) as port, linked(port) as owner:
        for tunnels in (["web"], ["own", "web"], ["web", "own"]):
            for session in ("", owner.session):
                async with dialled(port) as thief:
                    await thief.prove(await thief.hello(token=OTHER_TOKEN, tunnels=tunnels, session=session))
                    refused = await thief.answer()
                    assert (refused.get("code", str), refused.get("retry", bool)) == ("name", False)
                await assert_owned(owner)
        async with linked(port, "own", OTHER_TOKEN) as thief:
            await thief.send(FrameType.GOAWAY, payload=b"\0\0")
            await thief.synchronise()
            await assert_owned(owner)
        paths = [
            "api/status",
            "api/exchanges",
            "api/exchanges/1/replay",
            "_pytunnel/",
            "_pytunnel/web",
            "",
        ]
        for path in paths:
            for method in ("GET", "POST", "DELETE"):
                async with RawVisitor(port) as visitor:
                    await visitor.send(request(method, b"/" + path.encode(), b"localhost", body=b""))
                    got = await visitor.read_response()
                    assert (got.status, got.value(b"X-Pytunnel-Error")) == (404, b"unknown-tunnel")
        await assert_owned(owner)


@pytest.mark.parametrize("owner", ["", None, 0, [], {}], ids=repr)
async def test_a_name_whose_owner_is_nobody_is_nobodys_to_take(tmp_path: Path, owner: object) -> None:
    (tmp_path / "names.json").write_text(json.dumps({"names": {"web": owner}, "zones": []}))
    async with serving_here(tmp_path, TOKEN) as port:
        for key in (key_id(TOKEN), ""):
            async with dialled(port) as peer:
                challenge = await peer.hello(key=key)
                await peer.prove(challenge)
                assert (await peer.answer()).get("code", str) == ("name" if key else "token")
        await assert_logins_work(port)


async def test_of_connections_that_resume_one_session_at_once_one_carries_it() -> None:
    """What the server sends must not be split between them. Several rounds, because the moment is short."""
    async with serving() as (server, port), linked(port) as first, contextlib.AsyncExitStack() as stack:
        holder = first
        for number in range(10):
            peers = [await stack.enter_async_context(dialled(port)) for _ in range(3)]
            challenges = [await peer.hello(session=first.session) for peer in peers]
            await asyncio.gather(*(peer.prove(challenge) for peer, challenge in zip(peers, challenges, strict=True)))
            await holder.closed()
            ends = {asyncio.ensure_future(peer.closed(PATIENCE)): peer for peer in peers}
            for _ in peers[1:]:
                ended, _ = await asyncio.wait(ends, timeout=5, return_when=asyncio.FIRST_COMPLETED)
                assert ended, f"round {number}: {len(ends)} connections carry one session"
                for task in ended:
                    del ends[task]
                if len(ends) == 1:
                    break
            ((waiting, holder),) = ends.items()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert_calm(server)


# ---------------------------------------------------------------------------------------- What the client dials


async def _exits_with_5(server: str, **options: Any) -> str:
    """Run a client that finds no server; return its last words."""
    began = time.monotonic()
    words = ["connect", "1", "--server", server, "--token", TOKEN, "--json"]
    async with await Process.start(*words, **options) as client:
        assert await client.wait(PATIENCE) == 5, client.output()
        print(f"\n{client.stderr}: exit after {time.monotonic() - began:.1f} s")
        assert len(client.stderr) == 1
        assert (await client.event("error"))["code"] == "unreachable"
        assert TOKEN not in "\n".join([*client.stdout, *client.stderr])
        return client.stderr[0]


async def test_a_first_dial_that_finds_no_server_exits_with_5() -> None:
    """Redirects are not followed: the user has named the one host that is to know the token."""
    async with (
        RawOrigin(response(b"elsewhere")) as elsewhere,
        RawOrigin(response(b"a web site")) as site,
        contextlib.AsyncExitStack() as stack,
        asyncio.TaskGroup() as tasks,
    ):
        location = (b"Location", f"http://127.0.0.1:{elsewhere.port}{LINK_PATH}".encode())
        redirects = [
            await stack.enter_async_context(RawOrigin(response(b"", status, [location])))
            for status in (301, 302, 307, 308)
        ]
        words = [tasks.create_task(_exits_with_5(f"http://127.0.0.1:{origin.port}")) for origin in [*redirects, site]]
        words.append(tasks.create_task(_exits_with_5(f"http://127.0.0.1:{free_port()}")))
        await asyncio.wait(words)
        assert not elsewhere.connections
        assert all("redirect" in task.result() for task in words[:4])
        assert all(origin.requests for origin in [*redirects, site])


class TlsFront:
    """Takes TLS off and goes on to a server, if there is one. `heard` is what came after a handshake."""

    def __init__(self, context: ssl.SSLContext, upstream: int = 0) -> None:
        self.context, self.upstream = context, upstream
        self.heard = bytearray()
        self.port = 0
        self._serving: dict[asyncio.Task[Any], Writer] = {}

    async def __aenter__(self) -> TlsFront:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self.cut()
        await self._server.wait_closed()

    async def cut(self) -> None:
        """End every connection."""
        for writer in self._serving.values():
            writer.close()
        await asyncio.gather(*self._serving)

    async def _serve(self, reader: Reader, writer: Writer) -> None:
        task = asyncio.current_task()
        assert task
        self._serving[task] = writer
        task.add_done_callback(self._serving.pop)
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                self.heard += data
                if self.upstream:
                    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
                    with contextlib.closing(far_writer):
                        far_writer.write(data)
                        await asyncio.gather(_pipe(reader, far_writer), _pipe(far_reader, writer))


async def test_a_server_whose_certificate_is_no_good_hears_not_a_byte(tmp_path: Path) -> None:
    """On the first dial: one line that says what is wrong with it, and the exit status for no server."""
    cases = {
        "self-signed certificate)": ("localhost", 30, False),
        "certificate is not valid for 'localhost'.)": ("other.test", 30, True),
        "certificate has expired)": ("localhost", -1, True),
    }
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        fronts, words = [], {}
        for number, (reason, (name, days, trusted)) in enumerate(cases.items()):
            directory = tmp_path / str(number)
            directory.mkdir()
            fronts.append(await stack.enter_async_context(TlsFront(certificate(directory, days, [name])[0])))
            env = {"SSL_CERT_FILE": str(directory / "chain.pem")} if trusted else {}
            server = f"https://localhost:{fronts[-1].port}"
            words[reason] = tasks.create_task(_exits_with_5(server, env=env, command=with_limits(DIAL_TIMEOUT=3.0)))
        await asyncio.wait(words.values())
        for reason, task in words.items():
            assert "its certificate is not trusted (" in task.result()
            assert reason in task.result()
        assert not any(front.heard for front in fronts)


async def test_a_client_does_not_come_back_to_a_server_whose_certificate_is_another_now(tmp_path: Path) -> None:
    """Somebody has got in between: they hear nothing, and the client tries again until the server is there again."""
    own, other = tmp_path / "own", tmp_path / "other"
    for directory in (own, other):
        directory.mkdir()
        context, _ = certificate(directory, 30, ["localhost"])
    context.load_cert_chain(own / "chain.pem", own / "key.pem")
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port) as tunnel, TlsFront(context) as front:
        front.upstream = tunnel.port
        words = ["connect", str(origin.port), "--server", f"https://localhost:{front.port}", "--token", TOKEN]
        env = {"SSL_CERT_FILE": str(own / "chain.pem")}
        async with await Process.start(*words, "--json", env=env, command=with_limits(BACKOFF_MAX=0.3)) as client:
            await client.event("ready")
            assert front.heard.startswith(b"GET " + LINK_PATH.encode())
            front.heard.clear()
            context.load_cert_chain(other / "chain.pem", other / "key.pem")
            await front.cut()
            while "its certificate is not trusted" not in (await client.event("disconnected"))["reason"]:
                pass
            assert "its certificate is not trusted" in (await client.event("disconnected"))["reason"]
            assert not front.heard
            context.load_cert_chain(own / "chain.pem", own / "key.pem")
            await client.event("reconnected")


class Proxy:
    """A forward proxy as companies have them: CONNECT, and absolute-form for plain http."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.port = 0

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: Reader, writer: Writer) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            line, _, fields = head.partition(b"\r\n")
            method, target, version = line.split(b" ")
            self.requests.append(line.decode())
            authority, slash, path = target.removeprefix(b"http://").partition(b"/")
            host, _, port = authority.rpartition(b":")
            far_reader, far_writer = await asyncio.open_connection(host.decode(), int(port))
            with contextlib.closing(far_writer):
                if method == b"CONNECT":
                    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                else:
                    far_writer.write(b" ".join([method, slash + path, version]) + b"\r\n" + fields)
                await asyncio.gather(_pipe(reader, far_writer), _pipe(far_reader, writer))


async def _pipe(reader: Reader, writer: Writer) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY"])
async def test_the_link_goes_through_the_proxy_of_the_environment(variable: str) -> None:
    async with (
        Proxy() as proxy,
        RawOrigin(response(b"hello")) as origin,
        Tunnel(origin.port, env={variable: f"http://127.0.0.1:{proxy.port}"}) as tunnel,
    ):
        assert len(proxy.requests) == 1
        assert f"127.0.0.1:{tunnel.port}" in proxy.requests[0]
        assert (await tunnel.get()).body == b"hello"
        assert len(proxy.requests) == 1, "the local service is not behind the proxy"


async def test_a_link_over_tls_asks_the_proxy_to_connect() -> None:
    async with Proxy() as proxy, RawOrigin(b"not TLS") as origin:
        env = {"https_proxy": f"http://127.0.0.1:{proxy.port}"}
        async with await Process.start(
            "connect", "1", "--server", f"https://127.0.0.1:{origin.port}", "--token", TOKEN, "--json", env=env
        ) as client:
            await origin.wait_for(lambda: origin.bytes_received, 10, "a TLS hello")
            assert client.returncode is None
            assert proxy.requests[0] == f"CONNECT 127.0.0.1:{origin.port} HTTP/1.1"
            assert TOKEN.encode() not in b"".join(bytes(connection) for connection in origin.connections)


@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY"])
async def test_no_proxy_is_honoured(variable: str) -> None:
    async with Proxy() as proxy, RawOrigin(response(b"hello")) as origin:
        env = {"http_proxy": f"http://127.0.0.1:{proxy.port}", variable: "127.0.0.1"}
        async with Tunnel(origin.port, env=env) as tunnel:
            assert (await tunnel.get()).body == b"hello"
            assert proxy.requests == []
