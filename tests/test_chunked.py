"""A language model's loss in chunks is the same loss, for less memory; where it could not be, that is said."""

# Shapes: B batch, S sequence.

from __future__ import annotations

import pytest
import torch
from training import make
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from zoo import LLAMA, SPECIMENS, build_tiny

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.errors import ConfigError, UnsupportedSettingError
from hf_blocklocal.records.memory import ActivationMeter


LANGUAGE_MODELS = ("gpt2", "llama", "mixtral")


def stepped(model, batch, items=None, **values):
    """Run one step. Returns the losses of the blocks, and the gradients."""
    assembly = assemble(model, BlockLocalConfig(**values), batch)
    model.zero_grad()
    targets = assembly.read_targets(batch)
    lesson = assembly.step.teach(
        targets, scale=1 / len(targets), backward=torch.Tensor.backward, learned=lambda *_: None, inputs=batch
    )
    with lesson as report:
        output = model(**batch, **({} if items is None else {"num_items_in_batch": items}))
        output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [*report.losses, output.loss.detach()], gradients, output


@pytest.mark.parametrize(
    "values",
    [
        {"head_layers": 0, "denoising": 0.5, "reconstruction": 0.5},
        {"overlap": 1, "num_blocks": 3},
        {"head_lens": True, "head_refresh_steps": 2},
    ],
    ids=["second runs", "overlap", "copies"],
)
def test_it_goes_with_all_that_runs_a_model_again(values, borrow):
    batch, results = SPECIMENS["llama"].batch(0), []
    for chunked in (None, 5):
        torch.manual_seed(0)
        results.append(stepped(borrow("llama"), batch, **{"num_blocks": 2, **values, "chunked_loss": chunked}))
    assert_same(*results)


def assert_same(plain, chunked):
    (losses, gradients, _), (chunked_losses, chunked_gradients, _) = plain, chunked
    torch.testing.assert_close(chunked_losses, losses, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == chunked_gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[key], gradient, rtol=1e-3, atol=1e-6, msg=key)


@pytest.mark.parametrize("values", [{}, {"head_layers": 0}, {"negatives": None}], ids=["default", "own", "whole"])
@pytest.mark.parametrize("tokens", [1, 5, 1000])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_losses_and_gradients_are_the_same(name, tokens, values, borrow):
    batch, results = SPECIMENS[name].batch(0), []
    for chunked in ({}, {"chunked_loss": tokens}):
        results.append(stepped(borrow(name), batch, num_blocks=2, **values, **chunked))
    assert_same(*results)


def test_hidden_tokens_are_predicted_at_their_places():
    """EuroBERT's loss, unlike BERT's, is its `loss_function`."""
    batch, results = SPECIMENS["bert_mlm"].batch(0), []
    for chunked in (None, 5):
        model = build_tiny("eurobert", AutoModelForMaskedLM, LLAMA)
        results.append(stepped(model, batch, num_blocks=2, chunked_loss=chunked))
    assert_same(*results)


@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["a number", "a tensor"])
def test_a_count_of_items_divides_the_sum(items, borrow):
    batch = SPECIMENS["llama"].batch(0)
    plain, _, _ = stepped(borrow("llama"), batch, items, num_blocks=2)
    chunked, _, _ = stepped(borrow("llama"), batch, items, num_blocks=2, chunked_loss=4)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)


def test_logits_of_all_tokens_are_neither_kept_nor_returned(borrow):
    model = build_tiny("llama", AutoModelForCausalLM, LLAMA | {"vocab_size": 1000})
    batch = SPECIMENS["llama"].batch(0)
    logits_bytes = batch["input_ids"].numel() * 1000 * 4
    peaks = []
    for chunked in (None, 4):
        assembly = assemble(model, BlockLocalConfig(num_blocks=2, chunked_loss=chunked, negatives=8), batch)
        targets = assembly.read_targets(batch)
        lesson = assembly.step.teach(
            targets, scale=1.0, backward=torch.Tensor.backward, learned=lambda *_: None, inputs=batch
        )
        with ActivationMeter(model) as meter, lesson:
            output = model(**batch)
            output.loss.backward()
        peaks.append(meter.peak_bytes)
        assert ("logits" in output) == (chunked is None)
    assert peaks[1] < peaks[0] - 0.7 * logits_bytes


def test_the_model_is_given_back_as_it_was(borrow):
    model, batch = borrow("gpt2"), SPECIMENS["gpt2"].batch(0)
    before, loss = set(vars(model)), model(**batch).loss
    stepped(model, batch, num_blocks=2, chunked_loss=4)
    assert set(vars(model)) == before
    assert "forward" not in vars(model.lm_head)
    after = model(**batch)
    assert torch.equal(after.loss, loss)
    assert after.logits.shape[-1] == model.config.vocab_size


def test_a_loss_of_the_users_own_is_given_back_too(borrow):
    model, batch = borrow("gpt2"), SPECIMENS["gpt2"].batch(0)
    own = model.loss_function

    def halved(*args, **kwargs):
        return own(*args, **kwargs) / 2

    model.loss_function = halved
    plain, _, _ = stepped(model, batch, num_blocks=2)
    chunked, _, _ = stepped(model, batch, num_blocks=2, chunked_loss=4)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)
    assert model.loss_function is halved


