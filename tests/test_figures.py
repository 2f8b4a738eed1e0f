"""What the figures draw: counts, captions, panels, and that nothing overlaps. Not their pixels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from remaining_mistakes import draw_verdicts
from torchmetrics.classification import BinaryCalibrationError
from tradeoff import draw_tradeoff

from digitnet import figures, tallies
from digitnet.canvas import VERMILION
from digitnet.figures import History

NUM_IMAGES = 400
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (NUM_IMAGES, 28, 28), dtype=np.uint8)
LABELS = RNG.integers(0, 10, NUM_IMAGES)
CONFIDENCES = RNG.uniform(0.3, 1, NUM_IMAGES)
TOY_LABELS = np.array([0, 0, 1, 7, 7, 7, 2])
TOY_PREDICTIONS = np.array([0, 1, 1, 2, 2, 7, 2])


def predict_with(num_mistakes: int) -> np.ndarray:
    """The labels, but for the first few, which are read as the next digit."""
    predictions = LABELS.copy()
    predictions[:num_mistakes] = (predictions[:num_mistakes] + 1) % 10
    return predictions


def make_history(num_epochs: int) -> History:
    epochs = np.arange(num_epochs)
    return History(
        epochs + 1, 0.2 / (1 + epochs), 0.99 - 0.04 / (1 + epochs), 0.1 / (1 + epochs), 1 - 0.02 * 0.9**epochs
    )


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def title(figure: Figure) -> str:
    return figure.get_suptitle()


def to_array(drawn: Any) -> np.ndarray:
    """What an artist of matplotlib was given, whose types would allow much more."""
    return np.asarray(drawn)


def heights(axes: Axes) -> list[float]:
    return [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]


# --- what is counted --------------------------------------------------------------------------------------------------


def test_confusions_of_a_toy_case() -> None:
    counts = tallies.count_confusions(TOY_LABELS, TOY_PREDICTIONS)
    expected = {(0, 0): 1, (0, 1): 1, (1, 1): 1, (2, 2): 1, (7, 2): 2, (7, 7): 1}
    assert {(row, column): int(counts[row, column]) for row, column in np.argwhere(counts)} == expected
    assert tallies.rank_confusions(counts)[0] == (7, 2)
    assert tallies.rank_confusions(np.eye(10, dtype=int)) == []


def test_calibration_error_by_hand_and_as_torchmetrics_has_it() -> None:
    # Two bins of two images: right 2 of 2 at 0.95, right 1 of 2 at 0.55; both 0.05 off.
    by_hand = tallies.bin_reliability(np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, True, True, False]))
    assert by_hand.ece == pytest.approx(0.05)
    assert by_hand.counts.sum() == 4
    assert len(by_hand.counts) == 15

    correct = np.random.default_rng(1).uniform(size=NUM_IMAGES) < CONFIDENCES**2
    metric = BinaryCalibrationError(n_bins=15, norm="l1")
    expected = float(metric(torch.from_numpy(CONFIDENCES), torch.from_numpy(correct).int()))
    assert tallies.bin_reliability(CONFIDENCES, correct).ece == pytest.approx(expected, abs=1e-6)


def test_wilson_interval_against_published_values() -> None:
    assert tallies.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert tallies.wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert tallies.wilson_interval(4_978, 5_000) == pytest.approx((0.9933, 0.9971), abs=1e-4)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_confusion_matrix_writes_every_count_and_colours_only_mistakes() -> None:
    figure = figures.draw_confusion(TOY_LABELS, TOY_PREDICTIONS)
    (axes,) = figure.axes
    written = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert written == {(0, 0): "1", (0, 1): "1", (1, 1): "1", (2, 2): "1", (7, 2): "2", (7, 7): "1"}
    coloured: np.ma.MaskedArray = np.ma.asarray(axes.images[0].get_array())
    assert {tuple(cell) for cell in np.argwhere(~np.ma.getmaskarray(coloured)).tolist()} == {(0, 1), (7, 2)}
    assert title(figure) == "Confusion matrix: 3 mistakes in 7"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "actual")


@pytest.mark.parametrize(("num_mistakes", "num_drawn"), [(0, 0), (1, 1), (60, 60), (200, 60)])
def test_mistakes_are_all_there_up_to_the_limit(num_mistakes: int, num_drawn: int) -> None:
    figure = figures.draw_mistakes(IMAGES, LABELS, predict_with(num_mistakes), CONFIDENCES)
    assert sum(len(axes.images) for axes in figure.axes) == num_drawn
    said = {0: "No mistake in 400 images", 1: "1 mistake in 400", 60: "60 mistakes in 400", 200: "200 mistakes in 400"}
    assert title(figure).startswith(said[num_mistakes])
    note = "The first 60 of 200, the most confident first." if num_mistakes == 200 else ""
    assert figure.get_supxlabel() == note


def test_mistakes_go_from_the_most_confident_down_and_star_the_known_wrong_labels() -> None:
    labels, predictions = np.array([3, 5, 4, 7]), np.array([3, 6, 9, 2])
    known_wrong = np.array([True, False, True, False])  # the first was read rightly, so it is not here at all
    figure = figures.draw_mistakes(IMAGES[:4], labels, predictions, np.array([0.9, 0.5, 0.99996, 0.7]), known_wrong)
    assert texts(figure) == ["4 / 9 *\n99.9 %", "7 / 2\n70.0 %", "5 / 6\n50.0 %"]
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), IMAGES[2])
    assert figure.get_supxlabel() == "* people found this label to be wrong."


def test_confused_pair_shows_its_images_and_both_digits_read_rightly() -> None:
    confidences = np.array([0.9, 0.9, 0.9, 0.6, 0.8, 0.9, 0.9])
    figure = figures.draw_confused_pair(IMAGES[:7], TOY_LABELS, TOY_PREDICTIONS, confidences)
    assert title(figure) == "Commonest confusion: 7 read as 2, twice"
    assert texts(figure) == [
        "7 read as 2, with the confidence in 2", "80.0 %", "60.0 %",
        "7 read as 7, the first of the set", "2 read as 2, the first of the set",
    ]  # fmt: skip
    drawn = [image.get_array() for image in figure.axes[0].images]
    np.testing.assert_array_equal(drawn, IMAGES[[4, 3, 5, 6]])


def test_least_sure_starts_with_the_lowest_confidence() -> None:
    labels, predictions = np.array([1, 2, 3]), np.array([1, 7, 3])
    figure = figures.draw_least_sure(IMAGES[:3], labels, predictions, np.array([0.9, 0.4, 0.6]), limit=2)
    assert texts(figure) == ["2 / 7\n40.0 %", "3 / 3\n60.0 %"]
    colours = [text.get_color() for text in figure.axes[0].texts]
    assert colours[0] == VERMILION != colours[1]


def test_history_marks_the_best_epoch_and_makes_99_percent_readable() -> None:
    history = make_history(20)
    figure = figures.draw_history(history, best=10)
    loss, acc = figure.axes
    np.testing.assert_allclose(to_array(loss.lines[1].get_ydata()), history.train_loss)
    np.testing.assert_allclose(to_array(acc.lines[2].get_ydata()), history.val_acc)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training", "validation", "best epoch: 11"]
    assert [float(to_array(line.get_xdata())[0]) for line in acc.lines if line.get_marker() == "*"] == [11]
    to_axes = acc.transData + acc.transAxes.inverted()
    low, high = (to_axes.transform((1, accuracy))[1] for accuracy in (0.99, 0.995))
    assert high - low > 0.1


@pytest.mark.parametrize(
    "history",
    [
        make_history(1),
        History(*np.array([[1, 2], [2.3, 1e-9], [0.1, 1.0], [2.3, 1e-9], [0.1, 1.0]])),
        History(*np.array([[1, 2], [np.nan, np.nan], [0.1, 0.1], [np.nan, np.nan], [0.1, 0.1]])),
        History(*np.array([[1, 2], [0.1, 0.05], [1.0, 1.0], [0.1, 0.05], [1.0, 1.0]])),
        History(*np.array([[1, 2], [900, 800], [0.1, 0.1], [900, 800], [0.1, 0.1]])),
        History(*np.array([[1, 2], [0.1, 0.1], [0.9, 0.9], [0.1, 0.1], [0.9, 0.9]])),
    ],
    ids=["one epoch", "up to 100 %", "diverged", "all right", "large losses", "all the same"],
)
def test_history_of_extreme_runs_stays_on_the_page(history: History) -> None:
    _, acc = figures.draw_history(history, best=0).axes
    low, high = acc.get_ylim()
    assert low < history.train_acc.min()
    assert history.train_acc.max() < high


def test_reliability_draws_the_filled_bins_and_names_the_error() -> None:
    confidences, correct = np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, True, True, False])
    figure = figures.draw_reliability(confidences, correct)
    top, bottom = figure.axes
    assert title(figure) == "Reliability: expected calibration error 5.00 %"
    np.testing.assert_allclose(to_array(top.lines[1].get_xydata()), np.array([[0.55, 0.5], [0.95, 1]]))
    assert heights(bottom) == [0] * 8 + [2] + [0] * 5 + [2]
    assert "15 bins of equal width" in top.get_title(loc="left")


def test_class_scores_and_class_balance_draw_their_numbers() -> None:
    scores = RNG.uniform(0.98, 1, (3, 10))
    drawn = {line.get_label(): to_array(line.get_ydata()) for line in figures.draw_class_scores(*scores).axes[0].lines}
    for name, values in zip(("precision", "recall", "F1"), scores, strict=True):
        np.testing.assert_allclose(drawn[name], values)

    counts = {"training": np.arange(10) * 1000, "test": np.arange(10)}
    figure = figures.draw_class_balance(counts)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["training: 45,000 images", "test: 45 images"]
    assert heights(figure.axes[0]) == list(counts["training"])
    assert figure.axes[0].get_xticklabels()[3].get_text() == "3\n3,000"


def test_digits_means_and_augmentation_draw_their_images() -> None:
    figure = figures.draw_digits(IMAGES, LABELS)
    np.testing.assert_array_equal([image.get_array() for image in figure.axes[0].images], IMAGES[:25])
    assert texts(figure) == [str(label) for label in LABELS[:25]]

    zeros = np.zeros(2, int)  # nine digits without an image
    mean, spread = figures.draw_class_means(np.stack([IMAGES[0], IMAGES[1]]), zeros).axes[0].images
    np.testing.assert_allclose(to_array(mean.get_array()), (IMAGES[0].astype(float) + IMAGES[1]) / 2)
    np.testing.assert_allclose(to_array(spread.get_array()), np.abs(IMAGES[0].astype(float) - IMAGES[1]) / 2, rtol=1e-5)

    figure = figures.draw_augmentation(IMAGES[:2], IMAGES[2:8].reshape(2, 3, 28, 28), "Title")
    drawn = [image.get_array() for image in figure.axes[0].images]
    np.testing.assert_array_equal(drawn, IMAGES[[0, 2, 3, 4, 1, 5, 6, 7]])


def test_robustness_has_a_bar_for_each_corruption_and_a_mark_where_one_is_published() -> None:
    figure = figures.draw_robustness({"glass_blur": 0.25, "fog": 1.0}, {"fog": 0.5, "snow": 0.9}, "Title")
    [axes] = figure.axes
    assert [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in axes.containers[0]] == [(0, 0.25), (1, 1)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["glass blur", "fog"]
    assert [text.get_position()[1] for text in axes.texts] == [0, 1]
    assert [text.get_text().split()[0] for text in axes.texts] == ["25.0", "100.0"]
    np.testing.assert_allclose(to_array(axes.lines[0].get_xydata()), [[0.5, 1]])
    assert not figures.draw_robustness({"fog": 1.0}, {}, "Title").axes[0].lines


def test_corruptions_are_drawn_row_by_row() -> None:
    figure = figures.draw_corruptions({"clean": IMAGES[:2], "glass_blur": IMAGES[2:4]})
    np.testing.assert_array_equal([image.get_array() for image in figure.axes[0].images], IMAGES[:4])
    assert texts(figure) == ["clean", "glass blur"]


TRADEOFF = {"ours": [(30.0, 40.0, 3.0), (60.0, 30.0, 0.0), (500.0, 25.0, 2.0)], "theirs": [(300.0, 90.0, 0.0)]}


def test_verdicts_keep_each_image_with_its_caption_and_verdict() -> None:
    figure = draw_verdicts(IMAGES[:4], ["a", "b", "c", "d"], ["x", "y", "x", "x"], "Title", "")
    drawn = [image.get_array() for image in figure.axes[0].images]
    np.testing.assert_array_equal(drawn, IMAGES[[0, 2, 3, 1]])
    assert texts(figure) == ["x: 3", "a", "c", "d", "y: 1", "b"]


def test_tradeoff_draws_each_point_and_record() -> None:
    figure = draw_tradeoff(TRADEOFF, {"a record": 26}, "Title", "mistakes in 10,000")
    axes = figure.axes[0]
    ours, theirs = (each for each in axes.containers if isinstance(each, ErrorbarContainer))
    assert ours.get_label() == "ours"
    np.testing.assert_allclose(to_array(ours.lines[0].get_xydata()), np.array(TRADEOFF["ours"])[:, :2])
    bars = [segment[:, 1].tolist() for segment in ours.lines[2][0].get_segments() if len(segment)]
    assert bars == [[37, 43], [23, 27]]  # a point of a single run has none
    np.testing.assert_allclose(to_array(theirs.lines[0].get_xydata()), [[300, 90]])
    assert "a record" in texts(figure)
    assert axes.get_ylabel() == "mistakes in 10,000"


def test_more_curves_than_can_be_told_apart_are_refused() -> None:
    curves = {str(number): [(1.0, 2.0, 0.0)] for number in range(5)}
    with pytest.raises(ValueError, match="there are 5 curves; up to 4 can be told apart"):
        draw_tradeoff(curves, {}, "Title", "unit")


# --- how it looks -----------------------------------------------------------------------------------------------------

ACCURACIES = {"shot_noise": 0.98, "impulse_noise": 0.1, "glass_blur": 1.0, "canny_edges": 0.55}

EVERY_FIGURE: dict[str, Callable[[], Figure]] = {
    "digits": lambda: figures.draw_digits(IMAGES, LABELS),
    "class balance": lambda: figures.draw_class_balance({k: np.full(10, 6_742) for k in ("training", "test")}),
    "augmentation": lambda: figures.draw_augmentation(IMAGES[:10], IMAGES[:80].reshape(10, 8, 28, 28), "Rotation"),
    "class means": lambda: figures.draw_class_means(IMAGES, LABELS),
    "history": lambda: figures.draw_history(make_history(21), best=10),
    "history of 200 epochs": lambda: figures.draw_history(make_history(200), best=150),
    "confusion": lambda: figures.draw_confusion(np.tile(LABELS, 30), np.tile(predict_with(40), 30)),
    "mistakes": lambda: figures.draw_mistakes(IMAGES, LABELS, predict_with(200), CONFIDENCES, LABELS == 3),
    "one mistake": lambda: figures.draw_mistakes(
        IMAGES, LABELS, predict_with(1), CONFIDENCES, np.ones(NUM_IMAGES, bool)
    ),
    "no mistake": lambda: figures.draw_mistakes(IMAGES, LABELS, LABELS, CONFIDENCES),
    "confused pair": lambda: figures.draw_confused_pair(IMAGES, LABELS, predict_with(200), CONFIDENCES),
    "no confused pair": lambda: figures.draw_confused_pair(IMAGES, LABELS, LABELS, CONFIDENCES),
    "least sure": lambda: figures.draw_least_sure(IMAGES, LABELS, predict_with(200), CONFIDENCES),
    "class scores": lambda: figures.draw_class_scores(*RNG.uniform(0.99, 1, (3, 10))),
    "perfect class scores": lambda: figures.draw_class_scores(*np.ones((3, 10))),
    "verdicts": lambda: draw_verdicts(
        IMAGES[:25], ["4 / 9"] * 25, ["wrong label"] * 3 + ["ambiguous"] * 11 + ["ours to fix"] * 11, "Title", "A note."
    ),
    "tradeoff": lambda: draw_tradeoff(TRADEOFF, {"a record": 26, "another, far above it": 60}, "Title", "unit"),
    "robustness": lambda: figures.draw_robustness(ACCURACIES, {"shot_noise": 0.979}, "75.0 % right when spoiled"),
    "corruptions": lambda: figures.draw_corruptions(dict.fromkeys(ACCURACIES, IMAGES[:10])),
    "corruptions of one digit": lambda: figures.draw_corruptions(dict.fromkeys(ACCURACIES, IMAGES[:1])),
    "reliability": lambda: figures.draw_reliability(CONFIDENCES, np.equal(LABELS, predict_with(90))),
}


@pytest.mark.parametrize("draw", EVERY_FIGURE.values(), ids=EVERY_FIGURE.keys())
def test_no_text_overlaps_another_or_leaves_the_figure(draw: Callable[[], Figure]) -> None:
    figure = draw()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    boxes = []
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and not is_tick_off_the_axis(figure, text):
            boxes.append((text.get_text(), text.get_window_extent(renderer).padded(-1)))
    assert boxes
    for name, box in boxes:
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= figure.bbox.x1, name
        assert box.y1 <= figure.bbox.y1, name
    tiles = [image.get_window_extent() for axes in figure.axes if not axes.axison for image in axes.images]
    assert not [name for name, box in boxes if any(box.overlaps(tile) for tile in tiles)]
    for (name, box), (other_name, other) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other), f"{name!r} overlaps {other_name!r}"


def is_tick_off_the_axis(figure: Figure, text: Text) -> bool:
    """Whether this is the label of a tick outside the limits, which matplotlib keeps and does not draw."""
    for axes in figure.axes:
        if not axes.axison and text in (axes.get_xticklabels() + axes.get_yticklabels()):
            return True
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if text in (tick.label1, tick.label2) and not low <= tick.get_loc() <= high:
                    return True
    return False


def test_rendering_repeats_byte_for_byte_and_leaves_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    forms: tuple[tuple[Literal["png", "svg"], bytes], ...] = (("png", b"\x89PNG"), ("svg", b"<?xml"))
    for form, start in forms:
        first, second = (figures.render(figures.draw_digits(IMAGES, LABELS), form) for _ in range(2))
        assert first.startswith(start)
        assert first == second
    assert dict(matplotlib.rcParams) == before
