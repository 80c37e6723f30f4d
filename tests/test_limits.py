"""What strangers may take: deadlines, connections, requests, bytes and lines of the log; and what is told about it.

The deadlines are shortened, so that a test waits for what the server does and not for the clock.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import re
import socket
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    Header,
    Process,
    RawOrigin,
    RawRequest,
    RawResponse,
    RawVisitor,
    Tunnel,
    chunk,
    eventually,
    request,
    response,
    with_limits,
)
from test_security import LINK_HEADERS, OTHER_TOKEN, PROTOCOL, TOKEN, Peer, dialled

import pytunnel
from pytunnel import (
    LINK_PATH,
    MAX_CALLERS,
    MAX_FIELD,
    MAX_HEAD,
    METRICS,
    Allowance,
    Caller,
    Callers,
    Metrics,
    own_cookies,
)

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter

SOON = 0.3  # seconds: a deadline that is over soon, and yet not before an honest visitor is done
ELSEWHERE = "127.0.0.2"  # another address, to the server


async def told(visitor: RawVisitor) -> RawResponse:
    """What a visitor is told who is then hung up on."""
    answer = await visitor.read_response()
    assert answer.value(b"Connection") == b"close"
    assert await visitor.read_until_close() == b""
    return answer


def problem_of(answer: RawResponse) -> tuple[int, bytes | None]:
    return answer.status, answer.value(b"X-Pytunnel-Error")


async def metrics_of(t: Tunnel) -> dict[str, float]:
    """The server's samples by name and labels."""
    async with t.visitor() as visitor:
        await visitor.send(request(target=b"/metrics"))
        answer = await visitor.read_response()
    assert answer.status == 200, answer
    lines = answer.body.decode().splitlines()
    return {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


# ---------------------------------------------------------------------------------------- Deadlines


@pytest.mark.parametrize("begun", [b"", b"G", b"GET / HTTP/1.1\r\nHost: web.localhost\r\nX-Slow: 1\r\n"])
async def test_a_head_that_does_not_come_to_its_end_is_given_up(begun: bytes) -> None:
    """With a page for whoever has begun one; a connection that says nothing is just closed, as browsers expect."""
    async with (
        RawOrigin(response(b"ok")) as origin,
        Tunnel(origin.port, command=with_limits(HEAD_TIMEOUT=SOON)) as t,
        t.visitor() as slow,
    ):
        await slow.send(begun)
        assert (await t.get()).body == b"ok"
        if begun:
            assert problem_of(await told(slow)) == (408, b"request-timeout")
        else:
            assert await slow.read_until_close() == b""
        assert len(origin.requests) == 1
        slow.close()
        async with asyncio.timeout(5):
            while (await metrics_of(t))["pytunnel_visitors"] != 2:  # the client, and who asks
                pass


async def test_bytes_that_trickle_in_do_not_extend_the_deadline_of_a_head() -> None:
    async with (
        RawOrigin(response(b"ok")) as origin,
        Tunnel(origin.port, command=with_limits(HEAD_TIMEOUT=SOON)) as t,
        t.visitor() as slow,
    ):

        async def trickle() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    await slow.send(b"1")  # of one value: no bound on a head is met before its deadline
                    await t.get()  # some time passes, and an honest visitor is served meanwhile

        await slow.send(b"GET / HTTP/1.1\r\nHost: %b\r\nX-Slow: " % t.host)
        trickling = asyncio.ensure_future(trickle())
        assert (await slow.read_head()).status == 408
        trickling.cancel()
        await asyncio.gather(trickling, return_exceptions=True)


async def test_a_kept_connection_is_closed_when_it_is_idle_for_long_and_its_next_head_has_a_deadline() -> None:
    limits = with_limits(VISITOR_KEEPALIVE=SOON, HEAD_TIMEOUT=4 * SOON)
    async with RawOrigin(response(b"ok")) as origin, Tunnel(origin.port, command=limits) as t, t.visitor() as idle:
        await idle.send(t.request())
        assert (await idle.read_response()).body == b"ok"
        assert await idle.read_until_close() == b""
    limits = with_limits(HEAD_TIMEOUT=SOON)
    async with RawOrigin(response(b"ok")) as origin, Tunnel(origin.port, command=limits) as t, t.visitor() as slow:
        for _ in range(2):
            await slow.send(t.request())
            assert (await slow.read_response()).body == b"ok"
        await slow.send(t.request()[:-1])
        assert problem_of(await told(slow)) == (408, b"request-timeout")
        assert len(origin.requests) == 2


@pytest.mark.parametrize("chunked", [False, True])
async def test_content_that_stops_coming_is_given_up_with_408(chunked: bool) -> None:
    async with (
        RawOrigin(response(b"ok"), read_body=True) as origin,
        Tunnel(origin.port, command=with_limits(BODY_TIMEOUT=SOON)) as t,
        t.visitor() as slow,
    ):
        framing = (b"Transfer-Encoding", b"chunked") if chunked else (b"Content-Length", b"10")
        await slow.send(t.request("POST", b"/slow", [framing]) + (chunk(b"12345") if chunked else b"12345"))
        await origin.wait_for(lambda: origin.requests)
        answer = await slow.read_response()
        assert problem_of(answer) == (408, b"request-timeout")
        await origin.wait_for(lambda: not origin.open_connections, what="the local connection to end")
        assert not origin.requests[0].complete
        await slow.send(b"67890" + t.request(target=b"/canary"))
        assert await slow.read_until_close() == b""
        assert [each.target for each in origin.requests] == [b"/slow"]
        assert (await t.get()).body == b"ok"


async def test_a_request_beside_its_response_may_pause_for_longer_than_that() -> None:
    async def handle(request: RawRequest, reader: Reader, writer: Writer) -> None:
        if request.target == b"/both":
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"begun"))
        writer.write(chunk(await reader.readuntil(b"end")) + chunk(b""))

    async with (
        RawOrigin(handle) as origin,
        Tunnel(origin.port, command=with_limits(BODY_TIMEOUT=SOON)) as t,
        t.visitor() as both,
    ):
        await both.send(t.request("POST", b"/both", [(b"Transfer-Encoding", b"chunked")]))
        body = both.iter_body(await both.read_head())
        assert await anext(body) == b"begun"
        for _ in range(2):  # these have the same deadline, and nothing beside it
            async with t.visitor() as slow:
                await slow.send(t.request("POST", b"/slow", [(b"Transfer-Encoding", b"chunked")]))
                assert (await slow.read_response()).status == 408
        await both.send(chunk(b"end"))
        assert (await anext(body)).endswith(b"end")


