"""The operators at the released shape: inputs, what each must move and compute, gate and rival."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpu.timing import copies_beyond_l2
from sala_kernels.cache_write.op import write_cache
from sala_kernels.lightning.op import StateBatch, lightning_attention
from sala_kernels.lightning.reference import lightning_recurrent
from sala_kernels.paged import PagedBatch, cell_elements, view_pages
from sala_kernels.sparse_attend import reference as attend_reference
from sala_kernels.sparse_attend.op import attend_blocks
from sala_kernels.sparse_index import reference as index_reference
from sala_kernels.sparse_index.op import select_blocks
from sala_kernels.spec import BLOCK_TOKENS, SalaSpec, decay_slopes
from sala_kernels.testing import paged_batch, relative_rms, shuffled_block_table

if TYPE_CHECKING:
    from collections.abc import Iterator


Call = Callable[[], object]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative RMS error at which a gate is red; the kernel tests hold tighter ones."""
WRONG_SETS_BOUND = 1e-3
GATE_QUERIES = 8
DENSE_LEN = 8192
COHERENT_TOKENS = 128
"""Neighbouring queries that look for the same thing, in the inputs called coherent."""
# one layer, milliseconds, SGLang 0.5.23 on another machine of this kind; keys: operator, is decode
SGLANG_MS: dict[tuple[str, bool], dict[int, float]] = {
    ("select_blocks", False): {65536: 2.7 + 0.7, 262144: 10.4 + 1.3, 1048576: 41.9 + 3.6},
    ("select_blocks", True): {65536: 0.17, 262144: 0.51, 1048576: 2.03},
    ("attend_blocks", False): {65536: 11.2, 262144: 10.9, 1048576: 11.9},
}
SGLANG_LIGHTNING_MS = 0.6
FLA = "flash-linear-attention"


@dataclass
class Case:
    """One operator on one shape."""

    op: str
    folder: str
    """Where its implementation is, under ``sala_kernels``."""
    shape: dict[str, Any]
    calls: list[Call]
    """The same work on inputs that do not fit the L2 cache together."""
    num_bytes: int
    """Every input and output once."""
    num_flops: int
    gate: Callable[[], tuple[float, float]] | None = None
    """Returns the error and its bound."""
    rivals: dict[str, list[Call]] = field(default_factory=dict)
    published_ms: float | None = None


@dataclass(frozen=True)
class Shapes:
    """Where and of what size."""

    spec: SalaSpec
    device: str
    dtype: torch.dtype

    def randn(self, *shape: int) -> Tensor:
        """Standard normal values in the model's dtype."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def num_copies(self, touched_bytes: int, limit: int = 64) -> int:
        """Count the input sets to rotate over, of a call that touches ``touched_bytes``."""
        return 2 if self.device == "cpu" else copies_beyond_l2(touched_bytes, limit)

    def to_device(self, batch: PagedBatch) -> PagedBatch:
        """Copy a batch's tensors."""
        names = ("query_start_loc", "seq_lens", "block_table")
        return replace(batch, **{name: getattr(batch, name).to(self.device) for name in names})


class Pool:
    """Sequences of one length in a shuffled paged cache, and the contiguous K and V of the first."""

    def __init__(self, shapes: Shapes, num_seqs: int, context: int) -> None:
        self.shapes, self.context = shapes, context
        spec = shapes.spec
        self.table = shuffled_block_table([context] * num_seqs, seed=0).to(shapes.device)
        cells = (self.table.numel(), spec.num_kv_heads, BLOCK_TOKENS, cell_elements(spec.head_dim))
        self.cache = view_pages(
            torch.zeros(cells, device=shapes.device, dtype=shapes.dtype), spec.head_dim
        )
        width = (context, spec.num_kv_heads, spec.head_dim)
        self.keys, self.values = shapes.randn(*width), shapes.randn(*width)
        for row in reversed(range(num_seqs)):
            if row:
                keys, values = shapes.randn(*width), shapes.randn(*width)
            else:
                keys, values = self.keys, self.values
            write_cache(keys, values, self.cache, self.batch([row], context))

    def batch(self, rows: list[int], new: int) -> PagedBatch:
        """Describe a step in which the last ``new`` tokens of each of ``rows`` are new."""
        table = self.table[rows[0] : rows[-1] + 1]
        batch = paged_batch([new] * len(rows), [self.context] * len(rows), table)
        decodes = len(rows) if new == 1 else 0
        return self.shapes.to_device(replace(batch, num_decodes=decodes, num_decode_tokens=decodes))


