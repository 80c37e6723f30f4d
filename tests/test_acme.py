"""Certificates from an authority: pebble, which is made to test ACME clients, with a DNS where every name is this host.

pebble forgets everything when it ends. It refuses nonces at random, here only where a test wants that.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import json
import logging
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import requests
from acme.errors import ClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support import PROGRAM, Process, RawOrigin, RawRequest, eventually, free_port, listens, response, with_limits

import pytunnel
from pytunnel import Acme, Certificates, TunnelError

EMAIL = "you@example.com"
SECONDS = 30.0  # for one order: the library looks once a second whether there is something new


@functools.cache
def own_certificate(directory: Path) -> Path:
    """What pebble and its clients take for the certificate of its own address; the key lies beside it."""
    path, key = directory / "ca.pem", directory / "ca.key"
    names = "subjectAltName=IP:127.0.0.1"
    kind = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=ca")
    command = ["openssl", "req", *kind, "-addext", names, "-keyout", key, "-out", path]
    subprocess.run(command, check=True, capture_output=True)
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


class Authority:
    """pebble, on ports that stay the same when it is started again."""

    def __init__(self, directory: Path, *, validity: int = 90 * 86400, refused: int = 0) -> None:
        """Certificates are valid for so many seconds, and so many percent of all nonces are refused."""
        self.port, self.http_port, self._management = free_port(), free_port(), free_port()
        self._dns, self._dns_management = free_port(), free_port()
        self.url, self.ca = f"https://127.0.0.1:{self.port}/dir", own_certificate(directory)
        self.environment = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": str(refused)}
        self._processes: list[Process] = []
        self._config = directory / "pebble.json"
        config = {
            "listenAddress": f"127.0.0.1:{self.port}",
            "managementListenAddress": f"127.0.0.1:{self._management}",
            "certificate": str(self.ca),
            "privateKey": str(self.ca.with_suffix(".key")),
            "httpPort": self.http_port,
            "tlsPort": 1,
            "domainBlocklist": ["blocked.example.com"],
            "certificateValidityPeriod": validity,
        }
        self._config.write_text(json.dumps({"pebble": config}))

    async def start(self) -> None:
        dns = ["pebble-challtestsrv", "-dns01", f"127.0.0.1:{self._dns}", "-defaultIPv6", "", "-http01", "", "-https01"]
        dns += ["", "-tlsalpn01", "", "-management", f"127.0.0.1:{self._dns_management}"]
        pebble = ["pebble", "-config", str(self._config), "-dnsserver", f"127.0.0.1:{self._dns}"]
        for command, ready in ((dns, "Starting management server"), (pebble, "ACME directory available")):
            self._processes.append(await Process.start(command=command, env=self.environment))
            await self._processes[-1].stdout_line(ready)
        await eventually(lambda: listens(self.port), what="pebble listens")  # it says that it does before

    async def stop(self) -> None:
        while self._processes:
            await self._processes.pop().aclose()

    @property
    def orders(self) -> int:
        """How many it was asked for, in this run."""
        return sum("POST /order-plz " in line for line in self._processes[-1].stdout)

    @property
    def accounts(self) -> int:
        """How many accounts it has."""
        return len({line.rpartition("There are now ")[2] for line in self._processes[-1].stdout if " accounts" in line})

    async def root(self, path: Path) -> Path:
        """Keep the root of what it issues in a file."""
        fetch = ["curl", "-sSf", "--cacert", str(self.ca), f"https://127.0.0.1:{self._management}/roots/0"]
        async with await Process.start(command=fetch) as curl:
            assert await curl.wait() == 0, curl.output()
            return write(path, "\n".join(curl.stdout) + "\n")


@pytest.fixture
async def authority(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Authority]:
    authority = Authority(tmp_path, **getattr(request, "param", {}))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    monkeypatch.setattr(pytunnel, "ACME_BACKOFF", 0.1)
    await authority.start()
    try:
        yield authority
    finally:
        await authority.stop()


class Wanting:
    """An Acme, what it is to get, and who answers the authority."""

    def __init__(self, state: Path, authority: Authority, *hosts: str, **options: Any) -> None:
        self.hosts, self.state, self.certificates = list(hosts), state, Certificates()
        self.acme = Acme(self.certificates, state, EMAIL, authority.url, **options)
        self.challenges: list[str] = []  # what the authority has asked for
        self.answers = True
        self._port = authority.http_port

    async def _answer(self, seen: RawRequest, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = seen.target.decode()
        self.challenges.append(target)
        answer = self.acme.challenge(target) if self.answers else None
        writer.write(response(answer or b"not here", 200 if answer else 404))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Wanting]:
        self.acme.load()
        async with RawOrigin(self._answer, port=self._port):
            self.acme.start(lambda: self.hosts)
            try:
                yield self
            finally:
                await self.acme.close()

    @property
    def files(self) -> dict[str, str]:
        """The certificates that are kept, by host."""
        return {path.stem: path.read_text() for path in self.state.glob("acme/*/*.pem")}

    def failures(self, host: str) -> int:
        """How often in a row the file says that orders for a host have failed, or are under way."""
        (path,) = self.state.glob("acme/*/orders.json")
        count: int = json.loads(path.read_text())["failed"][host][0]
        return count

    async def certificate(self, host: str, not_this: str = "") -> str:
        """The file of a certificate for a host, once it is used."""

        def used() -> bool:
            return self.certificates.find(host) is not None and self.files.get(host, not_this) != not_this

        await eventually(used, SECONDS, f"a certificate for {host}")
        return self.files[host]


def openssl(*words: str | Path, text: str = "") -> str:
    done = subprocess.run(["openssl", *words], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [record for record in caplog.records if record.name == "pytunnel"]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


async def a_warning(caplog: pytest.LogCaptureFixture, text: str, seconds: float = SECONDS) -> str:
    found = await eventually(lambda: [line for line in warnings_of(caplog) if text in line], seconds, text)
    return found[0]


# ---------------------------------------------------------------------------------------- Certificates


async def test_a_certificate_is_issued_and_good_by_openssl(tmp_path: Path, authority: Authority) -> None:
    async with Wanting(tmp_path / "state", authority, "web.t.example.com").running() as wanting:
        text = await wanting.certificate("web.t.example.com")
        root = await authority.root(tmp_path / "root.pem")
    (path,) = (tmp_path / "state").glob("acme/*/*.pem")
    assert path.name == "web.t.example.com.pem"
    assert path.read_text() == text
    verify = ("verify", "-CAfile", root, "-untrusted", path, "-verify_hostname", "web.t.example.com", path)
    assert openssl(*verify).strip() == f"{path}: OK"
    assert openssl("pkey", "-in", path, "-pubout") == openssl("x509", "-in", path, "-noout", "-pubkey")
    assert [stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()] == [0o600] * 3
    assert [stat.S_IMODE(directory.stat().st_mode) for directory in path.parents[:3]] == [0o700] * 3


async def test_two_names_at_once_are_ordered_one_after_the_other(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, running, most = Acme._order, 0, 0

    def counted(self: Acme, host: str) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return order(self, host)
        finally:
            running -= 1

    monkeypatch.setattr(Acme, "_order", counted)
    async with Wanting(tmp_path / "state", authority, "t.example.com").running() as wanting:
        await wanting.certificate("t.example.com")
        wanting.hosts += ["one.t.example.com", "two.t.example.com"]
        wanting.acme.wake()
        assert all(map(wanting.certificates.awaited, wanting.hosts[1:]))  # also the one whose turn is later
        one, two = [await wanting.certificate(f"{name}.t.example.com") for name in ("one", "two")]
    assert most == 1
    assert "DNS:one.t.example.com\n" in openssl("x509", "-noout", "-ext", "subjectAltName", text=one)
    assert openssl("pkey", text=one) != openssl("pkey", text=two)
    assert authority.accounts == 1


async def test_what_is_kept_is_used_and_nothing_is_ordered_again(tmp_path: Path, authority: Authority) -> None:
    async with Wanting(tmp_path / "state", authority, "web.t.example.com").running() as wanting:
        text = await wanting.certificate("web.t.example.com")
    orders = authority.orders
    async with Wanting(tmp_path / "state", authority, "web.t.example.com", "x.t.example.com").running() as again:
        assert again.certificates.names == ["web.t.example.com"]
        assert again.acme._due("web.t.example.com") > time.time() + 50 * 86400
        await again.certificate("x.t.example.com")
        assert again.files["web.t.example.com"] == text
    assert authority.orders == orders + 1


@pytest.mark.parametrize("authority", [{"refused": 20}], indirect=True)
async def test_refused_nonces_keep_nobody_from_a_certificate(tmp_path: Path, authority: Authority) -> None:
    """Whether the library's second try helps, or it takes another order."""
    hosts = ("one.t.example.com", "two.t.example.com")
    async with Wanting(tmp_path / "state", authority, *hosts).running() as wanting:
        for host in hosts:
            await wanting.certificate(host)


