"""Carry trained weights between DigitNet and the write-up's Keras model, in either direction.

Three kinds of Keras file are read and written: ``.h5``, the legacy layout of the write-up's ``weights_MNIST784CV.h5``
(read also from a whole model saved that way); Keras 3's ``.weights.h5``; and ``.keras``, a whole model. Keras itself is
needed only to write ``.keras``. Reading stays inside the file: nothing is unpickled or executed, no link is followed,
and no array is read before its shape is checked.
"""

from __future__ import annotations

import importlib
import io
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from posixpath import join
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digitnet.checkpoints import find_run, load_net, save_weights
from digitnet.errors import say_why
from digitnet.files import replace_whole
from digitnet.model import DigitNet

# DigitNet's layers with the names that Keras gives the same layers in a fresh session, first to last.
LAYERS = {
    "conv1": "conv2d", "conv2": "conv2d_1", "conv3": "conv2d_2", "conv4": "conv2d_3", "conv5": "conv2d_4",
    "fc1": "dense", "fc2": "dense_1", "fc3": "dense_2",
}  # fmt: skip
FEATURES = (256, 3, 3)  # channels, height and width of what the network flattens
MAX_WEIGHTS_BYTES = 2**28  # in a .keras file, unpacked; ours are 6 MB, or 17 MB with Adam's two averages


def convert(source: Path, target: Path) -> None:
    """Copy trained weights from a Lightning checkpoint to a Keras file, or the other way.

    Args:
        source: the file to read: a checkpoint (.ckpt), or a Keras file (.h5, .weights.h5, .keras) of the write-up's
            model; its layers without weights do not matter.
        target: the file to write, replaced when it is there. Its ending decides the format: .ckpt for test; .h5 and
            .weights.h5 for load_weights on the write-up's model in Keras; .keras for load_model.

    Raises:
        ValueError: two checkpoints, a source that does not hold DigitNet's weights, a target with another ending, or a
            package missing.
        OSError: a file cannot be read or written.
    """
    if source.suffix == target.suffix == ".ckpt":
        raise ValueError(f"{source} and {target} are both checkpoints; one of the two must be a Keras file")
    if find_run(target):
        raise ValueError(f"{target} is among a run's own checkpoints; give a file elsewhere")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no folder {target.parent}")
    state_dict = load_checkpoint(source) if source.suffix == ".ckpt" else load_keras_weights(source)
    if target.suffix == ".ckpt":
        net = DigitNet()
        net.load_state_dict(state_dict)
        save_weights(net, target)
    else:
        save_keras_weights(state_dict, target)
    print(f"{source} -> {target}: {sum(tensor.numel() for tensor in state_dict.values()):,} parameters")


def build_keras_model() -> Any:
    """Build the write-up's model in real Keras: images (B, 28, 28, 1) in [0, 1] to probabilities (B, 10).

    Raises:
        ValueError: Keras is not installed.
    """
    os.environ.setdefault("KERAS_BACKEND", "torch")  # read at import; Keras' own default is TensorFlow
    keras = _require("keras")
    layers = keras.layers
    conv = {"padding": "same", "activation": "relu", "kernel_initializer": "he_normal"}
    dense = {"activation": "relu", "kernel_initializer": "he_normal"}
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.RandomRotation(0.05, fill_mode="nearest"),
            layers.RandomTranslation(0.1, 0.1, fill_mode="nearest"),
            layers.Conv2D(64, 7, **conv), layers.MaxPooling2D(2),
            layers.Conv2D(128, 3, **conv), layers.Conv2D(128, 3, **conv), layers.MaxPooling2D(2),
            layers.Conv2D(256, 3, **conv), layers.Conv2D(256, 3, **conv), layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(128, **dense), layers.Dropout(0.2),
            layers.Dense(64, **dense), layers.Dropout(0.2),
            layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


# --- the order of axes ------------------------------------------------------------------------------------------------


