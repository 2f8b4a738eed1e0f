from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import QUICKSTART, SHORT, Run
from scipy.ndimage import gaussian_filter
from torch import Tensor

from digitnet.calibrate import choose_threshold, fit_calibration, fit_max_score, fit_temperature
from digitnet.calibration import CalibratedNet, Calibration, Detector, read_calibration
from digitnet.data import DigitDataset, Digits, load_bundled_digits
from digitnet.model import Committee, DigitNet
from digitnet.near_misses import blur, draw_letters, draw_noise, draw_polygons, draw_strokes, make_near_misses, place
from digitnet.tallies import bin_reliability


def draw_logits(num: int) -> tuple[Tensor, Tensor]:
    """Logits (num, 10), and labels drawn by their softmax: calibrated by construction."""
    logits = 2 * torch.randn(num, 10)
    return logits, torch.multinomial(logits.softmax(1), 1)[:, 0]


@pytest.mark.parametrize("factor", [0.7, 1.0, 3.0])
def test_temperature_is_the_factor_that_logits_were_scaled_by(factor: float) -> None:
    logits, labels = draw_logits(20_000)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.03)


def test_temperature_stays_in_bounds_where_every_answer_is_right() -> None:
    logits = torch.eye(10)
    assert fit_temperature(logits, torch.arange(10)) == pytest.approx(0.5, rel=1e-3)
    assert fit_temperature(logits, torch.arange(10).flip(0)) == pytest.approx(10, rel=1e-3)


def test_ece_by_hand_and_after_calibration() -> None:
    confidence, is_right = np.array([0.95, 0.95, 0.65, 0.65]), np.array([True, True, True, False])
    assert bin_reliability(confidence, is_right).ece == pytest.approx(0.5 * 0.05 + 0.5 * 0.15)
    logits, labels = draw_logits(20_000)
    logits = 3 * logits
    temperature = fit_temperature(logits[:10_000], labels[:10_000])

    def ece(divisor: float) -> float:
        confidence, prediction = (logits[10_000:] / divisor).softmax(1).max(1)
        return bin_reliability(confidence.numpy(), (prediction == labels[10_000:]).numpy()).ece

    assert ece(temperature) < 0.03 < 0.1 < ece(1)


def test_threshold_keeps_the_accuracy_asked_for_on_other_answers() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 40_000)
    is_right = rng.random(40_000) < confidence
    threshold = choose_threshold(confidence[:20_000], accuracy=0.95)
    assert threshold == pytest.approx(0.9, abs=0.005)  # from t on, uniform confidences average (1 + t) / 2
    assert is_right[20_000:][confidence[20_000:] >= threshold].mean() == pytest.approx(0.95, abs=0.01)


def test_threshold_at_its_limits() -> None:
    assert choose_threshold(np.array([1.0, 1.0, 1.0])) == 1.0
    assert choose_threshold(np.array([0.9, 0.6, 0.3])) == 1.0
    assert choose_threshold(np.array([0.4, 0.4]), accuracy=0.1) == 0.5


@pytest.fixture(scope="module")
def parts() -> tuple[DigitNet, DigitDataset, DigitDataset, Digits]:
    digits = load_bundled_digits()
    torch.manual_seed(0)
    cut = [Digits(digits.images[a:b], digits.labels[a:b]) for a, b in ((0, 1200), (1200, 1500), (1500, 1797))]
    return DigitNet(), DigitDataset(cut[0]), DigitDataset(cut[1]), cut[2]


