"""The inspector: who may use it, what its interface says, and its page in a real browser.

The log is filled by hand, with the samples that the README's picture shows, and replays go to a RawOrigin; only one
test has a whole tunnel. The browser is Debian's Chromium, one for all tests of this file; each test has a context of
its own, in which an error on the console, a violation of the content security policy and a request that goes anywhere
but to the inspector fail the test.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import re
import shutil
import threading
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pictures import Samples, frame, inspector, png
from playwright.async_api import Browser, Page, Request, async_playwright, expect
from support import Header, RawOrigin, RawRequest, RawResponse, RawVisitor, eventually, free_port, request, response

import pytunnel
from pytunnel import INSPECTOR_PORT, Inspector, Target, Tunnel, TunnelClient, TunnelServer

pytestmark = pytest.mark.asyncio(loop_scope="module")  # the browser's
expect.set_options(timeout=20_000)  # for a machine that has other things to do
module_fixture = pytest_asyncio.fixture(loop_scope="module", scope="module")

JSON = (b"Content-Type", b"application/json")
HOSTILE = (
    '<script>alert(1)</script>"onload=alert(2) \u202egnp.exe\x1b[31m{{7*7}}<img src=//evil.test/x onerror=alert(3)>'
)


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
        lines = [
            b"%b %b HTTP/1.1" % (method.encode(), path.encode()),
            *(b"%b: %b" % pair for pair in [*fields, *headers]),
        ]
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
    assert (
        answer.value(b"cross-origin-opener-policy") == answer.value(b"cross-origin-resource-policy") == b"same-origin"
    )
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
    [
        ("GET", "/"),
        ("GET", "/api/exchanges"),
        ("POST", "/api/exchanges/1/replay"),
        ("POST", "/api/clear"),
        ("POST", "/api/stop"),
    ],
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
        [
            (b"Upgrade", b"websocket"),
            (b"Connection", b"Upgrade"),
            (b"Sec-WebSocket-Version", b"13"),
            (b"Sec-WebSocket-Key", b"AAAAAAAAAAAAAAAAAAAAAA=="),
        ],
        [(b"Accept", b"text/event-stream")],
    ],
    ids=["WebSocket", "event stream"],
)
async def test_o3_a_foreign_websocket_or_event_stream_is_refused(headers: list[Header]) -> None:
    async with inspector() as (page, _):
        for path in ("/", "/api/exchanges", "/api/exchanges?wait=25"):
            assert (await ask(page, "GET", path, *headers, (b"Origin", b"http://evil.com"))).status == 403


PATHS = """
GET /api/status            GET /api/exchanges               GET /api/exchanges/1          GET /api/exchanges/1?reveal=1
GET /api/har               GET /api/exchanges/1/body        GET /api/wait                 GET /api/none
POST /api/clear            POST /api/exchanges/1/replay     POST /api/stop                OPTIONS /api/clear
GET //                     GET /index.html
"""


@pytest.mark.parametrize("line", re.findall("[A-Z]+ [^ ]+", PATHS.replace("\n", "  ")))
async def test_nothing_but_the_page_is_served_without_the_token(line: str) -> None:
    method, path = line.split()
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
@pytest.mark.parametrize(
    "path", ["/", "/api/status", "/api/clear", "/api/exchanges/7", "/api/exchanges/x/body", "/../etc/passwd"]
)
async def test_o4_every_response_is_guarded(method: str, path: str) -> None:
    async with inspector() as (page, _):
        assert_safe(await ask(page, method, path))


@pytest.mark.parametrize(
    "raw", [b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX\r\n\r\n", b"GET /" + b"a" * 20_000]
)
async def test_o4_what_is_no_request_gets_a_guarded_answer(raw: bytes) -> None:
    async with inspector() as (page, _):
        async with RawVisitor(page.port) as visitor:
            await visitor.send(raw + b" HTTP/1.1\r\n\r\n")
            answer = await visitor.read_response()
        assert answer.status in (400, 414, 431)
        assert_safe(answer)
        assert (await ask(page)).status == 200


@pytest.mark.parametrize(
    "name", [b"X-Forwarded-For", b"x-forwarded-host", b"X-Forwarded-Proto", b"Forwarded", b"Via", b"X-Real-IP"]
)
async def test_o7_what_came_through_a_tunnel_is_refused(name: bytes) -> None:
    async with inspector() as (page, _):
        assert (await ask(page, "GET", "/", (name, b"1.1 a"))).status == 403
        assert (await ask(page, "GET", "/api/status", (name, b""))).status == 403


@pytest.mark.parametrize("host_header", ["", "rewrite"])
async def test_o7_a_tunnel_to_an_inspector_shows_nothing_of_it(host_header: str) -> None:
    """Whoever shares its port shares a page that says no, whatever a visitor knows and makes up."""
    async with inspector() as (page, client):
        Samples(client).add("GET", "/secret", 200)
        token = (b"X-Pytunnel-Token", page.token.encode())
        own = (b"Origin", b"http://127.0.0.1:%d" % page.port)
        async with (
            pytunnel.serve() as server,
            pytunnel.connect(
                page.port, server=server.url, token=server.token, name="web", host_header=host_header
            ) as tunnel,
        ):
            assert tunnel.url.startswith("http://web.localhost:")
            for method, path in (
                ("GET", "/"),
                ("GET", "/api/exchanges"),
                ("POST", "/api/clear"),
                ("POST", "/api/stop"),
            ):
                for headers in (
                    [],
                    [token],
                    [token, own],
                    [token, (b"Connection", b"X-Forwarded-For, X-Forwarded-Host")],
                ):
                    async with RawVisitor(server.server.port) as visitor:
                        fields = [*headers, (b"Content-Length", b"0")]
                        await visitor.send(request(method, path.encode(), b"web.localhost", fields))
                        answer = await visitor.read_response(method)
                    assert answer.status == 403
                    assert page.token.encode() not in answer.body and b"secret" not in answer.body
                    assert_safe(answer)
        assert len(client.log.exchanges) == 1
        assert not client._stopping.is_set()


async def test_o7_it_listens_on_loopback_only() -> None:
    async with inspector() as (page, _):
        listening = [sock.getsockname()[:2] for listener in page._listeners for sock in listener.sockets]
        assert listening in ([("127.0.0.1", page.port)], [("127.0.0.1", page.port), ("::1", page.port)])


# ---------------------------------------------------------------------------------------- Where it listens


async def test_localhost_works_by_ipv6() -> None:
    async with inspector() as (page, _):
        if len(page._listeners) < 2:
            pytest.fail("this machine has no IPv6 loopback, which the inspector listens on, too")
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


async def test_a_port_that_a_target_has_is_left_to_it() -> None:
    port = free_port()
    client = TunnelClient("http://localhost:1", "a token", [Tunnel("web", Target.parse(str(port)))])
    inspector = Inspector(client, port=port, on_stop=client.stop)
    await inspector.start()
    assert inspector.port != port
    await inspector.close()


async def test_the_default_port_is_the_documented_one() -> None:
    assert INSPECTOR_PORT == 4040


# ---------------------------------------------------------------------------------------- The interface


async def test_status_says_what_the_command_line_shows() -> None:
    async with inspector() as (page, client):
        Samples(client).add("GET", "/", 200, b"text/plain", b"hello")
        Samples(client).begin("POST", "/slow", body=b"abc")
        status = await ask_json(page, "/api/status")
        web = {"name": "web", "url": "https://web.t.example.com", "target": "localhost:3000", "requests": 2}
        assert status["tunnels"] == [web]
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
        for _ in range(3):
            assert (await ask(page)).status == 200  # whole requests later it still waits
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


@pytest.mark.parametrize(
    "query", ["wait=nan", "wait=-1", "wait=-inf", "since=nan", "limit=inf", "limit=1e400&since=-5"]
)
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


async def test_a_bug_says_nothing_of_the_inside(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with inspector() as (page, _):
        monkeypatch.setattr(page, "_status", lambda: 1 / 0)
        answer = await ask(page)
        assert (answer.status, json.loads(answer.body)) == (500, {"error": "a bug in pytunnel"})
        assert_safe(answer)
        assert "ZeroDivisionError" in caplog.text


async def test_o5_hostile_bytes_leave_the_interface_sound() -> None:
    async with inspector() as (page, client):
        headers = [
            (b"X-Odd", HOSTILE.encode()),
            (b"X-Latin", b"\xff\xfe"),
            (b"Content-Type", b"application/json; " + HOSTILE.encode()),
        ]
        e = Samples(client).add(
            "GET",
            "/" + HOSTILE,
            200,
            b"text/html",
            HOSTILE.encode() * 1000 + b"\xff",
            headers=headers,
            sent=b"\x00" * 5,
        )
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


async def test_heavy_views_leave_the_event_loop_to_the_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is held up in its thread until another request was answered; in the loop's thread none could be."""
    answered, threads = threading.Event(), dict[str, set[int]]()

    def hold(name: str) -> None:
        view = getattr(pytunnel, name)

        def held(*args: Any, **options: Any) -> Any:
            threads.setdefault(name, set()).add(threading.get_ident())
            assert threading.get_ident() == threading.main_thread().ident or answered.wait(20)
            return view(*args, **options)

        monkeypatch.setattr(pytunnel, name, held)

    for name in ("diff", "as_har", "body_view", "as_curl"):
        hold(name)
    async with replayable() as (page, client, _):
        e = Samples(client).add("POST", "/a", 200, b"application/json", b'{"a":1}' * 30_000, sent=b"[1]" * 60_000)
        for views, wanted in (
            (["as_har"], ask_json(page, "/api/har")),
            (["body_view", "as_curl"], ask_json(page, f"/api/exchanges/{e.id}")),
            (["diff"], ask_json(page, f"/api/exchanges/{e.id}/replay", {})),
        ):
            answered.clear()
            threads.clear()
            asking = asyncio.ensure_future(wanted)
            await eventually(lambda first=views[0]: first in threads, 20)  # type: ignore[misc]
            assert (await ask(page)).status == 200
            assert not asking.done()
            answered.set()
            assert await asking
            assert set(views) <= set(threads)
            assert not any(threading.get_ident() in idents for idents in threads.values())