async def test_a_certificate_is_renewed_when_a_third_of_its_time_is_left(tmp_path: Path, authority: Authority) -> None:
    late = 0.0
    wanting = Wanting(tmp_path / "state", authority, "web.t.example.com", clock=lambda: time.time() + late)
    async with wanting.running():
        first = await wanting.certificate("web.t.example.com")
        days = (wanting.acme._renewals["web.t.example.com"] - time.time()) / 86400
        assert 90 * (1 - 1.1 / 3) - 0.1 < days < 90 * 2 / 3 + 0.1
        late = 61 * 86400
        wanting.acme.wake()
        second = await wanting.certificate("web.t.example.com", first)
    assert openssl("x509", "-noout", "-serial", text=first) != openssl("x509", "-noout", "-serial", text=second)
    assert len(wanting.acme._issued) <= 1  # a renewal is none of the week's new ones


async def test_authorities_of_short_certificates_are_not_asked_all_the_time(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is wrong, so that what comes is due at once."""
    async with Wanting(tmp_path / "state", authority, "web.t.example.com").running() as wanting:
        first = await wanting.certificate("web.t.example.com")
    monkeypatch.setattr(pytunnel, "ACME_BACKOFF", 100.0)
    late = Wanting(tmp_path / "state", authority, "web.t.example.com", clock=lambda: time.time() + 80 * 86400)
    async with late.running():
        await late.certificate("web.t.example.com", first)
        assert 75 <= late.acme._due("web.t.example.com") - late.acme._clock() <= 125


# ---------------------------------------------------------------------------------------- What goes wrong


async def test_a_challenge_that_fails_is_told_and_tried_again(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    wanting = Wanting(tmp_path / "state", authority, "web.t.example.com")
    wanting.answers = False
    async with wanting.running():
        line = await a_warning(caplog, "404")
        assert line.startswith("no certificate for web.t.example.com: https://127.0.0.1:")
        assert "the next try is in 0 s" in line
        assert "\n" not in line
        assert not wanting.files
        wanting.answers = True
        await wanting.certificate("web.t.example.com")
    assert wanting.failures("web.t.example.com") == 0
    assert len(wanting.challenges) > 1
    assert [wanting.acme.challenge(target) for target in wanting.challenges] == [None] * len(wanting.challenges)


async def test_an_authority_that_is_down_is_tried_again_and_the_old_certificate_stays(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    late = 0.0
    wanting = Wanting(tmp_path / "state", authority, "web.t.example.com", clock=lambda: time.time() + late)
    async with wanting.running():
        first = await wanting.certificate("web.t.example.com")
        await authority.stop()
        late = 61 * 86400
        wanting.acme.wake()
        assert "dir cannot be reached: Connection refused" in await a_warning(caplog, "cannot be reached")
        await eventually(lambda: wanting.failures("web.t.example.com") >= 3, what="tries")
        assert wanting.files == {"web.t.example.com": first}
        assert wanting.certificates.context("web.t.example.com")
        await authority.start()
        await wanting.certificate("web.t.example.com", first)


async def test_an_order_that_is_refused_is_told_and_others_go_on(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with Wanting(tmp_path / "state", authority, "blocked.example.com", "web.t.example.com").running() as wanting:
        await wanting.certificate("web.t.example.com")
        line = await a_warning(caplog, "no certificate for blocked.example.com")
        assert "dir says: Order included an identifier for which issuance is forbidden by policy" in line
        assert list(wanting.files) == ["web.t.example.com"]


@pytest.mark.parametrize("before", range(0, 13, 3))
async def test_waits_double_and_outlive_the_server(
    tmp_path: Path, before: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, directory = "web.t.example.com", tmp_path / "acme" / "127.0.0.1_1_dir"

    now = time.time()

    def acme() -> Acme:
        made = Acme(Certificates(), tmp_path, EMAIL, "http://127.0.0.1:1/dir", lambda: now)
        made.load()
        return made

    pytunnel.write_private(directory / "orders.json", json.dumps({"failed": {host: [before, 0.0]}, "issued": {}}))
    one = acme()
    one.start(lambda: [host])
    assert one._certificates.awaited(host)
    await a_warning(caplog, "no certificate for web.t.example.com: http://127.0.0.1:1/dir cannot be reached")
    await eventually(lambda: not one._certificates.awaited(host), what="nobody waits")
    await one.close()
    assert 0.75 <= (one._due(host) - now) / min(60 * 2**before, 86400) <= 1.25
    assert acme()._failed == {host: (before + 1, one._due(host))}


async def test_a_week_has_so_many_new_certificates(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytunnel, "MAX_NEW_HOSTS", 1)
    late = 0.0
    hosts = ("one.t.example.com", "two.t.example.com")
    async with Wanting(tmp_path / "state", authority, *hosts, clock=lambda: time.time() + late).running() as wanting:
        await wanting.certificate(hosts[0])
        line = await a_warning(caplog, "no more new certificates until")
        assert "1 came within a week (two.t.example.com)" in line
        assert not wanting.certificates.awaited(hosts[1])
    again = Wanting(tmp_path / "state", authority, *hosts, clock=lambda: time.time() + late)
    async with again.running():
        await again.certificate(hosts[0])
        week = again.acme._due(hosts[1]) - time.time()
        assert 7 * 86400 - 60 < week < 7 * 86400
        late = week + 1
        again.acme.wake()
        await again.certificate(hosts[1])
    assert sum("no more new" in line for line in warnings_of(caplog)) == 2


GARBAGE: dict[str, tuple[int, bytes]] = {
    "no JSON": (200, b"<html>"),
    "no object": (200, b"[1]"),
    "null": (200, b"null"),
    "empty": (200, b"{}"),
    "numbers": (200, b'{"newNonce": 5, "newAccount": [], "newOrder": {}}'),
    "not found": (404, b"nothing"),
    "an error": (500, b'{"type": "urn:ietf:params:acme:error:serverInternal", "detail": "a\\u001b[31m\\nb"}'),
    "an odd error": (500, b'{"type": [], "detail": 3}'),
    "redirects": (302, b""),
    "an account": (200, b'{"newNonce": "/", "meta": {"externalAccountRequired": true}}'),
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_an_authority_that_talks_nonsense_costs_a_line(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    status, content = GARBAGE[kind]
    fields = [(b"Location", b"/dir")] if status == 302 else []
    async with RawOrigin(lambda *_: answer(_[2])) as origin:

        async def answer(writer: asyncio.StreamWriter) -> None:
            writer.write(response(content, status, fields))

        acme = Acme(Certificates(), tmp_path, EMAIL, f"http://127.0.0.1:{origin.port}/dir")
        acme.start(lambda: ["web.t.example.com"])
        line = await a_warning(caplog, "no certificate for web.t.example.com: ")
        await acme.close()
    assert line.isprintable()
    assert len(line) < 600
    assert len(warnings_of(caplog)) == 1


async def test_who_stops_does_not_wait_for_an_authority_that_hangs(tmp_path: Path) -> None:
    hangs = asyncio.Event()
    released = asyncio.Event()

    async def hang(*_: object) -> None:
        hangs.set()
        await released.wait()

    async with RawOrigin(hang) as origin:
        acme = Acme(Certificates(), tmp_path, EMAIL, f"http://127.0.0.1:{origin.port}/dir")
        acme.start(lambda: ["web.t.example.com"])
        await hangs.wait()
        assert (awaited := acme._certificates.awaited("web.t.example.com"))
        async with asyncio.timeout(5):
            await acme.close()
        assert awaited.done()
        path = tmp_path / "acme" / f"127.0.0.1_{origin.port}_dir" / "orders.json"
        saved = json.loads(path.read_text())
        assert [count for count, _ in saved["failed"].values()] == [1]  # the authority counts it, too
        released.set()


async def test_an_authority_that_hangs_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytunnel, "ACME_TIMEOUT", 0.2)
    released = asyncio.Event()

    async def hang(*_: object) -> None:
        await released.wait()

    async with RawOrigin(hang) as origin:
        acme = Acme(Certificates(), tmp_path, EMAIL, f"http://127.0.0.1:{origin.port}/dir")
        acme.start(lambda: ["web.t.example.com"])
        await a_warning(caplog, "/dir does not answer; the next try is in ")
        await acme.close()
        released.set()


async def test_a_certificate_that_cannot_be_kept_is_no_reason_to_ask_again_at_once(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytunnel, "ACME_BACKOFF", 60.0)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pytunnel, "write_private", full)
    async with Wanting(tmp_path / "state", authority, "web.t.example.com").running():
        await a_warning(caplog, "No space left on device")
    assert authority.orders == 0  # what cannot be noted is not asked for


def test_what_is_over_is_removed_and_what_cannot_be_used_now_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock may be wrong, or a read fail: a certificate that is lost then is not had again so soon."""
    directory = tmp_path / "acme" / "127.0.0.1_1_dir"
    kept = {
        "now.example.com": certificate("now.example.com", -1, 89),
        "early.example.com": certificate("early.example.com", 1, 89),
        "late.example.com": certificate("late.example.com", -91, -1),
        "broken.example.com": "not a certificate",
        "unreadable.example.com": certificate("unreadable.example.com", -1, 89),
    }
    gone = {
        "old.example.com": certificate("old.example.com", -365, -31),
        "other.example.com": certificate("now.example.com", -1, 89),
    }
    for host, text in (kept | gone).items():
        pytunnel.write_private(directory / f"{host}.pem", text)
    read = Path.read_text

    def read_text(path: Path, *args: Any, **named: Any) -> str:
        if path.stem == "unreadable.example.com":
            raise OSError(24, "Too many open files", str(path))
        return read(path, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        acme = Acme(Certificates(), tmp_path, EMAIL, "http://127.0.0.1:1/dir")
        acme.load()
    assert list(acme._renewals) == acme._certificates.names == ["now.example.com"]
    assert {path.stem: path.read_text() for path in directory.iterdir()} == kept
    pytunnel.write_private(directory / "orders.json", "{}")
    with pytest.raises(TunnelError, match=r"orders\.json is damaged; move it away"):
        acme.load()


def test_a_clock_that_is_wrong_for_a_while_gives_no_second_budget(tmp_path: Path) -> None:
    issued = {f"{number}.example.com": time.time() for number in range(pytunnel.MAX_NEW_HOSTS)}
    path = tmp_path / "acme" / "127.0.0.1_1_dir" / "orders.json"
    pytunnel.write_private(path, json.dumps({"failed": {}, "issued": issued}))
    for slow in (10 * 86400, 0):  # a machine without a clock of its own has booted, and is told the time
        acme = Acme(Certificates(), tmp_path, EMAIL, "http://127.0.0.1:1/dir", lambda slow=slow: time.time() - slow)
        acme.load()
        assert 6 * 86400 < acme._due("new.example.com") - acme._clock() <= 7 * 86400
        acme._save()
        assert json.loads(path.read_text())["issued"] == issued


async def test_what_a_given_certificate_is_for_is_not_ordered_until_that_has_expired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although there was an order for it before; and what has expired and is not wanted any more is let go."""
    given, directory = tmp_path / "given.pem", tmp_path / "acme" / "127.0.0.1_1_dir"
    write(given, certificate("web.example.com", -1, 10))
    for host in ("web.example.com", "gone.example.com", "other.example.com"):
        pytunnel.write_private(directory / f"{host}.pem", certificate(host, -1, 3))
    certificates = Certificates([(given, None)])
    acme = Acme(certificates, tmp_path, EMAIL, "http://127.0.0.1:1/dir", lambda: now)
    now = time.time()
    acme.load()
    ordered: list[str] = []

    async def obtain(host: str) -> None:
        ordered.append(host)
        acme._failed[host] = 1, now + 86400

    monkeypatch.setattr(acme, "_obtain", obtain)
    monkeypatch.setattr(pytunnel.time, "time", lambda: now)
    now += 4 * 86400
    acme.start(lambda: ["web.example.com", "other.example.com"])
    await eventually(lambda: ordered, what="an order")
    await eventually(lambda: certificates.find("gone.example.com") is None, what="the end of the one that is gone")
    assert ordered == ["other.example.com"]
    assert certificates.find("other.example.com")
    assert acme._renewals.keys() == {"web.example.com", "other.example.com"}
    now += 7 * 86400
    acme.wake()
    await eventually(lambda: "web.example.com" in ordered, what="an order in the place of the given one")
    await acme.close()


async def test_orders_that_fail_are_bounded_all_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytunnel, "MAX_ORDERS", 3)
    hosts = [f"{number}.example.com" for number in range(10)]
    acme = Acme(Certificates(), tmp_path, EMAIL, "http://127.0.0.1:1/dir")
    acme.start(lambda: hosts)
    assert "one is made every 72 s" in await a_warning(caplog, "too many orders")
    acme.wake()
    acme.wake()
    assert len(acme._failed) == 3
    assert len([line for line in warnings_of(caplog) if "too many" in line]) == 1
    assert not any(map(acme._certificates.awaited, hosts))
    await acme.close()


def certificate(host: str, begins: float, expires: float) -> str:
    """A certificate with its key; its time is in days from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    begin, end = [datetime.datetime.now(datetime.UTC) + datetime.timedelta(days) for days in (begins, expires)]
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, begin, end)
    signed = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), False).sign(key, hashes.SHA256())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private = key.private_bytes(pem, pkcs8, serialization.NoEncryption())
    return (private + signed.public_bytes(pem)).decode()


