"""Classification of image files, and for the speech networks of sound files, of any kind."""

import dataclasses
import logging
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import timm
import torch
from PIL import Image, ImageCms, ImageOps
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.models import parse_model_name, split_model_name_tag
from torch import nn

from ._text import one_line
from .audio import load_second
from .catalog import model_names
from .checkpoint import (
    CheckpointError,
    carried_settings,
    check_architecture,
    read_checkpoint,
    records_settings,
)
from .classes import CLASS_NAMES
from .factory import architecture_of, create_model
from .fetch import weights_file
from .tasks import TASKS, network_input, task_of

__all__ = [
    'FileResult',
    'Prediction',
    'check_inputs',
    'check_takes_files',
    'class_names',
    'load_image',
    'load_model',
    'predict_files',
]

_logger = logging.getLogger(__name__)

# beyond this ratio of the sides only the middle of an image is resized: the centre crop that follows drops the rest
_MAX_ASPECT = 16


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One class of a prediction.

    Attributes:
        label: Name of the class.
        index: Its index.
        probability: Its probability.
    """

    label: str
    index: int
    probability: float


@dataclasses.dataclass(frozen=True)
class FileResult:
    """What became of one file.

    Attributes:
        file: Path as given.
        predictions: Most probable classes first; empty if the file could not be read.
        error: Why the file could not be read.
    """

    file: str
    predictions: List[Prediction]
    error: Optional[str] = None


def check_takes_files(name: str, invert: bool = False) -> None:
    """Checks that a known model classifies files: images or sounds.

    Args:
        name: Model, of this package or `hf-hub:ORG/NAME` or `local-dir:FOLDER`.
        invert: Dark and light are to be swapped, which sounds do not have.

    Raises:
        ValueError: It is unknown, classifies other series, or has nothing to invert.
    """
    architecture = architecture_of(name)
    channels, height, steps = _input_size(architecture)
    task = task_of(architecture)
    if height > 1:
        return
    if task is None or not task.sound:
        images = [known for known in model_names() if _input_size(known)[1] > 1]
        sounds = [known for known in model_names() if known in TASKS and TASKS[known].sound]
        raise ValueError(
            f'{name} does not classify images or sounds but series of {steps} steps and {channels} channel(s): use it '
            f'from Python, or choose one of {", ".join(images)} for images, {", ".join(sounds)} for sounds.'
        )
    if invert:
        raise ValueError(f'{name} classifies sounds, which have no dark and light to invert.')


def _input_size(name: str) -> Tuple[int, ...]:
    return timm.get_pretrained_cfg(name).input_size


def load_model(name: str, checkpoint_path: Optional[Union[str, Path]] = None, inference_mode: bool = True) -> nn.Module:
    """Builds a model with its weights, in eval mode.

    Args:
        name: `name` or `name.tag` of a model of this package, `hf-hub:ORG/NAME` or `local-dir:FOLDER`.
        checkpoint_path: Weights to use in place of the model's own: of this package, deployed or not, or the authors'.
        inference_mode: In deployed form; else as it was trained, which wants weights of that form.

    Raises:
        ValueError: The model is unknown, or the checkpoint cannot be loaded.
        RuntimeError: The model has no weights.
    """
    architecture_of(name)
    if checkpoint_path is None:
        return create_model(name, pretrained=True, inference_mode=inference_mode).eval()
    if parse_model_name(name)[0]:
        raise ValueError(f'{name} brings its own weights: leave out checkpoint_path, or name the model alone.')
    path = Path(checkpoint_path)
    if not path.is_file():
        raise ValueError(f'No checkpoint at {path}: expected a file of weights (.safetensors, .pth, .pt ...).')
    try:
        checkpoint = read_checkpoint(path)
        check_architecture(checkpoint, split_model_name_tag(name)[0], 'it')
        carried = carried_settings(path, _input_size(name)[0], checkpoint)
        size = carried.get('input_size', _input_size(name))
        # images may have any size; a series of another rate is another one
        if _input_size(name)[1] == 1 and tuple(size) != _input_size(name):
            raise ValueError(
                f'it is of inputs of size {size}, not {_input_size(name)}: load its folder from Python, with '
                f'timm.create_model("local-dir:{path.parent}", pretrained=True).'
            )
        overlay = dict(state_dict=checkpoint, **carried)
        settings = dict(inference_mode=inference_mode, pretrained_cfg_overlay=overlay)
        model = timm.create_model(name, pretrained=True, **settings).eval()
        model.pretrained_cfg.pop('state_dict', None)  # the configuration would keep a second copy
        return model
    except Exception as e:  # unpickling and conversion of a file of unknown contents fail in any way
        raise ValueError(f'Cannot load {path} into {name}: {_one_line(e)} Expected a checkpoint of this model.') from e


def check_inputs(name: str, checkpoint_path: Optional[Union[str, Path]] = None, step_statistics: bool = False) -> None:
    """Checks how the inputs of weights were normalised, where the authors normalise them in another way.

    Weights that do not say it are reported in the log.

    Args:
        name: `name` or `name.tag` of a model of this package, `hf-hub:ORG/NAME` or `local-dir:FOLDER`.
        checkpoint_path: Weights to use in place of the model's own.
        step_statistics: They are taken for the authors'.

    Raises:
        ValueError: `step_statistics` for a model of other data, or for weights of this package's training.
        WeightsError: The model's own weights cannot be had.
    """
    task = task_of(architecture_of(name))
    if task is None or not task.stepwise:
        if step_statistics:
            fitting = ', '.join(known for known, task in TASKS.items() if task.stepwise)
            raise ValueError(f'Statistics of each time step are for {fitting}, not for {name}.')
        return
    file = Path(checkpoint_path) if checkpoint_path else weights_file(name)
    if file is None or not file.is_file():  # of which loading it says more
        return
    try:
        beside = bool(checkpoint_path or parse_model_name(name)[0])
        said, own = bool(carried_settings(file, beside=beside)), records_settings(file)
    except CheckpointError:  # so too
        return
    if step_statistics and own:
        raise ValueError(
            f'{file} says how its inputs were normalised, since it is of the training of this package: leave out '
            f"step_statistics, which is for the authors' weights."
        )
    if not step_statistics and not said:
        _logger.warning(
            '%s does not say how its inputs were normalised: as for the weights of this package is assumed. The '
            'authors normalise each time step; timm-smpconv validate --step-statistics measures their weights so.',
            file,
        )


def class_names(model: nn.Module) -> List[str]:
    """Names of a model's classes: their indices if nothing better is known."""
    cfg = model.pretrained_cfg
    if len(cfg.get('label_names') or ()) == model.num_classes:  # of somebody's own data
        return list(cfg['label_names'])
    if cfg.get('tag') == 'in1k' and model.num_classes == 1000:
        return ImageNetInfo().label_descriptions()
    names = CLASS_NAMES.get(cfg.get('tag'), ())
    return list(names) if len(names) == model.num_classes else [str(i) for i in range(model.num_classes)]


