"""The command line: what goes to stdout, what to stderr, the exit statuses, and where every setting comes from."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import hashlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support import (
    PROGRAM,
    Process,
    RawOrigin,
    RawRequest,
    RawResponse,
    RawVisitor,
    Relay,
    Tunnel,
    eventually,
    free_port,
    request,
    response,
)

from pytunnel import (
    COMMANDS,
    EXAMPLES,
    Console,
    MessageError,
    Origin,
    Refused,
    Target,
    UsageError,
    __version__,
    check_name,
    check_token,
    default_name,
    parse_listen,
    parse_server,
)

TOKEN = "test-token-0123456789abcdef0123456789abcdef"
OTHER_TOKEN = "another-token-0123456789abcdef0123456789ab"
COMMON_FLAGS = ["--help", "--json", "--verbose", "--debug"]
TOKEN_FLAGS = ["--token", "--token-file"]
LINK_FLAGS = ["--server", *TOKEN_FLAGS]
CLIENT_FLAGS = ["--detach", "--no-tui", "--wait-local", "--max-retries", "--no-compress", "--url-file", "--format"]
EDIT_FLAGS = ["--header", "--remove-header", "--response-header", "--remove-response-header"]
FLAGS = {
    "serve": [
        "--listen", "--cert", "--key", "--hsts", "--acme", "--acme-directory", "--domain", "--trusted-proxy", "--grace",
        "--hold", "--drain",
        "--max-body", "--max-per-address", "--metrics-public", "--log-format", "--tcp-ports",
        *TOKEN_FLAGS, *COMMON_FLAGS,
    ],
    "connect": [
        "--name", "--route", "--host-header", "--spa", "--insecure", "--auth", "--allow", "--pass-auth",
        "--remote-port", *LINK_FLAGS, *CLIENT_FLAGS, *EDIT_FLAGS, *COMMON_FLAGS,
    ],
    "start": ["--all", *LINK_FLAGS, *CLIENT_FLAGS, *COMMON_FLAGS],
    "status": COMMON_FLAGS,
    "stop": ["--all", *COMMON_FLAGS],
    "expect": ["--name", "--method", "--path", "--count", "--timeout", "--save", *COMMON_FLAGS],
    "replay": ["--name", "--times", *COMMON_FLAGS],
    "login": [*TOKEN_FLAGS, *COMMON_FLAGS],
    "token": ["--name", "--max-tunnels", "--max-requests", *COMMON_FLAGS],
    "config": [*LINK_FLAGS, *COMMON_FLAGS],
    "doctor": ["--idle", *LINK_FLAGS, *COMMON_FLAGS],
    "demo": ["--listen", "--no-tui", *COMMON_FLAGS],
}  # fmt: skip


@dataclass
class Finished:
    """A process that has ended."""

    status: int
    stdout: list[str]
    stderr: list[str]

    @property
    def error(self) -> str:
        """The one line that begins with `error: `, which is the last one; there is never a traceback."""
        text = "\n".join(self.stderr)
        assert "Traceback" not in text, text
        errors = [line for line in self.stderr if line.startswith("error: ")]
        assert len(errors) == 1 and self.stderr[-1] == errors[0], text
        assert len(errors[0]) < 400, errors[0]
        return errors[0]


async def start(
    *args: str,
    home: Path | None = None,
    env: Mapping[str, str] | None = None,
    command: list[str] | None = None,
) -> Process:
    """Start a process, in a home that may not be there yet."""
    if home is not None:
        os.makedirs(home, exist_ok=True)
    return await Process.start(*args, home=home, env=env, command=command)


async def run(
    *args: str,
    home: Path | None = None,
    env: Mapping[str, str] | None = None,
    command: list[str] | None = None,
    timeout: float = 20.0,
    expected_complaint: str = "",
) -> Finished:
    """Run a command to its end."""
    async with await start(*args, home=home, env=env, command=command) as process:
        process.expected_complaint = expected_complaint
        status = await process.wait(timeout)
        return Finished(status, process.stdout, process.stderr)


@dataclass
class Server:
    """A server of its own and where it listens."""

    process: Process
    port: int
    home: Path
    url: str = field(init=False)

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"


@contextlib.asynccontextmanager
async def serving(home: Path, *args: str, env: Mapping[str, str] | None = None, port: int = 0) -> AsyncIterator[Server]:
    """Run `serve` on a port of its own, for as long as the block lasts."""
    listen = f"127.0.0.1:{port}"
    async with await start("serve", "--listen", listen, "--json", *args, home=home, env=env) as process:
        listening = await process.event("listening")
        yield Server(process, int(listening["port"]), home)


async def visit(url: str, port: int | None = None, target: bytes = b"/") -> RawResponse:
    """GET a public URL. Its host need not resolve: the server is on 127.0.0.1, at the URL's port or another."""
    parts = urlsplit(url)
    async with RawVisitor(port or parts.port or 0) as visitor:
        await visitor.send(request("GET", target, parts.netloc.encode()))
        return await visitor.read_response()


async def url_of(client: Process) -> str:
    """Wait for the public URL on stdout, which is the whole of its line."""
    line = await client.stdout_line("://")
    assert re.fullmatch(r"https?://[a-z0-9.-]+(:[0-9]+)?", line), line
    return line


def origin(body: bytes = b"hello") -> RawOrigin:
    return RawOrigin(response(body))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


# ---------------------------------------------------------------------------------------- Help and version


@pytest.mark.parametrize("command", ["", *FLAGS])
async def test_help_begins_with_examples_and_names_every_flag(command: str) -> None:
    result = await run(*command.split(), "--help")
    assert (result.status, result.stderr) == (0, [])
    usage = next(i for i, line in enumerate(result.stdout) if line.startswith("usage: "))
    examples = [line for line in result.stdout[:usage] if line.startswith(f"  pytunnel {command}".rstrip())]
    assert examples
    assert result.stdout.index(examples[0]) <= 2, "the examples come first, after one line of summary"
    assert result.stdout[usage].startswith(f"usage: pytunnel {command}".rstrip())
    text = "\n".join(result.stdout[usage:])
    for flag in FLAGS.get(command, ["--help", "--version", *FLAGS]):
        assert re.search(rf"(^|[ ,\[]){flag}\b", text), flag
    assert max(map(len, result.stdout)) <= 120


@pytest.mark.parametrize("command", list(FLAGS))
async def test_help_explains_every_flag_that_there_is(command: str) -> None:
    text = "\n".join((await run(command, "--help")).stdout)
    listed = set(re.findall(r"^  (?:-\w(?: \w+)?, )?(--[a-z-]+)", text, re.M))
    assert listed == set(FLAGS[command]), "this test's list of flags is not the program's"
    for match in re.finditer(r"^  (?:-\w, )?--[a-z-]+(?: [A-Z:]+)?(.*)\n(.*)", text, re.M):
        explained = match[1].strip() or match[2].startswith(" " * 8)
        assert explained, match[0]


