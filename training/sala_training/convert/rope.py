"""Rotary positions as Llama, Qwen3 and MiniCPM checkpoints state them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sala_training.model.mixers import rotate_pairs

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


class TeacherError(ValueError):
    """A checkpoint that cannot be a teacher; says which field, what was expected and what came."""


@dataclass(frozen=True)
class Rope:
    """Rotation of queries and keys by position."""

    theta: float
    """Base of the geometric frequencies."""
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What the kind needs beyond ``theta``: ``factor``, ``original_max_position_embeddings`` ..."""
    max_position_embeddings: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int) -> Rope:
        """Read ``rope_theta`` with ``rope_scaling``, or ``rope_parameters`` of transformers 5.

        Args:
            config: fields of ``config.json``.
            head_dim: of the attention.

        Raises:
            TeacherError: no base, or a kind of scaling that is not known here.
        """
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(given, Mapping):
            raise TeacherError(f"rope_scaling: expected an object, got {given!r}")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind == "su":  # the name that longrope had first
            kind = "longrope"
        if kind not in KINDS:
            raise TeacherError(f"rope_scaling: expected one of {list(KINDS)}, got {kind!r}")
        theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
        if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 1:
            raise TeacherError(f"rope_theta: expected a number above 1, got {theta!r}")
        if (
            part := given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        ) not in (
            None,
            1,
        ):
            raise TeacherError(f"partial_rotary_factor: only 1 is supported, got {part!r}")
        longest = int(config.get("max_position_embeddings", 0))
        parameters = {
            name: value
            for name, value in given.items()
            if name not in ("rope_theta", "rope_type", "type", "partial_rotary_factor")
        }
        if "original_max_position_embeddings" not in parameters:
            parameters["original_max_position_embeddings"] = config.get(
                "original_max_position_embeddings", longest
            )
        rope = cls(float(theta), kind, parameters if kind != "default" else {}, longest)
        try:
            rope.frequencies(head_dim, 1)
        except KeyError as error:
            raise TeacherError(
                f"rope_scaling of kind {kind!r}: {error.args[0]} is missing"
            ) from None
        return rope

    def frequencies(self, head_dim: int, num_tokens: int) -> tuple[Tensor, float]:
        """Return the frequencies and the factor on cosine and sine.

        Args:
            head_dim: even; all of it rotates.
            num_tokens: longest sequence; longrope has other frequencies past its trained length.

        Returns:
            [head_dim / 2] float32, radians a token, and the factor.
        """
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        plain = 1.0 / self.theta**exponent
        given = self.parameters
        match self.kind:
            case "linear":
                return plain / given["factor"], 1.0
            case "llama3":
                return self._llama3(plain), 1.0
            case "yarn":
                return self._yarn(plain, head_dim)
            case "longrope":
                trained = given["original_max_position_embeddings"]
                name = "long_factor" if num_tokens > trained else "short_factor"
                stretch = torch.tensor(given[name], dtype=torch.float32)
                if len(stretch) != len(plain):
                    raise TeacherError(
                        f"rope_scaling.{name}: expected {len(plain)} values, got {len(stretch)}"
                    )
                scale = given.get("factor") or self.max_position_embeddings / trained
                usual = math.sqrt(1 + math.log(scale) / math.log(trained)) if scale > 1 else 1.0
                factor = given.get("attention_factor") or usual
                return 1.0 / (stretch * self.theta**exponent), float(factor)
            case _:
                return plain, 1.0

    def _llama3(self, plain: Tensor) -> Tensor:
        given = self.parameters
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        turns = given["original_max_position_embeddings"] * plain / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * plain / given["factor"] + keep * plain

    def _yarn(self, plain: Tensor, head_dim: int) -> tuple[Tensor, float]:
        given = self.parameters
        factor, trained = given["factor"], given["original_max_position_embeddings"]

        def dim_of(turns: float) -> float:
            """Return the pair that turns so often over the trained length."""
            return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        first, last = dim_of(given.get("beta_fast") or 32), dim_of(given.get("beta_slow") or 1)
        if given.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        last += 0.001 if first == last else 0
        stretch = ((torch.arange(len(plain)).float() - first) / (last - first)).clamp(0, 1)
        attention = given.get("attention_factor")
        if attention is None:
            scales = given.get("mscale"), given.get("mscale_all_dim")
            attention = (
                _yarn_scale(factor, scales[0]) / _yarn_scale(factor, scales[1])
                if scales[0] and scales[1]
                else _yarn_scale(factor)
            )
        return plain / factor * stretch + plain * (1 - stretch), float(attention)


def _yarn_scale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """Rotate half-split (NeoX) pairs over all dims, in float32.

    Args:
        x: [..., tokens, heads, dim].
        positions: [..., tokens] int64, broadcast against ``x``.
        frequencies: [dim / 2] float32, radians a token.
        factor: on cosine and sine.

    Returns:
        As ``x``.
    """
    angle = positions[..., None].float() * frequencies
    cos, sin = (angle.cos() * factor)[..., None, :], (angle.sin() * factor)[..., None, :]
    return rotate_pairs(x, cos, sin)
