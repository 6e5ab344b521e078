"""Every backend against the reference backend, and the reference backend against torch in float64."""

import math
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from synth import relative_error
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from timm_smpconv import ops
from timm_smpconv.layers import KernelCache, LargeConv2d
from timm_smpconv.ops import dft, direct, fft, reference
from timm_smpconv.ops.context import to_channels_last

BACKENDS = ops.available_backends()
OTHERS = [backend for backend in BACKENDS if backend != 'reference']
OPS = {
    'depthwise': ops.depthwise_conv2d,
    'dense': ops.conv2d,
    'causal': ops.causal_conv1d,
    'causal depthwise': ops.depthwise_causal_conv1d,
    'sequence': ops.conv1d,
    'sequence depthwise': ops.depthwise_conv1d,
}
# of a result of magnitude 1: inputs and output are rounded to this dtype, and torch itself sums float16 in float16
FORWARD = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BACKWARD = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 6e-2}


def make_case(op, batch, in_chs, out_chs, spatial, taps, dtype=torch.float64, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if is_1d(op):
        spatial, taps = spatial[:1], taps[:1]
    if not op.startswith('causal'):
        taps = [2 * k + 1 for k in taps]
    if op.endswith('depthwise'):
        return randn(batch, in_chs, *spatial), randn(in_chs, 1, *taps), randn(in_chs) if bias else None
    return randn(batch, in_chs, *spatial), randn(out_chs, in_chs, *taps), randn(out_chs) if bias else None


def is_1d(op):
    return op.startswith(('causal', 'sequence'))


def torch_result(op, x, weight, bias):
    groups = weight.shape[0] if op.endswith('depthwise') else 1
    if op.startswith('causal'):
        return F.conv1d(F.pad(x, (weight.shape[2] - 1, 0)), weight, bias, groups=groups)
    convolve = F.conv1d if is_1d(op) else F.conv2d
    return convolve(x, weight, bias, padding=tuple(k // 2 for k in weight.shape[2:]), groups=groups)


def with_gradients(function, args):
    """Output and gradients by all arguments, for an upstream gradient that is not constant."""
    args = [None if a is None else a.detach().clone().requires_grad_() for a in args]
    y = function(*args)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).sin().to(y.dtype)
    grads = torch.autograd.grad(y, [a for a in args if a is not None], upstream)
    for a, g in zip([a for a in args if a is not None], grads):
        assert a.shape == g.shape and a.dtype == g.dtype
    return y, *grads


def close(actual, wanted, tolerance):
    """Relative to the largest entry, or to 1 where the sum happens to be small."""
    assert actual.shape == wanted.shape
    if not wanted.numel():
        return True
    scale = max(wanted.detach().double().abs().max().item(), 1.0)
    return (actual.detach().double() - wanted.detach().double()).abs().max().item() <= tolerance * scale


shapes = dict(
    op=st.sampled_from(sorted(OPS)),
    batch=st.integers(0, 3),
    in_chs=st.integers(1, 3),
    out_chs=st.integers(1, 3),
    spatial=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    taps=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)


def fix(op, taps):
    return (taps[0] + 1,) if op.startswith('causal') else taps  # at least one tap, even numbers if causal only


@given(**shapes)
def test_reference_is_torch(op, batch, in_chs, out_chs, spatial, taps, bias, seed):
    case = make_case(op, batch, in_chs, out_chs, spatial, fix(op, taps), seed=seed, bias=bias)
    wanted = with_gradients(lambda *args: torch_result(op, *args), case)
    with ops.use_backend('reference'):
        got = with_gradients(OPS[op], case)
    assert all(close(a, b, 1e-11) for a, b in zip(got, wanted))


@pytest.mark.parametrize('backend', [*OTHERS, None])
@given(dtype=st.sampled_from([torch.float64, torch.float32]), **shapes)
def test_backends_agree(backend, dtype, op, batch, in_chs, out_chs, spatial, taps, bias, seed):
    case = make_case(op, batch, in_chs, out_chs, spatial, fix(op, taps), dtype, seed, bias)
    with ops.use_backend('reference'):
        wanted = with_gradients(OPS[op], [None if a is None else a.double() for a in case])
    with ops.use_backend(backend):
        got = with_gradients(OPS[op], case)
    assert got[0].dtype == dtype
    assert close(got[0], wanted[0], FORWARD[dtype])
    assert all(close(a, b, BACKWARD[dtype]) for a, b in zip(got[1:], wanted[1:]))


def dilated(op, dilation):
    """The operation of this package and that of torch, with a dilation."""

    def torch_op(x, weight, bias):
        padding = [k // 2 * d for k, d in zip(weight.shape[2:], dilation)]
        groups = x.shape[1] if op == 'depthwise' else 1
        return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=groups)

    return lambda x, weight, bias: OPS[op](x, weight, bias, dilation), torch_op


@pytest.mark.parametrize('backend', [*BACKENDS, None])
@given(
    **{
        **shapes,
        'op': st.sampled_from(['dense', 'depthwise']),
        'taps': st.tuples(st.integers(0, 3), st.integers(0, 3)),
        'dilation': st.tuples(st.integers(1, 5), st.integers(1, 5)),
        'last': st.booleans(),
    }
)
def test_dilation(backend, op, dilation, last, batch, in_chs, out_chs, spatial, taps, bias, seed):
    """Distances that divide the sides of a map or do not, or are larger: torch's own, in the memory format of x."""
    x, weight, b = make_case(op, batch, in_chs, out_chs, spatial, taps, seed=seed, bias=bias)
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    function, torch_function = dilated(op, dilation)
    wanted = with_gradients(torch_function, (x, weight, b))
    with ops.use_backend(backend):
        got = with_gradients(function, (x, weight, b))
    assert all(close(a, g, 1e-10) for a, g in zip(got, wanted))


@pytest.mark.parametrize('op', ['dense', 'depthwise'])
@pytest.mark.parametrize('last', [False, True])
def test_dilation_keeps_the_memory_format(op, last):
    x, weight, bias = make_case(op, 2, 6, 6, (11, 14), (3, 3), torch.float32)
    x = to_channels_last(x, x.dtype) if last else x
    for dilation in ((2, 3), (11, 7)):  # what is cut off leaves no gaps
        y = dilated(op, dilation)[0](x, weight, bias)
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert torch.equal(OPS[op](x, weight, bias, 2), OPS[op](x, weight, bias, (2, 2)))


@pytest.mark.parametrize('op', ['dense', 'depthwise'])
def test_dilation_elsewhere(op):
    """Under autocast, in torch.func, twice differentiated, and with kept spectra."""
    args = make_case(op, 2, 4, 4, (13, 10), (4, 3))
    function, torch_function = dilated(op, (3, 2))
    wanted = torch_function(*args)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = function(*(a.float() for a in args))
    assert y.dtype == torch.bfloat16 and relative_error(y.double(), wanted) < 3e-2
    each = torch.func.vmap(function, in_dims=(0, None, None))(args[0].unsqueeze(1), *args[1:])
    torch.testing.assert_close(each.squeeze(1), wanted)
    small = make_case(op, 1, 2, 2, (5, 4), (1, 1))
    small = [a.requires_grad_() for a in small]
    assert torch.autograd.gradgradcheck(dilated(op, (2, 2))[0], small)
    cache = KernelCache()
    with torch.no_grad(), ops.use_backend('fft'):
        for x in (args[0], args[0] + 1):
            y = OPS[op](x, *args[1:], (3, 2), cache.keep(args[1]))
            torch.testing.assert_close(y, torch_function(x, *args[1:]))


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='torch 2.6 cannot tell export from compilation')
@pytest.mark.parametrize('op', ['dense', 'depthwise'])
def test_compiled_and_exported_dilation(op):
    """Compiled once for all sizes; exported as the convolution of torch."""
    args = make_case(op, 2, 4, 4, (13, 10), (4, 3))
    function, torch_function = dilated(op, (3, 2))
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for size in ((13, 10), (9, 20), (12, 12)):
        x = args[0].new_ones(2, 4, *size).cumsum(2).sin()
        torch.testing.assert_close(compiled(x, *args[1:]), torch_function(x, *args[1:]))
    assert counter.frame_count == 1
    exported = torch.export.export(Wrapped(function), args)
    torch.testing.assert_close(exported.module()(*args), torch_function(*args))
    (node,) = [node for node in exported.graph.nodes if node.op == 'call_function']
    assert node.target is torch.ops.aten.conv2d.default


def test_dilations_that_cannot_work():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3)
    for dilation in ((0, 1), (1, -2), (1,), (1, 2, 3), 0, 2.0):
        with pytest.raises(ValueError, match=re.escape(f'positive number, or (rows, columns), got {dilation}')):
            ops.depthwise_conv2d(x, weight, None, dilation)
    with pytest.raises(ValueError, match='one step or pixel'):
        ops.depthwise_conv2d(x[:, :, :0], weight, None, (2, 2))


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize('op', sorted(OPS))
def test_one_sample_without_a_batch(op):
    """As torch's convolutions take it, in TorchScript, compiled and exported too."""
    x, weight, bias = make_case(op, 1, 3, 3, (11, 8), (5, 3))
    wanted = torch_result(op, x, weight, bias)[0]
    function = OPS[op]
    assert relative_error(function(x[0], weight, bias), wanted) < 1e-10
    got = with_gradients(function, (x[0], weight, bias))
    assert all(
        close(a, b, 1e-10) for a, b in zip(got, with_gradients(lambda *a: torch_result(op, *a), (x[0], weight, bias)))
    )
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend='aot_eager')(x[0], weight, bias)
    for each in (compiled, torch.jit.script(function)(x[0], weight, bias)):
        assert relative_error(each, wanted) < 1e-10
    exported = torch.export.export(Wrapped(function), (x[0], weight, bias)).module()
    assert relative_error(exported(x[0], weight, bias), wanted) < 1e-10


