"""Processes that start, stop, die and come back: names, sessions and requests outlive what they can."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from support import (
    ROOT,
    PatternChecker,
    Process,
    RawOrigin,
    RawRequest,
    RawVisitor,
    Relay,
    Truncated,
    Tunnel,
    WaitFailed,
    chunk,
    eventually,
    free_port,
    pattern,
    response,
)

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter

KIB = 1024
AWAY = 20.0  # seconds within which a client is back after a server that was away for a moment
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])

TOKEN = "test-token-0123456789abcdef0123456789abcdef"
OTHER_TOKEN = "another-token-0123456789abcdef0123456789"

HALVES = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n"


class Halves:
    """A local service that answers in two halves, the second one when the test releases it; `/` at once."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def __call__(self, request: RawRequest, reader: Reader, writer: Writer) -> None:
        if request.target == b"/":
            writer.write(response(b"hello"))
            return
        writer.write(HALVES + b"half")
        await self.release.wait()
        writer.write(b"half")


@contextlib.asynccontextmanager
async def half_way(tunnel: Tunnel) -> AsyncIterator[RawVisitor]:
    """A visitor who has read the first half of a response from Halves."""
    async with tunnel.visitor() as visitor:
        await visitor.send(tunnel.request(target=b"/halves"))
        assert (await visitor.read_head()).status == 200
        assert await visitor.read_exactly(4) == b"half"
        yield visitor


def since(began: float) -> str:
    """Seconds for the printed figures; `-s` shows them."""
    return f"{time.monotonic() - began:.2f} s"


# ---------------------------------------------------------------------------------------- The server


async def test_a_killed_server_that_starts_again_has_its_clients_back() -> None:
    halves = Halves()
    async with RawOrigin(halves) as origin, Tunnel(origin.port) as tunnel:
        async with half_way(tunnel) as visitor:
            killed = time.monotonic()
            await tunnel.restart_server(signal.SIGKILL)
            listening = time.monotonic()
            assert await visitor.read_until_close() == b""
            event = await tunnel.client.event("reconnected", timeout=AWAY)
            print(f"\nback {since(killed)} after the kill, {since(listening)} after the new server listened")
            assert event["resumed"] is False
        assert (await tunnel.get()).body == b"hello"  # under the same host
        assert not tunnel.client.events or {e["event"] for e in tunnel.client.events} <= {"disconnected", "request"}
        await eventually(lambda: not origin.connections[0].open, what="the interrupted request is given up")


@pytest.mark.parametrize("dials", [1, 5])
async def test_a_client_finds_a_server_that_was_away(dials: int) -> None:
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port) as tunnel:
        await tunnel.stop_server(signal.SIGKILL)
        began = time.monotonic()
        for _ in range(1 + dials):  # the link, then each dial
            await tunnel.client.event("disconnected", timeout=AWAY)
        await tunnel.start_server()
        listening = time.monotonic()
        await tunnel.client.event("reconnected", timeout=AWAY)
        print(f"\naway for {listening - began:.1f} s, back {since(listening)} after the new server listened")
        assert (await tunnel.get()).body == b"hello"


async def test_a_server_that_stops_lets_running_requests_finish_and_takes_no_new_ones() -> None:
    halves = Halves()
    async with (
        RawOrigin(halves) as origin,
        Tunnel(origin.port) as tunnel,
        contextlib.AsyncExitStack() as stack,
        half_way(tunnel) as visitor,
    ):
        regulars = [await stack.enter_async_context(tunnel.visitor()) for _ in range(5)]
        for regular in regulars:
            await regular.send(tunnel.request())
            assert (await regular.read_response()).body == b"hello"
        old = tunnel.server
        old.send_signal(signal.SIGTERM)
        await old.stderr_line("stopping")
        for regular in regulars:
            await regular.send(tunnel.request())
            got = await regular.read_response()
            assert (got.status, got.value(b"X-Pytunnel-Error")) == (503, b"shutting-down")
            assert got.value(b"Retry-After") is not None
            assert await regular.read_until_close() == b""
        with pytest.raises((ConnectionError, Truncated)):  # the port is free for the next server
            await tunnel.get()
        assert old.returncode is None
        halves.release.set()
        assert await visitor.read_exactly(4) == b"half"
        assert await old.wait() == 0
        await tunnel.start_server()
        await tunnel.client.event("reconnected", timeout=AWAY)
        assert (await tunnel.get()).body == b"hello"
        assert [request.target for request in origin.requests] == [b"/halves", *[b"/"] * 6]


