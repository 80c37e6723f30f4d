"""Where a client's values come from: flags, environment, files, memory; `login`, `config` and `start`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from support import PROGRAM, RawOrigin, Relay, free_port, response
from test_cli import OTHER_TOKEN, TOKEN, Finished, run, serving, start, url_of, visit

import pytunnel
from pytunnel import Edits, LocalService, Refused, Route, Setting, Settings, Target, Tunnel, UsageError

A, B, C, D = (f"token-{letter}-0123456789abcdef" for letter in "abcd")


class Place:
    """A user's directories and environment, in this process."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = root / "config" / "config.toml"
        self.state = root / "state"
        self.project = root / "project" / "pytunnel.toml"
        self._monkeypatch = monkeypatch
        self.config.parent.mkdir()
        self.project.parent.mkdir()
        self.state.mkdir()
        for name in list(os.environ):
            if name.startswith(("PYTUNNEL_", "STATE_DIRECTORY")):
                monkeypatch.delenv(name)
        self.env(PYTUNNEL_CONFIG=str(self.config), PYTUNNEL_STATE_DIR=str(self.state))
        monkeypatch.chdir(self.project.parent)

    def env(self, **variables: str) -> None:
        for name, value in variables.items():
            self._monkeypatch.setenv(name, value)

    def remember(self, server: str, **tokens: str) -> None:
        self.private("client.json", json.dumps({"server": server, "tokens": tokens}))

    def private(self, name: str, text: str) -> None:
        (self.state / name).write_text(text)
        (self.state / name).chmod(0o600)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


# ---------------------------------------------------------------------------------------- Precedence


def test_the_server_comes_from_the_nearest_place_that_names_one(place: Place) -> None:
    """Each step takes the strongest of them away."""
    place.config.write_text('server = "config.example"\n')
    place.project.write_text('server = "project.example"\n')
    place.env(PYTUNNEL_SERVER="env.example")
    place.remember("https://memory.example")
    steps: list[tuple[Callable[[], object], dict[str, str], bool, str, str]] = [
        (lambda: None, {"server": "flag.example"}, True, "https://flag.example", "--server"),
        (lambda: None, {}, True, "https://env.example", "$PYTUNNEL_SERVER"),
        (lambda: place.env(PYTUNNEL_SERVER=""), {}, True, "https://project.example", "pytunnel.toml"),
        (lambda: None, {}, False, "https://config.example", str(place.config)),
        (lambda: place.project.unlink(), {}, True, "https://config.example", str(place.config)),
        (lambda: place.config.unlink(), {}, True, "https://memory.example", "the last one that worked"),
        (lambda: (place.state / "client.json").unlink(), {}, True, "http://localhost:8080", "default"),
    ]
    for take_away, flags, project, server, source in steps:
        take_away()
        assert Settings(flags, project=project).server == Setting(server, source)


def test_the_token_comes_from_the_nearest_place_that_has_one(place: Place) -> None:
    server = "http://localhost:8080"
    place.config.write_text(f'token = "{C}"\n')
    place.project.write_text(f'token = "{B}"\n')
    place.env(PYTUNNEL_TOKEN=A)
    place.remember(server, **{server: D})
    place.private("token", f"{TOKEN}\n")
    steps: list[tuple[Callable[[], object], dict[str, str], bool, str, str]] = [
        (lambda: None, {"token": OTHER_TOKEN}, True, OTHER_TOKEN, "--token"),
        (lambda: None, {}, True, A, "$PYTUNNEL_TOKEN"),
        (lambda: place.env(PYTUNNEL_TOKEN=""), {}, True, B, "pytunnel.toml"),
        (lambda: None, {}, False, C, str(place.config)),
        (lambda: place.config.unlink(), {}, False, D, "the one that worked for this server"),
        (lambda: (place.state / "client.json").unlink(), {}, False, TOKEN, str(place.state / "token")),
        (lambda: (place.state / "token").unlink(), {}, False, "", "not set"),
    ]
    for take_away, flags, project, token, source in steps:
        take_away()
        assert Settings(flags, project=project).token == Setting(token, source)
    with pytest.raises(UsageError, match="no token for http://localhost:8080: run pytunnel login"):
        Settings({}).checked_token()


