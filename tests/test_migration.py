"""What people do around a `Trainer`, done around a `BlockLocalTrainer`: nothing of it needs another line."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from test_parity import arguments, examples
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainerCallback
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.callbacks import GradientAlignmentCallback, LinearProbeCallback
from hf_blocklocal.targets.probe import first_of_loader


BERT, GPT2 = SPECIMENS["bert"], SPECIMENS["gpt2"]


def make(folder, *, model=None, specimen=BERT, kind=BlockLocalTrainer, config=None, data=True, own=None, **options):
    data = {"train_dataset": examples(specimen), "eval_dataset": examples(specimen)} if data is True else data
    return kind(
        model=specimen.build() if model is None else model,
        args=arguments(folder, **{"max_steps": 4, **options}),
        block_local=BlockLocalConfig(num_blocks=2) if config is None else config,
        **data,
        **(own or {}),
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def still(model, before):
    return [name for name, parameter in model.named_parameters() if parameter.equal(before[name])]


# ---- Weights that are frozen for a while ----


class Unfreeze(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.requires_grad_(True)


def test_what_is_unfrozen_in_the_course_of_a_run_learns(tmp_path):
    model = BERT.build()
    model.bert.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = make(tmp_path, model=model, own={"callbacks": [Unfreeze()], "optimizers": (optimizer, None)})
    before = weights(model)
    trainer.train()
    assert still(model, before) == []


def test_what_is_unfrozen_after_an_evaluation_or_a_first_run_learns(tmp_path):
    model = BERT.build()
    model.bert.requires_grad_(False)
    trainer = make(tmp_path, model=model)
    trainer.evaluate()
    before = weights(model)
    trainer.train()
    assert {name.split(".")[0] for name in before.keys() - set(still(model, before))} == {"classifier"}
    model.requires_grad_(True)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert still(model, before) == []


def test_a_frozen_weight_that_blocks_share_is_no_reason_to_untie_or_freeze(tmp_path, caplog):
    model = GPT2.build()
    model.get_input_embeddings().weight.requires_grad_(False)
    trainer = make(tmp_path, model=model, specimen=GPT2, config=BlockLocalConfig(num_blocks=2, tied_weights="freeze"))
    assert trainer.assembly.shared == ("transformer.wte.weight",)
    assert "used by several blocks, and frozen" not in caplog.text


# ---- A model that is changed after it was cut ----


@pytest.mark.parametrize("copies", ["auto", "trained"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_embedding_that_has_grown_since_is_cut_with_the_model(name, copies, tmp_path):
    config = BlockLocalConfig(num_blocks=2, head_copies=copies)
    trainer = make(
        tmp_path, specimen=SPECIMENS[name], config=config, max_grad_norm=1e-6, learning_rate=1.0, optim="sgd"
    )
    first = trainer.assembly
    vocabulary = trainer.model.config.vocab_size + 3
    trainer.model.resize_token_embeddings(vocabulary)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.assembly is not first
    assert trainer.assembly.task.size == vocabulary
    moved = [(p - before[name]).norm() for name, p in trainer.model.named_parameters()]
    assert 0 < max(moved) < 1e-4, "clipped, as all else"


def test_adapters_that_are_added_since_are_cut_with_the_model(tmp_path):
    trainer = make(tmp_path)
    first = trainer.assembly
    trainer.model.add_adapter(LoraConfig(target_modules=["query"]))
    trainer.train()
    second = trainer.assembly
    assert second is not first
    trainer.model.delete_adapter("default")
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.model.requires_grad_(True)
    trainer.train()
    assert trainer.assembly is not second
    assert trainer.assembly.owners.keys() == dict(trainer.model.named_parameters()).keys()


def test_a_model_that_is_as_it_was_is_not_cut_again(tmp_path):
    trainer = make(tmp_path)
    first = trainer.assembly
    trainer.train()
    trainer.model.bert.requires_grad_(False)
    trainer.train()
    assert trainer.assembly is first


def test_copies_that_heads_train_are_made_anew_of_what_has_been_unfrozen(tmp_path):
    model = BERT.build()
    model.bert.requires_grad_(False)
    trainer = make(tmp_path, model=model, config=BlockLocalConfig(num_blocks=2, head_copies="trained"))
    trainer.train()
    few = len(trainer.assembly.originals)
    model.requires_grad_(True)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert len(trainer.assembly.originals) > few


def test_a_weight_that_is_untied_is_in_the_optimizer_of_the_one_that_it_was_tied_to(tmp_path):
    model = GPT2.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    config = BlockLocalConfig(num_blocks=2, tied_weights="untie", head_layers=0)
    trainer = make(tmp_path, model=model, specimen=GPT2, config=config, own={"optimizers": (optimizer, None)})
    trainer.train()
    assert not model.lm_head.weight.equal(model.transformer.wte.weight)
    assert any(parameter is model.lm_head.weight for group in optimizer.param_groups for parameter in group["params"])


# ---- Batches that are not what the data set holds ----


class Strict(nn.Module):
    """A model whose forward takes nothing but what it names."""

    def __init__(self):
        super().__init__()
        self.model = BERT.build()

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


class Weighted(BlockLocalTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        weights, labels = inputs.pop("weight"), inputs.pop("labels")
        outputs = model(**inputs)
        loss = (nn.functional.cross_entropy(outputs.logits, labels, reduction="none") * weights).mean()
        return (loss, outputs) if return_outputs else loss


def test_what_a_loss_of_ones_own_takes_out_of_a_batch_is_not_given_to_the_model(tmp_path):
    data = [{**example, "weight": torch.tensor(2.0)} for example in examples(BERT)]
    trainer = make(
        tmp_path,
        model=Strict(),
        kind=Weighted,
        data={"train_dataset": data},
        remove_unused_columns=False,
    )
    trainer.add_callback(GradientAlignmentCallback(trainer, every=2))
    trainer.add_callback(LinearProbeCallback(trainer, test_dataset=data, every=2, samples=4))
    trainer.train()
    assert any("block_0/loss" in row for row in trainer.state.log_history)
    assert any("alignment/block_0" in row for row in trainer.state.log_history)


class OwnLoader(BlockLocalTrainer):
    def get_train_dataloader(self):
        pairs = [(example["input_ids"], example["labels"]) for example in examples(BERT)]

        def collate(rows):
            return {"input_ids": torch.stack([row for row, _ in rows]), "labels": torch.stack([y for _, y in rows])}

        return torch.utils.data.DataLoader(pairs, batch_size=4, collate_fn=collate)


def test_a_loader_of_ones_own_is_all_the_data_that_is_needed(tmp_path):
    trainer = make(tmp_path, kind=OwnLoader, data={})
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_loader_of_ones_own_may_read_a_data_set_that_nobody_else_can(tmp_path):
    pairs = [(example["input_ids"], example["labels"]) for example in examples(BERT)]
    make(tmp_path, kind=OwnLoader, data={"train_dataset": pairs}).train()


def test_of_a_loader_s_batch_the_beginning_is_looked_at_if_it_has_one():
    ids = torch.arange(24).reshape(4, 6)
    without = {"input_ids": ids, "labels": torch.where(ids < 12, -100, ids)}
    batch = {"input_ids": ids + 1, "labels": ids}
    taken = first_of_loader([without, batch], 2)
    assert taken["input_ids"].equal(ids[:2] + 1), "the first two of the other have no label that counts"
    pictures = {**batch, "pixel_values": torch.zeros(64, 5)}
    assert first_of_loader([pictures], 2) is pictures, "which picture belongs to which text is not known"


def test_a_collator_that_takes_examples_apart_finds_them_whole(tmp_path):
    data = [dict(example) for example in examples(BERT)]
    keys = set(data[0])

    def collate(rows):
        labels = torch.stack([row.pop("labels") for row in rows])
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"labels": labels}

    trainer = make(
        tmp_path, data={"train_dataset": data, "data_collator": collate}, remove_unused_columns=False, max_steps=1
    )
    assert trainer.assembly.last == 1
    assert set(data[0]) == set(data[1]) == keys


# ---- Logs and evaluations ----


def test_logs_and_evaluations_ask_for_no_cut(tmp_path):
    trainer = make(tmp_path, data={})
    trainer.log({"seen": 1.0})
    assert "eval_loss" in trainer.evaluate(examples(BERT))
    with torch.inference_mode():
        trainer.evaluate(examples(BERT))
    assert trainer._assembly is None


class Logs(BlockLocalTrainer):
    def compute_loss(self, *args, **kwargs):
        self.log({"loss": 7.0})
        return super().compute_loss(*args, **kwargs)


def test_a_loss_that_somebody_logs_is_not_taken_for_that_of_the_run(tmp_path):
    plain, talking = make(tmp_path, logging_steps=2), make(tmp_path, kind=Logs, logging_steps=2)
    plain.train()
    talking.train()
    own = [row for row in talking.state.log_history if row.get("loss") == 7.0]
    assert len(own) == 4
    assert all("block_0/loss" not in row for row in own)
    names = ("loss", "block_0/loss", "block_1/loss")
    told = [[row[name] for name in names] for row in talking.state.log_history if "block_0/loss" in row]
    assert told == [[row[name] for name in names] for row in plain.state.log_history if "block_0/loss" in row]


def test_blocks_have_the_prefix_of_the_evaluation_wherever_it_stands(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "some", None, None, "valid")
    assert {name.split("_")[0] for name in output.metrics} == {"valid"}
    assert "valid_block_0_loss" in output.metrics


def test_an_evaluation_in_another_type_than_that_of_copies_leaves_the_heads_out(tmp_path, caplog):
    config = BlockLocalConfig(num_blocks=2, head_copies="trained")
    trainer = make(tmp_path, config=config, bf16_full_eval=True, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert "eval_block_0_loss" in next(row for row in trainer.state.log_history if "eval_loss" in row)
    assert "eval_block_0_loss" not in trainer.evaluate()
    assert "heads of blocks are not scored" in caplog.text
    live = make(tmp_path / "live", bf16_full_eval=True)
    live.train()
    assert "eval_block_0_loss" in live.evaluate()


# ---- The model beside its heads ----


class Looks(BlockLocalTrainer):
    def training_step(self, model, inputs, *args):
        assert model.config.num_labels == self.model.config.num_labels
        return super().training_step(model, inputs, *args)


@pytest.mark.parametrize(
    "state_dict",
    [
        lambda trainer: None,
        lambda trainer: trainer.model.state_dict(),
        lambda trainer: trainer.accelerator.get_state_dict(trainer.model_wrapped),
    ],
)
def test_the_wrapped_model_answers_as_the_model(state_dict, tmp_path):
    trainer = make(tmp_path, kind=Looks)
    trainer.train()
    wrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    assert wrapped.config is trainer.model.config
    wrapped.save_pretrained(tmp_path / "saved", state_dict=state_dict(trainer))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert all(value.equal(trainer.model.state_dict()[name]) for name, value in again.state_dict().items())
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = wrapped.nothing_of_the_kind


def test_a_copy_of_a_compiled_model_runs_with_its_own_weights(tmp_path):
    trainer = make(tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    batch = BERT.batch(0)
    twin = copy.deepcopy(trainer.model).eval()
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert twin(**batch).logits.abs().max() == 0
    torch.save(trainer.model, tmp_path / "model.pt")


# ---- Going on ----


def test_an_optimizer_of_ones_own_is_resumed_at_the_rates_of_its_checkpoint(tmp_path):
    def optimizer(model):
        return {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.1), None)}

    model = BERT.build()
    make(tmp_path, model=model, own=optimizer(model), save_strategy="steps", save_steps=2, max_steps=2).train()
    read = type(model).from_pretrained(tmp_path / "checkpoint-2")
    trainer = make(tmp_path, model=read, own=optimizer(read), max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert trainer.assembly.config.block_lr_decay == 1.0
