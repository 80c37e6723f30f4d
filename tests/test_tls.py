"""TLS on the server: certificates by name, replaced while they are in use, and what else calls such a port."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hmac
import os
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from support import (
    PROGRAM,
    Process,
    RawOrigin,
    RawRequest,
    RawResponse,
    RawVisitor,
    Tunnel,
    eventually,
    free_port,
    parse_response_head,
    pattern,
    request,
    response,
    with_limits,
)

import pytunnel

TOKEN = "test-token-0123456789abcdef0123456789abcdef"
EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


def openssl(*args: str | Path, stdin: bytes = b"", check: bool = True) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("openssl")
    assert program, "these tests make their certificates with the openssl command"
    return subprocess.run([program, *args], input=stdin, check=check, capture_output=True, timeout=30)


@functools.cache
def _made(names: tuple[str, ...], days: int, kind: tuple[str, ...], number: int) -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory(prefix="pytunnel-test-") as directory:
        chain, key = Path(directory, "chain.pem"), Path(directory, "key.pem")
        alternatives = "subjectAltName=" + ",".join(f"DNS:{name}" for name in names)
        subject = ("-subj", f"/CN={number}", *(("-addext", alternatives) if names else ()))
        openssl("req", "-x509", *kind, "-nodes", *subject, "-keyout", key, "-out", chain)
        openssl("x509", "-in", chain, "-signkey", key, "-days", str(days), "-out", chain)  # `req` takes no past days
        return chain.read_bytes(), key.read_bytes()


class Pair:
    """A self-signed certificate and its key in two files; `write` replaces them."""

    def __init__(self, directory: Path, *names: str, days: int = 30, kind: tuple[str, ...] = EC, number: int = 0):
        directory.mkdir(exist_ok=True)
        self.chain, self.key = directory / "chain.pem", directory / "key.pem"
        self.content = _made(names, days, kind, number)
        self.write(*self.content)

    def write(self, chain: bytes | None = None, key: bytes | None = None) -> None:
        for path, data in ((self.chain, chain), (self.key, key)):
            if data is not None:
                fresh = path.with_suffix(".new")
                fresh.write_bytes(data)
                os.replace(fresh, path)

    @property
    def paths(self) -> tuple[Path, Path]:
        return self.chain, self.key

    @property
    def flags(self) -> list[str]:
        return ["--cert", str(self.chain), "--key", str(self.key)]

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.content[0].decode())


@contextlib.asynccontextmanager
async def serving(certificates: pytunnel.Certificates, state: Path, **options: Any) -> AsyncIterator[Any]:
    options = {"listen": [("127.0.0.1", 0)], **options}
    server = pytunnel.TunnelServer(tokens=[TOKEN], state=state, certificates=certificates, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


def sloppy() -> ssl.SSLContext:
    """A client that takes any certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def ask(
    port: int, context: ssl.SSLContext, host: str = "localhost", data: bytes = b"", name: str | None = None
) -> RawResponse:
    """One request over TLS; the answer's body is what came until the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name or host)
    try:
        writer.write(data or request("GET", b"/healthz", host.encode(), [(b"Connection", b"close")]))
        head = parse_response_head(await reader.readuntil(b"\r\n\r\n"))
        head.body = await reader.read(-1)
        return head
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def shown(port: int, name: str | None) -> bytes:
    """The certificate that a visitor gets to see who asks for this name."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=sloppy(), server_hostname=name or "")
    try:
        return ssl.DER_cert_to_PEM_cert(writer.get_extra_info("ssl_object").getpeercert(True)).encode()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def client_hello(name: str | None) -> bytes:
    """What OpenSSL sends first."""
    out = ssl.MemoryBIO()
    end = sloppy().wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        end.do_handshake()
    return out.read()


def in_records(data: bytes, size: int) -> bytes:
    """A record's content in several ones."""
    body = data[5:]
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2) + piece for piece in pieces)


# ---------------------------------------------------------------------------------------- The name asked for


@pytest.mark.parametrize(("name", "found"), [("web.t.example.com", "web.t.example.com"), ("WEB.x.", "web.x"), ("", "")])
@pytest.mark.parametrize("size", [40, 70, 200, 16 * 1024])
def test_a_client_hello_tells_its_name_however_it_is_cut(name: str, found: str, size: int) -> None:
    hello = in_records(client_hello(name or None), size)
    for length in range(len(hello)):
        assert pytunnel.server_name(hello[:length]) is None
    assert pytunnel.server_name(hello) == found
    assert pytunnel.server_name(hello + b"more") == found


def test_a_client_hello_in_crumbs_is_not_looked_at_again_and_again() -> None:
    hello = in_records(client_hello("web.localhost"), 1)
    assert pytunnel.server_name(hello) == pytunnel.server_name(hello[: 6 * pytunnel.MAX_HELLO_RECORDS + 1]) == ""
    assert pytunnel.server_name(hello[: 6 * pytunnel.MAX_HELLO_RECORDS - 1]) is None


@given(st.binary(max_size=300))
def test_any_bytes_have_a_name_or_none(data: bytes) -> None:
    assert pytunnel.server_name(data) in (None, "") or pytunnel.server_name(data).isascii()  # type: ignore[union-attr]


@given(st.data())
def test_a_damaged_client_hello_does_no_harm(data: st.DataObject) -> None:
    hello = bytearray(client_hello("web.t.example.com"))
    for _ in range(data.draw(st.integers(1, 8))):
        hello[data.draw(st.integers(0, len(hello) - 1))] = data.draw(st.integers(0, 255))
    name = pytunnel.server_name(bytes(hello))
    assert name is None or (name.isascii() and name == name.lower() and len(name) <= len(hello))


@pytest.mark.parametrize("hello", [b"\x16\x02", b"\x16\x03\x01\xff\xff", b"\x16\x03\x01\x00\x05\x02\x00"])
def test_what_is_no_client_hello_is_not_waited_for(hello: bytes) -> None:
    assert pytunnel.server_name(hello) == ""


# ---------------------------------------------------------------------------------------- Certificates


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path / "pair", "t.example.com", "*.t.example.com", "localhost")


