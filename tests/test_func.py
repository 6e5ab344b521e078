"""The transforms of torch.func: per-sample gradients, ensembles and second derivatives, of operations and networks."""

import copy

import pytest
import torch
import torch.utils._pytree
from conftest import build, make_input
from synth import relative_error
from test_ops import BACKENDS, OPS, make_case, torch_result
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap

from timm_smpconv import ops
from timm_smpconv.layers import SMPConv1d, SMPConv2d

FAMILIES = ['smpconv_mobile31', 'smpconv_cifar', 'smpconv_seq_mnist']


@pytest.mark.parametrize('batched', [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize('op', sorted(OPS))
@pytest.mark.parametrize('backend', [*BACKENDS, None])
def test_vmap(backend, op, batched):
    """Over inputs, over kernels and over both, with gradients: what a loop computes."""
    cases = [make_case(op, 2, 3, 3, (6, 5), (3, 2), dtype=torch.float32, seed=seed, bias=False)[:2] for seed in (0, 1)]
    args = [torch.stack(values) if many else values[0] for values, many in zip(zip(*cases), batched)]

    def value(x, weight):
        return OPS[op](x, weight).pow(3).sum()

    dims = tuple(0 if many else None for many in batched)
    with ops.use_backend(backend):
        got = vmap(grad(value, (0, 1)), dims)(*args)
    for i in range(2):
        x, weight = (a[i] if many else a for a, many in zip(args, batched))
        wanted = grad(lambda x, weight: torch_result(op, x, weight, None).pow(3).sum(), (0, 1))(x, weight)
        for a, b in zip(got, wanted):
            assert relative_error(a[i], b) <= 1e-5


def _forward_mode(function):
    def directional(x, weight):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.sum() * x), weight)).tangent

    return directional


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='torch 2.6 compiles fewer of them')
@pytest.mark.parametrize('op', sorted(OPS))
def test_compiled_transforms(op):
    """torch.compile leaves the operation whole elsewhere, through which no transform could see."""
    x, weight, _ = make_case(op, 2, 3, 3, (6, 5), (3, 2), dtype=torch.float32, bias=False)
    for transform in (
        lambda x, weight: jvp(OPS[op], (x, weight), (weight.sum() * x, x.sum() * weight)),
        lambda x, weight: grad(lambda x: OPS[op](x, weight).pow(3).sum())(x),
        lambda x, weight: vmap(OPS[op], (0, None))(torch.stack([x, 2 * x]), weight),
        _forward_mode(OPS[op]),
    ):
        wanted = transform(x, weight)
        torch.compiler.reset()
        got = torch.compile(transform, fullgraph=True, backend='aot_eager')(x, weight)
        for a, b in zip(got, wanted):
            assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize('op', sorted(OPS))
@pytest.mark.parametrize('backend', BACKENDS)
def test_hessian(backend, op):
    x, weight, _ = make_case(op, 1, 2, 2, (3, 2), (2, 1), bias=False)

    def value(function):
        return lambda weight: function(x, weight).pow(3).sum()

    wanted = hessian(value(lambda x, weight: torch_result(op, x, weight, None)))(weight)
    with ops.use_backend(backend):
        assert relative_error(hessian(value(OPS[op]))(weight), wanted) <= 1e-10


@pytest.mark.parametrize('layer, shape', [('2d', (2, 4, 9, 9)), ('1d', (2, 4, 80))])
def test_layers_in_train_mode(layer, shape):
    """Where radii are projected, but for those that cannot be changed."""
    layer = SMPConv2d(4, 4, 5, groups=4) if layer == '2d' else SMPConv1d(4, 4, 80)
    x = torch.randn(shape)
    wanted = torch.autograd.grad(layer(x.requires_grad_()).pow(2).sum(), x)[0]
    assert relative_error(grad(lambda x: layer(x).pow(2).sum())(x), wanted) <= 1e-5
    layers = [copy.deepcopy(layer), layer]
    got = vmap(lambda params, x: functional_call(layer, params, (x,)), (0, None))(stack_module_state(layers)[0], x)
    assert relative_error(got[0], layer(x)) <= 1e-5 and relative_error(got[1], layer(x)) <= 1e-5


