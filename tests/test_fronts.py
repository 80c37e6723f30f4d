"""Caddy and nginx in front, as the README's section on them says: Debian's programs with these very recipes.

Replaced are only ports, the host (`t.example.com` is `localhost`, which needs no DNS) and where nginx's certificate
lies. Around a recipe stands what it leaves to the machine: for nginx Debian's own nginx.conf, for Caddy where it keeps
its files. Below localhost, Caddy's certificates come from an authority of its own.

    RawVisitor -> Unwrapped -> [Caddy or nginx] -> [server]
                         [client] -^
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import async_playwright
from support import (
    CHUNK,
    ROOT,
    PatternChecker,
    Process,
    RawOrigin,
    RawRequest,
    RawVisitor,
    Tunnel,
    WaitFailed,
    chunk,
    eventually,
    free_port,
    pattern,
    request,
    response,
    with_limits,
)
from test_doctor import certificate

import pytunnel

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## Behind Caddy or nginx\n")[2].partition("\n## ")[0]
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL))
SERVE = shlex.split(BLOCKS["sh"])[2:]

MiB = 1024 * 1024
STEP = 5.0  # seconds in which what is said on one side must be heard on the other
VISITOR = "127.0.0.3"  # of visitors, as the front and everything else here is 127.0.0.1
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

Change = Callable[[str], str]
Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


def as_written(recipe: str) -> str:
    return recipe


class Front(Tunnel):
    """A tunnel whose visitors and client come through a front; `visitor()` still is one who does not."""

    def __init__(
        self, kind: str, directory: Path, origin: RawOrigin, change: Change = as_written, **options: Any
    ) -> None:
        self.kind, self._change, self._files = kind, change, directory
        self.ports = {"443": free_port(), "80": free_port()}
        words = dict(zip(SERVE[::2], SERVE[1::2], strict=True))
        assert words.pop("--listen") == "127.0.0.1:8080"
        words["--domain"] = f"{words['--domain'].replace('t.example.com', 'localhost')}:{self.ports['443']}"
        self.root = directory / ("chain.pem" if kind == "nginx" else "caddy/pki/authorities/local/root.crt")
        args = [word for pair in words.items() for word in pair]
        super().__init__(
            origin.port,
            serve_args=[*args, *options.pop("serve_args", ())],
            env={"SSL_CERT_FILE": str(self.root)},
            **{"settles": kind == "nginx", **options},  # Caddy keeps connections to the server for the next request
        )

    async def start_server(self, *args: str) -> Process:
        server = await super().start_server(*args)
        if len(self._servers) == 1:
            if self.kind == "nginx":
                certificate(self._files, 30, ["localhost", "web.localhost", "api.localhost"])
            (self._files / "run").mkdir()
            await self.start_front()
        return server

    @property
    def server_url(self) -> str:
        return f"https://localhost:{self.ports['443']}"

    async def start_front(self) -> None:
        """Start it, or another one like it, and return when it has a certificate for each name."""
        write = {"nginx": self._write_nginx, "caddy": self._write_caddy}[self.kind]
        self._command_line = write(self._files)
        self.front = await Process.start(command=self._command_line, home=self._files)
        self._stack.push_async_callback(self.front.aclose)
        try:
            for name in ("localhost", "web.localhost", "api.localhost"):
                await eventually(lambda name=name: self._greets(name), 20, f"{self.kind} for {name}")
        except WaitFailed as error:
            error.add_note(self.front.output())
            raise

    async def stop_front(self) -> None:
        self.front.send_signal(signal.SIGTERM)
        await self.front.wait()

    async def reload_front(self) -> None:
        """Have it read its configuration again, as systemd and certbot do; return when the new one is in use."""
        if self.kind == "caddy":
            words = [*self._command_line[:1], "reload", *self._command_line[2:], "--force"]
            words += ["--address", f"unix/{self._files}/admin"]
            async with await Process.start(command=words, home=self._files) as reload:
                assert await reload.wait() == 0
            return
        before = self._workers()
        self.front.send_signal(signal.SIGHUP)
        # Of the old ones those that have nothing to do are gone a moment later.
        await eventually(lambda: len(self._workers() - before) >= len(before), STEP, "new workers")

    def _workers(self) -> set[str]:
        return set(Path(f"/proc/{self.front.pid}/task/{self.front.pid}/children").read_text().split())

    def _greets(self, name: str) -> bool:
        try:
            self.context = ssl.create_default_context(cafile=self.root)
            with (
                socket.create_connection(("127.0.0.1", self.ports["443"]), STEP) as sock,
                self.context.wrap_socket(sock, server_hostname=name),
            ):
                return True
        except (OSError, ValueError):
            return False

    def _on_our_ports(self, recipe: str) -> str:
        recipe = self._change(recipe).replace("t.example.com", "localhost")
        assert "127.0.0.1:8080" in recipe
        return recipe.replace("127.0.0.1:8080", f"127.0.0.1:{self.port}")

    def _write_nginx(self, files: Path) -> list[str]:
        recipe = self._on_our_ports(BLOCKS["nginx"])
        for directive, file in (("ssl_certificate", "chain.pem"), ("ssl_certificate_key", "key.pem")):
            recipe, count = re.subn(rf"(\b{directive} +)/etc/letsencrypt/\S+;", rf"\g<1>{files}/{file};", recipe)
            assert count == 1
        recipe, count = re.subn(r"\b(listen (?:\[::\]:)?)(80|443)\b", lambda m: m[1] + str(self.ports[m[2]]), recipe)
        assert count == 4
        (files / "pytunnel.conf").write_text(recipe, encoding="utf-8")
        main = Path("/etc/nginx/nginx.conf").read_text(encoding="utf-8")  # Debian's, but for where its own files are
        main = main.replace("include /etc/nginx/sites-enabled/*;", "").replace("/run/nginx.pid", f"{files}/nginx.pid")
        main = main.replace("/var/log/nginx/error.log", "stderr warn").replace("/var/log/nginx/access.log", "off")
        assert "/etc/nginx/conf.d/*.conf" in main
        main = main.replace("/etc/nginx/conf.d/*.conf", f"{files}/pytunnel.conf")
        (files / "nginx.conf").write_text(main, encoding="utf-8")
        nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
        assert nginx, "there is no nginx; apt-get install nginx-light"
        return [nginx, "-e", "stderr", "-c", str(files / "nginx.conf"), "-g", "daemon off;"]

    def _write_caddy(self, files: Path) -> list[str]:
        caddy = shutil.which("caddy")
        assert caddy, "there is no caddy; apt-get install caddy"
        around = f"""{{
            http_port {self.ports["80"]}
            https_port {self.ports["443"]}
            admin unix/{files}/admin
            storage file_system {files}/caddy
            skip_install_trust
        }}
        """
        (files / "Caddyfile").write_text(around + self._on_our_ports(BLOCKS["caddy"]), encoding="utf-8")
        return [caddy, "run", "--config", str(files / "Caddyfile"), "--adapter", "caddyfile"]

    @contextlib.asynccontextmanager
    async def outside(self, host: str = "web.localhost", source: str = VISITOR) -> AsyncIterator[RawVisitor]:
        """A visitor who comes through the front. TLS is taken off on the way, so that it is raw all the same."""

        async def unwrap(near_reader: Reader, near: Writer) -> None:
            try:
                far_reader, far = await asyncio.open_connection(
                    "127.0.0.1", self.ports["443"],
                    ssl=self.context, server_hostname=host, local_addr=(source, 0), limit=CHUNK,
                )  # fmt: skip
            except OSError:
                near.close()
                return
            up = asyncio.create_task(pump(near_reader, far))
            try:
                await pump(far_reader, near)
            finally:
                up.cancel()
                await asyncio.gather(up, return_exceptions=True)
                far.transport.abort()

        async def pump(reader: Reader, writer: Writer) -> None:
            try:
                while data := await reader.read(CHUNK):
                    writer.write(data)
                    await writer.drain()
            except OSError:
                pass  # as an end is one
            finally:
                writer.close()

        tasks: list[asyncio.Task[None]] = []

        def accept(reader: Reader, writer: Writer) -> None:
            tasks.append(asyncio.create_task(unwrap(reader, writer)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=CHUNK)
        async with server, RawVisitor(server.sockets[0].getsockname()[1]) as visitor:
            try:
                yield visitor
            finally:
                visitor.close()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def ask(self, message: bytes, host: str = "web.localhost", source: str = VISITOR, method: str = "GET") -> Any:
        """One request through the front, and its response."""
        async with self.outside(host, source) as visitor:
            await visitor.send(message)
            return await visitor.read_response(method)


def trusting(root: Path, home: Path) -> dict[str, str]:
    """The environment in which Chromium trusts one root more than it does by itself."""
    store, have = home / ".pki" / "nssdb", shutil.which("certutil")
    assert have, "there is no certutil; apt-get install libnss3-tools"
    store.mkdir(parents=True)
    subprocess.run([have, "-d", f"sql:{store}", "-N", "--empty-password"], check=True)
    subprocess.run([have, "-d", f"sql:{store}", "-A", "-n", "root", "-t", "C,,", "-i", root], check=True)
    return {**os.environ, "HOME": str(home)}


def without_front(directory: Path, origin: RawOrigin) -> Tunnel:
    """A server that speaks TLS itself."""
    certificate(directory, 30, ["localhost", "web.localhost"])
    files = ["--cert", str(directory / "chain.pem"), "--key", str(directory / "key.pem")]
    trusted = {"SSL_CERT_FILE": str(directory / "chain.pem")}
    return Tunnel(origin.port, serve_args=files, env=trusted, secure=True, settles=False)


def to_web(*args: Any, **options: Any) -> bytes:
    return request(*args, host=b"web.localhost", **options)


@pytest.fixture(params=["caddy", "nginx"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---------------------------------------------------------------------------------------- The recipes


def test_all_recipes_are_run_here() -> None:
    assert BLOCKS.keys() == {"sh", "caddy", "nginx"}
    assert SECTION.count("```") == 2 * len(BLOCKS)


def test_caddy_lets_go_of_a_connection_before_the_server_does() -> None:
    (seconds,) = re.findall(r"\bkeepalive (\d+)s$", BLOCKS["caddy"], re.MULTILINE)
    assert int(seconds) + 10 < pytunnel.VISITOR_KEEPALIVE


# ---------------------------------------------------------------------------------------- Who called, and what


async def test_what_only_the_front_may_say(kind: str, tmp_path: Path) -> None:
    claims = ["X-Forwarded-For", "X-Real-IP", "X-Forwarded-Host", "X_Forwarded_For", "X_Forwarded_Port"]
    claims += [f"X-Forwarded-{what}" for what in ("Port", "Prefix", "Server", "Ssl", "User")]
    lies = [*((name.encode(), b"192.0.2.1") for name in claims), (b"Forwarded", b"for=192.0.2.1")]
    lies.append((b"X-Forwarded-Proto", b"gopher"))
    async with RawOrigin(response(b"hello")) as origin, Front(kind, tmp_path, origin) as t:
        assert t.ready["url"] == f"https://web.localhost:{t.ports['443']}"
        assert (await t.ask(to_web(headers=lies))).body == b"hello"
        async with t.visitor(source="127.0.0.2") as visitor:  # who knows the server's own port, and is no front
            await visitor.send(to_web(headers=lies))
            assert (await visitor.read_response()).status == 200
        through, past = origin.requests
        for seen, address, scheme in ((through, b"127.0.0.3, 127.0.0.1", b"https"), (past, b"127.0.0.2", b"http")):
            assert seen.value(b"x-forwarded-for") == address
            assert seen.value(b"x-forwarded-proto") == scheme
            assert seen.value(b"x-forwarded-host") == seen.value(b"host") == b"web.localhost"
            assert b"192.0.2.1" not in seen.head


async def test_visitors_are_told_apart(kind: str, tmp_path: Path) -> None:
    async def handle(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(EVENTS + chunk(b"data: 1\n\n"))

    limits = {"serve_args": ["--max-per-address", "3"], "connect_args": ["--allow", VISITOR, "--allow", "127.0.0.4"]}
    async with (
        RawOrigin(handle) as origin,
        Front(kind, tmp_path, origin, **limits) as t,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(3):
            visitor = await stack.enter_async_context(t.outside())
            await visitor.send(to_web())
            assert (await visitor.read_head()).status == 200
        assert (await t.ask(to_web())).status == 429
        async with t.outside(source="127.0.0.4") as other:
            await other.send(to_web())
            assert (await other.read_head()).status == 200
        assert (await t.ask(to_web(), source="127.0.0.5")).status == 403


async def test_names(kind: str, tmp_path: Path) -> None:
    async with (
        RawOrigin(response(b"web")) as web,
        RawOrigin(response(b"api")) as api,
        Front(kind, tmp_path, web) as t,
    ):
        client = await t.start_client(name="api", origin_port=api.port)
        assert (await client.event("ready"))["url"] == f"https://api.localhost:{t.ports['443']}"
        for host, body in (("web.localhost", b"web"), ("api.localhost", b"api"), ("localhost", b"ok\n")):
            assert (await t.ask(request("GET", b"/healthz", host.encode()), host)).body == body


async def test_plain_http_is_sent_to_https(kind: str, tmp_path: Path) -> None:
    async with RawOrigin(response()) as origin, Front(kind, tmp_path, origin) as t:
        for address in ("127.0.0.1", "::1"):
            async with RawVisitor(int(t.ports["80"]), host=address) as visitor:
                await visitor.send(to_web("GET", b"/a?b=%2F"))
                answer = await visitor.read_response()
            assert (answer.status, answer.value(b"location")) == (308, b"https://web.localhost/a?b=%2F")
        assert not origin.requests


async def test_requests_and_responses_pass_as_they_are(kind: str, tmp_path: Path) -> None:
    big = [(b"X-%d" % number, b"x" * 14_000) for number in range(4)]
    own = [(b"Server", b"mine"), (b"Date", b"Mon, 02 Jan 2006 15:04:05 GMT")]
    page = response(
        b"<p>hello</p>" * 100,
        headers=[(b"Content-Type", b"text/html"), (b"ETag", b'"a"'), (b"X-Accel-Redirect", b"/other"), *own, *big],
    )
    async with RawOrigin(page) as origin, Front(kind, tmp_path, origin) as t:
        fields = [(b"api_key", b"1"), (b"Cookie", b"a=1; b=\xff"), (b"Accept-Encoding", b"gzip"), *big[:3]]
        target = b"/a//b/../c%2Fd%7e/?x=%41&y[]=|"
        answer = await t.ask(to_web("GET", target, headers=fields))
        assert (answer.status, answer.body, answer.value(b"etag")) == (200, b"<p>hello</p>" * 100, b'"a"')
        assert [answer.value(name) for name, _ in big] == [value for _, value in big]
        fronts = [b"Caddy"] if kind == "caddy" else []  # its own Server beside that of the local service
        assert sorted(answer.values(b"Server")) == [*fronts, b"mine"]
        assert answer.values(b"Date") == [b"Mon, 02 Jan 2006 15:04:05 GMT"]
        (seen,) = origin.requests
        assert (seen.method, seen.target) == (b"GET", target)
        assert [seen.value(name) for name, _ in fields] == [value for _, value in fields]


# ---------------------------------------------------------------------------------------- Streams


async def test_uploads_are_not_collected_first(kind: str, tmp_path: Path) -> None:
    got, read_on = PatternChecker(), asyncio.Event()

    async def handle(seen: RawRequest, reader: Reader, writer: Writer) -> None:
        if seen.target == b"/unread":
            await read_on.wait()
            return writer.close()
        async for piece in origin.iter_body(seen, reader):
            got.feed(piece)
        writer.write(response(b"%d" % got.offset))

    async with RawOrigin(handle) as origin, Front(kind, tmp_path, origin) as t:
        for framing in ((b"Content-Length", b"%d" % (6 * MiB)), (b"Transfer-Encoding", b"chunked")):
            wrap = chunk if framing[1] == b"chunked" else bytes
            got.offset = 0
            async with t.outside() as visitor:
                await visitor.send(to_web("POST", headers=[framing]) + wrap(pattern(0, 3 * MiB)))
                await eventually(lambda: got.offset == 3 * MiB, STEP, "the first half, before there is a second")
                await visitor.send(wrap(pattern(3 * MiB, 3 * MiB)) + (chunk(b"") if wrap is chunk else b""))
                assert (await visitor.read_response("POST")).body == b"%d" % (6 * MiB)
        async with t.outside() as visitor:
            await visitor.send(to_web("POST", b"/unread", headers=[(b"Content-Length", b"%d" % (256 * MiB))]))
            visitor.timeout, sent = 1.0, 0
            with pytest.raises(WaitFailed, match="room to send"):
                for _ in range(256):
                    await visitor.send(bytes(MiB))
                    sent += MiB
            assert sent < 64 * MiB  # what the sockets on the way hold, and the stream's window
            read_on.set()
        assert "temporary file" not in t.front.output()


async def test_events_come_one_by_one_and_a_visitor_who_leaves_is_missed(kind: str, tmp_path: Path) -> None:
    more: asyncio.Queue[bytes] = asyncio.Queue()
    left = asyncio.Event()

    async def handle(seen: RawRequest, reader: Reader, writer: Writer) -> None:
        wrap, head = (chunk, EVENTS)
        if seen.target == b"/plain":  # a length and no type tell nobody that it is a stream
            wrap, head = (bytes, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        writer.write(head)
        leaving = asyncio.ensure_future(reader.read())
        while not leaving.done():
            coming = asyncio.ensure_future(more.get())
            await asyncio.wait([coming, leaving], return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                writer.write(wrap(coming.result()))
            coming.cancel()
        left.set()
        writer.close()

    async with RawOrigin(handle) as origin, Front(kind, tmp_path, origin) as t:
        for target in (b"/events", b"/plain"):
            async with t.outside() as visitor:
                await visitor.send(to_web("GET", target))
                for text in (b"data: 1\n\n", b"data: 2\n\n"):
                    more.put_nowait(text)
                    await visitor.read_until(text)
            async with asyncio.timeout(STEP):
                await left.wait()
            left.clear()


def upgraded(seen: RawRequest) -> bytes:
    """The answer to an upgrade."""
    key = pytunnel.accept_key(seen.value(b"sec-websocket-key") or b"")
    fields = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " + key
    return b"HTTP/1.1 101 Switching Protocols\r\n" + fields + b"\r\n\r\n"


async def echo(seen: RawRequest, reader: Reader, writer: Writer) -> None:
    """Answer an upgrade, and from then on say what is heard."""
    writer.write(upgraded(seen))
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
    writer.close()


UPGRADE = [
    (b"Connection", b"Upgrade"),
    (b"Upgrade", b"websocket"),
    (b"Sec-WebSocket-Version", b"13"),
    (b"Sec-WebSocket-Key", b"dGhlIHNhbXBsZSBub25jZQ=="),
]


async def test_websockets(kind: str, tmp_path: Path) -> None:
    async with RawOrigin(echo) as origin, Front(kind, tmp_path, origin) as t, t.outside() as visitor:
        await visitor.send(to_web("GET", b"/ws", headers=UPGRADE))
        head = await visitor.read_head()
        assert (head.status, head.value(b"sec-websocket-accept")) == (101, b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
        sending = asyncio.create_task(visitor.send(pattern(0, 4 * MiB)))
        got = PatternChecker()
        while got.offset < 4 * MiB:
            got.feed(await visitor.read_some())
        await sending
        origin_end = origin.connections[0]
        visitor.close()
        await origin.wait_for(lambda: not origin_end.open, STEP, "the visitor's end to come through")


# ---------------------------------------------------------------------------------------- Time

NGINX_DEFAULTS = {"proxy_read_timeout": 60, "proxy_send_timeout": 60, "send_timeout": 60, "keepalive_timeout": 75}
HOUR = 3600.0


def paced(kind: str, port: int, silent: int, pace: int, until: float = HOUR) -> Change:
    """Make a recipe's times, and those that a front has by itself, shorter by `pace`.

    What asks the front on `port` is told by that clock, `until` seconds later, that nobody answers on `silent`.
    """

    def change(recipe: str) -> str:
        units = {"d": 86400, "s": 1}
        recipe = re.sub(r"\b(\d+)([ds])\b", lambda m: f"{int(m[1]) * units[m[2]] * 1000 // pace}ms", recipe)
        later = f"{until * 1000 / pace:.0f}ms"
        if kind == "caddy":
            return f"""{recipe}
                http://127.0.0.1:{port} {{
                    reverse_proxy 127.0.0.1:{silent} {{
                        transport http {{
                            response_header_timeout {later}
                        }}
                    }}
                }}
                """
        defaults = "".join(f"{name} {seconds * 1000 // pace}ms;\n" for name, seconds in NGINX_DEFAULTS.items())
        witness = f"location / {{ proxy_pass http://127.0.0.1:{silent}; proxy_read_timeout {later}; }}"
        return f"{defaults}{recipe}server {{ listen {port}; {witness} }}\n"

    return change


def hasty(pace: int) -> list[str]:
    """The program with its own times shorter by `pace`; those for an answer stay, as the machine is no faster."""
    names = ("PING_INTERVAL", "BODY_TIMEOUT", "STALL_TIMEOUT", "VISITOR_KEEPALIVE")
    return with_limits(**{name: getattr(pytunnel, name) / pace for name in names})


def losses(client: Process) -> list[dict[str, Any]]:
    return [event for event in client.events if event["event"] != "request"]


async def silence(_: RawRequest, reader: Reader, writer: Writer) -> None:
    await reader.read()
    writer.close()


async def test_an_hour_in_which_nothing_is_said(kind: str, tmp_path: Path) -> None:
    after = asyncio.Event()

    async def handle(seen: RawRequest, reader: Reader, writer: Writer) -> None:
        if seen.target == b"/ws":
            return await echo(seen, reader, writer)
        writer.write(EVENTS + chunk(b"data: 1\n\n"))
        await after.wait()
        writer.write(chunk(b"data: 2\n\n") + chunk(b""))

    port = free_port()
    async with (
        RawOrigin(silence) as silent,
        RawOrigin(handle) as origin,
        Front(kind, tmp_path, origin, paced(kind, port, silent.port, 600), command=hasty(600)) as t,
        t.outside() as events,
        t.outside() as talk,
        RawVisitor(port, timeout=20) as clock,
    ):
        await events.send(to_web("GET", b"/events"))
        assert (await events.read_head()).status == 200
        await talk.send(to_web("GET", b"/ws", headers=UPGRADE))
        assert (await talk.read_head()).status == 101
        await clock.send(request(host=b"127.0.0.1"))
        assert (await clock.read_response()).status in (502, 504)  # it is an hour later
        after.set()
        await events.read_until(b"data: 2\n\n")
        await talk.send(b"still there?")
        assert await talk.read_exactly(12) == b"still there?"
        assert losses(t.client) == []


async def test_nginx_without_the_timeouts(tmp_path: Path) -> None:
    """So the hour above means something: an event stream is cut after a minute, and the client's link is not."""
    port = free_port()

    def change(recipe: str) -> str:
        recipe, count = re.subn(r" +proxy_(read|send)_timeout 1d;\n", "", recipe)
        assert count == 2
        return paced("nginx", port, silent.port, 30, 150.0)(recipe)

    async def handle(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(EVENTS)
        await silence(_, reader, writer)

    async with (
        RawOrigin(silence) as silent,
        RawOrigin(handle) as origin,
        Front("nginx", tmp_path, origin, change, command=hasty(30)) as t,
        t.outside() as events,
        RawVisitor(port, timeout=20) as clock,
    ):
        await events.send(to_web("GET", b"/events"))
        assert (await events.read_head()).status == 200
        await clock.send(request(host=b"127.0.0.1"))
        assert await events.read_until_close() == b""
        assert not clock.buffered
        assert (await clock.read_response()).status == 504
        assert losses(t.client) == []


# ---------------------------------------------------------------------------------------- Starting again


async def test_a_front_that_starts_again(kind: str, tmp_path: Path) -> None:
    """The client's link is lost with it, and the streams are not."""
    after, half = asyncio.Event(), 2 * MiB

    async def handle(_: RawRequest, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (2 * half) + pattern(0, half))
        await after.wait()
        writer.write(pattern(half, half))

    async with RawOrigin(handle) as origin, Front(kind, tmp_path, origin) as t, t.visitor() as visitor:
        await visitor.send(to_web())
        await visitor.read_head()
        got = PatternChecker()
        while got.offset < half:
            got.feed(await visitor.read_some())
        await t.stop_front()
        after.set()
        await t.start_front()
        while got.offset < 2 * half:
            got.feed(await visitor.read_some())
        answer = await t.ask(to_web("HEAD"), method="HEAD")
        assert answer.status == 200


async def test_a_front_that_reads_its_configuration_again(kind: str, tmp_path: Path) -> None:
    """As certbot has nginx do it after each renewal: nobody notices."""
    after = asyncio.Event()

    async def handle(seen: RawRequest, reader: Reader, writer: Writer) -> None:
        if seen.target == b"/":
            writer.write(response(b"hello"))
            return
        writer.write(EVENTS + chunk(b"data: 1\n\n"))
        await after.wait()
        writer.write(chunk(b"data: 2\n\n") + chunk(b""))

    async with RawOrigin(handle) as origin, Front(kind, tmp_path, origin) as t, t.outside() as visitor:
        await visitor.send(to_web("GET", b"/events"))
        await visitor.read_until(b"data: 1\n\n")
        await t.reload_front()
        assert (await t.ask(to_web())).body == b"hello"
        after.set()
        await visitor.read_until(b"data: 2\n\n")


# ---------------------------------------------------------------------------------------- A browser

PAGE = b"""<!doctype html><title>waiting</title><script>
const sent = new Uint8Array(3 << 20).fill(7);
const upload = fetch("/upload", {method: "POST", body: sent}).then(answer => answer.text());
const event = new Promise((resolve, reject) => {
    const events = new EventSource("/events");
    events.onmessage = message => resolve(message.data);
    events.onerror = () => reject("events");
});
const word = new Promise((resolve, reject) => {
    const ws = new WebSocket(`wss://${location.host}/ws`);
    ws.onmessage = message => resolve(message.data);
    ws.onerror = () => reject("ws");
});
Promise.all([upload, event, word, isSecureContext])
    .then(all => document.title = all.join(" "), problem => document.title = `failed: ${problem}`);
</script>"""


@pytest.mark.parametrize("kind", ["caddy", "nginx", "nothing"])
async def test_a_browser(kind: str, tmp_path: Path) -> None:
    async def handle(seen: RawRequest, reader: Reader, writer: Writer) -> None:
        if seen.target == b"/upload":
            size = 0
            async for piece in origin.iter_body(seen, reader):
                size += len(piece)
            writer.write(response(b"%d" % size))
        elif seen.target == b"/events":
            writer.write(EVENTS + chunk(b"data: event\n\n"))
        elif seen.target == b"/ws":
            writer.write(upgraded(seen) + b"\x81\x04word")
            await silence(seen, reader, writer)
        else:
            found = seen.target == b"/"
            writer.write(response(PAGE, headers=[(b"Content-Type", b"text/html")]) if found else response(status=404))

    chromium = shutil.which("chromium")
    assert chromium, "there is no chromium; apt-get install chromium"
    async with contextlib.AsyncExitStack() as stack:
        origin = await stack.enter_async_context(RawOrigin(handle))
        if kind == "nothing":
            t = await stack.enter_async_context(without_front(tmp_path, origin))
            root = tmp_path / "chain.pem"
        else:
            t = front = await stack.enter_async_context(Front(kind, tmp_path, origin, settles=False))
            root = front.root
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox"], env=trusting(root, tmp_path / "home")
            )
            page = await browser.new_page()
            await page.goto(f"{t.ready['url']}/")
            await page.wait_for_function("document.title != 'waiting'")
            assert await page.title() == f"{3 << 20} event word true"
            await browser.close()
