"""The command ``export``: a checkpoint as a file that other programs run, compared with it before it is in place."""

from __future__ import annotations

import copy
import hashlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from digitnet.apply.predictor import BATCH_SIZE, Predictor
from digitnet.calibration import CalibratedNet
from digitnet.checkpoints import find_folder, find_newest, read_data_settings, verify_checkpoint
from digitnet.data import Digits, fetch_digits
from digitnet.files import make_writable, replace_whole, shorten
from digitnet.machine import list_versions

TOLERANCE = 1e-4  # between the numbers that the checkpoint gives and those of the exported file
INPUT = "images"
OUTPUTS = {
    "probabilities": "float32 [batch, 10], calibrated, of the digits 0 to 9",
    "logits": "float32 [batch, 10], before calibration",
    "is_digit": "bool [batch], false where the picture looks like no digit at all",
}
OUTPUTS_UNCALIBRATED = {
    "probabilities": "float32 [batch, 10], not calibrated, of the digits 0 to 9",
    "logits": "float32 [batch, 10]",
}
WITHOUT_DETECTOR = {"is_digit": "bool [batch], always true"}
Run = Callable[[np.ndarray], dict[str, np.ndarray]]


class Comparison(NamedTuple):
    """The exported file beside the checkpoint, on test images."""

    num_images: int
    num_errors: int  # of the exported file
    max_logit_difference: float


