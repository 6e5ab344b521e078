"""Local servers that stand for the Hugging Face Hub and for Google Drive, and the faults that they show on demand."""

import contextlib
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from minihub import Hub, Server


@contextlib.contextmanager
def serve(server):
    server.handle_error = lambda request, address: None  # a client that has left is no news
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def hub_server():
    """A Hub of a user `me` with a second origin as its CDN; `.hub.faults` takes functions of a request handler."""
    with serve(Server(hub=Hub())) as hub, serve(Server(hub=hub.hub)) as cdn:
        hub.cdn_base = cdn.url
        yield hub


def hub_environment(server, home, **more):
    """Environment of a new process that talks to a local Hub with an empty cache."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'HUGGINGFACE'))}
    return {
        **kept,
        'HF_ENDPOINT': server if isinstance(server, str) else server.url,
        'HF_TOKEN': 'hf_test',
        'HF_HUB_DISABLE_XET': '1',
        'HF_HOME': str(home),
        'NO_PROXY': '127.0.0.1',
        'no_proxy': '127.0.0.1',
        'TIMM_SMPCONV_CACHE': str(home / 'store'),
        'TIMM_SMPCONV_HUB_ORG': 'me',
        'TIMM_SMPCONV_DRIVE_URL': 'http://127.0.0.1:9/nobody',
        'HF_HUB_DISABLE_PROGRESS_BARS': '1',
        **more,
    }


def _is_weights(handler):
    return handler.command == 'GET' and '/_lfs/' in handler.path


def status(code, error_code=None):
    """Answers everything with a status."""

    def fault(handler):
        headers = {'X-Error-Code': error_code} if error_code else {}
        handler.send(code, b'{"error": "injected"}', headers)
        return True

    return fault


def weights_status(code):
    def fault(handler):
        if _is_weights(handler):
            handler.send(code, b'{"error": "injected"}')
            return True

    return fault


def half(pause):
    """Sends half of the weights under the length of the whole, and ends the connection after a while."""

    def fault(handler):
        if not _is_weights(handler):
            return False
        data = handler.hub.store[handler.path.rsplit('/', 1)[-1]]
        handler.send_response(200)
        handler.send_header('Content-Length', str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        time.sleep(pause)
        handler.close_connection = True
        return True

    return fault


def changed(change):
    """Sends other weights of the same length."""

    def fault(handler):
        if not _is_weights(handler):
            return False
        data = bytearray(handler.hub.store[handler.path.rsplit('/', 1)[-1]])
        change(data)
        handler.send_bytes(bytes(data), {'ETag': '"0"'})
        return True

    return fault


def garbage(data):
    data[:] = os.urandom(len(data))


def flip(data):
    data[-100] ^= 1


def slow(seconds):
    """Answers everything after a while."""

    def fault(handler):
        time.sleep(seconds)
        return False

    return fault


# how a server says that a file is the same as before
_VERSIONS = {'etag': ('ETag', '"v1"'), 'date': ('Last-Modified', 'Wed, 01 Jan 2025 00:00:00 GMT')}


class Drive(ThreadingHTTPServer):
    """Google Drive with one file.

    Attributes:
        data: The file.
        mode: 'ok', 'redirect', 'warning' (a page with a form before the file), 'quota' (a page without one), 'broken'
            (every connection ends after a part), 'dead' (and no byte comes), 'refused' (403).
        ranges: The server can go on in the middle.
        version: How it says that the file is the same: 'etag', or the 'date' of the last change.
        shift: Bytes by which a part begins elsewhere than it was asked for, as the server says.
        requests: Range headers that came.
    """

    daemon_threads = True

    def __init__(self, data=b'', mode='ok', ranges=True):
        super().__init__(('127.0.0.1', 0), _DriveHandler)
        self.data, self.mode, self.ranges, self.requests = data, mode, ranges, []
        self.version, self.shift = 'etag', 0
        self.part = max(len(data) // 3, 1)

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_address[1]}/download'


class _DriveHandler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def _send(self, code, body=b'', headers=None, length=None):
        self.send_response(code)
        for key, value in {'Content-Type': 'application/octet-stream', **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        if length is not None and length != len(body):
            self.close_connection = True

    def do_GET(self):
        drive, url = self.server, urlsplit(self.path)
        query = parse_qs(url.query)
        page = {'Content-Type': 'text/html; charset=utf-8'}
        drive.requests.append(self.headers.get('Range'))
        if drive.mode == 'redirect' and url.path == '/download':
            return self._send(302, headers={'Location': f'/elsewhere?{url.query}'})
        if drive.mode == 'warning' and 'uuid' not in query:
            form = (
                '<html><title>Google Drive - Virus scan warning</title><form id="download-form" action="/download" '
                f'method="get"><input type="hidden" name="id" value="{query["id"][0]}"><input type="hidden" '
                'name="confirm" value="t"><input type="hidden" name="uuid" value="1-2-3"><input type="submit"></form>'
            )
            return self._send(200, form.encode(), page)
        if drive.mode == 'quota':
            return self._send(200, b'<html><title>Google Drive - Quota exceeded</title>Too many users.</html>', page)
        if drive.mode == 'refused':
            return self._send(403)
        start = 0
        header, version = _VERSIONS[drive.version]
        if drive.ranges and self.headers.get('Range') and self.headers.get('If-Range') == version:
            start = int(self.headers['Range'].removeprefix('bytes=').rstrip('-'))
            if start >= len(drive.data):
                return self._send(416)
        body, total = drive.data[start:], len(drive.data)
        headers = {header: version}
        if start:
            headers['Content-Range'] = f'bytes {start + drive.shift}-{total - 1}/{total}'
        sent = {'broken': drive.part, 'dead': 0}.get(drive.mode, len(body))
        self._send(206 if start else 200, body[:sent], headers, length=len(body))
