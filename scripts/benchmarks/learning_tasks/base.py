"""What a learning task is: data split by hash, a model to start from, a budget, and how well a model does.

A task knows nothing of the methods that are compared on it. What takes time to make (data, tokenizer, pretrained
weights) is made once, in a folder whose name is a hash of all it depends on.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import platform
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor


Row = dict[str, Any]
# Only these touch numbers; the others of a run are recorded beside its result.
VERSIONS = ("torch", "transformers", "tokenizers", "scikit-learn", "peft")
HERE = Path(__file__).resolve().parent
# What all tasks make their data and starting models with, beside their own file.
BUILDERS = ("corpora.py", "pretraining.py", "vocabulary.py", "../../docstring_corpus.py")
# Fields that neither data nor starting model depend on.
COMPARED = ("blocks", "rates", "budget", "seconds", "single_stack")
DATA, START, FINGERPRINT = "data.pt", "start", "fingerprint.json"


@dataclass(frozen=True)
class Metric:
    """A score: what it is called, whether more of it is better, how it is printed."""

    name: str
    higher_is_better: bool
    form: str = ".3f"


ACCURACY = Metric("accuracy", higher_is_better=True)
PERPLEXITY = Metric("perplexity", higher_is_better=False, form=".2f")


@dataclass(frozen=True)
class Data:
    """Samples of each split. `before` holds samples of the pretraining domain that pretraining has not seen."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    before: list[Row]


@dataclass(frozen=True)
class Task(ABC):
    """One learning task; a subclass's fields are its sizes, and all of them go into the name of its folder.

    Attributes:
        blocks: The numbers of blocks K that are compared.
        rates: The grid of learning rates, ascending, the same for every row.
        budget: Fields of `TrainingArguments` that say how long to train.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[Metric]
    forgetting: ClassVar[Metric | None] = None
    pretrained: ClassVar[bool] = True
    single_stack: ClassVar[bool] = True
    head_modules: ClassVar[tuple[str, ...]] = ()
    references: ClassVar[tuple[str, ...]] = ()
    fills: ClassVar[Mapping[str, int]] = {}
    curve_every: ClassVar[int | None] = None
    # What a run takes on one core, about, for the estimate.
    seconds: ClassVar[float] = 20

    blocks: tuple[int, ...]
    rates: tuple[float, ...]
    budget: Mapping[str, Any]

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Layers of the model."""

    @abstractmethod
    def build(self, folder: Path) -> Data:
        """Make the data, and leave in the folder what `model` needs."""

    @abstractmethod
    def model(self, folder: Path, seed: int) -> Any:
        """Return the model to start from; the seed draws whatever is not pretrained."""

    @abstractmethod
    def score(self, model: Any, rows: Sequence[Row]) -> float:
        """Return the task's metric on some of its samples."""

    def remembered(self, model: Any, folder: Path, data: Data) -> float | None:
        """Return the forgetting metric, None for a task without."""
        return None

    def reference(self, name: str, folder: Path, data: Data) -> dict[str, float]:
        """Return validation and test score of a method that trains no transformer."""
        raise ValueError(f"{self.name} has no reference {name!r}. It has {list(self.references)}.")

    def spec(self) -> dict[str, Any]:
        """Return all that describes the task, as JSON values."""
        return json.loads(json.dumps({"task": self.name, **asdict(self)}))

    def run_spec(self) -> dict[str, Any]:
        """Return what one training run depends on, data and starting model apart: not what is compared."""
        return {name: value for name, value in self.spec().items() if name not in ("blocks", "rates")}

    def build_spec(self) -> dict[str, Any]:
        """Return what data and starting model depend on: not the budget, but the code that makes them."""
        sizes = {name: value for name, value in self.spec().items() if name not in COMPARED}
        files = [Path(inspect.getfile(type(self))), *(HERE / name for name in BUILDERS)]
        return sizes | {"versions": versions(), "code": code_hash(files)}

    def prepare(self, root: Path) -> Path:
        """Build data and starting model unless they are there already. Returns the task's folder."""
        folder = root / f"{self.name}-{hash_of(self.build_spec())}"
        if not (folder / FINGERPRINT).is_file():
            unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            data = self.build(unfinished)
            torch.save(asdict(data), unfinished / DATA)
            made = {"spec": self.build_spec(), "sizes": {name: len(split) for name, split in asdict(data).items()}}
            made["fingerprint"] = fingerprint(data, unfinished / START)
            (unfinished / FINGERPRINT).write_text(json.dumps(made, indent=1), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        return folder

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a batch; lists are padded to the longest with the task's fill values."""
        return {name: _stacked([row[name] for row in rows], self.fills.get(name, 0)) for name in rows[0]}

    def logits(self, model: Any, rows: Sequence[Row], batch: int = 64) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Run a model over samples without dropout or gradient. Yields logits and inputs, batch by batch."""
        training = model.training
        model.eval()
        with torch.inference_mode():
            for start in range(0, len(rows), batch):
                inputs = {k: v.to(model.device) for k, v in self.collate(rows[start : start + batch]).items()}
                yield model(**inputs).logits.float(), inputs
        model.train(training)


def load_data(folder: Path) -> Data:
    """Read the samples of a prepared task."""
    return Data(**torch.load(folder / DATA, weights_only=True))


def load_fingerprint(folder: Path) -> str:
    """Return the hash of a prepared task's samples and starting weights."""
    return json.loads((folder / FINGERPRINT).read_text(encoding="utf-8"))["fingerprint"]


@lru_cache
def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in VERSIONS}


