"""The corruptions against scikit-image and against pictures worked out by hand; and the command."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from skimage.feature import canny
from skimage.transform import AffineTransform, EuclideanTransform, warp

from digitnet.data import Digits, load_bundled_digits
from digitnet.scores import find_report_folder
from digitnet.study import corruptions
from digitnet.study.corruptions import CORRUPTIONS, corrupt
from digitnet.study.robustness import render_table

DIGITS = load_bundled_digits().images[:60]
BLANK = np.zeros((300, 28, 28), dtype=np.uint8)
DOT = BLANK.copy()
DOT[:, 13:15, 13:15] = 255


@pytest.fixture(scope="module")
def images(real_digits: Digits) -> np.ndarray:
    """(40, 28, 28) uint8."""
    return real_digits.images[:40]


# --- all of them ------------------------------------------------------------------------------------------------------


def test_they_are_the_fifteen_of_the_paper() -> None:
    assert len(CORRUPTIONS) == 15


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_decides_and_later_images_do_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruptions, "CHUNK", 20)
    spoiled = corrupt(DIGITS, name, seed=1)
    assert spoiled.shape == DIGITS.shape
    assert spoiled.dtype == np.uint8
    np.testing.assert_array_equal(corrupt(DIGITS[:40], name, seed=1), spoiled[:40])
    is_random = name not in ("scale", "brightness", "stripe", "canny_edges")
    assert is_random == (corrupt(DIGITS, name, seed=2) != spoiled).any()
    assert (spoiled != DIGITS).any()
    assert corrupt(DIGITS[:0], name, seed=1).shape == (0, 28, 28)


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no corruption 'snow'; there are shot_noise, .*canny_edges"):
        corrupt(DIGITS, "snow", 0)


def test_what_was_made_of_the_checkpoints_own_data_stays(trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    best, own = run / "checkpoints" / "best.ckpt", {"source": "digits"}
    assert find_report_folder(best, own, "digits").resolve() == run / "report"
    assert find_report_folder(best, {}, "mine.npz").resolve() == run / "report"  # it does not say what it knows
    other = find_report_folder(best, own, "mine.npz")
    assert other.resolve() == run / "report_mine"
    other.mkdir()
    (other / "robustness.json").write_text('{"dataset": "mine.npz"}')
    assert find_report_folder(best, own, "mine.npz") == other
    assert find_report_folder(best, own, "elsewhere/mine.npz").resolve() == run / "report_mine_2"


# --- against scikit-image and by hand ---------------------------------------------------------------------------------


def about_the_centre(transform: AffineTransform | EuclideanTransform) -> AffineTransform:
    """scikit-image's transform, (x, y) from output to input, held at the middle of 28 x 28."""
    matrix = np.array(transform.params)
    matrix[:2, 2] = 13.5 - matrix[:2, :2] @ [13.5, 13.5]
    return AffineTransform(matrix=matrix)


SHEARED = {sign: np.array([[1, -np.sin(0.4 * sign), 0], [0, np.cos(0.4), 0], [0, 0, 1]]) for sign in (1, -1)}


@pytest.mark.parametrize(
    ("name", "transforms"),
    [
        ("rotate", [EuclideanTransform(rotation=0.4), EuclideanTransform(rotation=-0.4)]),
        ("scale", [AffineTransform(scale=(1 / 0.7, 1 / 0.7))]),
        ("shear", [AffineTransform(matrix=SHEARED[1]), AffineTransform(matrix=SHEARED[-1])]),
    ],
)
def test_warps_are_scikit_images(
    name: str, transforms: list[AffineTransform | EuclideanTransform], images: np.ndarray
) -> None:
    spoiled = corrupt(images, name, seed=0).astype(float)
    references = [
        np.stack([255 * warp(image / 255, inverse_map=about_the_centre(one), order=1) for image in images])
        for one in transforms
    ]
    errors = np.stack([np.abs(spoiled - reference).max(axis=(1, 2)) for reference in references])  # (T, N)
    assert (errors.min(axis=0) <= 0.51).all()
    assert len(set(errors.argmin(axis=0))) == len(transforms)  # each direction occurs


def test_translates_by_three_pixels_each_way() -> None:
    corners = {tuple(np.argwhere(image)[0] - (13, 13)) for image in corrupt(DOT, "translate", 0)}
    assert corners == {(-3, -3), (-3, 3), (3, -3), (3, 3)}


def test_impulse_noise_is_black_or_white_on_17_percent() -> None:
    spoiled = corrupt(np.full_like(BLANK, 100), "impulse_noise", 0)
    assert [float((spoiled == level).mean()) for level in (0, 100, 255)] == pytest.approx(
        [0.085, 0.83, 0.085], abs=0.005
    )