async def test_help_needs_no_package_and_no_writable_home() -> None:
    result = await run("connect", "--help", command=[sys.executable, "-S", str(PROGRAM)], env={"HOME": "/nonexistent"})
    assert (result.status, result.stderr) == (0, [])


async def test_version() -> None:
    result = await run("--version")
    assert (result.status, result.stdout, result.stderr) == (0, [f"pytunnel {__version__}"], [])


def test_every_subcommand_is_in_this_file_s_list() -> None:
    assert set(COMMANDS) == set(FLAGS) == set(EXAMPLES) - {""}


@pytest.mark.parametrize("command", list(FLAGS))
async def test_the_examples_in_the_help_parse(command: str) -> None:
    """Every example is a command line that gets past the parser."""
    text = "\n".join((await run(command, "--help")).stdout).partition("\nusage: ")[0]
    examples = re.findall(r"^  (?:URL=\$\()?pytunnel (.*?)(?:  .*|\)  .*| [|<].*)?$", text, re.M)
    assert examples
    for example in examples:
        script = (
            "import runpy\n"
            f"parser = runpy.run_path({str(PROGRAM)!r})['_parser']()\n"
            f"print(parser.parse_args({shlex.split(example)!r}).command)\n"
        )
        result = await run(command=[sys.executable, "-c", script])
        assert (result.status, result.stdout) == (0, [command]), (example, result)


# ---------------------------------------------------------------------------------------- stdout is for programs


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_connect_prints_the_url_alone_and_once_and_it_answers(home: Path, loop: str) -> None:
    """Not on a terminal: the URL, on a line of its own, when it works; requests and outages go to stderr."""
    async with origin() as local, serving(home, "--token", TOKEN) as server, Relay(server.port) as relay:
        arguments = ["--server", f"http://127.0.0.1:{relay.port}", "--token", TOKEN, "--name", "web"]
        env = {"PYTUNNEL_LOOP": loop}
        async with await start("connect", str(local.port), *arguments, home=home, env=env) as client:
            url = await url_of(client)
            assert url == f"http://web.localhost:{relay.port}"
            answer = await visit(url, server.port)
            assert (answer.status, answer.body) == (200, b"hello")
            await client.stderr_line(f"{url} -> {local.port}")
            await client.stderr_line("200 GET")
            await relay.cut("reset")
            await client.stderr_line("connected again, nothing lost")
            assert (await visit(url, server.port)).status == 200
            client.send_signal(signal.SIGINT)
            assert await client.wait() == 0
            assert client.stdout == [url]
            assert "Traceback" not in "\n".join(client.stderr)


async def test_connect_several_targets(home: Path) -> None:
    async with origin(b"one") as one, origin(b"two") as two, serving(home, "--token", TOKEN) as server:
        targets = [f"web={one.port}", f"api=localhost:{two.port}", f"http://127.0.0.1:{one.port}"]
        args = ["--server", server.url, "--token", TOKEN]
        async with await start("connect", *targets, *args, home=home) as client:
            urls = [await url_of(client) for _ in targets]
            assert urls[:2] == [f"http://web.localhost:{server.port}", f"http://api.localhost:{server.port}"]
            assert [(await visit(url)).body for url in urls] == [b"one", b"two", b"one"]
            client.send_signal(signal.SIGTERM)
            assert await client.wait() == 0
            assert client.stdout == urls


async def test_connect_unix_socket(home: Path) -> None:
    async with serving(home, "--token", TOKEN) as server:

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(response(b"from a socket", headers=[(b"Connection", b"close")]))
            writer.close()

        path = home / "app.sock"
        listener = await asyncio.start_unix_server(answer, path)
        async with listener:
            args = [f"unix:{path}", "--server", server.url, "--token", TOKEN]
            async with await start("connect", *args, home=home) as client:
                assert (await visit(await url_of(client))).body == b"from a socket"


async def test_serve_writes_nothing_to_stdout_without_json(home: Path) -> None:
    async with await start("serve", "--listen", "127.0.0.1:0", home=home) as server:
        await server.stderr_line("pytunnel connect 3000")
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
        assert server.stdout == []


async def test_a_reader_that_goes_away_does_not_end_the_tunnel(home: Path) -> None:
    """`pytunnel connect … | head -n 1`, with a real head."""
    async with origin() as local, serving(home, "--token", TOKEN) as server:
        args = ["connect", str(local.port), "--server", server.url, "--token", TOKEN, "--name", "web"]
        pipeline = ["/bin/sh", "-c", '"$0" "$@" | head -n 1; echo head has ended >&2', sys.executable, str(PROGRAM)]
        async with await start(*args, home=home, command=pipeline) as client:
            url = await url_of(client)
            for _ in range(3):
                assert (await visit(url)).status == 200
            for _ in range(3):
                await client.stderr_line("200 GET")


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["url", "json"])
async def test_a_closed_stdout_leaves_the_exit_status_alone(home: Path, flags: list[str]) -> None:
    """The reader closes after one line; with --json there is more to print, which then goes nowhere, quietly."""
    async with origin() as local, serving(home, "--token", TOKEN) as server:
        process = await spawn(home, "connect", str(local.port), "--server", server.url, "--token", TOKEN, *flags)
        async with process:
            line = await process.read_line()
            url = json.loads(line)["url"] if flags else line.strip()
            process.close_stdout()
            for _ in range(3):
                assert (await visit(url)).status == 200
            process.process.send_signal(signal.SIGINT)
            status, stderr = await process.finish()
            assert "Traceback" not in stderr and "Exception ignored" not in stderr, stderr
            assert status == 0, stderr


class Spawned:
    """A process whose stdout the test reads, and closes, itself; stderr is a file or a pseudo-terminal."""

    def __init__(self, process: asyncio.subprocess.Process, stdout: int, stderr: Callable[[], str]) -> None:
        self.process = process
        self._stdout = stdout
        self._stderr = stderr

    async def __aenter__(self) -> Spawned:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        self.close_stdout()

    async def read_line(self) -> str:
        line = b""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10):
            while not line.endswith(b"\n"):
                piece = await loop.run_in_executor(None, os.read, self._stdout, 1)
                assert piece, f"stdout ended after {line!r}: {self._stderr()}"
                line += piece
        return line.decode()

    def close_stdout(self) -> None:
        if self._stdout >= 0:
            os.close(self._stdout)
            self._stdout = -1

    async def finish(self) -> tuple[int, str]:
        async with asyncio.timeout(10):
            return await self.process.wait(), self._stderr()


async def spawn(home: Path, *args: str) -> Spawned:
    """Start the program with a pipe of the test's own for stdout and a file for stderr."""
    read_end, write_end = os.pipe()
    path = home / "stderr.txt"
    try:
        with path.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, str(PROGRAM), *args, stdin=subprocess.DEVNULL, stdout=write_end, stderr=stderr,
                env=environment(home), cwd=home,
            )  # fmt: skip
    finally:
        os.close(write_end)
    return Spawned(process, read_end, path.read_text)


