"""Models and tokenizers in: hub id, folder, GGUF file or adapter folder; never remote code, never a pickle.

Writing them out again is in `saving.py`.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import MissingExtraError, ModelError, RepNoiseError
from . import adapters, quantised

logger = logging.getLogger(__name__)

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZERS = ("tokenizer*", "vocab.*", "*.model", "tekken.json", "merges.txt")


@dataclass(frozen=True)
class _Place:
    where: str
    """A folder, or a hub id."""
    local: bool
    gguf: str | None = None
    """Name of the GGUF file in the folder, where that is the model."""

    @property
    def options(self) -> dict[str, str]:
        return {} if self.gguf is None else {"gguf_file": self.gguf}


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    load_in_4bit: bool = False,
) -> PreTrainedModel:
    """The causal language model at `source`, in evaluation mode: a plain model that can be trained and saved.

    source: a hub id; a model folder; a .gguf file, or a folder with exactly one and no safetensors; an
    adapter folder (its base model is loaded and the adapter merged into it).
    dtype: "float32", "bfloat16", "float16", "float64", or None / "auto": as stored (GGUF: float32).
    device: where to put it, such as "cuda"; the CPU if left out (in 4 bits: the GPU, where there is one).
    load_in_4bit: pack the linear layers of the blocks into NF4, computed in `dtype`: 0.52 bytes a weight. They are
    frozen; `add_lora` trains on top and `merge_into` makes a plain model of the result. See `check_4bit`.
    """
    wanted = _dtype(dtype)
    place = _locate(source)
    packing = _packing(source, place, wanted, revision) if load_in_4bit else {}
    adapter = _adapter_config(place, revision)
    if adapter is not None:
        base, base_revision = _base(place, adapter)
        plain = load_model(base, dtype=dtype, device=device, revision=base_revision)
        return adapters.load_adapter(plain, _adapter_folder(place, revision)).eval()

    _check_weights(place)
    options: dict[str, Any] = dict(place.options, dtype=wanted, **packing)
    if place.gguf is None:
        options["use_safetensors"] = True
    else:
        if wanted == "auto":
            options["dtype"] = torch.float32
        if hasattr(transformers, "GgufConfig"):  # newer versions keep the blocks packed where they can
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _explained(place):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place.where,
            revision=revision or "main",
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise ModelError(
            f"{source} lacks {len(missing)} of the model's weights, for example {missing[0]}.\n"
            "Allowed: a complete causal language model. Next step: download it again, or correct config.json."
        )
    if place.gguf is not None:
        clear_quantisation(model)
    if load_in_4bit:
        quantised.keep_layout(model)
    return model if device is None else cast(Any, model).to(device)


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer at `source` (see `load_model`); without a pad token it pads with eos, else with unk."""
    place = _locate(source)
    if place.local and place.gguf is None and not any(any(Path(place.where).glob(p)) for p in _TOKENIZERS):
        adapter = _adapter_config(place, revision)
        if adapter is not None:
            base, base_revision = _base(place, adapter)
            return load_tokenizer(base, revision=base_revision)
        raise ModelError(
            f"No tokenizer in {place.where}: expected tokenizer.json or tokenizer_config.json.\n"
            "Next step: copy the tokenizer files of the base model into that folder."
        )
    with _explained(place):
        tokenizer = AutoTokenizer.from_pretrained(
            place.where, revision=revision or "main", trust_remote_code=False, **place.options
        )
    if tokenizer.pad_token_id is None:
        spare = next((t for t in (tokenizer.eos_token, tokenizer.unk_token) if t is not None), None)
        if spare is None:
            raise ModelError(
                f"The tokenizer of {source} has no pad token, and no eos or unk token to use instead.\n"
                'Next step: set "pad_token" in its tokenizer_config.json to a token of its vocabulary.'
            )
        tokenizer.pad_token = spare
        logger.warning("The tokenizer of %s has no pad token; using %r (masked wherever it pads).", source, spare)
    return tokenizer


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise if the tokenizer can produce an id for which the model has no embedding."""
    rows = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    needed = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if needed > rows:
        raise ModelError(
            f"The tokenizer does not fit the model: it has {needed} tokens, the model embeds {rows}.\n"
            f"Allowed: at most {rows}. Next step: use the tokenizer that came with the model (for a GGUF the "
            "one of the original folder: transformers may add a token to the GGUF's own)."
        )


def random_model(
    source: str | Path | PreTrainedModel,
    *,
    seed: int,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """The random control: the architecture of `source` with fresh weights, as transformers initialises them.

    That is N(0, initializer_range) for most families, as in the released code; the paper says Kaiming. The
    same seed gives the same weights; the global random state is left alone. dtype None / "auto": that of
    `source`.
    """
    generation = None
    if isinstance(source, PreTrainedModel):
        config, generation = copy.deepcopy(source.config), copy.deepcopy(source.generation_config)
        stored = source.dtype
    else:
        place = _locate(source)
        adapter = _adapter_config(place, revision)
        if adapter is not None:
            base, base_revision = _base(place, adapter)
            return random_model(base, seed=seed, dtype=dtype, revision=base_revision)
        version = revision or "main"
        with _explained(place):
            config = AutoConfig.from_pretrained(place.where, revision=version, trust_remote_code=False, **place.options)
        stored = config.dtype or torch.float32
        if place.gguf is None:
            try:
                generation = GenerationConfig.from_pretrained(place.where, revision=version)
            except OSError:
                logger.debug("%s has no generation_config.json", source)
    wanted = _dtype(dtype)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    if generation is not None:
        model.generation_config = generation
    return model.to(stored if isinstance(wanted, str) else wanted).eval()


def clear_quantisation(model: PreTrainedModel) -> None:
    """Drop the marks that a GGUF leaves: its weights are dense by now, yet save_pretrained would refuse."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "quantization_config"):
            del config.quantization_config