# ---------------------------------------------------------------------------------------- serve

DOMAIN = "t.example.com"
NAMES = "import socket; real = socket.getaddrinfo; "  # a client for which example.com is this host
NAMES += "socket.getaddrinfo = lambda host, *rest, **named: "
NAMES += "real('127.0.0.1' if str(host).endswith('.example.com') else host, *rest, **named); "
PROXY = f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import pytunnel; sys.exit(pytunnel.main())"
TOKEN = "0123456789abcdef0123"


class Host:
    """`pytunnel serve --acme` where pebble looks, the client of a tunnel, and visitors."""

    def __init__(self, authority: Authority, directory: Path, domain: str = DOMAIN) -> None:
        self.authority, self.port = authority, authority.http_port
        self.home, self.root = directory / "server", directory / "root.pem"
        self.home.mkdir(exist_ok=True)
        self._domain = domain

    async def serve(self, *more: str) -> Process:
        words = ["--json", "--listen", f"127.0.0.1:{self.port}", "--domain", f"{self._domain}:{self.port}"]
        words += ["--acme", EMAIL, "--acme-directory", self.authority.url, *more]
        environment = {"SSL_CERT_FILE": str(self.authority.ca), "PYTUNNEL_TOKEN": TOKEN}
        command = with_limits(ACME_BACKOFF=0.1)
        server = await Process.start("serve", *words, env=environment, home=self.home, command=command)
        await server.event("listening")
        return server

    async def connect(self, name: str, port: int) -> Process:
        environment = {"SSL_CERT_FILE": str(self.root), "PYTUNNEL_TOKEN": TOKEN, "PYTUNNEL_LOOP": "asyncio"}
        words = ["connect", str(port), "--name", name, "--server", f"https://{DOMAIN}:{self.port}", "--json"]
        return await Process.start(*words, env=environment, command=[sys.executable, "-c", NAMES + PROXY])

    async def curl(self, url: str, *words: str) -> tuple[int, str]:
        """Exit status and output."""
        host, port = url.split("/")[2].split(":")
        where = ["--resolve", f"{host}:{port}:127.0.0.1", "--cacert", str(self.root), "--max-time", "30"]
        async with await Process.start(command=["curl", "-sS", *where, *words, url]) as curl:
            status = await curl.wait(40)
        return status, "\n".join([*curl.stdout, *curl.stderr])

    @property
    def kept(self) -> set[str]:
        return {path.stem for path in self.home.glob("state/acme/*/*.pem")}

    async def wait_kept(self, *hosts: str) -> None:
        await eventually(lambda: self.kept >= set(hosts), SECONDS, f"certificates for {hosts}")


