"""Lightning attention in vectorised PyTorch: chunks for prompts, one batched update for decodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sala_kernels.lightning.op import StateBatch

CHUNK_TOKENS = 64


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, state: Tensor, batch: StateBatch
) -> Tensor:
    """Implement :func:`sala_kernels.lightning.op.lightning_attention`."""
    output = q.new_empty(q.shape)
    starts = batch.query_start_loc.tolist()
    num_queries = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    padding = (batch.state_slots[:, 0] < 0).tolist()
    active = [i for i, size in enumerate(num_queries) if size > 0 and not padding[i]]
    initial_slots = batch.state_slots[:, 0]
    if batch.initial_column is not None:
        initial_slots = batch.state_slots.gather(1, batch.initial_column[:, None].long())[:, 0]

    # one token writes column 0 whether or not it is a decode
    if short := [i for i in active if i < batch.num_decodes or num_queries[i] == 1]:
        seqs, new = torch.tensor(short), torch.tensor([num_queries[i] for i in short])
        after = _initial_state(state[initial_slots[seqs]], batch.has_context[seqs])
        for column in range(int(new.max())):
            has_more = new > column
            if not has_more.all():
                seqs, new, after = seqs[has_more], new[has_more], after[has_more]
            tokens = batch.query_start_loc[seqs] + column
            q_t, k_t, v_t = (x[tokens].float() for x in (q, k, v))
            after.mul_(_decay(slopes)).addcmul_(k_t.unsqueeze(-1), v_t.unsqueeze(-2))
            state[batch.state_slots[seqs, column]] = after
            output[tokens] = (scale * (q_t.unsqueeze(-2) @ after).squeeze(-2)).to(q.dtype)

    for i in sorted(set(active) - set(short)):
        new_tokens = slice(starts[i], starts[i + 1])
        before = _initial_state(state[initial_slots[i]].clone(), batch.has_context[i])
        output[new_tokens], state[batch.state_slots[i, 0]] = _prefill(
            q[new_tokens], k[new_tokens], v[new_tokens], slopes, scale, before
        )
    return output


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run one sequence chunk by chunk.

    Args:
        q: [tokens, heads, dim].
        k: as ``q``.
        v: as ``q``.
        slopes: [heads] float32.
        scale: factor on the output.
        state: [heads, dim, dim] float32 before the first token; not written.

    Returns:
        Output [tokens, heads, dim] in the dtype of ``q`` and the state after the last token.
    """
    position = torch.arange(CHUNK_TOKENS)
    distance = position[:, None] - position
    # exp(-s (i - j)) formed under the mask: split into exp(-s i) exp(s j) it overflows float32
    decay = torch.exp(-slopes[:, None, None] * distance.clamp(min=0)).masked_fill(distance < 0, 0.0)
    since_start = torch.exp(-slopes[:, None] * (position + 1)).unsqueeze(-1)
    chunk_outputs = []
    for q_c, k_c, v_c in zip(*(x.float().split(CHUNK_TOKENS) for x in (q, k, v)), strict=True):
        size = q_c.shape[0]
        q_c, k_c, v_c = (x.transpose(0, 1) for x in (q_c, k_c, v_c))  # [heads, size, dim]
        inside = (q_c @ k_c.transpose(-1, -2) * decay[:, :size, :size]) @ v_c
        carried = (q_c * since_start[:, :size]) @ state
        chunk_outputs.append(scale * (inside + carried).transpose(0, 1))
        # row size - 1 of the decay matrix: from each token to the end of the chunk
        written = (k_c * decay[:, size - 1, :size, None]).transpose(-1, -2) @ v_c
        state = since_start[:, size - 1, None] * state + written
    return torch.cat(chunk_outputs).to(q.dtype), state


def _initial_state(stored: Tensor, has_context: Tensor) -> Tensor:
    """Zero the copied states of sequences without context, in place (their slots may hold NaN)."""
    if not has_context.all():
        stored.masked_fill_(~has_context[..., None, None, None], 0.0)
    return stored


def _decay(slopes: Tensor) -> Tensor:
    """Return the decay of one token: [heads, 1, 1] float32."""
    return torch.exp(-slopes)[:, None, None]