@pytest.mark.parametrize(
    "args", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str
)
def test_a_run_learns_the_same(args, tmp_path):
    histories = []
    for chunked in (None, 6):
        config = BlockLocalConfig(num_blocks=2, chunked_loss=chunked)
        trainer = make("llama", tmp_path / str(chunked), config=config, max_steps=3, logging_steps=1, **args)
        trainer.train()
        histories.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert trainer.evaluate(trainer.train_dataset)["eval_block_0_loss"] > 0
    assert len(histories[0]) == 3
    assert histories[1] == pytest.approx(histories[0], rel=2e-2 if "bf16" in args else 1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "losses over a vocabulary, and that of BertForSequenceClassification is 'ForSequenceClassif"),
        ("bert_mlm", "BertForMaskedLM"),
        ("t5", "T5ForConditionalGeneration"),
    ],
)
def test_a_model_with_another_loss_is_refused(name, message, borrow):
    with pytest.raises(UnsupportedSettingError, match=message):
        assemble(borrow(name), BlockLocalConfig(num_blocks=2, chunked_loss=4), SPECIMENS[name].batch(0))


@pytest.mark.parametrize("cap", [0.5, 30.0], ids=["near", "beyond all logits of weights at random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_changes_its_logits_is_refused(cap, dtype):
    options = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    model = build_tiny("gemma2", AutoModelForCausalLM, options | {"head_dim": 4, "final_logit_softcapping": cap})
    with pytest.raises(UnsupportedSettingError, match="made of logits that are changed behind the head"):
        assemble(model.to(dtype), BlockLocalConfig(num_blocks=2, chunked_loss=4), SPECIMENS["llama"].batch(0))
    assert not {"_loss_function", "forward"} & {*vars(model), *vars(model.lm_head)}


def test_weights_in_low_precision_are_accepted(borrow):
    config = BlockLocalConfig(num_blocks=2, chunked_loss=4)
    assemble(borrow("llama").to(torch.bfloat16), config, SPECIMENS["llama"].batch(0))


def test_a_first_batch_without_a_label_that_counts_is_accepted(borrow):
    batch = SPECIMENS["llama"].batch(0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert assemble(borrow("llama"), BlockLocalConfig(num_blocks=2, chunked_loss=4), batch).step.chunked is not None


class DroppingHead(torch.nn.Linear):
    """A language-model head with dropout, as an adapter on it has."""

    def forward(self, hidden):
        return super().forward(torch.nn.functional.dropout(hidden, 0.5, self.training))


def test_dropout_of_the_head_is_the_same_in_the_backward_pass(borrow):
    batch, results = SPECIMENS["llama"].batch(0), []
    for chunked in (None, 1000):
        model = borrow("llama").train()
        model.lm_head.__class__ = DroppingHead
        torch.manual_seed(0)
        results.append(stepped(model, batch, num_blocks=2, head_layers=0, chunked_loss=chunked))
    assert_same(*results)


def test_adapters_on_the_head_learn_the_same(borrow):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], lora_dropout=0.5, init_lora_weights=False)
    batch, results = SPECIMENS["llama"].batch(0), []
    for chunked in (None, 1000):  # one chunk, so that dropout draws the same
        torch.manual_seed(0)
        model = peft.get_peft_model(borrow("llama"), settings).train()
        results.append(stepped(model, batch, num_blocks=2, head_layers=0, chunked_loss=chunked))
    assert_same(*results)
    assert "logits" not in results[1][2]


@pytest.mark.parametrize("tokens", [0, True, 2.5])
def test_a_chunk_has_tokens(tokens):
    with pytest.raises(ConfigError, match="chunked_loss must be a whole number of at least 1"):
        BlockLocalConfig(chunked_loss=tokens)


def test_a_single_block_is_the_plain_trainer():
    with pytest.raises(ConfigError, match="num_blocks=1 is the plain Trainer"):
        BlockLocalConfig(num_blocks=1, chunked_loss=64)


def test_a_trainer_that_computes_the_loss_itself_is_refused(borrow):
    model, batch = borrow("llama"), SPECIMENS["llama"].batch(0)
    assembly = assemble(model, BlockLocalConfig(num_blocks=2, chunked_loss=4), batch)
    targets = assembly.read_targets(batch)
    lesson = assembly.step.teach(
        targets, scale=1.0, backward=torch.Tensor.backward, learned=lambda *_: None, inputs=batch
    )
    with pytest.raises(UnsupportedSettingError, match="its loss is not computed by its loss_function"), lesson:
        model(**{name: value for name, value in batch.items() if name != "labels"})
    assert model(**batch).logits.shape[-1] == model.config.vocab_size


def test_what_needs_all_logits_is_refused(tmp_path):
    trainer = make("llama", tmp_path, config=BlockLocalConfig(chunked_loss=4), label_smoothing_factor=0.1)
    with pytest.raises(UnsupportedSettingError, match="chunked_loss=4 and label_smoothing_factor exclude"):
        trainer.train()
