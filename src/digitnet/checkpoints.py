"""Where the checkpoints of runs lie, whether a file is one, and how to write one.

Imports no Lightning, which takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digitnet.files import replace_whole, shorten, tell_command
from digitnet.model import Committee, DigitNet, Network, SingleNet, UprightNet, ZoomNet

log = logging.getLogger(__name__)
LOG_DIR = Path("lightning_logs")
FIT_HINT = "python -m digitnet fit --config configs/final.yaml"


def find_newest(filename: str) -> Path:
    """The most recently written ``<run>/checkpoints/<filename>`` under a log folder, but for a study's finished runs.

    Where a run began after that and has none, a warning says so.

    Raises:
        FileNotFoundError: when there is none.
    """
    found = [path for path in LOG_DIR.glob(f"**/checkpoints/{filename}") if not _is_finished(path.parents[1])]
    if not found:
        here = Path("checkpoints", filename)  # of a training without a logger
        hint = f"for {here}, type --ckpt_path {here}" if here.is_file() else f"train one first: {FIT_HINT}"
        raise FileNotFoundError(f"no run has a checkpoints/{filename} under {LOG_DIR}/ yet; {hint}")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    configs = [path for path in LOG_DIR.glob("**/config.yaml") if not _is_finished(path.parent)]
    begun = max(configs, key=lambda path: path.stat().st_mtime, default=newest)
    if begun.stat().st_mtime > newest.stat().st_mtime and not (begun.parent / "checkpoints" / filename).exists():
        log.warning("%s is newer than %s, but has no checkpoints/%s", begun.parent, newest, filename)
    return newest


def _is_finished(run: Path) -> bool:
    return (run / "result.json").exists()


def find_run(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint belongs to, None when it lies elsewhere."""
    folder = checkpoint.absolute().parent
    run = shorten(folder.parent)  # as when the run began: Lightning compares the text
    return run if folder.name == "checkpoints" and (run / "config.yaml").is_file() else None


def find_folder(checkpoint: Path, name: str) -> Path:
    """Where what is made of a checkpoint goes: its run's ``<name>/``, or ``<checkpoint>_<name>/`` beside it."""
    run = find_run(checkpoint)
    return run / name if run else shorten(checkpoint.with_name(f"{checkpoint.stem}_{name}"))


def verify_checkpoint(path: Path, to_resume: bool = False) -> dict[str, Any]:
    """Check that a file is a DigitClassifier's checkpoint; nothing in it is executed.

    Args:
        path: the file.
        to_resume: whether training is to go on from it, which takes more than the weights.

    Returns:
        What it holds: ``state_dict``, on the CPU, and what else Lightning and the callbacks put there.

    Raises:
        ValueError: it is missing, damaged, no checkpoint of Lightning's, of another architecture, or holds weights only
            where more is needed.
    """
    if path.is_dir():
        raise ValueError(f'"{path}" is a folder; give a checkpoint, as {path / "checkpoints" / "best.ckpt"} of a run')
    if not path.is_file():
        raise ValueError(f'"{path}": no such file; give the path of a checkpoint, a .ckpt')
    try:
        # PyTorch's own reader leaves the checksums alone; a file of its older formats has none.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"damaged: the checksum of {damaged} is wrong")
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can fail in any way
        reason = str(error).split(". ")[0].split("\n")[0]
        if " " not in reason:  # the number of a byte, or nothing
            reason = "PyTorch did not write it"
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {reason}") from error
    for key in ("state_dict", "pytorch-lightning_version"):
        if not isinstance(checkpoint, dict) or key not in checkpoint:
            raise ValueError(f"{path} is not a Lightning checkpoint: it has no {key}")
    if not isinstance(checkpoint["state_dict"], dict):
        raise ValueError(f"{path} is not a Lightning checkpoint: its state_dict is no dict")
    with torch.device("meta"):
        expected = {f"net.{name}": weight.shape for name, weight in make_net(checkpoint).state_dict().items()}
    found = {name: weight.shape for name, weight in checkpoint["state_dict"].items() if isinstance(weight, Tensor)}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            sizes = [str(list(shapes[name])) if name in shapes else "none" for shapes in (expected, found)]
            raise ValueError(f"{path} is of another architecture: {name} should be {sizes[0]}, and is {sizes[1]}")
    if to_resume and "optimizer_states" not in checkpoint:
        raise ValueError(f"{path} holds weights only; to go on with training, give a last.ckpt")
    return checkpoint


def read_data_settings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The source and the split that a checkpoint was trained with, as far as it holds them."""
    settings = checkpoint.get("datamodule_hyper_parameters")
    known = settings if isinstance(settings, dict) else {}
    found: dict[str, Any] = {"source": known["source"]} if isinstance(known.get("source"), str) else {}
    split = known.get("split")
    if isinstance(split, (tuple, list)) and [type(size) for size in split] == [int, int, int]:
        found["split"] = list(split)
    return found


def is_same_source(one: str, other: str) -> bool:
    """Whether two sources of digits are the same: one name, or one file, in whatever way its path is written."""
    if one == other:
        return True
    from digitnet.data.sources import NAMES  # imports Lightning

    with contextlib.suppress(OSError, RuntimeError, ValueError):  # another machine's "~user", a link to itself
        return not {one, other} & set(NAMES) and Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
    return False


def count_trained_on(settings: dict[str, Any], source: str, start: int, num_images: float = math.inf) -> int:
    """How many of a source's images, from the one at ``start`` on, a checkpoint of these data was trained on."""
    known = "source" in settings and "split" in settings and is_same_source(settings["source"], source)
    return int(min(num_images, max(0, settings["split"][0] - start))) if known else 0


