"""The seeds of the fuzz targets, and what they have found so far; `python tests/fuzz.py TARGET` looks for more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz import TARGETS, loop

FOUND: dict[str, list[bytes]] = {"frames": [], "response": [], "handshake": []}  # inputs that broke the promise once


@pytest.fixture(scope="module", autouse=True)
def event_loop_of_all_inputs() -> Iterator[None]:
    """One loop serves them all, here as in the fuzzer."""
    loop()
    yield
    loop().close()
    loop.cache_clear()


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_known_parses_or_raises_the_protocols_own_error(target: str) -> None:
    run, seeds = TARGETS[target]
    inputs = [*seeds(), *FOUND[target]]
    assert len(inputs) > 10
    for data in (b"", *inputs):
        for cut in (0, 1, len(data) // 2):
            run(data[: len(data) - cut])
