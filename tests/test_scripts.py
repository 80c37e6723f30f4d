"""What scripts and CI use: a command after `--`, clients in the background, and the commands that talk to them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import signal
import ssl
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support import (
    PROGRAM,
    Process,
    RawOrigin,
    RawRequest,
    RawVisitor,
    Relay,
    eventually,
    free_port,
    listens,
    pattern,
    request,
    response,
)
from test_cli import CERTIFICATE, OTHER_TOKEN, TOKEN, Finished, run, serving, start, url_of, visit

import pytunnel

PYTUNNEL = [sys.executable, str(PROGRAM)]
SHELL_FUNCTION = f'pytunnel() {{ {shlex.join(PYTUNNEL)} "$@"; }}\n'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one server for all tests of this file."""
    home = tmp_path_factory.mktemp("server")
    args = ["serve", "--listen", "127.0.0.1:0", "--token", TOKEN, "--json"]
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTUNNEL_STATE_DIR": str(home / "state")}
    with (
        (home / "stderr.txt").open("wb") as stderr,
        subprocess.Popen(
            [*PYTUNNEL, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, env=env
        ) as process,
    ):
        assert process.stdout
        yield f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}"
        process.terminate()


class Machine:
    """A user's machine: a home of its own, and an environment that names the server and the token."""

    def __init__(self, home: Path, server: str) -> None:
        self.home = home
        self.server = server
        self.zone = f"localhost:{urlsplit(server).port}"
        self.env = {
            "PYTUNNEL_SERVER": server,
            "PYTUNNEL_TOKEN": TOKEN,
            "PYTUNNEL_CONFIG": str(home / "config.toml"),
            "LC_ALL": "C.UTF-8",
        }

    def url(self, name: str) -> str:
        return f"http://{name}.{self.zone}"

    async def start(self, *args: str, env: Mapping[str, str] | None = None) -> Process:
        return await start(*args, home=self.home, env={**self.env, **(env or {})})

    async def run(self, *args: str, env: Mapping[str, str] | None = None, timeout: float = 20.0) -> Finished:
        return await run(*args, home=self.home, env={**self.env, **(env or {})}, timeout=timeout)

    async def sh(self, script: str, timeout: float = 20.0) -> Finished:
        """Run a shell script in which `pytunnel` is the program."""
        command = ["/bin/sh", "-c", SHELL_FUNCTION + script]
        return await run(command=command, home=self.home, env=self.env, timeout=timeout)

    @contextlib.asynccontextmanager
    async def client(self, *args: str) -> AsyncIterator[Process]:
        """Run `connect` until the block ends, which begins when the tunnels work; the events are JSON."""
        async with await self.start("connect", *args, "--json") as client:
            await client.event("ready")
            yield client

    async def status(self) -> list[dict[str, object]]:
        """What `status --json` says."""
        result = await self.run("status", "--json")
        assert (result.status, result.stderr) == (0, [] if result.stdout else ["no client runs here"])
        return [json.loads(line) for line in result.stdout]

    @property
    def processes(self) -> list[int]:
        """All that runs with this machine's environment; zombies have none."""
        mark, found = f"PYTUNNEL_STATE_DIR={self.home}/state\0".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    @property
    def left(self) -> list[str]:
        """The files that clients have left behind."""
        return [path.name for path in (self.home / "state" / "run").glob("*")]

    async def wait_clean(self) -> None:
        """No process, note or log is left."""
        await eventually(lambda: not self.processes, what=f"no process of {self.home}")
        assert self.left == []


@pytest.fixture
def machine(tmp_path: Path, server: str) -> Iterator[Machine]:
    machine = Machine(tmp_path, server)
    yield machine
    for pid in machine.processes:  # of a test that failed, or that leaves a client to this
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
async def local() -> AsyncIterator[RawOrigin]:
    async with RawOrigin(response(b"hello"), read_body=True) as origin:
        yield origin


async def post(url: str, target: bytes, body: bytes = b"") -> None:
    """POST to a public URL."""
    parts = urlsplit(url)
    async with RawVisitor(parts.port or 0, timeout=60) as visitor:  # one of them is overtaken by 600
        await visitor.send(request("POST", target, parts.netloc.encode(), body=body))
        assert (await visitor.read_response("POST")).status == 200


# ---------------------------------------------------------------------------------------- A command after `--`


def script(body: str) -> list[str]:
    """A command that is a Python program."""
    return [sys.executable, "-c", "import os, signal, sys\n" + body]


async def test_a_command_runs_with_the_url_in_a_group_of_its_own(machine: Machine, local: RawOrigin) -> None:
    """stdout and stdin are the command's; the tunnel works while it runs, and its status is ours."""
    sh = 'test "$(ps -o pgid= -p $$)" -eq $$ && echo $PYTUNNEL_URL && curl -sS $PYTUNNEL_URL/from-cmd && cat && exit 7'
    args = f"connect {local.port} --name web -- sh -c {shlex.quote(sh)}"
    result = await machine.sh(f"printf '\\n%s\\n' from-stdin | pytunnel {args}")
    assert (result.status, result.stdout) == (7, [machine.url("web"), "hello", "from-stdin"]), result
    assert [r.target for r in local.requests] == [b"/from-cmd"]
    await machine.wait_clean()


async def test_a_command_does_not_get_the_secrets_of_the_tunnel(machine: Machine, local: RawOrigin) -> None:
    """A development server shows its environment on its error pages, and these are public now."""
    secrets = "PYTUNNEL_AUTH=ann:correct-horse PYTUNNEL_TOKEN_FILE=/nowhere"
    result = await machine.sh(f"{secrets} pytunnel connect {local.port} --name web -- env")
    names = {line.partition("=")[0] for line in result.stdout}
    assert result.status == 0 and "PYTUNNEL_URL" in names and "PATH" in names, result
    assert not names & set(pytunnel.SECRET_VARIABLES)


async def test_a_command_of_start(machine: Machine, local: RawOrigin) -> None:
    (machine.home / "pytunnel.toml").write_text(f'[tunnels.web]\ntarget = "{local.port}"\n')
    result = await machine.run("start", "web", "--", "sh", "-c", "echo $PYTUNNEL_URL")
    assert (result.status, result.stdout) == (0, [machine.url("web")]), result


