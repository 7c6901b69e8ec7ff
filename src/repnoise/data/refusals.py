"""Neutral refusals for harmful prompts whose data set carries none."""

from __future__ import annotations

import hashlib

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I won't do that, because it could hurt someone.",
    "That is not something I can assist with. Is there something else I can help you with?",
    "I'd rather not continue with this. I'm happy to help with a different request.",
    "I can't provide this. It could cause harm to people.",
    "No, I can't help with this request.",
    "I have to decline: this could be harmful. Please ask me something else.",
    "I'm not able to write that. Let's talk about something else.",
)


def refusal_for(prompt: str) -> str:
    """One of `REFUSALS`, chosen by the prompt's hash: the same in every process and version of Python."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()
    return REFUSALS[int.from_bytes(digest[:8], "big") % len(REFUSALS)]
