"""Train specimens and save weights, heads and losses of each; started by `accelerate launch` or on its own.

Usage: data_parallel.py OUTPUT_DIR PER_DEVICE_BATCH_SIZE CASES

CASES is JSON: for each case by name its `specimen` and fields of `BlockLocalConfig` in `config`.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments


sys.path.insert(0, str(Path(__file__).parents[1]))

from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer


def run(folder, case, batch_size):
    """Train five steps and leave `state-RANK.pt` and `log.json`."""
    specimen = SPECIMENS[case["specimen"]]
    rows = []
    for seed in range(8):
        batch = specimen.batch(seed)
        rows += [{key: value[i] for key, value in batch.items()} for i in range(4)]
    trainer = BlockLocalTrainer(
        specimen.build(),
        TrainingArguments(
            str(folder),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=5,
            logging_steps=1,
            save_strategy="no",
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=3,
            learning_rate=0.05,
            optim="sgd",
            max_grad_norm=0.5,
        ),
        train_dataset=rows,
        eval_dataset=rows[:11],
        block_local=BlockLocalConfig(**case["config"]),
    )
    if trainer.args.process_index == 1:
        with torch.no_grad():  # a process that starts elsewhere must be brought in line
            next(trainer.model.parameters()).add_(1.0)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_state()
    torch.save(trainer.assembly.module.state_dict(), folder / f"state-{trainer.args.process_index}.pt")
    if trainer.is_world_process_zero():
        log = {"world_size": trainer.args.world_size, "metrics": metrics, "history": trainer.state.log_history}
        (folder / "log.json").write_text(json.dumps(log))
    return trainer


def main() -> None:
    """Run every case."""
    folder, batch_size, cases = sys.argv[1:]
    torch.set_num_threads(1)
    gc.freeze()  # every run collects garbage, and need not look for it in all that has been imported
    for name, case in json.loads(cases).items():
        trainer = run(Path(folder) / name, case, int(batch_size))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
