"""Pictures made by hand, whose 28x28 form is known, and MNIST's own digits made large, inverted, shaded and ruled."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from drawings import STROKES, render
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage

from digitnet.apply.imaging import Digit28, normalize
from digitnet.apply.ink import Invert
from digitnet.apply.opening import SHEET_SIDE, open_picture, shrink
from digitnet.apply.sheet import add_margin
from digitnet.apply.splitting import digit_groups, split_digits
from digitnet.data import Digits, fetch_digits, load_bundled_digits


def page(
    size: tuple[int, int] = (200, 200), colour: float | tuple[int, ...] | str = 255, mode: str = "L"
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new(mode, size, colour)
    return picture, ImageDraw.Draw(picture)


def bar() -> Image.Image:
    """A black upright bar, 20 x 100, in the upper left part of a white page."""
    picture, draw = page()
    draw.rectangle((30, 20, 49, 119), 0)
    return picture


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def found(picture: Image.Image, invert: Invert = "auto") -> Digit28:
    digit = normalize(picture, invert)
    assert digit is not None
    assert digit.image.shape == (28, 28)
    assert digit.image.dtype == np.uint8
    return digit


def extent(image: np.ndarray) -> tuple[int, int]:
    """Height and width of what is bright."""
    rows, columns = np.nonzero(image > 127)
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def apart(image: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference in [0, 255], up to one pixel of shift, as the centre of mass is rounded to one.

    Two different MNIST digits are about 35 apart.
    """
    shifts = [np.roll(other, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return min(float(np.abs(image.astype(float) - shift).mean()) for shift in shifts)


def large(digit: np.ndarray, times: int = 8) -> np.ndarray:
    """Enlarged, with the soft edges that a canvas or a scanner gives."""
    return np.asarray(Image.fromarray(digit).resize((28 * times,) * 2, Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def digits(real_digits: Digits) -> np.ndarray:
    return real_digits.images[:40]


# A bar: box, centre, polarity


def test_a_bar_fills_the_box_and_its_centre_of_mass_is_in_the_middle() -> None:
    image = found(bar()).image
    assert extent(image) == (20, 4)
    assert image.max() == 255
    assert image[0].max() == image[:, 0].max() == 0
    assert np.abs(np.array(ndimage.center_of_mass(image)) - 14).max() <= 0.5  # where MNIST has it, to a whole pixel


def test_a_wide_shape_keeps_its_aspect() -> None:
    assert extent(found(bar().transpose(Image.Transpose.ROTATE_90)).image) == (4, 20)


def test_the_border_decides_the_polarity_and_invert_overrules_it() -> None:
    dark = found(bar())
    bright = found(Image.eval(bar(), lambda v: 255 - v))
    np.testing.assert_array_equal(dark.image, bright.image)
    assert "inverted" in dark.steps
    assert "inverted" not in bright.steps
    np.testing.assert_array_equal(found(bar(), "yes").image, dark.image)
    assert normalize(bar(), "no") is None or not np.array_equal(found(bar(), "no").image, dark.image)


@pytest.mark.parametrize("colour", [(255, 220, 0), (20, 60, 200), (200, 30, 30), (150, 150, 150)])
def test_ink_of_any_colour(colour: tuple[int, int, int]) -> None:
    picture, draw = page(mode="RGB", colour="white")
    draw.rectangle((30, 20, 49, 119), colour)
    np.testing.assert_allclose(found(picture).image, found(bar()).image, atol=8)


@pytest.mark.parametrize("ink", [0, 255])
def test_a_transparent_background_is_paper_whatever_the_ink(ink: int) -> None:
    alpha = Image.eval(bar(), lambda v: 255 - v)
    picture = Image.merge("LA", [Image.new("L", alpha.size, ink), alpha])
    np.testing.assert_array_equal(found(picture).image, found(bar()).image)


def test_the_darker_edges_of_bright_ink_are_no_ink() -> None:
    soft = Image.eval(bar(), lambda v: 255 - v).resize((190, 190), Image.Resampling.BILINEAR)
    assert len(soft.getcolors() or []) > 2
    picture = Image.merge("RGBA", [soft] * 4)  # drawn onto nothing, so that its edges are mixed with black
    assert apart(found(picture).image, found(Image.eval(soft, lambda v: 255 - v)).image) < 8


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "RGBA", "CMYK", "LA", "I", "F", "I;16"])
def test_every_mode_reads_alike(mode: str) -> None:
    sixteen = Image.fromarray(np.asarray(bar()).astype(np.uint16) * 257)
    picture = sixteen if mode == "I;16" else bar().convert(mode)
    np.testing.assert_allclose(found(picture).image, found(bar()).image, atol=2)


# Opening


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "F"])
def test_a_large_picture_is_reduced_as_it_opens(mode: str) -> None:
    large = bar().resize((2 * SHEET_SIDE, 2 * SHEET_SIDE), Image.Resampling.NEAREST)
    picture = Image.fromarray(np.asarray(large).astype(np.uint16) * 257) if mode == "I;16" else large.convert(mode)
    reduced = shrink(picture)
    assert reduced.size == (SHEET_SIDE, SHEET_SIDE)
    np.testing.assert_allclose(found(reduced).image, found(picture).image, atol=2)
    assert shrink(bar()).size == bar().size
    if mode != "F":  # which no format but TIFF holds
        assert max(open_picture(encoded(picture, "TIFF")).size) == SHEET_SIDE


