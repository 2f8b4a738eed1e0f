"""How well a checkpoint reads people's own pictures of digits: accuracy per kind of picture.

    python benchmarks/own_digits.py lightning_logs/final/version_0/checkpoints/best.ckpt [FOLDER ...] --per_kind 200

The kinds are made in code out of MNIST's own test digits: enlarged, or drawn again with a pen along their middle line,
then put on paper, lit, soiled, photographed. Each FOLDER holds either ``labels.csv`` (file,label) or one folder per
digit. What was read wrongly is shown as the network saw it in ``--save``, one contact sheet each.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFilter

from digitnet.apply import imaging
from digitnet.apply.opening import open_picture
from digitnet.checkpoints import load_net
from digitnet.data import fetch_digits

Rng = np.random.Generator
FINE = 112  # pixels; middle lines are found at four times MNIST's resolution


def thinned(mask: np.ndarray) -> np.ndarray:
    """The middle line of a mask. Source: Zhang and Suen, A fast parallel algorithm for thinning (1984)."""
    image = np.pad(mask, 1).astype(np.uint8)
    while True:
        before = image.copy()
        for first in (True, False):
            p = [
                np.roll(image, (-y, -x), (0, 1))
                for y, x in ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
            ]
            neighbours = sum(p)
            crossings = sum((a == 0) & (b == 1) for a, b in zip(p, [*p[1:], p[0]], strict=True))
            n, e, s, w = p[0], p[2], p[4], p[6]
            open_side = (n * e * s == 0) & (e * s * w == 0) if first else (n * e * w == 0) & (n * s * w == 0)
            image[(image == 1) & (neighbours >= 2) & (neighbours <= 6) & (crossings == 1) & open_side] = 0
        if (image == before).all():
            return image[1:-1, 1:-1].astype(bool)


def pen(digit: np.ndarray, side: int, width: float) -> np.ndarray:
    """Draw a digit (28, 28) again with a round pen of ``width`` pixels: (side, side) float32 in [0, 1], 1 is ink."""
    fine = np.asarray(Image.fromarray(digit).resize((FINE, FINE), Image.Resampling.BICUBIC))
    points = np.argwhere(thinned(fine > 110)).astype(np.float32)  # (N, 2): row, column
    near = np.abs(points[:, None] - points).max(-1) <= 1
    for _ in range(3):  # pixels make stairs; a hand does not
        points = near @ points / near.sum(1, keepdims=True)
    page = Image.new("L", (2 * side, 2 * side))
    draw, width = ImageDraw.Draw(page), round(2 * width)
    for a, b in np.argwhere(np.triu(near)):
        ends = [tuple((points[i, ::-1] + 0.5) * 2 * side / FINE) for i in (a, b)]
        draw.line(ends, 255, width)
        (x, y), radius = ends[0], width / 2 - 0.5
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), 255) if width > 4 else None
    return np.asarray(page.reduce(2), np.float32) / 255


def enlarged(digit: np.ndarray, side: int) -> np.ndarray:
    """The digit as it is, smoothly enlarged: (side, side) float32 in [0, 1], 1 is ink."""
    large = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    return np.clip((np.asarray(large, np.float32) / 255 - 0.5) * 3 + 0.5, 0, 1)


def placed(ink: np.ndarray, height: int, width: int, rng: Rng) -> np.ndarray:
    """The ink somewhere on a larger sheet."""
    sheet = np.zeros((height, width), np.float32)
    top, left = rng.integers(0, height - ink.shape[0] + 1), rng.integers(0, width - ink.shape[1] + 1)
    sheet[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return sheet


def inked(ink: np.ndarray, colour: ArrayLike = 20, paper: ArrayLike = 235) -> np.ndarray:
    """Ink of a colour on paper of a colour: (H, W, 3) float32 in [0, 255]."""
    ink = ink[..., None]
    return np.broadcast_to(paper, (3,)) * (1 - ink) + np.broadcast_to(colour, (3,)) * ink


def picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def photo(values: np.ndarray, rng: Rng, blur: float = 0.8, noise: float = 4, quality: int = 80) -> Image.Image:
    """Through a phone's lens, sensor and JPEG encoder."""
    sharp = picture(values).filter(ImageFilter.GaussianBlur(blur))
    noisy = np.asarray(sharp, np.float32) + rng.normal(0, noise, (*sharp.size[::-1], 1))
    return jpeg(picture(noisy), quality)


def jpeg(image: Image.Image, quality: int, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, **options)
    return open_picture(file.getvalue())


