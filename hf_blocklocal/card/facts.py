"""Everything that a model card says, as plain values. What a run does not know is None, and the card is silent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_blocklocal.errors import CardError
from hf_blocklocal.records.history import BlockOfCut, Memory, StepTime


OF_BLOCK = re.compile(r"(?P<set>.+_)?block_(?P<block>\d+)_(?P<name>loss|accuracy)")
# What Trainer puts beside the metrics of an evaluation.
BESIDE = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


@dataclass(frozen=True)
class RunResult:
    """What a training run came to.

    Attributes:
        name: What to call it in a table.
        metrics: Metrics of an evaluation, as `Trainer.evaluate` returns them.
        evaluated_at: Optimizer steps taken when it was evaluated.
        steps: Optimizer steps of the run.
        epochs: How often it went through its training set.
        seconds: What `train()` took.
        peak_bytes: The most bytes that autograd kept for a training step, if that has been measured.
    """

    name: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluated_at: int | None = None
    steps: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None

    def of_model(self) -> dict[str, float]:
        """Return the metrics of the whole model, without the prefix."""
        return {name: value for name, value in self._cleaned().items() if not OF_BLOCK.fullmatch(name)}

    def of_blocks(self) -> dict[int, dict[str, float]]:
        """Return the metrics of each block's head, under the names that the whole model's have."""
        found: dict[int, dict[str, float]] = {}
        for name, value in self._cleaned().items():
            if match := OF_BLOCK.fullmatch(name):
                found.setdefault(int(match["block"]), {})[(match["set"] or "") + match["name"]] = value
        return dict(sorted(found.items()))

    def _cleaned(self) -> dict[str, float]:
        return {
            name.removeprefix("eval_"): value
            for name, value in self.metrics.items()
            if name.startswith("eval_")
            and not name.endswith(BESIDE)
            and isinstance(value, int | float)
            and not isinstance(value, bool)
        }


@dataclass(frozen=True)
class BaseModel:
    """The model that training started from.

    Attributes:
        name: Its id on the Hub; None for a folder that does not say.
        license: Its licence, where its own card says so.
        language: Its languages, likewise.
    """

    name: str | None = None
    license: str | None = None
    language: str | list[str] | None = None


@dataclass(frozen=True)
class Data:
    """The data set.

    Attributes:
        name: What to call it.
        hub_id: Its id on the Hub, if it came from there.
        revision: The commit it came from.
        config: The configuration of it that was loaded.
        license: Its licence, if it says so.
        train_rows: Examples trained on.
        eval_rows: Examples evaluated on.
        eval_split: The split those came from.
    """

    name: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    config: str | None = None
    license: str | None = None
    train_rows: int | None = None
    eval_rows: int | None = None
    eval_split: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of.

    Attributes:
        name: Name of the model.
        location: What `from_pretrained` is to be given: an id of the Hub, or `"."` inside the folder of the card.
        architecture: Class of the model.
        auto_class: The `AutoModelFor...` class that loads it.
        pipeline_tag: Its task, as the Hub names tasks.
        example: Python source of an input for the quick start.
        has_processor: Whether a tokenizer or the like is saved beside it.
        is_adapter: Whether only adapters are saved, which need the base model and PEFT.
        parameters: How many parameters it has.
        blocks: How it was cut.
        global_steps: Share of the optimizer steps that were backpropagation through the whole model.
        overlap: Blocks below its own that a loss taught too.
        whole_backward: Whether some backward pass went through all layers.
        result: What the run came to.
        baseline: What ordinary training came to, if that was run.
        steps_of_session: First and last optimizer step of the process that wrote the card.
        times: How long steps took in each process.
        peaks: How much memory each device needed.
        base_model: What training started from; None from scratch.
        data: What it was trained on.
        arguments: Training arguments that are not the default.
        block_local: Fields of the block-local config that are not the default.
        seed: Seed of the run.
        environment: Versions, commit and hardware.
        citations: Papers of the losses and heads.
        license: Licence of the model, if it was stated by hand.
        language: Languages, likewise.
        config: The file that configured the run.
        command: The command that ran it.
        limits: What else to know before using it, each a sentence.
        tags: More tags for the Hub.
    """

    name: str
    location: str
    architecture: str
    parameters: int
    blocks: tuple[BlockOfCut, ...]
    result: RunResult
    auto_class: str | None = None
    pipeline_tag: str | None = None
    example: str | None = None
    has_processor: bool = False
    is_adapter: bool = False
    global_steps: float = 0.0
    overlap: int = 0
    whole_backward: bool = False
    baseline: RunResult | None = None
    steps_of_session: tuple[int, int] | None = None
    times: tuple[StepTime, ...] = ()
    peaks: tuple[Memory, ...] = ()
    base_model: BaseModel | None = None
    data: Data | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    block_local: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    citations: tuple[str, ...] = ()
    license: str | None = None
    language: str | list[str] | None = None
    config: str | None = None
    command: str | None = None
    limits: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def inherited_license(self) -> str | None:
        """The licence that was stated, else that of the base model; None where neither is known."""
        return self.license or (self.base_model.license if self.base_model is not None else None)


@dataclass(frozen=True)
class CardStatement:
    """What the arguments of `Trainer.create_model_card` say, which counts more than what a run says of itself."""

    language: str | None = None
    license: str | None = None
    tags: str | list[str] | None = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: str | list[str] | None = None
    dataset_tags: str | list[str] | None = None
    dataset: str | list[str] | None = None
    dataset_args: str | list[str] | None = None

    def over(self, facts: CardFacts) -> CardFacts:
        """Return the facts with what is stated in place of what was found.

        Raises:
            CardError: If several tasks or data sets are named, of which a card has one.
        """
        base, data = facts.base_model, facts.data or Data()
        # What is known of one model does not count for another.
        if self.finetuned_from is not None and (base is None or base.name != self.finetuned_from):
            base = BaseModel(self.finetuned_from)
        data = replace(
            data,
            hub_id=_one("dataset_tags", self.dataset_tags) or data.hub_id,
            name=_one("dataset", self.dataset) or data.name,
            config=_one("dataset_args", self.dataset_args) or data.config,
        )
        tags = [self.tags] if isinstance(self.tags, str) else self.tags or []
        return replace(
            facts,
            language=self.language or facts.language,
            license=self.license or facts.license,
            tags=tuple(dict.fromkeys([*facts.tags, *tags])),
            name=self.model_name or facts.name,
            base_model=base,
            pipeline_tag=_one("tasks", self.tasks) or facts.pipeline_tag,
            data=None if data == Data() else data,
        )


def _one(name: str, value: str | list[str] | None) -> str | None:
    values = [value] if isinstance(value, str) else list(value or ())
    if len(values) > 1:
        raise CardError(f"{name}={values} names {len(values)}, and a card has room for one. Name the one that counts.")
    return values[0] if values else None
