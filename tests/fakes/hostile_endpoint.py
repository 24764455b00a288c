"""An HTTP endpoint that answers every request with something that does not end, grows or leads elsewhere."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BOMB = gzip.compress(bytes(64 * 2**20), 1)
MEANNESS = ("endless", "dripping", "gzip bomb", "nested", "redirect", "redirect for ever")


class HostileEndpoint:
    """kind: one of `MEANNESS`. elsewhere: URL that redirects lead to, by default itself.

    asked: the headers of each request. sent: bytes of bodies.
    """

    def __init__(self, kind: str, elsewhere: str | None = None) -> None:
        assert kind in MEANNESS
        self.kind, self.asked, self.sent, self._ended = kind, [], 0, False
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                endpoint.asked.append(dict(self.headers))
                self.rfile.read(int(self.headers.get("content-length", 0)))
                self.send_response(307 if "redirect" in kind else 200)
                self.send_header("content-type", "application/json")
                if "redirect" in kind:
                    self.send_header("location", (elsewhere or endpoint.url) + "/further")
                if kind == "gzip bomb":
                    self.send_header("content-encoding", "gzip")
                self.end_headers()
                for part in endpoint.parts():
                    try:
                        self.wfile.write(part)
                        self.wfile.flush()
                    except OSError:
                        return
                    endpoint.sent += len(part)

            do_GET = do_POST = answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.base_url = f"{self.url}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def parts(self) -> Iterator[bytes]:
        """The body, which ends with the connection."""
        if self.kind == "gzip bomb":
            yield BOMB
        if self.kind == "nested":
            yield b"[" * 2**20
        while self.kind in ("endless", "dripping") and not self._ended:
            yield b" " * (2**16 if self.kind == "endless" else 1)
            if self.kind == "dripping":
                time.sleep(0.05)

    def __enter__(self) -> HostileEndpoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)
