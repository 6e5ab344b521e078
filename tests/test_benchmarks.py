"""The benchmarks measure what they say: the plain path computes what this package computes, and the script runs."""

import csv
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build, input_size
from synth import randomize_norms

# its dense convolutions, 33 x 33 taps in float64, take the plain path seconds each
NARROW = {'smpconv_cifar': dict(dims=(8, 8, 12))}
RUN = Path(__file__).resolve().parents[1] / 'benchmarks' / 'run.py'


@pytest.fixture(scope='module')
def make_plain():
    return runpy.run_path(str(RUN))['make_plain']


@pytest.mark.parametrize('train', [False, True])
def test_plain_path_computes_the_same(name, train, make_plain):
    """In float64, where what is left of the plain path and of the backends is rounding; gradients too in training."""
    results = []
    for plain in (False, True):
        torch.manual_seed(0)
        model = randomize_norms(build(name, **NARROW.get(name, {})).double()).train(train)
        if plain:
            make_plain(model)
        channels, *size = input_size(name)
        x = torch.randn(2, channels, *[min(n, 64) if size[0] > 1 else n for n in size], dtype=torch.float64)
        torch.manual_seed(1)
        with torch.set_grad_enabled(train):
            y = model(x)
        if train:
            y.square().sum().backward()
        results.append([y.detach()] + [p.grad for p in model.parameters() if train])
    largest = max(plain.abs().max().item() for plain in results[1])
    for ours, plain in zip(*results):  # a bias before a batch norm has no gradient but rounding
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6 * plain.abs().max().item() + 1e-12 * largest)


def test_script_runs(tmp_path):
    path = tmp_path / 'results.csv'
    command = [sys.executable, str(RUN), '--cases', 'op-infer-768x7x7', '--repeats', '1', '--threads', '1']
    result = subprocess.run(command + ['--csv', str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with open(path, newline='') as f:
        rows = list(csv.DictReader(f))
    assert [row['path'] for row in rows] == ['plain', 'chosen', 'direct', 'fft']
    assert all(float(row['ms']) > 0 and float(row['ratio']) > 0 for row in rows)
    assert all(f'| {row["case"]} | {row["path"]} | {row["ms"]} |' in result.stdout for row in rows)
