"""Where `pretrained=True` finds its weights: with the package, in the local store, on the Hub, or with the authors.

The sources are asked in this order; each is left at once if it cannot be reached. What is returned has been checked:
its hash where one is known, and in any case that it can be read.
"""

import contextlib
import json
import logging
import os
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import timm
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import HfFileMetadata, repo_folder_name
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import parse_model_name, split_model_name_tag

from . import store
from ._files import save_tensors
from ._text import one_line, without_password
from .catalog import full_name, weights_names
from .checkpoint import FLOATS, WEIGHTS_FILE, CheckpointError, fit_checkpoint, read_checkpoint, state_dict_of
from .download import TIMEOUT, DownloadError, download
from .weights import WEIGHTS, WeightsError, bundled_path, hub_repo

__all__ = ['from_hub', 'hub_cause', 'hub_file', 'locate', 'weights_file']

_logger = logging.getLogger(__name__)

_PICKLED_FILE = 'pytorch_model.bin'
_STALLED_XET = 60.0
_STALLED = 15.0  # seconds without a byte after which a download from the Hub is given up; it tries again after ten


class _Unavailable(Exception):
    """A source has no usable weights; the message is the cause."""


def locate(name: str, cfg: Dict[str, Any], cache_dir: Optional[Union[str, Path]] = None) -> Optional[Path]:
    """Finds the weights that a pretrained configuration asks for.

    Args:
        name: `model.tag`.
        cfg: Resolved pretrained configuration. A `state_dict` or `url` of the caller is left to timm.
        cache_dir: Cache of the Hub in place of the usual one.

    Returns:
        File of weights to load, checked unless it is the caller's; None if the configuration names a source that timm
        loads itself.

    Raises:
        WeightsError: There are no weights; names the model, all sources, their causes and the remedy.
    """
    source, file = cfg.get('source') or '', cfg.get('file')
    for needed, key in (('local-dir', 'file'), ('hf-hub', 'hf_hub_id')):
        if source == needed and not cfg.get(key):
            raise WeightsError(f'Cannot load {name}: the configuration has source={source!r}, and no {key}.')
    if source == 'local-dir':
        return _from_folder(name, Path(file))
    if source == 'hf-hub' or (cfg.get('hf_hub_id') and not file and not cfg.get('state_dict')):
        return from_hub(cfg['hf_hub_id'], cfg.get('hf_hub_filename'), cache_dir=cache_dir, what=name)
    if cfg.get('state_dict') is not None:
        if not cfg['state_dict']:  # timm would take other weights in its place
            raise WeightsError(f'Cannot load {name}: the state_dict given for it is empty.')
        return None
    if file and Path(file) != bundled_path(name):
        return Path(file)
    return None if cfg.get('url') else _from_chain(name, cache_dir)


def weights_file(name: str) -> Optional[Path]:
    """File that `pretrained=True` loads for a name.

    Args:
        name: `model` or `model.tag` of this package, `hf-hub:ORG/NAME` or `local-dir:FOLDER`.

    Returns:
        The file; None if only timm may know it.

    Raises:
        WeightsError: There is none.
    """
    source, model_id = parse_model_name(name)
    if source == 'hf-hub':
        return from_hub(model_id, what=name)
    if source == 'local-dir':
        return _from_folder(name, Path(model_id))
    return locate(full_name(name), timm.get_pretrained_cfg(name).to_dict())


def from_hub(
    hub_id: str,
    filename: Optional[str] = None,
    cache_dir: Optional[Union[str, Path]] = None,
    what: Optional[str] = None,
) -> Path:
    """Weights in a repository of the Hugging Face Hub.

    Args:
        hub_id: `ORG/NAME`, or `ORG/NAME@REVISION`.
        filename: File in the repository; None for model.safetensors, else pytorch_model.bin.
        cache_dir: Cache of the Hub in place of the usual one.
        what: Name of the weights for messages.

    Returns:
        File in the cache of the Hub.

    Raises:
        WeightsError: It cannot be had, or is damaged.
    """
    try:
        return _from_hub(hub_id, filename, None, cache_dir)
    except _Unavailable as e:
        raise WeightsError(
            f'Cannot load {what or "weights"} from hf-hub:{hub_id} ({without_password(constants.ENDPOINT)}): {e} '
            f'Or use pretrained=False.'
        ) from e


