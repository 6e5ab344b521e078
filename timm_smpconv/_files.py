"""Files that are there completely or not at all, whatever kills the process that writes them."""

import contextlib
import csv
import glob
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = ['atomic_path', 'read_metadata', 'save_tensors', 'write_rows', 'write_text']

_KEY = 'timm_smpconv'
_STALE = 86400.0  # seconds after which nobody writes to a temporary file any more


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives the path of a temporary file that takes the place of `path` when the block ends without an exception.

    Args:
        path: File to write, or a link to it; its folder is made.

    Yields:
        Empty temporary file beside it, of this call alone.

    Raises:
        OSError: It cannot be written, or is a device or a folder.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # the rename would replace /dev/null
        raise OSError(f'Cannot write {path}: it is a folder or a device, expected a file.')
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f'.{glob.escape(path.name)}.*.part'):  # by processes that were killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink()
    part = path.with_name(f'.{path.name}.{secrets.token_hex(8)}.part')
    part.touch(exist_ok=False)
    mode = part.stat().st_mode  # that of any other file, which safetensors and the tempfile module hide from others
    try:
        yield part
        with part.open('rb+') as file:  # Windows syncs nothing that is open for reading alone
            os.fsync(file.fileno())
        part.chmod(mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding='utf-8')


def write_rows(path: Path, rows: Sequence[Dict[str, Any]]) -> None:
    """Writes a CSV file atomically.

    Args:
        path: File to write.
        rows: At least one, all with the columns of the first.
    """
    with atomic_path(path) as part, part.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def save_tensors(path: Path, tensors: Dict[str, torch.Tensor], metadata: Optional[Dict[str, Any]] = None) -> None:
    """Writes a safetensors file atomically.

    Args:
        path: File to write.
        tensors: Contents by name.
        metadata: What else the file shall say; anything that JSON can hold. None for a file of weights and no more.

    Raises:
        OSError: The file cannot be written.
    """
    text = {'format': 'pt'}  # without which some versions of transformers refuse a file
    if metadata is not None:
        text[_KEY] = json.dumps(metadata)
    with atomic_path(path) as part:
        try:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part, metadata=text)
            _sort_metadata(part)
        except SafetensorError as e:  # a full disk, for one
            raise OSError(f'Cannot write {path}: {e}') from e


def _sort_metadata(path: Path) -> None:
    """Puts the metadata, which safetensors writes in random order, in one order: equal contents, equal files."""
    with path.open('rb+') as file:
        size = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(size))
        header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(',', ':')).encode()
        if len(text) <= size:  # as it should be: the same characters, filled up with spaces
            file.seek(8)
            file.write(text.ljust(size))


def read_metadata(path: Path) -> Dict[str, Any]:
    """What `save_tensors` was given as metadata; nothing for a safetensors file of other origin."""
    with safe_open(path, 'pt') as file:
        return json.loads((file.metadata() or {}).get(_KEY, '{}'))
