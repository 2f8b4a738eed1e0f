"""Which choice helps: folders of configs, each trained with several seeds, in tables beside published figures.

A folder is a table, each config in it a row named like its file, with spaces for underscores. Two files are no rows,
and either may be missing:

- ``base.yaml`` holds what the rows share: a row is ``fit --config base.yaml --config row.yaml``;
- ``writeup.csv`` holds the figures to stand beside: columns row, train_acc, val_acc (in [0, 1]) and run_time_s, in the
  order that the table shall have. Cells and columns may be left out.

A finished run leaves a ``result.json``, known by the SHA-256 of its row's settings, and of its teacher's and its data's
files if it has such, and by its seed. So a changed config is trained anew, and one that stands in two tables is trained
once.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from digitnet.checkpoints import verify_checkpoint
from digitnet.errors import nearest_name, to_one_line
from digitnet.files import make_writable, tell_command, write_file, write_json
from digitnet.machine import describe_environment
from digitnet.run_folder import read_precision
from digitnet.study.history import load_history
from digitnet.study.recipes import (
    FIRST_SEED,
    Row,
    fit_or_go_on,
    load_row,
    measure_seconds,
    parse_shard,
    resolve,
    verify_unchanged,
)

MEASURES = {  # key: (what a table calls it, whether more is better)
    "train_acc": ("Training accuracy", True),
    "val_acc": ("Validation accuracy", True),
    "run_time_s": ("Run time", False),
}
Result = dict[str, Any]  # what a result.json holds


class Table(NamedTuple):
    """A folder of configs."""

    folder: Path
    name: str
    rows: list[Row]
    published: pd.DataFrame  # rows by measures, NaN where nothing was published


def ablate(folder: Path, seeds: int = 1, shard: str = "1/1", output: Path = Path("lightning_logs/ablations")) -> None:
    """Train each config of a folder with several seeds; write tables of accuracy and run time, CSV and Markdown.

    Each subfolder with configs is a table, or the folder itself: base.yaml holds what the rows share, every other .yaml
    what its row changes, writeup.csv (if any) published figures to stand beside. Stop it when you like: the same
    command goes on from there, and trains nothing twice. A finished run keeps its TensorBoard events, not its
    checkpoints.

    Args:
        folder: the configs, such as configs/ablations, or one table of them.
        seeds: how many seeds each row is trained with: 42, 43, and so on. 0 only writes the tables.
        shard: i/n trains the i-th of n parts, for n machines; their output folders, copied into one, make one table.
        output: where the runs, their results and the tables are kept.

    Raises:
        ValueError: an argument, a config or a result cannot be used, or a run failed; finished runs are kept.
        OSError: there is no such folder, no config in it, or no finished run to show; or the data cannot be had.
    """
    tables = load_tables(folder)
    jobs = pick_jobs(tables, seeds, shard)
    results = load_results(output)
    finished = find_finished(results)
    pending = [(row, seed) for row, seed in jobs if (row.digest, seed) not in finished]
    # All of them before the first is trained: a typo should not wait for hours.
    epochs = {row: count_epochs(row) for row in dict(pending)}
    if pending:
        make_writable(output, "--output")
    if jobs:
        print(f"{len(jobs)} runs, {len(jobs) - len(pending)} of them finished before", flush=True)
    failures: list[str] = []
    done_s, done_epochs = 0.0, 0  # by this call
    for i, (row, seed) in enumerate(pending):
        left_s = sum(epochs[row] for row, _ in pending[i:]) * done_s / max(done_epochs, 1)
        is_known = done_epochs and min(epochs[row] for row, _ in pending[i:]) > 0  # -1: until it stops by itself
        left = f", about {left_s / 60:.0f} min left" if is_known else ""
        name = f"{row.path.parent.name}/{row.name}, seed {seed}"
        if (row.digest, seed) in find_finished(load_results(output)):  # by another part, or the same command twice
            continue
        print(f"[{i + 1}/{len(pending)}] {name}{left}", flush=True)
        try:
            result = train(row, seed, output)
        except (KeyboardInterrupt, SystemExit):  # the latter is how fit ends after Ctrl-C
            print("ablation stopped; the same command goes on from here", flush=True)
            raise
        except OSError:  # the data or the disk: the other rows would fare no better
            raise
        except Exception as error:  # whatever is wrong with one row, the others can do without it
            failures.append(f"{name}: {to_one_line(str(error))}")
            print(f"failed: {failures[-1]}", flush=True)
            continue
        done_s, done_epochs = done_s + result["run_time_s"], done_epochs + result["epochs"]
        write_tables(tables, load_results(output), output)  # other parts may be at work in the same folder
    if failures:
        raise ValueError(f"{len(failures)} of {len(pending)} runs failed, the others are kept: {'; '.join(failures)}")
    written = write_tables(tables, load_results(output), output)
    if not written:
        remedy = f"train them: {tell_command('ablate', folder)}"
        raise FileNotFoundError(f"no row of {folder} has finished under {output} yet; {remedy}")
    print("\n".join(written))


# --- what is to be trained --------------------------------------------------------------------------------------------


def load_tables(folder: Path) -> list[Table]:
    """The tables of a folder of configs, each in the order of its ``writeup.csv``, then by name.

    Raises:
        FileNotFoundError: no such folder, or no config in it.
        ValueError: a file in it is damaged, or a published row has no config.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give one with configs of fit, such as configs/ablations")
    tables: list[Table] = []
    for parent in (folder, *sorted(folder.glob("*/"))):
        rows: dict[str, Row] = {}
        for row in map(load_row, sorted(parent.glob("*.yaml"))):
            if row.name in rows:
                raise ValueError(f"{rows[row.name].path} and {row.path} are both the row {row.name!r}; rename one")
            if row.name != "base":
                rows[row.name] = row
        if not rows:
            continue
        published = load_writeup(parent / "writeup.csv", list(rows))
        ordered = [rows[name] for name in dict.fromkeys([*published.index, *rows])]
        table = Table(parent, parent.resolve().name, ordered, published)
        if table.name in [other.name for other in tables]:
            raise ValueError(f"{folder} and {parent} would both make the table {table.name}.md; rename one")
        tables.append(table)
    if not tables:
        raise FileNotFoundError(f"{folder} has no configs: no .yaml besides base.yaml in it or in its subfolders")
    return tables


