"""The inspector: who may use it, what its interface says, and its page in a real browser.

The log is filled by hand, with the samples that the README's picture shows, and replays go to a RawOrigin; only one
test has a whole tunnel. The browser is Debian's Chromium, one for all tests of this file; each test has a context of
its own, in which an error on the console, a violation of the content security policy and a request that goes anywhere
but to the inspector fail the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import struct
import zlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pictures import NOON, Samples, frame, inspector, png
from playwright.async_api import Browser, Page, Request, async_playwright, expect
from support import Header, RawOrigin, RawRequest, RawResponse, RawVisitor, eventually, request, response

import pytunnel
from pytunnel import INSPECTOR_PORT, Inspector, Target, Tunnel, TunnelClient, TunnelServer

pytestmark = pytest.mark.asyncio(loop_scope="module")  # the browser's
module_fixture = pytest_asyncio.fixture(loop_scope="module", scope="module")

JSON = (b"Content-Type", b"application/json")
HOSTILE = "<script>alert(1)</script>\"onload=alert(2) \u202egnp.exe\x1b[31m{{7*7}}<img src=//evil.test/x onerror=alert(3)>"


async def ask(
    page: Inspector,
    method: str = "GET",
    path: str = "/api/status",
    *headers: Header,
    body: bytes = b"",
    token: str | None = "",
    host: bytes | None = b"",
) -> RawResponse:
    """One request; `token` and `host` are the right ones unless given, None leaves them out."""
    fields = [] if host is None else [(b"Host", host or b"127.0.0.1:%d" % page.port)]
    if token is not None:
        fields.append((b"X-Pytunnel-Token", (token or page.token).encode()))
    if body or method == "POST":
        fields.append((b"Content-Length", b"%d" % len(body)))
    async with RawVisitor(page.port) as visitor:
        lines = [b"%b %b HTTP/1.1" % (method.encode(), path.encode()), *(b"%b: %b" % pair for pair in [*fields, *headers])]
        await visitor.send(b"\r\n".join([*lines, b"", body]))
        return await visitor.read_response(method)


async def ask_json(page: Inspector, path: str, post: dict[str, Any] | None = None) -> Any:
    """Ask with the token, and by POST when there is something to say; the answer must be a 200."""
    body = b"" if post is None else json.dumps(post).encode()
    answer = await ask(page, "GET" if post is None else "POST", path, body=body)
    assert answer.status == 200, answer.body
    return json.loads(answer.body)


def assert_safe(answer: RawResponse) -> None:
    """O4: what every response says."""
    assert answer.value(b"x-content-type-options") == b"nosniff"
    assert answer.value(b"x-frame-options") == b"DENY"
    assert answer.value(b"referrer-policy") == b"no-referrer"
    assert answer.value(b"cache-control") == b"no-store"
    assert answer.value(b"cross-origin-opener-policy") == answer.value(b"cross-origin-resource-policy") == b"same-origin"
    policy = answer.value(b"content-security-policy") or b""
    assert b"default-src 'none'" in policy
    assert b"unsafe" not in policy and b"*" not in policy
    assert not [name for name, _ in answer.headers if name.lower().startswith(b"access-control-")]


# ---------------------------------------------------------------------------------------- Who may use it


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"evil.com", 403),
        (b"evil.com:%d", 403),
        (b"127.0.0.1.nip.io:%d", 403),
        (b"localhost.evil.com:%d", 403),
        (b"0.0.0.0:%d", 403),
        (b"127.0.0.2:%d", 403),
        (b"[::]:%d", 403),
        (b"127.0.0.1", 403),
        (b"127.0.0.1:1", 403),
        (b"localhost:80", 403),
        (None, 400),
        (b"127.0.0.1:%d, evil.com", 400),
        (b"evil.com@127.0.0.1:%d", 400),
        (b"127.0.0.1:99999", 400),
        (b"127.0.0.1:%d:%d", 400),
        (b"[::1", 400),
        (b"%%00", 400),
        (b"\xff\xfe", 400),
        (b"a b", 400),
    ],
)
async def test_o1_only_its_own_host_is_served(host: bytes | None, status: int) -> None:
    async with inspector() as (page, _):
        host = host.replace(b"%d", b"%d" % page.port) if host else host
        for path in ("/", "/api/status"):
            answer = await ask(page, path=path, host=host)
            assert answer.status == status
            assert page.token.encode() not in answer.body
            assert_safe(answer)
        assert (await ask(page)).status == 200


@pytest.mark.parametrize("host", [b"127.0.0.1:%d", b"localhost:%d", b"LOCALHOST:%d", b"[::1]:%d"])
async def test_its_own_names_are_served(host: bytes) -> None:
    async with inspector() as (page, _):
        name = host % page.port
        answer = await ask(page, "GET", "/", (b"Origin", b"http://" + name), host=name, token=None)
        assert answer.status == 200
        assert page.token.encode() in answer.body
        assert_safe(answer)


async def test_two_hosts_are_one_too_many() -> None:
    async with inspector() as (page, _):
        assert (await ask(page, "GET", "/", (b"Host", b"evil.com"))).status == 400


async def test_an_absolute_target_does_not_stand_in_for_host() -> None:
    async with inspector() as (page, _):
        target = f"http://127.0.0.1:{page.port}/api/status"
        assert (await ask(page, path=target, host=b"evil.com")).status == 403


FOREIGN = [
    [(b"Origin", b"http://evil.com")],
    [(b"Origin", b"null")],
    [(b"Origin", b"")],
    [(b"Origin", b"https://127.0.0.1:%d")],
    [(b"Origin", b"http://127.0.0.1:3000")],
    [(b"Origin", b"http://localhost:%d")],  # while Host says 127.0.0.1
    [(b"Origin", b"http://127.0.0.1:%d.evil.com")],
    [(b"Sec-Fetch-Site", b"cross-site")],
    [(b"Sec-Fetch-Site", b"same-site")],  # another port of localhost
    [(b"Sec-Fetch-Site", b"")],
]


@pytest.mark.parametrize("headers", FOREIGN, ids=lambda headers: headers[0][1].decode() or "empty")
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("GET", "/api/exchanges"), ("POST", "/api/exchanges/1/replay"), ("POST", "/api/clear"), ("POST", "/api/stop")],
)
async def test_o2_a_foreign_page_is_refused_even_with_the_token(headers: list[Header], method: str, path: str) -> None:
    async with RawOrigin(response()) as origin, inspector(target=f"localhost:{origin.port}") as (page, client):
        Samples(client).add("GET", "/", 200)
        ours = [(name, value.replace(b"%d", b"%d" % page.port)) for name, value in headers]
        answer = await ask(page, method, path, *ours)
        assert answer.status == 403
        assert_safe(answer)
        assert len(client.log.exchanges) == 1
        assert not client._stopping.is_set()
        assert not origin.requests


@pytest.mark.parametrize(
    "headers",
    [
        [(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade"), (b"Sec-WebSocket-Version", b"13"), (b"Sec-WebSocket-Key", b"AAAAAAAAAAAAAAAAAAAAAA==")],
        [(b"Accept", b"text/event-stream")],
    ],
    ids=["WebSocket", "event stream"],
)
async def test_o3_a_foreign_websocket_or_event_stream_is_refused(headers: list[Header]) -> None:
    async with inspector() as (page, _):
        for path in ("/", "/api/exchanges", "/api/exchanges?wait=25"):
            assert (await ask(page, "GET", path, *headers, (b"Origin", b"http://evil.com"))).status == 403


PATHS = [
    ("GET", "/api/status"), ("GET", "/api/exchanges"), ("GET", "/api/exchanges/1"), ("GET", "/api/exchanges/1?reveal=1"),
    ("GET", "/api/exchanges/1/body"), ("GET", "/api/har"), ("GET", "/api/wait"), ("POST", "/api/exchanges/1/replay"),
    ("POST", "/api/clear"), ("POST", "/api/stop"), ("GET", "/api/none"), ("GET", "//"), ("GET", "/index.html"), ("OPTIONS", "/api/clear"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_nothing_but_the_page_is_served_without_the_token(method: str, path: str) -> None:
    async with RawOrigin(response()) as origin, inspector(target=f"localhost:{origin.port}") as (page, client):
        Samples(client).add("GET", "/", 200)
        for token in (None, "x", page.token[:-1], page.token + "x", "\u00e9"):
            answer = await ask(page, method, path, token=token)
            assert answer.status == 403
            assert_safe(answer)
            assert json.loads(answer.body) == {"error": "not without the token"}
        assert len(client.log.exchanges) == 1
        assert not client._stopping.is_set()
        assert not origin.requests


async def test_the_token_is_of_one_run_and_long() -> None:
    async with inspector() as (one, _), inspector() as (other, _):
        assert one.token != other.token
        assert len(one.token) >= 32
        assert (await ask(one, token=other.token)).status == 403


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"])
@pytest.mark.parametrize("path", ["/", "/api/status", "/api/clear", "/api/exchanges/7", "/api/exchanges/x/body", "/../etc/passwd"])
async def test_o4_every_response_is_guarded(method: str, path: str) -> None:
    async with inspector() as (page, _):
        assert_safe(await ask(page, method, path))


@pytest.mark.parametrize("raw", [b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX\r\n\r\n", b"GET /" + b"a" * 20_000])
async def test_o4_what_is_no_request_gets_a_guarded_answer(raw: bytes) -> None:
    async with inspector() as (page, _):
        async with RawVisitor(page.port) as visitor:
            await visitor.send(raw + b" HTTP/1.1\r\n\r\n")
            answer = await visitor.read_response()
        assert answer.status in (400, 431)
        assert_safe(answer)
        assert (await ask(page)).status == 200


@pytest.mark.parametrize("name", [b"X-Forwarded-For", b"x-forwarded-host", b"X-Forwarded-Proto", b"Forwarded", b"Via", b"X-Real-IP"])
async def test_o7_what_came_through_a_tunnel_is_refused(name: bytes) -> None:
    async with inspector() as (page, _):
        assert (await ask(page, "GET", "/", (name, b"1.1 a"))).status == 403
        assert (await ask(page, "GET", "/api/status", (name, b""))).status == 403


async def test_o7_it_listens_on_loopback_only() -> None:
    async with inspector() as (page, _):
        listening = [sock.getsockname()[:2] for listener in page._listeners for sock in listener.sockets]
        assert listening in ([("127.0.0.1", page.port)], [("127.0.0.1", page.port), ("::1", page.port)])


# ---------------------------------------------------------------------------------------- Where it listens


async def test_localhost_works_by_ipv6() -> None:
    async with inspector() as (page, _):
        if len(page._listeners) < 2:
            pytest.skip("this machine has no IPv6")
        async with RawVisitor(page.port, host="::1") as visitor:
            await visitor.send(request("GET", b"/", b"localhost:%d" % page.port))
            assert (await visitor.read_response()).status == 200


async def test_the_next_free_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawOrigin(response()) as taken:
        monkeypatch.setattr(pytunnel, "INSPECTOR_PORT", taken.port)
        async with inspector(taken.port) as (page, _):
            assert taken.port < page.port < taken.port + pytunnel.INSPECTOR_PORTS
            assert page.url == f"http://127.0.0.1:{page.port}"
            assert (await ask(page)).status == 200


async def test_a_port_that_was_asked_for_is_not_replaced() -> None:
    async with RawOrigin(response()) as taken:
        with pytest.raises(pytunnel.TunnelError, match=rf"cannot listen on 127\.0\.0\.1:{taken.port}: .*choose another"):
            async with inspector(taken.port):
                pass


async def test_the_default_port_is_the_documented_one() -> None:
    assert INSPECTOR_PORT == 4040


# ---------------------------------------------------------------------------------------- The interface


async def test_status_says_what_the_command_line_shows() -> None:
    async with inspector() as (page, client):
        Samples(client).add("GET", "/", 200, b"text/plain", b"hello")
        Samples(client).begin("POST", "/slow", body=b"abc")
        status = await ask_json(page, "/api/status")
        assert status["tunnels"] == [{"name": "web", "url": "https://web.t.example.com", "target": "localhost:3000"}]
        assert (status["total"], status["in_flight"], status["bytes_in"], status["bytes_out"]) == (2, 1, 3, 5)
        assert status["classes"] == {"1": 0, "2": 1, "3": 0, "4": 0, "5": 0}
        assert status["p50"] == status["p90"] == pytest.approx(0.022)
        assert status["problem"] == "" and status["retry_in"] is None
        assert status["pytunnel"] == pytunnel.__version__
        client.problem, client.retry_at = "the server is away", asyncio.get_running_loop().time() + 60
        assert 55 < (await ask_json(page, "/api/status"))["retry_in"] <= 60


async def test_exchanges_are_those_that_changed_the_newest_first() -> None:
    async with inspector() as (page, client):
        samples = Samples(client)
        first = samples.begin("GET", "/a?token=hush")
        news = await ask_json(page, "/api/exchanges")
        assert [row["path"] for row in news["exchanges"]] == ["/a?token=•••"]
        assert news["exchanges"][0] | {"time": 0} == {
            "id": 1, "name": "web", "method": "GET", "path": "/a?token=•••", "status": None, "ms": None, "bytes_in": 0,
            "bytes_out": 0, "error": None, "time": 0, "replay_of": None,
        }  # fmt: skip
        samples.add("GET", "/b", 404)
        samples.add("POST", "/c", 200)
        later = await ask_json(page, f"/api/exchanges?since={news['version']}&id={first.id}")
        assert [row["id"] for row in later["exchanges"]] == [3, 2]
        assert (later["oldest"], later["selected"]) == (1, first.version)
        assert [row["id"] for row in (await ask_json(page, "/api/exchanges?filter=4xx"))["exchanges"]] == [2]
        assert [row["id"] for row in (await ask_json(page, "/api/exchanges?limit=1"))["exchanges"]] == [3]
        await ask_json(page, "/api/clear", {})
        cleared = await ask_json(page, f"/api/exchanges?since={later['version']}&id={first.id}")
        assert (cleared["exchanges"], cleared["oldest"], cleared["selected"]) == ([], 4, None)


async def test_a_poll_waits_until_something_is_new() -> None:
    async with inspector() as (page, client):
        client.log.touch()
        polling = asyncio.ensure_future(ask_json(page, f"/api/exchanges?since={client.log.version}&wait=25"))
        assert (await ask(page)).status == 200  # one whole request later it still waits
        assert not polling.done()
        Samples(client).begin("GET", "/now")
        async with asyncio.timeout(5):
            assert [row["path"] for row in (await polling)["exchanges"]] == ["/now"]
        assert (await ask_json(page, f"/api/exchanges?since={client.log.version}"))["exchanges"] == []


async def test_a_poll_ends_with_its_visitor_and_with_the_inspector() -> None:
    async with inspector() as (page, client):
        baseline = len(asyncio.all_tasks())
        async with RawVisitor(page.port) as visitor:
            poll = f"/api/exchanges?since={client.log.version}&wait=25".encode()
            token = (b"X-Pytunnel-Token", page.token.encode())
            await visitor.send(request("GET", poll, b"127.0.0.1:%d" % page.port, [token]))
            await eventually(lambda: len(asyncio.all_tasks()) > baseline)
        await eventually(lambda: len(asyncio.all_tasks()) <= baseline)
        polling = asyncio.ensure_future(ask(page, path=f"/api/exchanges?since={client.log.version}&wait=25"))
        await eventually(lambda: len(asyncio.all_tasks()) > baseline + 1)
    with pytest.raises(AssertionError):
        async with asyncio.timeout(5):
            await polling


@pytest.mark.parametrize("query", ["since=x", "wait=abc", "limit=", "id=1e", "since=" + "9" * 5000])
async def test_a_parameter_that_is_no_number_is_refused(query: str) -> None:
    async with inspector() as (page, _):
        answer = await ask(page, path=f"/api/exchanges?{query}")
        assert answer.status in (200, 400)
        assert "number" in answer.body.decode() or query.startswith("since=9")


@pytest.mark.parametrize("query", ["wait=nan", "wait=-1", "wait=-inf", "since=nan", "limit=inf", "limit=1e400&since=-5"])
async def test_odd_numbers_are_bounded(query: str) -> None:
    async with inspector() as (page, client):
        client.log.touch()
        async with asyncio.timeout(5):
            assert (await ask(page, path=f"/api/exchanges?{query}")).status == 200


async def test_a_detail_has_all_there_is() -> None:
    async with inspector() as (page, client):
        hook = Samples(client).fill()["json"]
        detail = await ask_json(page, f"/api/exchanges/{hook.id}")
        assert ["Authorization", "•••"] in detail["request"]["headers"]
        assert detail["target"] == "/hooks/payments?token=•••"
        assert detail["request"]["body"]["kind"] == detail["response"]["body"]["kind"] == "json"
        assert detail["response"]["body"]["text"] == '{\n  "received": true\n}'
        assert detail["timings"]["local"] == pytest.approx(0.064)
        assert detail["curl"].startswith("curl -X POST -H ") and "sk_test" not in detail["curl"]
        revealed = await ask_json(page, f"/api/exchanges/{hook.id}?reveal=1")
        assert ["Authorization", "Bearer sk_test_51H"] in revealed["request"]["headers"]
        assert revealed["target"] == "/hooks/payments?token=whsec_4f2a"
        assert "sk_test_51H" in revealed["curl"]


async def test_o8_secrets_are_masked_until_asked_for() -> None:
    async with inspector() as (page, client):
        samples = Samples(client).fill()
        secrets = (b"hunter2", b"sk_test_51H", b"whsec_4f2a", b"session=3b1f", b"session=9c0e")
        form, hook = samples["form"].id, samples["json"].id
        for path in ("/api/exchanges", "/api/status", f"/api/exchanges/{form}", f"/api/exchanges/{hook}"):
            body = (await ask(page, path=path)).body
            assert [secret for secret in secrets[1:] if secret in body] == []
        view = await ask_json(page, f"/api/exchanges/{form}")
        assert "hunter2" not in view["request"]["body"]["text"]
        revealed = (await ask(page, path=f"/api/exchanges/{form}?reveal=1")).body
        assert [secret for secret in secrets if secret in revealed] == [secrets[0], secrets[3], secrets[4]]
        assert b"sk_test" not in (await ask(page, path="/api/har")).body
        assert b"sk_test" in (await ask(page, path="/api/har?reveal=1")).body


async def test_a_body_is_only_ever_a_download() -> None:
    async with inspector() as (page, client):
        script = b"<script>alert(1)</script>"
        e = Samples(client).add("POST", "/", 200, b"text/html", script, sent=b"\x00\xff")
        answer = await ask(page, path=f"/api/exchanges/{e.id}/body?which=response")
        assert answer.body == script
        assert answer.value(b"content-type") == b"application/octet-stream"
        assert answer.value(b"content-disposition") == b'attachment; filename="response-1"'
        assert answer.value(b"content-security-policy") == b"default-src 'none'; sandbox"
        assert answer.value(b"x-content-type-options") == b"nosniff"
        assert (await ask(page, path=f"/api/exchanges/{e.id}/body?which=request")).body == b"\x00\xff"


async def test_har_of_one_and_of_all() -> None:
    async with inspector() as (page, client):
        one = Samples(client).fill()["json"]
        har = await ask_json(page, "/api/har")
        assert len(har["log"]["entries"]) == len(client.log.exchanges)
        entry = (await ask_json(page, f"/api/har?id={one.id}"))["log"]["entries"]
        assert [e["request"]["url"] for e in entry] == ["https://web.t.example.com/hooks/payments?token=•••"]


@pytest.mark.parametrize("number", ["0", "99", "-1", "x", "1" * 400, "%C2%B2", "1.0", ""])
async def test_an_exchange_that_is_not_there_is_a_404(number: str) -> None:
    async with inspector() as (page, client):
        Samples(client).add("GET", "/", 200)
        for method, path in (("GET", ""), ("GET", "/body"), ("POST", "/replay")):
            assert (await ask(page, method, f"/api/exchanges/{number}{path}")).status == 404
        assert (await ask(page, path=f"/api/har?id={number}")).status == 404


async def test_wait_returns_what_fits_or_says_that_it_did_not_come() -> None:
    async with inspector() as (page, client):
        samples = Samples(client)
        old = samples.add("POST", "/hook", 200)
        waiting = asyncio.ensure_future(ask_json(page, f"/api/wait?method=post&path=/h*&after={old.id}&timeout=30"))
        assert (await ask(page)).status == 200
        samples.add("GET", "/hook", 200)
        new = samples.add("POST", "/hook?x=1", 204)
        assert (await waiting)["id"] == new.id
        assert (await ask(page, path="/api/wait?path=/never&timeout=0")).status == 408
        assert (await ask_json(page, "/api/wait?count=2&method=POST"))["status"] == 204


async def test_stop_stops() -> None:
    async with inspector() as (page, client):
        await ask_json(page, "/api/stop", {})
        assert client._stopping.is_set()


async def test_a_bug_says_nothing_of_the_inside(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async with inspector() as (page, _):
        monkeypatch.setattr(page, "_status", lambda: 1 / 0)
        answer = await ask(page)
        assert (answer.status, json.loads(answer.body)) == (500, {"error": "a bug in pytunnel"})
        assert_safe(answer)
        assert "ZeroDivisionError" in caplog.text


async def test_o5_hostile_bytes_leave_the_interface_sound() -> None:
    async with inspector() as (page, client):
        headers = [(b"X-Odd", HOSTILE.encode()), (b"X-Latin", b"\xff\xfe"), (b"Content-Type", b"application/json; " + HOSTILE.encode())]
        e = Samples(client).add("GET", "/" + HOSTILE, 200, b"text/html", HOSTILE.encode() * 1000 + b"\xff", headers=headers, sent=b"\x00" * 5)
        for path in ("/api/exchanges", f"/api/exchanges/{e.id}", "/api/har"):
            assert json.loads((await ask(page, path=path)).body)
        long = Samples(client).add("GET", "/" + "a" * 16_000, 200, b"text/plain", b"x" * 5 * 1024 * 1024)
        assert len((await ask(page, path=f"/api/exchanges?filter={'a' * 300}")).body) < 2000
        assert len((await ask(page, path=f"/api/exchanges/{long.id}")).body) < 400_000


async def test_o6_a_bomb_is_unpacked_only_so_far() -> None:
    async with inspector() as (page, client):
        bomb = zlib.compress(b"[" * 64 * 1024 * 1024, 9)
        e = Samples(client).add("GET", "/", 200, b"text/plain", bomb, fields=[(b"Content-Encoding", b"deflate")])
        assert len((await ask(page, path=f"/api/exchanges/{e.id}")).body) < 8 * pytunnel.MAX_VIEW
        flat = Samples(client).add("GET", "/", 200, b"text/plain", b"[" * 1000 + b"1," * 130_000)
        assert len((await ask(page, path=f"/api/exchanges/{flat.id}")).body) < 8 * pytunnel.MAX_VIEW


async def test_a_request_that_is_too_large_is_refused() -> None:
    async with inspector() as (page, client):
        Samples(client).add("GET", "/", 200)
        answer = await ask(page, "POST", "/api/exchanges/1/replay", body=b" " * 1024 * 1024 + b"{}")
        assert answer.status == 413
        assert_safe(answer)


# ---------------------------------------------------------------------------------------- Replay


class Service:
    """A local service whose answers count, and say what they were asked."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, request: RawRequest, _: object, writer: asyncio.StreamWriter) -> None:
        self.calls += 1
        body = json.dumps({"call": self.calls, "target": request.target.decode(), "body": request.body.decode("latin-1")})
        writer.write(response(body.encode(), 200, [JSON]))


