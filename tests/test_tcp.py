"""TCP tunnels: a port of the server for each, and bytes both ways with their ends, over links that are cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support import (
    TIMEOUT,
    Cut,
    PatternChecker,
    Process,
    RawOrigin,
    RawVisitor,
    Tunnel,
    eventually,
    free_port,
    pattern,
    request,
    reset,
    response,
    with_limits,
)
from test_cli import run

import pytunnel
from pytunnel import (
    MAX_TCP_PORTS,
    MAX_TUNNELS,
    Grant,
    Message,
    ProtocolError,
    Refused,
    Target,
    TunnelClient,
    TunnelRegistry,
    UsageError,
    parse_ports,
    tcp_url,
)

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Handler = Callable[[Reader, Writer], Awaitable[None]]

KIB, MIB = 1024, 1024 * 1024
TOKEN = "test-token-0123456789abcdef0123456789abcdef"
SIZE = 16 * MIB  # of a transfer that is cut
LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
KINDS: tuple[Cut, ...] = ("reset", "close", "reset", "close")


class Service:
    """A local service that speaks anything but HTTP: the handler has each connection, which is closed after it."""

    def __init__(self, handler: Handler) -> None:
        self.port, self.accepted = 0, 0
        self.errors: list[BaseException] = []
        self.ended: asyncio.Queue[str] = asyncio.Queue()  # how each connection did: the handler's error, or ""
        self._handler = handler
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Service:
        self._server = await asyncio.start_server(self._start, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if kind is None and self.errors:
            raise self.errors[0]

    def _start(self, reader: Reader, writer: Writer) -> None:
        self.accepted += 1
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: Reader, writer: Writer) -> None:
        ended = ""
        try:
            await self._handler(reader, writer)
        except ConnectionError as error:
            ended = type(error).__name__
        except Exception as error:
            self.errors.append(error)
        finally:
            writer.close()
            self.ended.put_nowait(ended)
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def echo(reader: Reader, writer: Writer) -> None:
    while data := await reader.read(64 * KIB):
        writer.write(data)
        await writer.drain()


async def sink(reader: Reader, writer: Writer) -> None:
    while await reader.read(64 * KIB):
        pass


@contextlib.asynccontextmanager
async def tunnelled(handler: Handler, **options: object) -> AsyncIterator[tuple[Service, Tunnel]]:
    async with Service(handler) as service, Tunnel(service.port, tcp=True, **options) as t:  # type: ignore[arg-type]
        yield service, t


async def refused(*args: str) -> str:
    """What `connect` says that the server does not want."""
    finished = await run("connect", "--token", TOKEN, *args)
    assert finished.stdout == [] and finished.status == 4, finished
    return finished.error


async def is_refused(port: int) -> bool:
    """Whether a visitor is reset at once."""
    try:
        async with RawVisitor(port) as visitor:
            return await visitor.read_until_close() == b"" and visitor.ended == "reset"
    except ConnectionResetError:  # before it was even seen that it was connected
        return True


def port_of(url: str) -> int:
    return urlsplit(url).port or 0


# ---------------------------------------------------------------------------------------- Pure parts


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("tcp:22", "localhost", 22),
        ("tcp:db.local:5432", "db.local", 5432),
        ("tcp:[::1]:5432", "::1", 5432),
        ("tcp://127.0.0.1:5432", "127.0.0.1", 5432),
    ],
)
def test_a_target_may_be_tcp(text: str, host: str, port: int) -> None:
    assert Target.parse(text) == Target(text, host, port, tcp=True)


@pytest.mark.parametrize("text", ["tcp:", "tcp:host", "tcp:0", "tcp:host:0", "tcp:65536", "tcp:1:2:3", "tcp:unix:/a"])
def test_what_is_no_tcp_target(text: str) -> None:
    with pytest.raises(UsageError, match="is not a target"):
        Target.parse(text)


@pytest.mark.parametrize(
    ("text", "host", "ports"),
    [
        ("20000-20100", None, range(20000, 20101)),
        ("20000", None, range(20000, 20001)),
        (":5-6", None, range(5, 7)),
        ("127.0.0.1:5-6", "127.0.0.1", range(5, 7)),
        ("[::1]:5-6", "::1", range(5, 7)),
        (f"10000-{9999 + MAX_TCP_PORTS}", None, range(10000, 10000 + MAX_TCP_PORTS)),
    ],
)
def test_ports_of_a_server(text: str, host: str | None, ports: range) -> None:
    assert parse_ports(text) == (host, ports)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        *((text, "give FIRST-LAST") for text in ("", "-", "a-b", "1-", "-5", "1-2-3", "1" * 10)),
        *((text, "are within 1 to 65535") for text in ("0", "0-5", "1-99999999", "65530-65536", "70000-70010")),
        ("6-5", "the first port comes first"),
        (f"10000-{10000 + MAX_TCP_PORTS}", f"these are {MAX_TCP_PORTS + 1}; give {MAX_TCP_PORTS} at most"),
        ("::1:5-6", "'::1:5' is not an address to listen on"),
    ],
)
def test_what_are_no_ports(text: str, error: str) -> None:
    with pytest.raises(UsageError, match=re.escape(error)):
        parse_ports(text)


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("http://203.0.113.7:8080", "tcp://203.0.113.7:20001"),
        ("https://t.example.com", "tcp://t.example.com:20001"),
        ("http://[2001:db8::1]:8080/", "tcp://[2001:db8::1]:20001"),
    ],
)
def test_the_url_is_on_the_host_that_was_dialled(server: str, url: str) -> None:
    assert tcp_url(server, 20001) == url


def test_ports_in_a_hello_are_numbers() -> None:
    assert Message('{"tcp": {"a": 0, "b": 65535}}').numbers("tcp", 65535) == {"a": 0, "b": 65535}
    assert Message("{}").numbers("tcp", 65535) == {}
    for value in ("-1", "65536", "true", '"1"', "1.0", "null"):
        with pytest.raises(ProtocolError):
            Message(f'{{"tcp": {{"a": {value}}}}}').numbers("tcp", 65535)


class Registry(TunnelRegistry):
    """One of some ports, with tokens a and b."""

    def __init__(self, path: Path, ports: range = range(20000, 20004)) -> None:
        super().__init__(path / "names.json", grace=60.0, hold=60.0, tcp_ports=ports)
        self.keys = [pytunnel.key_id(text * 32) for text in "ab"]
        self.admit(Grant.from_token(text, text * 32, max_tunnels=None) for text in "ab")

    def port(self, name: str, wanted: int = 0, *, key: int = 0, running: bool = False) -> int:
        """What a client gets that asks for it."""
        self.claim(self.keys[key], [name])
        port = self.ports_for(name, wanted)[0]
        self.keep_ports({name: port})
        if running:
            session = pytunnel.Registration(self.keys[key], [name], pytunnel.Session(is_server=True), {}, {name: port})
            self.bind(session, "")
        return port


async def test_a_name_keeps_its_port(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    ports = {name: registry.port(name, running=True) for name in ("one", "two", "three", "four")}
    assert sorted(ports.values()) == [*range(20000, 20004)]
    assert {name: registry.port(name) for name in ports} == ports
    assert {name: Registry(tmp_path).port(name) for name in ports} == ports, "after a restart"
    (tmp_path / "names.json").unlink()
    first = Registry(tmp_path)
    assert first.port("three") == Registry(tmp_path / "other").port("three"), "a lost file changes no port of few"


async def test_a_port_is_kept_as_soon_as_it_is_given(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    first = registry.port("one")
    other = next(port for port in range(20000, 20004) if port != first)
    assert registry.port("one", other) == Registry(tmp_path).port("one") == other


async def test_a_port_is_its_name_s_until_that_is_free(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    assert registry.port("one", 20002) == 20002
    with pytest.raises(Refused, match="port 20002 belongs to another tunnel; choose another --remote-port"):
        registry.port("two", 20002, key=1)
    assert registry.port("mine", 20002) == 20002, "the token's own, which does not run"
    assert registry.port("one") != 20002
    registry.admit([Grant.from_token("b", "b" * 32)], revoked=[registry.keys[0]])
    assert registry.port("two", 20002, key=1) == 20002
    for wanted in (19999, 20004):
        with pytest.raises(Refused, match=f"port {wanted} is none for TCP tunnels, those are 20000 to 20003"):
            registry.port("two", wanted, key=1)


async def test_the_last_port_may_come_from_an_unused_name_of_the_token(tmp_path: Path) -> None:
    registry = Registry(tmp_path, range(20000, 20002))
    first = registry.port("one"), registry.port("two", running=True)
    assert registry.port("three", running=True) == first[0]
    with pytest.raises(Refused, match="all of this server's ports, 20000 to 20001, are taken"):
        registry.port("four")
    with pytest.raises(Refused, match="this server has no ports for TCP tunnels; start it with serve --tcp-ports"):
        Registry(tmp_path / "none", range(0)).port("one")


async def test_the_last_port_may_come_from_another_token_s_unused_name(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    ports = [registry.port(f"ci-{n}") for n in range(10)]
    assert registry.port("other", key=1) == ports[6], "the one unused the longest"
    assert "ci-6" not in registry.ports


async def test_a_client_that_is_about_to_come_back_keeps_its_port(tmp_path: Path) -> None:
    for name in ("one", "two"):
        Registry(tmp_path, range(20000, 20002)).port(name, running=True)
    registry = Registry(tmp_path, range(20000, 20002))  # the server has been restarted
    with pytest.raises(Refused, match="are taken"):
        registry.port("three")
    with pytest.raises(Refused, match="belongs to another tunnel"):
        registry.port("three", registry.ports["one"])
    assert registry.open_ports == {20000, 20001}


async def test_a_client_that_says_goodbye_leaves_its_port_to_its_token(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    port = registry.port("one", running=True)
    session = registry.current("one")
    assert session
    with pytest.raises(Refused, match="belongs to another tunnel"):
        registry.port("two", port)
    session.link.session.send_goaway(pytunnel.ErrorCode.NO_ERROR, "")
    registry.disconnected(session)
    assert registry.open_ports == {port}, "visitors are held for a moment"
    assert registry.port("two", port) == port


async def test_a_name_that_is_for_http_now_needs_no_port(tmp_path: Path) -> None:
    registry = Registry(tmp_path, range(20000, 20001))
    registry.port("web", running=True)
    registry.bind(pytunnel.Registration(registry.keys[0], ["web"], pytunnel.Session(is_server=True)), "")
    assert registry.open_ports == set() and registry.port("ssh", key=1) == 20000


# ---------------------------------------------------------------------------------------- Bytes and ends


async def test_bytes_go_both_ways() -> None:
    async with tunnelled(echo) as (service, t):
        assert t.ready["url"].startswith("tcp://127.0.0.1:")
        async with t.tcp_visitor() as visitor:
            for text in (b"\0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 1000):
                await visitor.send(text)
                assert await visitor.read_exactly(len(text)) == text
            visitor.write_eof()
            assert await visitor.read_until_close() == b"" and visitor.ended == "fin"
        assert await service.ended.get() == ""


async def test_a_visitor_s_end_leaves_the_other_way_open() -> None:
    async def count(reader: Reader, writer: Writer) -> None:
        received = await reader.read()
        for _ in range(3):
            writer.write(b"%d;" % len(received))
            await writer.drain()

    async with tunnelled(count) as (_, t), t.tcp_visitor() as visitor:
        await visitor.send(bytes(300_000))
        visitor.write_eof()
        assert await visitor.read_until_close() == b"300000;" * 3 and visitor.ended == "fin"


async def test_a_service_s_end_leaves_the_other_way_open() -> None:
    received: asyncio.Queue[bytes] = asyncio.Queue()

    async def greet(reader: Reader, writer: Writer) -> None:
        writer.write(b"hello")
        writer.write_eof()
        received.put_nowait(await reader.read())

    async with tunnelled(greet) as (service, t), t.tcp_visitor() as visitor:
        assert await visitor.read_until_close() == b"hello" and visitor.ended == "fin"
        await visitor.send(bytes(300_000))
        visitor.write_eof()
        assert await received.get() == bytes(300_000)
        assert await service.ended.get() == ""


async def test_a_visitor_may_speak_before_the_service_has_accepted_or_never() -> None:
    async def speak(reader: Reader, writer: Writer) -> None:
        writer.write(b"SSH-2.0-x\r\n")
        await sink(reader, writer)

    async with tunnelled(speak) as (_, t), t.tcp_visitor() as visitor:
        assert await visitor.read_until(b"\n") == b"SSH-2.0-x\r\n"


@pytest.mark.parametrize("by", ["visitor", "service"])
async def test_a_reset_is_passed_on_after_what_came_before(by: str) -> None:
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(reader: Reader, writer: Writer) -> None:
        got.put_nowait(await reader.readexactly(100_000))
        if by == "service":
            writer.write(bytes(100_000))
            await writer.drain()
            await reader.readexactly(1)
            reset(writer)
        elif await reader.read():
            raise AssertionError("nothing else was sent")

    async with tunnelled(serve) as (service, t), t.tcp_visitor() as visitor:
        await visitor.send(bytes(100_000))
        assert await got.get() == bytes(100_000)
        if by == "visitor":
            visitor.abort()
            assert await service.ended.get() == "ConnectionResetError"
        else:
            assert await visitor.read_exactly(100_000) == bytes(100_000)
            await visitor.send(b"1")
            assert await visitor.read_until_close() == b"" and visitor.ended == "reset"
            event = await t.client.event("request")
            assert (event["method"], event["status"], event["bytes_in"]) == ("TCP", 101, 100_001)
            assert "connection reset" in event["error"].lower()


async def test_a_service_that_is_down_resets_its_visitors_at_once_and_one_line_tells_why() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        async with Tunnel(port, tcp=True) as t:
            assert await is_refused(port_of(t.ready["url"]))
            event = await t.client.event("request")
            assert event["error"] == f"cannot connect to tcp:{port}: connection refused"
            assert (event["method"], event["status"]) == ("TCP", 502)


async def test_the_log_has_sizes_and_the_visitor_and_no_content() -> None:
    async with Service(echo) as service, pytunnel.serve(tcp_ports="127.0.0.1:32000-32050") as server:
        options = {"server": server.url, "token": server.token, "name": "ssh"}
        async with pytunnel.connect(f"tcp:{service.port}", **options) as client:  # type: ignore[arg-type]
            assert client.url.startswith("tcp://127.0.0.1:")
            async with RawVisitor(port_of(client.url)) as visitor:
                own = "{}:{}".format(*visitor.socket.sock.getsockname())
                await visitor.send(b"secret")
                assert await visitor.read_exactly(6) == b"secret"
                visitor.write_eof()
                await visitor.read_until_close()
            exchange = await client.wait_for(method="TCP")
            assert exchange.target == own and (exchange.bytes_in, exchange.bytes_out) == (6, 6)
            assert not exchange.request_body and not exchange.response_body
            line = pytunnel.one_line(exchange.summary())
            assert line.startswith(f"101 TCP     {own}  6 bytes in, 6 out  ") and exchange.error == ""
            assert pytunnel.as_curl(exchange, client.url) == f"nc 127.0.0.1 {port_of(client.url)}"
            assert pytunnel.as_har([exchange], client.urls_by_name)["log"]["entries"] == []
            with pytest.raises(pytunnel.MessageError, match="cannot be replayed"):
                await client.replay(exchange)
            assert server.server.metrics["pytunnel_tcp_connections_total"] == 1
            assert server.server.metrics["pytunnel_received_bytes_total"] == 6


async def test_a_visitor_who_does_not_read_holds_the_service_back() -> None:
    """Both ends keep a window each at the most; the rest is the kernel's."""
    sent = 0

    async def flood(reader: Reader, writer: Writer) -> None:
        nonlocal sent
        while sent < 256 * MIB:
            writer.write(bytes(64 * KIB))
            await writer.drain()
            sent += 64 * KIB

    async with tunnelled(flood) as (_, t), t.tcp_visitor(rcvbuf=64 * KIB) as visitor:
        await visitor.read_exactly(1)
        before = -1
        while before != sent:
            before = sent
            async with RawVisitor(t.port) as other:  # there and back: what could be sent has been
                await other.send(request("GET", b"/healthz", b"127.0.0.1"))
                await other.read_response()
            await asyncio.sleep(0.2)
        assert 0 < sent < 64 * MIB
        visitor.abort()


