"""Tokens: who may use a server and how much of it, what becomes of a revoked one, and that nobody sees one."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import pty
import re
import stat
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support import PROGRAM, Process, RawOrigin, RawRequest, RawResponse, RawVisitor, eventually, free_port, request
from test_cli import OTHER_TOKEN, TOKEN, origin, run, serving, start, visit

import pytunnel
from pytunnel import Grant, Refused, Tokens, TunnelError, UsageError, Verifier, client_proof, key_id

LIMITS = {"max_tunnels": 3, "max_requests": 7}
MESSAGE = b"hello and challenge"


def read_grants(tokens: Tokens) -> list[pytunnel.Grant]:
    """All that a server would take from the files now."""
    tokens.read()
    return [*tokens.default_grant(), *tokens.labelled.values()]


def tokens_in(home: Path) -> Tokens:
    """The tokens of a server with this home."""
    return Tokens(home / "state")


def add(home: Path, label: str, *names: str, max_tunnels: int = 64, max_requests: int = 512) -> str:
    return tokens_in(home).add(label, names, max_tunnels, max_requests)


# ---------------------------------------------------------------------------------------- The file


def test_the_file_has_what_proves_a_token_and_not_the_token(tmp_path: Path) -> None:
    token = add(tmp_path, "laptop", "web", **LIMITS)
    path = tmp_path / "state" / "tokens.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert token not in path.read_text()
    tokens = tokens_in(tmp_path)
    (grant,) = read_grants(tokens)
    assert (grant.label, grant.key, grant.names) == ("laptop", key_id(token), ("web",))
    assert (grant.max_tunnels, grant.max_requests) == (3, 7)
    proof, signature = client_proof(token, grant.verifier.salt, grant.verifier.iterations, MESSAGE)
    assert grant.verifier.accepts(proof, MESSAGE)
    assert grant.verifier.signature(MESSAGE) == signature


def test_a_thief_of_the_file_cannot_log_in(tmp_path: Path) -> None:
    """Whatever is in there, taken for ClientKey or for the token itself, makes no proof."""
    add(tmp_path, "laptop")
    (saved,) = json.loads((tmp_path / "state" / "tokens.json").read_text())["tokens"]
    verifier = Grant.from_json(saved).verifier
    loot = [verifier.stored_key, verifier.server_key, base64.b64decode(saved["salt"]) * 2, bytes(32)]
    for secret in loot:
        signature = pytunnel._digest(verifier.stored_key, MESSAGE)
        assert not verifier.accepts(pytunnel._xor(secret, signature), MESSAGE)
        assert not verifier.accepts(secret, MESSAGE)
    for text in (str(value) for value in saved.values()):
        proof, _ = client_proof(text, verifier.salt, verifier.iterations, MESSAGE)
        assert not verifier.accepts(proof, MESSAGE)


def test_each_token_has_a_salt_of_its_own(tmp_path: Path) -> None:
    add(tmp_path, "one")
    add(tmp_path, "two")
    one, two = read_grants(tokens_in(tmp_path))
    assert len(one.verifier.salt) == 16
    assert one.verifier.salt != two.verifier.salt


VERIFIER = Verifier(b"salt", 4096, bytes(32), bytes(32))
SOUND = Grant("laptop", "0123456789abcdef", VERIFIER, ("web",), 1, 1, "2025").as_json()
DAMAGE: dict[str, object] = {
    "label": "no label",
    "key": None,
    "salt": "not base64!",
    "iterations": 0,
    "stored_key": base64.b64encode(b"short").decode(),
    "server_key": "",
    "names": "web",
    "max_tunnels": "9",
    "max_requests": True,
    "made": None,
}


def test_the_sample_of_a_token_is_sound() -> None:
    assert Grant.from_json(SOUND).as_json() == SOUND
    assert set(DAMAGE) == set(SOUND)


@pytest.mark.parametrize("field", [field for field in DAMAGE if field not in ("key", "made")])
def test_a_damaged_entry_is_no_token(field: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Grant.from_json({**SOUND, field: DAMAGE[field]})
    with pytest.raises(KeyError):
        Grant.from_json({key: value for key, value in SOUND.items() if key != field})


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"tokens": [], "revoked": 5}', '{"tokens": [5], "revoked": []}', "\udcff", "[" * 9999]
)
def test_a_damaged_file_has_no_tokens(tmp_path: Path, content: str) -> None:
    path = tmp_path / "state" / "tokens.json"
    path.parent.mkdir()
    path.write_text(content, errors="surrogateescape")
    path.chmod(0o600)
    for use in (tokens_in(tmp_path).read, tokens_in(tmp_path).make_default, lambda: add(tmp_path, "x")):
        with pytest.raises(TunnelError, match=f"{re.escape(str(path))} is damaged; move it away, and add its tokens"):
            use()
    assert path.read_text(errors="surrogateescape") == content
    assert not (tmp_path / "state" / "token").exists()


async def test_a_damaged_file_is_one_line_when_serve_starts(tmp_path: Path) -> None:
    pytunnel.write_private(tmp_path / "state" / "tokens.json", "{}")
    for given in ([], ["--token", TOKEN]):
        result = await run("serve", "--listen", "127.0.0.1:0", *given, home=tmp_path)
        assert (result.status, result.stdout, len(result.stderr)) == (1, [], 1), result
        assert "is damaged; move it away" in result.error


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o602, 0o644])
@pytest.mark.parametrize("name", ["tokens.json", "token", "client.json"])
def test_a_file_that_others_have_access_to_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    add(tmp_path, "laptop")
    path = tmp_path / "state" / name
    pytunnel.write_private(tmp_path / "state" / "token", TOKEN)
    pytunnel.Memory(path.parent).remember("http://localhost:1", TOKEN)

    def use() -> object:
        return pytunnel.Memory(path.parent) if name == "client.json" else read_grants(tokens_in(tmp_path))

    use()
    path.chmod(mode)
    with pytest.raises(TunnelError, match=re.escape(f"; run: chmod 600 {path}")):
        use()


async def test_such_a_file_is_one_line_on_the_command_line(tmp_path: Path) -> None:
    add(tmp_path, "laptop")
    for name, args in ("tokens.json", ["serve"]), ("token", ["serve"]), ("client.json", ["connect", "3000"]):
        path = tmp_path / "state" / name
        path.touch()
        path.chmod(0o640)
        result = await run(*args, home=tmp_path)
        assert (result.status, result.stdout, len(result.stderr)) == (1, [], 1), result
        assert result.error == f"error: other users have access to {path}; run: chmod 600 {path}"
        path.unlink()


def test_what_root_writes_is_the_directory_owner_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when `sudo pytunnel token add` writes for a service that has a user of its own."""
    given = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", lambda descriptor, uid, gid: given.append((uid, gid)))
    status = os.stat_result((0o40700, 1, 1, 1, 4711, 4712, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda path, **_: status if path == tmp_path else os.stat(path))
    pytunnel.write_private(tmp_path / "token", TOKEN)
    assert given == [(4711, 4712)]
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    pytunnel.write_private(tmp_path / "token", TOKEN)
    assert len(given) == 1, "whoever is not root may not give files away"


def test_a_link_that_lies_in_the_way_is_not_written_through(tmp_path: Path) -> None:
    """Else the owner of the directory could have root overwrite any file, and give it to them."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / f".token.{os.getpid()}").symlink_to(tmp_path / "victim")
    pytunnel.write_private(tmp_path / "token", TOKEN)
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "token").read_text() == TOKEN


async def test_of_tokens_that_are_added_at_once_none_is_lost(tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import pytunnel; from pathlib import Path\n" + (
        f"for n in range(10): pytunnel.Tokens(Path({str(tmp_path / 'state')!r})).add(sys.argv[1] + str(n), [], 1, 1)"
    )
    command = [sys.executable, "-c", script]
    results = await asyncio.gather(*(run(label, command=command) for label in "abcd"))
    assert [result.stderr for result in results] == [[]] * 4
    tokens = tokens_in(tmp_path)
    tokens.read()
    assert set(tokens.labelled) == {f"{label}{n}" for label in "abcd" for n in range(10)}


# ---------------------------------------------------------------------------------------- token add, list, revoke


async def test_a_token_is_printed_once_and_listed_without(tmp_path: Path) -> None:
    added = await run("token", "add", "laptop", home=tmp_path)
    assert (added.status, len(added.stdout), len(added.stderr)) == (0, 1, 2)
    (token,) = added.stdout
    assert re.fullmatch(r"[0-9a-f]{40}", token)
    assert str(tmp_path / "state") in added.stderr[0] and token not in "".join(added.stderr)
    flags = ["--name", "web", "--name", "api", "--max-tunnels", "2", "--max-requests", "9", "--json"]
    added = await run("token", "add", "ci.job-1_x", *flags, home=tmp_path)
    other = json.loads(added.stdout[0])
    assert other["label"] == "ci.job-1_x" and len(other["token"]) == 40
    listed = await run("token", "list", home=tmp_path)
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert (listed.status, listed.stderr) == (0, [])
    assert listed.stdout == [
        f"laptop  any name  {pytunnel.MAX_TUNNELS} tunnels, {pytunnel.MAX_STREAMS} requests  made {today}",
        f"ci.job-1_x  web, api  2 tunnels, 9 requests  made {today}",
    ]
    listed = await run("token", "list", "--json", home=tmp_path)
    assert token not in "".join(listed.stdout) and other["token"] not in "".join(listed.stdout)
    row = json.loads(listed.stdout[1])
    assert row.pop("made").startswith(today)
    assert row == {"label": "ci.job-1_x", "names": ["web", "api"], "max_tunnels": 2, "max_requests": 9}
    revoked = await run("token", "revoke", "laptop", home=tmp_path)
    assert (revoked.status, revoked.stdout, len(revoked.stderr)) == (0, [], 1)
    assert [grant.label for grant in read_grants(tokens_in(tmp_path))] == ["ci.job-1_x"]
    assert token not in (tmp_path / "state" / "tokens.json").read_text()


async def test_a_list_of_nothing_says_how_there_comes_to_be_something(tmp_path: Path) -> None:
    listed = await run("token", "list", home=tmp_path)
    assert (listed.status, listed.stdout, len(listed.stderr)) == (0, [], 1)
    assert "pytunnel token add" in listed.stderr[0]
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["add", "laptop"], "there is a token 'laptop'; choose another label, or revoke that one first"),
        (["add", "default"], "choose another one"),
        (["add", "two words"], "'two words' is not a label: use up to 64 letters, digits, hyphens, dots and _"),
        (["add", "x" * 65], "is not a label"),
        (["add", "\u00e9"], "is not a label"),
        (["add", "x\x1b[2J"], "is not a label"),
        (["add"], "write pytunnel token add LABEL"),
        (["add", "x", "--name", "web"], "the name 'web' is reserved for the token 'laptop'; choose another one"),
        (["add", "x", "--name", "WEB"], "'WEB' is not allowed as a name"),
        (["add", "x", "--max-tunnels", "0"], "--max-tunnels"),
        (["add", "x", "--max-requests", "many"], "--max-requests"),
        (["revoke", "labtop"], "no token is called 'labtop'; there are: laptop"),
        (["revoke"], "write pytunnel token revoke LABEL"),
        (["revoke", "laptop", "--name", "web"], "are for token add; to change a token, revoke it and add one"),
        (["list", "--max-tunnels", "3"], "are for token add"),
        (["list", "laptop"], "leave the label out"),
        (["add", "x", "--max-requests", "0"], "'0' is no whole number from 1 on"),
        (["remove", "laptop"], "see pytunnel token --help"),
    ],
)
async def test_mistakes_are_one_line(tmp_path: Path, args: list[str], message: str) -> None:
    add(tmp_path, "laptop", "web")
    before = (tmp_path / "state" / "tokens.json").read_bytes()
    result = await run("token", *args, home=tmp_path)
    assert (result.status, result.stdout, len(result.stderr)) == (4 if "WEB" in args else 2, [], 1), result
    assert message in result.error
    assert (tmp_path / "state" / "tokens.json").read_bytes() == before


def test_to_revoke_where_there_is_none_says_where_that_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"no token is called 'x'; there is none in {re.escape(str(tmp_path))}"):
        tokens_in(tmp_path).revoke("x")


# ---------------------------------------------------------------------------------------- The default token


async def test_serve_makes_a_token_only_when_there_is_no_other(tmp_path: Path) -> None:
    kept, tokens = tmp_path / "state" / "token", tokens_in(tmp_path)
    async with serving(tmp_path):
        token = kept.read_text()
    add(tmp_path, "laptop")
    tokens.make_default()
    assert kept.read_text() == token, "both are good"
    listed = (await run("token", "list", home=tmp_path)).stdout
    assert [line.split()[0] for line in listed] == ["default", "laptop"]
    assert "any name  no limits  made 2" in listed[0]
    tokens.revoke("default")
    async with serving(tmp_path):
        assert not kept.exists()
    tokens.revoke("laptop")
    tokens.make_default()
    assert kept.read_text() != token


async def test_the_line_to_paste_of_a_server_with_labels_only(tmp_path: Path) -> None:
    token = add(tmp_path, "laptop")
    async with await start("serve", "--listen", "127.0.0.1:0", home=tmp_path) as server:
        line = await server.stderr_line("pytunnel connect 3000")
        assert line.strip().startswith("PYTUNNEL_TOKEN=… pytunnel connect 3000 --server http://127.0.0.1:")
        assert token not in server.output()


async def test_a_token_that_is_given_stands_in_for_the_default(service: Service) -> None:
    pytunnel.write_private(service.home / "other" / "state" / "token", TOKEN)
    labelled = add(service.home / "other", "laptop")
    state = service.home / "other" / "state"
    server = pytunnel.TunnelServer(tokens=[OTHER_TOKEN], state=state, listen=[("127.0.0.1", 0)])
    await server.start()
    try:
        url = f"http://127.0.0.1:{server.port}"
        for token in (OTHER_TOKEN, labelled):
            await pytunnel.TunnelClient(url, token, []).log_in()
        with pytest.raises(Refused, match="does not know this token"):
            await pytunnel.TunnelClient(url, TOKEN, []).log_in()
    finally:
        await server.close()


# ---------------------------------------------------------------------------------------- Revoked


async def test_a_revoked_token_s_clients_are_cut_off_within_five_seconds_and_no_others(tmp_path: Path) -> None:
    """One of them is in a download, the other link is idle."""
    token, other = add(tmp_path / "server", "laptop"), add(tmp_path / "server", "other")
    begun = asyncio.Event()

    async def endless(_: RawRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
        begun.set()
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(65536))
                await writer.drain()

    async with serving(tmp_path / "server") as server, RawOrigin(endless) as local, origin() as fine:
        args = ["--server", server.url]

        def client(port: int, token: str, name: str) -> Awaitable[Process]:
            home, env = tmp_path / name, {"PYTUNNEL_TOKEN": token}
            return start("connect", str(port), "--name", name, *args, "--json", home=home, env=env)

        async with (
            await client(local.port, token, "busy") as busy,
            await client(fine.port, token, "idle") as idle,
            await client(fine.port, other, "fine") as unaffected,
            RawVisitor(server.port) as visitor,
            RawVisitor(server.port) as patient,
        ):
            for process in (busy, idle, unaffected):
                url = (await process.event("ready"))["url"]
            await visitor.send(request("GET", b"/", f"busy.localhost:{server.port}".encode()))
            await visitor.read_head()
            patient.stop_reading()
            await patient.send(request("GET", b"/", f"busy.localhost:{server.port}".encode()))
            await local.wait_requests(2)
            tokens_in(tmp_path / "server").revoke("laptop")
            async with asyncio.timeout(5):
                assert await asyncio.gather(busy.wait(), idle.wait()) == [3, 3]
                with contextlib.suppress(ConnectionError):
                    await visitor.read_until_close()  # before the content's end, and far from it
            assert "does not know this token" in busy.stderr[-1]
            assert (await visit(url)).body == b"hello"
            assert not [event for event in unaffected.events if event["event"] == "disconnected"]
            gone = await visit(f"http://idle.localhost:{server.port}")
            assert (gone.status, gone.value(b"x-pytunnel-error")) == (404, b"unknown-tunnel")


# ---------------------------------------------------------------------------------------- A server that runs


class Service:
    """A server in this process, whose files of tokens change."""

    def __init__(self, home: Path, server: pytunnel.TunnelServer) -> None:
        self.home, self.server, self.url = home, server, f"http://127.0.0.1:{server.port}"
        self.registry = server._registry
        self.tokens = tokens_in(home)

    def connect(self, target: int | str, token: str, name: str) -> contextlib.AbstractAsyncContextManager[Any]:
        return pytunnel.connect(target, server=self.url, token=token, name=name)

    @contextlib.asynccontextmanager
    async def running(self, port: int, token: str, name: str) -> AsyncIterator[asyncio.Future[None]]:
        """Give the task of a client that has been let in."""
        ready, tunnel = asyncio.Event(), pytunnel.Tunnel(name, pytunnel.Target.parse(f"127.0.0.1:{port}"))
        client = pytunnel.TunnelClient(self.url, token, [tunnel], on_event=lambda *_, **__: ready.set())
        task = asyncio.ensure_future(client.run())
        try:
            async with asyncio.timeout(10):
                await ready.wait()
                yield task
        finally:
            await pytunnel.end_tasks(task)

    async def admitted(self, *labels: str) -> None:
        """Return when the server has seen these tokens, and no other."""
        await eventually(lambda: {grant.label for grant in self.registry.grants.values()} == set(labels), 5)

    async def get(self, name: str) -> RawResponse:
        return await visit(f"http://{name}.localhost:{self.server.port}")


@pytest.fixture
async def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    for name in [name for name in os.environ if name.startswith("PYTUNNEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTUNNEL_STATE_DIR", str(tmp_path / "client"))
    monkeypatch.setenv("PYTUNNEL_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setattr(pytunnel, "TICK", 0.01)
    server = pytunnel.TunnelServer(tokens=[], state=tmp_path / "state", listen=[("127.0.0.1", 0)], hold=0.0)
    await server.start()
    try:
        yield Service(tmp_path, server)
    finally:
        await server.close()
        assert server._watching.done()


async def refused(connecting: contextlib.AbstractAsyncContextManager[Any]) -> Refused:
    """The refusal of a client that may not connect."""
    with pytest.raises(Refused) as caught:
        async with connecting:
            pass
    return caught.value


async def test_a_server_takes_a_token_that_is_added_while_it_runs(service: Service) -> None:
    async with origin() as local:
        assert (await refused(service.connect(local.port, TOKEN, "web"))).code == "token"
        token = add(service.home, "laptop")
        await service.admitted("laptop")
        async with service.connect(local.port, token, "web"):
            assert (await service.get("web")).body == b"hello"


async def test_a_default_that_is_revoked_while_the_server_runs_is_no_good(service: Service) -> None:
    pytunnel.write_private(service.home / "state" / "token", TOKEN)
    await service.admitted("default")
    async with service.connect("127.0.0.1:1", TOKEN, "web"):
        pass
    service.tokens.revoke("default")
    await service.admitted()
    assert (await refused(service.connect("127.0.0.1:1", TOKEN, "web"))).code == "token"


async def test_a_default_that_cannot_be_read_keeps_no_revocation_from_counting(service: Service) -> None:
    pytunnel.write_private(service.home / "state" / "token", TOKEN)
    token = add(service.home, "laptop")
    await service.admitted("default", "laptop")
    (service.home / "state" / "token").chmod(0o644)
    service.tokens.revoke("laptop")
    await service.admitted("default")
    assert (await refused(service.connect("127.0.0.1:1", token, "api"))).code == "token"


@pytest.mark.parametrize("damage", [lambda path: path.write_text("{"), lambda path: path.chmod(0o644)])
async def test_a_file_that_is_damaged_while_the_server_runs_changes_nothing(
    service: Service, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    token = add(service.home, "laptop")
    await service.admitted("laptop")
    path = service.home / "state" / "tokens.json"
    text = path.read_text()
    damage(path)
    await eventually(lambda: "the tokens stay as they were: " in caplog.text, 5)
    async with service.connect("127.0.0.1:1", token, "web"):
        pass
    assert len([line for line in caplog.messages if "stay as they were" in line]) == 1, "one line for one change"
    pytunnel.write_private(path, text)
    add(service.home, "other")
    await service.admitted("laptop", "other")


async def test_a_name_is_for_its_token_only_from_the_start(service: Service) -> None:
    """It was somebody else's, who has it open; and the token may have no other."""
    other, third = add(service.home, "other"), add(service.home, "third")
    await service.admitted("other", "third")
    async with origin() as local:
        async with service.running(local.port, other, "web") as client:
            token = add(service.home, "ci", "web", "api")
            with pytest.raises(Refused, match="the name 'web' is reserved for another token; choose another") as caught:
                await client
            assert caught.value.exit_status == 4
        error = await refused(service.connect(local.port, third, "web"))
        assert "reserved for another token" in str(error)
        error = await refused(service.connect(local.port, token, "mine"))
        assert str(error) == "this token is only for --name web or --name api; not for 'mine'"
        assert (error.code, error.exit_status) == ("name", 4)
        async with service.connect(local.port, token, "web"), service.connect(local.port, other, "mine"):
            assert (await service.get("web")).body == b"hello"
        service.tokens.revoke("ci")
        await service.admitted("other", "third")
        async with service.connect(local.port, third, "web"):
            assert (await service.get("web")).body == b"hello"


async def test_the_names_of_a_revoked_token_are_free(service: Service) -> None:
    """Those of a token that is only not there, as when another one is given, are not."""
    one, two = add(service.home, "one"), add(service.home, "two")
    await service.admitted("one", "two")
    async with service.connect("127.0.0.1:1", one, "web"):
        pass
    assert "belongs to another token" in str(await refused(service.connect("127.0.0.1:1", two, "web")))
    assert (await service.get("web")).value(b"x-pytunnel-error") == b"tunnel-offline"
    service.tokens.revoke("one")
    await service.admitted("two")
    assert (await service.get("web")).value(b"x-pytunnel-error") == b"unknown-tunnel"
    async with service.connect("127.0.0.1:1", two, "web"):
        pass
    names = json.loads((service.home / "state" / "names.json").read_text())["names"]
    assert names == {"web": key_id(two)}


async def test_tunnels_are_limited_over_all_sessions_of_a_token(service: Service) -> None:
    token, other = add(service.home, "kiosk", max_tunnels=2), add(service.home, "other")
    await service.admitted("kiosk", "other")
    async with service.connect("127.0.0.1:1", other, "other"), service.connect("127.0.0.1:1", token, "one"):
        async with service.connect("127.0.0.1:1", token, "two"):
            error = await refused(service.connect("127.0.0.1:1", token, "three"))
            assert (error.code, error.exit_status, error.retry) == ("limit", 4, False)
            assert str(error) == "this token may have 2 tunnels at a time, and it has one, two now"
        await eventually(lambda: len(service.registry.sessions) == 2, 5)
        async with service.connect("127.0.0.1:1", token, "three"):
            pass
    await eventually(lambda: not service.registry.sessions, 5)
    with pytest.raises(Refused, match="may have 2 tunnels at a time, and these are 3"):
        async with pytunnel.connect("a=1", "b=1", "c=1", server=service.url, token=token):
            pass


async def test_a_client_that_takes_its_own_name_over_needs_no_room(service: Service) -> None:
    token = add(service.home, "kiosk", max_tunnels=1)
    await service.admitted("kiosk")
    async with service.running(1, token, "one") as first, service.running(1, token, "one"):
        with pytest.raises(Refused, match="another client with the same token"):
            await first
        assert len(service.registry.sessions) == 1


async def test_requests_are_limited_over_all_sessions_of_a_token_and_released(service: Service) -> None:
    token, other = add(service.home, "kiosk", max_requests=2), add(service.home, "other")
    await service.admitted("kiosk", "other")
    free = asyncio.Event()

    async def answer(_: RawRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await free.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    def ask(name: str) -> bytes:
        return request("GET", b"/", f"{name}.localhost:{service.server.port}".encode())

    async with (
        RawOrigin(answer) as slow,
        origin() as local,
        service.connect(slow.port, token, "one"),
        service.connect(slow.port, token, "two"),
        service.connect(local.port, other, "fine"),
        RawVisitor(service.server.port) as first,
        RawVisitor(service.server.port) as second,
    ):
        await first.send(ask("one"))
        await second.send(ask("two"))
        await slow.wait_requests(2)
        for name in ("one", "two"):
            full = await service.get(name)
            assert (full.status, full.value(b"x-pytunnel-error")) == (503, b"busy")
        assert (await service.get("fine")).status == 200, "another token has its own limit"
        second.close()
        await eventually(lambda: service.registry._requests[key_id(token)] == 1, 5)
        free.set()
        assert (await first.read_response()).body == b"hello"
        assert (await service.get("two")).body == b"hello"
        assert service.registry._requests[key_id(token)] == 0


async def test_a_link_that_takes_nothing_does_not_put_revocation_off(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is queued for it could wait for WRITE_TIMEOUT, which is longer than a revoked token may last."""
    token, stuck = add(service.home, "laptop"), asyncio.Event()

    whole = pytunnel.WebSocket.send

    def send(ws: pytunnel.WebSocket, opcode: pytunnel.Opcode, payload: bytes) -> None:
        if not ws._is_server or opcode != pytunnel.Opcode.BINARY:
            return whole(ws, opcode, payload)
        ws.pause_writing()
        stuck.set()

    await service.admitted("laptop")
    async with service.running(1, token, "web") as client, RawVisitor(service.server.port) as visitor:
        monkeypatch.setattr(pytunnel.WebSocket, "send", send)
        await visitor.send(request("GET", b"/", f"web.localhost:{service.server.port}".encode()))
        await stuck.wait()
        service.tokens.revoke("laptop")
        async with asyncio.timeout(5):
            assert (await visitor.read_response()).value(b"x-pytunnel-error") == b"link-lost"
            with pytest.raises(Refused, match="does not know this token"):
                await client


async def test_a_token_that_is_revoked_just_after_its_handshake_is_cut_off(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = add(service.home, "laptop")
    await service.admitted("laptop")
    whole = pytunnel.TunnelServer._session_for

    async def then_revoked(server: pytunnel.TunnelServer, hello: pytunnel.Message, key: str) -> Any:
        session = await whole(server, hello, key)
        server._registry.admit([])
        return session

    monkeypatch.setattr(pytunnel.TunnelServer, "_session_for", then_revoked)
    async with service.running(1, token, "web") as client:
        with pytest.raises(Refused, match="does not know this token"):
            await client
    assert not service.registry.sessions


async def test_doctor_knows_a_token_that_may_not_have_its_name(service: Service) -> None:
    token = add(service.home, "ci", "web")
    await service.admitted("ci")
    async with contextlib.aclosing(pytunnel.diagnose(service.url, token, [])) as findings:
        found = {finding.what: finding async for finding in findings}
    assert found["login"].ok is None
    assert "the server knows the token" in found["login"].detail and "--name web" in found["login"].detail


# ---------------------------------------------------------------------------------------- Nobody sees a token


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


@pytest.mark.parametrize("written", [["--token", TOKEN], [f"--token={TOKEN}"]], ids=["two words", "one word"])
async def test_ps_does_not_show_the_token_of_server_client_and_detached_client(
    tmp_path: Path, written: list[str]
) -> None:
    async with origin() as local, serving(tmp_path, *written) as server:
        args = ["connect", str(local.port), "--server", server.url, *written, "--name", "web"]
        command = [sys.executable, str(PROGRAM)]
        async with await start(*args, "--", "sh", "-c", "echo ran; read x <&1", "sh", TOKEN, command=command) as client:
            await client.stdout_line("ran")
            shown = command_line(client.pid)
            assert shown[2:6] == args[:4]
            assert TOKEN not in " ".join(shown[: shown.index("--")])
            assert "*" * len(TOKEN) in " ".join(shown), "and it is as long as it was: the rest has not moved"
            assert shown[-1] == TOKEN, "what belongs to the command is not ours to change"
        assert TOKEN not in " ".join(command_line(server.process.pid))
        env = {"PYTUNNEL_TOKEN": OTHER_TOKEN}
        assert (await run(*args, "--detach", home=tmp_path, env=env)).status == 0
        try:
            (note,) = (tmp_path / "state" / "run").glob("*.json")
            pid = int(note.stem)
            shown = command_line(pid)
            assert shown[2:6] == args[:4]
            assert "--token" not in " ".join(shown) and TOKEN not in " ".join(shown) and "*" not in " ".join(shown)
        finally:
            assert (await run("stop", home=tmp_path)).status == 0


async def test_where_it_cannot_be_hidden_a_line_says_so(tmp_path: Path) -> None:
    """As on other systems, where what `ps` shows is a copy."""
    code = f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import pytunnel\n"
    code += "sys.orig_argv = ['not', 'what', 'the', 'system', *sys.argv[1:]]; sys.exit(pytunnel.main())"
    command = [sys.executable, "-c", code]
    url = f"http://127.0.0.1:{free_port()}"
    result = await run("login", url, "--token", TOKEN, home=tmp_path, command=command)
    assert result.status == 5
    warning = "warning: other users of this machine can see the value of --token; use PYTUNNEL_TOKEN or --token-file"
    assert result.stderr[0] == warning
    assert len(result.stderr) == 2


@pytest.mark.parametrize("words", [["--auth", "a:b", "--token=t"], ["--auth=a:b", "--token", "t", "--", "--x", "y"]])
def test_flags_that_cannot_be_hidden_are_told(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", *words])
    assert pytunnel.hide_flags(["--token", "--auth", "--x"]) == ["--auth", "--token"]
    assert pytunnel.hide_flags(["--tok", "--au"]) == []


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["connect", "3000", "--token", "t", "--json"], ["connect", "3000", "--json"]),
        (["connect", "--token=t", "web=3000", "--server=u"], ["connect", "web=3000", "--server=u"]),
        (["--token", "a", "--token-file", "b", "--token=c", "d"], ["d"]),
        (["--tokens", "x", "--token"], ["--tokens", "x"]),
    ],
)
def test_a_command_line_without_its_secrets(words: list[str], kept: list[str]) -> None:
    assert pytunnel.without_flags(words, ("--token", "--token-file")) == kept


@pytest.mark.parametrize(
    "args",
    [
        ["serve", "--token", ""],
        ["connect", "3000", "--token-file="],
        ["serve", "--tok", OTHER_TOKEN],
        ["serve", f"--tok={OTHER_TOKEN}"],
        ["serve", f"--Token={OTHER_TOKEN}"],
        ["connect", "3000", "--toke", OTHER_TOKEN],
        ["connect", "3000", "-token", OTHER_TOKEN],
        ["connect", "--token", OTHER_TOKEN],
        ["connect", "3000", "--token", OTHER_TOKEN, "--token-file", "x"],
        ["connect", "3000", "--token-file", OTHER_TOKEN],
        ["connect", "3000", "--token", f"{OTHER_TOKEN} "],
        ["login", "http://127.0.0.1:1", "--token-file", OTHER_TOKEN, "--debug"],
        ["doctor", "--token", OTHER_TOKEN, "--server", "http://127.0.0.1:1", "--debug"],
        ["connect", "3000", "--token", OTHER_TOKEN, "--server", "http://127.0.0.1:1", "--max-retries", "0", "--debug"],
        ["connect", "3000", "--token", OTHER_TOKEN, "--server", "ftp://x", "--debug"],
        ["config", "--token", OTHER_TOKEN, "--json"],
    ],
)
async def test_no_mistake_shows_a_token(tmp_path: Path, args: list[str]) -> None:
    result = await run(*args, home=tmp_path, expected_complaint="Traceback" if "--debug" in args else "")
    text = "\n".join([*result.stdout, *result.stderr])
    assert text and OTHER_TOKEN not in text, text
    assert result.status == (0 if args[0] == "config" else result.status or 99)
    assert "" not in args or "it is empty" in text


@pytest.mark.parametrize("place", ["client_proof", "key_id", "Inspector"])
async def test_a_crash_does_not_show_a_token(tmp_path: Path, place: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import pytunnel\n"
    command = [sys.executable, "-c", f"{code}pytunnel.{place} = lambda *_, **__: 1 / 0; sys.exit(pytunnel.main())"]
    async with serving(tmp_path, "--token", TOKEN, "--debug") as server:
        args = ["connect", "3000", "--server", server.url, "--token", TOKEN, "--debug"]
        async with await start(*args, command=command) as client:
            client.expected_complaint = "Traceback"
            assert await client.wait() == 1
            assert client.stderr[-1] == "ZeroDivisionError: division by zero"
            assert TOKEN not in "\n".join([*client.stdout, *client.stderr, *server.process.stderr])


async def test_what_the_python_api_gives_does_not_show_it() -> None:
    async with pytunnel.serve(token=TOKEN) as server:
        client = pytunnel.TunnelClient(server.url, TOKEN, [])
        assert TOKEN not in f"{server!r} {client!r} {server.server!r} {server.server._given!r}"
        assert server.url in repr(server)


# ---------------------------------------------------------------------------------------- Where a token comes from


def test_the_token_comes_from_flags_then_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes the strongest of them away."""
    for name in "abc":
        (tmp_path / name).write_text(f"the-token-in-the-file-{name}\nand a remark\n")
    monkeypatch.setenv("PYTUNNEL_TOKEN", TOKEN)
    monkeypatch.setenv("PYTUNNEL_TOKEN_FILE", str(tmp_path / "b"))
    steps: list[tuple[Callable[[], object], dict[str, str | None], tuple[str, str]]] = [
        (lambda: None, {"token": OTHER_TOKEN, "token_file": "nowhere"}, (OTHER_TOKEN, "--token")),
        (lambda: None, {"token_file": str(tmp_path / "a")}, ("the-token-in-the-file-a", "--token-file")),
        (lambda: None, {"token": None, "token_file": None}, (TOKEN, "$PYTUNNEL_TOKEN")),
        (lambda: monkeypatch.delenv("PYTUNNEL_TOKEN"), {}, ("the-token-in-the-file-b", "$PYTUNNEL_TOKEN_FILE")),
        (lambda: monkeypatch.delenv("PYTUNNEL_TOKEN_FILE"), {}, ("", "not set")),
    ]
    for take_away, flags, setting in steps:
        take_away()
        assert pytunnel.Setting.first(pytunnel.given_tokens(flags)) == setting


async def test_a_token_from_a_file_and_from_stdin(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{TOKEN}\n")
    async with serving(tmp_path / "server", "--token-file", str(file)) as server:
        code = 'printf "%s\\nrest\\n" "$SECRET" | { "$0" "$@"; cat; }'
        piped = ["/bin/sh", "-c", code, sys.executable, str(PROGRAM)]
        env, args = {"SECRET": TOKEN}, ["login", server.url, "--token-file", "-"]
        result = await run(*args, home=tmp_path / "client", env=env, command=piped)
        assert (result.status, result.stdout) == (0, ["rest"]), "what follows is left for somebody else"
        assert "knows this token" in result.stderr[0]
        result = await run("login", server.url, "--token-file", "/dev/stdin", env=env, command=piped)
        assert "knows this token" in result.stderr[0]


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff\xff\n", b" \n" + OTHER_TOKEN.encode()])
def test_a_file_without_a_token_is_told_by_its_flag(tmp_path: Path, content: bytes | None) -> None:
    """And not by its name, which may be a token in the wrong place."""
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        pytunnel.read_token(str(path), "--token-file")
    assert str(caught.value).startswith("--token-file: ")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("command", ["serve", "connect 3000", "start", "doctor", "config", "login localhost"])
async def test_every_command_with_a_token_takes_it_from_a_file(tmp_path: Path, command: str) -> None:
    result = await run(*command.split(), "--token-file", "/", home=tmp_path)
    assert (result.status, result.stdout) == (2, [])
    assert result.error == "error: --token-file: is a directory; give a file with the token, or - for stdin"


@pytest.mark.parametrize("command", ["connect", "start"])
async def test_a_missing_token_is_asked_for_on_a_terminal(tmp_path: Path, command: str) -> None:
    """What is typed does not show; Ctrl-D is what no token is elsewhere."""
    async with origin() as local, serving(tmp_path / "server", "--token", TOKEN) as server:
        (tmp_path / "pytunnel.toml").write_text(f'[tunnels.web]\ntarget = "{local.port}"\n')
        args = ["connect", f"web={local.port}"] if command == "connect" else ["start"]
        env = {"PYTUNNEL_STATE_DIR": str(tmp_path / "state"), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        for typed in (TOKEN, ""):
            near, far = pty.openpty()
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, str(PROGRAM), *args, "--server", server.url, cwd=tmp_path, env=env,
                    stdin=far, stdout=asyncio.subprocess.PIPE, stderr=far, start_new_session=True,
                )  # fmt: skip
                os.close(far)
                shown = bytearray()

                def reads(what: bytes, near: int = near, shown: bytearray = shown) -> bool:
                    with contextlib.suppress(BlockingIOError, OSError):
                        shown.extend(os.read(near, 65536))
                    return what in shown

                os.set_blocking(near, False)
                await eventually(lambda: reads(f"token for {server.url}: ".encode()), 10, "the question")
                os.write(near, typed.encode() + b"\n" if typed else b"\x04")
                assert process.stdout
                if typed:
                    url = (await asyncio.wait_for(process.stdout.readline(), 10)).decode().strip()
                    assert (await visit(url)).body == b"hello"
                    process.terminate()
                    await process.wait()
                    assert TOKEN.encode() not in shown
                    (tmp_path / "state" / "client.json").unlink()
                else:
                    await eventually(lambda: reads(b"error: no token for "), 10, "the error")
                    assert await process.wait() == 2
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
                process._transport.close()  # type: ignore[attr-defined]
                os.close(near)
