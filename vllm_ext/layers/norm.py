"""Root-mean-square norms with the released rounding, fused with what stands beside them in the model.

vLLM's fused kernels multiply by the weight first and round once; the released model rounds twice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from sala_kernels.elementwise.op import add_rms_norm, mean_square, norm_gate, rms_norm


class NormWeight(nn.Module):
    """The weight of a norm that another layer computes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class ResidualNorm(NormWeight):
    """Adds a branch to the residual stream and normalises the sum, in one pass over both."""

    def __init__(self, width: int, eps: float, branch_scale: float) -> None:
        super().__init__(width)
        self.eps = eps
        self.branch_scale = branch_scale

    def forward(self, hidden: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the residual stream and its norm.

        Args:
            hidden: [tokens, width], the residual stream.
            branch: as ``hidden``, not yet scaled; None before the first branch.

        Returns:
            The residual stream with the branch, and that normalised, each as ``hidden``.
        """
        if branch is None:
            return hidden, rms_norm(hidden, self.weight, self.eps)
        return add_rms_norm(hidden, branch, self.branch_scale, self.weight, self.eps)


class GatedNorm(NormWeight):
    """A norm times a sigmoid gate, over a width that is split across the tensor-parallel ranks.

    The mean square spans all ranks: normalising each shard by itself would be another function.
    """

    def __init__(self, width: int, eps: float) -> None:
        self.tp_size = get_tensor_model_parallel_world_size()
        super().__init__(width // self.tp_size)
        self.eps = eps
        self.weight.weight_loader = self._load_shard

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalise x [tokens, width of this rank] and multiply by the sigmoid of ``gate``, of the same shape."""
        mean = None
        if self.tp_size > 1:
            mean = tensor_model_parallel_all_reduce(mean_square(x)) / self.tp_size
        return norm_gate(x, self.weight, gate, self.eps, mean)

    def _load_shard(self, parameter: nn.Parameter, full: Tensor) -> None:
        rank = get_tensor_model_parallel_rank()
        parameter.data.copy_(full.chunk(self.tp_size)[rank])