async def test_a_tunnel_has_https_when_its_client_is_there(tmp_path: Path, authority: Authority) -> None:
    """From nothing, and no visitor sees an error: the first one waits for the certificate."""
    host = Host(authority, tmp_path)
    await authority.root(host.root)
    async with RawOrigin(response(b"hello")) as origin, await host.serve() as server:
        async with await host.connect("web", origin.port) as client:
            event = await client.event("ready", SECONDS)
            assert event["url"] == f"https://web.{DOMAIN}:{host.port}"
            assert await host.curl(event["url"]) == (0, "hello")
            assert host.kept == {DOMAIN, f"web.{DOMAIN}"}
            # What a stranger asks for
            orders = authority.orders
            for name in (f"evil.{DOMAIN}", "example.org", f"*.{DOMAIN}", "x" * 255, ""):
                assert "unrecognized name" in await s_client(host.port, name)
            _, said = await host.curl(f"http://evil.{DOMAIN}:{host.port}/.well-known/acme-challenge/x", "-D", "-")
            assert said.startswith("HTTP/1.1 308 ")
            assert await host.curl(event["url"]) == (0, "hello")
            assert authority.orders == orders
            assert host.kept == {DOMAIN, f"web.{DOMAIN}"}
        server.send_signal(signal.SIGTERM)
        assert await server.wait(5) == 0
    verify = ("verify", "-CAfile", host.root, "-untrusted")
    for path in host.home.glob("state/acme/*/*.pem"):
        assert openssl(*verify, path, path).strip() == f"{path}: OK"


