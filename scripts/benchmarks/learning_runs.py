"""One training run of the learning benchmark, and the folder in which every run leaves one file.

A file's name holds a hash of all that the run depends on: its task and budget, the samples and the starting weights,
the row's settings with every default, the learning rate, the seed, the versions. So a benchmark goes on where it
stopped, and a change of any of these makes a new run.
"""

from __future__ import annotations

import gc
import json
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from learning_rows import LORA, ONE_RATE, Row
from learning_tasks import Data, Task, load_data, load_fingerprint
from learning_tasks.base import code_hash, hash_of, versions
from learning_tasks.pretraining import silent_arguments


CACHE = "cache"
CURVE_SAMPLES = 200


@dataclass(frozen=True)
class Run:
    """One row on one task with one cut, learning rate and seed."""

    task: Task
    row: Row
    num_blocks: int | None
    rate: float | None
    seed: int

    @property
    def label(self) -> str:
        """What a person calls the run."""
        return f"{self.task.name}: {self.row.name}{self.details}"

    @property
    def settings(self) -> dict[str, Any]:
        """All that the row is on this task."""
        task = self.task
        return self.row.settings(self.num_blocks, single_stack=task.single_stack, pretrained=task.pretrained)

    @property
    def details(self) -> str:
        """Cut, learning rate and seed in words."""
        cut = "" if self.num_blocks is None else f" K={self.num_blocks}"
        rate = "" if self.rate is None else f" lr={self.rate:g}"
        return f"{cut}{rate} seed={self.seed}"


class Store:
    """The results on disk, one JSON file per run.

    Args:
        folder: Where they are; prepared tasks lie in a folder below.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._prepared: dict[str, Path] = {}
        self._fingerprints: dict[str, str] = {}

    def prepare(self, task: Task) -> Path:
        """Build a task's data and starting model where they are missing. Returns their folder."""
        if task.name not in self._prepared:
            self._prepared[task.name] = task.prepare(self.folder / CACHE)
            self._fingerprints[task.name] = load_fingerprint(self._prepared[task.name])
        return self._prepared[task.name]

    def key(self, run: Run) -> str:
        """Return the hash of all that a run depends on. The task must have been prepared."""
        return hash_of(
            {
                "task": run.task.run_spec(),
                "fingerprint": self._fingerprints[run.task.name],
                "row": run.settings,
                "rate": run.rate,
                "seed": run.seed,
                "versions": versions(),
            }
        )

    def path(self, run: Run) -> Path:
        """Return where the result of a run is, or will be. Rows with the same settings share it."""
        name = re.sub(r"[^\w.=-]+", "_", f"{run.row.method}{run.details}")
        return self.folder / run.task.name / f"{name}-{self.key(run)}.json"

    def load(self, run: Run) -> dict[str, Any] | None:
        """Return the result of a run, None if it has not been made."""
        path = self.path(run)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def save(self, run: Run, outcome: Mapping[str, Any]) -> None:
        """Write the result of a run; a file is there in full or not at all."""
        path = self.path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"task": run.task.name, "row": run.row.name, "num_blocks": run.num_blocks}
        result = {**about, "rate": run.rate, "seed": run.seed, "code": package_code(), **outcome}
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)


@lru_cache
def package_code() -> str:
    """Hash the code of the package: runs whose hash differs were made with another state of it."""
    import hf_blocklocal

    return code_hash(sorted(Path(hf_blocklocal.__file__).parent.rglob("*.py")))


def execute(run: Run, prepared: Path) -> dict[str, Any]:
    """Train and score once.

    Args:
        run: What to do.
        prepared: Folder of the prepared task.

    Returns:
        Validation and test score, what is remembered of the old domain, the learning curve, and the time of training
        alone, in seconds of the processor and of the clock.
    """
    import torch

    task, data = run.task, load_data(prepared)
    if run.row.method == "reference":
        return task.reference(run.row.name, prepared, data)
    model = task.model(prepared, run.seed).to("cuda" if torch.cuda.is_available() else "cpu")
    curve: list[tuple[int, float]] = []
    clocks = (time.process_time(), time.perf_counter())
    if run.row.learns:
        model = train(run, model, data, curve)
    cpu_seconds, wall_seconds = time.process_time() - clocks[0], time.perf_counter() - clocks[1]
    outcome = {
        "validation": task.score(model, data.validation),
        "test": task.score(model, data.test),
        "remembered": task.remembered(model, prepared, data),
        "curve": curve,
        "cpu_seconds": round(cpu_seconds, 2),
        "wall_seconds": round(wall_seconds, 2),
    }
    del model
    gc.collect()  # a trainer is full of cycles, and the next run needs its place
    return outcome


def train(run: Run, model: Any, data: Data, curve: list[tuple[int, float]]) -> Any:
    """Train a model with the real trainer of its row. Returns it, without adapters."""
    from transformers import PrinterCallback, Trainer

    from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer

    with tempfile.TemporaryDirectory() as folder:
        common = {
            "args": silent_arguments(folder, **run.task.budget, learning_rate=run.rate, seed=run.seed),
            "train_dataset": data.train,
            "data_collator": run.task.collate,
        }
        if run.row.method == "local":
            config = BlockLocalConfig.from_dict(ONE_RATE | run.settings["block_local"])
            trainer = BlockLocalTrainer(model, block_local=config, **common)
        else:
            if run.row.method == "freeze":
                freeze_lower_(model, run.num_blocks, common)
            if run.row.method == "lora":
                model = with_adapters(model, run.task)
            trainer = Trainer(model, **common)
        trainer.remove_callback(PrinterCallback)
        if run.task.curve_every:
            trainer.add_callback(curve_callback(run.task, data, curve))
        trainer.train()
    return model.merge_and_unload() if run.row.method == "lora" else model


def freeze_lower_(model: Any, num_blocks: int, common: Mapping[str, Any]) -> None:
    """Freeze all that block-local training would not leave to the last block, and the embeddings."""
    from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer

    assembly = BlockLocalTrainer(model, block_local=BlockLocalConfig(num_blocks=num_blocks), **common).assembly
    last = {id(parameter) for parameter in assembly.parameters[-1]}
    # A shared embedding is the last block's to step, but it is also the lowest layer of all.
    embedding = model.get_input_embeddings()
    last -= {id(parameter) for parameter in embedding.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in last)


def with_adapters(model: Any, task: Task) -> Any:
    """Put low-rank adapters on every linear map of the layers; a new head is trained in full."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from hf_blocklocal.anatomy.layers import find_stacks

    layers = tuple(path for stack in find_stacks(model, None) for path in stack.layers)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{path}.") for path in layers)
    ]
    return get_peft_model(
        model, LoraConfig(**LORA, target_modules=linear, modules_to_save=list(task.head_modules) or None)
    )


def curve_callback(task: Task, data: Data, curve: list[tuple[int, float]]) -> Any:
    """Return a callback that scores some validation samples every few steps."""
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        """Write steps and scores to the list."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step % task.curve_every == 0:
                curve.append((state.global_step, task.score(model, data.validation[:CURVE_SAMPLES])))

    return Curve()
