"""The page in a real browser: headless Chromium draws on it, and a network that can read drawings answers."""

from __future__ import annotations

import io
import re
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from drawings import STROKES, Points, render, train_on_drawings
from PIL import Image

pytest.importorskip("fastapi", reason='the page needs the extra "serve"')
pytest.importorskip("playwright", reason="no playwright here, which drives the browser")
import uvicorn
from playwright.sync_api import Browser, FilePayload, Page, Route, expect, sync_playwright

from digitnet.apply.api import create_app
from digitnet.apply.predictor import Predictor
from digitnet.apply.serve import configure, listen

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server, whose network reads drawings; its address."""
    torch.manual_seed(0)
    checkpoint = tmp_path_factory.mktemp("drawn") / "drawn.ckpt"
    train_on_drawings(checkpoint)
    with listen("127.0.0.1", 0) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server = uvicorn.Server(configure(create_app(Predictor.load(checkpoint))))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield address
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def options() -> dict[str, Any]:
    """What kind of visitor it is; tests may ask for another."""
    return {"viewport": DESKTOP}


@pytest.fixture
def page(browser: Browser, address: str, options: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page, freshly opened; a test in whose course the browser complains fails, unless it says it may."""
    context = browser.new_context(**options)
    page = context.new_page()
    complaints: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    yield page
    context.close()
    if "may_complain" not in request.fixturenames:
        assert complaints == []


@pytest.fixture
def may_complain() -> None:
    """Chromium writes every 4xx and 5xx to its console."""


def draw(page: Page, strokes: list[Points]) -> None:
    box = page.locator("#paper").bounding_box()
    assert box
    for points in strokes:
        at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        page.mouse.move(*at[0])
        page.mouse.down()
        for x, y in at[1:]:
            page.mouse.move(x, y, steps=4)
        page.mouse.up()


def wait_until(page: Page, condition: str) -> None:
    """Playwright's own waiting needs eval, which the page forbids."""
    deadline = time.monotonic() + 5
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def answer_with(answer: dict[str, Any], route: Route) -> None:
    route.fulfill(json=answer)


def png(digit: int) -> bytes:
    buffer = io.BytesIO()
    render(STROKES[digit]).save(buffer, "PNG")
    return buffer.getvalue()


def test_drawn_digits_are_read(page: Page) -> None:
    expect(page.locator("#verdict")).to_have_text("Nothing yet")
    expect(page.get_by_role("button", name="Clear")).to_be_disabled()
    for digit in (7, 0, 4):
        draw(page, STROKES[digit])
        expect(page.locator("#digit")).to_have_text(str(digit))
        best = page.locator("#bars .best")
        expect(best).to_have_count(1)
        expect(best).to_have_text(re.compile(rf"{digit}$"))  # the answer to half a stroke may come in between
        assert page.locator("#seen").evaluate("image => image.complete && image.naturalWidth") == 28
        page.get_by_role("button", name="Clear").click()
        expect(page.locator("#digit")).to_have_text("")
        expect(page.locator("#seen")).to_be_hidden()


def test_a_tap_draws_a_dot(page: Page) -> None:
    draw(page, [[(0.5, 0.5)]])
    inked = """paper => paper.getContext("2d").getImageData(0, 0, paper.width, paper.height).data
        .filter((value, i) => i % 4 === 3 && value > 127).length"""
    assert page.locator("#paper").evaluate(inked) > 50


