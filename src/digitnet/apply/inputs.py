"""What was named on the command line -> digits as MNIST would hold them, picture by picture."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from glob import has_magic
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from digitnet.apply.imaging import Digit28, normalize
from digitnet.apply.ink import Invert
from digitnet.apply.opening import open_picture
from digitnet.apply.splitting import split_digits
from digitnet.cores import count_cores
from digitnet.errors import say_why

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
UNREAD = {".heic", ".heif", ".avif", ".jxl"}  # pictures, too; that they are not read is told
FILES_PER_WORKER = 64  # at least; with fewer, starting a process costs more than it saves
MAX_WORKERS = 16  # by then the network is slower
CHUNK = 8  # files that a worker is given at once


class Source(NamedTuple):
    """A picture to read: its name for people, and its path or content; or what is wrong with it."""

    name: str
    picture: Path | bytes | None
    message: str = ""


def find_pictures(files: Iterable[str]) -> Iterator[Source]:
    """What was named, file by file; in folders, what has the ending of a picture and is not hidden, sorted."""
    has_read = False
    for name in files:
        if not name:
            yield Source(name, None, "an empty name")
        elif name == "-" and (has_read or sys.stdin is None):
            yield Source(name, None, "was read already" if has_read else "standard input is closed; give a file")
        elif name == "-":
            yield Source(name, sys.stdin.buffer.read())
            has_read = True
        else:
            try:
                yield from find_named(name)
            except (OSError, ValueError) as error:  # a name too long, a folder that is closed to us, a pattern "a**"
                yield Source(name, None, (isinstance(error, OSError) and error.strerror) or str(error))


def find_named(name: str) -> list[Source]:
    """The pictures that a file's, folder's or pattern's name stands for.

    Raises:
        OSError: it cannot be looked up.
        ValueError: it is no pattern.
    """
    path = Path(name)
    if path.is_dir():
        nothing = Source(name, None, f"a folder without pictures ({', '.join(sorted(SUFFIXES))})")
        return find_in_folder(path) or [nothing]
    if not has_magic(name) or path.exists():
        return [Source(name, path)]
    anchor = Path(path.anchor)
    typed = {*path.parts}
    found: dict[str, Source] = {}  # by name: a pattern may match a folder and what is in it
    nothing = Source(name, None, "no file is named like this")
    for one in sorted(anchor.glob(str(path.relative_to(anchor)))):
        if not any(part.startswith(".") for part in {*one.parts} - typed):
            sources = find_in_folder(one) if one.is_dir() else [Source(str(one), one)] if one.is_file() else []
            found |= {source.name: source for source in sources}
            nothing = Source(name, None, "no pictures in what is named like this")
    return [found[key] for key in sorted(found, key=Path)] or [nothing]


def find_in_folder(folder: Path) -> list[Source]:
    """What has the ending of a picture in a folder and the folders in it, sorted, and what of these is closed to us.

    Hidden ones are left out: unfinished files, thumbnails, what macOS writes beside each picture on other systems'
    disks. Links to folders are not followed.
    """
    closed: list[OSError] = []
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=closed.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(parent, name) for name in names if not name.startswith("."))
        found += (file for file in files if file.suffix.lower() in SUFFIXES | UNREAD and _is_file(file))
    sources = [Source(str(file), file) for file in found]
    sources += [Source(str(error.filename), None, error.strerror or str(error)) for error in closed]
    return sorted(sources, key=lambda source: Path(source.name))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # reading it will say why
        return True


def prepare(source: Source, invert: Invert, split: bool) -> list[Digit28] | str:
    """The digits in a picture as MNIST would hold them, or what is wrong with the picture, in one line."""
    if source.picture is None:
        return source.message
    try:
        picture = open_picture(source.picture)
        if split:
            return split_digits(picture, invert)
        digit = normalize(picture, invert)
        return [digit] if digit else []
    except (ValueError, OSError, MemoryError) as error:
        return say_why(error)


@contextmanager
def prepare_all(sources: list[Source], invert: Invert, split: bool) -> Iterator[Iterator[list[Digit28] | str]]:
    """Start to prepare pictures in the background; ``prepare``'s results, in order.

    A small picture is many short steps of Python, which threads cannot share, so many files are read by processes. They
    import this module and not torch, and are at work while the caller still loads it.

    Raises:
        OSError: one of the processes was killed.
    """
    workers = min(count_cores(), MAX_WORKERS, len(sources) // FILES_PER_WORKER)
    pool: Executor
    if workers > 1:
        spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's threads without what they hold
        pool = ProcessPoolExecutor(workers, spawn, initializer=leave_with_parent)
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's, of each worker: more would fight for the cores
    else:
        pool = ThreadPoolExecutor(count_cores())
    try:
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers keep that: Ctrl-C is for the parent
        try:
            prepared = pool.map(partial(prepare, invert=invert, split=split), sources, chunksize=CHUNK)
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
        yield prepared
    except BrokenProcessPool as error:
        raise OSError(
            "a process that reads pictures was killed, as happens when memory runs out; free some, or give fewer than "
            f"{2 * FILES_PER_WORKER} files at once, which are read in one process"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def leave_with_parent() -> None:
    """End this worker when its parent is gone, however that ended; else it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