def test_a_kept_token_is_for_its_own_server(place: Place) -> None:
    """That of a file with a server, of the memory and of this machine's server go nowhere else."""
    place.config.write_text(f'server = "https://one.example"\ntoken = "{A}"\n')
    place.remember("https://two.example", **{"https://two.example": B})
    place.private("token", TOKEN)
    table = {
        "https://one.example": A,
        "https://one.example:443": "",  # another text; a token too few is safe
        "one.example": A,
        "http://one.example": "",
        "https://one.example:8443": "",
        "https://two.example": B,
        "https://three.example": "",
        "https://one.example.evil.example": "",
        "localhost": TOKEN,
        "http://127.0.0.1:9000": TOKEN,
        "http://[::1]:9000": TOKEN,
        "http://203.0.113.7:8080": "",
        "https://localhost.example": "",
    }
    for server, token in table.items():
        assert Settings({"server": server}).token.value == token, server
    place.project.write_text('server = "https://three.example"\n')
    assert Settings({}, project=True).token == Setting("", "not set"), "a project's server gets no token of mine"


def test_a_connect_in_a_directory_of_others_reads_no_file_there(place: Place) -> None:
    place.project.write_text("this is = no [TOML\n")
    assert Settings({}).server.value == "http://localhost:8080"
    with pytest.raises(UsageError, match=r"^pytunnel\.toml: "):
        Settings({}, project=True)


def test_the_configuration_directory_is_the_user_s_own(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTUNNEL_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place.config.parent))
    directory = place.config.parent / "pytunnel"
    directory.mkdir()
    (directory / "config.toml").write_text('server = "mine.example"\n')
    assert Settings({}).server.value == "https://mine.example"


def test_named_tunnels_of_the_project_win(place: Place) -> None:
    place.config.write_text('[tunnels.web]\ntarget = "1"\n[tunnels.own]\ntarget = "2"\nspa = true\n')
    place.project.write_text('[tunnels.web]\ntarget = "3"\n[tunnels.api]\ntarget = "4"\n')
    settings = Settings({}, project=True)
    assert [(name, settings.from_file(name).target.port) for name in settings.named()] == [
        ("web", 3), ("api", 4), ("own", 2),
    ]  # fmt: skip
    assert list(Settings({}).named()) == ["web", "own"]


def test_all_that_a_named_tunnel_may_have(place: Place, tmp_path: Path) -> None:
    place.project.write_text(
        """
        [tunnels.web]
        target = "https://nas.lan"
        host-header = "rewrite"
        header = ["X-One: 1", "X-Two:2"]
        remove-header = ["Cookie"]
        response-header = ["X-Frame-Options: DENY"]
        remove-response-header = ["Server"]
        route = ["/api=8080", "/files=."]
        spa = true
        insecure = true
        """
    )
    tunnel = Settings({}, project=True).from_file("web")
    here = str(place.project.parent)
    assert tunnel == Tunnel(
        "web",
        Target("https://nas.lan", "nas.lan", 443, True),
        (("/api", Target("8080", "localhost", 8080)), ("/files", Target(here, here, 0, folder=True))),
        "rewrite",
        Edits([(b"X-One", b"1"), (b"X-Two", b"2")], frozenset({b"cookie"})),
        Edits([(b"X-Frame-Options", b"DENY")], frozenset({b"server"})),
        insecure=True,
        spa=True,
    )


def test_a_port_in_a_file_needs_no_quotes(place: Place) -> None:
    place.config.write_text("[tunnels.web]\ntarget = 3000\n")
    assert Settings({}).from_file("web").target == Target("3000", "localhost", 3000)


