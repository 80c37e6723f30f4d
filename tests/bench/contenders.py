"""What is compared: each contender makes one local service, the origin, reachable for visitors on the server's side.

    visitor -> [server side] <- ... <- [home side] -> origin

Everything is started here, listens on ports of its own, keeps its files in one temporary directory and is gone
when the stage closes. On one machine both sides are 127.0.0.1; `network` makes two machines of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from support import free_port, with_limits

READY = 15.0  # seconds a contender may take until its first answer
TOKEN = "bench-token-0123456789abcdef0123456789abcdef"
MANY = 1_000_000_000  # more than a benchmark ever does
PACKAGES = {  # what Debian calls the packages of the programs used here
    "wrk": "wrk",
    "nginx": "nginx-light",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "curl": "curl",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "ss": "iproute2",
}


def find(program: str) -> str | None:
    """The program's path; /usr/sbin is looked at even where it is not in PATH."""
    return shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin")


def missing_packages() -> list[str]:
    """The Debian packages without which nothing can be measured."""
    return sorted({package for program, package in PACKAGES.items() if find(program) is None})


# ---------------------------------------------------------------------------------------- Stage


@dataclass(frozen=True)
class Side:
    """Where programs run: this machine, or a network namespace that `prefix` enters."""

    address: str = "127.0.0.1"  # what the other side dials
    prefix: tuple[str, ...] = ()

    @property
    def listen(self) -> str:
        """The address on which programs listen: every one of a namespace."""
        return "0.0.0.0" if self.prefix else "127.0.0.1"


class Target(NamedTuple):
    """Where visitors get at one of the origin's two ports."""

    side: Side  # the visitors'
    address: str
    port: int
    host: str = ""  # of the Host field

    def url(self, path: str) -> str:
        return f"http://{self.address}:{self.port}{path}"

    @property
    def authority(self) -> str:
        return self.host or f"{self.address}:{self.port}"


@dataclass
class Running:
    """A contender that works."""

    name: str
    files: Target
    app: Target
    server: subprocess.Popen[bytes] | None = None  # the process that visitors meet
    client: subprocess.Popen[bytes] | None = None
    origin: Target | None = None  # the app, from its own side
    more: Callable[[int], None] | None = None  # starts so many more idle clients
    tcp: tuple[Target, Target] | None = None  # files and app where bytes go through as they are

    @property
    def is_pytunnel(self) -> bool:
        return self.name.startswith("pytunnel")


