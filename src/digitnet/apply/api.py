"""The page and the JSON API in front of a predictor: ``/``, ``POST /predict``, ``/healthz``, ``/openapi.json``.

Whatever a client sends, it costs no more than the limits below, and is answered in one line.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import multiprocessing
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import MutableHeaders, UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import digitnet
from digitnet.apply.batching import Batcher, Budget, BusyError
from digitnet.apply.imaging import Digit28, normalize
from digitnet.apply.ink import MIN_CONTRAST, Invert
from digitnet.apply.inputs import leave_with_parent
from digitnet.apply.opening import open_picture
from digitnet.apply.predictor import Predictor, Reading
from digitnet.cores import count_cores
from digitnet.errors import to_one_line

MAX_BYTES = 10 * 2**20  # of one picture; a phone's photo has 2 to 6 MiB
MAX_JSON_BYTES = 64 * 2**10  # 784 numbers, however much space is between them
MAX_HELD_BYTES = 256 * 2**20  # of all pictures that are being received or read
MAX_WAITING = 128  # requests that are being read; one more is told to come back
BODY_SECONDS = 20.0  # a picture must be here by then: 10 MiB at 4 Mbit/s

# The page needs nothing from elsewhere, so nothing from elsewhere is allowed in.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # ask again: files carry an ETag
}

JSON, FORM = "application/json", "multipart/form-data"
Probability = Annotated[float, Field(ge=0, le=1)]
Level = Annotated[int, Field(ge=0, le=255, strict=True)]
Row = Annotated[list[Level], Field(min_length=28, max_length=28)]


class Pixels(BaseModel):
    """An image as MNIST has them: 28 rows of 28 grey levels, bright ink on 0."""

    model_config = ConfigDict(extra="forbid")
    pixels: Annotated[list[Row], Field(min_length=28, max_length=28)]


class Answer(BaseModel):
    """What the network reads in one picture; probabilities are calibrated."""

    status: Literal["ok", "uncertain", "no digit"]
    digit: Annotated[int, Field(ge=0, le=9)] | None = Field(description="the best guess, also when uncertain")
    confidence: Probability | None = Field(description="probability of the best guess")
    runner_up: Annotated[int, Field(ge=0, le=9)] | None
    runner_up_confidence: Probability | None
    probabilities: list[Probability] | None = Field(description="of the digits 0 to 9; null when no ink was found")
    steps: list[str] = Field(description="what was done to the picture")
    image: str | None = Field(description="the 28x28 image that the network saw: a PNG, base64")


class Problem(BaseModel):
    """What went wrong, in one line."""

    error: str


class Health(BaseModel):
    """That the server is there, and which version it is."""

    status: Literal["ok"]
    version: str


class Options(BaseModel):
    """What may stand behind the question mark."""

    model_config = ConfigDict(extra="forbid")
    invert: Invert = Field("auto", description="yes: ink is darker than paper; no: brighter; auto: look")


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"description": "an empty or broken body"},
    408: {"description": f"the body took longer than {BODY_SECONDS:.0f} s"},
    413: {"description": f"more than {MAX_BYTES:,} bytes, or too many pixels"},
    415: {"description": "neither a picture, nor a form with one, nor JSON"},
    422: {"description": "no picture that can be read, or no 28 x 28 values"},
    500: {"description": "a mistake of the server's; its log says which"},
    503: {"description": "too many requests wait already; try again later"},
}
PICTURE = {"type": "string", "format": "binary"}
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": PICTURE},
            "application/octet-stream": {"schema": PICTURE},
            FORM: {"schema": {"type": "object", "required": ["file"], "properties": {"file": PICTURE}}},
            JSON: {"schema": Pixels.model_json_schema()},
        },
    }
}


def create_app(predictor: Predictor | None = None) -> FastAPI:
    """The server's application.

    Args:
        predictor: reads the images; by default that of the checkpoint which the variable ``DIGITNET_CKPT_PATH`` names,
            or else of the newest run's best. With it, any ASGI server can start any number of processes:
            ``uvicorn --factory digitnet.apply.api:create_app --workers 4``.
    """
    if predictor is None:
        if multiprocessing.parent_process() is not None:  # one of several that a supervisor started
            leave_with_parent()
        path = os.environ.get("DIGITNET_CKPT_PATH")
        predictor = Predictor.load(Path(path) if path else None)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a broken form is told to who sent it
    batcher = Batcher[Reading](predictor.read)
    places, held_bytes = Budget(MAX_WAITING), Budget(MAX_HELD_BYTES)
    threads = ThreadPoolExecutor(min(4, count_cores()), "picture")  # few: a large picture takes up to 0.6 GB of memory

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with threads:
            async with batcher:
                yield

    app = FastAPI(
        title="digitnet",
        version=digitnet.__version__,
        description="Reads handwritten digits.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        exception_handlers={
            StarletteHTTPException: answer_http_error,
            RequestValidationError: answer_invalid,
            Exception: answer_failure,
        },
    )
    app.add_middleware(PageHeaders)

    @app.post(
        "/predict", openapi_extra=BODY, responses={code: {"model": Problem, **more} for code, more in PROBLEMS.items()}
    )
    async def predict(request: Request, options: Annotated[Options, Query()]) -> Answer:
        """Read the digit in a picture: the file itself, a form with one file, or 28 x 28 values as JSON."""
        try:
            with held_bytes.hold() as take_bytes, places.hold() as take_places:
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                body = await receive_body(request, MAX_JSON_BYTES if kind == JSON else MAX_BYTES, take_bytes)
                prepare: Callable[[], Digit28 | None]
                if kind == JSON:
                    prepare = partial(parse_pixels, body, options.invert)
                else:
                    prepare = partial(parse_picture, await find_picture(request, kind, body), options.invert)
                take_places(1)  # only now: who sends slowly keeps nobody from being read
                digit = await asyncio.get_running_loop().run_in_executor(threads, prepare)
                return describe(digit, None if digit is None else await batcher.read(digit.image))
        except BusyError:
            problem = "too many requests wait already; try again in a second"
            raise HTTPException(503, problem, headers={"Retry-After": "1"}) from None

    @app.api_route("/predict", methods=["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"], include_in_schema=False)
    async def explain() -> None:
        """Whoever types the address into a browser is told what it is for; the files below would say 404."""
        raise HTTPException(405, "send a picture with POST; /openapi.json says how", headers={"Allow": "POST"})

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> Health:
        """Whether the server is there."""
        return Health(status="ok", version=digitnet.__version__)

    app.mount("/", StaticFiles(directory=Path(__file__).with_name("web"), html=True))
    return app


async def receive_body(request: Request, limit: int, take_bytes: Callable[[int], None]) -> bytes:
    """The body of a request, no more of it than the limit, and no later than ``BODY_SECONDS``.

    Args:
        request: of which nothing has been read.
        limit: bytes.
        take_bytes: called with the size of each piece before it is kept.

    Raises:
        HTTPException: 400 for none, 408 when it is late, 413 when it is too large, 503 when the server stops.
        BusyError: from ``take_bytes``.
    """
    close = {"Connection": "close"}
    too_large = HTTPException(413, f"the body is larger than {limit:,} bytes; send a smaller one", close)
    hopeless = 8 * limit  # up to here it is received and dropped, as not all clients listen before they have sent all
    if int(request.headers.get("content-length", 0)) > hopeless:
        raise too_large
    body, num_bytes = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                num_bytes += len(piece)
                if num_bytes > hopeless:
                    break
                if num_bytes <= limit:
                    take_bytes(len(piece))
                    body += piece
    except TimeoutError:
        raise HTTPException(408, f"the body was not here after {BODY_SECONDS:.0f} s", close) from None
    except ClientDisconnect:
        raise HTTPException(400, "the body ended early") from None
    except asyncio.CancelledError:
        raise HTTPException(503, "the server is stopping", close) from None
    if num_bytes > limit:
        raise too_large
    if not body:
        raise HTTPException(400, "the body is empty; send a picture, or JSON as in /openapi.json")
    return bytes(body)


async def find_picture(request: Request, kind: str, body: bytes) -> bytes:
    """The bytes of the picture in a body: all of it, or the one file of a form.

    Raises:
        HTTPException: 400 for a broken form or one without a single file, 415 for another kind of body.
    """
    if kind.startswith("image/") or kind in ("application/octet-stream", ""):
        return body
    if kind != FORM:
        raise HTTPException(415, f"{kind[:80]} is no kind of picture; send image/png, image/jpeg, {FORM} or {JSON}")

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, replay).form(max_files=1, max_fields=8) as form:
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            if option := next((name for name, _ in form.multi_items() if name in Options.model_fields), None):
                raise HTTPException(422, f"the form has {option}, which goes into the address: /predict?{option}=...")
            if len(files) != 1:
                raise HTTPException(400, "the form has no file; send one, for example with curl -F file=@digit.png")
            return await files[0].read()
    except FormParserError as error:  # newer versions of Starlette answer by themselves
        raise HTTPException(400, f"the form is broken: {to_one_line(str(error))}") from error


def parse_picture(picture: bytes, invert: Invert) -> Digit28 | None:
    """The 28x28 digit in a picture file; None where there is no ink.

    Raises:
        HTTPException: 413 for too many pixels, 422 for what is no picture that can be read.
    """
    try:
        return normalize(open_picture(picture), invert)
    except ValueError as error:
        reason = to_one_line(str(error))
        raise HTTPException(413 if reason.startswith("too large") else 422, reason) from error


def parse_pixels(body: bytes, invert: Invert) -> Digit28 | None:
    """The image in a JSON body, inverted if told to; None where all of it is of one level, or nearly.

    Raises:
        HTTPException: 422 for anything but 28 x 28 grey levels.
    """
    try:
        pixels = Pixels.model_validate_json(body).pixels
    except ValidationError as error:
        raise HTTPException(422, first_problem(error.errors())) from None
    image = np.array(pixels, np.uint8)
    if image.max() == 1:
        raise HTTPException(422, "pixels: 0 and 1 alone; give levels from 0 to 255")
    if np.ptp(image) < MIN_CONTRAST:
        return None
    return Digit28(255 - image, ("inverted",)) if invert == "yes" else Digit28(image, ("used as given",))


def describe(digit: Digit28 | None, reading: Reading | None) -> Answer:
    """The answer to a client; without a digit, that there is none."""
    if digit is None or reading is None:
        none = dict.fromkeys(("digit", "confidence", "runner_up", "runner_up_confidence", "probabilities", "image"))
        return Answer(status="no digit", steps=["no ink found"], **none)
    return Answer(
        **(reading._asdict() | {"probabilities": list(reading.probabilities)}),
        steps=list(digit.steps),
        image=encode_png(digit.image),
    )


def encode_png(image: np.ndarray) -> str:
    """An image (28, 28) uint8 as a PNG, base64."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def first_problem(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors in one line, such as ``pixels[3][27]: Input should be ...``."""
    first = errors[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    return to_one_line(f"{place}: {first['msg']}" if place else first["msg"])


async def answer_http_error(_: Request, error: Exception) -> JSONResponse:
    """A 4xx or 503, in the words of whoever raised it."""
    assert isinstance(error, StarletteHTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def answer_invalid(_: Request, error: Exception) -> JSONResponse:
    """A wrong parameter."""
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"error": first_problem(error.errors())}, 422)


async def answer_failure(_: Request, error: Exception) -> JSONResponse:
    """A mistake of ours: its traceback goes to the server's log, not to the client."""
    # Answered outside all middleware.
    return JSONResponse({"error": "the server failed on this request; its log says why"}, 500, HEADERS)


class PageHeaders:
    """Adds ``HEADERS`` to every response.

    Args:
        app: what answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)
