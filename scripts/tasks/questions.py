"""Extractive question answering: where in a text the answer to a question starts, and where it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_blocklocal.errors import TargetError
from tasks.base import Kit, Prepared, build_model, load_splits, load_tokenizer


if TYPE_CHECKING:
    from recipes import Run

# Answers of more tokens are not looked for.
LONGEST = 64
# Ends and starts that are combined in search of the best answer.
TRIED = 20


@dataclass(frozen=True)
class QuestionAnswering(Kit):
    """Rows as those of SQuAD: `question`, `context`, and `answers` with `text` and `answer_start`, or none.

    A context that is too long is read in several overlapping parts. Where a part does not hold the answer, it is at
    the first token.

    Attributes:
        stride: Tokens that two parts of one context share.
    """

    metric: ClassVar[str] = "f1"
    predicts: ClassVar[str] = "where the answer starts and ends, among all positions"

    stride: int = 16

    def prepare(self, run: Run) -> Prepared:
        """Tokenize questions with their contexts and find the tokens of the answers."""
        from transformers import AutoModelForQuestionAnswering, DefaultDataCollator

        from hf_blocklocal.metrics import match_of_answers

        splits = load_splits(run, ["question", "context", "answers"])
        train, test = splits[run.train_split], splits[run.test_split]
        tokenizer = load_tokenizer(run, [*train["context"], *train["question"]])
        for name, split in splits.items():
            _check_answers(split, f"{run.dataset}, {name}")
        encode = self._encoder(tokenizer, run.max_length)
        parts = test.map(encode, batched=True, remove_columns=test.column_names)
        wanted = [answers["text"] or [""] for answers in test["answers"]]
        return Prepared(
            model=build_model(run, AutoModelForQuestionAnswering),
            train=train.map(encode, batched=True, remove_columns=train.column_names).remove_columns(
                ["row", "first", "last"]
            ),
            test=parts.remove_columns(["row", "first", "last"]),
            collator=DefaultDataCollator(),
            processor=tokenizer,
            compute_metrics=match_of_answers(
                lambda starts, ends: best_answers(starts, ends, parts, test["context"]), wanted
            ),
        )

    def _encoder(self, tokenizer: Any, max_length: int) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            encoded = tokenizer(
                rows["question"],
                rows["context"],
                truncation="only_second",
                max_length=max_length,
                stride=self.stride,
                padding="max_length",
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            offsets, of_row = encoded.pop("offset_mapping"), encoded.pop("overflow_to_sample_mapping")
            places = []
            for part, row in enumerate(of_row):
                in_context = [kind == 1 for kind in encoded.sequence_ids(part)]
                places.append(_place(offsets[part], in_context, rows["answers"][row]))
                offsets[part] = [
                    edges if inside else (-1, -1) for edges, inside in zip(offsets[part], in_context, strict=True)
                ]
            encoded["start_positions"], encoded["end_positions"] = map(list, zip(*places, strict=True))
            encoded["first"] = [[first for first, _ in edges] for edges in offsets]
            encoded["last"] = [[last for _, last in edges] for edges in offsets]
            # Rows are told apart by their question and context, because they are encoded in batches.
            encoded["row"] = [f"{rows['question'][row]}\n{rows['context'][row]}" for row in of_row]
            return encoded

        return encode


def _place(offsets: list[tuple[int, int]], in_context: list[bool], answers: dict[str, list[Any]]) -> tuple[int, int]:
    """Return the first and last token of the answer; the first token of all if it is not there."""
    if not answers["answer_start"]:
        return 0, 0
    start = answers["answer_start"][0]
    stop = start + len(answers["text"][0])
    inside = [
        token
        for token, (first, last) in enumerate(offsets)
        if in_context[token] and last > first and first < stop and last > start
    ]
    whole = inside and offsets[inside[0]][0] <= start and offsets[inside[-1]][1] >= stop
    return (inside[0], inside[-1]) if whole else (0, 0)


def best_answers(starts: Any, ends: Any, parts: Any, contexts: list[str]) -> list[str]:
    """Return the likeliest answer to each question over all parts of its context.

    Args:
        starts: Score of every token of every part as the start of the answer.
        ends: Likewise of the end.
        parts: The parts, with the characters that their tokens stand for.
        contexts: The texts that are asked about, in the order in which their parts come.
    """
    best: dict[str, tuple[float, str]] = {}
    numbers = {row: number for number, row in enumerate(dict.fromkeys(parts["row"]))}
    firsts, lasts = parts["first"], parts["last"]
    for part, row in enumerate(parts["row"]):
        for start in starts[part].argsort()[-TRIED:]:
            for end in ends[part].argsort()[-TRIED:]:
                score = float(starts[part][start] + ends[part][end])
                first, last = firsts[part][start], lasts[part][end]
                if 0 <= end - start < LONGEST and first >= 0 and last >= 0 and score > best.get(row, (-1e9, ""))[0]:
                    best[row] = (score, contexts[numbers[row]][first:last])
    return [best.get(row, (0, ""))[1] for row in numbers]


def _check_answers(split: Any, where: str) -> None:
    """Refuse answers that do not stand where they are said to."""
    for row in split:
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            if row["context"][start : start + len(text)] != text:
                raise TargetError(
                    f"A row of {where} has the answer {text!r} at {start}, and its context has "
                    f"{row['context'][start : start + len(text)]!r} there. The task question-answering needs answers "
                    "that are taken from the context."
                )
