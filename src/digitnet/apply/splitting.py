"""A sheet with several digits -> each of them as MNIST would have it, in reading order."""

from __future__ import annotations

import statistics

import numpy as np
from PIL import Image
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from digitnet.apply.imaging import (
    LARGE,
    MAX_PIECES,
    NUM_CELLS,
    TOLD_OF_MANY,
    Box,
    Digit28,
    cut_out,
    find_other_things,
    label_ink,
    measure_pieces,
    to_mnist,
    to_side,
)
from digitnet.apply.ink import Ink, Invert, count, find_ink, find_lines
from digitnet.apply.opening import SHEET_SIDE, flatten
from digitnet.apply.sheet import cut_to_sheet

SMALLEST = 8  # pixels of a sheet at SHEET_SIDE: no digit on it is smaller
BLOT = 20  # times the ink of a usual piece
SMALL = 0.55  # of the digits' height: a lower piece may be one of a broken digit
CROWD = 3  # times as many: then the smaller ones are the digits
JUMP = 0.7  # of the digits' height: two lines lie further apart


def split_digits(picture: Image.Image, invert: Invert = "auto") -> list[Digit28]:
    """Find the digits on a sheet, in reading order: line by line, from left to right.

    Args:
        picture: any size and mode.
        invert: as for ``normalize``.

    Returns:
        The digits, each with its line; none on a blank sheet.
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
    lines = enumerate(to_lines(found), start=1)
    return [digit._replace(line=number) for number, line in lines for _, digit in line]


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
        thickest = max(bridge_down, bridge_right) - 3  # twice a line, and a little: a bridge spans that and more
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
        perimeter = 2 * sum(cell.shape)  # lines may be uneven by a pixel all along
        if min(cell.shape) >= 2 * SMALLEST and hull_area(cell) - cell.sum() > perimeter:
            return True
    return False


def hull_area(region: np.ndarray) -> float:
    """How many pixels the convex hull of a region (H, W) bool has."""
    from scipy.spatial import ConvexHull  # takes a while that most pictures need not wait for

    rows = np.flatnonzero(region.any(1))
    starts, ends = region[rows].argmax(1), region.shape[1] - region[rows, ::-1].argmax(1)
    corners = np.concatenate([np.column_stack([rows + down, side]) for down in (0, 1) for side in (starts, ends)])
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
    usual = find_usual_height(boxes[whole])
    one, other = find_joins(boxes, whole, usual).T
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


def find_joins(boxes: np.ndarray, whole: np.ndarray, usual: float) -> np.ndarray:
    """Which small piece (N, 4) belongs to the same digit as which other piece, or to none but itself: (P, 2) places.

    Args:
        boxes: (N, 4) of each piece: top, left, bottom, right.
        whole: (N,) bool, those that are looked at.
        usual: how high a digit is.
    """
    heights, widths = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    is_small = heights < SMALL * usual
    pairs: list[np.ndarray] = [np.zeros((0, 2), int)]
    for i in np.flatnonzero(whole & is_small).tolist():  # piece by piece: there may be thousands of either
        gaps, is_over = measure_gaps(boxes, i)
        # As high as a digit together, or the one far smaller: small digits in a line under larger ones are neither.
        together = np.maximum(boxes[i, 2], boxes[:, 2]) - np.minimum(boxes[i, 0], boxes[:, 0])  # (N,)
        is_usual = together < 1.1 * usual
        digit = np.where(is_usual, together, np.maximum(heights[i], heights))
        reach = np.where(is_usual, np.inf, 0.5 * max(heights[i], widths[i]))
        stacked = is_over & (gaps[:, 0] < np.minimum(0.25 * digit, reach))
        against = gaps.max(1) < 0.1 * digit
        others = np.flatnonzero((stacked | against) & whole)
        large = others[~is_small[others]]
        if len(large) > 1:  # two digits: it is a piece of the nearer one or, as the bar of a fraction, of neither
            near, next_near = np.argsort(gaps[large].max(1), kind="stable")[:2]
            apart = gaps[large].max(1)[[near, next_near]]
            is_between = stacked[large[[near, next_near]]].all() and apart[1] < 2 * apart[0]
            others = np.setdiff1d(others, large if is_between else np.delete(large, near))
        if heights[i] < 0.2 * usual and widths[i] > 0.8 * usual:  # a line to write on, no part of what is above it
            others = others[boxes[others, 0] >= boxes[i, 0]]
        pairs.append(np.column_stack([np.full_like(others, i), others]))
    return np.concatenate(pairs)


def find_usual_height(boxes: np.ndarray) -> float:
    """How high the digits are of which these (N, 4) are pieces, the few far higher ones, as a headline, left out."""
    while True:
        heights = boxes[:, 2] - boxes[:, 0]
        usual = float(np.median(heights[heights >= 0.5 * heights.max()]))
        is_small = heights < SMALL * usual
        crowd, least = boxes[is_small & (heights >= 0.25 * usual)], CROWD * (~is_small).sum()
        if len(crowd) < least or (~find_stacked(crowd)).sum() < least:
            return usual
        boxes = boxes[is_small]


def find_stacked(boxes: np.ndarray) -> np.ndarray:
    """Which pieces (N, 4) lie so close over or under another that they are parts of one digit: (N,) bool."""
    heights = boxes[:, 2] - boxes[:, 0]
    stacked = np.zeros(len(boxes), bool)
    for i in range(len(boxes)):
        gaps, is_over = measure_gaps(boxes, i)
        is_over[i] = False
        stacked[i] = (is_over & (gaps[:, 0] < 0.2 * np.maximum(heights[i], heights))).any()
    return stacked


def measure_gaps(boxes: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
    """How far the pieces (N, 4) lie from one of them, and which lie over or under it.

    Returns:
        Gaps (N, 2) down and across, less than 0 where two overlap; and (N,) bool.
    """
    gaps = np.maximum(boxes[i, :2], boxes[:, :2]) - np.minimum(boxes[i, 2:], boxes[:, 2:])
    widths = boxes[:, 3] - boxes[:, 1]
    return gaps, -gaps[:, 1] > 0.5 * np.minimum(widths[i], widths)


def to_lines(found: list[tuple[Box, Digit28]]) -> list[list[tuple[Box, Digit28]]]:
    """The lines of a sheet, from the top down; in each, what is found from left to right.

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
    return whole


def overlap(a: slice, b: slice) -> float:
    """What two stretches share, as a share of the shorter one; less than 0 where they lie apart."""
    return (min(a.stop, b.stop) - max(a.start, b.start)) / min(a.stop - a.start, b.stop - b.start)