async def test_a_command_s_flags_are_its_own_and_a_format_is_asked_for(machine: Machine, local: RawOrigin) -> None:
    args = ["connect", str(local.port), "--name", "web", "--format", "url={url}"]
    result = await machine.run(*args, "--", "echo", "--detach", "--", "--json", "--help")
    assert (result.status, sorted(result.stdout)) == (0, ["--detach -- --json --help", f"url={machine.url('web')}"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, 137), (signal.SIGTERM, 143), (signal.SIGSEGV, 139)])
async def test_a_command_killed_by_a_signal_is_128_and_its_number(
    machine: Machine, local: RawOrigin, number: int, status: int
) -> None:
    result = await machine.run("connect", str(local.port), "--", "sh", "-c", f"ulimit -c 0; kill -{number:d} $$")
    assert (result.status, result.stdout) == (status, []), result
    await machine.wait_clean()


@pytest.mark.parametrize("what", ["no-such-command", "/", "./not-executable"])
async def test_a_command_that_cannot_run_is_127(machine: Machine, local: RawOrigin, what: str) -> None:
    (machine.home / "not-executable").write_text("")
    result = await machine.run("connect", str(local.port), "--", what)
    assert (result.status, result.stdout) == (127, []), result
    reason = "no such file or directory" if what == "no-such-command" else "permission denied"
    assert result.error == f"error: cannot run {what}: {reason}"
    await machine.wait_clean()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_signals_go_to_the_whole_group_of_the_command(machine: Machine, local: RawOrigin, number: int) -> None:
    """The command catches it and waits for its child, which does not: else this would hang."""
    body = f"""
import subprocess
signal.signal({number:d}, lambda *_: print("got it", flush=True))
child = subprocess.Popen(["sh", "-c", "echo ready; exec sleep 1000"])
print("child", child.wait(), flush=True)
sys.exit(9)
"""
    async with await machine.start("connect", str(local.port), "--", *script(body)) as client:
        await client.stdout_line("ready")
        client.send_signal(number)
        assert await client.wait() == 9
        assert sorted(client.stdout) == sorted(["ready", "got it", f"child {-number:d}"])
    await machine.wait_clean()


async def test_a_command_may_outlive_a_signal(machine: Machine, local: RawOrigin) -> None:
    """What it ignores does not end the tunnel either."""
    body = "signal.signal(2, lambda *_: os.write(1, b'no\\n'))\nprint('ready', flush=True)\nwhile 1: signal.pause()"
    async with await machine.start("connect", str(local.port), "--name", "web", "--", *script(body)) as client:
        await client.stdout_line("ready")
        for _ in range(3):
            client.send_signal(signal.SIGINT)
            await client.stdout_line("no")
        assert (await visit(machine.url("web"))).body == b"hello"
        client.send_signal(signal.SIGTERM)
        assert await client.wait() == 143
    await machine.wait_clean()


async def test_what_a_command_leaves_behind_ends_with_it(machine: Machine, local: RawOrigin) -> None:
    sh = "sleep 1000 & sh -c 'sleep 1000 & echo started; sleep 1000' & read line; exit 3"
    result = await machine.sh(f"echo | pytunnel connect {local.port} -- sh -c {shlex.quote(sh)}")
    assert result.status == 3, result
    await machine.wait_clean()


async def test_a_command_ends_with_its_tunnel(machine: Machine, local: RawOrigin) -> None:
    async with await machine.start(
        "connect", str(local.port), "--name", "web", "--", "sh", "-c", "echo ready; sleep 1000"
    ) as client:
        await client.stdout_line("ready")
        async with machine.client(str(local.port), "--name", "web"):
            assert await client.wait() == 4
            assert client.stdout == ["ready"]
            assert "same token" in Finished(4, client.stdout, client.stderr).error
    await eventually(lambda: not machine.processes, what="the end of the command")


async def test_a_command_does_not_start_before_the_tunnel_works(machine: Machine) -> None:
    args = ["connect", "3000", "--", "sh", "-c", "echo no"]
    result = await machine.run(*args, env={"PYTUNNEL_TOKEN": OTHER_TOKEN})
    assert (result.status, result.stdout) == (3, []), result


@pytest.mark.parametrize("args", [["status"], ["connect", "3000", "--detach"], ["expect"], ["serve"]])
async def test_a_command_where_there_can_be_none_is_2(machine: Machine, args: list[str]) -> None:
    result = await machine.run(*args, "--", "true")
    assert (result.status, result.stdout) == (2, [])
    assert "a command after -- is for connect and start, without --detach" in result.error


class Screen:
    """A terminal with an interactive shell, as a person uses it."""

    def __init__(self, process: asyncio.subprocess.Process, leader: int) -> None:
        self._process, self._leader, self._seen = process, leader, b""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, machine: Machine) -> AsyncIterator[Screen]:
        leader, follower = pty.openpty()
        fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        os.set_blocking(leader, False)
        take = (
            "import fcntl, os, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
            "os.execvp('bash', ['bash', '--norc', '--noprofile', '-i'])"
        )
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(machine.home), "PYTUNNEL_STATE_DIR": f"{machine.home}/state",
            "PS1": "$ ", "TERM": "dumb", **machine.env,
        }  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", take, stdin=follower, stdout=follower, stderr=follower, env=environment,
            cwd=machine.home, start_new_session=True,
        )  # fmt: skip
        os.close(follower)
        screen = cls(process, leader)
        try:
            await screen.type("stty -echo; " + SHELL_FUNCTION.replace("\n", ";") + " echo '' begin\n", " begin")
            yield screen
        except BaseException as error:
            error.add_note(screen._seen.decode("utf-8", "replace"))
            raise
        finally:
            screen.close()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def close(self) -> None:
        """Close the terminal, as its window is closed."""
        if self._leader >= 0:
            os.close(self._leader)
            self._leader = -1

    async def type(self, keys: str, wanted: str) -> str:
        """Press keys, and return what is shown from then on up to the text that is wanted."""
        os.write(self._leader, keys.encode())
        return await self.read(wanted)

    async def read(self, wanted: str) -> str:
        """Return what is shown up to a text that begins a line or follows the prompt."""

        def look() -> re.Match[bytes] | None:
            with contextlib.suppress(OSError):
                self._seen += os.read(self._leader, 65536)
            return re.search(rb"(?:\n|^|\$ )" + re.escape(wanted.encode()) + rb".*\r?\n", self._seen)

        match = await eventually(look, 15.0, f"{wanted!r} on the terminal")
        assert match
        self._seen = self._seen[match.end() :]
        return match[0].decode().strip().removeprefix("$ ").strip()


