"""What doctor says about real servers, sound ones and such as have something wrong in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from support import RawOrigin, RawRequest, Relay, response

import pytunnel
from pytunnel import Finding, Target

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
TOKEN = "test-token-0123456789abcdef0123456789abcdef"
LOOPBACK = {"t.test": "127.0.0.1", "*.t.test": "127.0.0.1"}

Edit = Callable[[bytes], bytes]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextlib.asynccontextmanager
async def serving(state: Path, **options: Any) -> AsyncIterator[int]:
    """A server in this process, and its port."""
    server = pytunnel.TunnelServer(tokens=[TOKEN], state=state, listen=[("127.0.0.1", 0)], **options)
    await server.start()
    try:
        yield server.port
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def front(
    upstream: int,
    *,
    request: Edit = lambda head: head,
    response: Edit = lambda head: head,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """A reverse proxy that edits heads, with one request on a connection; gives its port."""
    running: set[asyncio.Task[Any]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.add(cast("asyncio.Task[Any]", asyncio.current_task()))
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = request(await reader.readuntil(b"\r\n\r\n"))
            if b"Upgrade" not in head:
                head = head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
            there, back = await asyncio.open_connection("127.0.0.1", upstream)
            writers.append(back)
            back.write(head)
            writer.write(response(await there.readuntil(b"\r\n\r\n")))
            await asyncio.gather(pump(reader, back), pump(there, writer))
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        for writer in writers:
            writer.close()
        await asyncio.gather(*running)


def says(server: bytes) -> Edit:
    """A front that gives itself a name."""
    return lambda head: head.replace(b"\r\n", b"\r\nServer: " + server + b"\r\n", 1)


def dated(date: bytes) -> Edit:
    return lambda head: re.sub(rb"Date: [^\r]*", b"Date: " + date, head)


def drop_subprotocol(head: bytes) -> bytes:
    return re.sub(rb"\r\nSec-WebSocket-Protocol: [^\r]*", b"", head)


def drop_upgrade(head: bytes) -> bytes:
    return re.sub(rb"\r\n(Upgrade|Connection): [^\r]*", b"", head)


def rewrite_host(head: bytes) -> bytes:
    return re.sub(rb"\r\nHost: [^\r]*", b"\r\nHost: 127.0.0.1:8080", head)


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the resolver knows of `.test`; a star stands for any label."""
    known = dict(LOOPBACK)
    loop = asyncio.get_running_loop()
    resolve = loop.getaddrinfo

    async def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if str(host).endswith(".test"):
            zone = str(host).partition(".")[2]
            found = known.get(host) or known.get(f"*.{zone}")
            if not found:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            host = found
        return await resolve(host, *args, **kwargs)

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    return known


async def found(server: str, *targets: str, token: str = TOKEN, idle: float = 0) -> dict[str, Finding]:
    parsed = [Target.parse(text) for text in targets]
    async with contextlib.aclosing(pytunnel.diagnose(server, token, parsed, idle=idle)) as findings:
        return {finding.what: finding async for finding in findings}


def verdicts(findings: dict[str, Finding]) -> dict[str, bool | None]:
    return {what: finding.ok for what, finding in findings.items()}


def in_readme(advice: str) -> bool:
    """Whether what is to be put into a configuration stands in the README as well; it is all but the first line."""
    return all(line.strip() in README for line in advice.splitlines()[1:])


SOUND = dict.fromkeys(["proxy", "address", "server", "clock", "WebSocket", "login", "names", "visitor"], True)


# The server and the way to it


async def test_a_sound_server(tmp_path: Path, names: dict[str, str]) -> None:
    async with serving(tmp_path) as port:
        for host in ("t.test", "localhost", "127.0.0.1"):
            findings = await found(f"http://{host}:{port}")
            assert verdicts(findings) == SOUND, findings
            assert not any(finding.advice for finding in findings.values())
            assert findings["visitor"].detail.endswith("arrives here")


