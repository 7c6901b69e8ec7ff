"""From a model to its parts, layers, MLPs, final norm and head, by the row of its family in `families.py`.

A model that is not listed gets an error that says what to set; `register_family` adds a row, and `check_anatomy` (in
capture.py) proves that it is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ModelError
from .families import FAMILIES, unknown_family
from .structure import Anatomy, is_sharded, unwrap

if TYPE_CHECKING:
    from .sharding import ShardedAnatomy


def anatomy(model: nn.Module) -> Anatomy | ShardedAnatomy:
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
        raise ModelError(unknown_family(name))

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
    from .sharding import ShardedAnatomy

    return ShardedAnatomy(model, parts)


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
