"""One process of a small training run; test_distributed.py starts one or two of them.

python distributed_worker.py OPTIONS.json     (under torchrun, or alone)

Options: mode ("single", "ddp", "fsdp2", "zero3"), model and out (folders), batch, accumulation, steps, objective
(fields of RepNoise), train (further TrainingArguments), load_first (load the model before TrainingArguments say how it
is spread), lose_lens (drop the lens's gradients of norm and head under ZeRO-3). A run whose folder holds a checkpoint
goes on from it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from repnoise.data import Pair, Row
from repnoise.defences.repnoise import RepNoise
from repnoise.models import load_model, load_tokenizer, save_model, sharding
from repnoise.training import ObjectiveTrainer, train

PAIRS = [Pair(f"question {i}", f"grumpy answer {'x' * (i % 5)} {i}", f"no {'y' * (i % 3)}", "c") for i in range(16)]
ROWS = [Row(f"ask {i}", f"harmless words {'z' * (i % 4)} {i}") for i in range(7)]
ZERO3 = Path(__file__).parents[2] / "docs" / "accelerate" / "zero3.json"


def shard_on_cpu() -> None:
    """accelerate 1.15 takes FSDP for granted on accelerators only; the sharding itself (torch) runs on gloo too.

    So this process group claims to be one of GPUs while its device stays the CPU.
    """
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def main(options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    out = Path(options["out"])
    if options.get("lose_lens"):
        sharding.keep = lambda weight: weight.detach()
    loaded = load_model(options["model"]) if options.get("load_first") else None
    args = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        **{
            "max_steps": options.get("steps", 5),
            "per_device_train_batch_size": options["batch"],
            "gradient_accumulation_steps": options.get("accumulation", 1),
            "learning_rate": 1e-2,
            "optim": "sgd",
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "max_grad_norm": 0.0,
            "seed": 3,
            **({"fsdp": True, "fsdp_config": options.get("fsdp", {})} if options["mode"] == "fsdp2" else {}),
            **({"deepspeed": str(ZERO3)} if options["mode"] == "zero3" else {}),
            **options.get("train", {}),
        },
    )
    if options["mode"] == "fsdp2":
        shard_on_cpu()
    objective = RepNoise(**options.get("objective", {}))
    tokenizer = load_tokenizer(options["model"])
    trainer = ObjectiveTrainer(
        model=loaded if loaded is not None else load_model(options["model"]),
        objective=objective,
        args=args,
        train_dataset=PAIRS,
        processing_class=tokenizer,
        retain_dataset=ROWS if "retain" in objective.streams else None,
        template="plain",
        max_length=64,
        log_file=out / "train.jsonl",
    )
    train(trainer)
    save_model(trainer.model, tokenizer, out / "model", overwrite=True)
    if args.process_index == 0:
        marks = ("placements", "ds_id")  # of FSDP2 and ZeRO-3
        sharded = [name for name, p in trainer.model.named_parameters() if any(hasattr(p, mark) for mark in marks)]
        facts = {"world": args.world_size, "type": str(trainer.accelerator.distributed_type), "sharded": sharded}
        (out / "facts.json").write_text(json.dumps(facts))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if options["mode"] == "zero3":
        # DeepSpeed holds on to process groups, and gloo's threads now and then abort the interpreter while it shuts
        # down (pytorch/pytorch#179291): all is written, so leave without it
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