async def test_large_answers_become_json_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    dumps = json.dumps

    def watched(*args: Any, **options: Any) -> str:
        threads.add(threading.get_ident())
        return dumps(*args, **options)

    async with inspector() as (page, client):
        Samples(client).add("GET", "/", 200, b"application/json", b'{"a":1}' * 30_000)
        with monkeypatch.context() as patch:
            patch.setattr(pytunnel.json, "dumps", watched)
            for path in ("/api/exchanges/1", "/api/har", "/api/exchanges"):
                assert (await ask(page, path=path)).status == 200
    assert threads and threading.get_ident() not in threads


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
        body = json.dumps(
            {"call": self.calls, "target": request.target.decode(), "body": request.body.decode("latin-1")}
        )
        writer.write(response(body.encode(), 200, [JSON]))


@contextlib.asynccontextmanager
async def replayable() -> AsyncIterator[tuple[Inspector, TunnelClient, RawOrigin]]:
    """An inspector whose client has a local service."""
    async with (
        RawOrigin(Service(), read_body=True) as origin,
        inspector(target=f"localhost:{origin.port}") as (page, client),
    ):
        yield page, client, origin
        for route in client._routes[0]:
            route.service.close()


async def test_replay_sends_the_same_and_shows_what_differs() -> None:
    async with replayable() as (page, client, origin):
        headers = [(b"X-A", b"1"), (b"x-a", b"\xe9"), (b"Cookie", b"secret=1"), JSON]
        e = Samples(client).add(
            "POST", "/a?token=t%zz", 500, b"application/json", b'{"error":1}', headers=headers, sent=b"{}"
        )
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
        answer = await ask(
            page, "POST", "/api/exchanges/1/replay", (b"Content-Type", b"text/plain; charset=rot13"), body=body
        )
        assert answer.status == 400
        assert not origin.requests


async def test_a_content_that_was_not_kept_cannot_be_replayed() -> None:
    async with replayable() as (page, client, _):
        Samples(client).add("POST", "/", 200, sent=b"x" * (pytunnel.MAX_PREFIX + 1))
        answer = await ask(page, "POST", "/api/exchanges/1/replay", body=b"{}")
        assert (answer.status, json.loads(answer.body)) == (
            400,
            {"error": "only 262144 bytes of its content were kept"},
        )


