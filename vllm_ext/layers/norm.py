"""Root-mean-square norm with the released rounding, over one rank or over all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)


class RMSNorm(nn.Module):
    """x / rms(x) rounded to x's dtype, *then* times the weight.

    vLLM's fused kernels multiply first and round once; the released model rounds twice.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis: [..., width] in any float dtype, returned in the same."""
        wide = x.float()
        mean_square = self._mean_square(wide)
        return self.weight * (wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype)

    def _mean_square(self, wide: Tensor) -> Tensor:
        return wide.square().mean(-1, keepdim=True)


class ShardedRMSNorm(RMSNorm):
    """The same norm over a width that is split across the tensor-parallel ranks.

    The mean square spans all ranks: normalising each shard by itself would be another function.
    """

    def __init__(self, width: int, eps: float) -> None:
        self.tp_size = get_tensor_model_parallel_world_size()
        super().__init__(width // self.tp_size, eps)
        self.weight.weight_loader = self._load_shard

    def _mean_square(self, wide: Tensor) -> Tensor:
        mean_square = super()._mean_square(wide)
        if self.tp_size > 1:
            mean_square = tensor_model_parallel_all_reduce(mean_square) / self.tp_size
        return mean_square

    def _load_shard(self, parameter: nn.Parameter, full: Tensor) -> None:
        rank = get_tensor_model_parallel_rank()
        parameter.data.copy_(full.chunk(self.tp_size)[rank])
