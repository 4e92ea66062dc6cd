"""Print how many kernels the warm-up compiles, then the name of each that prompts of any kind compile beside them."""

import contextlib
import sys

import torch

from sala_kernels import warm_up
from sala_kernels.cache_write import triton_impl as cache_write
from sala_kernels.compile_only import compile_only
from sala_kernels.lightning import triton_impl as lightning
from sala_kernels.lightning.op import StateBatch
from sala_kernels.paged import PagedBatch, cell_elements, view_pages
from sala_kernels.sparse_attend import triton_impl as sparse_attend
from sala_kernels.sparse_index import triton_impl as sparse_index
from sala_kernels.spec import SparseSpec

HEADS, KV_HEADS, DIM, MAX_SEQ_LEN = 32, 2, 128, 160 * 1024
SPARSE = SparseSpec(topk=64, window_tokens=2048, init_blocks=1, dense_len=8192)
WIDTH = (HEADS + 2 * KV_HEADS) * DIM


def sparse_step(lens: list[int], news: list[int]) -> None:
    """A step of prompts as the engine describes it, pages and queries as vLLM lays them out."""
    starts = torch.tensor([0, *news]).cumsum(0).to(torch.int32)
    table = torch.zeros(len(lens), 4096, dtype=torch.int32)
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    batch = PagedBatch(starts, seq_lens, table, max(news), max(lens))
    cells = torch.empty(8, KV_HEADS, 64, cell_elements(DIM), dtype=torch.bfloat16)
    cache = view_pages(cells, DIM)
    packed = torch.empty(sum(news), WIDTH, dtype=torch.bfloat16)
    parts = packed.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, DIM)) for part in parts)
    output = torch.empty(sum(news), HEADS, DIM, dtype=torch.bfloat16)
    cache_write.write_cache(k, v, cache, batch)
    blocks = sparse_index.select_blocks(q, cache, batch, SPARSE)
    sparse_attend.attend_blocks(q, cache, batch, blocks, SPARSE, output)


def lightning_step(news: list[int], num_decodes: int = 0) -> None:
    """The same of a lightning layer: q, k and v beside the gate, states in padded pages; decodes come first."""
    starts = torch.tensor([0, *news]).cumsum(0).to(torch.int32)
    packed = torch.empty(sum(news), 4, HEADS, DIM, dtype=torch.bfloat16)
    state = torch.empty(9, 544_768)[:, : HEADS * DIM * DIM].view(9, HEADS, DIM, DIM)
    slots = torch.zeros(len(news), 1, dtype=torch.int32)
    has_context = torch.ones(len(news), dtype=torch.bool)
    batch = StateBatch(
        starts,
        slots,
        has_context,
        max(news),
        num_decodes=num_decodes,
        num_decode_tokens=sum(news[:num_decodes]),
    )
    q, k, v, _ = packed.unbind(1)
    lightning.lightning_attention(q, k, v, torch.ones(HEADS), 1.0, state, batch)


def use_triton() -> None:
    """The warm-up calls the checked operators, which would choose PyTorch for tensors on the CPU."""
    warm_up.write_cache = cache_write.write_cache
    warm_up.select_blocks = sparse_index.select_blocks
    warm_up.attend_blocks = sparse_attend.attend_blocks
    warm_up.lightning_attention = lightning.lightning_attention


def main() -> None:
    use_triton()
    cpu = torch.device("cpu")
    with contextlib.ExitStack() as stack:
        kernels = stack.enter_context(compile_only())
        warm_up.warm_up_sparse(SPARSE, HEADS, KV_HEADS, DIM, MAX_SEQ_LEN, torch.bfloat16, cpu)
        warm_up.warm_up_lightning(HEADS, DIM, torch.bfloat16, cpu)
        num_warmed = len(kernels)
        for length, new in (
            (500, 500),
            (8192, 8192),
            (9001, 101),
            (70_000, 2048),
            (150_000, 17),
            (150_000, 16_384),
        ):
            sparse_step([length], [new])
            lightning_step([new])
        sparse_step([300, 12_000, 64], [300, 1000, 64])
        lightning_step([300, 1000, 64])
        for num_decodes in (1, 2, 3):
            lightning_step([*[1] * num_decodes, 1000, 64], num_decodes)
    # those of decodes are compiled when their graphs are captured
    late = [kernel.name for kernel in kernels[num_warmed:] if "decode" not in kernel.name]
    sys.stdout.write("\n".join([str(num_warmed), *late]) + "\n")


if __name__ == "__main__":
    main()