async def test_a_domain_that_is_not_what_was_dialled(tmp_path: Path, names: dict[str, str]) -> None:
    async with serving(tmp_path) as port:
        pass
    domain = pytunnel.Origin("http", "public.test", port)
    async with serving(tmp_path, domain=domain) as port:
        findings = await found(f"http://t.test:{port}")
        assert (findings["names"].ok, findings["visitor"].ok) == (False, False)
        assert "public.test has no address" in findings["names"].detail


async def test_it_leaves_one_name_behind_however_often_it_runs(tmp_path: Path) -> None:
    async with serving(tmp_path) as port:
        for _ in range(2):
            await found(f"http://127.0.0.1:{port}")
        assert len(pytunnel.parse_object((tmp_path / "names.json").read_text())["names"]) == 1


async def test_a_wrong_token(tmp_path: Path) -> None:
    async with serving(tmp_path) as port:
        findings = await found(f"http://127.0.0.1:{port}", token="another-token-0123456789")
        assert verdicts(findings) == {**SOUND, "login": False}
        assert "does not know this token" in findings["login"].detail


async def test_a_wrong_token_for_a_host_that_the_server_does_not_know(tmp_path: Path, names: dict[str, str]) -> None:
    async with serving(tmp_path) as port:
        findings = await found(f"http://t.test:{port}", token="another-token-0123456789")
        assert verdicts(findings) == {**SOUND, "login": False, "visitor": None}
        await found(f"http://t.test:{port}")  # from which the server learns its zone
        findings = await found(f"http://t.test:{port}", token="another-token-0123456789")
        assert verdicts(findings) == {**SOUND, "login": False}


async def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    findings = await found(f"http://127.0.0.1:{port}")
    assert findings["server"] == Finding("server", False, "connection refused", pytunnel.SERVER_ADVICE)
    assert "WebSocket" not in findings


async def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(_: RawRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    monkeypatch.setattr(pytunnel, "CHECK_TIMEOUT", 1.0)  # which those that are answered have as well
    async with RawOrigin(silent) as origin, asyncio.timeout(30):
        findings = await found(f"http://127.0.0.1:{origin.port}", f"127.0.0.1:{origin.port}")
    assert findings["server"].detail == "no answer in time"
    assert findings[f"local service 127.0.0.1:{origin.port}"].detail.endswith("connected, but no answer in time")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (response(b"It works!"), "something else answers: status 200"),
        (b"HTTP/1.1 502 Bad Gateway\r\nServer: nginx/1.18.0\r\nContent-Length: 0\r\n\r\n", "status 502, nginx"),
        (
            b"HTTP/1.1 308 Moved\r\nLocation: https://t.test:8443/_pytunnel/link\r\nContent-Length: 0\r\n\r\n",
            "a redirect to https://t.test:8443 ",
        ),
        (
            b"HTTP/1.1 301 Moved\r\nLocation: https://t.test/\xe2\x80\xae\r\nContent-Length: 0\r\n\r\n",
            r"a redirect to https://t.test/\u202e",
        ),
        (
            b"HTTP/1.1 404 Not Found\r\nX-Pytunnel-Error: unknown-tunnel\r\nContent-Length: 0\r\n\r\n",
            "pytunnel answers 404 unknown-tunnel",
        ),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "server: "),
    ],
)
async def test_something_else_answers(answer: bytes, words: str) -> None:
    async with RawOrigin(answer, keep_alive=False) as origin:
        findings = await found(f"http://127.0.0.1:{origin.port}")
    assert findings["server"].ok is False
    assert findings["server"].advice
    assert words in " ".join(pytunnel._doctor_lines(findings["server"]))
    assert not {"clock", "WebSocket", "login", "visitor"} & set(findings)


async def test_a_clock_that_is_wrong(tmp_path: Path) -> None:
    for offset, words in [(3600, "behind"), (-3600, "ahead of")]:
        date = email.utils.formatdate(time.time() + offset, usegmt=True).encode()
        async with serving(tmp_path) as upstream, front(upstream, response=dated(date)) as port:
            clock = (await found(f"http://127.0.0.1:{port}"))["clock"]
            assert clock.ok is False
            assert re.search(rf"3[56]\d\d s {words} the server", clock.detail)
    async with serving(tmp_path) as upstream, front(upstream, response=dated(b"soon")) as port:
        assert (await found(f"http://127.0.0.1:{port}"))["clock"].ok is False


