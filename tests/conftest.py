"""What all tests share: Hypothesis' profiles, and the check that a test leaves nothing behind in this process.

A test fails when one of its tasks or descriptors is still there 2 seconds after its end, and when something was
never closed, awaited or retrieved: those reports come from destructors, so the garbage is collected while it is
still known whose it is. asyncio's debug mode (see pyproject.toml) adds where a task or coroutine was made.
"""

import asyncio
import collections
import contextlib
import gc
import inspect
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from hypothesis import settings
from support import REST, WaitFailed, eventually

# No deadline: a shared runner pauses as it likes. CI tries the same examples each time, so that a failure comes from
# the change; all other runs look for new ones.
settings.register_profile("new", deadline=None, derandomize=False, max_examples=150, print_blob=True)
settings.register_profile("ci", settings.get_profile("new"), derandomize=True)
settings.register_profile("thorough", settings.get_profile("new"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "new"))


class Complaints(logging.Handler):
    """What event loops report because nobody else could: exceptions in callbacks, results never retrieved, …"""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)  # a slow callback is a warning: the machine may be busy
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Error on transport creation for incoming connection"):
            return  # a client of a TLS server here has left in the handshake: it has no other word for "no"
        self.texts.append(logging.Formatter().format(record))


complaints = Complaints()


def pytest_configure() -> None:
    logging.getLogger("asyncio").addHandler(complaints)


def pytest_collection_finish() -> None:
    """Leave what is there for good, some 100,000 objects, out of the collection after each test."""
    gc.collect()
    gc.freeze()


def descriptors() -> collections.Counter[str]:
    """What this process has open: files by name, sockets and pipes by number, epolls and the like by kind."""
    found: collections.Counter[str] = collections.Counter()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists
            found[os.readlink(f"/proc/self/fd/{number}")] += 1
    return found


class Rest:
    """What was there before a test, against what is there after it."""

    def __init__(self) -> None:
        self._tasks = self._now()
        self._descriptors = descriptors()

    def begin(self) -> None:
        """The test is over. What it dropped reports itself now, and goes to the test by pytest's own hooks."""
        gc.collect()

    def excess(self) -> list[str]:
        """What is there and was not before. It is asked for again and again: a descriptor sends no event."""
        return [*map(repr, self._now() - self._tasks), *(descriptors() - self._descriptors).elements()]

    def check(self) -> None:
        excess, texts = self.excess(), complaints.texts[:]
        complaints.texts.clear()
        assert not excess, f"still there {REST:g} s after the test: " + ", ".join(excess)
        assert not texts, "the event loop reported:\n" + "\n".join(texts)

    @staticmethod
    def _now() -> set[asyncio.Task[object]]:
        try:
            return asyncio.all_tasks() - {asyncio.current_task()}
        except RuntimeError:
            return set()  # a test without a loop


async def wait_for_rest(rest: Rest) -> None:
    rest.begin()
    with contextlib.suppress(WaitFailed):
        await eventually(lambda: not rest.excess(), REST)
    rest.check()


# The test's own loop has to go on while its connections close, hence a fixture for each loop that there is.
@pytest_asyncio.fixture(loop_scope="function")
async def rest_on_function_loop() -> AsyncIterator[None]:
    rest = Rest()
    yield
    await wait_for_rest(rest)


@pytest_asyncio.fixture(loop_scope="module")
async def rest_on_module_loop() -> AsyncIterator[None]:
    rest = Rest()
    yield
    await wait_for_rest(rest)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """The first fixture of a test and so the last to end; those of its module are there before, and stay."""
    complaints.texts.clear()
    marker = request.node.get_closest_marker("asyncio")
    if marker is not None and inspect.iscoroutinefunction(request.function):
        request.getfixturevalue(f"rest_on_{marker.kwargs.get('loop_scope', 'function')}_loop")
        yield
        return
    rest = Rest()
    yield
    rest.begin()
    deadline = time.monotonic() + REST
    while rest.excess() and time.monotonic() < deadline:
        time.sleep(0.01)
    rest.check()