# ---------------------------------------------------------------------------------------- What is wrong in a file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('sever = "x"', "unknown setting 'sever'; did you mean 'server'?"),
        ('Token = "x"', "unknown setting 'Token'; did you mean 'token'?"),
        ("[tunnel.web]", "unknown setting 'tunnel'; did you mean 'tunnels'?"),
        ('[tunnels.web]\ntarget = "1"\nhost_header = "x"', "tunnel web: unknown setting 'host_header'; did you mean "
         "'host-header'?"),
        ('[tunnels.web]\ntarget = "1"\nroutes = []', "tunnel web: unknown setting 'routes'; did you mean 'route'?"),
        ('[tunnels.web]\nport = "1"', "tunnel web: unknown setting 'port'; did you mean "),
        ('[tunnels.web]\ntarget = "1"\nname = "x"', "tunnel web: unknown setting 'name'; did you mean "),
        ('"a\\u001b[31m" = 1', "unknown setting 'a\\\\x1b[31m'; did you mean "),
        ("server = 1", "server is not text in quotes"),
        ("token = true", "token is not text in quotes"),
        ("tunnels = []", "tunnels is not a table"),
        ("[tunnels.web]\ntarget = true", "tunnel web: target is not "),
        ("[tunnels.web]\ntarget = 3000.0", "tunnel web: target is not "),
        ('[tunnels.web]\ntarget = ["3000"]', "tunnel web: target is not "),
        ('[tunnels.web]\ntarget = "1"\nheader = "K: V"', "tunnel web: header is not a list of texts"),
        ('[tunnels.web]\ntarget = "1"\nroute = [1]', "tunnel web: route is not a list of texts"),
        ('[tunnels.web]\ntarget = "1"\nspa = "yes"', "tunnel web: spa is not true or false"),
        ('[tunnels.web]\ntarget = "1"\ninsecure = 1', "tunnel web: insecure is not true or false"),
        ("[tunnels.web]\nspa = true", 'tunnel web: it has no target; add one, like target = "3000"'),
        ("server = ", "Invalid value"),
        ('server = "x"\nserver = "y"', "overwrite"),
        ("\0", ""),
    ],
    ids=lambda text: re.sub(r"\W+", " ", text)[:30],
)  # fmt: skip
def test_a_file_that_is_wrong_is_told_with_its_name(place: Place, text: str, message: str) -> None:
    place.config.write_text(text)
    with pytest.raises(UsageError) as caught:
        Settings({})
    start, _, rest = str(caught.value).partition(": ")
    assert start == str(place.config) and message in rest
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_tunnel_that_is_no_table_is_told_so(place: Place) -> None:
    place.config.write_text('[tunnels]\nweb = "3000"\n')
    with pytest.raises(UsageError) as caught:
        Settings({}).named()
    assert "web" in str(caught.value) and "table" in str(caught.value)
    assert "'='" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a = " + b"[" * 100_000], ids=["not UTF-8", "deep"])
def test_a_file_that_is_no_toml_is_one_line(place: Place, content: bytes) -> None:
    place.config.write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.toml: "):
        Settings({})


def test_a_file_that_cannot_be_read_is_one_line(place: Place) -> None:
    place.config.mkdir()
    with pytest.raises(UsageError, match=r"config\.toml: .*directory"):
        Settings({})


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        ('target = "nonsense"', UsageError, "a port like 3000"),
        ('target = "1"\nhost-header = "a b"', UsageError, "'a b' is not a host"),
        ('target = "1"\nroute = ["api=1"]', UsageError, "'api=1' is not a route: write PATH=TARGET"),
        ('target = "1"\nheader = ["x"]', UsageError, "'x' is not a header field"),
    ],
)
def test_a_named_tunnel_that_makes_no_sense(place: Place, lines: str, error: type, message: str) -> None:
    place.config.write_text(f"[tunnels.web]\n{lines}\n")
    settings = Settings({})  # a broken tunnel does not keep the others from being used
    with pytest.raises(error, match=re.escape(f"{place.config}: tunnel web: ") + ".*" + re.escape(message)):
        settings.from_file("web")