async def test_a_visitor_who_takes_nothing_for_long_is_reset_and_so_is_the_service() -> None:
    async def flood(reader: Reader, writer: Writer) -> None:
        while True:
            writer.write(bytes(64 * KIB))
            await writer.drain()

    command = with_limits(TCP_STALL_TIMEOUT=0.5, GUARD_INTERVAL=0.1)
    async with tunnelled(flood, command=command) as (service, t), t.tcp_visitor(rcvbuf=64 * KIB):
        ended = await asyncio.wait_for(service.ended.get(), TIMEOUT)
        assert ended in ("ConnectionResetError", "BrokenPipeError")


async def is_at_rest(t: Tunnel, streams: int = 0) -> None:
    """Return when the server has no more than so many streams."""
    async with asyncio.timeout(TIMEOUT):
        while (await t._read_gauges())["pytunnel_streams"] > streams:
            pass


async def test_a_visitor_who_does_not_take_the_last_bytes_is_reset_as_well() -> None:
    async def serve(reader: Reader, writer: Writer) -> None:
        writer.write(bytes(500_000))  # which the server's kernel takes from it at once
        writer.write_eof()
        await reader.read()

    command = with_limits(TCP_STALL_TIMEOUT=0.5, GUARD_INTERVAL=0.1)
    async with tunnelled(serve, command=command) as (service, t), t.tcp_visitor(rcvbuf=4 * KIB):
        assert await asyncio.wait_for(service.ended.get(), TIMEOUT) == "ConnectionResetError"
        await is_at_rest(t)


