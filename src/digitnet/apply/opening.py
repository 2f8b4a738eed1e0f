"""A picture's file -> its pixels, upright, within limits, and of any mode in grey or colour, on paper."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from digitnet.apply.ink import MIN_CONTRAST

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")
MAX_PIXELS, MAX_SIDE = 64_000_000, 16_384  # above what phones take; up to 0.6 GB while decoded
MAX_PAGES = 100  # are counted
SHEET_SIDE = 1536  # a sheet of digits is looked at in this size

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # ours is the stricter limit


def open_picture(source: Path | BinaryIO | bytes) -> Image.Image:
    """Decode a picture, whatever its mode, and turn it as its EXIF data say; the first of several pages or frames.

    Args:
        source: a file's path, its content, or a file opened for reading bytes.

    Raises:
        ValueError: in one line, without the name, when this is not a picture, is damaged, or is too large to decode
            safely; the size is read from the header.
    """
    if isinstance(source, Path):
        if source.is_dir():
            raise ValueError("a folder, not a picture")
        try:
            source = source.read_bytes()
        except OSError as error:
            raise ValueError(error.strerror.lower() if error.strerror else str(error)) from error
    data = source if isinstance(source, bytes) else source.read()
    if not data:
        raise ValueError("empty: 0 bytes")
    try:
        picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"too large: {str(error).split(',')[0].lower()}; the limit is {MAX_PIXELS:,}") from error
    except Exception as error:  # a broken header can fail in any way
        hint = "; save a HEIC, AVIF or PDF as one of these" if data[4:8] == b"ftyp" or data[:4] == b"%PDF" else ""
        raise ValueError(f"not a picture in a known format ({', '.join(FORMATS)}){hint}") from error
    width, height = picture.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(
            f"too large: {width:,} x {height:,} pixels; the limit is {MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side"
        )
    try:
        is_photo = picture.format in ("JPEG", "MPO")  # the second with a preview behind
        if is_photo:
            picture.draft("RGB", (SHEET_SIDE, SHEET_SIDE))  # decodes a large photo at half size or less, much faster
        is_turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        picture.load()  # which turns a TIFF by itself
        num_pages = 1 if is_photo else count_pages(data)
        if is_turned:
            picture = ImageOps.exif_transpose(picture)
        picture = shrink(picture)
    except Exception as error:  # so can broken content
        raise ValueError("damaged: the picture breaks off or cannot be decoded") from error
    number = f"{num_pages} or more" if num_pages == MAX_PAGES else f"{num_pages}"
    steps = ("turned by EXIF" if is_turned else "", f"first of {number} pages" if num_pages > 1 else "")
    picture.info["steps"] = tuple(filter(None, steps))
    return picture


def shrink(picture: Image.Image) -> Image.Image:
    """A picture of at least twice SHEET_SIDE, reduced by a whole factor, as ``draft`` does with a JPEG.

    What is done with it afterwards takes several times its pixels' memory.
    """
    factor = max(picture.size) // SHEET_SIDE
    if factor < 2:
        return picture
    if picture.has_transparency_data:
        mode = "LA" if picture.mode == "LA" else "RGBA"
    elif picture.mode.startswith(("I", "F")):
        mode = picture.mode[0]
    else:
        mode = "L" if picture.mode in ("1", "L") else "RGB"
    return (picture if picture.mode == mode else picture.convert(mode)).reduce(factor)  # a copy costs its size


def count_pages(data: bytes) -> int:
    """How many pages or frames a picture has, up to MAX_PAGES."""
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    if picture.format != "TIFF":
        return min(getattr(picture, "n_frames", 1), MAX_PAGES)
    for number in range(1, MAX_PAGES):  # of these each is looked for, which takes milliseconds
        try:
            picture.seek(number)
        except Exception:  # there is none, or what is there cannot be read
            return number
    return MAX_PAGES


def flatten(picture: Image.Image) -> Image.Image:
    """The picture in mode "L" or "RGB": 16 bits to 8, transparent to white, or to black when white shows nothing."""
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, np.float32)
        if not np.isfinite(values).all():
            raise ValueError("damaged: some pixels are not finite numbers")
        if picture.mode == "F" and values.max() <= 1:  # levels as fractions
            values = values * 255
        top = 2 ** np.ceil(np.log2(max(float(values.max()), 255) + 1)) - 1  # 255 for 8 bits, 4,095 for 12, 65,535
        return Image.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        alpha = np.asarray(layer.getchannel("A"))
        solid = alpha >= 0.9 * alpha.max()  # bright ink may have darker edges, as some programs draw
        for paper in ("white", "black"):
            flat = Image.new("RGBA", layer.size, paper)
            flat.alpha_composite(layer)
            if paper == "black" or np.asarray(flat.convert("RGB"))[solid].min() < 255 - MIN_CONTRAST:
                break
        return drop_colour(flat.convert("RGB"))
    return picture.convert("L") if picture.mode in ("1", "L") else drop_colour(picture.convert("RGB"))


def drop_colour(picture: Image.Image) -> Image.Image:
    """A picture in mode "RGB" that holds nothing but grey, in mode "L"; others as they are."""
    colours = picture.getcolors(256)
    is_grey = colours and all(isinstance(colour, tuple) and len(set(colour)) == 1 for _, colour in colours)
    return picture.convert("L") if is_grey else picture
