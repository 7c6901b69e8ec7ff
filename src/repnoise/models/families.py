"""The table of model families, by `config.model_type`: where layers, MLPs, norm and head lie. Nothing else knows."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ModelError


@dataclass(frozen=True)
class Family:
    """Attribute paths of one model family, from the causal language model down."""

    layers: str = "model.layers"
    """The list of blocks."""
    mlp: str = "mlp"
    """Path inside a block, to the module whose output is the post-MLP activation before the residual add."""
    final: tuple[str, ...] = ("model.norm",)
    """What stands between the last residual stream and the head, in order; absent ones are skipped."""
    head: str = "lm_head"
    """The output layer."""
    logit_scale: str | None = None
    """Name of the config value that the logits are multiplied by."""
    logit_divisor: str | None = None
    """Name of the config value that the logits are divided by."""
    softcap: str | None = None
    """Name of the config value c in c * tanh(logits / c)."""


# In Gemma and OLMo 2 a norm follows the MLP before the residual add; what counts is the MLP's own output, as
# in the released RepNoise code. OPT has no MLP module: its block calls fc1 and fc2 on (B * T, d), and capture
# reshapes. In a mixture of experts it is the weighted sum over the chosen experts.
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "smollm3": Family(),
    "olmo2": Family(),
    "phi3": Family(),
    "mixtral": Family(),
    "qwen3_moe": Family(),
    "granite": Family(logit_divisor="logits_scaling"),
    "cohere": Family(logit_scale="logit_scale"),
    "gemma2": Family(softcap="final_logit_softcapping"),
    "gemma3_text": Family(softcap="final_logit_softcapping"),
    "phi": Family(final=("model.final_layernorm",)),
    "gpt2": Family(layers="transformer.h", final=("transformer.ln_f",)),
    "gpt_neox": Family(layers="gpt_neox.layers", final=("gpt_neox.final_layer_norm",)),
    "opt": Family(
        layers="model.decoder.layers",
        mlp="fc2",
        final=("model.decoder.final_layer_norm", "model.decoder.project_out"),
    ),
}


def register_family(model_type: str, family: Family, *, replace: bool = False) -> None:
    """Teach the package a model family: `model_type` is the value in the model's config.json."""
    if model_type in FAMILIES and not replace:
        raise ModelError(
            f"The model family {model_type!r} is already registered as {FAMILIES[model_type]}.\n"
            "Pass replace=True to change it."
        )
    FAMILIES[model_type] = family


def unknown_family(name: str) -> str:
    """What to say of a model whose family is not in the table."""
    return (
        f"Unknown model family {name!r}. Known: {', '.join(sorted(FAMILIES))}.\n"
        "Next step: name its parts and register them, here for a model that is built like Llama:\n"
        "  from repnoise.models import Family, check_anatomy, register_family\n"
        f"  register_family({name!r}, Family(\n"
        '      layers="model.layers",   # the list of blocks\n'
        '      mlp="mlp",               # inside a block: its output is the post-MLP activation\n'
        '      final=("model.norm",),   # between the last block and the head\n'
        '      head="lm_head",          # also logit_scale, logit_divisor, softcap: names of config values\n'
        "  ))\n"
        "  check_anatomy(model)         # compares the parts with the model's own logits"
    )
