"""What each network that timm's own scripts cannot feed is fed with: data, augmentation, features, normalisation."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Callable, Dict, FrozenSet, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from timm.models import split_model_name_tag

from .audio import RATE, resample
from .data import Samples, load_character_trajectories, load_mnist, load_speech, speaker_number
from .features import MFCC
from .recipe import Recipe
from .weights import training_speakers

__all__ = [
    'TASKS',
    'Task',
    'augment_digits',
    'augment_waves',
    'channel_statistics',
    'heard',
    'mask_spectrogram',
    'network_input',
    'normalize',
    'signal_input',
    'split',
    'stepwise',
    'task_of',
]

Step = Callable[[torch.Tensor, Optional[Recipe], Optional[torch.Generator]], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a network is fed with.

    Attributes:
        load: Reads the training or the test part under a data folder.
        signal: Stored samples to images, waves or trajectories; augmented if there is a recipe. Networks that have this
            in common can teach each other.
        features: Signals to inputs of the network, not yet normalised; augmented if there is a recipe.
        sound: Samples are recordings of one second at 16 kHz, as 16-bit numbers.
        resampled: Inputs of any number of steps make sense: they are brought to that of the network.
        measured: Inputs are normalised with the statistics of the training data, not with fixed numbers.
        stepwise: The authors' networks want inputs that are normalised in each time step; see `stepwise`.
        options: Fields of a recipe that say how this task augments and splits.
    """

    load: Callable[[Union[str, Path], bool], Samples]
    signal: Step
    features: Step
    measured: bool
    options: FrozenSet[str]
    sound: bool = False
    resampled: bool = False
    stepwise: bool = False


def task_of(name: str) -> Optional[Task]:
    """Task of `model` or `model.tag`; None for networks that timm's own loader of images feeds."""
    return TASKS.get(split_model_name_tag(name)[0])