def test_calibration_tells_digits_from_noise_and_is_the_same_each_time(
    parts: tuple[DigitNet, DigitDataset, DigitDataset, Digits],
) -> None:
    net, train, val, test = parts
    state = torch.get_rng_state()
    calibration = fit_calibration(net, train, val, 300, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    few, again = (fit_calibration(net, train, val, 20, seed=1).state_dict() for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in few.items())

    def share_of_digits(images: Tensor) -> float:
        with torch.no_grad():
            probabilities, _, is_digit = CalibratedNet(net, calibration)(images)
        assert probabilities.sum(1).numpy() == pytest.approx(1, abs=1e-5)
        return float(is_digit.float().mean())

    assert share_of_digits(val.images) >= 0.98
    assert share_of_digits(torch.from_numpy(test.images)[:, None]) >= 0.9
    assert share_of_digits(draw_noise(200, torch.Generator().manual_seed(5))) <= 0.1


def test_one_digit_in_133_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class ByItsFirstPixel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor) -> Tensor:
            return images[:, 0, 0, 0].float() * 256 + images[:, 0, 0, 1].float()

    places = torch.randperm(1000)
    images = torch.zeros(1000, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = places // 256, places % 256
    calibration: Calibration = Calibration()
    calibration.detector = ByItsFirstPixel()  # type: ignore[assignment]
    calibration.energy_weight.fill_(0.0)
    fit_max_score(calibration, torch.zeros(1000, 10), images)
    assert int((places > calibration.max_score).sum()) == 7  # of 7.5, no more


def test_the_detectors_score_is_the_odds_of_its_eleventh_class() -> None:
    images, detector = torch.rand(5, 1, 28, 28), Detector().eval()
    with torch.no_grad():
        probability = detector.classify(images).softmax(dim=1)[:, 10]
        torch.testing.assert_close(detector(images), torch.log(probability / (1 - probability)))
        torch.testing.assert_close(detector((images * 255).byte()), detector((images * 255).byte() / 255))


@pytest.mark.parametrize("num_digits", [1, 2, 3])
def test_a_few_digits_are_enough_to_fit(
    parts: tuple[DigitNet, DigitDataset, DigitDataset, Digits], num_digits: int
) -> None:
    net, train, val, _ = parts
    assert fit_calibration(net, train, val, num_digits).max_score.isfinite()


def test_logarithms_of_mean_probabilities_have_no_doubt_to_count(
    parts: tuple[DigitNet, DigitDataset, DigitDataset, Digits],
) -> None:
    net, train, val, _ = parts
    assert fit_calibration(net, train, val, 20).energy_weight > 0
    assert fit_calibration(Committee([net, DigitNet()]), train, val, 20).energy_weight == 0


def test_the_networks_doubt_counts_beside_the_detectors_score() -> None:
    images, net, calibration = torch.rand(6, 1, 28, 28), DigitNet().eval(), Calibration().eval()
    calibration.energy_weight.fill_(0.5)
    with torch.no_grad():
        logits = net(images)
        expected = calibration.detector(images) - 0.5 * logits.exp().sum(dim=1).log()
        score = calibration.score(images, logits)
        torch.testing.assert_close(score, expected)
        calibration.max_score.fill_(score.sort().values[2])  # its own, bit for bit: the third is on the border
        assert torch.equal(CalibratedNet(net, calibration)(images)[2], expected <= expected.sort().values[2])


def test_without_a_calibration_nothing_changes() -> None:
    images, net = torch.rand(4, 1, 28, 28), DigitNet().eval()
    probabilities, logits, is_digit = CalibratedNet(net, read_calibration({}, Path("none.ckpt")))(images)
    assert torch.equal(logits, net(images))
    assert torch.equal(probabilities, logits.softmax(1))
    assert is_digit.all()


@pytest.mark.parametrize("num_digits", [0, 30])
def test_fit_leaves_a_calibration_in_the_best_checkpoint(
    digitnet: Run, tmp_path: Path, num_digits: int, caplog: pytest.LogCaptureFixture
) -> None:
    own = (
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.monitor=val/loss",
        "--trainer.callbacks.filename=mine",
    )  # fmt: skip
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, "--calibration.num_digits", num_digits, *own) == 0
    (best,), (mine,) = tmp_path.rglob("best.ckpt"), tmp_path.rglob("mine.ckpt")
    assert "calibration" not in torch.load(mine, weights_only=True)
    checkpoint = torch.load(best, weights_only=True)
    calibration = read_calibration(checkpoint, Path("best.ckpt"))
    assert 0.5 <= float(calibration.temperature) <= 10
    assert torch.isfinite(calibration.max_score) == bool(num_digits)
    assert any("fitting the detector" in line for line in caplog.messages) == bool(num_digits)
    assert "40 images are few for that: confidences may promise too much" in caplog.messages


