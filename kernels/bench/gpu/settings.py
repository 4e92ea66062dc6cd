"""Everything a reader could want to change: models, engine arguments, lengths, repeats, time limits."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpu.environment import ROOT
from gpu.random_weights import LOAD_FORMAT

if TYPE_CHECKING:
    from pathlib import Path

K = 1024
RELEASED_CONFIG = ROOT / "tests/golden/released_config.json"
CHECKPOINT = ROOT / "training/demo/checkpoint"
TPOT_TOKENS = 64
"""Tokens after the first over which the time per output token is averaged."""
FP8 = "fp8 weights"
"""Name of the run of the correctness stage whose weights are quantised."""
SHARED_MEMORY_FRAC = 0.4
"""Of the GPU's memory that an engine of a small model may claim: tests may run beside it."""
QUESTION_TOKENS = 60
"""Tail in which questions on a shared document differ."""
SHORT_TOKENS = 500
SHORT_OUTPUT_TOKENS = 16
"""A short request beside a long prefill."""

STAGE_LIMIT_S = {
    "kernels": 300,
    "correctness": 300,
    "tests": 420,
    "sala": 540,
    "full-attention": 420,
    "serving": 300,
    "ngram": 180,
    "needle": 300,
    "offload": 480,
}
"""Stages in the order they run; each fits a host that ends a command after ten minutes."""
OPTIONAL_STAGES = ("offload",)
"""Run when they are named: no bar is set for them."""

FULL_ATTENTION_CONFIG: dict[str, Any] = {  # Qwen3-8B
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


@dataclass(frozen=True)
class Scale:
    """One size of the whole benchmark."""

    device: str
    dtype: str
    lengths: dict[int, int]
    """Prompt tokens -> requests timed, on SALA."""
    full_attention_lengths: dict[int, int]
    warm_up_tokens: tuple[int, ...]
    long_tokens: int
    """Prompt of the prefill beside which short requests arrive."""
    batch: tuple[int, int]
    """Requests and prompt tokens of the decode throughput."""
    num_arrivals: int
    kernel_contexts: tuple[int, ...]
    kernel_step_tokens: int
    """New tokens of a prefill step."""
    selection_lengths: tuple[int, ...]
    greedy_lengths: tuple[int, ...]
    needle_lengths: dict[int, int]
    """Prompt tokens -> questions."""
    sala_overrides: dict[str, Any] = field(default_factory=dict)
    full_attention_overrides: dict[str, Any] = field(default_factory=dict)
    common_engine: dict[str, Any] = field(default_factory=dict)
    sala_engine: dict[str, Any] = field(default_factory=dict)
    one_request_engine: dict[str, Any] = field(default_factory=dict)
    """More SALA arguments where requests are timed one after another."""
    full_attention_engine: dict[str, Any] = field(default_factory=dict)

    @property
    def max_model_len(self) -> int:
        """Served context: the longest prompt and its output, a whole number of 2,048-token blocks."""
        longest = max(*self.lengths, self.long_tokens, self.batch[1])
        return (longest + 2048) // 2048 * 2048

    def sala_arguments(self, folder: Path, one_request: bool = False) -> dict[str, Any]:
        """Write the released shape's config.json; return the engine arguments that serve it."""
        config = json.loads(RELEASED_CONFIG.read_text()) | self.sala_overrides
        config["max_position_embeddings"] = max(
            self.max_model_len, config["max_position_embeddings"]
        )
        model = _write_config(folder / "sala", config)
        arguments = {"max_model_len": self.max_model_len} | self.common_engine
        arguments |= self.sala_engine | (self.one_request_engine if one_request else {})
        return {"model": model, "dtype": self.dtype, "load_format": LOAD_FORMAT} | arguments

    def full_attention_arguments(self, folder: Path) -> dict[str, Any]:
        """The same for the full-attention yardstick."""
        max_model_len = max(self.full_attention_lengths) + 2048
        config = FULL_ATTENTION_CONFIG | self.full_attention_overrides
        model = _write_config(folder / "full", config | {"max_position_embeddings": max_model_len})
        arguments = {"max_model_len": max_model_len} | self.common_engine
        arguments |= {"enable_prefix_caching": False} | self.full_attention_engine
        return {"model": model, "dtype": self.dtype, "load_format": LOAD_FORMAT} | arguments


def _write_config(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return str(folder)


H200 = Scale(
    device="cuda",
    dtype="bfloat16",
    lengths={16 * K: 3, 64 * K: 2, 128 * K: 1, 256 * K: 1, 512 * K: 1, 1024 * K: 1},
    full_attention_lengths={16 * K: 2, 64 * K: 1, 128 * K: 1, 256 * K: 1, 512 * K: 1},
    warm_up_tokens=(20_000, 40_000),
    long_tokens=1024 * K,
    batch=(16, 128 * K),
    num_arrivals=12,
    kernel_contexts=(64 * K, 256 * K, 1024 * K),
    kernel_step_tokens=8192,
    selection_lengths=(8 * K, 64 * K, 1024 * K),
    greedy_lengths=(9001, 12_345, 16_000),
    needle_lengths={64 * K: 20, 256 * K: 10, 1024 * K: 10},
    common_engine={"skip_tokenizer_init": True, "gpu_memory_utilization": 0.92},
    # a whole number of blocks, and room for the tokens of running answers
    sala_engine={"max_num_batched_tokens": 8192 + 256, "max_num_seqs": 16},
    # the steps that suit each when it has the GPU to itself
    one_request_engine={
        "max_num_batched_tokens": 16384,
        "additional_config": {"sala_scheduler": {"quiet_s": 0, "long_chunk_tokens": 16384}},
    },
    full_attention_engine={
        # the start of a long prefill is not compiled (mode 0): compiled or not, TTFT is the same there
        "max_num_batched_tokens": 16384,
        "max_num_seqs": 16,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    },
)

_TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MINIATURE = Scale(
    device="cpu",
    dtype="float32",
    lengths={600: 2, 1500: 1},
    full_attention_lengths={600: 2, 1500: 1},
    warm_up_tokens=(100,),
    long_tokens=1500,
    batch=(3, 600),
    num_arrivals=3,
    kernel_contexts=(1024,),
    kernel_step_tokens=128,
    selection_lengths=(1024,),
    greedy_lengths=(300,),
    needle_lengths={1000: 2},
    sala_overrides=_TINY
    | {
        "lightning_nh": 4,
        "lightning_nkv": 4,
        "lightning_head_dim": 32,
        "mixer_types": ["minicpm4", "lightning-attn", "lightning-attn", "minicpm4"],
        "sparse_config": {
            "kernel_size": 32,
            "kernel_stride": 16,
            "init_blocks": 1,
            "block_size": 64,
            "window_size": 128,
            "topk": 3,
            "use_nope": False,
            "dense_len": 512,
        },
    },
    full_attention_overrides=_TINY,
    common_engine={
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
    },
    sala_engine={"max_num_batched_tokens": 256, "max_num_seqs": 8},
    full_attention_engine={"max_num_batched_tokens": 256, "max_num_seqs": 8},
)
"""The same stages on a CPU with a tiny model: shows that the benchmark runs, not how fast anything is."""

SCALES = {"h200": H200, "miniature": MINIATURE}