@LOOPS
async def test_a_reset_is_noticed_although_nothing_is_read(loop: str) -> None:
    """After an end, or while the other side takes nothing, the event loop does not watch the socket."""
    begun: asyncio.Queue[None] = asyncio.Queue()

    async def deaf(reader: Reader, writer: Writer) -> None:
        if await reader.read(1) == b"e":
            await reader.read()
        begun.put_nowait(None)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await reader.read()
        await asyncio.Event().wait()

    command, env = with_limits(GUARD_INTERVAL=0.1, LINGER=0.1), {"PYTUNNEL_LOOP": loop}
    async with Service(deaf) as service, Tunnel(service.port, tcp=True, command=command, env=env) as t:
        async with t.tcp_visitor() as visitor:
            await visitor.send(b"e")
            visitor.write_eof()
            await begun.get()
            visitor.abort()
        await is_at_rest(t)
        async with t.tcp_visitor() as visitor:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):  # by then, windows and buffers are full
                    while True:
                        await visitor.send(b"p" * 64 * KIB)
            await begun.get()
            visitor.abort()
        await is_at_rest(t)


@LOOPS
@pytest.mark.parametrize("by", ["visitor", "service"])
async def test_an_end_for_a_side_that_has_reset_is_no_bug(by: str, loop: str) -> None:
    ended, go = asyncio.Event(), asyncio.Event()

    async def serve(reader: Reader, writer: Writer) -> None:
        if by == "visitor":
            await reader.read()
        else:
            writer.write(b"hi")
            writer.write_eof()
        ended.set()
        await go.wait()
        if by == "service":
            reset(writer)

    env = {"PYTUNNEL_LOOP": loop}
    async with Service(serve) as service, Tunnel(service.port, tcp=True, env=env) as t, t.tcp_visitor() as visitor:
        if by == "visitor":
            visitor.write_eof()
            await ended.wait()
            visitor.abort()
            await t._read_gauges()  # there and back: the reset has arrived
            go.set()
        else:
            assert await visitor.read_until_close() == b"hi"
            go.set()
            await service.ended.get()
            visitor.write_eof()
        event = await t.client.event("request")
        assert "bug" not in (event["error"] or "") and "Traceback" not in t.server.output() + t.client.output()