def test_a_photo_that_changes_on_disk_is_still_the_one_that_was_chosen(page: Page, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(png(4))
    page.set_input_files("#photo", photo)
    expect(page.locator("#digit")).to_have_text("4")
    photo.write_bytes(png(7) + b" ")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+z")
    expect(page.locator("#digit")).to_have_text("4")


def test_keys_undo_and_clear(page: Page) -> None:
    draw(page, STROKES[7])
    draw(page, [[(0.3, 0.52), (0.7, 0.52)], [(0.1, 0.1), (0.9, 0.9)], [(0.9, 0.1), (0.1, 0.9)]])
    for _ in range(3):
        page.keyboard.press("Control+z")
    expect(page.locator("#digit")).to_have_text("7")
    for key in ("Escape", "Delete"):
        page.keyboard.press(key)
        expect(page.locator("#verdict")).to_have_text("Nothing yet")
        page.keyboard.press("Control+z")
        expect(page.locator("#digit")).to_have_text("7")


def test_photos_are_chosen_dropped_and_pasted(page: Page) -> None:
    page.set_input_files("#photo", {"name": "four.png", "mimeType": "image/png", "buffer": png(4)})
    expect(page.locator("#digit")).to_have_text("4")
    for event, digit in (("drop", 7), ("paste", 3)):
        page.evaluate(
            """([event, bytes]) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(bytes)], "photo.png", {type: "image/png"}));
                const settings = {bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data};
                const fired = event === "drop" ? new DragEvent(event, settings) : new ClipboardEvent(event, settings);
                document.body.dispatchEvent(fired);
            }""",
            [event, list(png(digit))],
        )
        expect(page.locator("#digit")).to_have_text(str(digit))
    draw(page, STROKES[0])  # a stroke on a photo begins a new drawing
    expect(page.locator("#digit")).to_have_text("0")


@pytest.mark.parametrize(
    "options", [{"viewport": PHONE, "has_touch": True, "is_mobile": True, "device_scale_factor": 3}]
)
def test_on_a_phone_a_finger_draws_and_nothing_scrolls(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    for name in ("#paper", "#digit", "#bars"):
        box = page.locator(name).bounding_box()
        assert box
        assert box["y"] + box["height"] <= PHONE["height"], name
    expect(page.locator("#camera")).to_have_count(1)
    expect(page.locator("label.camera")).to_be_visible()

    box = page.locator("#paper").bounding_box()
    assert box
    touch = page.context.new_cdp_session(page)
    (points,) = STROKES[1]
    path = [*points, (points[-1][0], points[-1][1] + 0.1)]
    for kind, place in [("touchStart", path[0]), *(("touchMove", place) for place in path[1:]), ("touchEnd", None)]:
        at = [{"x": box["x"] + place[0] * box["width"], "y": box["y"] + place[1] * box["height"]}] if place else []
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})
    expect(page.locator("#digit")).to_have_text("1")
    assert page.evaluate("scrollY") == 0


@pytest.mark.parametrize("size", [(320, 568), (360, 640), (667, 375), (844, 390)])
@pytest.mark.parametrize("options", [{"viewport": PHONE, "has_touch": True, "is_mobile": True}])
def test_small_phones_show_paper_and_answer_without_scrolling_sideways(page: Page, size: tuple[int, int]) -> None:
    width, height = size
    page.set_viewport_size({"width": width, "height": height})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for name in ("#paper", "#digit"):
        box = page.locator(name).bounding_box()
        assert box
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= height, name


def test_a_palm_beside_the_pen_draws_nothing(page: Page) -> None:
    page.evaluate(
        """(points) => {
            const paper = document.querySelector("#paper"), box = paper.getBoundingClientRect();
            paper.setPointerCapture = () => {};  // there is no such pointer
            const act = (kind, id, type, [x, y]) => paper.dispatchEvent(new PointerEvent(`pointer${kind}`, {
                pointerId: id, pointerType: type, isPrimary: true, button: 0, buttons: 1, pressure: 0.5, bubbles: true,
                cancelable: true, clientX: box.x + x * box.width, clientY: box.y + y * box.height}));
            act("down", 1, "touch", [0.9, 0.9]);
            act("down", 2, "pen", points[0]);
            for (const point of points.slice(1)) {
                act("move", 1, "touch", [0.1, 0.95]);
                act("move", 2, "pen", point);
            }
            act("up", 1, "touch", [0.1, 0.95]);
            act("up", 2, "pen", points.at(-1));
            act("down", 3, "touch", [0.9, 0.9]);  // the hand rests between strokes
            act("up", 3, "touch", [0.9, 0.9]);
        }""",
        STROKES[7][0],
    )
    expect(page.locator("#digit")).to_have_text("7")
    page.get_by_role("button", name="Undo").click()  # it was one stroke
    expect(page.locator("#verdict")).to_have_text("Nothing yet")


