"""The final figure of a recipe, measured as ``docs/protocol.md`` says: last epoch, once per seed, on all 10,000."""

from __future__ import annotations

import json
import shutil
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digitnet.calibrate import predict
from digitnet.checkpoints import choose_resumable, find_run, load_net, verify_checkpoint
from digitnet.cli import main
from digitnet.data import MNISTDataModule
from digitnet.machine import describe_hardware, list_versions
from digitnet.model import Network
from digitnet.study.ablation import FIRST_SEED, load_row, measure_seconds, parse_shard, resolve
from digitnet.study.page import write_file
from digitnet.study.report import KNOWN_WRONG

SPLIT = (60_000, 5_000, 5_000)  # all training images; the 10,000 test images in two halves, the second the write-up's
SHIFTS = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]  # of the image, in pixels down and to the right


def protocol(config: Path, seeds: int = 5, shard: str = "1/1", output: Path = Path("lightning_logs/protocol")) -> None:
    """Train a recipe on all 60,000 training images and score its last epoch once per seed; a table for the record.

    See docs/protocol.md. Nothing is chosen here: choose a recipe on a hold-out of the training images before. Stop it
    when you like: the same command goes on, and neither trains nor scores a seed twice.

    Args:
        config: a config of fit whose schedule ends by itself, such as configs/fast.yaml.
        seeds: how many: 42, 43, and so on.
        shard: i/n trains the i-th of n parts of the seeds, for several calls at once; the table has all that are done.
        output: where the runs and the table, <config>.md, are kept.

    Raises:
        ValueError: the config cannot be used, stops by itself, or a result is damaged.
        OSError: there is no such config, or the data cannot be had.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; it must be at least 1")
    row = load_row(config)
    settings = resolve(row)
    num_epochs = int(settings["trainer"]["max_epochs"] or 0)
    if num_epochs < 1:
        raise ValueError(f"{config} has max_epochs {num_epochs}; a schedule that ends by itself needs a number of them")
    data = {key: settings["data"][key] for key in ("source", "data_dir")}
    mine, table = parse_shard(shard), f"no seed of {seeds} is in part {shard}"
    runs = {
        seed: output / f"{config.stem}-{row.digest[:8]}" / f"seed_{seed}"
        for seed in range(FIRST_SEED, FIRST_SEED + seeds)
    }
    for seed, run in list(runs.items())[mine]:
        if not (run / "result.json").is_file():
            print(f"[{seed - FIRST_SEED + 1}/{seeds}] {config.stem}, seed {seed}", flush=True)
            train(row.flags, seed, run, num_epochs)
            result = score(run, seed, num_epochs, MNISTDataModule(**data, split=SPLIT))
            write_file(run / "result.json", (json.dumps(result, indent=2) + "\n").encode())
            (run / "checkpoints" / "best.ckpt").unlink(missing_ok=True)  # or `test` would take it for the newest model
        paths = [other / "result.json" for other in runs.values()]  # of the other parts, too
        results = [load_result(path) for path in paths if path.is_file()]
        table = render_table(config, seeds, results)
        write_file(output / f"{config.stem}.md", table.encode())
    print(table)


def train(flags: tuple[str, ...], seed: int, run: Path, num_epochs: int) -> None:
    """Train one seed, or go on with it; no early stopping, so that every seed has the same schedule."""
    last = run / "checkpoints" / "last.ckpt"
    if last.is_file() and find_run(last):
        sound, _ = choose_resumable(last)
        if sound != last or verify_checkpoint(last)["epoch"] + 1 < num_epochs:
            main(["fit", f"--ckpt_path={last}"])
        return
    shutil.rmtree(run, ignore_errors=True)  # stopped in its first epoch
    place = {"save_dir": str(run.parent.parent), "name": run.parent.name, "version": run.name}
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {**place, "default_hp_metric": False},
    }
    ours = [f"--data.split={list(SPLIT)}", f"--early_stopping.patience={num_epochs + 1}", "--trainer.devices=1"]
    ours += ["--calibration.num_digits=0"]  # no part of the figure, and minutes of work
    main(["fit", *flags, *ours, f"--seed_everything={seed}", f"--trainer.logger={json.dumps(logger)}"])


def score(run: Path, seed: int, num_epochs: int, module: MNISTDataModule) -> dict[str, Any]:
    """Score the last epoch of a run on the 10,000 test images: validation and test set of the data module.

    Raises:
        ValueError: the run did not train as many epochs as its config says.
    """
    net, checkpoint = load_net(run / "checkpoints" / "last.ckpt")
    if checkpoint["epoch"] + 1 != num_epochs:
        raise ValueError(f"{run} ended after {checkpoint['epoch'] + 1} of {num_epochs} epochs; its figure is not fixed")
    module.setup("test")
    images = torch.cat([module.datasets[1].images, module.datasets[2].images])
    labels = torch.cat([module.datasets[1].labels, module.datasets[2].labels])
    plain, averaged = count_mistakes(net, images, labels)
    return {
        "seed": seed,
        "epochs": num_epochs,
        "num_parameters": sum(parameter.numel() for parameter in net.parameters()),
        "mistakes": plain,
        "mistakes_shifted": averaged,
        "train_s": measure_seconds(run),
        "hardware": describe_hardware(),
        "versions": list_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def count_mistakes(net: Network, images: Tensor, labels: Tensor) -> tuple[list[int], list[int]]:
    """Where a network is wrong: positions among the images, for the image alone and for the mean over its shifts.

    Args:
        net: in evaluation mode.
        images: (N, 1, 28, 28) uint8.
        labels: (N,) int64.
    """
    net = net.to(memory_format=torch.channels_last)
    device = next(net.parameters()).device
    probabilities = [predict(net, shift(images, down, right), device).softmax(dim=1) for down, right in SHIFTS]
    guesses = (probabilities[0].argmax(dim=1), torch.stack(probabilities).mean(dim=0).argmax(dim=1))
    plain, averaged = ((guess != labels).nonzero()[:, 0].tolist() for guess in guesses)
    return plain, averaged


def shift(images: Tensor, down: int, right: int) -> Tensor:
    """Move images (N, 1, H, W) by whole pixels; what moves in is 0."""
    moved = images.roll((down, right), (2, 3))
    if down:
        moved[:, :, 0 if down > 0 else -1] = 0
    if right:
        moved[:, :, :, 0 if right > 0 else -1] = 0
    return moved


def load_result(path: Path) -> dict[str, Any]:
    """A finished seed's result.

    Raises:
        ValueError: it is damaged.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        for key in ("seed", "epochs", "num_parameters", "mistakes", "mistakes_shifted", "train_s", "hardware", "date"):
            result[key]
        result["versions"]["torch"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged; remove it, and the seed is scored again") from error
    return result


def render_table(config: Path, seeds: int, results: list[dict[str, Any]]) -> str:
    """The Markdown page of all seeds."""
    lines = [
        "| seed | mistakes in 10,000 | in the last 5,000 | of them known wrong labels | averaged over shifts: 10,000 | "
        "last 5,000 | training |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    columns: list[list[float]] = [[] for _ in range(6)]
    for result in results:
        counts: list[float] = []
        for key in ("mistakes", "mistakes_shifted"):
            counts += [len(result[key]), sum(one >= SPLIT[1] for one in result[key])]
        counts.insert(2, len(set(result["mistakes"]) & set(KNOWN_WRONG)))
        counts.append(result["train_s"])
        for column, count in zip(columns, counts, strict=True):
            column.append(count)
        lines.append(f"| {result['seed']} | {' | '.join(str(count) for count in counts[:5])} | {counts[5]:.0f} s |")
    summary = [
        f"{statistics.fmean(column):.1f}" + (f" ± {statistics.stdev(column):.1f}" if len(column) > 1 else "")
        for column in columns
    ]
    lines.append(f"| **mean ± sd** | {' | '.join(summary[:5])} | {summary[5]} s |")
    first = results[0]
    machines = sorted({f"{one['hardware']}, torch {one['versions']['torch']}, {one['date'][:10]}" for one in results})
    note = (
        f"{first['num_parameters']:,} parameters, {first['epochs']} epochs on all 60,000 training images, scored at "
        f"the last epoch, once per seed, as docs/protocol.md says. {'; '.join(machines)}: "
        f"`python -m digitnet protocol {config} --seeds {seeds}`"
    )
    return "\n".join([f"# {config.stem}", "", *lines, "", note, ""])
