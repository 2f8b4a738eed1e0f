"""Generated bad input: every command works or says in one line why not, and leaves nothing behind.

A handful of inputs each by default; DIGITNET_FUZZ=2000 makes it that many.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICKSTART, Run, generated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from digitnet.apply.imaging import normalize
from digitnet.apply.opening import open_picture
from digitnet.augment import RandomAffine
from digitnet.checkpoints import verify_checkpoint
from digitnet.data import Digits, MNISTDataModule, load_bundled_digits, load_file


def assert_one_line(error: BaseException, about: object = "") -> None:
    text = str(error)
    assert text.strip()
    assert str(about) in text
    assert "\n" not in text


@pytest.fixture(scope="module")
def few() -> Digits:
    digits = load_bundled_digits()
    return Digits(digits.images[:20], digits.labels[:20])


@pytest.fixture(scope="module", autouse=True)
def _plain_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a random array may overflow or divide by zero on its way to being refused
        yield


@pytest.fixture
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fit`` builds all there is to build, and stops where training would begin."""
    monkeypatch.setattr("lightning.Trainer.fit", lambda *args, **kwargs: None)
    monkeypatch.setattr("digitnet.cli.claim_folder", lambda *args, **kwargs: contextlib.nullcontext())


# --- settings ---------------------------------------------------------------------------------------------------------

numbers = st.integers(-(10**12), 10**12) | st.floats() | st.sampled_from([0, 1, 1797, 1437, 180, 0.1, -0.0])


@generated(20)
@given(split=st.tuples(*[st.integers(-2000, 4000)] * 3) | st.lists(st.integers(-10, 1800), max_size=5))
def test_a_split_adds_up_or_is_refused(split: Any) -> None:
    data = MNISTDataModule(source="digits", split=(1437, 180, 180))
    try:
        data = MNISTDataModule(source="digits", split=split)
        data.setup("fit")
    except ValueError as error:
        assert_one_line(error)
        assert len(split) != 3 or min(split) < 1 or sum(split) != 1797
    else:
        assert [len(dataset) for dataset in data.datasets] == list(split)


@generated(20)
@given(rotation=numbers, shift=numbers, size=st.integers(1, 5))
def test_a_strength_is_in_range_or_refused(rotation: float, shift: float, size: int) -> None:
    try:
        augmentation = RandomAffine(rotation, shift)
    except ValueError as error:
        assert_one_line(error)
        assert not (0 <= rotation <= 180 and 0 <= shift <= 1)
    else:
        images = torch.randint(0, 256, (size, 1, 28, 28), dtype=torch.uint8)
        augmented = augmentation(images)
        assert (augmented.shape, augmented.dtype) == (images.shape, torch.uint8)


KEYS = [
    "data.split", "data.batch_size", "data.eval_batch_size", "data.source", "data.data_dir", "data.augmentation",
    "data.augmentation.rotation_deg", "data.augmentation.shift_frac", "model.dropout", "model.conv_dropout",
    "model.optimizer", "model.optimizer.lr", "model.optimizer.betas", "model.lr_scheduler", "model.channels_last",
    "model.columns",
    "trainer.max_epochs", "trainer.precision", "trainer.accelerator", "trainer.callbacks", "trainer.logger",
    "trainer.limit_train_batches", "trainer.check_val_every_n_epoch", "trainer.accumulate_grad_batches",
    "trainer.devices", "trainer.strategy", "trainer.gradient_clip_val",
    "early_stopping.monitor", "early_stopping.patience", "best_checkpoint.mode",
    "last_checkpoint.filename", "calibration.num_digits", "pictures.every_n_epochs", "seed_everything", "ckpt_path",
    "config", "print_config", "data", "model", "trainer", "nonsense", "",
]  # fmt: skip
text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
values = (
    numbers.map(str)
    | text
    | st.lists(numbers, max_size=4).map(str)
    | st.sampled_from(["null", "true", "{}", "[]", "{class_path: os.system}", "{class_path: 3}", "torch.optim.SGD"])
    | st.sampled_from(["torch.optim.nothing", "[[[", "{a: ", "!!python/object/apply:os.system [ls]", "&a [*a]", "-1"])
    | st.sampled_from(["last", "best", "val/loss", "max", "digits", "/", ".", "~", "torch.nn.Identity", "1e999"])
)


def check_command(digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    """A command works (0), or fails with one line; either way nothing is left in the folder."""
    before = set(tmp_path.rglob("*"))
    capsys.readouterr()
    code = digitnet(*args)
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("digitnet: error: ")]
    assert "Traceback" not in output.err + output.out, args
    assert (code, len(errors)) in ((0, 0), (1, 1), (2, 1)), (args, code, output.err)
    assert set(tmp_path.rglob("*")) == before, args