def export(
    ckpt_path: Path | None = None,
    format: Literal["onnx", "pt2"] = "onnx",
    output: Path | None = None,
    data_dir: Path | None = None,
) -> None:
    """Export a trained network for other programs: scaling and calibration inside, any number of images at once.

      python -m digitnet export                    the newest run's best checkpoint, as <run>/export/digitnet.onnx
      python -m digitnet export --format pt2       for torch.export.load

    The file is run on the test images of the checkpoint's run, and put in place only when its logits and probabilities
    are the checkpoint's to within 1e-4 and it reads the same digit, or none, in every image. A card beside it says what
    it is: digitnet.onnx.json, or digitnet.pt2.json.

    Args:
        ckpt_path: the trained checkpoint; the newest run's best by default.
        format: onnx, for ONNX Runtime and others, without PyTorch; pt2, for PyTorch without digitnet.
        output: the file to write; by default digitnet.onnx or .pt2 in the run's folder export/, or in
            <checkpoint>_export/ beside a checkpoint that has no run.
        data_dir: where the run's data are kept, if not where fit looks by itself.

    Raises:
        ValueError: no such checkpoint, a package is missing, or the exported file differs from the checkpoint.
        OSError: there is no checkpoint, the data cannot be had, or a file cannot be written.
    """
    checkpoint = ckpt_path or find_newest("best.ckpt")
    if output is None:
        output = find_folder(checkpoint, "export") / f"digitnet.{format}"
    if output.suffix != f".{format}" or output.is_dir():
        raise ValueError(f"output is {output}; it must be a file whose name ends in .{format}")
    predictor = Predictor.load(checkpoint)
    if format == "onnx":
        require("onnx", "onnxscript", "onnxruntime")
    source, split, digits = load_test_digits(checkpoint, data_dir)
    make_writable(output.parent, "--output")  # not before: what cannot be exported leaves no folder
    images = torch.from_numpy(digits.images)[:, None]
    print(f"{shorten(checkpoint)}: run on {len(images):,} test images, and then the file made of it", flush=True)
    expected = answer(predictor.model, images)
    with replace_whole(output.with_name(f"{output.name}.json")) as card_part, replace_whole(output) as part:
        write, load = (write_onnx, load_onnx) if format == "onnx" else (write_pt2, load_pt2)
        write(predictor.model, part)
        comparison = compare(load(part), digits, expected)
        card = {
            "name": "digitnet",
            "file": output.name,
            "format": format,
            "sha256": hashlib.sha256(part.read_bytes()).hexdigest(),
            "input": {INPUT: "uint8 [batch, 1, 28, 28], bright ink on 0, as MNIST has it"},
            "outputs": describe_outputs(predictor),
            "uncertain_below": round(float(predictor.model.calibration.min_confidence), 6),
            "temperature": round(float(predictor.model.calibration.temperature), 6),
            "data": {"source": source, "split": split, "tested_on": "the last part"},
            "test": comparison._asdict() | {"accuracy": 1 - comparison.num_errors / comparison.num_images},
            "licence": "MIT",
            "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
            "versions": list_versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        card_part.write_text(json.dumps(card, indent=2) + "\n")
    print(
        f"{shorten(output)}: {output.stat().st_size / 1e6:.1f} MB\n"
        f"compared on {comparison.num_images:,} test images: the same digits, "
        f"logits within {comparison.max_logit_difference:.1e}; {comparison.num_errors:,} mistakes"
    )


def require(*packages: str) -> None:
    """Raise ValueError unless packages can be imported."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f'ONNX needs the package {package} ({error}): pip install -e ".[export]"') from error


def load_test_digits(checkpoint: Path, data_dir: Path | None) -> tuple[str, list[int], Digits]:
    """The source, the split and the test digits that a checkpoint was trained with; MNIST's where it does not say."""
    settings = read_data_settings(verify_checkpoint(checkpoint))
    source, split = settings.get("source", "mnist"), settings.get("split", [60_000, 5_000, 5_000])
    digits = fetch_digits(source, data_dir)
    start = split[0] + split[1]
    if sum(split) != len(digits.labels):
        raise ValueError(
            f"{checkpoint} is of a split of {sum(split):,} images of {source}, which has {len(digits.labels):,} now; "
            "export takes the same, to compare"
        )
    return source, split, Digits(digits.images[start:], digits.labels[start:])


def describe_outputs(predictor: Predictor) -> dict[str, str]:
    """What the file gives, by name, as its card tells."""
    outputs = OUTPUTS if predictor.is_calibrated else OUTPUTS | OUTPUTS_UNCALIBRATED
    return outputs if predictor.model.calibration.has_detector else outputs | WITHOUT_DETECTOR


@torch.inference_mode()
def answer(model: CalibratedNet, images: Tensor) -> dict[str, np.ndarray]:
    """What the checkpoint gives for images (N, 1, 28, 28), by the names of ``OUTPUTS``.

    And ``is_close`` (N,), bool: whether its "no digit" may turn by rounding.
    """
    calibration = model.calibration
    found: list[list[Tensor]] = []
    for batch in images.split(BATCH_SIZE):
        outputs = model(batch)
        margin = (calibration.score(batch, outputs[1]) - calibration.max_score).abs()
        found.append([*outputs, margin <= TOLERANCE])
    names = (*OUTPUTS, "is_close")
    return {name: torch.cat(parts).numpy() for name, parts in zip(names, zip(*found, strict=True), strict=True)}


def compare(run: Run, digits: Digits, expected: dict[str, np.ndarray]) -> Comparison:
    """Run an exported file on test digits, in batches of several sizes.

    Args:
        run: images (B, 1, 28, 28) to the file's outputs by name.
        digits: the test digits.
        expected: what ``answer`` gives of the checkpoint.

    Raises:
        ValueError: a digit is read differently, or a logit or a probability is off by more than 1e-4.
    """
    images = digits.images[:, None]
    ends = [1, 4, *range(4 + BATCH_SIZE, len(images), BATCH_SIZE)]
    batches = [run(batch) for batch in np.split(images, ends) if len(batch)]
    found = {name: np.concatenate([batch[name] for batch in batches]) for name in OUTPUTS}
    differences = {name: float(np.abs(found[name] - expected[name]).max()) for name in ("logits", "probabilities")}
    predictions = found["logits"].argmax(1)
    is_other_digit = predictions != expected["logits"].argmax(1)
    is_other_kind = (found["is_digit"] != expected["is_digit"]) & ~expected["is_close"]
    num_changed = int((is_other_digit | is_other_kind).sum())
    if num_changed or not all(difference <= TOLERANCE for difference in differences.values()):  # NaN is not, either
        told = " and ".join(f"its {name} differ by up to {value:.1e}" for name, value in differences.items())
        raise ValueError(
            f"the exported file is not the checkpoint: {told}, where {TOLERANCE:.0e} is allowed, and it reads "
            f"{num_changed} of {len(images):,} test images differently; nothing was written"
        )
    return Comparison(len(images), int((predictions != digits.labels).sum()), differences["logits"])


def trace(module: CalibratedNet) -> torch.export.ExportedProgram:
    """The module as a graph for any number of images."""
    batch = torch.export.Dim("batch", min=1, max=65_536)
    example = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    # torch.export.save takes weights in channels_last for slices of something larger, and warns.
    module = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    return torch.export.export(module, (example,), dynamic_shapes={INPUT: {0: batch}})


def write_pt2(module: CalibratedNet, path: Path) -> None:
    """Write a file for ``torch.export.load``."""
    content = io.BytesIO()
    torch.export.save(trace(module), content)
    path.write_bytes(content.getvalue())


def load_pt2(path: Path) -> Run:
    """A function that runs a .pt2 file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of PyTorch warn of their own reading
        module = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {name: out.numpy() for name, out in zip(OUTPUTS, module(torch.from_numpy(images)), strict=True)}

    return run


def write_onnx(module: CalibratedNet, path: Path) -> None:
    """Write an ONNX file, the weights inside."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's exporter warns of itself
        program = torch.onnx.export(
            trace(module), input_names=[INPUT], output_names=list(OUTPUTS), dynamo=True, verbose=False
        )
    assert program is not None
    path.write_bytes(program.model_proto.SerializeToString())


def load_onnx(path: Path) -> Run:
    """A function that runs an ONNX file with ONNX Runtime, on the CPU."""
    session: Any = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {INPUT: images}), strict=True))

    return run
