"""The report of a made-up run: 250 bundled digits, three mistakes, every figure worked out by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICKSTART, SHORT, Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from digitnet.data import load_bundled_digits
from digitnet.figures import History
from digitnet.study.history import load_history
from digitnet.study.published import KNOWN_WRONG
from digitnet.study.report import Results, build_report, find_tested_run, report

CHARTS = {"history", "confusion", "mistakes", "confused_pair", "class_scores", "reliability", "least_sure"}
DIGITS = load_bundled_digits()
FIRST = 1_547  # the test set is the last 250 of 1,797
CONFIG = """\
seed_everything: 7
data:
  source: digits
  split: [1297, 250, 250]
best_checkpoint:
  monitor: val/acc
  mode: max
"""


def write_events(run: Path, first_epoch: int, val_accs: list[float]) -> None:
    """What fit logs: four curves, and the epoch, counted from 0, at the last step of each epoch."""
    with SummaryWriter(str(run)) as writer:
        for epoch, val_acc in enumerate(val_accs, start=first_epoch):
            step = 41 * (epoch + 1) - 1
            curves = {
                "train/loss": 1 / (epoch + 1),
                "train/acc": 0.9,
                "val/loss": 0.5 / (epoch + 1),
                "val/acc": val_acc,
            }
            for tag, value in {**curves, "epoch": epoch, "train/images_per_s": 500.0}.items():
                writer.add_scalar(tag, value, step)


def write_test(run: Path, mistakes: dict[int, tuple[int, float]], **metrics: Any) -> None:
    """What test leaves. Right answers have confidence 0.99; mistakes: index -> (prediction, confidence)."""
    (run / "report").mkdir(parents=True, exist_ok=True)
    rows = ["index,label,prediction,confidence"]
    for index in range(FIRST, len(DIGITS.labels)):
        prediction, confidence = mistakes.get(index, (DIGITS.labels[index], 0.99))
        rows.append(f"{index},{DIGITS.labels[index]},{prediction},{confidence:.6f}")
    (run / "report" / "predictions.csv").write_text("\n".join(rows) + "\n")
    values = {
        "dataset": "digits", "split": [1297, 250, 250], "checkpoint": "best.ckpt", "epoch": 1, "num_images": 250,
        "num_errors": len(mistakes), "accuracy": 1 - len(mistakes) / 250, "loss": 0.0421, "config_sha256": "c0ffee",
        "versions": {"python": "3.11.2", "torch": "2.15.0"}, "hardware": "a <fast> machine", "precision": "32-true",
    }  # fmt: skip
    (run / "report" / "metrics.json").write_text(json.dumps(values | metrics))


def make_run(folder: Path) -> Path:
    """Two 7s read as 2, one 5 read as 6; the second of three epochs the best."""
    run = folder / "lightning_logs" / "toy" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "best.ckpt").touch()
    (run / "config.yaml").write_text(CONFIG)
    write_events(run, 0, [0.90, 0.97, 0.97])
    sevens, fives = (FIRST + np.flatnonzero(DIGITS.labels[FIRST:] == digit) for digit in (7, 5))
    write_test(run, {int(sevens[3]): (2, 0.75), int(sevens[8]): (2, 0.55), int(fives[0]): (6, 0.35)})
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A tested run to change."""
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def reported_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its report, to look at."""
    run = make_run(tmp_path_factory.mktemp("reported"))
    report(run)
    return run


class Page(HTMLParser):
    """What a reader of the page meets: rows of tables, images, headings, cards, text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.cards: dict[str, list[str]] = {}  # section -> its cards
        self.section, self.open = "", ""
        self.words: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.open = tag
        self.links += [values[name] or "" for name in ("src", "href") if name in values]
        if tag == "section":
            self.section = values["id"] or ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "img":
            self.images.append(values)
        elif tag in ("h1", "h2", "h3"):
            self.headings.append(tag)
        elif tag == "li" and self.section:
            self.cards.setdefault(self.section, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = ""
        if tag == "ul":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if self.open == "style":
            return
        self.words.append(data.replace("\u00a0", " "))
        if self.open in ("td", "th"):
            self.rows[-1][-1] += data
        if self.section in self.cards and data.strip():
            self.cards[self.section][-1] = f"{self.cards[self.section][-1]} {data.strip()}".strip()


def read_page(run: Path) -> Page:
    return Page((run / "report" / "report.html").read_text())


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_headline_and_tables_are_those_worked_out_by_hand(reported_run: Path) -> None:
    page = read_page(reported_run)
    assert "98.80 % on 250 test images (digits)" in page.text
    assert "95 % interval 96.53 to 99.59 %" in page.text  # Wilson's, of 247 in 250
    # 247 right at 0.99, and one mistake each alone in its bin: (247 * 0.01 + 0.75 + 0.55 + 0.35) / 250
    assert "Calibration error 1.65 % ECE, 15 equal-width bins, not calibrated" in page.text
    assert "tested without a calibration" in page.text
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["2"] == ["24", "0.9231", "1.0000", "0.9600"]  # precision 24 / 26
    assert rows["5"] == ["26", "1.0000", "0.9615", "0.9804"]  # recall 25 / 26
    assert rows["6"] == ["26", "0.9630", "1.0000", "0.9811"]  # precision 26 / 27
    assert rows["7"] == ["25", "1.0000", "0.9200", "0.9583"]  # recall 23 / 25
    assert rows["9"] == ["26", "1.0000", "1.0000", "1.0000"]
    assert rows["Split"] == ["1,297 / 250 / 250"]
    assert rows["Scored on"] == ["a <fast> machine"]
    assert rows["Checkpoint"] == ["best.ckpt, after epoch 2"]
    assert rows["Seed"] == ["7"]


def test_calibrated_confidences_are_said_to_be(run: Path) -> None:
    write_test(run, {}, temperature=1.25)
    report(run)
    page = read_page(run)
    assert "15 equal-width bins, calibrated" in page.text
    assert "divided by a temperature of 1.250" in page.text


def test_every_mistake_and_the_least_sure_images_have_a_card(reported_run: Path) -> None:
    page = read_page(reported_run)
    assert [re.sub(r" #\d+", "", card) for card in page.cards["mistakes"]] == [
        "7 / 2 75.0 %",
        "7 / 2 55.0 %",
        "5 / 6 35.0 %",
    ]
    assert len(page.cards["least-sure"]) == 24
    assert [card.endswith("mistake") for card in page.cards["least-sure"]] == [True] * 3 + [False] * 21
    assert "Most often it read 7 as 2: 2 of 25 images of 7. The other way round: 0." in page.text
    alts = " ".join(str(image["alt"]) for image in page.images)
    assert "The commonest confusions are 7 read as 2: 2; 5 read as 6: 1." in alts


def test_the_history_names_the_first_best_epoch(reported_run: Path) -> None:
    said = "The best epoch, counted from 1, was 2 of 3: validation accuracy 97.00 %, loss 0.2500"
    assert said in read_page(reported_run).text


def test_a_run_that_was_gone_on_with_after_its_test_is_told_of(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(run)
    assert "written anew" not in capsys.readouterr().out
    write_events(run, 3, [0.98])
    report(run)
    said = "best.ckpt was written anew after the test, in epoch 4; test again: python -m digitnet test --ckpt_path "
    assert said in capsys.readouterr().out
    assert "Its weights were kept, after this test, which scored earlier ones: test again." in read_page(run).text


@pytest.mark.parametrize("name", ["events.out.tfevents.0", "events.out.tfevents.9999999999"])
def test_an_epoch_begun_again_after_a_stop_counts_as_it_ran_last(run: Path, name: str) -> None:
    before = set(run.glob("events*"))
    write_events(run, 2, [0.99, 0.98])  # a second event file: the third epoch again, and a fourth
    (second,) = set(run.glob("events*")) - before
    second.rename(run / name)  # TensorBoard reads them by name
    history = load_history(run)
    assert history is not None
    np.testing.assert_array_equal(history.epochs, [1, 2, 3, 4])
    np.testing.assert_allclose(history.val_acc, [0.90, 0.97, 0.99, 0.98], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")  # of a run that is never validated
@pytest.mark.parametrize(
    ("flags", "validated"),
    [
        (("--trainer.check_val_every_n_epoch", 2), [False, True, False]),
        (("--trainer.limit_val_batches", 0), [False, False, False]),
        (("--trainer.val_check_interval", 0.5), [True, True, True]),
    ],
    ids=["every other epoch", "never", "twice an epoch"],
)
def test_a_history_has_all_epochs_validated_or_not(
    digitnet: Run, flags: tuple[Any, ...], validated: list[bool]
) -> None:
    assert digitnet("fit", "--config", QUICKSTART, *SHORT, "--trainer.max_epochs", 3, *flags) == 0
    run = Path("lightning_logs") / "quickstart" / "version_0"
    history = load_history(run, "val_loss")
    assert history is not None
    np.testing.assert_array_equal(history.epochs, [1, 2, 3])
    assert (~np.isnan(history.val_loss)).tolist() == (~np.isnan(history.val_acc)).tolist() == validated
    name = "best.ckpt" if any(validated) else "last.ckpt"
    if "--trainer.val_check_interval" in flags:  # the kept one may lie in the midst of an epoch
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
        scores = [one["best_model_score"] for key, one in state.items() if "val/loss" in key and "Checkpoint" in key]
        assert np.nanmin(history.val_loss) == pytest.approx(float(scores[0]))
        whole = load_history(run)
        assert whole is not None
        events = EventAccumulator(str(run))
        events.Reload()
        assert whole.val_loss.tolist() == [event.value for event in events.Scalars("val/loss")][1::2]  # each's last
    assert digitnet("test", "--ckpt_path", run / "checkpoints" / name) == 0
    report(run / "report")  # the run's, too
    said = read_page(run).text
    assert "outside a run" not in said
    assert ("No epoch was validated" in said) is (not any(validated))
    assert "3 epochs" in said


def test_a_report_says_when_the_images_were_trained_on(digitnet: Run) -> None:
    assert digitnet("fit", "--config", QUICKSTART, *SHORT) == 0
    run = Path("lightning_logs") / "quickstart" / "version_0"
    assert digitnet("test", "--data.split", "[1577, 40, 180]") == 0
    report(run)
    assert "The checkpoint was trained on 100 of these images, and knows them." in read_page(run).text


def test_a_run_without_events_has_a_report_without_history(run: Path) -> None:
    for events in run.glob("events*"):
        events.unlink()
    report(run)
    assert "holds no TensorBoard events" in read_page(run).text


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_carries_all_it_needs(reported_run: Path) -> None:
    written = {path.name for path in (reported_run / "report").iterdir()}
    assert written == {f"{name}.png" for name in CHARTS} | {"report.html", "metrics.json", "predictions.csv"}
    page, source = read_page(reported_run), (reported_run / "report" / "report.html").read_text()
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"https?:|url\(|@import", source)
    assert all(image["alt"] for image in page.images)
    assert page.headings == ["h1"] + ["h2"] * 8
    assert "prefers-color-scheme: dark" in source


def test_a_report_made_again_is_the_same_and_leaves_no_part_files(
    reported_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in (reported_run / "report").iterdir()}
    report(reported_run)
    assert {path.name: path.read_bytes() for path in (reported_run / "report").iterdir()} == before
    assert capsys.readouterr().out.endswith("report.html: accuracy 98.80 %, 3 mistakes in 250 images\n")


def test_no_mistake_at_all(run: Path) -> None:
    write_test(run, {})
    report(run)
    page = read_page(run)
    assert "100.00 % on 250 test images" in page.text
    assert "None in 250 images." in page.text
    assert "No digit was taken for another." in page.text
    assert "No confusions." in " ".join(str(image["alt"]) for image in page.images)


def test_the_run_tested_last_is_the_default(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = run.with_name("version_1")
    write_test(other, {})
    os.utime(other / "report" / "metrics.json", (1, 1))  # long ago
    monkeypatch.chdir(run.parents[2])
    assert find_tested_run().absolute() == run
    report()
    assert (run / "report" / "report.html").exists()


# --- MNIST ------------------------------------------------------------------------------------------------------------


def make_mnist_page(tmp_path: Path, first: int, wrong: list[int], config: dict[str, Any] | None = None) -> Page:
    """The page of a run that read every image from ``first`` on as 8, and those in ``wrong`` as 3."""
    indices = np.arange(first, 70_000)
    eights = np.full(len(indices), 8)
    predictions = np.where(np.isin(indices, wrong), 3, 8)
    images = np.zeros((len(indices), 28, 28), np.uint8)
    results = Results(indices, images, eights, predictions, np.full(len(indices), 0.9))
    config = config or {"data": {"augmentation": {"class_path": "digitnet.augment.RandomAffine"}}}
    page, _ = build_report(tmp_path, {}, config, results, None, is_mnist=True)
    return Page(page.decode())


def test_a_run_on_the_last_5000_is_not_put_among_lecuns_figures(tmp_path: Path) -> None:
    page = make_mnist_page(tmp_path, 65_000, [65_000, 69_999])
    ours = [row for row in page.rows if row[0] == "This run"]
    assert ours == [["This run", "RandomAffine", "0.04", "2 mistakes in 5,000"]]
    order = [row[0] for row in page.rows]
    assert order.index("This run") < order.index("Scored on all 10,000 test images")
    assert "This run was not scored on all 10,000" in page.text
    assert "made 22 mistakes (95 % interval of its accuracy 99.33 to 99.71 %), this run 2" in page.text


@pytest.mark.parametrize(
    ("architecture", "augmentation", "shown"),
    [
        ("zoom", None, "slant, affine, elastic"),
        ("upright", {"class_path": "digitnet.RandomWarp"}, "RandomWarp, slant"),
        ("digitnet", None, "none"),
        (
            "upright",
            {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": [
                {"class_path": "digitnet.RandomAffine"}, "mine.blur", {"class_path": "digitnet.RandomDisturbance"},
            ]}},
            "RandomAffine, blur, RandomDisturbance, slant",
        ),
    ],
)  # fmt: skip
def test_what_the_network_itself_distorts_stands_in_its_row(
    tmp_path: Path, architecture: str, augmentation: dict[str, Any] | None, shown: str
) -> None:
    config = {"model": {"architecture": architecture}, "data": {"augmentation": augmentation}}
    page = make_mnist_page(tmp_path, 65_000, [65_000], config)
    assert [row[1] for row in page.rows if row[0] == "This run"] == [shown]


@pytest.mark.parametrize(("first", "told"), [(60_000, "Of those this run made 1."), (66_000, "5 of its 22 mistakes. ")])
def test_sevens_read_as_twos_are_counted_among_the_write_ups_images(tmp_path: Path, first: int, told: str) -> None:
    indices = np.arange(first, 70_000)
    predictions = np.where(np.isin(indices, [60_001, 66_001]), 2, 7)
    images, sevens = np.zeros((len(indices), 28, 28), np.uint8), np.full(len(indices), 7)
    results = Results(indices, images, sevens, predictions, np.full(len(indices), 0.9))
    text = Page(build_report(tmp_path, {}, {}, results, None, is_mnist=True)[0].decode()).text
    assert told in text
    assert ("Of those this run made" in text) == (first == 60_000)


def test_a_run_on_all_10000_stands_with_its_half_in_both_groups(tmp_path: Path) -> None:
    page = make_mnist_page(tmp_path, 60_000, [60_000, 64_999, 65_000])
    ours = [row[2:] for row in page.rows if row[0] == "This run"]
    assert ours == [["0.02", "1 mistake in 5,000"], ["0.03", "3 mistakes in 10,000"]]
    lecun = [row for row in page.rows if len(row) == 4 and " et al. " in row[3]]
    assert len(lecun) == 22
    assert ["LeNet-5", "none", "0.95", "LeCun et al. 1998"] in lecun
    assert "not scored on all 10,000" not in page.text


def test_labels_known_to_be_wrong_are_marked_and_still_count(tmp_path: Path) -> None:
    assert len(KNOWN_WRONG) == 13
    page = make_mnist_page(tmp_path, 65_000, [65_937, 66_651, 69_679, 69_000])  # people see 3, 6, no digit
    assert [card.split("#")[1] for card in page.cards["mistakes"]] == [
        "65937 people see 3", "66651 people see 6", "69000", "69679 people see no digit",
    ]  # fmt: skip
    assert "saw something else than the label in 3 of these 4" in page.text
    assert "The network read what they saw in 1." in page.text
    assert "99.92 % on 5,000 test images (MNIST)" in page.text


# --- what can be wrong ------------------------------------------------------------------------------------------------


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        (run / "report" / name).write_text(change((run / "report" / name).read_text()))

    return apply


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "not tested": (lambda run: (run / "report" / "metrics.json").unlink(), "has not been tested yet"),
    "no predictions": (lambda run: (run / "report" / "predictions.csv").unlink(), "predictions.csv is missing"),
    "empty metrics": (edit("metrics.json", lambda text: ""), "metrics.json is damaged"),
    "cut metrics": (edit("metrics.json", lambda text: text[:40]), "metrics.json is damaged"),
    "other metrics": (edit("metrics.json", lambda text: '{"num_images": 250}'), "no 'num_errors'"),
    "no data set": (edit("metrics.json", lambda text: text.replace('"dataset"', '"data"')), "no 'dataset'"),
    "endless metrics": (edit("metrics.json", lambda text: '{"num_images": 1e999, "num_errors": 0}'), "is damaged"),
    "no such index": (edit("predictions.csv", lambda text: text.replace("\n1547,", f"\n{10**25},")), "is damaged"),
    "empty predictions": (edit("predictions.csv", lambda text: ""), "predictions.csv is damaged"),
    "cut predictions": (edit("predictions.csv", lambda text: text[:999]), "predictions.csv is damaged"),
    "other columns": (edit("predictions.csv", lambda text: text.replace("label", "truth", 1)), "is damaged"),
    "no numbers": (edit("predictions.csv", lambda text: text.replace("0.35", "low")), "is damaged"),
    "not of [0, 1]": (edit("predictions.csv", lambda text: text.replace("0.35", "1.35")), "lie in [0, 1]"),
    "other labels": (edit("predictions.csv", lambda text: text.replace(",5,5,", ",4,4,")), "labels are not those"),
    "other images": (edit("predictions.csv", lambda text: text.replace("\n1547,", "\n1797,")), "outside the 1,797"),
    "an image twice": (edit("predictions.csv", lambda text: text.replace("\n1547,", "\n1548,")), "indices repeat"),
    "other mistakes": (edit("predictions.csv", lambda text: text.replace(",5,6,", ",5,5,")), "2 mistakes, where"),
}


