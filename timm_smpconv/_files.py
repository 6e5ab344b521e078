"""Files that are there completely or not at all, whatever kills the process that writes them."""

import contextlib
import os
from pathlib import Path
from typing import Dict, Iterator

import torch
from safetensors.torch import save_file

__all__ = ['atomic_path', 'save_tensors', 'write_text']


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


def save_tensors(path: Path, tensors: Dict[str, torch.Tensor], metadata: Dict[str, str]) -> None:
    """Writes a safetensors file atomically, readable for whom the umask allows."""
    with atomic_path(path) as part:
        part.touch()
        mode = part.stat().st_mode
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part, metadata=metadata)
        part.chmod(mode & 0o777)  # safetensors may have made it private