@contextlib.asynccontextmanager
async def replayable() -> AsyncIterator[tuple[Inspector, TunnelClient, RawOrigin]]:
    """An inspector whose client has a local service."""
    async with RawOrigin(Service(), read_body=True) as origin, inspector(target=f"localhost:{origin.port}") as (page, client):
        yield page, client, origin
        for route in client._routes[0]:
            route.service.close()


async def test_replay_sends_the_same_and_shows_what_differs() -> None:
    async with replayable() as (page, client, origin):
        headers = [(b"X-A", b"1"), (b"x-a", b"\xe9"), (b"Cookie", b"secret=1"), JSON]
        e = Samples(client).add("POST", "/a?token=t%zz", 500, b"application/json", b'{"error":1}', headers=headers, sent=b"{}")
        again = await ask_json(page, f"/api/exchanges/{e.id}/replay", {})
        sent = origin.requests[0]
        assert (sent.method, sent.target, sent.body) == (b"POST", b"/a?token=t%zz", b"{}")
        assert [pair for pair in sent.headers if pair in headers] == headers
        assert again["id"] == 2 and client.log.exchanges[2].replay_of == 1
        assert "-500 Internal Server Error" in again["diff"] and "+200 OK" in again["diff"]
        same = await ask_json(page, "/api/exchanges/2/replay", {})
        assert [line for line in same["diff"] if line[0] in "+-"][2:] == ['-  "call": 1,', '+  "call": 2,']


