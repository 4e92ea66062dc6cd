"""The model card, the manifest and the loss curve of a checkpoint, from the files of its results."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from sala_kernels.spec import LayerKind, SalaSpec
from sala_training.checkpoint import write_json
from sala_training.eval import intervals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CARD_NAME = "README.md"
MANIFEST_NAME = "sala_manifest.json"
CURVE_NAME = "loss.png"
RUN_NAME, LOG_NAME, SCORES_NAME = "run.json", "log.jsonl", "scores.json"
PROVENANCE_NAME, NOTES_NAME = "provenance.json", "notes.md"

_MEAN_LINES = 5
"""Log lines averaged for the figures at the end of a stage: one line is one batch."""


def write(checkpoint: Path, results: Path) -> None:
    """Write the card and the manifest into ``checkpoint`` and the curve into ``results``.

    Args:
        checkpoint: an exported folder.
        results: holds run.json and log.jsonl of the run, provenance.json of the data, scores.json, and
            optionally notes.md: what else there is to say about this run.

    Raises:
        FileNotFoundError: one of these files is missing.
    """
    draw(read_log(results), _read_json(results / RUN_NAME)["recipe"], results / CURVE_NAME)
    (checkpoint / CARD_NAME).write_text(render(checkpoint, results), encoding="utf-8")
    write_json(checkpoint / MANIFEST_NAME, manifest(checkpoint, results))


def manifest(checkpoint: Path, results: Path) -> dict[str, Any]:
    """Describe every file of ``checkpoint`` but the manifest itself, and what made it."""
    run, data = _read_json(results / RUN_NAME), _read_json(results / PROVENANCE_NAME)
    files = sorted(path for path in checkpoint.iterdir() if path.name != MANIFEST_NAME)
    return {
        "files": {
            path.name: {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files
        },
        "num_parameters": _num_parameters(SalaSpec.from_file(checkpoint)),
        "recipe_digest": run["recipe_digest"],
        "steps": run["parts"][-1]["last_step"],
        "tokens": run["parts"][-1]["last_step"] * run["recipe"]["batch_tokens"],
        "data": {name: value for name, value in data.items() if name != "sources"},
        "made_by": run["parts"],
    }


def render(checkpoint: Path, results: Path) -> str:
    """Return the model card as Markdown with a Hugging Face header."""
    spec, run = SalaSpec.from_file(checkpoint), _read_json(results / RUN_NAME)
    data, scores = _read_json(results / PROVENANCE_NAME), _read_json(results / SCORES_NAME)
    notes = results / NOTES_NAME
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda frac: f"{100 * frac:.3g} %"
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        spec=spec,
        num_parameters=_num_parameters(spec),
        sparse_layers=[i for i, k in enumerate(spec.layer_kinds) if k is LayerKind.SPARSE],
        num_lightning=spec.layer_kinds.count(LayerKind.LIGHTNING),
        recipe=run["recipe"],
        recipe_digest=run["recipe_digest"],
        parts=run["parts"],
        stages=stages(read_log(results), run["recipe"]),
        tokens=run["parts"][-1]["last_step"] * run["recipe"]["batch_tokens"],
        data=data,
        licences=licences(data["sources"]),
        held_out=[source for source in data["sources"] if source["is_held_out"]],
        scores=scores,
        rows=[{**row, "interval": interval(row)} for row in scores["retrieval"]],
        notes=notes.read_text(encoding="utf-8").strip() if notes.exists() else None,
    )


def stages(log: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row a stage: its settings, its last step and the figures it ended with."""
    rows, first_step = [], 0
    for stage in recipe["stages"]:
        last_step = first_step + stage["num_steps"]
        lines = [line for line in log if first_step < line["step"] <= last_step][-_MEAN_LINES:]
        means = {
            name: sum(line[name] for line in lines) / len(lines) if lines else math.nan
            for name in ("loss", "answer_accuracy")
        }
        tokens = stage["num_steps"] * recipe["batch_tokens"]
        rows.append({**stage, **means, "first_step": first_step, "tokens": tokens})
        first_step = last_step
    return rows


def licences(sources: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, list[str]]]:
    """Return (licence, megabytes, packages) of the training texts, most text first."""
    num_bytes: defaultdict[str, int] = defaultdict(int)
    packages: defaultdict[str, list[str]] = defaultdict(list)
    for source in sources:
        if not source["is_held_out"]:
            num_bytes[source["licence"]] += source["text_bytes"]
            packages[source["licence"]].append(source["package"])
    ranked = sorted(num_bytes, key=lambda licence: -num_bytes[licence])
    return [(licence, num_bytes[licence] / 1e6, sorted(packages[licence])) for licence in ranked]


def interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return the 95 % interval of a share of right answers."""
    return intervals.wilson(round(row["exact_frac"] * row["num_cases"]), row["num_cases"])


def read_log(results: Path) -> list[dict[str, Any]]:
    """Return the lines of the training log."""
    text = (results / LOG_NAME).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def draw(log: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], path: Path) -> None:
    """Draw the loss and the wrong answer tokens over the tokens read, with the stages marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    million = 1e6
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    tokens = [line["tokens"] / million for line in log]
    wrong = [max(1 - line["answer_accuracy"], 1e-4) for line in log]
    for axes, values, label in (
        (upper, [line["loss"] for line in log], "loss (nats), answers weigh more"),
        (lower, wrong, "share of answer tokens wrong"),
    ):
        axes.plot(tokens, values, linewidth=1, color="#1f5fa8")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    upper.set_yticks([1, 2, 4, 8])
    lower.set_xlabel("training tokens (millions); dotted: stages, by context length")
    for stage in stages(log, recipe):
        start = stage["first_step"] * recipe["batch_tokens"] / million
        for axes in (upper, lower):
            axes.axvline(start, color="#888888", linewidth=0.8, linestyle=":")
        upper.annotate(
            f"{stage['length_tokens']:,}" + (" sparse" if stage["sparse"] else ""),
            (start, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
        )
    figure.savefig(path)


def _num_parameters(spec: SalaSpec) -> int:
    return sum(math.prod(shape) for shape in spec.weight_shapes().values())


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
