from .pelk import PeLK as PeLK
from .smpconv import SMPConv as SMPConv
from .smpconv_cifar import SMPConvCifar as SMPConvCifar
from .smpconv_seq import SMPConvSeq as SMPConvSeq
