"""Accuracy of any model of this package on test data."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
import torch
from PIL import Image
from timm.data import ImageDataset, ImageNetInfo, create_loader, resolve_data_config
from torch import nn
from tqdm import tqdm

from . import store
from .classes import CLASS_NAMES
from .data import Samples, speaker_number
from .predict import check_inputs, check_known, class_names, load_model
from .tasks import TASKS, stepwise
from .train import evaluate
from .weights import training_speakers

__all__ = ['Measurement', 'validate']


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Predictions of a model for all test data.

    Attributes:
        model: Name of the model.
        predictions: Predicted classes, (N,).
        labels: True classes, (N,).
        names: Names of the classes.
        left_out: Test samples that were not looked at, since the weights were trained on their speakers.
    """

    model: str
    predictions: torch.Tensor
    labels: torch.Tensor
    names: List[str]
    left_out: int = 0

    @property
    def total(self) -> int:
        """Number of samples."""
        return len(self.labels)

    @property
    def hits(self) -> int:
        """Samples whose prediction is right."""
        return int((self.predictions == self.labels).sum())

    @property
    def confusion(self) -> torch.Tensor:
        """Samples of each true class (row) that were taken for each class (column)."""
        count = len(self.names)
        return torch.bincount(self.labels * count + self.predictions, minlength=count * count).reshape(count, count)


def validate(
    name: str,
    data_dir: Union[str, Path],
    checkpoint_path: Optional[Union[str, Path]] = None,
    progress: bool = True,
    step_statistics: bool = False,
) -> Measurement:
    """Runs a model over its test data.

    The bundled speech weights were trained on half of the official test split: recordings by the speakers of that half
    are left out, unless other weights are given.

    Args:
        name: `name` or `name.tag` of a model of this package.
        data_dir: What `timm-smpconv data` made; for ImageNet and CIFAR-10 a folder of class folders, or one that holds
            it as test, val, validation or cifar10/test.
        checkpoint_path: Weights to use in place of the model's own.
        progress: Show a progress bar.
        step_statistics: Normalise the inputs in each time step, with statistics of the training data in `data_dir`, as
            the authors' speech and trajectory networks want it.

    Raises:
        ValueError: The model is unknown, weights or data do not fit, or an image cannot be read; or step_statistics for
            a model whose inputs the authors normalise as this package does, or for weights of this package.
        FileNotFoundError: The data are not there.
        RuntimeError: The model has no weights.
    """
    check_known(name)
    task = TASKS.get(name.partition('.')[0])
    check_inputs(name, checkpoint_path, step_statistics)
    if task:
        found = task.load(data_dir, False)
        samples = found if checkpoint_path else _unheard(name, found)
        if not len(samples):
            raise ValueError(f'{data_dir} has no test data for {name}.')
        model = load_model(name, checkpoint_path)
        if step_statistics:
            task = stepwise(task, task.load(data_dir, True))
            model.pretrained_cfg.update(mean=(0.0,), std=(1.0,))
        predictions = evaluate(model, samples, task, progress=progress)
        return Measurement(name, predictions, samples.labels, class_names(model), len(found) - len(samples))
    dataset = _image_folder(name, Path(data_dir))
    model = load_model(name, checkpoint_path)
    predictions, labels = _evaluate_images(model, dataset, progress)
    return Measurement(name, predictions, labels, class_names(model))


def _unheard(name: str, samples: Samples) -> Samples:
    """The samples whose speakers the model's own weights were not trained on."""
    key = f'{name.partition(".")[0]}.{timm.get_pretrained_cfg(name).tag}'
    heard = training_speakers(key)
    if not heard or samples.speakers is None or store.find(key, by_hand=True):  # weights of the user come first
        return samples
    return samples[~torch.isin(samples.speakers, torch.tensor([speaker_number(speaker) for speaker in heard]))]


class _Images(ImageDataset):
    """Images none of which is left out: timm's own data set takes the next one for one that it cannot read."""

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        file, target = self.reader[index]
        try:
            with file:
                image = Image.open(file).convert('RGB')
        except Exception as e:  # Pillow fails in any way on damaged files
            raise ValueError(f'{self.filename(index)} is no readable image ({e}): remove or replace it.') from e
        return self.transform(image) if self.transform else image, target


def _image_folder(name: str, root: Path) -> ImageDataset:
    cfg = timm.get_pretrained_cfg(name)
    known: List[str] = list(CLASS_NAMES.get(cfg.tag, ())) or ImageNetInfo().label_names()
    choices = ('cifar10/test',) * (cfg.tag in CLASS_NAMES) + ('test', 'val', 'validation', '')
    indices: Dict[str, int] = {label: i for i, label in enumerate(known)}
    for folder in (root / choice for choice in choices):
        if not folder.is_dir():
            continue
        found = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if not set(found) & set(known):
            continue
        strange = [label for label in found if label not in indices]
        if strange:
            raise ValueError(f'{folder / strange[0]} is not a class of {name}, which knows {_some(known)}.')
        try:
            return _Images(str(folder), class_map=indices)
        except RuntimeError as e:
            raise FileNotFoundError(' '.join(str(e).split())) from e
    raise FileNotFoundError(
        f'No test images under {root}: expected one folder for each class ({_some(known)}) in it or in its folder '
        f'{", ".join(choice for choice in choices if choice)}.'
        + (' For CIFAR-10: timm-smpconv data cifar10 DIR.' if cfg.tag in CLASS_NAMES else '')
    )


def _some(names: List[str]) -> str:
    return ', '.join(names if len(names) <= 10 else [*names[:3], '...', names[-1]])


@torch.inference_mode()
def _evaluate_images(model: nn.Module, dataset: ImageDataset, progress: bool) -> Tuple[torch.Tensor, torch.Tensor]:
    cfg = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    loader = create_loader(
        dataset,
        input_size=cfg['input_size'],
        batch_size=max(1, 100_000 // math.prod(cfg['input_size'][1:])),
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
    predictions, labels = [], []
    hits = seen = 0
    bar = tqdm(total=len(dataset), desc='evaluate', unit='image', disable=not progress, leave=False)
    for x, target in loader:
        predictions.append(model(x).argmax(1))
        labels.append(target)
        hits += int((predictions[-1] == target).sum())
        seen += len(target)
        bar.set_postfix(accuracy=f'{hits / seen:.4f}', refresh=False)
        bar.update(len(target))
    bar.close()
    return torch.cat(predictions), torch.cat(labels)