def hub_file(hub_id: str, filename: str, cache_dir: Optional[Union[str, Path]] = None) -> Path:
    """Any file in a repository of the Hub, with the checks of `from_hub`.

    Raises:
        WeightsError: It cannot be had, or is damaged.
    """
    try:
        return _hub_file(hub_id, filename, None, cache_dir)
    except _Unavailable as e:
        endpoint = without_password(constants.ENDPOINT)
        raise WeightsError(f'Cannot load {filename} from hf-hub:{hub_id} ({endpoint}): {e}') from e


def _from_folder(name: str, folder: Path) -> Optional[Path]:
    """Weights of a local-dir: source; None if they have a name that only timm may know."""
    path = next((folder / file for file in (WEIGHTS_FILE, _PICKLED_FILE) if (folder / file).is_file()), None)
    if path is not None:
        try:
            _check_readable(path)
        except _Unavailable as e:
            raise WeightsError(f'Cannot load {name} from local-dir:{folder}: {e} Convert or copy it again.') from e
    return path


def _from_chain(name: str, cache_dir: Optional[Union[str, Path]]) -> Path:
    weights = WEIGHTS.get(name)
    if weights is None:
        raise WeightsError(
            f'No pretrained weights exist for {name}: expected one of {", ".join(weights_names(name)) or "no tag"}. '
            f'Train it, or use pretrained=False for random weights.'
        )
    sources: List[Tuple[str, Callable[[], Path]]] = []
    if weights.bundled and not store.find(name, by_hand=True):
        sources.append(('bundled file', lambda: _from_package(name)))
    sources.append(('local store', lambda: _from_store(name)))
    repo = hub_repo(name)
    sources.append((f'Hugging Face Hub {repo}', lambda: _from_own_repo(name, repo, weights.sha256, cache_dir)))
    if weights.authors_file:
        sources.append((f"authors' file {weights.authors_url}", lambda: _from_authors(name)))
    causes = []
    for source, get in sources:
        try:
            path = get()
        except _Unavailable as e:
            _logger.info('%s: %s: %s', name, source, e)
            causes.append(f'{source}: {e}')
        else:
            _logger.info('%s: found in %s', name, source)
            return path
    if weights.authors_file:
        remedy = (
            f'Download {weights.authors_url} in a browser and run `timm-smpconv convert FILE --model '
            f'{split_model_name_tag(name)[0]} --install`'
        )
    elif weights.bundled:
        remedy = 'Install the package again'
    else:
        remedy = 'None were ever published: train it and load your file with pretrained_cfg_overlay=dict(file=PATH)'
    tried = ''.join(f'\n  {cause}' for cause in causes)
    raise WeightsError(
        f'Cannot load the weights {name}: no source has them. {remedy}, or use pretrained=False for random weights. '
        f'Tried:{tried}'
    )


# --- bundled file and local store ---


def _from_package(name: str) -> Path:
    path, weights = bundled_path(name), WEIGHTS[name]
    assert path is not None
    if not path.is_file():
        raise _Unavailable('missing from the installed package; install it again.')
    if weights.sha256 and store.file_sha256(path) != weights.sha256:
        raise _Unavailable(f'{path} has been changed: another hash than expected; install the package again.')
    return path


def _from_store(name: str) -> Path:
    try:
        folder = store.store_dir()
    except WeightsError as e:
        raise _Unavailable(str(e)) from e
    path = store.find(name)
    if path is None:
        raise _Unavailable(f'{folder} has none.')
    return path


# --- Hugging Face Hub ---


def _from_own_repo(name: str, repo: str, sha256: Optional[str], cache_dir: Optional[Union[str, Path]]) -> Path:
    """Weights of this package's repository, which have to be of the registered network."""
    path = _from_hub(repo, None, sha256, cache_dir)
    try:
        fit_checkpoint(read_checkpoint(path), timm.create_model(name, device='meta'), path.name)
    except CheckpointError as e:
        raise _Unavailable(str(e)) from e
    return path