def test_sequences_in_bfloat16_with_amx(monkeypatch):
    """Computed in float32 where torch's own convolution is not to be trusted."""
    seen, conv1d = [], F.conv1d
    monkeypatch.setattr(F, 'conv1d', lambda x, *args: seen.append(x.dtype) or conv1d(x, *args))
    case = make_case('causal', 2, 2, 3, (50,), (9,), torch.bfloat16)
    for amx, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        monkeypatch.setattr(direct, '_AMX', amx)
        with ops.use_backend('direct'):
            got = with_gradients(OPS['causal'], case)
        assert got[0].dtype == torch.bfloat16 and seen.pop() == dtype


@pytest.mark.parametrize('backend', OTHERS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    'op, channels, spatial, taps',
    [
        ('depthwise', 8, (14, 20), (6, 6)),
        ('depthwise', 4, (56, 40), (15, 15)),
        ('depthwise', 3, (7, 9), (15, 25)),  # kernel larger than the map
        ('dense', 6, (32, 32), (16, 16)),
        ('causal', 5, (300,), (300,)),
        ('causal', 5, (120,), (161,)),
        ('causal', 2, (500,), (64,)),
        ('causal depthwise', 6, (300,), (300,)),
        ('sequence', 5, (120,), (100,)),  # kernel longer than the sequence
        ('sequence depthwise', 8, (500,), (20,)),
    ],
)
def test_larger_shapes_in_all_dtypes(backend, dtype, op, channels, spatial, taps):
    x, weight, _ = make_case(op, 2, channels, channels, spatial, taps, dtype, bias=False)
    weight = weight / weight[0].numel() ** 0.5  # outputs of magnitude 1
    with ops.use_backend('reference'):
        wanted = with_gradients(OPS[op], (x.double(), weight.double()))
    with ops.use_backend(backend):
        got = with_gradients(OPS[op], (x, weight))
    assert got[0].dtype == dtype
    assert relative_error(got[0], wanted[0]) <= FORWARD[dtype]
    for a, b in zip(got[1:], wanted[1:]):
        assert relative_error(a, b) <= BACKWARD[dtype]


