"""The recipes: one function, one full configuration."""

from __future__ import annotations

from typing import Any

from sala_kernels.spec import LayerKind
from sala_training.config import Optim, Recipe, Stage


def demo_model() -> dict[str, Any]:
    """Return ``config.json`` of the shipped demo checkpoint: 14.7M parameters, released form.

    A quarter of the layers is sparse, at positions that are not periodic, the first one included;
    ``sparse_config`` and the muP scalings are the released ones, the widths are small.
    """
    sparse_layers = (0, 5, 9)
    num_layers = 12
    kinds = [
        LayerKind.SPARSE if i in sparse_layers else LayerKind.LIGHTNING for i in range(num_layers)
    ]
    return {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 576,
        "num_hidden_layers": num_layers,
        "mixer_types": [kind.value for kind in kinds],
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "lightning_nh": 8,
        "lightning_nkv": 8,
        "lightning_head_dim": 64,
        "lightning_scale": "1/sqrt(d)",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 131072,
        "attn_use_rope": False,
        "lightning_use_rope": True,
        "qk_norm": True,
        "use_output_norm": True,
        "use_output_gate": True,
        "attn_use_output_gate": True,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 64,
        "initializer_range": 0.1,
        "sparse_config": {
            "kernel_size": 32,
            "kernel_stride": 16,
            "init_blocks": 1,
            "block_size": 64,
            "window_size": 2048,
            "topk": 64,
            "use_nope": False,
            "dense_len": 8192,
        },
        "dtype": "bfloat16",
    }


def demo() -> Recipe:
    """Return the recipe of the shipped demo checkpoint (one H200, under 20 minutes)."""
    return Recipe(
        model=demo_model(),
        stages=(
            Stage(length_tokens=1024, num_steps=2000, recall_frac=0.4),
            Stage(length_tokens=4096, num_steps=500, recall_frac=0.5),
            Stage(length_tokens=16384, num_steps=350, recall_frac=0.6),
            Stage(length_tokens=16384, num_steps=250, recall_frac=0.7, sparse=True),
        ),
    )


def tiny() -> Recipe:
    """Return the demo's recipe in miniature: every stage on a CPU in seconds, for the tests."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 16}
    heads = {
        "num_attention_heads": 4,
        "lightning_nh": 4,
        "lightning_nkv": 4,
        "lightning_head_dim": 16,
    }
    mixers = [LayerKind.SPARSE, LayerKind.LIGHTNING, LayerKind.LIGHTNING, LayerKind.LIGHTNING]
    model = demo_model() | small | heads | {"mixer_types": [kind.value for kind in mixers]}
    model["sparse_config"] = model["sparse_config"] | {
        "window_size": 64,
        "topk": 3,
        "dense_len": 128,
    }
    return Recipe(
        model=model,
        stages=(
            Stage(length_tokens=256, num_steps=20),
            Stage(length_tokens=512, num_steps=10, sparse=True),
        ),
        optim=Optim(warmup_steps=5),
        batch_tokens=1024,
        save_every_s=5.0,
        log_every_steps=5,
    )


RECIPES = {"demo": demo, "tiny": tiny}