def test_a_photo_that_is_still_opened_gives_way_to_what_comes_after(page: Page) -> None:
    page.evaluate(
        """() => {
            const open = createImageBitmap;
            window.createImageBitmap = (file) => new Promise((resolve) => {
                window.opened = () => resolve(open(file));
            });
        }"""
    )
    draw(page, STROKES[0])
    expect(page.locator("#digit")).to_have_text("0")
    seven = FilePayload(name="seven.png", mimeType="image/png", buffer=png(7))
    page.set_input_files("#photo", seven)
    expect(page.locator("#verdict")).to_have_text("Reading …")
    expect(page.locator("#digit")).to_have_text("")  # the drawing's answer is not the photo's
    wait_until(page, "Boolean(window.opened)")
    page.keyboard.press("Escape")
    page.evaluate("opened()")
    page.wait_for_timeout(300)
    expect(page.locator("#verdict")).to_have_text("Nothing yet")
    page.evaluate("opened = null")
    page.set_input_files("#photo", seven)
    wait_until(page, "Boolean(window.opened)")
    page.evaluate("opened()")
    expect(page.locator("#digit")).to_have_text("7")
    page.keyboard.press("Escape")

    held: list[Route] = []
    page.route("**/predict*", lambda route: held.append(route))
    draw(page, STROKES[7])
    draw(page, [[(0.36, 0.5), (0.64, 0.5)]])  # more to ask about when the first answer is there
    page.wait_for_timeout(100)
    page.set_input_files("#photo", seven)
    page.wait_for_timeout(300)
    assert len(held) == 1  # nothing more is asked about the drawing
    expect(page.locator("#verdict")).to_have_text("Reading …")
    page.unroute("**/predict*")
    page.evaluate("opened()")
    expect(page.locator("#digit")).to_have_text("7")


def test_a_picture_of_a_kind_that_only_the_browser_knows_is_sent_as_one_that_the_server_does(page: Page) -> None:
    page.evaluate(
        """() => {
            const ask = fetch;
            window.fetch = (url, options) => { window.sent = options.body.type; return ask(url, options); };
        }"""
    )
    for kind, sent in (("png", "image/png"), ("avif", "image/webp")):
        page.set_input_files("#photo", {"name": "seven", "mimeType": f"image/{kind}", "buffer": png(7)})
        expect(page.locator("#digit")).to_have_text("7")
        assert page.evaluate("sent") == sent
        page.keyboard.press("Escape")


def test_an_old_answer_never_follows_a_new_one(page: Page) -> None:
    held: list[Route] = []
    page.route("**/predict*", lambda route: route.continue_() if held else held.append(route))
    draw(page, STROKES[7])
    draw(page, [[(0.36, 0.5), (0.64, 0.5)]])
    page.wait_for_timeout(200)
    assert len(held) == 1  # one question at a time, however many strokes
    expect(page.locator("#digit")).to_have_text("")
    page.keyboard.press("Escape")
    draw(page, STROKES[0])
    expect(page.locator("#digit")).to_have_text("0")
    assert "ABORTED" in (held[0].request.failure or "")


