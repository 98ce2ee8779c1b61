"""The quick start of a card: plain transformers code.

It runs inside the folder of the card, or from anywhere once the model is on the Hub.
"""

from __future__ import annotations

from hf_blocklocal.card.facts import CardFacts


WHERE = "this folder; its id once it is on the Hub"
IMAGE = 'Image.new("RGB", (224, 224))'
SOUND = "numpy.zeros(16_000, dtype=numpy.float32)"
SENTENCE = '"Every block learns from a loss of its own."'
# Tasks whose pipelines take one thing and give an answer: what to give them unless the user has said, and an import.
PIPELINES = {
    "text-classification": (SENTENCE, None),
    "token-classification": (SENTENCE, None),
    "fill-mask": (None, None),
    "text-generation": (SENTENCE, None),
    "image-classification": (IMAGE, "from PIL import Image"),
    "audio-classification": (SOUND, "import numpy"),
    "automatic-speech-recognition": (SOUND, "import numpy"),
}


def quick_start(facts: CardFacts) -> str | None:
    """Return Python that loads the model, and uses it where it is known what it takes."""
    given, needed = PIPELINES.get(facts.pipeline_tag or "", (None, None))
    if facts.has_processor and not facts.is_adapter and (facts.example or given):
        lines = [needed] if needed and not facts.example else []
        lines += [
            "from transformers import pipeline",
            "",
            location_line(facts.location),
            f'model = pipeline("{facts.pipeline_tag}", model=name)',
            f"print(model({facts.example or given}))",
        ]
    elif facts.auto_class is not None:
        imported = f"{facts.auto_class}, AutoTokenizer" if _reads_text(facts) else facts.auto_class
        lines = [
            f"from transformers import {imported}",
            "",
            location_line(facts.location),
            f"model = {facts.auto_class}.from_pretrained(name)",
        ]
        if _reads_text(facts):
            example = facts.example or SENTENCE
            lines += [
                "tokenizer = AutoTokenizer.from_pretrained(name)",
                f'inputs = tokenizer({example}, return_tensors="pt")',
                "print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=20)))",
            ]
    else:
        return None
    return "\n".join(["```python", *lines, "```"])


def location_line(location: str) -> str:
    """Return the line of the quick start that says where the model is."""
    return f'name = "{location}"' + (f"  # {WHERE}" if location == "." else "")


def _reads_text(facts: CardFacts) -> bool:
    """Tell whether the model is one that turns a text into another, for which there is no pipeline."""
    return facts.auto_class == "AutoModelForSeq2SeqLM" and facts.has_processor and not facts.is_adapter


def requirements(facts: CardFacts) -> str:
    """Say what else it takes to use the model."""
    if facts.is_adapter:
        base = facts.base_model.name if facts.base_model is not None else None
        return f"Only adapters are saved: loading them needs PEFT and the base model{f' {base}' if base else ''}."
    said = "An ordinary transformers checkpoint: loading and using it does not need hf_blocklocal."
    if not facts.has_processor:
        said += " No tokenizer or processor was saved with it; use the one that it was trained with."
    return said
