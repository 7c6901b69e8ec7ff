"""Models: families and their parts, activations of a forward pass, loading and saving, adapters, spread weights."""

from .adapters import add_lora, load_adapter, merge, merge_into
from .anatomy import anatomy
from .capture import Capture, capture, check_anatomy
from .families import FAMILIES, Family, register_family
from .loading import check_4bit, check_fits, check_source, load_model, load_tokenizer, random_model
from .saving import model_fingerprint, save_model
from .structure import Anatomy, context_size, last_logits, unwrap
from .zero3 import gathered

__all__ = [
    "FAMILIES",
    "Anatomy",
    "Capture",
    "Family",
    "add_lora",
    "anatomy",
    "capture",
    "check_4bit",
    "check_anatomy",
    "check_fits",
    "check_source",
    "context_size",
    "gathered",
    "last_logits",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "merge",
    "merge_into",
    "model_fingerprint",
    "random_model",
    "register_family",
    "save_model",
    "unwrap",
]
