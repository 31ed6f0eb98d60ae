"""A page on this machine that shows pictures as they are drawn (Motion JPEG), by Python's own server."""

import contextlib
import secrets
import threading
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT = 7861  # or, where that is taken, any free one
HOST = "127.0.0.1"  # what a camera sees leaves this machine by nobody's mistake
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>dfer: {title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 980px; padding: 12px; }}
h1 {{ font-size: 22px; margin: 0 0 8px; }} img {{ display: block; width: 100%; border-radius: 4px; }}
p {{ margin: 8px 0; }}
</style>
<h1>{title}</h1><img src="stream" alt="the camera's picture, its faces and their numbers">{words}</html>
"""


class LivePage:
    """Serves the page and the newest picture; whoever looks too slowly misses pictures, and holds up nobody.

    Its address has a word that nobody can guess, so that other users of the machine and other pages in the browser
    cannot look.

    Args:
        title: above the picture.
        words: paragraphs below it.
    """

    def __init__(self, title: str, words: list[str]):
        paragraphs = "".join(f"<p>{escape(line)}</p>" for line in words)
        self._page = _PAGE.format(title=escape(title), words=paragraphs).encode()
        self._picture, self._number, self._ended = b"", 0, False
        self._changed = threading.Condition()
        self._word = secrets.token_urlsafe(9)
        self._server = _listen(self)
        self.url = f"http://{HOST}:{self._server.server_address[1]}/{self._word}/"

    def __enter__(self) -> "LivePage":
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="page", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def show(self, jpeg: bytes) -> None:
        """Have all who look get this picture."""
        with self._changed:
            self._picture, self._number = jpeg, self._number + 1
            self._changed.notify_all()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer a request; that for the stream is over when the page is, or nobody looks."""
        kinds = {f"/{self._word}/": "text/html; charset=utf-8"}
        kinds[f"/{self._word}/stream"] = "multipart/x-mixed-replace; boundary=picture"
        if handler.path not in kinds:
            handler.send_error(404)
            return
        handler.send_response(200)
        handler.send_header("Content-Type", kinds[handler.path])
        handler.send_header("Cache-Control", "no-store")
        handler.send_header("Cross-Origin-Resource-Policy", "same-origin")
        handler.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'")
        handler.end_headers()
        with contextlib.suppress(OSError):  # who looked has gone
            if handler.path.endswith("/stream"):
                self._stream(handler)
            else:
                handler.wfile.write(self._page)

    def _stream(self, handler: BaseHTTPRequestHandler) -> None:
        sent = 0
        handler.wfile.write(b"--picture\r\n")
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._number > sent)  # noqa: B023 (called here)
                if self._ended:
                    return
                picture, sent = self._picture, self._number
            head = f"Content-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
            # Browsers show a picture once they have read the line that begins the next one.
            handler.wfile.write(head.encode() + picture + b"\r\n--picture\r\n")


def _listen(page: LivePage) -> ThreadingHTTPServer:
    """Return a server on the usual port, or on a free one."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # for one that asks nothing, or takes nothing

        def do_GET(self) -> None:
            page.answer(self)

        def log_message(self, *_: object) -> None:
            """Say nothing on the terminal, which has the numbers."""

    for port in (PORT, 0):
        with contextlib.suppress(OSError):
            server = ThreadingHTTPServer((HOST, port), Handler)
            server.daemon_threads, server.block_on_close = True, False
            return server
    raise AssertionError("no port is free")  # of tens of thousands
