from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sala_kernels.testing import relative_rms
from sala_training.losses import chunked_cross_entropy, chunked_kl

TOKENS, VOCAB, HIDDEN = 257, 300, 24


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "hidden": draw(TOKENS, HIDDEN).requires_grad_(),
        "table": draw(VOCAB, HIDDEN).requires_grad_(),
        "teacher_hidden": draw(TOKENS, 16).requires_grad_(),
        "teacher_table": draw(VOCAB, 16).requires_grad_(),
        "targets": torch.randint(0, VOCAB, (TOKENS,), generator=generator),
        "weights": torch.rand(TOKENS, generator=generator),
    }


def assert_equal_with_gradients(
    x: dict[str, torch.Tensor], losses: torch.Tensor, expected: torch.Tensor
) -> None:
    assert losses.shape == (TOKENS,)
    assert relative_rms(losses.detach(), expected.detach()) < 1e-6
    inputs = [x["hidden"], x["table"]]
    actual = torch.autograd.grad((losses * x["weights"]).sum(), inputs, retain_graph=True)
    wanted = torch.autograd.grad((expected * x["weights"]).sum(), inputs)
    for a, b in zip(actual, wanted, strict=True):
        assert relative_rms(a, b) < 1e-6


@pytest.mark.parametrize("chunk_tokens", [1, 64, 257, 1000])
def test_chunked_cross_entropy_equals_the_one_of_full_logits(chunk_tokens: int) -> None:
    x = tensors()
    losses, is_right = chunked_cross_entropy(x["hidden"], x["table"], x["targets"], chunk_tokens)
    logits = x["hidden"] @ x["table"].T
    expected = torch.nn.functional.cross_entropy(logits, x["targets"], reduction="none")
    assert_equal_with_gradients(x, losses, expected)
    assert torch.equal(is_right, logits.argmax(-1) == x["targets"])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_chunked_kl_equals_the_one_of_full_logits(temperature: float) -> None:
    x = tensors()
    arguments = x["hidden"], x["table"], x["teacher_hidden"], x["teacher_table"]
    losses = chunked_kl(*arguments, temperature, chunk_tokens=64)
    log_q = (x["hidden"] @ x["table"].T / temperature).log_softmax(-1)
    log_p = (x["teacher_hidden"] @ x["teacher_table"].T / temperature).log_softmax(-1).detach()
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert_equal_with_gradients(x, losses, expected)
    gradients = torch.autograd.grad(
        losses.sum(), [x["teacher_hidden"], x["teacher_table"]], allow_unused=True
    )
    assert gradients == (None, None)


def test_kl_is_zero_without_gradient_where_student_and_teacher_agree() -> None:
    x = tensors()
    losses = chunked_kl(x["hidden"], x["table"], x["hidden"].detach(), x["table"].detach())
    assert losses.abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(losses.sum(), [x["hidden"]])
    assert gradient.abs().max() < 1e-5


def test_the_tables_gradient_is_summed_in_float32() -> None:
    """Many chunks of bfloat16 are as exact as one: a sum kept in bfloat16 would round at each."""
    x = tensors(torch.bfloat16)
    exact = {n: x[n].detach().double().requires_grad_() for n in ("hidden", "table")}
    logits = exact["hidden"] @ exact["table"].T
    torch.nn.functional.cross_entropy(logits, x["targets"], reduction="sum").backward()

    def error(chunk_tokens: int) -> float:
        losses, _ = chunked_cross_entropy(x["hidden"], x["table"], x["targets"], chunk_tokens)
        (gradient,) = torch.autograd.grad(losses.sum(), [x["table"]])
        assert exact["table"].grad is not None
        return relative_rms(gradient.double(), exact["table"].grad)

    assert error(chunk_tokens=1) < 1.05 * error(chunk_tokens=TOKENS)


def test_a_frozen_table_gets_no_gradient() -> None:
    x = tensors()
    losses, _ = chunked_cross_entropy(x["hidden"], x["table"].detach(), x["targets"])
    losses.sum().backward()
    assert x["hidden"].grad is not None


def test_other_vocabularies_and_temperatures_are_refused() -> None:
    x = tensors()
    arguments = x["hidden"], x["table"], x["teacher_hidden"]
    with pytest.raises(ValueError, match="300 tokens and the teacher's 299"):
        chunked_kl(*arguments, x["teacher_table"][:299])
    with pytest.raises(ValueError, match="positive temperature"):
        chunked_kl(*arguments, x["teacher_table"], temperature=0.0)


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return result


def largest_tensor(kind: str, tokens: int, chunk_tokens: int) -> int:
    """At 32K tokens and a large vocabulary, on the meta device: shapes without memory."""
    hidden = torch.empty(tokens, 64, device="meta", requires_grad=True)
    table = torch.empty(73448, 64, device="meta", requires_grad=True)
    with LargestTensor() as seen:
        if kind == "kl":
            losses = chunked_kl(hidden, table, hidden, table, 1.0, chunk_tokens)
        else:
            targets = torch.empty(tokens, dtype=torch.int64, device="meta")
            losses, _ = chunked_cross_entropy(hidden, table, targets, chunk_tokens)
        losses.sum().backward()
    return seen.num_elements


@pytest.mark.parametrize("kind", ["cross entropy", "kl"])
def test_the_full_logits_never_exist(kind: str) -> None:
    assert largest_tensor(kind, 32768, chunk_tokens=256) == 256 * 73448
    assert largest_tensor(kind, 32768, chunk_tokens=32768) == 32768 * 73448
