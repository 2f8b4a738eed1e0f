"""What HardExamples keeps of a batch, against a small network whose answers are known."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import QUICKSTART, SHORT, Run
from torch import Tensor, nn

from digitnet import HardExamples, fetch_digits
from digitnet.checkpoints import save_checkpoint


class Sure(nn.Module):
    """Sure of the label that is written into an image's first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(5.0))

    def forward(self, images: Tensor) -> Tensor:
        return self.gain * nn.functional.one_hot(images[:, 0, 0, 0].long(), 10)


def make_batch(num: int, num_wrong: int) -> tuple[Tensor, Tensor]:
    """Images that Sure reads rightly, save for the first; their number stands in the second pixel."""
    labels = torch.arange(num) % 10
    images = torch.zeros(num, 1, 28, 28)
    images[:, 0, 0, 0] = (labels + (torch.arange(num) < num_wrong)) % 10
    images[:, 0, 0, 1] = torch.arange(num)
    return images, labels


@pytest.mark.parametrize(("hard_frac", "num_hard"), [(1.0, 10), (0.5, 5), (0.0, 0)])
def test_the_hardest_are_kept_and_some_of_the_others(hard_frac: float, num_hard: int) -> None:
    selection = HardExamples(keep_frac=0.25, hard_frac=hard_frac)
    selection.proxy = Sure()  # type: ignore[assignment]
    images, labels = make_batch(40, num_wrong=num_hard)
    kept, kept_labels = selection(images, labels)
    numbers = kept[:, 0, 0, 1].long()
    assert len(set(numbers.tolist())) == len(numbers) == 10  # a quarter, none twice
    assert set(numbers[:num_hard].tolist()) == set(range(num_hard))
    assert (numbers[num_hard:] >= num_hard).all()
    assert torch.equal(kept, images[numbers])
    assert torch.equal(kept_labels, labels[numbers])


@pytest.mark.parametrize(("keep_frac", "num", "num_kept"), [(1.0, 7, 7), (0.01, 7, 1), (0.5, 7, 4), (0.25, 1, 1)])
def test_how_many_are_kept(keep_frac: float, num: int, num_kept: int) -> None:
    images, labels = HardExamples(keep_frac)(*make_batch(num, 0))
    assert images.shape == (num_kept, 1, 28, 28)
    assert labels.shape == (num_kept,)


def test_the_small_network_learns_and_goes_on_where_it_was() -> None:
    digits = fetch_digits("digits")
    images = torch.from_numpy(digits.images[:1024])[:, None]
    labels = torch.from_numpy(digits.labels[:1024]).long()
    torch.manual_seed(0)
    first = HardExamples()
    for _ in range(20):
        for rows in torch.randperm(1024).split(128):
            first(images[rows], labels[rows])
    with torch.no_grad():
        accuracy = (first.proxy(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.8

    other = HardExamples(lr=0.05)
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    assert other.optimizer.param_groups[0]["lr"] == 0.05  # as configured now

    second = HardExamples()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for one in (first, second):
        torch.manual_seed(1)
        one(images[:128], labels[:128])
    torch.manual_seed(2)
    expected = first(images[128:256], labels[128:256])
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(expected, second(images[128:256], labels[128:256]), strict=True))


def test_a_former_small_network_can_be_scored_but_not_gone_on_with(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model.selection=digitnet.HardExamples", "--trainer.max_epochs", 1)
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, *flags) == 0
    for name in ("best.ckpt", "last.ckpt"):
        path = tmp_path / "lightning_logs" / "quickstart" / "version_0" / "checkpoints" / name
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["selection"]["proxy"]["conv1.weight"] = torch.zeros(8, 1, 3, 3)
        save_checkpoint(checkpoint, path)
    assert digitnet("test") == 0
    capsys.readouterr()
    assert digitnet("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2) == 1
    assert "HardExamples had another small network" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argument", "value"), [("keep_frac", 0), ("keep_frac", 1.5), ("hard_frac", -0.1), ("lr", 0), ("lr", float("nan"))]
)
def test_bad_arguments_are_named(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{argument} is {value}"):
        HardExamples(**{argument: value})
