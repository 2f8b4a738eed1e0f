"""The JSON API: what it answers, what it refuses, and that it stays well whatever is sent."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Run, generated
from drawings import STROKES, render, save_checkpoint
from PIL import Image

pytest.importorskip("fastapi", reason='the API needs the extra "serve"')
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from digitnet.apply import api, connections
from digitnet.apply import serve as serve_module
from digitnet.apply.api import create_app
from digitnet.apply.batching import Batcher
from digitnet.apply.imaging import normalize
from digitnet.apply.opening import open_picture
from digitnet.apply.predictor import Predictor, Reading
from digitnet.apply.serve import configure, listen
from digitnet.model import DigitNet

JSON, PNG = {"content-type": "application/json"}, {"content-type": "image/png"}


def encode(picture: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def make_header_of_png(width: int, height: int) -> bytes:
    """A PNG that says it is large, with next to nothing in it."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT": zlib.compress(bytes(1000))}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


SEVEN = encode(render(STROKES[7]))


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """Untrained: what is tested here is that answers arrive as they were given."""
    torch.manual_seed(0)
    return Predictor(DigitNet())


@pytest.fixture(scope="module")
def client(predictor: Predictor) -> Iterator[TestClient]:
    with TestClient(create_app(predictor), raise_server_exceptions=False) as client:
        yield client


def check_answer(answer: dict[str, Any], expected: Reading, image: np.ndarray) -> None:
    assert (answer["status"], answer["digit"], answer["runner_up"]) == (
        expected.status,
        expected.digit,
        expected.runner_up,
    )
    assert answer["confidence"] == pytest.approx(expected.confidence, abs=1e-5)
    assert answer["runner_up_confidence"] == pytest.approx(expected.runner_up_confidence, abs=1e-5)
    assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    seen = Image.open(io.BytesIO(base64.b64decode(answer["image"])))
    np.testing.assert_array_equal(np.asarray(seen), image)


# --- good requests ----------------------------------------------------------------------------------------------------


def test_a_picture_is_read_as_the_library_reads_it_however_it_is_sent(client: TestClient, predictor: Predictor) -> None:
    for form in ("PNG", "JPEG", "WEBP"):
        data = encode(render(STROKES[7]), form)
        digit = normalize(open_picture(data))
        assert digit is not None
        expected = predictor.read(digit.image[None])[0]
        for request in (
            {"content": data, "headers": PNG},  # the content counts, not what it is said to be
            {"content": data, "headers": {"content-type": "application/octet-stream"}},
            {"content": data},
            {"files": {"file": ("seven", data, "text/plain")}},
            {"files": {"any_name": data}, "data": {"and": "a field"}},
        ):
            response = client.post("/predict", **request)
            assert response.status_code == 200, response.text
            check_answer(response.json(), expected, digit.image)
            assert response.json()["steps"] == list(digit.steps)


def test_blank_pixels_are_no_digit(client: TestClient) -> None:
    for level in (0, 90, 255):
        answer = client.post("/predict", json={"pixels": [[level] * 28] * 28})
        assert answer.status_code == 200
        assert (answer.json()["status"], answer.json()["digit"]) == ("no digit", None)


def test_pixels_are_read_as_they_are(client: TestClient, predictor: Predictor) -> None:
    image = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    response = client.post("/predict", json={"pixels": image.tolist()})
    check_answer(response.json(), predictor.read(image[None])[0], image)


def test_pixels_are_inverted_when_told_to(client: TestClient, predictor: Predictor) -> None:
    image = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    response = client.post("/predict", params={"invert": "yes"}, json={"pixels": image.tolist()})
    check_answer(response.json(), predictor.read(255 - image[None])[0], 255 - image)
    assert response.json()["steps"] == ["inverted"]


def test_white_on_black_is_read_like_black_on_white_unless_told_otherwise(client: TestClient) -> None:
    white_on_black = encode(Image.fromarray(255 - np.asarray(render(STROKES[7]))))
    expected = client.post("/predict", content=SEVEN).json()["image"]
    images = {
        invert: client.post("/predict", params={"invert": invert}, content=white_on_black).json()["image"]
        for invert in ("auto", "yes", "no")
    }
    assert images["auto"] == images["no"] == expected
    assert images["yes"] != expected


def test_blank_paper_is_no_digit(client: TestClient) -> None:
    response = client.post("/predict", content=encode(Image.new("L", (100, 100), 255)))
    answer = response.json()
    assert (response.status_code, answer["status"], answer["digit"]) == (200, "no digit", None)


