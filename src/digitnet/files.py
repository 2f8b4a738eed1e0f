"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_whole(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write; when the block ends well it is forced to disk and renamed onto ``path``.

    When the block fails, the new file is removed and the old one, if any, is as it was. Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # also after a rename: that of a second name of the same file does nothing
