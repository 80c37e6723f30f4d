"""The README's tables, numbers, command lines and examples agree with the program."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import PROGRAM, ROOT, Process, RawOrigin, RawVisitor, request, response

import pytunnel

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = PROGRAM.read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)
PARSERS: dict[str, argparse.ArgumentParser] = next(
    action.choices for action in pytunnel._parser()._actions if isinstance(action, argparse._SubParsersAction)
)
TOKEN = "test-token-0123456789abcdef0123456789abcdef"


def blocks(language: str) -> list[str]:
    return [text for found, text in FENCED if found == language]


def command_lines() -> Iterator[str]:
    """Yield what follows `pytunnel` in examples and in prose, without what a shell takes for itself."""
    places = [*itertools.chain.from_iterable(text.splitlines() for _, text in FENCED), *INLINE]
    for place in places:
        for match in re.finditer(rf"\bpytunnel(?:\.py)? (?=(?:{'|'.join(PARSERS)})\b)", place):
            lexer = shlex.shlex(place[match.end() :], posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = itertools.takewhile(lambda word: not set(word) <= set("();<>|&"), lexer)
            yield shlex.join(words)


COMMANDS = [line for line in dict.fromkeys(command_lines()) if line != "connect"]  # where it is only a name


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the folders of the examples, where nothing is remembered or set up."""
    for name in [name for name in os.environ if name.startswith("PYTUNNEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTUNNEL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("PYTUNNEL_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("PYTUNNEL_TOKEN", TOKEN)
    for folder in ("dist", "site"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------- Command lines


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_parse(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    seen: list[argparse.Namespace] = []

    def see(options: argparse.Namespace, console: pytunnel.Console) -> int:
        seen.append(options)
        return 0

    monkeypatch.setitem(pytunnel.COMMANDS, words[0], see)
    level = pytunnel.log.level
    try:
        assert pytunnel.main(words) == 0
    finally:
        pytunnel.log.setLevel(level)
    (options,) = seen
    if getattr(options, "server", None):
        pytunnel.parse_server(options.server)
    if getattr(options, "token", None) == "…":
        options.token = None
    if options.command == "connect":
        assert pytunnel.Settings({**vars(options), "name": "".join(options.name)}).from_targets(options.targets)
    elif options.command == "serve":
        for address in options.listen:
            pytunnel.parse_listen(address)
    elif options.command == "start":
        assert set(options.names) <= set(pytunnel.read_settings(example_settings(place))["tunnels"])
    assert bool(options.run) == (" -- " in line)


def test_there_are_command_lines() -> None:
    assert len(COMMANDS) >= 30
    assert [line for line in COMMANDS if " -- " in line]
    assert {line.split()[0] for line in COMMANDS} == set(PARSERS)
    assert len(re.findall(r"^ExecStart=\S+/pytunnel serve ", README, re.MULTILINE)) == 3


def test_flags_are_the_programs() -> None:
    ours = re.sub(r"(?m)^\|[^|]*\| (`pytunnel|`--|`\[tun|the same)", r"\1", README)  # what stands left is of others
    others = {"--demo", "--test", "--uninstall", "--now"}  # of install.sh and systemctl
    others |= {"--cacert", "--force", "--with"}  # of curl and uv
    others |= {"--short", "--plot", "--only", "--pytunnel", "--contenders", "--repeat"}  # of the benchmark
    flags = {flag for parser in PARSERS.values() for action in parser._actions for flag in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours)) - others <= flags


def test_every_flag_is_there() -> None:
    left_to_help = {"-h", "--help"}
    for command, parser in PARSERS.items():
        for action in parser._actions:
            if action.option_strings and action.help != argparse.SUPPRESS and action.dest != "help":
                names = set(action.option_strings) - left_to_help
                assert any(re.search(rf"(?<![\w-]){name}(?![\w-])", README) for name in names), f"{command}: {names}"


def test_commands_are_there() -> None:
    assert set(PARSERS) <= set(re.findall(r"\bpytunnel(?:\.py)? ([a-z]+)", README))


# ---------------------------------------------------------------------------------------- Tables and numbers


def test_error_table_is_complete() -> None:
    rows = re.findall(r"^\| ([0-9, ]+) \| (`.*?`) \|", README, re.MULTILINE)
    documented = set()
    for statuses, names in rows:
        problems = re.findall(r"`([a-z-]+)`", names)
        for problem in problems:
            assert str(pytunnel.PROBLEMS[problem][0]) in statuses
        documented.update(problems)
    own_host_only = {"forbidden", "not-a-link", "internal"}
    assert documented == set(pytunnel.PROBLEMS) - own_host_only


def test_exit_statuses() -> None:
    documented = {int(number) for number in re.findall(r"^\| (\d+) \| [a-z]", README, re.MULTILINE)}
    assert documented == set(map(int, pytunnel.ExitStatus))


def test_events() -> None:
    emitted = set(re.findall(r'(?:\.|_)(?:emit|on_event)\("([a-z]+)"', SOURCE)) - {"listening"}  # which is serve's
    (line,) = re.findall(r"`connect --json` writes one object a line: (.*)\.", README)
    assert set(re.findall(r"`([a-z]+)`", line)) == emitted


def test_keys() -> None:
    table = README.partition("| key | |")[2].partition("\n\n")[0]
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| ")]
    documented = {key for left, right in rows for key in re.findall(r"`([^`]+)`", left)}
    names = {"up": "↑", "down": "↓", "page up": "PgUp", "page down": "PgDn", "home": "Home", "end": "End"}
    moves = {names.get(name, name) for name in pytunnel.Screen.MOVES if not name.startswith("wheel")}
    assert documented == moves | set(pytunnel.Screen.ACTIONS) | {"Enter", "/", "s", "Esc"}
    assert ", ".join(pytunnel.Screen.TABS[:-1]) + f" and {pytunnel.Screen.TABS[-1]}" in table
    assert f"`1` to `{len(pytunnel.Screen.TABS)}`" in table


@pytest.mark.parametrize(
    "text",
    [
        f"| {pytunnel.GRACE:g} s (`serve --grace`)",
        f"| {pytunnel.HOLD:g} s (`serve --hold`), {pytunnel.MAX_HELD} requests at a time",
        f"within {pytunnel.HOLD:g} s of its leaving",
        f"| {pytunnel.PING_INTERVAL + pytunnel.PING_TIMEOUT:g} s of silence",
        f"| {pytunnel.DRAIN:g} s (`serve --drain`)",
        f"The client: {pytunnel.GOODBYE:g} s",
        f"| {pytunnel.MAX_STREAMS} |",
        f"{pytunnel.MAX_STREAMS} requests are open in the session, or {pytunnel.MAX_HELD} wait",
        f"| {pytunnel.MAX_HEAD // pytunnel.KiB} KiB, {pytunnel.MAX_FIELDS} fields, "
        f"{pytunnel.MAX_FIELD // pytunnel.KiB} KiB each",
        f"at most {(pytunnel.MAX_STREAMS * pytunnel.INITIAL_WINDOW + pytunnel.MAX_WIDENED) // pytunnel.MiB} MiB "
        f"of unread bodies and {pytunnel.MAX_PENDING // pytunnel.MiB} MiB of frames",
        f"a stalled link holds {pytunnel.MAX_PENDING // pytunnel.MiB} MiB",
        f"| {pytunnel.MAX_DATA // pytunnel.KiB} KiB of content, known before it is unpacked; "
        f"{pytunnel.MIN_COMPRESSED // pytunnel.KiB} KiB or more, and a tenth smaller",
        f"both ends keep {pytunnel.HISTORY // pytunnel.KiB} KiB of the content",
        f"less than {pytunnel.COMPRESS_RATE * 8 / 1e6:g} Mbit/s",
        f"| {pytunnel.MAX_BUFFERED // pytunnel.MiB} MiB, then 503",
        f"or keeps {pytunnel.MAX_BUFFERED // pytunnel.MiB} MiB",
        f"for all sessions together by {pytunnel.MAX_BUFFERED // pytunnel.MiB} MiB",
        f"| {pytunnel.MAX_EACH} (`serve --max-per-address`), {pytunnel.MAX_VISITORS:,} or",
        f"may have {pytunnel.MAX_EACH} connections (IPv6: a /64), abort {pytunnel.MAX_ABORTS} requests at once "
        f"and {pytunnel.ABORT_RATE:g} a second",
        f"After {pytunnel.MAX_GUESSES} wrong ones an address may try\n  one every {1 / pytunnel.GUESS_RATE:g} s",
        f"| {pytunnel.HEAD_TIMEOUT:g} s; {pytunnel.BODY_TIMEOUT:g} s |",
        f"took more than {pytunnel.HEAD_TIMEOUT:g} s, or its content stopped for {pytunnel.BODY_TIMEOUT:g} s",
        f"| {pytunnel.VISITOR_KEEPALIVE:g} s |",
        f"| names of one token | {pytunnel.MAX_NAMES};",
        f"{pytunnel.MAX_CREDENTIALS} users, {pytunnel.MAX_NETWORKS} networks",
        f"| {pytunnel.MAX_TUNNELS}, {pytunnel.MAX_STREAMS} at a time (`token add",
        f"turns of {pytunnel.TURN_TIME * 1000:g} ms",
        f"the path holds and\n{pytunnel.QUEUE_TIME * 1000:g} ms of it",
        f"{pytunnel.INITIAL_WINDOW // pytunnel.KiB} KiB a stream at first",
        f"up to {pytunnel.MAX_STREAM_WINDOW // pytunnel.MiB} MiB",
        f"within {pytunnel.DIAL_TIMEOUT:g} s of starting",
        f"within {pytunnel.LOCAL_CONNECT_TIMEOUT:g} s",
        f"the last {pytunnel.MAX_EXCHANGES} exchanges, of each body the first "
        f"{pytunnel.MAX_PREFIX // pytunnel.KiB} KiB, in all at most {pytunnel.MAX_LOG // pytunnel.MiB} MiB",
        f"| {pytunnel.MAX_EXCHANGES} of them, {pytunnel.MAX_PREFIX // pytunnel.KiB} KiB of each body, "
        f"{pytunnel.MAX_LOG // pytunnel.MiB} MiB in all; {pytunnel.MAX_NOTES} messages",
        f"on port {pytunnel.INSPECTOR_PORT} or the next free one",
        f"http://127.0.0.1:{pytunnel.INSPECTOR_PORT}",
        f"listens on port {pytunnel.DEFAULT_PORT}",
        f"waits up to {PARSERS['expect'].get_default('timeout'):g} s",
        "`--wait-local` (60 s, or `--wait-local=S`)",
    ],
)
def test_numbers(text: str) -> None:
    assert text in README


def test_environment_variables() -> None:
    used = set(re.findall(r'"(PYTUNNEL_[A-Z_]+)"', SOURCE))
    assert used == set(re.findall(r"`(PYTUNNEL_[A-Z_]+)", README))


def test_the_frame_is_drawn_as_in_the_docstring() -> None:
    assert pytunnel.__doc__
    drawing = re.search(r"^ +\+-.*?\n(.*)\n +\+-", pytunnel.__doc__, re.MULTILINE)
    assert drawing
    assert drawing[1].strip() in README


# ---------------------------------------------------------------------------------------- What a reader sees


def test_the_result_stands_early() -> None:
    first_lines = README.splitlines()[:10]
    assert any(line.startswith("https://") for line in first_lines)


@pytest.mark.parametrize(("alt", "path"), re.findall(r"!\[(.*?)\]\((.*?)\)", README))
def test_pictures(alt: str, path: str) -> None:
    assert len(alt) > 30
    assert (ROOT / path).stat().st_size > 1000
    assert f"--plot {path}" in README or Path(path).name in (ROOT / "tests/pictures.py").read_text(encoding="utf-8")


def test_changelog_has_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {pytunnel.__version__} " in changelog


# ---------------------------------------------------------------------------------------- Settings and Python


def example_settings(place: Path) -> Path:
    (text,) = blocks("toml")
    path = place / "pytunnel.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_settings_file(place: Path) -> None:
    example_settings(place)
    settings = pytunnel.Settings({}, project=True)
    tunnels = {name: settings.from_file(name) for name in settings.named()}
    assert {name: tunnel.target.text for name, tunnel in tunnels.items()} == {
        "web": "5173",
        "docs": str(place / "site"),
    }
    assert tunnels["web"].host == "rewrite" and tunnels["docs"].spa


def test_a_tunnels_keys_are_flags_of_connect() -> None:
    flags = {flag[2:] for action in PARSERS["connect"]._actions for flag in action.option_strings}
    assert set(pytunnel.TUNNEL_SETTINGS) - {"target"} <= flags
    assert {"server", "token", "tunnels"} == set(pytunnel.SETTINGS)


def test_python_examples_compile() -> None:
    assert len(blocks("python")) == 2
    for text in blocks("python"):
        compile(text, "README.md", "exec")


def python_environment(home: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "PYTUNNEL_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}


async def test_python_example(tmp_path: Path) -> None:
    """It runs as it is written, but for the port of the local service."""
    serve = ("serve", "--listen", "127.0.0.1:0", "--json", "--token", TOKEN)
    async with RawOrigin(response(b"accepted")) as origin, await Process.start(*serve) as server:
        port = int((await server.event("listening"))["port"])
        example = tmp_path / "example.py"
        example.write_text(blocks("python")[0].replace("3000", str(origin.port)), encoding="utf-8")
        environment = python_environment(tmp_path) | {"PYTUNNEL_SERVER": f"http://127.0.0.1:{port}"}
        command = (sys.executable, str(example))
        async with await Process.start(command=command, env=environment) as process, RawVisitor(port) as visitor:
            host = f"web.localhost:{port}"
            assert await process.stdout_line("http") == f"http://{host}"
            await visitor.send(request("POST", b"/hook", host.encode(), body=b"paid"))
            assert (await visitor.read_response()).body == b"accepted"
            assert await process.wait() == 0
            assert process.stdout[1] == "200 b'paid'"
            assert re.fullmatch(r"200 \d+\.\d{3} s 2 in the log", process.stdout[2])
            assert process.stderr == []


async def test_pytest_example(tmp_path: Path) -> None:
    """It passes as it is written, but for the port of the local service; and fails when that refuses."""
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_example.py")
    for status, outcome in (200, "1 passed"), (500, "1 failed"):
        async with RawOrigin(response(b"accepted", status)) as origin:
            text = blocks("python")[1].replace("3000", str(origin.port))
            (tmp_path / "test_example.py").write_text(text, encoding="utf-8")
            environment = python_environment(tmp_path)
            async with await Process.start(command=command, env=environment, home=tmp_path) as process:
                assert await process.wait(30) == (0 if "passed" in outcome else 1)
                assert outcome in process.stdout[-1]
                assert len(origin.requests) == (2 if "passed" in outcome else 1)