@pytest.mark.parametrize(("damage", "said"), BROKEN.values(), ids=BROKEN.keys())
def test_a_damaged_test_is_told_in_one_line_with_what_to_type(
    run: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(run)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)) as caught:
        report(run)
    line = str(caught.value)
    assert line.endswith(f"python -m digitnet test --ckpt_path {run / 'checkpoints' / 'best.ckpt'}")
    assert "\n" not in line
    assert not (run / "report" / "report.html").exists()


def test_a_report_of_the_folder_one_is_in(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "report")
    report(Path())  # the run's
    assert read_page(run).text.endswith("Made by python -m digitnet report --run .. from what the run's folder holds.")
    outside = (run / "report").rename(run.parents[1] / "my own_report")
    (outside / "report.html").unlink()
    monkeypatch.chdir(outside)
    report(Path())
    assert (outside / "report.html").is_file()
    (outside / "predictions.csv").unlink()
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"digitnet test --ckpt_path '{outside.with_name('my own.ckpt')}'")
    ):
        report(Path())


def test_a_report_takes_nothing_of_how_the_run_was_trained(run: Path) -> None:
    (run / "config.yaml").write_text(f"{CONFIG}model:\n  x: 1\n".replace("data:", "data:\n  augmentation: my.Own"))
    report(run)
    assert (run / "report" / "report.html").is_file()