# What stands in front


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (b"nginx/1.26.0", "proxy_set_header Upgrade $http_upgrade;"),
        (b"Caddy", "reverse_proxy 127.0.0.1:8080 {"),
        (b"cloudflare", "Turn on WebSockets"),
        (b"Apache", "proxy_set_header Connection $connection_upgrade;"),
    ],
)
async def test_a_front_that_refuses_upgrades(server: bytes, words: str, tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as upstream,
        front(upstream, request=drop_upgrade, response=says(server)) as port,
    ):
        findings = await found(f"http://127.0.0.1:{port}")
        assert findings["server"].detail == f"pytunnel answers through {server.decode()}"
        assert (findings["WebSocket"].ok, findings["WebSocket"].detail) == (False, "refused with status 426")
        assert words in findings["WebSocket"].advice
        assert in_readme(findings["WebSocket"].advice)
        assert "login" not in findings


async def test_a_front_that_drops_the_subprotocol(tmp_path: Path) -> None:
    async with serving(tmp_path) as upstream, front(upstream, response=drop_subprotocol) as port:
        findings = await found(f"http://127.0.0.1:{port}")
        assert findings["WebSocket"].ok is False
        assert "login" not in findings


async def test_a_front_that_rewrites_host(tmp_path: Path, names: dict[str, str]) -> None:
    async with serving(tmp_path) as upstream, front(upstream, request=rewrite_host) as port:
        findings = await found(f"http://t.test:{port}")
        assert verdicts(findings) == {**SOUND, "visitor": False}
        assert "proxy_set_header Host $http_host;" in findings["visitor"].advice
        assert in_readme(findings["visitor"].advice)


async def test_a_front_that_does_not_take_the_names(tmp_path: Path, names: dict[str, str]) -> None:
    names["*.t.test"] = "127.0.0.2"
    async with serving(tmp_path) as port:
        page = b"HTTP/1.1 200 OK\r\nServer: Caddy\r\nContent-Length: 0\r\n\r\n"
        with contextlib.suppress(OSError):
            async with RawOrigin(page, host="127.0.0.2", port=port):
                assert "Caddyfile lists names" in (await found(f"http://t.test:{port}"))["visitor"].advice
        page = b"HTTP/1.1 502 Bad Gateway\r\nServer: nginx\r\nContent-Length: 0\r\n\r\n"
        with contextlib.suppress(OSError):  # where there is no more than one loopback address
            async with RawOrigin(page, host="127.0.0.2", port=port):
                findings = await found(f"http://t.test:{port}")
                assert verdicts(findings) == {**SOUND, "names": None, "visitor": False}
                assert "*.t.test. A 127.0.0.1" in findings["names"].advice
                assert "status 502 nginx" in findings["visitor"].detail


async def test_idle_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as upstream, Relay(upstream) as relay:
        server = f"http://127.0.0.1:{relay.port}"
        idle = (await found(server, idle=0.01))["idle link"]
        assert (idle.ok, idle.detail) == (True, "left alone for 0.01 s")
        async with contextlib.aclosing(pytunnel.diagnose(server, TOKEN, [], idle=60)) as findings:
            async for finding in findings:
                if finding.what == "visitor":
                    await relay.cut("close")
                    monkeypatch.setattr(pytunnel, "CHECK_TIMEOUT", 0)  # the idle time comes on top
        assert (finding.what, finding.ok) == ("idle link", False)
        assert finding.detail.startswith("lost: ")
        assert "proxy_read_timeout 1d;" in finding.advice
        assert in_readme(finding.advice)


# Names, certificates, proxies


async def test_names_that_are_missing(tmp_path: Path, names: dict[str, str]) -> None:
    async with serving(tmp_path) as port:
        del names["*.t.test"]
        findings = await found(f"http://t.test:{port}")
        assert verdicts(findings) == {**SOUND, "names": False, "visitor": False}
        assert findings["names"].advice.endswith("\n    *.t.test. A 127.0.0.1")
        del names["t.test"]
        assert verdicts(await found(f"http://t.test:{port}")) == {"proxy": True, "address": False}