def load_writeup(path: Path, names: list[str]) -> pd.DataFrame:
    """Published figures, rows by measures; empty where there is no file.

    Raises:
        ValueError: it is no table of such numbers, has a row twice, or one that is none of ``names``.
    """
    if not path.is_file():
        return pd.DataFrame(columns=list(MEASURES))
    empty = {key: [""] for key in MEASURES}  # and nothing else: a row may be called None
    try:
        given = pd.read_csv(path, index_col="row", dtype={"row": str}, keep_default_na=False, na_values=empty)
        for column in given.columns.difference(list(MEASURES)):
            raise ValueError(f"a column {column!r}{nearest_name(str(column), MEASURES)}")
        table = given.reindex(columns=list(MEASURES)).astype(float)
        for key in MEASURES:
            most, meant = (1.0, "a share from 0 to 1") if key.endswith("_acc") else (sys.float_info.max, "a time")
            for figure in table[key].dropna():
                if not 0 <= figure <= most:
                    raise ValueError(f"{key} is {figure:g}, where {meant} is expected")
    except ValueError as error:
        raise ValueError(f"{path} is no table of row, {', '.join(MEASURES)}: {error}") from error
    for name in table.index[table.index.duplicated() | ~table.index.isin(names)]:
        raise ValueError(f"{path}: a row {name!r} without a config, or twice{nearest_name(str(name), names)}")
    return table


def pick_jobs(tables: list[Table], seeds: int, shard: str = "1/1") -> list[tuple[Row, int]]:
    """The i-th of n parts of all rows with all seeds, finished or not. The first seed of every row comes first.

    Raises:
        ValueError: there is no such part, or less than no seeds.
    """
    mine = parse_shard(shard)
    if seeds < 0:
        raise ValueError(f"seeds is {seeds}; it is how many, or 0 to write the tables only")
    rows = {row.digest: row for table in tables for row in table.rows}  # one that stands in two tables once
    jobs = [(row, seed) for seed in range(FIRST_SEED, FIRST_SEED + seeds) for row in rows.values()]
    return jobs[mine]