def test_what_to_type_names_the_checkpoint_that_was_tested_or_that_there_is(run: Path) -> None:
    def find_told() -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            report(run)
        return str(caught.value).rsplit("/", 1)[-1]

    checkpoints = run / "checkpoints"
    (checkpoints / "last.ckpt").touch()
    write_test(run, {}, checkpoint=str(checkpoints / "last.ckpt"))
    (run / "report" / "predictions.csv").unlink()
    assert find_told() == "last.ckpt"
    other = shutil.copytree(run / "report", run / "report_mine")  # on other data, of the same checkpoint
    metrics, typed = json.loads((other / "metrics.json").read_text()), "python -m digitnet test --data.source mine.npz"
    (other / "metrics.json").write_text(json.dumps(metrics | {"command": typed}))
    with pytest.raises(FileNotFoundError, match=rf": {typed}$"):
        report(other)
    write_test(run, {}, checkpoint="elsewhere/epoch_3.ckpt")  # no longer there
    (run / "report" / "predictions.csv").unlink()
    assert find_told() == "best.ckpt"
    (run / "report" / "metrics.json").unlink()
    (checkpoints / "best.ckpt").unlink()  # a run without validation keeps none
    assert find_told() == "last.ckpt"


def test_what_is_no_run_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such run"):
        report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="train one first: python -m digitnet fit"):
        report(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tested yet; type: python -m digitnet test$"):
        find_tested_run(tmp_path)


def test_history_of_a_damaged_event_file_keeps_what_can_be_read(run: Path) -> None:
    (events,) = run.glob("events*")
    content = events.read_bytes()
    events.write_bytes(content[: len(content) * 2 // 3])
    history = load_history(run)
    assert isinstance(history, History)
    assert 1 <= len(history.epochs) < 3
    events.write_bytes(torch.randint(256, (500,), dtype=torch.uint8).numpy().tobytes())
    assert load_history(run) is None