def environment(home: Path) -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", ""), "HOME": str(home), "PYTUNNEL_STATE_DIR": str(home / "state")}


# ---------------------------------------------------------------------------------------- --json


async def test_json_events_of_a_client(home: Path) -> None:
    created = response(b"12345", 201, reason=b"Created")
    async with RawOrigin(created, read_body=True) as local, Tunnel(local.port, relay=True) as t:
        target = str(local.port)
        url = f"http://web.localhost:{t.relay.port}"
        assert t.ready == {"event": "ready", "url": url, "name": "web", "target": target}

        await t.fetch("POST", b"/a?b=%20c", body=b"123")
        event = await t.client.event("request")
        assert event.pop("ms") >= 0
        assert event == {
            "event": "request", "id": 1, "name": "web", "method": "POST", "path": "/a?b=%20c", "status": 201,
            "bytes_in": 3, "bytes_out": 5, "error": None,
        }  # fmt: skip

        await t.relay.cut("reset")
        lost = await t.client.event("disconnected")
        assert lost.keys() == {"event", "reason", "retry_in"}
        assert isinstance(lost["reason"], str) and lost["reason"]
        assert lost["retry_in"] == 0
        assert await t.client.event("reconnected") == {"event": "reconnected", "resumed": True, "lost": 0}

        t.client.send_signal(signal.SIGINT)
        assert await t.client.event("closed") == {"event": "closed"}
        assert await t.client.wait() == 0
        assert t.client.events == []
        assert all(json.loads(line)["event"] for line in t.client.stdout), "nothing but events on stdout"


async def test_json_request_that_failed_tells_why() -> None:
    async with Tunnel(free_port()) as t:
        assert (await t.get(b"/x")).status == 502
        event = await t.client.event("request", path="/x")
        assert event["status"] == 502
        assert "cannot connect" in event["error"] and str(t.origin_port) in event["error"]


async def test_json_several_targets_give_several_ready_events(home: Path) -> None:
    async with origin() as local, serving(home, "--token", TOKEN) as server:
        args = [f"a={local.port}", f"b={local.port}", "--server", server.url, "--token", TOKEN, "--json"]
        async with await start("connect", *args, home=home) as client:
            for name in "ab":
                ready = await client.event("ready")
                expected = f"http://{name}.localhost:{server.port}"
                assert ready == {"event": "ready", "url": expected, "name": name, "target": str(local.port)}


@pytest.mark.parametrize(
    ("args", "code", "status"),
    [
        (["connect", "3000"], "usage", 2),
        (["connect", "3000", "--token", TOKEN, "--name", "-"], "name", 4),
        (["serve", "--listen", "nonsense"], "usage", 2),
    ],
)
async def test_json_error(args: list[str], code: str, status: int) -> None:
    result = await run(*args, "--json")
    assert result.status == status
    (line,) = result.stdout
    assert json.loads(line) == {"event": "error", "code": code, "message": result.error.removeprefix("error: ")}


async def test_json_server_that_forgot_the_session_is_not_resumed() -> None:
    async with origin() as local, Tunnel(local.port) as t:
        await t.restart_server(signal.SIGKILL)
        assert await t.client.event("reconnected") == {"event": "reconnected", "resumed": False, "lost": 0}
        assert (await t.get()).body == b"hello"


@pytest.mark.parametrize(
    ("resumed", "lost", "text"),
    [(True, 0, "nothing lost"), (False, 0, "in a new session"), (False, 2, "but what was running is lost")],
)
def test_what_is_lost_is_told(resumed: bool, lost: int, text: str) -> None:
    assert Console._line("reconnected", {"resumed": resumed, "lost": lost}) == f"connected again, {text}"


# ---------------------------------------------------------------------------------------- Exit statuses and errors


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ([], "pytunnel --help"),
        (["frobnicate"], "pytunnel --help"),
        (["connect"], "pytunnel connect --help"),
        (["connect", "3000", "--frobnicate"], "connect --help"),
        (["serve", "--frobnicate"], "serve --help"),
        (["serve", "--grace", "long"], "serve --help"),
        (["connect", "3000", "--token"], "connect --help"),
        (["connect", "3000"], "pytunnel serve"),
        (["connect", "nonsense", "--token", TOKEN], "a port like 3000"),
        (["connect", "0", "--token", TOKEN], "a port is within 1 to 65535"),
        (["connect", "web=", "--token", TOKEN], "a port like 3000"),
        (["connect", "ftp://localhost:21", "--token", TOKEN], "https://host:port"),
        (["connect", "3000", "4000", "--name", "web", "--token", TOKEN], "web=3000"),
        (["connect", "web=3000", "--name", "api", "--token", TOKEN], "NAME=TARGET"),
        (["connect", "web=3000", "web=4000", "--token", TOKEN], "web=3000"),
        (["connect", "3000", "3000", "--token", TOKEN], "web=3000"),
        (["connect", "3000", "--token", "short"], "pytunnel serve"),
        (["connect", "3000", "--token", "with spaces in between"], "pytunnel serve"),
        (["connect", "3000", "--token", TOKEN, "--server", "ftp://example.com"], "https://"),
        (["connect", "3000", "--token", TOKEN, "--server", "not a host"], "https://t.example.com"),
        (["connect", "3000", "--token", TOKEN, "--server", "localhost:99999"], "https://t.example.com"),
        (["serve", "--listen", "nonsense"], "127.0.0.1:8080"),
        (["serve", "--listen", "127.0.0.1:"], "127.0.0.1:8080"),
        (["serve", "--listen", "127.0.0.1:99999"], "127.0.0.1:8080"),
        (["serve", "--token", "short"], "leave it out"),
        (["serve", "--domain", "not a host"], "https://t.example.com"),
        (["serve", "--trusted-proxy", "my-proxy"], "10.0.0.0/8"),
        (["demo", "--listen", "nonsense"], "127.0.0.1:8080"),
        (["demo", "3000"], "--help"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
async def test_usage_errors_are_one_line_with_the_next_step(args: list[str], hint: str) -> None:
    result = await run(*args)
    assert (result.status, result.stdout, len(result.stderr)) == (2, [], 1), result
    assert hint in result.error


async def test_name_given_twice_is_a_usage_error() -> None:
    """`--name` is for one target: two of them are a mistake, of which the last one must not silently win."""
    result = await run("connect", "3000", "--token", TOKEN, "--name", "one", "--name", "two", "--server", "localhost:1")
    assert (result.status, result.stdout) == (2, []), result
    assert "--name" in result.error


async def test_wrong_token_is_3(home: Path) -> None:
    async with serving(home, "--token", TOKEN) as server:
        result = await run("connect", "3000", "--server", server.url, "--token", OTHER_TOKEN)
        assert (result.status, result.stdout) == (3, [])
        assert "pytunnel serve" in result.error
        assert "3000" not in result.error and OTHER_TOKEN not in result.error


@pytest.mark.parametrize("name", ["www", "xn--abc", "-a", "a-", "a.b", "Web", "a_b", "ä", "a" * 64, "a b", "\x1b[31m"])
async def test_names_that_are_not_allowed(name: str) -> None:
    with pytest.raises(Refused, match="is not allowed as a name"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "web", "web-1", "0", "a" * 63, "a--b"])