# ---------------------------------------------------------------------------------------- Links that are lost


async def test_what_goes_both_ways_goes_on_when_the_link_is_cut() -> None:
    async def both(reader: Reader, writer: Writer) -> None:
        async def send() -> None:
            for offset in range(0, SIZE, 64 * KIB):
                writer.write(pattern(offset, 64 * KIB))
                await writer.drain()
            writer.write_eof()

        sending, checker = asyncio.ensure_future(send()), PatternChecker()
        while data := await reader.read(64 * KIB):
            checker.feed(data)
        await sending
        assert checker.offset == SIZE

    async with tunnelled(both, relay=True) as (service, t), t.tcp_visitor(timeout=60.0) as visitor:

        async def send() -> None:
            for offset in range(0, SIZE, 64 * KIB):
                await visitor.send(pattern(offset, 64 * KIB))
            visitor.write_eof()

        sending, checker, cuts = asyncio.ensure_future(send()), PatternChecker(), list(KINDS)
        while data := await visitor.read_some():
            checker.feed(data)
            if cuts and checker.offset > SIZE * (len(KINDS) - len(cuts)) / len(KINDS) + 1:
                assert await t.relay.cut(cuts.pop(0)) <= 1
        await sending
        assert checker.offset == SIZE and visitor.ended == "fin" and not cuts
        assert await asyncio.wait_for(service.ended.get(), TIMEOUT) == ""


async def test_a_visitor_is_held_while_the_client_is_away() -> None:
    async with tunnelled(echo, relay=True) as (service, t):
        await t.server.stderr_line("web: connected")
        t.relay.refuse = True
        await t.relay.cut("reset")
        await t.client.event("disconnected")
        await t.server.stderr_line("web: ")
        async with t.tcp_visitor() as visitor:
            await visitor.send(b"ping")
            assert service.accepted == 0
            t.relay.refuse = False
            assert await visitor.read_exactly(4) == b"ping"


async def test_a_held_visitor_who_leaves_takes_no_room() -> None:
    command = with_limits(MAX_HELD=1, GUARD_INTERVAL=0.1)
    async with tunnelled(echo, relay=True, command=command) as (_, t):
        t.relay.refuse = True
        await t.relay.cut("reset")
        await t.client.event("disconnected")
        at_rest = await t._read_gauges()
        for text in (b"", b"ping", b"ping"):
            with contextlib.suppress(ConnectionResetError):  # the one before is not missed yet
                async with t.tcp_visitor() as visitor:
                    await visitor.send(text)
                    visitor.abort()
        while (await t._read_gauges())["pytunnel_visitors"] > at_rest["pytunnel_visitors"]:
            pass
        async with t.tcp_visitor() as visitor:
            await visitor.send(b"ping")
            assert await is_refused(port_of(t.ready["url"])), "there is room for one only"
            t.relay.refuse = False
            assert await visitor.read_exactly(4) == b"ping"


