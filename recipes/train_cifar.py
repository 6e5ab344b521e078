"""Trains the CIFAR-10 networks on one GPU, in minutes.

timm's train.py trains them too (recipes/smpconv_cifar.yaml), but decodes and augments images on the CPU, and launches
each of the thousands of operations of a step: on a GPU that is what small networks wait for. Here the images lie on the
GPU and are augmented there, and a step is one CUDA graph, with its optimizer and with what a teacher says. Networks,
weights, optimizers and the average are those of train.py.

    timm-smpconv data cifar10 data
    python recipes/train_cifar.py --config RECIPE.yaml --data data/cifar10 --output output/RUN

A recipe names a network, a teacher (or none) and phases, one after the other, each from the averaged weights of the one
before. The output folder gets model.safetensors (the average), log.csv and checkpoint.pt: after every fifth epoch, at
the end of a phase, and after an epoch when a minute has passed. The same command continues a run that was stopped,
after the last epoch that it has saved.
"""

import argparse
import dataclasses
import hashlib
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import timm_smpconv  # noqa: F401  registers the networks
from timm_smpconv._files import atomic_path, save_tensors, write_rows
from timm_smpconv.classes import CIFAR10
from timm_smpconv.recipe import read_fields

EMA_STEPS = 4  # between updates of the average
SAVE_SECONDS = 60  # after which an epoch is saved that is not looked at
PADDING = 4  # pixels by which images are shifted at most
BAR: Dict[str, Any] = dict(unit_scale=True, mininterval=0.5 if sys.stderr.isatty() else 30.0)


@dataclasses.dataclass
class Phase:
    """Epochs with one input size and one course of the learning rate.

    Attributes:
        epochs: How many.
        lr: Highest learning rate, reached after `warmup` steps; a cosine leads down from it.
        min_lr: Learning rate of the last step.
        size: Height and width of the images of the network; the teacher gets them whole.
        model_kwargs: Arguments of the network.
        cutmix: Share of the images into which a rectangle of another one is put.
        batch_size: Images of a step.
        warmup: Steps.
        weight_decay: Of the optimizer.
        model_ema_decay: Decay of the average of the weights in a step.
    """

    epochs: int
    lr: float
    min_lr: float = 1e-5
    size: Tuple[int, int] = (32, 32)
    model_kwargs: Dict[str, object] = dataclasses.field(default_factory=dict)
    cutmix: float = 0.0
    batch_size: int = 512
    warmup: int = 100
    weight_decay: float = 0.1
    model_ema_decay: float = 0.998

    def __post_init__(self) -> None:
        for name, low, high in (
            ('epochs', 1, math.inf),
            ('batch_size', 1, math.inf),
            ('lr', 0, sys.float_info.max),
            ('min_lr', 0, self.lr),
            ('cutmix', 0, 1),
            ('warmup', 0, math.inf),
            ('weight_decay', 0, sys.float_info.max),
            ('model_ema_decay', 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f'{name} must be from {low} to {high}, got {value!r}.')
        for name in ('epochs', 'batch_size', 'warmup'):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f'{name} must be a whole number, got {getattr(self, name)!r}.')
        if len(self.size) != 2 or any(n < 1 or 32 % n for n in self.size):
            raise ValueError(f'size must be two numbers that divide 32, got {self.size}.')


