"""Recipes: the hyper-parameters of `timm-smpconv train`."""

import dataclasses
import inspect
import math
import re
import sys
from pathlib import Path
from typing import Any, Dict

import yaml

__all__ = ['Recipe', 'field_texts', 'read_recipe', 'recipe_text', 'same_recipe']


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a run; names as in timm's train.py where it has them.

    Attributes:
        model: Registered model name.
        epochs: Passes over the training data.
        batch_size: Samples per step.
        opt: Optimizer, one of timm's.
        lr: Learning rate after the warm-up; the radii learn at a tenth of it.
        min_lr: Learning rate at the end of the cosine.
        warmup_epochs: Epochs of linear warm-up, among `epochs`.
        warmup_prefix: The cosine begins after the warm-up, as in the authors' code; otherwise its first epochs are
            replaced by the warm-up.
        weight_decay: Weight decay of everything but coordinates and radii of points, biases and norms.
        clip_grad: Largest norm of the gradient, 0 for no limit.
        drop: Dropout rate within the blocks.
        drop_path: Largest rate of stochastic depth.
        input_drop_rate: Dropout rate of the input.
        pretrained: Start from the model's own weights, wherever `pretrained=True` finds them.
        initial_checkpoint: Start from the weights of this file; without it or `pretrained`, from random ones.
        amp: Compute in bfloat16 where torch's autocast does.
        smoothing: Label smoothing.
        mixup: Alpha of mixup, 0 for none.
        kd_model_name: Teacher, with its pretrained weights: a network for the same data, whose class probabilities of
            the augmented samples are learned beside the labels; none if empty.
        task_loss_weight: Share of the labels where there is a teacher, whose share is the rest.
        model_ema_decay: Decay of the weight average that is evaluated and kept, 0 for none.
        augment: MNIST: rotate, shift, scale and erase the training images.
        erase_size: MNIST: side of the square that `augment` erases, in pixels; the authors' code erases 11.
        time_shift: Speech: shift by up to so many seconds.
        speed: Speech: play faster or slower by up to this fraction.
        gain: Speech: amplify or attenuate by up to so many decibels.
        noise: Speech: add white noise of up to this standard deviation, where 1 is full scale.
        sample_rate: Raw speech: samples per second that the network gets, 0 for its own; kernel_size and radius of
            `model_kwargs` have to fit.
        initial_sample_rate: Raw speech: samples per second of the network in `initial_checkpoint`, 0 for the same.
        time_mask: Speech as MFCC: widest mask over frames.
        freq_mask: Speech as MFCC: widest mask over mel bands.
        masks: Speech as MFCC: masks of each kind.
        val_images: MNIST: training images held out to watch the run; never test images.
        val_percent: Other data: percentage of the speakers, or of the trajectories, held out.
        seed: Seed of initial weights, data order, augmentation and dropout.
        opt_kwargs: Further arguments of the optimizer.
        model_kwargs: Further arguments of the model.
    """

    model: str = 'smpconv_seq_mnist'
    epochs: int = 6
    batch_size: int = 64
    opt: str = 'adam'
    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_epochs: int = 1
    warmup_prefix: bool = False
    weight_decay: float = 1e-5
    clip_grad: float = 0.0
    drop: float = 0.0
    drop_path: float = 0.0
    input_drop_rate: float = 0.1
    pretrained: bool = False
    initial_checkpoint: str = ''
    amp: bool = False
    smoothing: float = 0.0
    mixup: float = 0.0
    kd_model_name: str = ''
    task_loss_weight: float = 0.5
    model_ema_decay: float = 0.999
    augment: bool = True
    erase_size: int = 4
    time_shift: float = 0.0
    speed: float = 0.0
    gain: float = 0.0
    noise: float = 0.0
    sample_rate: int = 0
    initial_sample_rate: int = 0
    time_mask: int = 0
    freq_mask: int = 0
    masks: int = 1
    val_images: int = 5000
    val_percent: int = 15
    seed: int = 0
    opt_kwargs: Dict[str, Any] = dataclasses.field(default_factory=dict)
    model_kwargs: Dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low, high in (
            ('epochs', 1, None),
            ('batch_size', 1, None),
            ('lr', 0, None),
            ('min_lr', 0, self.lr),
            ('warmup_epochs', 0, None),
            ('weight_decay', 0, None),
            ('clip_grad', 0, None),
            ('drop', 0, 1),
            ('drop_path', 0, 1),
            ('input_drop_rate', 0, 1),
            ('smoothing', 0, 1),
            ('mixup', 0, None),
            ('task_loss_weight', 0, 1),
            ('model_ema_decay', 0, 1),
            ('erase_size', 0, 28),
            ('time_shift', 0, 1),
            ('speed', 0, 0.9),
            ('gain', 0, 60),
            ('noise', 0, 1),
            ('sample_rate', 0, 16000),
            ('initial_sample_rate', 0, 16000),
            ('time_mask', 0, None),
            ('freq_mask', 0, None),
            ('masks', 0, None),
            ('val_images', 0, None),
            ('val_percent', 0, 99),
            ('seed', 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= (sys.float_info.max if high is None else high):
                limits = f'at least {low}' if high is None else f'from {low} to {high}'
                raise ValueError(f'{name} must be {limits}, got {value!r}.')
        if self.warmup_prefix and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f'warmup_prefix leaves no epoch for the cosine: epochs must exceed {self.warmup_epochs}, '
                f'warmup_epochs, got {self.epochs}.'
            )
        if self.pretrained and self.initial_checkpoint:
            raise ValueError('pretrained and initial_checkpoint both say where to start: give one of them.')
        if self.pretrained and self.sample_rate not in (0, 16000):
            raise ValueError(
                f'The pretrained weights are of 16,000 samples a second, sample_rate={self.sample_rate} is another: '
                f'give their file as initial_checkpoint, with initial_sample_rate=16000.'
            )
        if self.initial_sample_rate and not self.initial_checkpoint:
            raise ValueError('initial_sample_rate is that of the network in initial_checkpoint: give that too.')
        if self.erase_size != Recipe.erase_size and not self.augment:
            raise ValueError('erase_size is of the squares that augment erases: leave one of them as it is.')
        is_masked = bool(self.time_mask or self.freq_mask)
        if self.masks != Recipe.masks and not is_masked:
            raise ValueError('masks is the number of masks of time_mask and freq_mask: give one of these too.')
        if self.masks == 0 and is_masked:
            raise ValueError('masks=0 leaves nothing of time_mask and freq_mask: leave them out, or masks.')
        if self.kd_model_name and self.task_loss_weight == 1:
            raise ValueError('task_loss_weight=1 leaves nothing to learn from kd_model_name: leave out that.')
        if self.task_loss_weight != Recipe.task_loss_weight and not self.kd_model_name:
            raise ValueError('task_loss_weight is the share of the labels beside kd_model_name: give that too.')


class _Loader(yaml.SafeLoader):
    """Reads 1e-3, without a point, as a number: YAML 1.1 takes it for text. Refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:i]]:
                raise yaml.constructor.ConstructorError(
                    problem=f'{key.value!r} is given twice', problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `_Loader` would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        'tag:yaml.org,2002:float', re.compile(r'[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$'), list('-+.0123456789')
    )


