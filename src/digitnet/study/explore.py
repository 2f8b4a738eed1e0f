"""What the data look like before any training: samples, class balance, augmentation, means."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from digitnet import figures
from digitnet.augment import Augmentation, RandomAffine, preview_augmentation
from digitnet.data import MNISTDataModule
from digitnet.files import make_writable, tell_command, write_file
from digitnet.model import DigitNet, SingleNet
from digitnet.study.configs import load_data_module, make_untrained, read_config
from digitnet.study.page import render_page

NUM_DRAWS = 8
# Source: the write-up's Keras layers, RandomRotation(0.05) and RandomTranslation(0.1, 0.1).
WRITEUP_PREVIEWS = {  # name: (heading, title of the figure, what to draw)
    "rotation": ("Rotation alone", "Rotation by up to ±18°", RandomAffine(rotation_deg=18.0, shift_frac=0.0)),
    "shift": ("Shift alone", "Shift by up to ±10 % each way", RandomAffine(rotation_deg=0.0, shift_frac=0.1)),
    "rotation_and_shift": (
        "Both",
        "Rotation by up to ±18°, then shift by up to ±10 %",
        RandomAffine(rotation_deg=18.0, shift_frac=0.1),
    ),
}


class Picture(NamedTuple):
    """A figure and the words around it on the page."""

    name: str
    heading: str
    figure: Figure
    alt: str
    caption: str


def explore(config: Path | None = None, folder: Path = Path("explore"), seed: int = 42) -> None:
    """Picture the data: first digits, class balance, augmentation, mean images; as PNG, SVG and one page.

    Where a config's network sets digits upright or looks closer, what it sees of them in training is pictured, too.

    Args:
        config: a config of fit (or the config.yaml of a run), whose data and augmentation to picture; by default MNIST
            with the write-up's split and augmentation.
        folder: where the pictures and their contact page, index.html, are written; made if it is not there.
        seed: starts the random draws of the previews.

    Raises:
        ValueError: the config cannot be used, or its split does not fit its data.
        OSError: the config or the data cannot be read, or the folder cannot be written.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be from 0 to 2**63 - 1")
    settings = read_config(config) if config else None
    module = MNISTDataModule(augmentation=RandomAffine()) if settings is None else load_data_module(settings)
    net = None if settings is None else make_untrained(settings)
    pictures = draw_pictures(module, net, seed)
    make_writable(folder, "--folder")  # not before: what cannot be drawn leaves no folder
    for picture in pictures:
        write_file(folder / f"{picture.name}.png", figures.render(picture.figure, "png", dpi=200))
        write_file(folder / f"{picture.name}.svg", figures.render(picture.figure, "svg"))
    train, val, test = module.split
    typed = ["--config", str(config)] if config else []
    typed += ["--folder", str(folder)] * (folder != Path("explore")) + ["--seed", str(seed)] * (seed != 42)
    page = render_page(
        "explore.html",
        source=module.source,
        lead=f"{sum(module.split):,} images in order: {train:,} to train on, {val:,} to validate, {test:,} to test.",
        pictures=pictures,
        command=tell_command("explore", *typed),
    )
    write_file(folder / "index.html", page)
    print(f"{folder / 'index.html'}: {len(pictures)} figures of {module.source}, each as PNG and SVG")


def show_seen(net: SingleNet, augmentation: Augmentation | None) -> Augmentation:
    """From images (B, 1, 28, 28) uint8 to what a network in training sees of them: the darkest 0, the brightest 1."""

    def show(images: Tensor) -> Tensor:
        seen = net.see(images if augmentation is None else augmentation(images))
        low, high = seen.amin(dim=(1, 2, 3), keepdim=True), seen.amax(dim=(1, 2, 3), keepdim=True)
        return (seen - low) / (high - low).clamp_min(1e-6)

    return show


def draw_pictures(module: MNISTDataModule, net: SingleNet | None, seed: int) -> list[Picture]:
    """Every figure of the data, in the order of the page; with what a network sees, where that is something else."""
    module.setup("fit")
    splits = {
        name: (dataset.images[:, 0].numpy(), dataset.labels.numpy())
        for name, dataset in zip(("training", "validation", "test"), module.datasets, strict=True)
    }
    images, labels = splits["training"]
    counts = {name: np.bincount(split_labels, minlength=10) for name, (_, split_labels) in splits.items()}
    shares = counts["training"] / len(labels)
    pictures = [
        Picture(
            "first_digits", "The first 25 digits", figures.draw_digits(images, labels),
            f"The first digits in a grid, labelled {', '.join(map(str, labels[:25]))}.",
            "The start of the training set, each digit under its label.",
        ),
        Picture(
            "class_counts", "How many of each digit", figures.draw_class_balance(counts),
            "Bars of the number of images of each digit, for training, validation and test.",
            f"In the training set the rarest digit, {shares.argmin()}, has {100 * shares.min():.1f} % of the images, "
            f"the commonest, {shares.argmax()}, {100 * shares.max():.1f} %.",
        ),
    ]  # fmt: skip
    originals = np.stack([images[np.flatnonzero(labels == digit)[0]] for digit in range(10) if digit in labels])
    chosen, ours = module.augmentation, "This is what the config trains with"
    is_writeups = any(repr(chosen) == repr(transform) for *_, transform in WRITEUP_PREVIEWS.values())
    other = "" if is_writeups else "The write-up's, to compare: the config does not train with it"
    previews: list[tuple[str, str, str, Augmentation, str]] = [
        (name, heading, title, transform, ours if repr(transform) == repr(chosen) else other)
        for name, (heading, title, transform) in WRITEUP_PREVIEWS.items()
    ]
    if chosen is not None and not is_writeups:
        used = f"{ours}: {' '.join(repr(chosen).split())}"
        previews.append(("augmentation", "The config's own", "The augmentation that the config names", chosen, used))
    if net is not None and not isinstance(net, DigitNet):
        used = f"The network's own first step, without parameters{', on augmented images' if chosen else ''}"
        show = show_seen(net, chosen)
        previews.append(("seen", "What the network sees", "What the network sees in training", show, used))
    for name, heading, title, transform, used in previews:
        draws = preview_augmentation(transform, originals, NUM_DRAWS, seed)
        pictures.append(
            Picture(
                name,
                heading,
                figures.draw_augmentation(originals, draws, title),
                f"{title}: each digit beside {NUM_DRAWS} random draws.",
                f"The original on the left, {NUM_DRAWS} random draws beside it.{f' {used}.' if used else ''}",
            )
        )
    pictures.append(
        Picture(
            "class_means",
            "Mean and spread",
            figures.draw_class_means(images, labels),
            "For each digit the mean of its training images, and the standard deviation of each pixel.",
            "Where a mean is sharp people agree; where the spread is dark they write differently.",
        )
    )
    return pictures