async def test_sslip_that_is_not_resolved(names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    async with aiohttp.ClientSession() as http, contextlib.AsyncExitStack() as stack:
        checks = pytunnel.Doctor("http://192.0.2.1:8080", TOKEN, http, stack)

        async def refuse(*_: Any, **__: Any) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", refuse)
        ok, detail, advice = await checks.names()
        assert ok is False
        assert re.fullmatch(r"doctor-\w+\.192-0-2-1\.sslip\.io has no address", detail)
        assert "resolver" in advice


def certificate(directory: Path, days: int, names: list[str]) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A self-signed certificate: what a server takes, and what a client who trusts it takes. Its end may be past."""
    openssl = shutil.which("openssl")
    assert openssl, "this test makes its certificate with the openssl command"
    key, chain = directory / "key.pem", directory / "chain.pem"
    make = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    alternatives = "subjectAltName=" + ",".join(f"DNS:{name}" for name in names)
    make += ["-subj", "/CN=test", "-addext", alternatives, "-keyout", str(key), "-out", str(chain)]
    subprocess.run(make, check=True, capture_output=True)
    again = [openssl, "x509", "-in", str(chain), "-signkey", str(key), "-days", str(days), "-out", str(chain)]
    subprocess.run(again, check=True, capture_output=True)  # `req` takes no days that are over
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain, key)
    return context, ssl.create_default_context(cafile=str(chain))


async def test_certificates(tmp_path: Path, names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def trust(client: ssl.SSLContext) -> None:
        monkeypatch.setattr(ssl, "create_default_context", lambda *_, **__: client)
        monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", client)

    async with serving(tmp_path) as upstream:
        make = ssl.create_default_context
        both, trusting = certificate(tmp_path, 30, ["t.test", "*.t.test"])
        async with front(upstream, tls=both) as port:
            findings = await found(f"https://t.test:{port}")
            assert (findings["certificate"].ok, findings["server"].ok) == (False, False)
            assert findings["certificate"].detail.startswith("its certificate is not trusted (self-signed certificate)")
            assert "SSL_CERT_FILE" in findings["certificate"].advice
            trust(trusting)
            findings = await found(f"https://t.test:{port}")
            assert verdicts(findings) == {**SOUND, "certificate": True}
            assert findings["certificate"].detail.endswith("GMT, for t.test, *.t.test")
            names["other.test"] = "127.0.0.1"
            findings = await found(f"https://other.test:{port}")
            assert "certificate is not valid for 'other.test'" in findings["certificate"].detail
        monkeypatch.setattr(ssl, "create_default_context", make)
        one, trusting = certificate(tmp_path, 2, ["t.test"])
        trust(trusting)
        async with front(upstream, tls=one) as port:
            findings = await found(f"https://t.test:{port}")
            assert verdicts(findings) == {**SOUND, "certificate": None, "visitor": None}
            assert "renewed" in findings["certificate"].advice
            assert "*.t.test" in findings["visitor"].advice
            assert await pytunnel.doctor(f"https://t.test:{port}", TOKEN, [], 0, lambda line: None) == 0
            assert (await found(f"http://t.test:{port}"))["server"].ok is False
        assert "does not speak TLS" in (await found(f"https://t.test:{upstream}"))["certificate"].detail
        monkeypatch.setattr(ssl, "create_default_context", make)
        names["localhost"] = "127.0.0.1"
        own, trusting = certificate(tmp_path, 30, ["localhost"])
        trust(trusting)
        async with front(upstream, tls=own) as port:  # resolvers need not know a tunnel's name there, but certificates
            findings = await found(f"https://localhost:{port}")
            assert verdicts(findings) == {**SOUND, "certificate": True, "visitor": None}


async def test_proxies(tmp_path: Path, names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as port:
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{port}")  # it takes the absolute form, too
        del names["t.test"], names["*.t.test"]
        findings = await found("http://t.test")
        assert findings["proxy"] == Finding("proxy", True, f"127.0.0.1:{port}, as HTTP_PROXY says", "")
        assert (findings["address"].ok, findings["server"].ok) == (None, True)
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")  # it does not do CONNECT
        findings = await found("https://127.0.0.1")
        assert verdicts(findings) == {"proxy": True, "address": True, "server": False, "names": True}
        monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
        findings = await found(f"http://localhost:{port}")
        assert (findings["proxy"].ok, findings["server"].ok) == (False, False)
        monkeypatch.setenv("no_proxy", "localhost")
        assert verdicts(await found(f"http://localhost:{port}")) == SOUND


# Local services


async def local(target: str) -> tuple[bool | None, str, str]:
    return await pytunnel.check_target(Target.parse(target))


async def test_local_services(tmp_path: Path) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
    async with RawOrigin(early) as origin:
        ok, detail, _ = await local(str(origin.port))
        assert ok is True
        assert re.fullmatch(r"127\.0\.0\.1: HTTP status 404; ::1: cannot connect to \d+: .*", detail)
        assert [request.target for request in origin.requests] == [b"/"]
        with contextlib.suppress(OSError):  # where there is no IPv6
            async with RawOrigin(response(b"six"), host="::1", port=origin.port):
                detail = (await local(str(origin.port)))[1]
                assert detail == "127.0.0.1: HTTP status 404; ::1: HTTP status 200"
    ok, detail, advice = await local(str(origin.port))
    assert (ok, detail.count("connection refused") >= 1, bool(advice)) == (False, True, True)
    for answer, words in [(b"SSH-2.0-OpenSSH\r\n\r\n", "not an HTTP/1 response"), (b"", "no response")]:
        async with RawOrigin(answer, keep_alive=False) as origin:
            ok, detail, _ = await local(f"127.0.0.1:{origin.port}")
            assert (ok, words in detail) == (False, True), detail
    ok, detail, _ = await local(f"unix:{tmp_path}/none.sock")
    assert (ok, "no such file" in detail) == (False, True)


# The terminal


def test_lines() -> None:
    advice = "Write " + "many words " * 20 + "\n    location / {\n        proxy_set_header Host $http_host;"
    lines = list(pytunnel._doctor_lines(Finding("server", False, "bad \x1b[2J\u202e" + "x" * 300, advice)))
    assert lines[0] == r"no  server: bad"
    assert lines[1].startswith("      \\x1b[2J\\u202exxx")
    assert lines[2].startswith("      Write many words")
    assert lines[3].startswith("      words") or lines[3].startswith("      many")
    assert lines[-2:] == ["          location / {", "              proxy_set_header Host $http_host;"]
    assert all(len(line) <= 100 for line in lines[2:])
    url = "https://" + "a-very-long-name." * 8 + "test"
    assert f"      {url}" in pytunnel._doctor_lines(Finding("server", False, "x", f"Dial {url} for it"))
    marks = [next(pytunnel._doctor_lines(Finding("x", ok, "y", ""))) for ok in (True, None, False)]
    assert marks == ["ok  x: y", "??  x: y", "no  x: y"]


def test_every_line_of_configuration_stands_in_the_readme() -> None:
    advices = [*pytunnel.UPGRADE_ADVICE.values(), pytunnel.HOST_ADVICE, pytunnel.IDLE_ADVICE]
    assert all(map(in_readme, advices))
    assert sum(len(advice.splitlines()) - 1 for advice in advices) == 13


async def test_the_status(tmp_path: Path) -> None:
    written: list[str] = []
    async with serving(tmp_path) as port, RawOrigin(response(b"here")) as origin:
        server, good, bad = f"http://127.0.0.1:{port}", f"127.0.0.1:{origin.port}", f"unix:{tmp_path}/none.sock"
        assert await pytunnel.doctor(server, TOKEN, [Target.parse(good)], 0, written.append) == 0
        assert all(line.startswith("ok  ") for line in written)
        assert written[-1] == f"ok  local service {good}: 127.0.0.1: HTTP status 200"
        assert await pytunnel.doctor(server, TOKEN, [Target.parse(bad)], 0, written.append) == 1
        assert await pytunnel.doctor(server, "x" * 20, [], 0, written.append) == 1
    assert TOKEN not in "\n".join(written)
