"""Task (c): a vision transformer, pretrained on handwritten digits, sees them turned and noisy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from learning_tasks.base import ACCURACY, START, Data, Metric, Row, Task, accuracy, split_by_share
from learning_tasks.pretraining import pretrain_


@dataclass(frozen=True)
class Images(Task):
    """scikit-learn's 8x8 digits: pretrained by backpropagation as they are, fine-tuned on a shifted domain.

    The shift turns an image by 90 degrees and adds noise. The classes and the classifier stay.
    An image is in the same split before and after; each test image comes with three draws of noise. Forgetting is the
    accuracy on unshifted test images.
    """

    name: ClassVar[str] = "images"
    title: ClassVar[str] = "ViT, shifted digits"
    metric: ClassVar[Metric] = ACCURACY
    forgetting: ClassVar[Metric | None] = Metric("accuracy, old domain", higher_is_better=True)
    seconds: ClassVar[float] = 14

    blocks: tuple[int, ...] = (2, 4)
    rates: tuple[float, ...] = (8e-4, 2e-3, 5e-3)
    budget: dict[str, Any] = field(
        default_factory=lambda: {"num_train_epochs": 12, "per_device_train_batch_size": 32, "warmup_steps": 0.1}
    )
    layers: int = 8
    width: int = 64
    heads: int = 4
    noise: float = 0.1
    train_share: float = 0.5
    validation_share: float = 0.15
    pretraining: dict[str, Any] = field(
        default_factory=lambda: {
            "num_train_epochs": 30,
            "per_device_train_batch_size": 32,
            "learning_rate": 1e-3,
            "warmup_steps": 0.05,
            "seed": 0,
        }
    )

    @property
    def num_layers(self) -> int:
        """Layers of the vision transformer."""
        return self.layers

    def build(self, folder: Path) -> Data:
        """Split and shift the images; pretrain on those of train as they are."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images_N88 = torch.tensor(digits.images, dtype=torch.float32) / 16
        samples = list(zip(images_N88, digits.target.tolist(), strict=True))
        splits = split_by_share(
            samples,
            lambda sample: sample[0].numpy().tobytes(),
            train=self.train_share,
            validation=self.validation_share,
        )
        generator = torch.Generator().manual_seed(0)
        plain = [[_row(image, label) for image, label in part] for part in splits]
        shifted = [
            [_row(self._shift(image, generator), label) for _ in range(draws) for image, label in part]
            for part, draws in zip(splits, (1, 3, 3), strict=True)
        ]
        torch.manual_seed(0)
        model = self._new_model()
        pretrain_(model, plain[0], self.collate, **self.pretraining)
        model.save_pretrained(folder / START)
        return Data(*shifted, before=plain[2])

    def model(self, folder: Path, seed: int) -> Any:
        """Load the pretrained model with its classifier; the seed only shuffles the data."""
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification.from_pretrained(folder / START)

    def score(self, model: Any, rows: Sequence[Row]) -> float:
        """Return the accuracy."""
        return accuracy(self.logits(model, rows, batch=256))

    def remembered(self, model: Any, folder: Path, data: Data) -> float:
        """Return the accuracy on unshifted test images."""
        return self.score(model, data.before)

    def _new_model(self) -> Any:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return ViTForImageClassification(config)

    def _shift(self, image_88: Tensor, generator: torch.Generator) -> Tensor:
        turned = image_88.rot90()
        return turned + self.noise * torch.randn(turned.shape, generator=generator)


def _row(image_88: Tensor, label: int) -> Row:
    return {"pixel_values": (image_88[None] - 0.5) / 0.5, "labels": label}
