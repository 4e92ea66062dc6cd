"""Which package may import what; CONTRIBUTING.md says why."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "vllm", "transformers")
IMPLEMENTATIONS = {"kernel", "op", "torch_impl"}
# of the gateway, from the top; a part imports only what stands below it
LAYERS = [
    f"sala_serve.{part}"
    for part in (
        *("api", "jobs", "generation", "scheduling", "tenants", "tokens", "engine"),
        *("state", "telemetry"),
    )
]


@dataclass(frozen=True)
class Rule:
    """What the files under ``glob`` may not import, as dotted prefixes."""

    glob: str
    forbidden: tuple[str, ...] = ()
    excepted: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    """If given: nothing but the standard library and these."""
    no_implementations: bool = False

    def violations(self, source: str) -> list[str]:
        return sorted(name for name in imported(source) if self._forbids(name))

    def _forbids(self, name: str) -> bool:
        root, *rest = name.split(".")
        if is_under(name, self.excepted):
            return False
        if self.only is not None and root not in sys.stdlib_module_names | set(self.only):
            return True
        if self.no_implementations and root == "sala_kernels" and IMPLEMENTATIONS & set(rest):
            return True
        return is_under(name, self.forbidden)


RULES = [
    Rule(
        "sala_serve/**/*.py",
        (*HEAVY, "triton", "vllm_ext", "sala_training", "sala_kernels"),
        excepted=("sala_kernels.spec",),
    ),
    Rule("vllm_ext/**/*.py", ("sala_serve", "sala_training")),
    Rule(
        "training/sala_training/**/*.py",
        ("vllm", "vllm_ext", "sala_serve"),
        # chats are rendered by the code that serves
        excepted=("sala_serve.tokens.counter.TokenCounter", "sala_serve.errors.InvalidRequest"),
    ),
    Rule("kernels/sala_kernels/**/*.py", only=("torch", "triton", "sala_kernels")),
    Rule("kernels/sala_kernels/**/reference.py", no_implementations=True),
    Rule("kernels/sala_kernels/spec.py", only=()),
    *(Rule(f"sala_serve/{part}.py", tuple(LAYERS)) for part in ("bodies", "errors", "events")),
    Rule("sala_serve/settings.py", ("sala_serve",)),
    # the one place that puts the sections of all packages together
    Rule(
        "sala_serve/config.py",
        tuple(LAYERS),
        excepted=(*(f"{layer}.settings" for layer in LAYERS), "sala_serve.state.StateSettings"),
    ),
]
LAYER_RULES = [
    Rule(layer.replace(".", "/") + ending, tuple(LAYERS[:position]))
    for position, layer in enumerate(LAYERS)
    for ending in ("/**/*.py", ".py")
]


def is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def imported(source: str) -> set[str]:
    """Every dotted name imported anywhere in ``source``; ``from a import b`` is ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def stray_init_files(root: Path) -> list[str]:
    """``kernels`` and ``training`` are folders, not packages, and so is everything under tests."""
    strays = [root / "kernels/__init__.py", root / "training/__init__.py"]
    strays += root.glob("tests/**/__init__.py")
    return [str(path.relative_to(root)) for path in strays if path.exists()]


@pytest.mark.parametrize("rule", RULES + LAYER_RULES, ids=lambda rule: rule.glob)
def test_files_import_only_what_their_rule_allows(rule: Rule) -> None:
    files = list(ROOT.glob(rule.glob))
    assert files or rule in LAYER_RULES, f"no file matches {rule.glob}: the rule has gone stale"
    found = {
        str(path.relative_to(ROOT)): names
        for path in files
        if (names := rule.violations(path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    ("glob", "source"),
    [
        ("sala_serve/**/*.py", "import torch.nn"),
        ("sala_serve/**/*.py", "def late():\n    from vllm import LLM"),
        ("sala_serve/**/*.py", "from sala_kernels import registry"),
        ("vllm_ext/**/*.py", "from sala_serve.config import GatewayConfig"),
        ("training/sala_training/**/*.py", "import vllm_ext"),
        ("kernels/sala_kernels/**/*.py", "import transformers"),
        ("kernels/sala_kernels/spec.py", "import torch"),
        ("kernels/sala_kernels/**/reference.py", "from sala_kernels.lightning import op"),
        ("kernels/sala_kernels/**/reference.py", "from sala_kernels.lightning.kernel import run"),
        ("sala_serve/engine/**/*.py", "from sala_serve.api import chat"),
        ("sala_serve/errors.py", "import sala_serve.engine.http"),
        ("sala_serve/config.py", "from sala_serve.tenants.keys import KeyRing"),
        ("sala_serve/settings.py", "from sala_serve.config import Settings"),
        ("sala_serve/scheduling/**/*.py", "from sala_serve.generation import Call"),
        ("sala_serve/tenants/**/*.py", "from sala_serve.jobs.store import Jobs"),
    ],
)
def test_planted_import_is_found(glob: str, source: str) -> None:
    (rule,) = [rule for rule in RULES + LAYER_RULES if rule.glob == glob]
    assert rule.violations(source)


def test_gateway_may_read_the_model_specification() -> None:
    assert not RULES[0].violations("from sala_kernels.spec import SalaSpec")


def test_no_stray_init_files() -> None:
    assert stray_init_files(ROOT) == []


@pytest.mark.parametrize("folder", ["kernels", "training", "tests/kernels"])
def test_planted_init_file_is_found(folder: str, tmp_path: Path) -> None:
    planted = tmp_path / folder / "__init__.py"
    planted.parent.mkdir(parents=True)
    planted.touch()
    assert stray_init_files(tmp_path) == [f"{folder}/__init__.py"]


@pytest.mark.parametrize("package", ["vllm_ext", "sala_serve", "sala_kernels", "sala_kernels.spec"])
def test_import_in_a_fresh_process_loads_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}; print(*({set(HEAVY)!r} & set(sys.modules)))"
    process = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert process.stdout.strip() == ""
