"""A folder as a local service: what is served and how, and what is not, however it is asked for."""

from __future__ import annotations

import contextlib
import email.utils
import logging
import os
import re
import socket
import urllib.parse
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from support import Header, RawOrigin, RawResponse, RawVisitor, Tunnel, request

import pytunnel

HTML = (b"Accept", b"text/html,application/xhtml+xml,*/*;q=0.8")
ODD_NAMES = [
    "with space.txt",
    "hash#mark.txt",
    "question?.txt",
    "100%.txt",
    "%41.txt",
    "<b>&\"'.txt",
    "grüße-日本.txt",
    "a:b.txt",
    "new\nline.txt",
    "two..dots",
    os.fsdecode(b"latin-\xe9.txt"),
]


class Folder:
    """A folder that is served, and a visitor for it."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.port = root, port

    async def get(self, target: str, *headers: Header, method: str = "GET") -> RawResponse:
        async with RawVisitor(self.port) as visitor:
            await visitor.send(request(method, target.encode(), b"folder.test", headers))
            return await visitor.read_response(method)

    async def statuses(self, targets: Iterable[str], *headers: Header) -> dict[str, int]:
        return {target: (await self.get(target, *headers)).status for target in targets}


@contextlib.asynccontextmanager
async def folder(root: Path, *, spa: bool = False) -> AsyncIterator[Folder]:
    async with pytunnel.folder_service(root, spa=spa) as port:
        yield Folder(root, port)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`served` holds what may be seen; `secret` and `outside/` lie beside it."""
    root = tmp_path / "served"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "hello.txt").write_text("hello, world\n")
    (root / "sub" / "inner.txt").write_text("inner")
    (root / ".env").write_text("SECRET=1")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("secret")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    return root


def logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """All but asyncio's lines: of a slow callback it warns when the machine is busy, and its errors fail each test."""
    return [record for record in caplog.records if record.name != "asyncio"]


def links(page: RawResponse) -> list[str]:
    return re.findall(r'href="(.*?)"', page.body.decode())


# What is served


async def test_a_file(root: Path) -> None:
    async with folder(root) as served:
        answer = await served.get("/hello.txt?v=1")
        assert (answer.status, answer.body) == (200, b"hello, world\n")
        assert answer.value(b"content-type") == b"text/plain; charset=utf-8"
        assert answer.value(b"cache-control") == b"no-cache"
        head = await served.get("/hello.txt", method="HEAD")
        assert (head.status, head.body, head.value(b"content-length")) == (200, b"", b"13")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.html", b"text/html; charset=utf-8"),
        ("a.css", b"text/css; charset=utf-8"),
        ("a.mjs", b"(text|application)/javascript; charset=utf-8"),
        ("a.svg", b"image/svg\\+xml"),
        ("a.png", b"image/png"),
        ("a.txt.gz", b"application/gzip"),
        ("a", b"application/octet-stream"),
    ],
)
async def test_content_types(root: Path, name: str, kind: bytes) -> None:
    (root / name).write_text("x")
    async with folder(root) as served:
        answer = await served.get(f"/{name}")
        assert re.fullmatch(kind, answer.value(b"content-type") or b"")
        assert not answer.values(b"content-encoding")


async def test_ranges_and_conditions(root: Path) -> None:
    async with folder(root) as served:
        whole = await served.get("/hello.txt")
        etag, modified = whole.value(b"etag") or b"", whole.value(b"last-modified") or b""
        part = (b"Range", b"bytes=7-11")
        for condition in [(), ((b"If-Range", etag),), ((b"If-Range", modified),)]:
            answer = await served.get("/hello.txt", part, *condition)
            assert (answer.status, answer.body) == (206, b"world"), condition
            assert answer.value(b"content-range") == b"bytes 7-11/13"
        old = email.utils.formatdate(0, usegmt=True).encode()
        for changed in [b'"another"', b'W/"another"', b"W/" + etag, old]:
            answer = await served.get("/hello.txt", part, (b"If-Range", changed))
            assert (answer.status, answer.body) == (200, whole.body), changed
        assert (await served.get("/hello.txt", (b"Range", b"bytes=99-"))).status == 416
        for fresh in [(b"If-None-Match", etag), (b"If-Modified-Since", modified)]:
            answer = await served.get("/hello.txt", fresh)
            assert (answer.status, answer.body, answer.value(b"etag")) == (304, b"", etag)
        assert (await served.get("/hello.txt", (b"If-None-Match", b'"another"'))).status == 200
        assert (await served.get("/hello.txt", (b"If-Match", b'"another"'))).status == 412
        assert (await served.get("/hello.txt", (b"X-Bytes", b"\xff\xfe"), (b"If-Match", b"\xff"))).status == 200


async def test_a_change_is_seen_at_once(root: Path) -> None:
    async with folder(root) as served:
        etag = (await served.get("/hello.txt")).value(b"etag") or b""
        (root / "hello.txt").write_text("something else")
        assert (await served.get("/hello.txt", (b"If-None-Match", etag))).body == b"something else"