def test_names_that_are_allowed(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("args", [["3000", "--name=-a"], ["www=3000"], ["3000", "--name=\x1b[31m\n"]])
async def test_bad_name_is_4(args: list[str]) -> None:
    result = await run("connect", *args, "--token", TOKEN)
    assert (result.status, result.stdout, len(result.stderr)) == (4, [], 1), result
    assert "use a-z, 0-9 and hyphens" in result.error
    assert result.error.isprintable()


async def test_a_name_of_another_token_is_4(home: Path) -> None:
    """A name belongs to the token that first used it, across restarts of the server."""
    async with origin() as local:
        args = ["connect", str(local.port), "--name", "web", "--server"]
        async with (
            serving(home, "--token", TOKEN) as server,
            await start(*args, server.url, "--token", TOKEN) as client,
        ):
            await url_of(client)
        async with serving(home, "--token", OTHER_TOKEN) as server:
            result = await run(*args, server.url, "--token", OTHER_TOKEN)
            assert (result.status, result.stdout) == (4, [])
            assert "--name" in result.error and "'web'" in result.error


async def test_a_replaced_client_is_4_and_the_new_one_serves() -> None:
    async with origin() as local, origin(b"new") as new, Tunnel(local.port) as t:
        second = await t.start_client(origin_port=new.port)
        await second.event("ready")
        first = t.clients[0]
        assert await first.wait() == 4
        error = await first.event("error")
        assert error["code"] == "replaced" and "same token" in error["message"]
        assert Finished(4, first.stdout, first.stderr).error
        assert (await t.get()).body == b"new"


async def test_unreachable_servers_are_5_and_an_interrupt_before_that_130() -> None:
    """All at once, because each takes the ten seconds of the first dial."""
    async with (
        RawOrigin(response(b"not a pytunnel", 404, reason=b"Not Found")) as other,
        Relay(free_port()) as nothing_behind,
        Relay(free_port()) as hole,
        Relay(free_port()) as refusing,
    ):
        hole.set_mode("blackhole")
        refusing.refuse = True
        servers = [
            f"http://127.0.0.1:{free_port()}",
            f"http://127.0.0.1:{other.port}",
            f"http://127.0.0.1:{nothing_behind.port}",
            f"http://127.0.0.1:{hole.port}",
            f"http://127.0.0.1:{refusing.port}",
            f"https://127.0.0.1:{other.port}",
            "http://does-not-exist.invalid",
        ]
        args = ["connect", "3000", "--token", TOKEN, "--server"]
        loop = asyncio.get_running_loop()

        async def measured(server: str) -> tuple[Finished, float]:
            started = loop.time()
            return await run(*args, server, timeout=30), loop.time() - started

        async def interrupted(number: int) -> Finished:
            async with await start(*args, servers[0]) as client:
                await client.stderr_line("trying again")
                client.send_signal(number)
                return Finished(await client.wait(5), client.stdout, client.stderr)

        async with asyncio.TaskGroup() as tasks:
            dials = {server: tasks.create_task(measured(server)) for server in servers}
            stopped = [tasks.create_task(interrupted(number)) for number in (signal.SIGINT, signal.SIGTERM)]
        for server, dialled in dials.items():
            result, seconds = dialled.result()
            assert (result.status, result.stdout) == (5, []), (server, result)
            assert server in result.error and "pytunnel serve" in result.error
            assert 8 < seconds < 25, (server, seconds)
        for result in (task.result() for task in stopped):
            assert (result.status, result.stdout) == (130, []), result
            assert "Traceback" not in "\n".join(result.stderr)


@pytest.mark.parametrize("command", ["serve", "demo"])
async def test_port_in_use_is_one_line(command: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = await run(command, "--listen", address)
    assert (result.status, result.stdout, len(result.stderr)) == (1, [], 1), result
    assert f"cannot listen on {address}" in result.error and "--listen" in result.error


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "does-not-exist.invalid"], ids=["an address of others", "a name of nobody"]
)
async def test_address_that_is_not_this_machines_is_one_line(host: str) -> None:
    result = await run("serve", "--listen", f"{host}:8080")
    assert (result.status, result.stdout, len(result.stderr)) == (1, [], 1), result
    assert host in result.error and "--listen" in result.error


@pytest.mark.parametrize("command", [["serve", "--listen", "127.0.0.1:0"], ["connect", "3000"], ["demo"]])
@pytest.mark.parametrize("package", ["aiohttp", "zstandard", "platformdirs"])
async def test_a_missing_package_is_one_line(package: str, command: list[str]) -> None:
    script = (
        f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = ['pytunnel', *sys.argv[1:]];"
        f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    )
    if command == ["demo"] and package == "platformdirs":
        return  # it keeps nothing
    env = {"PYTUNNEL_TOKEN": TOKEN, **({"PYTUNNEL_STATE_DIR": ""} if package == "platformdirs" else {})}
    result = await run(*command, command=[sys.executable, "-c", script], env=env)
    assert (result.status, result.stdout, len(result.stderr)) == (1, [], 1), result
    assert package in result.error and "pip install aiohttp zstandard platformdirs" in result.error


@pytest.mark.parametrize("command", [["serve", "--listen", "127.0.0.1:0"], ["connect", "3000"], ["demo"]])
async def test_an_interpreter_without_any_package_is_one_line(command: list[str]) -> None:
    """-S leaves out site-packages: what somebody sees who runs the bare file."""
    result = await run(*command, command=[sys.executable, "-S", str(PROGRAM)], env={"PYTUNNEL_TOKEN": TOKEN})
    assert (result.status, result.stdout, len(result.stderr)) == (1, [], 1), result
    assert "pip install aiohttp zstandard platformdirs" in result.error


def old_interpreters() -> list[str]:
    """Those of Python 3.8 to 3.10 that are on PATH and run (a version manager's stub may not)."""
    found = []
    for minor in (8, 9, 10):
        path = shutil.which(f"python3.{minor}")
        if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            found.append(path)
    return found


async def test_an_old_python_is_told_so() -> None:
    """The whole file must parse there, so that its head can run; here the head runs with another version's number."""
    source = PROGRAM.read_text()
    ast.parse(source, feature_version=(3, 8))
    head = source[: source.index("import argparse")]
    script = f"import sys\nsys.version_info = (3, 10, 4)\nsys.version = '3.10.4 (main)'\nexec({head!r})"
    results = [await run(command=[sys.executable, "-c", script.replace("from __future__ import annotations", "")])]
    for interpreter in old_interpreters():
        results.append(await run("connect", "3000", command=[interpreter, str(PROGRAM)]))
    for result in results:
        assert (result.status, result.stdout, len(result.stderr)) == (1, [], 1), result
        assert "needs Python 3.11 or newer, this is 3." in result.error and "python3.11" in result.error


