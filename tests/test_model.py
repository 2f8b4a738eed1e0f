"""Every network against the figures of its source and against layers written out by hand."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import QUICKSTART, SHORT, Run

from digitnet.augment import affine
from digitnet.checkpoints import load_net, make_net
from digitnet.classifier import DigitClassifier
from digitnet.data import load_bundled_digits
from digitnet.model import (
    ARCHITECTURES,
    BatchNorm,
    Committee,
    DigitNet,
    UprightNet,
    ZoomNet,
)
from digitnet.views import deslant, zoom_in


def test_parameters_per_layer_are_the_write_ups() -> None:
    net = DigitNet()
    layers = [module for module in net.modules() if hasattr(module, "weight")]
    counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    assert counts == [3_200, 73_856, 147_584, 295_168, 590_080, 295_040, 8_256, 650]
    assert sum(counts) == sum(p.numel() for p in net.parameters()) == 1_413_834


def test_forward_is_the_write_ups_order_of_layers() -> None:
    net = DigitNet().eval()
    x = images = torch.rand(4, 1, 28, 28)
    for name, pooled in (("conv1", True), ("conv2", False), ("conv3", True), ("conv4", False), ("conv5", True)):
        layer = getattr(net, name)
        x = F.relu(F.conv2d(x, layer.weight, layer.bias, padding="same"))
        x = F.max_pool2d(x, 2) if pooled else x
    x = x.flatten(1)
    assert x.shape == (4, 2_304)
    x = net.fc3(F.relu(net.fc2(F.relu(net.fc1(x)))))
    torch.testing.assert_close(net(images), x)


def test_uint8_is_scaled_by_255() -> None:
    net = DigitNet().eval()
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(net(images), net(images.double().div(255).float()))


def test_weights_start_as_keras_he_normal() -> None:
    net = DigitNet()
    for layer in (net.conv2, net.conv5, net.fc1):
        std = math.sqrt(2 / layer.weight[0].numel())
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        cut = 2 * std / 0.8796
        assert 0.95 * cut < layer.weight.abs().max().item() <= cut * 1.001
        assert layer.bias is not None
        assert not layer.bias.any()


@pytest.mark.parametrize("kind", ["dropout", "conv_dropout"])
def test_dropout_acts_in_training_only(kind: str) -> None:
    images = torch.rand(2, 1, 28, 28)
    dropouts = {"dropout": 0.0, "conv_dropout": 0.0, kind: 0.5}
    net = DigitNet(dropouts["dropout"], dropouts["conv_dropout"])
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))
    plain = DigitNet(dropout=0.0)
    assert torch.equal(plain(images), plain(images))


@pytest.mark.parametrize(("kind", "value"), [("dropout", 1.0), ("dropout", -0.1), ("conv_dropout", math.nan)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_impossible_dropout_is_refused(architecture: str, kind: str, value: float) -> None:
    dropouts = {"dropout": 0.0, "conv_dropout": 0.0, kind: value}
    with pytest.raises(ValueError, match=f"{kind} is {value}"):
        ARCHITECTURES[architecture](dropouts["dropout"], dropouts["conv_dropout"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pixels_follow_the_precision_of_the_weights(dtype: torch.dtype) -> None:
    net = DigitNet().eval().to(dtype)
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    assert net(images).dtype == dtype


def test_upright_net_is_digitnet_on_deslanted_images() -> None:
    net = UprightNet().eval()
    images = torch.from_numpy(load_bundled_digits().images[:10])[:, None]
    assert sum(p.numel() for p in net.parameters()) == 1_413_834
    none = torch.zeros(10)
    x = affine(deslant(images.float() / 255), none, torch.zeros(10, 2), zoom=none + 8 / 7)
    x = (x - x.mean(dim=(2, 3), keepdim=True)) / x.std(dim=(2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(net(images), net.behind(x), rtol=1e-3, atol=1e-3)
    # Only the shape of the light counts, not how bright it is; an empty image has none.
    upright = (images + images.flip(-1)) / 510  # leaning to neither side, whatever the paper
    torch.testing.assert_close(net(0.2 + 0.5 * upright), net(upright), rtol=1e-2, atol=1e-2)
    assert net(torch.zeros(1, 1, 28, 28)).isfinite().all()


def test_zoom_net_is_digitnet_on_what_is_upright_and_near() -> None:
    net = ZoomNet().eval()
    images = torch.from_numpy(load_bundled_digits().images[:10])[:, None]
    assert sum(p.numel() for p in net.parameters()) == 1_413_834
    expected = net.behind(zoom_in(deslant(images.float() / 255), training=False))
    torch.testing.assert_close(net(images), expected)
    folded = copy.deepcopy(net)
    folded.fold()
    torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["upright", "zoom"])
def test_views_are_drawn_in_training_only(architecture: str) -> None:
    images = torch.from_numpy(load_bundled_digits().images[:10])[:, None]
    net = ARCHITECTURES[architecture](dropout=0.0)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4, 4)])
def test_batch_normalization_is_pytorchs_with_the_bias_of_the_layer(shape: tuple[int, ...]) -> None:
    layer = torch.nn.Linear(3, 5)
    bias = layer.bias.detach().clone()
    norm = BatchNorm(layer)
    reference = (torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d)(5, momentum=0.02)
    reference.load_state_dict({"bias": bias}, strict=False)
    for training in (True, True, False):
        x = torch.randn(shape) * 3 + 1
        torch.testing.assert_close(norm.train(training)(x), reference.train(training)(x))
    assert layer.bias is None
    assert torch.equal(norm.bias, bias)


def test_a_batch_of_one_image_can_be_trained_on() -> None:
    net = UprightNet(dropout=0.0)  # its dense layers have one value a channel then, and that no variance
    before = {name: value.clone() for name, value in net.named_buffers()}
    F.cross_entropy(net(torch.rand(1, 1, 28, 28)), torch.tensor([7])).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    changed = {name for name, value in net.named_buffers() if not torch.equal(value, before[name])}
    assert changed  # of the convolutions
    assert not any("fc" in name for name in changed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_come_in_the_precision_of_the_network(dtype: torch.dtype) -> None:
    images = torch.randint(2, (3, 1, 28, 28)).to(dtype)
    assert DigitNet().bfloat16()(images).dtype == torch.bfloat16


def test_a_folded_net_is_a_plain_one_of_the_same_values() -> None:
    torch.manual_seed(0)
    net = DigitNet(batch_norm=True)
    assert sum(p.numel() for p in net.parameters()) == 1_413_834
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.rand(40, 1, 28, 28)), torch.randint(10, (40,))).backward()
        optimizer.step()
    images = torch.rand(5, 1, 28, 28)
    folded = net.eval().folded()
    assert folded.state_dict().keys() == DigitNet().state_dict().keys()
    assert (net(images) - DigitNet().eval()(images)).abs().max() > 0.1
    torch.testing.assert_close(folded(images), net(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(folded.folded()(images), folded(images))


@pytest.mark.parametrize(("architecture", "part"), [("upright", "digitnet"), ("zoom", "zoomed")])
def test_batch_normalization_is_gone_from_what_is_used(
    digitnet: Run, tmp_path: Path, architecture: str, part: str
) -> None:
    assert digitnet("fit", "--config", QUICKSTART, "--model.architecture", architecture, *SHORT) == 0
    (path,) = tmp_path.glob("lightning_logs/quickstart/version_*/checkpoints/best.ckpt")
    net, checkpoint = load_net(path)
    assert isinstance(net, ARCHITECTURES[architecture])
    assert f"net.{part}.norms.conv1.mean" in checkpoint["state_dict"]
    assert net.get_submodule(part).state_dict().keys() == DigitNet().state_dict().keys()
    assert digitnet("test", "--ckpt_path", path) == 0
    scored = json.loads((path.parents[1] / "report" / "metrics.json").read_text())
    digits = load_bundled_digits()
    with torch.no_grad():
        predictions = net(torch.from_numpy(digits.images[-40:])[:, None]).argmax(dim=1).numpy()
    assert scored["num_errors"] == (predictions != digits.labels[-40:]).sum()


def test_an_architecture_is_told_by_its_weights() -> None:
    normed = [net(batch_norm=normed) for net in (UprightNet, ZoomNet) for normed in (False, True)]
    together = Committee([DigitNet(), *normed])
    for net in (*together.members, together):
        made = make_net({"state_dict": {f"net.{name}": weight for name, weight in net.state_dict().items()}})
        made.load_state_dict(net.state_dict())
        assert str(made) == str(net)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    weights = {f"net.{name.replace('conv', 'block')}": weight for name, weight in DigitNet().state_dict().items()}
    torch.save({"state_dict": weights, "pytorch-lightning_version": "2.6.6"}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt is of another architecture: net.block1.bias should be none"):
        load_net(tmp_path / "other.ckpt")


def test_columns_are_trained_scored_and_gone_on_with(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model.architecture=zoom", "--model.columns=2", *SHORT)
    average = "--trainer.callbacks+=digitnet.callbacks.AverageWeights"
    assert digitnet("fit", "--config", QUICKSTART, *flags, average) == 0
    run = tmp_path / "lightning_logs" / "quickstart" / "version_0"
    path, last = run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt"
    net = load_net(path)[0]
    assert isinstance(net, Committee)
    assert [type(column) for column in net.members] == [ZoomNet, ZoomNet]
    assert digitnet("test") == 0
    digits = load_bundled_digits()
    with torch.no_grad():
        images = torch.from_numpy(digits.images[-40:])[:, None]
        mean = torch.stack([column(images).softmax(dim=1) for column in net.members]).mean(dim=0)
    scored = json.loads((run / "report" / "metrics.json").read_text())
    assert scored["num_errors"] == (mean.argmax(dim=1).numpy() != digits.labels[-40:]).sum()
    assert digitnet("convert", path, "net.weights.h5") == 1
    assert "holds a Committee; the write-up's Keras model is a DigitNet" in capsys.readouterr().err

    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    go_on = ("fit", "--ckpt_path", last, "--trainer.max_epochs=3")
    for other, name in (("columns=1", "zoom (columns 1)"), ("architecture=upright", "upright (columns 2)")):
        assert digitnet(*go_on, f"--model.{other}") == 1
        assert f"last.ckpt holds another architecture than {name}; to resume it, drop" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
    assert digitnet(*go_on) == 0
    assert torch.load(last, weights_only=True)["epoch"] == 2


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="architecture is lenet; there are digitnet, upright, zoom"):
        DigitClassifier(architecture="lenet")  # type: ignore[arg-type]
