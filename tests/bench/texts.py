"""What compresses: an API's answer, a page and a script, as the origin serves them without compressing anything.

The JSON is made up, with the identifiers, times, numbers and sentences that make real answers compress worse than
repeated ones. The page is what pydoc writes about the standard library. The script is JavaScript that is installed.
"""

from __future__ import annotations

import datetime
import importlib
import inspect
import json
import pydoc
import random
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

MODULES = (
    *("argparse", "asyncio", "collections", "datetime", "email.message", "http.client", "inspect", "json", "logging"),
    *("pathlib", "pickle", "random", "re", "shutil", "socket", "ssl", "statistics", "string", "subprocess"),
    *("tarfile", "tempfile", "threading", "typing", "unittest", "urllib.parse", "zipfile"),
)


def api_answer(size: int) -> bytes:
    """A JSON list of records, of about so many bytes."""
    chance = random.Random(1)
    sources = "\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)
    lines = re.findall(r"^ *(?:# )?([A-Z][A-Za-z ,.'()-]{40,})$", sources, re.M)
    words = sorted({word for line in lines for word in line.split() if word.isalpha()})
    records: list[bytes] = []
    total = 0
    while total < size:
        record = json.dumps(_record(chance, words, lines, len(records))).encode()
        records.append(record)
        total += len(record) + 2
    return b'{"data": [' + b", ".join(records) + b"]}"


def _record(chance: random.Random, words: list[str], lines: list[str], number: int) -> dict[str, object]:
    made = datetime.datetime(2024, 1, 1) + datetime.timedelta(seconds=chance.randrange(30_000_000))
    first, last = chance.choice(words).lower(), chance.choice(words).lower()
    return {
        "id": number,
        "uuid": str(uuid.UUID(int=chance.getrandbits(128), version=4)),
        "created_at": made.isoformat() + "Z",
        "updated_at": None if chance.random() < 0.3 else made.replace(hour=chance.randrange(24)).isoformat() + "Z",
        "status": chance.choice(["active", "active", "active", "pending", "closed"]),
        "customer": {
            "name": f"{first.title()} {last.title()}",
            "email": f"{first}.{last}@example.com",
            "verified": chance.random() < 0.8,
        },
        "amount": {"value": round(chance.uniform(1, 5000), 2), "currency": chance.choice(["EUR", "USD", "GBP"])},
        "location": {"lat": round(chance.uniform(-90, 90), 6), "lon": round(chance.uniform(-180, 180), 6)},
        "tags": chance.sample(words, chance.randrange(5)),
        "description": " ".join(chance.choices(lines, k=chance.randrange(1, 4))),
        "links": {
            "self": f"https://api.example.com/v2/orders/{number}",
            "items": f"https://api.example.com/v2/orders/{number}/items",
            "customer": f"https://api.example.com/v2/customers/{chance.randrange(5000)}",
        },
    }


def page(size: int) -> bytes:
    """HTML of at most so many bytes."""
    made = (pydoc.HTMLDoc().page(name, pydoc.HTMLDoc().document(importlib.import_module(name))) for name in MODULES)
    return _joined((text.encode() for text in made), size)


def script(size: int) -> bytes:
    """JavaScript of at most so many bytes; nothing where none is installed."""
    places = [Path("/usr/share/javascript"), Path("/usr/share/nodejs"), Path(sys.prefix) / "lib"]
    found = sorted(path for place in places for path in place.rglob("*.js"))
    return _joined((path.read_bytes() for path in found if path.is_file()), size)


def _joined(parts: Iterator[bytes], size: int) -> bytes:
    data = bytearray()
    for part in parts:
        data += part
        if len(data) >= size:
            break
    return bytes(data[:size])
