"""Let vLLM's newer model runner start without a GPU, its Triton kernels interpreted.

On PYTHONPATH of the tests that need it, with TRITON_INTERPRET=1: vLLM believes in Triton once some
backend is listed, and the interpreter asks that backend for nothing.
"""

from types import SimpleNamespace
from typing import Any

from triton.backends import backends
from triton.runtime.interpreter import InterpreterBuilder

driver = SimpleNamespace(is_active=staticmethod(lambda: False))
backends["cpu"] = SimpleNamespace(compiler=None, driver=driver)

load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store


def load_any_mask(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
    mask.data = mask.data.astype(bool)
    return load(self, pointers, mask, *others)


def store_any_mask(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
    mask.data = mask.data.astype(bool)
    return store(self, pointers, value, mask, *others)


# masks that come out of a reduction are integers here, which the interpreter refuses
InterpreterBuilder.create_masked_load = load_any_mask
InterpreterBuilder.create_masked_store = store_any_mask