def test_a_named_tunnel_has_a_name_that_is_allowed(place: Place) -> None:
    place.config.write_text('[tunnels."a.b"]\ntarget = "1"\n')
    with pytest.raises(Refused, match=r"'a\.b' is not allowed as a name"):
        Settings({}).from_file("a.b")


def test_a_wrong_server_of_a_file_is_told_with_its_name(place: Place) -> None:
    place.config.write_text('server = "ftp://x"\n')
    with pytest.raises(UsageError) as caught:
        Settings({})
    assert str(place.config) in str(caught.value) and "'ftp://x' is not a server" in str(caught.value)


# ---------------------------------------------------------------------------------------- Targets on the command line


def parsed(place: Place, *texts: str, **flags: object) -> list[tuple[str, str, int]]:
    """Name, host and port of the tunnels of these targets; `=` stands for a name that was not chosen."""
    tunnels = Settings({"token": TOKEN, **flags}).from_targets(texts)
    return [(t.name if re.fullmatch("[a-f]", t.name) else "=", t.target.host, t.target.port) for t in tunnels]


def test_names_and_targets(place: Place) -> None:
    here = place.project.parent
    for name in ("dist", "x=1", "a=b"):
        (here / name).mkdir()
    table: list[tuple[list[str], list[tuple[str, str, int]]]] = [
        (["3000"], [("=", "localhost", 3000)]),
        (["a=3000", "b=nas:80", "4000"], [("a", "localhost", 3000), ("b", "nas", 80), ("=", "localhost", 4000)]),
        (["a=http://nas"], [("a", "nas", 80)]),
        (["a=unix:/x=y"], [("a", "/x=y", 0)]),
        (["unix:/x=y"], [("=", "/x=y", 0)]),
        (["dist"], [("=", f"{here}/dist", 0)]),
        (["./dist", "a=dist"], [("=", f"{here}/dist", 0), ("a", f"{here}/dist", 0)]),
        (["./x=1"], [("=", f"{here}/x=1", 0)]),
        (["a=./x=1"], [("a", f"{here}/x=1", 0)]),
        ([f"{here}/x=1"], [("=", f"{here}/x=1", 0)]),
        (["a=.."], [("a", f"{here.parent}", 0)]),
    ]
    for texts, expected in table:
        assert parsed(place, *texts) == expected, texts
    assert parsed(place, "3000", name="c") == [("c", "localhost", 3000)]
    place.env(PYTUNNEL_NAME="d")
    assert parsed(place, "3000") == [("d", "localhost", 3000)]
    assert parsed(place, "3000", name="c") == [("c", "localhost", 3000)]


@pytest.mark.parametrize("text", ["", "./missing", "/no/such/folder", "~/no-such-folder", "missing", ".file"])
def test_what_is_no_folder(place: Place, text: str) -> None:
    (place.project.parent / ".file").write_text("")
    with pytest.raises(UsageError, match=r"there is no folder|is not a target"):
        Target.parse(text)


def test_a_port_is_a_port_though_a_folder_is_called_so(place: Place) -> None:
    (place.project.parent / "3000").mkdir()
    assert Target.parse("3000") == Target("3000", "localhost", 3000)
    assert Target.parse("./3000").folder


def test_a_folder_in_the_home_directory(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place.config.parent.parent))
    path = str(place.config.parent)
    assert Target.parse("~/config") == Target(path, path, 0, folder=True)


# ---------------------------------------------------------------------------------------- Edits and routes


def test_edits() -> None:
    edits = Edits.parse(["X-New: 1", "Host:  a b:c ", "x-new:2", "X-Empty:"], ["Cookie", " X-GONE "])
    before = [(b"host", b"h"), (b"X-NEW", b"0"), (b"Accept", b"*/*"), (b"cookie", b"c"), (b"X-Gone", b"1"), (b"A", b"")]
    assert edits.apply(before) == [
        (b"X-New", b"1"), (b"Host", b"a b:c"), (b"x-new", b"2"), (b"X-Empty", b""), (b"Accept", b"*/*"), (b"A", b""),
    ]  # fmt: skip
    assert before[0] == (b"host", b"h"), "the log keeps what came"
    assert Edits.parse([], []).apply(before) is before
    assert Edits().apply([]) == []