@dataclasses.dataclass
class Recipe:
    """A run.

    Attributes:
        model: Name of a network, or 'resnet18', which gets a stem for small images.
        phases: What it goes through.
        pretrained: Begin with the bundled weights.
        initial_checkpoint: File to begin with.
        teacher: NAME of a network with bundled weights, or NAME:FILE; '' for none.
        ask_once: Ask the teacher about each image as it is, once, and not about what is made of it in each step. For a
            CPU, where a teacher may take longer than what it teaches.
        task_loss_weight: Share of the labels in the loss where there is a teacher, whose share is the rest.
        kd_temperature: Temperature of the teacher's answers.
        smoothing: Label smoothing.
        opt: Name of the optimizer in timm.
        opt_kwargs: Its arguments.
        seed: Of everything random.
    """

    model: str
    phases: List[Phase]
    pretrained: bool = False
    initial_checkpoint: str = ''
    teacher: str = ''
    ask_once: bool = False
    task_loss_weight: float = 0.5
    kd_temperature: float = 1.0
    smoothing: float = 0.0
    opt: str = 'nmuon'
    opt_kwargs: Dict[str, object] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError('phases is empty: expected what the network goes through, one or more.')
        if self.ask_once and (not self.teacher or any(phase.cutmix for phase in self.phases)):
            raise ValueError('ask_once needs a teacher and no cutmix: an answer is about an image as it is.')
        if not self.kd_temperature > 0:
            raise ValueError(f'kd_temperature must be positive, got {self.kd_temperature}.')
        if not 0 <= self.task_loss_weight < 1:
            raise ValueError(f'task_loss_weight must lie in [0, 1), got {self.task_loss_weight}: the rest is learned.')
        if self.pretrained and self.initial_checkpoint:
            raise ValueError('pretrained and initial_checkpoint both say what to begin with: give one of them.')

    def check_files(self) -> None:
        """Checks that the weights to begin with are there, before any work.

        Raises:
            FileNotFoundError: They are not.
        """
        for field, file in (
            ('initial_checkpoint', self.initial_checkpoint),
            ('teacher', self.teacher.partition(':')[2]),
        ):
            if file and not Path(file).is_file():
                raise FileNotFoundError(
                    f'{field}: no weights at {file}. Make them first (the head of the recipe says how).'
                )

    @classmethod
    def read(cls, path: Path) -> 'Recipe':
        """From YAML.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is not YAML, or no recipe.
        """
        fields = read_fields(path)
        try:
            return cls(**{**fields, 'phases': [Phase(**phase) for phase in fields.get('phases', ())]})
        except TypeError as e:  # fields that are not known or of another type
            raise ValueError(f'{path} is no recipe of this script: {e}.') from e


Arrays = Tuple[torch.Tensor, torch.Tensor]  # images (N, 3, 32, 32), uint8, and labels (N,)


def _decode(path: str) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert('RGB'))
    if pixels.shape != (32, 32, 3):
        raise ValueError(f'{path} is {pixels.shape[1]} x {pixels.shape[0]}, expected 32 x 32.')
    return pixels


def load_images(folder: Path, hold_out: int) -> Tuple[Arrays, Arrays]:
    """The images of CLASS/*, less the last `hold_out` of each class, and those.

    Raises:
        ValueError: They are not of the classes of CIFAR-10, an image is of another size, or a negative `hold_out`.
    """
    if hold_out < 0:
        raise ValueError(f'hold_out must not be negative, got {hold_out}.')
    dataset = ImageFolder(str(folder))
    if tuple(dataset.classes) != CIFAR10:
        raise ValueError(f'{folder} has the classes {dataset.classes}, expected those of CIFAR-10: {list(CIFAR10)}.')
    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(_decode, [path for path, _ in dataset.samples])))
    images, labels = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(dataset.targets)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(dataset.classes)):
        members = (labels == label).nonzero().flatten()
        held[members[max(len(members) - hold_out, 0) :]] = True
    return (images[~held], labels[~held]), (images[held], labels[held])


def crop_and_flip(images: torch.Tensor) -> torch.Tensor:
    """Shifts each image by up to four pixels, with its mirror image beyond the border, and flips half of them."""
    count, _, height, width = images.shape
    batch = torch.arange(count, device=images.device)

    def places(size: int) -> torch.Tensor:
        shift = torch.randint(-PADDING, PADDING + 1, (count, 1), device=images.device)
        place = torch.arange(size, device=images.device) + shift
        return (size - 1) - (size - 1 - place.abs()).abs()  # reflected at both ends

    rows, columns = places(height), places(width)
    flip = torch.rand(count, 1, device=images.device) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    pixels = images.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
    return pixels.permute(0, 3, 1, 2)


