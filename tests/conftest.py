"""Tiny random models of every supported family and a tiny tokenizer. No test downloads anything.

Fixtures
    family          parametrises a test over every entry of `TINY` (family variants included)
    make_model      make_model("llama", dtype=torch.float64, seed=1, vocab_size=300) -> a model, in eval mode
    make_tokenizer  make_tokenizer(pad=True, chat=True) -> byte-level tokenizer, lossless on any text
    make_folder     make_folder("gpt2") -> (folder, model, tokenizer): an ordinary Hugging Face folder
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

hypothesis.settings.register_profile("repnoise", deadline=None)  # a busy machine is no error
hypothesis.settings.load_profile("repnoise")

VOCAB, WIDTH, HEADS, LAYERS = 264, 16, 2, 3
BOS, EOS, PAD = 0, 1, 2

_IDS = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_LLAMA = {
    **_IDS,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
_HEAD_DIM = {"head_dim": 8}
_LAYER_TYPES = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_NEOX = {**_LLAMA, "intermediate_size": 32, "hidden_dropout": 0.0, "attention_dropout": 0.0}
_NEOX.pop("num_key_value_heads")
_OPT = {
    **_IDS,
    "hidden_size": WIDTH,
    "ffn_dim": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": WIDTH,
    "dropout": 0.0,
}
_GPT2 = {
    **_IDS,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

# name -> (config class, settings); a name may be a variant of a family
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "llama_tied": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", {**_LLAMA, **_HEAD_DIM}),
    "gemma2": (
        "Gemma2Config",
        {**_LLAMA, **_HEAD_DIM, **_LAYER_TYPES, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    ),
    "gemma3_text": ("Gemma3TextConfig", {**_LLAMA, **_HEAD_DIM, **_LAYER_TYPES, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", {**_NEOX, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("GPTNeoXConfig", {**_NEOX, "use_parallel_residual": False}),
    "opt": ("OPTConfig", _OPT),
    "opt_post_norm": ("OPTConfig", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 8}),
    "phi": ("PhiConfig", {**_LLAMA, "num_key_value_heads": HEADS}),
    "phi3": ("Phi3Config", _LLAMA),
    "smollm3": ("SmolLM3Config", _LLAMA),
    "olmo2": ("Olmo2Config", _LLAMA),
    "granite": (
        "GraniteConfig",
        {**_LLAMA, "logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "cohere": ("CohereConfig", {**_LLAMA, "logit_scale": 0.25}),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_LLAMA, **_HEAD_DIM, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    ),
}


def build_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """A tiny model whose every parameter (norms and biases too) is random enough to matter."""
    class_name, defaults = TINY[name]
    config = getattr(transformers, class_name)(**{**defaults, **settings})
    if hasattr(config, "num_experts_per_tok"):
        config._experts_implementation = "eager"  # the grouped kernel has no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.to(dtype).eval()


def build_tokenizer(*, pad: bool = True, chat: bool = True) -> PreTrainedTokenizerBase:
    """Byte-level tokenizer of 260 tokens: 4 special ones and one per byte."""
    specials = ["<bos>", "<eos>", "<pad>", "<unk>"]
    vocab = {token: index for index, token in enumerate(specials + sorted(ByteLevel.alphabet()))}
    core = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>" if pad else None,
    )
    if chat:
        tokenizer.chat_template = (
            "{% for message in messages %}"
            "<bos>{{ message['role'] }}: {{ message['content'] }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
        )
    return tokenizer


@pytest.fixture(params=sorted(TINY))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    return build_model


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerBase]:
    return build_tokenizer


@pytest.fixture
def make_folder(
    tmp_path: Path,
) -> Callable[..., tuple[Path, PreTrainedModel, PreTrainedTokenizerBase]]:
    def make(
        name: str = "llama", *, folder: str | None = None, **settings: Any
    ) -> tuple[Path, PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = build_model(name, **settings), build_tokenizer()
        path = tmp_path / (folder or name)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path, model, tokenizer

    return make
