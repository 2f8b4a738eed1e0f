"""What networks see of images: against least squares, PyTorch's own resampling, and the geometry they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from digitnet.augment import affine
from digitnet.data import load_bundled_digits
from digitnet.views import deslant, set_upright, zoom_in


def fit_slants(images: torch.Tensor) -> np.ndarray:
    """The slope (B,) of column by row of images (B, 1, H, W), by NumPy's least squares weighted with the ink."""
    columns, rows = np.meshgrid(np.arange(images.shape[3]), np.arange(images.shape[2]))
    inks = images[:, 0].double().numpy()
    return np.array([np.polyfit(rows.ravel(), columns.ravel(), 1, w=np.sqrt(ink).ravel())[0] for ink in inks])


def test_deslanting_leaves_no_slant_and_the_centre_where_it_was() -> None:
    images = torch.from_numpy(load_bundled_digits().images[:100])[:, None].float() / 255
    before = fit_slants(images)
    images = images[np.abs(before) < 0.5]  # the others are left with a part of theirs
    upright = deslant(images)
    assert np.abs(fit_slants(upright)).max() < 0.02 < np.abs(before).mean()
    for axis, places in ((2, torch.arange(28.0).view(28, 1)), (3, torch.arange(28.0).view(1, 28))):
        centres = [(each * places).sum(dim=(1, 2, 3)) / each.sum(dim=(1, 2, 3)) for each in (images, upright)]
        torch.testing.assert_close(*centres, atol=1e-2, rtol=0, msg=f"axis {axis}")
    torch.testing.assert_close(upright.sum(dim=3), images.sum(dim=3), atol=1e-2, rtol=0)  # each row keeps its ink


def test_deslanting_undoes_a_slant() -> None:
    images = torch.from_numpy(load_bundled_digits().images[:100])[:, None].float() / 255
    none = torch.zeros(100)
    leaning = affine(images, none, torch.zeros(100, 2), shear=none + 0.2)
    as_straight = (deslant(leaning) - deslant(images)).abs().mean()
    assert as_straight < 0.25 * (leaning - images).abs().mean()


def test_deslanting_leaves_what_leans_nowhere() -> None:
    images = torch.zeros(2, 1, 28, 28)
    images[1, :, 4:24, 13:15] = 1  # a bar; the other image is empty
    torch.testing.assert_close(deslant(images), images)
    torch.testing.assert_close(deslant(images.to(torch.bfloat16)), images.to(torch.bfloat16))


def test_deslanting_takes_and_gives_any_precision() -> None:
    images = torch.from_numpy(load_bundled_digits().images[:10])[:, None].double() / 255
    jitter = torch.full((10, 1), 0.1, dtype=torch.float64)
    torch.testing.assert_close(deslant(images, jitter), deslant(images.float(), jitter.float()).double())


def test_deslanting_is_as_precise_in_mixed_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        digits = torch.from_numpy(load_bundled_digits().images[:100])[:, None].float() / 255
        mixed = deslant(digits)
    assert torch.equal(mixed, deslant(digits))


def test_training_puts_back_a_random_slant() -> None:
    images = torch.from_numpy(load_bundled_digits().images[:100])[:, None].float() / 255
    assert torch.equal(set_upright(images, training=False), deslant(images))
    torch.manual_seed(0)
    spread = fit_slants(set_upright(images, training=True)) - fit_slants(deslant(images))
    assert np.abs(spread).max() < 0.22
    assert spread.std() == pytest.approx(0.2 / math.sqrt(3), rel=0.2)  # of a uniform distribution


def find_dots(images: torch.Tensor) -> np.ndarray:
    """The centres of mass (B, 2, 2) of the ink in the left and in the right half: column and row, 0 at the middle."""
    axis = torch.arange(28.0) - 13.5
    ink = images[:, 0] - images.amin(dim=(1, 2, 3))[:, None, None]
    halves = torch.stack([ink * (axis < 0), ink * (axis > 0)], dim=1)  # (B, 2, 28, 28)
    weights = halves / halves.sum(dim=(2, 3), keepdim=True)
    return torch.stack([(weights * axis).sum(dim=(2, 3)), (weights * axis[:, None]).sum(dim=(2, 3))], dim=-1).numpy()


def make_dots() -> torch.Tensor:
    """Two round dots (1, 1, 28, 28), five pixels to the left and to the right of the middle."""
    axis = torch.arange(28.0) - 13.5
    dots = [torch.exp(-((axis[None] - place) ** 2 + axis[:, None] ** 2) / 2) for place in (-5, 5)]
    return (dots[0] + dots[1])[None, None]


def test_zooming_in_enlarges_the_middle() -> None:
    images = torch.zeros(50, 1, 28, 28)
    images[..., 4:24, 4:24] = torch.from_numpy(load_bundled_digits().images[:50])[:, None, 4:24, 4:24] / 255
    near = F.interpolate(images[..., 2:26, 2:26], (28, 28), mode="bicubic").clamp(0, 1)
    near = (near - near.mean(dim=(2, 3), keepdim=True)) / near.std(dim=(2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(zoom_in(images, training=False), near, rtol=1e-3, atol=1e-3)
    assert zoom_in(torch.zeros(1, 1, 28, 28), training=False).isfinite().all()


def test_zooming_in_draws_sizes_that_have_the_tests_inside() -> None:
    images = make_dots()
    middle = find_dots(zoom_in(images, training=False))[0]
    np.testing.assert_allclose(middle, [[-5 * 28 / 24, 0], [5 * 28 / 24, 0]], atol=0.05)
    torch.manual_seed(0)
    seen = find_dots(zoom_in(images.expand(4000, -1, -1, -1), training=True))
    apart = seen[:, 1] - seen[:, 0]  # (N, 2)
    size = np.hypot(*apart.T) / (10 * 28 / 24)
    turn = np.linspace(0, math.radians(10), 1000)
    enlargement = 24 / 25 * (np.cos(turn) + np.sin(turn))
    assert (enlargement[0], enlargement[-1]) == pytest.approx((0.96, 1.11), abs=0.005)
    assert size.mean() == pytest.approx(enlargement.mean(), abs=0.005)
    assert np.quantile(size, 0.1) < 1 < np.quantile(size, 0.9)
    assert size.min() > 0.96 - 0.2  # two pixels of bending in ten
    assert size.max() < 1.11 + 0.2
    angle = np.degrees(np.arctan2(apart[:, 1], apart[:, 0]))
    assert angle.mean() == pytest.approx(0, abs=0.5)
    assert 10 / math.sqrt(3) < angle.std() < 9  # the turning's, and the bending's
    centre = seen.mean(axis=1)  # where the middle of both dots came to lie
    assert np.abs(centre.mean(axis=0)).max() < 0.1
    assert 1.1 * 1.2 < centre.std() < 1.8  # of shifts of 0.5 and 1.5, enlarged; and the bending's


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_zooming_in_is_as_precise_in_any_precision(dtype: torch.dtype) -> None:
    images = (torch.from_numpy(load_bundled_digits().images[:100])[:, None] / 255).to(dtype)
    for training in (False, True):
        torch.manual_seed(0)
        expected = zoom_in(images.float(), training)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            found = zoom_in(images, training)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-6 if dtype == torch.float64 else 2**-7, atol=1e-5)
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)  # as Lightning does in bf16-true and the like
        try:
            assert torch.equal(zoom_in(images, training), found)
        finally:
            torch.set_default_dtype(torch.float32)
