"""Every picture of the project: arrays in, matplotlib ``Figure`` out.

No files, no pyplot, no global state, so that a training callback, a report and a notebook draw with the same functions.
Images are (N, 28, 28) uint8, bright ink on 0 as in MNIST, and drawn as dark ink on white paper. Labels and predictions
are (N,) integers in [0, 9]; confidences are (N,), the probability of the predicted digit, in [0, 1].
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from digitnet import tallies
from digitnet.canvas import (
    BLUE,
    GREY,
    INK,
    PALE,
    VERMILION,
    WIDTH_IN,
    Array,
    add_note,
    draw_blocks,
    draw_tile,
    draw_tiles,
    make_canvas,
    make_empty_figure,
    make_figure,
    make_plain,
)

WHITE_TO_VERMILION = LinearSegmentedColormap.from_list(
    "white_to_vermilion", ["#FDEFE6", "#F0A070", "#B34700", "#6E2B00"]
)
Scale = Callable[[Any], Any]


# --- what the figures show --------------------------------------------------------------------------------------------


class History(NamedTuple):
    """A training run epoch by epoch: arrays (E,); epochs count from 1, accuracies lie in [0, 1].

    Of epochs that were not validated, ``val_loss`` and ``val_acc`` are nan.
    """

    epochs: Array
    train_loss: Array
    train_acc: Array
    val_loss: Array
    val_acc: Array


# --- data -------------------------------------------------------------------------------------------------------------


def draw_digits(images: Array, labels: Array) -> Figure:
    """The first 25 digits in a 5x5 grid, each under its label."""
    return draw_tiles(
        images[:25],
        [str(label) for label in labels[:25]],
        "The first digits and their labels",
        columns=5,
        caption_pt=11,
    )


def draw_class_balance(counts: Mapping[str, Array]) -> Figure:
    """How many images of each digit each split holds; a line marks equal shares.

    Args:
        counts: name of the split -> (10,) counts, in the order to draw.
    """
    figure = make_figure(WIDTH_IN, 0.6 + 1.6 * len(counts), "Images of each digit")
    all_axes = figure.subplots(len(counts), 1, squeeze=False)[:, 0]
    for axes, (name, split_counts) in zip(all_axes, counts.items(), strict=True):
        axes.bar(range(10), split_counts, color=BLUE, width=0.72)
        axes.axhline(np.mean(split_counts), color=INK, linewidth=1, linestyle="--")
        axes.set_title(f"{name}: {int(np.sum(split_counts)):,} images", loc="left", fontsize=10)
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xticks(range(10), [f"{digit}\n{count:,}" for digit, count in enumerate(split_counts)])
        axes.set_xlim(-0.55, 9.55)
        make_plain(axes)
    add_note(figure, "Below each bar its digit and its number of images. Dashed: equal shares.")
    return figure


def draw_augmentation(originals: Array, draws: Array, title: str) -> Figure:
    """Originals in the first column, random augmentations of each beside it.

    Args:
        originals: (R, 28, 28), one a row.
        draws: (R, D, 28, 28) uint8 or float in [0, 255].
        title: what was done to them.
    """
    num_rows, num_draws = draws.shape[:2]
    pitch, gap = 1.06, 0.35
    figure = make_figure(max(0.56 * ((1 + num_draws) * pitch + gap), 4.2), 0.56 * num_rows * pitch + 0.6, title)
    axes = make_canvas(figure, (1 + num_draws) * pitch + gap, num_rows * pitch, top=0.4)
    for row in range(num_rows):
        draw_tile(axes, originals[row], 0, row * pitch)
        for column in range(num_draws):
            draw_tile(axes, draws[row, column], gap + (1 + column) * pitch, row * pitch, frame=True)
    axes.text(0.5, -0.1, "original", ha="center", va="bottom", fontsize=9, color=INK)
    axes.text(gap + pitch, -0.1, "random draws", ha="left", va="bottom", fontsize=9, color=INK)
    return figure


def draw_class_means(images: Array, labels: Array) -> Figure:
    """The mean image of each digit above the standard deviation of its pixels."""
    pitch = 1.06
    figure = make_figure(7.2, 2.15, "Mean image and spread of each digit")
    axes = make_canvas(figure, 10 * pitch, 2 * pitch, top=0.35)
    for digit in range(10):
        axes.text(digit * pitch + 0.5, -0.05, str(digit), ha="center", va="bottom", fontsize=11, color=INK)
        group = images[labels == digit]
        if len(group):
            draw_tile(axes, group.mean(axis=0), digit * pitch, 0)
            draw_tile(axes, group.std(axis=0, dtype=np.float32), digit * pitch, pitch, vmax=128)
    for row, name in enumerate(("mean", "spread")):
        axes.text(-0.1, row * pitch + 0.5, name, ha="right", va="center", fontsize=10, color=INK)
    add_note(figure, "Black is level 255 in the mean, 128 in the spread (standard deviation of each pixel).")
    return figure


# --- training ---------------------------------------------------------------------------------------------------------


def draw_history(history: History, best: int | None) -> Figure:
    """Loss and accuracy of training and validation over the epochs.

    Both scales are stretched where networks spend their time: the loss is logarithmic, and so is the distance of the
    accuracy from 100 %.

    Args:
        history: the run.
        best: position in ``history`` of the epoch to mark, from 0; None marks none.
    """
    epochs = history.epochs
    figure = make_figure(WIDTH_IN, 5.6, "Training history")
    loss, acc = figure.subplots(2, 1, sharex=True)
    marker = {"marker": "o", "markersize": 4} if len(epochs) <= 50 else {}
    for axes, train, val in ((loss, history.train_loss, history.val_loss), (acc, history.train_acc, history.val_acc)):
        if best is not None:
            axes.axvline(epochs[best], color=GREY, linewidth=1, linestyle=":")
        axes.plot(epochs, train, color=VERMILION, linestyle="--", label="training", **marker)
        there = ~np.isnan(history.val_acc)
        if there.any():
            axes.plot(epochs[there], val[there], color=BLUE, label="validation", **marker)
        if best is not None:
            height = val[best] if there[best] else train[best]
            axes.plot(
                epochs[best], height, "*", color=BLUE, markersize=15, markeredgecolor="white",
                label=f"best epoch: {epochs[best]}",
            )  # fmt: skip
        axes.grid(axis="y", color=PALE, linewidth=0.8)
        make_plain(axes)
    loss.set_yscale("log")
    losses = np.concatenate([history.train_loss, history.val_loss])
    _fit_scale(loss, [m * 10.0**e for e in range(-6, 3) for m in (1, 2, 5)], losses, np.log10, lambda x: 10.0**x)
    loss.set_title("loss (cross-entropy)", loc="left", fontsize=10)
    acc.set_yscale("function", functions=(_stretch_accuracy, _unstretch_accuracy))
    ticks = [0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 1]
    _fit_scale(acc, ticks, np.concatenate([history.train_acc, history.val_acc]), _stretch_accuracy, _unstretch_accuracy)
    acc.set_title("accuracy", loc="left", fontsize=10)
    acc.set_xlabel("epoch, counted from 1")
    acc.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    acc.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _stretch_accuracy(accuracy: Any) -> Any:
    return -np.log10(1.0005 - np.asarray(accuracy))  # the 0.0005 keeps 100 % on the page


def _unstretch_accuracy(value: Any) -> Any:
    return 1.0005 - 10.0 ** -np.asarray(value)


def _fit_scale(axes: Axes, ticks: list[float], values: Array, scale: Scale, unscale: Scale) -> None:
    """Fit the y axis around the values, with the nearest ticks below and above them inside."""
    values = values[np.isfinite(values)]
    if not values.size:  # a training that diverged at once
        return
    low = max([t for t in ticks if t <= values.min()], default=ticks[0])
    high = min([t for t in ticks if t >= values.max()], default=ticks[-1])
    if low == high:  # one value, on a tick or beyond the last
        place = ticks.index(low)
        low, high = ticks[max(0, place - 1)], ticks[min(place + 1, len(ticks) - 1)]
    shown = [t for t in ticks if low <= t <= high]
    while len(shown) > 8:  # keep the ends, thin out between them
        shown = [shown[0], *shown[2:-1:2], shown[-1]]
    axes.yaxis.set_major_locator(FixedLocator(shown))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.4g}")
    bottom, top = scale(low), scale(high)
    pad = 0.05 * (top - bottom)
    axes.set_ylim(unscale(bottom - pad), unscale(top + pad))


# --- results ----------------------------------------------------------------------------------------------------------


def draw_confusion(labels: Array, predictions: Array) -> Figure:
    """The confusion matrix in counts. Only mistakes are coloured, or the diagonal would drown them."""
    counts = tallies.count_confusions(labels, predictions)
    num_errors = int(counts.sum() - np.trace(counts))
    figure = make_figure(WIDTH_IN, 5.9, f"Confusion matrix: {format_count(num_errors, 'mistake')} in {len(labels):,}")
    axes = figure.subplots()
    wrong = np.ma.masked_where(np.eye(10, dtype=bool) | (counts == 0), counts)
    top = max(int(wrong.max()) if wrong.count() else 1, 2)
    axes.imshow(wrong, cmap=WHITE_TO_VERMILION, vmin=1, vmax=top)
    for row, column in np.argwhere(counts > 0):
        count = int(counts[row, column])
        if row == column:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=PALE, edgecolor="none"))
        dark = row != column and (count - 1) / (top - 1) > 0.5
        axes.text(
            column, row, f"{count:,}", ha="center", va="center",
            color="white" if dark else INK, fontsize=10.5, fontweight="normal" if row == column else "bold",
        )  # fmt: skip
    axes.set_xticks(range(10))
    axes.set_yticks(range(10))
    axes.set_xticks(np.arange(-0.5, 10), minor=True)
    axes.set_yticks(np.arange(-0.5, 10), minor=True)
    axes.grid(which="minor", color=PALE, linewidth=0.8)
    axes.tick_params(which="both", length=0, labelsize=11)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", fontsize=11)
    axes.set_ylabel("actual", fontsize=11)
    add_note(figure, "Grey: read rightly. Empty: never happened.")
    return figure


def draw_mistakes(
    images: Array,
    labels: Array,
    predictions: Array,
    confidences: Array,
    known_wrong: Array | None = None,
    limit: int = 60,
) -> Figure:
    """Every image read wrongly, titled actual / predicted and confidence, the most confident first.

    Args:
        images: (N, 28, 28), right ones too.
        labels: (N,).
        predictions: (N,).
        confidences: (N,).
        known_wrong: (N,) bool, where people have found the label itself to be wrong; marked with a star.
        limit: draw this many at most; a note says how many there are.
    """
    wrong = tallies.find_mistakes(labels, predictions, confidences)
    shown = wrong[:limit]
    starred = np.zeros(len(labels), bool) if known_wrong is None else known_wrong
    title = f"{format_count(len(wrong), 'mistake')} in {len(labels):,}: actual / predicted, confidence"
    if len(wrong) == 0:
        return make_empty_figure(f"No mistake in {len(labels):,} images")
    notes = [f"The first {len(shown)} of {len(wrong):,}, the most confident first."] if len(wrong) > limit else []
    if starred[shown].any():
        notes.append("* people found this label to be wrong.")
    captions = [
        f"{labels[i]} / {predictions[i]}{' *' if starred[i] else ''}\n{format_percent(confidences[i])}" for i in shown
    ]
    colours = [VERMILION if starred[i] else INK for i in shown]
    return draw_tiles(images[shown], captions, title, columns=8, colours=colours, note=" ".join(notes))


def draw_confused_pair(images: Array, labels: Array, predictions: Array, confidences: Array) -> Figure:
    """The commonest confusion looked at closely: its images, above both digits as they usually look."""
    pairs = tallies.rank_confusions(tallies.count_confusions(labels, predictions))
    if not pairs:
        return make_empty_figure(f"No digit was taken for another in {len(labels):,} images")
    actual, predicted = pairs[0]
    wrong = tallies.find_mistakes(labels, predictions, confidences)
    mixed = wrong[(labels[wrong] == actual) & (predictions[wrong] == predicted)]
    columns = 6
    shown = mixed[: 3 * columns]
    blocks = [(f"{actual} read as {predicted}, with the confidence in {predicted}", shown, True)]
    for digit in pairs[0]:
        right = np.flatnonzero((labels == digit) & (predictions == digit))[:columns]
        if len(right):
            blocks.append((f"{digit} read as {digit}, the first of the set", right, False))
    note = f"The most confident {len(shown)} of {len(mixed):,}." if len(mixed) > len(shown) else ""
    return draw_blocks(
        images,
        [format_percent(confidence) for confidence in confidences],
        blocks,
        f"Commonest confusion: {actual} read as {predicted}, {_times(len(mixed))}",
        columns,
        note,
    )


def draw_least_sure(images: Array, labels: Array, predictions: Array, confidences: Array, limit: int = 24) -> Figure:
    """The images of lowest confidence, the least sure first, titled as mistakes are; orange where wrong."""
    shown = np.argsort(confidences, kind="stable")[:limit]
    captions, colours = [], []
    for i in shown:
        right = labels[i] == predictions[i]
        captions.append(f"{labels[i]} / {predictions[i]}\n{format_percent(confidences[i])}")
        colours.append(INK if right else VERMILION)
    return draw_tiles(
        images[shown], captions, "Least sure: actual / predicted, confidence", columns=8, colours=colours,
        note="Orange captions: read wrongly." if VERMILION in colours else "",
    )  # fmt: skip


def draw_class_scores(precision: Array, recall: Array, f1: Array) -> Figure:
    """Precision, recall and F1 of each digit, (10,) each, in [0, 1] or nan; the axis starts near the lowest."""
    figure = make_figure(WIDTH_IN, 3.7, "Precision, recall and F1 of each digit")
    axes = figure.subplots()
    series = (
        (precision, "precision", BLUE, "o", -0.2),
        (f1, "F1", INK, "D", 0.0),
        (recall, "recall", VERMILION, "s", 0.2),
    )
    for digit in range(10):
        axes.plot(
            [digit - 0.2, digit, digit + 0.2],
            [precision[digit], f1[digit], recall[digit]],
            color=PALE,
            linewidth=2,
            zorder=1,
        )
    for values, name, colour, marker, offset in series:
        axes.plot(np.arange(10) + offset, values, marker, color=colour, markersize=6, label=name, zorder=2)
    lowest = min(0.995, *(float(np.nanmin(values)) for values, *_ in series))
    axes.set_ylim(lowest - 0.12 * (1 - lowest), 1 + 0.06 * (1 - lowest))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_xticks(range(10))
    axes.set_xlabel("digit")
    make_plain(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    return figure


def draw_reliability(confidences: Array, correct: Array) -> Figure:
    """How often the network is right at each confidence, and how many images have it."""
    bins = tallies.bin_reliability(confidences, correct)
    figure = make_figure(WIDTH_IN, 5.6, f"Reliability: expected calibration error {100 * bins.ece:.2f} %")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    filled = bins.counts > 0
    intervals = np.array(
        [
            tallies.wilson_interval(round(a * n), n)
            for a, n in zip(bins.accuracy[filled], bins.counts[filled].tolist(), strict=True)
        ]
    )
    note = f"{len(bins.counts)} bins of equal width, with 95 % intervals; dashed: perfect"
    top.set_title(note, loc="left", fontsize=10)
    top.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
    top.vlines(bins.confidence[filled], intervals[:, 0], intervals[:, 1], color=BLUE, linewidth=1.5)
    top.plot(bins.confidence[filled], bins.accuracy[filled], "o", color=BLUE)
    top.set_ylim(-0.03, 1.03)
    top.set_ylabel("accuracy")
    top.grid(color=PALE, linewidth=0.8)
    widths = np.diff(bins.edges)
    bars = bottom.bar(bins.edges[:-1], bins.counts, widths, align="edge", color=BLUE, edgecolor="white")
    bottom.bar_label(bars, [f"{count:,}" if count else "" for count in bins.counts], fontsize=8.5, padding=2)
    bottom.set_yscale("log")
    bottom.set_ylim(0.5, max(bins.counts.max(), 1) * 6)
    bottom.yaxis.set_major_formatter("{x:,.0f}")
    bottom.yaxis.set_minor_locator(NullLocator())
    bottom.set_ylabel("images")
    bottom.set_xlabel("confidence")
    bottom.set_xlim(-0.01, 1.02)
    for axes in (top, bottom):
        make_plain(axes)
    return figure


def draw_robustness(accuracies: Mapping[str, float], published: Mapping[str, float], title: str) -> Figure:
    """Accuracy under each corruption, beside a published figure where there is one.

    Args:
        accuracies: name of the corruption -> accuracy in [0, 1], in the order to draw.
        published: the same of another network, as far as it is known.
        title: of the figure.
    """
    figure = make_figure(WIDTH_IN, 0.9 + 0.27 * len(accuracies), title)
    axes = figure.subplots()
    rows = np.arange(len(accuracies))
    values = np.array(list(accuracies.values()))
    axes.barh(rows, values, color=BLUE, height=0.66, label="this network")
    for row, value in enumerate(values.tolist()):
        axes.text(1.14, row, format_percent(value), ha="right", va="center", fontsize=9.5, color=INK)
    known = [(value, row) for row, name in enumerate(accuracies) if (value := published.get(name))]
    if known:
        x, y = zip(*known, strict=True)
        axes.plot(x, y, "D", color="white", markeredgecolor=VERMILION, markeredgewidth=2, label="plain CNN, published")
    axes.set_yticks(rows, [name.replace("_", " ") for name in accuracies])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_xticks(np.linspace(0, 1, 6), [f"{percent} %" for percent in range(0, 101, 20)])
    axes.set_xlabel("accuracy")
    make_plain(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    return figure


def draw_corruptions(examples: Mapping[str, Array]) -> Figure:
    """The same digits as each corruption leaves them: name -> (K, 28, 28) uint8, in the order to draw."""
    num_columns = max(6, *(len(images) for images in examples.values()))  # at least as wide as the title
    pitch, left = 1.06, 2.6
    width, height = left + num_columns * pitch, len(examples) * pitch
    figure = make_figure(0.44 * width, 0.44 * height + 0.4, "The same digits, spoiled in each way")
    axes = make_canvas(figure, width, height)
    for row, (name, images) in enumerate(examples.items()):
        text = name.replace("_", " ")
        axes.text(left - 0.15, row * pitch + 0.5, text, ha="right", va="center", fontsize=9.5, color=INK)
        for column, image in enumerate(images):
            draw_tile(axes, image, left + column * pitch, row * pitch, frame=True)
    return figure


# --- how they are drawn -----------------------------------------------------------------------------------------------


def render(figure: Figure, form: Literal["png", "svg"] = "png", dpi: int = 160) -> bytes:
    """The figure as the bytes of a PNG or an SVG file, the same on every call."""
    buffer = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None}}[form]
    with matplotlib.rc_context({"svg.hashsalt": "digitnet"}):
        figure.savefig(buffer, format=form, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def format_percent(probability: float) -> str:
    """One decimal, and never 100 % for what is only nearly so."""
    return f"{min(100 * probability, 99.9) if probability < 1 else 100:.1f} %"


def format_count(number: int, noun: str) -> str:
    """``1 mistake``, ``2,000 mistakes``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number:,} times")
