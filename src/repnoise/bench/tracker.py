"""Count the bytes of a program that allocates none: every tensor is fake, its storage is followed to its end."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class StorageTracker(TorchDispatchMode):
    """Bytes of all storages that are alive, by what they are for, and the moment at which they were most.

    Numbers that decide about shapes must exist: operations on integers and bools alone (ids, labels, masks) run for
    real and are not counted. Everything else is fake. A number that is read out of a fake tensor, a loss for example,
    reads as 1, a truth as False.

    What a kernel allocates inside of itself and frees again is not seen, but for one thing on CPUs.

    Args:
        label: a new tensor -> what it is for; called while the stack that made it stands.
        cpu: count the copies that elementwise CPU kernels make of operands in another precision than they compute in
            (`compute_types` in ATen's TensorIterator.cpp; CUDA kernels convert each element as they read it).
    """

    def __init__(self, label: Callable[[Tensor], str], cpu: bool = False) -> None:
        super().__init__()
        self.label, self.cpu = label, cpu
        self.now: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._total = self._most = 0
        self._alive: dict[int, tuple[str, int]] = {}  # by address: (label, bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fake = any(isinstance(tensor, FakeTensor) for tensor in given)
        if func is torch.ops.aten._local_scalar_dense.default and fake:
            return False if given[0].dtype is torch.bool else 1
        if not given or fake:
            out = func(*args, **kwargs)
        if not fake and (given or not _floats(out)):
            with _disable_current_modes():
                return func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self._follow(tensor)
        self._see(_copies(given) if self.cpu and torch.Tag.pointwise in func.tags else 0)
        return out

    def begin(self) -> None:
        """Forget the peak so far."""
        self.peak, self._most = dict(self.now), self._total

    def relabel(self, tensor: Tensor, label: str) -> None:
        """The storage of `tensor` is for something else from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._alive:
            old, size = self._alive[key]
            self._alive[key] = (label, size)
            self._add(old, -size)
            self._add(label, size)

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        label, size = self.label(tensor), storage.nbytes()
        self._alive[key] = (label, size)
        weakref.finalize(storage, self._end, key)
        self._add(label, size)

    def _see(self, inside: int) -> None:
        if self._total + inside >= self._most:
            self._most, self.peak = self._total + inside, {**self.now, "copies inside of kernels": inside}

    def _end(self, key: int) -> None:
        label, size = self._alive.pop(key)
        self._add(label, -size)

    def _add(self, label: str, size: int) -> None:
        self.now[label] = self.now.get(label, 0) + size
        self._total += size


def _floats(out: Any) -> bool:
    return any(isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) for t in tree_leaves(out))


def _copies(given: Sequence[Tensor]) -> int:
    """Bytes of the operands, outputs among them, that are not of the common dtype, in that dtype."""
    floats = [tensor for tensor in given if tensor.is_floating_point() and tensor.dim() > 0]
    if len({tensor.dtype for tensor in floats}) < 2:
        return 0
    common = functools.reduce(torch.promote_types, (tensor.dtype for tensor in floats))
    return sum(tensor.numel() for tensor in floats if tensor.dtype != common) * common.itemsize


@contextmanager
def tracked(label: Callable[[Tensor], str], cpu: bool = False) -> Iterator[StorageTracker]:
    """A program under it allocates nothing but integers; see `StorageTracker`. Modules stay where they are made."""
    with _modules_stay(), FakeTensorMode(allow_non_fake_inputs=True), StorageTracker(label, cpu) as tracker:
        yield tracker


@contextmanager
def _modules_stay() -> Iterator[None]:
    """`module.to(...)` does nothing: fake weights have one device, and torch cannot swap them."""
    own = nn.Module.to
    nn.Module.to = lambda module, *_, **__: module  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = own  # type: ignore[method-assign]


def stack() -> Iterator[CodeType]:
    """The code of every Python frame, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back
