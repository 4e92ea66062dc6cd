"""Losses over a large vocabulary: logits exist for one chunk of tokens at a time, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK_TOKENS = 1024


def chunked_cross_entropy(
    hidden: Tensor, table: Tensor, targets: Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of each token.

    Args:
        hidden: [tokens, hidden], already divided by the muP divisor.
        table: [vocab, hidden], the output projection.
        targets: [tokens] int64.
        chunk_tokens: tokens whose logits exist at once; the backward pass computes them again.

    Returns:
        Losses in nats, [tokens] float32, and whether the target was the likeliest token, [tokens] bool.
    """
    losses, is_right = _CrossEntropy.apply(hidden, table, targets, chunk_tokens)
    return losses, is_right


def chunked_kl(
    hidden: Tensor,
    table: Tensor,
    teacher_hidden: Tensor,
    teacher_table: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Compute the divergence KL(teacher || student) of each token; the teacher gets no gradient.

    Args:
        hidden: [tokens, hidden] of the student, already divided by its muP divisor.
        table: [vocab, hidden], the student's output projection.
        teacher_hidden: [tokens, teacher_hidden], already divided by the teacher's divisor.
        teacher_table: [vocab, teacher_hidden].
        temperature: both logits are divided by it; the loss is not multiplied by its square.
        chunk_tokens: tokens whose logits exist at once; the backward pass computes them again.

    Returns:
        Nats, [tokens] float32.

    Raises:
        ValueError: the vocabularies differ, or the temperature is not positive.
    """
    if table.shape[0] != teacher_table.shape[0]:
        raise ValueError(
            f"expected one vocabulary, got {table.shape[0]} tokens and the teacher's {teacher_table.shape[0]}"
        )
    if temperature <= 0:
        raise ValueError(f"expected a positive temperature, got {temperature}")
    result: Tensor = _Divergence.apply(
        hidden, table, teacher_hidden, teacher_table, temperature, chunk_tokens
    )
    return result


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        losses, normalisers, is_right = [], [], []
        for h, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
            logits = _logits(h, table)
            normaliser = logits.logsumexp(-1)
            losses.append(normaliser - logits.gather(-1, target[:, None])[:, 0])
            normalisers.append(normaliser)
            is_right.append(logits.argmax(-1) == target)
        ctx.save_for_backward(hidden, table, targets, torch.cat(normalisers))
        ctx.chunk_tokens = chunk_tokens
        right = torch.cat(is_right)
        ctx.mark_non_differentiable(right)
        return torch.cat(losses), right

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, table, targets, normalisers = ctx.saved_tensors

        def grad_logits(start: int, end: int) -> Tensor:
            grad = _logits(hidden[start:end], table)
            grad.sub_(normalisers[start:end, None]).exp_()
            minus_one = grad.new_full((end - start, 1), -1.0)
            grad.scatter_add_(-1, targets[start:end, None], minus_one)
            return grad.mul_(grad_losses[start:end, None])

        return *_grads(ctx, grad_logits, hidden, table), None, None


class _Divergence(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        teacher_hidden: Tensor,
        teacher_table: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        losses = []
        chunks = (hidden.split(chunk_tokens), teacher_hidden.split(chunk_tokens))
        for h, teacher_h in zip(*chunks, strict=True):
            log_p = (_logits(teacher_h, teacher_table) / temperature).log_softmax(-1)
            log_q = (_logits(h, table) / temperature).log_softmax(-1)
            losses.append((log_p.exp() * log_q.neg_().add_(log_p)).sum(-1))
        ctx.save_for_backward(hidden, table, teacher_hidden, teacher_table)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, table, teacher_hidden, teacher_table = ctx.saved_tensors

        def grad_logits(start: int, end: int) -> Tensor:
            teacher = _logits(teacher_hidden[start:end], teacher_table) / ctx.temperature
            student = _logits(hidden[start:end], table) / ctx.temperature
            grad = student.softmax(-1).sub_(teacher.softmax(-1))
            return grad.mul_(grad_losses[start:end, None] / ctx.temperature)

        return *_grads(ctx, grad_logits, hidden, table), None, None, None, None


def _logits(hidden: Tensor, table: Tensor) -> Tensor:
    return (hidden @ table.T).float()


def _grads(
    ctx: Any, grad_logits: Callable[[int, int], Tensor], hidden: Tensor, table: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Carry the gradient of the logits, made chunk by chunk, to the factors that ask for one.

    The table's is summed in float32 and rounded once.
    """
    grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
    grad_table = None
    if ctx.needs_input_grad[1]:
        grad_table = torch.zeros_like(table, dtype=torch.float32)
    for start in range(0, len(hidden), ctx.chunk_tokens):
        end = min(start + ctx.chunk_tokens, len(hidden))
        grad = grad_logits(start, end).to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden[start:end] = grad @ table
        if grad_table is not None:
            grad_table += grad.T @ hidden[start:end]
    return grad_hidden, None if grad_table is None else grad_table.to(table.dtype)