def test_a_certificate_tells_its_names_and_its_end(pair: Pair) -> None:
    certificate = pytunnel.Certificate.load(*pair.paths)
    assert certificate.names == ("t.example.com", "*.t.example.com", "localhost")
    end = openssl("x509", "-in", pair.chain, "-noout", "-enddate").stdout.decode().strip().removeprefix("notAfter=")
    assert certificate.expires == ssl.cert_time_to_seconds(end)


def test_certificate_and_key_may_share_a_file(pair: Pair) -> None:
    for text in (b"".join(pair.content), b"".join(reversed(pair.content))):
        pair.write(text)
        assert pytunnel.Certificate.load(pair.chain).names[0] == "t.example.com"


@pytest.mark.parametrize("kind", [EC, ("-newkey", "rsa:2048"), ("-newkey", "ed25519")], ids=["ec", "rsa", "ed25519"])
def test_keys_of_all_kinds(kind: tuple[str, ...], tmp_path: Path) -> None:
    assert pytunnel.Certificate.load(*Pair(tmp_path / "x", "x.example", kind=kind).paths).names == ("x.example",)


def break_missing(pair: Pair) -> None:
    pair.key.unlink()


def break_garbage(pair: Pair) -> None:
    pair.write(b"garbage")


def break_cut(pair: Pair) -> None:
    pair.write(pair.content[0][:-100])


def break_key_garbage(pair: Pair) -> None:
    pair.write(None, b"garbage")


def break_mismatch(pair: Pair) -> None:
    pair.write(None, _made(("other.example",), 30, EC, 1)[1])


def break_expired(pair: Pair) -> None:
    pair.write(*_made(("t.example.com",), -1, EC, 0))


def break_encrypted(pair: Pair) -> None:
    key = openssl("pkey", "-in", pair.key, "-aes256", "-passout", "pass:secret").stdout
    pair.write(None, key)


def break_weak(pair: Pair) -> None:
    pair.write(*_made(("t.example.com",), 30, ("-newkey", "rsa:1024"), 0))


