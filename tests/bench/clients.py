"""Many idle pytunnel clients in one process, each with a session, a link and a tunnel of its own.

    PYTUNNEL_TOKEN=… python tests/bench/clients.py DIRECTORY URL COUNT

DIRECTORY holds the pytunnel.py that is measured. A line on stdout tells that all of them are connected.
"""

from __future__ import annotations

import asyncio
import os
import sys

sys.path.insert(0, sys.argv[1])

import pytunnel

AT_ONCE = 16  # handshakes; a server lets one address have twice as many


async def main(url: str, count: int) -> None:
    """Connect them all, and stay."""
    limit = asyncio.Semaphore(AT_ONCE)
    target = pytunnel.Target.parse("3000")

    async def connect(number: int) -> asyncio.Task[None]:
        ready = asyncio.Event()

        def on_event(event: str, **_: object) -> None:
            if event == "ready":
                ready.set()

        tunnels = [pytunnel.Tunnel(f"idle-{number}", target)]
        async with limit:
            client = pytunnel.TunnelClient(url, os.environ["PYTUNNEL_TOKEN"], tunnels, on_event=on_event)
            running = asyncio.create_task(client.run())
            waiting = asyncio.create_task(ready.wait())
            await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
        return running

    running = await asyncio.gather(*(connect(number) for number in range(count)))
    print("connected", flush=True)
    await asyncio.gather(*running)


asyncio.run(main(sys.argv[2], int(sys.argv[3])))
