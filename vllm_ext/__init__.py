"""MiniCPM-SALA for vLLM, out of tree; importing this package imports neither vllm nor torch."""


def register() -> None:
    """Register the SALA config, model and backends with vLLM (entry point ``vllm.general_plugins``)."""
