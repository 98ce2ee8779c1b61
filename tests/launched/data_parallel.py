"""Train a specimen and save weights, heads and losses; started by `accelerate launch` or on its own.

Usage: data_parallel.py SPECIMEN OUTPUT_DIR PER_DEVICE_BATCH_SIZE [field=value of BlockLocalConfig ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import yaml
from transformers import TrainingArguments


sys.path.insert(0, str(Path(__file__).parents[1]))

from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer


def main() -> None:
    """Train five steps and leave `state.pt` and `log.json`."""
    name, folder, batch_size, *settings = sys.argv[1:]
    torch.set_num_threads(1)
    specimen = SPECIMENS[name]
    rows = []
    for seed in range(8):
        batch = specimen.batch(seed)
        rows += [{key: value[i] for key, value in batch.items()} for i in range(4)]
    values = dict(setting.split("=") for setting in settings)
    trainer = BlockLocalTrainer(
        specimen.build(),
        TrainingArguments(
            folder,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=5,
            logging_steps=1,
            save_strategy="no",
            per_device_train_batch_size=int(batch_size),
            per_device_eval_batch_size=3,
            learning_rate=0.05,
            optim="sgd",
            max_grad_norm=0.5,
        ),
        train_dataset=rows,
        eval_dataset=rows[:11],
        block_local=BlockLocalConfig(**{key: yaml.safe_load(value) for key, value in values.items()}),
    )
    if trainer.args.process_index == 1:
        with torch.no_grad():  # a process that starts elsewhere must be brought in line
            next(trainer.model.parameters()).add_(1.0)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_state()
    torch.save(trainer.assembly.module.state_dict(), Path(folder) / f"state-{trainer.args.process_index}.pt")
    if trainer.is_world_process_zero():
        log = {"world_size": trainer.args.world_size, "metrics": metrics, "history": trainer.state.log_history}
        (Path(folder) / "log.json").write_text(json.dumps(log))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
