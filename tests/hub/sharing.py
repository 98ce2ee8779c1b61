"""Runs to share, and clients that talk to the loopback Hub."""

from __future__ import annotations

import os

import huggingface_hub.constants as client
import transformers.utils.hub
from test_parity import arguments, examples
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.hub import Patience


BLOCKS = BlockLocalConfig(num_blocks=2, head_layers=0)
SAVES = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
QUICK = Patience(attempts=3, first_wait=0.01, silence=5.0, limit=20.0)


def talk_to(monkeypatch, url, cache, *, token="hf_write"):
    """Point the client, whose constants were read at import, to a Hub. Its functions stay as they are."""
    monkeypatch.setattr(client, "ENDPOINT", url)
    monkeypatch.setattr(client, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(
        transformers.utils.hub, "_hf_api", None, raising=False
    )  # would go on with the endpoint of its first use
    monkeypatch.setattr(client, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(client, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(client, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(client, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(client, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setenv("HF_TOKEN", token)


def of_subprocess(hub, folder):
    """Return the environment of a process whose client talks to a Hub."""
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": "hf_write",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def tokenizer():
    words = {f"word{number}": number for number in range(96)}
    words = {"[PAD]": 0, "[UNK]": 95, **{word: number for word, number in words.items() if 0 < number < 95}}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")


def make(folder, *, name="bert", blocks=BLOCKS, rows=None, **settings):
    specimen = SPECIMENS[name]
    trainer = BlockLocalTrainer(
        specimen.build(),
        arguments(folder, **({"max_steps": 2} | settings)),
        train_dataset=examples(specimen) if rows is None else rows,
        processing_class=tokenizer(),
        block_local=blocks,
    )
    trainer.push_patience = QUICK
    return trainer


def pushing(folder, strategy="every_save", **settings):
    """Make a trainer that pushes what it saves, at every step if nothing else is said."""
    settings = {"push_to_hub": True, "hub_model_id": "ann/run", "hub_strategy": strategy} | SAVES | settings
    return make(folder, **settings)
