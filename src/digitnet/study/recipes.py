"""What ``ablate`` and ``protocol`` share: a recipe, known by all it depends on, and how a seed of it is trained."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from digitnet.checkpoints import choose_resumable, find_run
from digitnet.cli import main
from digitnet.data.sources import NAMES
from digitnet.run_folder import discard_run, read_precision
from digitnet.study.configs import read_config

FIRST_SEED = 42


class Row(NamedTuple):
    """A recipe: a config, with the base beside it, that is a row of a table."""

    path: Path
    name: str
    flags: tuple[str, ...]  # for fit: the base and the config
    digest: str  # SHA-256 of the settings in them, and of the teacher's and the data's files


def load_row(path: Path) -> Row:
    """A row's config, with the base beside it.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: one of them is no YAML, or has no keys.
    """
    base = path.parent / "base.yaml"
    configs = [base, path] if base.is_file() else [path]
    settings = reduce(_merge, map(read_config, configs))
    digest = hashlib.sha256(yaml.safe_dump(settings).encode())  # the keys in order
    for file in _find_inputs(settings):
        digest.update(file.read_bytes())
    flags = tuple(f"--config={config}" for config in configs)
    return Row(path, path.stem.replace("_", " "), flags, digest.hexdigest())


def _find_inputs(settings: Any) -> list[Path]:
    """The files of teacher and data that a config names, if any: with others of the same names it is another recipe."""

    def look_up(*keys: str) -> Any:
        found = settings
        for key in keys:
            if not isinstance(found, dict):
                return None
            places = (found.get("init_args"), found.get("dict_kwargs"), found)  # as a config may have it
            found = next((place[key] for place in places if isinstance(place, dict) and key in place), None)
        return found

    teacher, source = look_up("model", "teacher", "checkpoint"), look_up("data", "source")
    paths = [Path(teacher)] if isinstance(teacher, str) else []
    if isinstance(source, str) and source and source not in NAMES:
        path = Path(source).expanduser()
        paths += sorted(path.glob("*-ubyte*")) if path.is_dir() else [path]
    return [path for path in paths if path.is_file()]


def verify_unchanged(row: Row) -> None:
    """Raise ValueError where a row's config is no longer what it was when the row was loaded."""
    if load_row(row.path).digest != row.digest:
        parts = f"{row.path}, its base.yaml, its teacher or its data"
        raise ValueError(f"{parts} changed meanwhile; type the command again")


def _merge(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}


def parse_shard(shard: str) -> slice:
    """Of "i/n": every n-th item of a list, from the i-th on.

    Raises:
        ValueError: there is no such part.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f'shard is "{shard}"; it must be i/n with i from 1 to n, such as 2/3 for the second of three')
    return slice(int(match[1]) - 1, None, int(match[2]))


def resolve(row: Row) -> dict[str, Any]:
    """Every setting that ``fit`` would train a row with, defaults included.

    Raises:
        ValueError: ``fit`` does not take them.
    """
    shown, complaint, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(complaint):
        try:
            main(["fit", *row.flags, "--print_config"])
        except SystemExit as stop:  # how a parser ends
            code = stop.code
    if code:
        raise ValueError(f"{row.path}: {complaint.getvalue().strip().removeprefix('digitnet: error: ')}")
    settings: dict[str, Any] = yaml.safe_load(shown.getvalue())
    return settings


def fit_or_go_on(flags: list[str], seed: int, run: Path) -> None:
    """Call ``fit`` with these flags and a run's seed and folder, or go on with the run where it has a checkpoint.

    In the precision that it began in; anew where its checkpoints are damaged. Without a detector of non-digits, which
    is no part of the figures, and minutes of work.
    """
    last = run / "checkpoints" / "last.ckpt"
    if last.is_file() and find_run(last):
        try:
            choose_resumable(last)
        except ValueError as error:
            cause: BaseException | None = error
            while cause:
                if isinstance(cause, (OSError, MemoryError)):  # it may be sound, and only not to be read now
                    raise
                cause = cause.__cause__
            print(f"{error.args[0].partition('; start anew')[0]}; it is trained anew", flush=True)
        else:
            again = ["fit", f"--ckpt_path={last}"]
            if not read_config(run / "config.yaml")["trainer"].get("plugins"):  # which may be a precision's
                again.append(f"--trainer.precision={read_precision(run)}")
            main(again)
            return
    discard_run(run)  # stopped in its first epoch
    place = {"save_dir": str(run.parent.parent), "name": run.parent.name, "version": run.name}
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {**place, "default_hp_metric": False},
    }
    ours = [f"--seed_everything={seed}", f"--trainer.logger={json.dumps(logger)}"]
    main(["fit", *flags, *ours, "--trainer.devices=1", "--calibration.num_digits=0"])


def measure_seconds(run: Path) -> float:
    """From the start of training to the end of its last epoch, with validation; sittings of a stopped run added up.

    By the clock of the TensorBoard events, of which each sitting writes a file.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    sittings = [[event.wall_time for event in EventFileLoader(str(path)).Load()] for path in run.glob("events.*")]
    return float(sum(max(times) - min(times) for times in sittings if times))
