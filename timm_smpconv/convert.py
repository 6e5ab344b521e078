"""Checkpoints of any training to folders as the Hugging Face Hub and timm's `local-dir:` names expect them."""

import contextlib
import dataclasses
import inspect
import json
import logging
import os
import secrets
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple, Union

import timm
import torch
from timm.models import split_model_name_tag
from timm.models._hub import save_config_for_hf
from torch import nn

from . import store
from ._files import save_tensors, write_text
from .cards import model_card
from .catalog import check_known, full_name
from .checkpoint import (
    DEPLOYED_FILE,
    NOT_NORMALISED_BY_US,
    WEIGHTS_FILE,
    ancestors,
    carried_settings,
    fit_checkpoint,
    read_checkpoint,
)
from .classes import CLASS_NAMES
from .models._base import LargeKernelNet
from .tasks import task_of
from .weights import WEIGHTS

__all__ = ['FILES', 'TENSORS_FILE', 'Converted', 'check_network_args', 'config_text', 'convert', 'name_classes']

_logger = logging.getLogger(__name__)

TENSORS_FILE = 'test/rand_tensors.safetensors'
FILES = ('config.json', WEIGHTS_FILE, 'README.md', TENSORS_FILE)  # of every folder


@dataclasses.dataclass(frozen=True)
class Converted:
    """What came of a conversion.

    Attributes:
        name: `model.tag`.
        folder: Hub-ready folder, if one was asked for.
        installed: File in the local store, if that was asked for.
        sha256: Hash of the weights, in the folder and installed.
    """

    name: str
    folder: Optional[Path]
    installed: Optional[Path]
    sha256: str