@pytest.mark.parametrize('dtype, autocast', [(dtype, False) for dtype in FORWARD] + [(torch.float32, True)], ids=str)
@pytest.mark.parametrize('channels', [5, 32])
@pytest.mark.parametrize('size', [(6, 6), (4, 5), (6, 4)])
@pytest.mark.parametrize('avx512', [False, True])
@pytest.mark.parametrize('last', [False, True])
def test_direct_depthwise_of_middle_size(avx512, last, size, channels, dtype, autocast, monkeypatch):
    """Rows and columns, 9 to 13 of them, for which the direct backend knows better than torch; on any processor."""
    monkeypatch.setattr(direct, '_AVX512', avx512)
    x, weight, bias = make_case('depthwise', 2, channels, channels, (17, 20), size, dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight = weight / weight[0].numel() ** 0.5
    with ops.use_backend('reference'):
        wanted = with_gradients(ops.depthwise_conv2d, [a.double() for a in (x, weight, bias)])
    with ops.use_backend('direct'), torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        got = with_gradients(ops.depthwise_conv2d, (x, weight, bias))
    computed = torch.bfloat16 if autocast else dtype
    assert got[0].dtype == computed
    assert relative_error(got[0], wanted[0]) <= FORWARD[computed]
    for a, b in zip(got[1:], wanted[1:]):
        assert relative_error(a, b) <= BACKWARD[computed]


@pytest.mark.parametrize('backend', BACKENDS)
class TestByHand:
    def test_causal(self, backend):
        with ops.use_backend(backend):
            x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
            y = ops.causal_conv1d(x, torch.tensor([[[10.0, 1.0]]]))  # present + 10 * the step before
            assert torch.allclose(y, torch.tensor([[[1.0, 12.0, 23.0, 34.0]]]), atol=1e-5)
            y = ops.causal_conv1d(x, torch.tensor([[[7.0, 0.0, 0.0, 0.0, 0.0, 1.0]]]))  # the first tap sees nothing
            assert torch.allclose(y, x, atol=1e-5)

    def test_correlation_not_convolution(self, backend):
        x = torch.zeros(1, 1, 3, 4)
        x[0, 0, 1, 1] = 1.0
        weight = torch.arange(9.0).reshape(1, 1, 3, 3)
        wanted = torch.tensor([[8.0, 7.0, 6.0, 0.0], [5.0, 4.0, 3.0, 0.0], [2.0, 1.0, 0.0, 0.0]])
        with ops.use_backend(backend):
            for op in (ops.conv2d, ops.depthwise_conv2d):
                assert torch.allclose(op(x, weight)[0, 0], wanted, atol=1e-5)

    def test_one_tap(self, backend):
        with ops.use_backend(backend):
            x = torch.randn(2, 3, 4, 5)
            scale = torch.tensor([1.0, -2.0, 0.5])
            y = ops.depthwise_conv2d(x, scale.reshape(3, 1, 1, 1), torch.ones(3))
            assert torch.allclose(y, x * scale.reshape(1, 3, 1, 1) + 1, atol=1e-5)

    def test_empty_batch(self, backend):
        with ops.use_backend(backend):
            x = torch.zeros(0, 3, 6, 5, requires_grad=True)
            weight = torch.randn(3, 1, 7, 7, requires_grad=True)
            y = ops.depthwise_conv2d(x, weight)
            assert tuple(y.shape) == (0, 3, 6, 5)
            y.sum().backward()
            assert (weight.grad == 0).all() and x.grad.shape == x.shape


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('op', sorted(OPS))
@pytest.mark.parametrize('which', [0, 1, 2])
def test_gradient_of_one_argument_alone(backend, op, which):
    case = make_case(op, 2, 3, 3, (7, 9), (3, 2))
    wanted = with_gradients(lambda *args: torch_result(op, *args), case)
    args = [a.clone() for a in case]
    args[which].requires_grad_()
    with ops.use_backend(backend):
        y = OPS[op](*args)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).sin()
    (grad,) = torch.autograd.grad(y, args[which], upstream)
    assert close(grad, wanted[1 + which], 1e-10)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('op', sorted(OPS))
def test_gradcheck(backend, op):
    x, weight, bias = make_case(op, 2, 2, 2, (4, 5), (2, 1))
    args = [a.requires_grad_() for a in (x, weight, bias)]
    with ops.use_backend(backend):
        assert torch.autograd.gradcheck(OPS[op], args)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('op', sorted(OPS))
def test_second_derivatives(backend, op):
    x, weight, _ = make_case(op, 1, 2, 2, (4, 5), (2, 1), bias=False)
    x.requires_grad_()
    weight.requires_grad_()

    def second_order(function):
        (grad,) = torch.autograd.grad(function(x, weight).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), (x, weight))

    wanted = second_order(lambda a, b: torch_result(op, a, b, None))
    with ops.use_backend(backend):
        got = second_order(OPS[op])
        assert torch.autograd.gradgradcheck(OPS[op], (x, weight))
        weight.requires_grad_(False)
        assert torch.autograd.gradgradcheck(lambda a: OPS[op](a, weight).pow(2), (x,))
    assert all(close(a, b, 1e-9) for a, b in zip(got, wanted))


@pytest.mark.parametrize('backend', [*BACKENDS, None])
@pytest.mark.parametrize('op', ['depthwise', 'dense'])
def test_memory_formats_2d(backend, op):
    x, weight, bias = make_case(op, 2, 4, 4, (9, 12), (6, 3))
    wanted = with_gradients(lambda *args: torch_result(op, *args), (x, weight, bias))
    layouts = [
        x.to(memory_format=torch.channels_last),
        torch.randn(2, 4, 12, 9, dtype=x.dtype).transpose(2, 3).copy_(x),
        torch.empty(4, 4, 18, 12, dtype=x.dtype)[::2, :, ::2].copy_(x),
        x[:1].expand(2, -1, -1, -1),
    ]
    for i, layout in enumerate(layouts):
        assert i == 3 or torch.equal(layout, x)
        with ops.use_backend(backend):
            x_leaf = layout.detach().requires_grad_()
            w_leaf = weight.flip(2).clone().flip(2).requires_grad_()
            y = OPS[op](x_leaf, w_leaf, bias)
            upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).sin()
            got = (y, *torch.autograd.grad(y, (x_leaf, w_leaf), upstream))
        if i == 3:
            assert close(y[0], wanted[0][0], 1e-10) and close(y[1], wanted[0][0], 1e-10)
        else:
            assert all(close(a, b, 1e-10) for a, b in zip(got, wanted))


