"""The defence step keeps no list of logits: its peak memory against that of the two plain passes it contains."""

from __future__ import annotations

import subprocess
import sys

import pytest

VOCABULARY, LAYERS, BATCH, LENGTH = 24_000, 6, 4, 96
ONE_LAYER = BATCH * LENGTH * VOCABULARY * 4 / 2**20  # MiB of float32 logits

PROGRAM = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from repnoise.defences.repnoise import RepNoise
from repnoise.losses import masked_cross_entropy
from repnoise.training import forward

which, vocabulary, layers, batch, length = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(0)
torch.set_num_threads(1)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=layers,
    num_attention_heads=4, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1))
def stream():
    ids = torch.randint(2, vocabulary, (batch, length))
    labels = ids.clone()
    labels[:, : length // 4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
both = {"harmful": stream(), "harmless": stream()}
objective = RepNoise(alpha=1.0, beta=0.001)
def step():
    if which == "plain":
        loss = sum(masked_cross_entropy(forward(model, s), s["labels"]) for s in both.values())
    elif which == "naive":
        terms = {k: v for k, v in objective.terms(model, both).items() if k != "ascent"}
        out = model(input_ids=both["harmful"]["input_ids"], output_hidden_states=True)
        lens = [masked_cross_entropy(model.lm_head(model.model.norm(h)), both["harmful"]["labels"])
                for h in out.hidden_states]
        loss = sum(terms.values()) - torch.log(torch.stack(lens).mean() + 1)
    else:
        loss = sum(objective.terms(model, both).values())
    loss.backward()
small = torch.ones(8, 8) @ torch.ones(8, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def peak(which: str) -> float:
    """MiB that one step adds to the process's peak."""
    sizes = [str(size) for size in (VOCABULARY, LAYERS, BATCH, LENGTH)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, which, *sizes], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads ru_maxrss in KiB, as Linux reports it")
def test_a_defence_step_needs_the_two_passes_and_one_layer_of_logits():
    plain, ours = peak("plain"), peak("ours")
    assert ours <= 1.1 * plain + ONE_LAYER, f"{ours:.0f} MiB against {plain:.0f} MiB for the plain passes"
    # the definition, with the logits of all layers kept, must break the bound: else this test could not fail
    assert peak("naive") > 1.1 * plain + ONE_LAYER
