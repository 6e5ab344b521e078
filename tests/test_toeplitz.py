"""The kernels for GPUs: on a GPU with tensor cores, else in Triton's interpreter (conftest.py), and compiled for GPUs.

test_ops.py runs every backend, this one too; here is what is its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from timm_smpconv import ops
from timm_smpconv.ops.context import has_tensor_cores

triton = pytest.importorskip('triton')
toeplitz = pytest.importorskip('timm_smpconv.ops.toeplitz')

DEVICE = 'cuda' if torch.cuda.is_available() and has_tensor_cores(torch.device('cuda')) else 'cpu'
# of the largest entry: inputs and results are rounded to this dtype, sums are in float32
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that ran."""
    seen = []
    for name in ('_launch_correlate', '_launch_weight_grad'):
        operator = getattr(toeplitz, name)
        monkeypatch.setattr(toeplitz, name, lambda *args, n=name, o=operator: seen.append(n) or o(*args))
    return seen


@pytest.mark.parametrize('dtype', list(TOLERANCE))
@settings(max_examples=12)
@given(
    batch=st.sampled_from([1, 2, 3, 17, 65]),
    height=st.integers(1, 9),
    width=st.sampled_from([1, 5, 14, 16, 31, 65, 80]),
    taps=st.tuples(st.integers(1, 6), st.integers(1, 90)),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    data=st.data(),
)
def test_values_and_gradients(dtype, batch, height, width, taps, memory_format, data):
    """Several tiles in each dimension, any padding, both memory formats, against torch in float64."""
    taps = tuple(min(k, 2 * n - 1) for k, n in zip(taps, (height, width)))
    left = tuple(data.draw(st.integers(max(k - n, 0), min(n, k) - 1)) for k, n in zip(taps, (height, width)))
    x, bias = randn(batch, 2, height, width, dtype=dtype, seed=1), randn(2, dtype=dtype, seed=2)
    weight = randn(2, 1, *taps, dtype=dtype, seed=3)
    args = [a.requires_grad_() for a in (x.to(memory_format=memory_format), weight, bias)]
    y = toeplitz.correlate(*args, left, True)
    assert y.is_contiguous(memory_format=memory_format)
    upstream = randn(*y.shape, dtype=dtype, seed=4)
    got = (y, *torch.autograd.grad(y, args, upstream))

    exact = [a.detach().double().requires_grad_() for a in args]
    pad = (left[1], taps[1] - 1 - left[1], left[0], taps[0] - 1 - left[0])
    wanted = F.conv2d(F.pad(exact[0], pad), exact[1], exact[2], groups=2)
    wanted = (wanted, *torch.autograd.grad(wanted, exact, upstream.double()))
    for a, b in zip(got, wanted):
        assert a.shape == b.shape and a.dtype == dtype
        assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()


def test_takes_depthwise_maps_and_leaves_the_rest(launches):
    weight = randn(3, 1, 5, 7).requires_grad_()
    with ops.use_backend('toeplitz'):
        ops.depthwise_conv2d(randn(2, 3, 6, 8), weight).sum().backward()
        assert launches == ['_launch_correlate', '_launch_weight_grad']
        ops.conv2d(randn(2, 3, 6, 8), randn(4, 3, 5, 7))
        ops.causal_conv1d(randn(2, 3, 6), randn(4, 3, 5))
        ops.depthwise_conv2d(randn(2, 3, 6, 8).double(), weight.double())
        assert len(launches) == 2
        x = randn(2, 3, 6, 8).to(memory_format=torch.channels_last)
        assert ops.depthwise_conv2d(x, weight).is_contiguous(memory_format=torch.channels_last)
        assert len(launches) == 3