def test_a_large_picture_with_a_transparent_colour_keeps_its_ink() -> None:
    large = bar().resize((2 * SHEET_SIDE, 2 * SHEET_SIDE), Image.Resampling.NEAREST)
    opened = open_picture(encoded(large.convert("P"), "PNG", transparency=255))
    assert opened.size == (SHEET_SIDE, SHEET_SIDE)
    np.testing.assert_allclose(found(opened).image, found(large).image, atol=2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF"])
def test_every_format_opens(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(encoded(bar(), kind))
    from_path, from_bytes = found(open_picture(path)).image, found(open_picture(path.read_bytes())).image
    np.testing.assert_array_equal(from_path, from_bytes)
    assert apart(from_path, found(bar()).image) < 4  # JPEG and WebP lose a little
    with path.open("rb") as file:
        np.testing.assert_array_equal(found(open_picture(file)).image, from_path)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_a_photo_held_sideways_is_turned_upright(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn a quarter clockwise to see it upright"
    lying = encoded(bar().transpose(Image.Transpose.ROTATE_90), kind, exif=exif, quality=95)
    digit = found(open_picture(lying))
    assert extent(digit.image) == (20, 4)
    assert "turned by EXIF" in digit.steps
    assert "turned by EXIF" not in found(open_picture(encoded(bar(), kind))).steps


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    lossless = {"lossless": True} if kind == "WEBP" else {}
    frames = encoded(bar(), kind, save_all=True, append_images=[Image.new("L", (200, 200), 255)], **lossless)
    np.testing.assert_array_equal(found(open_picture(frames)).image, found(bar()).image)
    assert "first of 2 pages" in found(open_picture(frames)).steps


def test_many_pages_are_not_counted_to_their_end() -> None:
    rest = [Image.new("L", (20, 20), level % 256) for level in range(150)]
    assert (
        "first of 100 or more pages"
        in open_picture(encoded(bar(), "TIFF", save_all=True, append_images=rest)).info["steps"]
    )


def test_the_preview_behind_a_photo_is_no_page() -> None:
    photo = open_picture(encoded(bar(), "MPO", save_all=True, append_images=[Image.new("L", (20, 20), 255)]))
    assert photo.format == "MPO"
    assert photo.info["steps"] == ()
    assert extent(found(photo).image) == (20, 4)


def test_thousands_of_pieces_take_no_memory_by_pairs() -> None:
    corners = np.array([(30 * row, 30 * column) for row in range(63) for column in range(63)])
    boxes = np.column_stack([corners, corners + np.where(np.arange(len(corners)) % 2, 20, 9)[:, None]])
    tracemalloc.start()
    groups, num_small = digit_groups(boxes, np.ones(len(boxes), bool))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(groups), num_small) == (len(boxes), 0)
    assert peak < 8e6  # all pairs are 16 million


def test_of_very_many_pieces_the_largest_are_looked_at() -> None:
    dots = np.full((380, 380), 255, np.uint8)
    dots[::4, ::4] = 0  # 9,025
    picture = Image.fromarray(dots)
    picture.paste(bar().crop((0, 0, 80, 140)), (200, 200))
    digit = found(picture)
    assert extent(digit.image) == (20, 4)
    assert "only the 4,000 largest pieces looked at" in digit.steps


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 999)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"%PDF-1.4 this is no picture", "not a picture"),
        (encoded(bar(), "PNG")[:60], "damaged|not a picture"),
        (encoded(bar(), "JPEG")[:-200], "damaged"),
        (png_header(30_000, 100), "too large: 30,000 x 100 pixels"),
        (png_header(10_000, 10_000), "too large"),
        (png_header(30_000, 30_000), "too large"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_picture(data)
    assert "\n" not in str(error.value)


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder"):
        open_picture(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        open_picture(tmp_path / "none.png")


def test_random_damage_never_gives_anything_but_a_value_error() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF"):
        whole = np.frombuffer(encoded(bar(), kind), np.uint8)
        for _ in range(15):
            data = whole.copy()
            data[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            with contextlib.suppress(ValueError):
                normalize(open_picture(data.tobytes()))


# Blank pages, dirt and lines


@pytest.mark.parametrize(("height", "width"), [(5000, 1), (20, 16_000)])
def test_a_page_much_longer_than_wide_is_no_digit(height: int, width: int) -> None:
    assert normalize(Image.new("L", (width, height), 255)) is None


def test_levels_as_fractions(digits: np.ndarray) -> None:
    expected = normalize(Image.fromarray(255 - digits[0]))
    fractions = normalize(Image.fromarray((255 - digits[0]) / np.float32(255)))
    assert expected is not None
    assert fractions is not None
    np.testing.assert_array_equal(fractions.image, expected.image)
    with pytest.raises(ValueError, match="not finite"):
        normalize(Image.fromarray(np.full((9, 9), np.nan, np.float32)))


@pytest.mark.parametrize("colour", [0, 128, 255])
def test_a_blank_page_is_no_digit(colour: int) -> None:
    assert normalize(page(colour=colour)[0]) is None
    assert normalize(page((28, 28), colour)[0]) is None
    assert split_digits(page(colour=colour)[0]) == []


def test_evenly_shaded_paper_is_no_digit() -> None:
    shade = np.tile(np.linspace(120, 250, 300), (200, 1)).round().astype(np.uint8)
    assert normalize(Image.fromarray(shade)) is None


@pytest.mark.parametrize("side", [1, 2, 5])
def test_tiny_pictures_do_no_harm(side: int) -> None:
    picture, draw = page((side, side))
    draw.point((0, 0), 0)
    normalize(picture)
    split_digits(picture)


def five(width: int = 10) -> Image.Image:
    """A 5 of two strokes that do not touch, its bar apart."""
    picture, draw = page()
    draw.line((75, 60, 70, 95), 0, width)
    draw.arc((60, 90, 120, 150), 200, 500, 0, width)
    draw.line((85, 48, 130, 48), 0, width)
    return picture


def test_specks_and_edge_pieces_go_and_a_broken_five_stays_whole() -> None:
    dirty = five()
    draw = ImageDraw.Draw(dirty)
    for x, y in ((10, 30), (180, 20), (170, 185), (25, 170)):
        draw.ellipse((x, y, x + 3, y + 3), 0)
    draw.rectangle((0, 0, 4, 199), 0)
    digit = found(dirty)
    np.testing.assert_allclose(digit.image, found(five()).image, atol=2)
    assert "4 specks dropped" in digit.steps
    assert not any("left out" in step for step in digit.steps)
    top = digit.image[: 4 + 3].sum()
    assert top > 255 * 10  # the bar


def test_other_digits_are_no_specks() -> None:
    sheet = Image.new("L", (600, 200), 255)
    for place in range(3):
        sheet.paste(five(), (200 * place, 0))
    ImageDraw.Draw(sheet).ellipse((10, 30, 13, 33), 0)
    steps = found(sheet).steps
    assert "1 speck dropped" in steps
    assert "2 large pieces left out" in steps


def test_ruled_lines_go_and_the_strokes_they_cross_stay() -> None:
    ruled = Image.new("RGB", (200, 200), "white")
    draw = ImageDraw.Draw(ruled)
    for y in range(15, 200, 30):
        draw.line((0, y, 199, y), (130, 150, 220), 2)
    ink = five()
    ruled.paste((0, 0, 0), mask=Image.eval(ink, lambda v: 255 - v))
    digit = found(ruled)
    assert "ruled line" in " ".join(digit.steps)
    assert apart(digit.image, found(ink).image) < 8


def test_a_digit_cut_out_tightly_keeps_the_bar_that_reaches_both_edges() -> None:
    picture, draw = page((100, 140))
    draw.line((0, 6, 99, 6), 0, 13)
    draw.line((93, 6, 40, 139), 0, 13)
    image = found(picture).image
    assert (image[image.any(1)][1] > 127).sum() >= 12


# MNIST's own digits


def test_an_mnist_digit_passes_unchanged(digits: np.ndarray) -> None:
    for image in digits:
        assert np.array_equal(found(Image.fromarray(image)).image, image)
        assert found(Image.fromarray(image)).steps == ()
        inverted = found(Image.fromarray(255 - image))
        assert np.array_equal(inverted.image, image)
        assert inverted.steps == ("inverted",)
    for mode in ("RGB", "RGBA", "P", "LA"):  # as programs save grey pictures
        assert np.array_equal(found(Image.fromarray(digits[0]).convert(mode)).image, digits[0])


@pytest.mark.parametrize("bright", [False, True])
def test_enlarged_digits_come_back(digits: np.ndarray, real_digits: Digits, bright: bool) -> None:
    if len(real_digits.images) < 70_000:
        pytest.skip("the bundled digits, with margins of their own, do not fill MNIST's box of 20x20")
    for enlarge in (lambda image: np.kron(image, np.ones((8, 8), np.uint8)), large):
        pictures = [enlarge(image) if bright else 255 - enlarge(image) for image in digits]
        distances = [
            apart(found(Image.fromarray(picture)).image, image) for picture, image in zip(pictures, digits, strict=True)
        ]
        assert np.median(distances) < 8
        assert max(distances) < 20  # some strokes are made thicker or thinner


@pytest.mark.parametrize("bright", [False, True])
@pytest.mark.parametrize("kind", sorted(STROKES))
def test_a_drawn_digit_enlarged_comes_back(kind: int, bright: bool) -> None:
    image = found(render(STROKES[kind])).image  # fills MNIST's box
    for enlarge in (lambda small: np.kron(small, np.ones((8, 8), np.uint8)), large):
        picture = enlarge(image) if bright else 255 - enlarge(image)
        assert apart(found(Image.fromarray(picture)).image, image) < 8


def test_shading_and_a_shadow_change_little(digits: np.ndarray) -> None:
    y, x = np.mgrid[0:224, 0:224]
    slope, shadow = 0.55 + 0.4 * x / 223, np.where(x + 0.4 * y > 150, 0.6, 1.0)
    for image in digits[:8]:
        plain = 235 - 0.85 * large(image)
        expected = found(Image.fromarray(plain.astype(np.uint8))).image
        for light in (slope, shadow):
            digit = found(Image.fromarray((plain * light).astype(np.uint8)))
            assert apart(digit.image, expected) < 14
            assert "shading removed" in digit.steps


@pytest.mark.parametrize("width", [6, 9, 40])
def test_a_shadow_over_most_of_a_photo_leaves_the_paper_bright(width: int) -> None:
    picture, draw = page((900, 1200), 225)
    draw.line([(450 + 360 * (x - 0.5), 600 + 360 * (y - 0.5)) for x, y in STROKES[7][0]], 80, width, "curve")
    y, x = np.mgrid[-1:1:1200j, -1:1:900j]
    expected = found(picture).image
    for angle in np.arange(0, 2 * np.pi, np.pi / 4):
        shade = ((np.cos(angle) * x + np.sin(angle) * y + 0.3) / 0.05 + 0.5).clip(0, 1)
        digit = found(Image.fromarray((np.asarray(picture) * (1 - 0.45 * shade)).astype(np.uint8)))
        assert {"inverted", "shading removed"} <= set(digit.steps)
        assert apart(digit.image, expected) < 14


def test_a_hairline_survives() -> None:
    picture, draw = page((1000, 1000))
    draw.ellipse((200, 100, 700, 900), outline=0, width=1)
    digit = found(picture)
    assert extent(digit.image)[0] in (19, 20)
    assert digit.image.max() > 200
    assert (digit.image[10:18].max(1) > 150).all()  # closed on both sides
    assert digit.image[12:16, 13:15].max() < 40  # and open inside
    assert "strokes thickened" in digit.steps


def test_a_small_digit_in_a_large_photo_is_looked_at_closely(digits: np.ndarray) -> None:
    near = 255 - large(digits[0], 4)
    frame = np.full((1500, 2000), 255, np.uint8)
    frame[900 : 900 + 112, 300 : 300 + 112] = near
    assert apart(found(Image.fromarray(frame)).image, found(Image.fromarray(near)).image) < 5


def test_grey_stays_grey(digits: np.ndarray) -> None:
    image = found(Image.fromarray(255 - large(digits[0]))).image
    assert np.unique(image).size > 20


# Several on a sheet


def test_split_reads_line_by_line_from_left_to_right(digits: np.ndarray) -> None:
    sheet = np.full((620, 900), 255, np.uint8)
    for i, image in enumerate(digits[:6]):
        row, column = divmod(i, 3)
        top, left = 40 + 290 * row + 12 * (column % 2), 30 + 290 * column
        sheet[top : top + 224, left : left + 224] = 255 - large(image)
    sheet[5:9, 450:454] = 0  # a speck
    parts = split_digits(Image.fromarray(sheet))
    assert [part.line for part in parts] == [1, 1, 1, 2, 2, 2]
    for part, image in zip(parts, digits, strict=False):
        assert apart(part.image, found(Image.fromarray(255 - large(image))).image) < 5


def test_split_keeps_a_broken_five_whole() -> None:
    sheet = Image.new("L", (400, 200), 255)
    sheet.paste(five(), (0, 0))
    sheet.paste(bar(), (200, 20))
    assert len(split_digits(sheet)) == 2


def test_a_rising_line_is_read_from_left_to_right(digits: np.ndarray) -> None:
    sheet = np.full((620, 900), 255, np.uint8)
    scales = (6, 4, 6, 4, 6)
    for i, (image, scale) in enumerate(zip(digits, scales, strict=False)):
        top = 250 - 50 * i + 14 * (8 - scale)
        sheet[top : top + 28 * scale, 170 * i : 170 * i + 28 * scale] = 255 - large(image, scale)
    parts = split_digits(Image.fromarray(sheet))
    assert [part.line for part in parts] == [1] * 5
    for part, image, scale in zip(parts, digits, scales, strict=False):
        assert apart(part.image, found(Image.fromarray(255 - large(image, scale))).image) < 5


@pytest.mark.parametrize("longest", [SHEET_SIDE, SHEET_SIDE + 24, 2 * SHEET_SIDE - 1, 3 * SHEET_SIDE - 1])
def test_a_slightly_larger_picture_of_a_page_is_read_no_worse(longest: int) -> None:
    sheet, draw = page((4 * SHEET_SIDE, 4 * SHEET_SIDE))
    for row in range(10):
        for column in range(10):
            left, top = 240 + 560 * column, 240 + 560 * row
            draw.line([(left, top), (left + 40, top), (left + 15, top + 60)], 0, 9)  # a hundredth of the page high
    found = split_digits(sheet.resize((longest, longest), Image.Resampling.BOX))
    assert len(found) == 100
    assert all(10 <= extent(each.image)[1] <= 16 for each in found)


def test_a_jumping_line_is_read_from_left_to_right(digits: np.ndarray) -> None:
    sheet = np.full((900, 1200), 255, np.uint8)
    for i, image in enumerate(digits[:5]):
        for line in range(2):
            top = 100 + 300 * line + (0, 70, 10, 75, 0)[i]
            sheet[top : top + 168, 200 * i : 200 * i + 168] = 255 - large(image, 6)
    parts = split_digits(Image.fromarray(sheet))
    assert [part.line for part in parts] == [1] * 5 + [2] * 5
    for part, image in zip(parts, [*digits[:5], *digits[:5]], strict=True):
        assert apart(part.image, found(Image.fromarray(255 - large(image, 6))).image) < 5


def test_a_fainter_digit_beside_a_bold_one_is_found() -> None:
    sheet = Image.new("L", (400, 200), 255)
    sheet.paste(five(), (0, 0))
    sheet.paste(Image.eval(bar(), lambda level: 150 + level * 105 // 255), (200, 20))
    assert len(split_digits(sheet)) == 2


# In other programs


def test_readme_makes_an_npz_of_labelled_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(import random\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    few = load_bundled_digits()
    for i in range(30):
        folder = tmp_path / "pictures" / str(few.labels[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - few.images[i]).save(folder / f"{i}.png")
    Image.new("L", (50, 50), 255).save(folder / "blank.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    made = fetch_digits("mine.npz")
    assert sorted(zip(made.labels, map(bytes, made.images), strict=True)) == sorted(
        zip(few.labels[:30], map(bytes, few.images[:30]), strict=True)
    )
    assert (np.diff(made.labels.astype(int)) < 0).any()  # shuffled


# What else is in a picture


def with_ink(ink: Image.Image, paper: int = 255, size: tuple[int, int] = (400, 400)) -> Image.Image:
    """A page with black ink (200, 200) in the middle."""
    sheet = Image.new("L", size, paper)
    sheet.paste(0, ((size[0] - 200) // 2, (size[1] - 200) // 2), Image.eval(ink, lambda level: 255 - level))
    return sheet


@pytest.mark.parametrize("tones", [(60, 240), (230, 40)])
@pytest.mark.parametrize("angle", [0, 8])
def test_a_sheet_on_a_table_of_another_tone(tones: tuple[int, int], angle: int) -> None:
    table, paper = tones
    sheet = with_ink(five())
    if table > paper:  # chalk on a board
        sheet = Image.eval(sheet, lambda level: 255 - level)
    low, high = sorted((paper, 0 if paper > table else 255))
    sheet = Image.eval(sheet, lambda level: low + level * (high - low) // 255)
    picture = Image.new("L", (700, 600), table)
    picture.paste(sheet.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=table), (100, 60))
    digit = found(picture)
    assert "table cut away" in digit.steps
    expected = found(with_ink(five()).rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=255))
    assert apart(digit.image, expected.image) < 8
    assert len(split_digits(picture)) == 1


@pytest.mark.parametrize("is_turned", [False, True])
def test_bars_around_a_screenshot(is_turned: bool) -> None:
    picture = Image.new("L", (400, 700), 0)
    picture.paste(with_ink(five()), (0, 150))
    expected = with_ink(five())
    if is_turned:
        picture, expected = (each.transpose(Image.Transpose.ROTATE_90) for each in (picture, expected))
    digit = found(picture)
    assert "bars cut away" in digit.steps
    assert apart(digit.image, found(expected).image) < 5


@pytest.mark.parametrize("margin", [0, 3, 40])
def test_an_upright_stroke_between_margins_is_no_screenshot(margin: int) -> None:
    picture, draw = page((160, 200))
    draw.rectangle((60, margin, 99, 199 - margin), 0)
    assert not any("cut away" in step for step in found(picture).steps)


@pytest.mark.parametrize("width", [20, 60])
def test_the_edge_of_a_table_is_no_one(width: int) -> None:
    picture = Image.new("L", (400, 400), 255)
    picture.paste(110, (150, 150), Image.eval(five(), lambda level: 255 - level).resize((100, 100)))
    expected = found(picture)
    ImageDraw.Draw(picture).rectangle((400 - width, 0, 399, 399), 60)
    assert apart(found(picture).image, expected.image) < 5


def test_punched_holes_are_no_digits() -> None:
    picture = with_ink(five())
    for y in (60, 280):
        ImageDraw.Draw(picture).ellipse((10, y, 80, y + 70), 30)
    digit = found(picture)
    assert "2 other things dropped" in digit.steps
    assert apart(digit.image, found(with_ink(five())).image) < 5
    assert len(split_digits(picture)) == 1


@pytest.mark.parametrize("shape", ["rectangle", "ellipse"])
def test_a_frame_around_a_digit_is_left_out(shape: str) -> None:
    picture = with_ink(five())
    getattr(ImageDraw.Draw(picture), shape)((60, 60, 340, 340), outline=0, width=6)
    assert apart(found(picture).image, found(with_ink(five())).image) < 5
    assert len(split_digits(picture)) == 1


def test_pencil_on_squared_paper() -> None:
    picture = Image.new("L", (400, 400), 250)
    draw = ImageDraw.Draw(picture)
    for place in range(10, 400, 25):
        draw.line((0, place, 399, place), 190, 2)
        draw.line((place, 0, place, 399), 190, 2)
    picture.paste(140, (100, 100), Image.eval(five(), lambda level: 255 - level))
    digit = found(picture)
    assert "16 ruled lines dropped" in digit.steps
    assert apart(digit.image, found(five()).image) < 12


def test_what_the_edge_cuts_off_is_told_where_digits_are_whole() -> None:
    sheet = Image.new("L", (400, 200), 255)
    sheet.paste(five(), (0, 0))
    ImageDraw.Draw(sheet).rectangle((375, 20, 399, 119), 0)
    (digit,) = split_digits(sheet)
    assert "1 large piece at the edge left out" in digit.steps


@pytest.mark.parametrize("num", [1, 2, 3, 5])
@pytest.mark.parametrize("tone", [0, 90])
def test_dark_ruled_lines_go_and_are_no_bars(num: int, tone: int) -> None:
    expected = with_ink(five())
    picture = expected.copy()
    for line in range(num):
        y = 290 if num == 1 else 60 + 280 * line // (num - 1)
        ImageDraw.Draw(picture).line((0, y, 399, y), tone, 3)
    digit = found(picture)
    assert not any("cut away" in step for step in digit.steps)
    assert apart(digit.image, found(expected).image) < 12


@pytest.mark.parametrize("width", [40, 48, 56])
def test_a_thick_zero_is_no_sheet(width: int) -> None:
    picture, draw = page((300, 300))
    draw.rounded_rectangle((80, 50, 220, 250), 40, outline=0, width=width)
    digit = found(picture)
    assert not any("cut away" in step for step in digit.steps)
    assert (digit.image > 127).sum() > 150


@pytest.mark.parametrize(("size", "left", "width"), [((120, 400), 35, 50), ((200, 400), 60, 80)])
def test_a_stroke_cut_out_tightly_is_no_screenshot(size: tuple[int, int], left: int, width: int) -> None:
    picture, draw = page(size)
    draw.rectangle((left, 0, left + width, size[1]), 0)
    assert extent(found(picture).image)[0] == 20


def test_a_digit_cut_out_tightly_is_kept_beside_a_speck() -> None:
    picture, draw = page((100, 140))
    draw.line((0, 6, 99, 6), 0, 13)
    draw.line((93, 6, 40, 139), 0, 13)
    draw.ellipse((10, 110, 17, 117), 0)
    image = found(picture).image
    assert (image[image.any(1)][1] > 127).sum() >= 12


def test_a_zero_with_its_stroke_inside_is_no_frame() -> None:
    picture, draw = page((300, 300))
    draw.ellipse((80, 40, 220, 260), outline=0, width=18)
    zero = found(picture)
    draw.line((120, 200, 180, 100), 0, 14)
    assert apart(found(picture).image, zero.image) < 15


def test_a_grey_smudge_is_no_digit_beside_a_bold_one() -> None:
    expected = with_ink(five(), size=(600, 400))
    picture = expected.copy()
    ImageDraw.Draw(picture).ellipse((20, 60, 160, 330), 150)
    assert apart(found(picture).image, found(expected).image) < 5


@pytest.mark.parametrize("bright", [False, True])
@pytest.mark.parametrize("times", [1, 10])
def test_a_digit_cut_out_along_its_ink_is_that_with_a_margin(
    digits: np.ndarray, real_digits: Digits, times: int, bright: bool
) -> None:
    if len(real_digits.images) < 70_000:
        pytest.skip("the bundled digits, 8x8 enlarged, are as thick as blots")
    distances = []
    for image in digits:
        rows, columns = (np.flatnonzero((image > 60).any(axis)) for axis in (1, 0))
        cut = Image.fromarray(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
        if np.asarray(cut).mean() > 0.5 * 255:  # little is left of the paper
            continue
        cut = cut.resize((cut.width * times, cut.height * times), Image.Resampling.BICUBIC)
        picture = cut if bright else ImageOps.invert(cut)
        with_margin = ImageOps.expand(picture, 10 * times, 0 if bright else 255)
        digit = normalize(picture)
        distances.append(255.0 if digit is None else apart(digit.image, found(with_margin).image))
    assert len(distances) > 20
    assert np.mean(np.array(distances) < 8) >= 0.95


@pytest.mark.parametrize("bright", [False, True])
@pytest.mark.parametrize("side", [30, 300])
@pytest.mark.parametrize("kind", ["0", "3", "7", "8"])
def test_a_drawn_digit_cut_out_along_its_ink_is_that_with_a_margin(kind: str, side: int, bright: bool) -> None:
    picture, draw = page((400, 400))
    if kind == "0":
        draw.ellipse((100, 50, 300, 350), outline=0, width=50)
    elif kind == "3":
        draw.arc((110, 50, 290, 210), -150, 90, 0, 45)
        draw.arc((110, 165, 290, 350), -90, 150, 0, 45)
    elif kind == "7":
        draw.line((100, 75, 300, 75), 0, 50)
        draw.line((280, 75, 170, 350), 0, 50)
    else:
        draw.ellipse((120, 50, 280, 215), outline=0, width=45)
        draw.ellipse((100, 170, 300, 350), outline=0, width=45)
    cut = picture.crop(ImageOps.invert(picture).getbbox())
    cut = cut.resize((round(side * cut.width / cut.height), side), Image.Resampling.LANCZOS)
    if bright:
        cut = ImageOps.invert(cut)
    digit = found(cut)
    assert "margin added" in digit.steps
    assert ("inverted" in digit.steps) is not bright
    assert apart(digit.image, found(ImageOps.expand(cut, side // 2, 0 if bright else 255)).image) < 5


def test_split_keeps_a_one_beside_specks_and_drops_a_bar_beside_ones() -> None:
    picture, draw = page((900, 600))
    for left in (100, 200, 300, 400):
        draw.line((left, 200, left, 300), 0, 8)  # as thin as a bar, but as high as each other
    draw.line((700, 20, 700, 580), 0, 8)
    assert len(split_digits(picture)) == 4
    picture, draw = page((900, 600))
    for left in (100, 300, 500, 700):
        draw.line((left, 200, left, 400), 0, 8)
    for left in (160, 360, 560):
        draw.rectangle((left, 300, left + 20, 335), 0)
    digits = split_digits(picture)
    assert len(digits) == 4
    assert all(extent(digit.image)[1] <= 4 for digit in digits)  # no speck of 21 x 36


def test_ruled_paper_gets_no_margin() -> None:
    picture, draw = page((300, 300))
    for at in range(5, 300, 12):
        draw.line((0, at, 299, at), 90, 3)
        draw.line((at, 0, at, 299), 90, 3)
    assert "margin added" not in (normalize(picture) or Digit28(np.zeros((28, 28), np.uint8), ())).steps


def test_a_shadow_across_a_photo_gets_no_margin() -> None:
    y, x = np.mgrid[:450, :600]
    shadow = ndimage.gaussian_filter((np.abs(x - 300 - 1.2 * (y - 225)) < 100).astype(float), 4)
    light = Image.fromarray((200 - 90 * shadow).astype(np.uint8))
    ImageDraw.Draw(light).line((300, 100, 300, 350), 25, 40)
    assert add_margin(light) == (light, ())


def sheet_of_bars(num: int = 6) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Two rows of upright strokes, each 16 x 80."""
    picture, draw = page((120 * num // 2 + 80, 400))
    for i in range(num):
        row, column = divmod(i, num // 2)
        left, top = 90 + 120 * column, 70 + 180 * row
        draw.rectangle((left, top, left + 15, top + 79), 0)
    return picture, draw


@pytest.mark.parametrize("kind", ["frame", "table", "bar"])
def test_split_reads_what_is_in_a_frame_a_table_and_beside_a_bar(kind: str) -> None:
    picture, draw = sheet_of_bars()
    width, height = picture.size
    if kind == "bar":
        draw.line((30, 20, 30, height - 20), 0, 6)
    else:
        draw.rectangle((30, 20, width - 30, height - 20), outline=0, width=6)
    if kind == "table":
        draw.line((30, 200, width - 30, 200), 0, 6)
        for left in (160, 280):
            draw.line((left, 20, left, height - 20), 0, 6)
    digits = split_digits(picture)
    expected = split_digits(sheet_of_bars()[0])
    assert len(digits) == len(expected) == 6
    for digit, other in zip(digits, expected, strict=True):
        assert apart(digit.image, other.image) < 5
        assert "1 other thing dropped" in digit.steps


@pytest.mark.parametrize("shape", ["disc", "splash", "pen"])
def test_split_reads_what_is_beside_a_blot_or_a_pen(shape: str) -> None:
    picture, _ = sheet_of_bars()
    wide, wide_draw = page((1400, 900))
    wide.paste(picture, (0, 0))
    if shape == "pen":
        wide_draw.line((500, 850, 1200, 450), 60, 90)
    for left, top, side in ((700, 300, 400), (640, 520, 200))[: {"disc": 1, "splash": 2, "pen": 0}[shape]]:
        wide_draw.ellipse((left, top, left + side, top + side), 60)
    digits, expected = split_digits(wide), split_digits(picture)
    assert len(digits) == len(expected) == 6
    for digit, other in zip(digits, expected, strict=True):
        assert apart(digit.image, other.image) < 5
        assert "1 other thing dropped" in digit.steps


def test_split_keeps_a_heading_that_is_larger_than_the_digits_below() -> None:
    picture, draw = page((1000, 900))
    draw.line([(300, 130), (480, 130), (380, 380)], 0, 60)  # over 20 times the ink of the others
    for left in range(100, 900, 120):
        draw.line([(left, 604), (left + 40, 604), (left + 20, 700)], 0, 7)
    assert len(split_digits(picture)) == 8


def form(touched: bool) -> Image.Image:
    """Six cells in a row with a seven in each; the second's, if touched, at its cell's right and upper line."""
    picture, draw = page((900, 300))
    draw.rectangle((60, 60, 840, 240), outline=60, width=4)
    for column in range(6):
        left, top = 60 + 130 * column, 60
        draw.line((left, top, left, 240), 60, 4)
        x, y = (left + 42, top + 6) if touched and column == 1 else (left + 15, top + 30)
        draw.line([(x, y), (x + 82, y), (x + 35, y + 110)], 0, 14)
    return picture


@pytest.mark.parametrize("angle", [0, 1])
def test_split_frees_a_digit_that_touches_its_cell(angle: int) -> None:
    parts = [
        split_digits(form(touched).rotate(angle, Image.Resampling.BICUBIC, fillcolor=255)) for touched in (False, True)
    ]
    assert [len(digits) for digits in parts] == [6, 6]
    assert "frame dropped" not in parts[0][0].steps
    assert "frame dropped" in parts[1][0].steps
    for free, other in zip(*parts, strict=True):
        assert apart(free.image, other.image) < 12


def test_split_keeps_small_digits_that_stand_on_the_line() -> None:
    picture, draw = page((900, 500))
    for left, top in ((100, 100), (200, 210), (300, 100), (400, 220)):
        draw.rectangle((left, top, left + 30, 299), 0)
    assert len(split_digits(picture)) == 4


def test_split_lives_with_a_line_of_a_pixel_along_the_diagonal() -> None:
    for start, end in (((100, 100), (700, 700)), ((700, 100), (100, 700))):
        picture, draw = page((900, 900))
        draw.line((*start, *end), 0, 1)
        for k in range(5):
            draw.line((750, 100 + 60 * k, 750, 118 + 60 * k), 0, 1)
        assert split_digits(picture)


@pytest.mark.parametrize("share", [0.33, 0.4, 0.45])
def test_split_takes_a_comma_for_no_digit_and_a_raised_one_for_one(share: float) -> None:
    for bottom, num in ((300 + round(90 * share), 4), (120 + round(200 * share), 5)):
        picture, draw = page((900, 500))
        for left in (100, 200, 420, 520):
            draw.rectangle((left, 100, left + 30, 299), 0)
        draw.rectangle((300, bottom - round(200 * share), 320, bottom), 0)
        digits = split_digits(picture)
        assert len(digits) == num
        assert all(("1 small piece left out" in digit.steps) == (num == 4) for digit in digits)


@pytest.mark.parametrize("rows", [8, 14])
def test_split_reads_a_table_of_many_rows(rows: int) -> None:
    picture, draw = page((600, 80 + 100 * rows))
    for row in range(rows + 1):
        draw.line((40, 40 + 100 * row, 560, 40 + 100 * row), 0, 4)
    for column in range(5):
        draw.line((40 + 130 * column, 40, 40 + 130 * column, 40 + 100 * rows), 0, 4)
    for row in range(rows):
        for column in range(4):
            draw.rectangle((100 + 130 * column, 60 + 100 * row, 108 + 130 * column, 119 + 100 * row), 0)
    digits = split_digits(picture)
    assert len(digits) == 4 * rows
    assert all("1 other thing dropped" in digit.steps for digit in digits)
    assert all(extent(digit.image)[0] == 20 for digit in digits)


def test_split_finds_nothing_on_blank_paper_however_noisy() -> None:
    for sigma in (4, 8):
        noisy = np.random.default_rng(sigma).normal(190, sigma, (900, 1200)).clip(0, 255)
        assert split_digits(Image.fromarray(noisy.astype(np.uint8))) == []


def test_split_tells_of_what_is_far_smaller_than_the_others() -> None:
    picture, draw = page((900, 500))
    for left in (100, 300, 500):
        draw.rectangle((left, 80, left + 60, 400), 0)
    draw.rectangle((700, 200, 730, 270), 0)
    digits = split_digits(picture)
    assert len(digits) == 3
    assert all("1 small piece left out" in digit.steps for digit in digits)


@pytest.mark.parametrize(
    ("num_large", "height", "rows", "gap"),
    [(1, 260, [7, 7, 7, 7], 20), (1, 170, [7], 60), (3, 240, [10], 45), (3, 180, [5], 45)],
)
def test_split_reads_lines_of_small_digits_below_larger_ones(
    num_large: int, height: int, rows: list[int], gap: int
) -> None:
    picture, draw = page((1000, 900))
    for column in range(num_large):
        draw.rectangle((60 + 200 * column, 30, 80 + 200 * column, 29 + height), 0)
        draw.rectangle(
            (60 + 200 * column, 9 + height, 160 + 200 * column, 29 + height), 0
        )  # with a foot, or it is a bar
    for row, num in enumerate(rows):
        top = 30 + height + gap + 100 * row
        for column in range(num):
            draw.rectangle((55 + 90 * column, top, 65 + 90 * column, top + 79), 0)
    lines = [digit.line for digit in split_digits(picture)]
    assert lines == [1] * num_large + [2 + row for row, num in enumerate(rows) for _ in range(num)]


@pytest.mark.parametrize(("num_whole", "num_broken"), [(1, 1), (2, 2), (3, 3), (4, 2)])
def test_split_joins_the_parts_of_broken_digits(num_whole: int, num_broken: int) -> None:
    picture, draw = page((1000, 300))
    for column in range(num_whole + num_broken):
        left = 60 + 130 * column
        draw.line([(left, 85), (left + 20, 135), (left, 185)], 0, 11)
        for top in (113, 151) if column >= num_whole else ():
            draw.rectangle((left - 10, top, left + 40, top + 4), 255)  # into three
    digits = split_digits(picture)
    assert len(digits) == num_whole + num_broken
    assert all(extent(digit.image)[0] == 20 for digit in digits)


def test_split_takes_a_line_to_write_on_for_no_part_of_the_digit_above_it() -> None:
    picture, draw = page((900, 600))
    for left in (100, 300, 500, 700):
        for top in (60, 260):
            draw.line([(left + 80 * x, top + 100 * y) for x, y in STROKES[7][0]], 0, 6)
            draw.line((left, top + 95, left + 80, top + 95), 0, 3)
    digits = split_digits(picture)
    assert len(digits) == 8
    alone, pen = page()
    pen.line([(60 + 80 * x, 50 + 100 * y) for x, y in STROKES[7][0]], 0, 6)
    assert all(apart(digit.image, found(alone).image) < 8 for digit in digits)


def test_split_takes_the_bar_of_a_fraction_for_a_piece_of_neither_digit() -> None:
    picture, draw = page((800, 500))
    for left, top in ((100, 150), (250, 150), (500, 60), (500, 200)):
        draw.rectangle((left, top, left + 12, top + 99), 0)
    draw.rectangle((440, 176, 572, 183), 0)
    digits = split_digits(picture)
    assert len(digits) == 4
    assert all("1 small piece left out" in digit.steps for digit in digits)
