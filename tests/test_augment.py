"""RandomAffine against images worked out by hand and against the write-up's own Keras layers."""

from __future__ import annotations

import keras
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from digitnet.augment import RandomAffine, RandomWarp, affine, verify_augmentation
from digitnet.data import Digits

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def digits(real_digits: Digits) -> Tensor:
    """Up to 10,000 of them (N, 1, 28, 28) uint8."""
    return torch.from_numpy(real_digits.images[:10_000])[:, None]


def move(images: Tensor, angle_deg: float = 0.0, down: float = 0.0, right: float = 0.0) -> Tensor:
    """``affine`` with the same movement for every image."""
    n = len(images)
    return affine(images, torch.full((n,), angle_deg), torch.tensor([[down, right]]).expand(n, 2))


def move_in_keras(images: Tensor, turn: float = 0.0, down: float = 0.0, right: float = 0.0) -> Tensor:
    """The write-up's layers, held to one angle (a fraction of a full turn) and one shift."""
    layers = [
        keras.layers.RandomRotation((turn, turn), fill_mode="nearest"),
        keras.layers.RandomTranslation((down, down), (right, right), fill_mode="nearest"),
    ]
    x = images.float().permute(0, 2, 3, 1)  # Keras keeps channels last
    for layer, active in zip(layers, (turn, down or right), strict=True):
        x = layer(x, training=True) if active else x
    return torch.as_tensor(x).cpu().permute(0, 3, 1, 2)


# --- where pixels go --------------------------------------------------------------------------------------------------


