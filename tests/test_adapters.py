"""Adapters of PEFT learn block by block, whatever their kind; those that belong to no block are refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from examining import Patient, difference, leaks, taught
from test_parity import arguments, equal, examples
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer, assemble, load_heads
from hf_blocklocal.errors import UnsupportedSettingError


peft = pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent / "hub"))

from loopback_hub import LoopbackHub  # noqa: E402
from sharing import talk_to  # noqa: E402


IN_TWO = BlockLocalConfig(num_blocks=2)
TEXTS = {"task_type": "SEQ_CLS"}
TOKENS = {"task_type": "CAUSAL_LM"}
ATTENTION = {"target_modules": ["query", "value"]}
BERT = TEXTS | ATTENTION | {"r": 4}
# By name: the specimen, its adapters, and the modules outside the layers that are trained, each with its block.
KINDS = {
    "LoRA": ("bert", peft.LoraConfig(**BERT), {"classifier": 1}),
    "LoRA on a decoder": ("llama", peft.LoraConfig(**TOKENS, r=4, target_modules="all-linear"), {}),
    "LoRA with a router loss": ("mixtral", peft.LoraConfig(**TOKENS, r=4, target_modules=["q_proj"]), {}),
    "LoRA on two stacks": ("t5", peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"]), {}),
    "LoRA on images": (
        "vit",
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
        {"classifier": 1},
    ),
    "whole modules": (
        "bert",
        peft.LoraConfig(**BERT, modules_to_save=["pooler", "classifier", "layer.1.output.dense"]),
        {"pooler": 1, "classifier": 1},
    ),
    "DoRA": ("bert", peft.LoraConfig(**BERT, use_dora=True), {"classifier": 1}),
    "IA3": (
        "bert",
        peft.IA3Config(**TEXTS, target_modules=["value", "output.dense"], feedforward_modules=["output.dense"]),
        {"classifier": 1},
    ),
    "LoHa": ("bert", peft.LoHaConfig(**BERT), {"classifier": 1}),
    "OFT": ("bert", peft.OFTConfig(**TEXTS, **ATTENTION, oft_block_size=4), {"classifier": 1}),
    "VeRA": ("bert", peft.VeraConfig(**BERT), {"classifier": 1}),
    "norms": ("bert", peft.LNTuningConfig(**TEXTS, target_modules=["output.LayerNorm"]), {"classifier": 1}),
    "Llama-Adapter": ("llama", peft.AdaptionPromptConfig(**TOKENS, adapter_len=2, adapter_layers=4), {}),
    "on the embedding": (
        "bert",
        peft.LoraConfig(**TEXTS, r=4, target_modules=["word_embeddings", "query"]),
        {"word_embeddings": 0, "classifier": 1},
    ),
    "on a tied embedding": (
        "gpt2",
        peft.LoraConfig(**TOKENS, r=4, target_modules=["wte", "c_attn"], fan_in_fan_out=True),
        {"wte": 0},
    ),
    "the whole embedding": (
        "llama",
        peft.LoraConfig(**TOKENS, r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        {"embed_tokens": 0, "lm_head": 1},
    ),
    "on the language-model head": (
        "llama",
        peft.LoraConfig(**TOKENS, r=4, target_modules=["q_proj", "lm_head"]),
        {"lm_head": 1},
    ),
}


def adapted(specimen, config):
    """Put adapters into a model, with values that say something from the start."""
    torch.manual_seed(0)
    model = peft.get_peft_model(SPECIMENS[specimen].build(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def trainer_of(folder, specimen="bert", config=None, **settings):
    return BlockLocalTrainer(
        adapted(specimen, config or peft.LoraConfig(**BERT)),
        arguments(folder, **({"max_steps": 4, "learning_rate": 1e-2} | settings)),
        train_dataset=examples(SPECIMENS[specimen]),
        block_local=IN_TWO,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_every_kind_learn_from_the_loss_of_their_block_alone(kind):
    specimen, config, outside = KINDS[kind]
    model, batch = adapted(specimen, config), SPECIMENS[specimen].batch(0)
    patient = Patient(model, batch, assemble(model, IN_TWO, batch))
    assembly = patient.assembly
    assert leaks(patient) == set()
    assert difference(patient) == 0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    taught(patient)
    torch.optim.AdamW([p for p in assembly.module.parameters() if p.requires_grad], lr=1e-2).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert all(any(name.startswith(f"{path}.") for name in moved) for path in assembly.cut.layers)
    owners = {name: assembly.owners[name] for name in moved if assembly.cut.layer_of_path(name) is None}
    for module, block in outside.items():
        assert {owner for name, owner in owners.items() if f".{module}." in name} == {block}
    assert all(any(f".{module}." in name for module in outside) for name in owners)


IN_FRONT = {"num_virtual_tokens": 3}
REFUSED = {
    "PROMPT_TUNING": ("gpt2", peft.PromptTuningConfig(**TOKENS, **IN_FRONT), "in front"),
    "PREFIX_TUNING": ("llama", peft.PrefixTuningConfig(**TOKENS, **IN_FRONT), "in front"),
    "P_TUNING": ("bert", peft.PromptEncoderConfig(**TEXTS, **IN_FRONT, encoder_hidden_size=8), "in front"),
    "MULTITASK_PROMPT_TUNING": (
        "gpt2",
        peft.MultitaskPromptTuningConfig(**TOKENS, **IN_FRONT, num_tasks=2),
        "in front",
    ),
    "ADALORA": ("bert", peft.AdaLoraConfig(**TEXTS, **ATTENTION, total_step=10), "regulariser"),
    "VBLORA": (
        "bert",
        peft.VBLoRAConfig(**BERT, num_vectors=16, vector_length=4, topk=2),
        "share one bank of vectors",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_belong_to_no_block_are_refused_by_name_when_the_trainer_is_made(kind, tmp_path):
    specimen, config, reason = REFUSED[kind]
    model = peft.get_peft_model(SPECIMENS[specimen].build(), config)
    with pytest.raises(UnsupportedSettingError, match=rf"adapter 'default' is {kind}\b.*{reason}"):
        BlockLocalTrainer(model, arguments(tmp_path), block_local=IN_TWO)
    BlockLocalTrainer(model, arguments(tmp_path), block_local=BlockLocalConfig(num_blocks=1))


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3", "whole modules", "on the embedding"])
def test_a_run_saves_adapters_and_heads_and_resumes_from_them_to_the_bit(kind, tmp_path):
    specimen, config, _ = KINDS[kind]
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(tmp_path, specimen, config, **saving)
    whole.train()
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "block_local_heads.safetensors", "block_local_config.json"} <= files
    assert "model.safetensors" not in files
    resumed = trainer_of(tmp_path, specimen, config, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(whole.assembly.module.state_dict(), resumed.assembly.module.state_dict())


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3"])
def test_merged_adapters_are_an_ordinary_model_again(kind, tmp_path):
    trainer = trainer_of(tmp_path / "run", *KINDS[kind][:2])
    trainer.train()
    batch = SPECIMENS["bert"].batch(0)
    model = trainer.model.eval()
    expected = model(**batch).logits
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = type(SPECIMENS["bert"].build()).from_pretrained(tmp_path / "merged").eval()
    assert not any("lora" in name or "ia3" in name for name in loaded.state_dict())
    torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_pushed_adapters_come_back_with_their_heads(tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        talk_to(monkeypatch, hub.url, tmp_path / "cache")
        trainer = trainer_of(tmp_path / "run", hub_model_id="ann/adapters")
        trainer.train()
        trainer.push_to_hub()
        files = hub.files("ann/adapters")
        assert {"adapter_model.safetensors", "adapter_config.json", "block_local_heads.safetensors"} <= files.keys()
        assert "model.safetensors" not in files
        (tmp_path / "down").mkdir()
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (tmp_path / "down" / name).write_bytes(files[name])
        model = peft.PeftModel.from_pretrained(SPECIMENS["bert"].build(), tmp_path / "down").eval()
        assembly = load_heads("ann/adapters", model)
    batch = SPECIMENS["bert"].batch(0)
    assert torch.equal(model(**batch).logits, trainer.model.eval()(**batch).logits)
    assert equal(assembly.heads.state_dict(), trainer.assembly.heads.state_dict())


def quantised(folder, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    plain = SPECIMENS["llama"].build()
    plain.save_pretrained(folder)
    base = type(plain).from_pretrained(folder, quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
    model = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return peft.get_peft_model(model, peft.LoraConfig(**TOKENS, r=4, target_modules=["q_proj", "v_proj"]))


def test_adapters_on_quantised_weights_learn_block_by_block(tmp_path):
    model, specimen = quantised(tmp_path / "base", bits=8), SPECIMENS["llama"]
    batch = specimen.batch(0)
    assert leaks(Patient(model, batch, assemble(model, IN_TWO, batch))) == set()
    settings = arguments(tmp_path / "run", max_steps=3)
    trainer = BlockLocalTrainer(model, settings, train_dataset=examples(specimen), block_local=IN_TWO)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora" in name}


def test_four_bits_on_a_cpu_are_refused_because_no_gradient_would_pass(tmp_path):
    model = quantised(tmp_path / "base", bits=4)
    with pytest.raises(UnsupportedSettingError, match=r"4 bits \(bitsandbytes\) and on a CPU.*load_in_8bit"):
        BlockLocalTrainer(model, arguments(tmp_path), block_local=IN_TWO)


def test_quantised_weights_are_refused_where_every_block_has_a_process(tmp_path):
    model = SPECIMENS["llama"].build()
    model.quantization_method = "bitsandbytes"
    config = BlockLocalConfig(num_blocks=2, block_parallel_size=2, tied_weights="untie")
    with pytest.raises(UnsupportedSettingError, match=r"quantised \(bitsandbytes\), and block_parallel_size=2"):
        assemble(model, config, SPECIMENS["llama"].batch(0))
