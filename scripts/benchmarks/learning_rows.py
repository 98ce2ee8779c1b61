"""The rows of the learning table: a name, and how a model is trained with K blocks.

A new idea is one line in `CANDIDATES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}

# With all layers above, live and over the whole vocabulary, a head has the gradient of backpropagation.
EVERYTHING = {"head_layers": 1000, "negatives": None}
ONE_RATE = {"block_lr_decay": 1.0}
LENS = {"head_layers": 0, "head_lens": True}

Method = Literal["start", "backpropagation", "freeze", "lora", "local", "reference"]


@dataclass(frozen=True)
class Row:
    """One way of training.

    Attributes:
        name: What the table calls it.
        method: The starting model as it is; the plain Trainer on all weights, on those of the last block, or on
            adapters; `BlockLocalTrainer`; or a method that trains no transformer.
        block_local: Fields of `BlockLocalConfig`; with `preset`, on top of that preset.
        in_processes: Whether heads borrow as they do where every block has a process of its own.
        lowest_rate: Learning rate of the lowest block, as a share of the last one's; in between it rises evenly, by
            `block_lr_decay`. None is the default: less than the last one's where the model is pretrained.
    """

    name: str
    method: Method
    block_local: Mapping[str, Any] = field(default_factory=dict)
    in_processes: bool = False
    lowest_rate: float | None = 1.0

    @property
    def depends_on_blocks(self) -> bool:
        """Whether the number of blocks makes a difference."""
        return self.method in ("freeze", "local")

    @property
    def learns(self) -> bool:
        """Whether it has a learning rate to tune and a seed."""
        return self.method not in ("start", "reference")

    @property
    def needs_pretraining(self) -> bool:
        """Whether it makes no sense from scratch."""
        return self.method in ("start", "freeze", "lora")

    def settings(
        self, num_blocks: int | None, *, single_stack: bool = True, pretrained: bool = False
    ) -> dict[str, Any]:
        """Return all that the row depends on, as JSON values.

        Fields of the configuration that are as they come are left out, so that a new one makes no run stale; and so is
        one rate for all blocks.

        Args:
            num_blocks: Blocks, None where it makes no difference.
            single_stack: Whether the model has one stack of layers, which some defaults depend on.
            pretrained: Whether its weights come from a checkpoint, which they depend on too.

        Raises:
            ConfigError: If this version of the package does not know the preset or a field.
        """
        from hf_blocklocal.config.defaults import settled

        settings: dict[str, Any] = {"method": self.method, "num_blocks": num_blocks}
        if self.method == "lora":
            settings["lora"] = LORA
        if self.method == "local":
            config = self._config(num_blocks)
            if self.in_processes:  # settled where blocks are apart, and run where they are not
                config = replace(config, block_parallel_size=num_blocks)
                config = settled(config, single_stack=single_stack, pretrained=pretrained)
                config = replace(config, block_parallel_size=1)
            given = settled(config, single_stack=single_stack, pretrained=pretrained).to_dict()
            usual = type(self)._defaults() | {"num_blocks": None, **ONE_RATE}
            settings["block_local"] = {name: value for name, value in given.items() if value != usual[name]}
        if self.method == "reference":
            settings["reference"] = self.name
        return settings

    @staticmethod
    def _defaults() -> dict[str, Any]:
        from hf_blocklocal import BlockLocalConfig

        return BlockLocalConfig().to_dict()

    def _config(self, num_blocks: int) -> Any:
        from hf_blocklocal import BlockLocalConfig

        given = {"num_blocks": num_blocks, "evaluate_blocks": False, **self.block_local}
        if self.lowest_rate is not None:
            given["block_lr_decay"] = round(self.lowest_rate ** (1 / (num_blocks - 1)), 3)
        preset = given.pop("preset", None)
        return BlockLocalConfig.from_dict(given) if preset is None else BlockLocalConfig.from_preset(preset, **given)


BASELINES = [
    Row("not fine-tuned", "start"),
    Row("backpropagation", "backpropagation"),
    Row("freeze lower", "freeze"),
    Row("LoRA", "lora"),
]
PUBLISHED = [
    Row("pred", "local", {"preset": "pred"}),
    Row("kappel2023", "local", {"preset": "kappel2023"}),
]
CANDIDATES = [
    Row("default", "local", lowest_rate=None),
    Row("default in several processes", "local", in_processes=True, lowest_rate=None),
    Row("backpropagation, less below", "local", EVERYTHING, lowest_rate=0.3),
    Row("default, a tenth below", "local", lowest_rate=0.1),
    Row("default, one rate", "local"),
    Row("default in several processes, one rate", "local", in_processes=True),
    Row("head_layers=0, one rate", "local", {"head_layers": 0}),
    Row("head_layers=0, less below", "local", {"head_layers": 0}, lowest_rate=0.3),
    Row("lens in several processes, one rate", "local", LENS, in_processes=True),
    Row("lens in several processes, less below", "local", LENS, in_processes=True, lowest_rate=0.3),
    Row("frozen copies in several processes, one rate", "local", {"head_copies": "frozen"}, in_processes=True),
    Row("default, one rate, polished", "local", {"polish": 0.2}),
    Row("straight through, one rate", "local", {"head_bypass": "straight_through"}),
]
ROWS = {row.name: row for row in [*BASELINES, *PUBLISHED, *CANDIDATES]}