async def test_an_edited_replay_keeps_what_was_left_as_shown() -> None:
    async with replayable() as (page, client, origin):
        headers = [(b"Cookie", b"a=1"), (b"X-Old", b"\xff"), (b"Cookie", b"b=2")]
        e = Samples(client).add("POST", "/a?key=k", 200, headers=headers, sent=b"x")
        shown = (await ask_json(page, f"/api/exchanges/{e.id}"))["request"]["headers"]
        edits = {"method": "PUT", "target": "/a?key=•••", "headers": [*shown, ["X-New", "ü"]], "body": "né"}
        await ask_json(page, f"/api/exchanges/{e.id}/replay", edits)
        sent = origin.requests[0]
        assert (sent.method, sent.target, sent.body) == (b"PUT", b"/a?key=k", "né".encode())
        kept = [pair for pair in sent.headers if pair[0] in (b"Cookie", b"X-Old", b"X-New")]
        assert kept == [*headers, (b"X-New", "ü".encode())]


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ({"target": "/b?key=•••&x=1"}, "show the secrets"),
        ({"headers": [["X-Other", "•••"]]}, "show the secrets"),
        ({"target": "http://evil.com/"}, "begins with /"),
        ({"target": "//evil.com:80@x"}, None),  # a path like any other: it goes to the local service
        ({"target": "/a b"}, ""),
        ({"target": "/\r\nX: y"}, ""),
        ({"method": "GET / HTTP/1.1\r\nX:"}, ""),
        ({"method": ""}, ""),
        ({"method": "\ud800"}, "not a request"),
        ({"headers": [["X", "a\r\nY: b"]]}, ""),
        ({"headers": [["X"]]}, "not a request"),
        ({"headers": [["X", 1]]}, "not a request"),
        ({"headers": [[None, "x"]]}, "not a request"),
        ({"headers": 7}, "not a request"),
        ({"headers": [["X" * 70_000, "y"]]}, ""),
    ],
)
async def test_edits_that_make_no_request_are_refused(edits: dict[str, Any], reason: str | None) -> None:
    async with replayable() as (page, client, origin):
        Samples(client).add("GET", "/a?key=k", 200)
        answer = await ask(page, "POST", "/api/exchanges/1/replay", body=json.dumps(edits).encode())
        if reason is None:
            assert answer.status == 200
            assert origin.requests[0].target == edits["target"].encode()
        else:
            assert answer.status in (400, 431) and reason in json.loads(answer.body)["error"]
            assert not origin.requests
        assert_safe(answer)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"', b"\xff", b"[" * 100_000])
async def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    async with replayable() as (page, client, origin):
        Samples(client).add("GET", "/", 200)
        answer = await ask(page, "POST", "/api/exchanges/1/replay", (b"Content-Type", b"text/plain; charset=rot13"), body=body)
        assert answer.status == 400
        assert not origin.requests


async def test_a_content_that_was_not_kept_cannot_be_replayed() -> None:
    async with replayable() as (page, client, origin):
        Samples(client).add("POST", "/", 200, sent=b"x" * (pytunnel.MAX_PREFIX + 1))
        answer = await ask(page, "POST", "/api/exchanges/1/replay", body=b"{}")
        assert (answer.status, json.loads(answer.body)) == (400, {"error": "only 262144 bytes of its content were kept"})


async def test_through_a_real_tunnel(tmp_path: Path) -> None:
    """A visitor's request is seen while it waits, and replayed, by the client that forwarded it."""
    token = pytunnel.make_token()
    server = TunnelServer(tokens=[token], state=tmp_path, host="127.0.0.1", port=0)
    await server.start()
    try:
        async with RawOrigin(Service(), read_body=True) as origin:
            tunnel = Tunnel("web", Target.parse(f"localhost:{origin.port}"))
            client = TunnelClient(f"http://localhost:{server.port}", token, [tunnel])
            page = Inspector(client, port=0, on_stop=client.stop)
            await page.start()
            running = asyncio.ensure_future(client.run())
            await eventually(lambda: not client.problem)
            assert (await ask_json(page, "/api/status"))["tunnels"][0]["url"] == f"http://web.localhost:{server.port}"
            waiting = asyncio.ensure_future(ask_json(page, "/api/wait?path=/hook&timeout=30"))
            async with RawVisitor(server.port) as visitor:
                await visitor.send(request("POST", b"/hook", b"web.localhost:%d" % server.port, body=b"hello"))
                assert (await visitor.read_response()).status == 200
            seen = await waiting
            again = await ask_json(page, f"/api/exchanges/{seen['id']}/replay", {})
            assert [r.body for r in origin.requests] == [b"hello", b"hello"]
            assert '-  "call": 1,' in again["diff"]
            await ask_json(page, "/api/stop", {})
            await running
            await page.close()
    finally:
        await server.close()
