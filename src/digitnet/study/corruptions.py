"""The 15 corruptions of MNIST-C, made anew: digits as noise, weather, a shaken hand or a crossing line leave them.

Source: Mu and Gilmer, "MNIST-C: A Robustness Benchmark for Computer Vision", arXiv:1906.02337, and the parameters its
authors published with it; each is used at the one severity of five that they chose. Images are (N, 28, 28), floating
point in [0, 1], bright ink on 0, and every image has its own random draws. Differs from the published files: other
draws, rounding to the nearest level, and for the motion blur NumPy where they used ImageMagick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

Array = np.ndarray
SIDE = 28
CENTRE = (SIDE - 1) / 2
FOG_SIDE = 256  # of the cloud that a picture's fog is a corner of; a power of two
CHUNK = 250  # images at once: a cloud is 0.5 MB


class Corruption(NamedTuple):
    """One way of spoiling images."""

    function: Callable[[Array, np.random.Generator], Array]  # (N, 28, 28) in [0, 1] to the same
    severity: int | None  # of the five published ones; None where there is only one
    description: str  # what that severity means


def corrupt(images: Array, name: str, seed: int) -> Array:
    """Spoil digits in one of the ways of ``CORRUPTIONS``.

    Args:
        images: (N, 28, 28) uint8, bright ink on 0.
        name: which way.
        seed: of the draws; the same seed gives the same images in whole chunks of 250, however many others follow.

    Returns:
        (N, 28, 28) uint8.

    Raises:
        ValueError: there is no such corruption, or canny_edges lacks scikit-image.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"no corruption {name!r}; there are {', '.join(CORRUPTIONS)}")
    spoiled = [
        CORRUPTIONS[name].function(images[start : start + CHUNK] / 255.0, np.random.default_rng([seed, start]))
        for start in range(0, len(images), CHUNK)
    ]
    levels = np.concatenate(spoiled) if spoiled else np.zeros(images.shape)
    rounded: Array = (np.clip(levels, 0, 1) * 255).round().astype(np.uint8)
    return rounded


# --- noise and blur ---------------------------------------------------------------------------------------------------


def shot_noise(images: Array, rng: np.random.Generator) -> Array:
    """Few photons: a Poisson count of 3 on average where the ink is full."""
    return rng.poisson(images * 3) / 3


def impulse_noise(images: Array, rng: np.random.Generator) -> Array:
    """Salt and pepper: 17 % of the pixels black or white."""
    salt = rng.random(images.shape) < 0.5
    return np.where(rng.random(images.shape) < 0.17, salt, images)


def glass_blur(images: Array, rng: np.random.Generator) -> Array:
    """Frosted glass: blurred, neighbouring pixels exchanged at random, blurred again."""
    spoiled = _blur(images, 0.7)
    every = np.arange(len(images))
    for _ in range(2):
        for row in range(SIDE - 1, 1, -1):
            for column in range(SIDE - 1, 1, -1):
                chosen = every[rng.random(len(images)) < 0.5]
                down, right = rng.integers(-1, 1, (2, len(chosen)))  # -1 or 0
                there = (chosen, row + down, column + right)
                spoiled[chosen, row, column], spoiled[there] = spoiled[there], spoiled[chosen, row, column]
    return _blur(spoiled, 0.7)


def motion_blur(images: Array, rng: np.random.Generator) -> Array:
    """A moving hand: drawn out one way, up to 45 degrees off the line of writing; half a Gaussian, sigma 3, 21 long."""
    angles = np.radians(rng.uniform(-45, 45, len(images)))
    steps = np.arange(21)
    weights = np.exp(-(steps**2) / (2 * 3**2))
    weights /= weights.sum()
    # ImageMagick's MotionBlurImage takes whole pixels along the way, and repeats the edge beyond it.
    across = np.ceil(steps * np.cos(angles)[:, None] - 0.5).astype(int)  # (N, 21)
    down = np.ceil(steps * np.sin(angles)[:, None] - 0.5).astype(int)
    every, pixels = np.arange(len(images))[:, None, None], np.arange(SIDE)
    spoiled = np.zeros_like(images)
    for step, weight in enumerate(weights):
        rows = np.clip(pixels + down[:, step, None], 0, SIDE - 1)
        columns = np.clip(pixels + across[:, step, None], 0, SIDE - 1)
        spoiled += weight * images[every, rows[:, :, None], columns[:, None]]
    return spoiled


# --- where the digit lies ---------------------------------------------------------------------------------------------