@pytest.mark.parametrize(
    'shape, taps, dtype, channels_last, trained, expected',
    [  # what was fastest on an H100 (benchmarks/README.md)
        ((64, 96, 56, 56), 31, torch.bfloat16, False, False, 'toeplitz'),
        ((64, 96, 56, 56), 31, torch.bfloat16, True, True, 'toeplitz'),
        ((64, 96, 56, 56), 31, torch.float32, False, True, 'fft'),
        ((64, 96, 56, 56), 31, torch.float32, False, False, 'fft'),
        ((64, 192, 28, 28), 29, torch.float32, False, True, 'toeplitz'),
        ((64, 768, 7, 7), 13, torch.bfloat16, False, False, 'direct'),
        ((64, 768, 7, 7), 13, torch.bfloat16, True, True, 'toeplitz'),
        ((64, 32, 112, 112), 51, torch.bfloat16, False, False, 'toeplitz'),
        ((64, 32, 112, 112), 101, torch.float32, False, True, 'fft'),
        ((64, 32, 112, 112), 101, torch.bfloat16, False, False, 'fft'),
        ((64, 32, 112, 112), 101, torch.bfloat16, True, True, 'fft'),
        ((64, 384, 14, 14), 27, torch.bfloat16, True, False, 'toeplitz'),
        ((64, 96, 56, 56), 5, torch.bfloat16, True, True, 'direct'),
        ((64, 96, 56, 56), 5, torch.bfloat16, False, True, 'toeplitz'),
        ((64, 96, 56, 56), 3, torch.float32, True, False, 'direct'),
        ((1, 96, 56, 56), 7, torch.float32, False, False, 'direct'),
        ((1, 96, 56, 56), 7, torch.float32, True, True, 'toeplitz'),
        ((1, 96, 56, 56), 7, torch.bfloat16, True, True, 'direct'),
        ((64, 96, 56, 56), 31, torch.float64, False, False, 'fft'),  # the kernels take no float64
    ],
)
def test_choice_on_a_gpu(shape, taps, dtype, channels_last, trained, expected):
    x = torch.empty(shape, device='meta', dtype=dtype)
    x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_(trained)
    weight = torch.empty(shape[1], 1, taps, taps, device='meta', dtype=dtype)
    assert ops.choose_backend(x, weight, (taps // 2, taps // 2), True, device='cuda') == expected
    assert ops.choose_backend(x, weight, (taps // 2, taps // 2), True) != 'toeplitz'  # elsewhere never


def test_second_derivatives():
    """Of both gradients by both arguments."""

    def second_order(function, dtype):
        x, weight = randn(1, 2, 4, 5).to(dtype).requires_grad_(), randn(2, 1, 3, 5, seed=1).to(dtype).requires_grad_()
        grads = torch.autograd.grad(function(x, weight).pow(3).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, weight))

    got = second_order(lambda x, weight: toeplitz.correlate(x, weight, None, (1, 2), True), torch.float32)
    wanted = second_order(lambda x, weight: F.conv2d(x, weight, padding=(1, 2), groups=2), torch.float64)
    assert all((a - b).abs().max() < 1e-5 * b.abs().max() for a, b in zip(got, wanted))


def test_operators_keep_the_rules_of_torch():
    x, weight, bias = randn(2, 2, 6, 7), randn(2, 1, 5, 3), randn(2)
    torch.library.opcheck(toeplitz._correlate_op, (x, weight, bias, [2, 1]))
    torch.library.opcheck(toeplitz._weight_grad_op, (x, randn(2, 2, 6, 7), [5, 3], [2, 1]))


@pytest.mark.skipif(
    tuple(int(n) for n in triton.__version__.split('.')[:2]) < (3, 4), reason='older Triton is asked in another way'
)
def test_compiles_for_gpus():
    """To machine code, half precision with instructions of the tensor cores; needs no GPU, but a process of its own."""
    script = Path(__file__).with_name('compile_toeplitz.py')
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    result = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = result.stdout.splitlines()
    assert len(rows) == 6 * 2
    for row in rows:
        kernel, capability, width, dtype, binary, shared, tensor_cores = row.split()
        assert int(binary) > 1000, row
        assert int(shared) <= 99 * 1024, row  # what a program may have on any GPU from 8.0
        assert (tensor_cores == 'True') == (kernel == '_correlate_kernel' or dtype != 'fp32'), row