def check_source(source: str | Path) -> None:
    """Raise `ModelError` where `source` cannot be a model: no such path, or a folder without weights. Loads nothing."""
    _check_weights(_locate(source))


def check_4bit(source: str | Path, *, revision: str | None = None) -> None:
    """Raise unless `load_model(source, load_in_4bit=True)` can work. Loads no weights.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ModelError: `source` is a GGUF, an adapter, or quantised already.
    """
    _packing(source, _locate(source), "auto", revision)


def _packing(source: str | Path, place: _Place, dtype: str | torch.dtype, revision: str | None) -> dict[str, Any]:
    """Options of `from_pretrained` that load in 4 bits."""
    quantised.require_bitsandbytes()
    if place.gguf is not None or _adapter_config(place, revision) is not None:
        raise ModelError(
            f"{source} is {'an adapter' if place.gguf is None else 'a GGUF'}; only a whole model of dense safetensors "
            f"is loaded in 4 bits.\nNext step: repnoise convert {source} FOLDER, and give FOLDER."
        )
    _check_weights(place)
    with _explained(place):
        config = AutoConfig.from_pretrained(place.where, revision=revision or "main", trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{source} is quantised already, and what is trained in 4 bits is merged into the original weights.\n"
            "Next step: give the model that it was made from."
        )
    stored = config.dtype or torch.float32
    return {"quantization_config": quantised.four_bits(config, stored if isinstance(dtype, str) else dtype)}


def _locate(source: str | Path) -> _Place:
    """Tell a file, a folder and a hub id apart."""
    text = str(source)
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"Not a model: {text} is a {path.suffix or 'plain'} file.\n"
                "Allowed: a folder, a .gguf file, a hub id. Next step: give the folder that holds the file."
            )
        return _gguf(path)
    if path.is_dir():
        ggufs = [] if any(path.glob("*.safetensors")) else sorted(path.glob("*.gguf"))
        if len(ggufs) > 1:
            raise ModelError(
                f"{text} holds {len(ggufs)} GGUF files: {', '.join(g.name for g in ggufs)}.\n"
                "Allowed: one. Next step: give the path of the one you mean."
            )
        return _gguf(ggufs[0]) if ggufs else _Place(str(path), local=True)
    if not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", text) or text.endswith((".gguf", ".safetensors")):
        raise ModelError(
            f"No such file or folder: {text}\n"
            "Allowed: a model folder, a .gguf file, or a hub id such as org/name. Next step: check the path."
        )
    return _Place(text, local=False)


def _gguf(path: Path) -> _Place:
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(
            f"Reading {path.name} needs the gguf package, which is not installed.\n"
            "Next step: pip install 'repnoise[gguf]'"
        )
    return _Place(str(path.parent), local=True, gguf=path.name)


def _check_weights(place: _Place) -> None:
    folder = Path(place.where)
    if not place.local or place.gguf is not None:
        return
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"Not a model folder: {folder} has no config.json. It holds: {found}.\n"
            "Allowed: config.json with *.safetensors, one .gguf, or an adapter. Next step: check the path."
        )
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds weights only as pickles ({', '.join(pickles[:3])}), which are not loaded: "
            "unpickling can run code.\nAllowed: safetensors. Next step, if you trust the file: "
            "AutoModelForCausalLM.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER)"
        )
    raise ModelError(
        f"No weights in {folder}: expected *.safetensors or one .gguf file.\n"
        "Next step: finish the download, or repeat the stage that should have written them."
    )


def _adapter_config(place: _Place, revision: str | None) -> dict[str, Any] | None:
    if place.gguf is not None:
        return None
    with _explained(place):
        path = find_adapter_config_file(place.where, revision=revision or "main")
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _adapter_folder(place: _Place, revision: str | None) -> Path:
    """Local folder of the adapter; on the hub only the safetensors file is ever fetched."""
    if place.local:
        return Path(place.where)
    with _explained(place):
        weights = cached_file(place.where, adapters.ADAPTER_WEIGHTS, revision=revision or "main")
        return Path(cast(str, weights)).parent


def _base(place: _Place, adapter: dict[str, Any]) -> tuple[str, str | None]:
    base = adapter.get("base_model_name_or_path")
    if not base or base == place.where:
        raise ModelError(
            f"The adapter in {place.where} does not name a base model (base_model_name_or_path: {base!r}).\n"
            "Next step: set it in adapter_config.json to a hub id or a folder."
        )
    return str(base), adapter.get("revision")


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ModelError(
        f"Unknown dtype {dtype!r}. Allowed: auto, {', '.join(DTYPES)}. Next step: correct it or leave it out."
    )


@contextmanager
def _explained(place: _Place) -> Iterator[None]:
    """Turn what transformers raises into a ModelError with a next step."""
    try:
        yield
    except (RepNoiseError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every type occurs; tokenizers and safetensors raise bare ones of their own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if place.local:
            step = "check that the download is complete and that config.json is a causal language model's."
        else:
            step = (
                "no folder of that name exists here, so it was taken for a hub id: check the spelling and "
                "network (is HF_HUB_OFFLINE set?), run `hf auth login` for a gated model, or give a folder."
            )
        what = place.where if place.gguf is None else f"{place.where}/{place.gguf}"
        raise ModelError(f"Could not load {what}: {reason}\nNext step: {step}") from error
