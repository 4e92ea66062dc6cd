"""MiniCPM-SALA for vLLM, out of tree; importing this package imports neither vllm nor torch."""


def register() -> None:
    """Register the SALA config, model and backends with vLLM (entry point ``vllm.general_plugins``).

    vLLM calls it in every process, possibly more than once. Nothing is imported at module level because
    vLLM logs and swallows errors of that import, whereas errors raised in here stop the start.

    Raises:
        RuntimeError: this vLLM is not a version the plugin is written for.
    """
    from vllm_ext.versions import require_supported_vllm

    require_supported_vllm()

    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import (
        AttentionBackendEnum,
        MambaAttentionBackendEnum,
        register_backend,
    )

    from sala_kernels.spec import ARCHITECTURE, MODEL_TYPE
    from vllm_ext.hf_config import SalaConfig
    from vllm_ext.models.limits import SalaLimits
    from vllm_ext.progress import choose_folder

    choose_folder()

    AutoConfig.register(MODEL_TYPE, SalaConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "vllm_ext.models.sala:SalaForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = SalaLimits
    # a second registration of the same name raises
    if "SALA_SPARSE" not in AttentionBackendEnum.__members__:
        register_backend("SALA_SPARSE", "vllm_ext.attention.sparse.SparseBackend")
    if "SALA_LIGHTNING" not in MambaAttentionBackendEnum.__members__:
        register_backend(
            "SALA_LIGHTNING", "vllm_ext.attention.lightning.LightningBackend", is_mamba=True
        )
