"""What every figure is made of: colours, a page with a title, and images laid out as tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Source: Okabe and Ito, "Color Universal Design", colours that people of every colour vision tell apart.
BLUE, VERMILION = "#0072B2", "#D55E00"
INK, GREY, PALE = "#222222", "#666666", "#E6E6E6"
WIDTH_IN = 5.6  # of a chart: its letters stay readable on a telephone and in a column
Array = np.ndarray


def make_figure(width_in: float, height_in: float, title: str) -> Figure:
    """A white page of this size in inches, its title at the upper left."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.06 / width_in, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def add_note(figure: Figure, text: str) -> None:
    """A line in small grey letters below everything."""
    figure.supxlabel(text, x=0.06 / figure.get_figwidth(), ha="left", fontsize=9, color=GREY)


def make_empty_figure(title: str) -> Figure:
    """A title alone, where there is nothing to draw."""
    return make_figure(WIDTH_IN, 0.45, title)


def make_plain(axes: Axes) -> None:
    """Take away the frame at the top and right, and grey what is left of it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=INK, labelsize=9.5)
    axes.set_axisbelow(True)


def make_canvas(figure: Figure, width: float, height: float, top: float = 0.0) -> Axes:
    """The figure's only axes, for tiles: no frame, one unit is the side of a tile, y runs down from ``-top``."""
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_aspect("equal", anchor="NW")
    axes.set(xlim=(-0.02, width), ylim=(height, -top))
    return axes


def draw_tile(axes: Axes, image: Array, left: float, top: float, *, vmax: float = 255, frame: bool = False) -> None:
    """Draw an image (H, W), 0 white and ``vmax`` black, on the unit square at ``left`` and ``top`` of a canvas."""
    # All tiles share one Axes: sixty of them would take seconds to lay out.
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=vmax, extent=(left, left + 1, top + 1, top), interpolation="nearest")
    axes.set(xlim=limits[0], ylim=limits[1])
    if frame:
        axes.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor=PALE, linewidth=0.8))


def draw_tiles(
    images: Array,
    captions: Sequence[str],
    title: str,
    *,
    columns: int,
    colours: Sequence[str] | None = None,
    note: str = "",
    caption_pt: float = 9,
) -> Figure:
    """Images in a grid, each under its caption."""
    tile_in = 0.78
    columns = min(columns, max(len(images), 1))
    rows = math.ceil(len(images) / columns)
    head = (max(caption.count("\n") for caption in captions) + 1) * 1.25 * caption_pt / 72 / tile_in + 0.06
    pitch_x, pitch_y = 1.12, 1 + head + 0.12
    width_in = max(tile_in * columns * pitch_x + 0.1, 0.095 * len(title) + 0.2, 3.2)
    figure = make_figure(width_in, tile_in * rows * pitch_y + (0.58 if note else 0.36), title)
    axes = make_canvas(figure, columns * pitch_x, rows * pitch_y)
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = k % columns * pitch_x, k // columns * pitch_y + head
        draw_tile(axes, image, left, top, frame=True)
        colour = colours[k] if colours else INK
        axes.text(left + 0.5, top - 0.04, caption, ha="center", va="bottom", fontsize=caption_pt, color=colour)
    if note:
        add_note(figure, note)
    return figure


def draw_blocks(
    images: Array, captions: Sequence[str], blocks: list[tuple[str, Array, bool]], title: str, columns: int, note: str
) -> Figure:
    """Blocks of images, each block under its heading, and where asked each image over its caption."""
    tile_in, pitch, heading, caption = 0.78, 1.06, 0.38, 0.24
    rows = [(math.ceil(len(picks) / columns), 1.0 + (caption if named else 0) + 0.06) for _, picks, named in blocks]
    height = sum(heading + num * row_height for num, row_height in rows) + 0.15 * (len(blocks) - 1)
    figure = make_figure(tile_in * columns * pitch + 0.1, tile_in * height + (0.58 if note else 0.36), title)
    axes = make_canvas(figure, columns * pitch, height)
    top = 0.0
    for (text, picks, named), (num_rows, row_height) in zip(blocks, rows, strict=True):
        axes.text(0, top + heading - 0.1, text, ha="left", va="bottom", fontsize=10, color=INK)
        for k, pick in enumerate(picks):
            left, y = k % columns * pitch, top + heading + k // columns * row_height
            draw_tile(axes, images[pick], left, y, frame=True)
            if named:
                axes.text(left + 0.5, y + 1.02, captions[pick], ha="center", va="top", fontsize=9, color=INK)
        top += heading + num_rows * row_height + 0.15
    if note:
        add_note(figure, note)
    return figure
