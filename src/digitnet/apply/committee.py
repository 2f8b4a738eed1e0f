"""Several trained networks as one: ``committee`` writes a checkpoint that the other commands read as any other."""

from __future__ import annotations

from pathlib import Path

import torch

from digitnet.calibrate import fit_calibration, fit_max_score
from digitnet.calibration import read_calibration
from digitnet.checkpoints import find_run, load_net, read_data_settings, save_weights
from digitnet.data import MNISTDataModule
from digitnet.files import make_writable
from digitnet.model import Committee, SingleNet, get_members


def committee(checkpoints: list[Path], output: Path = Path("committee.ckpt"), data_dir: str | None = None) -> None:
    """Combine checkpoints into one whose answer is the mean of theirs; test, predict, serve and export take it.

      python -m digitnet committee lightning_logs/final/version_*/checkpoints/best.ckpt
      python -m digitnet test --ckpt_path committee.ckpt

    Temperature and thresholds are fitted anew on the validation images of the first one's run; the detector of
    non-digits is the first one's.

    Args:
        checkpoints: two or more, trained with the same source and split.
        output: the file to write.
        data_dir: where the data are kept, if not where fit looks by itself.

    Raises:
        ValueError: fewer than two checkpoints, or one of them cannot be used, is of other data, is given twice, or
            would be overwritten.
        OSError: the data cannot be had, or the file cannot be written.
    """
    paths = [Path(path) for path in checkpoints]
    if len(paths) < 2:
        raise ValueError(f"a committee needs two checkpoints or more; given: {', '.join(map(str, paths)) or 'none'}")
    if output.is_dir():
        raise ValueError(f"output is {output}, which is a folder; give a file, such as committee.ckpt")
    if find_run(output):
        raise ValueError(f"output is {output}, which is among a run's own checkpoints; give a file elsewhere")
    files = [path.resolve() for path in paths]
    for path, file in zip(paths, files, strict=True):
        if files.count(file) > 1:
            raise ValueError(f"{path} is given twice; give each member once")
        if file == output.resolve():
            raise ValueError(f"output is {output}, which is a member; give another file: --output FILE.ckpt")
    runs = [find_run(path) for path in paths]
    for path, run in zip(paths, runs, strict=True):
        if run and runs.count(run) > 1:
            print(f"{path}: not the only one of {run}; such err alike, and gain little", flush=True)
    loaded = [load_net(path) for path in paths]
    first = loaded[0][1]
    known = read_data_settings(first)
    members: list[SingleNet] = []
    for path, (net, checkpoint) in zip(paths, loaded, strict=True):
        if read_data_settings(checkpoint) != known:
            other = read_data_settings(checkpoint)
            raise ValueError(f"{path} was trained on {other}, {paths[0]} on {known}; give members of the same data")
        is_trained_at_once = "columns" in checkpoint.get("hyper_parameters", {})
        if isinstance(net, Committee) and not is_trained_at_once:
            raise ValueError(f"{path} is a committee already; give its members")
        for member in get_members(net):
            if any(is_same(member, one) for one in members):
                raise ValueError(f"{path} holds a network that another holds, too; train each with a seed of its own")
            members.append(member)
    firsts = read_calibration(first, paths[0])
    module = MNISTDataModule(**known, data_dir=data_dir)
    module.setup("validate")
    make_writable(output.parent, "--output")  # not before: what makes no committee leaves no folder
    net = Committee(members)
    num_images = len(module.datasets[1])
    print(f"{len(members)} networks: fitting temperature and thresholds on {num_images:,} images", flush=True)
    calibration = fit_calibration(net, module.datasets[0], module.datasets[1], num_digits=0)
    if firsts.has_detector:
        calibration.detector = firsts.detector
        images = module.datasets[1].images
        fit_max_score(calibration, torch.zeros(len(images), 10), images)
    data_settings = first.get("datamodule_hyper_parameters", {})
    save_weights(net, output, calibration=calibration.state_dict(), datamodule_hyper_parameters=data_settings)
    num_parameters = sum(weight.numel() for weight in net.parameters())
    print(f"{output}: {len(members)} networks, {num_parameters:,} parameters")


def is_same(one: SingleNet, other: SingleNet) -> bool:
    """Whether two networks have the same weights."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
