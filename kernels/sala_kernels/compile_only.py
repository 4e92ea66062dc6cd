"""Compile Triton kernels for a GPU that is not there, to see registers, spills and matrix instructions.

Triton compiles from the shapes and dtypes of a launch; the launchers of this package never read a
tensor's values, so running them on CPU tensors under :func:`compile_only` compiles exactly what a GPU
would run, and launches nothing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

HOPPER = ("cuda", 90, 32)
"""Backend, compute capability and warp size."""


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler made of one kernel and one set of constants."""

    name: str
    registers: int
    """Registers a thread, at most 255."""
    spilled_bytes: int
    """Local memory a thread: spilled registers and arrays."""
    shared_bytes: int
    num_warps: int
    matrix_instructions: dict[str, int]
    """How often the machine code holds HGMMA (Hopper's own) and HMMA (older, slower)."""


class _AbsentGpu:
    """The part of Triton's driver interface that compilation needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*HOPPER)


@contextmanager
def compile_only() -> Iterator[list[CompiledKernel]]:
    """Make every Triton launch inside compile for Hopper and launch nothing.

    Yields:
        The kernels compiled, in order; the list grows as launches happen.

    Raises:
        RuntimeError: Triton interprets its kernels in this process.
    """
    import triton
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("compile_only needs a process without Triton's interpreter")
    kernels: list[CompiledKernel] = []
    seen: set[str] = set()
    real_run = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = real_run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            kernels.append(_inspect(compiled))
        return compiled

    triton.runtime.driver.set_active(_AbsentGpu())
    JITFunction.run = run
    try:
        yield kernels
    finally:
        JITFunction.run = real_run


def _inspect(compiled: Any) -> CompiledKernel:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [knobs.nvidia.cuobjdump.path, option, file.name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack, local = (
        int(re.search(rf"\b{field}:(\d+)", usage).group(1))  # type: ignore[union-attr]
        for field in ("REG", "STACK", "LOCAL")
    )
    return CompiledKernel(
        name=compiled.metadata.name,
        registers=registers,
        spilled_bytes=stack + local,
        shared_bytes=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        matrix_instructions={op: len(re.findall(rf"\b{op}\.", sass)) for op in ("HGMMA", "HMMA")},
    )
