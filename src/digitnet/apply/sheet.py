"""A picture of a sheet of paper, or of a screen, with something around it -> the sheet alone."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from digitnet.apply.ink import Invert

MIN_SIDE = 96  # of a picture that is looked at: a smaller one is a digit cut out
SIDE = 160  # of the picture in which a sheet is looked for
STEP = 60  # grey levels between a sheet and what is around it, at least
THICKEST = 0.15  # of a sheet's shorter side: no writing on it is as thick; the hole of a thick 0 is
LEAST_MARGIN = 0.07  # of the longer side: ink that comes nearer to all four sides was cut out tightly
SHARES = (0.2, 0.75)  # of a picture: how much of it such a digit's ink is
STROKES = (0.06, 0.4)  # of the longer side: how thick a digit's strokes are; those of a ruled sheet are thinner
EVENNESS = 16  # grey levels that a bar varies by, at most


def cut_to_sheet(picture: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Cut away the bars that telephones put around pictures, or else the table that a sheet lies on.

    Args:
        picture: in mode "L" or "RGB".

    Returns:
        The sheet and, in words, what was cut away. A picture without any such thing comes back as it is.
    """
    factor = math.ceil(max(picture.size) / SIDE)
    if min(picture.size) < max(MIN_SIDE, 8 * factor):
        return picture, ()
    grey = np.asarray(picture.reduce(factor).convert("L"), np.int16)
    if box := find_between_bars(grey):
        return crop(picture, box, factor), ("bars cut away",)
    sheet = find_sheet(grey)
    if sheet is None:
        return picture, ()
    inside = ndimage.binary_erosion(sheet, iterations=2)
    rows, columns = ndimage.find_objects(inside.astype(np.uint8))[0]
    box = (columns.start, rows.start, columns.stop, rows.stop)
    paper = np.median(np.asarray(picture.reduce(factor))[inside], axis=0)
    beside = Image.new(picture.mode, picture.size, tuple(np.atleast_1d(paper).round().astype(int).tolist()))
    mask = Image.fromarray(inside).resize((grey.shape[1] * factor, grey.shape[0] * factor), Image.Resampling.NEAREST)
    whole = Image.composite(picture, beside, mask.crop((0, 0, *picture.size)))
    return crop(whole, box, factor), ("table cut away",)


