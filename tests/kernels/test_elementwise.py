from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sala_kernels.elementwise import op, reference, torch_impl, triton_impl
from sala_kernels.elementwise.reference import to_dtype

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

EPS = 1e-5
SCALE = 1.4 / 32**0.5
# sums in another order move a value across a rounding boundary now and then
MAX_MOVED_FRAC = 2e-3


@pytest.fixture(params=[torch_impl, triton_impl], ids=["torch", "triton"])
def implementation(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest, implementation: ModuleType, device: str) -> torch.dtype:
    if request.param == torch.bfloat16 and implementation is triton_impl and device == "cpu":
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    return request.param


@pytest.fixture
def place(implementation: ModuleType, device: str) -> str:
    return device if implementation is triton_impl else "cpu"


def random(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def assert_rounded_alike(actual: Tensor, expected: Tensor) -> None:
    """Equal in the dtype of ``actual``, but for a few neighbouring values; float32 within its rounding errors."""
    actual, dtype = actual.cpu(), actual.dtype
    if dtype == torch.float32:
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=1e-6)
        return
    num_moved = int((actual.double() != expected).sum())
    assert num_moved <= 1 + MAX_MOVED_FRAC * expected.numel()
    # a unit in a factor is up to two in a product, and more where a rotation cancels
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=2 * ulp, atol=2 * ulp)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize(("tokens", "width"), [(1, 256), (3, 250), (7, 1024), (0, 64)])
def test_rms_norm(
    tokens: int, width: int, implementation: ModuleType, place: str, dtype: torch.dtype
) -> None:
    x, weight = random(tokens, width, dtype=dtype, seed=1), random(width, dtype=dtype, seed=2)
    normed = implementation.rms_norm(x.to(place), weight.to(place), EPS)
    assert_rounded_alike(normed, reference.rms_norm(*wide(x, weight), EPS, to_dtype(dtype)))


@pytest.mark.parametrize(("tokens", "width"), [(1, 256), (3, 250), (7, 1024)])
def test_add_rms_norm(
    tokens: int, width: int, implementation: ModuleType, place: str, dtype: torch.dtype
) -> None:
    # a slice of a wider tensor, and a stream much larger than its branch
    hidden = random(tokens, 2 * width, dtype=dtype, seed=1, scale=8)[:, :width]
    branch, weight = random(tokens, width, dtype=dtype, seed=2), random(width, dtype=dtype, seed=3)
    before = hidden.clone()
    total, normed = implementation.add_rms_norm(
        hidden.to(place), branch.to(place), SCALE, weight.to(place), EPS
    )
    rounded = to_dtype(dtype)
    expected = reference.add(*wide(hidden, branch), SCALE, rounded)
    if dtype != torch.float32:
        assert torch.equal(total.cpu().double(), expected)
    assert_rounded_alike(total, expected)
    assert_rounded_alike(normed, reference.rms_norm(expected, weight.double(), EPS, rounded))
    assert torch.equal(hidden, before)


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 4, 64), (5, 3, 32), (2, 20, 16)])
def test_norm_rope(
    tokens: int,
    heads: int,
    dim: int,
    implementation: ModuleType,
    place: str,
    dtype: torch.dtype,
) -> None:
    qkv, weights, angle = rope_inputs(tokens, heads, dim, dtype)
    turned = qkv.clone().to(place)
    cos, sin = angle.cos(), angle.sin()
    implementation.norm_rope(
        turned, *(weight.to(place) for weight in weights), cos.to(place), sin.to(place), EPS
    )
    assert_rounded_alike(turned, expected_rope(qkv, weights, cos, sin))


