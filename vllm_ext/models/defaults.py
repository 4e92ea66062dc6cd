"""Engine settings that suit SALA, where the user leaves vLLM's defaults in place."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from sala_kernels.spec import BLOCK_TOKENS, LayerKind

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from sala_kernels.spec import SalaSpec

SCHEDULER = "vllm_ext.scheduler.sala_scheduler"
MIN_BLOCK_TOKENS = 128
SNAPSHOT_INTERVAL_TOKENS = 65_536
"""At 9B a snapshot takes 3 blocks of 2,048 tokens, so these take 3/32 (9.4 %) of the memory of the keys."""
INTERVAL_KEY = "sala_snapshot_interval_tokens"
"""In ``--additional-config``, to choose 0 (none), which vLLM cannot tell from its own default."""


def set_defaults(vllm_config: VllmConfig) -> None:
    """Choose the scheduler, the block size and which states are kept, unless the user has."""
    if vllm_config.scheduler_config.scheduler_cls is None:
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER

    model, cache = vllm_config.model_config, vllm_config.cache_config
    dtype = STR_DTYPE_TO_TORCH_DTYPE.get(cache.cache_dtype, model.dtype)
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    min_tokens = min_block_tokens(model.hf_config.spec, dtype.itemsize, tp_size)
    if not cache.user_specified_block_size:
        block = MIN_BLOCK_TOKENS
        while block < min_tokens:
            block *= 2
        cache.block_size = block
        # else the platform would replace it
        cache.user_specified_block_size = True
    if not cache.enable_prefix_caching:
        return
    if cache.prefix_match_unit is None:
        cache.prefix_match_unit = BLOCK_TOKENS
    if cache.prefix_cache_retention_interval == 0:
        interval = vllm_config.additional_config.get(INTERVAL_KEY)
        if interval is None:
            # vLLM raises a block size that cannot hold a state to a multiple of itself
            block = cache.block_size * math.ceil(min_tokens / cache.block_size)
            interval = math.ceil(SNAPSHOT_INTERVAL_TOKENS / block) * block
        cache.prefix_cache_retention_interval = interval


def min_block_tokens(spec: SalaSpec, element_bytes: int, tp_size: int = 1) -> int:
    """Return the fewest tokens whose keys and values in one layer of a rank take the memory of its state.

    vLLM's blocks must hold either. The plugin takes the next power of two, 2,048 at 9B in bfloat16: chunks end at
    blocks, so that a step of 8,192 tokens wastes nothing.
    """
    num_sparse = spec.layer_kinds.count(LayerKind.SPARSE)
    num_lightning = spec.layer_kinds.count(LayerKind.LIGHTNING)
    # ranks beyond the number of KV heads repeat them
    num_kv_splits = min(tp_size, spec.num_kv_heads)
    state_bytes = spec.state_bytes_per_request() / num_lightning / tp_size
    token_bytes = spec.kv_bytes_per_token(element_bytes) / num_sparse / num_kv_splits
    return math.ceil(state_bytes / token_bytes)
