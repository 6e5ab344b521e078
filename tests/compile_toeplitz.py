"""Compiles the kernels of ops.toeplitz for GPUs, as they are launched, and prints a row for each.

A row: kernel, compute capability, width of the map, dtype, bytes of machine code and of shared memory, whether tensor
cores are used. No GPU is needed. TRITON_INTERPRET must not be set.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_smpconv.ops import toeplitz

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
POINTERS = ('x', 'bands', 'bias', 'y', 'grad', 'out')
OPTIONS = ('num_warps', 'num_stages')


def compile_kernel(kernel, constants, dtype, capability):
    names, signature, aligned = kernel.arg_names, {}, {}
    options = {name: value for name, value in constants.items() if name in OPTIONS}
    constants = {name: value for name, value in constants.items() if name not in OPTIONS}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = 'constexpr'
        elif name in POINTERS:
            signature[name] = '*fp32' if name == 'out' else f'*{dtype}'
            aligned[(i,)] = [['tt.divisibility', 16]]
        else:
            signature[name] = 'i32'
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)


CASES = ((80, 56, 'bf16'), (86, 100, 'fp32'), (90, 56, 'bf16'), (90, 14, 'fp16'), (90, 100, 'fp32'), (120, 56, 'bf16'))
for capability, width, dtype in CASES:
    for kernel, constants in (
        (toeplitz._correlate_kernel, dict(toeplitz._correlate_blocks(64, width, 31, 15, DTYPES[dtype]), HAS_BIAS=True)),
        (toeplitz._weight_grad_kernel, toeplitz._weight_grad_blocks(width, 15, DTYPES[dtype])),
    ):
        compiled = compile_kernel(kernel, constants, dtype, capability)
        size, shared = len(compiled.asm['cubin']), compiled.metadata.shared
        print(kernel.fn.__name__, capability, width, dtype, size, shared, 'mma' in compiled.asm['ptx'], flush=True)
