"""Model cards: what a run knows about its model, as text that a reader of the Hub can trust.

`CardFacts` is everything that a card says, as plain values; `write_card` renders it from `templates/model_card.md`. A
field is filled from the run, or absent.
"""

from __future__ import annotations

from hf_blocklocal.card.facts import BaseModel, CardFacts, CardStatement, Data, RunResult
from hf_blocklocal.card.sections import FIELDS
from hf_blocklocal.card.sources import base_model_of, baseline_of, data_of, last_evaluation
from hf_blocklocal.card.template import TEMPLATE, read_template
from hf_blocklocal.card.writing import BEGIN, CARD_NAME, END, name_location, render, write_card


__all__ = [
    "BEGIN",
    "CARD_NAME",
    "END",
    "FIELDS",
    "TEMPLATE",
    "BaseModel",
    "CardFacts",
    "CardStatement",
    "Data",
    "RunResult",
    "base_model_of",
    "baseline_of",
    "data_of",
    "last_evaluation",
    "name_location",
    "read_template",
    "render",
    "write_card",
]
