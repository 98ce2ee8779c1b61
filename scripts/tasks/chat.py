"""Supervised fine-tuning on conversations: a causal language model learns what the assistant says, and only that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hf_blocklocal.errors import TargetError
from hf_blocklocal.targets.batch import IGNORED
from tasks.base import Kit, Prepared, build_model, load_splits, load_tokenizer


if TYPE_CHECKING:
    from recipes import Run

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Chat(Kit):
    """Rows of `messages` with `role` and `content`, written by the chat template of the tokenizer."""

    metric: ClassVar[str] = "perplexity"
    predicts: ClassVar[str] = "the next token, where the assistant speaks"
    pipeline: ClassVar[str | None] = "text-generation"

    def prepare(self, run: Run) -> Prepared:
        """Write, tokenize and mask the conversations, and load a causal language model."""
        from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

        splits = load_splits(run, ["messages"])
        train = splits[run.train_split]
        for split in splits.values():
            for messages in split["messages"]:
                _check(messages)
        tokenizer = load_tokenizer(run, [message["content"] for messages in train["messages"] for message in messages])
        if tokenizer.chat_template is None:
            raise TargetError(
                f"The tokenizer of {run.model} has no chat template, so it does not tell how to write a conversation. "
                "Choose a model made for chats, or set tokenizer.chat_template and save it beside the model."
            )
        tokens = splits.map(
            lambda row: conversation(tokenizer, row["messages"], run.max_length), remove_columns=train.column_names
        ).filter(lambda row: any(label != IGNORED for label in row["labels"]))
        return Prepared(
            model=build_model(run, AutoModelForCausalLM),
            train=tokens[run.train_split],
            test=tokens[run.test_split],
            collator=DataCollatorForSeq2Seq(tokenizer),
            processor=tokenizer,
        )


def conversation(tokenizer: Any, messages: list[dict[str, str]], max_length: int) -> dict[str, list[int]]:
    """Write a conversation as its template says; only what the assistant says has labels, its end mark included.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        messages: Who says what.
        max_length: Tokens; the rest is cut off.
    """

    def written(count: int, *, opens: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=opens)

    text = written(len(messages))
    replies = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = written(number, opens=True), written(number + 1)
            if not text.startswith(after) or not after.startswith(before):
                raise TargetError(
                    "The chat template writes a conversation differently once it goes on, so replies cannot be told "
                    "from prompts. Use another template, or conversations with one reply."
                )
            replies.append((len(before), len(after)))
    encoded = tokenizer(
        text, add_special_tokens=False, truncation=True, max_length=max_length, return_offsets_mapping=True
    )
    said = [
        any(start <= first and last <= stop for start, stop in replies) for first, last in encoded["offset_mapping"]
    ]
    ids = encoded["input_ids"]
    labels = [token if counts else IGNORED for token, counts in zip(ids, said, strict=True)]
    return {"input_ids": ids, "attention_mask": encoded["attention_mask"], "labels": labels}


def _check(messages: list[dict[str, str]]) -> None:
    """Refuse what is no conversation that ends with the assistant."""
    roles = [message.get("role") for message in messages]
    if not roles or set(roles) - set(ROLES) or roles[-1] != "assistant":
        raise TargetError(
            f"The task chat needs messages by {', '.join(ROLES)} that end with the assistant, not {roles}: there is "
            "nothing to learn in prompts alone."
        )
