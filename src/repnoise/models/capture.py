"""Read the residual stream and the MLP outputs of a forward pass, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import ModelError, RunError
from .anatomy import anatomy
from .structure import Anatomy, is_sharded, unwrap


class Capture:
    """Activations of the latest forward pass inside `with capture(model) as seen`, graphs kept."""

    def __init__(self, layers: int, *, residual: bool, mlp: bool) -> None:
        self._layers = layers
        self._wants = {"residual": residual, "mlp": mlp}
        self._grad = torch.is_grad_enabled()
        self._shape: torch.Size | None = None
        self._residual: dict[int, Tensor] = {}
        self._mlp: dict[int, Tensor] = {}

    @property
    def residual(self) -> list[Tensor]:
        """L + 1 tensors (B, T, d): the input of block 0, then each block's output, before the final norm."""
        return self._complete("residual", self._residual, self._layers + 1)

    @property
    def mlp(self) -> list[Tensor]:
        """L tensors (B, T, d): each block's post-MLP activation, before the residual add."""
        return self._complete("mlp", self._mlp, self._layers)

    def check(self) -> None:
        """Raise if anything that was asked for is missing."""
        for name, wanted in self._wants.items():
            if wanted:
                getattr(self, name)

    def _complete(self, name: str, found: dict[int, Tensor], expected: int) -> list[Tensor]:
        if not self._wants[name]:
            raise RunError(f"seen.{name} was not captured. Next step: capture(model, {name}=True).")
        missing = [index for index in range(expected) if index not in found]
        if not missing:
            return [found[index] for index in range(expected)]
        if len(missing) == expected:
            what = "the model did not run inside `with capture(...)`, or a copy of it ran"
        else:
            what = f"indices {missing} are missing: a layer was skipped, or the forward pass was cut short"
        raise RunError(
            f"seen.{name} has {len(found)} of {expected} tensors; {what}.\n"
            "Next step: call exactly this model inside the block; set layerdrop to 0 where its config has it."
        )

    # Hooks. A checkpointed layer runs again during backward, and so do the hooks inside it. That second run
    # is skipped: it would replace the tensors of the graph in use.

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _in_backward():
            return
        hidden = args[0] if args else next(iter(kwargs.values()))  # the hidden states come first in every block
        self._residual.clear()
        self._mlp.clear()
        self._grad = torch.is_grad_enabled()
        self._shape = hidden.shape
        if self._wants["residual"]:
            self._residual[0] = hidden

    def _keep_residual(self, index: int, output: Any) -> None:
        if not _in_backward():
            self._residual[index + 1] = _first(output)

    def _tie_last_mlp(self, index: int, output: Any) -> None:
        """FSDP gathers a block's weights for backward when a gradient reaches the block's output, and not before.

        The last MLP's output may be read where nothing reads the last block's. It is made to depend on it, by zero.
        """
        if not _in_backward() and index in self._mlp:
            self._mlp[index] = _Tied.apply(self._mlp[index], _first(output))

    def _keep_mlp(self, index: int, output: Any) -> None:
        if _in_backward():
            return
        if self._grad and not torch.is_grad_enabled():
            raise ModelError(
                "MLP outputs carry no gradient under re-entrant gradient checkpointing.\n"
                'Next step: gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        output = _first(output)
        if self._shape is not None and output.dim() == 2:  # OPT flattens (B, T, d) to (B * T, d)
            output = output.reshape(*self._shape[:-1], output.shape[-1])
        self._mlp[index] = output


@contextmanager
def capture(model: nn.Module, residual: bool = True, mlp: bool = True) -> Iterator[Capture]:
    """Hook the blocks and MLPs of `model` while the body runs; the hooks go when it ends or raises.

    Blocks may nest; each sees every forward pass within it. If several passes run in one block, the latest
    counts. Leaving the block without a complete forward pass is an error. Tensors stay readable afterwards.
    """
    parts = anatomy(model)
    seen = Capture(len(parts.layers), residual=residual, mlp=mlp)
    handles: list[RemovableHandle] = []
    try:
        handles.append(parts.layers[0].register_forward_pre_hook(seen._start, with_kwargs=True))
        for index, (layer, block_mlp) in enumerate(zip(parts.layers, parts.mlps, strict=True)):
            if residual:
                handles.append(layer.register_forward_hook(_hook(seen._keep_residual, index)))
            if mlp:
                handles.append(block_mlp.register_forward_hook(_hook(seen._keep_mlp, index)))
        if mlp and is_sharded(model):
            handles.append(parts.layers[-1].register_forward_hook(_hook(seen._tie_last_mlp, len(parts.layers) - 1)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    seen.check()


@torch.no_grad()
def check_anatomy(model: nn.Module, tolerance: float = 1e-4) -> Anatomy:
    """Prove a family's row: its parts, applied to the last residual, must give the model's own logits.

    Runs one forward pass on a few token ids. The difference is judged relative to the largest logit.
    """
    parts = anatomy(model)
    plain = cast(PreTrainedModel, unwrap(model))
    device = next(plain.parameters()).device
    ids = torch.arange(1, 9, device=device)[None] % cast(nn.Embedding, plain.get_input_embeddings()).num_embeddings
    training = [module for module in plain.modules() if module.training]
    plain.eval()
    try:
        with capture(plain) as seen:
            expected = plain(input_ids=ids).logits.float()
        difference = (parts.logits(seen.residual[-1]).float() - expected).abs().max() / expected.abs().max()
    finally:
        for module in training:
            module.training = True
    shapes = {tuple(tensor.shape) for tensor in [*seen.mlp, *seen.residual]}
    if len(shapes) > 1:
        raise ModelError(
            f"MLP outputs and residual of family {parts.family!r} differ in shape: got {sorted(shapes)}.\n"
            "Next step: point Family(mlp=...) at the module whose output is added to the residual stream."
        )
    if not difference <= tolerance:
        raise ModelError(
            f"The parts of family {parts.family!r} do not give the model's logits: relative difference "
            f"{difference.item():.2g}, allowed {tolerance:g}.\n"
            "Next step: check final, head, logit_scale, logit_divisor and softcap in register_family(...)."
        )
    return parts.own


class _Tied(torch.autograd.Function):
    """The first tensor; backward gives the second a gradient of zero (zero times the tensor would keep its NaNs)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (other,) = ctx.saved_tensors
        return gradient, torch.zeros_like(other)


def _hook(keep: Any, index: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        keep(index, output)

    return hook


def _first(output: Any) -> Tensor:
    """Some blocks and mixtures of experts return (hidden, ...)."""
    return output[0] if isinstance(output, tuple) else output


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