@pytest.mark.parametrize('backend', [*BACKENDS, None])
@pytest.mark.parametrize('op', ['causal', 'causal depthwise', 'sequence', 'sequence depthwise'])
def test_memory_formats_1d(backend, op):
    x, weight, _ = make_case(op, 2, 4, 3, (50,), (50,))
    wanted = with_gradients(lambda *args: torch_result(op, *args, None), (x, weight))
    # channels_last of a map of one row, which the output has then too
    x = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    weight = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    with ops.use_backend(backend):
        y = OPS[op](x, weight)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).sin()
        got = (y, *torch.autograd.grad(y, (x, weight), upstream))
    assert all(close(a, b, 1e-10) for a, b in zip(got, wanted))
    if backend in ('fft', 'dft'):
        assert y.stride(1) == 1


def test_fast_format_on_a_cpu():
    maps, sequences = torch.randn(2, 3, 4, 5), torch.randn(2, 5, 3).transpose(1, 2)
    got = ops.to_fast_format(maps)
    assert torch.equal(got, maps) and got.is_contiguous(memory_format=torch.channels_last)
    got = ops.to_fast_format(sequences)
    assert torch.equal(got, sequences) and got.is_contiguous()


@pytest.mark.parametrize('backend', [*BACKENDS, None])
@pytest.mark.parametrize('op', sorted(OPS))
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(backend, op, dtype):
    case = make_case(op, 2, 3, 3, (12, 9), (5, 4), torch.float32)
    wanted = torch_result(op, *case)
    with ops.use_backend(backend), torch.autocast('cpu', dtype=dtype):
        y = OPS[op](*case)
    assert y.dtype == dtype == torch_autocast_dtype(op, case, dtype)
    assert relative_error(y, wanted) < 4 * FORWARD[dtype]


@pytest.mark.parametrize('op', sorted(OPS))
def test_autocast_leaves_float64_alone(op):
    """As it does with torch's own convolutions."""
    case = make_case(op, 2, 3, 3, (12, 9), (5, 4), torch.float64)
    wanted = torch_result(op, *case)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch_autocast_dtype(op, case, torch.bfloat16) == torch.float64
        assert relative_error(OPS[op](*case), wanted) < 1e-12
        with pytest.raises(TypeError, match='same dtype'):
            OPS[op](case[0], case[1].float())


@pytest.mark.parametrize('op', sorted(OPS))
@pytest.mark.parametrize('backend', ['direct', 'fft', 'dft'])
def test_compiled_gradients(backend, op):
    """In one graph, the gradients of the backends included."""
    args = make_case(op, 2, 3, 3, (8, 9), (5, 4), torch.float32, bias=False)[:2]

    def run(x, weight):
        return OPS[op](x, weight).square().sum()

    torch.compiler.reset()
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend='aot_eager')):
        own = [a.clone().requires_grad_() for a in args]
        with ops.use_backend(backend):
            function(*own).backward()
        results.append([a.grad for a in own])
    for eager, compiled in zip(*results):
        assert relative_error(compiled, eager) < 1e-5


def test_compiled_gradients_have_no_loop():
    """Over the images of a batch, which would be as many convolutions."""
    graphs = []

    def run(x, weight):
        return ops.depthwise_conv2d(x, weight).square().sum()

    def note(graph, inputs):
        graphs.append(sum('convolution' in str(node.target) for node in graph.graph.nodes))
        return graph

    args = [torch.randn(shape, requires_grad=True) for shape in ((16, 4, 14, 14), (4, 1, 13, 13))]
    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    with ops.use_backend('direct'):
        torch.compile(run, fullgraph=True, backend=backend)(*args).backward()
    assert graphs[0] == 1 and graphs[1] < 16


@torch.no_grad()
@pytest.mark.parametrize('size, module', [(33, dft), (3, None)])
def test_spectra_are_kept_within_autocast(size, module, monkeypatch):
    """Of the rounded kernel, beside those of the kernel itself."""
    layer, x = LargeConv2d(8, 8, size, bias=False).eval(), torch.randn(1, 8, 32, 32)
    wanted = layer(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        first = layer(x)
        if module is not None:  # the kernel is not transformed again, the input is
            calls, transform = [], module._transform
            monkeypatch.setattr(module, '_transform', lambda *args: calls.append(args) or transform(*args))
        assert torch.equal(layer(x), first) and relative_error(first, wanted) < 2e-2
        assert module is None or len(calls) == 1
        layer.weight.mul_(2)
        assert relative_error(layer(x), 2 * wanted) < 2e-2
    assert relative_error(layer(x), 2 * wanted) < 1e-5


def test_matrices_of_large_maps_are_not_kept():
    for side, kept in ((64, 3), (600, 1)):  # of the map, of the kernel and back, or of the kernel alone
        dft._made_once.cache_clear()
        dft.correlate(torch.randn(1, 1, side, side), torch.randn(1, 1, 3, 3), None, (1, 1), False)
        assert dft._made_once.cache_info().currsize == kept


def test_backward_pass_within_autocast():
    """Gradients are computed in float32, as those of a backward pass outside."""
    x, weight, _ = make_case('depthwise', 2, 6, 6, (12, 9), (5, 4), torch.float32)
    results = []
    for inside in (False, True):
        args = [a.clone().requires_grad_() for a in (x, weight)]
        y = ops.depthwise_conv2d(*args).square().sum()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=inside):
            y.backward()
        results.append([a.grad for a in args])
    for outside, inside in zip(*results):
        assert relative_error(inside, outside) < 1e-6


def torch_autocast_dtype(op, case, dtype):
    with torch.autocast('cpu', dtype=dtype):
        return torch_result(op, *case).dtype


