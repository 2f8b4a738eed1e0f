"""``fit`` killed at random moments, and gone on with: is the result the one of a run that was never killed?

    python benchmarks/kills.py --kills 50 --output results/kills.json

Short real trainings on the bundled digits (few steps, many epochs, so that much of the time is spent on checkpoints).
Each is killed (SIGKILL) at a moment drawn uniformly from those between the first file of its folder and its end; every
other one a little later, when a checkpoint is next being written. Then it is gone on with by ``fit --ckpt_path last``,
and compared bit for bit with a run that was left alone: weights, optimizer, schedule and counters in last.ckpt, the
weights in best.ckpt, and the curves in TensorBoard. After each kill every checkpoint there must be whole, and at the
end no temporary file may be left. Written beside the JSON: a Markdown page.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from digitnet.checkpoints import verify_checkpoint
from digitnet.files import PART, write_file, write_json
from digitnet.machine import describe_environment

ROOT = Path(__file__).parent.parent
FIT = [
    "fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.limit_train_batches", "3",
    "--early_stopping.patience", "100", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu",
    "--pictures.every_n_epochs", "0", "--calibration.num_digits", "0",
]  # fmt: skip
RUN = Path("lightning_logs/quickstart/version_0")
TAGS = ("train/loss", "train/acc", "val/loss", "val/acc", "hp/val_acc")
CONTEXT = multiprocessing.get_context("forkserver")  # each a process of its own, spared of imports that take seconds


def work(folder: Path, args: list[str]) -> None:
    """Run a digitnet command in a folder; what it says goes to output.txt."""
    os.chdir(folder)
    with Path("output.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    from digitnet.__main__ import main

    sys.argv[1:] = args
    sys.exit(main(args))


def start(folder: Path, args: list[str]) -> Any:
    process = CONTEXT.Process(target=work, args=(folder, args))
    process.start()
    return process


def wait_for_folder(folder: Path, process: Any) -> float:
    """When the run's folder appeared, on time.monotonic's clock."""
    while not (folder / RUN).exists() and process.is_alive():
        time.sleep(0.001)
    return time.monotonic()


def load_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in TAGS}


def compare(expected: Any, found: Any, name: str = "") -> list[str]:
    """The names of what differs, bit for bit."""
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(expected, found) else [name]
    if isinstance(expected, dict):
        if expected.keys() != found.keys():
            return [name]
        return [where for key in expected for where in compare(expected[key], found[key], f"{name}/{key}")]
    if isinstance(expected, (list, tuple)):
        if len(expected) != len(found):
            return [name]
        pairs = enumerate(zip(expected, found, strict=True))
        return [where for i, (one, two) in pairs for where in compare(one, two, f"{name}/{i}")]
    return [] if expected == found else [name]


def load_result(folder: Path) -> dict[str, Any]:
    run = folder / RUN
    last, best = (torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
    stopping = {key: state for key, state in last["callbacks"].items() if "EarlyStopping" in key}
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")
    kept = {key: last[key] for key in keys}
    return {**kept, "early stopping": stopping, "best": best["state_dict"], "curves": load_curves(run)}


def find_torn(folder: Path) -> list[str]:
    """Checkpoints and configs that are there and not whole."""
    torn = []
    for path in (folder / RUN).glob("checkpoints/[!.]*"):
        try:
            verify_checkpoint(path)
        except ValueError as error:
            torn.append(str(error))
    with contextlib.suppress(FileNotFoundError):
        if not isinstance(yaml.safe_load((folder / RUN / "config.yaml").read_text()), dict):
            torn.append("config.yaml")
    return torn


def kill_once(fit: list[str], after_s: float, while_saving: bool, expected: dict[str, Any]) -> dict[str, Any]:
    """Kill a run a while after its folder appears or when it next saves, go on with it, and compare."""
    with tempfile.TemporaryDirectory(prefix="digitnet-kills-") as name:
        folder = Path(name)
        process = start(folder, fit)
        begin = wait_for_folder(folder, process)
        time.sleep(max(0.0, begin + after_s - time.monotonic()))
        while while_saving and process.is_alive() and not list((folder / RUN).glob(f"checkpoints/{PART}*")):
            pass
        process.kill()
        process.join()
        checkpoints = folder / RUN / "checkpoints"
        has_last = (checkpoints / "last.ckpt").exists()
        torn = find_torn(folder)
        is_sound = has_last and not torn
        trial: dict[str, Any] = {
            "after_s": round(after_s, 3),
            "epochs_kept": torch.load(checkpoints / "last.ckpt", weights_only=True)["epoch"] + 1 if is_sound else 0,
            "was_saving": bool(list(folder.rglob(f"{PART}*"))),
            "had_ended": process.exitcode == 0,
            "torn": torn,
        }
        # Without a checkpoint there is nothing to go on with: it is started again, in a folder of its own.
        again = start(folder, ["fit", "--ckpt_path", "last"] if has_last else [*fit, "--trainer.logger.name", "again"])
        again.join()
        if not has_last and (folder / "lightning_logs" / "again").exists():
            (folder / RUN).rename(folder / "killed")
            (folder / "lightning_logs" / "again" / "version_0").rename(folder / RUN)
        trial["resumed"] = again.exitcode == 0
        if again.exitcode == 0:
            trial["differs"] = compare(expected, load_result(folder))
            trial["left_behind"] = [path.name for path in (folder / RUN).rglob(f"{PART}*")]
        else:
            trial["output"] = (folder / "output.txt").read_text()[-2000:]
        return trial


def is_clean(trial: dict[str, Any]) -> bool:
    return bool(trial["resumed"]) and not (trial["torn"] or trial["differs"] or trial["left_behind"])


def describe(result: dict[str, Any]) -> str:
    trials = result["trials"]
    moments = Counter(trial["epochs_kept"] for trial in trials)
    return "\n".join(
        [
            "# Killed and gone on with",
            "",
            "| | |",
            "|---|---|",
            f"| kills (SIGKILL) | {len(trials)} |",
            f"| before the first checkpoint, started again | {moments[0]} |",
            f"| while a checkpoint was being written | {sum(trial['was_saving'] for trial in trials)} |",
            f"| after the run had ended | {sum(trial['had_ended'] for trial in trials)} |",
            f"| clean resumes | {sum(trial['resumed'] for trial in trials)} |",
            f"| torn files | {sum(len(trial['torn']) for trial in trials)} |",
            f"| temporary files left | {sum(len(trial.get('left_behind', [])) for trial in trials)} |",
            f"| **same result, bit for bit** | **{sum(map(is_clean, trials))} of {len(trials)}** |",
            "",
            f"Runs of {result['epochs']} epochs of 3 steps, {result['whole_run_s']:.1f} s each. {result['hardware']}; "
            f"{result['date'][:10]}; `{result['command']}`",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=Path("kills.json"))
    args = parser.parse_args()
    CONTEXT.set_forkserver_preload(["digitnet.cli", "digitnet.__main__"])
    fit = [*FIT, "--trainer.max_epochs", str(args.epochs)]
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="digitnet-kills-") as name:
        process = start(Path(name), fit)
        begin = wait_for_folder(Path(name), process)
        process.join()
        whole_run_s = time.monotonic() - begin
        if process.exitcode:
            print((Path(name) / "output.txt").read_text(), file=sys.stderr)
            return 1
        expected = load_result(Path(name))
    trials = []
    for number in range(args.kills):
        trials.append(kill_once(fit, draw.uniform(0, whole_run_s), number % 2 == 1, expected))
        print(f"{number + 1:3d}", "clean" if is_clean(trials[-1]) else "FAILED", trials[-1], flush=True)
    result = {
        "kills": args.kills,
        "clean": sum(map(is_clean, trials)),
        "epochs": args.epochs,
        "whole_run_s": round(whole_run_s, 2),
        "command": f"python benchmarks/kills.py --kills {args.kills} --epochs {args.epochs} --seed {args.seed}",
        **describe_environment(),
        "trials": trials,
    }
    write_json(args.output, result)
    write_file(args.output.with_suffix(".md"), describe(result).encode())
    return 0 if result["clean"] == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
