"""Many callers, one network: what waits at the same time is read in one pass, off the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

Answer = TypeVar("Answer")


class BusyError(RuntimeError):
    """Everything there is to share out is taken; come back later."""


class Budget:
    """Something there is only so much of, such as places in a queue or bytes of memory.

    Args:
        total: how much of it there is.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.taken = 0

    @contextlib.contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Give a function that takes some of it; what it took is given back when the block ends.

        The function raises BusyError, and takes nothing, when less is left than it asks for.
        """
        taken = 0

        def take(amount: int) -> None:
            nonlocal taken
            if self.taken + amount > self.total:
                raise BusyError
            self.taken += amount
            taken += amount

        try:
            yield take
        finally:
            self.taken -= taken


class Job(NamedTuple):
    """One image, and the caller who waits for its answer."""

    image: np.ndarray
    answer: asyncio.Future[Any]


class Batcher(Generic[Answer]):
    """Reads images in batches as large as the number of callers who wait at that moment: a lone one never waits.

    Use it as ``async with Batcher(read_batch) as batcher: await batcher.read(image)``. Leaving the block
    cancels who still waits, and ends when the batch under way has.

    Args:
        read_batch: from images (B, H, W) to B answers; called in a thread, never twice at a time.
        max_batch: the largest B.
    """

    def __init__(self, read_batch: Callable[[np.ndarray], Sequence[Answer]], max_batch: int = 64) -> None:
        self.read_batch = read_batch
        self.max_batch = max_batch
        self.jobs: asyncio.Queue[Job] = asyncio.Queue()

    async def __aenter__(self) -> Batcher[Answer]:
        self.thread = ThreadPoolExecutor(1, "network")
        self.worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.worker.cancel()
        await asyncio.wait([self.worker])
        while not self.jobs.empty():
            self.jobs.get_nowait().answer.cancel()
        self.thread.shutdown()

    async def read(self, image: np.ndarray) -> Answer:
        """Read one image (H, W), together with whoever else is waiting."""
        job = Job(image, asyncio.get_running_loop().create_future())
        self.jobs.put_nowait(job)
        answer: Answer = await job.answer
        return answer

    async def _work(self) -> None:
        while True:
            jobs = [await self.jobs.get()]
            while not self.jobs.empty() and len(jobs) < self.max_batch:
                jobs.append(self.jobs.get_nowait())
            await self._read_jobs([job for job in jobs if not job.answer.done()])  # done: the caller gave up

    async def _read_jobs(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        images = np.stack([job.image for job in jobs])  # (B, H, W)
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self.thread, self.read_batch, images)
        except asyncio.CancelledError:
            for job in jobs:
                job.answer.cancel()
            raise
        except Exception as error:  # whatever it is, it is the callers' to hear
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(error)
            return
        for job, answer in zip(jobs, answers, strict=True):
            if not job.answer.done():
                job.answer.set_result(answer)