async def test_visitors_are_reset_when_the_client_ends_for_good() -> None:
    async with tunnelled(echo, serve_args=["--hold", "0"]) as (_, t):
        async with t.tcp_visitor() as visitor:
            await visitor.send(b"ping")
            await visitor.read_exactly(4)
            t.client.send_signal(9)
            await t.client.wait()
        url = t.ready["url"]
        await t.start_client()
        assert (await t.client.event("ready"))["url"] == url


async def test_the_port_is_closed_when_the_client_has_said_goodbye() -> None:
    async with tunnelled(echo, serve_args=["--hold", "0.1"], settles=False) as (_, t):
        port = port_of(t.ready["url"])
        t.client.send_signal(2)
        await t.client.wait()

        def is_closed() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", port)) != 0

        await eventually(is_closed)


async def test_a_restarted_server_listens_before_its_clients_are_back() -> None:
    async with tunnelled(echo, relay=True, settles=False) as (_, t):
        url = t.ready["url"]
        t.relay.refuse = True
        await t.restart_server()
        async with t.tcp_visitor() as visitor:
            await visitor.send(b"ping")
            t.relay.refuse = False
            assert await visitor.read_exactly(4) == b"ping"
        assert t.ready["url"] == url


# ---------------------------------------------------------------------------------------- Ports


async def test_a_port_that_is_asked_for_and_those_that_cannot_be_had() -> None:
    async with Service(echo) as service, Tunnel(service.port, tcp=True, settles=False) as t:
        first = int(t.serve_args[-1].partition(":")[2].partition("-")[0])
        port = next(p for p in range(first, first + 20) if p != port_of(t.ready["url"]))
        client = await t.start_client("--remote-port", str(port), name="other")
        assert (await client.event("ready"))["url"] == f"tcp://127.0.0.1:{port}"
        target = f"tcp:{service.port}"
        link = ["--server", t.server_url, "--name", "third"]
        assert f"port {port} belongs to another tunnel" in await refused(target, *link, "--remote-port", str(port))
        assert "is none for TCP tunnels" in await refused(target, *link, "--remote-port", "80")
        async with RawVisitor(port) as visitor:
            await visitor.send(b"ping")
            assert await visitor.read_exactly(4) == b"ping"
        again = await t.start_client(name="other")
        assert (await again.event("ready"))["url"] == f"tcp://127.0.0.1:{port}", "it is remembered"
        assert await client.wait() == 4
        moved = await t.start_client("--remote-port", str(port_of(t.ready["url"])), name="web")
        assert (await moved.event("ready"))["url"] == t.ready["url"]


async def test_a_port_of_somebody_else() -> None:
    async with Service(echo) as service, Tunnel(service.port, tcp=True, name="web") as t:
        first = int(t.serve_args[-1].partition(":")[2].partition("-")[0])
        port = next(p for p in range(first, first + 20) if p != port_of(t.ready["url"]))
        with socket.create_server(("127.0.0.1", port)):
            link = ["--server", t.server_url, "--name", "x", "--remote-port", str(port)]
            error = await refused(f"tcp:{service.port}", *link)
        wanted = f"error: the server cannot listen on port {port}: address already in use; choose another --remote-port"
        assert error == wanted


async def test_many_tunnels_of_one_client_have_a_port_each() -> None:
    async with Service(echo) as service, pytunnel.serve(tcp_ports=f"127.0.0.1:31000-{30999 + MAX_TUNNELS + 9}") as s:
        targets = [f"{'n' * 60}{n:02}=tcp:{service.port}" for n in range(MAX_TUNNELS)]
        async with pytunnel.connect(*targets, server=s.url, token=s.token) as client:
            assert len(set(map(port_of, client.urls))) == MAX_TUNNELS
            assert s.server._tcp_listeners.keys() == set(map(port_of, client.urls))
            for url in (client.urls[0], client.urls[-1]):
                async with RawVisitor(port_of(url)) as visitor:
                    await visitor.send(b"ping")
                    assert await visitor.read_exactly(4) == b"ping"


async def test_two_tunnels_of_one_client_do_not_get_the_same_port() -> None:
    async with Service(echo) as service, pytunnel.serve(tcp_ports=f"127.0.0.1:{free_port()}") as s:
        with pytest.raises(Refused, match="are taken"):
            async with pytunnel.connect(f"a=tcp:{service.port}", f"b=tcp:{service.port}", server=s.url, token=s.token):
                pass


def client_of(server: Any, service: Service, *, token: str = "", **ports: int) -> TunnelClient:
    """A client of an in-process server that wants these ports."""
    target = Target.parse(f"tcp:{service.port}")
    tunnels = [pytunnel.Tunnel(name, target, port=port) for name, port in ports.items()]
    return TunnelClient(server.url, token or server.token, tunnels)


async def test_a_hello_that_is_refused_changes_nothing() -> None:
    async with (
        Service(echo) as service,
        pytunnel.serve(tcp_ports="127.0.0.1:30900-30909") as s,
        pytunnel.connect(f"web=tcp:{service.port}", server=s.url, token=s.token) as client,
    ):
        own = port_of(client.url)
        other = next(port for port in range(30900, 30910) if port != own)
        with pytest.raises(Refused, match="is none for TCP tunnels"):
            await client_of(s, service, web=other, x=80).run()
        with socket.create_server(("127.0.0.1", other)), pytest.raises(Refused, match="address already in use"):
            await client_of(s, service, web=other).run()
        assert s.server._tcp_listeners.keys() == {own} and s.server._registry.ports == {"web": own}
        async with RawVisitor(own) as visitor:
            await visitor.send(b"ping")
            assert await visitor.read_exactly(4) == b"ping"


