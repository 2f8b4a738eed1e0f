"""Teacher against probabilities worked out by hand, and a real training towards it."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import QUICKSTART, Run

from digitnet import DigitClassifier, DigitNet, Teacher, UprightNet, ZoomNet
from digitnet.checkpoints import save_checkpoint
from digitnet.data import load_bundled_digits
from digitnet.model import Committee, get_members


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {f"net.{name}": weight for name, weight in DigitNet().state_dict().items()}
    path = tmp_path / "teacher.ckpt"
    save_checkpoint({"state_dict": state, "pytorch-lightning_version": "2.6.6"}, path)
    return path


@pytest.mark.parametrize("label_frac", [0.0, 0.25, 1.0])
def test_teaches_a_mixture_of_its_answer_and_the_label(checkpoint: Path, label_frac: float) -> None:
    net = DigitNet().eval()
    net.load_state_dict(
        {name.removeprefix("net."): weight for name, weight in torch.load(checkpoint)["state_dict"].items()}
    )
    images, labels = torch.rand(4, 1, 28, 28), torch.tensor([3, 1, 4, 1])
    with torch.no_grad():
        expected = (1 - label_frac) * net(images).softmax(dim=1)
    expected[range(4), labels] += label_frac
    _, found = Teacher(checkpoint, label_frac).teach(DigitNet(), images, labels)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("kind", "another"), [(UprightNet, DigitNet), (ZoomNet, UprightNet)])
def test_members_of_the_pupils_view_answer_for_what_it_sees(
    tmp_path: Path, kind: type[UprightNet], another: type[DigitNet | UprightNet]
) -> None:
    alike, other = kind().eval(), another().eval()
    state = {f"net.{name}": weight for name, weight in Committee([alike, other]).state_dict().items()}
    save_checkpoint({"state_dict": state, "pytorch-lightning_version": "2.6.6"}, tmp_path / "both.ckpt")
    teacher, pupil = Teacher(tmp_path / "both.ckpt", label_frac=0.0), kind(dropout=0.0)
    images, labels = torch.from_numpy(load_bundled_digits().images[:10])[:, None], torch.arange(10)

    torch.manual_seed(1)
    logits, targets = teacher.teach(pupil, images, labels)
    torch.manual_seed(1)
    seen = pupil.see(images)  # drawn, as it is in training
    torch.testing.assert_close(logits, pupil.score(seen))
    answers = alike.score(seen).softmax(dim=1), other(images).softmax(dim=1)
    torch.testing.assert_close(targets, (answers[0] + answers[1]) / 2, rtol=1e-3, atol=1e-5)
    assert logits.requires_grad
    assert not targets.requires_grad


def test_each_column_of_a_pupil_is_taught_on_a_view_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    answering = ZoomNet().eval()
    state = {f"net.{name}": weight for name, weight in answering.state_dict().items()}
    save_checkpoint({"state_dict": state, "pytorch-lightning_version": "2.6.6"}, tmp_path / "zoom.ckpt")
    module = DigitClassifier("zoom", dropout=0.0, columns=2, teacher=Teacher(tmp_path / "zoom.ckpt", label_frac=0.25))
    images, labels = torch.from_numpy(load_bundled_digits().images[:10])[:, None], torch.arange(10)

    torch.manual_seed(1)
    loss = module.training_step((images, labels), 0)
    torch.manual_seed(1)
    expected, views = torch.zeros(()), []
    for column in get_members(module.net):
        views.append(column.see(images))
        targets = 0.75 * answering.score(views[-1]).softmax(dim=1) + 0.25 * F.one_hot(labels, 10)
        expected = expected + F.cross_entropy(column.score(views[-1]), targets.detach())
    assert not torch.allclose(views[0], views[1], atol=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)  # the sum: each column gets all of its gradient
    torch.testing.assert_close(module.get_metric("train/loss").compute(), expected.detach() / 2, rtol=1e-3, atol=1e-5)


def test_few_members_answer_at_a_time_and_all_of_them_in_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    members = [DigitNet().eval() for _ in range(4)]
    state = {f"net.{name}": weight for name, weight in Committee(members).state_dict().items()}
    save_checkpoint({"state_dict": state, "pytorch-lightning_version": "2.6.6"}, tmp_path / "four.ckpt")
    teacher, images = Teacher(tmp_path / "four.ckpt", label_frac=0.0, num_answering=2), torch.rand(1, 1, 28, 28)
    with torch.no_grad():
        answers = torch.cat([member(images).softmax(dim=1) for member in members])  # (4, 10)
    pairs = list(combinations(range(4), 2))
    expected = torch.stack([answers[list(pair)].mean(dim=0) for pair in pairs])  # (6, 10)
    pupil, counts = DigitNet(), Counter[tuple[int, int]]()
    for _ in range(40):
        _, target = teacher.teach(pupil, images, torch.tensor([0]))
        distances = (expected - target).abs().amax(dim=1)
        assert distances.min() < 1e-4 < distances.sort().values[1]  # it is the mean of one pair, and of no other
        counts[pairs[int(distances.argmin())]] += 1
    assert len(counts) == 6


@pytest.mark.parametrize("num_answering", [0, 2, -1])
def test_no_more_members_answer_than_there_are(checkpoint: Path, num_answering: int) -> None:
    with pytest.raises(ValueError, match=f"num_answering is {num_answering}; it must be from 1 to 1, as"):
        Teacher(checkpoint, num_answering=num_answering)


def test_a_pupil_in_another_precision_is_taught_the_same(tmp_path: Path) -> None:
    state = {f"net.{name}": weight for name, weight in ZoomNet().state_dict().items()}
    save_checkpoint({"state_dict": state, "pytorch-lightning_version": "2.6.6"}, tmp_path / "zoom.ckpt")
    images, labels = torch.from_numpy(load_bundled_digits().images[:10])[:, None], torch.arange(10)
    teacher, pupil = Teacher(tmp_path / "zoom.ckpt", label_frac=0.0), ZoomNet(dropout=0.0).eval()
    expected = teacher.teach(pupil, images, labels)[1]
    logits, targets = teacher.teach(pupil.double(), images, labels)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(targets, expected, rtol=1e-3, atol=1e-5)


def test_the_loss_is_towards_the_teacher_and_the_accuracy_of_the_labels(checkpoint: Path) -> None:
    teacher = Teacher(checkpoint, label_frac=0.0)
    module = DigitClassifier(dropout=0.0, teacher=teacher).eval()
    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    loss = module.training_step((images, labels), 0)
    logits = module(images).detach()
    expected = -(teacher.teach(module.net, images, labels)[1] * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(loss.detach(), expected)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    torch.testing.assert_close(module.get_metric("train/acc").compute(), accuracy)
    assert not [name for name in module.state_dict() if "teacher" in name]  # it is no part of what is trained
    validation = module.validation_step((images, labels), 0)
    assert torch.equal(validation, logits)
    torch.testing.assert_close(module.get_metric("val/loss").compute(), F.cross_entropy(logits, labels))


def test_fit_with_a_teacher_and_test_without_it(digitnet: Run, checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--calibration.num_digits=0")
    teacher = ("--model.teacher=digitnet.Teacher", f"--model.teacher.checkpoint={checkpoint}")
    assert digitnet("fit", "--config", QUICKSTART, *flags, *teacher) == 0
    checkpoint.unlink()
    assert digitnet("test") == 0


def test_a_teacher_that_knows_the_validation_images_is_refused(
    digitnet: Run, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = torch.load(checkpoint, weights_only=True)
    stored["datamodule_hyper_parameters"] = {"source": "digits", "split": (1500, 147, 150)}
    save_checkpoint(stored, checkpoint)
    teacher = ("--model.teacher=digitnet.Teacher", f"--model.teacher.checkpoint={checkpoint}")
    assert digitnet("fit", "--config", QUICKSTART, *teacher) == 1
    said = "data.split is [1437, 180, 180], but model.teacher was trained on 63 of the images that it leaves out"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("label_frac", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(checkpoint: Path, label_frac: float) -> None:
    with pytest.raises(ValueError, match=f"label_frac is {label_frac}"):
        Teacher(checkpoint, label_frac)


def test_a_file_that_is_no_checkpoint_is_refused(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rubbish.ckpt").write_bytes(b"rubbish")
    teacher = ("--model.teacher=digitnet.Teacher", "--model.teacher.checkpoint=rubbish.ckpt")
    assert digitnet("fit", "--config", QUICKSTART, *teacher) == 1
    assert "rubbish.ckpt is not a checkpoint" in capsys.readouterr().err.splitlines()[-1]