def add_margin(picture: Image.Image, invert: Invert = "auto") -> tuple[Image.Image, tuple[str, ...]]:
    """Put paper around a digit that was cut out along its ink, by which paper and ink could not be told apart.

    Args:
        picture: in mode "L" or "RGB".
        invert: "yes": the ink is darker than the paper; "no": it is brighter; "auto": the paper holds most
            corners or, where it holds two, is the larger part.

    Returns:
        The picture with a margin and, in words, what was done. One that has a margin comes back as it is.
    """
    factor = math.ceil(max(picture.size) / SIDE)
    small = picture.reduce(factor)
    grey = np.asarray(small.convert("L"), np.float32)
    low, high = np.percentile(grey, (5, 95))
    if high - low < STEP:
        return picture, ()
    is_dark = grey < (low + high) / 2
    longest = max(grey.shape)
    edge = max(2, math.ceil(LEAST_MARGIN * longest))
    ends = (slice(edge), slice(-edge, None))
    corners = [is_dark[rows, columns].mean() > 0.5 for rows in ends for columns in ends]
    if invert == "auto":
        is_ink_dark = sum(corners) < 2 or (sum(corners) == 2 and is_dark.mean() < 0.5)
    else:
        is_ink_dark = invert == "yes"
    ink = is_dark if is_ink_dark else ~is_dark
    at_edges = [side.any() for end in ends for side in (ink[end], ink[:, end])]
    least, most = SHARES
    if not (all(at_edges) and least < ink.mean() < most):
        return picture, ()
    boldest = np.percentile(grey[ink], 2 if is_ink_dark else 98)
    if abs(boldest - np.median(grey[ink])) > 0.3 * (high - low):  # a shadow, with ink in it
        return picture, ()
    thinnest, thickest = STROKES
    if not thinnest < 2 * ndimage.distance_transform_edt(ink).max() / longest < thickest:
        return picture, ()
    paper = np.atleast_1d(np.median(np.asarray(small)[~ink], axis=0)).round().astype(int).tolist()
    wider = ImageOps.expand(picture, max(picture.size) // 4, tuple(paper) if len(paper) > 1 else paper[0])
    return wider, ("margin added",)


def crop(picture: Image.Image, box: tuple[int, int, int, int], factor: int) -> Image.Image:
    """What a box (left, top, right, bottom) of the reduced picture holds of the picture."""
    left, top, right, bottom = (factor * edge for edge in box)
    return picture.crop((left, top, min(right, picture.width), min(bottom, picture.height)))


def find_between_bars(grey: np.ndarray) -> tuple[int, int, int, int] | None:
    """The box (left, top, right, bottom) between two even bars along opposite sides of a picture (H, W), if any.

    All of what begins behind a bar is of another tone: between blank margins, a digit begins in the middle.
    """
    height, width = grey.shape
    for image, is_turned in ((grey, False), (grey.T, True)):
        length = len(image)
        lows, highs = image.min(1), image.max(1)
        ends = []
        for order in (slice(None), slice(None, None, -1)):
            low, high = lows[order], highs[order]
            is_bar = (high - low <= EVENNESS) & (np.abs(low - low[0]) <= EVENNESS)
            end = length if is_bar.all() else int(np.argmin(is_bar)) + 1  # the row that has some of both is cut, too
            behind = image[order][end : end + math.ceil(0.05 * length)]  # more than a ruled line
            is_other = np.abs(behind - np.median(image[order][0])) > STEP
            ends.append(end if 0.04 * length <= end < length and is_other.mean() > 0.95 else 0)
        start, stop = ends[0], length - ends[1]
        if all(ends) and sum(ends) < 0.7 * length and np.ptp(image[start:stop]) > STEP:  # there is ink
            return (start, 0, stop, height) if is_turned else (0, start, width, stop)
    return None


def find_sheet(grey: np.ndarray) -> np.ndarray | None:
    """Where in a picture (H, W) a sheet lies that is written on and away from the picture's sides: bool, if any."""
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    table = np.median(border)
    if np.abs(border - table).mean() > 20:
        return None
    for of_other_tone in (grey > table + STEP, grey < table - STEP):
        labels, num = ndimage.label(of_other_tone)
        if not num:
            continue
        largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
        sheet = ndimage.binary_fill_holes(largest)
        writing = sheet & ~of_other_tone  # without the paper in a loop
        if sheet.mean() < 0.12 or not 0.002 <= writing.sum() / sheet.sum() <= 0.3 or not is_rectangle(sheet):
            continue
        shorter = min(np.ptp(np.flatnonzero(sheet.any(axis))) + 1 for axis in (0, 1))
        if 2 * ndimage.distance_transform_edt(writing).max() <= THICKEST * shorter:
            return sheet
    return None


def is_rectangle(region: np.ndarray) -> bool:
    """Whether a region (H, W) bool fills most of the smallest rectangle around it, whichever way that is turned."""
    from scipy.spatial import ConvexHull  # takes a while that most pictures need not wait for

    points = np.argwhere(region)
    corners = points[ConvexHull(points).vertices]
    along = np.roll(corners, -1, axis=0) - corners
    # One of the rectangle's sides lies along one of the hull's.
    along = along / np.linalg.norm(along, axis=1, keepdims=True)  # (K, 2)
    across = along[:, ::-1] * [1, -1]
    areas = (np.ptp(corners @ along.T, axis=0) + 1) * (np.ptp(corners @ across.T, axis=0) + 1)
    return bool(len(points) >= 0.85 * areas.min())