def count_epochs(row: Row) -> int:
    """How many epochs a row's config asks for, at most.

    Raises:
        ValueError: ``fit`` does not take the config, or it validates nothing.
    """
    trainer = resolve(row)["trainer"]
    if trainer["limit_val_batches"] == 0:
        raise ValueError(f"{row.path} has trainer.limit_val_batches 0, so there is no validation accuracy to show")
    return int(trainer["max_epochs"] or 0)


# --- one run ----------------------------------------------------------------------------------------------------------


def train(row: Row, seed: int, output: Path) -> Result:
    """Train a row, or go on after the last whole epoch of a run that was stopped; leave and return its result.

    In this process, so that it stops when this one is killed, and on one device, whatever the machine has: several
    would make larger batches of the same config. ``shard`` uses them.

    Raises:
        ValueError, OSError: as ``fit`` does; or the config has changed since the row was loaded, or the last epoch was
            not validated.
    """
    verify_unchanged(row)
    tag = row.digest[:8]
    run = next(output.glob(f"*-{tag}"), output / f"{row.path.stem}-{tag}") / f"seed_{seed}"
    last = run / "checkpoints" / "last.ckpt"
    fit_or_go_on([*row.flags, "--trainer.enable_model_summary=false"], seed, run)
    history = load_history(run)
    if history is None:
        raise ValueError(f"{run} has no training and validation accuracy of any epoch")
    if math.isnan(history.val_acc[-1]) or history.epochs[-1] != verify_checkpoint(last)["epoch"] + 1:
        raise ValueError(f"{run} has no validation accuracy of its last epoch, see trainer.check_val_every_n_epoch")
    result = {
        "config": row.path.as_posix(),
        "config_sha256": row.digest,
        "seed": seed,
        "epochs": int(history.epochs[-1]),
        "train_acc": float(history.train_acc[-1]),
        "val_acc": float(history.val_acc[-1]),
        "run_time_s": measure_seconds(run),
        "precision": read_precision(run),
        **describe_environment(),
    }
    write_json(run / "result.json", result)
    shutil.rmtree(run / "checkpoints")  # 20 MB a run
    return result


def load_results(output: Path) -> list[Result]:
    """The finished runs under an output folder, whichever machine they come from.

    Raises:
        ValueError: a result is damaged.
    """
    results: dict[tuple[str, int], Result] = {}  # a run that was copied here twice counts once
    for path in sorted(output.glob("*/seed_*/result.json")):
        try:
            result = json.loads(path.read_text())
            figures = {key: float(result[key]) for key in ("seed", *MEASURES)}
            texts = {key: str(result[key]) for key in ("config_sha256", "hardware", "precision")}
            versions = {"torch": str(result["versions"]["torch"])}
            key = texts["config_sha256"], int(figures["seed"])
            results[key] = {**result, **texts, "versions": versions, **figures}
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{path} is damaged; remove it, and the run is trained again") from error
    return list(results.values())


def find_finished(results: list[Result]) -> set[tuple[str, int]]:
    """The digests and seeds of runs that are done."""
    return {(result["config_sha256"], int(result["seed"])) for result in results}


# --- the tables -------------------------------------------------------------------------------------------------------


def write_tables(tables: list[Table], results: list[Result], output: Path) -> list[str]:
    """Write <table>.csv and <table>.md for each table with a finished run, and return a line about each."""
    lines = []
    for table in tables:
        frame = tabulate(table, results)
        if num_finished := int((frame["n"] > 0).sum()):
            path = output / f"{table.name}.md"
            write_file(path.with_suffix(".csv"), frame.to_csv(float_format="%.6g").encode())
            write_file(path, render_table(table, frame, results).encode())
            lines.append(f"{path}: {num_finished} of {len(frame)} rows")
    return lines


def tabulate(table: Table, results: list[Result]) -> pd.DataFrame:
    """Row by row n, then mean, sample standard deviation over seeds (``_sd``) and published figure of each measure."""
    runs = [[result for result in results if result["config_sha256"] == row.digest] for row in table.rows]
    frame = pd.DataFrame({"n": [len(seeds) for seeds in runs]}, pd.Index([row.name for row in table.rows], name="row"))
    for key in MEASURES:
        values = [[run[key] for run in seeds] for seeds in runs]
        frame[key] = [statistics.fmean(x) if x else math.nan for x in values]
        frame[f"{key}_sd"] = [statistics.stdev(x) if len(x) > 1 else math.nan for x in values]
        frame[f"writeup_{key}"] = table.published[key].reindex(frame.index).astype(float)
    return frame


