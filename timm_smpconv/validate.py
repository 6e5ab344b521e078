"""Accuracy of any model of this package on test data."""

import dataclasses
import logging
import math
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, Union

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_loader, resolve_data_config
from timm.models import parse_model_name
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ._text import one_line
from .checkpoint import ancestors
from .classes import CLASS_NAMES
from .data import Samples
from .factory import architecture_of, read_config
from .fetch import weights_file
from .predict import check_image_channels, check_inputs, class_names, load_image, load_model
from .tasks import Task, heard, network_input, stepwise, task_of
from .weights import design_effect, wilson

__all__ = ['Measurement', 'evaluate', 'predict_classes', 'usable_device', 'validate']

_logger = logging.getLogger(__name__)
_NO_IMAGES = {'.mpg', '.mpeg', '.bufr', '.grib', '.h5', '.hdf'}  # which Pillow only recognises


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Predictions of a model for all test data.

    Attributes:
        predictions: Predicted classes, (N,).
        labels: True classes, (N,).
        names: Names of the classes.
        left_out: Test samples that were not looked at, since the weights were trained on their speakers.
        speakers: Number of the speaker of each sample, (N,), of recordings.
    """

    predictions: torch.Tensor
    labels: torch.Tensor
    names: List[str]
    left_out: int = 0
    speakers: Optional[torch.Tensor] = None

    @property
    def total(self) -> int:
        """Number of samples."""
        return len(self.labels)

    @property
    def hits(self) -> int:
        """Samples whose prediction is right."""
        return int((self.predictions == self.labels).sum())

    @property
    def effect(self) -> float:
        """How many times larger the variance of the accuracy is since recordings of a speaker resemble each other."""
        return 1.0 if self.speakers is None else design_effect(self.predictions == self.labels, self.speakers)

    @property
    def interval(self) -> Tuple[float, float]:
        """95 % interval of the accuracy, as fractions."""
        return wilson(self.hits, self.total, self.effect)

    @property
    def confusion(self) -> torch.Tensor:
        """Samples of each true class (row) that were taken for each class (column)."""
        count = len(self.names)
        return torch.bincount(self.labels * count + self.predictions, minlength=count * count).reshape(count, count)


@torch.inference_mode()
def predict_classes(
    model: nn.Module, batches: Iterable[Tuple[torch.Tensor, torch.Tensor]], total: int, unit: str, progress: bool
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Predicted classes of batches of inputs and labels, with a bar that shows the accuracy so far.

    Args:
        model: Network in eval mode.
        batches: Inputs and labels.
        total: Number of inputs in all batches.
        unit: What an input is, for the bar.
        progress: Show it.

    Returns:
        Predictions and labels, (N,).

    Raises:
        FloatingPointError: An output is not finite.
    """
    predictions, labels = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)]
    device = next(model.parameters()).device
    hits = seen = 0
    with tqdm(total=total, desc='evaluate', unit=unit, disable=not progress, leave=False) as bar:
        for x, target in batches:
            logits = model(x.to(device))
            if not logits.isfinite().all():
                raise FloatingPointError('The outputs of the network are not finite: its weights are damaged.')
            predictions.append(logits.argmax(1).cpu())
            labels.append(target)
            hits += int((predictions[-1] == target).sum())
            seen += len(target)
            bar.set_postfix(accuracy=f'{hits / seen:.4f}', refresh=False)
            bar.update(len(target))
    return torch.cat(predictions), torch.cat(labels)


