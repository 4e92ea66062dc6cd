"""Checkpoints in the released form: ``config.json`` and safetensors under the released names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sala_kernels.spec import ARCHITECTURE, MODEL_TYPE, SalaSpec
from sala_training.model.mixers import LightningMixer, lightning_slopes
from sala_training.model.sala import SalaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint folder whose weights are not the ones its ``config.json`` asks for."""


def load(path: Path, dtype: torch.dtype | None = None) -> SalaForCausalLM:
    """Load a checkpoint folder, one file or sharded, on the CPU.

    Args:
        path: folder with ``config.json`` and ``*.safetensors``.
        dtype: dtype of the weights; None keeps the stored one.

    Raises:
        SpecError: ``config.json`` is missing or not SALA.
        CheckpointError: a weight is missing, unexpected or of another shape; the names are listed.
    """
    spec = SalaSpec.from_file(path)
    weights = read_weights(path)
    check_weights(path, weights, spec.weight_shapes())
    with torch.device("meta"):
        model = SalaForCausalLM(spec)
    # the slopes are no weights: the meta device left them empty
    for module in model.modules():
        if isinstance(module, LightningMixer):
            module.slopes = lightning_slopes(spec)
    model.load_state_dict({k: v.to(dtype or v.dtype) for k, v in weights.items()}, assign=True)
    return model


def save(
    model: SalaForCausalLM,
    config: Mapping[str, Any],
    path: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 8_000_000,
) -> None:
    """Write ``config.json`` and sharded safetensors with their index, in the released names.

    Args:
        model: its weights are stored in ``dtype``.
        config: fields of ``config.json``; ``architectures`` and ``model_type`` are filled in.
        path: folder, made if needed.
        dtype: None keeps the model's.
        max_shard_bytes: a shard is closed before it grows past this; one tensor may.

    Raises:
        CheckpointError: ``config`` describes another model than ``model``.
    """
    full = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, **config}
    if SalaSpec.from_config(full) != model.spec:
        raise CheckpointError("config does not describe the model that is being saved")
    save_weights(model.state_dict(), path, dtype, max_shard_bytes)
    write_json(path / "config.json", full)


def save_weights(
    weights: Mapping[str, torch.Tensor],
    path: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 8_000_000,
) -> None:
    """Write sharded safetensors with their index; arguments as in :func:`save`."""
    path.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    shard_bytes = total_bytes = 0
    for name, tensor in weights.items():
        stored = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if shards[-1] and shard_bytes + stored.nbytes > max_shard_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = stored
        shard_bytes += stored.nbytes
        total_bytes += stored.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, path / file_name, metadata={"format": "pt"})
        (path / file_name).chmod(0o644)  # safetensors makes it private
        weight_map.update(dict.fromkeys(shard, file_name))
    write_json(
        path / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    )


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_weights(
    path: Path, weights: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare what a folder holds with the names and shapes that its configuration asks for.

    Raises:
        CheckpointError: a weight is missing, unexpected or of another shape; the names are listed.
    """
    problems = [f"missing: {name}" for name in expected if name not in weights]
    problems += [f"unexpected: {name}" for name in weights if name not in expected]
    problems += [
        f"{name}: expected shape {list(expected[name])}, got {list(tensor.shape)}"
        for name, tensor in weights.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    if problems:
        shown = "; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else "")
        raise CheckpointError(f"{path}: {len(problems)} weights do not fit config.json: {shown}")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a folder's safetensors files.

    Raises:
        CheckpointError: there are none, or one cannot be read.
    """
    index = path / INDEX_NAME
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: expected *.safetensors, found none")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                weights.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
    return weights
