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
import statistics
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from digitnet.apply.ink import Ink, Invert, count, find_ink, find_lines, quantile
from digitnet.apply.opening import SHEET_SIDE, flatten
from digitnet.apply.sheet import add_margin, cut_to_sheet

Box = tuple[slice, slice]

WORK_SIDE = 384  # a digit is looked for at this size
MIN_SIDE = 96  # what is smaller is enlarged first
SMALLEST = 8  # pixels of a sheet so large: no digit on it is smaller
LARGE = 0.3  # of the digit's ink: a piece with more of it is no speck
MAX_PIECES = 4_000  # of ink are looked at, the largest; a sheet has room for some 3,000 digits
TOLD_OF_MANY = f"only the {MAX_PIECES:,} largest pieces looked at"
NUM_CELLS, NUM_SMALL_CELLS = 3, 12  # pieces that a frame encloses, and no digit does
BLOT = 20  # times the ink of a usual piece
JUMP = 0.7  # of the digits' height: two lines lie further apart
GAP = 0.15  # of the digit: strokes of one digit are not further apart
FINE = 4  # strokes are measured and changed at this many times MNIST's resolution
STROKE_RANGE = (2.1, 4.4)  # pixels of 28; thinner is thickened to the first, thicker thinned to the second


class Digit28(NamedTuple):
    """A digit as the network wants it.

    Attributes:
        image: (28, 28) uint8 in [0, 255]; ink is bright, paper is 0.
        steps: what was done to the picture, in words for people: "turned by EXIF", "inverted", "2 specks dropped".
    """

    image: np.ndarray
    steps: tuple[str, ...]


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


def split_digits(picture: Image.Image, invert: Invert = "auto") -> list[Digit28]:
    """Find the digits on a sheet, in reading order: line by line, from left to right.

    Args:
        picture: any size and mode.
        invert: as for ``normalize``.

    Returns:
        The digits; none on a blank sheet.
    """
    flat, sheet_steps = cut_to_sheet(flatten(picture))
    if max(flat.size) > SHEET_SIDE:  # not by a whole factor, which could halve what little there is of small digits
        scale = SHEET_SIDE / max(flat.size)
        size = (max(1, round(flat.width * scale)), max(1, round(flat.height * scale)))
        flat = flat.resize(size, Image.Resampling.BOX)
    ink = find_ink(to_side(flat, SHEET_SIDE)[0], invert)
    if ink is None:
        return []
    (labels, bold), steps = label_ink(ink), (*picture.info.get("steps", ()), *sheet_steps, *ink.steps)
    if not len(bold):
        return []
    if len(bold) == MAX_PIECES:
        steps = (*steps, TOLD_OF_MANY)
    amounts, boxes = measure_pieces(ink, labels)
    other = find_other_things(labels, boxes, amounts)
    freed = without_frames(ink, labels, boxes, other)
    if freed is not None:
        ink, steps = freed, (*steps, "frame dropped")
        labels, bold = label_ink(ink)
        if not len(bold):
            return []
        amounts, boxes = measure_pieces(ink, labels)
        other = find_other_things(labels, boxes, amounts)
    at_edge = (boxes[:, :2] == 0).any(1) | (boxes[:, 2:] == labels.shape).any(1)
    other |= find_blots(labels, boxes, amounts, ~(at_edge | other))
    other |= find_bars(boxes, (amounts > 0.02 * amounts[~other].max()) & ~other)
    if other.any():
        steps = (*steps, f"{count(int(other.sum()), 'other thing')} dropped")
    left_out = at_edge | other
    whole = (amounts > 0.02 * amounts[~left_out].max(initial=0)) & ~left_out
    if not whole.any():
        whole = amounts > 0.02 * amounts.max()
    num_large = int((at_edge & ~other & ~whole & (amounts > LARGE * amounts[whole].max())).sum())
    if num_large:
        steps = (*steps, f"{count(num_large, 'large piece')} at the edge left out")
    groups, num_small = digit_groups(boxes, whole)
    if num_small:
        steps = (*steps, f"{count(num_small, 'small piece')} left out")
    found = []
    for group in groups:
        drawn, box = cut_out(ink, labels, boxes, group)
        image, width_step = to_mnist(drawn)
        found.append((box, Digit28(image, (*steps, *width_step))))
    return [digit for _, digit in reading_order(found)]