def test_uncertainty_and_no_digit_are_said(page: Page) -> None:
    none = dict.fromkeys(("confidence", "runner_up", "runner_up_confidence", "probabilities", "image"))
    shares = [0, 0, 0, 0, 0.56, 0, 0, 0.03, 0, 0.41]
    unsure = {"digit": 4, "confidence": 0.56, "runner_up": 9, "runner_up_confidence": 0.41, "probabilities": shares}
    for answer, digit, words in (
        ({**none, "status": "no digit", "digit": None, "steps": []}, "", "No digit"),
        ({**unsure, "status": "uncertain", "steps": ["inverted"], "image": None}, "4", "Uncertain"),
    ):
        page.route("**/predict*", partial(answer_with, answer))
        draw(page, STROKES[4])
        expect(page.locator("#verdict")).to_have_text(words)
        expect(page.locator("#digit")).to_have_text(digit)
        page.unroute("**/predict*")
    expect(page.locator("#detail")).to_contain_text("or a 9, 41\N{NO-BREAK SPACE}%")


def test_a_photo_of_several_digits_is_not_passed_off_as_one(page: Page) -> None:
    sheet = Image.new("L", (500, 250), 255)
    for place, digit in enumerate((7, 4)):
        sheet.paste(render(STROKES[digit]), (40 + 250 * place, 60))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    page.set_input_files("#photo", {"name": "two.png", "mimeType": "image/png", "buffer": buffer.getvalue()})
    expect(page.locator("#detail")).to_contain_text("is it the only one? 1 large piece left out")
    page.keyboard.press("Escape")
    draw(page, STROKES[7])
    expect(page.locator("#digit")).to_have_text("7")
    expect(page.locator("#detail")).not_to_contain_text("only one")


@pytest.mark.usefixtures("may_complain")
def test_problems_are_said_in_words_and_pass(page: Page) -> None:
    page.set_input_files("#photo", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"7"})
    expect(page.locator("#verdict")).to_have_text("Not read")
    expect(page.locator("#detail")).to_contain_text("Not a picture")
    page.keyboard.press("Escape")
    page.set_input_files("#photo", {"name": "nothing.png", "mimeType": "image/png", "buffer": b""})
    expect(page.locator("#detail")).to_have_text("The file is empty.")

    page.route("**/predict*", lambda route: route.abort())
    draw(page, STROKES[7])
    expect(page.locator("#detail")).to_have_text("The server does not answer. Is it still running?")
    page.unroute("**/predict*")
    page.route("**/predict*", lambda route: route.fulfill(status=503, json={"error": "too many requests wait already"}))
    expect(page.locator("#detail")).to_have_text("Too many requests wait already.")
    page.unroute("**/predict*")
    expect(page.locator("#digit")).to_have_text("7")  # by itself, when the server is back


def test_everything_is_reached_by_keyboard_and_a_screen_reader_is_not_flooded(page: Page) -> None:
    page.evaluate(
        """() => {
            window.spoken = [];
            const status = document.querySelector("[role=status]");
            new MutationObserver(() => spoken.push(status.textContent)).observe(status, {childList: true});
        }"""
    )
    draw(page, STROKES[7])
    draw(page, [[(0.36, 0.5), (0.64, 0.5)]])
    expect(page.get_by_role("status")).to_contain_text("7")
    page.wait_for_timeout(300)
    spoken = page.evaluate("spoken")
    assert len(spoken) == 1
    assert "7" in spoken[0]

    reached = set()
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached >= {"undo", "clear", "photo", "SUMMARY"}


@pytest.mark.parametrize("options", [{"viewport": DESKTOP, "color_scheme": "dark", "reduced_motion": "reduce"}])
def test_dark_and_still_for_who_asks(page: Page) -> None:
    def colour(selector: str, name: str) -> list[int]:
        script = f"element => getComputedStyle(element).{name}.match(/\\d+/g).slice(0, 3).map(Number)"
        return page.locator(selector).evaluate(script)

    assert max(colour("body", "backgroundColor")) < 60
    assert min(colour("body", "color")) > 200
    assert page.locator("#bars .fill").first.evaluate("bar => getComputedStyle(bar).transitionDuration") in ("0s", "")
    draw(page, STROKES[7])
    expect(page.locator("#digit")).to_have_text("7")  # light ink on dark paper, to the eye alone
