"""A photo or a drawing of a digit -> the 28x28 picture it would be in MNIST.

Source: http://yann.lecun.com/exdb/mnist/: scaled, anti-aliased, to fit a 20x20 box with its aspect kept, then shifted
by whole pixels until the centre of mass is in the middle of 28x28. Measured on the 70,000: the longer side is 20 (in 16
of them 19), the centre of mass lies in [14, 15] when pixel i spans [i, i + 1], and strokes are about 3 pixels wide
(5th percentile 2.1, 95th 4.3).

Pillow decodes, resizes and turns; ``scipy.ndimage`` filters and labels. Both come with what training needs, while
scikit-image would be a further dependency for functions that are one line of these.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from digitnet.apply.ink import Ink, Invert, count, find_ink, quantile
from digitnet.apply.opening import flatten
from digitnet.apply.sheet import add_margin, cut_to_sheet

Box = tuple[slice, slice]

WORK_SIDE = 384  # a digit is looked for at this size
MIN_SIDE = 96  # what is smaller is enlarged first
LARGE = 0.3  # of the digit's ink: a piece with more of it is no speck
MAX_PIECES = 4_000  # of ink are looked at, the largest; a sheet has room for some 3,000 digits
TOLD_OF_MANY = f"only the {MAX_PIECES:,} largest pieces looked at"
NUM_CELLS, NUM_SMALL_CELLS = 3, 12  # pieces that a frame encloses, and no digit does
GAP = 0.15  # of the digit: strokes of one digit are not further apart
FINE = 4  # strokes are measured and changed at this many times MNIST's resolution
STROKE_RANGE = (2.1, 4.4)  # pixels of 28; thinner is thickened to the first, thicker thinned to the second


class Digit28(NamedTuple):
    """A digit as the network wants it.

    Attributes:
        image: (28, 28) uint8 in [0, 255]; ink is bright, paper is 0.
        steps: what was done to the picture, in words for people: "turned by EXIF", "inverted", "2 specks dropped".
        line: of a sheet with several digits the line it stands in, from 1; None where one digit was looked for.
    """

    image: np.ndarray
    steps: tuple[str, ...]
    line: int | None = None


def normalize(picture: Image.Image, invert: Invert = "auto") -> Digit28 | None:
    """Find the digit in a picture and draw it as MNIST would. A picture that MNIST could hold is left as it is.

    Args:
        picture: any size and mode, showing one digit; from ``open_picture`` it is upright.
        invert: "yes": the ink is darker than the paper; "no": it is brighter; "auto": the border shows the paper.

    Returns:
        The digit; None when there is no ink at all.
    """
    flat = flatten(picture)
    steps = picture.info.get("steps", ())
    for name, wanted in (("no", np.asarray(flat)), ("yes", 255 - np.asarray(flat))):
        if invert in ("auto", name) and is_mnist_like(wanted):
            return Digit28(wanted, (*steps, "inverted") if name == "yes" else steps)
    flat, sheet_steps = cut_to_sheet(flat)
    flat, margin_steps = add_margin(flat, invert)
    steps = (*steps, *sheet_steps, *margin_steps)
    work, factor = to_side(flat, WORK_SIDE)
    ink = find_ink(work, invert)
    if ink is None:
        return None
    found = pick_digit(ink)
    if found is None:
        return None
    # Probably other digits: the closer look below no longer sees them.
    left_out: list[str] = [f"{count(found.num_left_out, 'large piece')} left out"] if found.num_left_out else []
    left_out += [f"{count(found.num_others, 'other thing')} dropped"] if found.num_others else []
    rows, columns = found.box
    size = max(rows.stop - rows.start, columns.stop - columns.start)
    if factor > 1 and size < 3 * 28:  # small in a large picture: look again, closer
        left, right = (round(v * factor) for v in (columns.start - size // 2, columns.stop + size // 2))
        top, bottom = (round(v * factor) for v in (rows.start - size // 2, rows.stop + size // 2))
        crop = flat.crop((max(left, 0), max(top, 0), min(right, flat.width), min(bottom, flat.height)))
        ink = find_ink(to_side(crop, WORK_SIDE)[0], invert) or ink
        found = pick_digit(ink) or found
    image, width_step = to_mnist(found.ink)
    return Digit28(image, (*steps, *ink.steps, *found.steps, *left_out, *width_step))


def is_mnist_like(image: np.ndarray) -> bool:
    """Whether an image (H, W) or (H, W, 3) is 28x28 and placed as every MNIST digit is; all 70,000 are."""
    if image.shape != (28, 28):
        return False
    for dark in (0, 32):  # JPEG leaves some noise around the ink
        bright = image > dark
        if bright.any() and not (bright[[0, -1]].all() or bright[:, [0, -1]].all()):
            extent = max(np.ptp(np.flatnonzero(bright.any(axis))) + 1 for axis in (0, 1))
            centre = ndimage.center_of_mass(np.where(bright, image, 0))
            if 19 - (dark > 0) <= extent <= 20 and all(13.4 <= c <= 14.6 for c in centre):
                return True
    return False


def to_side(picture: Image.Image, side: int) -> tuple[Image.Image, float]:
    """Reduce by a whole factor to at most ``side`` pixels, or enlarge what is tiny; and the factor."""
    longest = max(picture.size)
    if longest > side:
        factor = math.ceil(longest / side)
        return picture.reduce(factor), factor
    if longest < MIN_SIDE:
        factor = math.ceil(MIN_SIDE / longest)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC), 1 / factor
    return picture, 1.0


class Found(NamedTuple):
    """A digit's ink alone (h, w) in [0, 1], with a margin, and its box in the picture, without."""

    ink: np.ndarray
    box: Box
    steps: tuple[str, ...]
    num_left_out: int  # pieces that are too large for specks
    num_others: int  # frames, holes and edges