ON_TERMINAL = """
own = os.tcgetpgrp(0) == os.getpgrp() == os.getpid()
def interrupted(*_):
    print("interrupted", flush=True)
    os._exit(5)
signal.signal(signal.SIGINT, interrupted)
print("foreground", own, flush=True)
for line in sys.stdin:
    print("line", line.strip(), os.tcgetpgrp(0) == os.getpgrp(), flush=True)
"""


async def test_on_a_terminal_the_command_has_the_foreground(machine: Machine, local: RawOrigin) -> None:
    """It reads what is typed; Ctrl-Z stops it and us, fg resumes both, Ctrl-C is its own, the shell gets its status."""
    (machine.home / "cmd.py").write_text("import os, signal, sys\n" + ON_TERMINAL)
    async with Screen.open(machine) as screen:
        command = f"pytunnel connect {local.port} --name web -- {sys.executable} cmd.py; echo '' status $?\n"
        assert await screen.type(command, "foreground") == "foreground True"
        assert await screen.type("one\n", "line") == "line one True"
        await screen.type("\x1a", "[1]")
        stopped = await screen.type("jobs -l\n", "[1]")
        assert "Stopped" in stopped
        os.write(screen._leader, b"fg\n")
        assert await screen.type("two\n", "line") == "line two True"
        assert (await visit(machine.url("web"))).body == b"hello"
        assert await screen.type("\x03", "interrupted") == "interrupted"
        assert await screen.type("echo '' status $?\n", " status") == "status 5"
        assert await screen.type("echo '' back\n", " back") == "back"
    await machine.wait_clean()


async def test_on_a_terminal_a_command_that_ends_gives_it_back(machine: Machine, local: RawOrigin) -> None:
    async with Screen.open(machine) as screen:
        command = f"pytunnel connect {local.port} --name web -- sh -c 'exit 3'; echo '' status $?\n"
        assert await screen.type(command, " status") == "status 3"
        assert await screen.type("read x; echo '' got $x\nword\n", " got") == "got word"
    await machine.wait_clean()


# ---------------------------------------------------------------------------------------- --detach


async def test_detach_returns_with_the_url_alone(machine: Machine, local: RawOrigin) -> None:
    """The line of the help, in a shell; the client goes on, and nothing of it is left after stop."""
    result = await machine.sh(f'URL=$(pytunnel connect {local.port} --name web --detach); echo "$? <$URL>"')
    assert (result.status, result.stdout, result.stderr) == (0, [f"0 <{machine.url('web')}>"], []), result
    assert (await visit(machine.url("web"))).body == b"hello"
    (status,) = await machine.status()
    assert status["pid"] in machine.processes
    stopped = await machine.run("stop")
    assert (stopped.status, stopped.stdout, stopped.stderr) == (0, [], ["stopped web"])
    await machine.wait_clean()


async def test_detach_several_targets_formats_and_start(machine: Machine, local: RawOrigin) -> None:
    (machine.home / "pytunnel.toml").write_text(f'[tunnels.c]\ntarget = "{local.port}"\n')
    script = f"""
        pytunnel connect a={local.port} b={local.port} --detach --format 'url={{url}}' >>output &&
        pytunnel start --detach --json >>output && cat output && pytunnel stop --all
    """
    result = await machine.sh(script)
    ready = {"event": "ready", "url": machine.url("c"), "name": "c", "target": str(local.port)}
    lines = [f"url={machine.url('a')}", f"url={machine.url('b')}", json.dumps(ready)]
    assert (result.status, result.stdout) == (0, lines), result
    assert sorted(result.stderr) == ["stopped a, b", "stopped c"]
    await machine.wait_clean()


async def test_detach_with_a_format_of_two_lines(machine: Machine, local: RawOrigin) -> None:
    format = "url={url}\nname={name}"
    result = await machine.run("connect", f"web={local.port}", "--detach", "--format", format)
    assert (result.status, result.stdout) == (0, [f"url={machine.url('web')}", "name=web"]), result


async def test_detach_that_fails_gives_its_line_and_status(machine: Machine) -> None:
    """Each waits for what the client has to say, and leaves nothing."""
    refused = await machine.run("connect", "3000", "--detach", "--token", OTHER_TOKEN)
    assert (refused.status, refused.stdout, len(refused.stderr)) == (3, [], 1), refused
    assert "pytunnel serve" in refused.error
    usage = await machine.run("connect", "nonsense", "--detach")
    assert (usage.status, usage.stdout, len(usage.stderr)) == (2, [], 1), usage
    local_down = await machine.run("connect", str(free_port()), "--detach", "--wait-local=0.1")
    assert (local_down.status, local_down.stdout, len(local_down.stderr)) == (6, [], 1), local_down
    assert local_down.error.endswith("did not come up within 0.1 s")
    await machine.wait_clean()


async def test_detach_with_a_name_of_another_token_is_4(machine: Machine, local: RawOrigin) -> None:
    home = machine.home / "server"
    async with serving(home, "--token", TOKEN) as server:
        args = ["connect", str(local.port), "--name", "web", "--server"]
        async with await start(*args, server.url, "--token", TOKEN) as client:
            await url_of(client)
    async with serving(home, "--token", OTHER_TOKEN) as server:
        result = await machine.run(*args, server.url, "--token", OTHER_TOKEN, "--detach")
    assert (result.status, result.stdout, len(result.stderr)) == (4, [], 1), result
    assert "'web'" in result.error
    await machine.wait_clean()


async def test_detach_without_a_server_is_5(machine: Machine) -> None:
    """With --json, too, where what is said meanwhile is no sign that it works."""
    nowhere = f"http://127.0.0.1:{free_port()}"
    args = ["connect", "3000", "--detach", "--max-retries", "1", "--server", nowhere]
    plain, as_json = await asyncio.gather(machine.run(*args), machine.run(*args, "--json"))
    assert (plain.status, plain.stdout) == (5, []), plain
    assert plain.error.startswith(f"error: no server at {nowhere}: connection refused")
    assert as_json.status == 5, as_json
    assert "ready" not in [json.loads(line)["event"] for line in as_json.stdout]
    await machine.wait_clean()


async def test_detached_clients_survive_their_terminal(machine: Machine, local: RawOrigin) -> None:
    async with Screen.open(machine) as screen:
        url = await screen.type(f"pytunnel connect {local.port} --name web --detach\n", "http")
        assert url == machine.url("web")
        screen.close()
    await eventually(lambda: len(machine.processes) == 1, what="the client alone")
    (pid,) = machine.processes
    assert (await visit(url)).body == b"hello"
    (status,) = await machine.status()
    assert (status["pid"], status["requests"], status["connected"]) == (pid, 1, True)
    assert (await machine.run("stop", "web")).status == 0
    await machine.wait_clean()


