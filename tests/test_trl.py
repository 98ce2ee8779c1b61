"""The mixin makes a block-local trainer of TRL's SFTTrainer, which computes its loss itself."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo import SPECIMENS, VOCABULARY

from hf_blocklocal import BlockLocalConfig, BlockLocalMixin
from hf_blocklocal.errors import UnsupportedSettingError


datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")


class BlockLocalSFTTrainer(BlockLocalMixin, trl.SFTTrainer):
    """Supervised fine-tuning, block by block."""


def tokenizer():
    names = ["<pad>", "<start>", "<end>", *(f"word{number}" for number in range(3, VOCABULARY))]
    plain = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>")


def conversations(count=16):
    """Prompts of three words, answered by the next three; only the answers are learned."""
    starts = [3 + 5 * number for number in range(count)]
    return datasets.Dataset.from_list(
        [
            {
                "prompt": " ".join(f"word{start + i}" for i in range(3)),
                "completion": " " + " ".join(f"word{start + i}" for i in range(3, 6)),
            }
            for start in starts
        ]
    )


def sft(folder, kind, **settings):
    own = {name: settings.pop(name) for name in ("block_local", "peft_config") if name in settings}
    arguments = {"max_steps": 6, "logging_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    args = trl.SFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **{**arguments, **settings}
    )
    rows = conversations()
    model = SPECIMENS["llama"].build()
    return kind(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer(), **own)


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def test_one_block_is_the_sft_trainer_to_the_bit(tmp_path):
    plain = sft(tmp_path / "plain", trl.SFTTrainer, gradient_accumulation_steps=2)
    local = sft(
        tmp_path / "local",
        BlockLocalSFTTrainer,
        gradient_accumulation_steps=2,
        block_local=BlockLocalConfig(num_blocks=1),
    )
    plain.train()
    local.train()
    theirs, ours = weights(plain), weights(local)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_several_blocks_learn_to_answer_each_from_its_own_loss(tmp_path):
    trainer = sft(tmp_path, BlockLocalSFTTrainer, max_steps=20, block_local=BlockLocalConfig(num_blocks=2))
    before = weights(trainer)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert {"block_0/loss", "block_1/loss", "mean_token_accuracy", "entropy"} <= logged[0].keys()
    assert logged[0]["loss"] == logged[0]["block_1/loss"]
    for name in ("block_0/loss", "block_1/loss"):
        assert logged[-1][name] < 0.8 * logged[0][name]
    after = weights(trainer)
    for layer in range(4):
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert any(f"layers.{layer}." in name for name in moved)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_mean_token_accuracy", "eval_block_0_accuracy"} <= metrics.keys()


def test_only_what_counts_as_an_answer_teaches_the_heads(tmp_path):
    trainer = sft(tmp_path, BlockLocalSFTTrainer, block_local=BlockLocalConfig(num_blocks=2))
    batch = next(iter(trainer.get_train_dataloader()))
    targets = trainer.assembly.read_targets(batch)
    assert len(targets) == (batch["labels"][:, 1:] != -100).sum()
    assert len(targets) == 4 * 4  # three words and the end


def test_chunks_are_refused_where_the_trainer_has_its_own(tmp_path):
    trainer = sft(tmp_path, BlockLocalSFTTrainer, block_local=BlockLocalConfig(num_blocks=2, chunked_loss=4))
    with pytest.raises(UnsupportedSettingError, match="its loss is not computed by its loss_function"):
        trainer.train()


def test_accumulated_batches_weigh_their_tokens_as_in_the_sft_trainer(tmp_path):
    """The last block's task head alone, because nothing but its own loss reaches it."""

    def trained(name, kind, **own):
        trainer = sft(tmp_path / name, kind, max_steps=1, gradient_accumulation_steps=2, optim="sgd", **own)
        trainer.train()
        return weights(trainer)["lm_head.weight"]

    plain = trained("plain", trl.SFTTrainer, max_grad_norm=0)
    local = trained("local", BlockLocalSFTTrainer, max_grad_norm=0, block_local=BlockLocalConfig(num_blocks=2))
    assert torch.equal(plain, local)


def test_adapters_given_to_the_sft_trainer_learn_by_block_and_resume_to_the_bit(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    own = {"block_local": BlockLocalConfig(num_blocks=2), "peft_config": lora}
    whole = sft(tmp_path, BlockLocalSFTTrainer, save_strategy="steps", save_steps=3, **own)
    whole.train()
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "checkpoint-3" / "README.md").is_file() or (tmp_path / "README.md").is_file()
    resumed = sft(tmp_path, BlockLocalSFTTrainer, save_strategy="steps", save_steps=3, **own)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    theirs = weights(resumed)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(whole).items())