async def test_a_replay_ends_with_who_asked_for_it() -> None:
    async def silent(_: RawRequest, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read()

    async with RawOrigin(silent) as origin, inspector(target=f"localhost:{origin.port}") as (page, client):
        Samples(client).add("GET", "/", 200)
        async with RawVisitor(page.port) as visitor:
            token = (b"X-Pytunnel-Token", page.token.encode())
            path = b"/api/exchanges/1/replay"
            await visitor.send(request("POST", path, b"127.0.0.1:%d" % page.port, [token], body=b"{}"))
            await origin.wait_requests(1)
        await eventually(lambda: client.log.exchanges[2].ended)
        assert client.log.exchanges[2].error == "the visitor went away"
        assert not client._forwarding


async def test_through_a_real_tunnel(tmp_path: Path) -> None:
    """A visitor's request is seen while it waits, and replayed, by the client that forwarded it."""
    token = pytunnel.make_token()
    server = TunnelServer(tokens=[token], state=tmp_path, listen=[("127.0.0.1", 0)])
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


# ---------------------------------------------------------------------------------------- The page


@module_fixture
async def browser() -> AsyncIterator[Browser]:
    """Debian's Chromium, to which each name below .test is this machine."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.fail("there is no chromium; apt-get install chromium")
    arguments = ["--no-sandbox", "--host-resolver-rules=MAP *.test 127.0.0.1"]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        await browser.close()


@contextlib.asynccontextmanager
async def opened(
    browser: Browser, page: Inspector, fragment: str = "", *, width: int = 1600, expected: str = "", **options: Any
) -> AsyncIterator[Page]:
    """Open the page in a context of its own. What the console says is a failure, unless it matches `expected`."""
    size = {"width": width, "height": 900}
    async with await browser.new_context(viewport=size, **options) as context:
        await context.grant_permissions(["clipboard-read", "clipboard-write"])
        tab = await context.new_page()
        tab.set_default_timeout(20_000)
        said: list[str] = []
        went: list[Request] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: said.append(dialog.message))
        tab.on("request", lambda request: went.append(request))
        await tab.goto(page.url + "/" + fragment)
        await expect(tab.locator("#state")).to_have_text(re.compile("Connected|Reconnecting"))
        yield tab
        assert [text for text in said if not (expected and re.search(expected, text))] == []
        elsewhere = [
            r.url
            for r in went
            if not r.url.startswith((page.url, "blob:" + page.url, "data:image/svg+xml,")) and r.failure != "csp"
        ]
        assert elsewhere == []


async def paths(tab: Page) -> list[str]:
    """The paths in the list, from top to bottom."""
    return await tab.locator("#rows th").all_inner_texts()


async def test_rows_appear_and_change_as_it_happens(browser: Browser) -> None:
    async with inspector() as (page, client), opened(browser, page) as tab:
        await expect(tab.locator("#none")).to_contain_text("Waiting for the first request")
        await expect(tab.locator("#none a")).to_have_attribute("href", "https://web.t.example.com")
        samples = Samples(client)
        first = samples.begin("GET", "/first")
        row = tab.get_by_role("row", name="/first")
        await expect(row).to_contain_text("…")
        await expect(tab.locator("#none")).to_be_hidden()
        samples.respond(first, 503)
        client.log.finish(first, first.started + 0.25)
        await expect(row.get_by_role("cell").first).to_have_text("503")
        await expect(row).to_contain_text("250 ms")
        samples.add("POST", "/second", 200)
        await expect(tab.locator("#rows tr")).to_have_count(2)
        assert await paths(tab) == ["/second", "/first"]
        await expect(tab.locator("#stats")).to_contain_text("Requests2")
        client.log.send(first, b"more", samples.now)  # a row that is not the newest changes in its place
        await expect(row).to_contain_text("4 B")
        assert await paths(tab) == ["/second", "/first"]


async def test_the_public_address_can_be_copied(browser: Browser) -> None:
    async with inspector() as (page, _), opened(browser, page) as tab:
        await tab.locator("#none").get_by_role("button", name="Copy https://web.t.example.com").click()
        await expect(tab.locator("#toast")).to_have_text("Copied")
        assert await tab.evaluate("navigator.clipboard.readText()") == "https://web.t.example.com"


async def test_a_filter_chooses_what_is_listed(browser: Browser) -> None:
    async with inspector() as (page, client):
        samples = Samples(client)
        samples.fill()
        async with opened(browser, page) as tab:
            await tab.get_by_role("button", name="5xx").click()
            await expect(tab.locator("#rows tr")).to_have_count(2)
            assert await paths(tab) == ["/api/checkout", "/api/report?year=2025"]
            samples.add("GET", "/fine", 200)
            samples.add("GET", "/broken", 500)
            await expect(tab.locator("#rows tr")).to_have_count(3)
            await tab.get_by_label("Filter", exact=True).fill("body:KeyError")
            await expect(tab.locator("#rows tr")).to_have_count(1)
            await expect(tab.get_by_role("button", name="5xx")).to_have_attribute("aria-pressed", "false")
            await tab.get_by_label("Filter", exact=True).fill("nothing <b>like</b> it")
            await expect(tab.locator("#none")).to_contain_text("Nothing matches “nothing <b>like</b> it”")
            await tab.get_by_role("button", name="Show all").click()
            await expect(tab.locator("#rows tr")).to_have_count(len(client.log.exchanges))
            await tab.get_by_role("button", name="WebSocket").click()
            await expect(tab.locator("#rows tr")).to_have_count(1)


async def test_everything_is_reached_by_keys(browser: Browser) -> None:
    async with inspector() as (page, client):
        Samples(client).fill()
        async with opened(browser, page) as tab:
            await expect(tab.locator("#rows tr")).to_have_count(len(client.log.exchanges))
            await tab.keyboard.press("j")
            await expect(tab.get_by_role("link", name="/hooks/payments")).to_be_focused()
            await tab.keyboard.press("ArrowDown")
            await tab.keyboard.press("j")
            await tab.keyboard.press("k")
            await expect(tab.get_by_role("link", name="/api/checkout")).to_be_focused()
            await tab.keyboard.press("Enter")
            await expect(tab.get_by_role("heading", name="POST /api/checkout")).to_be_visible()
            await expect(tab.get_by_role("link", name="/api/checkout")).to_have_attribute("aria-current", "true")
            await tab.keyboard.press("j")
            await expect(tab.get_by_role("heading", name="DELETE /api/cart/7")).to_be_visible()
            await tab.keyboard.press("Escape")
            await expect(tab.locator("#exchange")).to_be_hidden()
            await expect(tab.locator("#rows a[href='#14']")).to_be_focused()
            await tab.keyboard.press("/")
            await expect(tab.get_by_label("Filter", exact=True)).to_be_focused()
            await tab.keyboard.type("jpr?")
            await expect(tab.locator("#rows tr")).to_have_count(0)
            await tab.keyboard.press("Escape")
            await expect(tab.locator("#rows tr")).to_have_count(len(client.log.exchanges))
            await tab.get_by_role("button", name="Help").focus()
            await tab.keyboard.press("?")
            await expect(tab.get_by_role("dialog", name="Keyboard")).to_be_visible()
            await tab.keyboard.press("p")
            await tab.keyboard.press("Escape")
            await expect(tab.get_by_role("dialog")).to_be_hidden()
            await expect(tab.locator("#pause")).to_have_attribute("aria-pressed", "false")
            await tab.keyboard.press("p")
            await expect(tab.locator("#pause")).to_have_attribute("aria-pressed", "true")


async def test_only_one_row_is_a_tab_stop(browser: Browser) -> None:
    async with inspector() as (page, client):
        Samples(client).fill()
        async with opened(browser, page) as tab:
            await expect(tab.locator("#rows tr")).to_have_count(len(client.log.exchanges))
            order = []
            for _ in range(30):
                await tab.keyboard.press("Tab")
                order.append(
                    await tab.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")
                )
                if order[-1] == "detail" or order[-1] in order[:-1]:
                    break
            chips = ["All", "2xx", "3xx", "4xx", "5xx", "WebSocket"]
            buttons = ["pause", "clear", "export", "ask"]
            wanted = ["https://web.t.example.com", "Copy", "filter", *chips, *buttons, "/hooks/payments?token=•••"]
            assert order[: len(wanted)] == wanted
            assert not set(order[len(wanted) :]) & {"/", "/account"}


async def test_focus_survives_new_rows_and_changes(browser: Browser) -> None:
    async with inspector() as (page, client):
        samples = Samples(client)
        running = samples.begin("GET", "/running")
        async with opened(browser, page) as tab:
            link = tab.get_by_role("link", name="/running")
            await link.focus()
            samples.add("GET", "/newer", 200)
            samples.respond(running, 200)
            client.log.finish(running, samples.now)
            await expect(tab.locator("#rows tr")).to_have_count(2)
            await expect(tab.get_by_role("row", name="/running").get_by_role("cell").first).to_have_text("200")
            await expect(link).to_be_focused()


async def test_bodies_are_shown_by_their_type(browser: Browser) -> None:
    async with inspector() as (page, client):
        samples = Samples(client).fill()
        async with opened(browser, page, f"#{samples['json'].id}") as tab:
            request_side, response_side = tab.locator("#request"), tab.locator("#response")
            await expect(request_side.locator("pre")).to_contain_text('{\n  "id": "evt_1Q7fXr",\n  "type"')
            await expect(response_side.locator("pre")).to_have_text('{\n  "received": true\n}')
            await expect(request_side.locator("dl")).to_contain_text("Idempotency-Key5c0f6f0e")
            await expect(tab.locator("#legend")).to_contain_text("local service64 ms")
            await tab.evaluate(f"location.hash = '#{samples['form'].id}'")
            await expect(request_side.locator("pre.form")).to_contain_text("email = jo@example.com\n")
            await expect(tab.locator("#facts")).to_contain_text("303 See Other")
            await tab.evaluate(f"location.hash = '#{samples['binary'].id}'")
            await expect(response_side.locator("pre.hex")).to_contain_text("00000010  10 11 12 13")
            await tab.evaluate(f"location.hash = '#{samples['image'].id}'")
            image = response_side.get_by_role("img", name="Body of the response")
            await expect(image).to_have_js_property("naturalWidth", 480)
            await tab.evaluate(f"location.hash = '#{samples['failed'].id}'")
            await expect(tab.locator("#facts")).to_contain_text("localhost:3000: the connection was refused")
            async with tab.expect_download() as download:
                await tab.evaluate(f"location.hash = '#{samples['binary'].id}'")
                await response_side.get_by_role("button", name="Download").click()
            path = await (await download.value).path()
            assert path.read_bytes() == bytes(range(256)) * 3


async def test_messages_and_events_appear_as_they_come(browser: Browser) -> None:
    async with inspector() as (page, client):
        samples = Samples(client).fill()
        socket, events = samples["socket"], samples["events"]
        async with opened(browser, page, f"#{socket.id}") as tab:
            notes = tab.locator("#notes li")
            await expect(notes).to_have_count(5)
            await expect(notes.first).to_contain_text("0.20 stextsubscribe orders")
            await expect(notes.first.get_by_role("img", name="from the visitor")).to_be_visible()
            client.log.send(socket, frame(2, b"\x00\xfe late"), socket.started + 9)
            await expect(notes).to_have_count(6)
            await expect(notes.last).to_contain_text("9.00 sbinary\\u{0}\\xfe late")
            client.log.receive(socket, frame(8, b"\x03\xe8bye", b"abcd"), socket.started + 10)
            await expect(notes.last).to_contain_text("close")
            await tab.evaluate(f"location.hash = '#{events.id}'")
            await expect(notes).to_have_count(2)
            client.log.send(events, b"event: tick\ndata: 3\n\n", events.started + 2)
            await expect(notes).to_have_count(3)
            await expect(notes.last).to_contain_text("event: tick\ndata: 3")


async def test_replay_as_it_was_shows_the_difference(browser: Browser) -> None:
    async with replayable() as (page, client, origin):
        Samples(client).add("POST", "/pay", 500, b"application/json", b'{"error":1}', sent=b"abc")
        async with opened(browser, page, "#1") as tab:
            await expect(tab.get_by_role("heading", name="POST /pay")).to_be_visible()
            await tab.keyboard.press("r")
            await expect(tab.locator("#diff .del").first).to_have_text("-500 Internal Server Error")
            await expect(tab.locator("#diff .add").first).to_have_text("+200 OK")
            await expect(tab.locator("#toast")).to_have_text("Replayed as #2: the response differs")
            assert [r.body for r in origin.requests] == [b"abc"]
            await tab.locator("#result").get_by_role("link", name="#2").click()
            await expect(tab.get_by_role("link", name="replay of #1")).to_be_visible()
            await expect(tab.locator("#response pre")).to_contain_text('"call": 1')


async def test_replay_edited_sends_what_was_edited_and_nothing_else(browser: Browser) -> None:
    async with replayable() as (page, client, origin):
        headers = [(b"Cookie", b"secret=1"), (b"X-Drop", b"1")]
        Samples(client).add("POST", "/pay?a=1", 500, headers=headers, sent=b"line 1\r\nline 2")
        async with opened(browser, page, "#1", expected="status of 400") as tab:
            await expect(tab.get_by_role("heading", name="POST /pay")).to_be_visible()
            await tab.keyboard.press("e")
            await expect(tab.get_by_label("Method")).to_be_focused()
            await expect(tab.get_by_label("Body", exact=True)).to_have_value("line 1\nline 2")
            fields = tab.get_by_label("Header fields")
            await expect(fields).to_have_value(re.compile("Cookie: •••"))
            await fields.fill((await fields.input_value()).replace("X-Drop: 1", "X-New: a: b"))
            await tab.get_by_label("Target").fill("/pay?a=2")
            await tab.get_by_label("Target").press("Enter")
            await expect(tab.locator("#diff")).to_contain_text("/pay?a=2")
            await expect(tab.locator("#edit")).to_be_hidden()
            await expect(tab.locator("#change")).to_be_focused()
            sent = origin.requests[0]
            assert (sent.method, sent.target, sent.body) == (b"POST", b"/pay?a=2", b"line 1\r\nline 2")
            assert {(b"Cookie", b"secret=1"), (b"X-New", b"a: b")} <= set(sent.headers)
            assert sent.value(b"x-drop") is None
            await tab.get_by_role("button", name="Edit and replay").click()
            await tab.get_by_label("Body", exact=True).fill("other")
            await tab.get_by_label("Method").fill("P UT")
            await tab.get_by_role("button", name="Send").click()
            await expect(tab.locator("#toast")).to_contain_text("start line")
            await tab.get_by_label("Method").fill("PUT")
            await tab.get_by_role("button", name="Send").click()
            await expect(tab.locator("#diff")).to_contain_text('"body": "other"')
            assert (origin.requests[1].method, origin.requests[1].body) == (b"PUT", b"other")


async def test_curl_and_har_are_exported(browser: Browser) -> None:
    async with inspector() as (page, client):
        samples = Samples(client).fill()
        async with opened(browser, page, f"#{samples['json'].id}") as tab:
            await tab.get_by_role("button", name="Copy as curl").click()
            await expect(tab.locator("#toast")).to_have_text("Copied")
            curl = await tab.evaluate("navigator.clipboard.readText()")
            assert (
                curl.startswith("curl -X POST") and "https://web.t.example.com/hooks" in curl and "sk_test" not in curl
            )
            for name, file, count in (
                ("HAR", "pytunnel-16.har", 1),
                ("Export HAR", "pytunnel.har", len(client.log.exchanges)),
            ):
                async with tab.expect_download() as download:
                    await tab.get_by_role("button", name=name, exact=True).click()
                saved = await download.value
                assert saved.suggested_filename == file
                assert len(json.loads((await saved.path()).read_bytes())["log"]["entries"]) == count


async def test_secrets_are_shown_when_asked_for(browser: Browser) -> None:
    async with inspector() as (page, client):
        samples = Samples(client).fill()
        async with opened(browser, page, f"#{samples['form'].id}") as tab:
            await expect(tab.locator("#request pre")).to_contain_text("password = •••")
            content = await tab.content()
            assert not [secret for secret in ("hunter2", "3b1f", "9c0e", "whsec", "sk_test") if secret in content]
            await tab.get_by_role("button", name="Show secrets").click()
            await expect(tab.locator("#request pre")).to_contain_text("password = hunter2")
            await expect(tab.locator("#request dl")).to_contain_text("session=3b1f")
            await expect(tab.locator("#response dl")).to_contain_text("session=9c0e")
            await expect(tab.locator("#reveal")).to_have_attribute("aria-pressed", "true")
            await tab.get_by_role("button", name="Show secrets").click()
            await expect(tab.locator("#request pre")).to_contain_text("password = •••")


async def test_pause_holds_and_clear_empties_the_list(browser: Browser) -> None:
    async with inspector() as (page, client):
        samples = Samples(client)
        samples.add("GET", "/before", 200)
        async with opened(browser, page) as tab:
            await expect(tab.locator("#rows tr")).to_have_count(1)
            await tab.get_by_role("button", name="Pause").click()
            await expect(tab.get_by_role("button", name="Pause")).to_have_attribute("aria-pressed", "true")
            samples.add("GET", "/meanwhile", 200)
            async with tab.expect_response("**/api/exchanges/1?*"):
                await tab.get_by_role("link", name="/before").click()
            assert await paths(tab) == ["/before"]
            await tab.get_by_role("button", name="Pause").click()
            await expect(tab.locator("#rows tr")).to_have_count(2)
            await tab.get_by_role("button", name="Clear").click()
            await expect(tab.locator("#none")).to_contain_text("Waiting for the first request")
            assert not client.log.exchanges
            await expect(tab.get_by_role("heading", name="GET /before")).to_be_visible()  # what is open stays open


async def test_the_page_is_cheap_under_load(browser: Browser) -> None:
    """One poll in half a second whatever happens, a hundred rows, and nothing at all while nobody looks."""
    async with inspector() as (page, client):
        samples = Samples(client)
        for n in range(600):
            samples.add("GET", f"/{n}", 200)
        async with opened(browser, page) as tab:
            await expect(tab.locator("#rows tr")).to_have_count(100)
            assert (await paths(tab))[0] == "/599"
            polls: list[object] = []
            tab.on("request", lambda request: polls.append(request))
            for n in range(3):
                async with tab.expect_response("**/api/exchanges?*"):
                    samples.add("GET", f"/more/{n}", 200)
                samples.add("GET", "/right after", 200)
            await eventually(lambda: len(polls) >= 4)
            begun = await tab.evaluate(
                "performance.getEntriesByType('resource').filter(entry => entry.name.includes('/api/exchanges?'))"
                ".map(entry => entry.startTime)"
            )
            assert min(b - a for a, b in itertools.pairwise(begun[-3:])) > 450  # milliseconds, by the page's clock
            assert await tab.locator("#rows tr").count() == 100
            await tab.get_by_role("button", name="Show older ones").click()
            await expect(tab.locator("#rows tr")).to_have_count(200)
            await tab.evaluate(
                "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
                "document.dispatchEvent(new Event('visibilitychange'))"
            )
            polls.clear()
            samples.add("GET", "/unseen", 200)
            assert (await ask(page)).status == 200
            await tab.evaluate("new Promise(resolve => setTimeout(resolve, 700))")  # the time of a poll
            assert not polls
            await tab.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
            await expect(tab.get_by_role("link", name="/unseen")).to_be_visible()


async def test_the_page_says_how_the_link_is(browser: Browser) -> None:
    async with inspector() as (page, client), opened(browser, page) as tab:
        await expect(tab.get_by_role("status").first).to_have_text("Connected")
        client.problem, client.retry_at = "the server hung up", asyncio.get_running_loop().time() + 25
        client.log.touch()
        await expect(tab.locator("#state")).to_have_text("Reconnecting: the server hung up")
        await expect(tab.locator("#retry")).to_have_text(re.compile("again in 2[0-9] s"))
        client.problem = ""
        client.log.touch()
        await expect(tab.locator("#state")).to_have_text("Connected")
        await expect(tab.locator("#retry")).to_have_text("")


async def test_the_page_outlives_its_client_and_finds_the_next_one(browser: Browser) -> None:
    async with contextlib.AsyncExitStack() as stack:
        first = contextlib.AsyncExitStack()
        page, client = await first.enter_async_context(inspector(free_port()))  # which nobody takes in between
        Samples(client).add("GET", "/kept", 200)
        refused = "Failed to load resource: .*(ERR_CONNECTION|403|ERR_EMPTY_RESPONSE)"
        tab = await stack.enter_async_context(opened(browser, page, expected=refused))
        await expect(tab.locator("#rows tr")).to_have_count(1)
        await first.aclose()
        await expect(tab.locator("#state")).to_have_text("The client has ended; this page waits for the next one")
        assert await paths(tab) == ["/kept"]
        again, other = await stack.enter_async_context(inspector(page.port))
        assert again.token != page.token
        Samples(other).add("GET", "/of the next one", 200)
        await tab.get_by_text("not without the token").wait_for()  # the page asks by itself; the text is there for 2 s
        await tab.evaluate("pollNow()")
        await expect(tab.locator("#rows th")).to_have_text(["/of the next one"])
        await expect(tab.locator("#state")).to_have_text("Connected")


async def test_o5_hostile_content_is_inert(browser: Browser) -> None:
    async with inspector() as (page, client):
        samples = Samples(client)
        hostile = HOSTILE.encode()
        client.urls = ["javascript:alert(1)"]
        client.problem = f"<img src=x onerror=alert(1)>{HOSTILE}"
        fields = [(b"X-<script>", hostile), (b"X-Latin", b"\xff"), (b"Location", b"javascript:alert(1)")]
        kinds = [
            b"text/html",
            b"application/json",
            b"image/svg+xml",
            b"image/png",
            b"application/x-www-form-urlencoded",
        ]
        svg = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script><image href="http://evil.test/"/></svg>\xff'
        for kind in kinds:
            body = b'{"' + hostile + b'": "' + hostile + b'"}'
            e = samples.add(
                "GET",
                "/" + HOSTILE,
                200,
                kind,
                svg if b"image" in kind else body,
                headers=fields,
                sent=b"a=" + hostile,
                fields=fields,
            )
            e.error, e.reason = HOSTILE, HOSTILE
        socket = samples.begin("GET", "/live", [(b"Upgrade", b"websocket")])
        samples.respond(socket, 101, b"", 0.1, (b"Upgrade", b"websocket"))
        client.log.send(socket, frame(1, hostile[:100]), samples.now)
        async with opened(browser, page, "#1") as tab:
            shape = {await tab.evaluate("[document.scripts.length, document.images.length, document.links.length]+''")}
            for number in range(1, 7):
                await tab.evaluate(f"location.hash = '#{number}'")
                await expect(tab.locator("#facts")).to_contain_text(f"#{number} at")
                shown = await tab.locator("body").inner_text()
                assert "\u202e" not in shown and "\x1b" not in shown
                assert "\\u{202e}gnp.exe\\u{1b}[31m" in shown
                assert await tab.locator("script").count() == 1
                # An image is there a moment before its bytes, and then has them from nowhere else.
                await expect(tab.locator("img:not([src^='blob:'])")).to_have_count(0)
                assert (
                    await tab.locator("[onload], [onerror], [href^='javascript:'], iframe, object, embed").count() == 0
                )
            assert shape
            await expect(tab.locator("#notes")).to_contain_text("<script>alert(1)</script>")
            tags = await tab.evaluate(
                "[...new Set([...document.body.querySelectorAll('*')].map(node => node.localName))].sort()"
            )
            assert not set(tags) & {"svg", "iframe", "object", "embed", "b"}


async def test_the_policy_stops_what_would_get_in(browser: Browser) -> None:
    """The page sets text only; were there a hole in that, no script, style or picture would come through it."""
    async with inspector() as (page, _), opened(browser, page, expected="Content Security Policy|TrustedHTML") as tab:
        for hole in (
            "document.body.innerHTML = '<img src=x onerror=alert(1)>'",
            "document.body.insertAdjacentHTML('beforeend', '<b>x</b>')",
            "document.write('<script>alert(1)</script>')",
        ):
            with pytest.raises(Exception, match="TrustedHTML"):
                await tab.evaluate(hole)
        loaded = await tab.evaluate(
            """async () => {
                const image = Object.assign(new Image(), {src: "http://evil.test/x"})
                const failed = new Promise(resolve => {
                  image.onerror = () => resolve("no")
                  image.onload = () => resolve("yes")
                })
                document.body.append(image)
                const sent = await fetch("http://evil.test/x", {mode: "no-cors"}).then(() => "yes", () => "no")
                return [await failed, sent]
            }"""
        )
        assert loaded == ["no", "no"]


# ---------------------------------------------------------------------------------------- For eyes, ears and hands

CONTRAST = """() => {  // the least contrast of text with what is behind it (WCAG 2.2, 1.4.3), and where it is
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true}), known = {}
  const parse = color => known[color] ??= (() => {
    canvas.clearRect(0, 0, 1, 1)
    canvas.fillStyle = color
    canvas.fillRect(0, 0, 1, 1)
    return [...canvas.getImageData(0, 0, 1, 1).data]
  })()
  const linear = v => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4
  const luminance = ([r, g, b]) => linear(r) * .2126 + linear(g) * .7152 + linear(b) * .0722
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor)
      if (color[3] === 255) return color
    }
    return parse(matchMedia("(prefers-color-scheme: dark)").matches ? "#0f0f12" : "#fff")
  }
  const found = []
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())
    const shown = own || node.matches("input, textarea")
    if (!shown || !node.checkVisibility({visibilityProperty: true}) || node.closest(".unseen, script")) continue
    const [a, b] = [luminance(parse(getComputedStyle(node).color)), luminance(behind(node))]
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), node.outerHTML.slice(0, 100)])
  }
  return found.sort((a, b) => a[0] - b[0])[0]
}"""
UNNAMED = """() => [...document.querySelectorAll("button, input, textarea, a, [tabindex='0'], img, dialog")].filter(
  node => !(node.ariaLabel || node.textContent.trim() || node.alt || node.labels?.length || node.ariaLabelledByElements)
).map(node => node.outerHTML)"""
SMALL = """() => [...document.querySelectorAll("button, input, textarea, tbody tr")].filter(node => {
  const {width, height} = node.getBoundingClientRect()
  return node.checkVisibility() && Math.min(width, height) < 24
}).map(node => node.outerHTML)"""
OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter(node => {
  const {left, right} = node.getBoundingClientRect()
  return node.checkVisibility() && !node.closest(".unseen, pre, #notes") && (right > innerWidth + 0.5 || left < -0.5)
}).map(node => node.outerHTML.slice(0, 200))"""
LIGHTNESS = """async data => {  // how light a picture is, from 0 to 1
  const image = await createImageBitmap(await (await fetch("data:image/png;base64," + data)).blob())
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true})
  canvas.imageSmoothingQuality = "high"
  canvas.drawImage(image, 0, 0, 1, 1)
  const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data
  return [image.width, image.height, (r + g + b) / 765]
}"""