@pytest.mark.parametrize(
    ("put", "drop"),
    [
        (["no colon"], []), ([": x"], []), (["a b: x"], []), (["X: a\r\nY: b"], []), (["X: a\0"], []),
        (["Content-Length: 3"], []), (["transfer-encoding: chunked"], []), (["Connection: close"], []),
        (["Keep-Alive: x"], []), (["Upgrade: x"], []), ([], ["TE"]), ([], ["Content-Length"]), ([], [""]),
        ([], ["a:b"]), ([], ["x\ny"]), (["\x1b[31m: x"], []),
    ],
)  # fmt: skip
def test_what_is_no_edit(put: list[str], drop: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Edits.parse(put, drop)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("prefix", "takes", "leaves"),
    [
        ("/api", ["/api", "/api/", "/api/x", "/api?x", "/api/?x"], ["/", "/apix", "/ap", "/API", "/x/api", "/api%2f"]),
        ("", ["/", "/x", "/?x", "*", ""], []),
        ("/a/b", ["/a/b", "/a/b/c"], ["/a", "/a/bc", "/a//b"]),
    ],
)  # fmt: skip
async def test_a_route_takes_what_is_below_its_prefix(prefix: str, takes: Iterable[str], leaves: Iterable[str]) -> None:
    route = Route(prefix, LocalService(Target.parse("3000"), insecure=False), Edits(), Edits())
    assert [path for path in takes if not route.takes(path)] == []
    assert [path for path in leaves if route.takes(path)] == []


async def test_a_tunnel_s_routes_are_tried_the_longest_first(place: Place) -> None:
    flags = {"token": TOKEN, "route": ["/a=1001", "/a/b/=1002", "/=1003", "/abc=nas:1004"], "host_header": "rewrite"}
    (tunnel,) = Settings({**flags, "header": ["X: 1"]}).from_targets(["1000"])
    assert [target.port for target in tunnel.targets] == [1000, 1001, 1002, 1003, 1004]
    routes = tunnel.open()
    prefixes = [(route.prefix, route.service.target.port) for route in routes]
    assert sorted(prefixes) == [("", 1000), ("", 1003), ("/a", 1001), ("/a/b", 1002), ("/abc", 1004)]
    assert [len(prefix) for prefix, _ in prefixes] == [4, 4, 2, 0, 0]

    def served(path: str) -> int:
        return next(route.service.target.port for route in routes if route.takes(path))

    paths = {"/": 1003, "/x": 1003, "/a": 1001, "/a/x": 1001, "/a/b": 1002, "/a/b/c": 1002, "/abc": 1004, "/ab": 1003}
    assert {path: served(path) for path in paths} == paths
    hosts = {route.prefix: route.request.put for route in routes}
    assert hosts["/abc"] == [(b"Host", b"nas:1004"), (b"X", b"1")], "each route's own"
    assert hosts["/a"] == [(b"Host", b"localhost:1001"), (b"X", b"1")]


# ---------------------------------------------------------------------------------------- What is made once

MAKER = """
import sys, pytunnel
def slowly(size):
    print("making", flush=True)
    sys.stdin.readline()
    return sys.argv[1] * size
if sys.argv[1]:
    pytunnel.secrets.token_hex = slowly
print(pytunnel.Settings({}).from_targets(["3000"])[0].name, flush=True)
"""


