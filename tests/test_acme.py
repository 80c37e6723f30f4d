"""Certificates from an authority: pebble, which is made to test ACME clients, with a DNS where every name is this host.

pebble refuses every twentieth nonce, and forgets everything when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import re
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from support import Process, RawOrigin, RawRequest, WaitFailed, eventually, free_port, response

import pytunnel
from pytunnel import Acme, TunnelError

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


class Authority:
    """pebble, on ports that stay the same when it is started again."""

    def __init__(self, directory: Path, *, validity: int = 90 * 86400) -> None:
        self.port, self.http_port, self._management = free_port(), free_port(), free_port()
        self._dns, self._dns_management = free_port(), free_port()
        self.url, self.ca = f"https://127.0.0.1:{self.port}/dir", own_certificate(directory)
        self.environment = {"PEBBLE_VA_NOSLEEP": "1"}
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

    async def stop(self) -> None:
        while self._processes:
            await self._processes.pop().aclose()

    def issued(self) -> list[str]:
        """The hosts it has made certificates for, in this run."""
        lines = self._processes[-1].stdout
        return [match[1] for line in lines if (match := re.search(r"Order for \[([^]]*)\]|issued .* (\S+)$", line))]

    def output(self) -> str:
        return self._processes[-1].output()

    async def root(self, path: Path) -> Path:
        """Keep the root of what it issues in a file."""
        fetch = ["curl", "-sSf", "--cacert", str(self.ca), f"https://127.0.0.1:{self._management}/roots/0"]
        async with await Process.start(command=fetch) as curl:
            assert await curl.wait() == 0, curl.output()
            path.write_text("\n".join(curl.stdout) + "\n")
        return path


@pytest.fixture
async def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Authority]:
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    monkeypatch.setattr(pytunnel, "ACME_BACKOFF", 0.1)  # a refused nonce costs a try
    await authority.start()
    try:
        yield authority
    finally:
        await authority.stop()


class Wanting:
    """An Acme, what it is to get, and what it has put."""

    def __init__(self, state: Path, authority: Authority, *hosts: str, **options: Any) -> None:
        self.hosts, self.put = list(hosts), dict[str, list[str]]()
        self.acme = Acme(state, authority.url, EMAIL, lambda: self.hosts, self._take, **options)
        self.challenges: list[str] = []  # what the authority has asked for
        self._port, self.answers = authority.http_port, True

    def _take(self, host: str, path: Path) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        self.put.setdefault(host, []).append(path.read_text())

    async def _answer(self, seen: RawRequest, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = seen.target.decode()
        self.challenges.append(target)
        answer = self.acme.challenge(target) if self.answers else None
        writer.write(response(answer or b"not here", 200 if answer else 404))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Wanting]:
        self.acme.load()
        async with RawOrigin(self._answer, port=self._port):
            task = asyncio.ensure_future(self.acme.run())
            try:
                yield self
            finally:
                await pytunnel.end_tasks(task)

    async def certificate(self, host: str, number: int = 1) -> str:
        await eventually(lambda: len(self.put.get(host, [])) >= number, SECONDS, f"certificate {number} for {host}")
        return self.put[host][number - 1]


def openssl(*words: str | Path, text: str = "") -> str:
    done = subprocess.run(["openssl", *words], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def a_warning(caplog: pytest.LogCaptureFixture, text: str, seconds: float = SECONDS) -> str:
    found = await eventually(lambda: [line for line in warnings_of(caplog) if text in line], seconds, text)
    return found[0]


# ---------------------------------------------------------------------------------------- Certificates


async def test_a_certificate_is_issued_and_good_by_openssl(tmp_path: Path, authority: Authority) -> None:
    async with Wanting(tmp_path / "state", authority, "web.t.example.com").running() as wanting:
        text = await wanting.certificate("web.t.example.com")
        root = await authority.root(tmp_path / "root.pem")
    (path,) = (tmp_path / "state").glob("*/*.pem")
    assert path.name == "web.t.example.com.pem"
    assert path.read_text() == text
    verify = ("verify", "-CAfile", root, "-untrusted", path, "-verify_hostname", "web.t.example.com", path)
    assert openssl(*verify).strip() == f"{path}: OK"
    assert openssl("pkey", "-in", path, "-pubout") == openssl("x509", "-in", path, "-noout", "-pubkey")
    assert [stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()] == [0o600] * 3
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