async def test_a_compressed_sibling_does_not_stand_in(root: Path) -> None:
    (root / "hello.txt.gz").write_bytes(b"an old backup")
    (root / "hello.txt.br").write_bytes(b"an old backup")
    async with folder(root) as served:
        answer = await served.get("/hello.txt", (b"Accept-Encoding", b"gzip, br"))
        assert answer.body == b"hello, world\n"
        assert not answer.values(b"content-encoding")


async def test_odd_names_are_listed_and_lead_to_their_files(root: Path) -> None:
    for name in ODD_NAMES:
        (root / name).write_text(f"this is {name!r}")
    async with folder(root) as served:
        page = await served.get("/")
        found = {}
        for link in links(page):
            assert re.fullmatch(r"\./[A-Za-z0-9%._~-]+/?", link), link
            name = os.fsdecode(urllib.parse.unquote_to_bytes(link[2:]))
            if name in ODD_NAMES:
                found[name] = (await served.get(link[1:])).body.decode()
        assert found == {name: f"this is {name!r}" for name in ODD_NAMES}
        assert "&lt;b&gt;&amp;" in page.body.decode()
        assert "<b>" not in page.body.decode()


async def test_a_listing(root: Path) -> None:
    (root / "Zoo").mkdir()
    (root / "big.bin").write_bytes(bytes(12345))
    async with folder(root) as served:
        page = await served.get("/")
        assert (page.status, page.value(b"content-type")) == (200, b"text/html; charset=utf-8")
        assert links(page) == ["./sub/", "./Zoo/", "./big.bin", "./hello.txt"]
        assert "<td>12,345\n" in page.body.decode()
        assert "color-scheme:light dark" in page.body.decode()
        assert links(await served.get("/sub/")) == ["../", "./deep/", "./inner.txt"]
        assert links(await served.get("/sub/deep/")) == ["../"]
        head = await served.get("/", method="HEAD")
        assert (head.status, head.body) == (200, b"")


async def test_an_index_stands_for_its_folder(root: Path) -> None:
    (root / "sub" / "index.html").write_text("<p>sub")
    async with folder(root) as served:
        assert (await served.get("/sub/")).body == b"<p>sub"
        for target in ("/sub", "/sub/deep"):
            for query in ("", "?a=%20&b=c?d"):
                answer = await served.get(target + query)
                assert (answer.status, answer.value(b"location")) == (302, f"{target}/{query}".encode())
        assert (await served.get("/sub/inner.txt/")).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
async def test_only_get_and_head(root: Path, method: str) -> None:
    async with folder(root) as served:
        for target in ("/hello.txt", "/", "/missing"):
            answer = await served.get(target, method=method)
            assert answer.status == 405
            assert set((answer.value(b"allow") or b"").replace(b" ", b"").split(b",")) == {b"GET", b"HEAD"}


async def test_a_single_page_application(root: Path) -> None:
    (root / "index.html").write_text("<p>app")
    async with folder(root, spa=True) as served:
        for target in ("/", "/users/7", "/users/7/", "/users?tab=1", "/sub", "/sub/", "/hello.txt/"):
            answer = await served.get(target, HTML)
            assert (answer.status, answer.body) == (200, b"<p>app"), target
        assert (await served.get("/users/7", HTML, method="HEAD")).status == 200
        assert (await served.get("/hello.txt", HTML)).body == b"hello, world\n"
        assert (await served.get("/app.js")).status == 404
        assert (await served.get("/app.js", (b"Accept", b"*/*"))).status == 404
        for target in ("/.env", "/.git/config", "/x/..%2f..%2fsecret", "/a%00"):
            assert (await served.get(target, HTML)).status == 404, target
    (root / "index.html").unlink()
    async with folder(root, spa=True) as served:
        assert await served.statuses(["/", "/users"], HTML) == {"/": 404, "/users": 404}
    async with folder(root) as served:
        assert await served.statuses(["/", "/users"], HTML) == {"/": 200, "/users": 404}


# What is not


UPWARD = [
    *("/..", "/../secret", "/sub/../../secret", "/./hello.txt", "/sub/../hello.txt", "/../served/hello.txt"),
    *("/%2e%2e/secret", "/%2E%2E/secret", "/.%2e/secret", "/sub/%2e%2e/%2e%2e/secret", "/%252e%252e/secret"),
    *("/..%2fsecret", "/..%2Fsecret", "/sub%2finner.txt", "/%2e%2e%2fsecret", "/sub/..%2f..%2fsecret"),
    *("/..%5csecret", "/sub%5cinner.txt", "/back%5cslash", "/..\\secret", "/\\secret"),
    *("/hello.txt%00", "/%00", "/hello.txt%00.html", "//hello.txt", "/sub//inner.txt", "//secret", "///"),
    *("/.env", "/%2eenv", "/.git", "/.git/", "/.git/config", "/sub/.hidden", "/.", "/sub/.."),
    *("/%2fetc%2fpasswd", "//etc/passwd", "http://folder.test/hello.txt", "/hello.txt/", "/hello.txt/x"),
    *("/" + "a" * 300, "/" + "a/" * 3000, "/%", "/%zz", "/%ff", "/C:/secret", "/missing"),
]


