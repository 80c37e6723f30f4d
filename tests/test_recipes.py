"""The README's section on scripts and CI runs as it is written, but for two things, of which each test says so.

Ports: the examples' port 3000 becomes a free one, as tests run in parallel. Installing: `pytunnel` on PATH runs this
checkout, and how CI installs it is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from support import PROGRAM, ROOT, Process, RawOrigin, free_port, response

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## Scripts and CI\n")[2].partition("\n## ")[0]
SCRIPTS = re.findall(r"^```sh\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
JOBS = re.findall(r"^```yaml\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)

APP = """\
# The service of the examples: it takes webhooks, and says that it is well.
import http.server


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = {"/hook": b"accepted\\n", "/health": b"ok\\n"}.get(self.path, b"")
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer


http.server.ThreadingHTTPServer(("127.0.0.1", 3000), Handler).serve_forever()
"""


def as_github_runs(job: str) -> list[str]:
    """Return the `run` of each step, which is one script for one shell."""
    found = re.finditer(r"^( +)(?:- )?run: (?:\|\n((?:\1 .*\n)+)|(.*)\n)", job, re.MULTILINE)
    return [textwrap.dedent(match[2]) if match[2] else match[3] for match in found]


def as_gitlab_runs(job: str) -> list[str]:
    """Return `before_script` and `script`, whose lines are one script for one shell."""
    found = re.finditer(r"^ +(?:before_)?script:\n((?: +- .*\n)+)", job, re.MULTILINE)
    return [re.sub(r"^ +- ", "", match[1], flags=re.MULTILINE) for match in found]


@dataclass
class Runner:
    """Runs scripts as a CI machine does: in one directory and a home that nobody used before."""

    home: Path
    port: int  # of the local service
    secrets: dict[str, str]
    environment: dict[str, str] = field(init=False)
    groups: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        tools = self.home / "bin"
        tools.mkdir()
        for name, command in {"pytunnel": f"{sys.executable} {PROGRAM}", "python3": sys.executable}.items():
            (tools / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
            (tools / name).chmod(0o755)
        path = f"{tools}:{os.environ.get('PATH', os.defpath)}"
        self.environment = {"PATH": path, "HOME": str(self.home), "CI": "true", **self.secrets}
        self.environment["PYTUNNEL_STATE_DIR"] = str(self.home / "state")
        (self.home / "app.py").write_text(self.on_our_port(APP), encoding="utf-8")

    def on_our_port(self, script: str) -> str:
        """Replace the examples' port, which another test may have."""
        assert "3000" in script
        return script.replace("3000", str(self.port))

    async def run(self, script: str) -> tuple[int, str, str]:
        """Return exit status, stdout and stderr, in which times are `N ms` and the name is NAME."""
        process = await asyncio.create_subprocess_exec(
            *("bash", "-euo", "pipefail", "-c", script),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment,
            cwd=self.home,
            start_new_session=True,
        )
        self.groups.append(process.pid)
        async with asyncio.timeout(30):
            output = await process.communicate()
        stdout, stderr = (re.sub(r"\b[a-z2-7]{10}\b(?=\.localhost|$)", "NAME", text.decode()) for text in output)
        assert process.returncode is not None
        return process.returncode, *(re.sub(r"\d+ ms", "N ms", text) for text in (stdout, stderr))

    def close(self) -> None:
        """End what the scripts have left running; a client in the background has a group of its own."""
        for note in (self.home / "state" / "run").glob("*.json"):
            self.groups.append(json.loads(note.read_text(encoding="utf-8"))["pid"])
        for group in self.groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


@contextlib.asynccontextmanager
async def machine(home: Path, port: int) -> AsyncIterator[Runner]:
    """Give a machine with the secrets of a server that runs."""
    token = "test-token-0123456789abcdef0123456789abcdef"
    async with await Process.start("serve", "--listen", "127.0.0.1:0", "--json", "--token", token) as server:
        listening = await server.event("listening")
        url = f"http://127.0.0.1:{listening['port']}"
        runner = Runner(home, port, {"PYTUNNEL_SERVER": url, "PYTUNNEL_TOKEN": token})
        try:
            yield runner
        finally:
            runner.close()


def test_all_examples_are_run_here() -> None:
    assert (len(SCRIPTS), len(JOBS)) == (1, 2)
    assert SECTION.count("```") == 2 * (len(SCRIPTS) + len(JOBS))


async def test_script(tmp_path: Path) -> None:
    async with RawOrigin(response(b"accepted\n"), read_body=True) as origin, machine(tmp_path, origin.port) as runner:
        result = await runner.run(runner.on_our_port(SCRIPTS[0]))
        assert result == (0, "accepted\n" + 3 * "200 POST    /hook  N ms\n", "stopped NAME\n")
        assert [(r.method, r.target, r.body) for r in origin.requests] == 3 * [(b"POST", b"/hook", b'{"paid": true}')]


async def test_github_actions(tmp_path: Path) -> None:
    install, *steps = as_github_runs(JOBS[0])
    command, path = install.splitlines()
    assert command == "sh tools/pytunnel/install.sh" and (ROOT / "install.sh").exists()
    assert re.findall(r"^ +(PYTUNNEL_\w+): \$\{\{ (?:vars|secrets)\.\1 \}\}$", JOBS[0], re.MULTILINE) == [
        "PYTUNNEL_SERVER",
        "PYTUNNEL_TOKEN",
    ]
    async with machine(tmp_path, free_port()) as runner:
        start, check = steps
        shared, paths = tmp_path / "github_env", tmp_path / "github_path"
        runner.environment |= {"GITHUB_ENV": str(shared), "GITHUB_PATH": str(paths)}
        assert await runner.run(path) == (0, "", "")
        assert paths.read_text() == f"{tmp_path}/.local/bin\n"
        assert await runner.run(runner.on_our_port(start)) == (0, "", "")
        assert shared.read_text().startswith("URL=http://") and shared.read_text().count("\n") == 1
        runner.environment |= dict(line.split("=", 1) for line in shared.read_text().splitlines())
        assert await runner.run(check) == (0, 'accepted\n200 POST    /hook  N ms\n{"paid": true}\n', "")
        assert (tmp_path / "hook.json").read_bytes() == b'{"paid": true}'


async def test_github_actions_fails_when_the_webhook_is_not_accepted(tmp_path: Path) -> None:
    _, start, check = as_github_runs(JOBS[0])
    async with machine(tmp_path, free_port()) as runner:
        (tmp_path / "app.py").write_text(runner.on_our_port(APP).replace("/hook", "/else"), encoding="utf-8")
        runner.environment["GITHUB_ENV"] = str(tmp_path / "github_env")
        assert await runner.run(runner.on_our_port(start)) == (0, "", "")
        runner.environment["URL"] = (tmp_path / "github_env").read_text().strip().partition("=")[2]
        status, stdout, stderr = await runner.run(check)
        assert (status, stdout) == (22, "")  # curl's for HTTP errors
        assert "404" in stderr


async def test_gitlab(tmp_path: Path) -> None:
    install, script = as_gitlab_runs(JOBS[1])
    assert install == "pip install ./tools/pytunnel\n" and (ROOT / "pyproject.toml").exists()
    async with machine(tmp_path, free_port()) as runner:
        status, stdout, stderr = await runner.run(runner.on_our_port(script))
        port = runner.secrets["PYTUNNEL_SERVER"].rpartition(":")[2]
        assert (status, stdout) == (0, "ok\n")
        assert stderr == f"http://NAME.localhost:{port} -> {runner.port}\n200 GET     /health  N ms\n"
