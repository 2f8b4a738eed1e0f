"""How well a trained network reads digits that are spoiled, in the 15 ways of MNIST-C."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from digitnet import figures
from digitnet.checkpoints import count_trained_on, find_newest, find_run, load_net, read_data_settings
from digitnet.data import MNISTDataModule
from digitnet.files import make_writable, write_file, write_json
from digitnet.machine import describe_environment
from digitnet.model import run_in_batches
from digitnet.scores import find_report_folder
from digitnet.study.configs import load_data_module, read_config
from digitnet.study.corruptions import CORRUPTIONS, corrupt

NUM_SHOWN = 10  # digits of each kind in the picture
# Accuracy of a plain CNN on the published files, all 10,000 test images. Source: Mu and Gilmer 2019; of the single
# corruptions, those that cost it the most.
PUBLISHED = {"mean": 0.759, "fog": 0.14, "glass_blur": 0.40, "translate": 0.47, "motion_blur": 0.47}


def robustness(
    ckpt_path: Path | None = None, config: Path | None = None, folder: Path | None = None, seed: int = 42
) -> None:
    """Score a checkpoint on its test images spoiled in the 15 ways of MNIST-C; a table and two figures.

    The corruptions are made anew from their published parameters, so the figures stand beside published ones, not for
    them. canny_edges needs scikit-image: pip install -e ".[robustness]".

    Args:
        ckpt_path: the checkpoint; by default the newest run's best.
        config: a config of fit, whose test images to take; by default the run's own; a checkpoint outside a run
            names its data itself.
        folder: where robustness.json, robustness.md, robustness.png and corruptions.png are written; by default the
            run's report/, or <checkpoint>_report/ beside a checkpoint that has no run; with _<name> behind it for other
            digits than it was trained on.
        seed: of the corruptions' draws.

    Raises:
        FileNotFoundError: there is no checkpoint yet.
        ValueError: the checkpoint or the config cannot be used, or scikit-image is missing.
        OSError: the data cannot be read, or the folder cannot be written.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    checkpoint = find_newest("best.ckpt") if ckpt_path is None else ckpt_path
    net, stored = load_net(checkpoint)
    net = net.to(memory_format=torch.channels_last)
    run = find_run(checkpoint)
    config = run / "config.yaml" if run and config is None else config
    trained_on = read_data_settings(stored)
    module = load_data_module(read_config(config)) if config else MNISTDataModule(**trained_on)
    folder = folder or find_report_folder(checkpoint, trained_on, module.source)
    module.setup("test")
    dataset = module.datasets[2]
    known = count_trained_on(trained_on, module.source, sum(module.split[:2]), len(dataset))
    images, labels = dataset.images[:, 0].numpy(), dataset.labels
    corrupt(images[:1], "canny_edges", seed)  # says at once what is missing
    make_writable(folder, "--folder")

    accuracies: dict[str, float] = {}
    examples = {}
    print(f"{len(images):,} test images of {module.source}, {checkpoint}")
    if known:
        print(f"the checkpoint was trained on {known:,} of these {len(images):,} images: it knows them")
    for name in ("clean", *CORRUPTIONS):
        spoiled = images if name == "clean" else corrupt(images, name, seed)
        examples[name] = spoiled[:NUM_SHOWN]
        logits = run_in_batches(net, torch.from_numpy(spoiled)[:, None])
        predictions = logits.argmax(dim=1)
        accuracies[name] = int((predictions == labels).sum()) / len(labels)
        print(f"{name:<14}{accuracies[name]:8.2%}", flush=True)
    mean = sum(accuracies[name] for name in CORRUPTIONS) / len(CORRUPTIONS)
    print(f"{'mean of 15':<14}{mean:8.2%}")

    record = {
        "dataset": module.source,
        "split": list(module.split),
        "num_images": len(images),
        "num_trained_on": known,
        "checkpoint": str(checkpoint),
        "accuracy": accuracies,
        "mean_of_15": mean,
        "seed": seed,
        **describe_environment(),
    }
    write_json(folder / "robustness.json", record)
    write_file(folder / "robustness.md", render_table(record).encode())
    corrupted = {name: accuracies[name] for name in CORRUPTIONS}
    title = f"{100 * mean:.1f} % right when spoiled, {100 * accuracies['clean']:.2f} % when not"
    chart = figures.draw_robustness(corrupted, find_published(record), title)
    write_file(folder / "robustness.png", figures.render(chart))
    write_file(folder / "corruptions.png", figures.render(figures.draw_corruptions(examples)))
    print(f"{folder / 'robustness.md'}: the table; robustness.png and corruptions.png beside it")


def find_published(record: dict[str, Any]) -> dict[str, float]:
    """What is published of MNIST-C, where it is MNIST that was spoiled."""
    return PUBLISHED if record["dataset"] == "mnist" else {}


def render_table(record: dict[str, Any]) -> str:
    """The Markdown page of what ``robustness`` measured."""
    published_figures = find_published(record)
    rows: list[tuple[str, str, float, float | None]] = [("clean", "", record["accuracy"]["clean"], None)]
    for name, corruption in CORRUPTIONS.items():
        severity = f"{corruption.severity} of 5: " if corruption.severity else ""
        rows.append((name, severity + corruption.description, record["accuracy"][name], published_figures.get(name)))
    rows.append(("mean of 15", "", record["mean_of_15"], published_figures.get("mean")))
    lines = ["| corruption | severity | accuracy | plain CNN, published |", "|---|---|---:|---:|"]
    for name, severity, accuracy, published in rows:
        lines.append(
            f"| {name} | {severity} | {100 * accuracy:.2f} % | {f'{100 * published:.1f} %' if published else '-'} |"
        )
    known = record["num_trained_on"]
    told = f"**of which the checkpoint was trained on {known:,} and knows them**, " if known else ""
    note = (
        f"{record['num_images']:,} test images of {record['dataset']}, split {record['split']}, {told}"
        f"seed {record['seed']}; {record['hardware']}, torch {record['versions']['torch']}, {record['date'][:10]}. The "
        "corruptions are made anew from the parameters published with MNIST-C (Mu and Gilmer, arXiv:1906.02337); the "
        "published figures are of its own files, all 10,000 test images."
    )
    return "\n".join(["# Accuracy under corruption", "", *lines, "", note, ""])
