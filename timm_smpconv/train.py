"""Training of the sequence models whose data or augmentation timm's train.py lacks, built on timm's own pieces.

A run is a function of its recipe: data order, augmentation and dropout of an epoch depend on the seed and the epoch
alone, so that a run that was killed continues from its last complete epoch with the same result.
"""

import csv
import dataclasses
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple, Union

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.datasets import MNIST
from tqdm import tqdm

__all__ = ['Recipe', 'augment_digits', 'evaluate', 'load_mnist', 'train']

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a run; names as in timm's train.py.

    Attributes:
        model: Registered model name.
        epochs: Passes over the training images.
        batch_size: Images per step.
        opt: Optimizer, one of timm's.
        lr: Learning rate after the warm-up; the radii learn at a tenth of it.
        min_lr: Learning rate at the end of the cosine.
        warmup_epochs: Epochs of linear warm-up.
        weight_decay: Weight decay of everything but points, biases and norms.
        drop: Dropout rate within the blocks.
        input_drop_rate: Dropout rate of the input.
        smoothing: Label smoothing.
        model_ema_decay: Decay of the weight average that is evaluated and kept, 0 for none.
        augment: Rotate, shift, scale and erase the training images.
        val_images: Training images held out to watch the run; never test images.
        seed: Seed of initial weights, data order, augmentation and dropout.
    """

    model: str = 'smpconv_seq_mnist'
    epochs: int = 6
    batch_size: int = 64
    opt: str = 'adam'
    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_epochs: int = 1
    weight_decay: float = 1e-5
    drop: float = 0.0
    input_drop_rate: float = 0.1
    smoothing: float = 0.0
    model_ema_decay: float = 0.999
    augment: bool = True
    val_images: int = 5000
    seed: int = 0


def load_mnist(root: Union[str, Path], train: bool) -> Tuple[torch.Tensor, torch.Tensor]:
    """Reads MNIST from its IDX files, in ROOT/MNIST/raw as torchvision keeps them.

    Args:
        root: Data folder.
        train: The 60,000 training images, or the 10,000 test images.

    Returns:
        Images (N, 1, 28, 28), uint8, and labels (N,).

    Raises:
        FileNotFoundError: The files are not there.
    """
    try:
        data = MNIST(str(root), train=train, download=False)
    except RuntimeError as e:
        raise FileNotFoundError(
            f'No MNIST under {root}: expected the unpacked IDX files (train-images-idx3-ubyte ...) in '
            f'{Path(root) / "MNIST" / "raw"}.'
        ) from e
    return data.data.unsqueeze(1), data.targets


def augment_digits(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Augments digits as the reference does: each of four operations with probability 0.5.

    Rotation by up to 30 degrees, shift by up to 2 of 28 pixels, scale 0.75 to 1, and erasing of a 4 x 4 patch.

    Args:
        images: Images with background 0, (B, C, H, W), float.
        generator: Source of all randomness.

    Returns:
        Augmented images of the same shape.
    """
    count, _, height, width = images.shape

    def uniform(low: float, high: float, neutral: float) -> torch.Tensor:
        value = low + (high - low) * torch.rand(count, generator=generator)
        return torch.where(torch.rand(count, generator=generator) < 0.5, value, torch.full((), neutral))

    angle = uniform(-30.0, 30.0, 0.0).deg2rad()
    shift_x, shift_y = uniform(-4 / 28, 4 / 28, 0.0), uniform(-4 / 28, 4 / 28, 0.0)  # in half widths
    scale = uniform(0.75, 1.0, 1.0)
    # affine_grid maps outputs to inputs: inverse rotation, inverse scale
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([torch.stack([cos, sin, shift_x], 1), torch.stack([-sin, cos, shift_y], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)

    top = torch.randint(0, height - 3, (count, 1, 1), generator=generator)
    left = torch.randint(0, width - 3, (count, 1, 1), generator=generator)
    erase = torch.rand(count, 1, 1, generator=generator) < 0.5
    rows, cols = torch.arange(height).reshape(1, -1, 1), torch.arange(width).reshape(1, 1, -1)
    patch = erase & (rows >= top) & (rows < top + 4) & (cols >= left) & (cols < left + 4)
    return images.masked_fill(patch.unsqueeze(1), 0.0)


def _normalize(images: torch.Tensor, model: nn.Module) -> torch.Tensor:
    cfg = model.pretrained_cfg
    return (images - torch.tensor(cfg['mean']).reshape(1, -1, 1, 1)) / torch.tensor(cfg['std']).reshape(1, -1, 1, 1)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int = 250,
    progress: bool = True,
) -> torch.Tensor:
    """Predicted classes of raw images.

    Args:
        model: Network, with the pretrained_cfg that says how its input is normalised.
        images: Images, (N, C, H, W), uint8.
        labels: Labels, (N,), for the running accuracy.
        batch_size: Images per forward pass.
        progress: Show a progress bar.

    Returns:
        Predictions, (N,).
    """
    model.eval()
    predictions = []
    hits = 0
    bar = tqdm(range(0, len(images), batch_size), desc='evaluate', disable=not progress, leave=False)
    for start in bar:
        part = images[start : start + batch_size].float() / 255
        predictions.append(model(_normalize(part, model)).argmax(1))
        hits += (predictions[-1] == labels[start : start + batch_size]).sum().item()
        bar.set_postfix(accuracy=f'{hits / min(start + batch_size, len(images)):.4f}')
    return torch.cat(predictions)


def _batches(
    recipe: Recipe, epoch: int, images: torch.Tensor, labels: torch.Tensor
) -> Iterator[Tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
    torch.manual_seed(recipe.seed * 100_003 + epoch)  # dropout
    order = torch.randperm(len(images), generator=generator)
    for index in order[: len(order) // recipe.batch_size * recipe.batch_size].split(recipe.batch_size):
        batch = images[index].float() / 255
        yield augment_digits(batch, generator) if recipe.augment else batch, labels[index]


def _save_atomically(checkpoint: Dict[str, Any], path: Path) -> None:
    part = path.with_suffix('.part')
    torch.save(checkpoint, part)
    os.replace(part, path)


def train(recipe: Recipe, data_dir: Union[str, Path], output: Union[str, Path], progress: bool = True) -> Path:
    """Trains a model on MNIST, from scratch or from where an earlier call with the same output stopped.

    Args:
        recipe: Hyper-parameters.
        data_dir: Folder that holds MNIST/raw.
        output: Folder for checkpoint.pt, log.csv, recipe.json and, at the end, model.safetensors.
        progress: Show progress bars.

    Returns:
        Path of the final weights.

    Raises:
        FileNotFoundError: The data are not there.
        ValueError: The output folder belongs to another recipe.
    """
    output = Path(output)
    images, labels = load_mnist(data_dir, train=True)
    split = len(images) - recipe.val_images
    images, val_images = images[:split], images[split:]
    labels, val_labels = labels[:split], labels[split:]

    output.mkdir(parents=True, exist_ok=True)
    recipe_path, checkpoint_path, log_path = output / 'recipe.json', output / 'checkpoint.pt', output / 'log.csv'
    fields = dataclasses.asdict(recipe)
    if recipe_path.exists() and json.loads(recipe_path.read_text()) != fields:
        raise ValueError(f'{output} holds a run of another recipe ({recipe_path}): choose another output folder.')
    if not recipe_path.exists():
        recipe_path.with_suffix('.part').write_text(json.dumps(fields, indent=2) + '\n')
        os.replace(recipe_path.with_suffix('.part'), recipe_path)

    torch.manual_seed(recipe.seed)
    model = timm.create_model(recipe.model, drop_rate=recipe.drop, input_drop_rate=recipe.input_drop_rate)
    ema: Optional[ModelEmaV3] = None
    if recipe.model_ema_decay:
        ema = ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=True)
    optimizer = create_optimizer_v2(model, recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = len(images) // recipe.batch_size
    scheduler, _ = create_scheduler_v2(
        optimizer,
        'cosine',
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.min_lr,
        min_lr=recipe.min_lr,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    first = 0
    if checkpoint_path.exists():
        checkpoint = torch.load(checkpoint_path, weights_only=True)
        model.load_state_dict(checkpoint['state_dict'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        if ema:
            ema.module.load_state_dict(checkpoint['state_dict_ema'])
        first = checkpoint['epoch']
        _logger.info('Continuing %s after epoch %d.', output, first)

    for epoch in range(first, recipe.epochs):
        model.train()
        start, loss_sum, hits = time.monotonic(), 0.0, 0
        bar = tqdm(
            _batches(recipe, epoch, images, labels), total=steps, desc=f'epoch {epoch + 1}', disable=not progress
        )
        for i, (batch, target) in enumerate(bar):
            update = epoch * steps + i
            scheduler.step_update(update)
            logits = model(_normalize(batch, model))
            loss = F.cross_entropy(logits, target, label_smoothing=recipe.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if ema:
                ema.update(model, step=update)
            loss_sum += loss.item()
            hits += (logits.argmax(1) == target).sum().item()
            bar.set_postfix(loss=f'{loss_sum / (i + 1):.4f}', accuracy=f'{hits / (i + 1) / recipe.batch_size:.4f}')
        seconds = time.monotonic() - start
        final = ema.module if ema else model
        val_hits = evaluate(final, val_images, val_labels, progress=progress) == val_labels
        row = dict(
            epoch=epoch + 1,
            lr=f'{optimizer.param_groups[0]["lr"]:.3e}',
            train_loss=f'{loss_sum / steps:.5f}',
            train_accuracy=f'{hits / steps / recipe.batch_size:.5f}',
            val_accuracy=f'{val_hits.float().mean():.5f}',
            seconds=f'{seconds:.0f}',
        )
        _save_atomically(
            dict(
                state_dict=model.state_dict(),
                state_dict_ema=ema.module.state_dict() if ema else None,
                optimizer=optimizer.state_dict(),
                epoch=epoch + 1,
                arch=recipe.model,
            ),
            checkpoint_path,
        )
        write_header = not log_path.exists()
        with log_path.open('a', newline='') as f:
            writer = csv.DictWriter(f, list(row))
            if write_header:
                writer.writeheader()
            writer.writerow(row)
        _logger.info('%s', row)

    path = output / 'model.safetensors'
    final = ema.module if ema else model
    save_file(final.state_dict(), path.with_suffix('.part'))
    os.replace(path.with_suffix('.part'), path)
    return path
