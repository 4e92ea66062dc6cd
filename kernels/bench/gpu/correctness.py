"""Is what was timed right: selection against float64, greedy tokens of the demo checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpu.demo_text import text_ids
from gpu.environment import ROOT
from gpu.operators import Shapes
from gpu.settings import CHECKPOINT, FP8, RELEASED_CONFIG, SHARED_MEMORY_FRAC, Scale
from sala_kernels.cache_write.op import write_cache
from sala_kernels.paged import cell_elements, view_pages
from sala_kernels.sparse_index.op import select_blocks
from sala_kernels.spec import BLOCK_TOKENS, SalaSpec, SparseSpec
from sala_kernels.testing import paged_batch, shuffled_block_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gpu.results import Recorder
    from sala_training.model.sala import SalaForCausalLM

ENGINE_LIMIT_S = 150
SELECTION_QUERIES = 48
QUERY_TILE = 8
NUM_TOPICS = 48
GREEDY_TOKENS = 32


def topical_inputs(shapes: Shapes, context: int) -> tuple[Tensor, Tensor]:
    """Return the last queries and all keys: blocks have topics that queries ask for, as in tests/golden."""
    spec = shapes.spec
    topics = shapes.randn(NUM_TOPICS, spec.head_dim).float()

    def topic(*shape: int) -> Tensor:
        return topics[torch.randint(NUM_TOPICS, shape, device=shapes.device)]

    num_blocks = -(-context // BLOCK_TOKENS)
    block_topics = topic(num_blocks, spec.num_kv_heads).repeat_interleave(BLOCK_TOKENS, 0)
    noise = shapes.randn(context, spec.num_kv_heads, spec.head_dim)
    keys = (0.6 * noise + 0.5 * block_topics[:context]).to(shapes.dtype)
    width = (SELECTION_QUERIES, spec.num_heads)
    q = 0.8 * shapes.randn(*width, spec.head_dim) + 0.5 * topic(*width)
    return q.to(shapes.dtype), keys


def chosen_in_float64(
    q: Tensor, keys: Tensor, positions: Tensor, sparse: SparseSpec
) -> tuple[Tensor, Tensor]:
    """Brute force with every sum in float64; the roundings of the definition stay (means, group scores).

    Returns:
        [queries, kv_heads, blocks] bool: chosen; and [queries, blocks] bool: forced.
    """
    heads, dim = q.shape[1:]
    context, kv_heads = keys.shape[:2]
    grouped = q.double().unflatten(1, (kv_heads, heads // kv_heads)) * dim**-0.5

    def logits(window: int, stride: int) -> Tensor:
        means = keys.double().unfold(0, window, stride).mean(-1).to(keys.dtype).double()
        first = torch.arange(len(means), device=keys.device) * stride
        visible = first + window - 1 <= positions[:, None]
        products = torch.einsum("qghd,cgd->qghc", grouped, means)
        return products.masked_fill(~visible[:, None, None], -torch.inf)

    fine = logits(32, 16)
    probability = (fine - logits(128, 64).logsumexp(-1, keepdim=True)).exp_().sum(2)
    score = probability.clamp(max=torch.finfo(q.dtype).max).to(q.dtype).double()
    # block b is touched by windows 4b - 1 to 4b + 3
    num_blocks = -(-context // BLOCK_TOKENS)
    padded = torch.nn.functional.pad(score, (1, 4 * num_blocks - score.shape[-1]), value=-torch.inf)
    block_score = padded.unfold(-1, 5, 4).amax(-1)
    block, own = torch.arange(num_blocks, device=q.device), positions[:, None] // BLOCK_TOKENS
    forced = ((block < sparse.init_blocks) | (block >= own - sparse.local_blocks)) & (block <= own)
    block_score = block_score.masked_fill(forced[:, None], torch.inf)
    block_score = block_score.masked_fill((block > own)[:, None], -torch.inf)
    best = block_score.sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(block_score, dtype=torch.bool)
    chosen.scatter_(-1, best[..., : sparse.num_selected_blocks], True)
    return chosen & (block <= own)[:, None], forced


def selection_overlap(record: Recorder, shapes: Shapes, context: int) -> None:
    """Compare the last queries' blocks, chosen as a prompt step and one by one, with float64."""
    spec, device = shapes.spec, shapes.device
    sparse = replace(spec.sparse, dense_len=0)
    q, keys = topical_inputs(shapes, context)
    positions = torch.arange(context - len(q), context, device=device)
    table = shuffled_block_table([context], seed=1).to(device)
    cells = (table.numel(), spec.num_kv_heads, BLOCK_TOKENS, cell_elements(spec.head_dim))
    cache = view_pages(torch.zeros(cells, device=device, dtype=shapes.dtype), spec.head_dim)
    whole = shapes.to_device(paged_batch([context], [context], table))
    write_cache(keys, keys, cache, whole)

    prompt = shapes.to_device(paged_batch([len(q)], [context], table))
    lens = (positions + 1).tolist()
    one_by_one = paged_batch([1] * len(q), lens, table.expand(len(q), -1).contiguous())
    decodes = shapes.to_device(replace(one_by_one, num_decodes=len(q), num_decode_tokens=len(q)))
    expected = [
        chosen_in_float64(q_tile, keys, position_tile, sparse)
        for q_tile, position_tile in zip(
            q.split(QUERY_TILE), positions.split(QUERY_TILE), strict=True
        )
    ]
    chosen, forced = (torch.cat(parts) for parts in zip(*expected, strict=True))
    number = torch.arange(chosen.shape[-1], device=device)
    for way, batch in (("prompt step", prompt), ("decode", decodes)):
        blocks = select_blocks(q, cache, batch, sparse)
        ours = torch.stack([(row[..., None] == number).any(-2) for row in blocks])
        record.write(
            "selection",
            context=context,
            way=way,
            queries=len(q),
            overlap_frac=round(float((chosen & ours).sum() / chosen.sum()), 6),
            exact_sets_frac=round(float((chosen == ours).all(-1).float().mean()), 4),
            all_forced=bool((ours | ~forced[:, None]).all()),
            same_size=bool((chosen.sum(-1) == ours.sum(-1)).all()),
        )