DAMAGED = {
    "not JSON": b"{",
    "a list": b"[]",
    "empty": b"",
    "no names": b'{"zones": []}',
    "names are a number": b'{"names": 3, "zones": []}',
    "not UTF-8": b'{"names": {"\xff": "x"}, "zones": []}',
    "deep": b"[" * 100_000,
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
async def test_damaged_names_are_one_line_and_left_alone(home: Path, content: bytes) -> None:
    path = home / "state" / "names.json"
    path.parent.mkdir()
    path.write_bytes(content)
    result = await run("serve", "--listen", "127.0.0.1:0", "--token", TOKEN, home=home)
    assert (result.status, result.stdout, len(result.stderr)) == (1, [], 1), result
    assert str(path) in result.error and "move it away" in result.error
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
async def test_damaged_memory_of_a_client_is_no_memory(home: Path, content: bytes) -> None:
    path = home / "state" / "client.json"
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(0o600)
    result = await run("connect", "3000", home=home)
    assert (result.status, len(result.stderr)) == (2, 1), result
    assert "no token for http://localhost:8080" in result.error


@pytest.mark.parametrize("content", [b"", b"\n", b"short\n", b"\xff\xfe\xfd" * 10, b"two\nlines of some length\n"])
async def test_a_damaged_token_file_is_not_served(home: Path, content: bytes) -> None:
    """An empty token would let everybody in."""
    path = home / "state" / "token"
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(0o600)
    async with await start("serve", "--listen", "127.0.0.1:0", home=home) as server:
        status = await server.wait()
        assert status in (1, 2)
        assert str(path) in Finished(status, server.stdout, server.stderr).error


@pytest.mark.parametrize("name", ["token", "machine"])
async def test_damaged_files_of_a_client_are_no_traceback(home: Path, name: str) -> None:
    path = home / "state" / name
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\xfd" * 10)
    path.chmod(0o600)
    async with origin() as local, serving(home / "server", "--token", TOKEN) as server:
        args = [str(local.port), "--server", server.url, *(() if name == "token" else ("--token", TOKEN))]
        async with await start("connect", *args, home=home) as client:
            if name == "machine":
                assert (await visit(await url_of(client))).status == 200
                return
            status = await client.wait()
            assert Finished(status, client.stdout, client.stderr).error
            assert status == 2


async def test_a_state_directory_that_cannot_be_is_one_line(home: Path) -> None:
    (home / "file").write_text("")
    env = {"PYTUNNEL_STATE_DIR": str(home / "file" / "state")}
    result = await run("serve", "--listen", "127.0.0.1:0", env=env)
    assert (result.status, len(result.stderr)) == (1, 1), result
    assert str(home / "file") in result.error and "PYTUNNEL_STATE_DIR" in result.error


async def test_debug_shows_frames_and_the_traceback_but_never_the_token(home: Path) -> None:
    async with origin() as local, serving(home, "--token", TOKEN, "--debug") as server:
        args = ["connect", str(local.port), "--server", server.url, "--token"]
        async with await start(*args, TOKEN, "--debug", home=home) as client:
            url = await url_of(client)
            assert (await visit(url)).status == 200
            await client.stderr_line("< OPEN")
            await server.process.stderr_line("< HEAD")
            assert client.stdout == [url]
            assert TOKEN not in "\n".join([*client.stderr, *server.process.stderr])
        result = await run(*args, OTHER_TOKEN, "--debug", expected_complaint="Traceback")
        assert result.status == 3
        assert "Traceback" in "\n".join(result.stderr)
        assert result.stderr[-1].startswith("error: ")
        assert OTHER_TOKEN not in "\n".join([*result.stderr, *server.process.stderr])


async def test_verbose_changes_nothing_on_stdout(home: Path) -> None:
    async with origin() as local, serving(home, "--token", TOKEN) as server:
        args = [str(local.port), "--server", server.url, "--token", TOKEN, "--verbose"]
        async with await start("connect", *args, home=home) as client:
            url = await url_of(client)
            client.send_signal(signal.SIGINT)
            assert await client.wait() == 0
            assert client.stdout == [url]


# ---------------------------------------------------------------------------------------- The rest of serve's flags


async def test_hold_is_how_long_a_request_waits_for_its_client() -> None:
    async with origin() as local, Tunnel(local.port, serve_args=["--hold", "0.05"]) as t:
        t.client.send_signal(signal.SIGKILL)
        await t.client.wait()
        answer = await t.get()
        assert (answer.status, answer.value(b"X-Pytunnel-Error")) == (503, b"tunnel-offline")


async def test_grace_is_how_long_a_session_outlives_its_link() -> None:
    async def begin(_: RawRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbegun")
        await writer.drain()
        await reader.read()

    async with (
        RawOrigin(begin) as local,
        Tunnel(local.port, serve_args=["--grace", "0.05"]) as t,
        t.visitor() as visitor,
    ):
        await visitor.send(t.request())
        await visitor.read_until(b"begun")
        t.client.send_signal(signal.SIGKILL)
        assert await visitor.read_until_close() == b"", "a body cut short has no clean end"


async def test_drain_is_how_long_running_requests_get() -> None:
    async def wait(_: RawRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with (
        RawOrigin(wait) as local,
        # The client keeps what runs, for a server that is not started again here.
        Tunnel(local.port, serve_args=["--drain", "0.05"], settles=False) as t,
        t.visitor() as visitor,
    ):
        await visitor.send(t.request())
        await local.wait_requests(1)
        assert await t.stop_server(signal.SIGTERM, timeout=5) == 0


async def test_trusted_proxy_is_believed_and_nobody_else() -> None:
    claim = [(b"X-Forwarded-For", b"198.51.100.7"), (b"X-Forwarded-Proto", b"https")]
    for arguments, proto in ((["--trusted-proxy", "127.0.0.0/8"], b"https"), ([], b"http")):
        async with origin() as local, Tunnel(local.port, serve_args=arguments) as t:
            await t.get(b"/", claim)
            seen = local.requests[-1]
            assert seen.value(b"X-Forwarded-Proto") == proto
            assert ((seen.value(b"X-Forwarded-For") or b"").startswith(b"198.51.100.7")) is bool(arguments)


# A key and a certificate that nobody trusts; made for this file.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgM7YNIMPzs1YW1UWp
Q4x95lj1S8nuAYB3oqIzO8ZPOTehRANCAAR8bacFSI0ATvozYiwnqP5dGSvpKVIK
KD8F/TUXRbmVxVdCvkWCNC8pdO66/GVkXaFCaK1DxAAKnoUY+52KnnLm
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBdjCCAR2gAwIBAgIUYGonlzmqN7o4p70bxmpNYMqqOAAwCgYIKoZIzj0EAwIw
EDEOMAwGA1UEAwwFbG9jYWwwIBcNMjYxMTIyMDkyMDAwWhgPMjEyNjEwMjkwOTIw
MDBaMBAxDjAMBgNVBAMMBWxvY2FsMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE
fG2nBUiNAE76M2IsJ6j+XRkr6SlSCig/Bf01F0W5lcVXQr5FgjQvKXTuuvxlZF2h
QmitQ8QACp6FGPudip5y5qNTMFEwHQYDVR0OBBYEFG7VTD9N1LGDgALwlpLExVtF
ZKHOMB8GA1UdIwQYMBaAFG7VTD9N1LGDgALwlpLExVtFZKHOMA8GA1UdEwEB/wQF
MAMBAf8wCgYIKoZIzj0EAwIDRwAwRAIgGaTrIj/WL5AxBIYBZ8UA/xfm1rnHngrZ
gXAqsqm0gZcCIDKzs45usLVFIY1inRh9gJlJP3fNw2aGnwpAF0hsewvb
-----END CERTIFICATE-----
"""


async def test_insecure_is_for_local_services_elsewhere(home: Path) -> None:
    """A loopback service may have any certificate; 0.0.0.0 leads there too, but does not say so."""
    (home / "pem").write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "pem")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(response(b"over TLS", headers=[(b"Connection", b"close")]))
            writer.close()

    async with serving(home, "--token", TOKEN) as server:
        listener = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        port = listener.sockets[0].getsockname()[1]
        common = ["--server", server.url, "--token", TOKEN]
        table = [
            ("a", f"https://127.0.0.1:{port}", [], 200),
            ("b", f"https://localhost:{port}", [], 200),
            ("c", f"https://0.0.0.0:{port}", [], 502),
            ("d", f"https://0.0.0.0:{port}", ["--insecure"], 200),
        ]
        async with listener:
            for name, target, flags, status in table:
                args = [f"{name}={target}", *common, *flags]
                async with await start("connect", *args, home=home) as client:
                    got = await visit(await url_of(client))
                    assert got.status == status, (target, flags, got)


# ---------------------------------------------------------------------------------------- Zero configuration


async def test_the_token_is_made_once_kept_privately_and_found_on_this_machine(home: Path) -> None:
    path = home / "state" / "token"
    tokens = []
    async with origin() as local:
        for _ in range(2):
            async with serving(home) as server:
                tokens.append(path.read_text())
                assert path.stat().st_mode & 0o777 == 0o600
                assert path.parent.stat().st_mode & 0o077 == 0
                args = [str(local.port), "--server", server.url]
                async with await start("connect", *args, home=home) as client:
                    assert (await visit(await url_of(client))).status == 200
                assert tokens[-1].strip() not in "\n".join(server.process.stderr)
    assert tokens[0] == tokens[1]
    assert check_token(tokens[0].strip())
    assert len(tokens[0].strip()) >= 27, "160 bits"


async def test_tokens_of_two_servers_differ(tmp_path: Path) -> None:
    tokens = []
    for name in ("one", "two"):
        async with serving(tmp_path / name):
            tokens.append((tmp_path / name / "state" / "token").read_text())
    assert tokens[0] != tokens[1]


async def test_server_and_token_are_remembered_after_the_first_success(home: Path) -> None:
    async with origin() as local, serving(home / "server", "--token", TOKEN) as server:
        client_home = home / "client"
        client_home.mkdir()
        args = [str(local.port), "--server", server.url]
        failed = await run("connect", *args, "--token", OTHER_TOKEN, home=client_home)
        assert failed.status == 3
        failed = await run("connect", *args, home=client_home)
        assert failed.status == 2, "what did not work is not remembered"
        urls = []
        for more in (["--server", server.url, "--token", TOKEN], [], ["--server", server.url]):
            async with await start("connect", str(local.port), *more, home=client_home) as client:
                urls.append(await url_of(client))
                assert (await visit(urls[-1])).status == 200
        assert len(set(urls)) == 1, "the name without --name is stable"
        kept = client_home / "state" / "client.json"
        assert kept.stat().st_mode & 0o777 == 0o600


async def test_a_remembered_token_of_a_server_reached_through_loopback_is_used(home: Path) -> None:
    """This machine serves too, with a token of its own, but the tunnel that is dialled is another server's."""
    (home / "state").mkdir()
    (home / "state" / "token").write_text("the-token-of-this-machines-own-server\n")
    (home / "state" / "token").chmod(0o600)
    async with origin() as local, serving(home / "server", "--token", TOKEN) as server:
        args = [str(local.port), "--server", server.url]
        for more in (["--token", TOKEN], []):
            async with await start("connect", *args, *more, home=home) as client:
                assert (await visit(await url_of(client))).status == 200


async def test_environment_and_flags(home: Path) -> None:
    """The environment says what the flags would; a flag wins."""
    async with origin() as local, serving(home / "s", env={"PYTUNNEL_TOKEN": TOKEN}) as server:
        assert not (home / "s" / "state" / "token").exists()
        env = {"PYTUNNEL_SERVER": server.url, "PYTUNNEL_TOKEN": TOKEN, "PYTUNNEL_NAME": "from-env"}
        table: list[tuple[list[str], dict[str, str], str]] = [
            ([], env, "from-env"),
            (["--name", "from-flag"], env, "from-flag"),
            (["--token", TOKEN], {**env, "PYTUNNEL_TOKEN": OTHER_TOKEN}, "from-env"),
            (["--server", server.url], {**env, "PYTUNNEL_SERVER": f"http://127.0.0.1:{free_port()}"}, "from-env"),
        ]
        for number, (flags, variables, name) in enumerate(table):
            args = ["connect", str(local.port), *flags]
            async with await start(*args, home=home / f"c{number}", env=variables) as client:
                assert await url_of(client) == f"http://{name}.localhost:{server.port}"


async def test_environment_wins_over_memory(home: Path) -> None:
    (home / "state").mkdir()
    memory = {"server": f"http://127.0.0.1:{free_port()}", "tokens": {}}
    (home / "state" / "client.json").write_text(json.dumps(memory))
    (home / "state" / "client.json").chmod(0o600)
    async with origin() as local, serving(home / "s", "--token", TOKEN) as server:
        env = {"PYTUNNEL_SERVER": server.url, "PYTUNNEL_TOKEN": TOKEN}
        async with await start("connect", str(local.port), home=home, env=env) as client:
            assert (await visit(await url_of(client))).status == 200


async def test_flag_of_serve_wins_over_environment(home: Path) -> None:
    async with origin() as local, serving(home, "--token", TOKEN, env={"PYTUNNEL_TOKEN": OTHER_TOKEN}) as server:
        args = ["connect", str(local.port), "--server", server.url, "--token"]
        assert (await run(*args, OTHER_TOKEN)).status == 3
        async with await start(*args, TOKEN) as client:
            assert await url_of(client)


async def test_default_names_differ_by_target_machine_and_token(home: Path) -> None:
    assert default_name(TOKEN, "m", "3000") == default_name(TOKEN, "m", "3000")
    names = {
        default_name(token, machine, target)
        for token in (TOKEN, OTHER_TOKEN)
        for machine in ("m", "n")
        for target in ("3000", "3001")
    }
    assert len(names) == 8
    assert all(check_name(name) for name in names)
    async with origin() as local, serving(home / "s", "--token", TOKEN) as server:
        urls = []
        for machine in ("one", "two", "one"):
            args = [str(local.port), "--server", server.url, "--token", TOKEN]
            async with await start("connect", *args, home=home / machine) as client:
                urls.append(await url_of(client))
        assert urls[0] == urls[2] != urls[1]


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
async def test_the_line_to_paste(home: Path, terminal: bool) -> None:
    """On a terminal it is complete, and works; in a log the token has no place, but where it is kept is said."""
    leader, follower = pty.openpty()
    read_end, write_end = os.pipe()
    stderr = (leader, follower) if terminal else (read_end, write_end)
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), "serve", "--listen", "127.0.0.1:0", stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=stderr[1], env=environment(home), cwd=home,
    )  # fmt: skip
    os.close(follower)
    os.close(write_end)
    try:
        text = await asyncio.wait_for(read_line_with(stderr[0], "  PYTUNNEL_TOKEN="), 10)
        kept = home / "state" / "token"
        token = kept.read_text().strip()
        words = shlex.split(text)
        secret = words.pop(0)
        assert words[:4] == ["pytunnel", "connect", "3000", "--server"]
        assert secret == f"PYTUNNEL_TOKEN={token if terminal else '…'}"
        assert (token in text) is terminal
        assert (str(kept) in text) is not terminal
        if terminal:
            async with origin() as local:
                args, env = ["connect", str(local.port), *words[3:]], dict([secret.split("=")])
                async with await start(*args, home=home / "elsewhere", env=env) as client:
                    assert (await visit(await url_of(client))).status == 200
    finally:
        process.terminate()
        await process.wait()
        os.close(leader)
        os.close(read_end)


async def read_line_with(descriptor: int, start: str) -> str:
    """Read until there is a whole line that starts like this."""
    loop = asyncio.get_running_loop()
    seen = b""
    while True:
        piece = await loop.run_in_executor(None, functools.partial(os.read, descriptor, 4096))
        assert piece, seen
        seen += piece
        for line in seen.decode().splitlines(keepends=True):
            if line.startswith(start) and line.endswith("\n"):
                return line.strip()


async def test_a_token_that_was_given_is_not_repeated(home: Path) -> None:
    async with await start("serve", "--listen", "127.0.0.1:0", "--token", TOKEN, home=home) as server:
        line = await server.stderr_line("pytunnel connect 3000")
        assert "PYTUNNEL_TOKEN=… pytunnel" in line
        server.send_signal(signal.SIGTERM)
        await server.wait()
        assert TOKEN not in "\n".join(server.stderr)
        assert not (home / "state" / "token").exists()


# ---------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("dialled", "url"),
    [
        ("https://t.example.com", "https://web.t.example.com"),
        ("https://t.example.com:443", "https://web.t.example.com"),
        ("https://T.Example.com:8443", "https://web.t.example.com:8443"),
        ("http://t.example.com", "http://web.t.example.com"),
        ("http://t.example.com:80", "http://web.t.example.com"),
        ("http://t.example.com:443", "http://web.t.example.com:443"),
        ("https://t.example.com:80", "https://web.t.example.com:80"),
        ("http://203.0.113.7:8080", "http://web.203-0-113-7.sslip.io:8080"),
        ("https://203.0.113.7", "https://web.203-0-113-7.sslip.io"),
        ("http://[2001:db8::7]:8080", "http://web.2001-db8--7.sslip.io:8080"),
        ("http://localhost:8080", "http://web.localhost:8080"),
        ("http://127.0.0.1:8080", "http://web.localhost:8080"),
        ("http://127.1.2.3:8080", "http://web.localhost:8080"),
        ("http://[::1]:8080", "http://web.localhost:8080"),
        ("http://host:8080", "http://web.host:8080"),
    ],
)
def test_public_urls_follow_from_what_was_dialled(dialled: str, url: str) -> None:
    assert Origin.from_url(dialled).url("web") == url


