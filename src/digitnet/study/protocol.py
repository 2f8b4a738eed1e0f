"""The figure of a recipe, measured as ``docs/protocol.md`` says: last epoch, once per seed, on the 10,000 test images.

Or, to choose a recipe, on a hold-out of the training images.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from digitnet.checkpoints import choose_resumable, find_run, load_net
from digitnet.data import MNISTDataModule, fetch_digits
from digitnet.files import make_writable, tell_command, write_file, write_json
from digitnet.machine import describe_environment
from digitnet.model import Network, run_in_batches
from digitnet.run_folder import read_precision
from digitnet.study.published import KNOWN_WRONG
from digitnet.study.recipes import (
    FIRST_SEED,
    fit_or_go_on,
    load_row,
    measure_seconds,
    parse_shard,
    resolve,
    verify_unchanged,
)

SPLIT = (60_000, 5_000, 5_000)  # all training images; the 10,000 test images in two halves, the second the write-up's
CUTS: dict[str, Callable[[Any], bool]] = {  # the trainer's: with such a value not every epoch is of all images
    "limit_train_batches": lambda limit: not (limit is None or (isinstance(limit, float) and limit == 1)),  # 1 is one
    "overfit_batches": bool,
    "fast_dev_run": bool,
    "max_steps": lambda steps: steps != -1,
    "max_time": bool,
}
ENDS = ("stopping_threshold", "divergence_threshold")  # of early stopping: with them a training may end by itself
COUNTS_STEPS = ("steps_per_epoch", "total_steps", "step_size_up", "step_size_down")  # of OneCycleLR and CyclicLR
SHIFTS = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]  # of the image, in pixels down and to the right


Result = dict[str, Any]  # what a result.json holds


class Column(NamedTuple):
    """One figure of every seed in a table."""

    title: str
    measure: Callable[[Result], float]
    decimals: int = 0
    unit: str = ""


TRAINING = Column("training", lambda result: result["train_s"], unit=" s")
OF_WRONG_LABELS = Column(  # of MNIST
    "of them known wrong labels", lambda result: _count(result["mistakes"], KNOWN_WRONG.__contains__)
)
FINAL = (
    Column("mistakes in 10,000", lambda result: len(result["mistakes"])),
    Column("in the last 5,000", lambda result: _count(result["mistakes"], lambda place: place >= SPLIT[1])),
    OF_WRONG_LABELS,
    Column("averaged over shifts: 10,000", lambda result: len(result["mistakes_shifted"])),
    Column("last 5,000", lambda result: _count(result["mistakes_shifted"], lambda place: place >= SPLIT[1])),
    TRAINING,
)
HOLDOUT = (  # odd places hold digits of writers that were not trained on
    Column("mistakes", lambda result: len(result["mistakes"])),
    Column("at odd places", lambda result: _count(result["mistakes"], lambda place: place % 2 == 1)),
    Column("loss", lambda result: result["loss"], decimals=4),
    Column("at odd places", lambda result: result["loss_odd"], decimals=4),
    Column("averaged over shifts: mistakes", lambda result: len(result["mistakes_shifted"])),
    Column("at odd places", lambda result: _count(result["mistakes_shifted"], lambda place: place % 2 == 1)),
    TRAINING,
)


def _count(places: list[int], is_meant: Callable[[int], bool]) -> int:
    return sum(map(is_meant, places))


def protocol(
    config: Path,
    seeds: int = 5,
    holdout: int = 0,
    shard: str = "1/1",
    output: Path = Path("lightning_logs/protocol"),
) -> None:
    """Train a recipe on all 60,000 training images and score its last epoch once per seed; a table for the record.

    See docs/protocol.md. A recipe is chosen before, with --holdout: trained on the first of the training images, scored
    on the last of them. Stop it when you like: the same command goes on, and neither trains nor scores a seed twice.

    Args:
        config: a config of fit whose schedule ends by itself, such as configs/fast.yaml. A base.yaml beside it comes
            first, as in ablate.
        seeds: how many: 42, 43, and so on.
        holdout: how many of the training images are scored in place of the test images, such as 10000. A schedule
            that counts steps is shortened by as much.
        shard: i/n trains the i-th of n parts of the seeds, for several calls at once; the table has all that are done.
        output: where the runs and the table, <config>-<part of its digest>.md, are kept.

    Raises:
        ValueError: the config cannot be used, may end early or changes between seeds, or a result is damaged.
        OSError: there is no such config, or the data cannot be had.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; it must be at least 1")
    if not 0 <= holdout < SPLIT[0]:
        raise ValueError(f"holdout is {holdout}; it must be some of the {SPLIT[0]:,} training images, or 0 for none")
    row = load_row(config)
    settings = resolve(row)
    num_epochs = int(settings["trainer"]["max_epochs"] or 0)
    if num_epochs < 1:
        raise ValueError(f"{config} has max_epochs {num_epochs}; a schedule that ends by itself needs a number of them")
    for name, cuts in CUTS.items():
        if cuts(value := settings["trainer"][name]):
            raise ValueError(f"{config} has trainer.{name} {value}, which cuts a training short; leave it out")
    for name in ENDS:
        if (value := settings["early_stopping"][name]) is not None:
            raise ValueError(f"{config} has early_stopping.{name} {value}, which ends a training; leave it out")
    schedule = settings["model"]["lr_scheduler"] or {}
    monitor = (schedule.get("init_args") or {}).get("monitor") or "val/loss"
    if str(schedule.get("class_path")).endswith("ReduceLROnPlateau") and not monitor.startswith("train/"):
        raise ValueError(
            f"{config} has a ReduceLROnPlateau that goes by {monitor}, of images that are scored; give it a monitor of "
            "train/, or take a schedule that ends by itself"
        )
    split, flags, suffix = SPLIT, list(row.flags), ""
    if holdout:
        split, suffix = (SPLIT[0] - holdout, holdout, sum(SPLIT[1:])), f"-holdout_{holdout}"
        flags += shorten_schedule(settings, split[0])
    module = MNISTDataModule(**{key: settings["data"][key] for key in ("source", "data_dir")}, split=split)
    mine = parse_shard(shard)
    recipe = output / f"{config.stem}-{row.digest[:8]}{suffix}"
    for seed in list(range(FIRST_SEED, FIRST_SEED + seeds))[mine]:
        run = recipe / f"seed_{seed}"
        if not (run / "result.json").is_file():
            verify_unchanged(row)
            print(f"[{seed - FIRST_SEED + 1}/{seeds}] {config.stem}{suffix}, seed {seed}", flush=True)
            num_images = len(fetch_digits(module.source, module.data_dir).labels)
            if num_images != sum(SPLIT):
                told = f"{module.source} has {num_images:,} images"
                raise ValueError(f"{told}; the protocol takes {sum(SPLIT):,}, in the order of MNIST's")
            make_writable(recipe, "--output")
            try:
                train([*flags, f"--data.split={list(split)}"], seed, run, num_epochs)
                print("scoring the last epoch, best or not, alone and averaged over shifts", flush=True)  # minutes
                result = score(run, seed, num_epochs, module, holdout)
                write_json(run / "result.json", result)
            except (KeyboardInterrupt, SystemExit):  # the latter is how fit ends after Ctrl-C
                print("protocol stopped; the same command goes on from here", flush=True)
                raise
            print(f"seed {seed} is done: {result['train_s']:.0f} s of training", flush=True)
            (run / "checkpoints" / "best.ckpt").unlink(missing_ok=True)  # the last epoch is what counts
            write_table(recipe, config, holdout)
    print(write_table(recipe, config, holdout))


