"""The sections of pytunnel.py are its architecture: each uses only what stands above it; the first are pure."""

from __future__ import annotations

import ast
import builtins
import re
import symtable
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import pytunnel

BANNER = re.compile(r"^# ---- (.+?) -+$")
BANNER_WIDTH = 119
SOURCE = Path(pytunnel.__file__).read_text(encoding="utf-8")

# What a pure section may not name: it knows no clock, no file, no socket, no event loop, no screen and no chance.
IMPURE = frozenset(
    {
        *("asyncio", "http", "logging", "log", "open", "os", "Path", "platform", "print", "input", "random", "secrets"),
        *("select", "signal", "socket", "ssl", "subprocess", "sys", "tempfile", "threading", "time"),
    }
)


class Section(NamedTuple):
    name: str
    tree: ast.Module
    text: str

    @property
    def defined(self) -> set[str]:
        """The names that the section's top level binds."""
        table = symtable.symtable(ast.unparse(self.tree), self.name, "exec")
        bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
        return bound | {
            child.get_name()
            for child in table.get_children()
            if child.get_type() != "annotation" and child.get_name() != "lambda"
        }

    @property
    def used(self) -> set[str]:
        """The module's names that the section refers to, at its top level and inside its functions and classes."""
        return set(_globals(symtable.symtable(ast.unparse(self.tree), self.name, "exec")))


def _globals(table: symtable.SymbolTable) -> Iterator[str]:
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module"):
            yield symbol.get_name()
    for child in table.get_children():
        yield from _globals(child)


class _WithoutAnnotations(ast.NodeTransformer):
    """Annotations are never evaluated (`from __future__ import annotations`), so they may look ahead."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AsyncFunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = ast.Constant(None)
        self.generic_visit(node)
        return node


def sections(source: str) -> list[Section]:
    """Cut a module at its banners; what stands before the first one belongs to nobody."""
    lines = source.splitlines()
    starts = [(match[1], number) for number, line in enumerate(lines) if (match := BANNER.match(line))]
    found = []
    for (name, start), stop in zip(starts, [*(number for _, number in starts[1:]), len(lines)], strict=True):
        text = "\n".join(lines[start:stop])
        tree = _WithoutAnnotations().visit(ast.parse(text))
        found.append(Section(name, ast.fix_missing_locations(tree), text))
    return found


def upward_references(source: str) -> list[str]:
    """Return `section: name` for each name that a section uses and only a later one defines, or none."""
    known = set(dir(builtins)) | {"__file__", "__name__", "__doc__", "__path__"}
    found = []
    for section in sections(source):
        known |= section.defined
        found += [f"{section.name}: {name}" for name in sorted(section.used - known)]
    return found


def impurities(section: Section) -> list[str]:
    """Return what in a section does I/O."""
    asynchronous = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    found = [f"async, line {node.lineno}" for node in ast.walk(section.tree) if isinstance(node, asynchronous)]
    found += ["async" for node in ast.walk(section.tree) if isinstance(node, ast.comprehension) and node.is_async]
    return found + sorted(section.used & IMPURE)


def documented(source: str) -> tuple[list[str], str]:
    """Return the list of sections in the module's docstring, and the first one that may do I/O."""
    docstring = ast.get_docstring(ast.parse(source)) or ""
    heading = re.search(r"^Sections, in order.* those before (.+) do no I/O\n-+\n", docstring, re.MULTILINE)
    assert heading, "the docstring has no list of sections"
    return docstring[heading.end() :].split("\n\n")[0].splitlines(), heading[1]


def pure_sections(source: str) -> list[Section]:
    """The sections between the imports and the first one that does I/O."""
    found, first = sections(source), documented(source)[1]
    stop = next((n for n, section in enumerate(found) if section.name == first), len(found))
    return found[1:stop]


# The module


def test_no_section_uses_what_stands_below_it() -> None:
    assert upward_references(SOURCE) == []


def test_the_docstring_lists_the_sections() -> None:
    assert documented(SOURCE)[0] == [section.name for section in sections(SOURCE)]


def test_each_top_level_name_is_defined_in_one_section() -> None:
    owners: dict[str, str] = {}
    for section in sections(SOURCE):
        for name in section.defined:
            assert owners.setdefault(name, section.name) == section.name


def test_banners_have_one_form_and_say_why_the_section_is_there() -> None:
    lines = SOURCE.splitlines()
    looking_like_one = [n for n, line in enumerate(lines) if re.match(r"#\s*[-=]{2,}", line)]
    for number in looking_like_one:
        assert BANNER.match(lines[number]) or lines[number].startswith("# ==== Everything below does I/O ")
        assert len(lines[number]) == BANNER_WIDTH
    for section in sections(SOURCE):
        assert re.match(r"# \w", section.text.splitlines()[1]), section.name
    assert not {section.name.lower() for section in sections(SOURCE)} & {"utils", "helpers", "misc", "common"}


