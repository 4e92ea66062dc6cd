"""Random weights of realistic size, as vLLM's load format ``random``.

vLLM's own ``dummy`` weights are within ±0.001, norms included: every block score is then the same number, all
queries choose the same blocks, and a benchmark of block-sparse attention would measure its best case. Here matrices are
N(0, 1 / fan-in) and norms 1, so scores differ and neighbouring queries share few blocks: the worst case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import ModelConfig

LOAD_FORMAT = "random"
SEED = 0


def register() -> None:
    """Register the load format (entry point ``vllm.general_plugins`` of the benchmark)."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    @register_model_loader(LOAD_FORMAT)
    class RandomWeights(DummyModelLoader):
        """Like ``dummy``, then realistic values wherever weights are not quantised."""

        def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
            super().load_weights(model, model_config)
            torch.manual_seed(SEED)
            for parameter in model.parameters():
                if parameter.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                    continue
                if parameter.ndim == 1:
                    parameter.data.fill_(1.0)
                else:
                    parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
