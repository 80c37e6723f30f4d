"""Local services at their worst, silence, and who may reach what: the tunnel goes on, and dials what it was told to.

The program runs with small limits where a test is about one of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import secrets
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    ROOT,
    Process,
    RawOrigin,
    RawRequest,
    RawVisitor,
    Tunnel,
    chunk,
    eventually,
    free_port,
    request,
    response,
    with_limits,
)
from test_fidelity import CHUNKED, CLOSE, answering, assert_quiet, head, problem, served
from test_limits import metrics_of
from test_websocket import ASKING, loop_back, piping, upgraded

import pytunnel
from pytunnel import OPEN_HEADER, RequestHead

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter

# ---------------------------------------------------------------------------------------- Services that fail


REFUSED = """
import asyncio, socket, sys, uvloop
import pytunnel

async def main():
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _, connection = await loop.create_connection(pytunnel.Connection, *listener.getsockname())
        service, _ = listener.accept()
    with service:
        service.setblocking(False)
        connection.send(b"request")
        await loop.sock_recv(service, 1)
        service.send(b"answer")
    connection.send(b"more")
    print(await connection.read())
    try:
        await connection.read()
    except ConnectionResetError:
        print("reset")

(uvloop if sys.argv[1] == "uvloop" else asyncio).run(main())
"""


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_an_answer_that_came_before_a_write_failed_is_read(loop: str) -> None:
    """A service that refuses an upload closes with bytes unread, which resets; the event loop has not looked yet."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{REFUSED}"]
    async with await Process.start(loop, command=command) as process:
        assert await process.wait() == 0
        assert process.stdout == ["b'answer'", "reset"]


