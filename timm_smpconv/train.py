"""Training of the networks whose data or augmentation timm's train.py lacks, built on timm's own pieces.

A run is a function of its recipe: data order, augmentation and dropout follow from the seed, the epoch and the step
alone. A run that was killed at any time continues from its last checkpoint with the same result, bit for bit.
"""

import contextlib
import functools
import hashlib
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models import parse_model_name, split_model_name_tag
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from ._files import atomic_path, save_tensors, write_rows, write_text
from ._text import one_line
from .audio import RATE
from .checkpoint import WEIGHTS_FILE, ancestors, carried_settings, check_architecture, fit_checkpoint, read_checkpoint
from .convert import check_network_args, config_text
from .data import Samples
from .factory import create_model
from .fetch import weights_file
from .models.smpconv_seq import change_rate
from .predict import check_inputs
from .recipe import Recipe, read_recipe, recipe_fields, recipe_text, same_recipe
from .tasks import TASKS, Task, channel_statistics, heard, signal_input, split, task_of
from .validate import evaluate, usable_device
from .weights import WeightsError

__all__ = ['check_trainable', 'train']

_logger = logging.getLogger(__name__)

_CHECKPOINT_VERSION = 5
_RECIPE_FILE, _CHECKPOINT_FILE = 'recipe.yaml', 'checkpoint.pt'
_OF_A_STEP = ('opt', 'lr', 'weight_decay', 'opt_kwargs', 'model_kwargs', 'batch_size')  # fields that one may fail by
_RECOVERY_SECONDS = 300  # steps of the longest sequences take most of a minute


def check_trainable(recipe: Recipe) -> Task:
    """The task of a recipe's model.

    Raises:
        ValueError: timm's train.py trains this model, or the recipe has options that its task lacks.
    """
    task, default = task_of(recipe.model), Recipe()
    if task is None:
        architecture = split_model_name_tag(recipe.model)[0]
        raise ValueError(
            f"timm-smpconv train is for {', '.join(TASKS)}. timm's own train.py trains {architecture}: "
            f'recipes/{architecture}.yaml begins with the command.'
        )
    for name in sorted(set().union(*(other.options for other in TASKS.values())) - task.options):
        value = getattr(recipe, name)
        if value != getattr(default, name):
            raise ValueError(f'{name}={value!r} has no effect on {recipe.model}, which knows {_listed(task.options)}.')
    return task


def _listed(names: Sequence[str]) -> str:
    return ', '.join(sorted(names))


def _seed(*numbers: int) -> int:
    """A seed that is unlike those of neighbouring numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], 'big')


def _digest(tensors: Sequence[torch.Tensor]) -> str:
    """What tells some tensors from others."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _blaming(**fields: Any) -> Iterator[None]:
    """Turns the error of arguments that nothing takes, or that weights do not fit, into one that names their fields."""
    try:
        yield
    except (WeightsError, FloatingPointError):
        raise
    except Exception as e:  # optimizers and networks raise almost anything
        values = ', '.join(f'{name}={value!r}' for name, value in fields.items())
        raise ValueError(f'{values} cannot work: {one_line(e)}') from e


class _Teacher:
    """A trained network whose class probabilities another one learns (Hinton et al., 2015, at temperature 1)."""

    def __init__(self, recipe: Recipe, task: Task, device: torch.device):
        name = recipe.kd_model_name
        if parse_model_name(name)[0] or task_of(name):
            check_inputs(name)
        try:
            self.model = create_model(name, pretrained=True).eval().to(device)
            self.file = weights_file(name)
            # what tells one teacher from another
            self.digest = _digest([tensor.cpu() for tensor in self.model.state_dict().values()])
        except WeightsError:
            raise
        except RuntimeError as e:  # no such model
            raise ValueError(f'kd_model_name={name!r} cannot teach: {e}') from e
        self.task = TASKS.get(self.model.pretrained_cfg['architecture'])
        if self.task is None or self.task.signal is not task.signal:
            fitting = [other for other, its in TASKS.items() if its.signal is task.signal]
            raise ValueError(
                f'kd_model_name={name!r} is of other data than {recipe.model}, which {_listed(fitting)} can teach.'
            )
        self.device = device

    @torch.no_grad()
    def probabilities(self, signal: torch.Tensor) -> torch.Tensor:
        """Of each class, (B, classes), for what `Task.signal` gave."""
        x = signal_input(self.task, signal, self.model.pretrained_cfg)
        return self.model(x.to(self.device)).softmax(1).cpu()