VIEWS = ["empty", "list", "json", "long", "image", "socket", "failed", "edit", "help", "diff"]


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_looks_right(browser: Browser, tmp_path: Path, scheme: str, width: int) -> None:
    """Each view in each scheme and width: readable, named, inside the window, large enough to touch."""
    async with replayable() as (page, client, _), opened(browser, page, width=width, color_scheme=scheme) as tab:
        samples: dict[str, Any] = {}
        for view in VIEWS:
            if view == "list":
                samples = Samples(client).fill()
                long, fields = "/long/" + "segment" * 60, [(b"X-Long", b"y" * 500)]
                samples["long"] = Samples(client).add("GET", long, 200, b"text/plain", b"x" * 900, headers=fields)
                await expect(tab.locator("#rows tr")).to_have_count(len(client.log.exchanges))
            elif view == "edit":
                await tab.evaluate(f"location.hash = '#{samples['error'].id}'")
                await expect(tab.locator("#title")).to_have_text("POST /api/checkout")
                await tab.get_by_role("button", name="Edit and replay").click()
                await expect(tab.get_by_label("Method")).to_be_focused()
            elif view == "diff":
                await tab.get_by_role("button", name="Replay", exact=True).click()
                await expect(tab.locator("#diff")).to_be_visible()
            elif view == "help":
                await tab.keyboard.press("Escape")
                await tab.keyboard.press("Escape")
                await tab.get_by_role("button", name="Help").click()
            elif view != "empty":
                await tab.evaluate(f"location.hash = '#{samples[view].id}'")
                await expect(tab.locator("#facts")).to_contain_text(f"#{samples[view].id} at")
            await tab.screenshot(path=tmp_path / f"{view}-{scheme}-{width}.png")
            if view == "help":
                await tab.keyboard.press("Escape")
                await tab.evaluate(f"location.hash = '#{samples['error'].id}'")
                await expect(tab.locator("#title")).to_be_visible()
                continue
            ratio, where = await tab.evaluate(CONTRAST)
            assert ratio >= 4.5, (view, where, ratio)
            assert await tab.evaluate(UNNAMED) == [], view
            assert await tab.evaluate(SMALL) == [], view
            assert await tab.evaluate(OVERFLOWING) == [], view
            assert await tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        both = await tab.locator("#list").is_visible() and await tab.locator("#detail").is_visible()
        assert both == (width == 1600)
        shot = base64.b64encode((tmp_path / f"list-{scheme}-{width}.png").read_bytes()).decode()
        other = await tab.context.new_page()  # where no policy forbids to look at it
        wide, high, light = await other.evaluate(LIGHTNESS, shot)
        assert (wide, high) == (width, 900)
        assert light < 0.25 if scheme == "dark" else light > 0.8


