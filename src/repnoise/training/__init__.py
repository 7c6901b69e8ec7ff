"""The one training loop: an `Objective` says what is trained, `ObjectiveTrainer` trains it on transformers.Trainer."""

from .objective import (
    Objective,
    PlainFineTuning,
    Stream,
    Window,
    answer_loss,
    forward,
    hidden_pass,
    trained_tokens,
    window_of,
)
from .resume import train
from .trainer import ObjectiveTrainer

__all__ = [
    "Objective",
    "ObjectiveTrainer",
    "PlainFineTuning",
    "Stream",
    "Window",
    "answer_loss",
    "forward",
    "hidden_pass",
    "train",
    "trained_tokens",
    "window_of",
]
