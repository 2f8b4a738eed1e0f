"""Web pages that open from disk with no network."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np


def render_page(template: str, **values: Any) -> bytes:
    """Fill one of the templates beside this file; text is escaped.

    Args:
        template: its file name in ``templates/``.
        values: what it shows; naming one that the template uses and leaving it out is an error.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("digitnet.study"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values).encode()


def embed_png(png: bytes) -> str:
    """The bytes of a PNG as a ``data:`` address, so that a page carries its pictures with it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def embed_digit(image: np.ndarray) -> str:
    """One digit (28, 28) uint8, bright ink on 0, as a ``data:`` address of dark ink on white."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(255 - image).save(buffer, "PNG", optimize=True)
    return embed_png(buffer.getvalue())