async def test_at_360_list_and_detail_follow_each_other(browser: Browser) -> None:
    async with inspector() as (page, client):
        Samples(client).fill()
        async with opened(browser, page, width=360) as tab:
            await tab.get_by_role("link", name="/api/checkout").click()
            await expect(tab.get_by_role("heading", name="POST /api/checkout")).to_be_visible()
            await expect(tab.locator("#list")).to_be_hidden()
            await tab.get_by_role("button", name="← All").click()
            await expect(tab.get_by_role("link", name="/api/checkout")).to_be_focused()
            await expect(tab.locator("#detail")).to_be_hidden()
            await tab.go_back()
            await expect(tab.get_by_role("heading", name="POST /api/checkout")).to_be_visible()


async def test_who_hears_the_page_is_told_now_and_then(browser: Browser) -> None:
    """Not one announcement for each request, and none that a countdown repeats."""
    async with inspector() as (page, client), opened(browser, page) as tab:
        live = await tab.evaluate(
            "[...document.querySelectorAll('[role=status], output, [aria-live]')].map(node => node.id)"
        )
        assert live == ["state", "news", "toast"]
        await tab.evaluate(
            "heard = [];"
            "new MutationObserver(() => heard.push(1)).observe(document.getElementById('news'), {childList: true})"
        )
        samples = Samples(client)
        for n in range(3):
            samples.add("GET", f"/{n}", 200)
            await expect(tab.locator("#rows tr")).to_have_count(n + 1)
        assert await tab.evaluate("heard.length") <= 1


