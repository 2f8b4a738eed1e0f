"""DigitClassifier's numbers against numbers computed by hand, and checkpoints that must be refused."""

from __future__ import annotations

import pickle
from copy import deepcopy
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from digitnet.checkpoints import verify_checkpoint
from digitnet.classifier import DigitClassifier
from digitnet.data import MNISTDataModule
from digitnet.model import Committee
from digitnet.selection import HardExamples

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def test_epoch_metrics_weigh_every_image_alike() -> None:
    images, labels = torch.rand(10, 1, 28, 28), torch.arange(10)
    model = DigitClassifier()
    # Batches of 8 and 2: a mean of batch means would be wrong.
    loader = DataLoader(TensorDataset(images, labels), batch_size=8, num_workers=0)
    metrics = L.Trainer(accelerator="cpu", **QUIET).validate(model, loader, verbose=False)[0]  # type: ignore[arg-type]
    with torch.no_grad():
        logits = model.eval()(images)
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["val/acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_a_trainer_predicts_the_test_images() -> None:
    model, data = DigitClassifier(), MNISTDataModule("digits", split=(1297, 250, 250), eval_batch_size=100)
    answers = L.Trainer(accelerator="cpu", **QUIET).predict(model, data)  # type: ignore[arg-type]
    assert isinstance(answers, list)
    with torch.no_grad():
        expected = model.eval()(data.datasets[2].images)
    torch.testing.assert_close(torch.cat(answers), expected)  # type: ignore[arg-type]


def test_a_module_that_was_validated_can_be_trained() -> None:
    model, data = DigitClassifier(), MNISTDataModule("digits", split=(1297, 250, 250), batch_size=8)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=1, **QUIET)  # type: ignore[arg-type]
    [before] = trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    [after] = trainer.validate(model, data, verbose=False)
    assert after["val/loss"] != before["val/loss"]


def test_channels_last_changes_the_layout_not_the_result() -> None:
    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    results = {}
    for channels_last in (True, False):
        torch.manual_seed(1)
        model = DigitClassifier(channels_last=channels_last)
        loader = DataLoader(TensorDataset(images, labels), batch_size=8)
        trainer = L.Trainer(accelerator="cpu", **QUIET)  # type: ignore[arg-type]
        results[channels_last] = trainer.validate(model, loader, verbose=False)[0]["val/loss"]
        assert model.get_parameter("net.conv2.weight").is_contiguous(memory_format=torch.channels_last) == channels_last
    assert results[True] == pytest.approx(results[False], rel=1e-5)


def test_the_summary_counts_what_an_image_costs() -> None:
    convolutions = 28 * 28 * 49 * 64 + 14 * 14 * 9 * (64 * 128 + 128 * 128) + 7 * 7 * 9 * (128 * 256 + 256 * 256)
    summary = ModelSummary(DigitClassifier())
    assert summary.total_flops == 2 * (convolutions + 2304 * 128 + 128 * 64 + 64 * 10)
    assert summary.total_parameters == 1_413_834


def test_columns_learn_each_by_itself_and_answer_as_one() -> None:
    torch.manual_seed(0)
    module = DigitClassifier(columns=2, dropout=0.0)
    net = module.net
    assert isinstance(net, Committee)
    images, labels = torch.randint(256, (6, 1, 28, 28), dtype=torch.uint8), torch.arange(6)
    module.training_step((images, labels), 0).backward()
    losses = []
    for column in net.members:
        alone = deepcopy(column)
        alone.zero_grad()
        losses.append(F.cross_entropy(alone(images), labels))
        losses[-1].backward()
        for mine, its in zip(column.parameters(), alone.parameters(), strict=True):
            assert mine.grad is not None
            assert its.grad is not None
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-3, atol=1e-6)
    assert losses[0] != losses[1]  # they began with weights of their own
    assert module.get_metric("train/loss").compute().item() == pytest.approx(
        torch.stack(losses).mean().item(), rel=1e-5
    )
    mean = torch.stack([column(images).softmax(dim=1) for column in net.eval().members]).mean(dim=0)
    torch.testing.assert_close(net(images).softmax(dim=1), mean)


def test_columns_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="columns is 0; it must be from 1 to 10"):
        DigitClassifier(columns=0)
    with pytest.raises(ValueError, match="columns is 1000000; it must be from 1 to 10"):
        DigitClassifier(columns=1_000_000)


