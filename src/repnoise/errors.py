"""Errors that a user can act on.

Every message says four things: what went wrong, what was given, what is allowed, what to do next. The command line
prints the message without a traceback and exits with `exit_code` (2: the input was wrong, 1: a stage failed).
"""

from __future__ import annotations


class RepNoiseError(Exception):
    """Base class of all errors that this package raises on purpose."""

    exit_code = 1


class ConfigError(RepNoiseError):
    """A recipe, a command-line value or a plug-in name is wrong."""

    exit_code = 2


class DataError(RepNoiseError):
    """Pairs, retain rows or evaluation rows are missing, malformed, or overlap where they must not."""

    exit_code = 2


class ModelError(RepNoiseError):
    """A model or tokenizer cannot be loaded, is of an unknown family, or does not fit the data."""

    exit_code = 2


class MissingExtraError(RepNoiseError):
    """An optional dependency is not installed; the message carries the pip line that installs it."""

    exit_code = 2


class RunError(RepNoiseError):
    """A stage failed while running: loss became NaN, the disk is full, a run folder is damaged."""

    exit_code = 1
