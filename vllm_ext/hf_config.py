"""The Hugging Face configuration class of a SALA checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from sala_kernels.spec import MODEL_TYPE, LayerKind, SalaSpec


class SalaConfig(PreTrainedConfig):
    """``config.json`` as it is: every field of the file becomes an attribute, none is renamed.

    Read the model from :attr:`spec`; the attributes are for vLLM and transformers. One field is ours:
    ``always_sparse`` (default false) selects blocks at every position, as if ``dense_len`` were 0.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True

    def __post_init__(self, **kwargs: Any) -> None:
        # refuse what we do not compute while the file is read, before transformers rewrites any field
        SalaSpec.from_config(kwargs)
        super().__post_init__(**kwargs)

    @property
    def spec(self) -> SalaSpec:
        """The model these fields describe.

        Raises:
            SpecError: a field is missing or asks for what SALA does not compute.
        """
        return SalaSpec.from_config(self.to_dict())

    @property
    def layers_block_type(self) -> list[str]:
        """Layer kinds in vLLM's words; it sizes the cache groups of hybrid models by them."""
        names = {LayerKind.SPARSE: "attention", LayerKind.LIGHTNING: "linear_attention"}
        return [names[kind] for kind in self.spec.layer_kinds]