def convert(
    file: Union[str, Path],
    name: str,
    out: Optional[Union[str, Path]] = None,
    install: bool = False,
    deployed: bool = False,
    use_ema: bool = True,
    overwrite: bool = False,
    model_kwargs: Optional[Dict[str, Any]] = None,
    license: Optional[str] = None,
    label_names: Optional[Sequence[str]] = None,
) -> Converted:
    """Converts a checkpoint: of the authors' code, of timm's train.py, or of this package.

    The folder holds config.json, model.safetensors, README.md (a model card), test/rand_tensors.safetensors (an input
    and what the network makes of it, under timm's names) and, if asked for, deployed.safetensors. It appears whole or
    not at all.

    Args:
        file: Checkpoint; see `read_checkpoint` for what is read and what is refused.
        name: `model` or `model.tag`; without a tag the model's default one.
        out: Folder to make.
        install: Put the weights into the local store, where pretrained=True finds them.
        deployed: Add the weights of the deployed form.
        use_ema: Take the average of the weights where the checkpoint has one.
        overwrite: Replace `out`, if that is a folder of an earlier conversion and nothing else.
        model_kwargs: Arguments of the network that differ from the model's own, such as num_classes.
        license: Licence of the weights for the card, as the Hub names it; None for that of the table if they are in
            it, else 'unknown'.
        label_names: Names of the classes in the order of the outputs, where they are not the model's own: of folders of
            images, sorted.

    Returns:
        Where the results are.

    Raises:
        CheckpointError: The file cannot be read, or does not fit; the message lists the differences.
        ValueError: The model is unknown, or nothing was asked for.
        FileExistsError: The folder exists, and is not to be overwritten or holds more than a conversion makes.
        WeightsError: The store cannot be written.
    """
    check_known(name)
    model_kwargs = {key: value for key, value in (model_kwargs or {}).items() if value is not None}  # as timm does
    if out is None and not install:
        raise ValueError('Nothing to do: expected a folder (out), install=True, or both.')
    if out is None and (deployed or overwrite or license or label_names):
        raise ValueError(
            'deployed, overwrite, license and label_names are of a folder: give one (out), or leave them out.'
        )
    if install and model_kwargs:
        raise ValueError(
            f'Only the standard form of a model can be installed as pretrained weights, got {model_kwargs}: give a '
            f'folder, and load it with timm.create_model("local-dir:FOLDER", pretrained=True).'
        )
    file = Path(file)
    if out is not None:
        out = Path(os.path.realpath(out))
        _check_replaceable(out, file, overwrite)
    checkpoint = read_checkpoint(file)
    if not use_ema:
        checkpoint = {key: value for key, value in checkpoint.items() if key not in ('state_dict_ema', 'model_ema')}
    model = _build(name, model_kwargs)
    model.load_state_dict(fit_checkpoint(checkpoint, model, str(file)))
    carried = carried_settings(file, model.in_chans, checkpoint)
    size = _describe_input(model)
    if label_names:
        if len(set(label_names)) != len(label_names) or len(label_names) != model.num_classes:
            raise ValueError(
                f'Expected {model.num_classes} different label_names, as many as classes, got {list(label_names)}.'
            )
        model.pretrained_cfg['label_names'] = list(label_names)
    if install and tuple(carried.get('input_size', size)) != size:
        raise ValueError(
            f'{file} is of inputs of size {carried["input_size"]}: only weights for the size of the model, {size}, can '
            f'be installed.'
        )
    model.pretrained_cfg.update(carried)
    task = task_of(name)
    if task and task.stepwise and not carried:
        _logger.warning(
            '%s does not say how its inputs were normalised: the configuration gets the mean and std of the weights of '
            'this package. If it is of the authors, they normalise each time step (timm-smpconv validate '
            '--step-statistics).',
            file,
        )

    name = full_name(name)
    source_sha256 = store.file_sha256(file)
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / WEIGHTS_FILE
        save_tensors(weights, model.state_dict())
        sha256 = store.file_sha256(weights)
        known = name in WEIGHTS and sha256 == WEIGHTS[name].sha256
        origin = sorted({*ancestors(file, checkpoint), *([name] if known else [])})
        # in the store, and on the Hub for other names than its own, there is no config.json beside them
        said: Dict[str, Any] = {**carried, **(dict(ancestors=origin) if origin else {})}
        if said and not known:
            save_tensors(weights, model.state_dict(), said)
            sha256 = store.file_sha256(weights)
        # the licence and the data of the table are those of the weights in it
        cfg = model.pretrained_cfg
        cfg['license'] = license or (cfg['license'] if known else None)
        cfg['description'] = cfg['description'] if known else None
        if known and not label_names:
            name_classes(model, name)
        if out is not None:
            printable = ''.join(c if c.isprintable() and c != '`' else '?' for c in file.name)
            provenance = f'Converted from `{printable}` (sha256 `{source_sha256}`).'
            card = model_card(name, model, provenance, known, deployed, model_kwargs, license)
            config = config_text(model, model_kwargs, bool(task and task.stepwise and not carried))
            with _replacing(out) as folder:
                shutil.copyfile(weights, folder / WEIGHTS_FILE)
                write_text(folder / 'config.json', config)
                write_text(folder / 'README.md', card)
                save_tensors(folder / TENSORS_FILE, _sample_tensors(model))
                if deployed:
                    save_tensors(folder / DEPLOYED_FILE, model.reparameterize().state_dict(), said or None)
        installed = None
        if install:
            with store.lock(name):
                installed = store.install(name, weights, file.name, source_sha256, by_hand=True)
    return Converted(name, out, installed, sha256)


def _build(name: str, model_kwargs: Dict[str, Any]) -> LargeKernelNet:
    try:
        model = timm.create_model(name, **model_kwargs).eval()
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f'Cannot build {name} with {model_kwargs}: {e}') from e
    check_network_args(model, model_kwargs)
    return model


def check_network_args(model: nn.Module, model_kwargs: Dict[str, Any]) -> None:
    """Checks that a network was made with arguments that a configuration, config.json, can hold and timm pass on.

    Args:
        model: What timm has made.
        model_kwargs: Arguments that it was given.

    Raises:
        ValueError: It is no network of this package, or an argument is not of the network itself.
    """
    if not isinstance(model, LargeKernelNet):
        raise ValueError(f'model_kwargs={model_kwargs!r} make something else of the network.')
    allowed = {*inspect.signature(type(model)).parameters} - {'device', 'dtype'}
    allowed |= {'img_size'} if model.pretrained_cfg.get('fixed_input_size') else set()
    others = [key for key in model_kwargs if key not in allowed]
    if others:
        raise ValueError(
            f'model_kwargs={model_kwargs!r} are not of the network itself ({", ".join(others)}): expected some of '
            f'{", ".join(sorted(allowed))}.'
        )


