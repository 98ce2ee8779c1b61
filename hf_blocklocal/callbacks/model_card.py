"""The model card of a run: what it was and what it came to, gathered by looking on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_blocklocal.callbacks.history import HistoryCallback
from hf_blocklocal.callbacks.portrait import (
    blocks_of,
    citations_of,
    devices_of,
    reaches_all_layers,
    share_of_global_steps,
)
from hf_blocklocal.callbacks.tasks import task_of
from hf_blocklocal.card import (
    FIELDS,
    CardFacts,
    Data,
    RunResult,
    base_model_of,
    baseline_of,
    data_of,
    last_evaluation,
    read_template,
    write_card,
)
from hf_blocklocal.records.history import CutRow, Memory, StepTime
from hf_blocklocal.records.provenance import commit, hardware, versions


# Where things go and who is told; tokens, which are secrets; and what only says how the loop is to talk.
NOT_TOLD = {
    *("output_dir", "logging_dir", "run_name", "project", "trackio_space_id", "report_to", "resume_from_checkpoint"),
    *("hub_token", "push_to_hub_token", "hub_model_id", "push_to_hub", "hub_strategy", "hub_private_repo"),
    *("hub_always_push", "hub_revision", "do_train", "do_eval", "do_predict", "disable_tqdm", "log_level"),
    *("log_level_replica", "log_on_each_node", "logging_steps", "logging_strategy", "logging_first_step"),
    *("save_strategy", "save_steps", "save_total_limit", "local_rank", "remove_unused_columns"),
    "dataloader_pin_memory",  # follows the device
}


class ModelCardCallback(TrainerCallback):
    """Writes the model card of a run, `README.md`, wherever a finished run saves its model; never asks the network.

    Every `BlockLocalTrainer` has one. To say what a run cannot know, add another, which takes its place:
    `trainer.add_callback(ModelCardCallback(trainer, baseline="runs/plain", dataset_name="...", limits=["..."]))`.

    Args:
        trainer: The `BlockLocalTrainer` to look at.
        base_model: Id on the Hub of the model that training started from, where that was loaded from a folder.
        license: Licence of the model. Default: that of the base model, if its card lies where it was loaded from.
        language: Language or languages, likewise.
        dataset: Id of the data set on the Hub, where it does not tell itself.
        dataset_name: What to call it.
        dataset_license: Its licence.
        pipeline_tag: The task as the Hub names it, where the class of the model does not tell.
        example: A text for the quick start.
        baseline: What ordinary training with the same budget came to: the folder of its run, its metrics, or a
            `RunResult`. Read when the card is written.
        config: The file that configured the run.
        command: The command that ran it.
        limits: What to know before using the model, each a sentence.
        tags: More tags for the Hub.
        template: A Markdown file to fill in place of `templates/model_card.md`.

    Raises:
        CardError: If the template has an unknown field; when it is made, before training.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        base_model: str | None = None,
        license: str | None = None,  # noqa: A002
        language: str | list[str] | None = None,
        dataset: str | None = None,
        dataset_name: str | None = None,
        dataset_license: str | None = None,
        pipeline_tag: str | None = None,
        example: str | None = None,
        baseline: RunResult | Mapping[str, float] | str | os.PathLike[str] | None = None,
        config: str | None = None,
        command: str | None = None,
        limits: Sequence[str] = (),
        tags: Sequence[str] = (),
        template: str | os.PathLike[str] | None = None,
    ) -> None:
        read_template(template, FIELDS)
        self.trainer = trainer
        self.base_model = base_model
        self.data = Data(name=dataset_name, hub_id=dataset, license=dataset_license)
        self.baseline = baseline
        self.example = example
        self.template = template
        self.stated = {
            "license": license,
            "language": language,
            "pipeline_tag": pipeline_tag,
            "config": config,
            "command": command,
            "limits": tuple(limits),
            "tags": tuple(tags),
        }
        self.finished = False
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember where this process began."""
        self.finished, self._first_step = False, state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From now on a saved model has a card."""
        self.finished = True

    def take_over(self, other: ModelCardCallback) -> None:
        """Know what another one knows, whose place this one takes."""
        self.finished, self._first_step = other.finished, other._first_step

    def write(self, folder: str | os.PathLike[str], facts: CardFacts | None = None) -> Path:
        """Write the card into a folder, of the facts that are known now unless others are given."""
        return write_card(self.facts() if facts is None else facts, folder, template=self.template)

    def facts(self) -> CardFacts:
        """Gather what is known now; needs the run no longer once it is done."""
        trainer, assembly = self.trainer, self.trainer.assembly
        args, state = trainer.args, trainer.state
        model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
        auto_class, pipeline_tag = task_of(model)
        hub_id = getattr(trainer, "hub_model_id", None) or args.hub_model_id
        share = share_of_global_steps(assembly, state.global_step, state.max_steps)
        kept = [seen.rows for seen in trainer.callback_handler.callbacks if isinstance(seen, HistoryCallback)]
        rows = kept[0] if kept else []
        cuts = [row for row in rows if isinstance(row, CutRow)]
        facts = CardFacts(
            name=(hub_id or str(Path(args.output_dir).absolute())).rstrip("/").split("/")[-1],
            location=hub_id or ".",
            architecture=type(model).__name__,
            auto_class=auto_class,
            pipeline_tag=pipeline_tag,
            example=self._example(),
            has_processor=trainer.processing_class is not None,
            is_adapter=model is not trainer.model or getattr(model, "_hf_peft_config_loaded", False),
            parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
            blocks=cuts[-1].blocks if cuts else blocks_of(assembly, devices_of(assembly)),
            global_steps=share,
            overlap=assembly.config.overlap,
            whole_backward=share > 0 or reaches_all_layers(assembly),
            result=self._result(),
            baseline=None if self.baseline is None else baseline_of(self.baseline),
            steps_of_session=(self._first_step, state.global_step),
            times=tuple({row.process: row for row in rows if isinstance(row, StepTime)}.values()),
            peaks=tuple({(row.process, row.device): row for row in rows if isinstance(row, Memory)}.values()),
            base_model=base_model_of(_loaded_from(model), self.base_model),
            data=data_of(trainer.train_dataset, trainer.eval_dataset, stated=self.data),
            arguments=changed_arguments(args),
            block_local=_changed(trainer.block_local),
            seed=args.seed,
            environment=_environment(args.world_size),
            citations=citations_of(assembly),
        )
        return replace(facts, **{name: value for name, value in self.stated.items() if value})

    def _result(self) -> RunResult:
        """Return what the run came to, for the weights that it ended with."""
        trainer, state, log = self.trainer, self.trainer.state, self.trainer.state.log_history
        ends = [index for index, row in enumerate(log) if "train_runtime" in row]
        metrics, evaluated_at = last_evaluation(log[ends[-1] :] if ends else [])
        if not metrics:
            best = state.best_global_step if trainer.args.load_best_model_at_end else None
            metrics, evaluated_at = last_evaluation(log, at=best)
        elif trainer.args.load_best_model_at_end and state.best_global_step:
            evaluated_at = state.best_global_step
        last = trainer.assembly.last
        return RunResult(
            "backpropagation" if last == 0 else f"block-local, {last + 1} blocks",
            metrics,
            evaluated_at=evaluated_at,
            steps=state.global_step,
            epochs=state.epoch,
            seconds=log[ends[-1]]["train_runtime"] if ends else None,
        )

    def _example(self) -> str | None:
        """Return an input for the quick start as Python source; None leaves the choice to the card."""
        mask = getattr(self.trainer.processing_class, "mask_token", None)
        if self.example is None and mask and type(self.trainer.model).__name__.endswith("ForMaskedLM"):
            return json.dumps(f"Every block learns from a {mask} of its own.")
        return None if self.example is None else json.dumps(self.example, ensure_ascii=False)


def _loaded_from(model: nn.Module) -> str | None:
    """Return what `from_pretrained` was given; a model need not have a configuration that says so."""
    return getattr(getattr(model, "config", None), "_name_or_path", None)


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the training arguments that are not the default and say something about the training."""
    return {name: value for name, value in _changed(args).items() if name not in NOT_TOLD}


def _changed(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not the default, if they can be written down."""
    found = {}
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = _plain(getattr(config, field.name))
        is_left_open = default in (None, "") and (value in (None, [], {}) or value is False)
        can_be_told = field.init and isinstance(value, str | int | float | list | dict)
        if can_be_told and not is_left_open and value != _plain(default):
            found[field.name] = value
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple | set) else value


def _environment(processes: int) -> dict[str, str]:
    seen = {"hardware": hardware(processes), **versions()}
    revision = commit()
    return seen | ({"commit": f"`{revision}` of the checkout it was run in"} if revision else {})
