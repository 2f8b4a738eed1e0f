"""uvicorn's HTTP/1.1 connections, with a time-out that it lacks: for clients who never finish asking."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0


class TimedConnection(H11Protocol):
    """A connection that is closed when the head of a request is not here ``HEAD_SECONDS`` after it could have begun.

    Without it a few thousand clients who send a byte now and then hold all the connections there are: uvicorn's own
    time-out is between requests, and any byte ends it. h11, though slower than httptools, also limits how large a head
    may grow.
    """

    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.stop_watching()

    def watch_head(self) -> None:
        """Start the timer where a head is due or has begun, stop it where it has been read whole."""
        first = self.cycle is None
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        refused = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY  # and still being sent
        if not (first or begun or refused):
            self.stop_watching()
        elif self.head_timer is None:
            self.head_timer = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def stop_watching(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None
