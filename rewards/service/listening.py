"""How the service listens: HTTP by uvicorn and h11, and how long a connection may keep it waiting."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

WAIT_S = 30.0
"""For the head of a request, for the rest of a body that was answered unread, and for an answer to be taken."""
_LATE = f"the head of a request did not arrive within {WAIT_S:g} s".encode()


def listening_server(app: Any, *, grace_s: int | None = None) -> uvicorn.Server:
    """h11 bounds the head of a request (16 KiB), which httptools does not; no upgrade leads to another protocol."""
    config = uvicorn.Config(
        app,
        http=WaitingProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,  # longer than clients keep theirs, so that these never write into a closing one
        timeout_graceful_shutdown=grace_s,
    )
    return uvicorn.Server(config)


class WaitingProtocol(H11Protocol):
    """uvicorn's protocol, which itself waits for ever for what a client began to send or does not read.

    The application limits the body that it reads, and `timeout_keep_alive` the time between two requests.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def _watch(self) -> None:
        """The time runs from the moment it became the client's turn."""
        in_work = self.cycle is not None and not self.cycle.response_complete
        kept_alive = self.timeout_keep_alive_task is not None and self.conn.their_state is h11.IDLE
        waiting = self.flow.write_paused or not (in_work or kept_alive)
        if self._timer is not None and (not waiting or self.transport.is_closing()):
            self._timer.cancel()
            self._timer = None
        elif self._timer is None and waiting and not self.transport.is_closing():
            self._timer = self.loop.call_later(WAIT_S, self._end)

    def _end(self) -> None:
        if self.transport.is_closing():
            return
        if self.flow.write_paused or self.conn.our_state is not h11.IDLE:
            self.transport.abort()
            return
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        events = h11.Response(status_code=408, headers=headers), h11.Data(data=_LATE), h11.EndOfMessage()
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()
