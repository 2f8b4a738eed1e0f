"""``test`` on 1, 2 and 3 processes: the same mistakes, image by image?

    python benchmarks/exact_scores.py --checkpoint best.ckpt --output results/exact_scores.json

Scores the last 5,000 and the last 10,001 images of a data set, 10,001 being a number that neither 2 nor 3 divides, with
``python -m digitnet test`` on that many CPU processes (gloo), in float32.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from digitnet.checkpoints import find_folder, save_checkpoint, verify_checkpoint
from digitnet.data import fetch_digits
from digitnet.files import write_json
from digitnet.machine import describe_environment

SIZES = (5_000, 10_001)
PROCESSES = (1, 2, 3)
NUM_OTHERS = 1 + max(PROCESSES)  # images not scored: one to train on, and one to validate for each process


def score(folder: Path, size: int, processes: int) -> dict[str, Any]:
    """Mistakes and predictions of one test."""
    flags = [
        "--ckpt_path", "model.ckpt", "--data.source", "digits.npz", "--data.split", f"[1,{NUM_OTHERS - 1},{size}]",
        "--trainer.accelerator", "cpu", "--trainer.devices", str(processes), "--trainer.precision", "32-true",
    ]  # fmt: skip
    strategy = ["--trainer.strategy", "ddp"] if processes > 1 else []
    command = [sys.executable, "-m", "digitnet", "test", *flags, *strategy]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr}")
    report = find_folder(folder / "model.ckpt", "report")
    rows = list(csv.DictReader((report / "predictions.csv").read_text().splitlines()))
    metrics = json.loads((report / "metrics.json").read_text())
    return {
        "num_images": metrics["num_images"],
        "num_errors": metrics["num_errors"],
        "indices": [int(row["index"]) for row in rows],
        "predictions": [int(row["prediction"]) for row in rows],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", default="mnist", help="as data.source of a config")
    parser.add_argument("--output", type=Path, default=Path("exact_scores.json"))
    args = parser.parse_args()
    try:
        stored, digits = verify_checkpoint(args.checkpoint), fetch_digits(args.data)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if len(digits.labels) < (needed := max(SIZES) + NUM_OTHERS):
        parser.error(f"data is {args.data}, {len(digits.labels):,} images; {needed:,} or more are needed")
    stored.pop("datamodule_hyper_parameters", None)  # else the report tells these data from those it was trained on
    table: dict[str, dict[str, int]] = {}
    is_exact = True
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="digitnet-exact-") as name:
            save_checkpoint(stored, Path(name, "model.ckpt"))
            few = slice(-size - NUM_OTHERS, None)
            np.savez(Path(name, "digits.npz"), images=digits.images[few], labels=digits.labels[few])
            results = [score(Path(name), size, processes) for processes in PROCESSES]
        for processes, result in zip(PROCESSES, results, strict=True):
            is_exact &= result == results[0] and result["indices"] == list(range(NUM_OTHERS, size + NUM_OTHERS))
            table.setdefault(str(size), {})[str(processes)] = result["num_errors"]
            print(f"{size:,} images, {processes} processes: {result['num_errors']} mistakes", flush=True)
    options = f"--checkpoint {args.checkpoint.name} --data {Path(args.data).name}"
    report = {
        "mistakes": table,
        "is_exact": is_exact,
        "command": f"python benchmarks/exact_scores.py {options}",
        **describe_environment(),
    }
    write_json(args.output, report)
    print("equal, image by image" if is_exact else "NOT EQUAL")
    return 0 if is_exact else 1


if __name__ == "__main__":
    sys.exit(main())
