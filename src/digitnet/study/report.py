"""How good a run is: one self-contained page from what its folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from digitnet import figures, tallies
from digitnet.canvas import Array
from digitnet.checkpoints import FIT_HINT, LOG_DIR
from digitnet.data import Digits, fetch_digits, verify_mnist
from digitnet.errors import say_why
from digitnet.figures import History
from digitnet.files import shorten, tell_command, write_file
from digitnet.study.configs import read_config
from digitnet.study.history import load_history
from digitnet.study.page import embed_digit, embed_png, render_page
from digitnet.study.published import CLASSIC_TEST_START, KNOWN_WRONG, LECUN_TABLE, WRITEUP_ERRORS

MAX_CARDS = 400  # mistakes on the page, about 400 bytes each; a hopeless network makes thousands
NUM_LEAST_SURE = 24

# By architecture: what the network's own first step does in training.
OWN_DISTORTIONS = {"upright": "slant", "zoom": "slant, affine, elastic"}


class Results(NamedTuple):
    """What the network said of each test image, (N,) each; images (N, 28, 28)."""

    indices: Array  # position in the whole data set
    images: Array
    labels: Array
    predictions: Array
    confidences: Array

    @property
    def correct(self) -> Array:
        """(N,) bool."""
        correct: Array = self.labels == self.predictions
        return correct


def report(run: Path | None = None) -> None:
    """Write <run>/report/report.html and its figures for a run that has been tested.

    Args:
        run: the run's folder, such as lightning_logs/final/version_0, or what test left of a checkpoint outside a run,
            such as committee_report; by default the run tested last.

    Raises:
        FileNotFoundError: there is no such run, or it has not been tested yet.
        ValueError: what the test left is damaged, or is not about the run's data.
    """
    run = find_tested_run() if run is None else run
    folder = run.absolute()
    if folder.name == "report" and (folder.parent / "config.yaml").is_file():
        run = shorten(folder.parent)
    is_outside = (run / "metrics.json").is_file()
    folder = run if is_outside else run / "report"
    metrics = load_metrics(run, folder)
    test_command = _test_command(run, str(metrics.get("checkpoint", "")), str(metrics.get("command", "")))
    predictions = load_predictions(folder, int(metrics["num_images"]), test_command)
    config = {} if is_outside else read_config(run / "config.yaml")
    digits = fetch_digits(metrics["dataset"], metrics.get("data_dir"))
    try:
        results = match_predictions(predictions, digits, int(metrics["num_errors"]))
    except ValueError as error:
        raise ValueError(f"{folder / 'predictions.csv'}: {error}; test again: {test_command}") from error
    history = None if is_outside else load_history(run, _find_monitored(config))
    page, charts = build_report(run, metrics, config, results, history, is_mnist=_is_mnist(digits))
    if history is not None and (epoch := _find_newer_best(metrics, config, history)):
        print(f"{metrics['checkpoint']} was written anew after the test, in epoch {epoch}; test again: {test_command}")
    for name, png in charts.items():
        write_file(folder / f"{name}.png", png)
    write_file(folder / "report.html", page)
    num_errors, num_images = int((~results.correct).sum()), len(results.labels)
    print(
        f"{folder / 'report.html'}: accuracy {100 * (1 - num_errors / num_images):.2f} %, "
        f"{figures.format_count(num_errors, 'mistake')} in {num_images:,} images"
    )


# --- what a run's folder holds ----------------------------------------------------------------------------------------


def find_tested_run(log_dir: Path = LOG_DIR) -> Path:
    """The run whose test was written last.

    Raises:
        FileNotFoundError: no run has been tested.
    """
    tested = sorted(log_dir.glob("**/report/metrics.json"), key=lambda path: path.stat().st_mtime)
    if not tested:
        raise FileNotFoundError(f"no run under {log_dir} has been tested yet; type: python -m digitnet test")
    return tested[-1].parent.parent


def load_metrics(run: Path, folder: Path) -> dict[str, Any]:
    """What ``test`` measured of a run: ``metrics.json`` in a folder, the run's ``report/`` or itself.

    Raises:
        FileNotFoundError: no such run, or no test yet.
        ValueError: damaged, or without the data set, or the number of images and mistakes.
    """
    path = folder / "metrics.json"
    if not run.is_dir():
        raise FileNotFoundError(
            f"{run}: no such run; give the folder of one, such as {LOG_DIR / 'final' / 'version_0'}"
        )
    if not path.exists():
        if not list(run.glob("checkpoints/[!.]*.ckpt")):
            raise FileNotFoundError(f"{run} is no trained run: it has no checkpoints; train one first: {FIT_HINT}")
        raise FileNotFoundError(f"{run} has not been tested yet; type: {_test_command(run)}")
    try:
        metrics = json.loads(path.read_text())
        {key: int(metrics[key]) for key in ("num_images", "num_errors")}
        if not isinstance(metrics["dataset"], str):
            raise TypeError(f"dataset {metrics['dataset']}")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged ({reason}); test again: {_test_command(run)}") from error
    return dict(metrics)


def load_predictions(folder: Path, num_images: int, test_command: str) -> dict[str, Array]:
    """What the network said of each test image: the columns of ``predictions.csv``, (N,) each.

    Args:
        folder: where the file is.
        num_images: how many rows there must be.
        test_command: what to type when they are missing or damaged.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    import pandas as pd

    path = folder / "predictions.csv"
    types = {"index": int, "label": int, "prediction": int, "confidence": float}
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; test again: {test_command}")
    try:
        table = pd.read_csv(path, usecols=list(types), dtype=types)
        columns = {name: table[name].to_numpy() for name in types}
        if len(table) != num_images or num_images == 0:
            raise ValueError(f"{len(table):,} rows, where metrics.json counts {num_images:,} images")
        if not np.isin(columns["prediction"], range(10)).all() or not table["confidence"].between(0, 1).all():
            raise ValueError("predictions must be digits, and confidences lie in [0, 1]")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged ({say_why(error)}); test again: {test_command}") from error
    return columns


