"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PART = ".part-"  # begins the name of a file that is not whole


@contextlib.contextmanager
def replace_whole(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write; when the block ends well it is forced to disk and renamed onto ``path``.

    When the block fails, the new file is removed and the old one, if any, is as it was. Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{PART}{os.getpid()}-{path.name}")  # with its ending, by which libraries choose a format
    try:
        yield part
        with part.open("r+b") as file:  # Windows forces to disk only what could be written
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # also after a rename: that of a second name of the same file does nothing


def shorten(path: str | Path) -> Path:
    """The path from the working folder; on another drive of Windows, as it is."""
    try:
        return Path(os.path.relpath(path))
    except ValueError:
        return Path(path)
