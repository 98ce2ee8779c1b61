"""Tiny models with random weights, one per architecture and task, each with a batch it can be trained on.

A specimen knows nothing of blocks, heads or trainers. It is the same model in every process and leaves the global
random state alone. Nothing in it is random in training: every dropout, layer drop and augmentation is off, so two
runs of one specimen on one batch can be compared number by number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    PreTrainedModel,
)


Batch: TypeAlias = dict[str, Tensor]
Task: TypeAlias = Literal["classes", "multilabel", "number", "tokens", "vocabulary", "image", "audio"]

MAX_PARAMETERS = 60_000
# One over the root of the width. The usual 0.02 leaves layers this narrow with attention gradients near 1e-6, which a
# comparison would take for zero.
INITIAL_SPREAD = 0.25

IGNORED = -100
CLASSES = 3
TOKEN_CLASSES = 5
VOCABULARY = 96
PAD, START, END, MASK, FIRST_WORD = range(5)
# RoBERTa and its kin pad with 1 in the wild and count positions from there, so one specimen does too.
ROBERTA_PAD = 1

# One entry per sample. The first fills the batch, so that its width is the same for every seed.
TEXT_LENGTHS = (12, 9, 7, 4)
TARGET_LENGTHS = (8, 6, 5, 3)
AUDIO_LENGTHS = (320, 260, 200, 140)
MEL_BINS, MEL_FRAMES = 8, 32
IMAGE_SIDE = 16


@dataclass(frozen=True)
class Specimen:
    """One tiny model with the batches that fit it.

    Attributes:
        name: Key in `SPECIMENS`, and the id of its row in the test matrix.
        build: Makes the model, with the same weights each time and in the mode its constructor leaves it in.
        batch: Makes the inputs from a seed, labels included, padded on the right.
        layers: Transformer layers a forward pass goes through, encoder and decoder added up.
        task: What the labels stand for, or the kind of input where that is not text and the label is a class.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    batch: Callable[[int], Batch]
    layers: int
    task: Task


@dataclass(frozen=True)
class Goal:
    """What a model is to predict: the class with the right head, what that head needs, and batches with labels."""

    auto_class: type
    batch: Callable[[int], Batch]
    task: Task
    options: Mapping[str, Any] = field(default_factory=dict)


def build_tiny(model_type: str, auto_class: type, options: Mapping[str, Any]) -> PreTrainedModel:
    """Build a model from its configuration, with all that is random in training switched off.

    Args:
        model_type: Name of the architecture, as `AutoConfig` spells it.
        auto_class: The `AutoModelFor...` class that picks the head.
        options: Fields of the configuration. They win over the dropouts and the spread set here.

    Returns:
        The model, with weights that depend on the arguments only.
    """
    known = AutoConfig.for_model(model_type).to_dict()
    dropouts = {name: 0.0 for name, value in known.items() if "drop" in name and isinstance(value, float)}
    spreads = {name: INITIAL_SPREAD for name in ("initializer_range", "init_std") if name in known}
    config = AutoConfig.for_model(model_type, **{**dropouts, **spreads, **options})
    with torch.random.fork_rng(devices=[]):
        # The CPU generator only: `torch.manual_seed` would reseed the accelerators, which are not forked here.
        torch.default_generator.manual_seed(0)
        model = auto_class.from_config(config)
    # A misspelt size would silently leave the full-size default in place.
    assert model.num_parameters() < MAX_PARAMETERS, f"{model_type} has {model.num_parameters()} parameters."
    return model


def build_wav2vec2(layerdrop: float) -> PreTrainedModel:
    """Build a speech classifier that skips each layer with the given probability in training."""
    return build_tiny("wav2vec2", AutoModelForAudioClassification, WAV2VEC2 | {"layerdrop": layerdrop})


def specimen(name: str, model_type: str, goal: Goal, sizes: Mapping[str, Any]) -> Specimen:
    """Describe a model of four layers."""
    build = partial(build_tiny, model_type, goal.auto_class, {**sizes, **goal.options})
    return Specimen(name, build, goal.batch, layers=4, task=goal.task)


def seeded(seed: int) -> torch.Generator:
    """Return a source of random numbers of its own."""
    return torch.Generator().manual_seed(seed)


