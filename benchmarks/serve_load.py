"""``digitnet serve`` under load on this machine, and under abuse.

    python benchmarks/serve_load.py --output results/serve.json

First 50 clients, each on a connection of its own, send pictures for a minute, one after another as answers come. Then
1,000 requests that no honest client would send: random bytes, broken pictures and forms, giant sizes, wrong types,
senders who stop half-way or send a byte now and then. Each must be answered 4xx or have its connection closed, and
afterwards the server must answer as before. Clients and server share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import io
import json
import random
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from digitnet.data import load_bundled_digits
from digitnet.files import write_json
from digitnet.machine import describe_hardware

SECONDS_LIMIT = 60.0  # a conversation that lasts longer is neither answered nor closed
SLOW_EVERY = 25  # one bad request in so many is a slow sender, who takes as long as the server lets him


def make_pictures(count: int) -> list[bytes]:
    """Digits as PNG files of 112x112, dark ink on white."""
    images, _ = load_bundled_digits()
    pictures = []
    for image in images[:count]:
        buffer = io.BytesIO()
        Image.fromarray(255 - image).resize((112, 112), Image.Resampling.BICUBIC).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    return pictures


def make_request(body: bytes, kind: str = "image/png", method: str = "POST", path: str = "/predict") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def read_response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body; raises IncompleteReadError when the connection is closed."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = re.search(r"\r\ncontent-length: *(\d+)", head)
    return int(head.split()[1]), await reader.readexactly(int(length[1]) if length else 0)


# --- load -------------------------------------------------------------------------------------------------------------


async def run_client(port: int, pictures: list[bytes], end: float, seed: int, latencies: list[float]) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    draw = random.Random(seed)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < end:
        start = time.perf_counter()
        writer.write(make_request(draw.choice(pictures)))
        status, _ = await read_response(reader)
        latencies.append(time.perf_counter() - start)
        outcomes[str(status)] += 1
    writer.close()
    return outcomes


async def measure_load(port: int, clients: int, seconds: float) -> dict[str, Any]:
    pictures, latencies = make_pictures(200), list[float]()
    await run_client(port, pictures, time.perf_counter() + min(2, seconds), 0, [])  # warm up
    start = time.perf_counter()
    jobs = (run_client(port, pictures, start + seconds, seed, latencies) for seed in range(clients))
    results = await asyncio.gather(*jobs, return_exceptions=True)
    elapsed = time.perf_counter() - start
    outcomes = sum((result for result in results if isinstance(result, Counter)), Counter[str]())
    outcomes.update(type(result).__name__ for result in results if isinstance(result, BaseException))
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return {
        "clients": clients,
        "seconds": round(elapsed, 1),
        "requests": len(latencies),
        "errors": sum(count for outcome, count in outcomes.items() if outcome != "200"),
        "outcomes": dict(outcomes),
        "requests_per_s": round(len(latencies) / elapsed, 1),
        "latency_ms": {"p50": round(p50, 1), "p99": round(p99, 1), "max": round(max(latencies) * 1000, 1)},
    }


# --- abuse ------------------------------------------------------------------------------------------------------------

Pieces = list[bytes]  # sent a second apart


def make_abuse(picture: bytes) -> list[tuple[str, Callable[[random.Random], Pieces]]]:
    """Kinds of bad requests: a name, and what is sent."""
    form = "multipart/form-data; boundary=x"
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    bomb = io.BytesIO()
    Image.new("1", (16_000, 16_000)).save(bomb, "PNG")

    def damage(r: random.Random) -> bytes:
        cut = r.randrange(60, len(picture) - 60)
        return picture[:cut] + r.randbytes(40) + picture[cut + 40 :]

    def pixels(value: object) -> bytes:
        return json.dumps({"pixels": [[value] * 28] * 28}).encode()

    return [
        ("random bytes", lambda r: [r.randbytes(r.randrange(1, 5000)) + b"\r\n\r\n"]),
        ("random picture", lambda r: [make_request(r.randbytes(r.randrange(1, 50_000)))]),
        ("truncated picture", lambda r: [make_request(picture[: r.randrange(1, len(picture) // 2)])]),
        ("damaged picture", lambda r: [make_request(damage(r)[: len(picture) // 2])]),
        ("empty body", lambda r: [make_request(b"")]),
        ("too many bytes", lambda r: [make_request(bytes(11 * 2**20))]),
        ("too many pixels", lambda r: [make_request(bomb.getvalue())]),
        ("giant length", lambda r: [head + b"Content-Length: %d\r\n\r\n" % r.randrange(10**9, 10**18) + bytes(1000)]),
        ("negative length", lambda r: [head + b"Content-Length: -5\r\n\r\nhello"]),
        ("giant head", lambda r: [head + b"A: " + b"b" * 200_000]),
        ("wrong type", lambda r: [make_request(picture, r.choice(["text/html", "video/mp4", "x", "a/b;c=" * 50]))]),
        ("broken form", lambda r: [make_request(r.randbytes(500), r.choice([form, "multipart/form-data"]))]),
        ("form without a picture", lambda r: [make_request(part + r.randbytes(99) + b"\r\n--x--\r\n", form)]),
        ("broken JSON", lambda r: [make_request(r.choice([b"{", b"\xff", b"[" * 60_000]), "application/json")]),
        ("wrong values", lambda r: [make_request(pixels(r.choice([256, -1, "a", None, 0.5])), "application/json")]),
        ("wrong place", lambda r: [make_request(picture, path=f"/{r.randrange(10**9)}")]),
        ("wrong method", lambda r: [make_request(b"", method=r.choice(["PUT", "DELETE", "PATCH", "BREW"]))]),
    ]  # fmt: skip


def make_slow(r: random.Random) -> tuple[str, Pieces]:
    """A sender who keeps the server waiting."""
    return r.choice(
        [
            ("silent", []),
            ("slow head", [b"POST /predict HTTP/1.1\r\n", *[b"A: b\r\n"] * 50]),
            ("slow body", [make_request(bytes(1000))[:-900], *[b"x"] * 50]),
            ("half a body", [make_request(bytes(1000))[:-900]]),
        ]
    )


async def converse(port: int, pieces: Pieces) -> str:
    """What came of it: a status, "closed", or "hangs"."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def send() -> None:
        with suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if len(pieces) > 1:
                    await asyncio.sleep(1)

    sending = asyncio.create_task(send())
    try:
        async with asyncio.timeout(SECONDS_LIMIT):
            status, _ = await read_response(reader)
        return str(status)
    except TimeoutError:
        return "hangs"
    except (ConnectionError, asyncio.IncompleteReadError):
        return "closed"
    finally:
        sending.cancel()
        writer.close()