async def s_client(port: int, name: str) -> str:
    """What `openssl s_client` says who asks for a name, "" for none."""
    words = ["-servername", name] if name else ["-noservername"]
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", *words]
    async with await Process.start(command=command) as client:
        await client.wait()
        return client.output()


async def test_a_server_that_starts_again_has_its_certificates_at_once(tmp_path: Path, authority: Authority) -> None:
    host = Host(authority, tmp_path)
    await authority.root(host.root)
    async with await host.serve() as server:
        await host.wait_kept(DOMAIN)
        server.send_signal(signal.SIGTERM)
        assert await server.wait(5) == 0
    await authority.stop()
    async with await host.serve():
        status, said = await host.curl(f"https://{DOMAIN}:{host.port}/healthz")
        assert (status, said) == (0, "ok")


async def test_a_bare_address_gets_https_by_names_from_sslip(tmp_path: Path, authority: Authority) -> None:
    host = Host(authority, tmp_path, "203.0.113.7")
    await authority.root(host.root)
    async with await host.serve():
        await host.wait_kept("203-0-113-7.sslip.io")
        assert await host.curl(f"https://203-0-113-7.sslip.io:{host.port}/healthz") == (0, "ok")


async def test_what_the_authority_looks_at_is_told_where_it_is_missing(tmp_path: Path) -> None:
    words = ["--listen", "127.0.0.1:0", "--domain", DOMAIN, "--acme", EMAIL, "--acme-directory", "https://127.0.0.1:1/"]
    async with await Process.start("serve", "--json", *words) as server:
        await server.stderr_line("--acme takes port 80, which is not among --listen")


