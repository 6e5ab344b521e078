"""Files that are there completely or not at all, whatever kills the process that writes them."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator

import torch
from safetensors import safe_open
from safetensors.torch import save_file

__all__ = ['atomic_path', 'read_metadata', 'save_tensors', 'write_text']

_KEY = 'timm_smpconv'


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives the path of a temporary file that takes the place of `path` when the block ends without an exception.

    Args:
        path: File to write; its folder is made.

    Yields:
        Temporary file beside it, with the suffix .part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + '.part')
    try:
        yield part
        with part.open('rb') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding='utf-8')


def save_tensors(path: Path, tensors: Dict[str, torch.Tensor], metadata: Dict[str, Any]) -> None:
    """Writes a safetensors file atomically, readable for whom the umask allows.

    Args:
        path: File to write.
        tensors: Contents by name.
        metadata: What else the file shall say; anything that JSON can hold.
    """
    # one entry, because safetensors writes several in random order: equal contents shall be equal files
    text = {_KEY: json.dumps(metadata)}
    with atomic_path(path) as part:
        part.touch()
        mode = part.stat().st_mode
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part, metadata=text)
        part.chmod(mode & 0o777)  # safetensors may have made it private


def read_metadata(path: Path) -> Dict[str, Any]:
    """What `save_tensors` was given as metadata; nothing for a safetensors file of other origin."""
    with safe_open(path, 'pt') as file:
        return json.loads((file.metadata() or {}).get(_KEY, '{}'))
