"""Where a model keeps its layers, MLPs, final norm and head: the only file that knows model families.

A family is one row of `FAMILIES`, keyed by `config.model_type`. A model that is not listed gets an error that
says what to set; `register_family` adds a row, and `check_anatomy` (in capture.py) proves that it is right.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from repnoise.errors import ModelError
from repnoise.models.zero3 import is_zero3


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


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model that the losses look at; built by `anatomy`.

    Attach adapters first and ask for the anatomy afterwards: an adapter replaces modules.
    """

    family: str
    """`config.model_type`."""
    layers: tuple[nn.Module, ...]
    """The L blocks in order."""
    mlps: tuple[nn.Module, ...]
    """One per block; its output is the post-MLP activation before the residual add, (B, T, d)."""
    final: tuple[nn.Module, ...]
    """Modules between the last residual stream and the head, in order; may be empty."""
    head: nn.Module
    """Linear layer to the vocabulary, possibly tied, possibly with bias."""
    logit_scale: float = 1.0
    """The logits are multiplied by it."""
    softcap: float | None = None
    """If set, logits become softcap * tanh(logits / softcap)."""

    @property
    def own(self) -> Anatomy:
        """The same with the model's own `final` and `head`; where its weights are spread, these here are copies."""
        return self

    def logits(self, hidden: Tensor) -> Tensor:
        """cap(scale * head(final(hidden))): the lens; on the last residual stream, the model's own logits.

        hidden: (..., d), a residual stream that has not been through the final norm. Returns (..., V).
        """
        for module in self.final:
            hidden = module(hidden)
        logits = self.head(hidden)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a causal language model, wrapped (PEFT, DDP, DeepSpeed, torch.compile) or not."""
    model = unwrap(model)
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", None)
    if config is None or name is None:
        raise ModelError(
            f"Not a transformers language model: got {type(model).__name__} without config.model_type.\n"
            "Next step: load it with repnoise.models.load_model, or set config.model_type and register it."
        )
    family = FAMILIES.get(name)
    if family is None:
        raise ModelError(_unknown(name))

    layers = tuple(_get(model, family.layers, name, "layers"))
    if not layers:
        raise ModelError(
            f"The model has no layers: {family.layers!r} of {type(model).__name__} is empty.\n"
            "Allowed: at least one block. Next step: check num_hidden_layers in its config.json."
        )
    final = (_get(model, path, name, "final", optional=True) for path in family.final)
    scale = 1.0 if family.logit_scale is None else float(_value(config, family.logit_scale, name) or 1.0)
    if family.logit_divisor is not None:
        scale /= float(_value(config, family.logit_divisor, name) or 1.0)
    softcap = None if family.softcap is None else _value(config, family.softcap, name)
    parts = Anatomy(
        family=name,
        layers=layers,
        mlps=tuple(_get(layer, family.mlp, name, "mlp") for layer in layers),
        final=tuple(module for module in final if module is not None),
        head=_get(model, family.head, name, "head"),
        logit_scale=scale,
        softcap=None if softcap is None else float(softcap),
    )
    if not is_sharded(model):
        return parts
    from repnoise.models.sharding import ShardedAnatomy

    return ShardedAnatomy(model, parts)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or DeepSpeed ZeRO-3 has spread this model's weights over processes."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing can be spread
    return is_zero3(model) or (fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules()))


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside PEFT, DistributedDataParallel, DeepSpeed and torch.compile wrappers."""
    while True:
        if "_orig_mod" in model._modules:  # torch.compile
            inner = model._modules["_orig_mod"]
        elif "module" in model._modules:  # DataParallel, DistributedDataParallel, DeepSpeed
            inner = model._modules["module"]
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):  # PeftModel
            inner = cast(Any, model).get_base_model()
        else:
            return model
        if inner is None or inner is model:
            return model
        model = inner


def _get(root: nn.Module, path: str, family: str, field: str, *, optional: bool = False) -> Any:
    """Follow a dotted path; what is missing or None is an error unless it is optional."""
    found: Any = root
    for part in path.split("."):
        holder, found = found, getattr(found, part, None)
        if found is None:
            if optional:
                return None
            children = ", ".join(name for name, _ in holder.named_children()) or "no submodules"
            raise ModelError(
                f"Family {family!r} has {field} at {path!r}, but {type(holder).__name__} lacks {part!r}.\n"
                f"It has: {children}.\n"
                f"Next step: register_family({family!r}, Family(...), replace=True) and the right {field}."
            )
    return found


def _value(config: Any, key: str, family: str) -> Any:
    if not hasattr(config, key):
        raise ModelError(
            f"The family {family!r} reads the config value {key!r}, which this model's config lacks.\n"
            f"Next step: register_family({family!r}, Family(...), replace=True) with the right name."
        )
    return getattr(config, key)


def _unknown(name: str) -> str:
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
