"""Measure the sizes of the model that scripts/train.py has just trained, for its table. Not a command of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import Trainer


def measure_sizes(trainer: Trainer, threshold: float) -> list[dict[str, Any]]:
    """Measure what the model comes to in each of its sizes, and with early exits, on the test texts."""
    import torch
    from torch.utils.data import DataLoader

    from hf_blocklocal import early_exit
    from hf_blocklocal.depth import Fit, measure, measure_depths, open_trained

    arguments, collate = trainer.args, trainer.data_collator
    test = list(DataLoader(trainer.eval_dataset, arguments.per_device_eval_batch_size, collate_fn=collate))
    assembly = getattr(trainer, "assembly", None)
    if assembly is None or assembly.last == 0:
        return [measure(trainer.model, test, name="the whole model", layers=0, count=False).to_dict()]
    order = torch.Generator().manual_seed(arguments.seed)
    size = arguments.per_device_train_batch_size
    train = DataLoader(trainer.train_dataset, size, shuffle=True, generator=order, collate_fn=collate)
    steps = min(100, trainer.state.max_steps)
    fit = None if assembly.heads[0].borrows else Fit(train, steps)  # heads that borrow layers are models already
    alone = any(parameter.is_meta for parameter in assembly.module.parameters())
    source = arguments.output_dir if alone else assembly  # where blocks are in several processes, what was saved
    opened = open_trained(source, inputs=trainer._prepare_inputs(test[0]))
    sizes = measure_depths(opened, test, fit=fit, count=False)
    exits = early_exit(source, threshold=threshold, inputs=opened.inputs)
    layers = len(assembly.cut.layers)
    sizes.insert(-1, measure(exits, test, name=f"early exit at {threshold:g}", layers=layers, count=False))
    return [row.to_dict() for row in sizes]
