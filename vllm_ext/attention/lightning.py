"""Lightning attention for vLLM: backend, per-step metadata and the layer that owns the states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import PAD_SLOT_ID, mamba_get_block_table_tensor

from sala_kernels.lightning.op import StateBatch, lightning_attention
from sala_kernels.spec import SalaSpec, decay_slopes

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionImplBase


class LightningBackend(AttentionBackend):
    """One float32 state per sequence; vLLM copies states at block boundaries for prefix reuse."""

    @staticmethod
    def get_name() -> str:
        """Return the name the plugin registers the backend under."""
        return "SALA_LIGHTNING"

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase]:
        """Refuse: the layer calls its op itself.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("lightning layers have no attention implementation class")

    @staticmethod
    def get_builder_cls() -> type[LightningMetadataBuilder]:
        """Return the metadata builder class."""
        return LightningMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """Tell vLLM that the cache is a state per sequence."""
        return True


class LightningMetadataBuilder(AttentionMetadataBuilder[StateBatch]):
    """Describe a step to all lightning layers of a cache group."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # the base class declares its constructor abstract
        super().__init__(*args, **kwargs)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StateBatch:
        """Find each sequence's state slot, and whether the slot holds its state yet."""
        query_start_loc = common_attn_metadata.query_start_loc
        query_lens = query_start_loc.diff()
        slots = mamba_get_block_table_tensor(
            common_attn_metadata.block_table_tensor,
            common_attn_metadata.seq_lens,
            self.kv_cache_spec,
            self.vllm_config.cache_config.mamba_cache_mode,
        )[:, 0]
        return StateBatch(
            query_start_loc=query_start_loc,
            state_slots=torch.where(query_lens > 0, slots, PAD_SLOT_ID),
            has_context=common_attn_metadata.seq_lens > query_lens,
            max_query_len=common_attn_metadata.max_query_len,
        )


class LightningState(nn.Module, MambaBase):
    """The recurrence of one layer on this rank's heads."""

    def __init__(self, spec: SalaSpec, prefix: str) -> None:
        super().__init__()
        tp_size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.num_heads = spec.lightning_num_heads // tp_size
        self.head_dim = spec.lightning_head_dim
        self.scale = spec.lightning_scale
        self.prefix = prefix
        # slopes follow the head's number in the whole model, not on its rank
        slopes = decay_slopes(spec.lightning_num_heads)[rank * self.num_heads :][: self.num_heads]
        self.register_buffer("slopes", torch.tensor(slopes, dtype=torch.float32), persistent=False)
        self.kv_cache = (torch.empty(0),)
        # how vLLM finds the layers that own a cache
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are named {prefix}")
        layers[prefix] = self

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Run the step's sequences.

        Args:
            q: [tokens, heads, dim]; rows past the batch's tokens are padding.
            k: as ``q``.
            v: as ``q``.

        Returns:
            [tokens, heads, dim] in the dtype of ``q``; zero while vLLM measures memory.
        """
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return torch.zeros_like(q)
        (state,) = self.kv_cache
        return lightning_attention(q, k, v, self.slopes, self.scale, state, metadata[self.prefix])

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The backend, by which vLLM also finds how states are copied."""
        return MambaAttentionBackendEnum["SALA_LIGHTNING"]

    def get_state_shape(self) -> tuple[tuple[int, int, int]]:
        """Return the shape of a sequence's state: heads, key dim, value dim."""
        return ((self.num_heads, self.head_dim, self.head_dim),)

    def get_state_dtype(self) -> tuple[torch.dtype]:
        """Return float32, whatever the model's dtype: rounding errors would add up over the context."""
        return (torch.float32,)
