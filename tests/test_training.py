"""Training semantics through timm's own tools alone: slow radii, projection, no weight decay on points."""

import copy
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.task import FeatureDistillationTask, LogitDistillationTask
from timm.utils import ModelEmaV3

import timm_smpconv  # noqa: F401
from timm_smpconv.layers import SMPKernel

ROOT = Path(__file__).resolve().parents[1]

# one small network of each family: name, keyword arguments, input shape
SMALL = {
    'image': ('smpconv_tiny', dict(depths=(1, 1), dims=(8, 16), kernel_sizes=(9, 7), num_classes=5), (4, 3, 32, 32)),
    'cifar': ('smpconv_cifar', dict(dims=(4, 4, 6), kernel_size=9, num_points=6, num_classes=5), (4, 3, 12, 12)),
    'sequence': ('smpconv_seq_mnist', dict(depth=2, dim=6, kernel_size=40, num_points=5, radius=0.05), (4, 1, 5, 8)),
}


def small(family, seed=0, **kwargs):
    name, args, shape = SMALL[family]
    torch.manual_seed(seed)
    return timm.create_model(name, **args, **kwargs), torch.randn(shape), torch.randint(0, 5, shape[:1])


def kernels(model):
    return [m for m in model.modules() if isinstance(m, SMPKernel)]


def train(model, optimizer, x, target, steps=1, clip=None):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip, error_if_nonfinite=True)
        optimizer.step()


def assert_usable(model, x):
    for kernel in kernels(model):
        radius = kernel.radius
        assert torch.isfinite(radius).all()
        assert (radius >= kernel.min_radius).all() and (radius <= kernel.max_radius).all()
        assert torch.isfinite(kernel()).all()
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize('opt', ['sgd', 'momentum', 'adam', 'adamw', 'nadamw', 'rmsprop'])
def test_radii_step_a_tenth(family, opt):
    """The radii move as those of a plain optimizer with a tenth of the learning rate in their parameter group."""
    model, x, target = small(family)
    # a radius of 0.5 keeps all radii off the ends of their range
    for kernel in kernels(model):
        kernel.set_radius(0.5)
    before = copy.deepcopy(model)
    optimizer = create_optimizer_v2(model, opt, lr=1e-3, weight_decay=0.05)
    train(model, optimizer, x, target)

    plain = [torch.nn.Parameter(k.radius.detach().clone()) for k in kernels(before)]
    for parameter, kernel in zip(plain, kernels(before)):
        parameter.grad = radius_gradient(before, kernel, x, target)
    create_optimizer_v2(plain, opt, lr=1e-4, weight_decay=0.0).step()
    for parameter, kernel, old in zip(plain, kernels(model), kernels(before)):
        moved = kernel.radius.detach() - old.radius.detach()
        expected = parameter.detach() - old.radius.detach()
        assert moved.abs().max() > 0
        torch.testing.assert_close(moved, expected, rtol=2e-2, atol=2e-7)


def radius_gradient(model, kernel, x, target):
    """Derivative of the loss by the effective radius itself, the radius fed in as an independent tensor."""
    twin = copy.deepcopy(model)
    index = kernels(model).index(kernel)
    radius = kernel.radius.detach().clone().requires_grad_()

    class Plain(type(kernel)):
        radius = property(lambda self: self.plain_radius)

    module = kernels(twin)[index]
    module.__class__ = Plain
    module.plain_radius = radius
    F.cross_entropy(twin(x), target).backward()
    return radius.grad


@pytest.mark.parametrize('family', SMALL)
def test_adam_step_ratio(family):
    """One Adam step moves every parameter with a gradient by the learning rate, the radii by a tenth of it."""
    model, x, target = small(family)
    for kernel in kernels(model):
        kernel.set_radius(0.5)
    before = copy.deepcopy(model)
    train(model, create_optimizer_v2(model, 'adam', lr=1e-4), x, target)
    for kernel, old in zip(kernels(model), kernels(before)):
        coords = (kernel.coords - old.coords).abs().median()
        radius = (kernel.radius - old.radius).abs().median()
        torch.testing.assert_close(radius / coords, torch.tensor(0.1), rtol=1e-2, atol=0)


@pytest.mark.parametrize('family', SMALL)
def test_no_weight_decay(family):
    model, _, _ = small(family)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1.0, weight_decay=0.1)
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    for name, parameter in model.named_parameters():
        last = name.rsplit('.', 1)[-1]
        exempt = last in ('coords', 'radius_offset', 'bias') or parameter.ndim == 1
        assert decay[id(parameter)] == (0.0 if exempt else 0.1), name
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for kernel, old in zip(kernels(model), kernels(before)):
        assert torch.equal(kernel.coords, old.coords)
        assert torch.equal(kernel.radius, old.radius)
        assert not torch.equal(kernel.weights, old.weights)


