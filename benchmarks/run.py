"""Measures this package against the plain path and against peers, all in one process.

The plain path is what the reference implementation does: kernels rendered in every forward pass, 2D convolution of
contiguous NCHW tensors with torch.nn.functional.conv2d, 1D convolution by complex FFT products (direct for sequences of
182 steps and less).

    python benchmarks/run.py                       # all cases, all cores
    python benchmarks/run.py --cases op train-seq  # cases whose names start so
    python benchmarks/run.py --csv results.csv --threads 2 --repeats 5
    python benchmarks/run.py --device cuda         # other cases: larger batches, half precision, Triton, torch.compile
"""

import argparse
import dataclasses
import platform
import resource
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import DeformConv2d
from tqdm import tqdm

import timm_smpconv
from timm_smpconv import ops
from timm_smpconv._files import write_rows
from timm_smpconv.layers import (
    CausalConv1d,
    LargeConv2d,
    PeripheralConv2d,
    PointwiseConv2d,
    RepSMPConv1d,
    RepSMPConv2d,
    SMPConv1d,
    SMPConv2d,
    convert_large_convs,
)
from timm_smpconv.models.pelk import PeLKBlock, PeLKStage
from timm_smpconv.models.smpconv import ConvFFN, LargeKernelBlock, SMPConvStage, Stem

Run = Callable[[], object]


