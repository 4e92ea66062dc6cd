from __future__ import annotations

import sys
from types import ModuleType

import pytest

import vllm_ext


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "1.0.32", "0.3"])
def test_register_refuses_other_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("vllm.version")
    fake.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.version", fake)
    with pytest.raises(RuntimeError, match=f"written for vLLM 0.32.x, got {version}"):
        vllm_ext.register()