def test_quarter_turn_is_counter_clockwise() -> None:
    image = torch.tensor([[[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]], dtype=torch.uint8)
    assert move(image, angle_deg=90).tolist() == [[[[3, 6, 9], [2, 5, 8], [1, 4, 7]]]]
    assert move(image, angle_deg=-90).tolist() == [[[[7, 4, 1], [8, 5, 2], [9, 6, 3]]]]


def test_shift_goes_down_and_right_and_repeats_the_edge() -> None:
    image = torch.tensor([[[[1, 2, 3, 4], [5, 6, 7, 8]]]], dtype=torch.uint8)
    assert move(image, down=1 / 2).tolist() == [[[[1, 2, 3, 4], [1, 2, 3, 4]]]]
    assert move(image, right=2 / 4).tolist() == [[[[1, 1, 1, 2], [5, 5, 5, 6]]]]
    assert move(image, down=-1 / 2, right=-1 / 4).tolist() == [[[[6, 7, 8, 8], [6, 7, 8, 8]]]]


@pytest.mark.parametrize("zoom", [0.8, 2.0])
def test_zoom_goes_about_the_centre(zoom: float) -> None:
    ramp = torch.arange(9.0).expand(1, 1, 9, 9)
    zoomed = affine(ramp, torch.zeros(1), torch.zeros(1, 2), torch.tensor([zoom]))
    expected = (4 + (torch.arange(9.0) - 4) / zoom).clamp(0, 8)  # beyond the edge, the edge repeats
    torch.testing.assert_close(zoomed, expected.expand(1, 1, 9, 9))


def test_scale_is_drawn_for_each_image_and_changes_no_other_draw(digits: Tensor) -> None:
    images = digits[:64].float()
    params = RandomAffine(10.0, 0.1, 0.2).make_params([images])
    torch.manual_seed(0)
    without = RandomAffine(10.0, 0.1).make_params([images])
    assert "zoom" not in without
    assert params["zoom"].unique().numel() == 64
    assert 0.8 <= params["zoom"].min() < 0.85 < 1.15 < params["zoom"].max() <= 1.2
    torch.manual_seed(0)
    again = RandomAffine(10.0, 0.1, 0.2).make_params([images])
    assert torch.equal(again["angle_deg"], without["angle_deg"])


def test_rotation_comes_before_the_shift() -> None:
    image = torch.zeros(1, 1, 7, 7)
    image[..., 3, 5] = 1  # two pixels right of the centre: turned, two above it; then one down
    assert move(image, angle_deg=90, down=1 / 7)[0, 0].round().nonzero().tolist() == [[2, 3]]


def test_oblong_images_rotate_rigidly() -> None:
    image = torch.zeros(1, 1, 5, 9)
    image[..., 2, 6] = 1  # two pixels right of the centre: turned, two above it
    assert move(image, angle_deg=90)[0, 0].round().nonzero().tolist() == [[0, 4]]


@pytest.mark.parametrize("turn", [0.05, -0.05, 0.02])
def test_rotation_is_keras_rotation(digits: Tensor, turn: float) -> None:
    found = move(digits[:256].float(), angle_deg=360 * turn)
    torch.testing.assert_close(found, move_in_keras(digits[:256], turn=turn), rtol=0, atol=0.01)  # of 255: rounding


@pytest.mark.parametrize(("down", "right"), [(0.1, 0.0), (0.0, -0.1), (-0.03, 0.07)])
def test_shift_is_keras_translation(digits: Tensor, down: float, right: float) -> None:
    found = move(digits[:256].float(), down=down, right=right)
    expected = move_in_keras(digits[:256], down=down, right=right)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


def test_both_are_keras_layers_in_sequence(digits: Tensor) -> None:
    # By whole pixels Keras' second resampling changes nothing, so one resampling must give the same; but for the edge,
    # which Keras repeats twice.
    found = move(digits[:256].float(), angle_deg=18, down=2 / 28, right=-1 / 28)
    expected = move_in_keras(digits[:256], turn=0.05, down=2 / 28, right=-1 / 28)
    inner = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(found[inner], expected[inner], rtol=0, atol=0.01)
    # Otherwise it blurs the strokes once more, by less than half a pixel: 1.9 levels of 255 on
    # average on MNIST. One degree more would make 2.6, a quarter of a pixel more 3.5.
    found = move(digits[:256].float(), angle_deg=18, down=0.1, right=-0.07)
    expected = move_in_keras(digits[:256], turn=0.05, down=0.1, right=-0.07)
    assert (found - expected).abs().mean() < 2.5


def test_positive_shear_leans_tops_to_the_right() -> None:
    image = torch.zeros(1, 1, 7, 7)
    image[..., 3] = 1  # an upright line
    leaning = affine(image, torch.zeros(1), torch.zeros(1, 2), shear=torch.tensor([1.0]))
    assert leaning[0, 0].round().nonzero().tolist() == [[row, 6 - row] for row in range(7)]


@pytest.mark.parametrize("height", [7, 5])
def test_shear_keeps_its_angle_on_oblong_images(height: int) -> None:
    image = torch.zeros(1, 1, height, 9)
    image[..., 4] = 1
    leaning = affine(image, torch.zeros(1), torch.zeros(1, 2), shear=torch.tensor([1.0]))
    middle = height // 2
    assert leaning[0, 0].round().nonzero().tolist() == [[row, 4 + middle - row] for row in range(height)]


def test_bend_fetches_each_pixel_from_where_it_says() -> None:
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    bend = torch.zeros(1, 3, 4, 2)
    bend[0, 0, 0] = torch.tensor([2.0, 1.0])  # to the right, down
    bend[0, 2, 3] = torch.tensor([-0.5, 0.0])
    bent = affine(image, torch.zeros(1), torch.zeros(1, 2), bend=bend)
    expected = image.clone()
    expected[0, 0, 0, 0] = image[0, 0, 1, 2]
    expected[0, 0, 2, 3] = 10.5
    torch.testing.assert_close(bent, expected)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_zero_strength_is_the_identity(digits: Tensor) -> None:
    assert torch.equal(RandomAffine(rotation_deg=0, shift_frac=0)(digits), digits)
    assert torch.equal(move(digits), digits)  # and so is the resampling itself


def test_every_image_has_its_own_draw(digits: Tensor) -> None:
    batch = RandomAffine()(digits[:1].expand(64, -1, -1, -1))
    assert len(batch.unique(dim=0)) == 64


def test_draws_are_uniform_and_independent() -> None:
    torch.manual_seed(0)
    params = RandomAffine(rotation_deg=18, shift_frac=0.1).make_params([torch.zeros(10_000, 1, 28, 28)])
    draws = torch.stack([params["angle_deg"] / 18, *(params["shift_frac"] / 0.1).unbind(1)])  # (3, 10000) in [-1, 1)
    assert draws.abs().max() <= 1 + 1e-6
    quarters = torch.stack([draw.histc(4, min=-1, max=1) for draw in draws]) / 10_000
    torch.testing.assert_close(quarters, torch.full((3, 4), 0.25), rtol=0, atol=0.02)  # 4.6 standard deviations
    torch.testing.assert_close(draws.corrcoef(), torch.eye(3), rtol=0, atol=0.04)  # 4 standard deviations


def test_warp_draws_as_strong_as_asked_and_smoothly() -> None:
    torch.manual_seed(0)
    params = RandomWarp(shear_deg=20, elastic_px=1.5).make_params([torch.zeros(5_000, 1, 28, 28)])
    angle = params["shear"].atan() * (180 / torch.pi)
    assert angle.abs().max() <= 20 + 1e-4
    assert angle.std() == pytest.approx(20 / 3**0.5, rel=0.03)
    bend = params["bend"]
    assert bend.shape == (5_000, 28, 28, 2)
    corners = bend[:, [0, 0, -1, -1], [0, -1, 0, -1]]  # nodes of the lattice, (5000, 4, 2)
    assert corners.std() == pytest.approx(1.5, rel=0.03)
    torch.testing.assert_close(corners.flatten(1).T.corrcoef(), torch.eye(8), rtol=0, atol=0.06)
    assert bend.diff(dim=1).std() < 0.25 * bend.std()  # neighbours move alike: no image is torn
    moved = params["bend"].mean(dim=(0, 1, 2))
    assert moved.abs().max() < 0.05


def test_warp_without_slant_and_bending_is_the_affine(digits: Tensor) -> None:
    images = digits[:64].float()
    results = []
    for augment in (RandomAffine(10, 0.05, 0.1), RandomWarp(10, 0.05, 0.1, shear_deg=0, elastic_px=0)):
        torch.manual_seed(0)
        results.append(augment(images))
    assert torch.equal(*results)
    assert torch.equal(RandomWarp(0, 0, 0, 0, 0)(images), images)
    warped = RandomWarp(0, 0, 0, 0, elastic_px=1)(images)
    assert len(RandomWarp(0, 0, 0, 0, elastic_px=1)(images[:1].expand(8, -1, -1, -1)).unique(dim=0)) == 8
    assert 0 < (warped - images).abs().mean() < 40


@pytest.mark.parametrize(("argument", "value"), [("shear_deg", 61), ("shear_deg", -1), ("elastic_px", -0.1)])
def test_warp_out_of_range_is_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{argument} is {value}"):
        RandomWarp(**{argument: value})


@pytest.mark.parametrize("device", DEVICES)
def test_seed_repeats_the_draws(digits: Tensor, device: str) -> None:
    augment, images = RandomAffine(), digits[:64].to(device)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(augment(images))
    assert runs[0].device == images.device
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_digits_stay_whole(digits: Tensor) -> None:
    torch.manual_seed(0)
    images = digits.repeat(-(-10_000 // len(digits)), 1, 1, 1)[:10_000]
    ink = RandomAffine()(images).double().mean() / images.double().mean()
    assert abs(ink - 1) < 0.02


# --- as a torchvision transform ---------------------------------------------------------------------------------------


def test_labels_pass_through_and_dtypes_stay(digits: Tensor) -> None:
    labels = torch.arange(8)
    for dtype in (torch.uint8, torch.float32, torch.bfloat16):
        images, passed = RandomAffine()(digits[:8].to(dtype), labels)
        assert images.dtype == dtype
        assert images.shape == (8, 1, 28, 28)
        assert passed is labels


def test_dtypes_agree(digits: Tensor) -> None:
    exact = move(digits[:64].float(), angle_deg=18, down=0.1)
    assert torch.equal(move(digits[:64], angle_deg=18, down=0.1).float(), exact.round())
    halved = move(digits[:64].bfloat16(), angle_deg=18, down=0.1).float()
    torch.testing.assert_close(halved, exact, rtol=0, atol=1)  # bfloat16 counts to 256 in steps of 1


def test_composes_with_torchvision(digits: Tensor) -> None:
    pipeline = v2.Compose([v2.ToImage(), RandomAffine(), v2.ToDtype(torch.float32, scale=True)])
    picture = digits[0, 0].numpy()
    torch.manual_seed(0)
    image, label = pipeline(Image.fromarray(picture), 5)
    torch.manual_seed(0)
    expected = RandomAffine()(digits[:1])[0] / 255
    assert isinstance(image, tv_tensors.Image)
    assert label == 5
    torch.testing.assert_close(image.as_subclass(Tensor), expected)


def test_picture_that_is_no_tensor_is_refused(digits: Tensor) -> None:
    with pytest.raises(TypeError, match=r"v2\.ToImage"):
        RandomAffine()(Image.fromarray(digits[0, 0].numpy()))


@pytest.mark.parametrize("strength", [-0.001, float("nan"), float("inf"), 181])
def test_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=rf"rotation_deg is {strength}; .* from 0 to 180"):
        RandomAffine(rotation_deg=strength)
    with pytest.raises(ValueError, match=rf"shift_frac is {strength}; .* from 0 to 1"):
        RandomAffine(shift_frac=strength)


def test_a_trial_of_an_augmentation_changes_neither_images_nor_draws() -> None:
    images = torch.full((8, 1, 28, 28), 7, dtype=torch.uint8)
    before, state = images.clone(), torch.get_rng_state()
    verify_augmentation(v2.RandomErasing(p=1, value=255, inplace=True), images)
    verify_augmentation(RandomWarp(), images)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
