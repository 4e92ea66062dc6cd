"""Times every operator, as it is or over a grid of its constants, against what the device reaches."""

from __future__ import annotations

import gc
import importlib
import json
from ast import literal_eval
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from gpu import elementwise_cases
from gpu.operators import DENSE_LEN, Case, Shapes, dense_prompt_case, lightning_case, sparse_cases
from gpu.results import spread
from gpu.settings import RELEASED_CONFIG, Scale
from gpu.timing import Ceilings, measure_ceilings, times_us
from sala_kernels.spec import SalaSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import ModuleType

    from gpu.results import Recorder


@dataclass(frozen=True)
class Grid:
    """Values of module constants to compare: ``sparse_attend.triton_impl:TILE=16,32;WARPS=4,8``."""

    folder: str
    module_name: str
    values: dict[str, list[Any]]

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read the command line's form.

        Raises:
            ValueError: the text is not of that form.
        """
        where, _, assignments = text.partition(":")
        folder, _, module = where.partition(".")
        values = {}
        for assignment in filter(None, assignments.split(";")):
            name, _, listed = assignment.partition("=")
            values[name] = list(literal_eval(f"[{listed}]"))
        if not (folder and module and values and all(values.values())):
            raise ValueError(f"--tune: expected FOLDER.MODULE:NAME=1,2;OTHER=3,4, got {text!r}")
        return cls(folder, f"sala_kernels.{folder}.{module}", values)

    def variants(self) -> Iterator[dict[str, Any]]:
        """Return every combination."""
        for values in product(*self.values.values()):
            yield dict(zip(self.values, values, strict=True))


@contextmanager
def constants(module: ModuleType, values: dict[str, Any]) -> Iterator[None]:
    """Set constants of a module for a while.

    ``NAME`` is a constant; ``NAME.field`` a field of a named tuple, or of the one that function ``NAME`` returns.

    Raises:
        AttributeError: the module has no such constant.
        ValueError: the named tuple has no such field.
    """
    before = {name.partition(".")[0]: None for name in values}
    before = {name: getattr(module, name) for name in before}
    try:
        for path, value in values.items():
            name, _, field = path.partition(".")
            now = getattr(module, name)
            setattr(module, name, _with_field(now, field, value) if field else value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _with_field(target: Any, field: str, value: Any) -> Any:
    if callable(target):
        return lambda *arguments: target(*arguments)._replace(**{field: value})
    return target._replace(**{field: value})


def run(record: Recorder, scale: Scale, grids: list[Grid], only: str = "") -> int:
    """Measure; return how many cases are wrong or failed.

    Args:
        record: where the lines go.
        scale: shapes and device.
        grids: constants to vary; empty = each operator as it is.
        only: a part of the names of the operators to measure.
    """
    torch.manual_seed(0)
    config = json.loads(RELEASED_CONFIG.read_text()) | scale.sala_overrides
    ceilings = measure_ceilings(scale.device)
    record.write(
        "ceilings",
        bytes_per_s=round(ceilings.bytes_per_s),
        flops_per_s=round(ceilings.flops_per_s),
    )
    num_bad = 0
    with torch.inference_mode():
        for names, group in case_groups(scale, SalaSpec.from_config(config)):
            if not any(only in name or name in only for name in names):
                continue
            try:
                for case in group:
                    if only in case.op:
                        num_bad += _measure_variants(record, scale.device, case, ceilings, grids)
            # inputs are made by the operators themselves; a broken one ends its group only
            except Exception as error:  # noqa: BLE001
                num_bad += 1
                record.write("kernel_inputs", failed=f"{type(error).__name__}: {error}"[:500])
            gc.collect()
            if scale.device == "cuda":
                torch.cuda.empty_cache()
    return num_bad


def case_groups(scale: Scale, spec: SalaSpec) -> Iterator[tuple[tuple[str, ...], Iterable[Case]]]:
    """Return every operator, in groups that share inputs, each with the names that occur in it.

    Groups are built one after another: their inputs do not fit together.
    """
    shapes = Shapes(spec, scale.device, getattr(torch, scale.dtype))
    step, (many, many_tokens) = scale.kernel_step_tokens, scale.batch
    for seqs, tokens in ((1, step), (1, 1), (many, 1)):
        yield ("lightning",), (lightning_case(shapes, seqs, tokens) for _ in range(1))
    for tokens in (step, many):
        yield elementwise_cases.NAMES, elementwise_cases.elementwise_cases(shapes, tokens)
    dense_tokens = min(step, DENSE_LEN)
    yield ("attend_blocks",), (dense_prompt_case(shapes, dense_tokens) for _ in range(1))
    names = ("cache_write", "select_blocks", "attend_blocks")
    for context in scale.kernel_contexts:
        yield names, sparse_cases(shapes, context, 1, step)
        yield names, sparse_cases(shapes, context, 1, 1)
    yield names, sparse_cases(shapes, many_tokens, many, 1)


def _measure_variants(
    record: Recorder, device: str, case: Case, ceilings: Ceilings, grids: list[Grid]
) -> int:
    if not grids:
        return _measure(record, device, case, ceilings, {})
    num_bad = 0
    for grid in grids:
        if grid.folder == case.folder:
            module = importlib.import_module(grid.module_name)
            for variant in grid.variants():
                with constants(module, variant):
                    num_bad += _measure(record, device, case, ceilings, variant)
    return num_bad


def _measure(
    record: Recorder, device: str, case: Case, ceilings: Ceilings, variant: dict[str, Any]
) -> bool:
    """Record one case; return whether it is wrong or failed."""
    fields: dict[str, Any] = {"op": case.op, "shape": case.shape, "variant": variant}
    try:
        if case.gate:
            error, bound = case.gate()
            fields |= {"gate_error": float(f"{error:.3g}"), "gate_bound": bound}
            if not error <= bound:
                record.write("kernel", **fields, failed="wrong output")
                return True
        times = times_us(case.calls, device)
    # one operator that does not compile must not hide the figures of the others
    except Exception as error:  # noqa: BLE001
        record.write("kernel", **fields, failed=f"{type(error).__name__}: {error}"[:500])
        return True
    bound_us, limit = ceilings.bound_us(case.num_bytes, case.num_flops)
    summary = spread(times)
    rivals = {name: spread(times_us(calls, device)) for name, calls in case.rivals.items()}
    record.write(
        "kernel",
        **fields,
        time_us=summary,
        bytes=case.num_bytes,
        flops=case.num_flops,
        bound_us=round(bound_us, 2),
        limit=limit,
        roofline_frac=round(bound_us / summary["median"], 4),
        rivals_us=rivals,
        sglang_published_ms=case.published_ms,
    )
    return False