def test_the_line_between_pure_and_io_is_where_the_docstring_says() -> None:
    first = documented(SOURCE)[1]
    line = [n for n, text in enumerate(SOURCE.splitlines()) if text.startswith("# ==== Everything below does I/O ")]
    banners = {match[1]: n for n, text in enumerate(SOURCE.splitlines()) if (match := BANNER.match(text))}
    assert len(line) == 1
    assert next(name for name in banners if banners[name] > line[0]) == first


@pytest.mark.parametrize("section", pure_sections(SOURCE), ids=lambda section: section.name)
def test_pure_sections_do_no_io(section: Section) -> None:
    assert impurities(section) == []


def test_the_pure_sections_are_there() -> None:
    names = [section.name for section in pure_sections(SOURCE)]
    wanted = [
        "Limits and defaults",
        "Errors",
        "Frames",
        "Flow control",
        "Session",
        "HTTP/1.1 messages",
        "Handshake",
    ]
    assert [name for name in names if name in wanted] == wanted


# The tests' tests

SAMPLE = '''"""A module.

Sections, in order; those before Second do no I/O
-------------------------------------------------
Imports
First
Second
"""

# ---- Imports ----------
# Why.
import os
import json as j
from time import sleep as nap

# ---- First ----------
# Why.
LIMIT = 3
class Low:
    size: High = LIMIT
    def grow(self, other: High, *rest: High) -> High:
        local: High = other
        later = [item for item in rest if item]
        return len(later) + self.size + LIMIT + local
def twice(n=LIMIT):
    def inner():
        return n * LIMIT
    return inner

# ---- Second ----------
# Why.
class High(Low):
    async def run(self):
        try:
            return await twice(LIMIT)
        except OSError as error:
            print(error, j, nap)
'''


def test_a_sound_sample_passes() -> None:
    assert upward_references(SAMPLE) == []
    assert documented(SAMPLE) == (["Imports", "First", "Second"], "Second")
    assert [section.name for section in sections(SAMPLE)] == ["Imports", "First", "Second"]
    assert [impurities(section) for section in pure_sections(SAMPLE)] == [[]]
    assert sections(SAMPLE)[0].defined == {"os", "j", "nap"}
    assert sections(SAMPLE)[1].defined == {"LIMIT", "Low", "twice"}


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("LIMIT = 3", "LIMIT = High", "First: High"),
        ("return n * LIMIT", "return High()", "First: High"),
        ("def twice(n=LIMIT)", "def twice(n=High)", "First: High"),
        ("class Low:", "class Low(High):", "First: High"),
        ("class Low:", "@High\nclass Low:", "First: High"),
        ("len(later)", "len(High.later)", "First: High"),
        ("size: High = LIMIT", "size: High = High.size", "First: High"),
        ("later = [item for item in rest if item]", "later = [High for item in rest]", "First: High"),
        ("later = [item for item in rest if item]", "later = lambda: [High]", "First: High"),
        ("later = [item for item in rest if item]", "later = f'{High}'", "First: High"),
        ("import os", "import os\nprint(LIMIT)", "Imports: LIMIT"),
        ("print(error", "print(erorr", "Second: erorr"),
    ],
)
def test_a_broken_sample_is_found(old: str, new: str, found: str) -> None:
    assert SAMPLE.count(old) == 1
    assert upward_references(SAMPLE.replace(old, new)) == [found]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("return n * LIMIT", "return os.urandom(n)", "os"),
        ("LIMIT = 3", "LIMIT = open('x')", "open"),
        ("len(later)", "print(later)", "print"),
        ("    def grow", "    async def grow", "async"),
        ("def twice(n=LIMIT):", "async def twice(n=LIMIT):\n    await n", "async"),
        ("later = [item for item in rest if item]", "later = [item async for item in rest]", "async"),
    ],
)
def test_an_impure_sample_is_found(old: str, new: str, found: str) -> None:
    assert SAMPLE.count(old) == 1
    broken = SAMPLE.replace(old, new)
    assert [word for section in pure_sections(broken) for word in impurities(section) if word.startswith(found)]


def test_a_docstring_that_is_out_of_date_is_found() -> None:
    stale = SAMPLE.replace("# ---- Second -", "# ---- Third -")
    assert documented(stale)[0] != [section.name for section in sections(stale)]