async def test_the_next_server_may_start_while_the_old_one_drains() -> None:
    halves = Halves()
    async with RawOrigin(halves) as origin, Tunnel(origin.port) as tunnel, half_way(tunnel) as visitor:
        old = tunnel.server
        old.send_signal(signal.SIGTERM)
        await old.stderr_line("stopping")
        await tunnel.start_server()
        waiting = asyncio.create_task(tunnel.get())  # held: the client is expected
        halves.release.set()
        assert await visitor.read_exactly(4) == b"half"
        assert await old.wait() == 0
        await tunnel.client.event("reconnected", timeout=AWAY)
        assert (await waiting).body == b"hello"
        assert tunnel.client.returncode is None


@pytest.mark.parametrize("how", ["second-signal", "timeout"])
async def test_a_drain_has_an_end(how: str) -> None:
    args = ["--drain", "1"] if how == "timeout" else []
    async with RawOrigin(Halves()) as origin, Tunnel(origin.port, serve_args=args) as tunnel:
        async with half_way(tunnel) as visitor:
            tunnel.server.send_signal(signal.SIGTERM)
            await tunnel.server.stderr_line("stopping")
            began = time.monotonic()
            if how == "second-signal":
                tunnel.server.send_signal(signal.SIGTERM)
            assert await visitor.read_until_close() == b""
            assert await tunnel.server.wait() == 0
            print(f"\n{how}: ended after {since(began)}")
        await tunnel.start_server()
        await tunnel.client.event("reconnected", timeout=AWAY)
        await eventually(lambda: not origin.open_connections, what="the interrupted request is given up")
        assert (await tunnel.get()).body == b"hello"


@SIGNALS
async def test_an_idle_server_stops_at_once(number: int) -> None:
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port) as tunnel, tunnel.visitor() as idle:
        await idle.send(tunnel.request())
        assert (await idle.read_response()).status == 200
        began = time.monotonic()
        assert await tunnel.stop_server(number) == 0
        print(f"\nstopped after {since(began)}")
        assert await idle.read_until_close() == b""


# ---------------------------------------------------------------------------------------- The client


async def test_a_killed_client_that_starts_again_has_its_tunnel_at_once() -> None:
    async with RawOrigin(Halves()) as origin, Tunnel(origin.port) as tunnel, half_way(tunnel) as visitor:
        tunnel.client.send_signal(signal.SIGKILL)
        assert await tunnel.client.wait() == -signal.SIGKILL
        began = time.monotonic()
        second = await tunnel.start_client()
        ready = await second.event("ready")
        assert ready["url"] == tunnel.ready["url"]
        assert await visitor.read_until_close() == b"", "the old session is over; half a file has no clean end"
        print(f"\nready {since(began)} after the start")
        assert (await tunnel.get()).body == b"hello"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
async def test_requests_wait_for_a_client_that_starts_again(number: int) -> None:
    async with RawOrigin(response(b"hello"), read_body=True) as origin, Tunnel(origin.port) as tunnel:
        tunnel.client.send_signal(number)
        await tunnel.client.wait()
        held = [asyncio.create_task(tunnel.fetch("POST", b"/%d" % n, body=b"x", timeout=AWAY)) for n in range(20)]
        await eventually(lambda: _established(tunnel.port) >= len(held), what="all are at the server")
        assert not any(task.done() for task in held)
        await (await tunnel.start_client()).event("ready")
        assert [(got.status, got.body) for got in await asyncio.gather(*held)] == [(200, b"hello")] * len(held)
        assert len(origin.requests) == len(held)


