"""Classes that transformers knows in this process only, as a user's own code would register them.

`my_llama` is Llama under another name, `my_helium` Helium, and so on; the others have Llama's keys
and tensors and compute something else.
"""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def register() -> None:
    """Makes them known to AutoConfig and AutoModelForCausalLM."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

    class OffsetNorm(torch.nn.Module):
        """An RMSNorm whose weight is stored less 1."""

        def __init__(self, size: int, eps: float) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(size))
            self.eps = eps

        def forward(self, x: Any) -> Any:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    class MyOffsetForCausalLM(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.input_layernorm = OffsetNorm(config.hidden_size, config.rms_norm_eps)
                layer.post_attention_layernorm = OffsetNorm(config.hidden_size, config.rms_norm_eps)
            self.model.norm = OffsetNorm(config.hidden_size, config.rms_norm_eps)

    class MyCappedForCausalLM(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 30 * torch.tanh(out.logits / 30)
            return out

    class MySixthForCausalLM(LlamaForCausalLM):
        """One layer of six is another, which no key says."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers[5::6]:
                layer.mlp.register_forward_hook(lambda module, given, out: 2 * out)

    def renamed(name: str, base: str) -> type:
        """A class of transformers under another name."""
        return type(f"{name}ForCausalLM", (getattr(transformers, f"{base}ForCausalLM"),), {})

    for model_type, base, kind in (
        ("my_llama", "Llama", renamed("MyLlama", "Llama")),
        ("my_helium", "Helium", renamed("MyHelium", "Helium")),
        ("my_mistral", "Mistral", renamed("MyMistral", "Mistral")),
        ("my_offset", "Llama", MyOffsetForCausalLM),
        ("my_capped", "Llama", MyCappedForCausalLM),
        ("my_sixth", "Llama", MySixthForCausalLM),
    ):
        config = type(f"{base}OfMine", (getattr(transformers, f"{base}Config"),), {})
        config.model_type = model_type
        kind.config_class = config
        AutoConfig.register(model_type, config)
        AutoModelForCausalLM.register(config, kind)


@cache
def rename(model_type: str) -> str:
    """Registers a class of transformers a second time, and gives its new model type."""
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
    )

    own = CONFIG_MAPPING[model_type]
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[own]
    config = type(f"Renamed{own.__name__}", (own,), {})
    config.model_type = f"renamed_{model_type}"
    model = type(f"Renamed{kind.__name__}", (kind,), {})
    model.config_class = config
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)
    return config.model_type