def rope_inputs(
    tokens: int, heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], Tensor]:
    qkv = random(tokens, 3 * heads * dim, dtype=dtype, seed=1)
    weights = [random(dim, dtype=dtype, seed=seed) for seed in (2, 3)]
    return qkv, weights, random(tokens, dim // 2, dtype=torch.float32, seed=4, scale=100)


def expected_rope(qkv: Tensor, weights: list[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    """Norm, then rotation; v as it was."""
    rounded = to_dtype(qkv.dtype)
    *parts, v = (part.unflatten(1, (-1, len(weights[0]))) for part in qkv.double().chunk(3, 1))
    normed = (
        reference.rms_norm(part, weight.double(), EPS, rounded)
        for part, weight in zip(parts, weights, strict=True)
    )
    turned = [reference.rotate(part, *wide(cos, sin), rounded) for part in normed]
    return torch.cat([part.flatten(1) for part in (*turned, v)], 1)


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize(("tokens", "width"), [(1, 256), (3, 500)])
def test_norm_gate(
    tokens: int,
    width: int,
    num_shards: int,
    implementation: ModuleType,
    place: str,
    dtype: torch.dtype,
) -> None:
    # shards of different size in mean square, each normalised by that of all
    x = random(tokens, width, dtype=dtype, seed=1) * torch.linspace(0.1, 4, width).to(dtype)
    weight, gate = random(width, dtype=dtype, seed=2), random(tokens, width, dtype=dtype, seed=3)
    shards = list(
        zip(*(tensor.to(place).chunk(num_shards, -1) for tensor in (x, weight, gate)), strict=True)
    )
    mean = None
    if num_shards > 1:
        mean = sum(implementation.mean_square(x_i) for x_i, *_ in shards) / num_shards
    gated = [implementation.norm_gate(*shard, EPS, mean) for shard in shards]
    rounded = to_dtype(dtype)
    normed = reference.rms_norm(*wide(x, weight), EPS, rounded)
    assert_rounded_alike(torch.cat(gated, 1), reference.gate(normed, gate.double(), rounded))


@pytest.mark.parametrize(("tokens", "width"), [(1, 256), (3, 250)])
def test_sigmoid_gate(
    tokens: int, width: int, implementation: ModuleType, place: str, dtype: torch.dtype
) -> None:
    x = random(tokens, width, dtype=dtype, seed=1)
    gate = random(tokens, 3 * width, dtype=dtype, seed=2, scale=4)[:, width : 2 * width]
    gated = implementation.sigmoid_gate(x.to(place), gate.to(place))
    assert_rounded_alike(gated, reference.gate(*wide(x, gate), to_dtype(dtype)))


def exact(x: Tensor) -> Tensor:
    return x


def mutants() -> dict[str, tuple[Tensor, Tensor]]:
    """Mistakes and what the released model computes instead, of values that float16 holds."""
    rounded = to_dtype(torch.float16)
    x, gate, branch, weight = (
        random(4, 512, dtype=torch.float16, seed=seed).double() for seed in range(4)
    )
    normed, gated = reference.rms_norm(x, weight, EPS, rounded), reference.gate(x, gate, rounded)
    normed_once = rounded(reference.rms_norm(x, weight, EPS, exact))
    total = reference.add(x, branch, SCALE, rounded)
    gated_norm = reference.gate(normed, gate, rounded)

    qkv, weights, angle = rope_inputs(4, 3, 32, torch.float16)
    cos, sin = angle.cos(), angle.sin()
    roped = expected_rope(qkv, weights, cos, sin)
    q, q_weight = qkv.double().chunk(3, 1)[0].unflatten(1, (3, 32)), weights[0].double()
    q_roped = roped[:, : 3 * 32].unflatten(1, (3, 32))
    q_normed = reference.rms_norm(q, q_weight, EPS, rounded)
    even_odd = torch.arange(32).view(16, 2).T.flatten()
    neighbours = reference.rotate(q_normed[..., even_odd], *wide(cos, sin), rounded)
    not_between = reference.rms_norm(q, q_weight, EPS, exact)
    return {
        "norm rounded once": (normed_once, normed),
        "width one short": (rounded(normed * (511 / 512) ** 0.5), normed),
        "branch not rounded": (rounded(x + branch * SCALE), total),
        "scale after add": (rounded((x + branch) * SCALE), total),
        "norm of the sum before rounding": (
            reference.rms_norm(x + rounded(branch * SCALE), weight, EPS, rounded),
            reference.rms_norm(total, weight, EPS, rounded),
        ),
        "sigmoid not rounded": (rounded(x * gate.sigmoid()), gated),
        "norm after gate": (reference.rms_norm(gated, weight, EPS, rounded), gated_norm),
        "norm rounded once, gated": (reference.gate(normed_once, gate, rounded), gated_norm),
        "norm of a shard": (
            torch.cat([reference.rms_norm(x[:, s], weight[:, s], EPS, rounded) for s in SHARDS], 1),
            normed,
        ),
        "neighbours paired": (neighbours[..., even_odd.argsort()], q_roped),
        "turned backwards": (expected_rope(qkv, weights, cos, -sin), roped),
        "weights exchanged": (expected_rope(qkv, weights[::-1], cos, sin), roped),
        "norm not rounded before the rotation": (
            reference.rotate(not_between, *wide(cos, sin), rounded),
            q_roped,
        ),
        "angles rounded": (expected_rope(qkv, weights, cos.half(), sin.half()), roped),
    }


SHARDS = (slice(0, 256), slice(256, 512))
MUTANTS = mutants()


@pytest.mark.parametrize("name", MUTANTS)
def test_bounds_reject(name: str) -> None:
    mutant, released = MUTANTS[name]
    assert_rounded_alike(released.half(), released)
    with pytest.raises(AssertionError):
        assert_rounded_alike(mutant.half(), released)


def test_wrong_arguments_are_named() -> None:
    x, weight, angle = torch.zeros(2, 48), torch.zeros(48), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"weight: expected shape \(48,\), got \(47,\)"):
        op.rms_norm(x, weight[1:], EPS)
    with pytest.raises(ValueError, match=r"branch: expected torch.float32, got torch.float16"):
        op.add_rms_norm(x, x.half(), SCALE, weight, EPS)
    with pytest.raises(ValueError, match=r"gate: expected shape \(2, 48\), got \(1, 48\)"):
        op.norm_gate(x, weight, x[:1], EPS)
    with pytest.raises(ValueError, match=r"mean_square: expected shape \(2,\), got \(2, 1\)"):
        op.norm_gate(x, weight, x, EPS, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"gate: expected shape \(2, 48\), got \(2, 4\)"):
        op.sigmoid_gate(x, angle)
    with pytest.raises(ValueError, match=r"q, k and v of heads of 10 \(even\), got width 48"):
        op.norm_rope(x, weight[:10], weight[:10], angle, angle, EPS)
    with pytest.raises(ValueError, match=r"cos: expected torch.float32, got torch.float64"):
        op.norm_rope(x, weight[:8], weight[:8], angle.double(), angle, EPS)
    with pytest.raises(NotImplementedError, match="sigmoid_gate: expected tensors on cpu or cuda"):
        op.sigmoid_gate(x.to("meta"), x.to("meta"))