@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize('opt,lr', [('sgd', 30.0), ('adam', 30.0)])
def test_huge_learning_rate(family, opt, lr, tmp_path):
    """In range after every step, in the weight average, and after save and resume."""
    model, x, target = small(family)
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = create_optimizer_v2(model, opt, lr=lr)
    model.train()
    for _ in range(8):
        train(model, optimizer, x, target, clip=10.0)
        ema.update(model)
        for kernel in kernels(model):
            assert (kernel.radius >= kernel.min_radius).all() and (kernel.radius <= kernel.max_radius).all()
    hit = torch.cat([k.radius.flatten() for k in kernels(model)])
    low = torch.cat([torch.full_like(k.radius, k.min_radius).flatten() for k in kernels(model)])
    assert ((hit == 1) | (hit == low)).any(), 'the step was meant to leave the range'
    state = dict(state_dict=model.state_dict(), optimizer=optimizer.state_dict())
    torch.save(state, tmp_path / 'checkpoint.pt')
    for kernel in kernels(model):  # saving projects the stored values, too
        stored = kernel.base_radius + kernel.radius_offset * kernel.radius_lr_scale
        torch.testing.assert_close(stored, kernel.radius, rtol=1e-5, atol=1e-7)

    resumed, _, _ = small(family, seed=1)
    loaded = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)
    resumed.load_state_dict(loaded['state_dict'])
    optimizer2 = create_optimizer_v2(resumed, opt, lr=lr)
    optimizer2.load_state_dict(loaded['optimizer'])
    train(resumed, optimizer2, x, target, clip=10.0)
    train(model, optimizer, x, target, clip=10.0)
    for a, b in zip(kernels(model), kernels(resumed)):
        assert torch.equal(a.radius, b.radius)
    for m in (model, resumed, ema.module):
        for kernel in kernels(m):
            assert (kernel.radius >= kernel.min_radius).all() and (kernel.radius <= kernel.max_radius).all()
            assert torch.isfinite(kernel()).all()


@pytest.mark.parametrize('opt', ['momentum', 'adamw'])
def test_projection_is_a_projection(opt):
    """A radius pushed far out of its range starts its way back from the boundary, as after clipping it."""
    kernel = SMPKernel(1, 1, 9, num_points=1, radius=0.97)
    optimizer = create_optimizer_v2(kernel, opt, lr=0.5, momentum=0.0)
    for sign, expected in ((-1, 1.0), (-1, 1.0), (1, 0.95)):
        kernel()  # training forward pass
        kernel.radius_offset.grad = torch.full_like(kernel.radius_offset, float(sign))
        if opt == 'adamw':
            optimizer.state.clear()
        optimizer.step()
        torch.testing.assert_close(kernel.radius, torch.full((1, 1), expected), rtol=1e-5, atol=0)


