"""Early exits: nobody sure, and it is the model to the bit; somebody sure, and the answer is that of their block."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from training import hooks_left, make
from transformers import AutoModelForSequenceClassification, pipeline
from zoo import BART, CLASSES, SPECIMENS, build_tiny, classes_batch

from hf_blocklocal import BlockLocalConfig, assemble, early_exit
from hf_blocklocal.depth import open_trained
from hf_blocklocal.errors import UnsupportedSettingError


NAMES = ["bert", "distilbert", "roberta", "deberta_v2", "vit", "wav2vec2", "bart"]
OWN, BORROWED = {"head_layers": 0}, {"head_layers": 1}
HEADS = pytest.mark.parametrize("options", [OWN, BORROWED], ids=["own", "borrowed"])


def bart_classifier():
    return build_tiny("bart", AutoModelForSequenceClassification, BART | {"num_labels": CLASSES})


def bart_batch(seed):
    batch = classes_batch(seed)
    last = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(len(last)), last] = BART["eos_token_id"]  # where it reads the class
    return batch


def cut_up(name, options, borrow):
    model, batch = (bart_classifier(), bart_batch(0)) if name == "bart" else (borrow(name), SPECIMENS[name].batch(0))
    return assemble(model.eval(), BlockLocalConfig(num_blocks=4, **options), batch), batch


def every_answer(assembly, batch):
    """What each block says, then the model: (K, B, C)."""
    opened = open_trained(assembly, inputs=batch)
    with torch.no_grad():
        return torch.stack([*(opened.head_logits(k) for k in range(assembly.last)), opened.model(**batch).logits])


@HEADS
@pytest.mark.parametrize("name", NAMES)
def test_with_a_threshold_above_one_it_is_the_model_to_the_bit(name, options, borrow):
    assembly, batch = cut_up(name, options, borrow)
    hooks_before = hooks_left(assembly.module.model)  # wav2vec 2.0 has one of its own
    with torch.no_grad():
        expected = assembly.module.model(**batch)
    model = early_exit(assembly, threshold=1.1, inputs=batch)
    output = model(**batch)
    assert type(output) is type(expected)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    assert model.exits_B.tolist() == [assembly.last] * len(batch["labels"])
    assert hooks_left(assembly.module.model) == hooks_before


@HEADS
@pytest.mark.parametrize("name", NAMES)
def test_each_sample_gets_the_answer_of_the_first_block_that_is_sure(name, options, borrow):
    assembly, batch = cut_up(name, options, borrow)
    answers_KBC = every_answer(assembly, batch)
    sure_KB = answers_KBC.softmax(-1).amax(-1)
    model = early_exit(assembly, inputs=batch)
    useful = [0, 1, 2] if options == OWN else [0, 1]  # below the last layer, to borrow one is to borrow all
    mixed = 0
    for threshold in sure_KB[useful].flatten().tolist():
        model.threshold = threshold - 1e-5
        output = model(**batch)
        expected = [
            next((k for k in useful if sure_KB[k, b] >= model.threshold), assembly.last)
            for b in range(len(sure_KB[0]))
        ]
        assert model.exits_B.tolist() == expected
        mixed += len(set(expected)) > 1
        want_BC = answers_KBC[expected, range(len(expected))]
        torch.testing.assert_close(output.logits, want_BC, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(want_BC, batch["labels"]))
    assert mixed > 0
    assert not any("forward" in vars(module) for module in assembly.module.model.modules())


def test_samples_that_have_left_are_computed_no_more(borrow):
    assembly, batch = cut_up("bert", OWN, borrow)
    sure_KB = every_answer(assembly, batch).softmax(-1).amax(-1)
    model = early_exit(assembly, threshold=sure_KB[0].median().item(), inputs=batch)
    rows = {}

    def note(index, attention, args):
        rows.setdefault(index, len(args[0]))

    layers = [assembly.module.model.get_submodule(path) for path in assembly.cut.layers]
    for index, layer in enumerate(layers):
        layer.attention.register_forward_pre_hook(partial(note, index))
    model(**batch)
    left = int((model.exits_B == 0).sum())
    assert 0 < left < 4
    assert rows[0] == 4
    assert rows.get(1) == 4 - left


def test_everybody_may_leave_at_once(borrow):
    assembly, batch = cut_up("bert", OWN, borrow)
    model = early_exit(assembly, threshold=0.01, inputs=batch)
    output = model(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert model.exits_B.tolist() == [0] * 4
    assert output.loss is None
    torch.testing.assert_close(output.logits, every_answer(assembly, batch)[0])


def test_it_is_called_as_the_model_is(borrow):
    assembly, batch = cut_up("bert", OWN, borrow)
    model = early_exit(assembly, threshold=0.01, inputs=batch)
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[1], model(**batch).logits)
    assert model.config is assembly.module.model.config
    assert not as_tuple[1].requires_grad
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(UnsupportedSettingError, match=f"{name}=True asks for every layer"):
            model(**batch, **{name: True})


@HEADS
def test_a_saved_run_is_opened_with_its_heads(options, tmp_path):
    trainer = make("bert", tmp_path, config=BlockLocalConfig(num_blocks=2, **options), max_steps=3)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    batch = SPECIMENS["bert"].batch(1)
    ours, theirs = (
        early_exit(source, threshold=0.4)(**batch).logits for source in (trainer.assembly, tmp_path / "final")
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("threshold", [0, -1, True, "0.5", float("nan")])
def test_a_threshold_is_a_number_above_zero(threshold, borrow):
    assembly, batch = cut_up("bert", OWN, borrow)
    with pytest.raises(UnsupportedSettingError, match="above 0"):
        early_exit(assembly, threshold=threshold, inputs=batch)


@pytest.mark.parametrize("name", ["t5", "gpt2", "bert_tokens", "bert_multilabel", "bert_regression"])
def test_what_chooses_no_class_for_a_sample_is_refused(name, borrow):
    with pytest.raises(UnsupportedSettingError, match="chooses one class for each sample"):
        early_exit(borrow(name), config=BlockLocalConfig(num_blocks=2, head_layers=1), inputs=SPECIMENS[name].batch(0))


def test_a_single_block_has_no_exit(borrow):
    with pytest.raises(UnsupportedSettingError, match="single block"):
        early_exit(borrow("bert"), config=BlockLocalConfig(num_blocks=1))


def test_a_pipeline_takes_it_for_a_model(tmp_path):
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "sort": 5, "list": 6}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    model = early_exit(SPECIMENS["bert"].build(), threshold=0.01, config=BlockLocalConfig(num_blocks=4, head_layers=1))
    guess = pipeline("text-classification", model=model, tokenizer=tokenizer)("sort list")[0]
    assert guess["label"] in model.config.label2id
    assert model.exits_B.tolist() == [0]
