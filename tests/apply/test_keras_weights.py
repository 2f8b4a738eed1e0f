"""Weights carried to and from the write-up's model in real Keras, on its PyTorch backend."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"  # before Keras is imported

import h5py
import keras
import numpy as np
import pytest
import torch
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from digitnet.apply import keras_weights
from digitnet.apply.keras_weights import build_keras_model, convert, load_keras_weights
from digitnet.classifier import DigitClassifier
from digitnet.data import Digits

pytestmark = [
    # Keras and Lightning use what NumPy and PyTorch have deprecated.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def images(real_digits: Digits) -> Tensor:
    """256 of them (256, 1, 28, 28) uint8."""
    return torch.from_numpy(real_digits.images[:256])[:, None]


@pytest.fixture(scope="module")
def model() -> keras.Model:
    """The notebook's model as it is saved after training: second of its session, compiled, no bias zero."""
    build_keras_model()  # takes the names without numbers, so the next one has conv2d_5, dense_3, ...
    model = build_keras_model()
    rng = np.random.default_rng(0)
    model.set_weights([w + 0.1 * rng.standard_normal(w.shape) if w.ndim == 1 else w for w in model.get_weights()])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture(scope="module")
def checkpoint(images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Lightning writes after a step of training, optimizer and all; no bias zero."""
    classifier = DigitClassifier()
    for name, parameter in classifier.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    trainer = quiet_trainer(max_steps=1)
    loader = DataLoader(TensorDataset(images[:32], torch.arange(32) % 10), batch_size=32)
    trainer.fit(classifier, loader, loader)
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    trainer.save_checkpoint(path)
    return path


def quiet_trainer(max_steps: int = -1) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=max_steps,
    )


@torch.no_grad()
def digitnet_logits(checkpoint: Path, images: Tensor) -> Tensor:
    return DigitClassifier.load_from_checkpoint(checkpoint, weights_only=True).eval()(images)


@torch.no_grad()
def keras_logits(model: keras.Model, images: Tensor) -> Tensor:
    """What the last layer gives its softmax."""
    last = model.layers[-1]
    softmax, last.activation = last.activation, keras.activations.linear
    logits = model(images.permute(0, 2, 3, 1).float() / 255, training=False)
    last.activation = softmax
    return logits


def save_legacy(model: keras.Model, path: Path) -> None:
    """What Keras 2 does for ``model.save_weights("x.h5")``; Keras 3 keeps the code."""
    with h5py.File(path, "w") as file:
        save_weights_to_hdf5_group(file, model)


def save(model: keras.Model, path: Path) -> None:
    if path.name == "weights.h5":
        save_legacy(model, path)
    elif path.name.endswith(".weights.h5"):
        model.save_weights(path)
    else:
        model.save(path)


# --- values -----------------------------------------------------------------------------------------------------------


def test_model_is_the_write_ups() -> None:
    model = build_keras_model()
    sizes = [layer.count_params() for layer in model.layers if layer.count_params()]
    assert sizes == [3_200, 73_856, 147_584, 295_168, 590_080, 295_040, 8_256, 650]
    assert model.count_params() == 1_413_834
    kinds = " ".join(type(layer).__name__ for layer in model.layers)
    assert kinds == (
        "RandomRotation RandomTranslation Conv2D MaxPooling2D Conv2D Conv2D MaxPooling2D Conv2D Conv2D MaxPooling2D "
        "Flatten Dense Dropout Dense Dropout Dense"
    )
    rotation, translation = (layer.get_config() for layer in model.layers[:2])
    assert rotation["factor"] == (-0.05, 0.05)
    assert (translation["height_factor"], translation["width_factor"]) == (0.1, 0.1)
    assert rotation["fill_mode"] == translation["fill_mode"] == "nearest"
    activations = [layer.activation.__name__ for layer in model.layers if hasattr(layer, "activation")]
    assert activations == ["relu"] * 7 + ["softmax"]


@pytest.mark.parametrize("name", ["weights.h5", "whole.h5", "model.weights.h5", "model.keras"])
def test_keras_to_digitnet(name: str, model: keras.Model, images: Tensor, tmp_path: Path) -> None:
    source, target = tmp_path / name, tmp_path / "model.ckpt"
    save(model, source)
    convert(source, target)
    expected = keras_logits(model, images)
    assert expected.std() > 0.1  # or agreement would mean little
    torch.testing.assert_close(digitnet_logits(target, images), expected, atol=1e-4, rtol=0)
    assert {path.name for path in tmp_path.iterdir()} == {name, "model.ckpt"}


@pytest.mark.parametrize("name", ["weights.h5", "model.weights.h5", "model.keras"])
def test_digitnet_to_keras(name: str, checkpoint: Path, images: Tensor, tmp_path: Path) -> None:
    target = tmp_path / name
    convert(checkpoint, target)
    if name.endswith(".keras"):
        model = keras.saving.load_model(target)
    else:
        model = build_keras_model()
        model.load_weights(target)
    torch.testing.assert_close(keras_logits(model, images), digitnet_logits(checkpoint, images), atol=1e-4, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_runs_own_checkpoint_is_not_replaced(trained_run: Path, model: keras.Model, tmp_path: Path) -> None:
    save(model, tmp_path / "model.weights.h5")
    for name in ("best.ckpt", "other.ckpt"):
        with pytest.raises(ValueError, match="is among a run's own checkpoints; give a file elsewhere"):
            convert(tmp_path / "model.weights.h5", trained_run / "checkpoints" / name)


def test_lightning_scores_a_converted_checkpoint(model: keras.Model, images: Tensor, tmp_path: Path) -> None:
    labels = torch.arange(256) % 10
    model.save_weights(tmp_path / "model.weights.h5")
    convert(tmp_path / "model.weights.h5", tmp_path / "model.ckpt")
    loader = DataLoader(TensorDataset(images, labels), batch_size=256)
    (scores,) = quiet_trainer().test(DigitClassifier(), loader, ckpt_path=tmp_path / "model.ckpt", weights_only=True)
    expected = torch.nn.functional.cross_entropy(keras_logits(model, images), labels)
    assert scores["test/loss"] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("name", ["weights.h5", "model.weights.h5"])
def test_other_variables_are_left_aside(name: str, model: keras.Model, tmp_path: Path) -> None:
    """Other versions of Keras save the state of random generators and of metrics too."""
    path = tmp_path / name
    save(model, path)
    expected = load_keras_weights(path)
    with h5py.File(path, "r+") as file:
        if name == "weights.h5":
            layer = file.attrs["layer_names"][0]
            file[layer].attrs["weight_names"] = [b"rotation/StateVar:0"]
            file[f"{layer}/rotation/StateVar:0"] = np.arange(3)
        else:
            file["layers/random_rotation/seed_generator/vars/0"] = np.array([7, 1], np.uint32)
            file["metrics/mean/vars/0"] = np.float32(0.5)
    for key, tensor in load_keras_weights(path).items():
        assert torch.equal(tensor, expected[key])


# --- bad input --------------------------------------------------------------------------------------------------------


def truncate(good: Path, bad: Path) -> None:
    bad.write_bytes(good.read_bytes()[:-1000])


def make_foreign_h5(good: Path, bad: Path) -> None:
    with h5py.File(bad, "w") as file:
        file["temperatures"] = np.zeros((3, 4))


def make_other_network(good: Path, bad: Path) -> None:
    layers = keras.layers
    save(keras.Sequential([keras.Input((28, 28, 1)), layers.Conv2D(32, 5), layers.Flatten(), layers.Dense(10)]), bad)


def make_text(good: Path, bad: Path) -> None:
    bad.write_text("not what its name says")


def make_external_link(good: Path, bad: Path) -> None:
    with h5py.File(good) as source, h5py.File(bad, "w") as file:
        for name, value in source.attrs.items():
            file.attrs[name] = value
        for name in source:
            file[name] = h5py.ExternalLink(good, f"/{name}")


def make_external_storage(good: Path, bad: Path) -> None:
    bad.write_bytes(good.read_bytes())
    (bad.parent / "secret").write_bytes(bytes(40))
    with h5py.File(bad, "r+") as file:
        layer = file.attrs["layer_names"][-1]
        bias = f"{layer}/{file[layer].attrs['weight_names'][1]}"
        del file[bias]
        file.create_dataset(bias, (10,), "f4", external=[(bad.parent / "secret", 0, 40)])


def make_other_zip(good: Path, bad: Path) -> None:
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("config.json", "{}")


def make_foreign_checkpoint(good: Path, bad: Path) -> None:
    state_dict = {"net.conv1.weight": torch.zeros(8, 1, 3, 3)}
    torch.save({"state_dict": state_dict, "pytorch-lightning_version": "2.6.6"}, bad)


class Touch:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


def make_malicious_checkpoint(good: Path, bad: Path) -> None:
    bad.write_bytes(pickle.dumps({"state_dict": Touch(bad.parent / "touched")}))


@pytest.mark.parametrize(
    ("good_name", "bad_name", "make", "message"),
    [
        ("weights.h5", "missing.h5", None, "no such file"),
        ("weights.h5", "missing.ckpt", None, "no such file"),
        ("weights.h5", "truncated.h5", truncate, "truncated"),
        ("model.keras", "truncated.keras", truncate, "does not hold"),
        ("model.keras", "foreign.h5", make_foreign_h5, "found 0 arrays .*, expected 16 arrays .7x7x1x64 64"),
        ("model.keras", "other.weights.h5", make_other_network, "found 4 arrays .5x5x1x32 32 18432x10 10."),
        ("model.keras", "text.keras", make_text, "does not hold"),
        ("model.keras", "text.ckpt", make_text, "not a checkpoint"),
        ("weights.h5", "linked.h5", make_external_link, "is not stored in the file"),
        ("model.weights.h5", "linked.weights.h5", make_external_link, "found 0 arrays"),
        ("weights.h5", "external.h5", make_external_storage, "is not stored in the file"),
        ("model.keras", "other.keras", make_other_zip, "model.weights.h5"),
        ("model.keras", "foreign.ckpt", make_foreign_checkpoint, "another architecture"),
        ("model.keras", "malicious.ckpt", make_malicious_checkpoint, "not a checkpoint"),
    ],
)
def test_bad_source(
    good_name: str,
    bad_name: str,
    make: Callable[[Path, Path], None] | None,
    message: str,
    model: keras.Model,
    tmp_path: Path,
) -> None:
    """One line that names the file, and no target, whole or half."""
    good, bad = tmp_path / good_name, tmp_path / bad_name
    save(model, good)
    if make is not None:
        make(good, bad)
    before = set(tmp_path.iterdir())
    target = tmp_path / ("target.h5" if bad.suffix == ".ckpt" else "target.ckpt")
    with pytest.raises((ValueError, OSError), match=message) as raised:
        convert(bad, target)
    assert str(raised.value).startswith(str(bad))
    assert "\n" not in str(raised.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("copy.ckpt", "both checkpoints"),
        ("model.onnx", "must end in .h5, .weights.h5 or .keras"),
        ("missing/model.h5", "there is no folder"),
    ],
)
def test_bad_target(target: str, message: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        convert(checkpoint, tmp_path / target)
    assert not any(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(file: h5py.File, weights: list[np.ndarray]) -> None:
        file["half"] = weights[0]
        raise OSError("no space left on device")

    target = tmp_path / "model.h5"
    target.write_text("the old file")
    monkeypatch.setattr(keras_weights, "_write_legacy", write_half)
    with pytest.raises(OSError, match="no space left"):
        convert(checkpoint, target)
    assert target.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("package", "target"), [("h5py", "model.h5"), ("keras", "model.keras")])
def test_missing_package(
    package: str, target: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ValueError, match=rf'package {package} .*: pip install -e "\.\[keras\]"'):
        convert(checkpoint, tmp_path / target)
    assert not any(tmp_path.iterdir())
