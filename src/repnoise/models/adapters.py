"""Adapters, LoRA above all: attach, load, merge. The only file that knows peft, which is imported when first needed."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, ModelError, RunError, suggest
from .quantised import is_quantised

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Kinds of peft 0.21 that have the method to merge and fail in it, or that do not train from a plain batch.
_NOT_MERGED = {"beft", "lily", "poly", "shadow", "trainable_tokens", "xlora"}


def add_lora(
    model: PreTrainedModel,
    rank: int,
    alpha: int | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
) -> PeftModel:
    """Freeze `model` and attach trainable LoRA weights: W x + (alpha / rank) B A x, where B starts as 0.

    rank: r >= 1. alpha: 2 * rank if left out.
    target_modules: names of the modules to adapt, or a regular expression. By default all linear layers but
    the head (which may be tied to the embeddings) and, in a mixture of experts, the fused expert weights too
    (dropout must then be 0).
    Look up `anatomy(...)` after this call, not before: modules are replaced.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    if rank < 1:
        raise ModelError(f"LoRA rank must be at least 1, got {rank}. Next step: set a rank such as 8.")
    if not 0.0 <= dropout < 1.0:
        raise ModelError(f"LoRA dropout must be in [0, 1), got {dropout}. Next step: 0.0 switches it off.")
    if is_adapted(model):
        raise ModelError("The model already carries an adapter. Next step: merge(model) first.")
    experts = _expert_weights(model) if target_modules is None else []
    if experts and dropout:
        raise ModelError(
            f"peft cannot apply dropout to fused expert weights ({experts[0]}), got dropout {dropout}.\n"
            "Next step: dropout 0.0, or name target_modules to adapt the attention alone."
        )
    targets = _all_linear(model) if target_modules is None else target_modules
    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets,
        target_parameters=experts or None,
        fan_in_fan_out=_transposed(model),
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        with _quiet():
            return get_peft_model(model, config)
    except ValueError as error:  # no such target module
        raise ModelError(
            f"LoRA could not be attached: {error}\n"
            f"Allowed: linear layers such as {', '.join(_all_linear(model)[:6])}. "
            "Next step: correct target_modules, or leave it out for all linear layers."
        ) from error