def read_temperature(checkpoint: dict[str, Any]) -> float | None:
    """What a checkpoint's calibration divides logits by; None where it holds none."""
    calibration = checkpoint.get("calibration")
    temperature = calibration.get("temperature") if isinstance(calibration, dict) else None
    return float(temperature) if isinstance(temperature, Tensor) and temperature.numel() == 1 else None


def make_net(checkpoint: dict[str, Any]) -> Network:
    """An untrained network of the kind that a checkpoint's ``state_dict`` holds the weights of."""
    names = [str(name).removeprefix("net.") for name in checkpoint["state_dict"] if str(name).startswith("net.")]
    members: dict[str, list[str]] = {}  # by number
    for name in names:
        if name.startswith("members."):
            number, _, name_in_member = name.removeprefix("members.").partition(".")
            members.setdefault(number, []).append(name_in_member)
    return Committee([_make_single(each) for each in members.values()]) if members else _make_single(names)


def is_of_architecture(checkpoint: dict[str, Any], net: nn.Module) -> bool:
    """Whether a checkpoint holds the weights of a network like this one."""
    with torch.device("meta"):
        return make_net(checkpoint).state_dict().keys() == net.state_dict().keys()


def _make_single(names: list[str]) -> SingleNet:
    keys = {name.partition(".")[0] for name in names}
    for kind in (UprightNet, ZoomNet):
        if kind.KEY in keys:
            return kind(batch_norm=f"{kind.KEY}.norms.conv1.mean" in names)
    return DigitNet()


def load_net(path: Path) -> tuple[Network, dict[str, Any]]:
    """The network of a checkpoint, in evaluation mode, and all that the file holds; nothing in it is executed.

    Raises:
        ValueError: the file is not a DigitClassifier's checkpoint.
    """
    checkpoint = verify_checkpoint(path)
    net = make_net(checkpoint)
    net.load_state_dict({name: checkpoint["state_dict"][f"net.{name}"] for name in net.state_dict()})
    for each in list(net.modules()):
        if isinstance(each, UprightNet):
            each.fold()
    return net.eval(), checkpoint


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all. Of ``last.ckpt``, the one before it is kept as ``previous.ckpt``.

    Raises:
        OSError: it cannot be written, as when the disk is full; the old one is as it was.
    """
    content = io.BytesIO()  # 17 MB of a DigitNet; PyTorch writing to a file by itself does not say why it fails
    torch.save(checkpoint, content)
    try:
        if path.name == "last.ckpt" and is_whole(path):  # a damaged one would take the place of one to go on from
            with replace_whole(path.with_name("previous.ckpt")) as part:
                try:
                    os.link(path, part)
                except OSError:  # a disk without second names for a file
                    part.write_bytes(path.read_bytes())
        with replace_whole(path) as part:
            part.write_bytes(content.getbuffer())
    except OSError as error:
        last, previous = path.with_name("last.ckpt"), path.with_name("previous.ckpt")
        before = (path, previous) if path == last else (path,)
        kept = "the one before it is kept" if any(map(is_whole, before)) else "nothing is kept"
        can_go_on = last.is_file() and any(map(is_whole, (last, previous))) and find_run(last)
        advice = f". Make room, then go on: {tell_command('fit', '--ckpt_path', shorten(last))}" if can_go_on else ""
        raise OSError(f"cannot save {path} ({os.strerror(error.errno or 0)}); {kept}{advice}") from error


def is_whole(path: Path) -> bool:
    """Whether a file is there and is a zip archive, as PyTorch writes them, of which every checksum is right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged one can fail in any way
        return False


def save_weights(net: nn.Module, path: Path, **more: Any) -> None:
    """Write a network as a checkpoint of no training, for ``test``, ``predict`` and the like.

    Args:
        net: its weights are written.
        path: the file; whole or not at all.
        more: what else it shall hold, such as ``calibration``.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    ours = {
        "state_dict": {f"net.{name}": weight for name, weight in net.state_dict().items()},
        "hyper_parameters": {},
        "pytorch-lightning_version": version("lightning"),
        "epoch": 0,
        "global_step": 0,
    }
    save_checkpoint(ours | more, path)


def choose_resumable(path: Path) -> tuple[Path, dict[str, Any], str]:
    """The checkpoint to go on from: the one given or, where a ``last.ckpt`` is damaged, the one before it.

    Returns:
        The path, what the file holds, and what is wrong with the one given, empty where it is sound.

    Raises:
        ValueError: neither can be used.
    """
    try:
        return path, verify_checkpoint(path, to_resume=True), ""
    except ValueError as error:
        previous = path.with_name("previous.ckpt")
        if path.name != "last.ckpt" or not path.is_file():
            raise
        try:
            return previous, verify_checkpoint(previous, to_resume=True), str(error)
        except ValueError as other:
            run = find_run(path)
            again = f"; start anew: {tell_command('fit', '--config', run / 'config.yaml')}" if run else ""
            why = f"{other}" if previous.is_file() else "there is no previous.ckpt beside it"
            raise ValueError(f"{error}; {why}{again}") from error
