"""Train a specimen with one block per process, or all in one, and leave what must be the same either way.

Usage: block_parallel.py SPECIMEN OUTPUT_DIR PER_DEVICE_BATCH_SIZE [name=value ...]

A name is a field of `BlockLocalConfig`, an argument of `TrainingArguments` after `args.`, or one of `dropout`,
`resume` (a checkpoint), `kill` (rank:step) and `odd` (a rank that reads other batches).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import yaml
from transformers import TrainerCallback, TrainingArguments


sys.path.insert(0, str(Path(__file__).parents[1]))

from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer


class Kill(TrainerCallback):
    """Ends a process from outside, as it were, in the middle of a step."""

    def __init__(self, step: int, sign: int) -> None:
        self.step, self.sign = step, sign

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Send the signal once the step has come."""
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.sign)


def rows_of(specimen, seeds):
    """Return single samples, with shapes as the collator wants them."""
    for seed in seeds:
        batch = specimen.batch(seed)
        for i in range(4):
            yield {key: value[i] for key, value in batch.items()}


def main() -> None:
    """Train, evaluate, predict, and leave `log.json` and an ordinary checkpoint."""
    name, folder, batch_size, *settings = sys.argv[1:]
    torch.set_num_threads(1)
    values = {key: yaml.safe_load(value) for key, value in (setting.split("=", 1) for setting in settings)}
    own = {key: values.pop(key, None) for key in ("dropout", "resume", "kill", "stop", "odd", "raise")}
    specimen = SPECIMENS[name]
    arguments = {
        "max_steps": 6,
        "logging_steps": 2,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "warmup_steps": 2,
    } | {key.removeprefix("args."): values.pop(key) for key in list(values) if key.startswith("args.")}
    args = TrainingArguments(
        folder,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=int(batch_size),
        per_device_eval_batch_size=3,
        **arguments,
    )
    model = specimen.build()
    if own["dropout"]:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = own["dropout"]
    seeds = range(9, 17) if own["odd"] == args.process_index else range(8)
    rows = list(rows_of(specimen, seeds))
    trainer = BlockLocalTrainer(
        model, args, train_dataset=rows, eval_dataset=rows[:11], block_local=BlockLocalConfig(**values)
    )
    for key, sign in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
        if own[key] is not None and args.process_index == own[key][0]:
            trainer.add_callback(Kill(own[key][1], sign))
    trainer.train(resume_from_checkpoint=own["resume"])
    metrics = trainer.evaluate()
    predicted = trainer.predict(rows[:11])
    trainer.save_model(str(Path(folder) / "final"))
    log = {
        "metrics": metrics,
        "predictions": torch.as_tensor(
            predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
        )
        .double()
        .sum((0,))
        .flatten()
        .tolist()[:20],
        "history": trainer.state.log_history,
        "held": sum(p.numel() for p in trainer.assembly.module.parameters() if not p.is_meta),
        "all": sum(p.numel() for p in trainer.assembly.module.parameters()),
    }
    (Path(folder) / f"log-{args.process_index}.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main()