def test_an_address_never_makes_a_label_that_is_no_host_name() -> None:
    """sslip.io's labels of IPv6 addresses: one that begins or ends with a hyphen has a zero there instead."""
    for address in ("2001:db8::", "::ffff:203.0.113.7", "64:ff9b::1"):
        label = Origin.from_url(f"http://[{address}]:8080").zone.removesuffix(".sslip.io")
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", label), label


@pytest.mark.parametrize("text", ["ftp://t.example.com", "http://", "http://a b", "nonsense", "http://ä"])
def test_what_is_no_origin(text: str) -> None:
    with pytest.raises(MessageError):
        Origin.from_url(text)


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("t.example.com", "https://t.example.com"),
        ("T.Example.com", "https://t.example.com"),
        ("t.example.com:8443", "https://t.example.com:8443"),
        ("https://t.example.com", "https://t.example.com"),
        ("https://t.example.com/", "https://t.example.com"),
        ("http://t.example.com:8080/", "http://t.example.com:8080"),
        ("localhost", "http://localhost:8080"),
        ("localhost:9000", "http://localhost:9000"),
        ("127.0.0.1", "http://127.0.0.1:8080"),
        ("203.0.113.7", "http://203.0.113.7:8080"),
        ("203.0.113.7:80", "http://203.0.113.7:80"),
        ("[::1]", "http://[::1]:8080"),
        ("[2001:db8::7]:9000", "http://[2001:db8::7]:9000"),
        ("http://localhost", "http://localhost"),
        ("https://203.0.113.7", "https://203.0.113.7"),
    ],
)
def test_parse_server(text: str, server: str) -> None:
    assert parse_server(text) == server
    assert parse_server(server) == server, "what is remembered means the same"


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "/", "a b", "ftp://t.example.com", "ws://t.example.com", "https://", "https://t.example.com/path",
        "https://user:secret@t.example.com", "https://t.example.com?x=1", "localhost:99999", "localhost:abc", "::1",
        "https://t.example.com#x", "t..example.com", "\x1b]0;x\x07",
    ],
)  # fmt: skip
def test_what_is_no_server(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_server(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "host", "port", "tls"),
    [
        ("3000", "localhost", 3000, False),
        ("65535", "localhost", 65535, False),
        ("localhost:3000", "localhost", 3000, False),
        ("127.0.0.1:80", "127.0.0.1", 80, False),
        ("nas.lan:5000", "nas.lan", 5000, False),
        ("[::1]:3000", "::1", 3000, False),
        ("http://localhost:3000", "localhost", 3000, False),
        ("http://localhost:3000/", "localhost", 3000, False),
        ("http://nas", "nas", 80, False),
        ("https://10.0.0.7", "10.0.0.7", 443, True),
        ("https://localhost:8443", "localhost", 8443, True),
        ("unix:/run/app.sock", "/run/app.sock", 0, False),
        ("unix:/run/with space", "/run/with space", 0, False),
    ],
)
def test_parse_target(text: str, host: str, port: int, tls: bool) -> None:
    assert Target.parse(text) == Target(text, host, port, tls)