def cutmix(x: torch.Tensor, target: torch.Tensor, share: float) -> Tuple[torch.Tensor, torch.Tensor]:
    """Puts a rectangle of another image into a share of the images (Yun et al., 2019), of a uniformly drawn area.

    timm's Mixup draws one rectangle for a batch, or in a loop over its images, on the CPU.
    """
    count, _, height, width = x.shape
    device = x.device
    side = (torch.rand(count, 1, device=device) * (torch.rand(count, 1, device=device) < share)).sqrt()

    def inside(size: int) -> torch.Tensor:
        middle = torch.rand(count, 1, device=device) * size
        place = torch.arange(size, device=device) + 0.5
        return (place - middle).abs() < side * size / 2

    mask = inside(height)[:, :, None] & inside(width)[:, None, :]
    mixed = torch.where(mask.unsqueeze(1), x.roll(1, 0), x)
    other = mask.flatten(1).float().mean(1, keepdim=True)
    return mixed, torch.lerp(target, target.roll(1, 0), other)


class GraphedStep:
    """A training step that is recorded as a CUDA graph in its fourth call, and replayed from then on.

    The first calls are steps like all others, by which everything that is made once gets made.
    """

    def __init__(self, step: Callable[..., torch.Tensor], enabled: bool = True):
        """
        Args:
            step: Works on what its tensors and its arguments hold, and launches all that it does on the GPU.
            enabled: False for steps that are never recorded.
        """
        self.step, self.enabled = step, enabled
        self.calls = 0
        self.graph: Optional[torch.cuda.CUDAGraph] = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return self.step(*inputs)
        self.calls += 1
        if self.calls < 4:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if self.graph is None:
            self.inputs = [x.clone() for x in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.step(*self.inputs)
        for own, x in zip(self.inputs, inputs):
            own.copy_(x)
        self.graph.replay()
        return self.result


def create_network(name: str, **kwargs: object) -> nn.Module:
    """timm's networks, and its ResNet-18 with a stem that keeps the resolution of small images."""
    if name != 'resnet18':
        return timm.create_model(name, **kwargs)
    checkpoint = kwargs.pop('checkpoint_path', '')
    if kwargs.pop('pretrained', False):
        raise ValueError("resnet18 comes without weights for small images: name a file of them, as 'resnet18:FILE'.")
    model = timm.create_model(name, num_classes=10, **kwargs)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode='fan_out', nonlinearity='relu')
    model.maxpool = nn.Identity()
    if checkpoint:
        load_checkpoint(model, str(checkpoint))
    return model


def create_teacher(name: str) -> nn.Module:
    """The network that a recipe names as its teacher, to be asked only."""
    name, _, file = name.partition(':')
    return create_network(name, pretrained=not file, checkpoint_path=file).eval().requires_grad_(False)


def create(recipe: Recipe, phase: Phase, weights: Optional[Dict[str, torch.Tensor]]) -> nn.Module:
    """The network of a phase, with weights that there are already, or with those to begin with."""
    first = weights is None
    model = create_network(
        recipe.model,
        pretrained=recipe.pretrained and first,
        checkpoint_path=recipe.initial_checkpoint if first else '',
        **phase.model_kwargs,
    )
    if weights is not None:
        model.load_state_dict(weights)
    return model


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)  # a graph must not keep casts