async def test_a_port_goes_from_one_tunnel_to_another() -> None:
    async with Service(echo) as service, pytunnel.serve(tcp_ports="127.0.0.1:30910-30919") as s:
        options = {"server": s.url, "token": s.token}
        async with pytunnel.connect(f"a=tcp:{service.port}", **options) as first:  # type: ignore[arg-type]
            port = port_of(first.url)
        async with pytunnel.connect(f"b=tcp:{service.port}", remote_port=port, **options) as second:  # type: ignore[arg-type]
            assert port_of(second.url) == port
            async with RawVisitor(port) as visitor:
                await visitor.send(b"ping")
                assert await visitor.read_exactly(4) == b"ping"
            assert (await second.wait_for(method="TCP")).tunnel == "b"


async def test_clients_that_come_at_once_have_no_more_tunnels_than_their_token_may() -> None:
    async with Service(echo) as service, pytunnel.serve(tcp_ports="127.0.0.1:30920-30939") as s:
        token = "k" * 40
        s.server._given.append(Grant.from_token("k", token, max_tunnels=1))
        s.server._read_tokens()
        clients = [client_of(s, service, token=token, **{f"n{n}": 0}) for n in range(8)]
        running = {asyncio.ensure_future(client.run()) for client in clients}
        async with asyncio.timeout(TIMEOUT):
            while len(running) > 1:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    with pytest.raises(Refused, match="may have 1 tunnel at a time"):
                        task.result()
        await eventually(lambda: any(client.urls for client in clients))
        assert len(s.server._registry.names) == len(s.server._tcp_listeners) == 1
        for client in clients:
            client.stop()
        await asyncio.wait(running)


async def test_a_server_that_drains_opens_nothing_for_whoever_was_about_to_come() -> None:
    about_to, go = asyncio.Event(), asyncio.Event()
    async with Service(echo) as service, pytunnel.serve(tcp_ports="127.0.0.1:30940-30949") as s:
        shake = s.server._handshake

        async def handshake(*args: Any) -> Any:
            proved = await shake(*args)
            about_to.set()
            await go.wait()
            return proved

        s.server._handshake = handshake  # type: ignore[method-assign]
        client = client_of(s, service, web=0)
        running = asyncio.ensure_future(client.run())
        await about_to.wait()
        draining = asyncio.ensure_future(s.server.drain())
        await asyncio.wait([draining], timeout=0)
        go.set()
        await eventually(lambda: s.server.metrics['pytunnel_handshakes_total{result="shutting-down"}'])
        assert not s.server._tcp_listeners and not s.server._registry.names
        running.cancel()
        await asyncio.wait([running])
        await draining


async def test_a_host_that_this_machine_has_not_is_told_at_once() -> None:
    with pytest.raises(pytunnel.TunnelError, match=r"on 203\.0\.113\.9: .*; choose another HOST in --tcp-ports"):
        async with pytunnel.serve(tcp_ports="203.0.113.9:20000-20010"):
            pass


async def test_a_server_without_ports_says_so() -> None:
    async with Service(echo) as service, pytunnel.serve(token=TOKEN) as server:
        error = await refused(f"tcp:{service.port}", "--server", server.url)
    assert "this server has no ports for TCP tunnels; start it with serve --tcp-ports, like 20000-20100" in error


async def test_a_server_that_is_too_old_says_nothing_and_is_left() -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(pytunnel.__file__).parent)!r}); import pytunnel; "
    code += "pytunnel.Message.numbers = lambda *_: {}; sys.exit(pytunnel.main())"
    listen = ("serve", "--listen", "127.0.0.1:0", "--token", TOKEN, "--json")
    async with await Process.start(*listen, command=[sys.executable, "-c", code]) as server:
        port = (await server.event("listening"))["port"]
        error = await refused("tcp:22", "--server", f"http://127.0.0.1:{port}")
    assert error == "error: this server is too old for TCP tunnels; upgrade it"


async def test_a_web_page_is_not_in_a_tcp_tunnel() -> None:
    async with tunnelled(echo) as (service, t), RawVisitor(t.port) as visitor:
        await visitor.send(request("GET", b"/", b"web.localhost:%d" % t.port))
        answer = await visitor.read_response()
        assert (answer.status, answer.value(b"X-Pytunnel-Error")) == (404, b"not-http")
        assert service.accepted == 0


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["tcp:22", "--auth", "ann:correct-horse"], "auth is for HTTP, and tcp:22 is TCP"),
        (["tcp:22", "--route", "/a=80"], "route is for HTTP, and tcp:22 is TCP"),
        (["tcp:22", "--host-header", "rewrite"], "host-header is for HTTP, and tcp:22 is TCP"),
        (["tcp:22", "--spa"], "spa is for HTTP, and tcp:22 is TCP"),
        (["3000", "--route", "/a=tcp:80"], "a route leads to HTTP, not to TCP"),
        (["tcp:0"], "tcp:0 is not a target: a port is within 1 to 65535"),
        (["a=tcp:22", "b=tcp:23", "--remote-port", "20000"], "--remote-port is for one target"),
        (["3000", "--remote-port", "20000"], "remote-port is for TCP; write tcp:3000"),
        (["tcp:22", "--remote-port", "65536"], "remote-port 65536 is no port"),
    ],
)
async def test_what_does_not_go_together(args: list[str], error: str) -> None:
    finished = await run("connect", *args, "--token", TOKEN, "--server", "127.0.0.1:1")
    assert finished.status == 2 and error in finished.error