def test_reference_trajectory():
    """Ten steps equal an explicit loop: a radius group at a tenth of the rate, clipped after each step."""
    model, x, target = small('sequence')
    reference = copy.deepcopy(model)
    optimizer = create_optimizer_v2(model, 'adam', lr=0.05)
    # the explicit loop keeps plain radii: the parameter itself, at scale 1
    for kernel in kernels(reference):
        kernel.radius_offset.data = kernel.radius.detach().clone()
        kernel.base_radius.zero_()
        kernel.radius_lr_scale = 1.0
    radii = [k.radius_offset for k in kernels(reference)]
    ids = {id(p) for p in radii}
    explicit = torch.optim.Adam(
        [{'params': [p for p in reference.parameters() if id(p) not in ids]}, {'params': radii, 'lr': 0.005}], lr=0.05
    )
    for _ in range(10):
        train(model, optimizer, x, target)
        train(reference, explicit, x, target)
        for kernel in kernels(reference):
            kernel.radius_offset.data = kernel.radius_offset.data.clamp(kernel.min_radius, kernel.max_radius)
    for a, b in zip(kernels(model), kernels(reference)):
        torch.testing.assert_close(a.radius, b.radius, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(a.coords, b.coords, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('family', SMALL)
def test_compiled_training(family):
    """torch.compile trains to the same weights, and projects."""
    torch._dynamo.reset()  # sizes that differ from those of a network before would become variables, slower to compile
    model, x, target = small(family)
    twin = copy.deepcopy(model)
    optimizers = [create_optimizer_v2(m, 'sgd', lr=1.0) for m in (model, twin)]
    compiled = torch.compile(model, backend='aot_eager')
    for i in range(3):
        train(compiled, optimizers[0], x, target)
        train(twin, optimizers[1], x, target)
        if i == 0:
            for a, b in zip(kernels(model), kernels(twin)):
                torch.testing.assert_close(a.radius, b.radius, rtol=1e-3, atol=1e-5)
    # eval mode is compiled without a graph break
    model.eval()
    full = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(full(x), model(x), rtol=1e-3, atol=1e-4)
    model.train()
    for kernel in kernels(model):  # far out of range: the compiled forward pass projects the stored value
        kernel.radius_offset.data.fill_(100.0)
    compiled(x)
    for kernel in kernels(model):
        torch.testing.assert_close(kernel.radius_offset, (1.0 - kernel.base_radius) / 0.1)


def test_distributed_training(tmp_path):
    """Two processes with DistributedDataParallel agree with each other and stay in range."""
    script = tmp_path / 'ddp.py'
    script.write_text(
        textwrap.dedent("""
        import sys
        import torch, timm, timm_smpconv
        import torch.distributed as dist
        from timm.optim import create_optimizer_v2
        from timm.utils import ModelEmaV3
        from timm_smpconv.layers import SMPKernel
        rank, out = int(sys.argv[1]), sys.argv[2]
        torch.set_num_threads(1)
        dist.init_process_group('gloo', init_method=f'file://{out}/store', rank=rank, world_size=2)
        torch.manual_seed(rank)  # DDP broadcasts rank 0's weights
        model = timm.create_model('smpconv_seq_mnist', depth=2, dim=6, kernel_size=40, num_points=5, radius=0.05)
        optimizer = create_optimizer_v2(model, 'adam', lr=5.0)
        ema = ModelEmaV3(model, decay=0.5)
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(6):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(ddp(torch.randn(4, 1, 5, 8)), torch.randint(0, 10, (4,))).backward()
            optimizer.step()
            ema.update(ddp)
        for m in (model, ema.module):
            for k in m.modules():
                if isinstance(k, SMPKernel):
                    assert (k.radius >= k.min_radius).all() and (k.radius <= k.max_radius).all()
                    assert torch.isfinite(k()).all()
        parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.save(parameters, f'{out}/{rank}.pt')
        dist.barrier()
        dist.destroy_process_group()
        """)
    )
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert torch.equal(torch.load(tmp_path / '0.pt'), torch.load(tmp_path / '1.pt'))


def test_grad_checkpointing_trains_alike():
    for family in SMALL:
        model, x, target = small(family)
        twin = copy.deepcopy(model)
        twin.set_grad_checkpointing()
        for m in (model, twin):
            F.cross_entropy(m(x), target).backward()
        for (name, a), b in zip(model.named_parameters(), twin.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_learns():
    """A small network of each family fits a handful of random inputs."""
    for family in SMALL:
        model, x, target = small(family)
        first = F.cross_entropy(model(x), target).item()
        train(model, create_optimizer_v2(model, 'adam', lr=1e-2), x, target, steps=40)
        model.train()
        assert F.cross_entropy(model(x), target).item() < 0.3 * first
        assert_usable(model, x)


@pytest.mark.parametrize('family', ['cifar', 'sequence'])
def test_rescaled_kernels(family):
    """The script that was run between two stages of smpconv_cifar: other norms, the same function."""
    rescale = runpy.run_path(str(ROOT / 'recipes' / 'shipped' / 'rescale.py'))['rescale']
    (model, x, target), (like, _, _) = small(family), small(family, seed=1)
    train(model, create_optimizer_v2(model, 'adam', lr=1e-2), x, target, steps=3)
    model, like, x = model.double().eval(), like.double(), x.double()
    with torch.no_grad():
        for kernel in kernels(model):
            kernel.weights *= 3.0
        wanted = model(x)
        rescale(model, like)
        torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
    for one, other in zip(kernels(model), kernels(like)):
        assert one.weights.norm().item() == pytest.approx(other.weights.norm().item())


@pytest.mark.parametrize('kind', ['logit', 'feature'])
def test_distillation_by_timm(kind):
    """train.py's --kd-model-name: a sequence of pixels learns from the network of images, which stays as it is."""
    student = timm.create_model('smpconv_seq_cifar', depth=1, dim=4, kernel_size=64, radius=0.05)
    teacher = timm.create_model('smpconv_cifar', pretrained=True)
    task_class = {'logit': LogitDistillationTask, 'feature': FeatureDistillationTask}[kind]
    kwargs = dict(temperature=2.0) if kind == 'logit' else {}
    task = task_class(student, teacher, criterion=torch.nn.CrossEntropyLoss(), task_loss_weight=0.25, **kwargs)
    before = copy.deepcopy(teacher.state_dict())
    x, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    result = task(x, target)
    result['loss'].backward()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())
    if kind == 'logit':
        statistics = [
            torch.tensor(m.pretrained_cfg[key]).reshape(1, 3, 1, 1)
            for m in (student, teacher)
            for key in ('std', 'mean')
        ]
        images = x * statistics[0] + statistics[1]
        with torch.no_grad():
            lesson = (teacher.eval()((images - statistics[3]) / statistics[2]) / 2).softmax(1)
        log_p = (result['output'] / 2).log_softmax(1)
        kd = 4 * (lesson * (lesson.log() - log_p)).sum(1).mean()
        wanted = 0.25 * F.cross_entropy(result['output'], target) + 0.75 * kd
        torch.testing.assert_close(result['loss'], wanted, rtol=1e-4, atol=1e-5)