def lightning_case(shapes: Shapes, seqs: int, tokens: int) -> Case:
    """A chunk that continues a state, or one token each of a batch."""
    spec = shapes.spec
    heads, dim = spec.lightning_num_heads, spec.lightning_head_dim
    is_decode = tokens == 1
    slopes = torch.tensor(decay_slopes(heads), device=shapes.device)
    state_bytes = 2 * seqs * heads * dim * dim * 4
    copies = shapes.num_copies(state_bytes) if is_decode else 1
    q, k, v = shapes.randn(3, seqs * tokens, heads, dim).unbind()
    state = torch.randn(copies * seqs, heads, dim, dim, device=shapes.device)
    before = state[:seqs].clone()

    def batch(copy: int) -> StateBatch:
        slots = torch.arange(copy * seqs, (copy + 1) * seqs, dtype=torch.int32)
        return StateBatch(
            (torch.arange(seqs + 1, dtype=torch.int32) * tokens).to(shapes.device),
            slots[:, None].to(shapes.device),
            torch.ones(seqs, dtype=torch.bool, device=shapes.device),
            tokens,
            num_decodes=seqs if is_decode else 0,
            num_decode_tokens=seqs if is_decode else 0,
        )

    def call(copy: int) -> Call:
        described = batch(copy)
        return lambda: lightning_attention(q, k, v, slopes, spec.lightning_scale, state, described)

    packed = [x.unflatten(0, (seqs, tokens)) for x in (q, k, v)]
    rivals = {}
    if simple_gla := flash_linear_attention(is_decode):

        def rival(before: Tensor) -> tuple[Tensor, Tensor]:
            return simple_gla(
                *packed,
                g_gamma=-slopes,
                scale=spec.lightning_scale,
                initial_state=before,
                output_final_state=True,
            )

        states = state.split(seqs)
        rivals[FLA] = [partial(rival, states[copy]) for copy in range(copies)]

    def gate() -> tuple[float, float]:
        state[:seqs] = before
        got = calls[0]()
        assert isinstance(got, Tensor)
        expected, after = lightning_recurrent(
            packed[0], packed[1], packed[2], slopes, spec.lightning_scale, before
        )
        output_error = relative_rms(got, expected.flatten(0, 1))
        if rivals and relative_rms(rival(before)[0], expected) > BOUND[shapes.dtype]:
            rivals.clear()  # no time for what is wrong
        return max(output_error, relative_rms(state[:seqs], after)), BOUND[shapes.dtype]

    calls = [call(copy) for copy in range(copies)]
    per_head = 5 * dim * dim if is_decode else 4 * dim * (dim + 64)
    return Case(
        "lightning decode" if is_decode else "lightning prefill",
        "lightning",
        {"sequences": seqs, "new_tokens": tokens},
        calls,
        4 * q.numel() * q.element_size() + state_bytes,
        seqs * tokens * heads * per_head,
        gate,
        rivals=rivals,
        published_ms=None if is_decode else SGLANG_LIGHTNING_MS,
    )


