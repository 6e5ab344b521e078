"""Gives the kernels of a network the norms that they have in another one, without changing what it computes.

A kernel in front of a batch norm has no scale of its own: Muon made those of smpconv_cifar three times as large, so
that the rates of the runs after it would have changed them three times less. Between the eighth and the ninth run of
smpconv_cifar.c10:

    python recipes/shipped/rescale.py smpconv_cifar output/muon/model.safetensors \\
        output/smpconv_cifar.c10.six/model.safetensors output/rescaled.safetensors
"""

import argparse
from pathlib import Path

import torch

import timm_smpconv
from timm_smpconv._files import save_tensors
from timm_smpconv.layers import RepSMPConv1d, RepSMPConv2d


@torch.no_grad()
def rescale(model: torch.nn.Module, like: torch.nn.Module) -> None:
    """Scales the kernels of both branches of each block, and the statistics of the batch norms behind them."""
    for block, other in zip(model.modules(), like.modules()):
        if not isinstance(block, (RepSMPConv1d, RepSMPConv2d)):
            continue
        for weight, wanted, bias, norm in (
            (block.large.kernel.weights, other.large.kernel.weights, block.large.bias, block.large_norm),
            (block.small.weight, other.small.weight, block.small.bias, block.small_norm),
        ):
            scale = (weight.norm() / wanted.norm()).item()
            for tensor in (weight, norm.running_mean, *([] if bias is None else [bias])):
                tensor /= scale
            norm.running_var.copy_((norm.running_var + norm.eps) / scale**2 - norm.eps)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ('model', 'file', 'like', 'out'):
        parser.add_argument(name)
    args = parser.parse_args()
    network, other = (timm_smpconv.create_model(args.model, checkpoint_path=path) for path in (args.file, args.like))
    rescale(network, other)
    save_tensors(Path(args.out), network.state_dict())