def _from_hub(
    hub_id: str, filename: Optional[str], sha256: Optional[str], cache_dir: Optional[Union[str, Path]]
) -> Path:
    if filename is not None:
        return _hub_file(hub_id, filename, sha256, cache_dir)
    try:
        return _hub_file(hub_id, WEIGHTS_FILE, sha256, cache_dir)
    except _NoFile as missing:
        try:
            return _hub_file(hub_id, _PICKLED_FILE, None, cache_dir)
        except _NoFile:
            raise missing from None
    except _Unavailable:
        # a repository that had the other file alone when it was asked, and cannot be asked now
        if sha256 or not _is_cached(hub_id, _PICKLED_FILE, cache_dir):
            raise
        return _hub_file(hub_id, _PICKLED_FILE, None, cache_dir)


def _is_cached(hub_id: str, filename: str, cache_dir: Optional[Union[str, Path]]) -> bool:
    repo, _, revision = hub_id.partition('@')
    try:
        cached = try_to_load_from_cache(repo, filename, revision=revision or None, cache_dir=cache_dir)
    except (ValueError, OSError):  # no name of a repository, or no cache
        return False
    return isinstance(cached, str)


class _NoFile(_Unavailable):
    """The repository exists, the file does not."""


class _Unreadable(_Unavailable):
    """The file is there and cannot be opened, which says nothing of its contents."""


def _hub_file(hub_id: str, filename: str, sha256: Optional[str], cache_dir: Optional[Union[str, Path]]) -> Path:
    """A file of the Hub, from the cache if it is intact there and cannot be newer on the server, else downloaded."""
    parts = filename.replace('\\', '/').split('/')
    if not parts[0] or ':' in parts[0] or '..' in parts:  # as a config.json of somebody else may say
        raise _Unavailable(f'{filename!r} is no file of a repository.')
    repo, _, revision = hub_id.partition('@')
    where = dict(revision=revision or None, cache_dir=cache_dir)
    path, problem = _cached_file(repo, filename, sha256, where)
    if path is not None and (sha256 or constants.HF_HUB_OFFLINE):  # nobody has to be asked
        return path
    if constants.HF_HUB_OFFLINE:
        raise _Unavailable(f'{problem}offline (HF_HUB_OFFLINE is set), and {filename} is not in the cache.')
    try:
        # answers or fails at once, while hf_hub_download repeats failures for half a minute
        announced = get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision or None), timeout=TIMEOUT)
    except Exception as e:  # clients of different versions raise different families of exceptions
        if path is not None and not isinstance(
            e, (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError)
        ):  # a lost connection, too many requests, a proxy that refuses
            endpoint = without_password(constants.ENDPOINT)
            _logger.info('%s cannot be reached: using the cached %s.', endpoint, path)
            return path
        kind = _NoFile if isinstance(e, EntryNotFoundError) else _Unavailable
        raise kind(problem + hub_cause(e, repo, filename)) from e
    return _download_checked(repo, filename, sha256, where, announced, problem)


def _cached_file(repo: str, filename: str, sha256: Optional[str], where: Dict[str, Any]) -> Tuple[Optional[Path], str]:
    """The file in the cache if it is intact, and of the hash that is wanted; else what was wrong, for messages."""
    try:
        cached = try_to_load_from_cache(repo, filename, **where)
    except HFValidationError as e:
        raise _Unavailable(hub_cause(e, repo)) from e
    except ValueError as e:
        raise _Unavailable(f'{filename!r} is no name of a file ({one_line(e)}).') from e
    except OSError as e:
        raise _Unavailable(
            f'the cache of the Hub cannot be read ({one_line(e)}): set HF_HOME to another folder.'
        ) from e
    if not isinstance(cached, str):
        return None, ''
    path = Path(cached)
    try:
        _check_hub_file(path, _announced_hash(path), None)
    except _Unreadable:
        raise
    except _Unavailable as e:
        _logger.warning('%s: %s', path, e)
        _set_hub_file_aside(path)
        return None, f'The cached file was damaged ({e}) and set aside. '
    if sha256 and store.file_sha256(path) != sha256:
        return None, 'The cached file is of another version. '
    return path, ''