def match_predictions(predictions: dict[str, Array], digits: Digits, num_errors: int) -> Results:
    """Put the predictions beside the images they are about.

    Args:
        predictions: what ``load_predictions`` returned.
        digits: the run's whole data set.
        num_errors: how many mistakes there must be.

    Raises:
        ValueError: the predictions are not about these digits, or not those that were counted.
    """
    indices, labels, predicted, confidences = predictions.values()
    fault = ""
    if indices.min() < 0 or indices.max() >= len(digits.labels) or len(np.unique(indices)) != len(indices):
        fault = f"its indices repeat, or lie outside the {len(digits.labels):,} images of the run's data"
    elif not np.array_equal(labels, digits.labels[indices]):
        fault = "its labels are not those of the run's data"
    elif (found := int((labels != predicted).sum())) != num_errors:
        fault = f"it has {found:,} mistakes, where metrics.json counts {num_errors:,}"
    if fault:
        raise ValueError(fault)
    return Results(indices, digits.images[indices], labels, predicted, confidences)


# --- the page ---------------------------------------------------------------------------------------------------------


def build_report(
    run: Path,
    metrics: dict[str, Any],
    config: dict[str, Any],
    results: Results,
    history: History | None,
    *,
    is_mnist: bool,
) -> tuple[bytes, dict[str, bytes]]:
    """The page, and the PNGs of its figures by name.

    Args:
        run: its folder, to name it.
        metrics: what ``load_metrics`` returned.
        config: the run's settings.
        results: what ``match_predictions`` returned.
        history: what ``load_history`` returned.
        is_mnist: whether the data are mnist_784, about which published figures and wrong labels are known.
    """
    from sklearn.metrics import precision_recall_fscore_support

    indices, images, labels, predictions, confidences = results
    num_images, num_errors = len(labels), int((~results.correct).sum())
    seen = _find_known_wrong(indices) if is_mnist else {}
    known_wrong = np.isin(np.arange(num_images), list(seen))
    scores = precision_recall_fscore_support(labels, predictions, labels=range(10), zero_division=np.nan)
    bins = tallies.bin_reliability(confidences, results.correct)
    drawn = {
        "confusion": figures.draw_confusion(labels, predictions),
        "mistakes": figures.draw_mistakes(images, labels, predictions, confidences, known_wrong),
        "confused_pair": figures.draw_confused_pair(images, labels, predictions, confidences),
        "class_scores": figures.draw_class_scores(*scores[:3]),
        "reliability": figures.draw_reliability(confidences, results.correct),
        "least_sure": figures.draw_least_sure(images, labels, predictions, confidences, NUM_LEAST_SURE),
    }
    best = newer = None
    if history is not None:
        best = _find_best_epoch(history, _find_monitored(config))
        newer = _find_newer_best(metrics, config, history)
        drawn["history"] = figures.draw_history(history, best)
    charts = {name: figures.render(figure) for name, figure in drawn.items()}
    wrong = tallies.find_mistakes(labels, predictions, confidences)
    unsure = np.argsort(confidences, kind="stable")[:NUM_LEAST_SURE]
    page = render_page(
        "report.html",
        run=run.as_posix(),
        command=tell_command("report", "--run", run.as_posix()),
        data=f"{num_images:,} test images ({'MNIST' if is_mnist else metrics.get('dataset', 'your own')})",
        accuracy=_accuracy(num_errors, num_images),
        interval=_interval(num_errors, num_images),
        num_known=metrics.get("num_trained_on"),
        num_errors=num_errors,
        num_images=num_images,
        ece=f"{100 * bins.ece:.2f} %",
        num_bins=tallies.NUM_BINS,
        calibration=_tell_calibration(metrics.get("temperature")),
        facts=_list_facts(metrics, config, history),
        charts={name: embed_png(png) for name, png in charts.items()},
        history=_tell_history(history, best, newer) if history is not None else None,
        is_outside=not config,
        confusion_alt=_describe_confusions(labels, predictions),
        mistakes=[_card(results, i, seen) for i in wrong[:MAX_CARDS]],
        known_wrong=_tell_known_wrong(results, wrong, seen),
        pair=_tell_pair(results, is_mnist=is_mnist),
        classes=[
            {
                "digit": digit,
                "num_images": f"{scores[3][digit]:,}",
                **{name: _score(scores[k][digit]) for k, name in enumerate(("precision", "recall", "f1"))},
            }
            for digit in range(10)
        ],
        reliability_alt=f"Accuracy against confidence in {tallies.NUM_BINS} bins above a histogram of the confidence; "
        f"expected calibration error {100 * bins.ece:.2f} %, {bins.counts[-1]:,} images in the top bin.",
        least_sure=[_card(results, i, seen, mark_mistakes=True) for i in unsure],
        comparison=_compare(results, config) if is_mnist else None,
    )
    return page, charts


