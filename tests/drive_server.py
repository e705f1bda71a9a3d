"""A cloud drive and a web server on loopback: all that they answer to `timm-dseq get`, faults included.

    with DriveServer() as drive:
        drive.files = {"vit_b16.pth": b"..."}
        ...  # gdown, with `redirected(drive.url)`; or drive.address("vit_b16.pth") for a plain download

The pages are written after those that gdown reads; that Google's are like them cannot be seen from here.
"""

import contextlib
import gzip
import hashlib
import html
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import requests

FOLDER = "1folder-of-the-authors-0000000000"


class DriveServer:
    """A context manager. files: name → bytes. large: ask for confirmation, as of files that no scanner has read.

    fault: "quota" or "login" (a page instead of the file), "again" (confirmations without end), "gone" (404), "error"
    (503), "cut" (half of the bytes, then the connection closes; once, or always with cuts = -1), "no range" (Range is
    not heard), "flip" (a byte altered), "drip" (a byte now and then), "slow" (all of it, in two seconds), "closed"
    (the folder is not public), "endless" (zeros, without a length), "packed" (with gzip), "unasked" (the second half
    alone). Of the web server alone: "portal" (a page instead of anything), "moved", "loop" and "ftp" (it is elsewhere).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.large, self.fault, self.cuts = False, None, 1
        self.version: str | None = None  # by which the web server calls every file, else one of its bytes
        self.pause = 0.0  # seconds before each twentieth part of a file
        self.requests: list[tuple[str, str | None]] = []  # path, Range
        handler = type("Handler", (_Handler,), {"drive": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "DriveServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def address(self, name: str) -> str:
        return f"{self.url}/plain/{quote(name)}"

    def ranges(self) -> list[str]:
        """The parts of files that were asked for."""
        return [asked for _, asked in self.requests if asked]


def identity(name: str) -> str:
    """The drive's own name of a file."""
    return f"1{hashlib.sha256(name.encode()).hexdigest()[:32]}"


@contextlib.contextmanager
def redirected(loopback: str):
    """Whatever requests asks of Google goes to the loopback server."""
    real = requests.Session.request

    def request(self, method, url, *args, **kwargs):
        parts = urlsplit(url)
        here = f"{loopback}{parts.path}?{parts.query}" if parts.hostname.endswith("google.com") else url
        return real(self, method, here, *args, **kwargs)

    requests.Session.request = request
    try:
        yield
    finally:
        requests.Session.request = real


class _Handler(BaseHTTPRequestHandler):
    drive: DriveServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.drive.requests.append((parts.path, self.headers.get("Range")))
        fault = self.drive.fault
        if parts.path == "/embeddedfolderview":
            return self._folder()
        if parts.path.startswith(("/plain/", "/other/")):
            name = unquote(parts.path[7:])
            if fault == "portal":
                return self._page("<html><title>Welcome to our network</title></html>")
            if fault in ("loop", "ftp") or (fault == "moved" and parts.path.startswith("/plain/")):
                places = {"loop": self.path, "ftp": "ftp://127.0.0.1/x", "moved": f"/other/{quote(name)}?key=secret"}
                return self._page("elsewhere", 302, places[fault])
            if fault in ("gone", "error") or name not in self.drive.files:
                return self._page("no", 503 if fault == "error" else 404)
            return self._file(name, attached=False)
        name = next((name for name in self.drive.files if identity(name) == query.get("id")), None)
        if name is None or fault == "gone":
            return self._page("<html><title>Not found</title></html>", 404)
        if fault == "quota":
            return self._page(
                '<html><title>Google Drive - Quota exceeded</title><p class="uc-error-subcaption">Too many users have '
                "viewed or downloaded this file recently. Please try accessing the file again later.</p></html>"
            )
        if fault == "login":
            return self._page("<html><title>Google Drive: Sign-in</title><form></form></html>")
        if fault == "again" or (self.drive.large and "confirm" not in query):
            return self._page(
                "<html><title>Google Drive - Virus scan warning</title>"
                '<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
                f'<input type="hidden" name="id" value="{identity(name)}">'
                '<input type="hidden" name="export" value="download">'
                '<input type="hidden" name="confirm" value="t"></form></html>'
            )
        return self._file(name, attached=True)

    def _folder(self) -> None:
        if self.drive.fault == "closed":
            return self._page("<html><title>Sign in</title></html>", 404)
        entries = "".join(
            f'<div><a href="https://drive.google.com/file/d/{identity(name)}/view?usp=drive_web">'
            f"{html.escape(name)}</a></div>"
            for name in self.drive.files
        )
        self._page(f"<html><head><title>weights</title></head><body>{entries}</body></html>")

    def _page(self, text: str, status: int = 200, location: str | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, name: str, attached: bool) -> None:
        content, fault = self.drive.files[name], self.drive.fault
        version = self.drive.version or f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        if fault == "no range" or self.headers.get("If-Range", version) != version:
            start = 0
        if start and start >= len(content):
            return self._page("no such range", 416)
        if fault == "flip":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if fault == "packed":
            content = gzip.compress(content, 1)
        if fault == "unasked":
            start = len(content) // 2
        part = content[start:]
        self.close_connection = True
        self.send_response(206 if start else 200)
        if attached:
            self.send_header("Content-Disposition", f'attachment; filename="{name}"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", version)
        self.send_header("Content-Type", "application/octet-stream")
        if fault == "packed":
            self.send_header("Content-Encoding", "gzip")
        if fault != "endless":
            self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if fault == "endless":
            with contextlib.suppress(OSError):
                while self.drive.fault == fault:
                    self.wfile.write(bytes(2**20))
            return None
        if fault == "cut" and self.drive.cuts:
            self.drive.cuts -= 1
            part = part[: len(part) // 2]
        size = 1 if fault == "drip" else len(part) // 20 + 1
        pause = {"drip": 0.2, "slow": 0.1}.get(fault, self.drive.pause)
        with contextlib.suppress(OSError):  # the client has gone
            for at in range(0, len(part), size):
                self.wfile.write(part[at : at + size])
                time.sleep(pause)
                if self.drive.fault != fault:
                    return
