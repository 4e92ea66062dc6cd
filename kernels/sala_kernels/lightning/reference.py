"""Lightning attention in plain float32 PyTorch, in two forms that must agree.

Source: the released MiniCPM-SALA modelling code. Per head with decay rate ``s``::

    S_t = exp(-s) * S_(t-1) + k_t^T v_t        o_t = scale * q_t S_t

No softmax, no normaliser, no per-layer factor on ``s``; the current token is included undecayed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lightning_recurrent(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence one token at a time.

    Args:
        q: [..., tokens, heads, dim], any float dtype.
        k: as ``q``.
        v: as ``q``.
        slopes: [heads] float32, 1/token, positive.
        scale: factor on the output.
        state: [..., heads, dim, dim] float32, key-major, before the first token; zero if None.

    Returns:
        Output [..., tokens, heads, dim] float32 and the state after the last token.
    """
    q, k, v = q.float(), k.float(), v.float()
    decay = torch.exp(-slopes.float())[:, None, None]
    if state is None:
        state = q.new_zeros(*q.shape[:-3], q.shape[-2], q.shape[-1], v.shape[-1])
    outputs = []
    for q_t, k_t, v_t in zip(q.unbind(-3), k.unbind(-3), v.unbind(-3), strict=True):
        state = decay * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outputs.append(scale * (q_t.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, dim=-3), state


def lightning_chunked(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, chunk_tokens: int = 64
) -> Tensor:
    """Compute the same output in parallel over chunks, from a zero state; differentiable.

    Inside a chunk the decay matrix ``exp(-s (i - j))`` is formed directly under the causal mask: split
    into ``exp(-s i) exp(s j)`` it overflows float32 within a hundred tokens on the fastest head. The
    states that enter the chunks come from one triangular matrix over chunks instead of a scan.

    Args:
        q: [batch, tokens, heads, dim], any float dtype.
        k: as ``q``.
        v: as ``q``.
        slopes: [heads] float32, 1/token, positive.
        scale: factor on the output.
        chunk_tokens: tokens a chunk; changes speed and rounding only.

    Returns:
        Output [batch, tokens, heads, dim] float32.
    """
    batch, tokens, heads, dim = q.shape
    num_chunks = -(-tokens // chunk_tokens)
    padding = num_chunks * chunk_tokens - tokens
    # [batch, heads, chunks, chunk, dim]; zero keys and values neither write nor are read
    q, k, v = (
        torch.nn.functional.pad(x.float(), (0, 0, 0, 0, 0, padding))
        .view(batch, num_chunks, chunk_tokens, heads, dim)
        .permute(0, 3, 1, 2, 4)
        for x in (q, k, v)
    )
    slopes = slopes.float()
    scores = (q @ k.transpose(-1, -2)) * _decay_matrix(slopes, chunk_tokens)[:, None]
    inside = scores @ v

    position = torch.arange(chunk_tokens, device=q.device)
    to_chunk_end = torch.exp(-slopes[:, None] * (chunk_tokens - 1 - position))
    written = (k * to_chunk_end[:, None, :, None]).transpose(-1, -2) @ v
    # state entering chunk n: everything written by chunks m < n, decayed over the chunks between
    across = _decay_matrix(slopes * chunk_tokens, num_chunks)
    entering = torch.einsum("hnm,bhmde->bhnde", across, written)
    entering = torch.nn.functional.pad(entering, (0, 0, 0, 0, 1, 0))[:, :, :num_chunks]
    since_chunk_start = torch.exp(-slopes[:, None] * (position + 1))
    carried = (q * since_chunk_start[:, None, :, None]) @ entering

    output = scale * (inside + carried)
    return output.permute(0, 2, 3, 1, 4).reshape(batch, -1, heads, dim)[:, :tokens]


def _decay_matrix(slopes: Tensor, size: int) -> Tensor:
    """Return ``exp(-s (i - j))`` for j <= i and 0 above the diagonal: [heads, size, size] float32."""
    position = torch.arange(size, device=slopes.device)
    distance = position[:, None] - position
    decay = torch.exp(-slopes[:, None, None] * distance.clamp(min=0))
    return decay.masked_fill(distance < 0, 0.0)