def _list_facts(metrics: dict[str, Any], config: dict[str, Any], history: History | None) -> list[tuple[str, str]]:
    """The rows of the table below the headline; what the metrics do not name is left out."""
    checkpoint = str(metrics.get("checkpoint", ""))
    if isinstance(metrics.get("epoch"), int):
        checkpoint += f", after epoch {metrics['epoch'] + 1}"  # Lightning counts from 0
    told = {
        "Data": metrics.get("dataset"),
        "Split": metrics.get("split"),
        "Trained": figures.format_count(int(history.epochs[-1]), "epoch") if history is not None else None,
        "Checkpoint": checkpoint,
        "Test loss": metrics.get("loss"),
        "Seed": metrics.get("seed", config.get("seed_everything")),
        "Precision": metrics.get("precision"),
        "Scored on": metrics.get("hardware"),
        "Versions": metrics.get("versions"),
        "Date": metrics.get("date"),
        "Command": metrics.get("command"),
        "Config SHA-256": metrics.get("config_sha256"),
    }
    return [(name, _tell(value)) for name, value in told.items() if value not in (None, "")]


def _tell_calibration(temperature: Any) -> dict[str, str]:
    """Which confidences these are, in a word and in a sentence."""
    if not isinstance(temperature, float):
        told = "The confidences are the network's own: this checkpoint was tested without a calibration."
        return {"word": "not calibrated", "text": told}
    told = f"The confidences are calibrated, as predict's are: logits divided by a temperature of {temperature:.3f}."
    return {"word": "calibrated", "text": told}


