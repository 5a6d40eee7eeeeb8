"""A reverse proxy as a hospital puts one before a server: it takes a path away and passes everything else on."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests

NOT_PASSED_ON = ("transfer-encoding", "connection", "content-encoding", "content-length", "date", "server")


class Proxy:
    """A running proxy.

    Args:
        target: address of the server behind it.
        prefix: the path that stands before every path of that server, as ``/unetr``.
    """

    def __init__(self, target: str, prefix: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                """Pass a request on; whatever lies outside the prefix is not there."""
                if not self.path.startswith(prefix + "/"):
                    self.send_error(404)
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = dict(self.headers) | {"Accept-Encoding": "identity"}
                address = target + self.path.removeprefix(prefix)
                answer = requests.request(
                    self.command, address, data=body, headers=headers, allow_redirects=False, timeout=120
                )
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    if name.lower() not in NOT_PASSED_ON:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            do_POST = do_PUT = do_DELETE = do_HEAD = do_GET  # noqa: N815 (names of http.server)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}{prefix}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