def load_image(path: Union[str, Path], channels: int = 3, background: int = 255, invert: bool = False) -> Image.Image:
    """Reads the first frame of an image file, upright.

    Args:
        path: File of any format that Pillow reads, in any mode.
        channels: 1 for a grey image, 3 for RGB.
        background: Grey value behind transparent pixels, 0 to 255.
        invert: Swap dark and light at the end.

    Returns:
        Image of mode L or RGB.

    Raises:
        Exception: The file cannot be read; Pillow's decoders raise exceptions of many types.
    """
    with warnings.catch_warnings():
        # about what was read nonetheless: odd metadata, a size near the limit
        warnings.simplefilter('ignore')
        with Image.open(path) as file:
            file.load()
            image = _to_8_bits(_upright(file))
    if image.mode == 'La':  # premultiplied: Pillow converts it to LA alone
        image = image.convert('LA')
    if image.mode in ('LA', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, (background,) * 3 + (255,)), image)
    image = image.convert('L' if channels == 1 else 'RGB')
    return ImageOps.invert(image) if invert else image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # metadata that is damaged does not damage the image; Pillow fails in any way on it
        return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales modes of more than 8 bits, which Pillow would clip, and leaves others as they are."""
    if image.mode == 'LAB':
        profiles = ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB')
        return ImageCms.profileToProfile(image, *profiles, outputMode='RGB')
    if image.mode not in ('I', 'F') and not image.mode.startswith('I;16'):
        return image
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    if image.mode.startswith('I;16'):
        white = 65535.0
    else:  # these modes do not say what white is: the smallest usual value that no pixel exceeds
        highest = values.max(initial=0.0)
        usual = (1.0, 255.0, 65535.0) if image.mode == 'F' else (255.0, 65535.0)
        white = next((value for value in usual if highest <= value), highest)
    grey = Image.fromarray((values.clip(0.0, white) / white * 255).round().astype(np.uint8))
    hidden = image.info.get('transparency')  # the value of transparent pixels
    if hidden is None:
        return grey
    return Image.merge('LA', (grey, Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8))))


def _limit_aspect(image: Image.Image) -> Image.Image:
    """Cuts the ends off an extremely long image, which would fill the memory once its short side is scaled up."""
    width, height = image.size
    longest = _MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def check_image_channels(channels: int) -> None:
    """Checks that image files can be made to inputs of so many channels.

    Raises:
        ValueError: They cannot.
    """
    if channels not in (1, 3):
        raise ValueError(f'Image files become 1 channel or 3, the model takes {channels}: feed it from Python.')


def _reader(model: nn.Module, invert: bool) -> Callable[[str], torch.Tensor]:
    """What turns a file into an input of the network, (channels, height, width) or (channels, steps)."""
    task = task_of(model.pretrained_cfg['architecture'])
    if task is not None and task.sound:
        known = timm.get_pretrained_cfg(model.pretrained_cfg['architecture']).input_size[0]
        if model.pretrained_cfg['input_size'][0] != known:
            raise ValueError(
                f'Sounds become {known} channels, the model takes {model.pretrained_cfg["input_size"][0]}.'
            )
        return lambda file: network_input(task, load_second(file).unsqueeze(0), model.pretrained_cfg)[0]
    cfg = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    transform = create_transform(**cfg, is_training=False)
    channels = cfg['input_size'][0]
    check_image_channels(channels)
    # digits are light on black; what is inverted afterwards needs the opposite ground
    background = 0 if channels == 1 and not invert else 255
    return lambda file: transform(_limit_aspect(load_image(file, channels, background, invert)))


@torch.inference_mode()
def predict_files(
    model: nn.Module,
    files: Sequence[Union[str, Path]],
    topk: int = 3,
    invert: bool = False,
    batch_size: int = 16,
) -> Iterator[FileResult]:
    """Classifies files, a few at a time, with the preprocessing of the model's weights.

    Args:
        model: Model for images or for speech in eval mode, with its pretrained_cfg.
        files: Paths. Of a sound longer than a second the second with the most energy counts.
        topk: Classes to return for each file; all if the model has fewer.
        invert: Swap dark and light: for dark digits on light ground.
        batch_size: Files in memory at a time.

    Yields:
        One result for each file, in their order; a file that cannot be read has its error in place of predictions.

    Raises:
        FloatingPointError: The weights give outputs that are not finite.
    """
    read = _reader(model, invert)
    names = class_names(model)

    for start in range(0, len(files), batch_size):
        chunk = [str(file) for file in files[start : start + batch_size]]
        inputs: List[torch.Tensor] = []
        errors: Dict[int, str] = {}
        for i, file in enumerate(chunk):
            try:
                inputs.append(read(file))
            except Exception as e:  # a broken file makes decoders raise almost anything, and must not stop the others
                errors[i] = _one_line(e)
        readable: Iterator[Any] = iter(())
        if inputs:
            probabilities, indices = model(torch.stack(inputs)).softmax(1).topk(min(topk, len(names)))
            if not probabilities.isfinite().all():
                raise FloatingPointError('The outputs of the network are not finite: its weights are damaged.')
            readable = zip(probabilities.tolist(), indices.tolist())
        for i, file in enumerate(chunk):
            if i in errors:
                yield FileResult(file, [], errors[i])
            else:
                yield FileResult(file, [Prediction(names[j], j, p) for p, j in zip(*next(readable))])


def _one_line(error: Exception) -> str:
    """The reason that an exception gives, short enough for a line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return text if text.endswith('.') else text + '.'