def _established(port: int) -> int:
    """Connections that a server on that port has."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "01" for fields in lines)


async def test_the_newer_of_two_clients_has_the_name() -> None:
    async with (
        RawOrigin(response(b"old")) as origin,
        RawOrigin(response(b"new")) as other,
        Tunnel(origin.port) as tunnel,
    ):
        older = tunnel.client
        newer = await tunnel.start_client(origin_port=other.port, home="newer")
        assert (await newer.event("ready"))["url"] == tunnel.ready["url"]
        assert await older.wait() == 4
        assert (await older.event("error"))["code"] == "replaced"
        assert len(older.stderr) == 1
        assert older.stderr[0].startswith("error: ")
        assert (await tunnel.get()).body == b"new"
        await tunnel.restart_server()
        await newer.event("reconnected", timeout=AWAY)
        assert (await tunnel.get()).body == b"new"
        assert newer.returncode is None


async def test_a_client_that_was_replaced_while_it_was_away_does_not_come_back() -> None:
    async with (
        RawOrigin(response(b"old")) as origin,
        RawOrigin(response(b"new")) as other,
        Tunnel(origin.port, relay=True) as tunnel,
    ):
        older = tunnel.client
        tunnel.relay.refuse = True
        await tunnel.relay.cut("reset")
        await older.event("disconnected")
        newer = await Process.start(
            *("connect", str(other.port), "--server", f"http://127.0.0.1:{tunnel.port}", "--name", "web"),
            *("--token", tunnel.token, "--json"),
        )  # fmt: skip
        async with newer:
            await newer.event("ready")
            tunnel.relay.refuse = False
            assert await older.wait(AWAY) == 4
            assert (await tunnel.get()).body == b"new"
            assert newer.returncode is None


TWO_TOKENS = f"""
import asyncio, json, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import pytunnel

async def serve():
    state = pathlib.Path(sys.argv[sys.argv.index("--state") + 1])
    server = pytunnel.TunnelServer(tokens=[{TOKEN!r}, {OTHER_TOKEN!r}], state=state, listen=[("127.0.0.1", 0)])
    await server.start()
    print(json.dumps({{"event": "listening", "port": server.port}}), flush=True)
    await asyncio.Event().wait()