def without_frames(ink: Ink, labels: np.ndarray, boxes: np.ndarray, other: np.ndarray) -> Ink | None:
    """Take away the lines of frames that digits touch; strokes that cross them stay whole. None where there is none.

    Args:
        ink: of the sheet, (H, W).
        labels: (H, W) of its pieces, from 1 on.
        boxes: (N, 4) of each: top, left, bottom, right.
        other: (N,) bool, those that are no digits.
    """
    values = ink.values.copy()
    heights = boxes[:, 2] - boxes[:, 0]
    is_changed = False
    for i in np.flatnonzero(other | (heights > 1.2 * np.median(heights))):
        top, left, bottom, right = boxes[i]
        piece = labels[top:bottom, left:right] == i + 1
        across, bridge_down, num_across = find_lines(piece)
        if num_across < 2:
            continue
        rows = np.flatnonzero(across.any(1))
        frame = slice(rows[0], rows[-1] + 1)  # without what sticks out of it
        down, bridge_right, num_down = find_lines(piece[frame].T)
        if num_down < 2:
            continue
        if not is_touched(piece):
            continue
        lines = across.copy()
        lines[frame] |= down.T
        thickest = max(bridge_down, bridge_right) - 3  # nearly twice that of a line
        parts, _ = ndimage.label(piece & ~lines, np.ones((3, 3)))
        for part, place in enumerate(ndimage.find_objects(parts), start=1):
            if min(side.stop - side.start for side in place) <= thickest:  # what is left of a line
                lines[place] |= parts[place] == part
        rest = piece & ~lines
        for axis, bridge in ((0, bridge_down), (1, bridge_right)):
            reached = ndimage.maximum_filter1d(rest.view(np.uint8), bridge, axis)
            lines &= ndimage.minimum_filter1d(reached, bridge, axis) == 0
        values[top:bottom, left:right][lines] = 0
        is_changed = True
    return ink._replace(values=values) if is_changed and (values > ink.floor).any() else None


def is_touched(frame: np.ndarray) -> bool:
    """Whether something reaches into a cell of a frame (H, W) bool: the empty cell is then no convex figure."""
    cells, _ = ndimage.label(ndimage.binary_fill_holes(frame) & ~frame)
    for number, place in enumerate(ndimage.find_objects(cells), start=1):
        cell = ndimage.binary_fill_holes(cells[place] == number)
        if min(cell.shape) >= 2 * SMALLEST and hull_area(cell) - cell.sum() > 2 * sum(cell.shape):  # uneven lines
            return True
    return False


def hull_area(region: np.ndarray) -> float:
    """How many pixels the convex hull of a region (H, W) bool has."""
    from scipy.spatial import ConvexHull  # takes a while that most pictures need not wait for

    corners = (np.argwhere(region)[:, None] + [(0, 0), (0, 1), (1, 0), (1, 1)]).reshape(-1, 2)
    return float(ConvexHull(corners).volume)  # in a plane, the area


