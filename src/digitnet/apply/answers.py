"""What was read in pictures, in the forms that people and programs want it."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from digitnet.apply.imaging import Digit28
from digitnet.apply.inputs import Source
from digitnet.apply.predictor import Predictor, Reading
from digitnet.files import replace_whole

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
    line: int | None = None  # with --split: which line it stands in, from 1
    steps: tuple[str, ...] = ()  # what was done to the picture
    message: str = ""  # what is wrong with the file


def read_pictures(
    predictor: Predictor, sources: Iterable[Source], prepared: list[list[Digit28] | str]
) -> tuple[list[Answer], list[np.ndarray | None]]:
    """Read prepared pictures; answers, and the 28x28 image that each is about, None where there is none."""
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
            for number, digit in enumerate(digits, 1):
                answers.append(to_answer(source.name, next(readings), digit, number))
                images.append(digit.image)
    return answers, images


def to_answer(file: str, reading: Reading, digit: Digit28, number: int) -> Answer:
    """What a Reading says of a file, or of a digit of it, which has a number where several were looked for."""
    return Answer(
        file, reading.digit, round(reading.confidence, 6), reading.status,
        reading.runner_up, round(reading.runner_up_confidence, 6),
        None if digit.line is None else number, digit.line, digit.steps,
    )  # fmt: skip


# --- formats ----------------------------------------------------------------------------------------------------------


def to_json(answers: list[Answer]) -> str:
    """A list of objects, one a line."""
    return "[\n" + ",\n".join(f"  {json.dumps(one._asdict())}" for one in answers) + "\n]"


def to_csv(answers: list[Answer]) -> str:
    """A header and a row for each answer; the steps joined by semicolons."""
    text = io.StringIO()
    writer = csv.DictWriter(text, Answer._fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**one._asdict(), "steps": "; ".join(one.steps)} for one in answers)
    return text.getvalue()


def to_table(answers: list[Answer]) -> str:
    """Aligned columns for people; errors are left to standard error."""
    rows: list[tuple[str, ...]] = [("file", "digit", "confidence", "runner-up", "status", "what was done")]
    for one in answers:
        if one.status == "error":
            continue
        name = to_printable(f"{one.file} {one.number}" if one.number else one.file)
        second = "" if one.runner_up is None else f"{one.runner_up} {one.runner_up_confidence:.1%}"
        first = "-" if one.digit is None else str(one.digit)
        confidence = "" if one.runner_up is None else f"{one.confidence:.1%}"
        rows.append((name, first, confidence, second, one.status, ", ".join(one.steps)))
    if len(rows) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


def to_printable(text: str) -> str:
    """Text whose line breaks and commands to a terminal, which a file's name may hold, are written out."""
    commands = ("Cc", "Cf", "Cs", "Zl", "Zp")  # and what is no letter at all; other spaces are common in names
    return "".join(
        each.encode("unicode_escape").decode() if unicodedata.category(each) in commands else each for each in text
    )


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
            stem = Path(one.file).stem  # of a telephone's names the end tells them apart
            pen.text((x + 3, y + 28 * ZOOM + 1), f"{guess}  {stem if len(stem) <= 9 else f'..{stem[-7:]}'}", 255)
        with replace_whole(folder / f"sheet_{start // TILES**2 + 1:03}.png") as part:
            sheet.save(part, "PNG")
