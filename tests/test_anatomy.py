"""The layers of a model are found by its structure, or the refusal says what was seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import SPECIMENS, build_wav2vec2

from hf_blocklocal.anatomy.embeddings import target_embedding, vocabulary_size
from hf_blocklocal.anatomy.layers import (
    Stack,
    check_all_layers_run,
    check_layers_not_shared,
    check_layers_run_once,
    find_stacks,
    shifts_labels,
)
from hf_blocklocal.anatomy.routers import find_router_loss
from hf_blocklocal.assembling import assemble, check_structure
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.cut.trace import trace_layers
from hf_blocklocal.errors import CutError, LayersNotFoundError, SharedLayersError, UnsupportedSettingError


STACKS = {
    "bert": ["bert.encoder.layer"],
    "bert_tokens": ["bert.encoder.layer"],
    "bert_mlm": ["bert.encoder.layer"],
    "bert_multilabel": ["bert.encoder.layer"],
    "bert_regression": ["bert.encoder.layer"],
    "distilbert": ["distilbert.transformer.layer"],
    "roberta": ["roberta.encoder.layer"],
    "deberta_v2": ["deberta.encoder.layer"],
    "gpt2": ["transformer.h"],
    "llama": ["model.layers"],
    "qwen3": ["model.layers"],
    "gemma3": ["model.layers"],
    "opt": ["model.decoder.layers"],
    "mixtral": ["model.layers"],
    "vit": ["vit.layers"],
    "t5": ["encoder.block", "decoder.block"],
    "bart": ["model.encoder.layers", "model.decoder.layers"],
    "whisper": ["model.encoder.layers", "model.decoder.layers"],
    "albert": ["albert.encoder.albert_layer_groups.0.albert_layers"],
    "wav2vec2": ["wav2vec2.encoder.layers"],
}


class Plain(nn.Module):
    """A model that owes nothing to transformers."""

    def __init__(self, *layers):
        super().__init__()
        self.front = nn.Linear(2, 2)
        self.steps = nn.ModuleList(layers)


# ---- Finding ----


@pytest.mark.parametrize("name", SPECIMENS)
def test_the_stacks_of_every_specimen_are_found(name, borrow):
    stacks = find_stacks(borrow(name))
    assert [stack.path for stack in stacks] == STACKS[name]
    if name != "albert":
        assert sum(len(stack.layers) for stack in stacks) == SPECIMENS[name].layers


@pytest.mark.parametrize("name", [name for name in SPECIMENS if name != "albert"])
def test_a_forward_pass_runs_the_layers_in_the_order_in_which_they_are_found(name, borrow):
    model, specimen = borrow(name), SPECIMENS[name]
    stacks = find_stacks(model)
    trace = trace_layers(model, stacks, specimen.batch(0))
    assert trace.layers == tuple(layer for stack in stacks for layer in stack.layers)
    assert trace.stacks == tuple(number for number, stack in enumerate(stacks) for _ in stack.layers)


def test_layers_are_dotted_names_in_the_model(borrow):
    model = borrow("t5")
    (encoder, decoder) = find_stacks(model)
    assert encoder == Stack("encoder.block", ("encoder.block.0", "encoder.block.1"))
    assert model.get_submodule(decoder.layers[1]) is model.decoder.block[1]


def test_a_plain_module_with_a_list_of_equal_layers_is_a_stack():
    model = Plain(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert find_stacks(model) == [Stack("steps", ("steps.0", "steps.1", "steps.2"))]


def test_only_the_outermost_of_nested_lists_is_a_stack():
    model = Plain(Plain(nn.Linear(2, 2), nn.Linear(2, 2)), Plain(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert [stack.path for stack in find_stacks(model)] == ["steps"]


@pytest.mark.parametrize(
    "layers", [(), (nn.Linear(2, 2),), (nn.Linear(2, 2), nn.ReLU())], ids=["none", "one", "mixed"]
)
def test_where_nothing_looks_like_a_stack_the_error_names_the_classes_seen(layers):
    with pytest.raises(LayersNotFoundError) as error:
        find_stacks(Plain(*layers))
    text = str(error.value)
    assert text.startswith("Found no stack of layers in Plain: no nn.ModuleList holds layers of one kind.")
    seen = sorted({"Linear", "ModuleList", "Plain"} | {type(layer).__name__ for layer in layers})
    assert f"Classes seen: {', '.join(seen)}." in text
    assert text.endswith("Name the list by hand, for example BlockLocalConfig(layers=['model.layers']).")


# ---- By hand ----


def test_lists_named_by_hand_are_taken_in_that_order(borrow):
    model = borrow("t5")
    assert [stack.path for stack in find_stacks(model, ["decoder.block"])] == ["decoder.block"]
    assert [stack.path for stack in find_stacks(model, ["decoder.block", "encoder.block"])] == [
        "decoder.block",
        "encoder.block",
    ]


def test_a_sequential_named_by_hand_is_a_stack_even_of_mixed_layers():
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert find_stacks(model, ["body"]) == [Stack("body", ("body.0", "body.1"))]


WRONG_PATHS = {
    "bert.encoder.layers": "nothing",
    "bert.embeddings": "a BertEmbeddings",
    "bert.encoder.layer.0.attention": "a BertAttention",
}


@pytest.mark.parametrize("path", WRONG_PATHS)
def test_a_wrong_path_is_refused_beside_the_lists_that_there_are(path, borrow):
    with pytest.raises(LayersNotFoundError) as error:
        find_stacks(borrow("bert"), [path])
    assert str(error.value) == (
        f"layers={path!r} names {WRONG_PATHS[path]} in BertForSequenceClassification, not a list of layers. The lists "
        "of this model: bert.encoder.layer."
    )


def test_a_model_without_any_list_says_so():
    with pytest.raises(LayersNotFoundError, match=r"names a Linear in Sequential.* The lists of this model: none\."):
        find_stacks(nn.Sequential(nn.Linear(2, 2)), ["0"])


def test_an_empty_list_is_no_stack():
    with pytest.raises(LayersNotFoundError, match="layers='steps' names a ModuleList in Plain"):
        find_stacks(Plain(), ["steps"])


def test_a_list_that_the_batch_does_not_use_is_left_aside_and_a_half_used_one_is_refused(borrow):
    model, batch = borrow("bert"), SPECIMENS["bert"].batch(0)
    model.spare = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    stacks = [Stack("spare", ("spare.0", "spare.1")), *find_stacks(model)]
    assert trace_layers(model, stacks, batch).layers == find_stacks(model)[0].layers
    mixed = Stack("bert.encoder.layer", (*find_stacks(model)[0].layers, "spare.0"))
    with pytest.raises(LayersNotFoundError, match=r"The layers spare\.0 of BertForSequenceClassification did not run"):
        trace_layers(model, [mixed], batch)


# ---- Refusing ----


def test_albert_is_refused_before_anything_is_run(borrow):
    model = borrow("albert")
    with pytest.raises(SharedLayersError) as error:
        check_layers_not_shared(model, find_stacks(model), 2)
    assert str(error.value).startswith(
        "AlbertForSequenceClassification shares layers across depth: 1 module(s) for the 4 layers that its config "
        "declares."
    )


def test_albert_is_refused_by_what_a_forward_pass_does(borrow):
    model = borrow("albert")
    with pytest.raises(SharedLayersError, match=r"albert_layers\.0 ran 4 times in one forward pass"):
        trace_layers(model, find_stacks(model), SPECIMENS["albert"].batch(0))


def test_one_block_of_albert_is_no_reason_to_refuse_before_training(borrow):
    check_structure(borrow("albert"), BlockLocalConfig(num_blocks=1))


def test_one_block_of_albert_is_ordinary_backpropagation(borrow):
    assembly = assemble(borrow("albert"), BlockLocalConfig(num_blocks=1), SPECIMENS["albert"].batch(0))
    assert assembly.cut.num_blocks == 1


def test_a_module_per_layer_is_no_reason_to_refuse(borrow):
    model = borrow("bert")
    for num_blocks in (1, 4, 5):
        check_layers_not_shared(model, find_stacks(model), num_blocks)


def test_more_blocks_than_layers_are_refused_before_anything_is_run(borrow):
    model = borrow("bert")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    check_structure(model, BlockLocalConfig(num_blocks=4))
    with pytest.raises(CutError, match="Cannot cut 4 layers into 5 blocks"):
        check_structure(model, BlockLocalConfig(num_blocks=5))
    with pytest.raises(CutError, match=r"Cannot cut 4 layers at boundaries \[4\]"):
        check_structure(model, BlockLocalConfig(boundaries=(4,)))


def test_more_blocks_than_layers_are_refused_once_they_are_counted(borrow):
    with pytest.raises(CutError, match="Cannot cut 4 layers into 5 blocks"):
        assemble(borrow("bert"), BlockLocalConfig(num_blocks=5), SPECIMENS["bert"].batch(0))


def test_layers_that_ran_once_each_are_what_is_wanted(borrow):
    check_layers_run_once(borrow("bert"), {"a": 1, "b": 1})


def test_layers_that_did_not_run_are_named(borrow):
    with pytest.raises(LayersNotFoundError) as error:
        check_layers_run_once(borrow("bert"), {"a": 1, "b": 0, "c": 0})
    assert str(error.value) == (
        "The layers b, c of BertForSequenceClassification did not run in a traced forward pass. If they belong to a "
        "part that this batch does not use, name the list to cut: BlockLocalConfig(layers=[...])."
    )


def test_layer_drop_is_refused_by_the_name_to_set():
    with pytest.raises(UnsupportedSettingError) as error:
        check_all_layers_run(build_wav2vec2(0.5))
    assert str(error.value) == (
        "LayerDrop is on (config.layerdrop = 0.5): a skipped layer would leave its block without a loss. Load the "
        "model with layerdrop=0.0."
    )


def test_layer_drop_of_a_part_is_refused_by_its_place(borrow):
    model = borrow("bart")
    model.model.decoder.layerdrop = 0.1
    with pytest.raises(UnsupportedSettingError, match=r"LayerDrop is on \(model\.decoder\.layerdrop = 0\.1\)"):
        check_all_layers_run(model)


@pytest.mark.parametrize("name", ["wav2vec2", "bart", "whisper", "opt", "bert"])
def test_layer_drop_that_is_off_is_no_reason_to_refuse(name, borrow):
    check_all_layers_run(borrow(name))


def test_layer_drop_does_not_matter_to_a_single_block():
    model = build_wav2vec2(0.5)
    check_structure(model, BlockLocalConfig(num_blocks=1))
    with pytest.raises(UnsupportedSettingError):
        check_structure(model, BlockLocalConfig(num_blocks=2))


# ---- Targets ----


VOCABULARIES = {"gpt2": 96, "bert_mlm": 96, "t5": 96, "bart": 96, "whisper": 96, "bert": None, "vit": None}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_only_language_models_choose_from_a_vocabulary(name, borrow):
    assert vocabulary_size(borrow(name)) == VOCABULARIES[name]


def test_a_plain_module_has_no_vocabulary():
    assert vocabulary_size(nn.Linear(2, 2)) is None


def test_the_embedding_of_targets_is_the_head_where_there_is_one(borrow):
    llama, bert = borrow("llama"), borrow("bert")
    assert target_embedding(llama) is llama.lm_head.weight
    assert target_embedding(bert) is bert.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize(
    ("name", "shifted"),
    [("gpt2", True), ("llama", True), ("opt", True), ("mixtral", True)]
    + [("bert_mlm", False), ("bert_tokens", False), ("bert", False), ("t5", False), ("bart", False)],
)
def test_only_causal_models_without_an_encoder_shift_their_labels(name, shifted, borrow):
    model, batch = borrow(name).eval(), SPECIMENS[name].batch(0)
    with torch.no_grad():
        outputs = model(**batch)
    assert shifts_labels(model, outputs.loss, outputs.logits, batch["labels"]) is shifted


@pytest.mark.parametrize("shifted", [False, True])
def test_a_model_that_names_no_loss_is_judged_by_its_loss(shifted):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    labels[:, 1] = -100
    predicts, predicted = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    loss = nn.functional.cross_entropy(predicts.flatten(0, 1), predicted.flatten())
    assert shifts_labels(nn.Linear(2, 2), loss, logits, labels) is shifted


# ---- Routers ----


def test_the_router_loss_of_mixtral_is_taken_apart_and_put_together_again(borrow):
    model, batch = borrow("mixtral").eval(), SPECIMENS["mixtral"].batch(0)
    router_loss = find_router_loss(model)
    with torch.no_grad():
        outputs = model(**batch)
    assert len(router_loss.routers) == 4
    assert router_loss.coefficient == pytest.approx(0.02)
    balance = router_loss.balance(outputs.router_logits, batch["attention_mask"])
    torch.testing.assert_close(balance, outputs.aux_loss)


def test_models_without_routers_or_with_their_loss_off_have_no_router_loss(borrow):
    assert find_router_loss(borrow("llama")) is None
    model = borrow("mixtral")
    model.config.output_router_logits = False
    assert find_router_loss(model) is None


def test_a_router_loss_that_cannot_be_taken_apart_is_refused(borrow):
    model = borrow("llama")
    model.config.output_router_logits = True
    with pytest.raises(
        UnsupportedSettingError, match=r"LlamaForCausalLM.*Set model\.config\.output_router_logits = False"
    ):
        find_router_loss(model)