def pick_digit(ink: Ink) -> Found | None:
    """The largest piece of ink that is not cut off by the edge, and the pieces that belong to it."""
    (labels, bold), steps = label_ink(ink), []
    if not len(bold):
        return None
    amounts, boxes = measure_pieces(ink, labels)
    at_edge = (boxes[:, :2] == 0).any(1) | (boxes[:, 2:] == labels.shape).any(1)
    other = find_other_things(labels, boxes, amounts)
    usable = bold & ~other if (bold & ~other).any() else ~other
    main = int(np.argmax(amounts * np.where(at_edge, 0.2, 1) * usable))

    gap = GAP * (boxes[main, 2:] - boxes[main, :2]).max()
    candidates = (amounts > 0.01 * amounts[main]) & ~(at_edge & ~at_edge[main]) & usable
    kept = np.zeros(len(bold), bool)
    kept[main] = True
    while True:
        lows, highs = boxes[kept, :2].min(0), boxes[kept, 2:].max(0)
        apart = np.maximum(boxes[:, :2] - highs, lows - boxes[:, 2:]).max(1)
        near = candidates & (apart <= gap) | kept
        if (near == kept).all():
            break
        kept = near
    num_left = int((~kept & ~other).sum())
    num_large = int((~kept & ~other & (amounts > LARGE * amounts[main])).sum())
    if len(bold) == MAX_PIECES:
        steps.append(TOLD_OF_MANY)
    if num_left > num_large:
        steps.append(f"{count(num_left - num_large, 'speck')} dropped")
    return Found(*cut_out(ink, labels, boxes, np.flatnonzero(kept)), tuple(steps), num_large, int(other.sum()))


