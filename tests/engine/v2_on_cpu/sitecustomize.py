"""Let vLLM's newer model runner start without a GPU, its Triton kernels interpreted.

On PYTHONPATH of the one test that needs it, with TRITON_INTERPRET=1: vLLM believes in Triton once some
backend is listed, and the interpreter asks that backend for nothing.
"""

from types import SimpleNamespace

from triton.backends import backends

driver = SimpleNamespace(is_active=staticmethod(lambda: False))
backends["cpu"] = SimpleNamespace(compiler=None, driver=driver)
