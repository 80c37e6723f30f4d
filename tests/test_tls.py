"""TLS on the server: certificates by name, replaced while they are in use, and what else calls such a port."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    RawOrigin,
    RawResponse,
    Tunnel,
    parse_response_head,
    pattern,
    request,
    response,
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
@pytest.mark.parametrize("size", [1, 7, 60, 16 * 1024])
def test_a_client_hello_tells_its_name_however_it_is_cut(name: str, found: str, size: int) -> None:
    hello = in_records(client_hello(name or None), size)
    for length in range(len(hello)):
        assert pytunnel.server_name(hello[:length]) is None
    assert pytunnel.server_name(hello) == found
    assert pytunnel.server_name(hello + b"more") == found


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
    break_key_garbage: "chain.pem with the key in .*key.pem cannot be used: ",
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
    for _ in range(5):
        certificates.reload()
        assert certificates.context("t.example.com") is before
    (line,) = [record.getMessage() for record in caplog.records]  # one, however often it is looked at
    assert "stays as it was" in line
    pair.write(*_made(("new.example",), 30, EC, 1))
    certificates.reload()
    assert certificates.context("new.example") is not before
    assert certificates.names == ["new.example"]


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
    put = certificates.put(*other.paths)
    contexts = [certificates.context(name) for name in ("t.example.com", "a.t.example.com", "unknown.example", "")]
    assert len(set(contexts)) == 1
    assert certificates.context("web.t.example.com") not in contexts
    assert certificates.context("other.example") is put.context
    assert certificates.find("a.b.t.example.com") is None
    assert certificates.find("unknown.example") is None


def test_what_was_put_is_replaced_and_refuses_others(tmp_path: Path) -> None:
    certificates = pytunnel.Certificates()
    assert certificates.context("web.example") is None
    first = certificates.put(*Pair(tmp_path / "1", "web.example").paths)
    assert certificates.find("web.example") == first
    second = certificates.put(*Pair(tmp_path / "2", "web.example", number=1).paths)
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
    certificates.put(*Pair(tmp_path / "1", "localhost").paths)
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
            certificates.put(*pair.paths)
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
        plain = await tunnel.get(b"/a?b")
        assert (plain.status, plain.value(b"Location")) == (308, url.encode() + b"/a?b")
        assert len(origin.requests) == 1
