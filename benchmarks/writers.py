"""Draws how alike MNIST's digits are to those that come soon after them: where a writer's digits stand together.

    python benchmarks/writers.py results/writers.png

Likeness is the correlation of two things that hang on the writer, the thickness of the stroke and its slant, each
against its mean over the digits of the same label; in the training images among those at even places, and among those
at odd ones. Prints the table that the picture draws, and how many times as much the mean over 1,000 in a row varies as
in random order: once where writers are scrambled. The images are those that `fit` reads (SCIKIT_LEARN_DATA).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.ticker import ScalarFormatter

from digitnet.canvas import BLUE, GREY, VERMILION, WIDTH_IN, Array, make_figure, make_plain
from digitnet.data import Digits, fetch_digits
from digitnet.figures import render
from digitnet.files import write_file

DISTANCES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)
BLOCK = 1_000
GROUPS = {  # places, colour, line
    "training images at even places": (slice(0, 60_000, 2), BLUE, "-"),
    "training images at odd places": (slice(1, 60_000, 2), VERMILION, "-"),
    "first 5,000 test images": (slice(60_000, 65_000), BLUE, ":"),
    "last 5,000 test images": (slice(65_000, 70_000), VERMILION, ":"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    picture = parser.parse_args().picture
    digits = fetch_digits("mnist")
    figure = make_figure(WIDTH_IN, 3.4, "Where a writer's digits stand together")
    axes = figure.subplots()
    print(f"| | {' | '.join(f'{distance:,}' for distance in DISTANCES)} | thickness | slant |")
    print(f"|---|{'---:|' * (len(DISTANCES) + 2)}")
    for name, (places, colour, line) in GROUPS.items():
        styles = measure_styles(Digits(digits.images[places], digits.labels[places]))
        likeness = [np.mean(styles[distance:] * styles[:-distance]) for distance in DISTANCES]
        means = styles.reshape(-1, BLOCK, 2).mean(axis=1)
        excess = BLOCK * means.var(axis=0, ddof=1)
        print(f"| {name} | {' | '.join(f'{each:z.2f}' for each in likeness)} | {excess[0]:.1f} | {excess[1]:.1f} |")
        axes.plot(DISTANCES, likeness, line, color=colour, label=name, linewidth=1.8)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("places apart, within the group")
    axes.set_ylabel("correlation of thickness and slant")
    axes.legend(frameon=False, fontsize=9)
    make_plain(axes)
    write_file(picture, render(figure))


def measure_styles(digits: Digits) -> Array:
    """Thickness of the stroke and its slant of each digit, (N, 2), each of mean 0 and variance 1 within a label."""
    images = digits.images.astype(np.float32)
    ink = images.sum(axis=(1, 2))
    edges = sum(np.abs(np.diff(images, axis=axis)).sum(axis=(1, 2)) for axis in (1, 2))
    places = np.arange(images.shape[1])
    down = places[None, :, None] - (images.sum(axis=2) @ places / ink)[:, None, None]  # from the centre of the ink
    right = places[None, None, :] - (images.sum(axis=1) @ places / ink)[:, None, None]
    slant = (images * down * right).sum(axis=(1, 2)) / (images * down**2).sum(axis=(1, 2))
    styles = np.stack([ink / edges, slant], axis=1)
    for label in np.unique(digits.labels):
        of_label = digits.labels == label
        styles[of_label] -= styles[of_label].mean(axis=0)
        styles[of_label] /= styles[of_label].std(axis=0)
    return styles


if __name__ == "__main__":
    main()