def test_near_misses_are_pictures_and_some_are_turned_digits() -> None:
    digits = load_bundled_digits()
    images = torch.from_numpy(digits.images[:40])[:, None].float() / 255
    labels = torch.from_numpy(digits.labels[:40]).long()
    near = make_near_misses(images, labels, torch.Generator().manual_seed(0), 600)
    assert near.shape == (600, 1, 28, 28)
    assert near.min() >= 0
    assert near.max() <= 1
    assert not torch.isnan(near).any()
    again = make_near_misses(images, labels, torch.Generator().manual_seed(0), 600)
    assert torch.equal(near, again)

    def distance(image: Tensor) -> float:
        return float((near - place(image[None])).abs().mean((1, 2, 3)).min())

    assert any(distance(three.flip((1, 2))) < 1e-3 for three in images[labels == 3])
    assert all(distance(zero) > 0.01 for zero in images[labels == 0])


def test_place_puts_ink_where_mnist_has_it(real_digits: Digits) -> None:
    images = torch.from_numpy(real_digits.images[:100])[:, None].float() / 255
    corner = F.pad(F.interpolate(images, (14, 14), mode="area"), (0, 14, 14, 0))
    for image, placed in zip(images, place(corner), strict=True):
        rows, columns = (placed[0] > 0.1).any(1).nonzero()[:, 0], (placed[0] > 0.1).any(0).nonzero()[:, 0]
        assert 18 <= max(int(axis.max() - axis.min()) + 1 for axis in (rows, columns)) <= 22
        for dim in (0, 1):
            mass = placed[0].sum(dim)
            assert float((mass * torch.arange(28.0)).sum() / mass.sum()) == pytest.approx(14, abs=0.6)
        assert np.corrcoef(image.flatten(), placed.flatten())[0, 1] > 0.65


def test_letters_are_upright_and_fit_the_page() -> None:
    letters = draw_letters()
    assert letters.shape == (9 * 38, 1, 28, 28)
    assert not (letters[:, :, [0, -1]] > 0).any()
    assert not (letters[..., [0, -1]] > 0).any()
    assert float(letters.amax((1, 2, 3)).min()) > 0.5


def test_drawings_lie_where_mnist_has_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    strokes = draw_strokes(torch.rand(50, 2, 4, 2, generator=generator), generator)[:, 0]
    square = draw_polygons(torch.tensor([[[0.0, 0.0], [0.0, 5.0], [5.0, 5.0], [5.0, 0.0]]]))[0, 0]
    assert float(square.sum()) == pytest.approx(17 * 17, rel=0.07)  # BOX - 3 a side
    for image in (*strokes, square):
        rows, columns = (image > 0.5).any(1).nonzero()[:, 0], (image > 0.5).any(0).nonzero()[:, 0]
        assert 14 <= max(int(axis.max() - axis.min()) + 1 for axis in (rows, columns)) <= 22
        centre = (image * torch.arange(28.0)).sum() / image.sum()
        assert float(centre) == pytest.approx(13.5, abs=3.5)


def test_blur_is_scipys() -> None:
    images = torch.rand(2, 1, 28, 28, dtype=torch.float64).float()
    for image, blurred, sigma in zip(images, blur(images, torch.tensor([0.7, 1.5])), (0.7, 1.5), strict=True):
        expected = gaussian_filter(image[0].numpy(), sigma, mode="constant", radius=7)
        np.testing.assert_allclose(blurred[0].numpy(), expected, atol=1e-5)