def render_table(table: Table, frame: pd.DataFrame, results: list[Result]) -> str:
    """The Markdown page of a table: figures, what is to be said of their order, and how they came about."""
    columns = [("Row", [name.replace("|", r"\|") for name in frame.index]), ("n", [str(n) for n in frame["n"]])]
    for key, (title, _) in MEASURES.items():
        pairs = zip(frame[key], frame[f"{key}_sd"], strict=True)
        columns.append((title, [_show(key, mean) + ("" if sd != sd else f" ± {_show(key, sd)}") for mean, sd in pairs]))
        if frame[f"writeup_{key}"].notna().any():
            columns.append(("write-up", [_show(key, figure) for figure in frame[f"writeup_{key}"]]))
    heads, cells = zip(*columns, strict=True)
    lines = [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *zip(*cells, strict=True))]
    orders = [f"- {text}" for key in MEASURES if (text := compare_orders(frame, key))]
    runs = [result for result in results if result["config_sha256"] in {row.digest for row in table.rows}]
    machines = sorted({f"{run['hardware']}, {run['precision']}, torch {run['versions']['torch']}" for run in runs})
    command = tell_command("ablate", table.folder, "--seeds", str(frame["n"].max()))
    notes = (
        "Each figure of ours: mean ± sample standard deviation over n seeds, at the last epoch. Within the spread: a "
        "difference smaller than √(s₁² + s₂²); with n = 1 there is none, and chance cannot be told from effect. "
        f"Trained on {'; '.join(machines)}: `{command}`"
    )
    return "\n".join([f"# {table.name.capitalize()}", "", *lines, "", *orders, "", notes, ""])


def _show(key: str, figure: float) -> str:
    if math.isnan(figure):
        return "-"
    minutes, seconds = divmod(round(figure), 60)
    return f"{minutes}:{seconds:02}" if key == "run_time_s" else f"{figure:.4f}"


def compare_orders(frame: pd.DataFrame, key: str) -> str:
    """Say where our means and the published figures of a measure put the rows in the same order, and where not.

    Args:
        frame: what ``tabulate`` returns.
        key: the measure.

    Returns:
        A few sentences; none where fewer than two rows have both figures.
    """
    title, more_is_better = MEASURES[key]
    both = frame.dropna(subset=[key, f"writeup_{key}"])
    if len(both) < 2:
        return ""
    before = " > " if more_is_better else " < "
    ours, theirs = (both[x].sort_values(ascending=not more_is_better, kind="stable") for x in (key, f"writeup_{key}"))
    num_alike, other, within = 0, [], []
    for a, b in itertools.combinations(ours.index, 2):
        gap, their_gap = abs(ours[a] - ours[b]), theirs[a] - theirs[b]
        if their_gap == 0:  # they put neither first
            continue
        pair = f"{a}{before if gap else ' = '}{b}"
        if gap and (their_gap > 0) == more_is_better:
            num_alike += 1
        else:
            other.append(pair)
        if 0 < gap < math.hypot(both.loc[a, f"{key}_sd"], both.loc[b, f"{key}_sd"]):  # false where one is NaN
            within.append(pair)
    their_order, our_order = _chain(theirs, before), _chain(ours, before)
    text = f"{title}. "
    text += f"Both: {our_order}. " if our_order == their_order else f"The write-up: {their_order}. Ours: {our_order}. "
    text += f"{num_alike} of {num_alike + len(other)} pairs agree"
    text += f"; we find instead {', '.join(other)}." if other else "."
    return text + (f" Within the spread: {', '.join(within)}." if within else "")


def _chain(figures: pd.Series[float], before: str) -> str:
    names = list(figures.index)
    steps = (f"{' = ' if figures[a] == figures[b] else before}{b}" for a, b in itertools.pairwise(names))
    return "".join([names[0], *steps])