class Trainer:
    """A network, and what its steps need."""

    def __init__(
        self, recipe: Recipe, output: Path, train: Arrays, held: Arrays, device: torch.device, graph: bool = True
    ):
        self.recipe, self.output, self.device = recipe, output, device
        self.graph = graph and device.type == 'cuda'
        self.data = _digest([*train, *held])
        self.images, self.labels = (part.to(device) for part in train)
        self.held_images, self.held_labels = (part.to(device) for part in held)
        # that of ImageNet, as all of the networks have it, for numbers up to 255
        self.mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=device).mul(255).reshape(3, 1, 1)
        self.std = torch.tensor(IMAGENET_DEFAULT_STD, device=device).mul(255).reshape(3, 1, 1)
        self.rows: List[Dict[str, str]] = []
        self.teacher: Optional[nn.Module] = None
        if recipe.teacher:
            teacher = create_teacher(recipe.teacher)
            self.data += _digest(list(teacher.state_dict().values()))
            if hasattr(teacher, 'reparameterize'):  # after the digest: processors round what it computes in other ways
                teacher.reparameterize()
            self.teacher = teacher.to(device, memory_format=torch.channels_last)
        self.answers: Optional[torch.Tensor] = None
        if recipe.ask_once:
            parts = tqdm(self.images.split(100), unit='batch', desc='teacher', **BAR)
            self.answers = torch.cat([self.ask(self.normalize(part)) for part in parts])

    @torch.no_grad()
    def ask(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the teacher."""
        with _autocast(self.device):
            return self.teacher(x).float()

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 to the range of the networks."""
        return (images.float() - self.mean) / self.std

    def resize(self, x: torch.Tensor, phase: Phase) -> torch.Tensor:
        """Means over pixels."""
        factors = [have // want for have, want in zip(x.shape[2:], phase.size)]
        return x if factors == [1, 1] else F.avg_pool2d(x, factors)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, phase: Phase) -> float:
        """Share of the held-out images that are right."""
        model.eval()
        hits = 0
        for images, labels in zip(self.held_images.split(500), self.held_labels.split(500)):
            with _autocast(self.device):
                logits = model(self.resize(self.normalize(images), phase))
            hits += int((logits.argmax(1) == labels).sum())
        return hits / len(self.held_labels)

    def make_optimizer(self, model: nn.Module, phase: Phase) -> torch.optim.Optimizer:
        """timm's, with learning rates that a recorded step can read, where the optimizer can be recorded too."""
        kwargs = dict(self.recipe.opt_kwargs, lr=phase.lr, weight_decay=phase.weight_decay)
        if not self.graph:
            kwargs.pop('capturable', None)
        optimizer = create_optimizer_v2(model, self.recipe.opt, **kwargs)
        if _is_capturable(optimizer):
            for group in optimizer.param_groups:
                group['lr'] = torch.tensor(phase.lr, device=self.device)
        return optimizer

    def adapt(self, optimizer: torch.optim.Optimizer) -> None:
        """Brings a state that may be of another device, or of steps launched one by one, into the form for these."""
        captured = _is_capturable(optimizer)
        for group in optimizer.param_groups:
            if 'capturable' in group:
                group['capturable'] = captured
            lr = float(group['lr'])
            group['lr'] = torch.tensor(lr, device=self.device) if captured else lr
        for state in optimizer.state.values():
            if torch.is_tensor(state.get('step')):
                state['step'] = state['step'].to(self.device if captured else 'cpu')

    def make_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, phase: Phase
    ) -> Callable[..., torch.Tensor]:
        """Loss of normalised images, class probabilities and, if it is asked once, the teacher's logits; updates."""
        recipe, captured = self.recipe, _is_capturable(optimizer)
        temperature, share = recipe.kd_temperature, recipe.task_loss_weight if self.teacher else 1.0

        def compute(x: torch.Tensor, target: torch.Tensor, *answer: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            with _autocast(self.device):
                logits = model(self.resize(x, phase)).float()
            loss = share * F.cross_entropy(logits, target, label_smoothing=recipe.smoothing)
            if self.teacher:
                lesson = ((answer[0] if answer else self.ask(x)) / temperature).softmax(1)
                loss = loss + (1 - share) * temperature**2 * F.cross_entropy(logits / temperature, lesson)
            loss.backward()
            if captured:
                optimizer.step()
            return loss.detach()

        graphed = GraphedStep(compute, self.graph)

        def step(*inputs: torch.Tensor) -> torch.Tensor:
            loss = graphed(*inputs)
            if not captured:
                optimizer.step()
            return loss

        return step

    def run(self) -> None:
        """All phases, or the rest of them."""
        self.output.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.recipe.seed)
        saved, weights = self.read_checkpoint(), None
        for number, phase in enumerate(self.recipe.phases):
            if not saved or number >= saved['phase']:
                here = saved if saved and number == saved['phase'] else None
                weights = self.run_phase(number, phase, weights, here)

    def run_phase(
        self, number: int, phase: Phase, weights: Optional[Dict[str, torch.Tensor]], saved: Optional[Dict[str, Any]]
    ) -> Dict[str, torch.Tensor]:
        """A phase, or the rest of it; returns the averaged weights."""
        device = self.device
        model = create(self.recipe, phase, saved['state_dict'] if saved else weights)
        model = model.to(device, memory_format=torch.channels_last)
        optimizer = self.make_optimizer(model, phase)
        rates = [group.get('lr_scale', 1.0) for group in optimizer.param_groups]
        ema = ModelEmaV3(model, decay=phase.model_ema_decay**EMA_STEPS)
        if saved:
            optimizer.load_state_dict(saved['optimizer'])
            self.adapt(optimizer)
            ema.module.load_state_dict(saved['state_dict_ema'])
            self.rows = saved['rows']
            torch.set_rng_state(saved['rng'].cpu())
            if device.type == 'cuda' and saved['rng_cuda'] is not None:  # None of a run that began on a CPU
                torch.cuda.set_rng_state(saved['rng_cuda'].cpu(), device)
        step = self.make_step(model, optimizer, phase)
        steps = len(self.labels) // phase.batch_size
        if not steps:
            raise ValueError(
                f'{len(self.labels)} images are too few for a batch of {phase.batch_size}: lower batch_size.'
            )
        total, first = steps * phase.epochs, saved['epoch'] if saved else 0
        done = first * steps
        bar = tqdm(total=total * phase.batch_size, initial=done * phase.batch_size, unit='image', **BAR)
        saved_at = time.monotonic()
        for epoch in range(first, phase.epochs):
            model.train()
            bar.set_description(f'phase {number + 1}/{len(self.recipe.phases)} epoch {epoch + 1}/{phase.epochs}')
            start, losses = time.monotonic(), torch.zeros((), device=device)
            for part in torch.randperm(len(self.labels), device=device)[: steps * phase.batch_size].chunk(steps):
                lr = _rate(phase, done, total)
                for group, scale in zip(optimizer.param_groups, rates):
                    if torch.is_tensor(group['lr']):
                        group['lr'].fill_(lr * scale)
                    else:
                        group['lr'] = lr * scale
                x = self.normalize(crop_and_flip(self.images[part]))
                target = F.one_hot(self.labels[part], 10).float()
                if phase.cutmix:
                    x, target = cutmix(x, target, phase.cutmix)
                answer = [] if self.answers is None else [self.answers[part]]
                losses += step(x.contiguous(memory_format=torch.channels_last), target, *answer)
                done += 1
                if done % EMA_STEPS == 0:
                    ema.update(model)
                bar.update(phase.batch_size)
            loss = losses.item() / steps
            seconds = time.monotonic() - start
            if not math.isfinite(loss):
                raise FloatingPointError(f'The loss is {loss} in epoch {epoch}: lower lr.')
            row = dict(phase=number, epoch=epoch, lr=f'{lr:.3e}', train_loss=f'{loss:.4f}', val_accuracy='')
            look = epoch % 5 == 4 or epoch + 1 == phase.epochs
            if look and len(self.held_labels):
                row['val_accuracy'] = f'{self.evaluate(ema.module, phase):.4f}'
                bar.set_postfix(val_accuracy=row['val_accuracy'])
            row.update(seconds=f'{seconds:.2f}', images_per_second=f'{steps * phase.batch_size / seconds:.0f}')
            self.rows.append({key: str(value) for key, value in row.items()})
            if look or time.monotonic() - saved_at > SAVE_SECONDS:
                self.save(number, epoch + 1, model, optimizer, ema.module)
                saved_at = time.monotonic()
        bar.close()
        return {key: value.clone() for key, value in ema.module.state_dict().items()}

    def save(
        self, phase: int, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module
    ) -> None:
        """Checkpoint after so many epochs of a phase, the average on its own, and the log."""
        checkpoint = dict(
            recipe=dataclasses.asdict(self.recipe),
            data=self.data,
            phase=phase,
            epoch=epoch,
            state_dict=model.state_dict(),
            optimizer=optimizer.state_dict(),
            state_dict_ema=average.state_dict(),
            rows=self.rows,
            rng=torch.get_rng_state(),
            rng_cuda=torch.cuda.get_rng_state(self.device) if self.device.type == 'cuda' else None,
        )
        # the checkpoint last: a run that is stopped before it does this epoch once more, and writes the others again
        save_tensors(self.output / 'model.safetensors', average.state_dict())
        write_rows(self.output / 'log.csv', self.rows)
        with atomic_path(self.output / 'checkpoint.pt') as part:
            torch.save(checkpoint, part)

    def read_checkpoint(self) -> Optional[Dict[str, Any]]:
        """What a run in this folder has saved."""
        path = self.output / 'checkpoint.pt'
        if not path.exists():
            return None
        saved = torch.load(path, map_location=self.device, weights_only=True)
        if saved['recipe'] != dataclasses.asdict(self.recipe):
            raise ValueError(f'{self.output} holds a run of another recipe: choose another output folder.')
        if saved.get('data') != self.data:
            raise ValueError(
                f'{self.output} holds a run on other data, with other images held out, or with another teacher: choose '
                f'another output folder.'
            )
        return saved