def shear(images: Array, rng: np.random.Generator) -> Array:
    """Slanted by 0.4 radians either way; the height shrinks with it, as in scikit-image 0.15."""
    return _warp_either_way(images, rng, lambda sign: [[1, -np.sin(0.4 * sign)], [0, np.cos(0.4)]])


def scale(images: Array, rng: np.random.Generator) -> Array:
    """At 70 % of its size."""
    return _warp(images, [[1 / 0.7, 0], [0, 1 / 0.7]])


def rotate(images: Array, rng: np.random.Generator) -> Array:
    """Turned by 0.4 radians, 23 degrees, either way."""
    cos, sin = np.cos(0.4), np.sin(0.4)
    return _warp_either_way(images, rng, lambda sign: [[cos, -sin * sign], [sin * sign, cos]])


def translate(images: Array, rng: np.random.Generator) -> Array:
    """Moved by 3 pixels up or down and 3 left or right."""
    moved = np.zeros_like(images)
    signs = rng.integers(0, 2, (len(images), 2)) * 2 - 1
    for down, right in ((-3, -3), (-3, 3), (3, -3), (3, 3)):
        chosen = (signs * 3 == (down, right)).all(axis=1)
        moved[chosen] = ndimage.shift(images[chosen], (0, down, right), order=0)
    return moved


# --- light and weather ------------------------------------------------------------------------------------------------


def brightness(images: Array, rng: np.random.Generator) -> Array:
    """Everything brighter by half the range."""
    return images + 0.5


def stripe(images: Array, rng: np.random.Generator) -> Array:
    """Inverted in the left and in the right quarter."""
    spoiled = images.copy()
    spoiled[:, :, :7] = 1 - spoiled[:, :, :7]
    spoiled[:, :, 21:] = 1 - spoiled[:, :, 21:]
    return spoiled


def fog(images: Array, rng: np.random.Generator) -> Array:
    """A fractal cloud three times as bright as the ink; then all of it as dark again as before."""
    brightest = images.max(axis=(1, 2), keepdims=True)
    clouds = _draw_clouds(len(images), rng, decay=1.4)[:, :SIDE, :SIDE]
    return np.clip((images + 3 * clouds) * brightest / (brightest + 3), 0, 1)


def spatter(images: Array, rng: np.random.Generator) -> Array:
    """Splashes of dark mud."""
    drops = _blur(rng.normal(0.65, 0.3, images.shape), 1.0) > 0.65
    mud = _blur(drops.astype(float), 1.5)
    mud[mud < 0.8] = 0
    return images * (1 - mud) + 63 / 255 * mud


# --- pen and pencil ---------------------------------------------------------------------------------------------------