asyncio.run(serve())
"""


async def test_the_name_of_another_token_is_refused_and_its_holder_does_not_notice(tmp_path: Path) -> None:
    halves = Halves()

    async def connect(port: int, target: int, token: str, name: str) -> Process:
        return await Process.start(
            "connect", f"{target}", "--server", f"http://127.0.0.1:{port}", "--token", token, "--name", name, "--json"
        )

    async with (
        RawOrigin(halves) as origin,
        RawOrigin(response(b"thief")) as other,
        await Process.start("--state", str(tmp_path), command=[sys.executable, "-c", TWO_TOKENS]) as server,
    ):
        port = (await server.event("listening"))["port"]
        async with await connect(port, origin.port, TOKEN, "web") as holder, RawVisitor(port) as visitor:
            await holder.event("ready")
            await visitor.send(b"GET /halves HTTP/1.1\r\nHost: web.localhost\r\n\r\n")
            assert (await visitor.read_head()).status == 200
            async with await connect(port, other.port, OTHER_TOKEN, "web") as thief:
                assert await thief.wait() == 4
                assert (await thief.event("error"))["code"] == "name"
                assert len(thief.stderr) == 1
            async with await connect(port, other.port, OTHER_TOKEN, "own") as neighbour:
                await neighbour.event("ready")
            halves.release.set()
            assert await visitor.read_exactly(8) == b"halfhalf"
            assert holder.returncode is None
            assert {event["event"] for event in holder.events} <= {"request"}


async def test_a_name_belongs_to_its_token_across_restarts_of_the_server() -> None:
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port) as tunnel:
        await tunnel.stop_server()
        await tunnel.start_server("--token", OTHER_TOKEN)
        assert await tunnel.client.wait(AWAY) == 3  # this server does not know its token
        thief = await tunnel.start_client(token=OTHER_TOKEN, home="thief")
        assert await thief.wait() == 4
        assert (await thief.event("error"))["code"] == "name"
        await tunnel.restart_server()
        owner = await tunnel.start_client()
        assert (await owner.event("ready"))["url"] == tunnel.ready["url"]


async def test_default_names_are_stable_and_differ_by_target_and_machine() -> None:
    async with (
        RawOrigin(response(b"1")) as origin,
        RawOrigin(response(b"2")) as other,
        Tunnel(origin.port, name=None) as t,
    ):
        first = t.ready["url"]
        t.client.send_signal(signal.SIGTERM)
        assert await t.client.wait() == 0
        await t.restart_server()
        again = await (await t.start_client()).event("ready")
        target = await (await t.start_client(origin_port=other.port)).event("ready")
        machine = await (await t.start_client(home="machine")).event("ready")
        assert again["url"] == first
        assert len({first, target["url"], machine["url"]}) == 3
        assert all(len(ready["name"]) >= 10 for ready in (again, target, machine)), "too many to guess"


# ---------------------------------------------------------------------------------------- Signals to the client


@SIGNALS
async def test_a_client_that_was_ready_exits_with_0(number: int) -> None:
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port) as tunnel:
        assert (await tunnel.get()).status == 200
        began = time.monotonic()
        tunnel.client.send_signal(number)
        assert await tunnel.client.wait() == 0
        print(f"\nstopped after {since(began)}")
        await tunnel.client.event("closed")
        assert tunnel.client.stderr == []


@SIGNALS
@pytest.mark.parametrize("server", ["refuses", "is-silent"])
async def test_a_client_that_was_not_ready_exits_with_130(number: int, server: str) -> None:
    async with Relay(free_port()) as relay:
        relay.refuse = server == "refuses"
        relay.mode = "blackhole"
        async with await Process.start(
            *("connect", "1", "--server", f"http://127.0.0.1:{relay.port}", "--token", TOKEN, "--json")
        ) as client:
            await relay.wait_accepted(1)
            if server == "refuses":
                await client.event("disconnected")
            began = time.monotonic()
            client.send_signal(number)
            assert await client.wait() == 130
            print(f"\nstopped after {since(began)}")
            assert "Traceback" not in client.output()


@SIGNALS
async def test_a_client_between_two_dials_exits_at_once(number: int) -> None:
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port) as tunnel:
        await tunnel.stop_server(signal.SIGKILL)
        while (await tunnel.client.event("disconnected"))["retry_in"] < 0.5:
            pass
        began = time.monotonic()
        tunnel.client.send_signal(number)
        assert await tunnel.client.wait() == 0
        print(f"\nstopped after {since(began)}")


@SIGNALS
async def test_a_request_in_flight_finishes_on_the_first_signal(number: int) -> None:
    halves = Halves()
    async with RawOrigin(halves) as origin, Tunnel(origin.port) as tunnel, half_way(tunnel) as visitor:
        tunnel.client.send_signal(number)
        await tunnel.client.stderr_line("finishing what still runs (1)")
        halves.release.set()
        assert await visitor.read_exactly(4) == b"half"
        assert await tunnel.client.wait() == 0
        assert (await tunnel.client.event("request"))["status"] == 200


async def test_a_request_that_comes_while_a_client_stops_is_held_for_the_next_one() -> None:
    halves = Halves()
    async with RawOrigin(halves) as origin, Tunnel(origin.port) as tunnel, half_way(tunnel) as visitor:
        tunnel.client.send_signal(signal.SIGTERM)
        await tunnel.client.stderr_line("finishing what still runs (1)")
        held = asyncio.create_task(tunnel.fetch(timeout=AWAY))
        await eventually(lambda: _established(tunnel.port) >= 3, what="link and two visitors are at the server")
        second = await tunnel.start_client()
        await second.event("ready")
        assert (await held).body == b"hello"
        assert not visitor.buffered, "the old session is over"


# ---------------------------------------------------------------------------------------- Outputs that nobody reads


def _pipe(process: Process, number: int) -> asyncio.ReadTransport:
    transport = process._process._transport.get_pipe_transport(number)  # type: ignore[attr-defined]
    assert isinstance(transport, asyncio.ReadTransport)
    return transport


async def test_a_client_whose_outputs_are_closed_goes_on() -> None:
    halves = Halves()
    async with RawOrigin(halves) as origin, Tunnel(origin.port, relay=True) as tunnel:
        for number in (1, 2):
            _pipe(tunnel.client, number).close()
        for _ in range(5):
            assert (await tunnel.get()).body == b"hello"
        accepted = tunnel.relay.accepted
        await tunnel.relay.cut("reset")
        await tunnel.relay.wait_accepted(accepted + 1)
        assert (await tunnel.get()).body == b"hello"
        async with half_way(tunnel) as visitor:
            tunnel.client.send_signal(signal.SIGTERM)
            halves.release.set()
            assert await visitor.read_exactly(4) == b"half"
        assert await tunnel.client.wait() == 0


async def test_a_client_whose_output_is_full_goes_on() -> None:
    """Nobody reads its stdout, and the pipe takes no more: that must not stop the traffic."""
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port) as tunnel:
        _pipe(tunnel.client, 1).pause_reading()
        try:
            target = b"/" + b"x" * (8 * KIB)
            for _ in range(20):  # a pipe holds 64 KiB
                assert (await tunnel.get(target)).body == b"hello"
            tunnel.client.send_signal(signal.SIGTERM)
        finally:
            _pipe(tunnel.client, 1).resume_reading()
        assert await tunnel.client.wait() == 0


async def test_a_server_whose_outputs_are_closed_goes_on() -> None:
    async with RawOrigin(response(b"hello")) as origin, Tunnel(origin.port, relay=True) as tunnel:
        for number in (1, 2):
            _pipe(tunnel.server, number).close()
        await tunnel.relay.cut("reset")
        await tunnel.client.event("reconnected", timeout=AWAY)
        async with tunnel.visitor() as visitor:
            await visitor.send(b"not HTTP at all\r\n\r\n")
            assert (await visitor.read_response()).status == 400
        assert (await tunnel.get()).body == b"hello"
        assert await tunnel.stop_server() == 0


# ---------------------------------------------------------------------------------------- What is left behind


async def test_descriptors_are_back_at_the_baseline() -> None:
    """After 200 exchanges of all kinds, 120 of which are broken off, and four cuts."""
    body = pattern(0, 512 * KIB)

    async def serve(request: RawRequest, reader: Reader, writer: Writer) -> None:
        if request.target == b"/never":
            await asyncio.Event().wait()
        writer.write(response(body))
        await writer.drain()

    async def whole(tunnel: Tunnel) -> None:
        checker = PatternChecker()
        async with tunnel.visitor(timeout=AWAY) as visitor:
            await visitor.send(tunnel.request())
            got = await visitor.read_response(sink=checker.feed)
            assert (got.status, got.clean, checker.offset) == (200, True, len(body))

    async def in_the_body(tunnel: Tunnel) -> None:
        async with tunnel.visitor(timeout=AWAY, rcvbuf=4096) as visitor:
            await visitor.send(tunnel.request())
            await visitor.read_head()
            visitor.abort()

    async def before_the_head(tunnel: Tunnel) -> None:
        async with tunnel.visitor(timeout=AWAY) as visitor:
            await visitor.send(tunnel.request(target=b"/never"))

    async def in_the_upload(tunnel: Tunnel) -> None:
        async with tunnel.visitor(timeout=AWAY) as visitor:
            await visitor.send(
                tunnel.request("POST", headers=[(b"Transfer-Encoding", b"chunked")]) + chunk(body[:1000])
            )
            visitor.abort()

    async with RawOrigin(serve) as origin, Tunnel(origin.port, relay=True) as tunnel:
        processes = {"server": tunnel.server, "client": tunnel.client}
        baseline = {name: process.fd_count() for name, process in processes.items()}
        kinds: list[Callable[[Tunnel], object]] = [whole, whole, in_the_body, before_the_head, in_the_upload]
        for _ in range(4):
            running = [asyncio.ensure_future(kind(tunnel)) for kind in kinds * 10]  # type: ignore[call-overload]
            seen = len(origin.requests)
            await origin.wait_for(lambda seen=seen: len(origin.requests) > seen, AWAY)  # type: ignore[misc]
            assert await tunnel.relay.cut("reset") == 1
            await asyncio.gather(*running)
            await tunnel.client.event("reconnected", timeout=AWAY)
        peak = {name: process.fd_count() for name, process in processes.items()}

        def left() -> dict[str, int]:
            return {name: process.fd_count() - baseline[name] for name, process in processes.items()}

        began = time.monotonic()
        try:
            await eventually(lambda: max(left().values()) <= 0, 10, "no descriptor more than at the start")
        except WaitFailed:
            raise AssertionError(f"descriptors left: {left()}; {baseline} at the start, {peak} after") from None
        finally:
            print(f"\nbaseline {baseline}, after the traffic {peak}, now +{left()} after {since(began)}")
