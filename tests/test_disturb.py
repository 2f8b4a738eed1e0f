"""RandomDisturbance: what each disturbance may do to a picture, and how often."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from digitnet.data import load_bundled_digits
from digitnet.disturb import RandomDisturbance, add_noise, blur, invert, outline, relight, scribble

Disturb = Callable[[Tensor], Tensor]
ALL = (outline, blur, scribble, invert, relight, add_noise)


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """(400, 1, 28, 28) uint8."""
    return torch.from_numpy(load_bundled_digits().images[:400])[:, None]


@pytest.mark.parametrize("disturb", ALL)
@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (1, 1, 20, 32)])
def test_images_keep_shape_and_range(disturb: Disturb, shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    disturbed = disturb(images)
    assert disturbed.shape == images.shape
    assert disturbed.min() >= 0
    assert disturbed.max() <= 1 + 1e-6
    assert not torch.equal(disturbed, images)


@pytest.mark.parametrize("disturb", ALL)
def test_an_image_is_disturbed_without_looking_at_others(disturb: Disturb, digits: Tensor) -> None:
    one = digits[:1].float() / 255
    disturbed = disturb(torch.cat([one, torch.zeros(200, 1, 28, 28)]))
    assert disturbed[0].max() > 0.1  # its ink is still there
    assert not torch.equal(disturbed[1], disturbed[2]) or disturb in (outline, blur)  # blank stays blank there


def test_inverts_inside_one_rectangle_or_outside_it(digits: Tensor) -> None:
    images = digits.float() / 255 * 0.8  # no 0.5, which is its own inverse
    inverted = invert(images)
    is_inverted = inverted != images
    torch.testing.assert_close(inverted[is_inverted], 1 - images[is_inverted])
    for one in is_inverted[:, 0]:
        inside = one if not one[[0, 0, -1, -1], [0, -1, 0, -1]].all() else ~one
        rows, columns = inside.any(1), inside.any(0)
        assert torch.equal(inside, rows[:, None] & columns) or torch.equal(
            ~inside, (~inside).any(1)[:, None] & (~inside).any(0)
        )
    share = is_inverted.float().mean()
    assert 0.3 < share < 0.7


def test_a_blur_keeps_the_ink_of_a_dot_and_its_place() -> None:
    dots = torch.zeros(500, 1, 28, 28)
    dots[:, :, 13:16, 13:16] = 1
    blurred = blur(dots)
    assert float(blurred.sum((1, 2, 3)).mean()) == pytest.approx(9, rel=0.1)
    axis = torch.arange(28.0)
    for dim in (2, 3):
        centre = (blurred.sum(dim)[:, 0] * axis).sum(1) / blurred.sum((1, 2, 3))
        assert float(centre.mean()) == pytest.approx(14, abs=0.1)
        assert float(centre.std()) < 0.5


def test_relit_ink_is_paler_and_everything_else_brighter(digits: Tensor) -> None:
    images = digits.float() / 255
    relit = relight(images)
    low, high = images.flatten(1).amin(1), images.flatten(1).amax(1)
    assert (relit.flatten(1).amin(1) >= low - 1e-6).all()
    assert (relit.flatten(1).amax(1) <= high.clamp(min=1) + 1e-6).all()
    contrast = relit.flatten(1).std(1) / images.flatten(1).std(1)
    assert contrast.mean() < 0.9


def test_a_stroke_only_adds_ink_and_is_thin() -> None:
    drawn = scribble(torch.zeros(500, 1, 28, 28))
    covered = (drawn > 0.25).float().mean((1, 2, 3))
    assert 0.02 < float(covered.mean()) < 0.2
    full = torch.ones(4, 1, 28, 28)
    assert torch.equal(scribble(full), full)


def test_the_rim_of_a_square_is_one_pixel_wide() -> None:
    square = torch.zeros(200, 1, 28, 28)
    square[:, :, 10:18, 10:18] = 1
    sizes = set(outline(square).sum((1, 2, 3)).int().tolist())
    assert sizes == {100 - 64, 100 - 36}  # the ring around it, alone or with the ring within


def test_the_share_of_images_is_disturbed(digits: Tensor) -> None:
    images = digits[:200].repeat(10, 1, 1, 1)
    for share in (0.0, 0.5, 1.0):
        changed = (RandomDisturbance(share)(images) != images).flatten(1).any(1).float().mean()
        # One of six at least: 1 - 0.75^6. Now and then a disturbance changes nothing.
        assert float(changed) == pytest.approx(share * (1 - 0.75**6), abs=0.05)


def test_dtype_labels_and_seed(digits: Tensor) -> None:
    disturb, labels = RandomDisturbance(1.0), torch.arange(8)
    torch.manual_seed(3)
    disturbed, same_labels = disturb(tv_tensors.Image(digits[:8]), labels)
    assert isinstance(disturbed, tv_tensors.Image)
    assert disturbed.dtype == torch.uint8
    assert same_labels.dtype == torch.int64
    torch.manual_seed(3)
    torch.testing.assert_close(disturb(digits[:8].float() / 255) * 255, disturbed.float(), atol=0.51, rtol=0)
    assert disturb(digits[0]).shape == (1, 28, 28)


def test_a_share_outside_its_range_is_refused() -> None:
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="a fraction of the images, from 0 to 1"):
            RandomDisturbance(share)


def test_works_in_a_composition(digits: Tensor) -> None:
    both = v2.Compose([v2.Identity(), RandomDisturbance(1.0)])
    assert both(digits[:4]).shape == (4, 1, 28, 28)