async def test_a_service_that_resets_whatever_is_accepted_is_a_502(subtests: pytest.Subtests) -> None:
    class Resetting(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            nonlocal accepted
            accepted += 1
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            assert isinstance(transport, asyncio.Transport)
            transport.abort()

    accepted = 0
    service = await asyncio.get_running_loop().create_server(Resetting, "127.0.0.1", 0)
    async with service, Tunnel(service.sockets[0].getsockname()[1]) as tunnel, tunnel.visitor() as visitor:
        for number, method in enumerate(("GET", "POST", "HEAD"), 1):
            with subtests.test(method):
                await visitor.send(tunnel.request(method, body=b"x" if method == "POST" else None))
                got = await visitor.read_response(method)
                assert problem(got) in ((502, b"local-reset"), (502, b"local-refused"))
                assert accepted == number, "it was tried again"
        assert_quiet(tunnel.client)


async def test_a_restart_of_the_service_costs_the_requests_in_flight_and_no_others() -> None:
    """Visitors and the client keep their connections; those to the old process are not used for the new one."""
    visitors = 12

    async def hold(request: RawRequest, reader: Reader, writer: Writer) -> None:
        await asyncio.Event().wait()

    async with contextlib.AsyncExitStack() as stack:
        origin, tunnel = await stack.enter_async_context(served(answering({b"/held": hold}), read_body=True))
        idle, busy = [[await stack.enter_async_context(tunnel.visitor()) for _ in range(visitors)] for _ in range(2)]

        async def ask(visitor: RawVisitor, method: str, target: bytes) -> tuple[int, bytes]:
            await visitor.send(tunnel.request(method, target, body=b"x" if method == "POST" else None))
            got = await visitor.read_response()
            return got.status, got.value(b"x-pytunnel-error") or got.body

        assert {await task for task in [ask(visitor, "GET", b"/") for visitor in [*idle, *busy]]} == {(200, b"real")}
        held = [
            asyncio.create_task(ask(visitor, ("GET", "POST")[number % 2], b"/held"))
            for number, visitor in enumerate(busy)
        ]
        await origin.wait_for(lambda: sum(seen.target == b"/held" for seen in origin.requests) == visitors)
        await origin.aclose()
        failures = set(await asyncio.gather(*held))
        # A GET on a connection that was used before has been tried on a new one, as RFC 9110, 9.2.2, allows.
        assert {(502, b"local-reset")} <= failures <= {(502, b"local-reset"), (502, b"local-refused")}
        assert await ask(idle[0], "GET", b"/") == (502, b"local-refused")
        async with RawOrigin(response(b"new"), port=origin.port, read_body=True) as again:
            methods = ["GET", "POST"] * visitors
            asked = [ask(visitor, method, b"/") for visitor, method in zip([*idle, *busy], methods, strict=True)]
            assert set(await asyncio.gather(*asked)) == {(200, b"new")}
            assert len(again.requests) == 2 * visitors


@contextlib.contextmanager
def full_backlog() -> Iterator[int]:
    """A port whose listener accepts nobody, with as many waiting as the kernel takes."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = listener.getsockname()
        for _ in range(20):
            waiting = stack.enter_context(socket.socket())
            waiting.settimeout(0.3)
            try:
                waiting.connect(address)
            except TimeoutError:
                break
        else:
            pytest.fail("the backlog has no end")
        yield address[1]


async def test_a_service_whose_backlog_is_full_is_a_504() -> None:
    """And what goes elsewhere is not held up by it."""
    with full_backlog() as port:
        command = with_limits(LOCAL_CONNECT_TIMEOUT=0.3)
        async with RawOrigin(response(b"real")) as other, Tunnel(port, command=command) as tunnel:
            client = await tunnel.start_client(name="other", origin_port=other.port)
            await client.event("ready")
            async with tunnel.visitor() as visitor, tunnel.visitor() as second:
                for method, body in (("GET", None), ("POST", b"x")):
                    await visitor.send(tunnel.request(method, body=body))
                    await second.send(request(host=b"other.localhost"))
                    assert (await second.read_response()).body == b"real"
                    got = await visitor.read_response()
                    assert problem(got) == (504, b"local-timeout")
                    assert b"local service" in got.body
                    noted = await tunnel.clients[0].event("request", status=504)
                    assert noted["error"] == f"no connection to {port} within 0.3 s"
            assert_quiet(tunnel.clients[0])


# ---------------------------------------------------------------------------------------- Too many at once


async def test_two_hundred_requests_to_a_service_with_one_worker_are_all_answered() -> None:
    """They wait their turn at the service, as they would without a tunnel."""
    worker, working, most = asyncio.Lock(), 0, 0

    async def work(request: RawRequest, reader: Reader, writer: Writer) -> None:
        nonlocal working, most
        async with worker:
            working += 1
            most = max(most, working)
            writer.write(response(request.target))
            await writer.drain()
            working -= 1

    async with RawOrigin(work) as origin, Tunnel(origin.port) as tunnel:
        targets = [b"/%d" % number for number in range(200)]
        await worker.acquire()
        asked = [asyncio.create_task(tunnel.get(target)) for target in targets]
        await origin.wait_for(lambda: len(origin.requests) == 200, 10)
        worker.release()
        assert [got.body for got in await asyncio.gather(*asked)] == targets
        assert most == 1
        assert len(origin.requests) == 200


async def test_beyond_the_limit_of_open_requests_visitors_are_told_so() -> None:
    """They get a 503 at once, the service never sees them, and a place that becomes free is given to the next one."""
    limit, release = 16, asyncio.Event()

    async def work(request: RawRequest, reader: Reader, writer: Writer) -> None:
        await release.wait()
        writer.write(response(b"late"))

    async with RawOrigin(work) as origin, Tunnel(origin.port, command=with_limits(MAX_STREAMS=limit)) as tunnel:
        held = [asyncio.create_task(tunnel.get(b"/held")) for _ in range(limit)]
        await origin.wait_for(lambda: len(origin.requests) == limit)
        for got in await asyncio.gather(*(tunnel.fetch("POST", b"/more", body=b"x") for _ in range(50))):
            assert problem(got) == (503, b"busy")
            assert got.value(b"retry-after") is not None
        assert {seen.target for seen in origin.requests} == {b"/held"}
        assert len(origin.connections) == limit
        release.set()
        assert {(await task).body for task in held} == {b"late"}
        assert (await tunnel.get(b"/next")).body == b"late"
        assert_quiet(tunnel.server)
        assert_quiet(tunnel.client)


async def test_a_tunnel_to_its_own_server_goes_round_only_so_often() -> None:
    """Each round is a request of the same session, so the limit of these ends it, and all of it is over then."""
    port = free_port()
    command = with_limits(MAX_STREAMS=16, LOCAL_IDLE=0.1)
    async with Tunnel(port, relay=True, serve_args=["--listen", f"127.0.0.1:{port}"], command=command) as tunnel:
        assert problem(await tunnel.get()) == (503, b"busy")
        rounds = [await tunnel.client.event("request") for _ in range(16)]
        assert {event["status"] for event in rounds} == {503}
        assert problem(await tunnel.get()) == (503, b"busy")
        assert_quiet(tunnel.server)
        assert_quiet(tunnel.client)


# ---------------------------------------------------------------------------------------- Silence

SHORT = {
    "MAX_EACH": 1000,
    "VISITOR_KEEPALIVE": 1.0,
    "LOCAL_IDLE": 0.2,
    "LINGER": 0.2,
    "PING_INTERVAL": 0.2,
    "GRACE": 0.5,
    "HOLD": 0.5,
}


async def long_enough(tunnel: Tunnel, origin: RawOrigin) -> None:
    """Return when what is limited by time has ended several times: idle connections of visitors and to the service."""
    for _ in range(2):
        async with tunnel.visitor() as visitor:
            await visitor.send(tunnel.request(target=b"/idle"))
            assert (await visitor.read_response()).body == b"real"
            connection = origin.connections[origin.requests[-1].connection]
            assert await visitor.read_until_close() == b""
            await origin.wait_for(lambda c=connection: not c.open)  # type: ignore[misc]


async def test_silence_ends_nothing_that_is_open(subtests: pytest.Subtests) -> None:
    """An event stream with and without its first bytes, a long poll, an upload in between, and 200 WebSockets."""
    go_on = asyncio.Event()
    stream = head(b"HTTP/1.1 200 OK", (b"Content-Type", b"text/event-stream"), CHUNKED)

    async def events(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(stream + (chunk(b": hello\n\n") if request.target == b"/begun" else b""))
        await go_on.wait()
        writer.write(chunk(b"data: 1\n\n") + chunk(b""))

    async def poll(request: RawRequest, reader: Reader, writer: Writer) -> None:
        await go_on.wait()
        writer.write(response(b"news"))

    async def take(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(response(b"".join([piece async for piece in origin.iter_body(request, reader)])))

    async def pull(request: RawRequest, reader: Reader, writer: Writer) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(64 * 1024))
                await writer.drain()

    answers: dict[bytes, Any] = dict.fromkeys((b"/begun", b"/empty"), events)
    answers |= {
        b"/poll": poll,
        b"/upload": take,
        b"/ws": piping(loop_back),
        b"/slow": piping(pull),
        b"/idle": response(b"real"),
    }
    async with contextlib.AsyncExitStack() as stack:
        origin = await stack.enter_async_context(RawOrigin(answering(answers), record_limit=1024))
        tunnel = await stack.enter_async_context(Tunnel(origin.port, command=with_limits(**SHORT)))

        async def visitor(target: bytes, method: str = "GET", **options: Any) -> RawVisitor:
            opened = await stack.enter_async_context(tunnel.visitor(rcvbuf=options.pop("rcvbuf", None)))
            await opened.send(tunnel.request(method, target, **options))
            return opened

        begun, empty, polling = [await visitor(target) for target in (b"/begun", b"/empty", b"/poll")]
        uploading = await visitor(b"/upload", "POST", headers=[(b"Content-Length", b"10")])
        await uploading.send(b"first")
        heads = [await opened.read_head() for opened in (begun, empty)]
        body = begun.iter_body(heads[0])
        assert await anext(body) == b": hello\n\n"
        sockets = [await visitor(b"/ws", headers=ASKING) for _ in range(200)]
        assert {(await opened.read_head()).status for opened in sockets} == {101}
        slow = await stack.enter_async_context(tunnel.visitor(rcvbuf=8192))
        await upgraded(slow, tunnel, b"/slow")
        await long_enough(tunnel, origin)
        go_on.set()
        with subtests.test("event stream"):
            assert b"".join([piece async for piece in body]) == b"data: 1\n\n"
        with subtests.test("event stream without a byte"):
            assert b"".join([piece async for piece in empty.iter_body(heads[1])]) == b"data: 1\n\n"
        with subtests.test("long poll"):
            assert (await polling.read_response()).body == b"news"
        with subtests.test("upload"):
            await uploading.send(b"later")
            assert (await uploading.read_response()).body == b"firstlater"
        with subtests.test("WebSockets"):
            for number, opened in enumerate(sockets):
                await opened.send(b"%03d" % number)
            for number, opened in enumerate(sockets):
                assert await opened.read_exactly(3) == b"%03d" % number
        assert {event["event"] for event in tunnel.client.events} == {"request"}, "the link was never lost"
        assert_quiet(tunnel.server)
        assert_quiet(tunnel.client)


async def test_who_got_an_early_error_and_then_says_nothing_is_not_waited_for(subtests: pytest.Subtests) -> None:
    """Whether the service closes its connection or would read on for ever."""

    async def read_on(request: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(response(b"who", 401))
        await reader.read()

    closing = head(b"HTTP/1.1 401 Unauthorized", CLOSE, (b"Content-Length", b"3")) + b"who"
    answers: dict[bytes, Any] = {b"/closing": closing, b"/reading": read_on}
    async with (
        RawOrigin(answering(answers)) as origin,
        Tunnel(origin.port, command=with_limits(LINGER=0.3)) as tunnel,
    ):
        for target, field in itertools.product(answers, ((b"Content-Length", b"1000"), CHUNKED)):
            with subtests.test(f"{target.decode()} {field[0].decode()}"):
                async with tunnel.visitor() as visitor:
                    await visitor.send(tunnel.request("POST", target, [field]))
                    got = await visitor.read_response()
                    assert (got.status, got.body) == (401, b"who")
                    assert await visitor.read_until_close() == b""
                    await origin.wait_for(lambda: not origin.open_connections)


# ---------------------------------------------------------------------------------------- Where it leads


async def test_nothing_that_a_server_says_changes_what_is_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of each request is made up by the server here, to lead elsewhere; it is text to the local service."""
    async with RawOrigin(response(b"trapped")) as trap, RawOrigin(response(b"real"), read_body=True) as origin:
        away = f"127.0.0.1:{trap.port}".encode()
        heads = [
            RequestHead(b"GET", b"http://" + away + b"/", [(b"Host", away)]),
            RequestHead(b"GET", b"https://" + away + b"/", [(b"Host", b"web.localhost")]),
            RequestHead(b"CONNECT", away, [(b"Host", away)]),
            RequestHead(b"GET", b"//" + away + b"/", [(b"Host", away), (b"X-Forwarded-Host", away)]),
            RequestHead(b"GET", b"@" + away + b"/", [(b"Host", b"user@" + away), (b"Forwarded", b"host=" + away)]),
            RequestHead(b"POST", b"unix:/etc/passwd", [(b"Host", b"unix:/etc/passwd")]),
            RequestHead(b"GET", b"/../../etc/passwd", [(b"Host", b"")]),
            RequestHead(b"GET", b"file:///etc/passwd", [(b"Host", b"")]),
        ]
        said = iter(heads)
        monkeypatch.setattr(pytunnel.TunnelServer, "_request_head", lambda *_: next(said))
        async with (
            pytunnel.serve() as server,
            pytunnel.connect(origin.port, server=server.url, token=server.token, name="web"),
        ):
            for made_up in heads:
                origin.requests.clear()
                async with RawVisitor(server.server.port) as visitor:
                    await visitor.send(request(host=b"web.localhost"))
                    got = await visitor.read_response()
                arrived = [seen.head.partition(b"\r\n")[0] for seen in origin.requests]
                if made_up.target.startswith(b"/"):
                    assert got.body == b"real"
                    assert arrived == [b"%b %b HTTP/1.1" % (made_up.method, made_up.target)]
                else:  # no server passes such a request on
                    assert (problem(got), arrived) == ((502, b"local-invalid"), [])
        assert not trap.connections


@pytest.mark.parametrize("tunnel_index", [1, 63, 65535])
async def test_a_tunnel_that_the_client_does_not_have_leads_nowhere(
    monkeypatch: pytest.MonkeyPatch, tunnel_index: int
) -> None:
    pack = OPEN_HEADER.pack

    class Lying:
        size, unpack_from = OPEN_HEADER.size, OPEN_HEADER.unpack_from

        @staticmethod
        def pack(_: int, *rest: int) -> bytes:
            return pack(tunnel_index, *rest)

    async with (
        RawOrigin(response(b"real")) as origin,
        pytunnel.serve() as server,
        pytunnel.connect(origin.port, server=server.url, token=server.token, name="web"),
        RawVisitor(server.server.port) as visitor,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(pytunnel, "OPEN_HEADER", Lying)
            await visitor.send(request(host=b"web.localhost"))
            assert problem(await visitor.read_response()) == (502, b"local-invalid")
        assert not origin.connections
        await visitor.send(request(host=b"web.localhost"))
        assert (await visitor.read_response()).body == b"real"


async def test_nothing_that_a_local_service_says_changes_what_is_dialled(subtests: pytest.Subtests) -> None:
    async with RawOrigin(response(b"trapped")) as trap:
        away = b"http://127.0.0.1:%d/" % trap.port
        fields = [
            (b"Location", away), (b"Refresh", b"0; url=" + away), (b"Alt-Svc", b'http/1.1="127.0.0.1:%d"' % trap.port),
            (b"Link", b"<" + away + b">; rel=preload"), (b"Content-Location", away), (b"X-Accel-Redirect", away),
        ]  # fmt: skip
        statuses = (200, 301, 302, 303, 305, 307, 308, 401, 407, 421)
        answers: dict[bytes, Any] = {b"/%d" % status: response(b"", status, fields) for status in statuses}
        async with served(answering(answers)) as (origin, tunnel):
            for target in answers:
                with subtests.test(target.decode()):
                    got = await tunnel.get(target)
                    assert (b"/%d" % got.status, got.value(b"location")) == (target, away)
                    assert (await tunnel.get(b"/next")).body == b"real"
            assert len(origin.requests) == 2 * len(answers)
        assert not trap.connections


async def test_a_lax_parser_of_requests_is_no_reason_to_go_on() -> None:
    """aiohttp without its compiled part takes a bare CR in a chunk extension for the end of the line."""
    async with await Process.start("serve", "--listen", "127.0.0.1:0", env={"AIOHTTP_NO_EXTENSIONS": "1"}) as server:
        assert await server.wait() == 1
        assert [line.split(";")[0] for line in server.stderr] == [
            "error: aiohttp lacks its C parser, and its other one is not strict"
        ]


# ---------------------------------------------------------------------------------------- Whose bytes they are


async def test_two_hundred_tenants_never_get_each_others_bytes(tmp_path: Path) -> None:
    """Each with a token, a session and a name; halves of all answers interleave, visitors leave, links are lost."""
    tokens = [secrets.token_hex(16) for _ in range(200)]
    halves: list[bytes] = []
    second_half = asyncio.Event()

    async def echo(request: RawRequest, reader: Reader, writer: Writer) -> None:
        proof = b" ".join([request.value(b"X-Tenant") or b"", request.value(b"Host") or b"", request.target])
        answer = proof + b" " + request.body
        writer.write(head(b"HTTP/1.1 200 OK", (b"X-Proof", proof), CHUNKED) + chunk(answer[:70]))
        await writer.drain()
        halves.append(proof)
        await second_half.wait()
        writer.write(chunk(answer[70:]) + chunk(b""))

    async def ask(number: int, *, leave: bool = False) -> None:
        nonce = secrets.token_hex(32).encode()
        async with RawVisitor(server.port, timeout=30) as visitor:
            host = b"n%d.localhost" % number
            await visitor.send(request("POST", b"/" + nonce[:10], host, body=nonce * 20))
            got = await visitor.read_head()
            proof = b"%d %b /%b" % (number, host, nonce[:10])
            assert (got.status, got.value(b"X-Proof")) == (200, proof)
            if leave:
                return visitor.abort()
            body = b"".join([piece async for piece in visitor.iter_body(got)])
            assert body == proof + b" " + nonce * 20

    asyncio.get_running_loop().set_debug(False)  # all of them are in this process, with thousands of tasks
    server = pytunnel.TunnelServer(tokens=tokens, state=tmp_path, listen=[("127.0.0.1", 0)], max_each=1000)
    await server.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(server.close)
        origin = await stack.enter_async_context(RawOrigin(echo, read_body=True, record_limit=0))
        url = f"http://127.0.0.1:{server.port}"
        contexts = [
            pytunnel.connect(origin.port, server=url, token=token, name=f"n{n}", header=[f"X-Tenant: {n}"])
            for n, token in enumerate(tokens)
        ]
        clients = [await stack.enter_async_context(context) for context in contexts]
        for what in ("nothing else", "visitors leave", "links are lost", "nothing else"):
            halves.clear()
            second_half.clear()
            async with asyncio.TaskGroup() as tasks:
                for number in range(200):
                    tasks.create_task(ask(number))
                    if what == "visitors leave":
                        tasks.create_task(ask(number, leave=True))
                await origin.wait_for(lambda: len(halves) >= 200, 30)
                if what == "links are lost":
                    for client in clients[::8]:
                        assert client._link is not None
                        client._link.lose("a test")
                second_half.set()


# ---------------------------------------------------------------------------------------- Requests without a task


async def test_what_has_begun_without_a_task_goes_on_in_one() -> None:
    loop = asyncio.get_running_loop()
    first, second, third = loop.create_future(), loop.create_future(), loop.create_future()
    seen: list[object] = []

    async def work() -> str:
        seen.append(await first)
        try:
            await second
        except ValueError as error:
            seen.append(str(error))
        async with asyncio.timeout(60):  # which needs a task
            seen.append(await third)
        return "done"

    begun = pytunnel.Begun(work())
    begun.go_on()
    assert begun.waits_for is first
    first.set_result(1)
    begun.go_on()
    assert begun.waits_for is second
    task = asyncio.ensure_future(begun)
    second.set_exception(ValueError("failed"))
    third.set_result(3)
    assert await task == "done"
    assert seen == [1, "failed", 3]


@pytest.mark.parametrize("in_task", [False, True])
async def test_what_has_begun_without_a_task_may_be_cancelled_and_tidies_up(in_task: bool) -> None:
    loop = asyncio.get_running_loop()
    tidied, may_tidy = asyncio.Event(), loop.create_future()

    async def work() -> None:
        try:
            await loop.create_future()
        finally:
            await may_tidy
            tidied.set()

    begun = pytunnel.Begun(work())
    begun.go_on()
    task = asyncio.ensure_future(begun) if in_task else None
    if task:
        await asyncio.wait([task], timeout=0)
        task.cancel()
    else:
        begun.cancel()
    may_tidy.set_result(None)
    await tidied.wait()
    if task:
        with pytest.raises(asyncio.CancelledError):
            await task


class Held:
    """A local service that answers at once, but `/held` when it may, in two pieces."""

    def __init__(self) -> None:
        self.head, self.content = asyncio.Event(), asyncio.Event()

    async def __call__(self, request: RawRequest, reader: Reader, writer: Writer) -> None:
        if request.target != b"/held":
            return writer.write(response(request.target))
        await self.head.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n")
        await self.content.wait()
        writer.write(b"late")


async def send_behind(held: Held, origin: RawOrigin, tunnel: Tunnel, visitor: RawVisitor, data: bytes) -> None:
    """Let something come while a request waits, and then the request's response."""
    held.head.clear()
    held.content.set()
    count = sum(seen.target == b"/held" for seen in origin.requests)
    await visitor.send(tunnel.request(target=b"/held"))
    await origin.wait_for(lambda: sum(seen.target == b"/held" for seen in origin.requests) > count)
    await visitor.send(data)
    assert (await tunnel.get(b"/other")).body == b"/other"  # it has come by now
    held.head.set()
    assert (await visitor.read_response()).body == b"late"


@pytest.mark.parametrize("cut", [None, 10, -1], ids=["whole", "in its line", "in its end"])
async def test_what_comes_while_a_request_waits_is_answered_after_it(cut: int | None) -> None:
    held = Held()
    async with served(held) as (origin, tunnel), tunnel.visitor() as visitor:
        following = tunnel.request(target=b"/following")
        for _ in range(2):  # on a connection that is new, and again
            await send_behind(held, origin, tunnel, visitor, following[:cut])
            await visitor.send(following[len(following[:cut]) :])
            assert (await visitor.read_response()).body == b"/following"
        await send_behind(held, origin, tunnel, visitor, b"\0 garbage\r\n")
        assert (await visitor.read_response()).status == 400
        assert await visitor.read_until_close() == b""


async def test_a_head_that_begins_while_a_request_waits_is_bounded() -> None:
    held = Held()
    async with served(held) as (origin, tunnel), tunnel.visitor() as visitor:
        large = tunnel.request()[:-2] + b"".join(b"X-%d: %b\r\n" % (n, b"x" * 8000) for n in range(9))
        await send_behind(held, origin, tunnel, visitor, large)
        assert problem(await visitor.read_response()) == (431, b"too-large")
        assert await visitor.read_until_close() == b""


async def test_a_head_that_begins_while_a_request_waits_has_a_deadline() -> None:
    held = Held()
    async with (
        RawOrigin(held) as origin,
        Tunnel(origin.port, command=with_limits(HEAD_TIMEOUT=0.3)) as tunnel,
        tunnel.visitor() as visitor,
    ):
        await send_behind(held, origin, tunnel, visitor, tunnel.request()[:-2])
        assert problem(await visitor.read_response()) == (408, b"request-timeout")


async def test_a_visitor_who_is_reset_while_a_page_waits_for_room_leaves_no_complaint(tmp_path: Path) -> None:
    """Without a task, nobody else would see what became of the wait."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    server = pytunnel.TunnelServer(tokens=["0123456789abcdef" * 2], state=tmp_path, listen=[("127.0.0.1", 0)])
    await server.start()
    async with RawVisitor(server.port, rcvbuf=4096) as visitor:
        asked = request(target=b"/metrics", host=b"localhost")
        await visitor.send(asked)
        await visitor.read_response()
        (protocol,) = server._http.connections
        transport = protocol.transport
        assert isinstance(transport, asyncio.Transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        transport.set_write_buffer_limits(0)
        for count in itertools.count(2):
            await visitor.send(asked)
            await eventually(lambda count=count: protocol._request_count == count)  # type: ignore[misc]
            if protocol.writing_paused:  # the answers fill all buffers on the way
                break
        assert protocol._begun  # type: ignore[attr-defined]
        visitor.abort()
        await eventually(lambda: not server._http.connections)
    await server.close()
    gc.collect()
    assert not complaints


async def test_a_bug_is_a_500_without_a_task_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(pytunnel, "Visitor", fail)
    server = pytunnel.TunnelServer(tokens=["0123456789abcdef" * 2], state=tmp_path, listen=[("127.0.0.1", 0)])
    await server.start()
    async with RawVisitor(server.port) as visitor:
        await visitor.send(request(host=b"localhost"))
        assert problem(await visitor.read_response()) == (500, b"internal")
        assert await visitor.read_until_close() == b""
    await server.close()


async def test_a_response_that_comes_in_pieces_is_passed_on_so() -> None:
    held = Held()
    async with served(held) as (_, tunnel), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request(target=b"/held"))
        held.head.set()
        assert (await visitor.read_head()).status == 200
        held.content.set()
        assert await visitor.read_exactly(4) == b"late"
        await visitor.send(tunnel.request())
        assert (await visitor.read_response()).body == b"/"


async def test_a_connection_is_not_idle_while_its_request_waits() -> None:
    held = Held()
    held.content.set()
    async with (
        RawOrigin(held) as origin,
        Tunnel(origin.port, command=with_limits(VISITOR_KEEPALIVE=0.3)) as tunnel,
        tunnel.visitor() as visitor,
        tunnel.visitor() as idle,
    ):
        await visitor.send(tunnel.request())
        assert (await visitor.read_response()).body == b"/"
        await visitor.send(tunnel.request(target=b"/held"))
        await origin.wait_requests(2)
        await idle.send(tunnel.request())
        assert (await idle.read_response()).body == b"/"
        assert await idle.read_until_close() == b""  # it was used after the other one
        held.head.set()
        assert (await visitor.read_response()).body == b"late"
        assert await visitor.read_until_close() == b""


async def test_a_visitor_who_leaves_while_its_request_waits_has_aborted_it() -> None:
    async with served(Held()) as (origin, tunnel), tunnel.visitor() as visitor:
        await visitor.send(tunnel.request())
        assert (await visitor.read_response()).body == b"/"
        await visitor.send(tunnel.request(target=b"/held"))
        await origin.wait_requests(2)
        assert "pytunnel_aborts_total" not in await metrics_of(tunnel)
        visitor.close()
        await origin.wait_for(lambda: not origin.open_connections)
        assert (await metrics_of(tunnel))["pytunnel_aborts_total"] == 1
        assert (await tunnel.get()).body == b"/"
