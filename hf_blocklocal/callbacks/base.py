"""What the callbacks have in common: when they look, how a model is looked at without a trace, where the numbers go.

What there is to see is not known here; `measure` of a subclass says it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_blocklocal.errors import TargetError, UnsupportedSettingError
from hf_blocklocal.randomness import random_state_kept
from hf_blocklocal.targets.probe import with_own_generators


class BlockCallback(TrainerCallback, ABC):
    """Looks at a `BlockLocalTrainer` at the start of a run, every n optimizer steps, and at the last one.

    Several processes: the first looks while the others wait, or all look where `all_look` is set, and the first logs.
    A run that is resumed goes on with the rows of its checkpoint, so it is not looked at once more where it starts.

    Attributes:
        all_look: Whether `measure` needs all processes.

    Args:
        trainer: The `BlockLocalTrainer` to look at.
        every: Optimizer steps from one look to the next.

    Raises:
        UnsupportedSettingError: If the trainer has no blocks, or `every` is not a positive whole number.
    """

    all_look = False

    def __init__(self, trainer: Trainer, *, every: int) -> None:
        if not hasattr(type(trainer), "assembly"):
            raise UnsupportedSettingError(
                f"{type(self).__name__} looks at blocks, and {type(trainer).__name__} has none. Give it the "
                "BlockLocalTrainer that it is added to."
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UnsupportedSettingError(f"every must be a whole number of steps, at least 1, got {every!r}.")
        self.trainer = trainer
        self.every = every

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Return what is to be seen now, by name; nothing where there is nothing to see."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look before the first step."""
        if state.global_step == 0:
            self._look(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look every n steps, and after the last one."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self._look(state, control)

    def _look(self, state: TrainerState, control: TrainerControl) -> None:
        if not (state.is_world_process_zero or self.all_look):
            return
        seen = self.measure()
        if seen and state.is_world_process_zero:
            # Trainer.log takes back the wish for the log of the losses that may be due at this very step.
            should_log = control.should_log
            self.trainer.log(seen)
            control.should_log = should_log


def check_whole_model_here(callback: BlockCallback) -> None:
    """Refuse a callback that runs the whole model, where a process has only a block of it.

    Raises:
        UnsupportedSettingError: If every block has a process of its own.
    """
    size = callback.trainer.block_local.block_parallel_size
    if size > 1:
        raise UnsupportedSettingError(
            f"{type(callback).__name__} runs the whole model, and with block_parallel_size={size} a process has one "
            "block of it. Leave it out, or look at a run in one process: block_parallel_size=1. DriftCallback works "
            "in both."
        )


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode; give back the mode of each part, and all random streams, as they were."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    with random_state_kept():
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training


def collated(trainer: Trainer, dataset: Any, *, samples: int, batch_size: int) -> list[Mapping[str, Any]]:
    """Collate some examples of a data set as the trainer would.

    Args:
        trainer: Whose collator to use; its random generators are not advanced.
        dataset: Map-style, from which examples are taken evenly spread, because classes often lie one after the
            other; or iterable, from which the first are taken. Of a dict of data sets, the first.
        samples: Examples to take.
        batch_size: Examples in a batch.

    Raises:
        TargetError: If there is no data set, or no example in it.
    """
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()), None)
    if dataset is None:
        raise TargetError("There are no examples to look at: the trainer has no such data set. Pass one by hand.")
    collate = trainer._get_collator_with_removed_columns(
        with_own_generators(trainer.data_collator), description="diagnostics"
    )
    with random_state_kept():
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            examples = list(islice(dataset, samples))
        else:
            count = min(samples, len(dataset))
            examples = [dataset[number * len(dataset) // count] for number in range(count)]
        if not examples:
            raise TargetError("There are no examples to look at: the data set is empty. Pass another by hand.")
        return [collate(examples[start : start + batch_size]) for start in range(0, len(examples), batch_size)]
