"""SALA written once more, from the published formulas, in float64 numpy: one token, one head at a time.

Shares no code with the model under test. ``error`` plants one mistake, so that a test can show that its
tolerance would catch it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

ERRORS = (
    "slopes differ by layer",
    "output norm after the gate",
    "output norm per head",
    "no QK-norm in lightning layers",
    "rotation pairs neighbours",
    "no rotation in lightning layers",
    "rotation in sparse layers",
    "QK-norm in sparse layers",
    "gate reads the residual stream",
    "no gate in sparse layers",
    "embedding not scaled",
    "branches not scaled",
    "logits not divided",
    "state decays the current token",
    "selection starts one token late",
    "one local block short",
    "no initial block",
    "fine windows normalise themselves",
    "window across the block edge left out",
)


def logits(
    weights: dict[str, Array], config: dict[str, Any], tokens: Array, error: str = ""
) -> Array:
    """[tokens] ids -> [tokens, vocab] float64."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    eps, num_layers = config["rms_norm_eps"], config["num_hidden_layers"]
    branch = 1.0 if error == "branches not scaled" else config["scale_depth"] / num_layers**0.5
    h = w["model.embed_tokens.weight"][tokens]
    h = h * (1.0 if error == "embedding not scaled" else config["scale_emb"])
    for index, kind in enumerate(config["mixer_types"]):
        name = f"model.layers.{index}."
        own = {
            k.removeprefix(name).removesuffix(".weight"): v
            for k, v in w.items()
            if k.startswith(name)
        }
        attn = {
            k.removeprefix("self_attn."): v for k, v in own.items() if k.startswith("self_attn.")
        }
        x = _norm(h, own["input_layernorm"], eps)
        gate_input = h if error == "gate reads the residual stream" else x
        mixer = _sparse if kind == "minicpm4" else _lightning
        h = h + branch * mixer(x, gate_input, attn, config, index, error)
        x = _norm(h, own["post_attention_layernorm"], eps)
        gated = x @ own["mlp.gate_proj"].T
        gated = gated * _sigmoid(gated) * (x @ own["mlp.up_proj"].T)
        h = h + branch * (gated @ own["mlp.down_proj"].T)
    divisor = (
        1.0 if error == "logits not divided" else config["hidden_size"] / config["dim_model_base"]
    )
    return _norm(h, w["model.norm.weight"], eps) / divisor @ w["lm_head.weight"].T


def _lightning(
    x: Array, gate_input: Array, w: dict[str, Array], config: dict[str, Any], layer: int, error: str
) -> Array:
    heads, dim, eps = config["lightning_nh"], config["lightning_head_dim"], config["rms_norm_eps"]
    q, k, v = ((x @ w[f"{n}_proj"].T).reshape(len(x), heads, dim) for n in "qkv")
    if error != "no QK-norm in lightning layers":
        q, k = _norm(q, w["q_norm"], eps), _norm(k, w["k_norm"], eps)
    if error != "no rotation in lightning layers":
        neighbours = error == "rotation pairs neighbours"
        q, k = (_rotate(y, config["rope_theta"], neighbours) for y in (q, k))
    out = np.zeros_like(q)
    for head in range(heads):
        slope = 2.0 ** (-8 * (head + 1) / heads)
        if error == "slopes differ by layer":
            slope *= 1 - layer / (config["num_hidden_layers"] - 1) + 1e-5
        state = np.zeros((dim, dim))
        for t in range(len(x)):
            written = np.outer(k[t, head], v[t, head])
            if error == "state decays the current token":
                state = np.exp(-slope) * (state + written)
            else:
                state = np.exp(-slope) * state + written
            out[t, head] = q[t, head] @ state / dim**0.5
    if error == "output norm per head":
        out = _norm(out, w["o_norm"].reshape(heads, dim), eps)
    out = out.reshape(len(x), -1)
    gate = _sigmoid(gate_input @ w["z_proj"].T)
    if error == "output norm per head":
        return (out * gate) @ w["o_proj"].T
    if error == "output norm after the gate":
        return _norm(out * gate, w["o_norm"], eps) @ w["o_proj"].T
    return (_norm(out, w["o_norm"], eps) * gate) @ w["o_proj"].T