def code_hash(files: Sequence[Path]) -> str:
    """Hash what Python files do: comments, formatting, docstrings and what a task compares do not count."""
    trees = []
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [line for line in body if not _is_text(line) and not _is_compared(line)]
        trees.append(ast.dump(tree))
    return hash_of(trees)


def _is_compared(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in COMPARED


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def hash_of(values: Any) -> str:
    """Return a short hash of JSON values, the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def share_of(content: bytes | str) -> float:
    """Place a sample in [0, 1) by a hash of its content alone: what decides which split it belongs to."""
    content = content.encode() if isinstance(content, str) else content
    return int(hashlib.sha256(content).hexdigest()[:12], 16) / 16**12


def split_by_share(
    samples: Sequence[Any], content: Callable[[Any], bytes | str], *, train: float, validation: float
) -> tuple[list[Any], list[Any], list[Any]]:
    """Divide samples into train, validation and test by `share_of` their content, ordered by it within each split.

    Args:
        samples: The samples.
        content: What of a sample is hashed; samples with equal content fall into the same split.
        train: Share of train.
        validation: Share of validation; test is what remains.
    """
    ordered = sorted(samples, key=lambda sample: share_of(content(sample)))
    edges = (0.0, train, train + validation, 1.0)
    parts = [
        [sample for sample in ordered if low <= share_of(content(sample)) < high]
        for low, high in zip(edges, edges[1:], strict=False)
    ]
    return parts[0], parts[1], parts[2]


def fingerprint(data: Data, start: Path) -> str:
    """Hash samples and starting weights."""
    digest = hashlib.sha256()
    for split in asdict(data).values():
        for row in split:
            plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in row.items()}
            digest.update(json.dumps(plain, sort_keys=True).encode())
        digest.update(b"|")
    for path in sorted(start.glob("*.safetensors")) if start.is_dir() else ():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def accuracy(batches: Iterator[tuple[Tensor, dict[str, Tensor]]]) -> float:
    """Return the share of samples whose label has the largest logit."""
    right = [(logits_BC.argmax(-1) == inputs["labels"]).cpu() for logits_BC, inputs in batches]
    return torch.cat(right).float().mean().item()


def perplexity(batches: Iterator[tuple[Tensor, dict[str, Tensor]]], *, shifted: bool) -> float:
    """Return the exponential of the mean negative log-likelihood of a target token.

    Args:
        batches: Logits (B, S, V) and inputs with labels (B, S).
        shifted: Whether position i predicts the label at i + 1.
    """
    total, count = 0.0, 0
    for logits_BSV, inputs in batches:
        labels_BS = inputs["labels"]
        if shifted:
            logits_BSV, labels_BS = logits_BSV[:, :-1], labels_BS[:, 1:]
        total += torch.nn.functional.cross_entropy(
            logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=-100, reduction="sum"
        ).item()
        count += int((labels_BS != -100).sum())
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def _stacked(values: Sequence[Any], fill: int) -> Tensor:
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    if isinstance(values[0], int):
        return torch.tensor(values)
    longest = max(map(len, values))
    return torch.tensor([[*value, *[fill] * (longest - len(value))] for value in values])