def test_shot_noise_counts_three_where_the_ink_is_full() -> None:
    spoiled = corrupt(np.full_like(BLANK, 255), "shot_noise", 0)
    assert set(np.unique(spoiled)) == {0, 85, 170, 255}
    shares = [float((spoiled == level).mean()) for level in (0, 85, 170)]
    assert shares == pytest.approx([0.0498, 0.1494, 0.2240], abs=0.01)  # e^-3 (1, 3, 9 / 2)
    assert not corrupt(BLANK, "shot_noise", 0).any()


def test_glass_spreads_a_dot_evenly_and_keeps_its_ink() -> None:
    spoiled = corrupt(DOT, "glass_blur", 0).astype(float)
    assert spoiled.sum(axis=(1, 2)).mean() == pytest.approx(4 * 255, rel=0.02)
    assert 20 < spoiled.max(axis=(1, 2)).mean() < 200
    assert len({image.tobytes() for image in spoiled}) == len(spoiled)
    flat = np.full_like(BLANK, 90)
    np.testing.assert_array_equal(corrupt(flat, "glass_blur", 0), flat)


def test_motion_draws_a_dot_out_one_way() -> None:
    spoiled = corrupt(DOT, "motion_blur", 0).astype(float)
    assert spoiled.sum(axis=(1, 2)) == pytest.approx(np.full(len(DOT), 4 * 255), rel=0.05)  # each level is rounded
    row, column = np.mgrid[:28, :28] - 13.5
    assert not spoiled[:, column > 0.5].any()  # up to 45 degrees off the line of writing
    tilts = np.degrees(np.arctan2((spoiled * row).sum(axis=(1, 2)), -(spoiled * column).sum(axis=(1, 2))))
    assert np.abs(tilts).max() < 47
    assert np.abs(tilts.mean()) < 5
    assert tilts.std() == pytest.approx(90 / 12**0.5, rel=0.15)  # uniform


def test_brightness_and_stripe_by_hand(images: np.ndarray) -> None:
    brighter = corrupt(images, "brightness", 0)
    np.testing.assert_allclose(brighter, np.minimum(images + 127.5, 255), atol=0.51)
    striped = corrupt(images, "stripe", 0)
    np.testing.assert_array_equal(striped[:, :, 7:21], images[:, :, 7:21])
    np.testing.assert_array_equal(striped[:, :, :7], 255 - images[:, :, :7])
    np.testing.assert_array_equal(striped[:, :, 21:], 255 - images[:, :, 21:])


def test_fog_is_a_smooth_cloud_and_leaves_a_quarter_of_the_contrast() -> None:
    foggy = corrupt(DOT, "fog", 0).astype(float)
    around = foggy[:, [12, 12, 15, 15], [12, 15, 12, 15]].mean(axis=1)
    rise = foggy[:, 13:15, 13:15].mean(axis=(1, 2)) - around
    assert rise.mean() == pytest.approx(255 / 4, abs=3)
    assert foggy[:, 0, 0].std() > 20  # as bright as it happens to be
    steps = np.abs(np.diff(foggy[:, :10], axis=2)).mean()
    assert 0 < steps < 0.2 * foggy[:, :10].std()


def test_clouds_fill_their_range_and_join_at_the_edges() -> None:
    clouds = corruptions._draw_clouds(20, np.random.default_rng(0), decay=1.4)
    assert clouds.shape == (20, 256, 256)
    np.testing.assert_array_equal(clouds.min(axis=(1, 2)), 0)
    np.testing.assert_array_equal(clouds.max(axis=(1, 2)), 1)
    inner, seam = np.abs(clouds[:, 1] - clouds[:, 0]).mean(), np.abs(clouds[:, -1] - clouds[:, 0]).mean()
    assert seam == pytest.approx(inner, rel=0.3)
    near, far = (np.abs(clouds[:, step:] - clouds[:, :-step]).mean() for step in (1, 64))
    assert far > 5 * near


def test_mud_is_a_quarter_as_bright_as_ink() -> None:
    muddy = corrupt(BLANK, "spatter", 0)
    assert muddy.max() == 63
    assert 0.1 < (muddy > 0).mean() < 0.5
    assert muddy[muddy > 0].min() >= 50  # nothing thinner than 80 %
    covered = corrupt(np.full_like(BLANK, 255), "spatter", 0)
    np.testing.assert_array_equal(covered < 255, muddy > 0)


def test_a_line_falls_off_with_the_distance_above_and_below() -> None:
    line = corruptions._draw_line(*(np.array([value]) for value in (2, 10, 12, 15)))[0]
    assert not line[:, :2].any()
    assert not line[:, 12:].any()
    assert line[10, 2] == 1
    for rows_off in (0, 1, 2):
        expected = max(np.log(1 - rows_off / 2.3) + 1, 0)
        assert line[11 + rows_off, 4] == pytest.approx(expected)  # it is at row 11 there
        assert line[11 - rows_off, 4] == pytest.approx(expected)