async def test_clients_that_start_at_once_are_on_one_machine(tmp_path: Path) -> None:
    """Each has seen that nothing is there and makes a name for the machine, before any of them keeps it."""

    async def begin(own: str) -> asyncio.subprocess.Process:
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTUNNEL_STATE_DIR": str(tmp_path / "state")}
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            sys.executable, "-c", MAKER, own, cwd=tmp_path, stdin=pipe, stdout=pipe,
            env={**env, "PYTHONPATH": str(PROGRAM.parent), "PYTUNNEL_TOKEN": A},
        )  # fmt: skip

    async with asyncio.timeout(30):
        makers = [await begin(own) for own in "abcd"]
        for maker in makers:
            assert maker.stdout and await maker.stdout.readline() == b"making\n"
        assert not (tmp_path / "state" / "machine").exists()
        names = {(await maker.communicate(b"\n"))[0] for maker in makers}
        assert [maker.returncode for maker in makers] == [0] * 4
        names.add((await (await begin("")).communicate())[0])
    assert len(names) == 1 and names != {b""}
    assert os.listdir(tmp_path / "state") == ["machine"]
    assert (tmp_path / "state" / "machine").stat().st_mode & 0o777 == 0o600


# ---------------------------------------------------------------------------------------- config


async def execute(home: Path, *args: str, **env: str) -> Finished:
    """Run a command with a configuration directory of its own."""
    return await run(*args, home=home, env={"PYTUNNEL_CONFIG": str(home / "config.toml"), **env})


async def test_config_of_nothing(tmp_path: Path) -> None:
    plain = await execute(tmp_path, "config")
    lines = ["server = http://localhost:8080  (default)", "token =   (not set)"]
    assert (plain.status, plain.stdout, plain.stderr) == (0, lines, [])
    assert os.listdir(tmp_path) == [], "to look changes nothing"


async def test_config_shows_what_is_in_force_and_where_it_comes_from(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'server = "t.example.com"\ntoken = "{TOKEN}"\n[tunnels.own]\ntarget = "4000"\n')
    (tmp_path / "pytunnel.toml").write_text('[tunnels.web]\ntarget = "3000"\n')
    plain = await execute(tmp_path, "config")
    assert (plain.status, plain.stderr) == (0, [])
    assert plain.stdout == [
        f"server = https://t.example.com  ({config})",
        f"token = test…  ({config})",
        "tunnels.web = 3000  (pytunnel.toml)",
        f"tunnels.own = 4000  ({config})",
    ]
    as_json = await execute(tmp_path, "config", "--json", "--server", "other.example", PYTUNNEL_TOKEN=OTHER_TOKEN)
    assert (as_json.status, as_json.stderr) == (0, [])
    assert [json.loads(line) for line in as_json.stdout] == [
        {"setting": "server", "value": "https://other.example", "source": "--server"},
        {"setting": "token", "value": "anot…", "source": "$PYTUNNEL_TOKEN"},
        {"setting": "tunnels.web", "value": "3000", "source": "pytunnel.toml"},
        {"setting": "tunnels.own", "value": "4000", "source": str(config)},
    ]
    unset = await execute(tmp_path, "config", "--json", "--server", "other.example")
    assert json.loads(unset.stdout[1]) == {"setting": "token", "value": None, "source": "not set"}


async def test_config_shows_a_file_of_others_as_text(tmp_path: Path) -> None:
    """./pytunnel.toml comes with a project: what it says is not for the terminal to carry out."""
    target, name = "3000\x1b]0;pwned\x07", "a\x1b[31m"
    (tmp_path / "pytunnel.toml").write_text(f"[tunnels.{json.dumps(name)}]\ntarget = {json.dumps(target)}\n")
    plain = await execute(tmp_path, "config")
    assert (plain.status, plain.stderr) == (0, [])
    assert plain.stdout[2:] == [r"tunnels.a\x1b[31m = 3000\x1b]0;pwned\x07  (pytunnel.toml)"]
    as_json = await execute(tmp_path, "config", "--json")
    assert not [line for line in as_json.stdout if "\x1b" in line or "\x07" in line]
    row = {"setting": f"tunnels.{name}", "value": target, "source": "pytunnel.toml"}
    assert json.loads(as_json.stdout[2]) == row


async def test_config_of_a_wrong_file_is_2(tmp_path: Path) -> None:
    (tmp_path / "pytunnel.toml").write_text('sever = "x"\n')
    result = await execute(tmp_path, "config")
    assert (result.status, result.stdout, len(result.stderr)) == (2, [], 1)
    assert result.error == "error: pytunnel.toml: unknown setting 'sever'; did you mean 'server'?"


