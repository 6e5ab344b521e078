"""Peripheral convolution and PeLK against the definitions of the paper and timm's ConvNeXt."""

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from synth import relative_error
from timm.models.convnext import ConvNeXt

from timm_smpconv.layers import LargeConv2d, PeripheralConv2d, PeripheralKernel, sharing_grid

# parameters that the paper reports, in millions
PARAMS = {'pelk_tiny': 29, 'pelk_small': 50, 'pelk_base': 89, 'pelk_base_101': 90}
SMALL = dict(depths=(1, 2, 1, 1), dims=(16, 24, 32, 40), kernel_sizes=(13, 9, 7, 5))


def by_definition(kernel):
    """Eq. 1, tap by tap: every position of the cell Z(a, b) takes the parameter w(a, b)."""
    bounds = [sum(kernel.grid[:i]) for i in range(len(kernel.grid) + 1)]
    size = bounds[-1]
    dense = torch.zeros(*kernel.weights.shape[:2], size, size, dtype=kernel.weights.dtype)
    for a in range(len(kernel.grid)):
        for b in range(len(kernel.grid)):
            for x in range(bounds[a], bounds[a + 1]):
                for y in range(bounds[b], bounds[b + 1]):
                    dense[:, :, x, y] = kernel.weights[:, :, a, b]
    if kernel.small is not None:
        first, taps = (size - kernel.small.shape[2]) // 2, kernel.small.shape[2]
        dense[:, :, first : first + taps, first : first + taps] += kernel.small
    return dense


# --- grids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'kernel_size, center_size, half',
    [
        (31, 5, [7, 4, 2, 1, 1, 1]),
        (33, 5, [8, 4, 2, 1, 1, 1]),
        (51, 1, [11, 8, 4, 2, 1]),
        (51, 3, [10, 8, 4, 2, 1, 1]),
        (51, 5, [9, 8, 4, 2, 1, 1, 1]),
        (51, 7, [8, 8, 4, 2, 1, 1, 1, 1]),
    ],
)
def test_grids_of_the_paper(kernel_size, center_size, half):
    """Figure 1, Tables 5 and 6: half of each grid, from the border to the centre."""
    grid = sharing_grid(kernel_size, center_size)
    assert grid == half + half[-2::-1]


@pytest.mark.parametrize(
    'half, share',
    [
        ([1] * 17, 1.00),
        ([2, 2, 2, 2, 2, 2, 2, 2, 1], 0.27),
        ([2, 2, 2, 2, 2, 2, 2, 1, 1, 1], 0.33),
        ([4, 4, 4, 2, 1, 1, 1], 0.16),
        ([8, 4, 2, 1, 1, 1], 0.11),
        ([1, 1, 2, 4, 8, 1], 0.11),
    ],
)
def test_parameters_of_other_grids(half, share):
    """Table 5: parameters relative to a dense kernel of 33 x 33."""
    kernel = PeripheralKernel(1, 3, 33, grid=half + half[-2::-1], small_kernel_size=0)
    assert round(kernel.weights[0].numel() / 33**2, 2) == share
    assert tuple(kernel().shape) == (3, 1, 33, 33)
    assert torch.equal(kernel(), by_definition(kernel))


@given(
    kernel_size=st.integers(0, 80).map(lambda n: 2 * n + 1),
    center_size=st.integers(0, 6).map(lambda n: 2 * n + 1),
    base=st.integers(1, 4),
)
def test_any_grid(kernel_size, center_size, base):
    grid = sharing_grid(kernel_size, center_size, base)
    side = (len(grid) - min(center_size, kernel_size)) // 2
    assert sum(grid) == kernel_size and grid == grid[::-1] and min(grid) >= 1
    assert all(width == 1 for width in grid[side : len(grid) - side])
    growing = grid[:side][::-1]  # from the centre to the border
    assert growing[:-1] == [base ** (i + 1) for i in range(side - 1)]
    assert not growing or growing[-1] <= base**side


def test_parameters_grow_like_a_logarithm():
    cells = [len(sharing_grid(size)) for size in (7, 13, 25, 49, 97, 193)]
    assert all(b - a == 2 for a, b in zip(cells, cells[1:]))