def write_table(recipe: Path, config: Path, holdout: int) -> str:
    """Write the table of all seeds that are done, of other parts and earlier calls too, beside their folder.

    Raises:
        ValueError: there is none, or a result is damaged.
    """
    results = [load_result(path, holdout) for path in recipe.glob("seed_*/result.json")]
    results.sort(key=lambda result: result["seed"])
    if not results:
        raise ValueError(f"no seed of {config} is done yet, and none is in this part of them")
    table = render_table(config, results, holdout)
    path = recipe.with_name(f"{recipe.name}.md")
    write_file(path, table.encode())
    return f"{table}\n{path}: the table"


def shorten_schedule(settings: dict[str, Any], num_images: int) -> list[str]:
    """Flags of ``fit`` that make a schedule which counts steps as much shorter as a training on so many images is."""
    given = (settings["model"]["lr_scheduler"] or {}).get("init_args", {})

    def count_steps(images: int) -> int:
        batches = math.ceil(images / settings["data"]["batch_size"])
        return math.ceil(batches / (settings["trainer"]["accumulate_grad_batches"] or 1))

    steps, all_steps = count_steps(num_images), count_steps(SPLIT[0])  # of an epoch
    lengths = {name: math.ceil(given[name] * steps / all_steps) for name in COUNTS_STEPS if given.get(name)}
    return [f"--model.lr_scheduler.{name}={length}" for name, length in lengths.items()]


def train(flags: list[str], seed: int, run: Path, num_epochs: int) -> None:
    """Train one seed, or go on with it; no early stopping, so that every seed has the same schedule."""
    last = run / "checkpoints" / "last.ckpt"
    if last.is_file() and find_run(last):
        with contextlib.suppress(ValueError):  # damaged
            sound, stored, _ = choose_resumable(last)
            if sound == last and stored["epoch"] + 1 >= num_epochs:
                return  # stopped before it was scored
    fit_or_go_on([*flags, "--early_stopping.patience=1000000000"], seed, run)


