"""What a checkpoint's answers are worth: confidence on MNIST's test digits, and pictures that hold no digit.

    python benchmarks/non_digits.py lightning_logs/final/version_0/checkpoints/best.ckpt ... --num 1000

The pictures are made in code and go the way that ``predict`` sends them. Several checkpoints, such as those of several
seeds, stand side by side. Nothing here was seen by the detector, whose own drawings (``near_misses.py``) are others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images

from digitnet.apply.imaging import normalize
from digitnet.apply.predictor import Predictor, Reading
from digitnet.data import Digits, fetch_digits
from digitnet.tallies import bin_reliability

SIDE = 112  # of a drawing, in pixels
FONTS = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVu*.ttf"))
# Left out, as people could write a digit like them: B D G I J L O Q S T U Y Z, b g h i j l o q s t u y z, and others.
LETTERS = "ACEFHKMNPRVWX" + "acdefkmnprvwx"
Draw = Callable[[np.random.Generator], np.ndarray]


def to_canvas(draw: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
    """Ink (SIDE, SIDE) uint8, bright on 0, drawn at four times the size and scaled down."""
    canvas = Image.new("L", (4 * SIDE, 4 * SIDE))
    draw(ImageDraw.Draw(canvas))
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX))


def draw_letter(rng: np.random.Generator) -> np.ndarray:
    """One letter of a printed font, 36 to 72 pixels high."""
    fonts = [font for font in FONTS if "Display" not in font.name]
    font = ImageFont.truetype(str(rng.choice(list(map(str, fonts)))), int(rng.uniform(200, 400)))
    letter = str(rng.choice(list(LETTERS)))
    return to_canvas(lambda pen: pen.text((2 * SIDE, 2 * SIDE), letter, 255, font, anchor="mm"))


def draw_shape(rng: np.random.Generator) -> np.ndarray:
    """A polygon, star, cross, disc, heart, grid or checkerboard, outlined or filled; no ring, no bar."""
    centre, radius, width = 2.0 * SIDE, rng.uniform(90, 180), int(rng.uniform(16, 44))
    turn = rng.uniform(0, 2 * np.pi)

    def corners(num: int, radii: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
        angles = turn + 2 * np.pi * np.arange(num) / num
        scale = radius * np.resize(radii, num)
        return list(zip(centre + scale * np.cos(angles), centre + scale * np.sin(angles), strict=True))

    def outline(pen: ImageDraw.ImageDraw, points: list[tuple[float, float]]) -> None:
        if rng.random() < 0.5:
            pen.polygon(points, 255)
        else:
            pen.line([*points, *points[:2]], 255, width, joint="curve")

    def draw(pen: ImageDraw.ImageDraw) -> None:
        kind = rng.integers(8)
        box = (centre - radius, centre - radius, centre + radius, centre + radius)
        if kind == 0:
            outline(pen, corners(3))
        elif kind == 1:
            outline(pen, corners(4))
        elif kind == 2:
            outline(pen, corners(10, (1.0, 0.42)))
        elif kind == 3:
            a, b, c, d = corners(4)
            pen.line([a, c], 255, width)
            pen.line([b, d], 255, width)
        elif kind == 4:
            pen.ellipse(box, 255)
        elif kind == 5:
            angles = np.linspace(0, 2 * np.pi, 60)
            xs = 16 * np.sin(angles) ** 3
            ys = -13 * np.cos(angles) + 5 * np.cos(2 * angles) + 2 * np.cos(3 * angles) + np.cos(4 * angles)
            outline(pen, list(zip(centre + xs * radius / 17, centre + ys * radius / 17, strict=True)))
        elif kind == 6:
            for offset in np.linspace(-radius, radius, int(rng.integers(3, 6))):
                pen.line([(centre + offset, box[1]), (centre + offset, box[3])], 255, width // 2)
                pen.line([(box[0], centre + offset), (box[2], centre + offset)], 255, width // 2)
        else:
            cells = int(rng.integers(3, 7))
            size = 2 * radius / cells
            for i, j in np.argwhere(np.indices((cells, cells)).sum(0) % 2):
                x, y = box[0] + i * size, box[1] + j * size
                pen.rectangle((x, y, x + size, y + size), 255)

    return to_canvas(draw)


def draw_scribble(rng: np.random.Generator) -> np.ndarray:
    """One long pen stroke that goes to and fro: 8 to 20 turns, rounded."""
    num_turns = int(rng.integers(8, 21))
    turns = rng.uniform(60, 4 * SIDE - 60, (num_turns, 2))
    times = np.linspace(0, num_turns - 1, 40 * num_turns)
    points = np.stack([np.interp(times, np.arange(num_turns), turns[:, axis]) for axis in (0, 1)], 1)
    points = gaussian_filter(points, (rng.uniform(4, 14), 0))
    width = int(rng.uniform(12, 36))
    return to_canvas(lambda pen: pen.line([tuple(point) for point in points], 255, width, joint="curve"))


def draw_noise(rng: np.random.Generator) -> np.ndarray:
    """28x28: uniform, Gaussian, sparse or dense specks, smooth clouds, blots, or stripes of random brightness."""
    kind = rng.integers(6)
    uniform = rng.random((28, 28))
    image: np.ndarray
    if kind == 0:
        image = uniform * rng.uniform(0.3, 1)
    elif kind == 1:
        image = rng.normal(rng.uniform(0, 0.6), rng.uniform(0.05, 0.4), (28, 28))
    elif kind == 2:
        image = 1.0 * (uniform < rng.uniform(0.02, 0.6))
    elif kind == 5:
        image = np.broadcast_to(rng.random((28, 1)), (28, 28))
        image = image if rng.random() < 0.5 else image.T
    else:
        image = gaussian_filter(uniform, rng.uniform(1, 4))
        image = (image - image.min()) / np.ptp(image)
        image = image if kind == 3 else 1.0 * (image > rng.uniform(0.4, 0.7))
    return (255 * image.clip(0, 1)).round().astype(np.uint8)


def draw_blank(rng: np.random.Generator) -> np.ndarray:
    """28x28: empty paper, paper of one grey, shaded paper, or faint grain."""
    kind = rng.integers(4)
    image = np.zeros((28, 28))
    if kind == 1:
        image += rng.uniform(0, 255)
    elif kind == 2:
        image = image + np.linspace(rng.uniform(0, 255), rng.uniform(0, 255), 28)
        image = image if rng.random() < 0.5 else image.T
    elif kind == 3:
        image = rng.normal(0, rng.uniform(1, 12), (28, 28))
    return image.clip(0, 255).round().astype(np.uint8)


def draw_photograph(rng: np.random.Generator) -> np.ndarray:
    """28x28: a piece of one of three bundled photographs, 28 to 200 pixels wide, as it is or inverted."""
    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as portrait:
        photographs = [*load_sample_images().images, np.asarray(portrait)]
    photograph = Image.fromarray(photographs[rng.integers(3)]).convert("L")
    size = int(rng.uniform(28, 200))
    x, y = (int(rng.integers(length - size)) for length in photograph.size)
    piece = np.asarray(photograph.crop((x, y, x + size, y + size)).resize((28, 28), Image.Resampling.BOX))
    return piece if rng.random() < 0.5 else 255 - piece


KINDS: dict[str, Draw] = {
    "blank": draw_blank,
    "noise": draw_noise,
    "photographs": draw_photograph,
    "letters": draw_letter,
    "shapes": draw_shape,
    "scribbles": draw_scribble,
}
TURNED = (2, 3, 4, 5, 7)  # which are no digit upside down: 0, 1 and 8 stay one, 6 and 9 change places
TARGET = 0.999  # accuracy of the answers that are not abstained from


def measure_answers(readings: list[Reading], labels: np.ndarray) -> dict[str, float]:
    """How far the answers on real digits can be believed, all in percent but the counts."""
    probabilities = np.array([one.probabilities for one in readings])
    confidence, is_right = probabilities.max(1), probabilities.argmax(1) == labels
    certain = np.array([one.status == "ok" for one in readings])
    order = np.argsort(-confidence)
    accuracy = np.cumsum(is_right[order]) / np.arange(1, len(order) + 1)
    num_answered = max(np.flatnonzero(accuracy >= TARGET) + 1, default=0)
    return {
        "mistakes": int((~is_right).sum()),
        "calibration error (ECE, 15 bins)": 100 * bin_reliability(confidence, is_right).ece,
        "not called certain": 100 * float((~certain).mean()),
        "called no digit": 100 * float(np.mean([one.status == "no digit" for one in readings])),
        "wrong although called certain": int((certain & ~is_right).sum()),
        "accuracy of the certain": 100 * float(is_right[certain].mean()) if certain.any() else float("nan"),
        "fewest abstentions for 99.9 %": 100 * (1 - float(num_answered) / len(order)),
    }


def measure_rejection(predictor: Predictor, pictures: list[np.ndarray]) -> float:
    """Share of pictures, (H, W) uint8, that ``predict`` calls no digit, in percent."""
    found = [normalize(Image.fromarray(picture)) for picture in pictures]
    images = np.array([one.image for one in found if one is not None], np.uint8).reshape(-1, 28, 28)
    num_digits = sum(one.status != "no digit" for one in predictor.read(images))
    return 100 * (1 - num_digits / len(pictures))


def make_pictures(test: Digits, num: int, seed: int) -> dict[str, list[np.ndarray]]:
    """``num`` pictures of each kind that hold no digit."""
    pictures = {}
    for name, draw in KINDS.items():
        rng = np.random.default_rng([seed, *name.encode()])
        pictures[name] = [draw(rng) for _ in range(num)]
    turned = test.images[np.isin(test.labels, TURNED)][:num]
    return pictures | {"digits upside down": list(np.rot90(turned, 2, (1, 2)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--num", type=int, default=1000, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    digits = fetch_digits("mnist")
    test = Digits(digits.images[65_000:], digits.labels[65_000:])
    pictures = make_pictures(test, args.num, args.seed)
    rows: dict[str, list[float]] = {}
    for path in args.checkpoints:
        predictor = Predictor.load(path)
        measured = measure_answers(predictor.read(test.images), test.labels)
        rejected = {name: measure_rejection(predictor, some) for name, some in pictures.items()}
        rejected["all kinds, mean"] = float(np.mean(list(rejected.values())))
        for name, value in (measured | {f"no digit: {name}": value for name, value in rejected.items()}).items():
            rows.setdefault(name, []).append(value)
    for name, values in rows.items():
        print(
            "| " + " | ".join([name, *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values)])
        )


if __name__ == "__main__":
    main()
