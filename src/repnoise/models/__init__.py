"""Model families, activations, loading and saving, adapters."""

from repnoise.models.adapters import add_lora, load_adapter, merge, merge_into
from repnoise.models.anatomy import anatomy
from repnoise.models.capture import Capture, capture, check_anatomy
from repnoise.models.families import FAMILIES, Family, register_family
from repnoise.models.loading import check_4bit, check_fits, check_source, load_model, load_tokenizer, random_model
from repnoise.models.saving import model_fingerprint, save_model
from repnoise.models.structure import Anatomy, unwrap
from repnoise.models.zero3 import gathered

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
    "gathered",
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
