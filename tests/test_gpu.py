"""Whole networks on a GPU against a CPU: what is chosen there, and the formats that layers keep there."""

import copy
import runpy
from pathlib import Path

import pytest
import timm
import torch
from synth import randomize_norms

from timm_smpconv import ops
from timm_smpconv.ops import dft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'),
]
NETWORKS = {
    'smpconv_tiny': (dict(depths=(1, 1, 1, 1)), (3, 96, 64)),
    'pelk_tiny': (dict(depths=(1, 1, 1, 1)), (3, 96, 64)),
    'smpconv_cifar': (dict(dims=(8, 8, 12)), (3, 32, 32)),
    'smpconv_seq_mnist': (dict(depth=2), (1, 28, 28)),
    'smpconv_seq_speech': (dict(depth=2), (20, 161)),
}


def make(name):
    torch.manual_seed(0)
    kwargs, shape = NETWORKS[name]
    return randomize_norms(timm.create_model(name, num_classes=5, **kwargs)), torch.randn(4, *shape)


def no_tf32():
    return torch.backends.cudnn.flags(allow_tf32=False)


@pytest.mark.parametrize('name', sorted(NETWORKS))
def test_inference(name):
    """Deployed or not."""
    model, x = make(name)
    with torch.no_grad(), no_tf32():
        wanted = model.eval().double()(x.double())
        model = model.float().cuda()
        for _ in range(2):
            assert (model(x.cuda()).cpu() - wanted).abs().max() < 2e-4 * wanted.abs().max()
            model.reparameterize()


@pytest.mark.parametrize('name', sorted(NETWORKS))
def test_training_step(name):
    """Output, gradients and the statistics of norms."""
    model, x = make(name)
    other = copy.deepcopy(model).cuda().train()
    wanted = model.double().train()(x.double())
    wanted.square().sum().backward()
    with no_tf32():
        got = other(x.cuda())
        got.square().sum().backward()
    assert (got.cpu() - wanted).abs().max() < 1e-3 * wanted.abs().max()
    scale = max(p.grad.norm() for p in model.parameters())
    for (key, a), b in zip(model.named_parameters(), other.parameters()):
        # norms over small batches, and activations that switch, magnify the rounding of float32
        assert (b.grad.cpu() - a.grad).norm() < 1e-2 * a.grad.norm() + 1e-5 * scale, key
    for (key, a), b in zip(model.named_buffers(), other.buffers()):
        assert torch.allclose(b.cpu().double(), a.double(), rtol=1e-3, atol=1e-4), key


def test_sequences_stay_in_channels_last():
    """From the first norm on, so that no norm falls back to the kernels that it avoids."""
    model, x = make('smpconv_seq_mnist')
    model = model.cuda().train()
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.register_forward_hook(lambda m, args, y: seen.append(args[0].stride(1)))
            module.register_full_backward_hook(lambda m, grads_in, grads_out: seen.append(grads_out[0].stride(1)))
    model(x.cuda()).sum().backward()
    assert len(seen) == 16 and set(seen) == {1}


def test_constants_are_made_once():
    """By graphs too, whose memory holds nothing until they are replayed."""
    dft._made_once.cache_clear()
    x, weight = (torch.randn(shape, device='cuda') for shape in ((2, 3, 8, 8), (4, 3, 5, 5)))
    with ops.use_backend('dft'):
        wanted = ops.conv2d(x, weight)
        made = dft._made_once.cache_info().misses
        dft._made_once.cache_clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.conv2d(x, weight)
        assert dft._made_once.cache_info().misses == 0
        graph.replay()
        assert torch.allclose(y, wanted, atol=1e-5)
        with torch.inference_mode():
            ops.conv2d(x, weight)
        assert dft._made_once.cache_info().misses == made
        ops.conv2d(x, weight.requires_grad_()).sum().backward()
        assert dft._made_once.cache_info().misses == made


@pytest.mark.parametrize(
    'name,opt,opt_kwargs',
    [
        ('smpconv_cifar', 'nmuon', dict(fallback_no_weight_decay=True)),
        ('smpconv_seq_cifar', 'nmuon', dict(fallback_no_weight_decay=True)),
        ('smpconv_cifar', 'adam', {}),  # as recipes/ablations.py has it
    ],
)
def test_recorded_steps(name, opt, opt_kwargs, tmp_path):
    """Steps of recipes/train_cifar.py that replay a CUDA graph learn what launched ones learn."""
    script = runpy.run_path(str(Path(__file__).resolve().parents[1] / 'recipes' / 'train_cifar.py'))
    kwargs = dict(dims=(8, 8), kernel_size=9) if name == 'smpconv_cifar' else dict(depth=1, dim=8)
    kd = dict(teacher='smpconv_cifar', task_loss_weight=0.3, kd_temperature=2.0)
    recipe = script['Recipe'](name, [], opt=opt, opt_kwargs=dict(opt_kwargs, capturable=True), **kd)
    phase = script['Phase'](1, 1e-2, model_kwargs=kwargs)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8), torch.arange(64) % 10
    losses = []
    for graph in (False, True):
        trainer = script['Trainer'](recipe, tmp_path, images, images, torch.device('cuda'), graph)
        torch.manual_seed(0)
        model = script['create'](recipe, phase, None).to('cuda', memory_format=torch.channels_last).train()
        step = trainer.make_step(model, trainer.make_optimizer(model, phase), phase)
        x = trainer.normalize(trainer.images).contiguous(memory_format=torch.channels_last)
        target = torch.nn.functional.one_hot(trainer.labels, 10).float()
        losses.append([step(x, target).item() for _ in range(8)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and losses[1][-1] < losses[1][3] < losses[1][0]
