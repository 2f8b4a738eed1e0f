from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run

from digitnet.apply import export as module
from digitnet.apply.predictor import Predictor
from digitnet.data import load_bundled_digits
from digitnet.model import ARCHITECTURES

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np, onnxruntime
images = np.load(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
np.save(sys.argv[3], session.run(["probabilities"], {"images": images})[0])
"""


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_the_exported_file_reads_as_the_checkpoint_does(
    digitnet: Run, trained_run: Path, tmp_path: Path, capsys: Any, format: str
) -> None:
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    checkpoint = trained_run / "checkpoints" / "best.ckpt"
    output = tmp_path / "out" / f"net.{format}"
    assert digitnet("export", "--ckpt_path", checkpoint, "--format", format, "--output", output) == 0
    assert "40 test images: the same digits" in capsys.readouterr().out
    assert sorted(path.name for path in output.parent.iterdir()) == [f"net.{format}", f"net.{format}.json"]
    card = json.loads(output.with_name(f"net.{format}.json").read_text())
    assert "calibrated" in card["outputs"]["probabilities"].split(", ")
    assert card["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert (card["data"]["source"], card["test"]["num_images"]) == ("digits", 40)

    images = load_bundled_digits().images[:7]
    expected = np.array([reading.probabilities for reading in Predictor.load(checkpoint).read(images)])
    if format == "pt2":
        with torch.inference_mode():
            found = torch.export.load(output).module()(torch.from_numpy(images)[:, None])[0].numpy()
    else:
        np.save(tmp_path / "images.npy", images[:, None])
        paths = (output, tmp_path / "images.npy", tmp_path / "found.npy")
        subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *map(str, paths)], check=True)
        found = np.load(tmp_path / "found.npy")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("architecture", ["upright", "zoom"])
def test_the_exported_file_sets_digits_upright(
    digitnet: Run, trained_run: Path, tmp_path: Path, capsys: Any, architecture: str, format: str
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
    stored = torch.load(trained_run / "checkpoints" / "best.ckpt", weights_only=True)
    stored["state_dict"] = {
        f"net.{name}": weight for name, weight in ARCHITECTURES[architecture]().state_dict().items()
    }
    torch.save(stored, tmp_path / "upright.ckpt")
    assert digitnet("export", "--ckpt_path", tmp_path / "upright.ckpt", "--format", format) == 0
    assert "40 test images: the same digits" in capsys.readouterr().out  # compared by the command


@pytest.mark.parametrize(
    ("wrong", "by"), [("probabilities", 0.001), ("probabilities", math.nan), ("logits", 0.001), ("is_digit", 1)]
)
def test_a_file_that_differs_is_not_put_in_place(
    digitnet: Run,
    trained_run: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    wrong: str,
    by: float,
) -> None:
    load = module.load_pt2

    def load_wrongly(path: Path) -> module.Run:
        run = load(path)

        def run_wrongly(images: np.ndarray) -> dict[str, np.ndarray]:
            outputs = run(images)
            return outputs | {wrong: ~outputs[wrong] if wrong == "is_digit" else outputs[wrong] + by}

        return run_wrongly

    monkeypatch.setattr(module, "load_pt2", load_wrongly)
    output = tmp_path / "net.pt2"
    args = ("--ckpt_path", trained_run / "checkpoints" / "best.ckpt", "--format", "pt2", "--output", output)
    assert digitnet("export", *args) == 1
    assert "is not the checkpoint" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_card_of_a_checkpoint_without_calibration_claims_none(
    digitnet: Run, trained_run: Path, tmp_path: Path
) -> None:
    for name, told in (("last", "not calibrated"), ("best", "calibrated, of")):  # this one without a detector
        checkpoint, output = trained_run / "checkpoints" / f"{name}.ckpt", tmp_path / f"{name}.pt2"
        assert digitnet("export", "--ckpt_path", checkpoint, "--format", "pt2", "--output", output) == 0
        outputs = json.loads((tmp_path / f"{name}.pt2.json").read_text())["outputs"]
        assert told in outputs["probabilities"]
        assert outputs["is_digit"] == "bool [batch], always true"


@pytest.mark.parametrize("output", ["model.json", "model.txt", "folder.pt2"])
def test_an_output_that_cannot_be_is_told_before_the_work(
    digitnet: Run, trained_run: Path, tmp_path: Path, capsys: Any, output: str
) -> None:
    (tmp_path / "folder.pt2").mkdir()
    checkpoint = trained_run / "checkpoints" / "best.ckpt"
    assert digitnet("export", "--ckpt_path", checkpoint, "--format", "pt2", "--output", output) == 1
    assert f"output is {output}; it must be a file whose name ends in .pt2" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt2"]


def test_a_missing_package_is_one_line(
    digitnet: Run, trained_run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxscript", sys)
    monkeypatch.setitem(sys.modules, "onnx", sys)
    assert digitnet("export", "--ckpt_path", trained_run / "checkpoints" / "best.ckpt") == 1
    assert "ONNX needs the package onnxruntime" in capsys.readouterr().err