async def test_who_takes_nothing_of_a_response_is_cut_off_and_who_takes_little_is_not() -> None:
    async def endless(_: RawRequest, __: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(65536))
            await writer.drain()

    async with (
        RawOrigin(endless) as origin,
        Tunnel(origin.port, command=with_limits(STALL_TIMEOUT=4 * SOON)) as t,
        t.visitor(rcvbuf=65536) as slow,
        t.visitor(rcvbuf=65536) as stalled,
    ):
        await slow.send(t.request(target=b"/slow"))
        await stalled.send(t.request(target=b"/stalled"))
        for visitor in (slow, stalled):
            await visitor.read_head()
        while (found := await metrics_of(t))["pytunnel_streams"] == 2:
            assert await slow.read_some(40_000)
            await asyncio.sleep(0.1)  # the pace is what this is about: for seconds it takes less than has to go
        assert found["pytunnel_streams"] == found["pytunnel_aborts_total"] == 1
        assert await slow.read_some()
        await stalled.read_until_close()
        assert stalled.ended == "reset"


async def head_timeout(t: Tunnel) -> None:
    """Return when somebody who has come now is told that it took too long."""
    async with t.visitor() as timer:
        await timer.send(b"G")
        assert (await told(timer)).status == 408


async def test_a_head_that_begins_behind_a_request_has_its_deadline_when_that_is_answered() -> None:
    release = asyncio.Event()

    async def handle(_: RawRequest, __: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12")
        await release.wait()
        writer.write(b"345")

    async with (
        RawOrigin(handle) as origin,
        Tunnel(origin.port, command=with_limits(HEAD_TIMEOUT=SOON)) as t,
        t.visitor() as visitor,
    ):
        await visitor.send(t.request())
        assert await visitor.read_until(b"\r\n\r\n12")
        await visitor.send(t.request()[:-1])
        await head_timeout(t)  # meanwhile the other one is in a response, where no page belongs
        release.set()
        assert await visitor.read_exactly(3) == b"345"
        assert problem_of(await told(visitor)) == (408, b"request-timeout")


async def test_a_head_that_begins_behind_a_declined_upgrade_ends_no_response() -> None:
    release = asyncio.Event()

    async def handle(request: RawRequest, _: Reader, writer: Writer) -> None:
        if request.target == b"/slow":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12")
            await release.wait()
            writer.write(b"345")
        else:
            writer.write(response(b"ok"))

    async with (
        RawOrigin(handle) as origin,
        Tunnel(origin.port, command=with_limits(HEAD_TIMEOUT=SOON)) as t,
        t.visitor() as visitor,
    ):
        upgrade = t.request(headers=[(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")])
        await visitor.send(upgrade + t.request(target=b"/slow"))
        assert (await visitor.read_response()).body == b"ok"
        assert await visitor.read_until(b"\r\n\r\n12")
        await visitor.send(b"GET /x HT")
        await head_timeout(t)
        release.set()
        assert await visitor.read_exactly(3) == b"345"


async def test_an_empty_line_between_requests_is_none() -> None:
    async with (
        RawOrigin(response(b"ok"), read_body=True) as origin,
        Tunnel(origin.port, command=with_limits(HEAD_TIMEOUT=SOON)) as t,
        t.visitor() as visitor,
    ):
        await visitor.send(t.request("POST", body=b"old browsers") + b"\r\n")
        assert (await visitor.read_response()).body == b"ok"
        await head_timeout(t)
        await visitor.send(t.request())
        assert (await visitor.read_response()).body == b"ok"


# ---------------------------------------------------------------------------------------- How large


@pytest.mark.parametrize(
    ("head", "answer"),
    [
        (b"GET /%b HTTP/1.1\r\n", (414, b"uri-too-long")),
        (b"GET / HTTP/1.1\r\nX-Large: %b\r\n", (431, b"too-large")),
        (b"GET / HTTP/1.1\r\n%b: 1\r\n", (431, b"too-large")),
    ],
)
@pytest.mark.parametrize("slices", [1, 3])
async def test_a_line_that_is_too_long_is_refused_by_its_kind(
    head: bytes, answer: tuple[int, bytes], slices: int
) -> None:
    async with RawOrigin(response(b"ok")) as origin, Tunnel(origin.port) as t, t.visitor() as visitor:
        filled = head % (b"a" * (MAX_FIELD + 1)) + b"Host: %b\r\n\r\n" % t.host
        step = -(-len(filled) // slices)
        for start in range(0, len(filled), step):
            with contextlib.suppress(ConnectionError):
                await visitor.send(filled[start : start + step])
        assert problem_of(await told(visitor)) == answer
        assert not origin.requests


async def test_a_head_is_bounded_as_a_whole_before_it_is_complete() -> None:
    async with RawOrigin(response(b"ok")) as origin, Tunnel(origin.port) as t, t.visitor() as visitor:
        await visitor.send(b"GET / HTTP/1.1\r\nHost: %b\r\n" % t.host)
        line = b"X-Large: %b\r\n" % (b"a" * (MAX_FIELD - 100))
        for _ in range(MAX_HEAD // len(line) + 1):
            await visitor.send(line)
        assert problem_of(await told(visitor)) == (431, b"too-large")
        assert not origin.requests


@pytest.mark.parametrize(("own", "status"), [(101, 200), (124, 200), (125, 431), (200, 431)])
async def test_a_head_has_so_many_fields_with_those_that_the_server_adds(own: int, status: int) -> None:
    async with RawOrigin(response(b"ok")) as origin, Tunnel(origin.port) as t:
        fields = [(b"X-%d" % number, b"1") for number in range(own)]  # and Host
        answer = await t.get(headers=fields)
        assert answer.status == status
        assert len(origin.requests) == (status == 200)
        assert answer.value(b"X-Pytunnel-Error") == (None if status == 200 else b"too-large")


@pytest.mark.parametrize("chunked", [False, True])
async def test_content_over_max_body_is_refused_with_413(chunked: bool) -> None:
    async with (
        RawOrigin(response(b"ok"), read_body=True) as origin,
        Tunnel(origin.port, serve_args=["--max-body", "1K"]) as t,
    ):
        for size in (1024, 1025):
            async with t.visitor() as visitor:
                if chunked:
                    body = chunk(bytes(1000)) + chunk(bytes(size - 1000)) + chunk(b"")
                    await visitor.send(t.request("POST", headers=[(b"Transfer-Encoding", b"chunked")]) + body)
                else:
                    await visitor.send(t.request("POST", body=bytes(size)))
                answer = await visitor.read_response("POST")
                assert problem_of(answer) == ((413, b"content-too-large") if size > 1024 else (200, None))
        assert [each.body for each in origin.requests if each.complete] == [bytes(1024)]
        async with t.visitor() as visitor:  # which goes on, and is cut off
            await visitor.send(t.request("POST", headers=[(b"Content-Length", b"2000000000")]) + bytes(1024))
            assert (await visitor.read_response("POST")).status == 413
            with pytest.raises(ConnectionError):
                while True:
                    await visitor.send(bytes(65536))
        assert len([each for each in origin.requests if each.complete]) == 1


@pytest.mark.parametrize("arguments", [[], ["--max-body", "1K"]])
async def test_a_large_upload_to_nowhere_gets_one_answer(arguments: list[str]) -> None:
    async with RawOrigin(response(b"ok")) as origin, Tunnel(origin.port, serve_args=arguments) as t:
        for _ in range(3):
            async with t.visitor() as visitor:
                host = t.host if arguments else b"nobody.localhost"
                await visitor.send(b"POST / HTTP/1.1\r\nHost: %b\r\nContent-Length: 100000000\r\n\r\n" % host)
                answer = await visitor.read_response("POST")
                assert answer.status == (413 if arguments else 404)
                with contextlib.suppress(ConnectionError):
                    for _ in range(40):
                        await visitor.send(bytes(262144))
                visitor.write_eof()
                assert await visitor.read_until_close() == b""


async def test_pages_for_who_does_not_read_them_do_not_pile_up() -> None:
    pages = 20_000
    limits = with_limits(STALL_TIMEOUT=2 * SOON)
    async with RawOrigin(response(b"ok")) as origin, Tunnel(origin.port, command=limits) as t:
        before = t.server.rss()
        async with t.visitor(rcvbuf=4096, sndbuf=65536) as visitor:
            asks = request(host=b"nobody.localhost", headers=[(b"Accept", b"text/html")])
            with contextlib.suppress(ConnectionError):
                for _ in range(pages // 50):
                    await visitor.send(asks * 50)
            async with asyncio.timeout(10):
                while (found := await metrics_of(t))["pytunnel_visitors"] > 2:  # it is still there, and hung up on
                    pass
        assert t.server.rss() - before < 8 * 1024 * 1024
        assert found['pytunnel_refusals_total{reason="unknown-tunnel"}'] < pages


# ---------------------------------------------------------------------------------------- How many


async def test_connections_of_one_address_are_bounded_and_others_do_not_notice() -> None:
    async with RawOrigin(response(b"ok")) as origin, Tunnel(origin.port, serve_args=["--max-per-address", "3"]) as t:
        async with contextlib.AsyncExitStack() as stack:
            visitors = [await stack.enter_async_context(t.visitor()) for _ in range(3)]  # the client's link is no such
            for visitor in visitors:
                await visitor.send(t.request())
                assert (await visitor.read_response()).body == b"ok"
            async with t.visitor() as refused:
                await refused.send(t.request(target=b"/canary"))
                answer = await told(refused)
            assert problem_of(answer) == (429, b"too-many-requests")
            assert answer.value(b"Retry-After") == b"5"
            async with t.visitor(source=ELSEWHERE) as other:
                await other.send(t.request())
                assert (await other.read_response()).body == b"ok"
            await visitors[0].send(t.request())
            assert (await visitors[0].read_response()).body == b"ok"
        assert await t.server.stderr_line("refused a connection from 127.0.0.1: it has 3 already")

        async def admitted() -> bool:
            return (await t.get()).status == 200

        while not await admitted():
            pass
        assert b"/canary" not in [each.target for each in origin.requests]


async def test_connections_are_bounded_in_all() -> None:
    command = with_limits(MAX_VISITORS=4)
    async with (
        RawOrigin(response(b"ok")) as origin,
        Tunnel(origin.port, command=command) as t,  # whose link is the first
        t.visitor() as one,
        t.visitor(source=ELSEWHERE) as two,
        t.visitor() as three,
    ):
        for visitor in (one, two, three):
            await visitor.send(t.request())
            assert (await visitor.read_response()).body == b"ok"
        async with t.visitor(source="127.0.0.3") as refused:
            assert problem_of(await told(refused)) == (503, b"server-full")
        one.close()
        await eventually_served(t)


async def eventually_served(t: Tunnel) -> None:
    async with asyncio.timeout(5):
        while (await t.get()).status != 200:
            pass


async def test_behind_a_trusted_proxy_requests_are_counted_by_the_visitors_own_address() -> None:
    holding = asyncio.Event()

    async def handle(request: RawRequest, _: Reader, writer: Writer) -> None:
        if request.target == b"/hold":
            await holding.wait()
        writer.write(response(b"ok"))

    arguments = ["--max-per-address", "2", "--trusted-proxy", "127.0.0.1"]
    async with (
        RawOrigin(handle) as origin,
        Tunnel(origin.port, serve_args=arguments) as t,
        contextlib.AsyncExitStack() as stack,
    ):

        def of(address: bytes, target: bytes) -> bytes:
            return t.request(target=target, headers=[(b"X-Forwarded-For", b"1.2.3.4, " + address)])

        held = [await stack.enter_async_context(t.visitor()) for _ in range(2)]
        for visitor in held:
            await visitor.send(of(b"203.0.113.1", b"/hold"))
        await origin.wait_for(lambda: len(origin.requests) == 2)
        async with t.visitor() as front:  # one connection of the front carries anybody's requests
            await front.send(of(b"203.0.113.1", b"/"))
            assert problem_of(await front.read_response()) == (429, b"too-many-requests")
            await front.send(of(b"203.0.113.2", b"/"))
            assert (await front.read_response()).body == b"ok"
            holding.set()
            for visitor in held:
                assert (await visitor.read_response()).body == b"ok"
            await front.send(of(b"203.0.113.1", b"/"))
            assert (await front.read_response()).body == b"ok"
        assert await t.server.stderr_line("refused a request from 203.0.113.1: it has 2 open")


async def test_who_aborts_many_requests_has_to_wait_and_nobody_else() -> None:
    aborts = 20
    command = with_limits(MAX_ABORTS=aborts, ABORT_RATE=0.001)

    async def handle(request: RawRequest, reader: Reader, writer: Writer) -> None:
        if request.target == b"/hang":
            await reader.read()
        else:
            writer.write(response(b"ok"))

    async with RawOrigin(handle) as origin, Tunnel(origin.port, command=command) as t:
        for number in range(aborts):
            async with t.visitor() as visitor:
                await visitor.send(t.request(target=b"/hang"))
                await origin.wait_for(lambda n=number: len(origin.requests) > n)
        await origin.wait_for(lambda: not origin.open_connections)

        async def counted() -> bool:
            return (await metrics_of(t))["pytunnel_aborts_total"] == aborts

        async with asyncio.timeout(5):
            while not await counted():
                pass
        assert problem_of(await t.get()) == (429, b"too-many-requests")
        async with t.visitor(source=ELSEWHERE) as other:
            await other.send(t.request())
            assert (await other.read_response()).body == b"ok"
        assert await t.server.stderr_line(f"refused a request from 127.0.0.1: it aborted {aborts} requests")


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12"])
async def test_an_upgrade_that_nobody_waited_for_was_aborted_like_any_request(begun: bytes) -> None:
    async def handle(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(begun)
        await reader.read()

    async with RawOrigin(handle) as origin, Tunnel(origin.port, command=with_limits(MAX_ABORTS=2, ABORT_RATE=0.0)) as t:
        for number in range(2):
            async with t.visitor() as visitor:
                await visitor.send(t.request(headers=[(b"Connection", b"upgrade"), (b"Upgrade", b"x")]))
                await origin.wait_for(lambda n=number: len(origin.requests) > n)
        await origin.wait_for(lambda: not origin.open_connections)
        async with asyncio.timeout(5):
            while (await metrics_of(t)).get("pytunnel_aborts_total") != 2:
                pass
        assert problem_of(await t.get()) == (429, b"too-many-requests")


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_visitors_who_are_gone_before_they_are_seen_leave_nothing_behind(loop: str) -> None:
    """Of such a connection uvloop cannot tell the address."""
    arguments, env = ["--trusted-proxy", "10.0.0.0/8"], {"PYTUNNEL_LOOP": loop}
    async with RawOrigin(response(b"ok")) as origin, Tunnel(origin.port, serve_args=arguments, env=env) as t:
        before = await metrics_of(t)
        for _ in range(200):
            sock = socket.create_connection(("127.0.0.1", t.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        async with asyncio.timeout(5):
            for name in ("pytunnel_visitors", "pytunnel_tasks"):
                while (await metrics_of(t))[name] > before[name]:
                    pass
        assert (await t.get()).body == b"ok"


def test_who_keeps_little_is_not_made_to_wait_by_who_keeps_much() -> None:
    kept: collections.Counter[str] = collections.Counter()
    assert pytunnel.find_crowded(kept) == set()
    kept.update({f"idle {number}": 1000 for number in range(50)})
    kept.update({"hog": pytunnel.MAX_BUFFERED - 100_000, "modest": 40_000})
    assert pytunnel.find_crowded(kept) == set()
    kept["hog"] += 100_000
    assert pytunnel.find_crowded(kept) == {"hog"}
    kept["modest"] = pytunnel.MAX_BUFFERED // 2 + 1
    assert pytunnel.find_crowded(kept) == {"hog", "modest"}


async def test_one_token_cannot_use_up_what_all_sessions_may_keep() -> None:
    """Its own tunnels get nothing new; those of others go on."""
    size = 32 * 1024 * 1024
    command = with_limits(MAX_BUFFERED=64 * 1024, TICK=0.02)

    async def handle(request: RawRequest, _: Reader, writer: Writer) -> None:
        writer.write(response(bytes(size) if request.target == b"/large" else b"ok"))

    async with RawOrigin(handle) as origin, Tunnel(origin.port, command=command) as t:
        added = await Process.start("token", "add", "other", home=t._home / "server")
        async with added:
            assert await added.wait() == 0
        other = await t.start_client(name="other", token=added.stdout[0], home="elsewhere")
        await other.event("ready")
        async with t.visitor(rcvbuf=4096) as visitor:
            await visitor.send(t.request(target=b"/large"))
            await visitor.read_head()
            assert await t.server.stderr_line("token given: its sessions keep too much")
            async with asyncio.timeout(5):
                while problem_of(await t.get()) != (503, b"server-full"):
                    pass
            async with t.visitor() as another:
                for _ in range(5):
                    await another.send(request(host=b"other.localhost"))
                    assert (await another.read_response()).body == b"ok"


async def test_who_leaves_a_websocket_has_not_aborted_anything() -> None:
    async def handle(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        await reader.read()

    async with RawOrigin(handle) as origin, Tunnel(origin.port, command=with_limits(MAX_ABORTS=1)) as t:
        for _ in range(3):
            async with t.visitor() as visitor:
                await visitor.send(t.request(headers=[(b"Connection", b"upgrade"), (b"Upgrade", b"x")]))
                assert (await visitor.read_head()).status == 101
        await origin.wait_for(lambda: not origin.open_connections)
        assert "pytunnel_aborts_total" not in await metrics_of(t)


async def test_when_sessions_keep_too_much_new_requests_are_refused_and_running_ones_go_on() -> None:
    kib = 1024
    size = 32 * 1024 * kib
    command = with_limits(MAX_BUFFERED=64 * kib, TICK=0.02)

    async def handle(request: RawRequest, _: Reader, writer: Writer) -> None:
        writer.write(response(bytes(size) if request.target == b"/large" else b"ok"))

    async with (
        RawOrigin(handle) as origin,
        Tunnel(origin.port, command=command) as t,
        t.visitor(rcvbuf=4096) as visitor,
    ):
        await visitor.send(t.request(target=b"/large"))
        head = await visitor.read_head()
        assert await t.server.stderr_line("token given: its sessions keep too much, and get no new requests")
        async with asyncio.timeout(5):
            while problem_of(await t.get()) != (503, b"server-full"):
                pass
        got = 0
        async for piece in visitor.iter_body(head):
            got += len(piece)
        assert got == size
        await eventually_served(t)


# ---------------------------------------------------------------------------------------- Guesses and handshakes


@contextlib.asynccontextmanager
async def serving(*args: str, command: Sequence[str]) -> AsyncIterator[tuple[Process, int]]:
    env = {"PYTUNNEL_TOKEN": TOKEN}
    words = ["serve", "--listen", "127.0.0.1:0", "--json", *args]
    async with await Process.start(*words, env=env, command=command) as server:
        yield server, (await server.event("listening"))["port"]


async def guess(peer: Peer) -> str:
    """Log in with a wrong token; what the server says."""
    await peer.prove(await peer.hello(token=OTHER_TOKEN))
    return (await peer.answer()).get("code", str)


async def test_who_guesses_tokens_has_to_wait_and_nobody_else() -> None:
    """Neither another address, nor a client behind the same one that was there before; but the right token, if new."""
    async with serving(command=with_limits(MAX_GUESSES=3, GUESS_RATE=0.0)) as (server, port):
        async with dialled(port) as peer:
            await peer.shake_hands()
        assert [await guess_from(port) for _ in range(5)] == ["token"] * 3 + ["throttled"] * 2
        async with dialled(port) as peer:
            await peer.shake_hands()
        assert await guess_from(port, ELSEWHERE) == "token"
        async with RawVisitor(port) as visitor:  # it may visit as before
            await visitor.send(request(target=b"/healthz"))
            assert (await visitor.read_response()).status == 200
        assert server.returncode is None


async def test_while_an_address_has_to_wait_even_the_right_token_is_not_told_from_others() -> None:
    async with serving(command=with_limits(MAX_GUESSES=2, GUESS_RATE=0.0)) as (server, port):
        found = []
        for key in (TOKEN, OTHER_TOKEN, TOKEN, OTHER_TOKEN):  # of the first it makes a wrong proof
            async with dialled(port) as peer:
                answer = await peer.hello(key=pytunnel.key_id(key), token=OTHER_TOKEN)
                if answer.get("type", str) == "challenge":
                    await peer.prove(answer)
                    answer = await peer.answer()
                found.append(answer.get("code", str))
        assert found == ["token", "token", "throttled", "throttled"]
        assert server.returncode is None


async def guess_from(port: int, source: str = "127.0.0.1") -> str:
    """What the server says to a wrong token from an address."""
    connector = aiohttp.TCPConnector(local_addr=(source, 0))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.ws_connect(f"http://127.0.0.1:{port}{LINK_PATH}", protocols=[pytunnel.SUBPROTOCOL]) as ws,
    ):
        peer = Peer(ws, port)
        answer = await peer.hello(token=OTHER_TOKEN)
        if answer.get("type", str) == "challenge":
            await peer.prove(answer)
            answer = await peer.answer()
        return answer.get("code", str)


async def test_what_has_not_shown_a_token_may_not_send_much() -> None:
    async with serving(command=with_limits()) as (server, port):
        for size, cut in ((pytunnel.MAX_HELLO, False), (4 * pytunnel.MAX_HELLO, True)):
            async with RawVisitor(port) as visitor:
                await visitor.send(request(target=LINK_PATH.encode(), headers=[*LINK_HEADERS, PROTOCOL]))
                assert (await visitor.read_head()).status == 101
                head = b"\x81\xff" + (10**6).to_bytes(8, "big") + bytes(4)  # a text of a million bytes begins
                with contextlib.suppress(ConnectionError):
                    await visitor.send(head + bytes(size))
                if cut:
                    await visitor.read_until_close()
                    assert visitor.ended
        assert server.returncode is None


async def test_a_link_that_is_none_is_an_ordinary_request() -> None:
    async with RawOrigin(response(b"ok"), read_body=True) as origin, Tunnel(origin.port) as t, t.visitor() as visitor:
        old = [(name, b"12" if name == b"Sec-WebSocket-Version" else value) for name, value in LINK_HEADERS]
        await visitor.send(request(target=LINK_PATH.encode(), headers=[*old, PROTOCOL]))
        answer = await visitor.read_response()
        assert (answer.status, answer.value(b"Connection")) == (426, b"Upgrade")
        await visitor.send(t.request())
        assert (await visitor.read_response()).body == b"ok"


@pytest.mark.parametrize("address", ["[::1]", "[0:0:0:0:0:0:0:1]", "[::0001]", "localhost", "LOCALHOST", "localhost."])
async def test_a_server_is_dialled_by_any_spelling_of_its_host(address: str) -> None:
    words = ["serve", "--listen", "[::1]:0" if "[" in address else "127.0.0.1:0", "--json"]
    env = {"PYTUNNEL_TOKEN": TOKEN}
    async with await Process.start(*words, env=env) as server:
        port = (await server.event("listening"))["port"]
        words = ["connect", "3000", "--server", f"http://{address}:{port}", "--name", "web", "--json"]
        async with await Process.start(*words, env=env) as client:
            assert (await client.event("ready"))["url"] == f"http://web.localhost:{port}"


async def test_a_link_without_tunnels_ends_with_its_login() -> None:
    async with serving(command=with_limits()) as (_, port), dialled(port) as peer:
        await peer.shake_hands(tunnels=[])
        await peer.closed()
        async with RawVisitor(port) as visitor:
            await visitor.send(request(target=b"/metrics"))
            assert b"pytunnel_sessions 0\n" in (await visitor.read_response()).body


# ---------------------------------------------------------------------------------------- The log


async def test_the_log_has_a_line_about_an_address_now_and_then_and_counts_the_rest() -> None:
    limits = with_limits(CALLER_LINE_RATE=0.0)
    async with RawOrigin(response(b"ok")) as origin, Tunnel(origin.port, command=limits) as t:
        before = len(t.server.stderr)
        for _ in range(100):
            async with t.visitor() as visitor:
                await visitor.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 \x1b[31m\r\n\r\n")
                assert (await visitor.read_response()).status == 400
        async with t.visitor(source=ELSEWHERE) as visitor:
            await visitor.send(b"nonsense\r\n\r\n")
            assert (await visitor.read_response()).status == 400
        await t.server.stderr_line(f"bad request from {ELSEWHERE}")
        lines = [line for line in t.server.stderr[before:] if "bad request" in line]
        assert len(lines) == 2, lines
        assert all(line.isprintable() for line in lines)


def test_a_line_says_how_many_were_left_out() -> None:
    caller = Caller()
    assert caller.line("one", 10.0) == "one"
    assert [caller.line("two", 10.0 + n / 10) for n in range(5)] == [""] * 5
    assert caller.line("three", 12.0) == "three (5 more of this address were left out)"
    assert caller.line("four", 14.0) == "four"


async def test_log_lines_can_be_json() -> None:
    arguments = ["--log-format", "json"]
    async with RawOrigin(response(b"ok")) as origin, Tunnel(origin.port, serve_args=arguments) as t:
        async with t.visitor() as visitor:
            await visitor.send(b"nonsense \x1b[31m\r\n\r\n")
            assert (await visitor.read_response()).status == 400
        await t.server.stderr_line("bad request")
        taken = ["serve", "--listen", f"127.0.0.1:{t.port}", *arguments]
        async with await Process.start(*taken) as second:
            assert await second.wait() == pytunnel.ExitStatus.UNEXPECTED
        await t.stop_server()
    for server in (t.server, second):
        lines = [json.loads(line) for line in server.stderr]
        assert lines
        for line in lines:
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
            assert line["level"] in ("info", "error")
            assert line["message"]
    assert lines[-1]["level"] == "error"
    assert "cannot listen" in lines[-1]["message"]


def test_a_traceback_is_a_field_of_its_line(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("one\ntwo")
    except ValueError:
        pytunnel.log.exception("it %s", "failed")
    line = pytunnel.JsonLines().format(caplog.records[-1])
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["message"]) == ("error", "it failed")
    assert "ValueError: one\ntwo" in found["traceback"]


# ---------------------------------------------------------------------------------------- Metrics


async def test_metrics_count_what_happened() -> None:
    async with RawOrigin(response(b"12345"), read_body=True) as origin, Tunnel(origin.port) as t:
        assert (await t.get()).status == 200
        assert (await t.fetch("POST", body=b"123")).status == 200
        assert (await t.get(headers=[(b"Host", b"x")])).status == 400
        async with t.visitor() as visitor:
            await visitor.send(request(host=b"nobody.localhost"))
            assert (await visitor.read_response()).status == 404
        found = await metrics_of(t)
        expected = {
            "pytunnel_sessions": 1,
            "pytunnel_links": 1,
            "pytunnel_streams": 0,
            "pytunnel_buffered_bytes": 0,
            "pytunnel_visitors": 2,
            "pytunnel_received_bytes_total": 3,
            "pytunnel_sent_bytes_total": 10,
            'pytunnel_responses_total{class="2xx"}': 2,
            'pytunnel_responses_total{class="4xx"}': 2,
            'pytunnel_refusals_total{reason="unknown-tunnel"}': 1,
            'pytunnel_refusals_total{reason="bad-request"}': 1,
            'pytunnel_handshakes_total{result="ready"}': 1,
            "pytunnel_resumes_total": 0,
        }
        for name in ("pytunnel_buffered_bytes", "pytunnel_visitors"):  # they come back to rest
            while found[name] != expected[name]:
                found = await metrics_of(t)
        assert {name: found.get(name) for name in expected} == expected
        await eventually(lambda: t.server.fd_count() == found["process_open_fds"] - 1, what="the last visitor's end")
        assert 0.5 < found["process_resident_memory_bytes"] / t.server.rss() < 2
        lag = "pytunnel_event_loop_lag_seconds"
        async with asyncio.timeout(5):
            while not found.get(f"{lag}_count"):
                found = await metrics_of(t)
        assert found[f'{lag}_bucket{{le="+Inf"}}'] == found[f"{lag}_count"]


async def test_a_resumed_link_and_a_wrong_token_are_counted() -> None:
    async with RawOrigin(response(b"ok")) as origin, Tunnel(origin.port, relay=True) as t:
        await t.relay.cut("reset")
        await t.client.event("reconnected")
        async with dialled(t.port) as peer:
            assert await guess(peer) == "token"
        found = await metrics_of(t)
        assert found["pytunnel_resumes_total"] == 1
        assert found['pytunnel_handshakes_total{result="token"}'] == 1
        assert found['pytunnel_handshakes_total{result="ready"}'] == 2


@pytest.mark.parametrize("public", [False, True])
async def test_metrics_are_for_this_machine_unless_they_are_made_public(public: bool) -> None:
    """A front on this machine forwards strangers: what it says about them counts, whether it is trusted or not."""
    arguments = ["--trusted-proxy", "127.0.0.3", *(["--metrics-public"] if public else [])]
    forwarded = (b"X-Forwarded-For", b"203.0.113.9")
    cases: list[tuple[bytes, list[Header], str, bool]] = [
        (b"127.0.0.1", [], "127.0.0.1", True),
        (b"localhost:8080", [], ELSEWHERE, True),
        (b"[::1]", [], "127.0.0.1", True),
        (b"127.0.0.1", [], "127.0.0.3", True),
        (b"127.0.0.1", [forwarded], "127.0.0.3", public),
        (b"127.0.0.1", [forwarded], "127.0.0.1", public),
        (b"127.0.0.1", [(b"Forwarded", b"for=203.0.113.9")], "127.0.0.1", public),
        (b"127.0.0.1", [(b"X-Real-IP", b"203.0.113.9")], "127.0.0.1", public),
        (b"evil.example", [], "127.0.0.1", public),
        (b"10.0.0.1", [], "127.0.0.1", public),
    ]
    async with RawOrigin(response(b"mine", 404)) as origin, Tunnel(origin.port, serve_args=arguments) as t:
        for host, headers, source, allowed in cases:
            async with t.visitor(source=source) as visitor:
                await visitor.send(request(target=b"/metrics", host=host, headers=headers))
                answer = await visitor.read_response()
                assert answer.status == (200 if allowed else 404), (host, headers, source)
                assert answer.body.startswith(b"# HELP pytunnel_sessions ") == allowed
        mine = await t.get(b"/metrics")  # on a tunnel's host it is the local service's
        assert (mine.status, mine.body) == (404, b"mine")


def test_every_metric_is_described_once_in_prometheus_format() -> None:
    metrics = Metrics()
    metrics['pytunnel_responses_total{class="2xx"}'] += 3
    metrics.observe_lag(0.003)
    metrics.observe_lag(0.3)
    lines = metrics.text({"pytunnel_sessions": 2}).splitlines()
    assert lines[:3] == [
        f"# HELP pytunnel_sessions {METRICS['pytunnel_sessions'][1]}",
        "# TYPE pytunnel_sessions gauge",
        "pytunnel_sessions 2",
    ]
    assert 'pytunnel_responses_total{class="2xx"} 3' in lines
    lag = "pytunnel_event_loop_lag_seconds"
    buckets = [line.rpartition(" ")[2] for line in lines if line.startswith(f"{lag}_bucket")]
    assert buckets == ["0", "1", "1", "1", "1", "1", "2", "2", "2"]
    assert [line for line in lines if line.startswith(f"{lag}_")][-2:] == [f"{lag}_sum 0.303", f"{lag}_count 2"]
    with pytest.raises(KeyError):
        metrics.text({"pytunnel_nobody_described_this": 1})


# ---------------------------------------------------------------------------------------- Cookies

HOST = "web.t.example.com"


@pytest.mark.parametrize(
    ("cookie", "kept"),
    [
        (b"a=1", None),
        (b"a=1; Path=/; Secure", None),
        (b"a=1; Domain=web.t.example.com; Path=/", None),
        (b"a=1; Domain=.web.t.example.com", None),
        (b"a=1; Domain=x.web.t.example.com", None),
        (b"a=1; Domain=elsewhere.org", None),  # browsers refuse it, and that is what the service sees at home, too
        (b"a=1; Domain=tt.example.com", None),
        (b"domain=t.example.com; Path=/", None),
        (b"a=1; Domain=t.example.com; Path=/", b"a=1; Path=/"),
        (b"a=1; domain=.t.example.com", b"a=1"),
        (b"a=1;DOMAIN=T.Example.COM", b"a=1"),
        (b"a=1; Domain=t.example.com.", b"a=1"),
        (b"a=1; Domain=example.com", b"a=1"),
        (b"a=1; Domain=com", b"a=1"),
        (b"a=1; \t Domain \t = \t t.example.com", b"a=1"),
        (b"a=1; Domain=t.example.com; Domain=web.t.example.com", b"a=1; Domain=web.t.example.com"),
        (b"a=1; Domain=web.t.example.com; Domain=t.example.com", b"a=1; Domain=web.t.example.com"),
        (b"a=1; Domain=t%2Eexample.com", b"a=1"),
        (b"a=1; Domain=\xef\xbd\x94.example.com", b"a=1"),
        (b'a=1; Domain="t.example.com"', b"a=1"),
        (b"a=1; Domain=", b"a=1"),
    ],
)
def test_no_cookie_is_for_more_than_its_tunnel(cookie: bytes, kept: bytes | None) -> None:
    headers = [(b"X-Domain", b"t.example.com"), (b"sEt-cOOkie", cookie), (b"Set-Cookie", b"b=2")]
    assert own_cookies(headers, HOST) == [headers[0], (b"sEt-cOOkie", kept or cookie), headers[2]]


async def test_visitors_get_no_cookie_for_the_zone() -> None:
    fields = [
        (b"Set-Cookie", b"a=1; Domain=localhost"),
        (b"Set-Cookie", b"b=2; Domain=web.localhost"),
        (b"Set-Cookie", b"c=3"),
    ]
    hints = b"HTTP/1.1 103 Early Hints\r\nSet-Cookie: a=1; Domain=localhost\r\n\r\n"
    async with RawOrigin(hints + response(b"ok", headers=fields)) as origin, Tunnel(origin.port) as t:
        got = await t.get()
        assert got.values(b"Set-Cookie") == [b"a=1", b"b=2; Domain=web.localhost", b"c=3"]
        assert [head.values(b"Set-Cookie") for head in got.interim] == [[b"a=1"]]


# ---------------------------------------------------------------------------------------- Arithmetic


@given(
    st.integers(1, 50),
    st.floats(0, 100),
    st.lists(st.floats(0, 10), min_size=1, max_size=200),
)
def test_an_allowance_is_never_exceeded(burst: int, rate: float, pauses: list[float]) -> None:
    allowance, now, taken = Allowance(burst, rate), 100.0, []
    for pause in pauses:
        now += pause
        before = allowance.left(now)
        assert before <= burst
        if allowance.take(now):
            taken.append(now)
        else:
            assert before == 0
    for start in range(len(taken)):
        for stop in range(start, len(taken)):
            assert stop - start + 1 <= burst + (taken[stop] - taken[start]) * rate + 1e-6


def test_addresses_are_told_apart_as_networks_give_them_out() -> None:
    callers = Callers()
    assert callers["192.0.2.1"] is callers["192.0.2.1"] is callers["::ffff:192.0.2.1"]
    assert callers["192.0.2.1"] is not callers["192.0.2.2"]
    assert callers["2001:db8:0:1::1"] is callers["2001:db8:0:1:ffff::2"]
    assert callers["2001:db8:0:1::1"] is not callers["2001:db8:0:2::1"]
    assert callers["fe80::1%eth0"] is callers["fe80::2%eth0"]
    assert callers[""] is callers[""]
    assert callers["not: an address"] is callers["not: an address"]


def test_so_many_addresses_are_remembered_and_those_that_are_here_stay() -> None:
    callers = Callers()
    here = callers["192.0.2.1"]
    here.open = 1
    gone = callers["192.0.2.2"]
    for number in range(2 * MAX_CALLERS):
        callers[f"x{number}"].open = 0
    assert callers["192.0.2.1"] is here
    assert callers["192.0.2.2"] is not gone
    assert len(callers._callers) <= MAX_CALLERS


# ---------------------------------------------------------------------------------------- File descriptors

LIMITS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
sys.path.insert(0, {root!r})
import pytunnel
pytunnel.raise_file_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], pytunnel.file_limit())
"""


@pytest.mark.parametrize(("soft", "hard", "after"), [(256, 1024, 1024), (1024, 1024, 1024), (300, 20000, 10032)])
async def test_a_server_takes_the_file_descriptors_that_it_may_have(soft: int, hard: int, after: int) -> None:
    script = LIMITS.format(soft=soft, hard=hard, root=str(Path(pytunnel.__file__).parent))
    async with await Process.start(command=[sys.executable, "-c", script]) as process:
        assert await process.wait() == 0
        assert process.stdout == [f"{after} {after}"]


async def test_with_few_file_descriptors_visitors_get_503_and_not_silence() -> None:
    program = [sys.executable, pytunnel.__file__]
    command = ["/bin/sh", "-c", 'ulimit -n 64; exec "$0" "$@"', *program]
    async with RawOrigin(response(b"ok")) as origin, Tunnel(origin.port, command=command) as t:
        async with contextlib.AsyncExitStack() as stack:
            statuses = []
            for _ in range(39):
                visitor = await stack.enter_async_context(t.visitor())
                await visitor.send(t.request())
                statuses.append((await visitor.read_response()).status)
        assert statuses[0] == 200
        assert statuses.index(503) == 64 - pytunnel.RESERVED_FILES - 1, "all but the client's link"
        assert set(statuses) == {200, 503}
        await eventually_served(t)
