"""The pictures of the data, on the digits bundled with scikit-learn."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torchvision.transforms import v2

from digitnet.augment import RandomAffine, preview_augmentation
from digitnet.study.configs import SECTIONS, load_data_module, make_untrained, read_config
from digitnet.study.explore import NUM_DRAWS, draw_pictures, explore, show_seen
from digitnet.study.recipes import load_row, resolve
from digitnet.views import see_upright

DIGITS = "data:\n  source: digits\n  split: [1297, 250, 250]\n"
AUGMENTATION = """\
  augmentation:
    class_path: torchvision.transforms.v2.Compose
    init_args:
      transforms:
      - class_path: digitnet.augment.RandomAffine
        init_args: {rotation_deg: 5}
"""
ORIGINALS = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)


def test_writes_each_figure_twice_and_a_page_that_needs_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = tmp_path / "config.yaml", tmp_path / "new" / "folder"
    config.write_text(DIGITS + AUGMENTATION + "trainer:\n  max_epochs: 3\n")
    explore(config, folder, seed=7)
    names = {"first_digits", "class_counts", "rotation", "shift", "rotation_and_shift", "augmentation", "class_means"}
    expected = {f"{name}.{form}" for name in names for form in ("png", "svg")} | {"index.html"}
    assert {path.name for path in folder.iterdir()} == expected

    page = (folder / "index.html").read_text()
    shown = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert {name for name in shown if name != "data:,"} == expected - {"index.html"}
    assert "//" not in page
    assert len(re.findall(r'<img[^>]* alt="[^"]{20,}"', page)) == len(names)
    assert "1,297 to train on, 250 to validate, 250 to test" in page
    assert "RandomAffine(rotation_deg=5.0, shift_frac=0.1, scale_frac=0.0)" in page  # what the config names
    assert f"python -m digitnet explore --config {config} --folder {folder} --seed 7" in page  # makes it again
    out = capsys.readouterr().out
    assert out == f"{folder / 'index.html'}: 7 figures of digits, each as PNG and SVG\n"


def test_a_config_with_the_writeups_augmentation_marks_it_and_draws_it_once() -> None:
    settings = {"source": "digits", "split": [1297, 250, 250], "augmentation": "digitnet.augment.RandomAffine"}
    pictures = draw_pictures(load_data_module({"data": settings}), None, seed=0)
    marked = {picture.name: "This is what the config trains with" in picture.caption for picture in pictures}
    assert "augmentation" not in marked
    assert [name for name, is_marked in marked.items() if is_marked] == ["rotation_and_shift"]


@pytest.mark.parametrize(
    ("architecture", "augmentation", "is_shown"),
    [("zoom", None, True), ("upright", "digitnet.RandomWarp", True), ("digitnet", None, False), (None, None, False)],
)
def test_what_a_network_sees_is_pictured_where_it_is_something_else(
    architecture: str | None, augmentation: str | None, is_shown: bool
) -> None:
    settings = {"source": "digits", "split": [1297, 250, 250], "augmentation": augmentation}
    config = {"data": settings, "model": {"architecture": architecture} if architecture else None}
    pictures = {each.name: each for each in draw_pictures(load_data_module(config), make_untrained(config), seed=0)}
    assert ("seen" in pictures) == is_shown
    if is_shown:
        assert ("on augmented images" in pictures["seen"].caption) == (augmentation is not None)


def test_what_a_network_sees_fills_the_levels() -> None:
    images = torch.from_numpy(ORIGINALS)[:, None]
    net = make_untrained({"model": {"architecture": "upright"}})
    torch.manual_seed(1)
    seen = show_seen(net, None)(images)
    torch.manual_seed(1)
    for image, level in zip(see_upright(images / 255, training=True), seen, strict=True):
        assert (level.min(), level.max()) == (0, 1)
        np.testing.assert_allclose(np.corrcoef(image.flatten(), level.flatten()), 1, atol=1e-5)
    assert not show_seen(make_untrained({}), None)(torch.zeros(1, 1, 28, 28, dtype=torch.uint8)).any()


def test_draws_repeat_with_the_seed_and_leave_the_callers_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (preview_augmentation(RandomAffine(), ORIGINALS, NUM_DRAWS, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (3, NUM_DRAWS, 28, 28)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[:, 0], first[:, 1])


def test_draws_keep_the_order_of_the_originals_and_the_scale_of_uint8() -> None:
    for augmentation in (RandomAffine(0, 0), v2.ToDtype(torch.float32, scale=True)):
        draws = preview_augmentation(augmentation, ORIGINALS, 2, seed=0)
        np.testing.assert_allclose(draws, np.stack([ORIGINALS, ORIGINALS], axis=1), atol=1e-3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: {", "is no YAML"),
        ("hello", "is no config"),
        ("dtaa:\n  source: digits", "a key 'dtaa', which fit does not know; did you mean data?"),
        ("data: 3", "where keys such as source and split are expected"),
        ("data:\n  sorce: digits", "'sorce'"),
        ("data:\n  split: [a, b]", "data.split"),
        ("data:\n  source: digits\n  split: [1, 2, 3]", "adds up to 6"),
        ("data:\n  augmentation:\n    class_path: digitnet.augment.Rotate", "digitnet.augment.Rotate"),
        (DIGITS + "  augmentation: {class_path: digitnet.augment.RandomAffine, init_args: {shift_frac: -1}}", "-1.0"),
        (DIGITS + "  augmentation: torch.nn.Flatten", "the shape must stay"),
        (DIGITS + "model: {architecture: [zoom]}", "model.architecture is ['zoom']; there are digitnet,"),
        (DIGITS + "model: {architecture: lenet}", "model.architecture is lenet; there are digitnet, upright, zoom"),
    ],
)
def test_bad_configs_are_told_in_one_line_and_leave_no_folder(tmp_path: Path, text: str, said: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        explore(config, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_sections_are_those_of_fit() -> None:
    settings = resolve(load_row(ROOT / "configs" / "quickstart.yaml"))
    assert set(settings) - set(SECTIONS) == set()
    assert set(SECTIONS) - set(settings) <= {"ckpt_path", "weights_only"}


def test_a_seed_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="seed is 99999999999999999999; it must be from 0 to"):
        explore(seed=99999999999999999999)


def test_a_file_in_the_folders_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("digitnet.study.explore.draw_pictures", lambda *_: [])
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OSError, match=r"a file is in the way.*name another place with --folder"):
        explore(ROOT / "configs" / "quickstart.yaml", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_missing_config_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such config"):
        explore(Path("nowhere.yaml"))


def test_the_configs_of_the_project_describe_data() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        assert sum(load_data_module(read_config(path)).split) in (1_797, 70_000), path
