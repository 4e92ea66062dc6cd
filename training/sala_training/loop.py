"""The training loop: data -> loss -> backward -> clip -> step -> log -> save; resumable at any step.

A run folder holds ``state.pt``, ``log.jsonl`` (one line every few steps) and ``run.json`` (the recipe
and, for each process that worked on it, the steps, seconds, device and versions).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sala_kernels.spec import SalaSpec
from sala_training.checkpoint import write_json
from sala_training.config import Recipe, Stage
from sala_training.model.mixers import LightningMixer
from sala_training.model.sala import SalaForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

STATE_NAME = "state.pt"
LOG_NAME = "log.jsonl"
RUN_NAME = "run.json"

BatchFn = Callable[[int, Stage, int], tuple[Tensor, Tensor]]
"""(step, stage, sequences) -> tokens [seqs, length + 1] int64 and loss weights, as long, float32."""


class ResumeError(ValueError):
    """A run folder that belongs to another recipe, or whose state cannot be read."""


@dataclass
class StepMetrics:
    """Sums over one step, kept on the device; read only when a line is logged."""

    loss: Tensor
    answer_loss: Tensor
    answer_accuracy: Tensor
    grad_norm: Tensor


def train(
    recipe: Recipe,
    run_dir: Path,
    batches: BatchFn,
    device: torch.device,
    max_seconds: float | None = None,
    compile_backend: str | None = None,
) -> bool:
    """Run the recipe from where ``run_dir`` left off.

    SIGTERM saves after the current step and returns; so does ``max_seconds``, for hosts that lend time
    in pieces. Only the main thread may call this: it handles a signal.

    Args:
        recipe: what to train.
        run_dir: holds the files of the run; made if needed.
        batches: the data, a pure function of the step, so that a resumed run sees the same tokens.
        device: where to train.
        max_seconds: stop after this many seconds; None runs to the end.
        compile_backend: of ``torch.compile``; None compiles nothing.

    Returns:
        True when the recipe is finished, False when it was stopped; call again to go on.

    Raises:
        ResumeError: ``run_dir`` belongs to another recipe or its state is unreadable.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    deadline_at_s = time.monotonic() + max_seconds if max_seconds is not None else float("inf")
    model = SalaForCausalLM(SalaSpec.from_config(recipe.model))
    model.initialise(recipe.seed)
    model.to(device)
    optimizers = _make_optimizers(model, recipe)
    first_step = _resume(recipe, run_dir, model, optimizers)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if first_step == recipe.num_steps:
        return True
    run = _RunFile(recipe, run_dir / RUN_NAME, first_step, device, compile_backend)
    log = _Log(run_dir / LOG_NAME, first_step)
    saved_at_s = time.monotonic()
    next_step = first_step
    compiled_for: Stage | None = None
    with _sigterm_noted() as stop:
        for step, tokens, weights in _prefetched(recipe, batches, first_step, device):
            stage = recipe.stage_at(step)
            if compile_backend and stage != compiled_for:
                compile_layers(model, stage.sparse, compile_backend)
                compiled_for = stage
            metrics = _step(model, optimizers, recipe, step, tokens, weights)
            next_step = step + 1
            if next_step % recipe.log_every_steps == 0:
                log.write(recipe, step, metrics)
            now_s = time.monotonic()
            if stop.requested or now_s > deadline_at_s:
                break
            if now_s - saved_at_s > recipe.save_every_s:
                _save(recipe, run_dir, next_step, model, optimizers)
                run.write(next_step)
                saved_at_s = now_s
        _save(recipe, run_dir, next_step, model, optimizers)
        run.write(next_step)
    if next_step < recipe.num_steps:
        logger.info("stopped after step %d of %d", next_step, recipe.num_steps)
    return next_step == recipe.num_steps