def _digest(tensors: Sequence[torch.Tensor]) -> str:
    """What tells some tensors from others: their bytes, or of images the sums of their rows, which take no time."""
    digest = hashlib.sha256()
    for tensor in tensors:
        rows = tensor.flatten(1).sum(1) if tensor.dtype == torch.uint8 and tensor.ndim > 1 else tensor
        digest.update(rows.flatten().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _is_capturable(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get('capturable'))


def _rate(phase: Phase, step: int, total: int) -> float:
    """Of a step; timm's schedulers would put numbers in the place of the tensors that a recorded step reads."""
    if step < phase.warmup:
        return phase.lr * (step + 1) / phase.warmup
    progress = (step - phase.warmup) / max(total - phase.warmup - 1, 1)
    return phase.min_lr + (phase.lr - phase.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def add_options(parser: argparse.ArgumentParser) -> None:
    """What any script that trains in this way asks for."""
    parser.add_argument('--data', type=Path, required=True, help='folder with train/CLASS/*')
    parser.add_argument('--hold-out', type=int, default=200, help='images of each class that are not trained on')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--no-graph', action='store_true', help='launch the operations of each step one by one')


def prepare_torch() -> None:
    """Settings of the process, as in train.py."""
    torch.set_float32_matmul_precision('high')
    torch.backends.cudnn.benchmark = True


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', type=Path, required=True, help='the recipe')
    parser.add_argument('--output', type=Path, required=True)
    add_options(parser)
    args = parser.parse_args(argv)
    prepare_torch()
    recipe, device = Recipe.read(args.config), torch.device(args.device)
    recipe.check_files()
    train, held = load_images(args.data / 'train', args.hold_out)
    Trainer(recipe, args.output, train, held, device, not args.no_graph).run()


if __name__ == '__main__':
    main()
