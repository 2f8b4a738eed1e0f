"""A picture -> its ink alone: without paper, shading, shadows and ruled lines."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

Invert = Literal["auto", "yes", "no"]

WINDOW = 0.35  # of a picture's shorter side; no stroke is that wide
NEAR = 0.12  # of a picture's shorter side: so near, the edge of a shadow differs little, and ink much
MIN_CONTRAST = 12  # grey levels; less is paper
MIN_SHARE = 0.3  # of how much the shading varies; ink that is fainter everywhere is shading


class Ink(NamedTuple):
    """How much each pixel differs from the paper around it: (H, W) float32 in [0, 255]; noise lies below ``floor``."""

    values: np.ndarray
    floor: float
    steps: tuple[str, ...]


def find_ink(picture: Image.Image, invert: Invert) -> Ink | None:
    """Take away the paper, its shading and its shadows; None when nothing else is there."""
    pixels = np.asarray(picture, np.float32).reshape(picture.height, picture.width, -1)
    shrink = math.ceil(max(picture.size) / 80)
    small = np.asarray(picture.reduce(shrink), np.float32)
    small = small.reshape(*small.shape[:2], -1)
    if small.shape[2] == 3 and np.abs(small - small[..., [1, 2, 0]]).max() > 8:  # coloured
        # Take the channel that shows the ink best.
        grey = np.array([0.299, 0.587, 0.114], np.float32)
        mixes = [grey, *np.eye(3, dtype=np.float32)]
        fits = [fit_paper(small @ mix) for mix in mixes]
        contrasts = [max(fit.dark, fit.bright) * (1 if i else 1.5) for i, fit in enumerate(fits)]  # grey has less noise
        best = int(np.argmax(contrasts))
        fit, small, pixels = fits[best], small @ mixes[best], pixels @ mixes[best]
    else:
        small, pixels = small[..., 0], pixels[..., 0]
        fit = fit_paper(small)
    dark = is_dark(small, fit) if invert == "auto" else invert == "yes"
    steps = ["inverted"] if dark else []

    light = pixels if dark else 255 - pixels  # ink is the darker in it
    level = fit.level if dark else 255 - fit.level
    coarse, size = light, round(WINDOW * min(light.shape))
    if max(light.shape) > 160:
        coarse, size = resize(light, (max(1, light.shape[0] // 2), max(1, light.shape[1] // 2))), size // 2
    # Only what is wider than the window is a shadow; and no shadow is as dark as ink that runs along the edge.
    half = size // 2
    padded = np.pad(np.maximum(coarse, 0.45 * level), half, mode="edge")  # shadows go on outside
    closed = ndimage.grey_closing(padded, (2 * half + 1, 2 * half + 1), mode="nearest")
    closed = closed[half : half + coarse.shape[0], half : half + coarse.shape[1]]
    paper = resize(closed, light.shape)
    values = (paper - light) * (level / np.maximum(paper, 1)).clip(0.5, 3)  # as black in the shadow as in the light
    values -= quantile(values, 0.5)
    noise = 1.4826 * quantile(np.abs(values), 0.5)
    floor = max(MIN_CONTRAST, 4 * noise)
    shading = float(np.ptp(closed))
    if shading > 16:
        steps.append("shading removed")
    ink = without_lines(Ink(values.clip(0, 255), floor, tuple(steps)))
    return ink if ink.values.max() > max(floor, MIN_SHARE * shading) else None


def is_dark(image: np.ndarray, fit: Paper) -> bool:
    """Whether the paper is dark, and the ink on it bright: it is what differs further, and has more room to differ.

    Args:
        image: (H, W) float32.
        fit: of the image.
    """
    below, above = fit.dark, fit.bright
    if min(below, above) > MIN_CONTRAST:  # the edge of a shadow, perhaps, to which no even shading fits
        window = max(1, round(NEAR * min(image.shape)))
        near = measure_contrasts(image - ndimage.median_filter(image, window, mode="nearest"))
        nearer = min(below, near[0]), min(above, near[1])
        if max(nearer) > MIN_CONTRAST:  # else strokes are wider than the window
            below, above = nearer
    return below * fit.level > above * (255 - fit.level)


class Paper(NamedTuple):
    """The paper's middle level, and how far the few pixels that differ most lie below and above the paper."""

    level: float
    dark: float
    bright: float


def fit_paper(image: np.ndarray) -> Paper:
    """Fit a quadratic surface, evenly shaded paper, to what most pixels are, starting from the border's median."""
    terms = quadratic_terms(*image.shape)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    flat = image.ravel().astype(np.float64)
    fitted = np.full_like(flat, quantile(border, 0.5))
    for _ in range(3):  # least squares, with ever less weight on ink
        distance = np.abs(flat - fitted)
        weighted = terms / (1 + (distance / (2 * quantile(distance, 0.5) + 4)) ** 2)
        fitted = np.linalg.solve(weighted @ terms.T + 1e-3 * np.eye(6), weighted @ flat) @ terms
    return Paper(quantile(fitted, 0.5), *measure_contrasts(flat - fitted))