def slope(shape: tuple[int, int], rng: Rng) -> np.ndarray:
    """Light that falls off across the sheet, (H, W, 1) in about [0.45, 1]."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    t = (math.cos(angle) * x + math.sin(angle) * y) / math.sqrt(2)
    return (0.72 + 0.27 * t - 0.1 * (x * x + y * y))[..., None]


def shadow(shape: tuple[int, int], rng: Rng) -> np.ndarray:
    """A straight shadow edge through the sheet, (H, W, 1)."""
    angle, offset = rng.uniform(0, 2 * math.pi), rng.uniform(-0.5, 0.5)
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    edge = np.clip((math.cos(angle) * x + math.sin(angle) * y - offset) / rng.uniform(0.02, 0.2) + 0.5, 0, 1)
    return (1 - 0.45 * edge)[..., None]


def rules(values: np.ndarray, rng: Rng, grid: bool = False) -> np.ndarray:
    """Blue lines across the paper, a little tilted; ink lies over them."""
    height, width = values.shape[:2]
    gap, tilt = rng.integers(70, 130), rng.uniform(-0.02, 0.02)
    y, x = np.mgrid[:height, :width]
    line = ((y + tilt * x + rng.integers(gap)) % gap) < 2.5
    if grid:
        line |= ((x - tilt * y + rng.integers(gap)) % gap) < 2.5
    return np.where(line[..., None], np.minimum(values, np.array([120, 150, 205])), values)


def specks(values: np.ndarray, rng: Rng) -> np.ndarray:
    """Dirt: small dark dots, and a dark strip at one edge."""
    out = values.copy()
    for _ in range(12):
        y, x, r = rng.integers(out.shape[0]), rng.integers(out.shape[1]), rng.integers(1, 4)
        out[max(y - r, 0) : y + r, max(x - r, 0) : x + r] = 30
    out[:, : rng.integers(2, 8)] = 40
    return out


def transparent(ink: np.ndarray, colour: int) -> Image.Image:
    alpha = picture(255 * ink)
    out = Image.new("RGBA", alpha.size, (colour,) * 3 + (0,))
    out.putalpha(alpha)
    return out


def hue(rng: Rng) -> np.ndarray:
    """A strong colour of any hue."""
    angles = rng.uniform(0, 2 * math.pi) + np.array([0, 2.1, 4.2])
    return 110 + 110 * np.cos(angles)


def squeeze(digit: np.ndarray, side: int, rng: Rng) -> np.ndarray:
    """A canvas as most web pages send it: drawn large, anywhere, shrunk to ``side``."""
    return np.asarray(
        Image.fromarray(placed(pen(digit, 200, 14), 280, 280, rng)).resize((side, side), Image.Resampling.BOX)
    )


KINDS: dict[str, Callable[[np.ndarray, Rng], Image.Image]] = {
    "enlarged, black on white": lambda d, r: picture(inked(enlarged(d, 224), 0, 255)),
    "enlarged, white on black": lambda d, r: picture(255 * enlarged(d, 224)),
    "canvas, white on black": lambda d, r: picture(255 * placed(pen(d, 260, 16), 400, 400, r)),
    "canvas shrunk to 28": lambda d, r: picture(255 * squeeze(d, 28, r)),
    "canvas shrunk to 64": lambda d, r: picture(255 - 255 * squeeze(d, 64, r)),
    "transparent, black ink": lambda d, r: transparent(pen(d, 300, 12), 0),
    "transparent, white ink": lambda d, r: transparent(pen(d, 300, 12), 255),
    "hairline, 1 px of 1,000": lambda d, r: picture(inked(pen(d, 1000, 1), 0, 255)),
    "thin, 3 px of 1,000": lambda d, r: picture(inked(pen(d, 1000, 3), 0, 255)),
    "marker, thick": lambda d, r: picture(inked(placed(pen(d, 260, 36), 300, 300, r), 0, 255)),
    "tight crop": lambda d, r: tight(d),
    "coloured ink": lambda d, r: picture(inked(placed(pen(d, 200, 9), 300, 300, r), hue(r), 255)),
    "coloured ink and paper": lambda d, r: photo(inked(placed(pen(d, 200, 9), 300, 300, r), 20, 150 + hue(r) / 2), r),
    "photo": lambda d, r: photo(inked(placed(pen(d, 360, 9), 600, 480, r)), r),
    "photo, shading": lambda d, r: photo(inked(placed(pen(d, 360, 9), 600, 480, r)) * slope((600, 480), r), r),
    "photo, shadow edge": lambda d, r: photo(inked(placed(pen(d, 360, 9), 600, 480, r)) * shadow((600, 480), r), r),
    "the same, from afar": lambda d, r: photo(inked(placed(pen(d, 360, 9), 1200, 900, r)) * shadow((1200, 900), r), r),
    "photo, pencil": lambda d, r: photo(inked(placed(pen(d, 360, 7), 600, 480, r), 160, 220) * slope((600, 480), r), r),
    "photo, small in a large frame": lambda d, r: photo(
        inked(placed(pen(d, 90, 4), 1200, 1600, r)) * slope((1200, 1600), r), r
    ),
    "photo, ruled paper": lambda d, r: photo(rules(inked(placed(pen(d, 300, 9), 600, 480, r), (30, 40, 90)), r), r),
    "photo, squared paper": lambda d, r: photo(rules(inked(placed(pen(d, 300, 9), 600, 480, r)), r, True), r),
    "photo, blurred, noisy": lambda d, r: photo(inked(placed(pen(d, 360, 9), 600, 480, r), 60, 200), r, 3, 12, 40),
    "scan, specks and an edge": lambda d, r: picture(specks(inked(placed(pen(d, 250, 8), 320, 320, r)), r)),
    "JPEG, quality 10": lambda d, r: jpeg(picture(inked(placed(pen(d, 140, 7), 200, 200, r), 0, 255)), 10),
    "chalk on a board": lambda d, r: photo(
        inked(placed(pen(d, 360, 12), 600, 480, r), 215, (40, 70, 55)) * slope((600, 480), r), r
    ),
    "turned by EXIF": lambda d, r: lying(d, r),
}


def tight(digit: np.ndarray) -> Image.Image:
    """Cut off exactly at the ink."""
    ink = pen(digit, 300, 16)
    rows, columns = np.flatnonzero(ink.max(1) > 0.5), np.flatnonzero(ink.max(0) > 0.5)
    return picture(inked(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 0, 255))


def lying(digit: np.ndarray, rng: Rng) -> Image.Image:
    """As a phone held sideways stores it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    upright = picture(inked(placed(pen(digit, 300, 9), 400, 300, rng)))
    return jpeg(upright.transpose(Image.Transpose.ROTATE_90), 85, exif=exif.tobytes())