def dotted_line(images: Array, rng: np.random.Generator) -> Array:
    """A dotted line from edge to edge, two pixels on and two off."""
    start, end = rng.integers(0, 27, (2, len(images)))
    line = _draw_line(np.zeros(len(images)), start, np.full(len(images), 27.0), end)
    line[:, :, np.arange(SIDE) // 2 % 2 == 0] = 0
    return np.clip(images + line, 0, 1)


def zigzag(images: Array, rng: np.random.Generator) -> Array:
    """A zigzag from left to right, 4 pixels high and long, up to 12 degrees off the line of writing."""
    left, right, half = 2, 25, 2.0
    start = rng.integers(0, 27, len(images))
    angles = np.arctan(rng.integers(-5, 5, len(images)) / (right - left))
    length = (right - left) / np.cos(angles)  # 23 to 23.6, so that six turns fit in
    turns = half * (2 * np.arange(6) + 1)
    along = np.column_stack([np.zeros_like(length), np.tile(turns, (len(length), 1)), length])  # (N, 8)
    beside = np.column_stack([np.tile([0, 2, -2, 2, -2, 2, -2], (len(length), 1)), -half / (2 * (length - 20))])
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    columns, rows = left + cos * along - sin * beside, start[:, None] + sin * along + cos * beside
    spoiled = images
    for one in range(7):
        line = _draw_line(columns[:, one], rows[:, one], columns[:, one + 1], rows[:, one + 1])
        spoiled = np.clip(spoiled + line, 0, 1)
    return spoiled


def canny_edges(images: Array, rng: np.random.Generator) -> Array:
    """Only the edges that Canny's detector finds, one pixel wide."""
    try:
        from skimage.feature import canny
    except ImportError as error:
        raise ValueError('canny_edges needs scikit-image: pip install -e ".[robustness]"') from error
    return np.stack([canny(image) for image in images]).astype(float)


CORRUPTIONS = {
    "shot_noise": Corruption(shot_noise, 5, "Poisson noise, 3 counts where the ink is full"),
    "impulse_noise": Corruption(impulse_noise, 4, "17 % of the pixels black or white"),
    "glass_blur": Corruption(glass_blur, 1, "blur of sigma 0.7, neighbours exchanged twice, blur again"),
    "motion_blur": Corruption(motion_blur, 1, "half a Gaussian, sigma 3, 21 pixels long, up to 45° either way"),
    "shear": Corruption(shear, 2, "0.4 radians either way"),
    "scale": Corruption(scale, 3, "70 % of the size"),
    "rotate": Corruption(rotate, 2, "0.4 radians either way"),
    "brightness": Corruption(brightness, 5, "half the range added"),
    "translate": Corruption(translate, 3, "3 pixels in each direction"),
    "stripe": Corruption(stripe, None, "left and right quarter inverted"),
    "fog": Corruption(fog, 5, "a cloud of three times the ink's brightness"),
    "spatter": Corruption(spatter, 4, "mud of a quarter of the ink's brightness"),
    "dotted_line": Corruption(dotted_line, None, "from the left edge to the right"),
    "zigzag": Corruption(zigzag, None, "from left to right"),
    "canny_edges": Corruption(canny_edges, None, "sigma 1"),
}


# --- what they are made of --------------------------------------------------------------------------------------------


def _blur(images: Array, sigma: float) -> Array:
    blurred: Array = ndimage.gaussian_filter(images, (0, sigma, sigma), mode="nearest")
    return blurred


def _warp(images: Array, matrix: Array | list[list[float]]) -> Array:
    """Take each pixel from where a 2x2 matrix sends it, about the centre; (x, y) as in scikit-image."""
    back = np.eye(3)
    back[1:, 1:] = np.asarray(matrix)[::-1, ::-1]  # SciPy counts rows first
    offset = np.array([0, CENTRE, CENTRE]) - back @ [0, CENTRE, CENTRE]
    warped: Array = ndimage.affine_transform(images, back, offset, order=1, mode="grid-constant")
    return warped


def _warp_either_way(images: Array, rng: np.random.Generator, matrix: Callable[[int], list[list[float]]]) -> Array:
    is_positive = rng.random(len(images)) < 0.5
    warped = np.empty_like(images)
    for sign, chosen in ((1, is_positive), (-1, ~is_positive)):
        warped[chosen] = _warp(images[chosen], matrix(sign))
    return warped


def _draw_line(x0: Array, y0: Array, x1: Array, y1: Array) -> Array:
    """Soft lines (N, 28, 28): full in the middle, falling off as log(1 - d / 2.3) + 1 with the distance above or below.

    From the column of ``x0`` up to the one before ``x1``.
    """
    x0, y0, x1, y1 = (values[:, None, None].astype(float) for values in (x0, y0, x1, y1))
    row, column = np.mgrid[:SIDE, :SIDE]
    distance = np.abs(row - (y0 + (y1 - y0) / (x1 - x0) * (column - x0)))
    line = np.clip(np.log(1 - np.minimum(distance, 2.3 - 1e-10) / 2.3) + 1, 0, 1)
    return np.where((column >= np.floor(x0)) & (column < np.ceil(x1)), line, 0)


def _draw_clouds(num: int, rng: np.random.Generator, decay: float) -> Array:
    """Plasma fractals (N, 256, 256) in [0, 1] by the diamond-square method; their edges join."""
    heights = np.zeros((num, FOG_SIDE, FOG_SIDE), dtype=np.float32)
    step, roughness = FOG_SIDE, 100.0

    def raise_(total: Array) -> Array:
        noise = rng.random(total.shape, dtype=np.float32) * 2 - 1
        raised: Array = total / 4 + np.float32(roughness**2) * noise
        return raised

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        two = corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, half::step] = raise_(two + np.roll(two, -1, axis=2))
        middles = heights[:, half::step, half::step]
        above = middles + np.roll(middles, 1, axis=1)
        heights[:, ::step, half::step] = raise_(above + corners + np.roll(corners, -1, axis=2))
        beside = middles + np.roll(middles, 1, axis=2)
        heights[:, half::step, ::step] = raise_(beside + two)
        step, roughness = half, roughness / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    heights /= heights.max(axis=(1, 2), keepdims=True)
    return heights