def compile_layers(model: SalaForCausalLM, sparse: bool, backend: str) -> None:
    """Compile each layer for one stage, as one graph and for one shape.

    What cannot be one graph stays eager: the selection depends on data and would split a layer, and
    compiled pieces around such a break fail now and then, in the backward pass, on torch 2.11. A
    process that resumes in a stage compiles the same as one that reaches it.

    Args:
        model: changed in place.
        sparse: the stage selects blocks; only the MLPs of sparse layers are compiled then.
        backend: of ``torch.compile``.
    """
    # else the shapes of earlier stages count against the recompile limit
    torch.compiler.reset()
    for layer in model.model.layers:
        is_whole = not sparse or isinstance(layer.self_attn, LightningMixer)
        layer.compile(backend=backend, dynamic=False, fullgraph=True, disable=not is_whole)
        layer.mlp.compile(backend=backend, dynamic=False, fullgraph=True, disable=is_whole)


def load_trained(recipe: Recipe, run_dir: Path) -> SalaForCausalLM:
    """Return the model of a finished run, float32 on the CPU.

    Raises:
        ResumeError: the run is unfinished, belongs to another recipe or is unreadable.
    """
    model = SalaForCausalLM(SalaSpec.from_config(recipe.model))
    step = _resume(recipe, run_dir, model, [])
    if step < recipe.num_steps:
        raise ResumeError(
            f"{run_dir}: expected a finished run, got step {step} of {recipe.num_steps}"
        )
    return model


