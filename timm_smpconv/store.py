"""The local store: converted weights on this machine, each with its hash, found before anything is downloaded.

`<store>/<model>.<tag>/weights.json` names the file of weights beside it. The file is complete before the entry that
names it appears, and both appear by a rename: another process, or one that is killed, never leaves half a file that
anybody would load.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Iterator, Optional, Union

from huggingface_hub.utils import WeakFileLock
from timm.models import split_model_name_tag

from ._files import atomic_path, write_text
from .weights import WeightsError

__all__ = [
    'Entry',
    'file_sha256',
    'find',
    'install',
    'lock',
    'set_aside',
    'store_dir',
]

_logger = logging.getLogger(__name__)
_ENTRY = 'weights.json'
_NAME = re.compile(r'[\w.-]+\.[\w-]+', re.ASCII)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Weights in the store.

    Attributes:
        file: File name, beside the entry.
        size: Bytes.
        sha256: Hash.
        source: Where the weights came from.
        source_sha256: Hash of the file that they were converted from.
        by_hand: The user chose them, so that they come before those of the package.
    """

    file: str
    size: int
    sha256: str
    source: str
    source_sha256: str
    by_hand: bool = False


def store_dir() -> Path:
    """Folder of the store: `TIMM_SMPCONV_CACHE`, or timm_smpconv in the user's cache folder.

    Raises:
        WeightsError: The user has no home folder.
    """
    chosen = os.environ.get('TIMM_SMPCONV_CACHE')
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_smpconv'
    except RuntimeError as e:
        raise WeightsError(f'No place for the store of weights ({e}): set TIMM_SMPCONV_CACHE to a folder.') from e


def file_sha256(path: Union[str, Path]) -> str:
    """Hash of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Keeps other processes that prepare the same weights waiting; the system frees it if this process dies.

    Raises:
        WeightsError: The store cannot be written.
    """
    folder = store_dir() / '.locks'
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(folder / f'{name}.lock'))
        except OSError as e:
            raise _unwritable(name, folder, e) from e
        yield


def set_aside(path: Path) -> Path:
    """Renames a damaged file to NAME.corrupt, so that it is neither used nor lost."""
    aside = path.with_name(path.name + '.corrupt')
    with contextlib.suppress(OSError):  # gone already, or in a folder of somebody else: it is not used in any case
        os.replace(path, aside)
    return aside


def find(name: str, by_hand: bool = False) -> Optional[Path]:
    """File of the weights `model.tag` in the store; None if there are none, none intact, or no store.

    A file that has not the size and hash of its entry, or an entry that says something else, is set aside.

    Args:
        name: `model.tag`.
        by_hand: Look for weights that the user chose, and for no others.

    Raises:
        WeightsError: Weights that the user chose are damaged or gone: others must not take their place unnoticed.
    """
    try:
        folder = _folder(name)
    except WeightsError:
        return None
    entry: Optional[Entry] = None
    try:
        entry = _read_entry(folder)
        path = folder / entry.file
        if path.parent != folder or Path(entry.file).name != entry.file:
            raise ValueError(f'{entry.file!r} is no file name')
        if by_hand and entry.by_hand is not True:
            return None
        intact = path.stat().st_size == entry.size and file_sha256(path) == entry.sha256
    except FileNotFoundError:
        if entry is None:
            return None
        with contextlib.suppress(OSError, ValueError, TypeError):
            if _read_entry(folder) != entry:  # others were installed in the meantime
                return find(name, by_hand)
        if entry.by_hand is True:
            raise _lost(name, folder, f'{path} is gone') from None
        return None
    except OSError as e:  # of another user, or a failure that may pass
        _logger.warning('%s in the store cannot be read (%s): not used.', name, e)
        return None
    except (ValueError, TypeError, RecursionError) as e:  # no JSON, other fields
        aside = set_aside(folder / _ENTRY)
        _logger.warning('The entry of %s in the store cannot be read (%s): set aside as %s.', name, e, aside)
        return None
    if not intact:
        aside = set_aside(path)
        if entry.by_hand is True:
            raise _lost(name, folder, f'{path} is damaged, and was set aside as {aside.name}')
        _logger.warning('%s is damaged: set aside as %s.', path, aside)
        return None
    return path


def _read_entry(folder: Path) -> Entry:
    return Entry(**json.loads((folder / _ENTRY).read_text(encoding='utf-8')))


def _lost(name: str, folder: Path, what: str) -> WeightsError:
    model = split_model_name_tag(name)[0]
    return WeightsError(
        f'Cannot load the weights {name} that were installed by hand: {what}. Install them again (timm-smpconv convert '
        f'FILE --model {model} --install), or delete {folder} to go back to those that the package finds.'
    )


def install(name: str, weights: Path, source: str, source_sha256: str, by_hand: bool = False) -> Path:
    """Puts a complete file of weights into the store.

    Args:
        name: `model.tag`.
        weights: Safetensors file; it is copied.
        source: Where the weights come from.
        source_sha256: Hash of the file that they were converted from.
        by_hand: The user chose them.

    Returns:
        The file in the store.

    Raises:
        WeightsError: The store cannot be written.
    """
    folder = _folder(name)
    sha256 = file_sha256(weights)
    # content in the name: an older entry stays valid until the new one is there
    path = folder / f'{sha256[:16]}.safetensors'
    entry = Entry(path.name, weights.stat().st_size, sha256, source, source_sha256, by_hand)
    try:
        with atomic_path(path) as part:
            shutil.copyfile(weights, part)
        kept = {path.name}
        with contextlib.suppress(OSError, ValueError, TypeError):
            kept.add(_read_entry(folder).file)  # which another process may be about to read
        write_text(folder / _ENTRY, json.dumps(dataclasses.asdict(entry), indent=2) + '\n')
    except OSError as e:
        raise _unwritable(name, folder, e) from e
    for old in folder.glob('*.safetensors'):  # hundreds of megabytes each
        if old.name not in kept:
            with contextlib.suppress(OSError):  # open in another program, on Windows
                old.unlink()
    return path


def _unwritable(name: str, folder: Path, error: OSError) -> WeightsError:
    return WeightsError(
        f'Cannot store the weights {name} in {folder}: {error}. Make it writable, or set TIMM_SMPCONV_CACHE to another '
        f'folder.'
    )


def _folder(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ValueError(f'Weights are named model.tag, got {name!r}.')
    return store_dir() / name