async def measure_abuse(port: int, requests: int) -> dict[str, Any]:
    draw, picture = random.Random(0), make_pictures(1)[0]
    kinds = make_abuse(picture)
    at_once = asyncio.Semaphore(100)
    outcomes: dict[str, Counter[str]] = {}

    async def send_one(number: int) -> None:
        name, make = kinds[number % len(kinds)]
        pieces = make(draw) if number % SLOW_EVERY else None
        if pieces is None:
            name, pieces = make_slow(draw)
        async with at_once:
            outcomes.setdefault(name, Counter())[await converse(port, pieces)] += 1

    await asyncio.gather(*map(send_one, range(requests)))
    total = sum(outcomes.values(), Counter[str]())
    return {
        "requests": requests,
        "neither_4xx_nor_closed": sum(n for outcome, n in total.items() if outcome[0] != "4" and outcome != "closed"),
        "outcomes": dict(sorted(total.items())),
        "each_kind": {name: dict(sorted(counts.items())) for name, counts in sorted(outcomes.items())},
    }


# --- the server -------------------------------------------------------------------------------------------------------


@contextmanager
def running_server(flags: list[str]) -> Iterator[tuple[int, int]]:
    """A server in a process of its own; its port and process id."""
    command = [sys.executable, "-m", "digitnet", "serve", "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        match = re.search(r":(\d+)/", process.stdout.readline())
        if not match:
            sys.exit("the server did not start; its message is above")
        try:
            yield int(match[1]), process.pid
        finally:
            process.terminate()
    if process.returncode:
        sys.exit(f"the server ended with exit code {process.returncode}")


def measure_rss(pid: int) -> float:
    """Memory of a process in MiB."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return round(int(match[1]) / 1024, 1)


async def ask_once(port: int) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(make_request(make_pictures(1)[0]))
    status, body = await read_response(reader)
    writer.close()
    return json.loads(body) if status == 200 else status


async def measure(args: argparse.Namespace, port: int, pid: int) -> dict[str, Any]:
    before, rss = await ask_once(port), {"started": measure_rss(pid)}
    load = await measure_load(port, args.clients, args.seconds)
    rss["after_load"] = measure_rss(pid)
    abuse = await measure_abuse(port, args.bad_requests)
    rss["after_abuse"] = measure_rss(pid)
    again = await measure_abuse(port, args.bad_requests)
    rss["after_abuse_again"] = measure_rss(pid)
    return {
        "load": load,
        "abuse": abuse,
        "abuse_again": again["outcomes"],
        "server_rss_mib": rss,
        "same_answer_afterwards": await ask_once(port) == before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50, help="clients at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="how long they send (default: %(default)s)")
    parser.add_argument("--bad-requests", type=int, default=1000, help="each of two times (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the result here, too")
    parser.add_argument("serve", nargs="*", help="flags of digitnet serve, after --, such as --ckpt_path")
    args = parser.parse_args()
    with running_server(args.serve) as (port, pid):
        result = asyncio.run(measure(args, port, pid))
    options = f"--clients {args.clients} --seconds {args.seconds:g} --bad-requests {args.bad_requests}"
    if args.serve:
        options += f" -- {shlex.join(args.serve)}"
    report = {
        "command": f"python benchmarks/serve_load.py {options}",
        "date": datetime.date.today().isoformat(),
        "hardware": describe_hardware(),
        "versions": {name: version(name) for name in ("torch", "fastapi", "uvicorn", "numpy", "pillow")},
        **result,
    }
    print(json.dumps(report, indent=1))
    if args.output:
        write_json(args.output, report)


if __name__ == "__main__":
    main()