def evaluate(
    model: nn.Module,
    samples: Samples,
    task: Task,
    batch_size: Optional[int] = None,
    progress: bool = True,
) -> torch.Tensor:
    """Predicted classes.

    Args:
        model: Network, with the pretrained_cfg that says how its input is normalised.
        samples: Stored samples, with labels for the running accuracy.
        task: What turns them into inputs.
        batch_size: Samples per forward pass; None for what fits any machine.
        progress: Show a progress bar.

    Returns:
        Predictions, (N,).

    Raises:
        FloatingPointError: An output is not finite.
    """
    cfg = model.pretrained_cfg
    size = batch_size or max(1, 200_000 // math.prod(cfg['input_size'][1:]))
    parts = (samples[start : start + size] for start in range(0, len(samples), size))
    batches = ((network_input(task, part.inputs, cfg), part.labels) for part in parts)
    return predict_classes(model.eval(), batches, len(samples), 'sample', progress)[0]


def validate(
    name: str,
    data_dir: Union[str, Path],
    checkpoint_path: Optional[Union[str, Path]] = None,
    progress: bool = True,
    step_statistics: bool = False,
    device: Union[str, torch.device] = 'cpu',
) -> Measurement:
    """Runs a model over its test data.

    The bundled speech weights were trained on three fifths of the official test split: recordings by the speakers of
    that part are left out for them, and for weights that say that they began with these or were taught by them.

    Args:
        name: `name` or `name.tag` of a model of this package, `hf-hub:ORG/NAME` or `local-dir:FOLDER`.
        data_dir: What `timm-smpconv data` made; for ImageNet, CIFAR-10 and images with classes of one's own a folder of
            class folders, or one that holds it as test, val, validation or cifar10/test.
        checkpoint_path: Weights to use in place of the model's own.
        progress: Show a progress bar.
        step_statistics: Normalise the inputs in each time step, with statistics of the training data in `data_dir`, as
            the authors' speech and trajectory networks want it.
        device: Device to compute on.

    Raises:
        ValueError: The model or the device is unknown, weights, classes or data do not fit, no recordings are left, or
            an image cannot be read; or step_statistics for a model whose inputs the authors normalise as this package
            does, or for weights of this package.
        FileNotFoundError: The data are not there.
        WeightsError: The model has no weights.
        FloatingPointError: Its weights give outputs that are not finite.
    """
    device, task = usable_device(device), task_of(architecture_of(name))
    own = _own_classes(name)
    if task and own:
        if timm.get_pretrained_cfg(architecture_of(name)).input_size[1] == 1:
            raise ValueError(
                f'{name} has classes of its own ({_some(own)}), of which there are no test data: only images in a '
                f'folder for each class can be measured.'
            )
        task = None
    if task:
        found = samples = task.load(data_dir, False)
        if found.speakers is not None:
            weights = Path(checkpoint_path) if checkpoint_path else weights_file(name)
            samples = found[~heard(found, ancestors(weights) if weights else ())]
        if not len(samples):
            if len(found):
                raise ValueError(
                    f'All {len(found)} test recordings in {data_dir} are by speakers that the weights of {name} were '
                    f'trained on: nothing is left to measure.'
                )
            raise ValueError(f'{data_dir} has no test data for {name}.')
        check_inputs(name, checkpoint_path, step_statistics)
        model = load_model(name, checkpoint_path).to(device)
        if step_statistics:
            task = stepwise(task, task.load(data_dir, True))
            model.pretrained_cfg.update(mean=(0.0,), std=(1.0,))
        predictions = evaluate(model, samples, task, progress=progress)
        left_out = len(found) - len(samples)
        return Measurement(predictions, samples.labels, class_names(model), left_out, samples.speakers)
    dataset = _image_folder(name, own, Path(data_dir))
    check_inputs(name, checkpoint_path, step_statistics)
    model = load_model(name, checkpoint_path).to(device)
    return Measurement(*_evaluate_images(model, dataset, progress), class_names(model))


def usable_device(device: Union[str, torch.device]) -> torch.device:
    """A device that torch can compute on.

    Raises:
        ValueError: It cannot.
    """
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        reason = str(e).split('\n')[0]
        raise ValueError(f'device {str(device)!r} cannot be used: {reason} Expected cpu, or cuda with a GPU.') from e
    return torch.device(device)


class _Images(Dataset):
    """Images in a folder for each class, and in folders within it, read as `predict` does.

    Of any format that Pillow reads: timm's data set knows two, and takes the next image for one that it cannot read.

    Attributes:
        transform: What makes an input of an image; timm's loader sets it.
    """

    def __init__(self, folder: Path, classes: Dict[str, int], channels: int):
        """
        Args:
            folder: Holds the folders.
            classes: Their names, and the numbers of these classes.
            channels: 1 for grey images, 3 for RGB.

        Raises:
            FileNotFoundError: There are no images.
        """
        self.transform: Optional[Callable[[Image.Image], Any]] = None
        self.channels = channels
        self.samples: List[Tuple[Path, int]] = []
        suffixes = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN} - _NO_IMAGES
        others = 0
        for name in sorted(classes.keys() & {path.name for path in folder.iterdir()}):
            for path in _visible_files(folder / name):
                if path.suffix.lower() in suffixes:
                    self.samples.append((path, classes[name]))
                else:
                    others += 1
        if others:
            _logger.warning('%d files in the folders of %s are not images by their names: left out.', others, folder)
        if not self.samples:
            raise FileNotFoundError(f'No images in the folders of {folder}.')

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        path, label = self.samples[index]
        try:
            image = load_image(path, self.channels, background=0 if self.channels == 1 else 255)
        except Exception as e:  # Pillow fails in any way on damaged files
            raise ValueError(f'{path} is no readable image ({one_line(e)}): remove or replace it.') from e
        return self.transform(image) if self.transform else image, label


