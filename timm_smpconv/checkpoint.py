"""Checkpoint files of unknown origin: read without running code, and checked against a network before use."""

import argparse
import json
import math
import pickle
import re
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import split_model_name_tag
from torch import nn

from ._files import read_metadata
from ._text import one_line
from .catalog import model_names
from .layout import unwrap_checkpoint
from .store import file_sha256
from .weights import WEIGHTS, WeightsError, bundled_path

if TYPE_CHECKING:  # models load their weights through this module
    from .models._base import LargeKernelNet

__all__ = [
    'DEPLOYED_FILE',
    'FLOATS',
    'NOT_NORMALISED_BY_US',
    'WEIGHTS_FILE',
    'CheckpointError',
    'ancestors',
    'carried_settings',
    'check_architecture',
    'differences',
    'fit_checkpoint',
    'read_checkpoint',
    'records_settings',
    'state_dict_of',
]

WEIGHTS_FILE, DEPLOYED_FILE = 'model.safetensors', 'deployed.safetensors'  # of a folder for the Hub
# in a config.json: mean and std are placeholders, as nobody knows how the inputs of the weights were normalised
NOT_NORMALISED_BY_US = 'unknown_normalisation'
# numpy 2 has renamed a module, whose old name is in older files
_number = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS: List[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ('bool', 'int32', 'int64', 'float16', 'float32', 'float64')),
    *((_number, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
]
_LOADING = threading.Lock()
_SETTINGS = ('mean', 'std', 'input_size')
_LARGEST_SIZE = 1 << 28  # numbers of an input: more would fill the memory
_ARCHIVE = b'PK\x03\x04'  # that torch.load takes for an archive
_MAX_LISTED = 12  # differences that a message names
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # others need scales that weights lack


class CheckpointError(WeightsError):
    """A file is no checkpoint, or one of another network."""


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """Reads a checkpoint: safetensors, or what torch.save writes; no code in it is run.

    Besides tensors and plain Python values a pickle may hold an argparse.Namespace, as training scripts store it, and
    single numbers of numpy: the authors' ImageNet training has them as learning rates, in the state of the optimizer.

    Args:
        path: File of any name; its contents decide.

    Returns:
        What was saved: a state dict, or a dictionary with state dicts in it.

    Raises:
        CheckpointError: The file is missing, damaged, no checkpoint, or would run code.
    """
    try:
        safe = _is_safetensors(path)
    except OSError as e:
        raise CheckpointError(f'Cannot read {path}: {e.strerror or e}. Expected a checkpoint file.') from e
    if safe:
        try:
            str(path).encode()
        except UnicodeEncodeError as e:  # which safetensors takes for a damaged file
            raise CheckpointError(f'{path} has a name that is no UTF-8: move or rename it.') from e
        try:
            tensors = dict(load_file(path))
        except (SafetensorError, ValueError, OSError, RuntimeError) as e:
            raise CheckpointError(f'{path} is a damaged safetensors file ({one_line(e)}): fetch it again.') from e
        try:
            architecture = read_metadata(path).get('architecture')  # of `timm-smpconv train`
        except (AttributeError, ValueError, RecursionError):  # written by somebody else
            architecture = None
        if not tensors:
            raise CheckpointError(f'{path} is empty: expected weights.')
        return dict(state_dict=tensors, arch=architecture) if isinstance(architecture, str) else tensors
    _check_archive(path)
    try:
        # a list of the whole process: another thread would lose what this one removes
        with _LOADING:
            known = torch.serialization.get_safe_globals()  # the context would remove those of the user at its end
            with torch.serialization.safe_globals([item for item in _SAFE_GLOBALS if item not in known]):
                # a file object: given a name, torch goes by its suffix
                with path.open('rb') as f:
                    checkpoint = torch.load(f, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        # in the midst of advice that does not help here
        refused = re.search(r'GLOBAL (\S{1,100})', one_line(e, limit=5000))
        raise CheckpointError(
            f'{path} holds more than tensors and plain values, or is damaged or no checkpoint: it is not unpickled, '
            f'because that could run code ({f"it names {refused[1]}" if refused else one_line(e)}). Expected '
            f'safetensors, or a state dict saved by torch.save.'
        ) from e
    except Exception as e:  # the parsers of torch fail in any way on damaged files
        raise CheckpointError(
            f'{path} is damaged, or no checkpoint ({type(e).__name__}: {one_line(e)}): expected safetensors or what '
            f'torch.save writes.'
        ) from e
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f'{path} holds a {type(checkpoint).__name__}: expected a state dict, or a dictionary with one.'
        )
    if not checkpoint:
        raise CheckpointError(f'{path} is empty: expected weights.')
    return checkpoint


def fit_checkpoint(
    checkpoint: Dict[str, Any],
    model: 'LargeKernelNet',
    what: str,
    adapt: Optional[Callable[[Dict[str, torch.Tensor]], Dict[str, torch.Tensor]]] = None,
) -> Dict[str, torch.Tensor]:
    """Brings a checkpoint into the layout of a network, all of it and exactly.

    Args:
        checkpoint: In the reference layout or in that of this package, possibly nested in a training checkpoint, of
            which the average of the weights (EMA) is taken.
        model: Network of this package, in the form (training or deployed) of the checkpoint.
        what: Name of the checkpoint for messages.
        adapt: What to do to weights in this package's layout before they are compared.

    Returns:
        State dict with the keys, shapes and dtypes of the model's own.

    Raises:
        CheckpointError: It is of another network; the message lists the differences.
    """
    check_architecture(checkpoint, _name(model), what)
    state_dict = state_dict_of(checkpoint, what)
    try:
        state_dict = model.convert_checkpoint(state_dict)
        state_dict = adapt(state_dict) if adapt else state_dict
    except (RuntimeError, ValueError, IndexError, KeyError) as e:
        raise CheckpointError(f'{what} does not fit {_name(model)}: {one_line(e)}') from e
    own = model.state_dict()
    state_dict = {key: _as_count(value) if _is_count(own.get(key)) else value for key, value in state_dict.items()}
    found = differences(state_dict, model)
    if found:
        listed = ''.join(f'\n  {line}' for line in found[:_MAX_LISTED])
        more = f'\n  and {len(found) - _MAX_LISTED} more' if len(found) > _MAX_LISTED else ''
        raise CheckpointError(
            f'{what} does not fit {_name(model)}, {len(found)} difference(s):{listed}{more}\n'
            f'Expected a checkpoint of this network: choose another model, or give its num_classes and arguments.'
        )
    return {key: state_dict[key].to(own[key].dtype).contiguous() for key in own}


def _is_count(own: Optional[torch.Tensor]) -> bool:
    return own is not None and own.ndim == 0 and not own.is_floating_point()


def _as_count(value: torch.Tensor) -> torch.Tensor:
    """A number of batches, of which averages of checkpoints (timm's avg_checkpoints.py) make a fraction."""
    fraction = value.is_floating_point() and bool(torch.isfinite(value).all())
    return value.double().round().long() if fraction else value


def check_architecture(checkpoint: Dict[str, Any], wanted: str, what: str) -> None:
    """Checks that a checkpoint of train.py or of this package, which say their network, is of the one wanted.

    Raises:
        CheckpointError: It is of another network of this package.
    """
    arch = checkpoint.get('arch')
    arch = split_model_name_tag(arch)[0] if isinstance(arch, str) else None
    if arch in model_names() and arch != wanted:
        raise CheckpointError(f'{what} says that it is of {arch}, not of {wanted}: choose that model.')


def differences(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> List[str]:
    """What distinguishes a state dict from that of a network: keys, shapes, kinds of numbers, values not finite."""
    own = model.state_dict()
    found = [f'missing: {key} {tuple(own[key].shape)}' for key in own if key not in state_dict]
    for key, value in state_dict.items():
        if key not in own:
            # a damaged file has keys that a terminal cannot show
            shown = key.encode('unicode_escape').decode()
            found.append(f'unknown: {shown[:100]} {tuple(value.shape)}')
            continue
        wanted = own[key]
        if value.shape != wanted.shape:
            found.append(f'shape of {key}: {tuple(value.shape)}, expected {tuple(wanted.shape)}')
        elif value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
            found.append(f'kind of {key}: {value.dtype}, expected {wanted.dtype}')
        elif value.is_floating_point() and value.dtype not in FLOATS:
            found.append(f'kind of {key}: {value.dtype}, expected one of {", ".join(map(str, FLOATS))}')
        elif value.is_floating_point() and not torch.isfinite(value.to(wanted.dtype)).all():
            found.append(f'values of {key}: not finite')
        elif key.endswith('running_var') and (value < 0).any():
            found.append(f'values of {key}: a negative variance')
    return found


def carried_settings(
    path: Path,
    channels: Optional[int] = None,
    checkpoint: Optional[Dict[str, Any]] = None,
    beside: bool = True,
) -> Dict[str, Tuple[float, ...]]:
    """What a file of weights says of the input it was trained on.

    `timm-smpconv train` and `convert` write it into weights and checkpoint; the weights in a folder for the Hub have a
    config.json beside them; the bundled weights are known by their values.

    Args:
        path: File of weights, of any format.
        channels: Channels of the input; None if not known.
        checkpoint: What `read_checkpoint` has read of it already.
        beside: Look for a config.json beside it. The cache of the Hub has one only if somebody has asked for it.

    Returns:
        `mean` and `std` (one number for each channel, or one for all) and `input_size`, as far as they are known.

    Raises:
        CheckpointError: The file cannot be read, or says what cannot be.
    """
    try:
        carried = _recorded(path, checkpoint)
        if not carried.keys() & set(_SETTINGS):
            carried = (_beside(path) if beside else {}) or _of_the_table(path, checkpoint)
        found = {key: tuple(carried[key]) for key in _SETTINGS if key in carried}
        numbers = {key: tuple(float(v) for v in values) for key, values in found.items() if key != 'input_size'}
    except (TypeError, ValueError, RecursionError, SafetensorError, OSError):  # written by somebody else
        return {}
    for key, values in numbers.items():
        finite = all(math.isfinite(v) and (v > 0 or key == 'mean') for v in values)
        if not finite or len(values) not in ((1, channels) if channels else range(1, len(values) + 1)):
            raise CheckpointError(
                f'{path} says that its inputs have the {key} {values[:3]} ({len(values)} numbers): expected '
                f'{"finite" if key == "mean" else "positive"} numbers, one or as many as channels'
                f'{f" ({channels})" if channels else ""}.'
            )
    size = found.get('input_size')
    if size is not None:
        whole = len(size) == 3 and all(type(n) in (int, float) and n > 0 and n == n // 1 for n in size)
        if not whole or math.prod(size) > _LARGEST_SIZE or (channels and size[0] != channels):
            raise CheckpointError(
                f'{path} says that its inputs have the size {size}: expected positive whole numbers, '
                f'({channels or "channels"}, height, width).'
            )
        found['input_size'] = tuple(int(n) for n in size)
    return {**found, **numbers}


def records_settings(path: Path) -> bool:
    """Whether weights are of this package's own training, which knows how their inputs were normalised.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        return 'mean' in _recorded(path, None) or bool(_of_the_table(path, None))
    except (TypeError, ValueError, RecursionError, SafetensorError, OSError):  # written by somebody else
        return False


def _beside(path: Path) -> Dict[str, Any]:
    """What the configuration of a folder for the Hub says of the weights in it."""
    config = path.with_name('config.json')
    if path.name in (WEIGHTS_FILE, DEPLOYED_FILE) and config.is_file() and _is_safetensors(path):
        settings = json.loads(config.read_text(encoding='utf-8'))
        return {} if settings.get(NOT_NORMALISED_BY_US) else settings.get('pretrained_cfg', {})
    return {}


def ancestors(path: Path, checkpoint: Optional[Dict[str, Any]] = None) -> List[str]:
    """Which bundled weights a file holds or goes back to, as `model.tag`: by its values and by what it says.

    `timm-smpconv train` writes what a run began with and who taught it, `timm-smpconv convert` passes it on.

    Args:
        path: File of weights, of any format.
        checkpoint: What `read_checkpoint` has read of it already.
    """
    try:
        name, said = _table_name(path, checkpoint), _recorded(path, checkpoint).get('ancestors', [])
        return sorted({*([name] if name else []), *(str(other) for other in said if other in WEIGHTS)})
    except (TypeError, ValueError, RecursionError, SafetensorError, OSError, CheckpointError):  # of somebody else
        return []


def _table_name(path: Path, checkpoint: Optional[Dict[str, Any]]) -> Optional[str]:
    """`model.tag` of a file that is one of the table of weights, or holds bundled ones that somebody has saved anew.

    None if it is of other weights.
    """
    size = path.stat().st_size
    alike = [name for name, weights in WEIGHTS.items() if weights.size == size]
    sha256 = file_sha256(path) if alike else None
    found = next((name for name in alike if WEIGHTS[name].sha256 == sha256), None)
    if found is None:
        try:
            state_dict = state_dict_of(read_checkpoint(path) if checkpoint is None else checkpoint, str(path))
        except CheckpointError:  # whoever loads it says more
            return None
        found = next((name for name in WEIGHTS if _is_bundled(state_dict, name)), None)
    return found


def _is_bundled(state_dict: Dict[str, Any], name: str) -> bool:
    bundled = bundled_path(name)
    if bundled is None:
        return False
    try:
        with safe_open(bundled, 'pt') as file:  # one after the other: the first that differs is enough
            return set(file.keys()) == state_dict.keys() and all(
                _is_same(state_dict[key], file.get_tensor(key)) for key in file.keys()
            )
    except (OSError, SafetensorError):  # damaged, of which it is told where it is wanted
        return False


def _is_same(saved: torch.Tensor, bundled: torch.Tensor) -> bool:
    """Whether a tensor is a bundled one, perhaps of another precision."""
    alike = saved.dtype == bundled.dtype or {saved.dtype, bundled.dtype} <= set(FLOATS)
    return alike and torch.equal(saved, bundled.to(saved.dtype))


def _of_the_table(path: Path, checkpoint: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    name = _table_name(path, checkpoint)
    cfg = timm.get_pretrained_cfg(name) if name else None
    return dict(mean=cfg.mean, std=cfg.std, input_size=cfg.input_size) if cfg else {}


def _recorded(path: Path, checkpoint: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    """What `timm-smpconv train` has written into a file."""
    if _is_safetensors(path):
        said = read_metadata(path)
        return said if isinstance(said, dict) else {}
    if checkpoint is None:
        checkpoint = read_checkpoint(path)
    return checkpoint if {'mean', 'std', 'state_dict'} <= checkpoint.keys() else {}


def _is_safetensors(path: Path) -> bool:
    # such a file starts with the length of its header, 8 bytes, and the brace that opens it
    with path.open('rb') as f:
        head = f.read(9)
    return head[8:] == b'{' and not head.startswith(_ARCHIVE)


def _check_archive(path: Path) -> None:
    """Refuses archives that unpack to more than they are: torch.save compresses nothing."""
    with path.open('rb') as f:
        if f.read(4) != _ARCHIVE:
            return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError) as e:
        raise CheckpointError(f'{path} is a damaged or incomplete checkpoint ({one_line(e)}): fetch it again.') from e
    if unpacked > path.stat().st_size:
        raise CheckpointError(f'{path} is compressed, which torch.save does not do: refused, unpack it yourself.')


def state_dict_of(checkpoint: Dict[str, Any], what: str) -> Dict[str, torch.Tensor]:
    """The tensors of a checkpoint, in its own layout.

    Args:
        checkpoint: State dict, possibly nested in a training checkpoint, of which the average of the weights is taken.
        what: Name of the checkpoint for messages.

    Raises:
        CheckpointError: There is none, or something else than dense tensors in it.
    """
    try:
        state_dict = unwrap_checkpoint(checkpoint)
    except RecursionError as e:
        raise CheckpointError(f'{what} holds itself: expected a state dict.') from e
    except AttributeError as e:
        raise CheckpointError(f'{what} has keys that are no text: expected a state dict.') from e
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f'{what} has a {type(value).__name__} at {key!r}, expected tensors alone.')
        problem: Optional[str] = None
        if value.is_nested:
            problem = 'a nested tensor, expected a dense one'
        elif value.layout != torch.strided or value.is_quantized or value.device.type != 'cpu':
            problem = f'a tensor of layout {value.layout} on {value.device}, expected a dense one'
        elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
            problem = f'a tensor of shape {tuple(value.shape)} that is larger than its data'
        if problem:
            raise CheckpointError(f'{what} has at {key!r} {problem}.')
    if not state_dict:
        raise CheckpointError(f'{what} is empty: expected a state dict.')
    return state_dict


def _name(model: nn.Module) -> str:
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__