async def test_the_table_is_one_for_who_hears_it(browser: Browser) -> None:
    async with inspector() as (page, client):
        Samples(client).add("GET", "/a", 200)
        async with opened(browser, page) as tab:
            table = tab.get_by_role("table", name="Requests and their responses, the newest first")
            for name in ("Status", "Method", "Path", "Time", "Size", "At"):
                await expect(table.get_by_role("columnheader", name=name, exact=True)).to_be_visible()
            await expect(table.get_by_role("rowheader", name="/a")).to_be_visible()
            assert await tab.evaluate("document.documentElement.lang") == "en"
            await expect(tab.get_by_role("main")).to_have_count(1)
            await expect(tab.get_by_role("banner")).to_have_count(1)


# ---------------------------------------------------------------------------------------- A hostile page

ATTACK = """async ({base, token}) => {
  const done = {}, replay = base + "/api/exchanges/1/replay"
  const tries = {
    read: () => fetch(base + "/api/exchanges").then(r => r.text()),
    readPage: () => fetch(base + "/").then(r => r.text()),
    readWithToken: () => fetch(base + "/api/exchanges", {headers: {"X-Pytunnel-Token": token}}).then(r => r.text()),
    readBlindly: () => fetch(base + "/", {mode: "no-cors"}).then(r => r.type),
    clear: () => fetch(base + "/api/clear", {method: "POST", mode: "no-cors"}).then(r => r.type),
    stop: () => fetch(base + "/api/stop", {method: "POST", mode: "no-cors"}).then(r => r.type),
    replayAsText: () => fetch(replay, {method: "POST", mode: "no-cors", body: "{}"}).then(r => r.type),
    replayAsJson: () => fetch(replay, {method: "POST", body: "{}", headers: {"Content-Type": "application/json"}})
      .then(r => r.text()),
    beacon: async () => navigator.sendBeacon(base + "/api/clear", "{}"),
    image: () => new Promise(resolve => {
      const image = new Image()
      image.onload = () => resolve("loaded")
      image.onerror = () => resolve("failed")
      image.src = base + "/api/exchanges/1/body?which=response"
    }),
    script: () => new Promise(resolve => {
      const script = document.createElement("script")
      script.onload = () => resolve("loaded")
      script.onerror = () => resolve("failed")
      script.src = base + "/api/exchanges"
      document.head.append(script)
    }),
    socket: () => new Promise(resolve => {
      const socket = new WebSocket(base.replace("http", "ws") + "/api/exchanges")
      socket.onopen = () => resolve("opened")
      socket.onerror = () => resolve("failed")
    }),
    events: () => new Promise(resolve => {
      const events = new EventSource(base + "/api/exchanges")
      events.onopen = () => resolve("opened")
      events.onerror = () => { events.close(); resolve("failed") }
    }),
    frame: () => new Promise(resolve => {
      const frame = document.createElement("iframe")
      frame.onload = () => {
        try { resolve("loaded " + frame.contentDocument.body.textContent) } catch (error) { resolve("failed") }
      }
      frame.src = base + "/"
      document.body.append(frame)
    }),
    form: () => new Promise(resolve => {
      const target = Object.assign(document.createElement("iframe"), {name: "target"})
      const form = Object.assign(document.createElement("form"),
        {method: "POST", action: base + "/api/exchanges/1/replay", enctype: "text/plain", target: "target"})
      form.append(Object.assign(document.createElement("input"), {name: '{"method":"DELETE","x":"', value: '"}'}))
      target.onload = () => resolve("sent")
      document.body.append(target, form)
      form.submit()
    }),
  }
  for (const name in tries) done[name] = await tries[name]().catch(error => "failed")
  return done
}"""