BROKEN = {
    break_missing: "cannot read .*key.pem: no such file",
    break_garbage: "chain.pem holds no certificate; give",
    break_cut: "chain.pem holds no certificate; give",
    break_key_garbage: "key.pem holds no private key; ",
    break_mismatch: "the key in .*key.pem is not that of the certificate in .*chain.pem",
    break_expired: "chain.pem is not good: certificate has expired; renew it",
    break_encrypted: "key.pem is encrypted; write it without a passphrase: openssl pkey",
    break_weak: "cannot be used: ee key too small",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_bad_pair_is_refused_in_one_line(damage: Any, pair: Pair) -> None:
    damage(pair)
    with pytest.raises(pytunnel.TunnelError, match=BROKEN[damage]) as caught:
        pytunnel.Certificates([pair.paths])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_the_old_one_stays_until_a_good_one_comes(damage: Any, pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    certificates = pytunnel.Certificates([pair.paths])
    before = certificates.context("t.example.com")
    damage(pair)
    caplog.set_level("INFO", "pytunnel")
    for _ in range(5):
        certificates.reload()
        assert certificates.context("t.example.com") is before
    (line,) = [record.getMessage() for record in caplog.records]  # one, however often it is looked at
    assert "stays as it was" in line
    pair.write(*_made(("new.example",), 30, EC, 1))
    for _ in range(3):
        certificates.reload()
    assert certificates.context("new.example") is not before
    assert certificates.names == ["new.example"]
    assert [record.getMessage() for record in caplog.records if "is new" in record.getMessage()] == [
        f"the certificate of {pair.chain} is new (new.example)"
    ]


def test_a_bad_pair_is_not_read_all_the_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long; but maybe only the clock is wrong, or nothing can be opened for now."""
    certificates = pytunnel.Certificates([pair.paths])
    loaded, load, now = 0, pytunnel.Certificate.load, pytunnel.time.time()

    def counted(*paths: Path) -> pytunnel.Certificate:
        nonlocal loaded
        loaded += 1
        return load(*paths)

    monkeypatch.setattr(pytunnel.Certificate, "load", counted)
    monkeypatch.setattr(pytunnel.time, "time", lambda: now)
    for damage, seen in ((break_garbage, 2), (break_mismatch, 2)):
        damage(pair)
        for _ in range(10):
            certificates.reload()
        assert loaded == seen
        loaded = 0
    now += pytunnel.RELOAD + 1
    certificates.reload()
    certificates.reload()
    assert loaded == 1


def test_what_has_not_expired_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    star = Pair(tmp_path / "star", "*.t.example.com")
    short = Pair(tmp_path / "short", "web.t.example.com", days=1, number=1)
    fresh = Pair(tmp_path / "fresh", "web.t.example.com", number=2)
    certificates = pytunnel.Certificates([short.paths])
    put = pytunnel.Certificate.load(*fresh.paths)
    certificates.put(put)
    given = certificates.find("web.t.example.com")
    assert given is not put and given and certificates.is_given("web.t.example.com")
    both = pytunnel.Certificates([short.paths, star.paths])
    later = pytunnel.time.time() + 2 * 86400
    monkeypatch.setattr(pytunnel.time, "time", lambda: later)
    assert certificates.find("web.t.example.com") is put
    assert not certificates.is_given("web.t.example.com")
    found = both.find("web.t.example.com")
    assert found and found.names == ("*.t.example.com",)
    certificates.prune(["web.t.example.com"], later + 60 * 86400)
    assert certificates.find("web.t.example.com") is put
    certificates.prune([], later)
    assert certificates.find("web.t.example.com") is put
    certificates.prune([], later + 60 * 86400)
    assert certificates.find("web.t.example.com") is given  # better than none


def test_half_of_a_new_pair_is_not_told(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    certificates = pytunnel.Certificates([pair.paths])
    chain, key = _made(("new.example",), 30, EC, 1)
    pair.write(chain)
    certificates.reload()
    pair.write(None, key)
    certificates.reload()
    assert certificates.names == ["new.example"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_certificate_is_chosen_by_name(tmp_path: Path) -> None:
    star = Pair(tmp_path / "star", "*.t.example.com", "t.example.com")
    exact = Pair(tmp_path / "exact", "web.t.example.com", number=1)
    other = Pair(tmp_path / "other", "other.example", number=2)
    certificates = pytunnel.Certificates([star.paths, exact.paths])
    put = pytunnel.Certificate.load(*other.paths)
    certificates.put(put)
    contexts = [certificates.context(name) for name in ("t.example.com", "a.t.example.com", "unknown.example", "")]
    assert len(set(contexts)) == 1
    assert certificates.context("web.t.example.com") not in contexts
    assert certificates.context("other.example") is put.context
    assert certificates.find("a.b.t.example.com") is None
    assert certificates.find("unknown.example") is None


def test_what_was_put_is_replaced_and_refuses_others(tmp_path: Path) -> None:
    certificates = pytunnel.Certificates()
    assert certificates.context("web.example") is None
    first = pytunnel.Certificate.load(*Pair(tmp_path / "1", "web.example").paths)
    certificates.put(first)
    assert certificates.find("web.example") == first
    second = pytunnel.Certificate.load(*Pair(tmp_path / "2", "web.example", number=1).paths)
    certificates.put(second)
    assert certificates.find("web.example") == second
    assert certificates.context("other.example") is None
    assert certificates.context("") is None


# ---------------------------------------------------------------------------------------- Visitors


async def test_visitors_see_the_certificate_of_the_name_they_ask_for(tmp_path: Path) -> None:
    first, second = Pair(tmp_path / "1", "localhost"), Pair(tmp_path / "2", "two.localhost", number=1)
    async with serving(pytunnel.Certificates([first.paths, second.paths]), tmp_path) as server:
        assert await shown(server.port, "localhost") == first.content[0]
        assert await shown(server.port, "two.localhost") == second.content[0]
        assert await shown(server.port, "unknown.example") == first.content[0]
        assert await shown(server.port, None) == first.content[0]
        assert (await ask(server.port, first.trust())).body == b"ok\n"


async def test_without_a_certificate_for_it_a_name_is_refused(tmp_path: Path) -> None:
    certificates = pytunnel.Certificates()
    certificates.put(pytunnel.Certificate.load(*Pair(tmp_path / "1", "localhost").paths))
    async with serving(certificates, tmp_path) as server:
        for name in ("unknown.example", ""):
            with pytest.raises(ssl.SSLError, match=r"UNRECOGNIZED_NAME|unrecognized name"):
                await shown(server.port, name)
        await shown(server.port, "localhost")


async def test_visitors_wait_for_a_names_first_certificate(tmp_path: Path) -> None:
    certificates, pair = pytunnel.Certificates(), Pair(tmp_path / "1", "web.localhost")
    async with serving(certificates, tmp_path) as server:
        with certificates.expected("web.localhost"):
            waiting = [asyncio.ensure_future(ask(server.port, pair.trust(), "web.localhost")) for _ in range(3)]
            with pytest.raises(ssl.SSLError):
                await shown(server.port, "other.localhost")  # nobody waits for this one
            done, _ = await asyncio.wait(waiting, timeout=0.2)
            assert not done
            certificates.put(pytunnel.Certificate.load(*pair.paths))
        assert [answer.status for answer in await asyncio.gather(*waiting)] == [404] * 3  # there is no such tunnel
        with certificates.expected("none.localhost"):
            waiting = [asyncio.ensure_future(shown(server.port, "none.localhost"))]
            await asyncio.wait(waiting, timeout=0.2)
        with pytest.raises(ssl.SSLError, match=r"UNRECOGNIZED_NAME|unrecognized name"):
            await waiting[0]  # it did not come


async def test_a_tunnel_over_tls_and_the_redirect_to_it(tmp_path: Path) -> None:
    """Visitors and the link share a port that speaks both."""
    pair = Pair(tmp_path / "1", "localhost", "web.localhost")
    environment = {"SSL_CERT_FILE": str(pair.chain)}
    body = pattern(0, 3 * 1024 * 1024)
    async with (
        RawOrigin(response(body)) as origin,
        Tunnel(origin.port, env=environment, serve_args=pair.flags, secure=True) as tunnel,
    ):
        url = f"https://web.localhost:{tunnel.port}"
        assert tunnel.ready["url"] == url
        get = request("GET", b"/a?b", b"web.localhost:%d" % tunnel.port, [(b"Connection", b"close")])
        assert (await ask(tunnel.port, pair.trust(), "web.localhost", get)).body == body
        assert origin.requests[0].value(b"X-Forwarded-Proto") == b"https"
        redirect = await plain(tunnel.port, get)
        assert (redirect.status, redirect.value(b"Location")) == (308, url.encode() + b"/a?b")
        assert len(origin.requests) == 1


LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


@contextlib.asynccontextmanager
async def tunnel_over_tls(
    pair: Pair, answer: Any, *serve_args: str, loop: str = "uvloop", **options: Any
) -> AsyncIterator[tuple[RawOrigin, Tunnel]]:
    environment = {"SSL_CERT_FILE": str(pair.chain), "PYTUNNEL_LOOP": loop}
    flags = [*pair.flags, *serve_args]
    async with (
        RawOrigin(answer, read_body=True) as origin,
        Tunnel(origin.port, env=environment, serve_args=flags, secure=True, **options) as tunnel,
    ):
        yield origin, tunnel


@pytest.fixture
def local(tmp_path: Path) -> Pair:
    return Pair(tmp_path / "local", "localhost", "web.localhost")


def get(tunnel: Tunnel, target: bytes = b"/", *fields: tuple[bytes, bytes]) -> bytes:
    return request("GET", target, b"web.localhost:%d" % tunnel.port, [(b"Connection", b"close"), *fields])


@LOOPS
async def test_bytes_are_the_same_whatever_they_cross(loop: str, local: Pair) -> None:
    """A large upload and a large download at once, through a link over TLS that is cut meanwhile."""
    body = pattern(0, 8 * 1024 * 1024)
    async with tunnel_over_tls(local, response(body), loop=loop, relay=True) as (origin, tunnel):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", tunnel.port, ssl=local.trust(), server_hostname="web.localhost"
        )
        head = request("POST", b"/", b"web.localhost", [(b"Connection", b"close")], body)
        tunnel.relay.up.rate = tunnel.relay.down.rate = 16 * 1024 * 1024

        async def upload() -> None:
            writer.write(head)
            await writer.drain()

        uploading = asyncio.ensure_future(upload())
        await origin.wait_for(lambda: origin.bytes_received > len(body) // 4)
        await tunnel.relay.cut("reset")
        answer = parse_response_head(await reader.readuntil(b"\r\n\r\n"))
        got = await reader.readexactly(len(body) // 2)
        await tunnel.relay.cut("reset")
        got += await reader.read(-1)
        await uploading
        assert (answer.status, got == body) == (200, True)
        assert origin.requests[0].body == body
        writer.close()
        await writer.wait_closed()


@LOOPS
async def test_a_protocol_switch_over_tls(loop: str, local: Pair) -> None:
    async def echo(_: RawRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    async with tunnel_over_tls(local, echo, loop=loop) as (_, tunnel):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", tunnel.port, ssl=local.trust(), server_hostname="web.localhost"
        )
        writer.write(request("GET", b"/", b"web.localhost", [(b"Connection", b"Upgrade"), (b"Upgrade", b"x")]))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        data = pattern(0, 1024 * 1024)
        writer.write(data)
        assert await reader.readexactly(len(data)) == data
        writer.close()
        await writer.wait_closed()


@LOOPS
async def test_a_download_ends_well_while_the_server_stops(loop: str, local: Pair) -> None:
    """The drain waits until the kernel has everything, TLS or not."""
    body = pattern(0, 4 * 1024 * 1024)
    async with tunnel_over_tls(local, response(body), loop=loop) as (_, tunnel):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", tunnel.port, ssl=local.trust(), server_hostname="web.localhost"
        )
        writer.write(get(tunnel))
        await reader.readuntil(b"\r\n\r\n")
        start = await reader.readexactly(100_000)
        stopping = asyncio.ensure_future(tunnel.stop_server())
        await tunnel.server.stderr_line("stopping")
        assert start + await reader.read(-1) == body
        assert await stopping == 0
        writer.close()
        await writer.wait_closed()


async def test_who_takes_nothing_is_cut_off_and_who_is_slow_is_not(local: Pair) -> None:
    body = pattern(0, 4 * 1024 * 1024)
    command = with_limits(STALL_TIMEOUT=1.5)
    async with tunnel_over_tls(local, response(body), command=command) as (_, tunnel):
        ends: list[Any] = []
        for _ in range(2):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", tunnel.port))
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            end = local.trust().wrap_bio(incoming, outgoing, server_hostname="web.localhost")
            while True:
                try:
                    end.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await loop.sock_sendall(sock, outgoing.read())
                    incoming.write(await loop.sock_recv(sock, 65536))
            end.write(get(tunnel))
            await loop.sock_sendall(sock, outgoing.read())
            ends.append(sock)
        # Until the one is cut off, the other takes 40 KB at a time, with pauses in which the server's buffers do not
        # move for long.
        while ends[0].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != errno.ECONNRESET:
            assert await loop.sock_recv(ends[1], 40_000)
            await asyncio.sleep(0.1)  # the pace is what this is about
        assert not ends[1].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        for sock in ends:
            sock.close()


async def test_answers_to_what_is_no_request_can_be_read(local: Pair, tmp_path: Path) -> None:
    async with serving(pytunnel.Certificates([local.paths]), tmp_path) as server:
        large = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n"
        assert (await ask(server.port, local.trust(), data=large)).status == 431
        assert (await ask(server.port, local.trust(), data=b"nonsense\r\n\r\n")).status == 400


# ---------------------------------------------------------------------------------------- Plain visitors


async def plain(port: int, data: bytes, method: str = "GET") -> RawResponse:
    async with RawVisitor(port) as visitor:
        await visitor.send(data)
        return await visitor.read_response(method)


@pytest.mark.parametrize(
    ("data", "location"),
    [
        (request("GET", b"/a?b=%2f", b"web.localhost"), b"https://web.localhost:9/a?b=%2f"),
        (request("HEAD", b"/", b"WEB.localhost.:99"), b"https://web.localhost:99/"),
        (request("GET", b"/", b"web.localhost:80"), b"https://web.localhost:9/"),
        (request("GET", b"/", b"web.localhost:443"), b"https://web.localhost/"),
        (request("POST", b"/", b"web.localhost", body=b"x" * 100_000), b"https://web.localhost:9/"),
        (request("OPTIONS", b"*", b"web.localhost"), b"https://web.localhost:9/"),
        (request("GET", b"http://one.localhost:99/x", b"two.localhost"), b"https://one.localhost:99/x"),
        (request("GET", b"//evil.example/", b"web.localhost"), b"https://web.localhost:9//evil.example/"),
        (request("GET", b"/healthz", b"web.localhost"), b"https://web.localhost:9/healthz"),
        (request("GET", b"/metrics", b"t.example.com"), b"https://t.example.com:9/metrics"),
        (request("GET", pytunnel.LINK_PATH.encode(), b"[::1]:99"), b"https://[::1]:99/_pytunnel/link"),
        (request("GET", b"/healthz", b"localhost"), None),
        (request("GET", b"/metrics", b"127.0.0.1"), None),
    ],
)
async def test_who_comes_without_tls_is_sent_to_it(
    data: bytes, location: bytes | None, local: Pair, tmp_path: Path
) -> None:
    """The port asked for stays, as it may be led to ours from anywhere; without one the domain's counts."""
    certificates = pytunnel.Certificates([local.paths])
    for url in ("https://localhost:9", "https://localhost"):
        async with serving(certificates, tmp_path, domain=pytunnel.Origin.from_url(url)) as server:
            answer = await plain(server.port, data, data.split()[0].decode())
            assert answer.status == (308 if location else 200)
            there = location and location.replace(b":9/", b":9/" if ":9" in url else b"/")
            assert answer.value(b"Location") == there


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", b"x\r\n\r\n"])
async def test_a_bad_plain_request_is_sent_nowhere(data: bytes, local: Pair, tmp_path: Path) -> None:
    async with serving(pytunnel.Certificates([local.paths]), tmp_path) as server:
        answer = await plain(server.port, data)
        assert (answer.status, answer.value(b"Location")) == (400, None)


async def test_a_front_may_come_without_tls(local: Pair) -> None:
    async with tunnel_over_tls(local, response(b"ok"), "--trusted-proxy", "127.0.0.1", settles=False) as (_, tunnel):
        answer = await tunnel.get(b"/", [(b"X-Forwarded-For", b"192.0.2.1"), (b"X-Forwarded-Proto", b"https")])
        assert (answer.status, answer.body) == (200, b"ok")


async def test_hsts_is_on_what_comes_over_tls_only(local: Pair, tmp_path: Path) -> None:
    field = b"Strict-Transport-Security"
    own = b"HTTP/1.1 200 OK\r\nStrict-Transport-Security: max-age=1\r\nContent-Length: 0\r\n\r\n"

    async def answer(asked: RawRequest, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(own if asked.target == b"/own" else response(b"ok"))

    async with tunnel_over_tls(local, answer, "--hsts") as (_, tunnel):
        for target, expected in ((b"/", [b"max-age=31536000"]), (b"/own", [b"max-age=1"])):
            got = await ask(tunnel.port, local.trust(), "web.localhost", get(tunnel, target))
            assert got.values(field) == expected
        assert (await ask(tunnel.port, local.trust())).values(field) == [b"max-age=31536000"]
        assert (await tunnel.get()).values(field) == []
    async with serving(pytunnel.Certificates([local.paths]), tmp_path, hsts=0.0) as server:
        assert (await ask(server.port, local.trust())).values(field) == [b"max-age=0"]
    async with serving(pytunnel.Certificates([local.paths]), tmp_path) as server:
        assert (await ask(server.port, local.trust())).values(field) == []


# ---------------------------------------------------------------------------------------- Replaced while in use


@LOOPS
async def test_a_certificate_is_replaced_without_one_failed_request(loop: str, local: Pair) -> None:
    again = [_made(("localhost", "web.localhost"), 30, EC, number) for number in range(1, 5)]
    trust = ssl.create_default_context(cadata="".join(chain.decode() for chain, _ in [local.content, *again]))
    async with tunnel_over_tls(local, response(b"ok"), loop=loop) as (_, tunnel):
        stop, done = asyncio.Event(), 0

        async def visit() -> None:
            nonlocal done
            while not stop.is_set():
                assert (await ask(tunnel.port, trust, "web.localhost", get(tunnel))).body == b"ok"
                done += 1

        async def stay() -> None:
            """One connection outlives all certificates."""
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", tunnel.port, ssl=trust, server_hostname="web.localhost"
            )
            while not stop.is_set():
                writer.write(request("GET", b"/", b"web.localhost"))
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(2)
            writer.close()
            await writer.wait_closed()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(visit())
            tasks.create_task(stay())
            for number, content in enumerate(again):
                local.write(*content)
                await tunnel.server.stderr_line("is new")
                assert await shown(tunnel.port, "localhost") == content[0], number
                await eventually(lambda before=done: done > before + 5, 30.0, "visits")  # type: ignore[misc]
            stop.set()


def test_what_expires_soon_is_told_once_a_day(pair: Pair, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    soon = Pair(pair.chain.parent, "t.example.com", days=3)
    certificates = pytunnel.Certificates([soon.paths])
    for _ in range(3):
        certificates.reload()
    now = pytunnel.time.time() + pytunnel.REMIND + 1
    monkeypatch.setattr(pytunnel.time, "time", lambda: now)
    certificates.reload()
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition("chain.pem ")[2].split(";")[0] for line in lines] == [
        "expires in 3.0 days",
        "expires in 2.0 days",
    ]


# ---------------------------------------------------------------------------------------- Other programs


async def run(*command: str | Path, stdin: bytes = b"") -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(20):
        output, _ = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace")


async def test_openssl_and_curl_accept_it(local: Pair) -> None:
    async with tunnel_over_tls(local, response(b"fine")) as (_, tunnel):
        at, ca = f"127.0.0.1:{tunnel.port}", ("-CAfile", local.chain, "-verify_return_error")
        for version in ("-tls1_2", "-tls1_3"):
            status, text = await run(
                "openssl", "s_client", "-connect", at, "-servername", "web.localhost",
                "-verify_hostname", "web.localhost", *ca, version, "-alpn", "h2,http/1.1", "-ign_eof",
                stdin=get(tunnel),
            )  # fmt: skip
            assert status == 0
            assert "Verify return code: 0 (ok)" in text
            assert "ALPN protocol: http/1.1" in text
            assert text.count("HTTP/1.1 200 OK") == 1 and "fine" in text
        for version in ("-tls1", "-tls1_1"):
            status, text = await run("openssl", "s_client", "-connect", at, version, "-cipher", "ALL:@SECLEVEL=0")
            assert status == 1
            assert "alert protocol version" in text
        for weak in ("AES128-SHA", "AES256-GCM-SHA384", "ECDHE-ECDSA-AES128-SHA256", "ECDHE-RSA-AES128-SHA"):
            status, text = await run("openssl", "s_client", "-connect", at, "-tls1_2", "-cipher", f"{weak}:@SECLEVEL=0")
            assert (status, "handshake failure" in text) == (1, True), weak
        status, text = await run("openssl", "s_client", "-connect", at, "-tls1_2", stdin=b"R\n")
        assert "no renegotiation" in text
        resolve = ("--resolve", f"web.localhost:{tunnel.port}:127.0.0.1")
        url = f"https://web.localhost:{tunnel.port}/"
        assert await run("curl", "-sS", "--cacert", local.chain, *resolve, url) == (0, "fine")
        away = ("-sSL", "--cacert", local.chain, *resolve, url.replace("https", "http"))
        assert await run("curl", *away) == (0, "fine")  # by the redirect


async def test_a_client_needs_to_trust_the_server(local: Pair) -> None:
    async with tunnel_over_tls(local, response(b"ok")) as (_, tunnel):
        client = await tunnel.start_client("--max-retries", "1", name="other", env={"SSL_CERT_FILE": os.devnull})
        assert await client.wait() == 5
        assert [line for line in client.stderr if "certificate" in line]
        tunnel.scheme = "http"
        client = await tunnel.start_client("--max-retries", "1", name="other")
        assert await client.wait() == 5
        assert [line for line in client.stderr if "redirects" in line]


# ---------------------------------------------------------------------------------------- Strangers


def old_hello(minor: int) -> bytes:
    """A ClientHello of TLS 1.0 or 1.1 without extensions."""
    body = bytes((3, minor)) + bytes(32) + b"\0" + b"\0\4\0\x2f\0\x35" + b"\1\0"
    return b"\x16\3\1" + (len(body) + 4).to_bytes(2) + b"\1" + len(body).to_bytes(3) + body


HELLO = client_hello("web.localhost")
SCANS = {
    "nothing": b"",
    "half a hello": HELLO[: len(HELLO) // 2],
    "a hello and no more": HELLO,
    "garbage in a record": b"\x16\3\1\0\x40" + bytes(range(64)),
    "a long record": b"\x16\3\1\xff\xff" + bytes(1000),
    "a hello without end": b"\x16\3\1\x40\0\1\xff\xff\xff" + bytes(16380) + (b"\x16\3\1\x40\0" + bytes(16384)) * 20,
    "no ASCII in the name": HELLO.replace(b"web.localhost", b"web.\xff\xfe\x00alho"),
    "escapes in the name": HELLO.replace(b"web.localhost", b"\x1b[31m\n\r\r\r\r\r\r"),
    "TLS 1.0": old_hello(1),
    "TLS 1.1": old_hello(2),
    "SSL 2": b"\x80\x2e\1\0\2\0\x15\0\0\0\x10" + bytes(40),
    "a record of data": b"\x17\3\3\0\5hello",
    "garbage after the hello": HELLO + b"\x16\3\3\0\5hello" * 10,
    "an alert after the hello": HELLO + b"\x15\3\3\0\2\2\x50",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "SSH": b"SSH-2.0-scan\r\n",
    "a byte": b"\x16",
    "NULs": bytes(100),
}


@LOOPS
async def test_what_scanners_send_leaves_no_trace(loop: str, local: Pair) -> None:
    flags = ["serve", "--listen", "127.0.0.1:0", *local.flags, "--token", TOKEN, "--json"]
    async with await Process.start(
        *flags, env={"PYTUNNEL_LOOP": loop}, command=with_limits(HEAD_TIMEOUT=0.5)
    ) as server:
        port = (await server.event("listening"))["port"]
        for name, data in SCANS.items():
            for leave in ("abort", "close", "write_eof", "stop_reading"):
                async with RawVisitor(port) as visitor:
                    with contextlib.suppress(ConnectionError):
                        await visitor.send(data)
                        getattr(visitor, leave)()
                        if leave == "write_eof":
                            assert not (await visitor.read_until_close()).startswith(b"HTTP/1.1 2"), name
        assert (await ask(port, local.trust())).status == 200
        lines = [line for line in server.stderr if "bad request from" not in line]
        assert lines == []  # the harness looks for tracebacks; this is about lines as well


async def test_half_handshakes_are_bounded_as_connections_are(local: Pair, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pytunnel, "HEAD_TIMEOUT", 3.0)
    async with (
        serving(pytunnel.Certificates([local.paths]), tmp_path, max_each=8) as server,
        contextlib.AsyncExitStack() as stack,
    ):
        visitors = [await stack.enter_async_context(RawVisitor(server.port)) for _ in range(30)]
        for number, visitor in enumerate(visitors):
            with contextlib.suppress(ConnectionError):
                await visitor.send(HELLO[:100] if number < 8 else HELLO)
        for visitor in visitors[8:]:  # at once
            assert await visitor.read_until_close() == b""
        assert server._gate.open <= 8
        async with RawVisitor(server.port, source="127.0.0.2") as other:
            await other.send(HELLO)
            assert (await other.read_exactly(1)) == b"\x16"  # it goes on with the handshake
        for visitor in visitors[:8]:
            assert await visitor.read_until_close() == b""  # when the time for it is over
        assert (await ask(server.port, local.trust())).status == 200


async def test_who_is_one_too_many_is_told_so_without_tls_only(local: Pair, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pytunnel, "REFUSAL_LINGER", 60.0)  # who reads and leaves does not wait for its end
    async with (
        serving(pytunnel.Certificates([local.paths]), tmp_path, max_each=1) as server,
        RawVisitor(server.port) as first,
    ):
        await first.send(HELLO[:100])
        async with RawVisitor(server.port) as visitor:
            await visitor.send(request("GET", b"/", b"localhost"))
            assert b"HTTP/1.1 429 " in await visitor.read_until_close()
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await ask(server.port, local.trust())


def test_a_protocol_with_a_small_buffer_gets_everything() -> None:
    class Small(asyncio.BufferedProtocol):
        got = b""
        buffer = bytearray(10)

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, nbytes: int) -> None:
            self.got += self.buffer[:nbytes]

    protocol = Small()
    transport = pytunnel.SecureTransport(protocol, pytunnel.Certificates(), pytunnel.Metrics())
    transport._deliver(bytes(range(95)))
    assert protocol.got == bytes(range(95))


async def test_an_address_has_so_many_handshakes(
    local: Pair, tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pytunnel, "MAX_SECURED", 3)
    monkeypatch.setattr(pytunnel, "SECURE_RATE", 1e-6)
    caplog.set_level("INFO", "pytunnel")
    async with serving(pytunnel.Certificates([local.paths]), tmp_path) as server:
        for _ in range(3):
            assert (await ask(server.port, local.trust())).status == 200
        for _ in range(3):
            with pytest.raises((ConnectionError, ssl.SSLError)):
                await ask(server.port, local.trust())
        async with RawVisitor(server.port, source="127.0.0.2") as other:
            await other.send(HELLO)
            assert (await other.read_exactly(1)) == b"\x16"
    assert len([record for record in caplog.records if "TLS handshake" in record.getMessage()]) == 1
    async with serving(pytunnel.Certificates([local.paths]), tmp_path, trusted_proxies=["127.0.0.1"]) as server:
        for _ in range(6):
            assert (await ask(server.port, local.trust())).status == 200


async def test_a_tls_record_that_breaks_the_rules_ends_the_connection(local: Pair, tmp_path: Path) -> None:
    async with serving(pytunnel.Certificates([local.paths]), tmp_path) as server:
        sock = socket.create_connection(("127.0.0.1", server.port))
        with sock:
            sock.settimeout(5)
            tls = await asyncio.to_thread(local.trust().wrap_socket, sock, server_hostname="localhost")
            raw = socket.socket(fileno=tls.detach())
            with raw:
                raw.settimeout(5)
                raw.sendall(b"\x17\3\3\0\x20" + bytes(32))
                await asyncio.to_thread(drain, raw)
        assert (await ask(server.port, local.trust())).status == 200


class Records:
    """A visitor of TLS 1.3 who makes its records by hand once the handshake is done."""

    def __init__(self, visitor: RawVisitor, directory: Path) -> None:
        self._visitor, self._log = visitor, directory / "keys"

    async def shake_hands(self) -> None:
        context = sloppy()
        context.keylog_filename = str(self._log)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        end = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                end.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._visitor.send(outgoing.read())
                header = await self._visitor.read_exactly(5)
                incoming.write(header + await self._visitor.read_exactly(int.from_bytes(header[3:])))
        await self._visitor.send(outgoing.read())
        cipher = end.cipher()
        assert cipher and cipher[0] == "TLS_AES_256_GCM_SHA384"
        lines = self._log.read_text().splitlines()
        self._use(next(bytes.fromhex(line.split()[2]) for line in lines if line.startswith("CLIENT_TRAFFIC_SECRET_0 ")))

    def _use(self, secret: bytes) -> None:
        self._secret, self._number = secret, 0
        self._key, self._iv = AESGCM(self._expand(b"key", 32)), int.from_bytes(self._expand(b"iv", 12))

    def _expand(self, label: bytes, length: int) -> bytes:
        """HKDF-Expand-Label (RFC 8446 section 7.1), of one block."""
        label = b"tls13 " + label
        info = length.to_bytes(2) + bytes([len(label)]) + label + b"\0"
        return hmac.digest(self._secret, info + b"\1", "sha384")[:length]

    def record(self, content: bytes, kind: int = 23) -> bytes:
        header = b"\x17\3\3" + (len(content) + 17).to_bytes(2)
        nonce = (self._iv ^ self._number).to_bytes(12)
        self._number += 1
        return header + self._key.encrypt(nonce, content + bytes([kind]), header)

    def key_update(self) -> bytes:
        """One that asks for the other end's."""
        update = self.record(b"\x18\0\0\1\1", 22)
        self._use(self._expand(b"traffic upd", 48))
        return update


@pytest.mark.parametrize("size", [1, 30, 10_000])
async def test_records_without_data_are_few(size: int, local: Pair, tmp_path: Path, monkeypatch: Any) -> None:
    """A KeyUpdate takes as long as a record full of data; OpenSSL would take any number of them at once."""
    monkeypatch.setattr(pytunnel, "EMPTY_RATE", 1e-6)
    got, answered = 0, asyncio.Event()
    receive, deliver = pytunnel.SecureTransport._receive, pytunnel.SecureTransport._deliver

    def received(self: pytunnel.SecureTransport, data: bytes) -> None:
        for start in range(0, len(data), size):
            if not self.is_closing():
                receive(self, data[start : start + size])

    def delivered(self: pytunnel.SecureTransport, data: bytes) -> None:
        nonlocal got
        got += len(data)
        deliver(self, data)
        answered.set()

    monkeypatch.setattr(pytunnel.SecureTransport, "_receive", received)
    monkeypatch.setattr(pytunnel.SecureTransport, "_deliver", delivered)
    ask_for = request("GET", b"/healthz", b"localhost")
    async with serving(pytunnel.Certificates([local.paths]), tmp_path) as server, RawVisitor(server.port) as visitor:
        records = Records(visitor, tmp_path)
        await records.shake_hands()
        await visitor.send(b"".join(records.key_update() for _ in range(20)) + records.record(ask_for))
        await answered.wait()
        await visitor.send(b"".join(records.key_update() for _ in range(20)) + records.record(ask_for))
        with contextlib.suppress(ConnectionError):
            await visitor.read_until_close()
        assert got == len(ask_for)
        assert (await ask(server.port, local.trust())).status == 200


class Generous(asyncio.Protocol):
    """Answers whatever comes with more than the kernel takes, and closes."""

    def __init__(self) -> None:
        self.closed, self.lost = asyncio.Event(), asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def may_secure(self) -> bool:
        return True

    def data_received(self, data: bytes) -> None:
        self.transport.write(bytes(16 * 1024 * 1024))
        self.transport.close()
        self.closed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


class Ending(Generous):
    """Ends its half of the connection, and waits for the other one."""

    def data_received(self, data: bytes) -> None:
        self.transport.write_eof()

    def eof_received(self) -> None:
        self.closed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        assert exc is None
        self.lost.set()


async def test_the_peers_goodbye_after_ours_is_an_end(local: Pair) -> None:
    """OpenSSL has an error for it."""
    protocol = Ending()
    certificates = pytunnel.Certificates([local.paths])
    make = functools.partial(pytunnel.SecureTransport, protocol, certificates, pytunnel.Metrics())
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)

    def visit() -> None:
        with (
            socket.create_connection(server.sockets[0].getsockname()) as sock,
            local.trust().wrap_socket(sock, server_hostname="localhost") as visitor,
        ):
            visitor.send(b"x")
            assert visitor.recv(1) == b""
            visitor.unwrap().close()

    await asyncio.to_thread(visit)
    await protocol.closed.wait()
    await protocol.lost.wait()
    server.close()


async def test_last_bytes_that_nobody_takes_are_not_kept(local: Pair, monkeypatch: Any) -> None:
    monkeypatch.setattr(pytunnel, "STALL_TIMEOUT", 0.2)
    protocol = Generous()
    certificates = pytunnel.Certificates([local.paths])
    make = functools.partial(pytunnel.SecureTransport, protocol, certificates, pytunnel.Metrics())
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    with socket.create_connection(server.sockets[0].getsockname()) as sock:
        visitor = await asyncio.to_thread(local.trust().wrap_socket, sock, server_hostname="localhost")
        with visitor:
            visitor.send(b"x")
            await protocol.closed.wait()
            assert not protocol.lost.is_set()
            await protocol.lost.wait()
    server.close()


def drain(sock: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        while sock.recv(65536):
            pass


# ---------------------------------------------------------------------------------------- The command


async def test_it_listens_on_all_that_is_asked_for(local: Pair) -> None:
    flags = ["--listen", "127.0.0.1:0", "--listen", "[::1]:0", *local.flags, "--token", TOKEN, "--json"]
    async with await Process.start("serve", *flags) as server:
        ports = [(await server.event("listening", host=host))["port"] for host in ("127.0.0.1", "::1")]
        assert (await ask(ports[0], local.trust())).status == 200
        async with RawVisitor(ports[1], host="::1") as visitor:
            await visitor.send(request("GET", b"/x", b"localhost:%d" % ports[1]))
            assert (await visitor.read_response()).value(b"Location") == b"https://localhost:%d/x" % ports[1]


async def test_a_port_that_is_taken_is_told_and_the_other_let_go(local: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, other = taken.getsockname()[1], free_port()
        flags = ["--listen", f"127.0.0.1:{other}", "--listen", f"127.0.0.1:{port}", *local.flags]
        async with await Process.start("serve", *flags) as server:
            assert await server.wait() == 1
            (line,) = [line for line in server.stderr if line.startswith("error: ")]
            assert f"cannot listen on 127.0.0.1:{port}: address already in use" in line


@pytest.mark.parametrize(
    ("flags", "status", "text"),
    [
        (
            ["--cert", "CHAIN", "--cert", "CHAIN", "--key", "KEY"],
            2,
            "there are 2 of --cert and 1 of --key; give a key for each",
        ),
        (["--key", "KEY"], 2, "there are 0 of --cert and 1 of --key"),
        (["--cert", "CHAIN"], 1, "chain.pem holds no private key; give the file that has it with --key"),
        (["--cert", "CHAIN", "--key", "CHAIN"], 1, "chain.pem holds no private key"),
        (["--cert", "nowhere.pem"], 1, "cannot read nowhere.pem: no such file or directory"),
        (["--hsts"], 2, "--hsts is about TLS; give a certificate with --cert"),
        (["--cert", "CHAIN", "--key", "KEY", "--hsts", "-1"], 2, "--hsts"),
    ],
)
async def test_wrong_flags_are_told_in_one_line(flags: list[str], status: int, text: str, local: Pair) -> None:
    words = [{"CHAIN": str(local.chain), "KEY": str(local.key)}.get(word, word) for word in flags]
    async with await Process.start("serve", "--listen", "127.0.0.1:0", *words) as server:
        assert await server.wait() == status
        (line,) = server.stderr
        assert line.startswith("error: ") and text in line


async def test_names_without_a_certificate_are_told(local: Pair) -> None:
    flags = ["serve", "--listen", "127.0.0.1:0", *local.flags, "--domain", "t.example.com"]
    async with await Process.start(*flags) as server:
        await server.stderr_line("no certificate is for *.t.example.com")
        await server.stderr_line("lead that here, or give --domain t.example.com:")
        await server.stderr_line("--server https://t.example.com")


async def test_who_names_the_port_of_the_domain_hears_nothing_of_it(local: Pair) -> None:
    flags = ["serve", "--listen", "127.0.0.1:0", *local.flags, "--domain", "t.example.com:443"]
    async with await Process.start(*flags) as server:
        await server.stderr_line("--server https://t.example.com")
        assert not [line for line in server.stderr if "lead that here" in line]


# ---------------------------------------------------------------------------------------- systemd and certbot

README = (PROGRAM.parent / "README.md").read_text(encoding="utf-8")
UNIT = re.search(r"^```ini\n(\[Unit\]\n.*?)^```", README, re.MULTILINE | re.DOTALL)
EXEC = re.findall(r"^ExecStart=.*$", README, re.MULTILINE)
HOOK = re.search(r"^```sh\n(#!/bin/sh\nset -eu\nstate=.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("command", EXEC)
async def test_systemd_takes_the_unit(command: str, tmp_path: Path) -> None:
    assert UNIT and len(EXEC) == 3
    text = UNIT[1].replace(EXEC[0], command).replace("/opt/pytunnel/venv/bin/pytunnel", "/bin/true")
    unit = tmp_path / "pytunnel.service"
    unit.write_text(text, encoding="utf-8")
    assert await run("systemd-analyze", "verify", "--recursive-errors=no", "--man=no", unit) == (0, "")
    status, text = await run("systemd-analyze", "security", "--offline=yes", "--threshold=30", "--no-pager", unit)
    assert status == 0, text  # an exposure of 3.0 at most, of 10


async def test_certbots_hook_hands_the_files_over(local: Pair, tmp_path: Path) -> None:
    assert HOOK
    state, lineage = tmp_path / "state", tmp_path / "live"
    state.mkdir()
    lineage.mkdir()
    (lineage / "fullchain.pem").write_bytes(local.content[0])
    (lineage / "privkey.pem").write_bytes(local.content[1])
    script = tmp_path / "hook"
    script.write_text(HOOK[1].replace("/var/lib/private/pytunnel", str(state)), encoding="utf-8")
    assert await run("env", f"RENEWED_LINEAGE={lineage}", "sh", script) == (0, "")
    assert sorted(path.name for path in state.iterdir()) == ["cert.pem", "key.pem"]
    assert {path.stat().st_mode & 0o777 for path in state.iterdir()} == {0o600}
    assert pytunnel.Certificates([(state / "cert.pem", state / "key.pem")]).names == ["localhost", "web.localhost"]