def augment_digits(images: torch.Tensor, generator: torch.Generator, erase_size: int = 4) -> torch.Tensor:
    """Augments digits as the reference does: each of four operations with probability 0.5.

    Rotation by up to 30 degrees, shift by up to 2 of 28 pixels, scale 0.75 to 1, and erasing of a square, of 4 x 4
    pixels as the authors describe it. Their code takes the nearest pixel, shifts by whole ones, and erases more: 4 / 28
    is an area there, a square of 11 x 11 pixels, which gets the mean grey.

    Args:
        images: Images with background 0, (B, C, H, W), float.
        generator: Source of all randomness.
        erase_size: Side of the square, in pixels, up to that of the images.

    Returns:
        Augmented images of the same shape.
    """
    count, _, height, width = images.shape

    def uniform(low: float, high: float, neutral: float, numbers: int = 1) -> torch.Tensor:
        value = low + (high - low) * torch.rand(numbers, count, generator=generator)
        return torch.where(torch.rand(count, generator=generator) < 0.5, value, torch.full((), neutral))

    (angle,) = uniform(-30.0, 30.0, 0.0).deg2rad()
    shift_x, shift_y = uniform(-4 / 28, 4 / 28, 0.0, numbers=2)  # in half widths
    (scale,) = uniform(0.75, 1.0, 1.0)
    # affine_grid maps outputs to inputs: inverse rotation, inverse scale
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([torch.stack([cos, sin, shift_x], 1), torch.stack([-sin, cos, shift_y], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)

    top = torch.randint(0, height - erase_size + 1, (count, 1, 1), generator=generator)
    left = torch.randint(0, width - erase_size + 1, (count, 1, 1), generator=generator)
    erase = torch.rand(count, 1, 1, generator=generator) < 0.5
    rows, cols = torch.arange(height).reshape(1, -1, 1), torch.arange(width).reshape(1, 1, -1)
    patch = erase & (rows >= top) & (rows < top + erase_size) & (cols >= left) & (cols < left + erase_size)
    return images.masked_fill(patch.unsqueeze(1), 0.0)


def augment_waves(waves: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """Shifts, stretches, amplifies and disturbs recordings, as far as a recipe says.

    Args:
        waves: Waves in [-1, 1], (B, samples).
        recipe: Its fields time_shift, speed, gain and noise.
        generator: Source of all randomness.

    Returns:
        Waves of the same shape; what moves in from outside is silence.
    """
    count, length = waves.shape

    def uniform(limit: float) -> torch.Tensor:
        return limit * (2 * torch.rand(count, 1, generator=generator) - 1)

    if recipe.time_shift or recipe.speed:
        shift = (uniform(recipe.time_shift) * RATE).round()
        middle = (length - 1) / 2
        position = (torch.arange(length) - middle) * (1 + uniform(recipe.speed)) + middle - shift
        # linear interpolation, with a zero beyond each end
        position = (position + 1).clamp(0, length + 1)
        left = position.floor().long()
        padded = F.pad(waves, (1, 2))
        waves = torch.lerp(padded.gather(1, left), padded.gather(1, left + 1), position - left)
    if recipe.gain:
        waves = waves * 10 ** (uniform(recipe.gain) / 20)
    if recipe.noise:
        scale = recipe.noise * torch.rand(count, 1, generator=generator)
        waves = waves + scale * torch.randn(count, length, generator=generator)
    return waves


def mask_spectrogram(spectrogram: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """Hides bands and frames, as far as a recipe says (SpecAugment).

    Args:
        spectrogram: Log spectrograms, (B, bands, frames).
        recipe: Its fields time_mask, freq_mask and masks.
        generator: Source of all randomness.

    Returns:
        Spectrograms with each recording's own mean in the masks.
    """
    mean = spectrogram.mean((1, 2), keepdim=True)
    for dim, widest in ((1, recipe.freq_mask), (2, recipe.time_mask)):
        if not widest:
            continue
        size = spectrogram.shape[dim]
        shape = (len(spectrogram), 1, 1)
        steps = torch.arange(size).reshape((1, -1, 1) if dim == 1 else (1, 1, -1))
        for _ in range(recipe.masks):
            width = (torch.rand(shape, generator=generator) * (min(widest, size) + 1)).floor()
            start = (torch.rand(shape, generator=generator) * (size - width + 1)).floor()
            spectrogram = torch.where((steps >= start) & (steps < start + width), mean, spectrogram)
    return spectrogram


def _digits(raw: torch.Tensor, recipe: Optional[Recipe], generator: Optional[torch.Generator]) -> torch.Tensor:
    images = raw.float() / 255
    return augment_digits(images, generator, recipe.erase_size) if recipe is not None and recipe.augment else images


def _waves(raw: torch.Tensor, recipe: Optional[Recipe], generator: Optional[torch.Generator]) -> torch.Tensor:
    waves = raw.float() / 32768
    return augment_waves(waves, recipe, generator) if recipe is not None else waves


def _as_they_are(signal: torch.Tensor, recipe: Optional[Recipe], generator: Optional[torch.Generator]) -> torch.Tensor:
    return signal


def _one_channel(signal: torch.Tensor, recipe: Optional[Recipe], generator: Optional[torch.Generator]) -> torch.Tensor:
    return signal.unsqueeze(1)


@functools.lru_cache(maxsize=1)
def _mfcc() -> MFCC:
    with torch.inference_mode(False):  # gradients may pass it later
        return MFCC()


def _cepstra(signal: torch.Tensor, recipe: Optional[Recipe], generator: Optional[torch.Generator]) -> torch.Tensor:
    spectrogram = _mfcc().log_mel(signal)
    if recipe is not None:
        spectrogram = mask_spectrogram(spectrogram, recipe, generator)
    return _mfcc().cepstrum(spectrogram)


def _trajectories(raw: torch.Tensor, recipe: Optional[Recipe], generator: Optional[torch.Generator]) -> torch.Tensor:
    return raw.float()


_WAVE_OPTIONS = frozenset({'time_shift', 'speed', 'gain', 'noise', 'val_percent'})
_RAW_OPTIONS = _WAVE_OPTIONS | {'sample_rate', 'initial_sample_rate'}
_MFCC_OPTIONS = _WAVE_OPTIONS | {'time_mask', 'freq_mask', 'masks'}
_MNIST = Task(load_mnist, _digits, _as_they_are, False, frozenset({'augment', 'erase_size', 'val_images'}))

TASKS: Dict[str, Task] = {
    'smpconv_seq_mnist': _MNIST,
    'smpconv_seq_pmnist': _MNIST,
    'smpconv_seq_speech': Task(load_speech, _waves, _cepstra, True, _MFCC_OPTIONS, sound=True, stepwise=True),
    'smpconv_seq_speech_raw': Task(
        load_speech, _waves, _one_channel, False, _RAW_OPTIONS, sound=True, resampled=True, stepwise=True
    ),
    'smpconv_seq_chartraj': Task(
        load_character_trajectories, _trajectories, _as_they_are, True, frozenset({'val_percent'}), stepwise=True
    ),
}


def split(samples: Samples, recipe: Recipe, task: Task) -> Tuple[Samples, Samples]:
    """Training data to what is trained on and what is held out, the same in every run.

    Speakers are never in both parts: those whose number, a hash, is in the lowest val_percent of 100 are held out.

    Args:
        samples: Training data.
        recipe: Its fields val_images or val_percent.
        task: Task that says which field counts.

    Raises:
        ValueError: Too little is left to train on.
    """
    count = len(samples)
    if 'val_images' in task.options:
        held = torch.arange(count) >= count - recipe.val_images
    elif samples.speakers is not None:
        held = samples.speakers % 100 < recipe.val_percent
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        held = order < count * recipe.val_percent / 100
    if count - int(held.sum()) < recipe.batch_size:
        raise ValueError(
            f'Of {count} training samples {int(held.sum())} are held out: not enough is left for a batch of '
            f'{recipe.batch_size}. Lower val_images, val_percent or batch_size.'
        )
    return samples[~held], samples[held]


def heard(samples: Samples, names: Iterable[str]) -> torch.Tensor:
    """Which samples are by speakers that bundled weights, `model.tag`, were trained on, (N,), bool."""
    speakers = {speaker for name in names for speaker in training_speakers(name)}
    if samples.speakers is None or not speakers:
        return torch.zeros(len(samples), dtype=torch.bool)
    return torch.isin(samples.speakers, torch.tensor([speaker_number(speaker) for speaker in speakers]))


def _moments(samples: Samples, task: Task, dim: int, batch_size: int) -> Tuple[int, torch.Tensor, torch.Tensor]:
    """Number of values, mean and variance of the features at each place of a dimension, over all others."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for raw in samples.inputs.split(batch_size):
        x = task.features(task.signal(raw, None, None), None, None).double().transpose(0, dim).flatten(1)
        count += x.shape[1]
        total, squares = total + x.sum(1), squares + x.square().sum(1)
    mean = total / count
    return count, mean, (squares / count - mean.square()).clamp(min=0.0)


def channel_statistics(samples: Samples, task: Task, batch_size: int = 256) -> Tuple[List[float], List[float]]:
    """Mean and standard deviation of each channel of the network's input, over all samples and steps."""
    _, mean, variance = _moments(samples, task, 1, batch_size)
    std = variance.sqrt().clamp(min=1e-6)
    # few digits, so that a file of text carries exactly what the network was trained with
    return [float(f'{value:.6g}') for value in mean.tolist()], [float(f'{value:.6g}') for value in std.tolist()]


def stepwise(task: Task, samples: Samples, batch_size: int = 256) -> Task:
    """A task whose features are normalised in each time step, as the authors' speech and trajectory networks want them.

    Mean and standard deviation of a step are over all samples and channels (`normalise_data` of the authors' code).
    Their files do not hold them, so they are measured here.

    Args:
        task: Of a network whose inputs are series, (B, channels, steps).
        samples: Training data.
        batch_size: Samples at once.

    Returns:
        The task with such features, which need no further normalisation.
    """
    count, mean, variance = _moments(samples, task, 2, batch_size)
    std = (variance * count / (count - 1)).sqrt()

    def features(signal: torch.Tensor, recipe: Optional[Recipe], generator: Optional[torch.Generator]) -> torch.Tensor:
        x = task.features(signal, recipe, generator)
        return (x - mean.to(x.dtype)) / (std.to(x.dtype) + 1e-5)

    return dataclasses.replace(task, features=features)


def network_input(task: Task, raw: torch.Tensor, cfg: Mapping[str, Any]) -> torch.Tensor:
    """Stored samples, (B, ...), to what a network is called with outside training; see `signal_input`."""
    return signal_input(task, task.signal(raw, None, None), cfg)


def signal_input(
    task: Task,
    signal: torch.Tensor,
    cfg: Mapping[str, Any],
    recipe: Optional[Recipe] = None,
    generator: Optional[torch.Generator] = None,
) -> torch.Tensor:
    """Signals to what a network is called with.

    Args:
        task: The network's.
        signal: What `task.signal` gave.
        cfg: The network's pretrained configuration: input_size, mean and std.
        recipe: Says how to augment the features; None for no augmentation.
        generator: Source of all randomness of the augmentation.

    Returns:
        Input, (B, channels, steps) or (B, channels, height, width).
    """
    x = task.features(signal, recipe, generator)
    steps = cfg['input_size'][-1]
    if task.resampled and x.shape[-1] != steps:
        x = resample(x, steps)
    return normalize(x, cfg['mean'], cfg['std'])


def normalize(x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Subtracts the mean of each channel and divides by its standard deviation; channels are dimension 1."""
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return (x - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape)
