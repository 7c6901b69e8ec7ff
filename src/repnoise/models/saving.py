"""Models out: ordinary Hugging Face folders of safetensors, whole or not at all; and their fingerprints."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError, RunError
from ..store.files import disk_guard
from . import adapters, vector
from .structure import is_sharded, unwrap

logger = logging.getLogger(__name__)


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Write model and tokenizer to `folder`, which appears complete or not at all; returns its path.

    Everything is written to a hidden folder beside it, flushed to the disk, and renamed. A folder that holds
    files is replaced only if `overwrite` says so.

    Where several processes train (DDP, FSDP2, DeepSpeed ZeRO-3), all of them must call it: whole weights are collected
    on the first process, which writes, and all return or raise together.
    """
    if adapters.is_adapted(model):
        raise ModelError(
            "The model carries an adapter, and a model folder holds plain weights.\n"
            "Next step: save_model(merge(model), ...), or model.save_pretrained(folder) for the adapter."
        )
    folder = Path(folder).expanduser().absolute()
    sharded = is_sharded(model)
    if not (dist.is_available() and dist.is_initialized() and (sharded or dist.get_world_size() > 1)):
        return _write(model, None, tokenizer, folder, overwrite)
    weights = None
    if sharded:
        from .sharding import full_weights

        weights = full_weights(unwrap(model))
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            _write(model, weights, tokenizer, folder, overwrite)
        except BaseException as error:
            failure = error
    failed = torch.tensor(float(failure is not None), device=next(model.parameters()).device)
    dist.all_reduce(failed)
    if failure is not None:
        raise failure
    if failed:
        raise RunError(f"{folder} was not written.\nNext step: read the message of process 0.")
    return folder


def _write(
    model: nn.Module,
    weights: dict[str, Tensor] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    overwrite: bool,
) -> Path:
    """`weights`: whole ones, if those in the model are shards."""
    plain = cast(PreTrainedModel, unwrap(model))
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not overwrite):
        raise ModelError(
            f"{folder} exists already.\nAllowed: a new or empty folder. Next step: another name, or overwrite=True."
        )
    with disk_guard(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.writing-", dir=folder.parent))
        try:
            _mend_generation_config(plain)
            if weights is not None:
                tied = getattr(plain, "all_tied_weights_keys", {})  # {head: embedding}: collected twice, stored once
                weights = {name: weight for name, weight in weights.items() if tied.get(name) not in weights}
            plain.save_pretrained(draft, state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
            for path in [draft, *draft.rglob("*")]:
                _follow_umask(path)
                if path.is_file():
                    _flush(path)
            _swap(draft, folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    return folder


def _follow_umask(path: Path) -> None:
    """safetensors and temporary folders keep files to their owner; others must be able to serve what is released."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def model_fingerprint(path: str | Path) -> str:
    """First 16 hex digits of a sha256 over the weights and config of a model folder, or over one file."""
    path = Path(path).expanduser()
    if path.is_file():
        return _digest([path])
    weights = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))
    if not weights:
        raise ModelError(
            f"No weights to fingerprint at {path}.\n"
            "Allowed: a local folder with *.safetensors or .gguf, or one file. Next step: check the path."
        )
    configs = [path / name for name in ("config.json", "adapter_config.json")]
    beside = sorted((path / vector.FOLDER).glob("*.safetensors"))
    return _digest([*(p for p in configs if p.is_file()), *weights, *beside])


def _digest(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        one = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                one.update(block)
        total.update(f"{file.name} {one.hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Some models carry sampling settings with do_sample off, which transformers refuses to save."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
        logger.warning("The generation config sets sampling values without do_sample; saved with do_sample on.")


def _swap(draft: Path, folder: Path) -> None:
    """Give the draft its final name; what stood there before goes only after that has worked."""
    if not folder.exists():
        draft.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent)) / folder.name
    folder.rename(old)
    try:
        draft.rename(folder)
    except BaseException:
        old.rename(folder)
        old.parent.rmdir()
        raise
    shutil.rmtree(old.parent, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