def test_the_dotted_line_runs_from_edge_to_edge_two_on_and_two_off() -> None:
    dotted = corrupt(BLANK, "dotted_line", 0)
    drawn = dotted.max(axis=1) > 100  # (N, 28) columns
    expected = np.arange(28) // 2 % 2 == 1
    expected[27] = False  # a line ends before its last column
    assert (drawn == expected).all(axis=1).mean() > 0.9  # the others leave the picture


def test_the_zigzag_turns_every_four_pixels() -> None:
    zigzags = corrupt(BLANK, "zigzag", 0)
    middle = zigzags[(zigzags[:, 5:23] > 200).any(axis=2).sum(axis=1) > 0]
    rows = (middle.astype(float) * np.arange(28)[:, None]).sum(axis=1) / np.maximum(middle.sum(axis=1), 1)  # (N, 28)
    whole = rows[(middle.max(axis=1)[:, 3:24] > 100).all(axis=1) & (rows[:, 3:24].min(axis=1) > 4)]
    assert len(whole) > 50
    tops = whole - np.array([np.polyval(np.polyfit(np.arange(3, 24), one[3:24], 1), np.arange(28)) for one in whole])
    turns = (np.diff(np.sign(tops[:, 3:24]), axis=1) != 0).sum(axis=1)
    assert 4 <= np.median(turns) <= 6  # it crosses its own line every four columns
    assert np.abs(tops[:, 3:24]).max(axis=1).mean() == pytest.approx(2, abs=0.7)


def test_edges_are_cannys(images: np.ndarray) -> None:
    expected = np.stack([canny(image / 255) for image in images]) * 255
    np.testing.assert_array_equal(corrupt(images, "canny_edges", 0), expected)


# --- the command ------------------------------------------------------------------------------------------------------


def test_scores_a_run_and_writes_its_table_and_figures(
    digitnet: Run, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder = trained_run / "checkpoints" / "best.ckpt", tmp_path / "out"
    assert digitnet("robustness", "--ckpt_path", checkpoint, "--folder", folder) == 0
    out = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        "robustness.json", "robustness.md", "robustness.png", "corruptions.png",
    }  # fmt: skip
    record = json.loads((folder / "robustness.json").read_text())
    assert record["num_images"] == 40
    accuracies = record["accuracy"]
    assert list(accuracies) == ["clean", *CORRUPTIONS]
    assert record["mean_of_15"] == pytest.approx(np.mean([accuracies[name] for name in CORRUPTIONS]))

    # The same digits, scored by test.
    assert digitnet("test", "--ckpt_path", checkpoint, "--trainer.precision", "32-true") == 0
    metrics = json.loads((trained_run / "report" / "metrics.json").read_text())
    assert accuracies["clean"] == pytest.approx(metrics["accuracy"])

    table = (folder / "robustness.md").read_text()
    fog = f"| fog | 5 of 5: a cloud of three times the ink's brightness | {100 * accuracies['fog']:.2f} % |"
    assert f"{fog} - |" in table  # these are no digits of MNIST's, of which figures are published
    table = render_table({**record, "dataset": "mnist"})
    assert f"{fog} 14.0 % |" in table
    assert f"| mean of 15 |  | {100 * record['mean_of_15']:.2f} % | 75.9 % |" in table
    assert f"mean of 15{record['mean_of_15']:12.2%}" in out


def test_a_checkpoint_outside_a_run_is_scored_on_the_data_it_names(
    digitnet: Run,
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("digitnet.study.robustness.CORRUPTIONS", {"fog": CORRUPTIONS["fog"]})  # the others take time
    shutil.copy(trained_run / "checkpoints" / "best.ckpt", tmp_path / "mine.ckpt")
    assert digitnet("robustness", "--ckpt_path", "mine.ckpt") == 0
    assert capsys.readouterr().out.startswith("40 test images of digits, mine.ckpt\n")
    assert "knows them" not in (tmp_path / "mine_report" / "robustness.md").read_text()

    (tmp_path / "other.yaml").write_text("data: {source: digits, split: [1000, 697, 100]}\n")
    assert digitnet("robustness", "--ckpt_path", "mine.ckpt", "--config", "other.yaml") == 0
    assert "the checkpoint was trained on 20 of these 100 images: it knows them\n" in capsys.readouterr().out
    assert "was trained on 20 and knows them" in (tmp_path / "mine_report" / "robustness.md").read_text()


def test_a_negative_seed_is_refused(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert digitnet("robustness", "--seed", "-1") == 1
    assert capsys.readouterr().err == "digitnet: error: seed is -1; it must be at least 0\n"


def test_without_scikit_image_it_says_what_to_install(
    digitnet: Run,
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    folder = tmp_path / "out"
    assert digitnet("robustness", "--ckpt_path", trained_run / "checkpoints" / "best.ckpt", "--folder", folder) == 1
    assert capsys.readouterr().err == (
        'digitnet: error: canny_edges needs scikit-image: pip install -e ".[robustness]"\n'
    )
    assert not folder.exists()
