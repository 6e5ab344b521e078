"""Measures every backend over a grid of convolutions and says how far from the fastest `choose_backend` is.

    python benchmarks/rule.py --csv rule.csv                # on a CPU
    python benchmarks/rule.py --device cuda --csv rule.csv
    python benchmarks/rule.py --replay rule.csv             # the rule of today on the times of another day

Cases come in random order, so that a run that is cut short (--seconds, Ctrl-C) has measured a sample of them all.
"""

import argparse
import collections
import csv
import dataclasses
import itertools
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, Tuple
from unittest import mock

import torch
from tqdm import tqdm

from timm_smpconv import ops
from timm_smpconv._files import write_rows
from timm_smpconv._text import one_line
from timm_smpconv.ops import direct

# channels in and out (0: depthwise), map or steps, taps
SHAPES = {
    'depthwise': [(c, 0, n, k) for c, n in ((96, 56), (192, 28), (384, 14), (768, 7)) for k in (5, 13, 31, 51)],
    'dense': [
        *((3, 36, 32, 33), (24, 24, 32, 33), (36, 36, 32, 33), (36, 36, 32, 9), (36, 36, 32, 5), (36, 36, 32, 3)),
        *((64, 64, 56, 31), (64, 64, 56, 7), (64, 64, 14, 27), (128, 128, 28, 13), (256, 256, 7, 13)),
        (16, 16, 128, 51),
    ],
    'sequence': [
        *((30, 30, 161, 20), (30, 30, 161, 161), (30, 30, 784, 5), (30, 30, 784, 784), (30, 30, 1024, 64)),
        *((30, 30, 1024, 1024), (30, 30, 4000, 16), (30, 30, 16000, 5), (30, 30, 16000, 60), (30, 30, 16000, 16000)),
        (64, 64, 1024, 256),
    ],
    'depthwise sequence': [
        (c, 0, n, k) for c, n in ((256, 250), (256, 1000), (64, 4000), (64, 16000)) for k in (7, 31, 101, 501, 4000)
    ],
}
BACKENDS = {
    'depthwise': ('direct', 'fft', 'toeplitz'),
    'dense': ('direct', 'fft', 'dft'),
    'sequence': ('direct', 'fft'),
    'depthwise sequence': ('direct', 'fft', 'toeplitz'),
}
OPS = {
    'depthwise': ops.depthwise_conv2d,
    'dense': ops.conv2d,
    'sequence': ops.causal_conv1d,
    'depthwise sequence': ops.depthwise_causal_conv1d,
}
DTYPES = {'bfloat16': torch.bfloat16, 'float32': torch.float32}
_MAX_NUMBERS = 2**29  # of a map
_MAX_PRODUCTS = {'cuda': 2**44, 'cpu': 2**32}  # multiply-adds of direct, not waited for beyond


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the rule knows of a machine: the type of its device, and whether its CPU multiplies bfloat16."""

    device: str
    bfloat16: bool = direct.MULTIPLIES_BFLOAT16


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution; maps are square and in channels_last format; sequences are contiguous, and causal."""

    kind: str
    in_chs: int
    out_chs: int
    size: int
    taps: int
    batch: int
    dtype: str
    train: bool

    @property
    def dims(self) -> int:
        return 1 if self.kind.endswith('sequence') else 2

    def tensors(self, device: str) -> Tuple[torch.Tensor, torch.Tensor]:
        """Input and kernel, with taps that no input can reach cut off as `ops` does."""
        dims = self.dims
        taps = min(self.taps, self.size if dims == 1 else 2 * self.size - 1)
        options = dict(device=device, dtype=DTYPES[self.dtype])
        x = torch.randn(self.batch, self.in_chs, *[self.size] * dims, **options)
        if dims == 2:
            x = x.contiguous(memory_format=torch.channels_last)
        shape = (self.out_chs, self.in_chs) if self.out_chs else (self.in_chs, 1)
        weight = torch.randn(*shape, *[taps] * dims, **options) / taps
        return x.requires_grad_(self.train), weight.requires_grad_(self.train)

    def choice(self, device: str) -> str:
        """What `choose_backend` says, asked without data."""
        x, weight = self.tensors('meta')
        left = tuple(k - 1 if self.dims == 1 else k // 2 for k in weight.shape[2:])
        return ops.choose_backend(x, weight, left, not self.out_chs, device=device)

    def numbers(self) -> int:
        """Entries of the input."""
        return self.batch * self.in_chs * self.size**self.dims

    def products(self) -> int:
        """Multiply-adds of a direct convolution."""
        return self.numbers() * self.taps**self.dims * max(self.out_chs, 1)


def all_cases(kinds: List[str], batches: List[int]) -> Iterator[Case]:
    for kind in kinds:
        for shape, batch, dtype, train in itertools.product(SHAPES[kind], batches, DTYPES, (False, True)):
            case = Case(kind, *shape, batch, dtype, train)
            if case.numbers() <= _MAX_NUMBERS:
                yield case


def measure(case: Case, backend: str, device: str) -> float:
    """Median time in ms, from the call to the end of its work."""
    x, weight = case.tensors(device)
    convolve = OPS[case.kind]

    def run() -> None:
        y = convolve(x, weight)
        if case.train:
            torch.autograd.grad(y, (x, weight), upstream)
        if device == 'cuda':
            torch.cuda.synchronize()

    with ops.use_backend(backend), torch.set_grad_enabled(case.train):
        upstream = torch.randn_like(convolve(x, weight))
        run()
        times: List[float] = []
        started = time.perf_counter()
        while len(times) < 3 or (len(times) < 30 and time.perf_counter() - started < 0.03):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
            if time.perf_counter() - started > 0.5:
                break
    return statistics.median(times)


def choices(times: Dict[Case, Dict[str, float]], machine: Machine) -> Dict[Case, Tuple[str, float]]:
    """The choice on a machine and its time relative to that of the fastest backend, where both are known."""
    found = {}
    with mock.patch.object(direct, 'MULTIPLIES_BFLOAT16', machine.bfloat16):
        for case, measured in times.items():
            chosen = case.choice(machine.device)
            if chosen in measured and len(measured) > 1:
                found[case] = chosen, measured[chosen] / min(measured.values())
    return found


def report(times: Dict[Case, Dict[str, float]], machine: Machine, limit: float) -> None:
    """Prints the cases whose choice takes more than `limit` times as long as the fastest, and a summary."""
    found = choices(times, machine)
    for case in sorted(found, key=dataclasses.astuple):
        chosen, ratio = found[case]
        if ratio > limit:
            measured = ', '.join(f'{name} {ms:.2f}' for name, ms in sorted(times[case].items()))
            print(*dataclasses.astuple(case), f'{chosen}: {ratio:.1f} times the fastest ({measured} ms)')
    if found:
        ratios = [ratio for _, ratio in found.values()]
        near, middle = sum(ratio <= limit for ratio in ratios), statistics.median(ratios)
        print(f'{near} of {len(found)} choices within {limit:.2f} times the fastest, median {middle:.2f}')


def read(path: str) -> Tuple[Dict[Case, Dict[str, float]], Machine]:
    """Times of an earlier run, and its machine."""
    times: Dict[Case, Dict[str, float]] = collections.defaultdict(dict)
    machine = Machine('cpu')
    with open(path, newline='') as file:
        for row in csv.DictReader(file):
            numbers = [int(row[name]) for name in ('in_chs', 'out_chs', 'size', 'taps', 'batch')]
            case = Case(row['kind'], *numbers, row['dtype'], row['train'] == 'True')
            times[case][row['backend']] = float(row['ms'])
            machine = Machine(row['device'], row.get('bfloat16') == 'True')
    return times, machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--kinds', nargs='+', default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 8, 64, 512])
    parser.add_argument('--seconds', type=float, default=float('inf'), help='stop after so long')
    parser.add_argument('--limit', type=float, default=1.3, help='ratio up to which a choice counts as good')
    parser.add_argument('--csv', help='file for the times')
    parser.add_argument('--replay', metavar='CSV', help='judge the rule by the times in a file, without measuring')
    args = parser.parse_args()
    if args.replay:
        report(*read(args.replay), args.limit)
        return
    cases = list(all_cases(args.kinds, args.batches))
    random.Random(0).shuffle(cases)  # a run that is cut short has a sample of them all
    work = [(case, name) for case in cases for name in BACKENDS[case.kind] if name in ops.available_backends()]
    work = [(case, name) for case, name in work if name != 'direct' or case.products() < _MAX_PRODUCTS[args.device]]
    if args.device == 'cpu':
        work = [(case, name) for case, name in work if name != 'toeplitz' and case.numbers() < 2**24]
    times: Dict[Case, Dict[str, float]] = collections.defaultdict(dict)
    machine = Machine(args.device)
    started = time.monotonic()
    try:
        for case, name in tqdm(work, unit='case', disable=None):
            if time.monotonic() - started > args.seconds:
                break
            try:
                times[case][name] = measure(case, name, args.device)
            except RuntimeError as e:  # not enough memory, for one
                tqdm.write(f'{case} {name}: {one_line(e)}', file=sys.stderr)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
    rows = [
        {**dataclasses.asdict(case), **dataclasses.asdict(machine), 'backend': name, 'ms': f'{ms:.4g}'}
        for case, measured in times.items()
        for name, ms in measured.items()
    ]
    if args.csv and rows:
        write_rows(Path(args.csv), rows)
    report(times, machine, args.limit)


if __name__ == '__main__':
    main()