# --- kernels and convolutions -------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    size=st.integers(0, 12).map(lambda n: 2 * n + 1),
    center=st.sampled_from([1, 3, 5]),
    small=st.sampled_from([0, 1, 3, 5]),
    depthwise=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernel_and_gradient(size, center, small, depthwise, seed):
    torch.manual_seed(seed)
    chans = 1 if depthwise else 2
    kernel = PeripheralKernel(chans, 3, size, center_size=center, small_kernel_size=small, dtype=torch.float64)
    dense, wanted = kernel(), by_definition(kernel)
    assert torch.equal(dense, wanted)
    weight = torch.randn_like(dense)
    parameters = list(kernel.parameters())
    for got, want in zip(
        torch.autograd.grad((dense * weight).sum(), parameters),
        torch.autograd.grad((wanted * weight).sum(), parameters),
    ):
        assert relative_error(got, want) < 1e-12


@settings(max_examples=25)
@given(
    size=st.integers(1, 9).map(lambda n: 2 * n + 1),
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    depthwise=st.booleans(),
    embedded=st.booleans(),
    bias=st.booleans(),
)
def test_convolution_is_equation_3(size, height, width, depthwise, embedded, bias):
    torch.manual_seed(size)
    groups = 4 if depthwise else 1
    conv = PeripheralConv2d(
        4, 4, size, groups=groups, bias=bias, center_size=3, small_kernel_size=3, dtype=torch.float64
    )
    if bias:
        torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, 4, height, width, dtype=torch.float64)
    embedding = torch.randn(4, size, size, dtype=torch.float64) if embedded else None
    # the sum over all taps of w (x + h), where x is zero outside the map
    windows = F.pad(x, [size // 2] * 4).unfold(2, size, 1).unfold(3, size, 1)
    if embedding is not None:
        windows = windows + embedding[:, None, None]
    w = by_definition(conv.kernel)
    wanted = (
        torch.einsum('bchwij,cij->bchw', windows, w[:, 0])
        if depthwise
        else torch.einsum('bchwij,ocij->bohw', windows, w)
    )
    if bias:
        wanted = wanted + conv.bias[:, None, None]
    for training in (True, False):
        assert relative_error(conv.train(training)(x, embedding), wanted) < 1e-10
    with torch.no_grad():
        assert relative_error(conv(x, embedding), wanted) < 1e-10
        fused = conv.fuse(embedding)
    assert type(fused) is LargeConv2d and (fused.bias is None) == (not bias and not embedded)
    assert relative_error(fused(x), wanted) < 1e-10


@torch.no_grad()
def test_eval_mode_sees_changes():
    conv = PeripheralConv2d(4, 4, 15, groups=4).eval()
    x = torch.randn(1, 4, 10, 10)
    first = conv(x)
    assert conv.kernel.for_convolution() is conv.kernel.for_convolution()  # rendered once
    for parameter in conv.kernel.parameters():
        parameter.data[0] += 1.0
        assert not torch.equal(conv(x), first)
        first = conv(x)
    assert relative_error(first, conv.fuse()(x)) < 1e-5


@pytest.mark.parametrize(
    'kwargs, words',
    [
        (dict(kernel_size=10), ('odd', '10')),
        (dict(kernel_size=11, center_size=4), ('center_size', '4')),
        (dict(kernel_size=11, base=0), ('base', '0')),
        (dict(kernel_size=11, grid=[5, 1, 4]), ('symmetric', '(5, 1, 4)')),
        (dict(kernel_size=11, grid=[3, 1, 3]), ('11', '7')),
        (dict(kernel_size=11, small_kernel_size=2), ('small_kernel_size', '2')),
        (dict(kernel_size=11, groups=2), ('groups', '2')),
    ],
)
def test_arguments_that_cannot_work(kwargs, words):
    with pytest.raises(ValueError) as e:
        PeripheralConv2d(4, 4, **{'groups': 4, **kwargs})
    assert all(word in str(e.value) for word in words), e.value


# --- networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', PARAMS)
def test_parameters_of_the_paper(name):
    """Section 5.3: in millions. The paper's networks are wider and partly zero, these are dense: 3 % apart at most."""
    count = sum(p.numel() for p in timm.create_model(name, device='meta').parameters())
    assert abs(count / 1e6 / PARAMS[name] - 1) < 0.03


def small_network(**kwargs):
    model = timm.create_model('pelk_tiny', **SMALL, num_classes=5, ls_init_value=0.5, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_convnext_with_the_rendered_kernels():
    """The network is timm's ConvNeXt with these kernels, and with a single one where channels pass."""
    model = small_network().double().eval()
    reference = ConvNeXt(num_classes=5, **SMALL, ls_init_value=0.5).double()
    state = {key: value for key, value in model.state_dict().items() if key in reference.state_dict()}
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            kernel = by_definition(block.conv.kernel)
            weight = torch.zeros_like(reference.stages[i].blocks[j].conv_dw.weight)
            bias = torch.zeros(weight.shape[0], dtype=torch.float64)
            weight[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] = 1.0
            weight[: kernel.shape[0]] = kernel
            bias[: kernel.shape[0]] = block.conv.bias + (kernel[:, 0] * stage.pos_embed).sum((1, 2))
            state[f'stages.{i}.blocks.{j}.conv_dw.weight'] = weight.detach()
            state[f'stages.{i}.blocks.{j}.conv_dw.bias'] = bias.detach()
    reference.load_state_dict(state)
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        wanted = reference.eval()(x)
        assert relative_error(model(x), wanted) < 1e-10
        assert relative_error(model.reparameterize()(x), wanted) < 1e-10


def test_three_eighths_of_the_channels():
    for stage in timm.create_model('pelk_tiny', device='meta').stages:
        assert {block.num_conv for block in stage.blocks} == {stage.blocks[0].norm.normalized_shape[0] * 3 // 8}
    block = small_network().stages[0].blocks[0]
    x = torch.randn(1, 16, 8, 8)
    y = block._mix(x, None)
    assert torch.equal(y[:, 6:], x[:, 6:]) and not torch.equal(y[:, :6], x[:, :6])


def test_one_embedding_for_a_stage():
    model = small_network().train()
    names = [key for key in model.state_dict() if 'pos_embed' in key]
    assert names == [f'stages.{i}.pos_embed' for i in range(4)]
    assert tuple(model.stages[1].pos_embed.shape) == (9, 9, 9)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(stage.pos_embed.grad.abs().sum() > 0 for stage in model.stages)
    assert not any('pos_embed' in key for key in small_network(pos_embed=False).state_dict())


def test_no_layer_scale():
    model = timm.create_model('pelk_tiny', depths=(1,), dims=(8,), kernel_sizes=(9,), ls_init_value=0).eval()
    assert model.stages[0].blocks[0].gamma is None
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = model(x)
        assert relative_error(model.reparameterize()(x), wanted) < 1e-5


def test_learns():
    """Tells apart where a bright spot is: what a large kernel sees at once."""
    torch.manual_seed(0)
    target = torch.arange(16) % 4
    x = torch.zeros(16, 3, 64, 64)
    for i, quarter in enumerate(target.tolist()):
        row, column = 32 * (quarter // 2) + 2 * (i // 4), 32 * (quarter % 2) + 2 * (i // 4)
        x[i, :, row : row + 16, column : column + 16] = 1.0
    model = timm.create_model('pelk_tiny', **SMALL, num_classes=4, ls_init_value=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(90):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.0 and losses[-1] < 0.1
    with torch.no_grad():
        assert (model.eval().reparameterize()(x).argmax(1) == target).all()


def test_compiled_training():
    model = small_network().train()
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
    grads = []
    torch._dynamo.reset()
    for step in (model, torch.compile(model, backend='aot_eager')):
        model.zero_grad()
        F.cross_entropy(step(x), target).backward()
        grads.append({key: p.grad.clone() for key, p in model.named_parameters()})
    largest = max(grad.abs().max() for grad in grads[0].values())
    assert all((grads[1][key] - grad).abs().max() <= 1e-5 * largest for key, grad in grads[0].items())


@torch.no_grad()
def test_blocks_that_convolve_all_channels():
    """Nothing is joined then, which would leave the channels_last format."""
    model = timm.create_model('pelk_tiny', depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), conv_ratio=1.0).eval()
    formats = []
    model.stages[0].blocks[0].norm.register_forward_pre_hook(lambda m, args: formats.append(args[0].is_contiguous()))
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()
    assert formats == [True]  # of maps whose channels are the last dimension