def find_other_things(labels: np.ndarray, boxes: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """Which pieces are no digits: a table's edge along a whole side, a punched hole, a frame around a digit.

    Args:
        labels: (H, W) of the pieces, from 1 on.
        boxes: (N, 4) of each: top, left, bottom, right.
        amounts: (N,) of its ink.

    Returns:
        (N,) bool; none of them where there is nothing else that may be a digit.
    """
    num = len(boxes)
    edges, holes, frames = np.zeros((3, num), bool)
    sizes = boxes[:, 2:] - boxes[:, :2]  # (N, 2): height, width
    longest = sizes.max(1)
    for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        edges |= np.bincount(side, minlength=num + 1)[1:] >= 0.9 * len(side)
    if edges.any():
        main = int(np.argmax(amounts * ~edges))  # lies away from the sides, or it is a digit cut out tightly
        is_inside = (boxes[main, :2] > 0).all() and (boxes[main, 2:] < labels.shape).all()
        edges &= bool(is_inside and longest[main] >= 0.1 * min(labels.shape))
    for i in np.flatnonzero((amounts > 0.05 * amounts.max()) & ~edges):
        top, left, bottom, right = boxes[i]
        within = labels[top:bottom, left:right]
        piece = within == i + 1
        if longest[i] < 1.4 * sizes[i].min() and piece.mean() > 0.65:  # a disc fills 0.79 of its box
            holes[i] = 2 * ndimage.distance_transform_edt(np.pad(piece, 1)).max() >= 0.8 * longest[i]
        is_within = (boxes[:, :2] > boxes[i, :2]).all(1) & (boxes[:, 2:] < boxes[i, 2:]).all(1)
        inner = is_within & (sizes[:, 0] > 0.3 * sizes[i, 0]) & (amounts > 0.05 * amounts[i])
        cells = is_within & (sizes[:, 0] > 0.08 * sizes[i, 0]) & (amounts > 0.01 * amounts[i])
        small = is_within & (sizes[:, 0] > 0.02 * sizes[i, 0]) & (amounts > 0.002 * amounts[i])
        if inner.any() or cells.sum() >= NUM_CELLS or small.sum() >= NUM_SMALL_CELLS:
            filled = ndimage.binary_fill_holes(piece)
            enclosed = np.unique(within[filled & ~piece & (within > 0)]) - 1
            # Narrower than a circle, and with round corners: a zero with its stroke inside.
            frames[i] = inner[enclosed].any() and (sizes[i, 0] < 1.3 * sizes[i, 1] or filled.mean() > 0.9)
            # Around several, or a table with them in its cells.
            frames[i] |= cells[enclosed].sum() >= NUM_CELLS or small[enclosed].sum() >= NUM_SMALL_CELLS
    holes &= longest[~(edges | holes | frames)].max(initial=0) >= 0.7 * longest  # else a blot, with specks
    other = edges | holes | frames
    return other & ~other.all()


def measure_pieces(ink: Ink, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every labelled piece the amount of ink, (N,), and top, left, bottom, right, (N, 4), the last two exclusive."""
    where = np.flatnonzero(labels)
    amounts = np.bincount(labels.ravel()[where], ink.values.ravel()[where])[1:]
    return amounts, np.array([(r.start, c.start, r.stop, c.stop) for r, c in ndimage.find_objects(labels)])


def cut_out(ink: Ink, labels: np.ndarray, boxes: np.ndarray, pieces: np.ndarray) -> tuple[np.ndarray, Box]:
    """The ink of some pieces (K,), by their places in ``boxes``, with soft edges, scaled so a stroke's middle is 1."""
    top, left, bottom, right = (int(end) for end in (*boxes[pieces, :2].min(0), *boxes[pieces, 2:].max(0)))
    height, width = labels.shape
    margin = 2 + max(bottom - top, right - left) // 40
    box = (
        slice(max(top - margin, 0), min(bottom + margin, height)),
        slice(max(left - margin, 0), min(right + margin, width)),
    )
    values, within = ink.values[box], labels[box]  # not the whole sheet for each digit on it
    mask = np.isin(within, pieces + 1)
    soft = ndimage.maximum_filter(mask, 2 * margin + 1) & ((within == 0) | mask)
    full = quantile(values[mask], 0.6)
    low = min(ink.floor / 2, full / 4)
    scaled = np.where(soft, (values - low) / (full - low), 0).clip(0, 1)
    return scaled.astype(np.float32), (slice(top, bottom), slice(left, right))


def label_ink(ink: Ink) -> tuple[np.ndarray, np.ndarray]:
    """Number the pieces of ink (H, W) from 1, and say which of them are bold, (N,).

    A piece is above half of Otsu's threshold. A bold one reaches it somewhere; the others, of a fainter pen perhaps,
    are well above the noise and have a tenth of the largest piece's ink or more. Of more than MAX_PIECES, the largest.
    """
    values = ink.values[ink.values > ink.floor]
    edges = np.linspace(0, values.max(), 65)
    counts = np.bincount((values * (64 / edges[-1])).astype(np.intp).clip(max=63), minlength=64)
    below, sums = np.cumsum(counts), np.cumsum(counts * (edges[1:] + edges[:-1]) / 2)
    between = (sums[-1] * below - sums * len(values)) ** 2 / np.maximum(below * (len(values) - below), 1)
    threshold = edges[1 + np.argmax(between)]
    weak = ink.values > max(ink.floor, 0.5 * threshold)
    labels, num = ndimage.label(weak, np.ones((3, 3)))
    is_clear, is_bold = (
        np.bincount(labels[ink.values >= least], minlength=num + 1) > 0 for least in (3 * ink.floor, threshold)
    )
    amounts = np.bincount(labels.ravel(), ink.values.ravel(), num + 1)
    is_piece = is_bold | (is_clear & (amounts > 0.1 * amounts[1:].max(initial=0)))
    is_piece[0] = False
    is_piece[np.argsort(-amounts * is_piece, kind="stable")[MAX_PIECES:]] = False
    numbers = np.where(is_piece, np.cumsum(is_piece), 0)
    return numbers[labels], is_bold[is_piece]


def to_mnist(ink: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Draw ink (h, w) in [0, 1] as (28, 28) uint8: 20 pixels long, strokes of MNIST's width, centred by mass."""
    rows, columns = (np.flatnonzero((ink > 0.1).any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    fine = scale_to(ink, 20 * FINE)
    peak = max(quantile(fine[fine > 0.5 * fine.max()], 0.6), 0.05)  # hairlines fade in shrinking
    ink, fine = ink / peak, (fine / peak).clip(0, 1)
    width = stroke_width(fine) / FINE
    thinnest, thickest = STROKE_RANGE
    steps: tuple[str, ...] = ()
    if width < thinnest:
        radius = math.ceil((thinnest - width) / 2 * FINE)
        fine = np.pad(scale_to(ink, 20 * FINE - 2 * radius), radius)
        fine = ndimage.grey_dilation(fine, footprint=disc(radius))
        steps = ("strokes thickened",)
    elif width > thickest:
        radius = math.ceil((width - thickest) / 2 * FINE)
        fine = scale_to(ndimage.grey_erosion(fine, footprint=disc(radius)), 20 * FINE)
        steps = ("strokes thinned",)
    height, width = (math.ceil(side / FINE) for side in fine.shape)
    fine = np.pad(fine, ((0, height * FINE - fine.shape[0]), (0, width * FINE - fine.shape[1])))
    box = fine.reshape(height, FINE, width, FINE).mean((1, 3))  # (<= 20, <= 20)
    centre = ndimage.center_of_mass(box)
    top, left = (min(max(round(14 - c), 0), 28 - side) for c, side in zip(centre, box.shape, strict=True))
    image = np.zeros((28, 28), np.uint8)
    image[top : top + height, left : left + width] = np.round(255 * box)
    return image, steps


def scale_to(ink: np.ndarray, longest: int) -> np.ndarray:
    """The ink with its longer side ``longest`` pixels and its aspect kept."""
    factor = longest / max(ink.shape)
    size = tuple(max(1, round(side * factor)) for side in reversed(ink.shape))
    how = Image.Resampling.BOX if factor <= 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(ink).resize(size, how)).clip(0, 1)


def stroke_width(ink: np.ndarray) -> float:
    """The strokes' mean width in pixels: across a stroke, the distance to its edge averages a quarter of its width."""
    inside = ink > 0.5
    return (
        float(4 * ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1][inside].mean()) if inside.any() else 0
    )


def disc(radius: int) -> np.ndarray:
    """A disc as a boolean mask, (2 radius + 1) square."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return x * x + y * y <= (radius + 0.5) ** 2