def _download_checked(
    repo: str,
    filename: str,
    sha256: Optional[str],
    where: Dict[str, Any],
    announced: HfFileMetadata,
    earlier: str,
) -> Path:
    """Downloads a file, once more if what came is not what the server announced or the hash that is wanted."""
    # Xet fetches large pieces before it writes any
    patience = _STALLED if getattr(announced, 'xet_file_data', None) is None else _STALLED_XET
    problem: Optional[_Unavailable] = None
    for attempt in range(2):
        try:
            path = _download_from_hub(repo, filename, patience, force_download=attempt > 0, **where)
        except _Unavailable:
            raise
        except Exception as e:
            raise _Unavailable(earlier + hub_cause(e, repo, filename)) from e
        etag = announced.etag or ''
        try:
            _check_hub_file(path, sha256 or (etag if len(etag) == 64 else None), announced.size)
        except _Unavailable as e:
            _logger.warning('%s: %s', path, e)
            _set_hub_file_aside(path)
            problem = e
        else:
            return path
    raise _Unavailable(
        f'{earlier}Downloaded twice, and damaged both times: {problem} The file on the server is damaged, or not the '
        f'one that this version of timm_smpconv knows: upgrade the package, or tell the owner of the repository.'
    )


def _download_from_hub(
    repo: str,
    filename: str,
    patience: float,
    force_download: bool,
    revision: Optional[str],
    cache_dir: Optional[Union[str, Path]],
) -> Path:
    """hf_hub_download, given up once nothing has arrived for `patience` seconds: by itself it goes on for minutes.

    It runs in a thread that nobody waits for then. What it may still fetch is put into the cache as usual.
    """
    result: List[Union[str, Exception]] = []

    def run() -> None:
        try:
            result.append(
                hf_hub_download(
                    repo,
                    filename,
                    etag_timeout=TIMEOUT,
                    force_download=force_download,
                    revision=revision,
                    cache_dir=cache_dir,
                )
            )
        except Exception as e:  # raised below, in the thread that asked
            result.append(e)

    folder = repo_folder_name(repo_id=repo, repo_type='model')
    blobs = Path(cache_dir or constants.HF_HUB_CACHE) / folder / 'blobs'
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    arrived, since = -1, time.monotonic()
    while thread.is_alive():
        thread.join(0.2)
        size = _folder_size(blobs)
        if size != arrived:
            arrived, since = size, time.monotonic()
        elif time.monotonic() - since > patience:
            raise _Unavailable(f'the download stopped, no byte for {patience:.0f} s: check the network and try again.')
    if isinstance(result[0], Exception):
        raise result[0]
    return Path(result[0])


def _folder_size(folder: Path) -> int:
    size = 0
    for path in folder.glob('*'):
        with contextlib.suppress(OSError):  # renamed in the meantime
            size += path.stat().st_size
    return size


def _announced_hash(path: Path) -> Optional[str]:
    """The hash by which the cache of the Hub names a large file."""
    blob = path.resolve().name
    return blob if len(blob) == 64 else None


def _check_hub_file(path: Path, sha256: Optional[str], size: Optional[int]) -> None:
    try:
        actual = path.stat().st_size
        if size is not None and actual != size:
            raise _Unavailable(f'{actual} bytes, expected {size}.')
        if sha256:
            found = store.file_sha256(path)
            if found != sha256:
                raise _Unavailable(f'sha256 {found[:12]}..., expected {sha256[:12]}...')
    except OSError as e:
        raise _Unreadable(f'{path} cannot be read ({e.strerror or e}): set HF_HOME to another folder.') from e
    _check_readable(path)


def _check_readable(path: Path) -> None:
    """Checks what can be checked of a file without knowing its network."""
    if path.suffix in ('.safetensors', '.bin', '.pth', '.pt'):
        try:
            values = state_dict_of(read_checkpoint(path), path.name)
        except CheckpointError as e:
            raise _Unavailable(str(e)) from e
        for key, value in values.items():
            if value.dtype in FLOATS and not torch.isfinite(value).all():
                raise _Unavailable(f'{path.name} has values in {key} that are not finite.')
    elif path.suffix == '.json':
        try:
            json.loads(path.read_text(encoding='utf-8'))
        except (ValueError, RecursionError) as e:
            raise _Unavailable(f'{path.name} is no JSON ({one_line(e)}).') from e


def _set_hub_file_aside(path: Path) -> None:
    blob = path.resolve()
    store.set_aside(blob)
    if path != blob:
        with contextlib.suppress(OSError):  # of somebody else: the link leads nowhere, or to what is refused again
            path.unlink()


