"""Files that are written whole or not at all, and how paths and commands are told."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PART = ".part-"  # begins the name of a file that is not whole


@contextlib.contextmanager
def replace_whole(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write; when the block ends well it is forced to disk and renamed onto ``path``.

    When the block fails, the new file is removed and the old one, if any, is as it was. Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of one's own, on other machines too; with its ending, by which libraries choose a format.
    part = path.with_name(f"{PART}{secrets.token_hex(8)}-{path.name}")
    try:
        yield part
        with part.open("r+b") as file:  # Windows forces to disk only what could be written
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk does not say of which file
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)  # also after a rename: that of a second name of the same file does nothing


def write_file(path: Path, data: bytes) -> None:
    """Write all or nothing. Missing folders are made."""
    with replace_whole(path) as part:
        part.write_bytes(data)


def write_json(path: Path, record: Any) -> None:
    """Write a record as JSON for people, all or nothing. Missing folders are made."""
    write_file(path, (json.dumps(record, indent=2) + "\n").encode())


def make_writable(folder: Path, flag: str) -> None:
    """Make a folder if it is not there, and try it, before hours of work whose results it shall keep.

    Raises:
        OSError: it cannot be written; the message names the flag that names another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        in_way = error.errno in (errno.EEXIST, errno.ENOTDIR)
        why = "a file is in the way" if in_way else os.strerror(error.errno or 0)
        raise OSError(f"cannot write to {folder} ({why}); name another place with {flag}") from error


def shorten(path: str | Path) -> Path:
    """The path from the working folder; on another drive of Windows, as it is."""
    try:
        return Path(os.path.relpath(path))
    except ValueError:
        return Path(path)


def tell_command(*arguments: str | Path) -> str:
    """What to type to call digitnet: names with spaces are quoted."""
    typed = [each.as_posix() if isinstance(each, Path) else each for each in arguments]  # "\" would be quoted
    return shlex.join(["python", "-m", "digitnet", *typed])
