from .cache import KernelCache as KernelCache
from .conv import PeripheralConv2d as PeripheralConv2d, SMPConv1d as SMPConv1d, SMPConv2d as SMPConv2d
from .folding import check_part as check_part
from .kernel import RenderedKernel as RenderedKernel, SMPKernel as SMPKernel, no_weight_decay as no_weight_decay
from .large import (
    CausalConv1d as CausalConv1d,
    LargeConv1d as LargeConv1d,
    LargeConv2d as LargeConv2d,
    PointwiseConv2d as PointwiseConv2d,
    convert_large_convs as convert_large_convs,
)
from .norm import (
    AffineNorm as AffineNorm,
    can_take_norm as can_take_norm,
    fold_norm_into_next as fold_norm_into_next,
    is_foldable as is_foldable,
    norm_to_conv as norm_to_conv,
)
from .parts import by_parts as by_parts
from .peripheral import PeripheralKernel as PeripheralKernel, sharing_grid as sharing_grid
from .rep import ConvNorm as ConvNorm, RepSMPConv1d as RepSMPConv1d, RepSMPConv2d as RepSMPConv2d
