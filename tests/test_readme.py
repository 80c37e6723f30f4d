"""The README's tables, numbers and command lines agree with the program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import pytunnel

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:\$ )?(?:python )?pytunnel(?:\.py)? ((?:serve|connect|demo).*)$", README, re.MULTILINE)
EXEC_START = re.findall(r"^ExecStart=\S+/pytunnel (.*)$", README, re.MULTILINE)


@pytest.mark.parametrize("line", [*COMMANDS, *EXEC_START])
def test_command_lines_parse(line: str) -> None:
    words = shlex.split(re.split(r" [|>] ", line)[0], comments=True)
    options = pytunnel._parser().parse_args(words)
    for target in getattr(options, "targets", []):
        pytunnel.Target.parse(target.rpartition("=")[2])
    if getattr(options, "listen", None):
        pytunnel.parse_listen(options.listen)
    if getattr(options, "server", None):
        pytunnel.parse_server(options.server)


def test_there_are_command_lines() -> None:
    assert len(COMMANDS) >= 8
    assert len(EXEC_START) == 1


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
    assert documented == set(map(int, pytunnel.ExitStatus)) - {pytunnel.ExitStatus.LOCAL_DOWN}


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
        f"at most {pytunnel.MAX_STREAMS * pytunnel.INITIAL_WINDOW // pytunnel.MiB} MiB of unread bodies "
        f"and {pytunnel.MAX_UNACKED // pytunnel.MiB} MiB kept",
        f"| names of one token | {pytunnel.MAX_NAMES};",
        f"turns of {pytunnel.TURN // pytunnel.KiB} KiB",
        f"{pytunnel.INITIAL_WINDOW // pytunnel.KiB} KiB a stream",
        f"within {pytunnel.DIAL_TIMEOUT:g} s of starting",
        f"within {pytunnel.LOCAL_CONNECT_TIMEOUT:g} s",
    ],
)
def test_numbers(text: str) -> None:
    assert text in README


def test_environment_variables() -> None:
    source = Path(pytunnel.__file__).read_text(encoding="utf-8")
    used = set(re.findall(r'"(PYTUNNEL_[A-Z_]+)"', source))
    assert used == set(re.findall(r"`(PYTUNNEL_[A-Z_]+)", README))


def test_the_frame_is_drawn_as_in_the_docstring() -> None:
    assert pytunnel.__doc__
    drawing = re.search(r"^ +\+-.*?\n(.*)\n +\+-", pytunnel.__doc__, re.MULTILINE)
    assert drawing
    assert drawing[1].strip() in README


def test_the_result_stands_early() -> None:
    first_lines = README.splitlines()[:10]
    assert any(line.startswith("https://") for line in first_lines)


def test_changelog_has_this_version() -> None:
    changelog = (Path(__file__).parent.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {pytunnel.__version__} " in changelog