@pytest.mark.parametrize(
    "text",
    [
        "", "0", "65536", "99999", "123456", "-1", "nonsense", "localhost", "localhost:", "localhost:0", ":3000",
        "http://", "ftp://localhost:21", "http://localhost:3000/path", "http://user@localhost", "unix:",
        "unix:relative",
        "a b:3000", "http://3000:x", "\x1b[31m", "localhost:3000:4000", "\u0663\u0660",
    ],
)  # fmt: skip
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Target.parse(text)
    assert str(caught.value).isprintable()


def test_localhost_means_both_loopbacks() -> None:
    assert Target.parse("3000").addresses == ["127.0.0.1", "::1"]
    assert Target.parse("127.0.0.1:3000").addresses == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8080", (None, 8080)),
        (":8080", (None, 8080)),
        ("0", (None, 0)),
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("[::1]:8080", ("::1", 8080)),
        ("[::]:80", ("::", 80)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_parse_listen(text: str, expected: tuple[str | None, int]) -> None:
    assert parse_listen(text) == expected


@pytest.mark.parametrize(
    "text", ["", ":", "x", "127.0.0.1", "127.0.0.1:", "1:65536", "1:-1", "1:8080x", ":\u0663", "::1"]
)
def test_what_is_nothing_to_listen_on(text: str) -> None:
    with pytest.raises(UsageError):
        parse_listen(text)


async def test_the_domain_is_fixed_by_its_flag(home: Path) -> None:
    table = [
        ("t.example.com", "https://web.t.example.com"),
        ("https://t.example.com", "https://web.t.example.com"),
        ("http://t.example.com:8080", "http://web.t.example.com:8080"),
    ]
    for number, (domain, url) in enumerate(table):
        async with origin() as local, serving(home / str(number), "--token", TOKEN, "--domain", domain) as server:
            args = [f"web={local.port}", "--server", server.url, "--token", TOKEN]
            async with await start("connect", *args) as client:
                assert await url_of(client) == url
                assert (await visit(url, server.port)).body == b"hello"
                wrong = await visit("http://web.localhost", server.port)
                assert wrong.value(b"X-Pytunnel-Error") == b"unknown-tunnel"


async def test_a_tunnel_answers_below_every_host_that_was_dialled(home: Path) -> None:
    """Loopback in all its spellings: the URL is the same, and it is the one that answers."""
    async with origin() as local, serving(home, "--token", TOKEN) as server:
        for host in ("127.0.0.1", "localhost"):
            args = [f"web={local.port}", "--server", f"http://{host}:{server.port}", "--token", TOKEN]
            async with await start("connect", *args) as client:
                url = await url_of(client)
                assert url == f"http://web.localhost:{server.port}"
                assert (await visit(url)).body == b"hello"


async def test_a_warning_tells_that_the_link_is_not_encrypted(home: Path) -> None:
    """Not for loopback, where nobody listens; the warning is no error, and not on stdout."""
    async with serving(home, "--token", TOKEN) as server:
        for host, expected in (("127.0.0.1", False), ("0.0.0.0", True)):
            args = ["3000", "--server", f"http://{host}:{server.port}", "--token", TOKEN]
            async with await start("connect", *args) as client:
                await url_of(client)
                client.send_signal(signal.SIGINT)
                assert await client.wait() == 0
                assert any(line.startswith("warning: ") for line in client.stderr) is expected


# ---------------------------------------------------------------------------------------- Demo


async def test_demo_is_all_that_it_promises(home: Path) -> None:
    async with await start("demo", "--listen", "127.0.0.1:0", home=home) as demo:
        url = await url_of(demo)
        host, port = urlsplit(url).netloc.encode(), urlsplit(url).port
        assert port is not None
        page = await visit(url)
        assert page.status == 200
        assert b"<!doctype html>" in page.body
        assert (page.value(b"Content-Type") or b"").startswith(b"text/html")

        async with RawVisitor(port) as visitor:
            await visitor.send(request("GET", b"/events", host))
            head = await visitor.read_head()
            assert head.value(b"Content-Type") == b"text/event-stream"
            await visitor.read_until(b"data: event 1")
            await visitor.read_until(b"data: event 2")

        async with RawVisitor(port) as visitor:
            upgrade = [
                (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-WebSocket-Version", b"13"),
                (b"Sec-WebSocket-Key", b"dGhlIHNhbXBsZSBub25jZQ=="),
            ]  # fmt: skip
            await visitor.send(request("GET", b"/ws", host, upgrade))
            head = await visitor.read_head()
            assert head.status == 101
            assert head.value(b"Sec-WebSocket-Accept") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", "RFC 6455, 1.3"
            await visitor.send(b"\x81\x85\0\0\0\0hello")
            assert await visitor.read_exactly(13) == b"\x81\x0becho: hello"

        async with RawVisitor(port) as visitor:
            body = bytes(100_000)
            await visitor.send(request("POST", b"/upload", host, body=body))
            answer = await visitor.read_response()
            assert answer.body.decode() == f"100000 bytes, SHA-256 {hashlib.sha256(body).hexdigest()}\n"

        async with RawVisitor(port) as visitor:  # one is still open when it is interrupted
            await visitor.send(request("GET", b"/events", host))
            await visitor.read_until(b"data: event 1")
            demo.send_signal(signal.SIGINT)
            await demo.stderr_line("once more to stop now")
            demo.send_signal(signal.SIGINT)
            assert await demo.wait(4) == 0
        assert demo.stdout == [url]
        assert "Traceback" not in "\n".join(demo.stderr)


async def test_demo_takes_a_free_port_when_its_own_is_taken() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # then somebody else has it, which will do as well
            taken.bind(("127.0.0.1", 8080))
            taken.listen()
        async with await start("demo", "--json") as demo:
            url = (await demo.event("ready"))["url"]
            assert urlsplit(url).port != 8080
            assert (await visit(url)).status == 200
            demo.send_signal(signal.SIGINT)
            assert await demo.wait() == 0


async def test_demo_leaves_nothing_behind(home: Path) -> None:
    temporary = home / "tmp"
    temporary.mkdir()
    async with await start("demo", "--listen", "127.0.0.1:0", home=home, env={"TMPDIR": str(temporary)}) as demo:
        await url_of(demo)
        await eventually(lambda: list(temporary.iterdir()), what="the demo's own state")
        demo.send_signal(signal.SIGTERM)
        assert await demo.wait() == 0
    assert list(temporary.iterdir()) == []
    assert not (home / "state").exists()