def check_adapter(kind: str, options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless `kind` is an adapter of peft that can be merged and has these options."""
    cls = _adapter_class(kind)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in options:
        if key not in known:
            hint = suggest(key, known)
            raise ConfigError(f"the adapter {kind!r} has no option {key!r}.{hint} See {cls.__name__} of peft.")


def add_adapter(model: PreTrainedModel, kind: str, options: Mapping[str, Any], *, steps: int = 0) -> PeftModel:
    """Freeze `model` and attach an adapter of the kind that peft calls `kind`, on all linear layers but the head.

    options: fields of the kind's config, which win over what is set here. steps: of the training, for kinds that
    plan with them (AdaLoRA).

    Raises:
        ConfigError: as `check_adapter`, or values that the kind refuses.
        ModelError: the model has an adapter already, or the kind does not fit its layers.
    """
    from peft import TaskType, get_peft_model

    check_adapter(kind, options)
    if is_adapted(model):
        raise ModelError("The model already carries an adapter. Next step: merge(model) first.")
    cls = _adapter_class(kind)
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    ours = {
        "task_type": TaskType.CAUSAL_LM,
        "target_modules": None if kind.lower() == "ln_tuning" else _all_linear(model),  # its own are the norms
        "feedforward_modules": [],  # IA3: scale what every layer gives
        "fan_in_fan_out": _transposed(model),
        "total_step": max(1, steps),
        "tinit": 0,  # AdaLoRA moves no ranks here
        "tfinal": 0,
    }
    try:
        config = cls(**{**{key: value for key, value in ours.items() if key in known}, **options})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the adapter {kind!r}: {' '.join(str(error).split())} Correct its options.") from error
    try:
        with _quiet():
            return get_peft_model(model, config)
    except (ValueError, TypeError, AssertionError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"The adapter {kind!r} could not be attached: {' '.join(str(error).split())}\n"
            "Next step: correct its options (block sizes must divide the layers' widths), or use LoRA."
        ) from error


def _adapter_class(kind: str) -> Any:
    """The peft config class of a kind that changes weights."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    kinds = {str(each.value).lower(): each for each in PEFT_TYPE_TO_CONFIG_MAPPING}
    usable = {
        name
        for name, each in kinds.items()
        if issubclass(tuner := PEFT_TYPE_TO_TUNER_MAPPING.get(each, object), BaseTuner)
        and hasattr(tuner, "merge_and_unload")
        and name not in _NOT_MERGED
    }
    name = kind.lower()
    if name in usable:
        return PEFT_TYPE_TO_CONFIG_MAPPING[kinds[name]]
    if name in kinds:
        raise ConfigError(
            f"the adapter {kind!r} cannot be merged into the weights, and an attack must leave a plain model."
            f" Allowed: {', '.join(sorted(usable))}."
        )
    raise ConfigError(f"peft knows no adapter {kind!r}.{suggest(name, usable)} Allowed: {', '.join(sorted(usable))}.")


def merge(model: nn.Module) -> PreTrainedModel:
    """Fold the adapter into the weights and return the plain model; the adapter is gone afterwards."""
    if not is_adapted(model):
        raise ModelError(f"The model carries no adapter to merge, got {type(model).__name__}.")
    if is_quantised(model):
        raise ModelError(
            "The adapter's base is quantised, and merging would round away what was trained.\n"
            "Next step: merge_into(load_model(SOURCE), model), which takes the original weights."
        )
    unload = getattr(model, "merge_and_unload", None)
    if unload is None:
        raise ModelError(
            "This kind of adapter cannot be merged into the weights (prompt tuning, for example).\n"
            "Allowed: LoRA and its relatives. Next step: train a LoRA adapter instead."
        )
    try:
        plain: PreTrainedModel = unload(safe_merge=True)
    except ValueError as error:  # safe_merge found NaN
        raise RunError(f"The adapter was not merged: {error} Next step: lower the learning rate.") from error
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        if leftover in vars(plain):
            delattr(plain, leftover)
    plain.requires_grad_(True)
    return plain


def merge_into(original: PreTrainedModel, adapted: nn.Module) -> PreTrainedModel:
    """Fold the adapter of `adapted`, which was trained on a quantised copy of `original`, into `original` itself.

    W + (alpha / rank) B A with the original's own W, in its dtype and on its device: the copy's rounding is not in it.
    """
    from peft import get_peft_model

    if not is_adapted(adapted):
        raise ModelError(f"The model carries no adapter to merge, got {type(adapted).__name__}.")
    config = copy.deepcopy(cast(Any, adapted).peft_config["default"])
    # else peft warns: the 4-bit layers of a GPT-2 are not transposed, and the original may come from another place
    config.fan_in_fan_out, config.base_model_name_or_path = _transposed(original), None
    trained = dict(adapted.named_parameters())
    try:
        with _quiet(), torch.no_grad():
            target = get_peft_model(original, config)
            for name, parameter in target.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(trained[name])
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"The adapter does not fit the original model: {error}\n"
            "Next step: give the model that was loaded in 4 bits, unquantised."
        ) from error
    return merge(target)


def load_adapter(base: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """`base` with the adapter in `folder` merged into it. Reads safetensors only."""
    from peft import PeftModel

    folder = Path(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"No {ADAPTER_WEIGHTS} in {folder}; .bin adapters are not loaded: unpickling can run code.\n"
            "Next step, if you trust the file: load it with peft and call save_pretrained(NEW_FOLDER)."
        )
    try:
        with _quiet():
            adapted: Any = PeftModel.from_pretrained(base, str(folder))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"The adapter in {folder} does not fit its base model: {error}\n"
            "Next step: check base_model_name_or_path in its adapter_config.json."
        ) from error
    return merge(adapted)


def is_adapted(model: nn.Module) -> bool:
    """Whether adapter layers are attached, by whichever peft interface."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return hasattr(model, "peft_config") or any(isinstance(m, BaseTunerLayer) for m in model.modules())


@contextmanager
def _quiet() -> Iterator[None]:
    """peft 0.21 reads an attribute that transformers 5.23 has renamed; nothing that a user could act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def _transposed(model: PreTrainedModel) -> bool:
    """Whether linear layers hold weights as (in, out), as GPT-2's do."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def _all_linear(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers, without the head."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def _expert_weights(model: PreTrainedModel) -> list[str]:
    """Names of the (experts, out, in) weights that transformers 5 fuses into one parameter."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
