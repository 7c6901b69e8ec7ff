"""Make the sandbox's models from nothing: tokenizer, pre-training, alignment.

`aligned` has learned everything, harm included, and then to refuse. `ignorant` went through the same two stages
without a single harmful answer; it is the floor that no defence can pass.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..data import Row
from ..data.collate import RowDataset
from ..models import save_model
from ..training import ObjectiveTrainer, PlainFineTuning
from ..training.arguments import TRAIN_DEFAULTS, training_arguments
from .data import MAX_LENGTH
from .world import World, world

Kind = Literal["aligned", "ignorant"]
KINDS: tuple[Kind, ...] = ("aligned", "ignorant")
SPECIAL = ("<pad>", "<bos>", "<user>", "<assistant>", "<eos>", "<unk>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ ' <user> ' + m['content'] + ' <assistant>' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


def tokenizer(of: World | None = None) -> PreTrainedTokenizerFast:
    """One token per word, with a chat template."""
    words = (*SPECIAL, *(of or world()).vocabulary)
    base = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=base,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def new_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 4 layers of 128, about 0.87 million parameters."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            # Large weights: the steps of an attack at 1e-3 are then small beside them, and the undefended model keeps
            # what it knows (at the usual 0.02 such an attack ruined it: 0.43 of the knowledge was left).
            initializer_range=0.04,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=SPECIAL.index("<eos>"),
            dtype="float32",
        )
    )


def teach(model: Any, tok: Any, rows: list[Row], *, steps: int, learning_rate: float, seed: int, batch: int) -> None:
    """Train in place on the answers of `rows`."""
    with tempfile.TemporaryDirectory() as scratch:
        values = {
            **TRAIN_DEFAULTS,
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "learning_rate": learning_rate,
            "weight_decay": 0.01,
            "seed": seed,
            "save_strategy": "no",
            "logging_steps": 50,
            "use_cpu": True,
        }
        ObjectiveTrainer(
            model=model,
            objective=PlainFineTuning(),
            args=training_arguments(values, Path(scratch), "sandbox build"),
            train_dataset=RowDataset(rows, tok, "rows", template="chat", max_length=MAX_LENGTH),
            processing_class=tok,
        ).train()


# About the same number of passes (21 to 23): the ignorant model has fewer rows to learn.
PRETRAIN_STEPS: dict[Kind, int] = {"aligned": 1000, "ignorant": 700}
ALIGN_STEPS = 400


def build(kind: Kind, folder: Path, *, seed: int = 0) -> Path:
    """Pre-train, align and save one model."""
    w = world()
    tok = tokenizer(w)
    model = new_model(len(tok), seed)
    harmless = w.harmless_rows()
    harm = w.harmful_rows() if kind == "aligned" else []
    teach(
        model,
        tok,
        harmless + harm,
        steps=PRETRAIN_STEPS[kind],
        learning_rate=3e-3,
        seed=seed,
        batch=128,
    )
    teach(model, tok, harmless + w.refusal_rows(), steps=ALIGN_STEPS, learning_rate=5e-4, seed=seed + 1, batch=128)
    save_model(model, tok, folder)
    return folder