def score(run: Path, seed: int, num_epochs: int, module: MNISTDataModule, holdout: int = 0) -> Result:
    """Score the last epoch of a run on the 10,000 test images, or on a hold-out of the training images.

    Args:
        run: its folder.
        seed: of it.
        num_epochs: of its schedule.
        module: the data, whose validation and test set are scored; of a hold-out, the validation set alone.
        holdout: how many of the training images are held out; 0 for the test images.

    Returns:
        What a result.json holds. Mistakes are positions among the test images; of a hold-out, among MNIST's.

    Raises:
        ValueError: the run did not train as many epochs as its config says.
    """
    net, checkpoint = load_net(run / "checkpoints" / "last.ckpt")
    if checkpoint["epoch"] + 1 != num_epochs:
        raise ValueError(f"{run} ended after {checkpoint['epoch'] + 1} of {num_epochs} epochs; its figure is not fixed")
    module.setup("test")
    scored = module.datasets[1:2] if holdout else module.datasets[1:]
    images, labels = torch.cat([part.images for part in scored]), torch.cat([part.labels for part in scored])
    first = len(module.datasets[0]) if holdout else 0
    plain, averaged, losses = judge(net, images, labels)
    is_odd = (first + torch.arange(len(losses))) % 2 == 1
    return {
        "seed": seed,
        "source": module.source,
        "epochs": num_epochs,
        "num_parameters": sum(parameter.numel() for parameter in net.parameters()),
        "mistakes": [first + place for place in plain],
        "mistakes_shifted": [first + place for place in averaged],
        **({"loss": float(losses.mean()), "loss_odd": float(losses[is_odd].mean())} if holdout else {}),
        "train_s": measure_seconds(run),
        "precision": read_precision(run),
        **describe_environment(),
    }


def judge(net: Network, images: Tensor, labels: Tensor) -> tuple[list[int], list[int], Tensor]:
    """Where a network is wrong, for the image alone and for the mean over its shifts, and its loss on each image.

    Args:
        net: in evaluation mode.
        images: (N, 1, 28, 28) uint8.
        labels: (N,) int64.

    Returns:
        Two lists of positions among the images, and the cross-entropy (N,) of the images alone.
    """
    net = net.to(memory_format=torch.channels_last)
    logits = [run_in_batches(net, shift(images, down, right)) for down, right in SHIFTS]
    guesses = (logits[0].argmax(dim=1), torch.stack(logits).softmax(dim=2).mean(dim=0).argmax(dim=1))
    plain, averaged = ((guess != labels).nonzero()[:, 0].tolist() for guess in guesses)
    return plain, averaged, F.cross_entropy(logits[0], labels, reduction="none")


def shift(images: Tensor, down: int, right: int) -> Tensor:
    """Move images (N, 1, H, W) by a pixel or none along each axis; what moves in is 0."""
    moved = images.roll((down, right), (2, 3))
    if down:
        moved[:, :, 0 if down > 0 else -1] = 0
    if right:
        moved[:, :, :, 0 if right > 0 else -1] = 0
    return moved


def load_result(path: Path, holdout: int = 0) -> Result:
    """A finished seed's result, which has what a table shows.

    Raises:
        ValueError: it is damaged.
    """
    try:
        result: Result = json.loads(path.read_text())
        for kind, keys in {int: ("seed", "epochs", "num_parameters"), str: ("hardware", "date")}.items():
            for key in keys:
                if not isinstance(result[key], kind):
                    raise TypeError(key)
        result["versions"]["torch"]
        for column in HOLDOUT if holdout else FINAL:
            if not isinstance(column.measure(result), int | float):
                raise TypeError(column.title)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged; remove it, and the seed is scored again") from error
    return result


def describe_circumstances(result: Result) -> str:
    """On what, how and when a seed was trained and scored; the first results did not say the precision."""
    precision = [result["precision"]] if "precision" in result else []
    return ", ".join([result["hardware"], *precision, f"torch {result['versions']['torch']}", result["date"][:10]])


def render_table(config: Path, results: list[Result], holdout: int = 0) -> str:
    """The Markdown page of all seeds, in order."""
    first = results[0]
    source = first.get("source", "mnist")  # the first results did not say
    columns = [each for each in (HOLDOUT if holdout else FINAL) if source == "mnist" or each is not OF_WRONG_LABELS]
    summary = []
    cells = [[str(result["seed"]) for result in results]]
    for column in columns:
        values = [column.measure(result) for result in results]
        cells.append([f"{value:.{column.decimals}f}{column.unit}" for value in values])
        averages = [statistics.fmean(values), *([statistics.stdev(values)] if len(values) > 1 else [])]
        summary.append(" ± ".join(f"{value:.{max(column.decimals, 1)}f}" for value in averages) + column.unit)
    summary.insert(0, "**mean ± sd**" if len(results) > 1 else "**one seed**")
    rows = [["seed", *(column.title for column in columns)], *zip(*cells, strict=True), summary]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"|{'---:|' * len(cells)}")
    machines = sorted({describe_circumstances(result) for result in results})
    trained, scored = f"all {SPLIT[0]:,} training images", "scored at the last epoch, once per seed"
    num_seeds = max(one["seed"] for one in results) - FIRST_SEED + 1
    asked = tell_command("protocol", config, "--seeds", str(num_seeds))
    if holdout:
        trained, scored = f"the first {SPLIT[0] - holdout:,} training images", f"scored on the next {holdout:,}"
        asked += f" --holdout {holdout}"
    note = (
        f"{first['num_parameters']:,} parameters, {first['epochs']} epochs on {trained} of {source}, {scored}, as "
        f"docs/protocol.md says. {'; '.join(machines)}: `{asked}`"
    )
    return "\n".join([f"# {config.stem}", "", *lines, "", note, ""])