def sparse_cases(shapes: Shapes, context: int, seqs: int, new: int) -> Iterator[Case]:
    """The operators of a sparse layer: the last chunk of a long prompt, or one token each of a batch."""
    spec = shapes.spec
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    element_bytes = shapes.dtype.itemsize
    sparse = replace(spec.sparse, dense_len=0)
    is_decode = new == 1
    tokens = seqs * new
    shape = {"context": context, "sequences": seqs, "new_tokens": new}
    step = "decode" if is_decode else "prefill"

    attended = min(sparse.num_selected_blocks * BLOCK_TOKENS, context)
    attended_bytes = 2 * seqs * kv_heads * attended * dim * element_bytes
    copies = shapes.num_copies(attended_bytes, limit=24) if is_decode else 1
    pool = Pool(shapes, copies * seqs, context)
    rows = [list(range(i * seqs, (i + 1) * seqs)) for i in range(copies)]
    batches = [pool.batch(row, new) for row in rows]
    cache = pool.cache
    q = 2 * shapes.randn(tokens, heads, dim)
    positions = torch.arange(context - new, context, device=shapes.device)

    new_keys, new_values = (
        x[-new:].repeat(seqs, 1, 1).contiguous() for x in (pool.keys, pool.values)
    )

    def write_gate() -> tuple[float, float]:
        pages = pool.table[0].long()
        stored = cache.keys[pages].transpose(1, 2).flatten(0, 1)[:context]
        if not torch.equal(stored, pool.keys):
            return math.inf, 0.0
        windows = index_reference.compress_keys(pool.keys, 32, 16)
        means = cache.fine_means[pages].transpose(1, 2).flatten(0, 1)[1 : len(windows) + 1]
        return relative_rms(means, windows), BOUND[shapes.dtype]

    written = tokens * kv_heads * dim
    yield Case(
        f"cache_write {step}",
        "cache_write",
        shape,
        [
            lambda batch=batch: write_cache(new_keys, new_values, cache, batch)  # type: ignore[misc]
            for batch in batches
        ],
        int(element_bytes * written * (4 + 2 + 2 + 5 / 64)),
        4 * written,
        write_gate,
    )

    selected = [select_blocks(q, cache, batch, sparse) for batch in batches]
    last = slice(-min(GATE_QUERIES, new), None)

    def as_mask(blocks: Tensor) -> Tensor:
        number = torch.arange(-(-context // BLOCK_TOKENS), device=shapes.device)
        return (blocks[..., None] == number).any(-2)

    def select_gate() -> tuple[float, float]:
        # the first sequence is the one whose contiguous keys are known
        ours = select_blocks(q, cache, batches[0], sparse)[:new][last]
        expected = index_reference.select_blocks(q[:new][last], pool.keys, positions[last], sparse)
        missed = (expected & ~as_mask(ours)).sum() / expected.sum()
        return float(missed), WRONG_SETS_BOUND

    mean_context = context - new // 2
    means_bytes = int(seqs * 5 / 64 * context * kv_heads * dim * element_bytes)
    yield Case(
        f"select_blocks {step}",
        "sparse_index",
        shape,
        [
            lambda batch=batch: select_blocks(q, cache, batch, sparse)  # type: ignore[misc]
            for batch in batches
        ],
        q.numel() * element_bytes + means_bytes + 4 * selected[0].numel(),
        int(10 / 64 * tokens * mean_context * heads * dim),
        select_gate,
        published_ms=SGLANG_MS["select_blocks", is_decode].get(context) if seqs == 1 else None,
    )

    def attend_gate() -> tuple[float, float]:
        ours = attend_blocks(q, cache, batches[0], selected[0], sparse)[:new][last]
        expected = attend_reference.attend_blocks(
            q[:new][last].float(),
            pool.keys.float(),
            pool.values.float(),
            positions[last],
            as_mask(selected[0][:new][last]),
        )
        return relative_rms(ours, expected), BOUND[shapes.dtype]

    rivals = {}
    if seqs == 1 and (dense := dense_attention(q, pool.keys, pool.values)):
        rivals["dense FlashAttention 3, contiguous"] = [dense]
    inputs = {"independent": (q, selected)}
    if not is_decode:
        topics = 2 * shapes.randn(-(-new // COHERENT_TOKENS), heads, dim)
        coherent = topics.repeat_interleave(COHERENT_TOKENS, 0)[:new] + 0.2 * shapes.randn(
            new, heads, dim
        )
        inputs["coherent"] = coherent, [select_blocks(coherent, cache, batches[0], sparse)]
    for kind, (queries, blocks) in inputs.items():
        touched = attended_bytes
        if not is_decode:
            distinct = sum(
                int((b := blocks[0][:, h])[b >= 0].unique().numel()) for h in range(kv_heads)
            )
            touched = 2 * distinct * BLOCK_TOKENS * dim * element_bytes
        yield Case(
            f"attend_blocks {step}",
            "sparse_attend",
            shape | {"queries": kind},
            [
                lambda batch=batch, chosen=chosen, queries=queries: attend_blocks(  # type: ignore[misc]
                    queries, cache, batch, chosen, sparse
                )
                for batch, chosen in zip(batches, blocks, strict=False)
            ],
            2 * q.numel() * element_bytes + touched + 4 * blocks[0].numel(),
            4 * tokens * attended * heads * dim,
            attend_gate if kind == "independent" else None,
            rivals if kind == "independent" else {},
            SGLANG_MS.get(("attend_blocks", is_decode), {}).get(context) if seqs == 1 else None,
        )


def dense_prompt_case(shapes: Shapes, tokens: int) -> Case:
    """The start of every prompt: all tokens below ``dense_len``, attention over everything."""
    spec = shapes.spec
    pool = Pool(shapes, 1, tokens)
    batch = pool.batch([0], tokens)
    q = shapes.randn(tokens, spec.num_heads, spec.head_dim)
    sparse = replace(spec.sparse, dense_len=tokens + 1)
    width = sparse.num_selected_blocks
    none = torch.full(
        (tokens, spec.num_kv_heads, width), -1, dtype=torch.int32, device=shapes.device
    )
    dense = dense_attention(q, pool.keys, pool.values)
    return Case(
        "attend_blocks dense prompt",
        "sparse_attend",
        {"context": tokens, "sequences": 1, "new_tokens": tokens},
        [lambda: attend_blocks(q, pool.cache, batch, none, sparse)],
        2 * (q.numel() + pool.keys.numel()) * shapes.dtype.itemsize,
        4 * tokens * tokens // 2 * spec.num_heads * spec.head_dim,
        rivals={"dense FlashAttention 3, contiguous": [dense]} if dense else {},
    )


def flash_linear_attention(is_decode: bool) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Linear attention with a constant decay a head, of the library that is not required; None without it."""
    try:
        from fla.ops import simple_gla
    except ImportError:
        return None
    return simple_gla.fused_recurrent_simple_gla if is_decode else simple_gla.chunk_simple_gla


def dense_attention(q: Tensor, keys: Tensor, values: Tensor) -> Call | None:
    """Causal attention of the last queries over all keys by FlashAttention 3; None where it is not."""
    if q.device.type != "cuda":
        return None
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    starts = [torch.tensor([0, len(x)], dtype=torch.int32, device=q.device) for x in (q, keys)]

    def call() -> object:
        return flash_attn_varlen_func(
            q,
            keys,
            values,
            max_seqlen_q=len(q),
            cu_seqlens_q=starts[0],
            max_seqlen_k=len(keys),
            cu_seqlens_k=starts[1],
            causal=True,
            fa_version=3,
        )

    return call