def measure_contrasts(rest: np.ndarray) -> tuple[float, float]:
    """How far the few pixels that differ most from the paper, by what is left without it, lie below and above it."""
    few = max(1, min(16, rest.size // 50))
    ordered = np.partition(rest, (few, -few), axis=None)
    return -float(ordered[:few].mean()), float(ordered[-few:].mean())


@lru_cache(maxsize=8)
def quadratic_terms(height: int, width: int) -> np.ndarray:
    """1, x, y, x^2, xy and y^2 of every pixel, x and y in [-1, 1]: (6, height * width) float64."""
    y, x = (np.linspace(-1, 1, side) ** np.arange(3)[:, None] for side in (height, width))  # (3, side): 1, x, x^2
    return (y[[0, 0, 1, 0, 1, 2], :, None] * x[[0, 1, 0, 2, 1, 0], None]).reshape(6, -1)


def quantile(values: np.ndarray, share: float) -> float:
    """What ``np.quantile`` gives, without its preparations: they take longer than a small picture's pixels."""
    position = share * (values.size - 1)
    low = int(position)
    high = min(low + 1, values.size - 1)
    ordered = np.partition(values, (low, high), axis=None)
    return float(ordered[low] + (position - low) * (ordered[high] - ordered[low]))


def resize(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An image (h, w) float32 at another shape, bilinear, anti-aliased when it shrinks."""
    size = (shape[1], shape[0])
    return np.asarray(Image.fromarray(image.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))


def without_lines(ink: Ink) -> Ink:
    """Take away ruled lines: thin, straight, from edge to edge; strokes that cross them stay whole."""
    values, total = ink.values, 0
    inked = values > ink.floor
    ways = [turned for turned in (False, True) if spans(inked.T if turned else inked)]
    others = inked.copy()  # than lines, whichever way these run; three may be strokes of a digit cut out tightly
    for turned in ways:
        band, _, num = find_lines(inked.T if turned else inked)
        if num >= 4:
            others &= ~(band.T if turned else band)
    for turned in ways:
        image = values.T if turned else values
        mask = image > ink.floor
        band, bridge, num = find_lines(mask)
        rest = mask & ~band
        digit = (others.T if turned else others) & ~band
        if not num or not digit.any():
            continue
        tone = np.percentile(image[band & mask], 75)
        reaches_edge = digit[[0, -1]].any() or digit[:, [0, -1]].any()
        if reaches_edge and tone > 0.7 * np.percentile(image[digit], 75):
            continue  # as black as the rest, which reaches the edge as well: a digit cut out tightly
        crossing = ndimage.minimum_filter1d(ndimage.maximum_filter1d(rest.view(np.uint8), bridge, 0), bridge, 0) > 0
        line = band & ~crossing & (image < 1.5 * tone)  # a stroke along it is blacker
        image = np.where(line, 0, image)
        values, total = (image.T if turned else image), total + num
    steps = (f"{count(total, 'ruled line')} dropped",) if total else ()
    return ink._replace(values=values, steps=ink.steps + steps)


def spans(mask: np.ndarray) -> bool:
    """Whether something lies at the left edge and at the right one, as of a ruled line it must."""
    return bool(mask[:, :4].any() and mask[:, -4:].any())


def find_lines(mask: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Thin lines from the left edge to the right: where they are, how high a gap they leave, and how many they are."""
    height, width = mask.shape
    length = max(width // 10, 8)
    runs = ndimage.maximum_filter1d(ndimage.minimum_filter1d(mask.view(np.uint8), length), length)
    labels, _ = ndimage.label(ndimage.maximum_filter(runs, (3, length)))
    band, bridge, num = np.zeros_like(mask), 0, 0
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        if columns.stop - columns.start < 0.95 * width:
            continue
        part = (labels[rows] == label) & (runs[rows] > 0)
        thickness = part.sum(0)
        usual = float(np.median(thickness))
        if 0 < usual <= 0.04 * height:
            band[rows] |= part & (thickness <= 1.6 * usual + 1)
            bridge, num = max(bridge, 2 * int(usual) + 5), num + 1
    return ndimage.maximum_filter1d(band.view(np.uint8), 3, 0).view(bool), bridge, num


def count(number: int, what: str) -> str:
    """ "1 speck", "2 specks"."""
    return f"{number} {what}{'' if number == 1 else 's'}"