@dataclass(frozen=True)
class EngineRun:
    """One engine whose greedy tokens are checked."""

    name: str
    dtype: str
    arguments: dict[str, Any]


def engine_runs(scale: Scale) -> list[EngineRun]:
    """Chunk sizes, batches and prefix hits; float32 must be exact, bfloat16 is compared in logits."""
    common = {
        "max_model_len": (max(scale.greedy_lengths) + 2048) // 64 * 64,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 2 << 30,
        "gpu_memory_utilization": SHARED_MEMORY_FRAC,
        "enforce_eager": scale.device == "cpu",
    }
    runs = [
        EngineRun("steps of 8192", "float32", common | {"max_num_batched_tokens": 8192}),
        EngineRun("steps of 1000", "float32", common | {"max_num_batched_tokens": 1000}),
        EngineRun("steps of 8192", "bfloat16", common | {"max_num_batched_tokens": 8192}),
    ]
    if scale.device == "cuda":  # vLLM has no 8-bit products on a CPU
        eight_bits = {"max_num_batched_tokens": 8192, "quantization": "fp8"}
        runs.append(EngineRun(FP8, "bfloat16", common | eight_bits))
    return runs


def greedy_equality(record: Recorder, scale: Scale, folder: Path, run: EngineRun) -> int:
    """Compare an engine's greedy tokens on the demo checkpoint with the plain PyTorch model's.

    The oracle sees the engine's own tokens before each step, so one difference does not cause others.

    Returns:
        Wrong tokens in float32; 0 in bfloat16, where roundings may differ.
    """
    from sala_training.checkpoint import load

    ids = text_ids(max(scale.greedy_lengths) + 60)
    first, *others = (ids[:length] for length in scale.greedy_lengths)
    # the second time and in the branch the document's beginning is cached
    branch = first[: len(first) - 100] + ids[-60:]
    batches = [[first], [first], [branch], [first, branch, *others]]
    job = {
        "engine": {"model": str(CHECKPOINT), "dtype": run.dtype, **run.arguments},
        "batches": batches,
        "sampling": {"max_tokens": GREEDY_TOKENS},
    }
    job_path, result_path = folder / "greedy-job.json", folder / "greedy-result.json"
    job_path.write_text(json.dumps(job))
    subprocess.run(
        [sys.executable, ROOT / "tests/engine/generate.py", job_path, result_path],
        check=True,
        timeout=ENGINE_LIMIT_S,
    )
    outputs = json.loads(result_path.read_text())["batches"]
    model = load(CHECKPOINT, torch.float32).to(scale.device)
    num_wrong, num_tokens, gap, cached = 0, 0, 0.0, []
    for batch, answers in zip(batches, outputs, strict=True):
        for prompt, answer in zip(batch, answers, strict=True):
            gaps = greedy_gaps(model, prompt, answer["tokens"])
            num_wrong += int((gaps > 0).sum())
            num_tokens += len(gaps)
            gap = max(gap, float(gaps.max()))
            cached.append(answer["cached"])
    record.write(
        "greedy",
        run=run.name,
        dtype=run.dtype,
        tokens=num_tokens,
        mismatches=num_wrong,
        mismatch_frac=round(num_wrong / num_tokens, 5),
        largest_logit_gap=round(gap, 5),
        cached_tokens=cached,
        prompt_tokens=[[len(prompt) for prompt in batch] for batch in batches],
    )
    return num_wrong if run.dtype == "float32" else 0


@torch.no_grad()
def greedy_gaps(model: SalaForCausalLM, prompt: list[int], tokens: list[int]) -> Tensor:
    """Return how far below the model's best logit each generated token's is; 0 where it is the best."""
    device = next(model.parameters()).device
    logits = model(torch.tensor([prompt + tokens], device=device))[0, len(prompt) - 1 : -1].float()
    of_token = logits.gather(1, torch.tensor(tokens, device=device)[:, None]).squeeze(1)
    return (logits.amax(-1) - of_token).cpu()


def run(record: Recorder, scale: Scale, folder: Path) -> int:
    """Check everything; return how much is wrong. One failing part does not hide the others."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    config = json.loads(RELEASED_CONFIG.read_text()) | scale.sala_overrides
    shapes = Shapes(SalaSpec.from_config(config), scale.device, getattr(torch, scale.dtype))
    num_wrong = 0
    with torch.inference_mode():
        for context in scale.selection_lengths:
            num_wrong += _guarded(record, "selection", selection_overlap, shapes, context)
    if scale.device == "cuda":
        torch.cuda.empty_cache()
    for engine in engine_runs(scale):
        num_wrong += _guarded(record, "greedy", greedy_equality, scale, folder, engine)
    return num_wrong


def _guarded(
    record: Recorder, name: str, check: Callable[..., int | None], *arguments: object
) -> int:
    try:
        return check(record, *arguments) or 0
    except Exception as error:  # noqa: BLE001
        record.write(name, failed=f"{type(error).__name__}: {error}"[:500])
        return 1