def to_keras(state_dict: Mapping[str, Tensor]) -> list[Tensor]:
    """A DigitNet's weights as Keras has them: the kernel and bias of each layer, first to last.

    Convolution kernels turn from (out, in, H, W) to (H, W, in, out), dense kernels from (out, in) to (in, out). The
    rows of the first dense kernel also turn from channel-height-width to height-width-channel, as Keras' Flatten has
    them.
    """
    weights = []
    for layer in LAYERS:
        kernel = state_dict[f"{layer}.weight"]
        if layer == "fc1":
            kernel = kernel.reshape(-1, *FEATURES).permute(2, 3, 1, 0).flatten(0, 2)
        else:
            kernel = kernel.permute(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
        weights += [kernel, state_dict[f"{layer}.bias"]]
    return weights


def from_keras(weights: list[Tensor]) -> dict[str, Tensor]:
    """The inverse of ``to_keras``: a DigitNet's state dict."""
    channels, *size = FEATURES
    state_dict: dict[str, Tensor] = {}
    for layer, kernel, bias in zip(LAYERS, weights[::2], weights[1::2], strict=True):
        if layer == "fc1":
            kernel = kernel.reshape(*size, channels, -1).permute(3, 2, 0, 1).flatten(1)
        else:
            kernel = kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        state_dict |= {f"{layer}.weight": kernel.contiguous(), f"{layer}.bias": bias}
    return state_dict


def _describe(weights: Iterable[Any]) -> str:
    shapes = ["x".join(map(str, weight.shape)) or "scalar" for weight in weights]
    return f"{len(shapes)} arrays ({' '.join(shapes[:20])}{' ...' if len(shapes) > 20 else ''})"


# --- Keras files ------------------------------------------------------------------------------------------------------


def load_keras_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a DigitNet's state dict, float32 on the CPU, from a Keras file of the write-up's model.

    Layers go by their order and shapes; their names, and layers without weights, do not matter.

    Args:
        path: .h5 in the legacy layout (weights alone or a whole model), .weights.h5, or .keras.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a Keras file, damaged, another architecture, data outside the file, or h5py is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    h5py = _require("h5py")
    try:
        with h5py.File(_unzip_weights(path) if zipfile.is_zipfile(path) else path, "r") as file:
            datasets = _find_datasets(file)
            with torch.device("meta"):  # shapes without values
                expected = to_keras(DigitNet().state_dict())
            if [dataset.shape for dataset in datasets] != [tuple(weight.shape) for weight in expected]:
                raise ValueError(f"found {_describe(datasets)}, expected {_describe(expected)}")
            return from_keras([torch.from_numpy(dataset[()].astype("float32")) for dataset in datasets])
    except Exception as error:  # a damaged file can fail in any way
        message = f"{path} does not hold the weights of the write-up's Keras model: {say_why(error)}"
        raise ValueError(message) from error


def _unzip_weights(path: Path) -> io.BytesIO:
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo("model.weights.h5").file_size
        if size > MAX_WEIGHTS_BYTES:
            raise ValueError(f"its weights unpack to {size:,} bytes, more than {MAX_WEIGHTS_BYTES:,}")
        return io.BytesIO(archive.read("model.weights.h5"))


def _find_datasets(file: Any) -> list[Any]:
    """The file's weights in the order of the model's layers, none of them read yet."""
    groups: dict[str, Any] = {"/": file}
    datasets: dict[str, Any] = {}

    def collect(name: str, item: Any) -> None:
        (datasets if hasattr(item, "dtype") else groups)[f"/{name}"] = item

    file.visititems(collect)  # each object once; follows neither soft nor external links
    root = "/model_weights" if "/model_weights" in groups else "/"
    if "layer_names" in groups[root].attrs:  # the legacy layout lists its layers, and each layer its weights
        paths = [join(root, name) for name in _read_names(groups, root, "layer_names")]
        names = [join(path, name) for path in paths for name in _read_names(groups, path, "weight_names")]
    else:  # Keras 3 (and 2.13, under the longer name) numbers the layers of each kind: conv2d, conv2d_1, ..., dense
        names = sorted(name for name in datasets if name.startswith(("/layers/", "/_layer_checkpoint_dependencies/")))
    for name in names:
        if name not in datasets or datasets[name].external or datasets[name].is_virtual:
            raise ValueError(f"{name} is not stored in the file")
    # Random layers (augmentation, dropout) may keep the state of their generators, in whole numbers.
    return [datasets[name] for name in names if datasets[name].dtype.kind == "f"]


def _read_names(groups: dict[str, Any], path: str, attribute: str) -> list[str]:
    if path not in groups:
        raise ValueError(f"{path} is not stored in the file")
    return [name.decode() if isinstance(name, bytes) else name for name in groups[path].attrs[attribute]]


def save_keras_weights(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a DigitNet's weights as a Keras file; all of it or nothing.

    Args:
        state_dict: of a DigitNet, any floating dtype; written as float32.
        path: .weights.h5 and .h5 hold weights alone, for ``load_weights`` on the write-up's model; .keras holds the
            whole model, for ``load_model``.

    Raises:
        ValueError: another ending, or a package that it needs is not installed.
        OSError: the file cannot be written.
    """
    path = Path(path)
    weights = [weight.detach().cpu().float().numpy() for weight in to_keras(state_dict)]
    if path.suffix == ".keras":
        model = build_keras_model()
        model.set_weights(weights)
        with replace_whole(path) as part:
            model.save(part)
    elif path.suffix == ".h5":
        write_layout = _write_keras3 if path.name.endswith(".weights.h5") else _write_legacy
        h5py = _require("h5py")
        with replace_whole(path) as part, h5py.File(part, "w") as file:
            write_layout(file, weights)
    else:
        raise ValueError(f"{path}: the name of a Keras file must end in .h5, .weights.h5 or .keras")


def _write_legacy(file: Any, weights: list[np.ndarray]) -> None:
    file.attrs["layer_names"] = np.array(list(LAYERS.values()), "S")
    file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.15.0"  # without them Keras guesses Keras 1
    for layer, kernel, bias in zip(LAYERS.values(), weights[::2], weights[1::2], strict=True):
        group = file.create_group(layer)
        group.attrs["weight_names"] = np.array([f"{layer}/kernel:0", f"{layer}/bias:0"], "S")
        group[f"{layer}/kernel:0"], group[f"{layer}/bias:0"] = kernel, bias


def _write_keras3(file: Any, weights: list[np.ndarray]) -> None:
    file.create_group("vars")  # of the model itself: none, but Keras 2 and 3.0 look for it
    for layer, kernel, bias in zip(LAYERS.values(), weights[::2], weights[1::2], strict=True):
        file[f"layers/{layer}/vars/0"], file[f"layers/{layer}/vars/1"] = kernel, bias


# --- checkpoints and files --------------------------------------------------------------------------------------------


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a DigitNet's state dict from a Lightning checkpoint of DigitClassifier.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: damaged, not a checkpoint, or another architecture's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    net = load_net(path)[0]
    if not isinstance(net, DigitNet):
        raise ValueError(f"{path} holds a {type(net).__name__}; the write-up's Keras model is a DigitNet")
    return net.state_dict()


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f'Keras files need the package {package} ({error}): pip install -e ".[keras]"') from error
