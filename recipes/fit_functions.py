"""The paper's fitting experiment (Figure 3): points that move fit a function better than as many that do not.

204 points are fitted to a function that is sampled at 51 x 51 places, from the same random start in three ways: the
weights alone, the radii too, and the coordinates too. The paper does not name its two "sinusoidal-based" functions, or
how it fitted them: those here, a checkerboard of waves and rings, the start, and the course are choices of this script.

    python recipes/fit_functions.py --output output/fit --picture fit.png

It prints the errors, means over the seeds, and writes those of each run to fit_functions.csv after the run. The same
command continues after an interruption; another number of steps or points wants another folder.
"""

import argparse
import csv
import math
import statistics
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from PIL import Image
from tqdm import tqdm

from timm_smpconv._files import atomic_path, write_rows
from timm_smpconv.layers import SMPKernel
from timm_smpconv.pictures import paint

TAPS, POINTS = 51, 204  # the paper's

FUNCTIONS: Dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    'waves': lambda x, y: torch.sin(2 * math.pi * x) * torch.sin(3 * math.pi * y),
    'rings': lambda x, y: torch.cos(3 * math.pi * (x**2 + y**2).sqrt()),
}
LEARNED: Dict[str, Dict[str, bool]] = {
    'weights': dict(learn_coords=False, learn_radius=False),
    'weights and radii': dict(learn_coords=False, learn_radius=True),
    'weights, radii and coordinates': dict(learn_coords=True, learn_radius=True),
}


def sample(function: str) -> torch.Tensor:
    """Values of a function at the places of the taps of a kernel, (51, 51), row 0 at the top."""
    steps = torch.linspace(-1, 1, TAPS)
    return FUNCTIONS[function](steps, steps.flip(0).unsqueeze(1))


def fit(target: torch.Tensor, learned: str, seed: int, steps: int, points: int = POINTS) -> Tuple[float, torch.Tensor]:
    """Fits points to a function by Adam.

    They start anywhere on the square, with radii of 1.5 times the distance that points of a regular grid would have.

    Args:
        target: Values of the function, (51, 51).
        learned: Key of LEARNED.
        seed: Of the start.
        steps: Of Adam, at a rate that falls from 0.01 to zero along a cosine.
        points: Their number.

    Returns:
        Root of the mean squared error, and the kernel, (51, 51).
    """
    generator = torch.Generator().manual_seed(seed)
    radius = min(1.5 * 2 / math.sqrt(points), 1.0)
    kernel = SMPKernel(1, 1, TAPS, num_points=points, radius=radius, **LEARNED[learned])
    with torch.no_grad():
        kernel.coords.copy_(2 * torch.rand(kernel.coords.shape, generator=generator) - 1)
        kernel.weights.copy_(0.1 * torch.randn(kernel.weights.shape, generator=generator))
    optimizer = torch.optim.Adam([p for p in kernel.parameters() if p.requires_grad], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (kernel()[0, 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        result = kernel()[0, 0]
    return float((result - target).square().mean().sqrt()), result


def tabulate(rows: Sequence[Dict[str, str]]) -> List[Dict[str, str]]:
    """A row for each function and what was learned: mean and standard deviation of the error over the seeds."""
    table = []
    for function in FUNCTIONS:
        for learned in LEARNED:
            errors = [float(r['error']) for r in rows if (r['function'], r['learned']) == (function, learned)]
            if errors:
                spread = f'{statistics.stdev(errors):.4f}' if len(errors) > 1 else ''
                row = dict(function=function, learned=learned, error=f'{statistics.mean(errors):.4f}', std=spread)
                table.append({**row, 'seeds': str(len(errors))})
    return table


def draw(kernels: Dict[Tuple[str, str], torch.Tensor], path: Path) -> None:
    """A row for each function: itself, and for each of LEARNED the fitted kernel."""
    rows = [[paint(sample(f), 1.0), *(paint(kernels[f, learned], 1.0) for learned in LEARNED)] for f in FUNCTIONS]
    width, height = rows[0][0].size
    gap = 8
    picture = Image.new('RGB', ((width + gap) * len(rows[0]) - gap, (height + gap) * len(rows) - gap), 'white')
    for i, row in enumerate(rows):
        for j, part in enumerate(row):
            picture.paste(part, (j * (width + gap), i * (height + gap)))
    with atomic_path(path) as part:
        picture.save(part, 'PNG')


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, help='folder of fit_functions.csv')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4])
    parser.add_argument('--steps', type=int, default=2000, help='of each fit (default: 2000)')
    parser.add_argument('--points', type=int, default=POINTS, help=f'(default: {POINTS}, as in the paper)')
    parser.add_argument('--picture', type=Path, metavar='FILE.png', help='draw the fits of the first seed')
    args = parser.parse_args(argv)
    if args.steps < 1 or args.points < 1:
        parser.error(f'--steps and --points must be at least 1, got {args.steps} and {args.points}.')
    file = args.output / 'fit_functions.csv'
    args.output.mkdir(parents=True, exist_ok=True)
    settings = dict(steps=str(args.steps), points=str(args.points))
    rows: List[Dict[str, str]] = []
    if file.exists():
        with open(file, newline='') as f:
            rows = list(csv.DictReader(f))
        if any({key: row[key] for key in settings} != settings for row in rows):
            parser.error(f'{file} is of other --steps or --points: name another folder.')
    done = {(row['function'], row['learned'], row['seed']) for row in rows}
    kernels = {}
    runs = [(f, learned, seed) for seed in dict.fromkeys(args.seeds) for f in FUNCTIONS for learned in LEARNED]
    for function, learned, seed in tqdm(runs, unit='fit', mininterval=1):
        drawn = args.picture is not None and seed == args.seeds[0]
        if (function, learned, str(seed)) in done and not drawn:
            continue
        error, kernel = fit(sample(function), learned, seed, args.steps, args.points)
        if drawn:
            kernels[function, learned] = kernel
        if (function, learned, str(seed)) not in done:
            rows.append(dict(function=function, learned=learned, seed=str(seed), **settings, error=f'{error:.6f}'))
            write_rows(file, rows)
    wanted = {str(seed) for seed in args.seeds}
    table = tabulate([row for row in rows if row['seed'] in wanted])
    for row in [{key: key for key in table[0]}, *table]:
        print('| ' + ' | '.join(row.values()) + ' |')
    if args.picture:
        draw(kernels, args.picture)


if __name__ == '__main__':
    main()