# ---------------------------------------------------------------------------------------- login


async def with_stdin(home: Path, text: str, *args: str) -> Finished:
    """Run a command that reads its stdin."""
    command = ["/bin/sh", "-c", 'printf %s "$TEXT" | "$0" "$@"', sys.executable, str(PROGRAM)]
    env = {"TEXT": text, "PYTUNNEL_CONFIG": str(home / "config.toml")}
    return await run(*args, home=home, command=command, env=env)


@pytest.mark.parametrize("way", ["flag", "stdin", "environment"])
async def test_login_keeps_a_token_that_works(tmp_path: Path, way: str) -> None:
    home = tmp_path / "client"
    async with RawOrigin(response(b"hello")) as local, serving(tmp_path / "server", "--token", TOKEN) as server:
        if way == "stdin":
            result = await with_stdin(home, f"{TOKEN}\n", "login", server.url)
        elif way == "flag":
            result = await execute(home, "login", f"127.0.0.1:{server.port}/", "--token", TOKEN)
        else:
            result = await execute(home, "login", server.url, PYTUNNEL_TOKEN=TOKEN)
        line = f"{server.url} knows this token; from now on `pytunnel connect 3000` uses both"
        assert (result.status, result.stdout, result.stderr) == (0, [], [line])
        kept = home / "state" / "client.json"
        assert json.loads(kept.read_text()) == {"server": server.url, "tokens": {server.url: TOKEN}}
        assert kept.stat().st_mode & 0o777 == 0o600
        env = {"PYTUNNEL_CONFIG": str(home / "config.toml")}
        async with await start("connect", f"web={local.port}", home=home, env=env) as client:
            assert (await visit(await url_of(client))).body == b"hello"


async def test_login_without_a_stdin_is_2(tmp_path: Path) -> None:
    script = ["/bin/sh", "-c", 'exec "$0" "$@" <&-', sys.executable, str(PROGRAM)]
    result = await run("login", f"http://127.0.0.1:{free_port()}", home=tmp_path, command=script)
    assert (result.status, result.stdout, len(result.stderr)) == (2, [], 1), result
    assert result.error.startswith("error: no token was given: ")
    assert os.listdir(tmp_path) == []


async def test_login_that_fails_keeps_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path / "server", "--token", TOKEN) as server, Relay(0) as refusing:
        refusing.refuse = True
        nowhere, reset = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{refusing.port}"
        table = [
            ([server.url, "--token", OTHER_TOKEN], 3, "pytunnel serve"),
            ([nowhere, "--token", TOKEN], 5, f"no server at {nowhere}: connection refused; check the address"),
            ([reset, "--token", TOKEN], 5, f"no server at {reset}: "),
            ([server.url, "--token", "short"], 2, "copy the whole of what"),
            ([server.url], 2, "no token was given"),  # stdin is empty
            (["ftp://x", "--token", TOKEN], 2, "is not a server"),
            ([], 2, "pytunnel login --help"),
        ]
        for args, status, message in table:
            result = await execute(tmp_path / "client", "login", *args)
            assert (result.status, result.stdout, len(result.stderr)) == (status, [], 1), (args, result)
            assert message in result.error
            assert OTHER_TOKEN not in result.error
        assert not (tmp_path / "client" / "state").exists()


# ---------------------------------------------------------------------------------------- start