class TestUseBackend:
    def test_names(self):
        assert {'reference', 'direct', 'fft', 'dft'} <= set(BACKENDS) and len(set(BACKENDS)) == len(BACKENDS)

    def test_forced_nested_restored(self, monkeypatch):
        """Seen from outside: outputs of `reference` are exact in float32 up to one rounding, others are called."""
        seen = []
        table = ops.functional._BACKENDS

        def spy(name, function):
            def correlate(*args, **kwargs):
                seen.append(name)
                return function(*args, **kwargs)

            return correlate

        for name in BACKENDS:
            monkeypatch.setitem(table, name, spy(name, table[name]))
        x, weight, _ = make_case('depthwise', 1, 2, 2, (5, 5), (1, 1))
        chosen = ops.choose_backend(x, weight, (1, 1), True)
        with ops.use_backend('fft'):
            ops.depthwise_conv2d(x, weight)
            with ops.use_backend('reference'):
                ops.depthwise_conv2d(x, weight)
                with ops.use_backend(None):
                    ops.depthwise_conv2d(x, weight)
            ops.depthwise_conv2d(x, weight)
            with pytest.raises(KeyError), ops.use_backend('direct'):
                raise KeyError
            ops.depthwise_conv2d(x, weight)
        ops.depthwise_conv2d(x, weight)
        assert seen == ['fft', 'reference', chosen, 'fft', 'fft', chosen]

    def test_unknown_name(self):
        with pytest.raises(ValueError) as e, ops.use_backend('cudnn'):
            pass
        assert 'cudnn' in str(e.value) and all(name in str(e.value) for name in BACKENDS)

    @pytest.mark.parametrize('depthwise', [False, True])
    @pytest.mark.parametrize('taps', [1, 5, 13, 51])
    @pytest.mark.parametrize('grad', [False, True])
    def test_chooser_names_a_backend(self, depthwise, taps, grad):
        x = torch.zeros(1, 4, 8, 8, requires_grad=grad)
        weight = torch.zeros(4, 1 if depthwise else 4, taps, taps)
        assert ops.choose_backend(x, weight, (taps // 2, taps // 2), depthwise) in BACKENDS
        assert ops.choose_backend(x, weight, (taps // 2, taps // 2), depthwise, device='mps') == 'direct'


# docs/backends.md: channels in, out (0: depthwise), map, taps, then the choice for inference and training at batch 8
# (and larger), then at batch 1
RULE = [
    (96, 0, (56, 56), (31, 31), 'fft', 'fft', 'fft', 'fft'),
    (64, 0, (56, 56), (51, 51), 'fft', 'fft', 'fft', 'fft'),
    (192, 0, (28, 28), (29, 29), 'direct', 'fft', 'direct', 'direct'),
    (384, 0, (14, 14), (27, 27), 'direct', 'direct', 'direct', 'direct'),
    (768, 0, (7, 7), (13, 13), 'direct', 'direct', 'direct', 'direct'),
    (96, 0, (56, 56), (5, 5), 'direct', 'direct', 'direct', 'direct'),
    (3, 24, (32, 32), (33, 33), 'dft', 'dft', 'dft', 'dft'),
    (24, 24, (32, 32), (33, 33), 'dft', 'dft', 'dft', 'dft'),
    (48, 48, (32, 32), (33, 33), 'dft', 'dft', 'dft', 'dft'),
    (36, 36, (32, 32), (5, 5), 'dft', 'dft', 'direct', 'direct'),
    (24, 24, (32, 32), (3, 3), 'direct', 'direct', 'direct', 'direct'),
    (48, 48, (32, 32), (3, 3), 'direct', 'direct', 'direct', 'direct'),
    (36, 36, (224, 224), (33, 33), 'fft', 'fft', 'dft', 'dft'),
    (30, 30, (784,), (784,), 'fft', 'fft', 'fft', 'fft'),
    (30, 30, (1024,), (1024,), 'fft', 'fft', 'fft', 'fft'),
    (30, 30, (16000,), (16000,), 'fft', 'fft', 'fft', 'fft'),
    (30, 30, (16000,), (60,), 'fft', 'fft', 'fft', 'fft'),
    (30, 30, (1024,), (64,), 'fft', 'fft', 'fft', 'fft'),
    (30, 30, (161,), (161,), 'fft', 'fft', 'direct', 'direct'),
    (30, 30, (182,), (182,), 'fft', 'fft', 'direct', 'direct'),
    (30, 30, (784,), (5,), 'direct', 'direct', 'direct', 'direct'),
    (256, 0, (1000,), (31,), 'direct', 'direct', 'direct', 'direct'),
    (256, 0, (1000,), (501,), 'fft', 'fft', 'fft', 'fft'),
    (256, 0, (1000,), (101,), 'direct', 'fft', 'direct', 'direct'),
    (64, 0, (16000,), (16000,), 'fft', 'fft', 'fft', 'fft'),
]


@pytest.mark.parametrize('in_chs, out_chs, size, taps, infer, train, infer_one, train_one', RULE)
def test_documented_rule(in_chs, out_chs, size, taps, infer, train, infer_one, train_one):
    left = tuple(k // 2 for k in taps) if len(taps) == 2 else (taps[0] - 1,)
    weight = torch.empty(out_chs or in_chs, in_chs if out_chs else 1, *taps, device='meta')
    for batch, expected in ((8, (infer, train)), (64, (infer, train)), (1, (infer_one, train_one))):
        for grad, name in zip((False, True), expected):
            x = torch.empty(batch, in_chs, *size, device='meta', requires_grad=grad)
            assert ops.choose_backend(x, weight, left, not out_chs) == name
            if not out_chs and taps in ((31, 31), (51, 51), (29, 29)) and batch > 1:
                last = x.detach().to(memory_format=torch.channels_last).requires_grad_(grad)
                reordered = 'direct' if taps == (29, 29) else 'fft'
                assert ops.choose_backend(last, weight, left, True) == reordered


@pytest.mark.parametrize('taps, batch, grad', [(5, 8, False), (5, 64, False), (9, 1, True)])
def test_rule_for_maps_in_bfloat16(taps, batch, grad, monkeypatch):
    """Direct is half as dear where the processor multiplies bfloat16; the frequency domain computes in float32."""
    weight = torch.empty(36, 36, taps, taps, device='meta')
    x = torch.empty(batch, 36, 32, 32, device='meta', requires_grad=grad)
    for able in (False, True):
        monkeypatch.setattr(direct, 'MULTIPLIES_BFLOAT16', able)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            expected = 'direct' if able and dtype == torch.bfloat16 else 'dft'
            assert ops.choose_backend(x.to(dtype), weight.to(dtype), (taps // 2,) * 2, False) == expected


# docs/backends.md: channels in, out, map or steps, taps, batch, dtype, then the choice for inference and training
GPU_RULE = [
    (36, 36, (32, 32), (33, 33), 512, torch.bfloat16, 'dft', 'dft'),
    (36, 36, (32, 32), (33, 33), 64, torch.float32, 'dft', 'dft'),
    (36, 36, (32, 32), (33, 33), 1, torch.float32, 'dft', 'dft'),
    (24, 24, (32, 32), (33, 33), 10, torch.float32, 'dft', 'direct'),
    (24, 24, (32, 32), (33, 33), 11, torch.float32, 'dft', 'dft'),
    (24, 36, (32, 32), (33, 33), 20, torch.bfloat16, 'dft', 'direct'),
    (24, 36, (32, 32), (33, 33), 21, torch.bfloat16, 'dft', 'dft'),
    (3, 36, (32, 32), (33, 33), 64, torch.bfloat16, 'dft', 'dft'),
    (36, 36, (32, 32), (3, 3), 512, torch.bfloat16, 'direct', 'direct'),
    (36, 36, (32, 32), (9, 9), 512, torch.float32, 'dft', 'dft'),
    (36, 36, (32, 32), (9, 9), 70, torch.float32, 'direct', 'direct'),
    (36, 36, (32, 32), (9, 9), 71, torch.float32, 'direct', 'dft'),
    (36, 36, (32, 32), (9, 9), 81, torch.float32, 'dft', 'dft'),
    (64, 64, (56, 56), (31, 31), 512, torch.bfloat16, 'dft', 'dft'),
    (64, 64, (56, 56), (7, 7), 512, torch.bfloat16, 'direct', 'direct'),
    (128, 128, (28, 28), (13, 13), 64, torch.bfloat16, 'dft', 'dft'),
    (30, 30, (784,), (784,), 1, torch.float32, 'fft', 'direct'),
    (30, 30, (784,), (784,), 10, torch.float32, 'fft', 'fft'),
    (30, 30, (784,), (784,), 18, torch.bfloat16, 'direct', 'direct'),
    (30, 30, (784,), (784,), 19, torch.bfloat16, 'direct', 'fft'),
    (30, 30, (784,), (784,), 21, torch.bfloat16, 'fft', 'fft'),
    (30, 30, (4000,), (4000,), 1, torch.bfloat16, 'fft', 'fft'),
    (30, 30, (16000,), (16000,), 8, torch.bfloat16, 'fft', 'fft'),
    (30, 30, (161,), (161,), 64, torch.bfloat16, 'direct', 'direct'),
    (30, 30, (16000,), (60,), 8, torch.float32, 'fft', 'fft'),
    (30, 30, (16000,), (60,), 7, torch.float32, 'direct', 'fft'),
    (30, 30, (16000,), (60,), 5, torch.float32, 'direct', 'direct'),
    (30, 30, (784,), (5,), 512, torch.float32, 'direct', 'direct'),
]


@pytest.mark.parametrize('in_chs, out_chs, size, taps, batch, dtype, infer, train', GPU_RULE)
def test_documented_rule_on_a_gpu(in_chs, out_chs, size, taps, batch, dtype, infer, train):
    left = tuple(k // 2 for k in taps) if len(taps) == 2 else (taps[0] - 1,)
    weight = torch.empty(out_chs, in_chs, *taps, device='meta', dtype=dtype)
    for grad, name in zip((False, True), (infer, train)):
        x = torch.empty(batch, in_chs, *size, device='meta', dtype=dtype, requires_grad=grad)
        assert ops.choose_backend(x, weight, left, False, device='cuda') == name


@pytest.mark.parametrize('taps, name', [(31, 'direct'), (4001, 'fft')])
def test_rule_for_depthwise_sequences_on_a_gpu(taps, name):
    """No kernel that is compiled for the length of a sequence."""
    weight = torch.empty(64, 1, taps, device='meta', dtype=torch.bfloat16)
    x = torch.empty(64, 64, 4001, device='meta', dtype=torch.bfloat16)
    assert ops.choose_backend(x, weight, (taps - 1,), True, device='cuda') == name


@pytest.mark.parametrize('backend', OTHERS)
@pytest.mark.parametrize(
    'op, x, weight',
    [
        ('depthwise', (2, 4, 30, 8), (4, 1, 21, 1)),
        ('depthwise', (2, 4, 30, 1), (4, 1, 21, 5)),
        ('depthwise', (2, 4, 8, 8), (4, 1, 1, 1)),
        ('dense', (2, 4, 30, 8), (4, 4, 21, 1)),
        ('dense', (2, 4, 30, 8), (4, 4, 1, 21)),
        ('causal', (2, 4, 30), (4, 4, 1)),
        ('causal', (2, 4, 30), (4, 4, 7)),
    ],
)
def test_outputs_can_be_changed_in_place(backend, op, x, weight):
    """As those of torch, with what an activation in place does in training."""
    results = []
    for place in (True, False):
        torch.manual_seed(0)
        a, w = (torch.randn(shape, requires_grad=True) for shape in (x, weight))
        with ops.use_backend(backend):
            y = OPS[op](a, w)
        y = torch.relu_(y) if place else torch.relu(y)
        y.square().sum().backward()
        results.append((y.detach(), a.grad, w.grad))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('machine, cases, good', [('h100', 330, 313), ('epyc', 562, 520)])
def test_rule_by_times(machine, cases, good):
    """The choices against what was measured: docs/backends.md says how many are near the fastest."""
    folder = Path(__file__).resolve().parents[1] / 'benchmarks'
    rule = runpy.run_path(str(folder / 'rule.py'))
    choices = rule['choices'](*rule['read'](folder / f'rule_{machine}.csv')).values()
    assert len(choices) == cases
    assert sum(ratio <= 1.3 for _, ratio in choices) == good


# docs/backends.md: batch, steps, taps, then the parts in which 30 channels are transformed
PARTS = [
    (64, 784, 288, 1),
    (8, 784, 288, 2),
    (1, 784, 784, 4),
    (16, 16000, 5500, 1),
    (8, 16000, 5500, 2),
    (8, 16000, 16000, 1),
    (1, 16000, 16000, 4),
]


@pytest.mark.parametrize('batch, length, taps, parts', PARTS)
def test_documented_parts(batch, length, taps, parts):
    count, points = fft.plan_parts(batch, 30, 30, length, taps)
    assert count == parts
    assert points == fft.fast_len(math.ceil(length / parts) + taps - 1)


@given(
    parts=st.integers(1, 16),
    length=st.integers(1, 60),
    taps=st.integers(1, 70),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    batch=st.integers(1, 3),
    data=st.data(),
)
def test_any_number_of_parts(parts, length, taps, channels, batch, data):
    """More parts than steps, parts shorter than the kernel: always the same sums and gradients."""
    left = (data.draw(st.integers(0, taps - 1)),)
    x, weight, _ = make_case('causal', batch, *channels, (length,), (taps,), bias=False)
    wanted = with_gradients(lambda x, weight: reference.correlate(x, weight, None, left, False), (x, weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fft, 'plan_parts', lambda *args: (parts, 0))
        got = with_gradients(lambda x, weight: fft.correlate(x, weight, None, left, False), (x, weight))
    assert all(close(a, b, 1e-11) for a, b in zip(got, wanted))


@pytest.mark.parametrize('at_hand', [1, 400, 1500])
@given(**{**shapes, 'op': st.sampled_from([op for op in sorted(OPS) if op.endswith('depthwise')]), 'batch': st.just(2)})
def test_channels_in_groups(at_hand, op, batch, in_chs, out_chs, spatial, taps, bias, seed):
    """Of any size, one channel if need be: the same sums and gradients, with a kernel that is transformed once."""
    case = make_case(op, batch, 4 * in_chs, out_chs, spatial, fix(op, taps), seed=seed, bias=bias)
    wanted = with_gradients(lambda *args: torch_result(op, *args), case)
    cache = KernelCache()
    with pytest.MonkeyPatch.context() as patch, ops.use_backend('fft'):
        patch.setattr(fft, '_AT_HAND', at_hand)
        got = with_gradients(OPS[op], case)
        with torch.no_grad():
            kept = [OPS[op](*case, keep=cache.keep(case[1])) for _ in range(2)]
    assert all(close(a, b, 1e-11) for a, b in zip((*got, *kept), (*wanted, wanted[0], wanted[0])))


@pytest.mark.skipif(not dft._ONEDNN, reason='a build of torch without MKL or without oneDNN')
@pytest.mark.parametrize('transposed', [False, True])
@given(sizes=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(0, 300)), seed=st.integers(0, 999))
def test_products_by_onednn(transposed, sizes, seed):
    """Against float64, with first and second derivatives, matrices in either order in memory."""
    (rows, inner, columns), generator = sizes, torch.Generator().manual_seed(seed)
    matrix, x = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    if transposed:
        matrix, x = matrix.t().contiguous().t(), x.t().contiguous().t()
    results = []
    for multiply, dtype in ((dft._multiply, torch.float32), (torch.matmul, torch.float64)):
        signal = x.to(dtype).requires_grad_()
        y = multiply(matrix.to(dtype), signal)
        (grad,) = torch.autograd.grad(y.sin().sum(), signal, create_graph=True)
        (second,) = torch.autograd.grad(grad.sin().sum(), signal)
        results.append((y, multiply(matrix.to(dtype), signal.detach()), grad, second))
    ours, wanted = results
    assert all(close(a, b, FORWARD[torch.float32]) for a, b in zip(ours[:2], wanted[:2]))
    assert all(close(a, b, BACKWARD[torch.float32]) for a, b in zip(ours[2:], wanted[2:]))


@pytest.mark.filterwarnings('ignore:TF32')  # of torch, by its own flags
def test_onednn_multiplies_where_it_is_there(monkeypatch):
    seen, linear = [], dft._linear
    monkeypatch.setattr(dft, '_linear', lambda *args: seen.append(args) or linear(*args))
    x, weight, _ = make_case('dense', 2, 3, 4, (9, 8), (4, 4), torch.float32, bias=False)
    with ops.use_backend('dft'):
        with_gradients(ops.conv2d, (x, weight))
        assert len(seen) == (6 if dft._ONEDNN else 0)  # of the input, the kernel and the output, and their gradients
        ops.conv2d(x.double(), weight.double())
        ops.conv2d(x[:0], weight)
        with torch.backends.mkldnn.flags(enabled=False):
            ops.conv2d(x, weight)
        assert len(seen) == (6 if dft._ONEDNN else 0)


@given(n=st.integers(1, 12), k=st.integers(1, 30), data=st.data())
def test_count_of_taps_on_the_map(n, k, data):
    left = data.draw(st.integers(0, k - 1))
    expected = sum(0 <= t + j - left < n for t in range(n) for j in range(k))
    assert ops.chooser._taps_on_map(n, k, left) == expected


@pytest.mark.parametrize(
    'op, x, weight, bias, words',
    [
        ('depthwise', (1, 3, 8), (3, 1, 3, 3), None, ('(1, 3, 8)', '(3, 1, 3, 3)')),
        ('depthwise', (3, 8), (3, 1, 3, 3), None, ('4D', '3D', '(3, 8)')),
        ('depthwise', (1, 3, 8, 8), (3, 1, 3), None, ('4D', '(3, 1, 3)')),
        ('depthwise', (1, 3, 8, 8), (4, 1, 3, 3), None, ('(4, 1, 3, 3)', '3 channels')),
        ('depthwise', (1, 3, 8, 8), (3, 3, 3, 3), None, ('(3, 3, 3, 3)', '(3, 1, kh, kw)')),
        ('depthwise', (1, 3, 8, 8), (3, 1, 4, 3), None, ('odd', '(4, 3)')),
        ('depthwise', (1, 3, 8, 8), (3, 1, 3, 2), None, ('odd', '(3, 2)')),
        ('depthwise', (1, 3, 8, 8), (3, 1, 3, 3), (4,), ('bias', '(3,)', '(4,)')),
        ('dense', (1, 3, 8, 8), (5, 4, 3, 3), None, ('4', '(1, 3, 8, 8)')),
        ('dense', (1, 3, 8, 8), (5, 3, 6, 6), None, ('odd', '(6, 6)')),
        ('dense', (1, 3, 8, 8), (5, 3, 3, 3), (3,), ('bias', '(5,)', '(3,)')),
        ('causal', (1, 3, 8, 8), (5, 3, 4), None, ('3D', '(1, 3, 8, 8)')),
        ('causal', (1, 3, 8), (5, 2, 4), None, ('2', '(1, 3, 8)')),
        ('causal', (1, 3, 8), (5, 3, 4), (1,), ('bias', '(5,)', '(1,)')),
        ('causal', (1, 3, 0), (5, 3, 4), None, ('one step', '(1, 3, 0)')),
        ('causal', (1, 3, 8), (5, 3, 0), None, ('one tap', '(5, 3, 0)')),
        ('causal depthwise', (1, 3, 8), (3, 1, 0), None, ('one tap', '(3, 1, 0)')),
        ('causal depthwise', (1, 3, 8), (3, 3, 4), None, ('depthwise_causal_conv1d', '(3, 1, K)', '(3, 3, 4)')),
        ('sequence', (1, 3, 8), (5, 3, 4), None, ('conv1d expects an odd', '(4,)')),
        ('sequence depthwise', (1, 3, 8), (3, 1, 4), None, ('depthwise_conv1d expects an odd', '(4,)')),
        ('sequence depthwise', (1, 3, 0), (3, 1, 5), None, ('one step', '(1, 3, 0)')),
        ('dense', (1, 3, 0, 8), (5, 3, 3, 3), None, ('one step or pixel', '(1, 3, 0, 8)')),
        ('depthwise', (1, 3, 8, 0), (3, 1, 3, 3), None, ('one step or pixel', '(1, 3, 8, 0)')),
    ],
)
def test_shapes_that_do_not_fit(op, x, weight, bias, words):
    with pytest.raises(ValueError) as e:
        OPS[op](torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias))
    assert all(word in str(e.value) for word in words), e.value


class _CallsOps(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise = nn.Parameter(torch.randn(3, 1, 5, 7))
        self.dense = nn.Parameter(torch.randn(3, 3, 3, 3))
        self.causal = nn.Parameter(torch.randn(2, 3, 20))
        self.long = nn.Parameter(torch.randn(2, 1, 9))
        self.sequence = nn.Parameter(torch.randn(2, 2, 9))
        self.bias = nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = ops.conv2d(ops.depthwise_conv2d(x, self.depthwise), self.dense)
        x = ops.causal_conv1d(x.flatten(2), self.causal, self.bias)
        x = ops.depthwise_conv1d(ops.depthwise_causal_conv1d(x, self.long), self.long, self.bias)
        return ops.conv1d(x, self.sequence)


def test_script():
    module = _CallsOps()
    x = torch.randn(2, 3, 6, 9)
    assert relative_error(torch.jit.script(module)(x), module(x)) < 1e-5


def test_trace():
    x, weight = torch.randn(2, 4, 50), torch.randn(4, 1, 31)
    for op, kernel in ((ops.conv1d, weight.expand(-1, 4, -1)), (ops.depthwise_conv1d, weight)):
        traced = torch.jit.trace(lambda x, op=op, kernel=kernel: op(x, kernel), x, check_trace=False)
        torch.testing.assert_close(traced(x), op(x, kernel), rtol=1e-4, atol=1e-4)


def test_compile_for_any_size():
    """Sizes as symbols, to which torch.compile turns when it has seen several: two products of `dft` in a row."""
    x, *weights = (torch.randn(shape, requires_grad=True) for shape in ((4, 3, 12, 12), (4, 3, 9, 9), (4, 4, 9, 9)))

    def run(x, first, second):
        return ops.conv2d(ops.conv2d(x, first), second).relu().sum()

    with ops.use_backend('dft'):
        compiled = torch.compile(run, backend='aot_eager', dynamic=True)
        got, wanted = (torch.autograd.grad(f(x, *weights), (x, *weights)) for f in (compiled, run))
    assert all(relative_error(a, b) < BACKWARD[torch.float32] for a, b in zip(got, wanted))


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='torch 2.6 compiles the choice')
@pytest.mark.parametrize('layout', ['contiguous', 'last', 'sliced', 'expanded'])
@pytest.mark.parametrize('op', sorted(OPS))
@torch.no_grad()
def test_compiled_inference(op, layout):
    """By an operator whose result has the strides that the compiler has been told."""
    x, weight, bias = make_case(op, 2, 3, 3, (12, 9), (5, 4), torch.float32)
    if layout == 'last':
        x = to_channels_last(x, x.dtype)
    elif layout == 'sliced':
        x = torch.cat([x, x], -1)[..., : x.shape[-1]]
    elif layout == 'expanded':
        x = x[:1].expand(2, *x.shape[1:])
    torch.compiler.reset()
    compiled = torch.compile(OPS[op], fullgraph=True, backend='aot_eager')
    assert relative_error(compiled(x, weight, bias), torch_result(op, x, weight, bias)) < FORWARD[torch.float32]
    for dilation in [[1]] if is_1d(op) else [[1, 1], [2, 3]]:
        arguments = (x, weight, bias, dilation, op.endswith('depthwise'), op.startswith('causal'), layout == 'last')
        torch.library.opcheck(torch.ops.timm_smpconv.correlate.default, arguments)


@pytest.mark.parametrize('backend', OTHERS)
def test_compile_of_the_ops(backend):
    module = _CallsOps()
    x = torch.randn(2, 3, 6, 9)
    with ops.use_backend(backend):
        wanted = module(x)
        got = torch.compile(module, backend='eager', fullgraph=True)(x)
    assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize('size', [7, 31])  # direct and in the frequency domain
def test_dtypes_that_cannot_be_convolved(size):
    x, weight = torch.zeros(1, 3, 56, 56), torch.zeros(3, 1, size, size)
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(TypeError, match=str(dtype)):
            ops.depthwise_conv2d(x.to(dtype), weight)
        with pytest.raises(TypeError, match=str(dtype)):
            ops.depthwise_conv2d(x, weight.to(dtype))
    with pytest.raises(TypeError, match='torch.float32 and torch.bfloat16'):
        ops.depthwise_conv2d(x, weight.bfloat16())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert ops.depthwise_conv2d(x, weight.bfloat16()).dtype == torch.bfloat16