def hub_cause(error: Exception, repo: str, filename: str = 'such file') -> str:
    """What went wrong on the way to the Hub, and what to do about it."""
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if isinstance(error, GatedRepoError):
        return f'access to {repo} must be granted by its owner: ask on its page, and log in (`hf auth login`).'
    if isinstance(error, HFValidationError):
        return f'{repo!r} is no name of a repository ({one_line(error)}): expected ORG/NAME.'
    if isinstance(error, OfflineModeIsEnabled):
        return 'offline (HF_HUB_OFFLINE is set): unset it.'
    if status == 403:
        return f'access to {repo} is refused (403): log in as somebody who may (`hf auth login` or HF_TOKEN).'
    found = isinstance(error, (RevisionNotFoundError, EntryNotFoundError))  # the repository, if not what is in it
    if isinstance(error, RepositoryNotFoundError) or status == 401 or (status == 404 and not found):
        return 'no such repository, or a private one: check the name, or log in (`hf auth login` or HF_TOKEN).'
    if isinstance(error, RevisionNotFoundError):
        return f'{repo} has no such revision: check what follows the @.'
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f'the repository has no {filename}: ask its owner, or name another file (hf_hub_filename).'
    if status is not None:
        return f'the server failed with status {status}: try again later.'
    of_a_file = isinstance(error, OSError) and error.errno and error.filename
    if of_a_file and not isinstance(error, (ConnectionError, TimeoutError)):
        return f'{error.strerror}: {error.filename}.'
    if type(error).__name__ in ('UnsupportedProtocol', 'MissingSchema', 'InvalidSchema', 'InvalidURL'):
        return f'the address of the Hub is none ({one_line(error)}): check HF_ENDPOINT.'
    text = f'{type(error).__name__} {error}'.lower()
    if 'timeout' in text or 'timed out' in text:
        return f'no answer within {TIMEOUT:.0f} s: check the network, or set HF_HUB_OFFLINE=1.'
    if 'consistency check' in text or 'incomplete' in text or 'peer closed' in text or 'protocol' in text:
        return f'the download broke off ({one_line(error)}): try again.'
    if isinstance(error, OSError) and error.errno and 'connect' not in text:
        return f'{error.strerror}: {error.filename or "the cache of the Hub"}.'
    return f'no connection ({one_line(error)}): check the network, or set HF_HUB_OFFLINE=1.'


# --- the authors' file, on Google Drive ---


def _from_authors(name: str) -> Path:
    """Downloads the authors' checkpoint and keeps it, converted, in the store."""
    if constants.HF_HUB_OFFLINE:
        raise _Unavailable('offline (HF_HUB_OFFLINE is set).')
    file_id = WEIGHTS[name].authors_file
    assert file_id is not None
    part = store.store_dir() / 'downloads' / f'{file_id}.part'
    try:
        with store.lock(name):
            found = store.find(name)  # perhaps another process was faster
            if found is not None:
                return found
            part.parent.mkdir(parents=True, exist_ok=True)
            problem = ''
            for _ in range(2):
                download(_drive_url(file_id), part, name)
                try:
                    path = _install_authors_file(name, part)
                except CheckpointError as e:
                    problem = f'{e} It was set aside as {store.set_aside(part)}.'
                    _logger.warning('%s: %s', name, problem)
                else:
                    part.unlink()
                    return path
            raise _Unavailable(f'downloaded twice, and unusable both times: {problem}')
    except OSError as e:
        raise _Unavailable(f'cannot write to {store.store_dir()} ({one_line(e)}): set TIMM_SMPCONV_CACHE.') from e
    except (DownloadError, WeightsError) as e:
        raise _Unavailable(str(e)) from e


def _install_authors_file(name: str, file: Path) -> Path:
    checkpoint = read_checkpoint(file)
    model = timm.create_model(split_model_name_tag(name)[0])
    state_dict = fit_checkpoint(checkpoint, model, f'the file of {name}')
    converted = file.with_name(f'{name}.converted')
    save_tensors(converted, state_dict)
    try:
        return store.install(name, converted, WEIGHTS[name].authors_url or '', store.file_sha256(file))
    finally:
        converted.unlink()


def _drive_url(file_id: str) -> str:
    base = os.environ.get('TIMM_SMPCONV_DRIVE_URL') or 'https://drive.usercontent.google.com/download'
    return f'{base}?{urllib.parse.urlencode(dict(id=file_id, export="download", confirm="t"))}'