async def test_start(tmp_path: Path) -> None:
    """The only one, some of them, all; the URLs are in the order of what was asked for."""
    home = tmp_path / "client"
    home.mkdir()
    async with RawOrigin(response(b"hello")) as local, serving(tmp_path / "server", "--token", TOKEN) as server:
        (home / "config.toml").write_text(f'server = "{server.url}"\ntoken = "{TOKEN}"\n')
        (home / "pytunnel.toml").write_text(f'[tunnels.web]\ntarget = "{local.port}"\n')
        env = {"PYTUNNEL_CONFIG": str(home / "config.toml")}

        async def names(*args: str, count: int) -> list[str]:
            async with await start("start", *args, home=home, env=env) as client:
                urls = [await url_of(client) for _ in range(count)]
                assert [(await visit(url)).body for url in urls] == [b"hello"] * count
                client.send_signal(2)
                assert await client.wait() == 0
                assert client.stdout == urls
                return [url.partition("//")[2].partition(".")[0] for url in urls]

        assert await names(count=1) == ["web"]
        with (home / "config.toml").open("a") as file:
            file.write("".join(f'[tunnels.{name}]\ntarget = "{local.port}"\n' for name in ("one", "two", "three")))
        assert await names("two", "web", count=2) == ["two", "web"]
        assert await names("two", "two", count=1) == ["two"]
        assert await names("--all", count=4) == ["web", "one", "two", "three"]

        unknown = await execute(home, "start", "wep")
        assert (unknown.status, unknown.stdout) == (2, [])
        assert unknown.error == "error: no tunnel is called 'wep'; did you mean 'web'?"
        which = await execute(home, "start")
        assert (which.status, which.stdout) == (2, [])
        assert which.error == "error: which tunnel? give --all, or some of: web, one, two, three"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('target = "nonsense"', "a port like 3000"),
        ('target = "./no-such-folder"', "there is no folder"),
        ('target = "3000"\nheader = ["no colon"]', "Name: value"),
        ('target = "3000"\nhost-header = "a b"', "rewrite"),
    ],
)
async def test_a_broken_tunnel_of_a_file_is_its_own_trouble(tmp_path: Path, lines: str, message: str) -> None:
    """The others start, `config` shows all, and who starts it reads where to look."""
    home = tmp_path / "client"
    home.mkdir()
    async with RawOrigin(response(b"hello")) as local, serving(tmp_path / "server", "--token", TOKEN) as server:
        (home / "config.toml").write_text(f'server = "{server.url}"\ntoken = "{TOKEN}"\n')
        text = f'[tunnels.broken]\n{lines}\n[tunnels.other]\ntarget = "{local.port}"\n'
        (home / "pytunnel.toml").write_text(text)
        env = {"PYTUNNEL_CONFIG": str(home / "config.toml")}
        async with await start("start", "other", home=home, env=env) as client:
            assert (await visit(await url_of(client))).body == b"hello"
        config = await execute(home, "config")
        assert (config.status, config.stderr) == (0, [])
        shown = [line.partition(" = ")[0] for line in config.stdout]
        assert shown == ["server", "token", "tunnels.broken", "tunnels.other"]
        for args in (["broken"], ["other", "broken"], ["--all"]):
            result = await execute(home, "start", *args)
            assert (result.status, result.stdout, len(result.stderr)) == (2, [], 1), (args, result)
            assert result.error.startswith("error: pytunnel.toml: tunnel broken: ") and message in result.error


async def test_start_without_any_is_2(tmp_path: Path) -> None:
    for args in ([], ["web"], ["--all"]):
        result = await execute(tmp_path, "start", *args)
        assert (result.status, result.stdout, len(result.stderr)) == (2, [], 1), result
        files = f"pytunnel.toml or {tmp_path}/config.toml"
        assert result.error == f"error: no tunnels are set up in {files}; see pytunnel start --help"


def test_settings_know_all_flags_of_a_tunnel() -> None:
    """What `connect` can do to a tunnel, a file can, too."""
    options = pytunnel._parser().parse_args(["connect", "3000"])
    flags = {name.replace("_", "-") for name in vars(options)}
    assert set(pytunnel.TUNNEL_SETTINGS) - {"target"} <= flags
    others = {"command", "server", "token", "token-file", "name", "targets", "json", "verbose", "debug", "no-tui"}
    client = {"detach", "detached", "wait-local", "max-retries", "no-compress", "url-file", "format"}
    assert flags - set(pytunnel.TUNNEL_SETTINGS) == others | client