def plain_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    groups: int,
    dilation: Tuple[int, int] = (1, 1),
) -> torch.Tensor:
    padding = (weight.shape[2] // 2 * dilation[0], weight.shape[3] // 2 * dilation[1])
    return F.conv2d(x.contiguous(), weight, bias, padding=padding, dilation=dilation, groups=groups)


def plain_conv1d(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    length, taps = x.shape[2], weight.shape[2]
    if length <= 182 or taps <= 5:
        return F.conv1d(F.pad(x, (taps - 1, 0)), weight, bias)
    weight = F.pad(weight, (1 - taps % 2, 0))  # the reference makes the number of taps odd
    x = F.pad(x, (weight.shape[2] - 1, 0))
    product = torch.einsum('bi...,oi...->bo...', torch.fft.rfft(x), torch.fft.rfft(weight, x.shape[2]).conj())
    y = torch.fft.irfft(product, x.shape[2])[..., :length]
    return y if bias is None else y + bias.reshape(1, -1, 1)


def plain_peripheral_conv2d(m: nn.Module, x: torch.Tensor, pos_embed: Optional[torch.Tensor] = None) -> torch.Tensor:
    kernel = m.kernel()
    return plain_conv2d(x, kernel, m._total_bias(kernel, pos_embed, m.bias), x.shape[1], m.dilation)


def plain_pelk_block(m: nn.Module, x: torch.Tensor, pos_embed: Optional[torch.Tensor] = None) -> torch.Tensor:
    part = x[:, : m.num_conv]
    part = m.conv(part, pos_embed) if m.embedded else m.conv(part)
    return x + m.drop_path(m._mlp(torch.cat([part, x[:, m.num_conv :]], 1)))


def plain_pelk_stage(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = m.downsample(x)
    for block in m.blocks:
        x = block(x, m.pos_embed)
    return x


def make_plain(model: nn.Module) -> nn.Module:
    """Replaces the forward passes of all convolutions of this package, in place."""
    forwards: Dict[type, Callable[..., torch.Tensor]] = {
        SMPConv2d: lambda m, x: plain_conv2d(x, m.kernel(), m.bias, x.shape[1] if m.depthwise else 1, m.dilation),
        SMPConv1d: lambda m, x: plain_conv1d(x, m.kernel(), m.bias),
        LargeConv2d: lambda m, x: plain_conv2d(x, m.weight, m.bias, m.groups, m.dilation),
        PointwiseConv2d: lambda m, x: m._conv_forward(x, m.weight, m.bias),
        CausalConv1d: lambda m, x: plain_conv1d(x, m.weight, m.bias),
        PeripheralConv2d: plain_peripheral_conv2d,
        # without what this package does in eval mode and on a CPU beyond the convolutions
        RepSMPConv1d: lambda m, x: m.large_norm(m.large(x)) + m.small_norm(m.small(x)),
        RepSMPConv2d: lambda m, x: m.large_norm(m.large(x)) + m.small_norm(m.small(x)),
        LargeKernelBlock: lambda m, x: x + m.drop_path(m._branch(x)),
        ConvFFN: lambda m, x: x + m.drop_path(m._branch(x)),
        SMPConvStage: lambda m, x: m.blocks(m.downsample(x)),
        Stem: lambda m, x: m._forward(x),
        PeLKBlock: plain_pelk_block,
        PeLKStage: plain_pelk_stage,
    }
    for module in model.modules():
        if type(module) in forwards:
            module.forward = types.MethodType(forwards[type(module)], module)
    return model


def settle(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Sets the statistics of the batch norms to those of a batch, in place.

    Maps of an untrained network fade to denormal numbers without it, on which arithmetic is several times slower.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def inference(model: nn.Module, x: torch.Tensor, autocast: Optional[torch.dtype] = None) -> Run:
    model.eval()

    def run() -> None:
        with torch.inference_mode(), torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            model(x)

    return run


def training_step(model: nn.Module, x: torch.Tensor, autocast: Optional[torch.dtype] = None) -> Run:
    """Forward and backward pass; no optimizer, whose step is the same on all paths."""
    model.train()
    target = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def run() -> None:
        model.zero_grad()
        with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), target)
        loss.backward()

    return run


def on_backend(name: str, run: Run) -> Run:
    """The same run with all convolutions on one backend."""

    def forced() -> None:
        with ops.use_backend(name):
            run()

    return forced


@dataclasses.dataclass(frozen=True)
class Case:
    """A case: its paths by name, 'plain' first; they are built just before they are measured."""

    name: str
    paths: Dict[str, Callable[[], Run]]
    goal: str = ''


def convolution(
    convolve: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    train: bool,
    backend: Optional[str] = None,
) -> Run:
    """A forward pass, or both passes, of a convolution, by a backend of this package if one is named."""
    x.requires_grad_(train)
    weight.requires_grad_(train)
    grad = torch.randn_like(x)

    def run() -> None:
        with torch.set_grad_enabled(train), ops.use_backend(backend):
            y = convolve(x, weight)
        if train:
            x.grad = weight.grad = None
            y.backward(grad)

    return run


def op_case(channels: int, size: int, kernel: int, train: bool, goal: str = '', dilation: int = 1) -> Case:
    def make(
        convolve: Callable[..., torch.Tensor],
        backend: Optional[str] = None,
        fmt: torch.memory_format = torch.contiguous_format,
    ) -> Run:
        x = torch.randn(8, channels, size, size).to(memory_format=fmt)
        return convolution(convolve, x, torch.randn(channels, 1, kernel, kernel), train, backend)

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return plain_conv2d(x, weight, None, channels, (dilation, dilation))

    def plain_last(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, padding=kernel // 2 * dilation, dilation=dilation, groups=channels)

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.depthwise_conv2d(x, weight, None, (dilation, dilation))

    paths = {
        'plain': lambda: make(plain),
        'chosen': lambda: make(ours),
        'direct': lambda: make(ours, 'direct'),
        'fft': lambda: make(ours, 'fft'),
    }
    kind, shape = 'train' if train else 'infer', f'{channels}x{size}x{size}-k{kernel}'
    if dilation > 1 or kernel < 13:  # where torch itself is slow, or fast, in the other format
        paths['plain channels_last'] = lambda: make(plain_last, fmt=torch.channels_last)
        paths['chosen channels_last'] = lambda: make(ours, fmt=torch.channels_last)
    if dilation > 1:
        return Case(f'dilated-{kind}-{shape}-d{dilation}-b8', paths, goal)
    return Case(f'op-{kind}-{shape}-b8', paths, goal)


def sequence_case(channels: int, steps: int, kernel: int, train: bool) -> Case:
    """Depthwise convolution of sequences, centred."""

    def make(convolve: Callable[..., torch.Tensor], backend: Optional[str] = None) -> Run:
        return convolution(convolve, torch.randn(8, channels, steps), torch.randn(channels, 1, kernel), train, backend)

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv1d(x, weight, padding=kernel // 2, groups=channels)

    paths = {
        'plain': lambda: make(plain),
        'chosen': lambda: make(ops.depthwise_conv1d),
        'direct': lambda: make(ops.depthwise_conv1d, 'direct'),
        'fft': lambda: make(ops.depthwise_conv1d, 'fft'),
    }
    return Case(f'sequence-{"train" if train else "infer"}-{channels}x{steps}-k{kernel}-b8', paths)


def model_case(kind: str, name: str, batch: int, goal: str = '', peer: Optional[str] = None, **kwargs) -> Case:
    torch.manual_seed(0)

    def images(model_name: str) -> torch.Tensor:
        return torch.randn(batch, *timm.get_pretrained_cfg(model_name).input_size)

    def build(plain: bool, model_name: str, fmt: Optional[torch.memory_format] = None, dtype=None) -> Run:
        x = images(model_name)
        model = timm.create_model(model_name, **kwargs)
        if kind != 'train':
            settle(model, x)
        if kind == 'deployed' and not plain and model_name == name:
            model.reparameterize()
        if dtype is not None:
            model, x = model.to(dtype), x.to(dtype)
        if fmt is not None:
            model, x = model.to(memory_format=fmt), x.to(memory_format=fmt)
        if plain:
            make_plain(model)
        return (training_step if kind == 'train' else inference)(model, x)

    paths: Dict[str, Callable[[], Run]] = {
        'plain': lambda: build(True, name),
        'chosen': lambda: build(False, name),
    }
    if peer:
        paths['chosen channels_last'] = lambda: build(False, name, torch.channels_last)
        if kind == 'deployed':
            paths['chosen bfloat16'] = lambda: build(False, name, dtype=torch.bfloat16)
            paths['chosen bfloat16 channels_last'] = lambda: build(False, name, torch.channels_last, torch.bfloat16)
        paths[peer] = lambda: build(False, peer)
        paths[f'{peer} channels_last'] = lambda: build(False, peer, torch.channels_last)
    suffix = ''.join(f'-{key}{value}' for key, value in kwargs.items())
    return Case(f'{kind}-{name}-b{batch}{suffix}', paths, goal)


def converted_case(kind: str, name: str, batch: int, device: str = 'cpu', **kwargs) -> Case:
    """A network of timm, as it is and with large convolutions by this package; in bfloat16 by autocast on a GPU."""
    autocast = torch.bfloat16 if device == 'cuda' else None

    def build(fmt: torch.memory_format, convert: bool, **kwargs) -> Run:
        x = torch.randn(batch, *timm.get_pretrained_cfg(name).input_size, device=device).to(memory_format=fmt)
        model = settle(timm.create_model(name, **kwargs).to(device, memory_format=fmt), x)
        if convert:
            convert_large_convs(model)
        return training_step(model, x, autocast) if kind == 'train' else inference(model, x, autocast)

    paths = {}
    for suffix, fmt in (('', torch.contiguous_format), (' channels_last', torch.channels_last)):
        paths[f'plain{suffix}'] = lambda fmt=fmt: build(fmt, False, **kwargs)
        paths[f'chosen{suffix}'] = lambda fmt=fmt: build(fmt, True, **kwargs)
    if kwargs:  # as it is published
        paths[name] = lambda: build(torch.contiguous_format, False)
    suffix = ''.join(f'-{key}{value}' for key, value in kwargs.items())
    prefix = 'gpu-' if device == 'cuda' else ''
    return Case(f'{prefix}converted-{kind}-{name}-b{batch}{suffix}', paths)


def deformable_case() -> Case:
    """Table 1 of the paper: one dense layer on CIFAR-10 maps, deformable convolutions against an SMPConv of 33 x 33."""
    x = torch.randn(16, 24, 32, 32, requires_grad=True)

    def smp(plain: bool) -> Run:
        layer = SMPConv2d(24, 24, 33, bias=False)
        if plain:
            make_plain(layer)
        return lambda: layer(x).sum().backward()

    def deformable(kernel: int) -> Run:
        offset = nn.Conv2d(24, 2 * kernel * kernel, 3, padding=1)
        layer = DeformConv2d(24, 24, kernel, padding=kernel // 2, bias=False)
        return lambda: layer(x, offset(x)).sum().backward()

    paths = {'plain': lambda: smp(True), 'chosen': lambda: smp(False)}
    for name in ('fft', 'dft'):
        paths[name] = lambda name=name: on_backend(name, smp(False))
    for k in (3, 5, 7):
        paths[f'deformable k{k}'] = lambda k=k: deformable(k)
    return Case('op-train-24x32x32-k33-dense-b16', paths)


def gpu_op_case(channels: int, size: int, kernel: int, batch: int, dtype: torch.dtype, train: bool) -> Case:
    """Depthwise convolution on a GPU: cuDNN in both memory formats, compiled, and the backends."""

    def make(convolve: Callable[..., torch.Tensor], fmt: torch.memory_format, backend: Optional[str] = None) -> Run:
        x = torch.randn(batch, channels, size, size, device='cuda', dtype=dtype).to(memory_format=fmt)
        weight = torch.randn(channels, 1, kernel, kernel, device='cuda', dtype=dtype)
        return convolution(convolve, x, weight, train, backend)

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, padding=kernel // 2, groups=channels)

    ours, nchw, last = ops.depthwise_conv2d, torch.contiguous_format, torch.channels_last

    def compiled() -> Run:
        torch.compiler.reset()  # each case counts as another version of `plain`, and torch gives up after a few
        return make(torch.compile(plain, dynamic=False), nchw)

    paths = {
        'plain': lambda: make(plain, nchw),
        'plain channels_last': lambda: make(plain, last),
        'plain compiled': compiled,
        'chosen': lambda: make(ours, nchw),
        'chosen channels_last': lambda: make(ours, last),
        'fft': lambda: make(ours, nchw, 'fft'),
        'toeplitz': lambda: make(ours, nchw, 'toeplitz'),
    }
    kind, name = 'train' if train else 'infer', str(dtype).removeprefix('torch.')
    goal = '10 x the best plain path' if kernel == 31 and dtype == torch.bfloat16 else ''
    return Case(f'gpu-op-{kind}-{channels}x{size}x{size}-k{kernel}-b{batch}-{name}', paths, goal)


def gpu_model_case(name: str, batch: int, train: bool, peer: Optional[str] = None) -> Case:
    """A network in bfloat16 on a GPU, deployed or in training with autocast."""

    def build(model_name: str, fmt: torch.memory_format, plain: bool = False) -> Run:
        x = torch.randn(batch, *timm.get_pretrained_cfg(model_name).input_size, device='cuda')
        model = timm.create_model(model_name).to('cuda')
        if x.ndim == 4:
            x, model = x.to(memory_format=fmt), model.to(memory_format=fmt)
        if not train:
            settle(model, x)
            if model_name == name and not plain:
                model.reparameterize()
            model = model.to(torch.bfloat16)
        if plain:
            make_plain(model)
        return training_step(model, x, torch.bfloat16) if train else inference(model, x.to(torch.bfloat16))

    nchw, last = torch.contiguous_format, torch.channels_last
    paths = {
        'plain': lambda: build(name, nchw, plain=True),
        'chosen': lambda: build(name, nchw),
        'chosen channels_last': lambda: build(name, last),
    }
    if peer:
        paths[peer] = lambda: build(peer, nchw)
        paths[f'{peer} channels_last'] = lambda: build(peer, last)
    goal = f'images/s of 0.8 {peer}' if peer and not train else ''
    return Case(f'gpu-{"train" if train else "deployed"}-{name}-b{batch}-bfloat16', paths, goal)


def gpu_cases() -> List[Case]:
    shapes = ((96, 56, 31), (192, 28, 29), (384, 14, 27), (768, 7, 13), (64, 56, 51))
    # around the crossovers of the rule: few taps, one image, large maps
    few = ((96, 56, 5, 64), (96, 56, 7, 64), (96, 56, 13, 64), (384, 14, 5, 64), (768, 7, 5, 64), (96, 56, 31, 1))
    crossovers = (*few, (32, 112, 51, 64), (32, 112, 101, 64))
    both = [(dtype, train) for dtype in (torch.bfloat16, torch.float32) for train in (False, True)]
    return [
        *(gpu_op_case(*shape, batch, *rest) for shape in shapes for batch in (64, 128) for rest in both),
        *(gpu_op_case(*shape, *rest) for shape in crossovers for rest in both),
        *(
            gpu_model_case('smpconv_tiny', batch, train, 'convnext_tiny')
            for batch in (64, 128)
            for train in (False, True)
        ),
        gpu_model_case('smpconv_cifar', 512, True),
        gpu_model_case('smpconv_seq_mnist', 512, True),
        gpu_model_case('smpconv_seq_cifar', 512, True),
        gpu_model_case('smpconv_seq_speech_raw', 32, True),
        converted_case('infer', 'convnext_tiny', 64, 'cuda', kernel_sizes=31),
        converted_case('train', 'convnext_tiny', 64, 'cuda', kernel_sizes=31),
    ]


def cpu_cases() -> List[Case]:
    sequences = ((256, 1000, 31), (256, 1000, 501), (64, 16000, 1001))
    return [
        op_case(96, 56, 31, False),
        op_case(192, 28, 29, False),
        op_case(384, 14, 27, False),
        op_case(768, 7, 13, False),
        op_case(64, 56, 51, False),
        op_case(96, 56, 31, True, '20 x'),
        op_case(192, 28, 29, True),
        op_case(384, 14, 27, True),
        op_case(768, 7, 13, True),
        op_case(96, 56, 7, False),
        op_case(768, 32, 9, False),
        op_case(96, 56, 7, True),
        op_case(768, 32, 9, True),
        op_case(768, 14, 13, False, dilation=2),
        op_case(384, 28, 27, False, dilation=2),
        op_case(768, 14, 13, True, dilation=2),
        op_case(384, 28, 27, True, dilation=2),
        *(sequence_case(*shape, train) for train in (False, True) for shape in sequences),
        deformable_case(),
        model_case('deployed', 'smpconv_tiny', 8, '5 x, bfloat16 9 x, convnext_tiny 1 x', 'convnext_tiny'),
        model_case('deployed', 'smpconv_tiny', 1, '4 x', 'convnext_tiny'),
        model_case('deployed', 'smpconv_tiny', 8, '', 'convnext_tiny', output_stride=16),
        model_case('eval', 'smpconv_tiny', 8, '4.5 x', 'convnext_tiny'),
        model_case('deployed', 'smpconv_cifar', 1),
        model_case('deployed', 'smpconv_cifar', 8),
        model_case('deployed', 'smpconv_seq_mnist', 1),
        model_case('deployed', 'smpconv_seq_speech_raw', 1),
        model_case('deployed', 'pelk_tiny', 8, '', 'convnext_tiny'),
        model_case('train', 'pelk_tiny', 8, '', 'convnext_tiny'),
        model_case('train', 'smpconv_tiny', 8, '4 x, convnext_tiny 1 / 1.4 x', 'convnext_tiny'),
        model_case('train', 'smpconv_seq_mnist', 64, '4 x'),
        model_case('train', 'smpconv_seq_cifar', 64, '10 x'),
        model_case('train', 'smpconv_seq_chartraj', 64),
        model_case('train', 'smpconv_seq_speech', 32),
        model_case('train', 'smpconv_seq_speech_raw', 8, '8 x'),
        model_case('train', 'smpconv_cifar', 32, '60 x'),
        converted_case('infer', 'convnext_tiny', 8, kernel_sizes=31),
        converted_case('train', 'convnext_tiny', 8, kernel_sizes=31),
        converted_case('infer', 'convmixer_768_32', 4),
        converted_case('train', 'convmixer_768_32', 4),
    ]


def measure(
    runs: Dict[str, Run], repeats: int, seconds: float, device: str, progress: Callable[[str], None]
) -> Dict[str, float]:
    """Median seconds of several runs of each path after one that warms up; two of them, however long they take.

    The paths take turns, so that a machine that slows down or speeds up does so for all of them.
    """
    times: Dict[str, List[float]] = {path: [] for path in runs}
    for _ in range(repeats + 1):
        for path, run in runs.items():
            progress(path)
            if len(times[path]) < 3 or sum(times[path]) < seconds:
                begin = time.perf_counter()
                run()
                if device == 'cuda':
                    torch.cuda.synchronize()
                times[path].append(time.perf_counter() - begin)
    return {path: statistics.median(values[1:]) for path, values in times.items()}


def peak_memory(case: str, path: str, threads: int, device: str) -> float:
    """MiB that a path adds to a fresh process, from its own measurement of two runs."""
    command = [sys.executable, __file__, '--threads', str(threads), '--device', device, '--memory-of', case, path]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # errors go to the terminal
    return float(result.stdout)


def peak_rss() -> int:
    """Peak resident memory of this process in KiB."""
    try:
        # getrusage also counts what the process had before exec, as a copy of its parent
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) for line in f if line.startswith('VmHWM'))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def print_peak_memory(case: Case, path: str, device: str) -> None:
    base = peak_rss()
    run = case.paths[path]()
    run()
    run()
    print(torch.cuda.max_memory_allocated() / 2**20 if device == 'cuda' else (peak_rss() - base) / 1024)


def _first_words(cases: List[Case]) -> str:
    return ', '.join(sorted({case.name.partition('-')[0] for case in cases}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', default=[''], help='run the cases whose names start so')
    parser.add_argument('--skip', nargs='*', default=[], help='leave out these paths (plain stays)')
    parser.add_argument('--repeats', type=int, default=7, help='measured runs of each path')
    parser.add_argument('--seconds', type=float, default=20.0, help='no further run of a path after this time')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of torch')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='what to measure on (default: cpu)')
    parser.add_argument('--memory', action='store_true', help='measure peak memory too, each path in its own process')
    parser.add_argument('--csv', help='write the results here')
    parser.add_argument('--memory-of', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f'--repeats must be at least 1, got {args.repeats}')
    torch.set_num_threads(args.threads)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda needs a CUDA GPU, and torch sees none')
    cases = gpu_cases() if args.device == 'cuda' else cpu_cases()
    strange = [prefix for prefix in args.cases if not any(c.name.startswith(prefix) for c in cases)]
    if strange:
        parser.error(f'no case begins with {", ".join(strange)}; the first words are {_first_words(cases)}')
    cases = [c for c in cases if any(c.name.startswith(prefix) for prefix in args.cases)]
    skipped = set(args.skip) & {path for case in cases for path in case.paths} - {'plain'}
    for case in cases:
        for path in skipped & set(case.paths):
            del case.paths[path]
    if args.skip and not set(args.skip) <= skipped:
        parser.error(f'no such path in these cases: {", ".join(sorted(set(args.skip) - skipped))}')
    if args.memory_of:
        print_peak_memory(next(c for c in cases if c.name == args.memory_of[0]), args.memory_of[1], args.device)
        return

    print(
        f'{time.strftime("%Y-%m-%d")}, {platform.machine()}, {args.threads} threads, '
        f'Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, '
        f'timm {timm.__version__}, timm_smpconv {timm_smpconv.__version__}, '
        f'{torch.cuda.get_device_name() if args.device == "cuda" else torch.backends.cpu.get_cpu_capability()}\n'
    )
    print('| case | path | ms | plain / path | peak MiB | goal |\n|---|---|---|---|---|---|')
    rows = []
    runs_in_all = sum(len(c.paths) for c in cases) * (args.repeats + 1)
    bar = tqdm(total=runs_in_all, unit='run', mininterval=0.5 if sys.stderr.isatty() else 30.0)
    for case in cases:

        def progress(path: str, case: Case = case) -> None:
            bar.set_description(f'{case.name} {path}')
            bar.update()

        runs = {}
        for path, build in case.paths.items():
            torch.manual_seed(0)
            runs[path] = build()
        medians = measure(runs, args.repeats, args.seconds, args.device, progress)
        for path, seconds in medians.items():
            ratio = medians['plain'] / seconds
            row = dict(
                case=case.name,
                path=path,
                ms=f'{seconds * 1e3:.{1 if args.device == "cpu" else 3}f}',
                ratio=f'{ratio:.2f}',
                mib='',
            )
            if args.memory:
                row['mib'] = f'{peak_memory(case.name, path, args.threads, args.device):.0f}'
            row['goal'] = case.goal if path == 'chosen' else ''
            rows.append(row)
            tqdm.write('| ' + ' | '.join(row.values()) + ' |', file=sys.stdout)
            sys.stdout.flush()
        if args.csv:  # after each case: a run that is cut short keeps what it has
            write_rows(Path(args.csv), rows)
    bar.close()


if __name__ == '__main__':
    main()
