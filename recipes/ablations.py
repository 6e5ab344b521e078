"""The paper's ablations on CIFAR-10 (Tables 6 to 9) at a reduced schedule.

What is learned of the points, how far apart they start, how large they start, and how many there are: each setting of
`smpconv_cifar` is trained from scratch by train_cifar.py, with its augmentation, and the averaged weights classify the
held-out training images. Test images have no part in it. The setting of the paper is in all four tables and runs once.

    timm-smpconv data cifar10 data
    python recipes/ablations.py --data data/cifar10 --output output/ablations
    python recipes/ablations.py --data data/cifar10 --output output/table6 --tables 6 --seeds 0 1 2 --epochs 20

It prints the tables with the paper's numbers beside the ones of this call, and writes them to ablations.csv after each
run. The same command continues after an interruption; another number of epochs wants another folder.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from train_cifar import Phase, Recipe, Trainer, add_options, load_images, prepare_torch

from timm_smpconv._files import write_rows

PAPER: Dict[str, Any] = dict(learn_coords=True, learn_radius=True, coord_std=0.05, radius=0.12, num_points=16)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A column of a table.

    Attributes:
        table: Number in the paper.
        label: What is varied.
        change: Arguments of the network that differ from the paper's setting.
        paper: Accuracy in the paper after 210 epochs, in per cent.
    """

    table: int
    label: str
    change: Tuple[Tuple[str, Any], ...]
    paper: float

    @property
    def kwargs(self) -> Dict[str, Any]:
        """Arguments of the network."""
        return {**PAPER, **dict(self.change)}

    @property
    def folder(self) -> str:
        """Name of the folder of its runs."""
        return '-'.join(f'{key}={value}' for key, value in self.kwargs.items() if value != PAPER[key]) or 'paper'


SETTINGS = [
    Setting(6, 'fixed points', (('learn_coords', False), ('learn_radius', False)), 90.92),
    Setting(6, 'learned radii', (('learn_coords', False),), 91.35),
    Setting(6, 'learned coordinates', (('learn_radius', False),), 92.47),
    Setting(6, 'both learned', (), 93.00),
    *(
        Setting(7, f'std of coordinates {std}', (('coord_std', std),), paper)
        for std, paper in ((0.05, 93.00), (0.2, 92.24), (0.3, 91.84), (0.5, 91.51))
    ),
    *(
        Setting(8, f'radius {radius}', (('radius', radius),), paper)
        for radius, paper in ((0.12, 93.00), (0.18, 92.36), (0.24, 92.06), (0.3, 91.76))
    ),
    *(
        Setting(9, f'{count} points', (('num_points', count),), paper)
        for count, paper in ((4, 92.56), (8, 92.28), (16, 93.00), (32, 92.84), (64, 92.21))
    ),
]
TABLES = sorted({setting.table for setting in SETTINGS})


def make_recipe(setting: Setting, seed: int, epochs: int, base: Optional[Recipe] = None) -> Recipe:
    """A run of a setting.

    Args:
        setting: Decides about the points.
        seed: Of everything random.
        epochs: Of a run with the paper's optimizer and dropout; a larger batch, with the rate that goes with it.
        base: Recipe of train_cifar.py to take instead of that; `epochs` has no effect then.
    """
    if base is None:
        course = dict(lr=0.01, batch_size=256, warmup=200, weight_decay=1e-5, model_ema_decay=0.99)
        phase = Phase(epochs, model_kwargs=dict(drop_rate=0.1), **course)
        base = Recipe('smpconv_cifar', [phase], opt='adam', opt_kwargs=dict(capturable=True))
    phases = [
        dataclasses.replace(phase, model_kwargs={**phase.model_kwargs, **setting.kwargs}) for phase in base.phases
    ]
    return dataclasses.replace(base, phases=phases, seed=seed)


def tabulate(settings: Sequence[Setting], accuracies: Dict[str, List[float]]) -> List[Dict[str, str]]:
    """Rows of the tables.

    Args:
        settings: Their order.
        accuracies: Shares of the held-out images that the seeds of a setting got right, by its folder.
    """
    rows = []
    for setting in settings:
        shares = [100 * share for share in accuracies.get(setting.folder, [])]
        rows.append(
            {
                'table': str(setting.table),
                'setting': setting.label,
                'paper': f'{setting.paper:.2f}',
                'held_out': f'{statistics.mean(shares):.2f}' if shares else '',
                'std': f'{statistics.stdev(shares):.2f}' if len(shares) > 1 else '',
                'seeds': str(len(shares)),
            }
        )
    return rows


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, help='a folder for each run, and ablations.csv')
    parser.add_argument('--tables', type=int, nargs='+', choices=TABLES, default=TABLES)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--epochs', type=int, default=10, help='of each run')
    parser.add_argument('--config', type=Path, help='a recipe for train_cifar.py, in place of --epochs of Adam')
    add_options(parser)
    args = parser.parse_args(argv)
    if args.hold_out < 1:
        parser.error(f'--hold-out must be at least 1, got {args.hold_out}: settings are compared by these images.')
    prepare_torch()
    base, device = args.config and Recipe.read(args.config), torch.device(args.device)
    train, held = load_images(args.data / 'train', args.hold_out)
    settings = [setting for setting in SETTINGS if setting.table in args.tables]
    accuracies: Dict[str, List[float]] = {}
    for seed in dict.fromkeys(args.seeds):
        for setting in {setting.folder: setting for setting in settings}.values():
            folder = args.output / f'{setting.folder}-seed{seed}'
            trainer = Trainer(
                make_recipe(setting, seed, args.epochs, base), folder, train, held, device, not args.no_graph
            )
            trainer.run()
            accuracies.setdefault(setting.folder, []).append(float(trainer.rows[-1]['val_accuracy']))
            rows = tabulate(settings, accuracies)
            write_rows(args.output / 'ablations.csv', rows)
    for row in [{key: key for key in rows[0]}, *rows]:
        print('| ' + ' | '.join(row.values()) + ' |')


if __name__ == '__main__':
    main()
