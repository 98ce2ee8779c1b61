"""The YAML at the top of a card, in the Hub's own classes, so that what it would refuse is refused here."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_blocklocal.card.facts import CardFacts


TAGS = ("block-local", "hf_blocklocal")


def metadata_of(facts: CardFacts) -> ModelCardData:
    """Return the metadata of a run; what is not known is absent."""
    data, base = facts.data, facts.base_model
    results = eval_results(facts)
    return ModelCardData(
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=facts.pipeline_tag,
        base_model=base.name if base is not None else None,
        license=facts.inherited_license,
        language=facts.language or (base.language if base is not None else None),
        datasets=[data.hub_id] if data is not None and data.hub_id else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        tags=[*TAGS, *facts.tags],
        model_name=facts.name if results else None,
        eval_results=results or None,
    )


def eval_results(facts: CardFacts) -> list[EvalResult]:
    """Return what the whole model was measured to be; nothing where task or data set have no name."""
    data = facts.data
    if facts.pipeline_tag is None or data is None or not (data.hub_id or data.name):
        return []
    return [
        EvalResult(
            task_type=facts.pipeline_tag,
            dataset_type=data.hub_id or re.sub(r"\W+", "-", data.name.lower()),  # an id, as the Hub spells them
            dataset_name=data.name or data.hub_id,
            dataset_config=data.config,
            dataset_split=data.eval_split,
            dataset_revision=data.revision,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in facts.result.of_model().items()
        if math.isfinite(value)
    ]


def merged(kept: ModelCardData, new: ModelCardData, *, ours: bool) -> ModelCardData:
    """Return the metadata of a card that is updated.

    Args:
        kept: What stands there.
        new: What the run says.
        ours: Whether what stands there comes from an earlier run, so that measured values are replaced. What a user
            may have written is kept: licence, language and everything that the run says nothing about.
    """
    old, fresh = _without_folders(kept.to_dict()), new.to_dict()
    measured = ("model-index", "metrics", "datasets", "base_model", "library_name", "pipeline_tag")
    result = {**fresh, **old, **({name: fresh[name] for name in measured if name in fresh} if ours else {})}
    result["tags"] = list(dict.fromkeys([*(old.get("tags") or []), *fresh["tags"]]))
    return ModelCardData(**result)


def _without_folders(values: dict[str, Any]) -> dict[str, Any]:
    """Drop what names a folder of this machine as the base model, as PEFT does in every card it saves."""
    base = values.get("base_model")
    if not isinstance(base, str) or not Path(base).is_dir():
        return values
    tags = [tag for tag in values.get("tags") or [] if not tag.endswith(f":{base}")]
    return {name: value for name, value in values.items() if name != "base_model"} | {"tags": tags}