def _tell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_tell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " / ".join(f"{item:,}" if isinstance(item, int) else _tell(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _find_monitored(config: dict[str, Any]) -> str:
    """The field of a history that tells which epoch's checkpoint was kept."""
    monitored = str((config.get("best_checkpoint") or {}).get("monitor")).replace("/", "_")
    return monitored if monitored in History._fields else "val_acc"


def _find_best_epoch(history: History, monitored: str) -> int | None:
    """Position of the epoch whose checkpoint was kept: the first best; None where none was validated."""
    values = getattr(history, monitored)
    if np.isnan(values).all():
        return None
    return int(np.nanargmin(values) if monitored.endswith("loss") else np.nanargmax(values))


def _find_newer_best(metrics: dict[str, Any], config: dict[str, Any], history: History) -> int | None:
    """The best epoch by now, counted from 1, where the ``best.ckpt`` that was tested is of an earlier one."""
    best, tested = _find_best_epoch(history, _find_monitored(config)), metrics.get("epoch")
    if best is None or not isinstance(tested, int) or Path(str(metrics.get("checkpoint"))).name != "best.ckpt":
        return None
    epoch = int(history.epochs[best])
    return epoch if tested + 1 < epoch else None


def _tell_history(history: History, best: int | None, newer: int | None) -> dict[str, str]:
    last = int(history.epochs[-1])
    if best is None:
        alt = f"Loss and accuracy of training over {figures.format_count(last, 'epoch')}."
        return {"text": "No epoch was validated, so none was kept as the best.", "alt": alt}
    epoch = int(history.epochs[best])
    val = f"validation accuracy {100 * history.val_acc[best]:.2f} %, loss {history.val_loss[best]:.4f}; "
    text = (
        f"The best epoch, counted from 1, was {epoch} of {last}: {'' if np.isnan(history.val_acc[best]) else val}"
        f"training accuracy {100 * history.train_acc[best]:.2f} %, loss {history.train_loss[best]:.4f}. "
        f"Its weights were kept{'.' if newer is None else ', after this test, which scored earlier ones: test again.'}"
    )
    alt = f"Loss and accuracy of training and validation over {last} epochs; the best, {epoch}, is marked."
    return {"text": text, "alt": alt}


def _card(results: Results, i: int, seen: dict[int, int | None], *, mark_mistakes: bool = False) -> dict[str, Any]:
    """One image for the page. What is marked: a wrong label, and where not all of them are mistakes, a mistake."""
    actual, predicted = int(results.labels[i]), int(results.predictions[i])
    confidence = figures.format_percent(float(results.confidences[i]))
    marks = ["mistake"] if mark_mistakes and actual != predicted else []
    if i in seen:
        marks.append(f"people see {'no digit' if seen[i] is None else seen[i]}")
    return {
        "picture": embed_digit(results.images[i]),
        "title": f"{actual} / {predicted}",
        "confidence": confidence,
        "index": int(results.indices[i]),
        "mark": ", ".join(marks),
        "alt": f"Labelled {actual}, read as {predicted} with {confidence} confidence.",
    }


def _find_known_wrong(indices: Array) -> dict[int, int | None]:
    """Row of the results -> what people see, for the images whose label is known to be wrong."""
    seen = {CLASSIC_TEST_START + position: digit for position, digit in KNOWN_WRONG.items()}
    return {row: seen[index] for row, index in enumerate(indices.tolist()) if index in seen}


def _tell_known_wrong(results: Results, wrong: Array, seen: dict[int, int | None]) -> str:
    marked = [i for i in wrong.tolist() if i in seen]
    if not marked:
        return ""
    agreed = sum(seen[i] == results.predictions[i] for i in marked)
    return (
        f"people, shown the image, saw something else than the label in {len(marked)} of these {len(wrong):,} "
        f"(Northcutt et al. 2021). The network read what they saw in {agreed}."
    )


def _describe_confusions(labels: Array, predictions: Array) -> str:
    counts = tallies.count_confusions(labels, predictions)
    told = [f"{pair[0]} read as {pair[1]}: {counts[pair]:,}" for pair in tallies.rank_confusions(counts)[:3]]
    return f"Confusion matrix of {len(labels):,} images. " + (
        f"The commonest confusions are {'; '.join(told)}." if told else "No confusions."
    )


def _tell_pair(results: Results, *, is_mnist: bool) -> dict[str, str] | None:
    counts = tallies.count_confusions(results.labels, results.predictions)
    pairs = tallies.rank_confusions(counts)
    if not pairs:
        return None
    actual, predicted = pairs[0]
    text = (
        f"Most often it read {actual} as {predicted}: {counts[actual, predicted]:,} of {counts[actual].sum():,} images "
        f"of {actual}. The other way round: {counts[predicted, actual]:,}."
    )
    if ties := sum(counts[pair] == counts[pairs[0]] for pair in pairs[1:]):
        text += f" {figures.format_count(ties, 'other pair')} of digits {'was' if ties == 1 else 'were'} as common."
    if is_mnist:
        # Of those images alone that the write-up scored, too.
        is_theirs = results.indices >= CLASSIC_TEST_START + 5_000
        num_theirs = int((is_theirs & (results.labels == 7) & (results.predictions == 2)).sum())
        text += " The write-up's commonest, on the last 5,000 test images, was 7 read as 2: 5 of its 22 mistakes."
        if is_theirs.sum() == 5_000:
            text += f" Of those this run made {num_theirs:,}."
    return {"text": text, "alt": f"Images of {actual} read as {predicted}, above both digits read rightly."}


def _compare(results: Results, config: dict[str, Any]) -> dict[str, Any]:
    """The write-up's figure and LeCun's table beside ours, each on the images it was scored on."""
    is_wrong = {int(index): not right for index, right in zip(results.indices, results.correct, strict=True)}

    def count_errors(start: int) -> tuple[int, int] | None:
        """Mistakes and images from the classic test image ``start`` to the last; None where not all were scored."""
        wanted = range(CLASSIC_TEST_START + start, CLASSIC_TEST_START + 10_000)
        return (sum(is_wrong[i] for i in wanted), len(wanted)) if all(i in is_wrong for i in wanted) else None

    whole, last = count_errors(0), count_errors(5_000)
    easy = [_row("The write-up (Keras)", "affine", WRITEUP_ERRORS, 5_000)]
    full = [
        dict(zip(("network", "distortions", "error", "source"), row, strict=True), ours=False) for row in LECUN_TABLE
    ]
    distortions = _name_augmentation((config.get("data") or {}).get("augmentation")) if config else "not known"
    own = OWN_DISTORTIONS.get(str((config.get("model") or {}).get("architecture")))
    if own:
        distortions = own if distortions == "none" else f"{distortions}, {own}"
    for rows, counted in ((easy, last), (full, whole)):
        if counted:
            rows.insert(0, _row("This run", distortions, *counted, ours=True))
    notes = []
    if last:
        notes.append(
            f"On the last 5,000 the write-up made {WRITEUP_ERRORS} mistakes (95 % interval of its accuracy "
            f"{_interval(WRITEUP_ERRORS, 5_000)}), this run {last[0]:,} ({_interval(*last)})."
        )
    if not whole:
        notes.append(
            "This run was not scored on all 10,000, so it has no row among LeCun's; "
            "one trained with --data.split '[55000, 5000, 10000]' has."
        )
    groups = [
        {"title": "Scored on the last 5,000 test images, the easy half", "rows": easy},
        {"title": "Scored on all 10,000 test images", "rows": full},
    ]
    return {"notes": " ".join(notes), "groups": groups}


def _name_augmentation(augmentation: Any) -> str:
    """Of a config: the class, or those that a Compose puts one after another; "none" without one."""
    if not augmentation:
        return "none"
    if isinstance(augmentation, str):  # a function
        return augmentation.rpartition(".")[2]
    name = str(augmentation.get("class_path")).rpartition(".")[2]
    parts = (augmentation.get("init_args") or {}).get("transforms")
    return ", ".join(map(_name_augmentation, parts)) if name == "Compose" and isinstance(parts, list) else name


def _row(network: str, distortions: str, num_errors: int, num_images: int, *, ours: bool = False) -> dict[str, Any]:
    source = f"{figures.format_count(num_errors, 'mistake')} in {num_images:,}"
    return {
        "network": network,
        "distortions": distortions,
        "error": f"{100 * num_errors / num_images:.2f}",
        "source": source,
        "ours": ours,
    }


def _accuracy(num_errors: int, num_images: int) -> str:
    return f"{100 * (1 - num_errors / num_images):.2f}\u00a0%"


def _interval(num_errors: int, num_images: int) -> str:
    low, high = tallies.wilson_interval(num_images - num_errors, num_images)
    return f"{100 * low:.2f} to {100 * high:.2f}\u00a0%"


def _score(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"


def _test_command(run: Path, tested: str = "", typed: str = "") -> str:
    """What to type to test a run: the checkpoint tested before, else best.ckpt, else last.ckpt, as far as there.

    Of what a test on other data left, what was typed for it.
    """
    if (run / "metrics.json").is_file():
        folder = run if run.name else run.absolute()  # "." has no name
        checkpoint = folder.with_name(f"{folder.name.removesuffix('_report')}.ckpt")
        if not checkpoint.is_file() and typed.startswith(tell_command("test")):
            return typed
    else:
        candidates = [run / "checkpoints" / name for name in (Path(tested).name, "best.ckpt", "last.ckpt")]
        checkpoint = next((path for path in candidates if path.is_file()), candidates[1])
    return tell_command("test", "--ckpt_path", checkpoint)


def _is_mnist(digits: Digits) -> bool:
    try:
        verify_mnist(digits)
    except ValueError:
        return False
    return True
