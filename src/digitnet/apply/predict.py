"""The command ``predict``: pictures in, digits out."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from digitnet.apply.ink import Invert
from digitnet.apply.inputs import find_pictures, prepare_all
from digitnet.files import make_writable

DONE, FAILED, NO_DIGIT = 0, 1, 3  # exit codes; 2 is wrong usage


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

    The answer is "uncertain" where the confidence is below that from which on answers are right 999 times in 1,000, and
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
        json: print a list of objects: file, digit (null where there is none), confidence, status, and more; of a sheet
            that was split, the number and the line of each digit, from 1.
        csv: print the same as comma-separated values.
        save_preprocessed: a folder for contact sheets of what the network saw.

    Raises:
        ValueError: both json and csv, or the checkpoint is none.
        OSError: there is no checkpoint, or a file cannot be written.
    """
    if json and csv:
        raise ValueError("--json and --csv are two formats; give one of them")
    if save_preprocessed and save_preprocessed.is_file():
        raise ValueError(f"save_preprocessed is {save_preprocessed}, which is a file; give a folder")
    sources = list(find_pictures(files))
    with prepare_all(sources, invert, split) as prepared:
        from digitnet.apply import answers as formats  # imports torch: takes seconds, while pictures are prepared
        from digitnet.apply.predictor import Predictor

        predictor = Predictor.load(ckpt_path)
        if save_preprocessed:
            make_writable(save_preprocessed, "--save-preprocessed")
        is_quiet = len(sources) <= 128 or not sys.stderr.isatty()
        digits = list(tqdm(prepared, total=len(sources), unit="picture", disable=is_quiet))
    answers, images = formats.read_pictures(predictor, sources, digits)  # now that all cores are free
    if save_preprocessed:
        formats.save_sheets(save_preprocessed, answers, images)
    if json:
        print(formats.to_json(answers))
    elif csv:
        print(formats.to_csv(answers), end="")
    else:
        print(formats.to_table(answers), end="")
    for wrong in (one for one in answers if one.status == "error"):
        print(f"digitnet: error: {formats.to_printable(wrong.file) or repr('')}: {wrong.message}", file=sys.stderr)
    statuses = {one.status for one in answers}
    return FAILED if "error" in statuses else NO_DIGIT if "no digit" in statuses else DONE