def field_texts() -> Dict[str, str]:
    """What each field of a recipe is."""
    text = inspect.cleandoc(Recipe.__doc__ or '')  # none if Python runs without them
    return {name: ' '.join(line.split()) for name, line in re.findall(r'^ {4}(\w+): ((?:.|\n {8})+)$', text, re.M)}


def read_fields(path: Path) -> Dict[str, Any]:
    """Reads a mapping from YAML, in which 1e-3 is a number and no key may be there twice; JSON is YAML too.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds something else.
    """
    try:
        fields = yaml.load(path.read_text(encoding='utf-8'), _Loader)
    except OSError:
        raise
    except Exception as e:  # tags and dates with wrong values make the parser raise almost anything
        raise ValueError(f'{path} is not YAML: {str(e) or type(e).__name__}.') from e
    if not isinstance(fields, dict):
        raise ValueError(f'{path} must hold the fields of a recipe.')
    return fields


def read_recipe(path: Path) -> Dict[str, Any]:
    """Reads the fields of a recipe from YAML.

    Args:
        path: File.

    Returns:
        Fields that the file gives, with values of the right types.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not YAML, or has unknown fields or wrong values.
    """
    fields = read_fields(path)
    types = {field.name: field.type for field in dataclasses.fields(Recipe)}
    for name, value in fields.items():
        if name not in types:
            raise ValueError(f'{path}: unknown field {name!r}, expected {", ".join(types)}.')
        kind = types[name] if isinstance(types[name], type) else dict
        if kind is float and type(value) is int:
            try:
                fields[name] = value = float(value)
            except OverflowError as e:
                raise ValueError(f'{path}: {name} must be of type float, got a number that is too large for it.') from e
        if type(value) is not kind:
            raise ValueError(f'{path}: {name} must be of type {kind.__name__}, got {value!r}.')
    return fields


def recipe_text(recipe: Recipe) -> str:
    """A recipe with all its fields as YAML."""
    fields = dataclasses.asdict(recipe)
    return yaml.dump(fields, Dumper=_Dumper, default_flow_style=None, sort_keys=False, width=math.inf)


def recipe_fields(text: str) -> Dict[str, Any]:
    """The fields in what `recipe_text` has made."""
    return yaml.load(text, _Loader)


def same_recipe(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes are the same as YAML, which has no tuples."""
    return recipe_fields(recipe_text(one)) == recipe_fields(recipe_text(other))
