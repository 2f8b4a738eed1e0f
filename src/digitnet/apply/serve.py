"""Serve a trained model: a page to draw a digit on, and the JSON API behind it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from digitnet.cores import count_cores

if TYPE_CHECKING:
    from uvicorn import Config

STOP_SECONDS = 10  # what is under way when the server is stopped may take as long
MAX_CONNECTIONS = 512  # one more is answered 503


def serve(
    ckpt_path: Path | None = None, host: str = "127.0.0.1", port: int = 8000, workers: int = 1, browser: bool = True
) -> None:
    """Draw a digit in the browser and see it read; POST /predict answers programs in JSON.

    Ctrl-C or SIGTERM stops the server when what is under way is answered.

    Args:
        ckpt_path: the checkpoint that reads; by default the one that the variable ``DIGITNET_CKPT_PATH`` names, or else
            the newest run's best.
        host: address to listen on. The default is for this machine alone; 0.0.0.0 lets the whole network in.
        port: port to listen on; 0 takes a free one.
        workers: processes that share the port, each with a network of its own.
        browser: open the page in a browser, where there is a screen to show it on.

    Raises:
        ValueError: the checkpoint cannot be used, a number is out of range, or the server's packages are missing.
        OSError: the address cannot be had.
    """
    missing = [name for name in ("fastapi", "uvicorn", "python_multipart") if find_spec(name) is None]
    if missing:
        raise ValueError(f'serve needs {", ".join(missing)}; pip install -e ".[serve]"')
    if not 1 <= workers <= 64:
        raise ValueError(f"workers is {workers}; it is a number of processes, from 1 to 64")
    from digitnet.apply.api import create_app
    from digitnet.apply.predictor import Predictor
    from digitnet.checkpoints import find_newest

    with listen(host, port) as listener:
        named = os.environ.get("DIGITNET_CKPT_PATH")
        path = ckpt_path or Path(named or find_newest("best.ckpt"))
        if named and not ckpt_path and not path.is_file():
            raise FileNotFoundError(f"DIGITNET_CKPT_PATH is {named}, and there is no such file; unset it or change it")
        predictor = Predictor.load(path)  # also for several workers: what is wrong with it is said once
        os.environ["DIGITNET_CKPT_PATH"] = str(path.resolve())  # also for those that replace a dead one, later
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
        print(f"serve: {url} (Ctrl-C stops)", flush=True)
        if browser and sys.stdout.isatty() and has_screen():
            webbrowser.open(url)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(
                number, lambda *_: None
            )  # the server's own come on top, and raise the signal again at the end
        if workers == 1:
            run_server(create_app(predictor), listener)
        else:
            run_workers(listener, workers)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address, before anything slow is done.

    Raises:
        ValueError: the port is out of range.
        OSError: the address cannot be had; the message says which, and what to do.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; it must lie in 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
        reason = error.strerror if isinstance(error, OSError) else "no name of a machine is like this"
        raise OSError(f"cannot listen on {host}, port {port}: {reason}; give another --port or --host") from error


def has_screen() -> bool:
    """Whether a browser with windows can open here."""
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def run_server(app: Any, listener: socket.socket) -> None:
    """Answer in this process until a signal comes."""
    import uvicorn

    uvicorn.Server(configure(app)).run([listener])


def run_workers(listener: socket.socket, workers: int) -> None:
    """Answer in several processes that share one socket, until a signal comes; one that dies is replaced."""
    from uvicorn.supervisors import Multiprocess

    # Of each; more would fight for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // workers)))
    Multiprocess(configure("digitnet.apply.api:create_app", factory=True, workers=workers), [listener]).run()


def configure(app: Any, **settings: Any) -> Config:
    """uvicorn's settings: what a client may not do, and how long what is under way may take at the end."""
    from uvicorn import Config

    return Config(
        app,
        http="digitnet.apply.connections:TimedConnection",
        ws="none",
        log_level="error",  # a client's mistake is told to the client
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=STOP_SECONDS,
        **settings,
    )
