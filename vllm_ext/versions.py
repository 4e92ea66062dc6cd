"""The vLLM release the plugin is written for and tested with."""

SUPPORTED_VLLM = "0.32"
"""Major and minor version. vLLM's extension points change between minors, so there is one."""


def require_supported_vllm() -> None:
    """Check the installed vLLM.

    Raises:
        RuntimeError: its minor version is another one.
    """
    from vllm.version import __version__

    if not __version__.startswith(f"{SUPPORTED_VLLM}."):
        raise RuntimeError(
            f"the sala plugin is written for vLLM {SUPPORTED_VLLM}.x, got {__version__}: "
            "install that version, or uninstall sala-serve to run other models on this one"
        )
