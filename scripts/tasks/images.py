"""Image classification: one class per picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.base import Kit, Prepared, both_ways, build_model, load_splits, names_of_classes


if TYPE_CHECKING:
    from recipes import Run


@dataclass(frozen=True)
class ImageClassification(Kit):
    """Pictures in the column `image`, as pictures or as numbers from 0 to 255.

    Attributes:
        image_column: Where they are.
    """

    metric: ClassVar[str] = "accuracy"
    predicts: ClassVar[str] = "the class, from the mean over patches"
    pipeline: ClassVar[str | None] = "image-classification"

    image_column: str = "image"

    def prepare(self, run: Run) -> Prepared:
        """Bring the pictures into the form that the model takes."""
        import numpy as np
        from PIL import Image
        from transformers import AutoModelForImageClassification, DefaultDataCollator

        from hf_blocklocal.metrics import accuracy_of_logits

        splits, names = names_of_classes(load_splits(run, [self.image_column, run.label_column]), run)
        processor = _processor(run)

        def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            images = [
                image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, dtype=np.uint8))
                for image in rows[self.image_column]
            ]
            pixels = processor([image.convert("RGB") for image in images], return_tensors="np")["pixel_values"]
            return {"pixel_values": pixels}

        columns = [name for name in splits[run.train_split].column_names if name != "label"]
        pixels = splits.map(encode, batched=True, remove_columns=columns).with_format("torch")
        return Prepared(
            model=build_model(run, AutoModelForImageClassification, **both_ways(names)),
            train=pixels[run.train_split],
            test=pixels[run.test_split],
            collator=DefaultDataCollator(),
            processor=processor,
            compute_metrics=accuracy_of_logits(),
        )


def _processor(run: Run) -> Any:
    """Load the processor of a model; that of a new one only scales."""
    from transformers import AutoImageProcessor

    if isinstance(run.model, str):
        return AutoImageProcessor.from_pretrained(run.model)
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    side = run.model["image_size"]
    return ViTImageProcessorPil(size={"height": side, "width": side})
