"""How much a step costs: plain fine-tuning, the formula as it is written, and ours, as ratios within one run."""
