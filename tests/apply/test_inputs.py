from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from PIL import Image

from digitnet.apply import inputs
from digitnet.apply.inputs import Source, find_pictures, prepare, prepare_all
from digitnet.data import load_bundled_digits

DIGITS = load_bundled_digits()
NUM = 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty files: digits of two sizes, dark on light and light on dark; blank paper; and two that are no pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(DIGITS.images[: NUM - 3]):
        side = 28 if index % 2 else 70
        Image.fromarray(image if index % 3 else 255 - image).resize((side, side)).save(folder / f"{index:02}.png")
    Image.new("L", (60, 50), 255).save(folder / "03b.png")
    (folder / "05b.jpg").write_text("no picture")
    (folder / "12b.png").touch()
    return folder


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every file may have a worker, up to two of them; a list of how many each pool had."""
    made: list[int] = []

    def make(workers: int, *args: Any, **kwargs: Any) -> ProcessPoolExecutor:
        made.append(workers)
        return ProcessPoolExecutor(workers, *args, **kwargs)

    monkeypatch.setattr(inputs, "ProcessPoolExecutor", make)
    monkeypatch.setattr(inputs, "FILES_PER_WORKER", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    return made


def test_processes_and_threads_give_the_same_answers_and_errors(
    digitnet: Run, trained_run: Path, folder: Path, pools: list[int], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("predict", "--json", folder, "missing.png", "--ckpt_path", trained_run / "checkpoints" / "best.ckpt")
    assert digitnet(*args) == 1
    by_processes = capsys.readouterr()
    assert pools == [2]
    monkeypatch.setattr(inputs, "FILES_PER_WORKER", 64)
    assert digitnet(*args) == 1
    by_threads = capsys.readouterr()
    assert pools == [2]  # none was added
    assert by_processes == by_threads
    assert [line.split(": ")[2] for line in by_threads.err.splitlines()] == [
        str(folder / "05b.jpg"),
        str(folder / "12b.png"),
        "missing.png",
    ]


def test_workers_see_the_same_pixels_and_leave_ctrl_c_to_the_parent(folder: Path, pools: list[int]) -> None:
    sources = list(find_pictures([str(folder)]))
    with prepare_all(sources, "auto", False) as prepared:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGINT)
        found = list(prepared)
    assert pools == [2]
    assert not multiprocessing.active_children()
    for source, digits in zip(sources, found, strict=True):
        expected = inputs.prepare(source, "auto", False)
        if isinstance(expected, str) or isinstance(digits, str):
            assert digits == expected
        else:
            np.testing.assert_array_equal([one.image for one in digits], [one.image for one in expected])
            assert [one.steps for one in digits] == [one.steps for one in expected]


def test_a_killed_worker_is_one_clear_line(folder: Path, pools: list[int]) -> None:
    def read_while_one_is_killed() -> None:
        with prepare_all(list(find_pictures([str(folder)])), "auto", False) as prepared:
            multiprocessing.active_children()[0].kill()
            list(prepared)

    with pytest.raises(OSError, match=r"^a process .* was killed, .*memory.*; .* fewer than"):
        read_while_one_is_killed()
    assert pools == [2]
    assert not multiprocessing.active_children()


def test_an_interrupt_ends_the_workers_and_drops_what_waits(folder: Path, pools: list[int]) -> None:
    def interrupt() -> None:
        with prepare_all(list(find_pictures([str(folder)])) * 500, "auto", False) as prepared:
            next(prepared)
            raise KeyboardInterrupt

    begin, handler = time.monotonic(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert time.monotonic() - begin < 10  # all 10,000 take longer
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_worker_does_not_outlive_its_parent(folder: Path) -> None:
    script = f"""
import multiprocessing, os, signal
from pathlib import Path
from digitnet.apply import inputs
if __name__ == "__main__":
    inputs.FILES_PER_WORKER, os.sched_getaffinity = 1, lambda _: {{0, 1}}
    with inputs.prepare_all([inputs.Source("", Path({str(folder / "00.png")!r}))] * 40, "auto", False) as prepared:
        list(prepared)
        print(*(one.pid for one in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""
    (folder / "main.py").write_text(script)
    done = subprocess.run([sys.executable, folder / "main.py"], capture_output=True, text=True, timeout=60)
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2, done.stderr
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker waits for ever"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no zombie that nobody has collected yet."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_workers_do_not_import_torch() -> None:
    code = "import sys, digitnet.apply.inputs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_hidden_files_in_folders_are_no_pictures(folder: Path) -> None:
    shown = [source.name for source in find_pictures([str(folder)])]
    hidden = folder / "._00.png"  # as macOS writes beside each picture on a disk of another system
    hidden.write_bytes(b"Mac OS X")
    assert [source.name for source in find_pictures([str(folder)])] == shown
    assert [source.name for source in find_pictures([str(hidden)])] == [str(hidden)]  # who names it means it


def test_pictures_of_kinds_that_are_not_read_are_told_of(folder: Path) -> None:
    photo = folder / "IMG_0001.HEIC"
    photo.write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "notes.txt").write_text("no picture")
    sources = list(find_pictures([str(folder)]))
    assert "notes.txt" not in {Path(source.name).name for source in sources}
    [source] = [source for source in sources if source.name == str(photo)]
    told = str(prepare(source, "auto", False))
    assert told.startswith("not a picture in a known format (PNG, JPEG")
    assert told.endswith("; save a HEIC, AVIF or PDF as one of these")


def test_pictures_in_hidden_folders_are_none(folder: Path) -> None:
    shown = [source.name for source in find_pictures([str(folder)])]
    (folder / ".thumbs" / "small").mkdir(parents=True)
    thumbnail = folder / ".thumbs" / "small" / "00.png"
    thumbnail.write_bytes((folder / "00.png").read_bytes())
    assert [source.name for source in find_pictures([str(folder)])] == shown
    assert [source.name for source in find_pictures([str(folder / ".thumbs")])] == [str(thumbnail)]


def test_a_name_that_cannot_be_looked_up_stops_no_other(folder: Path) -> None:
    good, long = str(folder / "00.png"), "x" * 300 + ".png"
    sources = list(find_pictures([long, str(folder / "0**.png"), good]))
    assert [source.name for source in sources] == [long, str(folder / "0**.png"), good]
    assert "File name too long" in str(prepare(sources[0], "auto", False))
    assert sources[1].message  # what it says depends on Python's version
    assert sources[2].picture == Path(good)


def test_a_closed_folder_among_others_says_so_and_stops_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = list(find_pictures([str(folder)]))
    (folder / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for name in (folder, folder / "*"):
        sources = list(find_pictures([str(name)]))
        assert [source for source in sources if source.picture] == shown
        assert Source(str(folder / "closed"), None, "Permission denied") in sources
    assert list(find_pictures([str(folder / "closed")])) == [Source(str(folder / "closed"), None, "Permission denied")]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a folder that is closed to us")
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_folder_closed_to_us_says_so(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    try:
        by_folder = [prepare(source, "auto", False) for source in find_pictures([str(folder)])]
        by_name = [prepare(source, "auto", False) for source in find_pictures([str(folder / "00.png")])]
    finally:
        folder.chmod(0o755)
    assert by_folder
    assert all("Permission denied" in str(message) for message in by_folder + by_name)


def test_one_source_that_is_wrong_needs_no_process(pools: list[int]) -> None:
    with prepare_all([Source("a", None, "is wrong")], "auto", False) as prepared:
        assert list(prepared) == ["is wrong"]
    assert pools == []