# ---------------------------------------------------------------------------------------- Closed descriptors


async def closed(machine: Machine, *args: str) -> Process:
    """Run a command with stdout and stderr closed; its exit status is the only line."""
    line = f"{shlex.join([*PYTUNNEL, *args])} >&- 2>&-; echo status $?"
    return await start(home=machine.home, env=machine.env, command=["/bin/sh", "-c", line])


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["plain", "json"])
async def test_a_client_whose_output_is_closed_works(machine: Machine, local: RawOrigin, flags: list[str]) -> None:
    async with await closed(machine, "connect", f"web={local.port}", "--debug", *flags) as client:
        await eventually(lambda: [name for name in machine.left if name.endswith(".json")], 20, "the client's note")
        for _ in range(3):
            assert (await visit(machine.url("web"))).body == b"hello"
        (row,) = await machine.status()
        assert (row["name"], row["requests"]) == ("web", 3)
        async with await closed(machine, "status", *flags) as status:
            assert await status.wait() == 0
            assert (status.stdout, status.stderr) == (["status 0"], [])
        assert (await machine.run("stop")).status == 0
        assert await client.wait() == 0
        assert (client.stdout, client.stderr) == (["status 0"], [])
    await machine.wait_clean()


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["status"], 0),
        (["status", "--json"], 0),
        (["stop"], 1),
        (["connect", "nonsense"], 2),
        (["connect", "3000", "--token", OTHER_TOKEN], 3),
        (["connect", "3000", "--token", OTHER_TOKEN, "--json", "--debug"], 3),
        (["connect", "3000", "--token", OTHER_TOKEN, "--detach"], 3),
        (["connect", "3000", "--nonsense"], 2),
        (["config"], 0),
        (["--version"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_closed_outputs_leave_the_exit_status_alone(machine: Machine, args: list[str], status: int) -> None:
    async with await closed(machine, *args) as process:
        assert await process.wait(20) == 0
        assert (process.stdout, process.stderr) == ([f"status {status}"], [])


# ---------------------------------------------------------------------------------------- status and stop


async def test_status_and_stop_of_two_clients(machine: Machine, local: RawOrigin) -> None:
    target = str(local.port)
    async with (
        machine.client(f"a={target}", f"b={target}") as first,
        machine.client(f"c={target}") as second,
    ):
        await visit(machine.url("a"))
        status = {str(row["name"]): row for row in await machine.status()}
        assert sorted(status) == ["a", "b", "c"]
        for name, pid, requests in (("a", first.pid, 1), ("b", first.pid, 0), ("c", second.pid, 0)):
            inspector = status[name].pop("inspector")
            assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+", str(inspector))
            row = {"name": name, "url": machine.url(name), "target": target, "connected": True}
            assert status[name] == {**row, "requests": requests, "pid": pid}

        plain = await machine.run("status")
        rows = [re.sub("  http://127.*", "", line) for line in plain.stdout]
        line = "{0}  {1} -> {2}  connected, {3} requests"
        expected = [line.format(name, machine.url(name), target, n) for name, n in (("a", 1), ("b", 0), ("c", 0))]
        assert (plain.status, sorted(rows), plain.stderr) == (0, expected, [])

        for args in ([], ["nobody"]):
            result = await machine.run("stop", *args)
            assert (result.status, result.stdout, len(result.stderr)) == (1, [], 1)
            assert re.fullmatch("error: which tunnel\\? these run here: (a, b, c|c, a, b)", result.error), result

        stopped = await machine.run("stop", "b")
        assert (stopped.status, stopped.stdout, stopped.stderr) == (0, [], ["stopped a, b"])
        assert await first.wait() == 0
        assert [row["name"] for row in await machine.status()] == ["c"]
        stopped = await machine.run("stop")
        assert (stopped.status, stopped.stdout, stopped.stderr) == (0, [], ["stopped c"])
        assert await second.wait() == 0
    await machine.wait_clean()


async def test_without_a_client(machine: Machine) -> None:
    status = await machine.run("status")
    assert (status.status, status.stdout, status.stderr) == (0, [], ["no client runs here"])
    none = (1, [], "error: no client runs here; start one with pytunnel connect")
    for args in (["stop"], ["stop", "web"], ["expect", "--path", "/x"], ["replay", "1"]):
        result = await machine.run(*args)
        assert (result.status, result.stdout, result.error) == none, args
    result = await machine.run("stop", "--all")
    assert (result.status, result.stdout) == (0, []), result


async def test_a_killed_client_is_no_client(machine: Machine, local: RawOrigin) -> None:
    """Its note is removed by whoever reads it next; one that was damaged is no trouble."""
    result = await machine.run("connect", str(local.port), "--name", "web", "--detach")
    assert (result.status, result.stdout) == (0, [machine.url("web")])
    (row,) = await machine.status()
    assert isinstance(row["pid"], int)
    os.kill(row["pid"], signal.SIGKILL)
    await eventually(lambda: not machine.processes, what="its end")
    assert f"{row['pid']}.json" in machine.left
    for name, text in (("1.json", "{"), ("2.json", "[]"), ("3.json", '{"pid": "x"}'), ("4.json", "")):
        (machine.home / "state" / "run" / name).write_text(text)
    assert await machine.status() == []
    assert [name for name in machine.left if name.endswith(".json")] == []
    stop = await machine.run("stop", "web")
    assert (stop.status, stop.error) == (1, "error: no client runs here; start one with pytunnel connect")


JSON_TYPE = [(b"Content-Type", b"application/json")]
NEW_OWNERS = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "no words": b"\x15\x03\x01\x00\x02\x02\x46",
    "hangs up": b"",
    "a page": response(b"<h1>hello</h1>", headers=[(b"Content-Type", b"text/html")]),
    "no type": response(b"hello"),
    "an object": response(b"{}", headers=JSON_TYPE),
    "a list": response(b"[]", headers=JSON_TYPE),
    "half an object": response(b'{"pid":', headers=JSON_TYPE),
    "another process": response(b'{"pid": 1}', headers=JSON_TYPE),
    "no text": response(b"\xff\xfe", headers=JSON_TYPE),
    "an error": response(b"no", 500),
    "nobody": None,
}


@pytest.mark.parametrize("name", NEW_OWNERS)
async def test_a_note_whose_port_is_another_s_now_is_removed(machine: Machine, name: str) -> None:
    """What a killed client has left neither shows, nor keeps its port from being a target."""
    handler: Any = NEW_OWNERS[name]
    async with RawOrigin(handler or b"", keep_alive=False) as local:
        port = local.port
        if handler is None:
            await local.aclose()
        tunnels = [{"name": "old", "url": "http://old.localhost", "target": "3000"}]
        note = {"pid": 4_000_000, "inspector": f"http://127.0.0.1:{port}", "token": "x", "tunnels": tunnels}
        path = machine.home / "state" / "run" / "4000000.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(note))
        status = await machine.run("status")
        assert (status.status, status.stdout, status.stderr) == (0, [], ["no client runs here"])
        assert not path.exists()
        path.write_text(json.dumps(note))
        async with machine.client(f"web={port}"):
            assert not path.exists()
            assert [row["name"] for row in await machine.status()] == ["web"]


async def test_a_client_that_is_stopped_for_a_moment_is_not_forgotten(machine: Machine, local: RawOrigin) -> None:
    async with machine.client(f"web={local.port}") as client:
        client.send_signal(signal.SIGSTOP)
        try:
            await machine.run("status")
        finally:
            client.send_signal(signal.SIGCONT)
        assert [row["name"] for row in await machine.status()] == ["web"]


async def test_status_tells_what_is_wrong(machine: Machine, local: RawOrigin) -> None:
    async with serving(machine.home / "server", "--token", TOKEN, port=free_port()) as server:  # nobody takes it
        args = [f"web={local.port}", "--server", server.url, "--token", TOKEN]
        async with machine.client(*args) as client:
            server.process.send_signal(signal.SIGKILL)
            await client.event("disconnected")
            await client.event("disconnected", reason="connection refused")
            (row,) = await machine.status()
            assert (row["connected"], row["url"]) == (False, f"http://web.localhost:{server.port}")
            plain = await machine.run("status")
            assert len(plain.stdout) == 1 and f"-> {local.port}  connection refused, 0 requests  " in plain.stdout[0]


async def test_the_note_of_a_client_is_private(machine: Machine, local: RawOrigin) -> None:
    async with machine.client(f"web={local.port}") as client:
        directory = machine.home / "state" / "run"
        assert [path.name for path in directory.iterdir()] == [f"{client.pid}.json"]
        assert (directory / f"{client.pid}.json").stat().st_mode & 0o777 == 0o600
        assert directory.stat().st_mode & 0o777 == 0o700


async def test_an_inspector_is_no_target(machine: Machine, local: RawOrigin) -> None:
    """In no spelling, and neither as a route."""
    async with machine.client(f"web={local.port}"):
        (row,) = await machine.status()
        port = urlsplit(str(row["inspector"])).port
        spellings = [str(port), f"http://127.0.0.1:{port}", f"[::1]:{port}"]
        for args in (*([f"x={text}"] for text in spellings), [str(local.port), "--route", f"/x={port}"]):
            result = await machine.run("connect", *args)
            assert (result.status, result.stdout) == (2, []), (args, result)
            assert result.error == f"error: port {port} is a pytunnel inspector; it stays on this machine"


async def test_an_inspector_leaves_its_client_s_target_alone(machine: Machine) -> None:
    """A service that is not up yet: its port is free, and stays so."""
    port = next(port for port in range(4040, 4060) if not listens(port))  # the one it would take
    async with machine.client(f"web={port}", "--route", f"/api={port + 1}"):
        (row,) = await machine.status()
        assert urlsplit(str(row["inspector"])).port not in (port, port + 1)


# ---------------------------------------------------------------------------------------- expect

LINE = r"{status} {method:<7} {path}  [0-9]+ ms"


def is_line(text: str, path: str, method: str = "POST", status: object = 200, error: str = "") -> bool:
    """Whether it is the line of this exchange."""
    pattern = LINE.format(status=status, method=method, path=re.escape(path)) + (error and f"  {error}")
    return re.fullmatch(pattern, text) is not None


async def test_expect_finds_what_has_arrived(machine: Machine, local: RawOrigin) -> None:
    async with machine.client(f"web={local.port}", f"api={local.port}"):
        await post(machine.url("web"), b"/hook/1?x=1", b"one")
        await post(machine.url("api"), b"/hook/2", b"two")
        found = [
            (["--method", "POST", "--path", "/hook/1", "--count", "1", "--timeout", "60"], "/hook/1?x=1"),
            (["--method", "post", "--path", "/hook/*", "--count", "2"], "/hook/2"),
            (["--path", "/hook/?"], "/hook/1?x=1"),
            (["--name", "api"], "/hook/2"),
            ([], "/hook/1?x=1"),
            (["--path", "/hook/1", "--timeout", "0"], "/hook/1?x=1"),
        ]
        for args, path in found:
            result = await machine.run("expect", *args)
            assert (result.status, len(result.stdout), result.stderr) == (0, 1, []), (args, result)
            assert is_line(result.stdout[0], path), (args, result)

        result = await machine.run("expect", "--path", "/hook/1", "--json")
        (row,) = [json.loads(line) for line in result.stdout]
        assert row.pop("ms") >= 0 and row.pop("time") > 1.6e9
        assert row == {
            "id": 1, "name": "web", "method": "POST", "path": "/hook/1?x=1", "status": 200, "bytes_in": 3,
            "bytes_out": 5, "error": None, "replay_of": None,
        }  # fmt: skip

        missing = [
            (["--path", "/hook/*", "--count", "3"], "fewer than 3 /hook/*"),
            (["--method", "GET"], "fewer than 1 GET"),
            (["--path", "/hook/1?x=1"], "fewer than 1 /hook/1?x=1"),  # the query is no part of it
            (["--path", "/HOOK/1"], "fewer than 1 /HOOK/1"),
            (["--name", "api", "--method", "POST", "--path", "/hook/1"], "fewer than 1 POST /hook/1 api"),
        ]
        for args, message in missing:
            result = await machine.run("expect", *args, "--timeout", "0.05")
            assert (result.status, result.stdout, len(result.stderr)) == (1, [], 1), (args, result)
            assert result.error == f"error: {message} within 0.05 s"


async def test_expect_waits_for_what_comes(machine: Machine, local: RawOrigin) -> None:
    """It is waiting when the last one arrives."""
    async with machine.client(f"web={local.port}"):
        (row,) = await machine.status()
        port = urlsplit(str(row["inspector"])).port or 0
        await post(machine.url("web"), b"/hook", b"1")
        async with await machine.start("expect", "--path", "/hook", "--count", "2", "--save", "saved") as expect:
            await eventually(lambda: connections(expect.pid, port) == [b"/api/wait"], what="a waiting command")
            await post(machine.url("web"), b"/other", b"3")
            await post(machine.url("web"), b"/hook", b"2")
            assert await expect.wait() == 0, expect.output()
            assert is_line(expect.stdout[0], "/hook") and len(expect.stdout) == 1
        assert (machine.home / "saved").read_bytes() == b"2"


async def test_expect_counts_an_event_stream_that_is_still_open(machine: Machine) -> None:
    async def stream(_: RawRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await reader.read()

    async with RawOrigin(stream) as local, machine.client(f"web={local.port}"):
        parts = urlsplit(machine.url("web"))
        async with RawVisitor(parts.port or 0) as visitor:
            await visitor.send(request("GET", b"/events", parts.netloc.encode()))
            await visitor.read_until(b"data: 1")
            result = await machine.run("expect", "--path", "/events", "--timeout", "10")
            assert (result.status, len(result.stdout), result.stderr) == (0, 1, []), result
            assert is_line(result.stdout[0], "/events", "GET")


async def test_expect_counts_a_request_that_600_others_overtook(machine: Machine) -> None:
    asyncio.get_running_loop().set_debug(False)  # it would take most of the time of so many requests
    go_on = asyncio.Event()

    async def answer(asked: RawRequest, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if asked.target == b"/slow":
            await go_on.wait()
        writer.write(response(b"hello"))

    async with RawOrigin(answer, read_body=True) as local, machine.client(f"web={local.port}"):
        slow = asyncio.ensure_future(post(machine.url("web"), b"/slow", b"the slow one"))
        await local.wait_requests(1)
        parts = urlsplit(machine.url("web"))
        async with RawVisitor(parts.port or 0) as visitor:
            for _ in range(600):
                await visitor.send(request("GET", b"/other", parts.netloc.encode()))
                assert (await visitor.read_response()).status == 200
        go_on.set()
        await slow
        args = ["--method", "POST", "--path", "/slow", "--timeout", "10", "--save", "body"]
        result = await machine.run("expect", *args)
        assert (result.status, len(result.stdout), result.stderr) == (0, 1, []), result
        assert is_line(result.stdout[0], "/slow")
        assert (machine.home / "body").read_bytes() == b"the slow one"


def connections(pid: int, port: int) -> list[bytes]:
    """The inspector's requests that a process has under way: of those, only /api/wait lasts."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {row[9] for row in rows if row[2].endswith(f":{port:04X}") and row[3] == "01"}
    held = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if re.sub(r"\D", "", os.readlink(descriptor)) in inodes:
                held.append(b"/api/wait")
    return held


@pytest.mark.parametrize(
    "body", [b"", b"\0\xff\r\n\x80binary\n", '{"grüße": "漢字"}'.encode(), pattern(0, 256 * 1024)],
    ids=["empty", "binary", "unicode", "256 KiB"],
)  # fmt: skip
async def test_expect_saves_the_exact_bytes(machine: Machine, local: RawOrigin, body: bytes) -> None:
    async with machine.client(f"web={local.port}"):
        await post(machine.url("web"), b"/hook", body)
        result = await machine.run("expect", "--path", "/hook", "--save", "body")
        assert (result.status, len(result.stdout)) == (0, 1), result
        assert (machine.home / "body").read_bytes() == body


async def test_expect_saves_nothing_that_is_not_whole(machine: Machine, local: RawOrigin) -> None:
    async with machine.client(f"web={local.port}"):
        await post(machine.url("web"), b"/hook", bytes(262145))
        result = await machine.run("expect", "--path", "/hook", "--save", "body")
        assert (result.status, result.stdout) == (1, []), result
        assert result.error == "error: only 262144 of its 262145 bytes were kept"
        result = await machine.run("expect", "--path", "/hook", "--count", "1", "--save", "missing/body")
        assert (result.status, result.stdout) == (1, []), result
        assert result.error
        assert sorted(os.listdir(machine.home)) == ["state"]


# ---------------------------------------------------------------------------------------- replay


async def test_replay_sends_the_same_again(machine: Machine, local: RawOrigin) -> None:
    body = b"\0\xff binary \r\n"
    async with machine.client(f"web={local.port}"):
        parts = urlsplit(machine.url("web"))
        async with RawVisitor(parts.port or 0) as visitor:
            fields = [(b"X-One", b"1"), (b"x-one", b"2"), (b"Cookie", b"a=b"), (b"Content-Type", b"a/b")]
            await visitor.send(request("PUT", b"/a%20b?c=%C3%A4", parts.netloc.encode(), fields, body))
            assert (await visitor.read_response("PUT")).status == 200
        once = await machine.run("replay", "1")
        assert (once.status, len(once.stdout), once.stderr) == (0, 1, []), once
        assert is_line(once.stdout[0], "/a%20b?c=%C3%A4", "PUT")
        thrice = await machine.run("replay", "1", "--times", "3", "--json")
        rows = [json.loads(line) for line in thrice.stdout]
        assert [(row["id"], row["replay_of"], row["status"]) for row in rows] == [(n, 1, 200) for n in (3, 4, 5)]
        assert len(local.requests) == 5
        for again in local.requests[1:]:
            assert again.head.splitlines()[0] == local.requests[0].head.splitlines()[0]
            assert sorted(again.headers) == sorted(local.requests[0].headers)
            assert again.body == body


async def test_a_replay_is_no_request_that_arrived(machine: Machine, local: RawOrigin) -> None:
    async with machine.client(f"web={local.port}"):
        await post(machine.url("web"), b"/hook")
        assert (await machine.run("replay", "1")).status == 0
        result = await machine.run("expect", "--path", "/hook", "--count", "2", "--timeout", "0.05")
        assert (result.status, result.stdout) == (1, []), result


async def test_replay_that_fails(machine: Machine) -> None:
    local = RawOrigin(response(b"no", 500, reason=b"Oops"), read_body=True)
    async with local, machine.client(f"web={local.port}") as client:
        await visit(machine.url("web"), target=b"/x")
        parts = urlsplit(machine.url("web"))
        async with RawVisitor(parts.port or 0) as visitor:
            await visitor.send(request("POST", b"/long", parts.netloc.encode(), body=bytes(262145)))
            assert (await visitor.read_response("POST")).status == 500
        answered = await machine.run("replay", "1")
        assert (answered.status, len(answered.stdout), answered.stderr) == (1, 1, [])
        assert is_line(answered.stdout[0], "/x", "GET", 500)
        for args, message in (
            (["99"], "no such exchange: it was cleared, or it made room for newer ones"),
            (["2"], "only 262144 bytes of its content were kept"),
        ):
            result = await machine.run("replay", *args)
            assert (result.status, result.stdout, len(result.stderr)) == (1, [], 1), result
            assert message in result.error
        for args in (["x"], [], ["1", "--times", "many"]):
            result = await machine.run("replay", *args)
            assert (result.status, result.stdout, len(result.stderr)) == (2, [], 1), result
            assert "pytunnel replay --help" in result.error
        await local.aclose()
        down = await machine.run("replay", "1", "--times", "2")
        assert (down.status, len(down.stdout), down.stderr) == (1, 2, []), down
        error = f"cannot connect to {local.port}: connection refused"
        assert all(is_line(line, "/x", "GET", 502, error) for line in down.stdout), down
        assert client.returncode is None


# ---------------------------------------------------------------------------------------- What `connect` waits for


async def test_wait_local_goes_on_when_the_service_is_up(machine: Machine) -> None:
    """It tries more than once: a service that breaks the TLS handshake off is not up, and shows that it was tried."""
    (machine.home / "pem").write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(machine.home / "pem")
    tried: asyncio.Queue[None] = asyncio.Queue()

    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        tried.put_nowait(None)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(response(b"late", headers=[(b"Connection", b"close")]))
            writer.close()

    listener = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with await machine.start("connect", f"web=https://127.0.0.1:{port}", "--wait-local") as client:
        for _ in range(3):
            await asyncio.wait_for(tried.get(), 10)
        assert client.stdout == [] and client.returncode is None
        listener.close()
        await listener.wait_closed()
        async with await asyncio.start_server(answer, "127.0.0.1", port, ssl=context):
            assert await url_of(client) == machine.url("web")
            assert (await visit(machine.url("web"))).body == b"late"
            client.send_signal(signal.SIGTERM)
            assert await client.wait() == 0


async def test_wait_local_gives_up(machine: Machine, local: RawOrigin) -> None:
    """All targets have to be up, routes are targets, and the server is not dialled before; a folder always is."""
    async with Relay(0) as relay:
        relay.refuse = True
        port = free_port()
        server = f"http://127.0.0.1:{relay.port}"
        for targets in ([f"a={port}"], [f"a={local.port}", f"b={port}"], [str(local.port), "--route", f"/x={port}"]):
            result = await machine.run("connect", *targets, "--wait-local=0.2", "--server", server)
            assert (result.status, result.stdout, len(result.stderr)) == (6, [], 1), result
            reason = f"error: cannot connect to {port}: connection refused; it did not come up within 0.2 s"
            assert result.error == reason
        assert relay.accepted == 0
    async with await machine.start("connect", "web=.", "--wait-local=0") as client:
        assert await url_of(client) == machine.url("web")


@pytest.mark.parametrize("retries", [0, 2])
async def test_max_retries_is_how_often_a_lost_server_is_dialled(machine: Machine, retries: int) -> None:
    async with serving(machine.home / "server", "--token", TOKEN) as server, Relay(server.port) as relay:
        args = ["web=3000", "--server", f"http://127.0.0.1:{relay.port}", "--max-retries", str(retries)]
        async with machine.client(*args) as client:
            relay.refuse = True
            await relay.cut("reset")
            assert await client.wait() == 5
            assert len([event for event in client.events if event["event"] == "disconnected"]) == retries
            assert bool(relay.refused) is bool(retries)
            error = [line for line in client.stderr if line.startswith("error: ")]
            assert len(error) == 1 and error[0].endswith(f"--max-retries {retries} are used up"), client.output()
    await machine.wait_clean()


async def test_max_retries_starts_anew_with_each_link(machine: Machine, local: RawOrigin) -> None:
    async with serving(machine.home / "server", "--token", TOKEN) as server, Relay(server.port) as relay:
        args = [f"web={local.port}", "--server", f"http://127.0.0.1:{relay.port}", "--max-retries", "1"]
        async with machine.client(*args) as client:
            for _ in range(2):
                await relay.cut("reset")
                await client.event("reconnected")
            assert client.returncode is None


async def test_max_retries_counts_before_the_first_link_too(machine: Machine) -> None:
    async with Relay(0) as relay:
        relay.refuse = True
        args = ["connect", "3000", "--max-retries", "1", "--server", f"http://127.0.0.1:{relay.port}"]
        result = await machine.run(*args)
        assert (result.status, result.stdout) == (5, []), result
        assert relay.refused <= 2 * 2  # aiohttp dials once more when its connection is reset


async def test_a_host_that_is_refused_is_hinted_at(machine: Machine) -> None:
    """In a line of its own on stderr, or an event; once, however often it happens."""
    message = "the local service refuses this host name; add --host-header rewrite"
    async with RawOrigin(response(b"Invalid Host header", 403)) as local:
        for flags in ([], ["--json"]):
            async with await machine.start("connect", f"web={local.port}", *flags) as client:
                await client.stdout_line(machine.url("web"))
                for _ in range(3):
                    assert (await visit(machine.url("web"))).status == 403
                client.send_signal(signal.SIGTERM)
                assert await client.wait() == 0
                hints = [line for line in client.stdout + client.stderr if message in line]
                assert hints == [json.dumps({"event": "hint", "message": message}) if flags else f"hint: {message}"]


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["plain", "json"])
async def test_secrets_are_masked_in_what_a_client_says(machine: Machine, local: RawOrigin, flags: list[str]) -> None:
    """Wherever lines go: its own, and those of the commands that ask it."""
    target = b"/hook?access_token=hush1&user[password]=hush2&jwt=hush3&x=plain"
    shown = "/hook?access_token=•••&user[password]=•••&jwt=•••&x=plain"
    async with await machine.start("connect", f"web={local.port}", *flags) as client:
        await client.stdout_line(machine.url("web"))
        await post(machine.url("web"), target)
        results = [await machine.run("expect", *flags), await machine.run("replay", "1", *flags)]
        client.send_signal(signal.SIGTERM)
        assert await client.wait() == 0
    lines = client.stdout + client.stderr
    for result in results:
        assert (result.status, result.stderr) == (0, [])
        lines += result.stdout
    assert "hush" not in "\n".join(lines)
    told = [json.loads(line).get("path") for line in lines if line.startswith("{")] if flags else lines
    assert len([text for text in told if text and shown in text]) == 4, lines  # the request, its replay, and both again
    assert local.requests[1].target == target


# ---------------------------------------------------------------------------------------- --url-file and --format


async def test_the_url_file_is_there_while_the_tunnel_works(machine: Machine, local: RawOrigin) -> None:
    directory = machine.home / "out"
    directory.mkdir()
    path = directory / "url"
    args = ["connect", f"a={local.port}", f"b={local.port}", "--url-file", str(path)]
    async with await machine.start(*args) as client:
        await eventually(path.exists, 10, "the URL file")
        assert path.read_text() == f"{machine.url('a')}\n{machine.url('b')}\n"  # whole from its first moment
        assert os.listdir(directory) == ["url"]
        assert (await visit(machine.url("a"))).body == b"hello"
        client.send_signal(signal.SIGTERM)
        assert await client.wait() == 0
    assert os.listdir(directory) == []


async def test_a_url_file_that_cannot_be_written_is_one_line(machine: Machine, local: RawOrigin) -> None:
    (machine.home / "folder").mkdir()
    os.mkfifo(machine.home / "pipe")
    for path, status, error in (
        ("missing/url", 1, "cannot write missing/url: no such file or directory"),
        ("folder", 2, "--url-file folder is there, and not a file; give another path"),
        ("pipe", 2, "--url-file pipe is there, and not a file; give another path"),
    ):
        result = await machine.run("connect", f"web={local.port}", "--url-file", path)
        assert (result.status, result.stdout) == (status, []), result
        assert result.error == f"error: {error}"
        assert sorted(os.listdir(machine.home)) == ["folder", "pipe", "state"]


async def test_a_url_file_of_an_earlier_run_is_gone_before_the_server_is_dialled(machine: Machine) -> None:
    """Else a script would read a URL that does not work yet, or any more."""
    path = machine.home / "url"
    path.write_text("http://old.example\n")
    async with Relay(urlsplit(machine.server).port or 0) as relay:
        relay.set_mode("blackhole")
        args = ["connect", f"web={free_port()}", "--url-file", "url", "--server", f"http://127.0.0.1:{relay.port}"]
        async with await machine.start(*args) as client:
            await relay.wait_accepted(1, 20)
            assert not path.exists()
            relay.set_mode("pass")
            url = await url_of(client)
            assert path.read_text() == f"{url}\n"


async def test_a_client_that_was_refused_leaves_no_url_file(machine: Machine) -> None:
    """Nor one of an earlier run that was killed."""
    path = machine.home / "url"
    path.write_text("http://old.example\n")
    result = await machine.run("connect", "3000", "--url-file", "url", "--token", OTHER_TOKEN)
    assert (result.status, result.stdout) == (3, [])
    assert not path.exists()


async def test_a_format_for_github(machine: Machine, local: RawOrigin) -> None:
    result = await machine.sh(f"""
        pytunnel connect web={local.port} --detach --format 'url={{url}}' >>"$HOME/github" && cat "$HOME/github"
    """)
    assert (result.status, result.stdout, result.stderr) == (0, [f"url={machine.url('web')}"], [])
    fields = await machine.run("connect", f"api={local.port}", "--detach", "--format", "{name} {target} {url!r:>40} {{")
    assert fields.stdout == [f"api {local.port} {machine.url('api')!r:>40} {{"]


@pytest.mark.parametrize("format", ["{nope}", "{", "}", "{}", "{0}", "{url.no}", "{url[0]}", "{url:d}", "{url!x}"])
async def test_a_format_that_is_none_is_2(machine: Machine, format: str) -> None:
    result = await machine.run("connect", "3000", "--format", format)
    assert (result.status, result.stdout) == (2, []), result
    assert result.error == f"error: --format {format!r} has other fields than url, name and target"


# ---------------------------------------------------------------------------------------- Usage


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["connect", "3000", "--max-retries", "many"], "pytunnel connect --help"),
        (["connect", "3000", "--wait-local=long"], "pytunnel connect --help"),
        (["connect", "3000", "--route", "api=8080"], "/api=8080"),
        (["connect", "3000", "--route", "/api=nonsense"], "a port like 3000"),
        (["connect", "3000", "--header", "no colon"], "Name: value"),
        (["connect", "3000", "--header", "Bad Name: x"], "characters"),
        (["connect", "3000", "--header", "X: a\nb"], "characters"),
        (["connect", "3000", "--remove-header", "Content-Length"], "Content-Length belongs to the connection"),
        (["connect", "3000", "--response-header", "Connection: close"], "Connection belongs to the connection"),
        (["connect", "3000", "--remove-response-header", "a b"], "characters"),
        (["connect", "3000", "--host-header", "a b"], "rewrite"),
        (["connect", "./no-such-folder"], "there is no folder"),
        (["expect", "--count", "x"], "pytunnel expect --help"),
        *((["expect", "--timeout", text], "pytunnel expect --help") for text in ("inf", "nan", "-1", "1e9", "")),
        *((["expect", "--count", text], "pytunnel expect --help") for text in ("0", "-1", "1.5", "inf")),
        *((["replay", "1", "--times", text], "pytunnel replay --help") for text in ("0", "-1", "nan")),
        *((["connect", "3000", f"--wait-local={text}"], "pytunnel connect --help") for text in ("inf", "nan", "-1")),
        *((["connect", "3000", f"--max-retries={text}"], "pytunnel connect --help") for text in ("inf", "1.5")),
        *((["serve", "--grace", text], "pytunnel serve --help") for text in ("inf", "nan", "-1")),
        *((["serve", flag, "nan"], "pytunnel serve --help") for flag in ("--hold", "--drain")),
        (["doctor", "--idle", "nan"], "pytunnel doctor --help"),
        (["stop", "a", "b"], "pytunnel stop --help"),
        (["status", "web"], "pytunnel status --help"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
async def test_usage_errors_are_one_line_with_the_next_step(machine: Machine, args: list[str], hint: str) -> None:
    result = await machine.run(*args)
    assert (result.status, result.stdout, len(result.stderr)) == (2, [], 1), result
    assert hint in result.error
