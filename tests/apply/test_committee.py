"""A committee answers with the mean of its members' probabilities, wherever a checkpoint is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run

from digitnet import DigitClassifier
from digitnet.apply.predictor import Predictor
from digitnet.checkpoints import load_net
from digitnet.data import load_bundled_digits
from digitnet.model import Committee, DigitNet
from digitnet.study.report import report


@pytest.fixture(scope="module")
def members(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints of the same data: the trained one, and two with weights of their own."""
    folder = tmp_path_factory.mktemp("members")
    stored = torch.load(trained_run / "checkpoints" / "best.ckpt", weights_only=True)
    paths = [folder / f"{name}.ckpt" for name in "abc"]
    torch.save(stored, paths[0])
    for seed, path in enumerate(paths[1:]):
        torch.manual_seed(seed)
        weights = {f"net.{name}": weight for name, weight in DigitNet().state_dict().items()}
        torch.save({**stored, "state_dict": weights}, path)
    return paths


@pytest.fixture
def committee(members: list[Path], tmp_path: Path, digitnet: Run) -> Path:
    assert digitnet("committee", *members, "--output", "all.ckpt") == 0
    return tmp_path / "all.ckpt"


def test_test_scores_the_mean_of_the_members(
    digitnet: Run, members: list[Path], committee: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = load_bundled_digits()
    images, labels = torch.from_numpy(digits.images[-40:])[:, None], torch.from_numpy(digits.labels[-40:]).long()
    with torch.no_grad():
        each = torch.stack([load_net(path)[0](images).softmax(dim=1) for path in members])
    mean = each.mean(dim=0)
    assert len(torch.unique(each.argmax(dim=2), dim=0)) == 3  # they do not agree

    assert digitnet("test", "--ckpt_path", committee, "--trainer.precision", "32-true") == 0
    metrics = json.loads((tmp_path / "all_report" / "metrics.json").read_text())
    assert metrics["num_errors"] == int((mean.argmax(dim=1) != labels).sum())
    report(tmp_path / "all_report")  # as test itself does; the fixture leaves that out
    page = (tmp_path / "all_report" / "report.html").read_text()
    assert "on 40 test images (digits)" in page
    assert "This checkpoint lies outside a run's folder" in page
    assert "after epoch" not in page
    (tmp_path / "all_report" / "predictions.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"test again: python -m digitnet test --ckpt_path .*/all\.ckpt$"):
        report(tmp_path / "all_report")

    found = np.array([reading.probabilities for reading in Predictor.load(committee).read(digits.images[-40:])])
    temperature = float(torch.load(committee, weights_only=True)["calibration"]["temperature"])
    expected = (mean.log() / temperature).softmax(dim=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_it_is_exported_like_any_other(digitnet: Run, committee: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digitnet("export", "--ckpt_path", committee, "--format", "pt2") == 0
    assert "40 test images: the same digits" in capsys.readouterr().out
    assert committee.with_name("all_export").joinpath("digitnet.pt2").is_file()


def test_a_committee_that_cannot_be_written_is_told_without_advice_on_training(
    digitnet: Run, members: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert digitnet("committee", *members[:2], "--output", "file/all.ckpt") == 1
    told = "digitnet: error: cannot write to file (a file is in the way); name another place with --output\n"
    assert capsys.readouterr().err == told


def test_what_makes_no_committee_is_told_in_one_line(
    digitnet: Run, members: list[Path], committee: Path, tmp_path: Path, capsys: Any
) -> None:
    other = torch.load(members[0], weights_only=True)
    other["datamodule_hyper_parameters"] = {"source": "digits", "split": (1297, 250, 250)}
    torch.save(other, tmp_path / "other.ckpt")
    (tmp_path / "copy.ckpt").write_bytes(members[0].read_bytes())
    before = set(tmp_path.rglob("*"))
    attempts: list[tuple[list[Any], str]] = [
        (["committee", members[0]], f"two checkpoints or more; given: {members[0]}"),
        (["committee", "nosuch*.ckpt"], "two checkpoints or more; given: nosuch*.ckpt"),
        (["committee", members[0], committee], "all.ckpt is a committee already; give its members"),
        (["committee", members[0], "other.ckpt"], "other.ckpt was trained on"),
        (
            ["committee", members[1], members[0], "copy.ckpt"],
            "copy.ckpt holds a network that another holds, too",
        ),
        (["committee", members[0], "none.ckpt"], '"none.ckpt": no such file'),
        (["committee", *members, "--output", "."], "output is ., which is a folder; give a file"),
        (["fit", "--ckpt_path", committee], "holds weights only"),
    ]
    for args, line in attempts:
        capsys.readouterr()
        assert digitnet(*args, *(["--output", "new.ckpt"] if args[0] == "committee" and "." not in args else [])) == 1
        errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("digitnet: error: ")]
        assert len(errors) == 1
        assert line in errors[0]
    assert set(tmp_path.rglob("*")) == before


def test_columns_that_were_trained_at_once_are_members_each(
    digitnet: Run, members: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    nets = [load_net(path)[0] for path in members]
    stored = torch.load(members[0], weights_only=True)
    columns = [net for net in nets[:2] if isinstance(net, DigitNet)]
    weights = {f"net.{name}": weight for name, weight in Committee(columns).state_dict().items()}
    torch.save({**stored, "state_dict": weights, "hyper_parameters": {"columns": 2}}, "columns.ckpt")
    assert digitnet("committee", "columns.ckpt", members[2], "--output", "all.ckpt") == 0
    assert f"all.ckpt: 3 networks, {3 * 1_413_834:,} parameters" in capsys.readouterr().out
    images = torch.rand(4, 1, 28, 28)
    with torch.no_grad():
        mean = torch.stack([net(images).softmax(dim=1) for net in nets]).mean(dim=0)
        torch.testing.assert_close(load_net(Path("all.ckpt"))[0](images).softmax(dim=1), mean)


def test_a_calibration_of_another_version_is_told_in_one_line(
    digitnet: Run, members: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = torch.load(members[0], weights_only=True)
    del old["calibration"]["energy_weight"]
    torch.save(old, "old.ckpt")
    assert digitnet("committee", "old.ckpt", members[1]) == 1
    line = "digitnet: error: old.ckpt: its calibration is of another version of digitnet; fit again\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "committee.ckpt").exists()


def test_it_is_loaded_as_a_module_without_a_trainer(committee: Path) -> None:
    images = torch.rand(2, 1, 28, 28)
    with torch.inference_mode():
        found = DigitClassifier.load_from_checkpoint(committee, weights_only=True).eval()(images)
        torch.testing.assert_close(found, load_net(committee)[0](images))


def test_a_member_is_neither_counted_twice_nor_overwritten(
    digitnet: Run, members: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = members[0].read_bytes()
    assert digitnet("committee", *members[:2], "--output", members[0]) == 1
    assert f"output is {members[0]}, which is a member; give another file" in capsys.readouterr().err
    assert members[0].read_bytes() == before
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("seed_everything: 1\n")
    assert digitnet("committee", *members[:2], "--output", run / "checkpoints" / "best.ckpt") == 1
    assert "best.ckpt, which is among a run's own checkpoints; give a file elsewhere" in capsys.readouterr().err
    assert digitnet("committee", members[0], members[0]) == 1
    assert f"{members[0]} is given twice; give each member once" in capsys.readouterr().err


def test_members_of_one_run_are_told_of(
    digitnet: Run, trained_run: Path, members: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    both = [run / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    shutil.copy(members[2], both[1])  # its last epoch may be its best
    assert digitnet("committee", *both, members[1], "--output", "of_run.ckpt") == 0
    assert capsys.readouterr().out.count("such err alike, and gain little") == 2