async def test_a_password_from_the_environment_is_for_http_as_well() -> None:
    finished = await run("connect", "tcp:22", "--token", TOKEN, env={"PYTUNNEL_AUTH": "ann:correct-horse"})
    assert finished.status == 2 and "auth is for HTTP" in finished.error


# ---------------------------------------------------------------------------------------- Strangers


async def test_visitors_from_elsewhere_are_reset_and_the_service_never_hears_of_them() -> None:
    async with tunnelled(echo, connect_args=["--allow", "127.0.0.2"]) as (service, t):
        assert await is_refused(port_of(t.ready["url"]))
        await t.server.stderr_line("127.0.0.1 is not allowed for web")
        async with RawVisitor(port_of(t.ready["url"]), source="127.0.0.2") as visitor:
            await visitor.send(b"ping")
            assert await visitor.read_exactly(4) == b"ping"
        assert service.accepted == 1


async def test_one_address_has_so_many_connections() -> None:
    async with tunnelled(echo, serve_args=["--max-per-address", "2"]) as (_, t), contextlib.AsyncExitStack() as stack:
        for visitor in [await stack.enter_async_context(t.tcp_visitor()) for _ in range(2)]:
            await visitor.send(b"ping")
            assert await visitor.read_exactly(4) == b"ping"
        assert await is_refused(port_of(t.ready["url"]))
        async with RawVisitor(port_of(t.ready["url"]), source="127.0.0.2") as visitor:
            await visitor.send(b"ping")
            assert await visitor.read_exactly(4) == b"ping"
        await t.server.stderr_line("refused a connection from 127.0.0.1: it has 2 already")


async def test_idle_connections_leave_room_for_requests() -> None:
    async with (
        RawOrigin(response(b"hello")) as origin,
        Service(echo) as service,
        pytunnel.serve(tcp_ports="127.0.0.1:30960-30969") as s,
        contextlib.AsyncExitStack() as stack,
    ):
        tunnels = f"ssh=tcp:{service.port}", f"web={origin.port}"
        async with pytunnel.connect(*tunnels, server=s.url, token=s.token) as client:
            (session,) = s.server._registry.sessions.values()
            session.link.session.max_streams = 8
            port = port_of(client.urls[0])
            visitors = [await stack.enter_async_context(RawVisitor(port)) for _ in range(7)]
            for visitor in visitors:
                await visitor.send(b"ping")
                assert await visitor.read_exactly(4) == b"ping"
            assert await is_refused(port)
            assert s.server.metrics['pytunnel_refusals_total{reason="busy"}'] == 1
            async with RawVisitor(s.server.port) as visitor:
                await visitor.send(request("GET", b"/", b"web.localhost"))
                assert (await visitor.read_response()).body == b"hello"


async def test_neither_end_waits_for_machines_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    guard = pytunnel.Connection.guard

    def note(connection: Any, *args: float) -> None:
        guard(connection, *args)
        sock = connection._transport.get_extra_info("socket")
        looked.append((type(connection), sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)))

    monkeypatch.setattr(pytunnel.Connection, "guard", note)
    async with (
        Service(echo) as service,
        pytunnel.serve(tcp_ports="127.0.0.1:30980-30989") as s,
        pytunnel.connect(f"ssh=tcp:{service.port}", server=s.url, token=s.token) as client,
        RawVisitor(port_of(client.url)) as visitor,
    ):
        await visitor.send(b"ping")
        assert await visitor.read_exactly(4) == b"ping"
    assert looked == [(pytunnel.TcpVisitor, 1), (pytunnel.Connection, 1)]


async def test_heads_that_nobody_reads_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async def many(forwarding: Any) -> None:
        for _ in range(pytunnel.MAX_INTERIM):
            forwarding._stream.write_head(pytunnel.ResponseHead(103, b"", []).encode(), interim=True)
        forwarding._stream.write_head(pytunnel.ResponseHead(101, b"", []).encode())
        await forwarding._stream.write(b"x")
        await asyncio.Event().wait()

    monkeypatch.setattr(pytunnel.TcpForwarding, "run", many)
    async with (
        Service(echo) as service,
        pytunnel.serve(tcp_ports="127.0.0.1:30970-30979") as s,
        pytunnel.connect(f"ssh=tcp:{service.port}", server=s.url, token=s.token) as client,
        RawVisitor(port_of(client.url)) as visitor,
    ):
        assert await visitor.read_exactly(1) == b"x"
        (session,) = s.server._registry.sessions.values()
        assert [len(stream._heads) for stream in session.link._streams.values()] == [0]


async def test_ports_that_leave_no_files_for_visitors() -> None:
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)); "
    code += f"sys.path.insert(0, {str(Path(pytunnel.__file__).parent)!r}); import pytunnel; sys.exit(pytunnel.main())"
    words = ("serve", "--listen", "127.0.0.1:0", "--token", TOKEN, "--tcp-ports", "127.0.0.1:12000-12499")
    async with await Process.start(*words, command=[sys.executable, "-c", code]) as server:
        await server.stderr_line("500 TCP ports take 1000 of the 1024 files that may be open, and leave too few")
        assert await server.wait() == 1


