"""One clear line for every mistake: what was wrong, with its value, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# What jsonargparse adds to the one line that matters: its bookkeeping of unions, and echoes of whole objects.
_NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:$|Given value type|Given value: (Namespace|NestedArg|.{80})|tip: "
    r"|Expected a <class 'NoneType'>"
)


def say_why(error: BaseException) -> str:
    """An error's message in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def to_one_line(message: str) -> str:
    """The lines of a message that say something, joined into one."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    denied = re.search(r"Importing '([\w.]+)' is not allowed", message)
    if denied:
        return (
            f"a config may not name {denied[1]}, but classes that digitnet trains with, of lightning, torch.nn, "
            "torch.optim, torchmetrics and torchvision.transforms; allow more by package, if you trust it: "
            f"DIGITNET_ALLOW_IMPORTS={denied[1].partition('.')[0]}"
        )
    line = " ".join(line for line in lines if line and not _NOISE.match(line)) or " ".join(message.split())
    return re.sub(r"(?:a )?<class '(?:\w+\.)*(\w+)'>", r"\1", line)


def nearest_name(wrong: str, names: Iterable[str]) -> str:
    """``"; did you mean NAME?"`` for the name most like ``wrong``, or an empty string."""
    near = difflib.get_close_matches(wrong, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""
