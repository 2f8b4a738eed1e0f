"""The command ``predict``: pictures in, digits out."""

from __future__ import annotations

import csv as csv_format
import io
import json as json_format
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from digitnet.apply.imaging import Digit28, Invert
from digitnet.apply.inputs import Source, find_pictures, prepare_all
from digitnet.files import replace_whole

if TYPE_CHECKING:
    from digitnet.apply.predictor import Predictor, Reading

BATCH_SIZE = 128  # pictures between two steps of the progress bar
DONE, FAILED, NO_DIGIT = 0, 1, 3  # exit codes; 2 is wrong usage
TILES, ZOOM, CAPTION = 20, 3, 14  # a contact sheet: tiles a side, enlargement, pixels for the text under each tile


class Answer(NamedTuple):
    """One object of ``--json``, one row of ``--csv``: what was read in one file, or in one place of a sheet."""

    file: str
    digit: int | None  # None where there is no digit
    confidence: float | None  # probability of the best guess; 0 on blank paper, None for an error
    status: Literal["ok", "uncertain", "no digit", "error"]
    runner_up: int | None = None
    runner_up_confidence: float | None = None
    number: int | None = None  # with --split: which digit on the sheet, from 1
    steps: tuple[str, ...] = ()  # what was done to the picture
    message: str = ""  # what is wrong with the file


def predict(
    files: list[str],
    ckpt_path: Path | None = None,
    invert: Invert = "auto",
    split: bool = False,
    json: bool = False,
    csv: bool = False,
    save_preprocessed: Path | None = None,
) -> int:
    """Read handwritten digits in photos, scans and drawings.

      python -m digitnet predict photo.jpg scans/        a folder stands for the pictures in it and below
      python -m digitnet predict "scans/*.png" --json
      python -m digitnet predict --split sheet.jpg       several digits on one sheet, in reading order
      cat photo.jpg | python -m digitnet predict -

    The answer is "uncertain" where the network's confidence is below what it needs to be right 999 times in 1,000, and
    "no digit" for blank paper and for what looks like none of the ten. A file that cannot be read gets a line on
    standard error; the others go on.

    Exit codes: 0 all read, if uncertainly; 1 a file or the checkpoint could not be read; 2 wrong usage; 3 a picture
    holds no digit.

    Args:
        files: PNG, JPEG, BMP, WebP, TIFF or GIF files, folders, patterns such as "scans/*.png", or - for standard
            input.
        ckpt_path: the trained checkpoint; the newest run's best by default.
        invert: yes where ink is darker than paper, no where it is brighter; auto looks at the border.
        split: find several digits in each picture.
        json: print a list of objects: file, digit (null where there is none), confidence, status, and more.
        csv: print the same as comma-separated values.
        save_preprocessed: a folder for contact sheets of what the network saw.

    Raises:
        ValueError: both json and csv, or the checkpoint is none.
        OSError: there is no checkpoint, or a file cannot be written.
    """
    if json and csv:
        raise ValueError("--json and --csv are two formats; give one of them")
    sources = list(find_pictures(files))
    answers: list[Answer] = []
    images: list[np.ndarray | None] = []
    bar = tqdm(total=len(sources), unit="picture", disable=len(sources) <= BATCH_SIZE or not sys.stderr.isatty())
    with bar, prepare_all(sources, invert, split) as prepared:
        from digitnet.apply.predictor import Predictor  # takes seconds, in which the first pictures are prepared

        predictor = Predictor.load(ckpt_path)
        for start in range(0, len(sources), BATCH_SIZE):
            batch = sources[start : start + BATCH_SIZE]
            new, seen = answer(predictor, batch, list(islice(prepared, BATCH_SIZE)))
            answers += new
            images += seen
            bar.update(len(batch))
    if save_preprocessed:
        save_sheets(save_preprocessed, answers, images)
    if json:
        print(to_json(answers))
    elif csv:
        print(to_csv(answers), end="")
    else:
        print(to_table(answers), end="")
    for wrong in (one for one in answers if one.status == "error"):
        print(f"digitnet: error: {wrong.file}: {wrong.message}", file=sys.stderr)
    statuses = {one.status for one in answers}
    return FAILED if "error" in statuses else NO_DIGIT if "no digit" in statuses else DONE