async def test_eight_transfers_get_their_share() -> None:
    async def flood(reader: Reader, writer: Writer) -> None:
        while True:
            writer.write(bytes(64 * KIB))
            await writer.drain()

    async with tunnelled(flood) as (_, t), contextlib.AsyncExitStack() as stack:
        visitors = [await stack.enter_async_context(t.tcp_visitor()) for _ in range(8)]
        got = [0] * len(visitors)

        async def read(number: int) -> None:
            while True:
                got[number] += len(await visitors[number].read_some())
                if sum(got) > 256 * MIB:  # beside which it is little what the kernel's buffers make of a start
                    done.set()

        done = asyncio.Event()
        readers = [asyncio.ensure_future(read(number)) for number in range(8)]
        await asyncio.wait_for(done.wait(), 60.0)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        assert max(got) < 1.5 * min(got), got
        for visitor in visitors:
            visitor.abort()


# ---------------------------------------------------------------------------------------- Programs


@contextlib.asynccontextmanager
async def running(*words: str, ready: str, **options: object) -> AsyncIterator[None]:
    """A program, once it has written a line with `ready` to stderr; it is ended with the block."""
    process = await asyncio.create_subprocess_exec(
        *words, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, **options
    )  # type: ignore[call-overload]
    seen = b""
    try:
        async with asyncio.timeout(TIMEOUT):
            while ready.encode() not in seen:
                line = await process.stderr.readline()
                assert line, f"{words[0]} has ended: {seen.decode(errors='replace')}"
                seen += line
        drain = asyncio.ensure_future(process.stderr.read())
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
    await drain


@contextlib.asynccontextmanager
async def sshd(directory: Path) -> AsyncIterator[int]:
    """OpenSSH's daemon, with keys and configuration of its own."""
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        assert await (await asyncio.create_subprocess_exec(*words)).wait() == 0
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # where a daemon that root starts locks itself up
    port, config = free_port(), directory / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/user.pub\n"
        "UsePAM no\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nPidFile none\n"
    )
    async with running("/usr/sbin/sshd", "-D", "-e", "-f", str(config), ready="Server listening"):
        yield port


async def test_an_ssh_session_goes_on_when_the_link_is_cut(tmp_path: Path) -> None:
    async with sshd(tmp_path) as port, Tunnel(port, tcp=True, relay=True, name="ssh") as t:
        words = [
            "ssh", "-F", "/dev/null", "-p", str(port_of(t.ready["url"])), "-i", str(tmp_path / "user"),
            "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path}/known", "-o", "BatchMode=yes",
            "127.0.0.1", "cat",
        ]  # fmt: skip
        pipe = asyncio.subprocess.PIPE
        ssh = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe)
        assert ssh.stdin and ssh.stdout
        ssh.stdin.write(b"hello\n")
        assert await asyncio.wait_for(ssh.stdout.readexactly(6), TIMEOUT) == b"hello\n"

        async def send(stdin: asyncio.StreamWriter) -> None:
            for offset in range(0, SIZE, 64 * KIB):
                stdin.write(pattern(offset, 64 * KIB))
                await stdin.drain()
            stdin.close()

        sending, checker, cuts = asyncio.ensure_future(send(ssh.stdin)), PatternChecker(), list(KINDS)
        while data := await asyncio.wait_for(ssh.stdout.read(64 * KIB), 60.0):
            checker.feed(data)
            if cuts and checker.offset > SIZE * (len(KINDS) - len(cuts)) / len(KINDS):
                await t.relay.cut(cuts.pop(0))
        await sending
        assert (checker.offset, await ssh.wait(), cuts) == (SIZE, 0, [])
        assert t.relay.accepted > len(KINDS)


def postgres_programs() -> Path:
    """Where Debian has those of the newest version that is installed."""
    return max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))


@contextlib.asynccontextmanager
async def postgres() -> AsyncIterator[int]:
    """PostgreSQL with a cluster of its own; it does not run as root."""
    user: dict[str, object] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="pytunnel-test-") as directory:
        if user:
            shutil.chown(directory, "postgres", "postgres")
        programs, port, data = postgres_programs(), free_port(), f"{directory}/data"
        words = [f"{programs}/initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"]
        quiet: dict[str, object] = {"stdout": asyncio.subprocess.DEVNULL, "cwd": directory, **user}
        made = await asyncio.create_subprocess_exec(*words, **quiet)  # type: ignore[arg-type]
        assert await made.wait() == 0
        words = [f"{programs}/postgres", "-D", data, "-p", str(port), "-k", directory, "-h", "127.0.0.1", "-F"]
        async with running(*words, ready="ready to accept connections", **quiet):
            yield port


async def test_a_database_connection_goes_on_when_the_link_is_cut() -> None:
    async with postgres() as port, Tunnel(port, tcp=True, relay=True, name="db") as t:
        at = ["-h", "127.0.0.1", "-p", str(port_of(t.ready["url"])), "-U", "postgres"]
        pipe = asyncio.subprocess.PIPE
        psql = await asyncio.create_subprocess_exec("psql", *at, "-XAtq", "postgres", stdin=pipe, stdout=pipe)
        stdin, stdout = psql.stdin, psql.stdout
        assert stdin and stdout

        async def ask(text: bytes) -> bytes:
            stdin.write(text + b"\n")
            return (await asyncio.wait_for(stdout.readline(), 30.0)).strip()

        backend = await ask(b"select pg_backend_pid();")
        assert backend.isdigit()
        for how in KINDS:
            assert await t.relay.cut(how) == 1
            assert await ask(b"select pg_backend_pid();") == backend
        rows, rest = 3_000, b"x" * 1000
        query = b"copy (select i || repeat('x', %d) from generate_series(1, %d) i) to stdout;\n"
        stdin.write(query % (len(rest), rows))
        for number in range(1, rows + 1):
            assert await stdout.readline() == b"%d%b\n" % (number, rest)
            if number in (1, rows // 3, rows // 2):
                await t.relay.cut("reset")
        assert await ask(b"select pg_backend_pid();") == backend
        stdin.close()
        assert await psql.wait() == 0
