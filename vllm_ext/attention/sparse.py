"""Block-sparse attention for vLLM: backend, per-step metadata and the layer that owns the pages."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.distributed import (
    get_tensor_model_parallel_rank,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import KVCacheLayout

from sala_kernels.cache_write.op import write_cache
from sala_kernels.paged import PagedBatch, PagedCache, cell_elements, view_pages
from sala_kernels.sparse_attend.op import attend_blocks
from sala_kernels.sparse_index.op import select_blocks
from sala_kernels.spec import BLOCK_TOKENS, SparseSpec
from sala_kernels.warm_up import warm_up_sparse

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec


class SparseBackend(AttentionBackend):
    """Pages of 64 tokens that hold K, V and the key means (:mod:`sala_kernels.paged`)."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """Return the name the plugin registers the backend under."""
        return "SALA_SPARSE"

    @staticmethod
    def get_impl_cls() -> type[SparseImpl]:
        """Return the implementation class."""
        return SparseImpl

    @staticmethod
    def get_builder_cls() -> type[SparseMetadataBuilder]:
        """Return the metadata builder class."""
        return SparseMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int]:
        """Ask for 64-token pages: vLLM splits its own larger blocks into them."""
        return [BLOCK_TOKENS]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Keep a page's bytes of one head together, so that its parts are plain views."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Widen each token's cell by its share of the page's key means."""
        cell_bytes = cell_elements(spec.head_size) * get_dtype_size(spec.dtype)
        return dataclasses.replace(spec, state_content_bytes=cell_bytes)


class SparseMetadataBuilder(AttentionMetadataBuilder[PagedBatch]):
    """Describe a step to all sparse layers at once.

    The tensors are vLLM's own persistent buffers, so a captured decode graph sees each step's values.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # sequences with drafts to verify count as decodes
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        if device.type == "cuda":
            model, parallel = vllm_config.model_config, vllm_config.parallel_config
            spec, tp_size = model.hf_config.spec, parallel.tensor_parallel_size
            warm_up_sparse(
                spec.sparse,
                heads=spec.num_heads // tp_size,
                kv_heads=max(1, spec.num_kv_heads // tp_size),
                dim=spec.head_dim,
                max_seq_len=model.max_model_len,
                dtype=model.dtype,
                device=device,
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PagedBatch:
        """Take what the ops need; nothing is computed or copied to the host."""
        step = common_attn_metadata
        num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(
            step, self.reorder_batch_threshold
        )
        return PagedBatch(
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            block_table=step.block_table_tensor,
            max_query_len=step.max_query_len,
            max_seq_len=step.max_seq_len,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
        )


class SparseImpl(AttentionImpl[PagedBatch]):
    """One layer's calls into the ops, behind vLLM's attention operator."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        *unused: object,
        sparse: SparseSpec,
        ranks_per_kv_head: int,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.sparse = sparse
        self.ranks_per_kv_head = ranks_per_kv_head

    def forward(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: PagedCache,
        attn_metadata: PagedBatch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the new tokens, choose blocks, attend.

        Args:
            layer: unused.
            query: [tokens, heads, dim]; rows past the batch's tokens are padding.
            key: [tokens, kv_heads, dim].
            value: as ``key``.
            kv_cache: the layer's pages.
            attn_metadata: the step; None while vLLM measures memory, before pages exist.
            output: [tokens, heads, dim]; written.
            output_scale: unused (quantised outputs).
            output_block_scale: unused.

        Returns:
            ``output``.
        """
        if attn_metadata is None:
            return output.zero_()
        write_cache(key, value, kv_cache, attn_metadata)
        blocks = select_blocks(self._group(query), kv_cache, attn_metadata, self.sparse)
        return attend_blocks(query, kv_cache, attn_metadata, blocks, self.sparse, output)

    def _group(self, query: Tensor) -> Tensor:
        """Collect all query heads of this rank's KV heads, whose scores are summed before blocks are chosen.

        Ranks that share a KV head choose its blocks each for itself, from the same queries: windows are
        pooled and ranked after the sum, so partial results could be added per window only, which is as
        much traffic as there are keys.

        Args:
            query: [tokens, heads, dim] of this rank.

        Returns:
            [tokens, heads * ranks_per_kv_head, dim].
        """
        if self.ranks_per_kv_head == 1:
            return query
        everyone = tensor_model_parallel_all_gather(query.contiguous(), dim=1)
        heads = query.shape[1] * self.ranks_per_kv_head
        group = get_tensor_model_parallel_rank() // self.ranks_per_kv_head
        return everyone[:, group * heads :][:, :heads]


class SparseAttention(Attention):
    """vLLM's attention layer over SALA pages."""

    def __init__(self, *, sparse: SparseSpec, ranks_per_kv_head: int, **kwargs: Any) -> None:
        super().__init__(
            attn_backend=SparseBackend, sparse=sparse, ranks_per_kv_head=ranks_per_kv_head, **kwargs
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Keep named views of the pages: [pages, kv_heads, 64, cell elements].

        NOTE: a tuple on purpose. vLLM zeroes fresh blocks of caches that are tensors; its CPU runner
        does so with manager block numbers on 64-token pages and would wipe other requests' pages.
        """
        self.kv_cache = view_pages(kv_cache, self.head_size)
