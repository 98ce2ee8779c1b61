"""Language modelling: hidden tokens of a text from both sides, or each token from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_blocklocal.targets.batch import IGNORED
from tasks.base import Kit, Prepared, build_model, load_splits, load_tokenizer


if TYPE_CHECKING:
    from recipes import Run


@dataclass(frozen=True)
class MaskedLanguageModel(Kit):
    """Some tokens of each text are hidden, others every time.

    Attributes:
        masked: Share of the tokens that are to be guessed.
    """

    metric: ClassVar[str] = "perplexity"
    predicts: ClassVar[str] = "hidden tokens, at their places"
    pipeline: ClassVar[str | None] = "fill-mask"

    masked: float = 0.15

    def prepare(self, run: Run) -> Prepared:
        """Tokenize the texts, and load a model that fills gaps."""
        from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

        splits = load_splits(run, [run.text_column])
        tokenizer = load_tokenizer(run, splits[run.train_split][run.text_column])
        tokens = splits.map(
            lambda rows: tokenizer(rows[run.text_column], truncation=True, max_length=run.max_length),
            batched=True,
            remove_columns=splits[run.train_split].column_names,
        )
        seed = run.training.get("seed", 42)
        return Prepared(
            model=build_model(run, AutoModelForMaskedLM),
            train=tokens[run.train_split],
            test=tokens[run.test_split],
            collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=self.masked, seed=seed),
            processor=tokenizer,
        )


@dataclass(frozen=True)
class CausalLanguageModel(Kit):
    """Texts packed into rows of full length, or one per row.

    Attributes:
        packing: Whether several texts share a row. They do not see each other: their positions start anew, and no
            text predicts the first token of the next.
    """

    metric: ClassVar[str] = "perplexity"
    predicts: ClassVar[str] = "the next token, at every place"
    pipeline: ClassVar[str | None] = "text-generation"

    packing: bool = True

    def prepare(self, run: Run) -> Prepared:
        """Tokenize and pack the texts, and load a model that goes on with them."""
        from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, DefaultDataCollator

        splits = load_splits(run, [run.text_column])
        tokenizer = load_tokenizer(run, splits[run.train_split][run.text_column])

        def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            texts = tokenizer(rows[run.text_column], add_special_tokens=False)["input_ids"]
            texts = [[*ids, tokenizer.eos_token_id] for ids in texts]
            if self.packing:
                return pack(texts, run.max_length)
            return {"input_ids": (cut := [ids[: run.max_length] for ids in texts]), "labels": cut}

        columns = splits[run.train_split].column_names
        tokens = splits.map(encode, batched=True, batch_size=None, remove_columns=columns)
        return Prepared(
            model=build_model(run, AutoModelForCausalLM),
            train=tokens[run.train_split],
            test=tokens[run.test_split],
            collator=DefaultDataCollator() if self.packing else DataCollatorForSeq2Seq(tokenizer),
            processor=tokenizer,
        )


def pack(texts: Sequence[Sequence[int]], length: int) -> dict[str, list[list[int]]]:
    """Lay texts end to end and cut them into rows of one length; what is left in the end is dropped.

    Args:
        texts: Tokens of each text.
        length: Tokens of a row.

    Returns:
        Tokens, labels and positions of each row. Without an attention mask, transformers takes positions that start
        anew for the beginning of another text.

    Raises:
        ValueError: If there is not enough text for one row.
    """
    ids, labels, positions = [], [], []
    for text in texts:
        ids += text
        labels += [IGNORED, *text[1:]]
        positions += range(len(text))
    if len(ids) < length:
        raise ValueError(f"{len(texts)} texts have {len(ids)} tokens, too few for a row of max_length={length}.")
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for start in range(0, len(ids) - length + 1, length):
        stop, first = start + length, positions[start]
        carried = next((step for step in range(length) if positions[start + step] == 0), length)
        rows["input_ids"].append(ids[start:stop])
        rows["labels"].append(labels[start:stop])
        rows["position_ids"].append(
            [place - first if step < carried else place for step, place in enumerate(positions[start:stop])]
        )
    return rows