def _visible_files(folder: Path) -> List[Path]:
    """All files in a folder, the folders within it and those that links lead to, but for what systems hide in them."""
    found: List[Path] = []
    ways = {str(folder): [os.stat(folder)]}  # from there: a link may lead back
    for place, folders, files in os.walk(str(folder), followlinks=True):
        way, ahead = ways.pop(place), {}
        for name in folders:
            status = os.stat(os.path.join(place, name))
            if not _is_hidden(name) and not any(os.path.samestat(status, passed) for passed in way):
                ahead[name] = [*way, status]
        folders[:] = ahead
        ways.update({os.path.join(place, name): way for name, way in ahead.items()})
        found += [Path(place, name) for name in files if not _is_hidden(name)]
    return sorted(found)


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or name == '__MACOSX'


def _own_classes(name: str) -> Optional[List[str]]:
    """Names of the classes of a model of the Hub or of a folder; None if they are those of the registered model.

    Raises:
        ValueError: They are others, and have no names.
    """
    if not parse_model_name(name)[0]:
        return None
    config, registered = read_config(name), timm.get_pretrained_cfg(architecture_of(name))
    own = config.get('label_names') or config.get('pretrained_cfg', {}).get('label_names')
    if not own:
        if config.get('num_classes', registered.num_classes) != registered.num_classes:
            raise ValueError(f'{name} does not name its classes: convert it with label_names.')
        return None
    own = [str(label) for label in own]
    return None if own == list(CLASS_NAMES.get(registered.tag, ())) else own


def _image_folder(name: str, own: Optional[List[str]], root: Path) -> _Images:
    channels = timm.get_pretrained_cfg(architecture_of(name)).input_size[0]
    if parse_model_name(name)[0]:
        channels = read_config(name).get('pretrained_cfg', {}).get('input_size', [channels])[0]
    check_image_channels(channels)
    tag = '' if own else timm.get_pretrained_cfg(architecture_of(name)).tag
    known: List[str] = own or list(CLASS_NAMES.get(tag, ())) or ImageNetInfo().label_names()
    choices = ('cifar10/test',) * (tag in CLASS_NAMES) + ('test', 'val', 'validation', '')
    indices: Dict[str, int] = {label: i for i, label in enumerate(known)}
    for folder in (root / choice for choice in choices):
        if not folder.is_dir():
            continue
        folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
        found = [label for label in folders if not _is_hidden(label)]
        if not set(found) & set(known):
            continue
        strange = [label for label in found if label not in indices]
        if strange:
            raise ValueError(f'{folder / strange[0]} is not a class of {name}, which knows {_some(known)}.')
        return _Images(folder, indices, channels)
    raise FileNotFoundError(
        f'No test images under {root}: expected one folder for each class ({_some(known)}) in it or in its folder '
        f'{", ".join(choice for choice in choices if choice)}.'
        + (' For CIFAR-10: timm-smpconv data cifar10 DIR.' if tag in CLASS_NAMES else '')
    )


def _some(names: List[str]) -> str:
    return ', '.join(names if len(names) <= 10 else [*names[:3], '...', names[-1]])


def _evaluate_images(model: nn.Module, dataset: _Images, progress: bool) -> Tuple[torch.Tensor, torch.Tensor]:
    cfg = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    pixels = 100_000 if next(model.parameters()).device.type == 'cpu' else 6_400_000  # of a batch
    loader = create_loader(
        dataset,
        input_size=cfg['input_size'],
        batch_size=max(1, pixels // math.prod(cfg['input_size'][1:])),
        interpolation=cfg['interpolation'],
        mean=cfg['mean'],
        std=cfg['std'],
        crop_pct=cfg['crop_pct'],
        crop_mode=cfg['crop_mode'],
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device('cpu'),
    )
    return predict_classes(model, loader, len(dataset), 'image', progress)