async def test_no_way_out(root: Path) -> None:
    (root / "sub" / ".hidden").write_text("secret")
    (root / "back\\slash").write_text("a link to it would lead elsewhere on Windows")
    async with folder(root) as served:
        assert await served.statuses(UPWARD) == dict.fromkeys(UPWARD, 404)
        for absolute in ("/etc/passwd", str(root.parent / "secret")):
            assert (await served.get(absolute)).status == 404


async def test_links_are_followed_inside_only(root: Path) -> None:
    (root / "alias.txt").symlink_to("hello.txt")
    (root / "folder").symlink_to(root / "sub")
    (root / "secret").symlink_to(root.parent / "secret")
    (root / "outside").symlink_to("../outside")
    (root / "sub" / "up").symlink_to("../..")
    (root / "env").symlink_to(".env")
    (root / "git").symlink_to(".git")
    (root / "loop").symlink_to("loop")
    (root / "nowhere").symlink_to("missing")
    (root / ".shown").symlink_to("hello.txt")
    (root.parent / "served-too").mkdir()
    (root / "neighbour").symlink_to(root.parent / "served-too")
    async with folder(root) as served:
        assert (await served.get("/alias.txt")).body == b"hello, world\n"
        assert (await served.get("/folder/inner.txt")).body == b"inner"
        hidden = ["/secret", "/outside", "/outside/", "/outside/secret.txt", "/sub/up/", "/sub/up/secret", "/env"]
        hidden += ["/git/", "/git/config", "/loop", "/nowhere", "/.shown", "/neighbour/"]
        assert await served.statuses(hidden) == dict.fromkeys(hidden, 404)
        assert links(await served.get("/")) == ["./folder/", "./sub/", "./alias.txt", "./hello.txt"]
        assert links(await served.get("/sub/")) == ["../", "./deep/", "./inner.txt"]


async def test_the_root_may_be_a_link_and_lie_in_a_hidden_folder(root: Path) -> None:
    hidden = root.parent / ".cache"
    os.rename(root, hidden)
    os.symlink(hidden, root)
    async with folder(root) as served:
        assert await served.statuses(["/", "/hello.txt", "/.env"]) == {"/": 200, "/hello.txt": 200, "/.env": 404}


async def test_special_files_do_not_block(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(root / "fifo")
    (root / "null").symlink_to("/dev/null")
    (root / "index.html").symlink_to("fifo")
    monkeypatch.chdir(root)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        async with folder(root) as served:
            targets = ["/fifo", "/null", "/socket", "/index.html"]
            assert await served.statuses(targets) == dict.fromkeys(targets, 404)
            assert links(await served.get("/")) == ["./sub/", "./hello.txt"]


async def test_what_cannot_be_read_is_forbidden(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tests may run as root, who can read everything, so the system's answer is made up."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    async with folder(root) as served:
        monkeypatch.setattr(os, "listdir", refuse)
        monkeypatch.setattr(Path, "open", refuse)
        assert await served.statuses(["/", "/hello.txt"]) == {"/": 403, "/hello.txt": 403}
        monkeypatch.setattr(Path, "stat", refuse)
        assert await served.statuses(["/", "/hello.txt"]) == {"/": 404, "/hello.txt": 404}
    assert not logged(caplog)


async def test_a_folder_that_goes_away(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with folder(root) as served:
        os.rename(root, root.parent / "moved")
        assert await served.statuses(["/", "/hello.txt"]) == {"/": 404, "/hello.txt": 404}
    assert not logged(caplog)


async def test_a_visitor_who_leaves_leaves_no_trace(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (root / "big").open("wb") as big:
        big.truncate(64 * 2**20)
    async with folder(root) as served:
        async with RawVisitor(served.port, rcvbuf=4096) as visitor:
            await visitor.send(request("GET", b"/big", b"folder.test"))
            await visitor.read_head()
            visitor.abort()
        assert (await served.get("/hello.txt")).status == 200
    assert not logged(caplog)


async def test_through_a_tunnel(root: Path) -> None:
    (root / "big").write_bytes(os.urandom(3_000_000))
    async with RawOrigin(b"unused") as origin, folder(root) as served, Tunnel(origin.port) as tunnel:
        client = await tunnel.start_client(name="files", origin_port=served.port)
        await client.event("ready")
        tunnel.host = b"files." + tunnel.host.partition(b".")[2]
        assert (await tunnel.get(b"/big")).body == (root / "big").read_bytes()
        assert (await tunnel.get(b"/big", [(b"Range", b"bytes=-5")])).body == (root / "big").read_bytes()[-5:]
        assert (await tunnel.get(b"/sub?x")).value(b"location") == b"/sub/?x"
        assert (await tunnel.get(b"/../secret")).status == 404
        assert (await tunnel.fetch("HEAD", b"/big")).value(b"content-length") == b"3000000"