def answer(
    predictor: Predictor, sources: Iterable[Source], prepared: list[list[Digit28] | str]
) -> tuple[list[Answer], list[np.ndarray | None]]:
    """Read a batch of pictures; answers, and the 28x28 image that each is about, None where there is none."""
    seen = [digit.image for digits in prepared if not isinstance(digits, str) for digit in digits]
    readings = iter(predictor.read(np.stack(seen)) if seen else ())
    answers: list[Answer] = []
    images: list[np.ndarray | None] = []
    for source, digits in zip(sources, prepared, strict=True):
        if isinstance(digits, str):
            answers.append(Answer(source.name, None, None, "error", message=digits))
            images.append(None)
        elif not digits:
            answers.append(Answer(source.name, None, 0.0, "no digit", steps=("no ink found",)))
            images.append(None)
        else:
            several = len(digits) > 1
            for number, digit in enumerate(digits, 1):
                answers.append(to_answer(source.name, next(readings), digit.steps, number if several else None))
                images.append(digit.image)
    return answers, images


def to_answer(file: str, reading: Reading, steps: tuple[str, ...], number: int | None) -> Answer:
    """What a Reading says of a file."""
    return Answer(
        file, reading.digit, round(reading.confidence, 6), reading.status,
        reading.runner_up, round(reading.runner_up_confidence, 6), number, steps,
    )  # fmt: skip


# --- formats ----------------------------------------------------------------------------------------------------------


def to_json(answers: list[Answer]) -> str:
    """A list of objects, one a line."""
    return "[\n" + ",\n".join(f"  {json_format.dumps(one._asdict())}" for one in answers) + "\n]"


def to_csv(answers: list[Answer]) -> str:
    """A header and a row for each answer; the steps joined by semicolons."""
    text = io.StringIO()
    writer = csv_format.DictWriter(text, Answer._fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**one._asdict(), "steps": "; ".join(one.steps)} for one in answers)
    return text.getvalue()


def to_table(answers: list[Answer]) -> str:
    """Aligned columns for people; errors are left to standard error."""
    rows: list[tuple[str, ...]] = [("file", "digit", "confidence", "runner-up", "status", "what was done")]
    for one in answers:
        if one.status == "error":
            continue
        name = f"{one.file} {one.number}" if one.number else one.file
        second = "" if one.runner_up is None else f"{one.runner_up} {one.runner_up_confidence:.1%}"
        first = "-" if one.digit is None else str(one.digit)
        confidence = "" if one.runner_up is None else f"{one.confidence:.1%}"
        rows.append((name, first, confidence, second, one.status, ", ".join(one.steps)))
    if len(rows) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


def save_sheets(folder: Path, answers: list[Answer], images: list[np.ndarray | None]) -> None:
    """Write contact sheets ``sheet_001.png`` ...: what the network saw, enlarged, with its answer below."""
    tiles = [(one, image) for one, image in zip(answers, images, strict=True) if image is not None]
    width, height = 28 * ZOOM + 4, 28 * ZOOM + CAPTION
    for start in range(0, len(tiles), TILES**2):
        some = tiles[start : start + TILES**2]
        columns = min(TILES, len(some))
        sheet = Image.new("L", (columns * width, -(-len(some) // columns) * height), 96)
        pen = ImageDraw.Draw(sheet)
        for index, (one, image) in enumerate(some):
            x, y = index % columns * width, index // columns * height
            sheet.paste(Image.fromarray(image).resize((28 * ZOOM, 28 * ZOOM), Image.Resampling.NEAREST), (x + 2, y + 1))
            guess = "no digit" if one.digit is None else f"{one.digit}{'?' * (one.status == 'uncertain')}"
            pen.text((x + 3, y + 28 * ZOOM + 1), f"{guess}  {Path(one.file).stem[:9]}", 255)
        with replace_whole(folder / f"sheet_{start // TILES**2 + 1:03}.png") as part:
            sheet.save(part, "PNG")