def test_healthz_and_openapi(client: TestClient) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.head("/healthz").status_code == 200  # as some load balancers ask
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):  # GET: as typed into a browser; PUT: curl -T
        opened = client.request(method, "/predict")
        assert (opened.status_code, opened.headers["allow"]) == (405, "POST")
    described = client.get("/openapi.json").json()
    body = described["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(body) == {"image/*", "application/octet-stream", "multipart/form-data", "application/json"}
    answers = described["paths"]["/predict"]["post"]["responses"]
    assert {"200", "400", "408", "413", "415", "422", "500", "503"} <= set(answers)
    answer = client.post("/predict", content=SEVEN).json()
    assert set(described["components"]["schemas"]["Answer"]["properties"]) == set(answer)


def test_what_the_readme_types(client: TestClient) -> None:
    readme = (ROOT / "README.md").read_text()
    assert "curl -F file=@photo.jpg http://127.0.0.1:8000/predict" in readme
    assert client.post("/predict", files={"file": ("photo.jpg", SEVEN)}).status_code == 200
    described = re.search(r"The API describes itself under\s+`(/\S+)`", readme)
    assert described
    assert client.get(described[1]).status_code == 200


def test_the_page_needs_nothing_from_elsewhere_and_allows_nothing(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    names = set(re.findall(r'(?:src|href)="([^":]+)"', page.text))
    assert names == {"style.css", "app.js", "openapi.json"}
    for text in (page.text, *(client.get(f"/{name}").text for name in names - {"openapi.json"})):
        assert {"http://www.w3.org/2000/svg"} >= set(re.findall(r"https?://[^'\" )]+", text))
        assert not re.search(r"<script>|<style>|\sstyle=|\son\w+=", text)


# --- many at once -----------------------------------------------------------------------------------------------------


class SlowPredictor(Predictor):
    """Reads when told to, and counts what it is given."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(DigitNet())
        self.batches: list[int] = []
        self.go = threading.Event()

    def read(self, images: np.ndarray) -> list[Reading]:
        self.batches.append(len(images))
        assert self.go.wait(30)
        return super().read(images)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_concurrent_answers_are_those_given_one_by_one_from_fewer_passes(predictor: Predictor) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
    slow = SlowPredictor()
    with TestClient(create_app(slow)) as client, ThreadPoolExecutor(len(images)) as pool:

        def ask(image: np.ndarray) -> dict[str, Any]:
            return client.post("/predict", json={"pixels": image.tolist()}).json()

        answers = [pool.submit(ask, image) for image in images]
        wait_until(lambda: bool(slow.batches))
        time.sleep(0.2)  # the others arrive while the first is being read
        slow.go.set()
        for answer, image in zip(answers, images, strict=True):
            check_answer(answer.result(), predictor.read(image[None])[0], image)
    assert sum(slow.batches) == len(images)
    assert len(slow.batches) < len(images) / 2


def test_when_too_many_wait_the_next_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_WAITING", 3)
    slow = SlowPredictor()
    with TestClient(create_app(slow)) as client, ThreadPoolExecutor(10) as pool:
        answers = [pool.submit(client.post, "/predict", content=SEVEN) for _ in range(10)]
        wait_until(lambda: sum(answer.done() for answer in answers) == 7)
        slow.go.set()
        responses = [answer.result() for answer in answers]
        assert sorted(response.status_code for response in responses) == [200] * 3 + [503] * 7
        refused = next(response for response in responses if response.status_code == 503)
        assert refused.headers["retry-after"] == "1"
        assert "try again" in refused.json()["error"]
        assert client.post("/predict", content=SEVEN).status_code == 200


def test_memory_for_pictures_is_bounded(monkeypatch: pytest.MonkeyPatch, predictor: Predictor) -> None:
    monkeypatch.setattr(api, "MAX_HELD_BYTES", len(SEVEN) + 100)
    with TestClient(create_app(predictor)) as client:
        for _ in range(3):  # what was taken is given back, each time
            assert client.post("/predict", content=SEVEN).status_code == 200
            assert client.post("/predict", content=SEVEN + bytes(101)).status_code == 503


def test_a_failing_network_is_told_and_forgotten(predictor: Predictor) -> None:
    class FailsOnce(Predictor):
        has_failed = False

        def read(self, images: np.ndarray) -> list[Reading]:
            if not self.has_failed:
                self.has_failed = True
                raise ValueError("secret")
            return super().read(images)

    with TestClient(create_app(FailsOnce(predictor.model.net)), raise_server_exceptions=False) as client:
        response = client.post("/predict", content=SEVEN)
        assert (response.status_code, list(response.json())) == (500, ["error"])
        assert "secret" not in response.text
        assert response.headers["x-content-type-options"] == "nosniff"  # as of every other answer
        assert client.post("/predict", content=SEVEN).status_code == 200


# --- bad requests -----------------------------------------------------------------------------------------------------


def rows(change: Callable[[list[list[Any]]], Any]) -> bytes:
    pixels = [[0] * 28 for _ in range(28)]
    return json.dumps({"pixels": change(pixels)}).encode()


# Starlette leaves the file of a form that breaks off to the garbage collector.
UNFINISHED_FORM = "ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning"
FORM = {"content-type": "multipart/form-data; boundary=x"}
FILE = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'


@pytest.mark.filterwarnings(UNFINISHED_FORM)
@pytest.mark.parametrize(
    ("headers", "body", "status", "said"),
    [
        (PNG, b"", 400, "the body is empty"),
        (PNG, b"hello", 422, "not a picture"),
        (PNG, SEVEN[:-200], 422, "damaged"),
        (PNG, make_header_of_png(30_000, 30_000), 413, "too large"),
        (PNG, make_header_of_png(0, 5), 422, "not a picture"),
        (PNG, b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422, "not a picture"),
        (PNG, bytes(10 * 2**20 + 1), 413, "larger than 10,485,760 bytes"),
        ({"content-type": "text/html"}, b"<p>7", 415, "text/html is no kind of picture"),
        ({"content-type": "application/x-www-form-urlencoded"}, b"file=7", 415, "no kind of picture"),
        ({"content-type": "multipart/form-data"}, SEVEN, 400, "boundary"),
        (FORM, b"hello", 400, ""),
        (FORM, FILE + SEVEN, 400, ""),
        (FORM, b"--x--\r\n", 400, "no file"),
        (FORM, FILE + SEVEN + b"\r\n" + FILE + SEVEN + b"\r\n--x--\r\n", 400, "Too many files"),
        (FORM, FILE + b"\r\n--x--\r\n", 422, "empty"),
        (
            FORM,
            b'--x\r\nContent-Disposition: form-data; name="invert"\r\n\r\nno\r\n' + FILE + SEVEN + b"\r\n--x--\r\n",
            422,
            "the form has invert, which goes into the address",
        ),
        (JSON, rows(lambda pixels: [[1] * 28, *pixels[1:]]), 422, "pixels: 0 and 1 alone; give levels from 0 to 255"),
        (JSON, b"{", 422, "Invalid JSON"),
        (JSON, b"[" * 60_000, 422, "Invalid JSON"),
        (JSON, b"7", 422, "Input should be"),
        (JSON, b"{}", 422, "pixels: Field required"),
        (JSON, b"\xff\xfe", 422, "Invalid JSON"),
        (JSON, rows(lambda pixels: pixels[1:]), 422, "pixels: List should have at least 28 items"),
        (JSON, rows(lambda pixels: [*pixels[1:], [0] * 29]), 422, "pixels[27]: List should have at most 28 items"),
        (JSON, rows(lambda pixels: [*pixels[1:], [0] * 27 + [256]]), 422, "pixels[27][27]: Input should be less than"),
        (JSON, rows(lambda pixels: [*pixels[1:], [0] * 27 + [-1]]), 422, "greater than or equal to 0"),
        (JSON, rows(lambda pixels: [*pixels[1:], [0] * 27 + [0.5]]), 422, "valid integer"),
        (JSON, rows(lambda pixels: [*pixels[1:], [0] * 27 + ["7"]]), 422, "valid integer"),
        (JSON, rows(lambda pixels: [*pixels[1:], [0] * 27 + [None]]), 422, "valid integer"),
        (JSON, rows(lambda pixels: pixels) + b" " * 70_000, 413, "larger than 65,536 bytes"),
    ],
)
def test_bad_bodies_are_refused_in_one_line(
    client: TestClient, headers: dict[str, str], body: bytes, status: int, said: str
) -> None:
    response = client.post("/predict", content=body, headers=headers)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    message = response.json()["error"]
    assert message
    assert said in message
    assert "\n" not in message


def test_wrong_places_and_parameters_are_refused_in_json(client: TestClient) -> None:
    wrong = client.post("/predict", params={"invert": "maybe"}, content=SEVEN)
    assert (wrong.status_code, "'auto', 'yes' or 'no'" in wrong.json()["error"]) == (422, True)
    unknown = client.post("/predict", params={"split": "true"}, content=SEVEN)
    assert (unknown.status_code, unknown.json()["error"].startswith("query.split: ")) == (422, True)
    assert client.get("/nowhere").status_code == 404
    assert client.get("/../serve.py").status_code == 404
    assert client.get("/%2e%2e/serve.py").status_code == 404
    assert client.put("/healthz").status_code == 405
    for path in ("/predict", "/nowhere"):
        assert list(client.get(path).json()) == ["error"]


@pytest.mark.filterwarnings(UNFINISHED_FORM)
@generated(40)
@given(
    kind=st.sampled_from(["", "image/png", "application/json", FORM["content-type"], "multipart/form-data"])
    | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30),
    body=st.binary(max_size=300)
    | st.binary(max_size=60).map(lambda noise: SEVEN[:150] + noise + SEVEN[150 + len(noise) :])
    | st.binary(max_size=60).map(lambda noise: FILE + noise + b"\r\n--x--\r\n")
    | st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=9).map(
        lambda value: json.dumps({"pixels": value}).encode()
    ),
)
def test_whatever_is_sent_is_answered(client: TestClient, kind: str, body: bytes) -> None:
    response = client.post("/predict", content=body, headers={"content-type": kind})
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, response.text
        assert "\n" not in response.json()["error"]


# --- a real server ----------------------------------------------------------------------------------------------------


@contextmanager
def running(predictor: Predictor) -> Iterator[tuple[int, uvicorn.Server]]:
    """The server as the command starts it, in a thread; its port, and itself."""
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = uvicorn.Server(configure(create_app(predictor)))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield port, server
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


def converse(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Everything that a server says to what is sent in pieces, until it closes the connection."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            while data := connection.recv(65536):
                said += data
        except (ConnectionResetError, BrokenPipeError):
            pass
    return said


POST = b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Type: image/png\r\n"


def test_slow_senders_are_cut_off_and_others_served(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(api, "BODY_SECONDS", 0.3)
    with running(predictor) as (port, _), ThreadPoolExecutor() as pool:
        silent = pool.submit(converse, port)
        head = pool.submit(converse, port, b"POST /predict HTTP/1.1\r\n", *[b"A: b\r\n"] * 60, pause=0.02)
        second_head = pool.submit(converse, port, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", b"GET", pause=0.1)
        body = pool.submit(converse, port, POST + b"Content-Length: 1000\r\n\r\n", *[b"x"] * 10, pause=0.02)
        chunks = pool.submit(converse, port, POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for _ in range(4):  # longer than the time-outs: a connection that is used stays
            connection.request("POST", "/predict", SEVEN)
            assert connection.getresponse().read().startswith(b'{"status":')
            time.sleep(0.15)
        connection.close()
        assert silent.result() == b""
        assert head.result() == b""
        assert second_head.result().count(b"HTTP/1.1 200") == 1
        for late in (body.result(), chunks.result()):
            assert late.startswith(b"HTTP/1.1 408")
            assert b"was not here after" in late


def test_bytes_that_are_no_http_are_refused(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with running(predictor) as (port, _):
        noise = np.random.default_rng(0).bytes(2000)
        for data in (noise, b"GET / HTTP/1.1\r\n\r\n", POST + b"Content-Length: -1\r\n\r\n", b"GET /" + b"a" * 200_000):
            said = converse(port, data)
            assert said.startswith(b"HTTP/1.1 4") or not said
        endless = b"Content-Length: 99999999999\r\n\r\n"
        assert converse(port, POST + endless, bytes(1000)).startswith(b"HTTP/1.1 413")
        # Refused before it is read, and closed though the sender goes on.
        elsewhere = b"POST /nowhere HTTP/1.1\r\nHost: here\r\n" + endless
        assert converse(port, elsewhere, bytes(1000), bytes(1000), pause=0.1).startswith(b"HTTP/1.1 405")


def test_whoever_waits_for_a_batcher_that_is_left_is_cancelled() -> None:
    go = threading.Event()

    def read(images: np.ndarray) -> list[int]:
        assert go.wait(30)
        return [0] * len(images)

    async def leave() -> list[Any]:
        async with Batcher(read, max_batch=1) as batcher:
            waiting = [asyncio.create_task(batcher.read(np.zeros((28, 28), np.uint8))) for _ in range(3)]
            await asyncio.sleep(0.1)  # one is under way, two are in the queue
            threading.Timer(0.1, go.set).start()
        return await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30)

    assert [type(answer) for answer in asyncio.run(leave())] == [asyncio.CancelledError] * 3


def test_an_upload_that_does_not_end_before_the_server_is_told_so(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serve_module, "STOP_SECONDS", 1)
    with ThreadPoolExecutor() as pool, running(predictor) as (port, server):
        request = POST + b"Content-Length: %d\r\n\r\n" % len(SEVEN)
        answer = pool.submit(converse, port, request, SEVEN[:10], pause=0.1)
        time.sleep(0.5)
        server.should_exit = True
        said = answer.result(30)
    assert said.startswith(b"HTTP/1.1 503")
    assert b"the server is stopping" in said
    assert "Traceback" not in caplog.text


def test_a_stopped_server_answers_what_is_under_way() -> None:
    slow = SlowPredictor()
    with ThreadPoolExecutor() as pool, running(slow) as (port, server):
        request = POST + b"Content-Length: %d\r\n\r\n" % len(SEVEN) + SEVEN
        answer = pool.submit(converse, port, request)
        wait_until(lambda: bool(slow.batches))
        server.should_exit = True
        time.sleep(0.5)
        assert not answer.done()
        slow.go.set()
        assert answer.result(30).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_command_serves_until_sigterm_and_ends_well(tmp_path: Path, workers: int) -> None:
    checkpoint = tmp_path / "any.ckpt"
    save_checkpoint(DigitNet(), checkpoint)
    command = [sys.executable, "-m", "digitnet", "serve", "--port", "0", "--ckpt_path", str(checkpoint)]
    with subprocess.Popen(
        [*command, "--workers", str(workers)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        url = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)/", url)
        assert match, url
        connection = http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=60)
        connection.request("POST", "/predict", SEVEN)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    digit = normalize(open_picture(SEVEN))
    assert digit is not None
    check_answer(answer, Predictor.load(checkpoint).read(digit.image[None])[0], digit.image)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    checkpoint = tmp_path / "any.ckpt"
    save_checkpoint(DigitNet(), checkpoint)
    flags = ("--port", "0", "--workers", "2", "--ckpt_path", str(checkpoint))
    command = [sys.executable, "-m", "digitnet", "serve", *flags]

    def is_served(port: str) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        match = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        assert match
        assert is_served(match[1])
        process.kill()
    deadline = time.monotonic() + 30
    while is_served(match[1]):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_all_processes_serve_the_checkpoint_that_was_the_newest_at_the_start(
    digitnet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = tmp_path / "lightning_logs" / "mine" / "version_0" / "checkpoints" / "best.ckpt"
    newest.parent.mkdir(parents=True)
    save_checkpoint(DigitNet(), newest)
    named: list[str | None] = []
    monkeypatch.setenv("DIGITNET_CKPT_PATH", "")  # put back at the end
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(serve_module, "run_workers", lambda *_: named.append(os.environ["DIGITNET_CKPT_PATH"]))
    assert digitnet("serve", "--port", 0, "--workers", 2) == 0
    assert named == [str(newest)]
    other = newest.with_name("other.ckpt")
    save_checkpoint(DigitNet(), other)
    monkeypatch.setenv("DIGITNET_CKPT_PATH", str(other))
    assert digitnet("serve", "--port", 0, "--workers", 2) == 0
    assert named[1:] == [str(other)]


# --- mistakes on the command line -------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_told_in_one_line(digitnet: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert digitnet("serve", "--port", port) == 1
    assert re.fullmatch(
        rf"digitnet: error: cannot listen on 127.0.0.1, port {port}: .*in use.*\n", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--port", 70000), "port is 70000"),
        (("--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid"),
        (("--host", "127.0.0..1"), "cannot listen on 127.0.0..1, port 8000: no name of a machine is like this"),
        (("--workers", 0), "workers is 0"),
        (("--port", 0, "--ckpt_path", "nowhere.ckpt"), "nowhere.ckpt"),
        (("--port", 0), "train one first"),
    ],
)
def test_wrong_flags_are_told_in_one_line(
    digitnet: Run, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], said: str
) -> None:
    assert digitnet("serve", *flags) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_checkpoint_that_the_environment_names_in_vain_is_told_so(
    digitnet: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIGITNET_CKPT_PATH", "/nope.ckpt")
    assert digitnet("serve", "--port", 0) == 1
    assert "error: DIGITNET_CKPT_PATH is /nope.ckpt, and there is no such file" in capsys.readouterr().err


def test_missing_packages_are_named(
    digitnet: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_module, "find_spec", lambda name: None)
    assert digitnet("serve") == 1
    error = capsys.readouterr().err
    assert "fastapi, uvicorn, python_multipart" in error
    assert 'pip install -e ".[serve]"' in error
