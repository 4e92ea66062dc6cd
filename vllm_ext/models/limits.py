"""Engine settings that SALA cannot run with, refused before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from vllm_ext.models.defaults import set_defaults

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from sala_kernels.spec import SalaSpec


_QUANTISATIONS = (None, "fp8", "auto_gptq", "auto_awq", "awq", "compressed-tensors")
"""vLLM's names of the weight formats whose tensors the model loads; AWQ has one a device."""


class SalaLimits(VerifyAndUpdateConfig):
    """vLLM's per-architecture check, run in the process that parses the arguments."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check the engine's settings against the model.

        Raises:
            ValueError: a setting asks for what the model or the plugin cannot compute.
            NotImplementedError: the device has no SALA kernels.
        """
        spec = vllm_config.model_config.hf_config.spec
        _check_device(vllm_config)
        model, cache = vllm_config.model_config, vllm_config.cache_config
        if model.runner_type != "generate":
            raise ValueError(f"runner: expected 'generate', got {model.runner_type!r}")
        if model.quantization not in _QUANTISATIONS:
            raise ValueError(
                "quantization: expected "
                f"{', '.join(repr(name) for name in _QUANTISATIONS if name)} or none, got {model.quantization!r}"
            )
        if model.quantization and current_platform.device_type == "cpu":
            _check_quantisation_on_cpu(model.quantization)

        cache_dtype, model_dtype = cache.cache_dtype, model.dtype
        if cache_dtype != "auto" and STR_DTYPE_TO_TORCH_DTYPE.get(cache_dtype) != model_dtype:
            raise ValueError(
                f"kv_cache_dtype: expected 'auto' ({model_dtype}), got {cache_dtype!r}: block selection "
                "averages and compares cached keys, which is only defined in the model's own dtype"
            )

        for name in ("mamba_cache_dtype", "mamba_ssm_cache_dtype"):
            if (dtype := getattr(cache, name)) not in ("auto", "float32"):
                raise ValueError(
                    f"{name}: expected 'auto' or 'float32', got {dtype!r}: lightning states are float32"
                )

        _check_ranks(spec, vllm_config.parallel_config.tensor_parallel_size)
        _check_speculation(vllm_config)
        set_defaults(vllm_config)


def _check_quantisation_on_cpu(name: str) -> None:
    """Check that vLLM has operators for a weight format on this machine.

    Raises:
        ValueError: it has not; vLLM itself would find out at the first step.
    """
    if name == "fp8":
        raise ValueError("quantization: 'fp8' needs a GPU, vLLM has no such operators for CPUs")
    if not torch.cpu._is_avx512_supported():  # vLLM's own test for which operators it loads
        raise ValueError(f"quantization: {name!r} needs a GPU or a CPU with AVX-512")


def _check_ranks(spec: SalaSpec, tp_size: int) -> None:
    """Check that heads and channels divide evenly; KV heads may also be repeated on several ranks.

    Raises:
        ValueError: they do not.
    """
    for count, what in (
        (spec.num_heads, "query heads"),
        (spec.lightning_num_heads, "lightning heads"),
        (spec.intermediate_size, "MLP channels"),
    ):
        if count % tp_size:
            raise ValueError(
                f"tensor_parallel_size: expected a divisor of {count} {what}, got {tp_size}; "
                "use replicas instead"
            )
    if spec.num_kv_heads % tp_size and tp_size % spec.num_kv_heads:
        raise ValueError(
            f"tensor_parallel_size: expected a divisor or a multiple of {spec.num_kv_heads} KV heads, "
            f"got {tp_size}; use replicas instead"
        )


def _check_speculation(vllm_config: VllmConfig) -> None:
    """Check how drafts are made, and that rejected ones can be taken back.

    Raises:
        ValueError: the method needs a draft model, or the combination does not run.
    """
    speculation = vllm_config.speculative_config
    if speculation is None:
        return
    if speculation.method not in ("ngram", "ngram_gpu"):
        raise ValueError(
            "speculative_config: expected method 'ngram' or 'ngram_gpu', got "
            f"{speculation.method!r}: draft models and draft heads are not supported, there are none for SALA yet"
        )
    if vllm_config.use_v2_model_runner:
        return
    if speculation.method == "ngram_gpu":
        raise ValueError("speculative_config: expected method 'ngram' on a CPU, got 'ngram_gpu'")
    if vllm_config.cache_config.enable_prefix_caching:
        raise ValueError(
            "speculative_config: expected no prefix caching beside drafts on a CPU "
            "(--no-enable-prefix-caching): vLLM moves states between drafts and cached blocks on GPUs only"
        )


def _check_device(vllm_config: VllmConfig) -> None:
    """Check the device, and choose how steps are launched on a GPU.

    Raises:
        NotImplementedError: there are no SALA kernels for the device.
        ValueError: the graph mode cannot capture the model.
    """
    if current_platform.device_type == "cpu":
        return
    if not current_platform.is_cuda():
        raise NotImplementedError(
            f"device: expected 'cuda' or 'cpu', got {current_platform.device_type!r}"
        )
    if not current_platform.is_device_capability(90):
        raise NotImplementedError(
            "device: expected a Hopper GPU (compute capability 9.0), which the kernels are built and tested "
            f"for, got {current_platform.get_device_name()} "
            f"({current_platform.get_device_capability()})"
        )
    if not vllm_config.use_v2_model_runner:
        raise NotImplementedError(
            "model runner: expected vLLM's V2 runner, whose step tensors stay in place for CUDA graphs; "
            "unset VLLM_USE_V2_MODEL_RUNNER"
        )
    # Decode is launch-bound and is captured whole. A prompt step is bound by the GPU: its kernels are fused by
    # hand, and torch.compile or piecewise graphs would only lengthen the start (docs/decisions/0010).
    compilation = vllm_config.compilation_config
    if compilation.mode is None:
        compilation.mode = CompilationMode.NONE
    if compilation.cudagraph_mode is None:
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    if compilation.cudagraph_mode not in (CUDAGraphMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY):
        raise ValueError(
            "cudagraph_mode: expected FULL_DECODE_ONLY or NONE, "
            f"got {compilation.cudagraph_mode.name}: prompt steps are not captured"
        )