class Watched(Inspector):
    """An inspector that remembers what it was asked and what it answered."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.answers: list[tuple[str, str, int]] = []

    async def _handle(self, request: Any) -> Any:
        answer = await super()._handle(request)
        self.answers.append((request.method, request.path, answer.status))
        return answer


@contextlib.asynccontextmanager
async def attacked() -> AsyncIterator[tuple[Watched, TunnelClient, RawOrigin]]:
    """A watched inspector with one exchange; afterwards it is still there, and nothing was replayed or stopped."""
    async with RawOrigin(response()) as origin:
        client = TunnelClient("http://localhost", "token", [Tunnel("web", Target.parse(f"localhost:{origin.port}"))])
        Samples(client).add("GET", "/a?token=t", 200, b"image/png", png(4, 4))
        page = Watched(client, port=0, on_stop=client.stop)
        await page.start()
        try:
            yield page, client, origin
            assert list(client.log.exchanges) == [1]
            assert not client._stopping.is_set()
            assert not origin.requests
            assert page.answers and {status for _, _, status in page.answers} == {403}
        finally:
            await page.close()


@pytest.mark.parametrize("host", ["evil.test", "localhost", "127.0.0.1"])
async def test_a_hostile_page_can_neither_read_nor_replay_nor_clear(browser: Browser, host: str) -> None:
    """Served from another site, and from another port of this machine."""
    html = response(b"<!doctype html><title>evil</title>", 200, [(b"Content-Type", b"text/html")])
    async with RawOrigin(html) as evil, attacked() as (page, _, _), await browser.new_context() as context:
        tab = await context.new_page()
        await tab.goto(f"http://{host}:{evil.port}/")
        for base in (page.url, f"http://localhost:{page.port}"):
            before = len(page.answers)
            done = await tab.evaluate(ATTACK, {"base": base, "token": page.token})
            assert (done.pop("form"), done.pop("beacon")) == ("sent", True)  # and refused, as the log shows
            assert set(done.values()) == {"failed"}
            reached = {(method, path) for method, path, _ in page.answers[before:]}
            assert {("POST", "/api/clear"), ("POST", "/api/stop"), ("POST", "/api/exchanges/1/replay")} <= reached
            assert {("GET", "/"), ("GET", "/api/exchanges"), ("OPTIONS", "/api/exchanges")} <= reached


async def test_a_name_that_was_pointed_here_gets_nothing(browser: Browser) -> None:
    """DNS rebinding: to the browser the hostile page and the inspector are one origin; only Host tells."""
    async with attacked() as (page, _, _), await browser.new_context() as context:
        tab = await context.new_page()
        base = f"http://evil.test:{page.port}"
        answer = await tab.goto(base + "/")
        assert answer is not None and answer.status == 403
        read = await tab.evaluate(
            """async ({base, token}) => {
                const headers = {"X-Pytunnel-Token": token}
                const ask = async (path, options) => (await fetch(base + path, options)).text()
                return [await ask("/"), await ask("/api/exchanges", {headers}),
                  await ask("/api/exchanges/1?reveal=1", {headers}),
                  await ask("/api/exchanges/1/replay", {method: "POST", body: "{}", headers}),
                  await ask("/api/clear", {method: "POST", headers}), await ask("/api/stop", {method: "POST", headers})]
            }""",
            {"base": base, "token": page.token},
        )
        assert read == ['{"error": "not this host"}'] * 6