async def test_a_server_stops_at_once_while_an_authority_hangs(tmp_path: Path) -> None:
    async with RawOrigin(b"never: this does not speak TLS") as silent:
        port = free_port()
        words = ["--listen", f"127.0.0.1:{port}", "--domain", DOMAIN, "--acme", EMAIL]
        directory = f"https://127.0.0.1:{silent.port}/dir"
        async with await Process.start("serve", "--json", *words, "--acme-directory", directory) as server:
            await server.event("listening")
            await silent.wait_for(lambda: silent.connections, SECONDS, "a look at the directory")
            server.send_signal(signal.SIGTERM)
            assert await server.wait(5) == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--acme", EMAIL], "--acme needs to know for what: add --domain with your domain"),
        (["--acme", "you", "--domain", DOMAIN], "'you' is no e-mail address"),
        (["--acme", EMAIL, "--domain", DOMAIN, "--acme-directory", "x"], "'x' is no authority's directory"),
        (["--domain", DOMAIN, "--acme-directory", "https://a.test"], "--acme-directory is about --acme"),
    ],
)
async def test_what_is_missing_is_told_in_a_line(words: list[str], error: str) -> None:
    async with await Process.start("serve", "--listen", "127.0.0.1:0", *words) as server:
        assert await server.wait() == 2
        (line,) = server.stderr
        assert line.startswith(f"error: {error}")


def test_what_is_no_directory_is_told_by_its_status(tmp_path: Path) -> None:
    answer = requests.Response()
    answer.status_code = 404
    directory = Acme(Certificates(), tmp_path, EMAIL, "https://a.test/x")
    assert directory._reason(ClientError(answer)) == "https://a.test/x answers with HTTP status 404; is it a directory?"


async def test_the_missing_extra_is_told_in_a_line() -> None:
    command = [sys.executable, "-c", f"import sys; sys.modules['acme'] = None; {PROXY}"]
    words = ["serve", "--listen", "127.0.0.1:0", "--acme", EMAIL, "--domain", DOMAIN]
    async with await Process.start(*words, command=command) as server:
        assert await server.wait() == 1
        pip = f"{shlex.quote(sys.executable)} -m pip install acme cryptography"
        assert server.stderr == [f"error: --acme needs certbot's library; run: {pip}"]