def labelled(folder: Path) -> Iterator[tuple[Path, int]]:
    """The files of a folder with their digits."""
    if (folder / "labels.csv").exists():
        with (folder / "labels.csv").open() as file:
            yield from ((folder / row["file"], int(row["label"])) for row in csv.DictReader(file))
    else:
        yield from ((path, int(path.parent.name)) for path in sorted(folder.glob("[0-9]/[!.]*")))


def sheet(images: np.ndarray, titles: list[str], path: Path) -> None:
    """Save images (N, 28, 28) under their titles."""
    side, per_row = 62, 16
    page = Image.new("L", (per_row * side, -(-len(images) // per_row) * (side + 12)), 90)
    draw = ImageDraw.Draw(page)
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        x, y = i % per_row * side, i // per_row * (side + 12)
        page.paste(Image.fromarray(image).resize((56, 56)), (x, y + 12))
        draw.text((x, y), title, fill=255)
    page.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--per_kind", type=int, default=200, help="pictures made of each kind")
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    parser.add_argument("--save", type=Path, help="a folder for contact sheets")
    args = parser.parse_args()
    try:
        network, _ = load_net(args.checkpoint)
    except ValueError as error:
        parser.error(str(error))
    files = {folder: list(labelled(folder)) for folder in args.folders}
    for folder, found in files.items():
        if not found:
            parser.error(f"{folder}: no labels.csv, and no pictures in folders named 0 to 9")
    digits = fetch_digits("mnist")
    chosen = 60_000 + np.random.default_rng(1).permutation(10_000)[: args.per_kind]

    def score(name: str, pictures: Iterator[tuple[Image.Image, int]]) -> None:
        seen = [(imaging.normalize(one), label) for one, label in pictures]
        images = np.stack([np.zeros((28, 28), np.uint8) if one is None else one.image for one, _ in seen])
        labels = np.array([label for _, label in seen])
        with torch.inference_mode():
            read = torch.cat([network(part) for part in torch.from_numpy(images)[:, None].split(256)]).argmax(1).numpy()
        wrong = np.flatnonzero(read != labels)
        print(
            f"{name:32} {len(labels):5} pictures  {100 * np.mean(read == labels):6.2f} %  {len(wrong):3} wrong",
            flush=True,
        )
        if args.save and len(wrong):
            args.save.mkdir(parents=True, exist_ok=True)
            sheet(images[wrong], [f"{labels[i]} as {read[i]}" for i in wrong], args.save / f"{name}.png")

    for folder, found in files.items():
        score(folder.name, ((open_picture(path), label) for path, label in found))
    for name, make in KINDS.items():
        if args.only in name:
            rng = np.random.default_rng(2)
            score(name, ((make(digits.images[i], rng), int(digits.labels[i])) for i in chosen))


if __name__ == "__main__":
    main()