def test_default_optimizer_is_keras_adam() -> None:
    optimizer = DigitClassifier().configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert (optimizer.defaults["lr"], optimizer.defaults["eps"]) == (1e-3, 1e-7)


class Bomb:
    """Unpickling this would run code: it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_copy_has_weights_of_its_own_and_shares_what_trains_it() -> None:
    module = DigitClassifier(optimizer=torch.optim.SGD, selection=HardExamples())
    copy = deepcopy(module)
    assert copy.selection is module.selection
    assert copy.optimizer is module.optimizer
    for (name, mine), theirs in zip(module.state_dict().items(), copy.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
        assert mine.data_ptr() != theirs.data_ptr(), name


def test_foreign_checkpoints_are_refused_in_one_line(tmp_path: Path) -> None:
    model = DigitClassifier()
    trainer = L.Trainer(accelerator="cpu", max_epochs=0, **QUIET)  # type: ignore[arg-type]
    loader = DataLoader(TensorDataset(torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long)))
    trainer.fit(model, loader, loader)
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    verify_checkpoint(tmp_path / "good.ckpt", to_resume=True)
    good = torch.load(tmp_path / "good.ckpt", weights_only=True)
    torch.save({"state_dict": good["state_dict"]}, tmp_path / "bare.ckpt")
    torch.save({**good, "state_dict": [1, 2]}, tmp_path / "listed.ckpt")

    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    (tmp_path / "empty.ckpt").touch()
    whole = (tmp_path / "good.ckpt").read_bytes()
    (tmp_path / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save([1, 2], tmp_path / "list.ckpt")
    resized = {**good["state_dict"], "net.fc3.weight": torch.zeros(26, 64)}
    torch.save({**good, "state_dict": resized}, tmp_path / "resized.ckpt")
    torch.save({**good, "state_dict": {"encoder.weight": torch.zeros(3)}}, tmp_path / "other.ckpt")
    torch.save({**good, "state_dict": {"net.members.0": torch.zeros(3)}}, tmp_path / "member.ckpt")
    (tmp_path / "bomb.ckpt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    expected = {
        "missing": "no such file",
        "text": "not a checkpoint that can be read safely",
        "empty": "not a checkpoint that can be read safely",
        "truncated": "not a checkpoint that can be read safely",
        "list": "no state_dict",
        "bare": "no pytorch-lightning_version",
        "listed": "its state_dict is no dict",
        "resized": r"another architecture: net.fc3.weight should be \[10, 64\], and is \[26, 64\]",
        "other": "another architecture: encoder.weight should be none",
        "member": "another architecture: net.members.0 should be none",
        "bomb": "not a checkpoint that can be read safely",
    }
    for name, reason in expected.items():
        with pytest.raises(ValueError, match=reason) as refusal:
            verify_checkpoint(tmp_path / f"{name}.ckpt")
        assert "\n" not in str(refusal.value)
        assert f"{name}.ckpt" in str(refusal.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_counted_in_full_in_half_precision(dtype: torch.dtype) -> None:
    model = DigitClassifier().to(dtype=dtype)  # as Lightning's bf16-true and 16-true do
    losses = torch.linspace(0, 0.2, 60_000)[torch.randperm(60_000, generator=torch.Generator().manual_seed(0))]
    metric = model.get_metric("val/loss")
    for batch in losses.split(32):
        metric.update(batch)
    assert metric.compute().item() == pytest.approx(0.1, rel=1e-4)
    metric.reset()
    metric.update(losses[:1])
    assert metric.compute().item() == pytest.approx(losses[0].item(), rel=1e-6)


def test_losses_are_counted_in_double_precision_where_all_is() -> None:
    assert DigitClassifier().to(dtype=torch.float64).get_metric("val/loss").dtype == torch.float64


def test_a_partial_without_a_length_is_as_long_as_the_training() -> None:
    cycle = partial(OneCycleLR, max_lr=0.002, total_steps=None)
    assert DigitClassifier(lr_scheduler=cycle).configure_optimizers(30)["lr_scheduler"]["scheduler"].total_steps == 30
    cycle = partial(OneCycleLR, max_lr=0.002, total_steps=20)
    assert DigitClassifier(lr_scheduler=cycle).configure_optimizers(30)["lr_scheduler"]["scheduler"].total_steps == 20