def _step(
    model: SalaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    step: int,
    tokens: Tensor,
    weights: Tensor,
) -> StepMetrics:
    """Do one optimiser step on one batch."""
    dense = not recipe.stage_at(step).sparse
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(tokens[:, :-1], dense=dense)
    metrics = weighted_loss(logits, tokens[:, 1:], weights[:, 1:])
    metrics.loss.backward()
    metrics.grad_norm = torch.nn.utils.clip_grad_norm_(
        model.parameters(), recipe.optim.grad_clip_norm
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return metrics


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> StepMetrics:
    """Average the cross-entropy by weight; tokens with weight above 1 are answers.

    Args:
        logits: [seqs, tokens, vocab] float32.
        targets: [seqs, tokens] int64.
        weights: [seqs, tokens] float32, 0 = ignored.
    """
    token_loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    flat = weights.flatten()
    answer = (flat > 1).float()
    num_answer = answer.sum().clamp(min=1)
    with torch.no_grad():
        right = (logits.argmax(-1) == targets).flatten().float()
    return StepMetrics(
        loss=(token_loss * flat).sum() / flat.sum(),
        answer_loss=(token_loss.detach() * answer).sum() / num_answer,
        answer_accuracy=(right * answer).sum() / num_answer,
        grad_norm=logits.new_zeros(()),
    )


def _make_optimizers(model: SalaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Split the parameters: Muon for the layers' matrices, AdamW for tables and norms."""
    optim = recipe.optim
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or ".layers." not in n]
    return [
        torch.optim.Muon(
            matrices, lr=optim.lr, weight_decay=optim.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=optim.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _prefetched(
    recipe: Recipe, batches: BatchFn, first_step: int, device: torch.device
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (step, tokens, weights) in order; on a GPU, worker processes make batches ahead."""

    class Steps(torch.utils.data.Dataset[tuple[int, Tensor, Tensor]]):
        def __len__(self) -> int:
            return recipe.num_steps - first_step

        def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
            step = first_step + index
            stage = recipe.stage_at(step)
            return step, *batches(step, stage, max(1, recipe.batch_tokens // stage.length_tokens))

    on_gpu = device.type == "cuda"
    workers = min(12, os.cpu_count() or 1) if on_gpu else 0
    loader = torch.utils.data.DataLoader(
        Steps(),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_ignore_sigterm,
        pin_memory=on_gpu,
        prefetch_factor=8 if workers else None,
    )
    for step, tokens, weights in loader:
        yield step, tokens.to(device, non_blocking=True), weights.to(device, non_blocking=True)


def _ignore_sigterm(worker_id: int) -> None:
    """Leave SIGTERM to the main process: it saves first, then ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _save(
    recipe: Recipe,
    run_dir: Path,
    step: int,
    model: SalaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
) -> None:
    """Write the state atomically: a kill leaves either the old file or the new one."""
    state = {
        "recipe": recipe.digest(),
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    partial = run_dir / (STATE_NAME + ".partial")
    torch.save(state, partial)
    partial.replace(run_dir / STATE_NAME)


def _resume(
    recipe: Recipe, run_dir: Path, model: SalaForCausalLM, optimizers: list[torch.optim.Optimizer]
) -> int:
    """Load ``state.pt`` if there is one; return the next step."""
    path = run_dir / STATE_NAME
    if not path.exists():
        return 0
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a torn file
        raise ResumeError(f"{path} cannot be read ({error}); remove it to start again") from error
    if state["recipe"] != recipe.digest():
        raise ResumeError(
            f"{path} belongs to another recipe ({state['recipe']}, expected {recipe.digest()}); use another folder"
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=False):
        optimizer.load_state_dict(saved)
    return int(state["step"])


@dataclass
class _Stop:
    """Whether somebody asked the loop to stop."""

    requested: bool = False


@contextmanager
def _sigterm_noted() -> Iterator[_Stop]:
    """Turn SIGTERM into a wish to stop, so that the loop can save at the end of a step."""
    stop = _Stop()

    def request(signum: int, frame: object) -> None:
        stop.requested = True

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


class _RunFile:
    """Writes ``run.json``: the recipe, and a part for each process that worked on the run."""

    def __init__(
        self,
        recipe: Recipe,
        path: Path,
        first_step: int,
        device: torch.device,
        compile_backend: str | None,
    ) -> None:
        self._path = path
        self._started_at_s = time.monotonic()
        earlier = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else []
        self._content = {
            "recipe_digest": recipe.digest(),
            "recipe": dataclasses.asdict(recipe),
            "parts": [part for part in earlier if part["last_step"] <= first_step],
        }
        self._part = {
            "first_step": first_step,
            "device": device_text(device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compile_backend": compile_backend,
        }

    def write(self, last_step: int) -> None:
        """Say that this process has come to ``last_step``."""
        seconds = round(time.monotonic() - self._started_at_s, 1)
        part = {**self._part, "last_step": last_step, "seconds": seconds}
        partial = self._path.with_name(self._path.name + ".partial")
        write_json(partial, {**self._content, "parts": [*self._content["parts"], part]})
        partial.replace(self._path)


def device_text(device: torch.device) -> str:
    """Name a device as people do."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


class _Log:
    """Appends one JSON object a line; a resumed run drops the lines it is about to write again."""

    def __init__(self, path: Path, first_step: int) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= first_step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._path = path
        self._written_at_s = time.monotonic()
        self._written_step = first_step

    def write(self, recipe: Recipe, step: int, metrics: StepMetrics) -> None:
        loss = metrics.loss.item()  # waits for the device, so the clock below is honest
        now_s = time.monotonic()
        num_tokens = (step + 1 - self._written_step) * recipe.batch_tokens
        line = {
            "step": step + 1,
            "tokens": (step + 1) * recipe.batch_tokens,
            "length_tokens": recipe.stage_at(step).length_tokens,
            "loss": round(loss, 4),
            "answer_loss": round(metrics.answer_loss.item(), 4),
            "answer_accuracy": round(metrics.answer_accuracy.item(), 4),
            "grad_norm": round(metrics.grad_norm.item(), 4),
            "lr": round(recipe.lr_at(step), 6),
            "tokens_per_s": round(num_tokens / (now_s - self._written_at_s)),
        }
        self._written_at_s, self._written_step = now_s, step + 1
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        logger.info("%s", line)


def _step_of(line: str) -> float:
    """Return the step of a log line; a line that a kill has cut belongs to no step."""
    try:
        return int(json.loads(line)["step"])
    except json.JSONDecodeError:
        return math.inf