def _sparse(
    x: Array, gate_input: Array, w: dict[str, Array], config: dict[str, Any], layer: int, error: str
) -> Array:
    heads, kv_heads, dim = (
        config[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    q = (x @ w["q_proj"].T).reshape(len(x), heads, dim)
    k = (x @ w["k_proj"].T).reshape(len(x), kv_heads, dim)
    v = (x @ w["v_proj"].T).reshape(len(x), kv_heads, dim)
    if error == "rotation in sparse layers":
        q, k = (_rotate(y, config["rope_theta"], neighbours=False) for y in (q, k))
    if error == "QK-norm in sparse layers":
        q, k = (_norm(y, np.ones(dim), config["rms_norm_eps"]) for y in (q, k))
    group = heads // kv_heads
    dense_len = config["sparse_config"]["dense_len"] + (error == "selection starts one token late")
    out = np.zeros_like(q)
    for g in range(kv_heads):
        # windows of keys: (tokens of the window, their mean)
        fine = _windows(k[:, g], 32, 16)
        coarse = (
            fine if error == "fine windows normalise themselves" else _windows(k[:, g], 128, 64)
        )
        for i in range(len(x)):
            queries = q[i, g * group : (g + 1) * group]
            allowed = np.arange(i + 1)
            if i + 1 >= dense_len:
                blocks = _select(queries, fine, coarse, i, config["sparse_config"], error)
                allowed = allowed[np.isin(allowed // 64, blocks)]
            scores = queries @ k[allowed, g].T / dim**0.5
            scores = np.exp(scores - scores.max(1, keepdims=True))
            out[i, g * group : (g + 1) * group] = (
                scores / scores.sum(1, keepdims=True) @ v[allowed, g]
            )
    out = out.reshape(len(x), -1)
    if error != "no gate in sparse layers":
        out = out * _sigmoid(gate_input @ w["o_gate"].T)
    return out @ w["o_proj"].T


def _select(
    queries: Array,
    fine: list[tuple[int, Array]],
    coarse: list[tuple[int, Array]],
    i: int,
    sparse: dict[str, int],
    error: str,
) -> list[int]:
    """Blocks of one token and one KV head, from the queries of its group."""
    own, scale = i // 64, queries.shape[-1] ** -0.5
    local = sparse["window_size"] // 64
    scores = np.zeros(len(fine))
    for query in queries:
        logits = [scale * query @ mean for last, mean in coarse if last <= i]
        if not logits:
            continue
        normaliser = sum(np.exp(logits))
        for c, (last, mean) in enumerate(fine):
            if last <= i:
                scores[c] += np.exp(scale * query @ mean) / normaliser
    forced_local = local - (error == "one local block short")
    rank = {}
    for b in range(own + 1):
        first = 4 * b if error == "window across the block edge left out" else 4 * b - 1
        touching = [scores[c] for c in range(first, 4 * b + 4) if 0 <= c < len(scores)]
        is_initial = b < sparse["init_blocks"] and error != "no initial block"
        is_forced = is_initial or b >= own - forced_local
        rank[b] = np.inf if is_forced else max(touching, default=-np.inf)
    return sorted(rank, key=lambda b: (-rank[b], b))[: sparse["topk"] + local]


def _windows(keys: Array, size: int, stride: int) -> list[tuple[int, Array]]:
    """(last token, mean) of every whole window."""
    starts = range(0, len(keys) - size + 1, stride)
    return [(start + size - 1, keys[start : start + size].mean(0)) for start in starts]


def _norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def _rotate(x: Array, theta: float, neighbours: bool) -> Array:
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] / theta ** (np.arange(half) / half)
    turn = np.exp(1j * angle)[:, None]
    if neighbours:
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack((turned.real, turned.imag), -1).reshape(x.shape)
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate((turned.real, turned.imag), -1)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))