def name_classes(model: nn.Module, name: str) -> None:
    """Puts the names of their classes into the configuration of weights of this package, for transformers to show."""
    names = CLASS_NAMES.get(split_model_name_tag(name)[1], ())
    if len(names) == model.num_classes:
        model.pretrained_cfg['label_names'] = list(names)


def _describe_input(model: LargeKernelNet) -> Tuple[int, ...]:
    """Brings the configuration of a network in line with its arguments; returns its input size."""
    cfg = model.pretrained_cfg
    size = (model.in_chans, *(getattr(model, '_traits', {}).get('img_size') or cfg['input_size'][1:]))
    cfg.update(num_classes=model.num_classes, input_size=size)
    for key in ('mean', 'std'):  # of a network of other channels, as timm's loaders read them
        if len(cfg[key]) not in (1, model.in_chans):
            cfg[key] = (statistics.mean(cfg[key]),) * model.in_chans
    return size


def _check_replaceable(out: Path, file: Path, overwrite: bool) -> None:
    """Checks that a folder can be made, or replaced without a loss."""
    if not os.path.lexists(out):
        return
    if out.exists() and not out.is_dir():
        raise FileExistsError(f'{out} is a file, and not overwritten: choose another name for the folder.')
    if not overwrite:
        raise FileExistsError(f'{out} exists: choose another folder, or overwrite it.')
    found = [path.relative_to(out).as_posix() for path in out.rglob('*') if not path.is_dir()]
    others = sorted(set(found) - {*FILES, DEPLOYED_FILE})
    if others or file.resolve().is_relative_to(out.resolve()):
        raise FileExistsError(
            f'{out} is not overwritten, since it is no folder of an earlier conversion and nothing else (it has '
            f'{others[0] if others else file.name!r}): choose another folder.'
        )


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Gives an empty folder that takes the place of `folder` when the block ends without an exception."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # beside the final place, so that a rename is enough; not by tempfile, which hides folders from others
    temporary = folder.with_name(f'.{folder.name}.{secrets.token_hex(8)}')
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():  # two renames: the folder is missing for a moment, and never half written
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'.{folder.name}.'))
            try:
                os.replace(folder, old / folder.name)
                os.replace(temporary, folder)
            except BaseException:  # Ctrl-C too
                if not folder.exists():
                    os.replace(old / folder.name, folder)
                raise
            finally:
                if folder.exists():  # the new one, or the old one again
                    shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def config_text(model: nn.Module, model_kwargs: Dict[str, Any], unknown_normalisation: bool = False) -> str:
    """The configuration, config.json, from which timm and transformers build a model.

    Args:
        model: Registered model.
        model_kwargs: Arguments that differ from those of the registered model.
        unknown_normalisation: The mean and std of its pretrained configuration are placeholders.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_config_for_hf(model, Path(folder) / 'config.json')
        config = json.loads((Path(folder) / 'config.json').read_text(encoding='utf-8'))
    names = config['pretrained_cfg'].pop('label_names', None)
    if names:  # where transformers looks for them
        config['label_names'] = names
    # nothing but the differences; num_classes has a place of its own, and transformers passes it too
    config['model_args'] = {key: value for key, value in model_kwargs.items() if key != 'num_classes'}
    if unknown_normalisation:
        config[NOT_NORMALISED_BY_US] = True
    return json.dumps(config, indent=2) + '\n'


@torch.inference_mode()
def _sample_tensors(model: nn.Module) -> Dict[str, torch.Tensor]:
    """A random input and its outputs, as timm keeps them beside weights on the Hub."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *model.pretrained_cfg['input_size'], generator=generator)
    features = model.forward_features(x)
    output, pre_logits = model.forward_head(features), model.forward_head(features, pre_logits=True)
    tensors = dict(input=x, output=output, features=features, pre_logits=pre_logits)
    return {key: value.contiguous().clone() for key, value in tensors.items()}
