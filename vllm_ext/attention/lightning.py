"""Lightning attention for vLLM: backend, per-step metadata and the layer that owns the states."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionMetadataBuilder
from vllm.v1.attention.backends.utils import (
    mamba_get_block_table_tensor,
    split_decodes_and_prefills,
)
from vllm.v1.kv_cache_interface import MambaSpec

from sala_kernels.lightning.op import StateBatch, lightning_attention
from sala_kernels.spec import SalaSpec, decay_slopes
from sala_kernels.warm_up import warm_up_lightning

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionImplBase
    from vllm.v1.kv_cache_interface import KVCacheSpec


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


class LightningMetadataBuilder(ShortConvAttentionMetadataBuilder):
    """Describe a step to all lightning layers of a cache group.

    A captured decode graph reads the tensors of its capture again at every replay, so each tensor of a batch is
    either vLLM's own persistent buffer or one of this builder's, refilled in place.

    NOTE: the base class is chosen for its name. vLLM tells how many drafts were accepted to builders of
    listed classes only, and this is the one that both of its model runners list and whose constructor asks
    nothing of the layers; everything that builds is overridden.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self.has_context = torch.zeros(max_num_seqs, dtype=torch.bool, device=device)
        self.initial_column = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        if device.type == "cuda":
            # the attribute's presence asks vLLM to find the slots of all groups in one kernel, each step
            self.mamba_aligned_state_indices: Tensor | None = None
            model, tp_size = vllm_config.model_config, get_tensor_model_parallel_world_size()
            spec: SalaSpec = model.hf_config.spec
            num_heads = spec.lightning_num_heads // tp_size
            warm_up_lightning(num_heads, spec.lightning_head_dim, model.dtype, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        *,
        num_accepted_tokens: Tensor | None = None,
        num_decode_draft_tokens_cpu: Tensor | None = None,
    ) -> StateBatch:
        """Find each sequence's state slots, and whether and where they hold its state yet.

        Args:
            common_prefix_len: unused.
            common_attn_metadata: the step.
            fast_build: unused.
            num_accepted_tokens: [seqs] int32, sampled by the sequence's last step; None without drafts.
            num_decode_draft_tokens_cpu: [seqs] int32, drafts to verify; -1 = tokens that cannot be rejected.
        """
        step = common_attn_metadata
        num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(
            step, self.reorder_batch_threshold
        )
        slots = getattr(self, "mamba_aligned_state_indices", None)
        if slots is None:
            slots = mamba_get_block_table_tensor(
                step.block_table_tensor,
                step.seq_lens,
                self.kv_cache_spec,
                self.vllm_config.cache_config.mamba_cache_mode,
            )
        slots = slots[: step.num_reqs, : 1 + self.num_spec_tokens]
        if num_decode_draft_tokens_cpu is not None:
            slots = _join_columns(slots, step.query_start_loc_cpu, num_decode_draft_tokens_cpu)
        has_context = self.has_context[: step.num_reqs]
        torch.gt(step.seq_lens, step.query_start_loc.diff(), out=has_context)
        initial_column = None
        if self.use_spec_decode:
            initial_column = self.initial_column[: step.num_reqs]
            if num_accepted_tokens is not None:
                # a step that sampled nothing was part of a prompt, and left its state in column 0
                torch.clamp(num_accepted_tokens - 1, min=0, out=initial_column)
        return StateBatch(
            query_start_loc=step.query_start_loc,
            state_slots=slots,
            has_context=has_context,
            max_query_len=step.max_query_len,
            initial_column=initial_column,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> StateBatch:
        """Describe a step to capture: the values are arbitrary, the tensors are those of every step."""
        return self.build(0, common_attn_metadata)


def _join_columns(slots: Tensor, query_start_loc_cpu: Tensor, num_drafts_cpu: Tensor) -> Tensor:
    """Give short prompt tails one column, since all their tokens count.

    They are among the decodes for their length, which write a column per token, and the next step starts from
    column 0. Also for tokens that a preempted sequence recomputes. No such step is captured.

    Args:
        slots: [seqs, columns] int32; not written.
        query_start_loc_cpu: [seqs + 1] int32.
        num_drafts_cpu: [seqs] int32, -1 for tokens that cannot be rejected.

    Returns:
        [seqs, columns] int32.
    """
    whole = (num_drafts_cpu < 0) & (query_start_loc_cpu.diff() > 1)
    if not whole.any():
        return slots
    return torch.where(whole.to(slots.device)[:, None], slots[:, :1], slots)


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

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """Describe the state as filling the page that it shares with a sparse layer's keys and values.

        vLLM 0.32 copies a block that requests share in part (copy on write) through the first of the two layers'
        views, so a view of the state alone would leave the end of the page behind: stale keys in whatever hits
        inside a block. Until vLLM copies whole pages.
        """
        spec = super().get_kv_cache_spec(vllm_config)
        assert isinstance(spec, MambaSpec)
        num_padding_bytes = spec.page_size_bytes - spec.state_content_size_bytes
        if num_padding_bytes == 0:
            return spec
        return replace(
            spec,
            shapes=(*spec.shapes, (num_padding_bytes,)),
            dtypes=(*spec.dtypes, torch.int8),
        )