def parts(model):
    return {key: value.detach() for key, value in model.named_parameters()}, dict(model.named_buffers())


def test_per_sample_gradients(name, model):
    model, x = model.double(), make_input(name).double()
    params, buffers = parts(model)

    def loss(params, x):
        return functional_call(model, (params, buffers), (x[None],)).square().sum()

    got = vmap(grad(loss), (None, 0))(params, x)
    for i in range(len(x)):
        wanted = torch.autograd.grad(model(x[i : i + 1]).square().sum(), list(model.parameters()), allow_unused=True)
        for (key, value), b in zip(got.items(), wanted):
            b = torch.zeros_like(value[i]) if b is None else b
            assert (value[i] - b).abs().max() <= 1e-8 * max(b.abs().max().item(), 1e-6), key


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('gradients', [False, True])
def test_ensemble(name, gradients):
    """Networks as one: parameters are batched, whose values cannot be read."""
    models = [build(name).eval() for _ in range(2)]
    x, base = make_input(name), copy.deepcopy(models[0])
    params, buffers = stack_module_state(models)
    with torch.set_grad_enabled(gradients):
        got = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(params, buffers)
        assert relative_error(got, torch.stack([model(x) for model in models])) <= 1e-4


@pytest.mark.parametrize('which', ['x', 'weight', 'both'])
@pytest.mark.parametrize('op', sorted(OPS))
@pytest.mark.parametrize('backend', [*BACKENDS, None])
def test_forward_mode(backend, op, which):
    """torch.autograd.forward_ad: the tangents of torch's own convolution, whatever else has gradients."""
    args = make_case(op, 2, 3, 3, (20, 18), (9, 7), dtype=torch.float32, bias=False)[:2]
    tangents = [torch.randn_like(a) if which in (name, 'both') else None for name, a in zip(('x', 'weight'), args)]
    for requires_grad in (False, True):
        results = []
        for function in (OPS[op], lambda x, weight: torch_result(op, x, weight, None)):
            with forward_ad.dual_level(), ops.use_backend(backend):
                duals = [a.clone().requires_grad_(requires_grad) for a in args]
                duals = [a if t is None else forward_ad.make_dual(a, t) for a, t in zip(duals, tangents)]
                results.append(forward_ad.unpack_dual(function(*duals)).tangent)
        assert relative_error(*results) <= 1e-5


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_forward_mode_of_networks(name):
    """Without gradients of the usual kind, where results are kept from one call to the next."""
    model, x = build(name).eval(), make_input(name)
    model(x)
    params, buffers = parts(model)
    for of_input in (True, False):
        primal = (x,) if of_input else ({'head.fc.weight': params['head.fc.weight']} | _kernels(params),)

        def run(primal, of_input=of_input):
            given = (params, primal) if of_input else ({**params, **primal}, x)
            return functional_call(model, (given[0], buffers), (given[1],))

        direction = torch.utils._pytree.tree_map(torch.randn_like, primal)
        _, wanted = jvp(run, primal, direction)
        with forward_ad.dual_level():
            duals = torch.utils._pytree.tree_map(forward_ad.make_dual, primal, direction)
            assert relative_error(forward_ad.unpack_dual(run(*duals)).tangent, wanted) <= 1e-4


def _kernels(params):
    return {key: value for key, value in params.items() if key.endswith(('kernel.weights', 'kernel.coords'))}


@pytest.mark.parametrize('name', FAMILIES)
def test_directional_derivative(name):
    """Forward mode against a backward pass: u (J v) = (u J) v."""
    model, x = build(name).eval().double(), make_input(name).double().requires_grad_()
    params, buffers = parts(model)
    v, u = torch.randn_like(x), torch.randn(len(x), model.num_classes, dtype=x.dtype)
    _, tangent = jvp(lambda x: functional_call(model, (params, buffers), (x,)), (x.detach(),), (v,))
    (gradient,) = torch.autograd.grad(model(x), x, u)
    assert relative_error((u * tangent).sum(), (gradient * v).sum()) <= 1e-9
