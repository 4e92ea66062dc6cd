"""Typed recipes; a recipe is a function that returns one, ``--set section.field=value`` edits it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any


class RecipeError(ValueError):
    """An override that names no field, or a value of the wrong type; says what was expected."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of steps at one context length and one data mix."""

    length_tokens: int
    num_steps: int
    sparse: bool = False
    """Sparse layers select blocks past ``dense_len``; False attends everything."""
    recall_frac: float = 0.3
    """Share of sequences that are documents with facts and questions."""
    chat_frac: float = 0.08
    """Share of sequences of short conversations; what is left is plain text."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW for tables and norms, Muon for the matrices between them; warm-up, stable, decay."""

    lr: float = 6e-3
    min_lr_frac: float = 0.05
    warmup_steps: int = 100
    decay_frac: float = 0.35
    """Last share of all steps over which the learning rate falls, linearly."""
    weight_decay: float = 0.05
    grad_clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a training run depends on; its digest guards a resume."""

    model: dict[str, Any]
    """Fields of ``config.json``."""
    stages: tuple[Stage, ...]
    optim: Optim = Optim()
    batch_tokens: int = 131_072
    """Tokens a step, the same in every stage: sequences = batch_tokens / length_tokens."""
    seed: int = 0
    log_every_steps: int = 20
    save_every_s: float = 120.0

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """Return the stage of 0-based ``step``."""
        for stage in self.stages:
            if step < stage.num_steps:
                return stage
            step -= stage.num_steps
        raise IndexError("step lies beyond the last stage")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of 0-based ``step``: linear warm-up, stable, linear decay."""
        optim = self.optim
        warm = min(1.0, (step + 1) / max(optim.warmup_steps, 1))
        left = (self.num_steps - step) / max(optim.decay_frac * self.num_steps, 1)
        return optim.lr * warm * max(optim.min_lr_frac, min(1.0, left))

    def digest(self) -> str:
        """Return 16 hex digits that change with any field."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def with_overrides(recipe: Recipe, overrides: list[str]) -> Recipe:
    """Apply ``path=value`` edits; values are JSON, paths are field names and stage indices.

    Examples: ``seed=3``, ``optim.lr=0.002``, ``stages.0.num_steps=10``.

    Raises:
        RecipeError: no such field, or a value of another type than the field's.
    """
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(f"--set: expected path=value, got {override!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            raise RecipeError(f"--set {path}: expected a JSON value, got {text!r}") from None
        recipe = _replaced(recipe, path.split("."), value, path)
    return recipe


def _replaced(node: Any, names: list[str], value: Any, path: str) -> Any:
    """Return ``node`` with the value at ``names`` replaced; every level is copied, none changed."""
    if not names:
        if isinstance(node, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(node):
            raise RecipeError(f"--set {path}: expected {type(node).__name__}, got {value!r}")
        return value
    name, rest = names[0], names[1:]
    if dataclasses.is_dataclass(node) and not isinstance(node, type) and name in vars(node):
        return dataclasses.replace(
            node, **{name: _replaced(getattr(node, name), rest, value, path)}
        )
    if isinstance(node, dict) and name in node:
        return {**node, name: _replaced(node[name], rest, value, path)}
    if isinstance(node, tuple) and name.isdigit() and int(name) < len(node):
        index = int(name)
        return (*node[:index], _replaced(node[index], rest, value, path), *node[index + 1 :])
    raise RecipeError(f"--set {path}: no field {name!r} in {type(node).__name__}")
