"""The command line. Heavy imports happen inside the verbs, so that --help answers at once."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from ..errors import ConfigError, RepNoiseError, RunError
from . import bench, studies, sweeps, tools
from .common import at_end, say

app = typer.Typer(
    name="repnoise",
    help="Immunise open-weight language models against harmful fine-tuning, attack them, measure what holds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)
app.registered_commands += studies.app.registered_commands
app.registered_commands += sweeps.app.registered_commands
app.registered_commands += bench.app.registered_commands
app.add_typer(tools.recipes_app, name="recipes")
app.add_typer(tools.judges_app, name="judges")
app.add_typer(tools.sandbox_app, name="sandbox")

INTERRUPTED = "interrupted. What was finished is kept; run the same command again to go on."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the return value is the exit code: 0 done, 1 a stage failed, 2 wrong input.

    With REPNOISE_TRACEBACK=1 in the environment errors come with their traceback.
    """
    _print_anything()
    try:
        with at_end:
            code = app(args=arguments, prog_name="repnoise", standalone_mode=False) or 0
            if code == 130:  # what newer versions of typer make of KeyboardInterrupt, older ones of Abort
                raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        say(f"repnoise: {INTERRUPTED}")
        return RunError.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:  # `repnoise recipes ls | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return RunError.exit_code
    except Exception as error:
        return _explain(error)
    return int(code)


def _print_anything() -> None:
    """A name that the terminal's encoding lacks is printed as an escape: telling of a success must not fail."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # absent where a test captures the stream
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _explain(error: Exception) -> int:
    """Print an error on stderr and give its exit code."""
    if os.environ.get("REPNOISE_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, RepNoiseError):
        say(f"repnoise: {error}")
        return error.exit_code
    if hasattr(error, "format_message"):  # a usage error; typer brings its own copy of click, or uses the real one
        context = getattr(error, "ctx", None)
        if context is None:
            say(f"repnoise: {error.format_message()}")
        else:
            what = error.format_message() or f"{context.command_path}: a command is missing."
            say(f"repnoise: {what}\n{context.get_usage()}\nTry `{context.command_path} --help`.")
        return ConfigError.exit_code
    what = " ".join(f"{type(error).__name__}: {error}".split())
    step = "Set REPNOISE_TRACEBACK=1 to see where."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        step = "Out of memory: lower train.per_device_train_batch_size, batch_size or data.max_length."
    say(f"repnoise: a stage failed unexpectedly: {what[:1000]}\nWhat was finished is kept. {step}")
    return RunError.exit_code
