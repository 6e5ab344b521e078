"""Downloads over HTTP that go on where a broken connection stopped, and know when a file is not complete."""

import html.parser
import http.client
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from tqdm import tqdm

from ._files import write_text
from ._text import one_line, without_password

__all__ = ['TIMEOUT', 'DownloadError', 'download']

_logger = logging.getLogger(__name__)

TIMEOUT = 5.0  # seconds for a server to answer
_TRIES = 3  # connections without a byte that one download may take
_PAUSE = 0.5  # seconds before a broken connection is taken up again
_MAX_SIZE = 4 << 30  # bytes that any checkpoint or data set may have
_BLOCK = 1 << 18


class DownloadError(Exception):
    """A download failed for good; the message is the cause."""


class _Broken(Exception):
    """A connection that may be taken up again."""


def download(url: str, path: Path, what: str, progress: bool = True) -> None:
    """Downloads a file, going on where an earlier call stopped.

    Google Drive asks before it sends a large file, on a page with a form: the form is answered once.

    Args:
        url: Address of the file.
        path: File to write; what is in it already is kept if the server still has the same file.
        what: Name for the progress bar.
        progress: Show one, on a terminal.

    Raises:
        DownloadError: The file cannot be had.
        OSError: The file cannot be written.
    """
    answered = False
    tries = 0
    while True:
        before = path.stat().st_size if path.exists() else 0
        try:
            form = _continue_download(url, path, what, progress)
            if form is None:
                _version_path(path).unlink(missing_ok=True)
                return
            if answered:
                raise DownloadError('a page came in place of the file, again after its form was answered: try later.')
            url, answered = form, True
        except _Broken as e:
            grown = path.exists() and path.stat().st_size > before
            tries = 0 if grown and _can_go_on(path) else tries + 1
            if tries >= _TRIES:
                kept = 'what has arrived is kept, call again to go on' if _can_go_on(path) else 'try again later'
                raise DownloadError(f'{e}; {kept}.') from e
            _logger.info('%s: %s; going on.', what, e)
            time.sleep(_PAUSE)


def _continue_download(url: str, path: Path, what: str, progress: bool) -> Optional[str]:
    """One connection. Returns None once the file is complete, or the address that the form on a page leads to."""
    have = path.stat().st_size if path.exists() else 0
    try:
        request = urllib.request.Request(url, headers={'User-Agent': 'timm_smpconv'})
    except ValueError as e:
        raise DownloadError(f'{without_password(url)!r} is no address ({one_line(e)}).') from e
    version = _version_path(path)
    if have and _can_go_on(path):
        request.add_header('Range', f'bytes={have}-')
        request.add_header('If-Range', version.read_text(encoding='utf-8'))
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            if response.headers.get_content_type() == 'text/html':
                return _answer_form(response.read(1 << 20).decode('utf-8', 'replace'), response.url)
            resumed = response.status == 206
            start, total = _range(response.headers.get('Content-Range')) if resumed else (0, None)
            if resumed and start != have:
                path.unlink(missing_ok=True)
                version.unlink(missing_ok=True)
                raise DownloadError(
                    'the server sent another part of the file than it was asked for; what had arrived is thrown away, '
                    'call again to start over.'
                )
            length = response.headers.get('Content-Length')
            if total is None and length and length.isdigit():
                total = int(length) + (have if resumed else 0)
            if (total or 0) > _MAX_SIZE:
                raise DownloadError(f'the file has {total} bytes, more than the {_MAX_SIZE} that any should have.')
            if not resumed:
                path.unlink(missing_ok=True)
                version.unlink(missing_ok=True)
                etag = response.headers.get('ETag') or ''
                # a weak one does not tell whether the bytes are the same
                announced = response.headers.get('Last-Modified') if etag.startswith('W/') or not etag else etag
                if announced:
                    write_text(version, announced)
            _receive(response, path, what if progress else None, total, have if resumed else 0)
            return None
    except urllib.error.HTTPError as e:
        if e.code == 416 and have:  # the part is as long as the file, or of another file
            path.unlink(missing_ok=True)
            version.unlink(missing_ok=True)
            raise _Broken('what was there did not belong to this file') from e
        if e.code >= 500 or e.code == 429:
            raise _Broken(f'the server failed with status {e.code}') from e
        if 300 <= e.code < 400:
            raise DownloadError(f'the server leads in a circle, or nowhere (status {e.code}): try again later.') from e
        raise DownloadError(
            f'the server refused with status {e.code}: the file was removed, or is asked for too often.'
        ) from e
    except urllib.error.URLError as e:
        if isinstance(e.reason, TimeoutError):
            raise _Broken(f'no answer within {TIMEOUT:.0f} s') from e
        # nobody listens, or the name is unknown: no use in asking again
        raise DownloadError(
            f'no connection to {urllib.parse.urlsplit(url).hostname} ({e.reason}): check the network.'
        ) from e
    except http.client.InvalidURL as e:  # whose text has what stands before the @ of a password
        raise DownloadError(f'{without_password(url)!r} is no address.') from e
    except ValueError as e:  # of an address that cannot be one: a label of its host that is empty, or too long
        raise DownloadError(f'{without_password(url)!r} is no address ({one_line(e)}).') from e
    except (http.client.HTTPException, ConnectionError, TimeoutError) as e:
        raise _Broken(f'the connection broke off ({one_line(e)})') from e


