"""The programs of benchmarks/, as far as they take no hours."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exact_scores
import numpy as np
import pytest
from conftest import ROOT, Run

from digitnet.data import load_bundled_digits


def test_exact_scores_compares_image_by_image(
    digitnet: Run,
    tmp_path: Path,
    trained_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    digits = load_bundled_digits()
    np.savez(tmp_path / "few.npz", images=digits.images[-90:], labels=digits.labels[-90:])
    called: list[list[str]] = []
    is_wrong = False

    def run(command: list[str], cwd: Path, **_: Any) -> SimpleNamespace:
        called.append(command)
        processes = command.index("--trainer.devices") + 1
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            flags = [flag for flag in command[processes + 1 :] if flag not in ("--trainer.strategy", "ddp")]
            done = digitnet(*command[3:processes], "1", *flags)  # Lightning would leave LOCAL_RANK to later tests
        table = cwd / "model_report" / "predictions.csv"
        if is_wrong and command[processes] == "2":
            lines = table.read_text().splitlines()
            lines[5] = re.sub(r"^(\d+,\d,)(\d)", lambda found: f"{found[1]}{(int(found[2]) + 1) % 10}", lines[5])
            table.write_text("\n".join(lines))
        return SimpleNamespace(returncode=done, stderr=capsys.readouterr().err)

    monkeypatch.setattr("exact_scores.subprocess.run", run)
    monkeypatch.setattr("exact_scores.SIZES", (40, 60))
    monkeypatch.setattr("exact_scores.PROCESSES", (1, 2))
    best = trained_run / "checkpoints" / "best.ckpt"
    monkeypatch.setattr(sys, "argv", ["exact_scores.py", "--checkpoint", str(best), "--data", "few.npz"])
    assert exact_scores.main() == 0
    record = json.loads(Path("exact_scores.json").read_text())
    assert record["is_exact"]
    assert set(record["mistakes"]) == {"40", "60"}
    assert 0 < record["mistakes"]["40"]["1"] <= record["mistakes"]["60"]["1"]
    assert ["[1,3,40]" in command for command in called] == [True, True, False, False]
    is_wrong = True
    assert exact_scores.main() == 1
    assert not json.loads(Path("exact_scores.json").read_text())["is_exact"]
    for wrong in (["--checkpoint", "none.ckpt"], ["--checkpoint", str(best), "--data", "none.npz"]):
        monkeypatch.setattr(sys, "argv", ["exact_scores.py", *wrong])
        with pytest.raises(SystemExit) as stop:
            exact_scores.main()
        assert stop.value.code == 2
        assert "error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["committees", "remaining_mistakes"])
@pytest.mark.parametrize("other", [{"loss_odd": 0.1}, {"source": "mine.npz"}])
def test_what_was_not_scored_on_mnists_test_images_is_refused(
    name: str,
    other: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "seed_42").mkdir()
    (tmp_path / "seed_42" / "result.json").write_text(json.dumps({"mistakes": [1], **other}))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path), *["verdicts.csv"] * (name != "committees")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))["main"]()
    assert stop.value.code == 2
    assert "scored on" in capsys.readouterr().err