def find_blots(labels: np.ndarray, boxes: np.ndarray, amounts: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Which pieces are far larger than several others and convex, nearly: a blot, a pen on the paper. (N,) bool.

    Args:
        labels: (H, W) of the pieces, from 1 on.
        boxes: (N, 4) of each: top, left, bottom, right.
        amounts: (N,) of its ink.
        candidates: (N,) bool, those that are looked at.
    """
    sizes = boxes[:, 2:] - boxes[:, :2]
    blots = np.zeros(len(boxes), bool)
    others = candidates & (sizes.max(1) >= 2 * SMALLEST)  # the rest are specks
    if others.sum() <= NUM_CELLS:
        return blots
    for i in np.flatnonzero(candidates & (amounts > BLOT * np.median(amounts[others]))):
        top, left, bottom, right = boxes[i]
        piece = labels[top:bottom, left:right] == i + 1
        blots[i] = piece.sum() > 0.7 * hull_area(piece)
    return blots


def find_bars(boxes: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Which pieces (N, 4) are straight strokes far longer than the others are high, as between columns: (N,) bool."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    longest, heights = sizes.max(1), sizes[:, 0]
    bars = np.zeros(len(boxes), bool)
    for i in np.flatnonzero(candidates & (longest > 8 * sizes.min(1))):
        others = candidates & (heights > 0.1 * longest[i])
        others[i] = False
        bars[i] = others.sum() >= NUM_CELLS and longest[i] > 3 * np.median(heights[others])
    return bars


def digit_groups(boxes: np.ndarray, whole: np.ndarray) -> tuple[list[np.ndarray], int]:
    """Which pieces (N, 4) form a digit together, a small one joining what it lies over, under or against.

    Returns:
        Of each digit its pieces' places (K,); and how many are left out as they are far smaller than the others, but no
        specks.
    """
    heights, widths = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    usual = np.median(heights[whole][heights[whole] >= 0.5 * heights[whole].max()])
    pairs: list[np.ndarray] = [np.zeros((0, 2), int)]
    for i in np.flatnonzero(whole & (heights < 0.55 * usual)):  # piece by piece: there may be thousands of either
        gaps = np.maximum(boxes[i, :2], boxes[:, :2]) - np.minimum(boxes[i, 2:], boxes[:, 2:])  # (N, 2), overlap < 0
        stacked = (-gaps[:, 1] > 0.5 * np.minimum(widths[i], widths)) & (gaps[:, 0] < 0.25 * usual)
        against = gaps.max(1) < 0.1 * usual
        others = np.flatnonzero((stacked | against) & whole)
        pairs.append(np.column_stack([np.full_like(others, i), others]))
    one, other = np.concatenate(pairs).T
    joined = sparse.coo_array((np.ones(len(one)), (one, other)), shape=(len(boxes), len(boxes)))
    _, groups = csgraph.connected_components(joined, directed=False)
    order = np.flatnonzero(whole)[np.argsort(groups[whole], kind="stable")]
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    lows = np.array([boxes[m, :2].min(0) for m in members])  # (M, 2): top, left
    highs = np.array([boxes[m, 2:].max(0) for m in members])  # (M, 2): bottom, right
    sizes = highs - lows
    is_digit, is_speck = sizes[:, 0] >= 0.3 * usual, sizes.max(1) < SMALLEST
    for i in np.flatnonzero(is_digit & (sizes[:, 0] < 0.5 * usual)):  # a comma hangs beside the foot of a digit
        near = np.maximum(lows[i, 1], lows[:, 1]) - np.minimum(highs[i, 1], highs[:, 1]) < 0.5 * usual
        beside = near & (lows[i, 0] > (lows + highs)[:, 0] / 2) & (lows[i, 0] < highs[:, 0])
        hangs = highs[i, 0] > highs[:, 0] + 0.1 * usual
        is_digit[i] = not (beside & hangs & (sizes[:, 0] >= 0.5 * usual)).any()
    digits = [m for m, found in zip(members, is_digit & ~is_speck, strict=True) if found]
    return digits, int((~is_digit & ~is_speck).sum())


def reading_order(found: list[tuple[Box, Digit28]]) -> list[tuple[Box, Digit28]]:
    """Line by line, from left to right.

    A line goes on with what overlaps its last digit by half the smaller height. Two lines are one that jumps where none
    of it lies above or below another part, and their middles are as near as no two lines' are.
    """
    lines: list[list[tuple[Box, Digit28]]] = []
    for one in sorted(found, key=lambda one: one[0][1].start):
        overlaps = [overlap(line[-1][0][0], one[0][0]) for line in lines]
        if max(overlaps, default=0) >= 0.5:
            lines[int(np.argmax(overlaps))].append(one)
        else:
            lines.append([one])

    def middle(line: list[tuple[Box, Digit28]]) -> float:
        return statistics.fmean((rows.start + rows.stop) / 2 for (rows, _), _ in line)

    lines.sort(key=middle)
    usual = statistics.median([rows.stop - rows.start for (rows, _), _ in found] or [0])
    whole: list[list[tuple[Box, Digit28]]] = []
    for line in lines:
        before = whole[-1] if whole else []
        is_near = bool(before) and middle(line) - middle(before) < JUMP * usual
        if is_near and not any(overlap(one[0][1], other[0][1]) > 0 for one in line for other in before):
            whole[-1] = sorted(before + line, key=lambda one: one[0][1].start)
        else:
            whole.append(line)
    return [one for line in whole for one in line]


def overlap(a: slice, b: slice) -> float:
    """What two stretches share, as a share of the shorter one; less than 0 where they lie apart."""
    return (min(a.stop, b.stop) - max(a.start, b.start)) / min(a.stop - a.start, b.stop - b.start)