def prefix_mask(lengths: tuple[int, ...]) -> Tensor:
    """Mark with 1 the first `lengths[i]` places of row `i`, and with 0 the padding behind them."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def random_words(lengths: tuple[int, ...], *, padding: int, generator: torch.Generator) -> Tensor:
    """Draw rows of ordinary token ids, none of them a special token, with `padding` behind each row."""
    mask = prefix_mask(lengths)
    words = torch.randint(FIRST_WORD, VOCABULARY, mask.shape, generator=generator)
    return words.where(mask.bool(), padding)


def random_text(generator: torch.Generator, *, pad: int = PAD) -> Batch:
    """Draw token ids with their attention mask, without labels."""
    input_ids = random_words(TEXT_LENGTHS, padding=pad, generator=generator)
    return {"input_ids": input_ids, "attention_mask": prefix_mask(TEXT_LENGTHS)}


def random_classes(generator: torch.Generator) -> Tensor:
    """Draw one class per sample."""
    return torch.randint(CLASSES, (len(TEXT_LENGTHS),), generator=generator)


def classes_batch(seed: int, *, pad: int = PAD) -> Batch:
    """Texts, each of one class."""
    generator = seeded(seed)
    return {**random_text(generator, pad=pad), "labels": random_classes(generator)}


def multilabel_batch(seed: int) -> Batch:
    """Texts, each with any number of the classes, as floats."""
    generator = seeded(seed)
    text = random_text(generator)
    return {**text, "labels": torch.randint(2, (len(TEXT_LENGTHS), CLASSES), generator=generator).float()}


def number_batch(seed: int) -> Batch:
    """Texts, each with a real number to predict."""
    generator = seeded(seed)
    return {**random_text(generator), "labels": torch.randn(len(TEXT_LENGTHS), generator=generator)}


def tokens_batch(seed: int) -> Batch:
    """Texts with a class for each token, and none for the padding."""
    generator = seeded(seed)
    text = random_text(generator)
    labels = torch.randint(TOKEN_CLASSES, text["input_ids"].shape, generator=generator)
    return {**text, "labels": labels.where(text["attention_mask"].bool(), IGNORED)}


def masked_batch(seed: int) -> Batch:
    """Texts in which about a quarter of the tokens are hidden; these have a label and no other token does."""
    generator = seeded(seed)
    text = random_text(generator)
    # Padding draws a negative number, so the highest ones are real tokens. They make at least one per text.
    draws = torch.rand(text["input_ids"].shape, generator=generator) - 2 * (1 - text["attention_mask"])
    ranks = draws.argsort(dim=1, descending=True).argsort(dim=1)
    hidden = ranks < torch.tensor([max(1, round(length / 4)) for length in TEXT_LENGTHS])[:, None]
    labels = text["input_ids"].where(hidden, IGNORED)
    return {**text, "input_ids": text["input_ids"].masked_fill(hidden, MASK), "labels": labels}


def causal_batch(seed: int) -> Batch:
    """Texts that are their own labels; the model shifts them."""
    text = random_text(seeded(seed))
    return {**text, "labels": text["input_ids"].where(text["attention_mask"].bool(), IGNORED)}


def translation_batch(seed: int) -> Batch:
    """Texts with a shorter text each as label; the model makes the decoder inputs from it."""
    generator = seeded(seed)
    text = random_text(generator)
    return {**text, "labels": random_words(TARGET_LENGTHS, padding=IGNORED, generator=generator)}


def transcription_batch(seed: int) -> Batch:
    """Spectrograms of the one length Whisper takes, with a text each as label."""
    generator = seeded(seed)
    return {
        "input_features": torch.randn(len(TARGET_LENGTHS), MEL_BINS, MEL_FRAMES, generator=generator),
        "labels": random_words(TARGET_LENGTHS, padding=IGNORED, generator=generator),
    }


def image_batch(seed: int) -> Batch:
    """Images, each of one class."""
    generator = seeded(seed)
    return {
        "pixel_values": torch.randn(len(TEXT_LENGTHS), 3, IMAGE_SIDE, IMAGE_SIDE, generator=generator),
        "labels": random_classes(generator),
    }


def audio_batch(seed: int) -> Batch:
    """Waveforms, silent behind their end, each of one class."""
    generator = seeded(seed)
    mask = prefix_mask(AUDIO_LENGTHS)
    return {
        "input_values": torch.randn(mask.shape, generator=generator) * mask,
        "attention_mask": mask,
        "labels": random_classes(generator),
    }


CLASSIFY = Goal(AutoModelForSequenceClassification, classes_batch, "classes", {"num_labels": CLASSES})
CLASSIFY_ROBERTA = replace(CLASSIFY, batch=partial(classes_batch, pad=ROBERTA_PAD))
CLASSIFY_IMAGE = Goal(AutoModelForImageClassification, image_batch, "image", {"num_labels": CLASSES})
TAG = Goal(AutoModelForTokenClassification, tokens_batch, "tokens", {"num_labels": TOKEN_CLASSES})
SEVERAL = {"num_labels": CLASSES, "problem_type": "multi_label_classification"}
ATTRIBUTE = Goal(AutoModelForSequenceClassification, multilabel_batch, "multilabel", SEVERAL)
NUMBER = {"num_labels": 1, "problem_type": "regression"}
RATE = Goal(AutoModelForSequenceClassification, number_batch, "number", NUMBER)
FILL_IN = Goal(AutoModelForMaskedLM, masked_batch, "vocabulary")
CONTINUE = Goal(AutoModelForCausalLM, causal_batch, "vocabulary")
TRANSLATE = Goal(AutoModelForSeq2SeqLM, translation_batch, "vocabulary")
TRANSCRIBE = Goal(AutoModelForSpeechSeq2Seq, transcription_batch, "vocabulary")

WORDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
PLACES = {"max_position_embeddings": 32}
TRUNK = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
BERT = WORDS | PLACES | TRUNK
ALBERT = BERT | {"embedding_size": 16}
DISTILBERT = WORDS | PLACES | {"dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 32}
# Positions start behind the padding id, so there must be that many more.
ROBERTA = BERT | {"pad_token_id": ROBERTA_PAD, "bos_token_id": PAD, "max_position_embeddings": 33 + ROBERTA_PAD}
# Fewer buckets than a text has tokens, so that far positions do share one.
DEBERTA = (
    BERT
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
    | {"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False}
)
GPT2 = WORDS | {"n_positions": 32, "n_embd": 16, "n_layer": 4, "n_head": 2}
LLAMA = BERT | {"num_key_value_heads": 1, "head_dim": 8}
# A window narrower than a text, so that the two kinds of layer see different things.
GEMMA = (
    LLAMA
    | {"query_pre_attn_scalar": 8, "sliding_window": 4}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2}
)
OPT = (
    WORDS
    | PLACES
    | {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    | {"word_embed_proj_dim": 16, "ffn_dim": 32}
)
MIXTRAL = (
    LLAMA
    | {"num_local_experts": 4, "num_experts_per_tok": 2}
    | {"output_router_logits": True, "router_aux_loss_coef": 0.02}
)
VIT = TRUNK | {"image_size": IMAGE_SIDE, "patch_size": 4}
T5 = (
    WORDS
    | {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
    | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": PAD}
)
TWO_STACKS = (
    WORDS
    | {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    | {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
)
BART = TWO_STACKS | PLACES | {"decoder_start_token_id": END}
# The encoder halves the number of frames. The tokens suppressed by default lie beyond this vocabulary.
WHISPER = (
    TWO_STACKS
    | {"num_mel_bins": MEL_BINS, "max_source_positions": MEL_FRAMES // 2, "max_target_positions": 32}
    | {"decoder_start_token_id": START, "begin_suppress_tokens": None}
)
WAV2VEC2 = (
    WORDS
    | TRUNK
    | {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}
    | {"apply_spec_augment": False, "mask_time_prob": 0.0, "num_labels": CLASSES}
)

_ROWS = (
    specimen("bert", "bert", CLASSIFY, BERT),
    specimen("bert_tokens", "bert", TAG, BERT),
    specimen("bert_mlm", "bert", FILL_IN, BERT),
    specimen("bert_multilabel", "bert", ATTRIBUTE, BERT),
    specimen("bert_regression", "bert", RATE, BERT),
    specimen("distilbert", "distilbert", CLASSIFY, DISTILBERT),
    specimen("roberta", "roberta", CLASSIFY_ROBERTA, ROBERTA),
    specimen("deberta_v2", "deberta-v2", CLASSIFY, DEBERTA),
    specimen("gpt2", "gpt2", CONTINUE, GPT2),
    specimen("llama", "llama", CONTINUE, LLAMA),
    specimen("qwen3", "qwen3", CONTINUE, LLAMA),
    specimen("gemma3", "gemma3_text", CONTINUE, GEMMA),
    specimen("opt", "opt", CONTINUE, OPT),
    specimen("mixtral", "mixtral", CONTINUE, MIXTRAL),
    specimen("vit", "vit", CLASSIFY_IMAGE, VIT),
    specimen("t5", "t5", TRANSLATE, T5),
    specimen("bart", "bart", TRANSLATE, BART),
    specimen("whisper", "whisper", TRANSCRIBE, WHISPER),
    # One layer, used four times over.
    specimen("albert", "albert", CLASSIFY, ALBERT),
    Specimen("wav2vec2", partial(build_wav2vec2, layerdrop=0.0), audio_batch, layers=4, task="audio"),
)
SPECIMENS: dict[str, Specimen] = {row.name: row for row in _ROWS}