def _receive(
    response: http.client.HTTPResponse, path: Path, what: Optional[str], total: Optional[int], have: int
) -> None:
    # no bar where nobody watches
    with (
        tqdm(total=total, initial=have, unit='B', unit_scale=True, desc=what, disable=None if what else True) as bar,
        path.open('ab') as f,
    ):
        while block := _read(response):
            f.write(block)
            have += len(block)
            bar.update(len(block))
            if have > _MAX_SIZE:
                raise DownloadError(f'more than {_MAX_SIZE} bytes came: no file should be that large.')
    if total is not None and have < total:
        raise _Broken(f'the connection ended after {have} of {total} bytes')


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_BLOCK)
    except (http.client.HTTPException, OSError) as e:  # of the connection: no route any more, a broken encryption
        raise _Broken(f'the connection broke off ({one_line(e)})') from e


def _version_path(path: Path) -> Path:
    """File with what the server calls this version of the file: an ETag, or the date of the last change."""
    return path.with_name(path.name + '.version')


def _can_go_on(path: Path) -> bool:
    """Whether a broken download of a file can be gone on with: the server has said how to know that it is the same."""
    try:
        text = _version_path(path).read_text(encoding='utf-8')
    except (OSError, ValueError):
        return False
    return bool(text) and text.isprintable()


def _range(content_range: Optional[str]) -> Tuple[Optional[int], Optional[int]]:
    """First byte, and length of the whole file, of a `Content-Range: bytes 100-199/200`."""
    start, _, rest = (content_range or '').removeprefix('bytes ').partition('-')
    total = rest.partition('/')[2]
    return tuple(int(number) if number.isdigit() else None for number in (start, total))


class _Form(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.action: Optional[str] = None
        self.fields: Dict[str, str] = {}
        self.title = ''
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        values = {key: value or '' for key, value in attrs}
        self._in_title = tag == 'title'
        if tag == 'form' and self.action is None:
            self.action = values.get('action')
        elif tag == 'input' and self.action is not None and values.get('type') == 'hidden' and 'name' in values:
            self.fields[values['name']] = values.get('value', '')

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False


def _answer_form(page: str, url: str) -> str:
    form = _Form()
    form.feed(page)
    if not form.action or not form.fields:
        title = ' '.join(form.title.split())[:100] or 'without a title'
        raise DownloadError(
            f'a page ({title!r}) came in place of the file: it was removed, is private, or too many have asked for it.'
        )
    action = urllib.parse.urljoin(url, form.action)
    if urllib.parse.urlsplit(action).scheme not in ('http', 'https'):
        raise DownloadError(f'the page in place of the file leads to {action!r}.')
    return f'{action}?{urllib.parse.urlencode(form.fields)}'