class _Run:
    """All that changes in the course of a run, and the checkpoint that holds it."""

    def __init__(self, recipe: Recipe, task: Task, samples: Samples, output: Path, device: torch.device):
        self.recipe, self.output, self.device = recipe, output, device
        self.steps_per_epoch = len(samples) // recipe.batch_size
        self.data = _digest([samples.labels, samples.inputs])
        self.teacher = _Teacher(recipe, task, device) if recipe.kd_model_name else None
        torch.manual_seed(recipe.seed)
        resumed = self._checkpoint_path.exists()
        self.model = self._create_model(resumed)
        self.start: Optional[Path] = None  # file of the weights that the run begins with
        # bundled weights that it learns from, by way of other weights too
        self.ancestors = ancestors(self.teacher.file) if self.teacher and self.teacher.file else []
        carried: Dict[str, Any] = {}
        if not resumed and (recipe.initial_checkpoint or recipe.pretrained):
            self.start = Path(recipe.initial_checkpoint) if recipe.initial_checkpoint else weights_file(recipe.model)
            carried = self._load_start(task)
        self.model.to(device)
        self.ema: Optional[ModelEmaV3] = None
        if recipe.model_ema_decay:
            self.ema = ModelEmaV3(self.model, decay=recipe.model_ema_decay, use_warmup=True)
        self._create_optimizer()
        self.step = 0  # complete ones
        self.has_stepped = False  # in this process
        self.loss_sum, self.hits, self.seconds = 0.0, 0, 0.0  # of the epoch
        self.rows: List[Dict[str, str]] = []  # of the log
        self.saved_at = time.monotonic()
        cfg = self.model.pretrained_cfg
        self.mean, self.std = [float(v) for v in cfg['mean']], [float(v) for v in cfg['std']]
        if resumed:
            self._resume()
        elif task.measured and not carried:  # weights that are there are used to their own statistics
            self.mean, self.std = channel_statistics(samples, task)
        cfg['mean'], cfg['std'] = tuple(self.mean), tuple(self.std)
        if recipe.sample_rate:
            cfg['input_size'] = (*cfg['input_size'][:-1], recipe.sample_rate)
        if self.ema:
            self.ema.module.pretrained_cfg = cfg

    def _create_model(self, resumed: bool) -> nn.Module:
        recipe = self.recipe
        with _blaming(model=recipe.model, model_kwargs=recipe.model_kwargs):
            model = timm.create_model(
                recipe.model,
                pretrained=recipe.pretrained and not resumed,
                drop_rate=recipe.drop,
                drop_path_rate=recipe.drop_path,
                input_drop_rate=recipe.input_drop_rate,
                **recipe.model_kwargs,
            )
        check_network_args(model, recipe.model_kwargs)
        return model

    def _load_start(self, task: Task) -> Dict[str, Any]:
        """Loads the weights of a file to start from, and returns what they say of the input they are used to."""
        recipe, start = self.recipe, self.start
        assert start is not None
        checkpoint = read_checkpoint(start)
        self.ancestors = sorted({*self.ancestors, *ancestors(start, checkpoint)})
        if recipe.initial_checkpoint:
            check_architecture(checkpoint, self.model.pretrained_cfg['architecture'], str(start))
            carried = carried_settings(start, self.model.in_chans, checkpoint)
            rate = recipe.initial_sample_rate or recipe.sample_rate or RATE
            steps = carried.pop('input_size', (rate,))[-1]
            if task.resampled and steps != rate:
                raise ValueError(
                    f'{start} is of {steps} samples a second, and taken to be of {rate}: set '
                    f'initial_sample_rate={steps}.'
                )
            adapt = None
            if recipe.initial_sample_rate:
                ratio = (recipe.sample_rate or RATE) / recipe.initial_sample_rate
                adapt = functools.partial(change_rate, model=self.model, ratio=ratio)
            self.model.load_state_dict(fit_checkpoint(checkpoint, self.model, str(start), adapt))
            self.model.pretrained_cfg.update(carried)
        else:
            carried = carried_settings(start, beside=False)
        if not carried and task.stepwise:
            _logger.warning(
                '%s does not say how its inputs were normalised: here each channel is, over all time steps. The '
                'authors normalise each step; weights of theirs have to get used to it.',
                start,
            )
        return carried

    def _create_optimizer(self) -> None:
        recipe = self.recipe
        with _blaming(opt=recipe.opt, opt_kwargs=recipe.opt_kwargs):
            self.optimizer = create_optimizer_v2(
                self.model, recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, **recipe.opt_kwargs
            )
        if getattr(self.optimizer, 'is_second_order', False):
            raise ValueError(f'opt={recipe.opt!r} needs second derivatives, which are not computed.')
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            'cosine',
            num_epochs=recipe.epochs - (recipe.warmup_epochs if recipe.warmup_prefix else 0),
            warmup_epochs=recipe.warmup_epochs,
            warmup_lr=recipe.min_lr,
            min_lr=recipe.min_lr,
            warmup_prefix=recipe.warmup_prefix,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )

    @property
    def final(self) -> nn.Module:
        """The network that is evaluated and kept."""
        return self.ema.module if self.ema else self.model

    @property
    def recipe_path(self) -> Path:
        """File that says of which recipe the checkpoint is."""
        return self.output / _RECIPE_FILE

    @property
    def _checkpoint_path(self) -> Path:
        return self.output / _CHECKPOINT_FILE

    def _resume(self) -> None:
        path = self._checkpoint_path
        advice = 'delete it to start over'
        try:
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
            version = checkpoint.get('version')
        except (OSError, MemoryError):  # which say nothing of its contents
            raise
        except Exception as e:  # torch.load raises almost anything, with long advice that does not help here
            raise ValueError(f'Cannot continue from {path}, it is damaged or no checkpoint: {advice}.') from e
        if version != _CHECKPOINT_VERSION:
            raise ValueError(f'Cannot continue from {path}, which another version of this package wrote: {advice}.')
        if 'recipe' in checkpoint and not same_recipe(Recipe(**checkpoint['recipe']), self.recipe):
            raise ValueError(f'Cannot continue from {path}: it is of another recipe; {advice}.')
        if checkpoint.get('data') != self.data:
            raise ValueError(f'Cannot continue from {path}: it is of a run on other data; {advice}.')
        if checkpoint.get('teacher') != (self.teacher and self.teacher.digest):
            raise ValueError(f'Cannot continue from {path}: {self.recipe.kd_model_name} has other weights; {advice}.')
        try:
            self.model.load_state_dict(checkpoint['state_dict'])
            self.optimizer.load_state_dict(checkpoint['optimizer'])
            if self.ema:
                self.ema.module.load_state_dict(checkpoint['state_dict_ema'])
            for name in ('step', 'loss_sum', 'hits', 'seconds', 'rows', 'mean', 'std', 'ancestors'):
                setattr(self, name, checkpoint[name])
        except (KeyError, RuntimeError, ValueError) as e:
            raise ValueError(f'Cannot continue from {path} ({e}): {advice}.') from e
        _logger.info('Continuing %s after step %d.', self.output, self.step)

    def save(self) -> None:
        """Writes the checkpoint and, from the rows in it, the log."""
        checkpoint = dict(
            version=_CHECKPOINT_VERSION,
            arch=self.recipe.model,
            recipe=recipe_fields(recipe_text(self.recipe)),
            data=self.data,
            teacher=self.teacher and self.teacher.digest,
            ancestors=self.ancestors,
            state_dict=self.model.state_dict(),
            state_dict_ema=self.ema.module.state_dict() if self.ema else None,
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            loss_sum=self.loss_sum,
            hits=self.hits,
            seconds=self.seconds,
            rows=self.rows,
            mean=self.mean,
            std=self.std,
            input_size=self.model.pretrained_cfg['input_size'],
        )
        if self.recipe_path.exists():
            _check_output(self.output, self.recipe)  # another run may have begun there in the meantime
        else:  # not before: another recipe may take the place of one that fails
            write_text(self.recipe_path, recipe_text(self.recipe))
        with atomic_path(self._checkpoint_path) as part:
            try:
                torch.save(checkpoint, part)
            except RuntimeError as e:  # a full disk, for one
                raise OSError(f'Cannot write {self._checkpoint_path}: {e}') from e
        self.write_log()
        self.saved_at = time.monotonic()

    def write_log(self) -> None:
        """Writes the log as the rows have it, so that a killed run neither loses nor doubles one."""
        if self.rows:
            try:
                write_rows(self.output / 'log.csv', self.rows)
            except PermissionError as e:  # open in another program, on Windows; the checkpoint has the rows
                _logger.warning('%s cannot be written now (%s).', self.output / 'log.csv', e)

    def train_step(self, x: torch.Tensor, target: torch.Tensor, labels: torch.Tensor) -> None:
        """One update from normalised inputs and class indices or probabilities; `labels` are for the accuracy."""
        recipe = self.recipe
        self.scheduler.step_update(self.step)
        # a later step can only fail by something else
        suspects = {} if self.has_stepped else {name: getattr(recipe, name) for name in _OF_A_STEP}
        with _blaming(**suspects) if suspects else contextlib.nullcontext():
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=recipe.amp):
                logits = self.model(x)
                loss = F.cross_entropy(logits, target, label_smoothing=recipe.smoothing)
            self.optimizer.zero_grad()
            loss.backward()
            if recipe.clip_grad:
                nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
            self.optimizer.step()
        self.has_stepped = True
        if self.ema:
            self.ema.update(self.model, step=self.step)
        self.loss_sum += loss.item()
        self.hits += int((logits.argmax(1) == labels).sum())
        self.step += 1
        if not math.isfinite(self.loss_sum):
            raise FloatingPointError(f'The loss is {loss.item()} in step {self.step}: lower lr, or set clip_grad.')

    def end_epoch(self, val_accuracy: Optional[float]) -> None:
        """Adds a row to the log and starts the sums again."""
        steps, count = self.steps_per_epoch, self.steps_per_epoch * self.recipe.batch_size
        row = dict(
            epoch=str(self.step // steps),
            lr=f'{self.optimizer.param_groups[0]["lr"]:.3e}',
            train_loss=f'{self.loss_sum / steps:.5f}',
            train_accuracy=f'{self.hits / count:.5f}',
            val_accuracy='' if val_accuracy is None else f'{val_accuracy:.5f}',
            seconds=f'{self.seconds:.1f}',
            samples_per_second=f'{count / max(self.seconds, 1e-9):.1f}',
            seed=str(self.recipe.seed),
        )
        self.rows.append(row)
        self.loss_sum, self.hits, self.seconds = 0.0, 0, 0.0
        _logger.info('%s', ', '.join(f'{key} {value}' for key, value in row.items()))


def train(
    recipe: Recipe,
    data_dir: Union[str, Path],
    output: Union[str, Path],
    progress: bool = True,
    recovery_interval: int = 100,
    device: Union[str, torch.device] = 'cpu',
) -> Path:
    """Trains a model, from scratch or from where an earlier call with the same output stopped.

    Args:
        recipe: Hyper-parameters.
        data_dir: Folder that holds what `timm-smpconv data` made.
        output: Folder for checkpoint.pt, log.csv, recipe.yaml and, at the end, model.safetensors and config.json, which
            timm.create_model('local-dir:OUTPUT', pretrained=True) loads.
        progress: Show progress bars.
        recovery_interval: Steps between checkpoints within an epoch, 0 for none; where steps are slow there is one
            every five minutes, and always one after each epoch.
        device: Device to train on. Runs repeat bit for bit on a CPU with the same number of threads.

    Returns:
        Path of the final weights: the average if the recipe has one.

    Raises:
        FileNotFoundError: The data are not there.
        WeightsError, CheckpointError: The weights to start from cannot be had, or do not fit.
        ValueError: The recipe, the data or the device do not fit, or the output folder belongs to another recipe or to
            other data.
        OSError: The disk is full.
        FloatingPointError: The loss is not finite.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f'{output} is a file: expected a folder for checkpoint, log and weights.')
    if recovery_interval < 0:
        raise ValueError(f'recovery_interval must not be negative, got {recovery_interval}.')
    device = usable_device(device)
    task = check_trainable(recipe)
    samples, held = split(task.load(data_dir, True), recipe, task)
    _check_output(output, recipe)
    run = _Run(recipe, task, samples, output, device)
    _warn_of_heard(run, held)
    _try_out(run, task, samples)
    run.write_log()
    steps, batch_size = run.steps_per_epoch, recipe.batch_size
    bar = tqdm(
        total=recipe.epochs * steps * batch_size,
        initial=run.step * batch_size,
        unit='sample',
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        disable=not progress,
    )
    with bar:
        while run.step < recipe.epochs * steps:
            epoch = run.step // steps
            bar.set_description(f'epoch {epoch + 1}/{recipe.epochs}', refresh=False)
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(_seed(recipe.seed, epoch)))
            _train_epoch(run, task, samples, order, recovery_interval, bar)
            accuracy = None
            if len(held):
                try:
                    predictions = evaluate(run.final, held, task, progress=progress and sys.stderr.isatty())
                except FloatingPointError as e:
                    raise FloatingPointError(
                        f'The outputs of the network are not finite after step {run.step}: lower lr, or set clip_grad.'
                    ) from e
                accuracy = (predictions == held.labels).float().mean().item()
            run.end_epoch(accuracy)
            run.save()
    return _write_result(run)


def _check_output(output: Path, recipe: Recipe) -> None:
    """Checks that an output folder holds no run of another recipe.

    Raises:
        ValueError: It does, or one whose recipe is not known.
    """
    path = output / _RECIPE_FILE
    if path.exists():
        if not same_recipe(Recipe(**read_recipe(path)), recipe):
            raise ValueError(f'{output} holds a run of another recipe ({path}): choose another output folder.')
    elif (output / _CHECKPOINT_FILE).exists():
        raise ValueError(f'{output} holds a run without its {_RECIPE_FILE}: choose another output folder.')


def _warn_of_heard(run: _Run, held: Samples) -> None:
    """Tells if weights that a run learns from were trained on speakers that it holds out."""
    count = int(heard(held, run.ancestors).sum())
    if count:
        _logger.warning(
            '%d of %d held-out recordings are by speakers that %s was trained on: val_accuracy is too high.',
            count,
            len(held),
            ', '.join(run.ancestors),
        )


def _try_out(run: _Run, task: Task, samples: Samples) -> None:
    """Lets a sample through the network, before anything is written."""
    kwargs = run.recipe.model_kwargs
    classes = int(samples.labels.max()) + 1
    if run.teacher and run.teacher.model.num_classes != run.model.num_classes:
        raise ValueError(
            f'kd_model_name={run.recipe.kd_model_name!r} tells {run.teacher.model.num_classes} classes apart, '
            f'{run.recipe.model} {run.model.num_classes}: they must be the same ones.'
        )
    if run.model.num_classes < classes:
        raise ValueError(f'model_kwargs={kwargs} give {run.model.num_classes} classes, the data have {classes}.')
    try:
        evaluate(run.model, samples[:1], task, progress=False)
    except (RuntimeError, ValueError) as e:
        raise ValueError(f'model_kwargs={kwargs} do not fit the data: {e}') from e


def _train_epoch(
    run: _Run, task: Task, samples: Samples, order: torch.Tensor, recovery_interval: int, bar: tqdm
) -> None:
    """The rest of an epoch."""
    recipe, steps = run.recipe, run.steps_per_epoch
    run.model.train()
    epoch, first = divmod(run.step, steps)
    for i in range(first, steps):
        start = time.monotonic()
        seed = _seed(recipe.seed, epoch, i)
        torch.manual_seed(seed)  # dropout
        part = samples[order[i * recipe.batch_size : (i + 1) * recipe.batch_size]]
        generator = torch.Generator().manual_seed(_seed(seed))
        signal = task.signal(part.inputs, recipe, generator)
        x = signal_input(task, signal, run.model.pretrained_cfg, recipe, generator)
        target = part.labels
        if run.teacher or recipe.mixup:
            target = F.one_hot(target, run.model.num_classes).float()
        if run.teacher:
            target = torch.lerp(run.teacher.probabilities(signal), target, recipe.task_loss_weight)
        if recipe.mixup:
            x, target = _mix(x, target, np.random.default_rng(seed), recipe.mixup)
        run.train_step(*(tensor.to(run.device) for tensor in (x, target, part.labels)))
        run.seconds += time.monotonic() - start
        done = i + 1
        bar.set_postfix(
            loss=f'{run.loss_sum / done:.4f}', accuracy=f'{run.hits / done / recipe.batch_size:.4f}', refresh=False
        )
        bar.update(recipe.batch_size)
        if recovery_interval and done < steps:
            if run.step % recovery_interval == 0 or time.monotonic() - run.saved_at > _RECOVERY_SECONDS:
                run.save()


def _mix(
    x: torch.Tensor, target: torch.Tensor, rng: np.random.Generator, alpha: float
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mixup: each sample with the one at its place in the reversed batch; its own share is the larger."""
    share = torch.from_numpy(rng.beta(alpha, alpha, len(x))).float()
    share = torch.maximum(share, 1 - share)
    target = torch.lerp(target.flip(0), target, share.unsqueeze(1))
    return torch.lerp(x.flip(0), x, share.reshape(-1, *(1,) * (x.ndim - 1))), target


def _write_result(run: _Run) -> Path:
    """Weights and configuration in timm's layout of a model folder."""
    cfg = run.final.pretrained_cfg
    cfg['license'] = None  # that of the package's own weights
    write_text(run.output / 'config.json', config_text(run.final, run.recipe.model_kwargs))
    # a file on its own says how its input is normalised
    metadata = dict(architecture=cfg['architecture'], mean=run.mean, std=run.std, input_size=cfg['input_size'])
    if run.ancestors:
        metadata['ancestors'] = run.ancestors
    path = run.output / WEIGHTS_FILE
    save_tensors(path, run.final.state_dict(), metadata)
    return path