class Stage:
    """A directory, two sides, an origin, and all processes that were started for them."""

    def __init__(self, home: Side, server: Side, pytunnel: Path, limits: Mapping[str, float]) -> None:
        self.home, self.server = home, server
        self.pytunnel, self.limits = pytunnel, limits
        self.directory = Path()
        self.files_port, self.app_port = 0, 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def start(
        self, side: Side, *words: str, name: str, env: Mapping[str, str] | None = None, stdout: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start a program on one side; its output goes to a file, its stdout to a pipe when asked for."""
        log = self._stack.enter_context((self.directory / f"{name}.log").open("ab"))
        process = subprocess.Popen(
            [*side.prefix, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if stdout else log,
            stderr=log,
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.directory), **(env or {})},
            cwd=self.directory,
            start_new_session=True,
        )
        self._stack.callback(end, process)
        return process

    def log(self, name: str) -> str:
        """The last lines that a program has written."""
        return "\n".join((self.directory / f"{name}.log").read_text(errors="replace").splitlines()[-20:])

    def write(self, name: str, text: str, mode: int = 0o600) -> str:
        """Write a file of a program's configuration and return its path."""
        path = self.directory / name
        path.write_text(text)
        path.chmod(mode)
        return str(path)


def end(process: subprocess.Popen[Any]) -> None:
    """End a process with SIGTERM, where that works, and all that it has started."""
    left = list(tree(process.pid))
    process.terminate()
    try:
        process.wait(3.0)
    except subprocess.TimeoutExpired:
        process.kill()
    for pid in left[1:]:  # like a session of sshd, which waits for a client that is gone
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()


def tree(pid: int) -> Iterator[int]:
    """A process and all that it has started."""
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from tree(int(child))


def start_contenders(stage: Stage, names: Iterable[str]) -> list[Running]:
    """Start those that are there, and return when all of them work."""
    made = [running for name in names if (running := CONTENDERS[name](stage))]
    for running in made:
        running.origin = Target(stage.home, "127.0.0.1", stage.app_port)
    return [wait_until_ready(stage, running) for running in made]


def wait_until_ready(stage: Stage, running: Running) -> Running:
    """Return when both ports of the origin answer through the contender."""
    wait_for_answer(stage, running.files, "/small")
    wait_for_answer(stage, running.app, "/empty")
    return running


def wait_for_answer(stage: Stage, target: Target, path: str) -> None:
    """Return when a request succeeds; the benchmark ends with what all programs have said when none does in time."""
    deadline = time.monotonic() + READY
    words = ["curl", "-sf", "-m", "5", "-o", "/dev/null", "-H", f"Host: {target.authority}", target.url(path)]
    while subprocess.run([*target.side.prefix, *words]).returncode:
        if time.monotonic() > deadline:
            logs = [f"--- {path.stem}\n{stage.log(path.stem)}" for path in stage.directory.glob("*.log")]
            sys.exit("\n".join([f"error: no answer within {READY:g} s: {' '.join(words)}", *logs]))
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------- Origin

_NGINX = """\
daemon off; pid {directory}/{name}.pid; error_log stderr error; worker_processes 1; {user}
events {{ worker_connections 8192; }}
http {{
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests {many}; keepalive_timeout 600s; server_tokens off;
  open_file_cache max=100; client_max_body_size 0; default_type application/octet-stream;
  types {{ application/json json; text/html html; application/javascript js; }}
  client_body_temp_path {directory}/{name}-body; proxy_temp_path {directory}/{name}-proxy;
  fastcgi_temp_path {directory}/{name}-f; uwsgi_temp_path {directory}/{name}-u; scgi_temp_path {directory}/{name}-s;
  {content}
}}
"""


def _start_nginx(stage: Stage, side: Side, name: str, content: str) -> subprocess.Popen[bytes]:
    user = "user root;" if os.geteuid() == 0 else ""  # the directory is nobody else's
    text = _NGINX.format(directory=stage.directory, name=name, many=MANY, content=content, user=user)
    config = stage.write(f"{name}.conf", text)
    return stage.start(side, find("nginx") or "", "-e", "stderr", "-c", config, "-p", str(stage.directory), name=name)


def small_json() -> str:
    """1 KiB of JSON."""
    record = {"id": 1, "name": "a small answer", "tags": ["one", "two", "three"], "nested": {"ok": True, "n": 3.5}}
    text = json.dumps({"items": [record] * 8})
    return text[:-1] + ', "fill": "' + "x" * (1024 - len(text) - 12) + '"}'


def start_origin(stage: Stage, files: Path) -> None:
    """Start what all contenders forward to: nginx with a directory of files, and the app of `origin`."""
    stage.files_port, stage.app_port = free_port(), free_port()
    answer = f"default_type application/json; return 200 '{small_json()}';"
    small = f"location = /small {{ {answer} }} location = /varied {{ add_header X-Request-Id $request_id; {answer} }}"
    listen = f"listen {stage.home.listen}:{stage.files_port} backlog=4096;"
    _start_nginx(stage, stage.home, "origin", f"server {{ {listen} {small} root {files}; }}")
    app = str(Path(__file__).with_name("origin.py"))
    stage.start(stage.home, sys.executable, app, stage.home.listen, str(stage.app_port), name="app")


# ---------------------------------------------------------------------------------------- Contenders


def straight(stage: Stage) -> Running:
    """No contender at all: what everything else is measured against."""
    where = [Target(stage.server, stage.home.address, port) for port in (stage.files_port, stage.app_port)]
    return Running("straight", *where, tcp=(where[0], where[1]))


def nginx(stage: Stage) -> Running:
    """A reverse proxy on the server's side, which would need the origin to be reachable from there."""
    content = "map $http_upgrade $connection_field { default upgrade; '' ''; } "
    targets = []
    for name, port in (("files", stage.files_port), ("app", stage.app_port)):
        targets.append(Target(stage.server, "127.0.0.1", free_port()))
        content += f"""
        upstream {name} {{ server {stage.home.address}:{port}; keepalive 512; keepalive_requests {MANY}; }}
        server {{
          listen {stage.server.listen}:{targets[-1].port} backlog=4096;
          location / {{
            proxy_pass http://{name}; proxy_http_version 1.1; proxy_set_header Host $host;
            proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_field;
            proxy_buffering off; proxy_buffer_size 64k; proxy_buffers 8 64k; proxy_request_buffering off;
            proxy_read_timeout 600s;
          }}
        }}"""
    return Running("nginx", *targets, server=_start_nginx(stage, stage.server, "nginx", content))


def ssh(stage: Stage, *options: str) -> Running:
    """`ssh -R` with a daemon of our own: keys, configuration and port are nobody else's."""
    title = " ".join(["ssh", *options, "-R"])
    place = stage.directory / title.replace(" ", "")
    place.mkdir()
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / f"{name}_key")]
        subprocess.run(words, check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where a daemon that root starts locks itself up
    port = free_port()
    lines = [
        f"Port {port}", f"ListenAddress {stage.server.listen}", f"HostKey {place}/host_key",
        f"AuthorizedKeysFile {place}/user_key.pub", "UsePAM no", "StrictModes no", "PermitRootLogin yes",
        "PasswordAuthentication no", "PidFile none", "MaxStartups 1000", "AllowTcpForwarding yes",
    ]  # fmt: skip
    config = stage.write(f"{place.name}/config", "\n".join(lines) + "\n")
    server = stage.start(stage.server, find("sshd") or "", "-D", "-e", "-f", config, name="sshd")
    targets = [Target(stage.server, "127.0.0.1", free_port()) for _ in range(2)]
    login = [
        "ssh", *options, "-N", "-F", "/dev/null", "-i", f"{place}/user_key", "-p", str(port),
        "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={place}/known_hosts",
        "-o", "ExitOnForwardFailure=yes", "-o", "BatchMode=yes", "-o", "ConnectionAttempts=20",
    ]  # fmt: skip

    def connect(*pairs: tuple[Target, int]) -> subprocess.Popen[bytes]:
        forwards = [word for target, port in pairs for word in ("-R", f"127.0.0.1:{target.port}:127.0.0.1:{port}")]
        return stage.start(stage.home, *login, *forwards, stage.server.address, name="ssh")

    def more(count: int) -> None:
        made = [Target(stage.server, "127.0.0.1", free_port()) for _ in range(count)]
        for target in made:
            connect((target, stage.files_port))
        for target in made:
            wait_for_answer(stage, target, "/small")

    client = connect((targets[0], stage.files_port), (targets[1], stage.app_port))
    return Running(title, *targets, server=server, client=client, more=more, tcp=(targets[0], targets[1]))


def frp(stage: Stage) -> Running | None:
    """frp's http mode, in the language of the version that is installed; None without it."""
    if find("frps") is None or find("frpc") is None:
        return None
    port, visitors = free_port(), free_port()
    new = _frp_version() >= (0, 52)  # the first with TOML
    suffix = "toml" if new else "ini"
    server = (
        f'bindAddr = "{stage.server.listen}"\nbindPort = {port}\nvhostHTTPPort = {visitors}\n'
        if new
        else f"[common]\nbind_addr = {stage.server.listen}\nbind_port = {port}\nvhost_http_port = {visitors}\n"
    )
    config = stage.write(f"frps.{suffix}", server)
    frps = stage.start(stage.server, find("frps") or "", "-c", config, name="frps")
    time.sleep(0.5)  # so that frpc's first dial is not one of those it repeats later and later

    def connect(name: str, tunnels: Mapping[str, int]) -> subprocess.Popen[bytes]:
        make = _frpc_toml if new else _frpc_ini
        config = stage.write(f"{name}.{suffix}", make(stage.server.address, port, tunnels))
        return stage.start(stage.home, find("frpc") or "", "-c", config, name=name)

    def more(count: int) -> None:
        for number in range(count):
            connect(f"frpc-{number}", {f"idle-{number}": stage.files_port})
        for number in range(count):
            wait_for_answer(stage, Target(stage.server, "127.0.0.1", visitors, f"idle-{number}.bench"), "/small")

    frpc = connect("frpc", {"files": stage.files_port, "app": stage.app_port})
    targets = [Target(stage.server, "127.0.0.1", visitors, f"{name}.bench") for name in ("files", "app")]
    return Running("frp", *targets, server=frps, client=frpc, more=more)


def _frpc_toml(address: str, port: int, tunnels: Mapping[str, int]) -> str:
    text = f'serverAddr = "{address}"\nserverPort = {port}\nloginFailExit = false\n'
    for name, local in tunnels.items():
        text += f'[[proxies]]\nname = "{name}"\ntype = "http"\nlocalIP = "127.0.0.1"\n'
        text += f'localPort = {local}\ncustomDomains = ["{name}.bench"]\n'
    return text


def _frpc_ini(address: str, port: int, tunnels: Mapping[str, int]) -> str:
    text = f"[common]\nserver_addr = {address}\nserver_port = {port}\nlogin_fail_exit = false\n"
    for name, local in tunnels.items():
        text += f"[{name}]\ntype = http\nlocal_ip = 127.0.0.1\nlocal_port = {local}\ncustom_domains = {name}.bench\n"
    return text


def _frp_version() -> tuple[int, ...]:
    text = version_of([find("frps") or "", "--version"])
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def pytunnel(stage: Stage, loop: str) -> Running:
    """Server and client on asyncio's own loop or on uvloop.

    All visitors come from one address here, and all clients have one token, so what these may do is not bounded.
    """
    env = {"PYTUNNEL_TOKEN": TOKEN, "PYTUNNEL_LOOP": loop, "PYTUNNEL_STATE_DIR": str(stage.directory / loop)}
    program = with_limits(stage.pytunnel.parent, **{"MAX_ABORTS": MANY, "MAX_NAMES": MANY, **stage.limits})
    words = ["serve", "--listen", f"{stage.server.listen}:0", "--json", "--max-per-address", "100000"]
    has_tcp = "--tcp-ports" in stage.pytunnel.read_text()  # not so every pytunnel that ours may be compared with
    if has_tcp:
        first = random.randrange(12_000, 32_000, 20)  # those that are free are taken
        words += ["--tcp-ports", f"{stage.server.listen}:{first}-{first + 19}"]
    server = stage.start(stage.server, *program, *words, name=f"server-{loop}", env=env, stdout=True)
    port = int(json.loads(_line(server))["port"])
    dial = f"http://{stage.server.address}:{port}"
    more_targets = [f"tcp-files=tcp:{stage.files_port}", f"tcp-app=tcp:{stage.app_port}"] if has_tcp else []
    words = ["connect", f"files={stage.files_port}", f"app={stage.app_port}", *more_targets, "--server", dial]
    client = stage.start(stage.home, *program, *words, name=f"client-{loop}", env=env, stdout=True)
    hosts = [urlsplit(_line(client)).netloc for _ in range(4 if has_tcp else 2)]
    targets = [Target(stage.server, "127.0.0.1", port, host) for host in hosts[:2]]
    raw = [Target(stage.server, "127.0.0.1", int(host.rpartition(":")[2])) for host in hosts[2:]]

    def more(count: int) -> None:
        words = [sys.executable, str(Path(__file__).with_name("clients.py")), str(stage.pytunnel.parent)]
        clients = stage.start(stage.home, *words, dial, str(count), name=f"clients-{loop}", env=env, stdout=True)
        _line(clients)

    tcp = (raw[0], raw[1]) if raw else None
    return Running(f"pytunnel, {loop}", *targets, server=server, client=client, more=more, tcp=tcp)


def _line(process: subprocess.Popen[bytes]) -> str:
    """The next line of a program's stdout, which says that it works."""
    assert process.stdout is not None
    line = process.stdout.readline().decode().strip()
    if not line:
        sys.exit(f"error: no line from {' '.join(process.args)}")  # type: ignore[arg-type]
    return line


CONTENDERS: dict[str, Callable[[Stage], Running | None]] = {
    "straight": straight,
    "nginx": nginx,
    "ssh -R": ssh,
    "ssh -C -R": lambda stage: ssh(stage, "-C"),
    "frp": frp,
    "pytunnel, asyncio": lambda stage: pytunnel(stage, "asyncio"),
    "pytunnel, uvloop": lambda stage: pytunnel(stage, "uvloop"),
}


def version_of(words: list[str]) -> str:
    """What a program says of its version, on stdout or stderr."""
    done = subprocess.run(words, capture_output=True, text=True)
    return (done.stdout + done.stderr).strip().partition("\n")[0]


def versions(pytunnel: Path) -> str:
    """The contenders' versions, for the table's head."""
    found = [version_of(["ssh", "-V"]).partition(",")[0], version_of([find("nginx") or "", "-v"])]
    if find("frps"):
        found.append("frp " + version_of([find("frps") or "", "--version"]))
    python = f"Python {platform.python_version()}"
    with contextlib.suppress(ImportError):
        import uvloop

        python += f", uvloop {uvloop.__version__}"
    source = re.search(r'^__version__ = "(.+)"', pytunnel.read_text(), re.M)
    return ", ".join([*found, f"pytunnel {source[1] if source else '?'}", python])