@generated(6)
@given(overrides=st.lists(st.tuples(st.sampled_from(KEYS), values), min_size=1, max_size=2))
@pytest.mark.usefixtures("_no_training")
def test_any_flag_builds_a_training_or_is_refused_in_one_line(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[tuple[str, str]]
) -> None:
    flags = [part for key, value in overrides for part in (f"--{key}", value)]
    check_command(digitnet, tmp_path, capsys, ["fit", "--config", str(QUICKSTART), *flags])


trees = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | text, inner, max_size=3),
    max_leaves=6,
)


@generated(6)
@given(config=st.binary(max_size=60) | trees.map(str).map(str.encode) | text.map(str.encode))
def test_any_config_parses_or_is_refused_in_one_line(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: bytes
) -> None:
    (tmp_path / "any.yaml").write_bytes(config)
    check_command(digitnet, tmp_path, capsys, ["fit", "--config", "any.yaml", "--print_config"])


@generated(10)
@given(words=st.lists(text | st.sampled_from(["fit", "test", "--help", "--", "-", "predict", "convert"]), max_size=3))
def test_any_words_are_answered(
    digitnet: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    words = [word for word in words if word not in ("fit", "serve", "ablate", "benchmark", "explore")]
    before = set(tmp_path.rglob("*"))
    assert digitnet(*words) in (0, 1, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) == before


# --- files ------------------------------------------------------------------------------------------------------------


@st.composite
def damages(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file's bytes with some of them changed, cut out, doubled or replaced."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "zero", "end"]))
        length = draw(st.integers(1, 40))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=40))
        elif kind == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            del data[at:]
    return bytes(data)


def make_files(few: Digits) -> dict[str, bytes]:
    npz = io.BytesIO()
    np.savez(npz, images=few.images, labels=few.labels)
    packed = io.BytesIO()
    np.savez_compressed(packed, images=few.images, labels=few.labels)
    rows = np.column_stack([few.images.reshape(-1, 784), few.labels]).tolist()
    arff = ("@DATA\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)).encode()
    idx = bytes([0, 0, 8, 3]) + np.array(few.images.shape, ">u4").tobytes() + few.images.tobytes()
    return {
        "a.npz": npz.getvalue(), "b.npz": packed.getvalue(), "c.arff": arff, "d.arff.gz": gzip.compress(arff),
        "train-images-idx3-ubyte": idx, "train-images-idx3-ubyte.gz": gzip.compress(idx),
    }  # fmt: skip


@generated(40)
@given(data=st.data())
def test_a_damaged_file_is_read_right_or_refused(tmp_path: Path, few: Digits, data: st.DataObject) -> None:
    files = make_files(few)
    name = data.draw(st.sampled_from(sorted(files)))
    content = data.draw(damages(files[name]) | st.binary(max_size=200))
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if "idx" in name:
        for subset in ("train", "t10k"):
            labels = bytes([0, 0, 8, 1, 0, 0, 0, 20]) + few.labels.tobytes()
            (folder / f"{subset}-labels-idx1-ubyte").write_bytes(labels)
        (folder / "t10k-images-idx3-ubyte").write_bytes(files["train-images-idx3-ubyte"])
    (folder / name).write_bytes(content)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    try:
        digits = load_file(folder if "idx" in name else folder / name)
    except ValueError as error:
        assert_one_line(error, about=folder)
    else:  # harmless damage, or one that made other digits: a file of one's own has no digest to hold it to
        assert digits.images.shape == (len(digits.labels), 28, 28)
        assert digits.images.dtype == digits.labels.dtype == np.uint8
        assert digits.labels.max() <= 9
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@generated(40)
@given(data=st.data())
def test_any_picture_is_read_or_refused(data: st.DataObject) -> None:
    mode, form = data.draw(
        st.sampled_from([("L", "PNG"), ("RGBA", "PNG"), ("RGB", "JPEG"), ("1", "BMP"), ("P", "TIFF")])
    )
    size = data.draw(st.tuples(st.integers(1, 80), st.integers(1, 80)))
    pixels = np.frombuffer(data.draw(st.binary(min_size=16, max_size=64)), np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.resize(pixels, size[::-1])).convert(mode).save(file, form)
    content = file.getvalue()
    try:
        digit = normalize(open_picture(data.draw(st.just(content) | damages(content) | st.binary(max_size=200))))
    except ValueError as error:
        assert_one_line(error)
    else:
        assert digit is None or (digit.image.shape == (28, 28) and digit.image.dtype == np.uint8)


@generated(10)
@given(data=st.data())
def test_a_damaged_checkpoint_is_whole_or_refused(tmp_path: Path, trained_run: Path, data: st.DataObject) -> None:
    whole = trained_run / "checkpoints" / "best.ckpt"
    path = tmp_path / "any.ckpt"
    path.write_bytes(data.draw(damages(whole.read_bytes()) | st.binary(max_size=200)))
    with contextlib.suppress(OSError):
        try:
            found = verify_checkpoint(path)["state_dict"]
        except ValueError as error:
            assert_one_line(error, about=path)
        else:  # what was damaged is not used
            original = verify_checkpoint(whole)["state_dict"]
            assert all(torch.equal(found[name], original[name]) for name in original)
