"""Audio classification: one class per sound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_blocklocal.errors import TargetError
from tasks.base import Kit, Prepared, both_ways, build_model, load_splits, names_of_classes


if TYPE_CHECKING:
    from recipes import Run


@dataclass(frozen=True)
class AudioClassification(Kit):
    """Sounds in the column `audio`, each with its `array` of samples and its `sampling_rate`.

    Attributes:
        audio_column: Where they are.
        seconds: Longer sounds are cut off.
    """

    metric: ClassVar[str] = "accuracy"
    predicts: ClassVar[str] = "the class, from the mean over time"
    pipeline: ClassVar[str | None] = "audio-classification"

    audio_column: str = "audio"
    seconds: float = 10.0

    def prepare(self, run: Run) -> Prepared:
        """Scale the sounds and load a classifier."""
        import numpy as np
        from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, Wav2Vec2FeatureExtractor

        from hf_blocklocal.metrics import accuracy_of_logits

        splits, names = names_of_classes(load_splits(run, [self.audio_column, run.label_column]), run)
        rate = splits[run.train_split][0][self.audio_column]["sampling_rate"]
        if isinstance(run.model, str):
            extractor = AutoFeatureExtractor.from_pretrained(run.model)
        else:
            extractor = Wav2Vec2FeatureExtractor(sampling_rate=rate, return_attention_mask=True)
        if rate != extractor.sampling_rate:
            raise TargetError(
                f"The sounds of {run.dataset} have {rate} samples a second and the model takes "
                f"{extractor.sampling_rate}. Cast the column first: "
                f"dataset.cast_column({self.audio_column!r}, Audio({extractor.sampling_rate}))."
            )
        longest = int(self.seconds * rate)

        def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            sounds = [np.asarray(sound["array"][:longest], dtype=np.float32) for sound in rows[self.audio_column]]
            return extractor(sounds, sampling_rate=rate)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            import torch

            labels = [row["label"] for row in rows]
            sounds = [{name: value for name, value in row.items() if name != "label"} for row in rows]
            return {**extractor.pad(sounds, return_tensors="pt"), "labels": torch.tensor(labels)}

        columns = [name for name in splits[run.train_split].column_names if name != "label"]
        values = splits.map(encode, batched=True, remove_columns=columns)
        return Prepared(
            model=build_model(run, AutoModelForAudioClassification, **both_ways(names)),
            train=values[run.train_split],
            test=values[run.test_split],
            collator=collate,
            processor=extractor,
            compute_metrics=accuracy_of_logits(),
        )
