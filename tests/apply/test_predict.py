from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from PIL import Image

from digitnet.apply.imaging import normalize
from digitnet.apply.inputs import find_pictures
from digitnet.apply.opening import open_picture
from digitnet.apply.predictor import Predictor
from digitnet.data import load_bundled_digits

DIGITS = load_bundled_digits()


@pytest.fixture
def make_checkpoint(trained_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a trained checkpoint with another calibration; None for none at all."""

    def make(**values: float | None) -> Path:
        checkpoint = torch.load(trained_run / "checkpoints" / "best.ckpt", weights_only=True)
        for name, value in values.items():
            if value is None:
                del checkpoint["calibration"]
            else:
                checkpoint["calibration"][name].fill_(value)
        torch.save(checkpoint, tmp_path / "copy.ckpt")
        return tmp_path / "copy.ckpt"

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three digits, blank paper, and four files that are no pictures."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(DIGITS.images[0]).save(folder / "a.png")
    Image.fromarray(255 - DIGITS.images[1]).save(folder / "b.bmp")
    Image.fromarray(DIGITS.images[2]).resize((84, 84)).convert("RGB").save(folder / "more" / "c.JPG", "JPEG")
    Image.new("L", (200, 100), 255).save(folder / "blank.webp")
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no picture")
    (folder / "cut.tiff").write_bytes((folder / "b.bmp").read_bytes()[:300])
    (folder / "notes.txt").write_text("not looked at")
    return folder


def seen(path: Path) -> np.ndarray:
    """What the network sees of a file."""
    digit = normalize(open_picture(path))
    assert digit is not None
    return digit.image


def test_predictor_is_the_softmax_of_the_logits_over_the_temperature(make_checkpoint: Callable[..., Path]) -> None:
    predictor = Predictor.load(make_checkpoint(temperature=2.0, min_confidence=0.0, max_score=torch.inf))
    images = DIGITS.images[:150]  # more than a batch
    readings = predictor.read(images)
    with torch.no_grad():
        expected = (predictor.model.net(torch.from_numpy(images)[:, None]) / 2).softmax(1).numpy()
    np.testing.assert_allclose([reading.probabilities for reading in readings], expected, atol=1e-6)
    for reading, row in zip(readings, expected, strict=True):
        best, second = np.argsort(-row)[:2]
        assert (reading.digit, reading.runner_up, reading.status) == (best, second, "ok")
        assert (reading.confidence, reading.runner_up_confidence) == pytest.approx((row[best], row[second]), abs=1e-6)
    assert predictor.read(images[:0]) == []


@pytest.mark.parametrize(
    "images", [np.zeros((1, 28, 28)), np.zeros((28, 28), np.uint8), np.zeros((1, 27, 28), np.uint8)]
)
def test_predictor_refuses_other_images(make_checkpoint: Callable[..., Path], images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[N, 28, 28\]"):
        Predictor.load(make_checkpoint()).read(images)


@pytest.mark.parametrize(
    ("calibration", "status", "code"),
    [
        ({"min_confidence": 0.0, "max_score": torch.inf}, "ok", 0),
        ({"min_confidence": 1.1, "max_score": torch.inf}, "uncertain", 0),
        ({"min_confidence": 0.0, "max_score": -torch.inf}, "no digit", 3),
    ],
)
def test_each_status_and_its_exit_code(
    digitnet: Run, folder: Path, make_checkpoint: Callable[..., Path], capsys: Any, calibration: dict[str, float],
    status: str, code: int,
) -> None:  # fmt: skip
    ckpt_path = make_checkpoint(**calibration)
    assert digitnet("predict", "--json", folder / "a.png", "--ckpt_path", ckpt_path) == code
    (one,) = json.loads(capsys.readouterr().out)
    (reading,) = Predictor.load(ckpt_path).read(seen(folder / "a.png")[None])
    assert (one["file"], one["status"], one["digit"]) == (str(folder / "a.png"), status, reading.digit)
    assert one["confidence"] == pytest.approx(reading.confidence, abs=1e-6)


def test_a_folder_with_good_blank_and_broken_files(
    digitnet: Run, folder: Path, make_checkpoint: Callable[..., Path], capsys: Any
) -> None:
    ckpt_path = make_checkpoint(min_confidence=0.0, max_score=torch.inf)
    flags = ("--ckpt_path", ckpt_path)
    assert digitnet("predict", folder, "missing.png", *flags, "--json") == 1
    out, err = capsys.readouterr()
    answers = {Path(one["file"]).name: one for one in json.loads(out)}
    assert list(answers) == [
        "a.png",
        "b.bmp",
        "blank.webp",
        "cut.tiff",
        "empty.png",
        "c.JPG",
        "text.jpg",
        "missing.png",
    ]
    wrong = {"cut.tiff", "empty.png", "text.jpg", "missing.png"}
    assert {name for name, one in answers.items() if one["status"] == "error"} == wrong
    lines = err.strip().splitlines()
    assert len(lines) == len(wrong)
    for name in wrong:
        assert answers[name]["digit"] is None
        assert sum(f"{name}: {answers[name]['message']}" in line for line in lines) == 1
    assert (answers["blank.webp"]["status"], answers["blank.webp"]["digit"]) == ("no digit", None)
    images = np.stack([seen(folder / name) for name in ("a.png", "b.bmp")])
    expected = [reading.digit for reading in Predictor.load(ckpt_path).read(images)]
    assert [answers[name]["digit"] for name in ("a.png", "b.bmp")] == expected
    assert "inverted" in answers["b.bmp"]["steps"]

    assert digitnet("predict", folder, "--csv", *flags) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["status"] for row in rows] == [one["status"] for one in list(answers.values())[:-1]]

    assert digitnet("predict", folder / "a.png", folder / "blank.webp", *flags) == 3
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["file", "digit", "confidence"]
    assert table[1].split()[1] == str(expected[0])
    assert "no digit" in table[2]


def test_patterns_standard_input_and_contact_sheets(
    digitnet: Run, folder: Path, make_checkpoint: Callable[..., Path], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt_path = make_checkpoint(min_confidence=0.0, max_score=torch.inf)
    content = (folder / "a.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    args = ("--save-preprocessed", "seen", "--json", "-", folder / "*.png", "*.gif")
    assert digitnet("predict", "--ckpt_path", ckpt_path, *args) == 1
    answers = json.loads(capsys.readouterr().out)
    assert [Path(one["file"]).name for one in answers] == ["-", "a.png", "empty.png", "*.gif"]
    assert answers[0]["digit"] == answers[1]["digit"]
    assert answers[3]["message"] == "no file is named like this"
    (folder / "no_pictures").mkdir()
    assert digitnet("predict", "--ckpt_path", ckpt_path, "--json", folder / "no_p*") == 1
    [answer] = json.loads(capsys.readouterr().out)
    assert answer["message"] == "no pictures in what is named like this"

    odd = Path("odd")
    for name in ("in", "empty", ".hidden"):
        (odd / name).mkdir(parents=True)
        (odd / name / "notes.txt").touch()
    (odd / ".hidden" / "a.png").write_bytes(content)
    (odd / "in" / "line\nbreak\x1b at 9.41\u202fPM.png").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert digitnet("predict", "--ckpt_path", ckpt_path, "odd/*", "-", "-", "") == 1
    out, err = capsys.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        "file",
        "odd/in/line\\nbreak\\x1b at 9.41\u202fPM.png",
        "-",
    ]
    assert err == "digitnet: error: -: was read already\ndigitnet: error: '': an empty name\n"
    monkeypatch.setattr(sys, "stdin", None)  # as of a program started with it closed
    assert [source.message for source in find_pictures(["-"])] == ["standard input is closed; give a file"]
    for pattern in ("odd/*", "odd/**/*.png"):
        names = [source.name for source in find_pictures([pattern])]
        assert names == ["odd/in/line\nbreak\x1b at 9.41\u202fPM.png"]
    sheet = np.asarray(Image.open("seen/sheet_001.png"))
    np.testing.assert_array_equal(sheet[1:85:3, 2:86:3], seen(folder / "a.png"))


def test_split_numbers_the_digits_of_a_sheet(digitnet: Run, make_checkpoint: Callable[..., Path], capsys: Any) -> None:
    sheet = Image.new("L", (400, 200), 255)
    for index in (3, 5):
        sheet.paste(Image.fromarray(255 - DIGITS.images[index]).resize((112, 112)), (40 + 100 * (index - 3), 40))
    sheet.save("sheet.png")
    sheet.crop((0, 0, 160, 200)).save("one.png")
    predict = ("predict", "sheet.png", "one.png", "--json", "--ckpt_path", make_checkpoint(max_score=torch.inf))
    for flags, places in [(["--split"], [(1, 1), (2, 1), (1, 1)]), ([], [(None, None)] * 2)]:
        digitnet(*predict, *flags)
        assert [(one["number"], one["line"]) for one in json.loads(capsys.readouterr().out)] == places


@pytest.mark.parametrize(
    ("values", "said"),
    [({"temperature": None}, ["no calibration"]), ({"max_score": torch.inf}, ["no detector"]), ({"max_score": 9}, [])],
)
def test_a_checkpoint_that_takes_any_picture_for_a_digit_says_so_once(
    make_checkpoint: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    values: dict[str, float | None],
    said: list[str],
) -> None:
    predictor = Predictor.load(make_checkpoint(**values))
    assert [what for message in caplog.messages for what in said if what in message] == said
    assert len(caplog.messages) == len(said)
    assert {reading.status for reading in predictor.read(np.zeros((2, 28, 28), np.uint8))} <= {"ok", "uncertain"}


def test_wrong_usage(digitnet: Run, folder: Path, make_checkpoint: Callable[..., Path], capsys: Any) -> None:
    assert digitnet("predict") == 2
    assert digitnet("predict", folder, "--jsn") == 2
    assert digitnet("predict", folder) == 1
    assert digitnet("predict", folder, "--json", "--csv", "--ckpt_path", make_checkpoint()) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4
    assert "no run has a checkpoints/best.ckpt" in lines[2]
    assert digitnet("predict", "--help") == 0
    assert 'scans/*.png" --json' in capsys.readouterr().out


def test_contact_sheets_that_cannot_be_written_are_told_before_the_reading(
    digitnet: Run, folder: Path, make_checkpoint: Callable[..., Path], capsys: Any
) -> None:
    Path("file").touch()
    assert digitnet("predict", folder, "--save-preprocessed", "file/seen", "--ckpt_path", make_checkpoint()) == 1
    shown = capsys.readouterr()
    told = "cannot write to file/seen (a file is in the way); name another place with --save-preprocessed"
    assert (shown.out, shown.err) == ("", f"digitnet: error: {told}\n")


def test_a_name_that_the_output_cannot_have(folder: Path, make_checkpoint: Callable[..., Path]) -> None:
    picture = folder / "数.png"
    Image.fromarray(DIGITS.images[0]).save(picture)
    command = [
        sys.executable,
        "-m",
        "digitnet",
        "predict",
        "--ckpt_path",
        str(make_checkpoint(max_score=9)),
        str(picture),
    ]
    shown = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, check=False)
    assert b"\\u6570.png" in shown.stdout
    assert (shown.returncode, shown.stderr) == (0, b"")
