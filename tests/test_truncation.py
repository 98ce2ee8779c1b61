"""A model in K sizes: each is an ordinary checkpoint, and says what the head of its last block said."""

from __future__ import annotations

import copy

import pytest
import torch
from training import make
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from zoo import BERT, CLASSES, GPT2, LLAMA, PLACES, SPECIMENS, TOKEN_CLASSES, build_tiny, tokens_batch

from hf_blocklocal import BlockLocalConfig, assemble, truncate
from hf_blocklocal.depth import open_trained
from hf_blocklocal.errors import ConfigError, HeadsMismatchError, TruncationError, UnsupportedSettingError


NAMES = [name for name in SPECIMENS if name != "albert"]


def logits_of(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def head_says(source, block, **options):
    return open_trained(source, **options).head_logits(block)


def trained(name, folder, config):
    trainer = make(name, folder, config=config, max_steps=2)
    trainer.train()
    trainer.save_model(folder / "final")
    return trainer, folder / "final"


# ---- Heads that borrow layers ----


@pytest.mark.parametrize(("num_blocks", "kept", "borrowed"), [(2, 1, 1), (4, 1, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_the_smaller_model_says_to_the_bit_what_the_head_says(name, num_blocks, kept, borrowed, borrow):
    model, batch = borrow(name), SPECIMENS[name].batch(0)
    config = BlockLocalConfig(num_blocks=num_blocks, head_layers=borrowed)
    small = truncate(model, kept, config=config, inputs=batch)
    assert type(small) is type(model)
    assert small.num_parameters() < model.num_parameters()
    assert torch.equal(logits_of(small, batch), head_says(model, kept - 1, config=config, inputs=batch))


@pytest.mark.parametrize(
    ("name", "auto_class"),
    [
        ("bert", AutoModelForSequenceClassification),
        ("distilbert", AutoModelForSequenceClassification),
        ("llama", AutoModelForCausalLM),
        ("vit", AutoModelForImageClassification),
    ],
)
def test_a_saved_run_becomes_a_checkpoint_that_the_auto_class_loads(name, auto_class, tmp_path):
    _, folder = trained(name, tmp_path, BlockLocalConfig(num_blocks=4, head_layers=1))
    batch = SPECIMENS[name].batch(1)
    truncate(folder, 2, output=tmp_path / "small")
    loaded, info = auto_class.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.num_hidden_layers == 3  # two blocks of a layer, and the one that the head borrows
    assert torch.equal(logits_of(loaded, batch), head_says(folder, 1, inputs=batch))
    assert not list((tmp_path / "small").glob("block_local*"))


def test_the_trainers_assembly_is_as_good_as_its_folder(tmp_path):
    trainer, folder = trained("bert", tmp_path, BlockLocalConfig(num_blocks=2, head_layers=1))
    ours, theirs = (truncate(source, 1).state_dict() for source in (trainer.assembly, folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_model_is_left_as_it_was_and_shares_nothing(borrow):
    model = borrow("llama")
    before = copy.deepcopy(model.state_dict())
    small = truncate(model, 1, config=BlockLocalConfig(num_blocks=4, head_layers=1))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1)
    assert model.config.num_hidden_layers == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_half_precision_stays_half_precision(borrow):
    model = borrow("bert").to(torch.bfloat16)
    small = truncate(model, 1, config=BlockLocalConfig(num_blocks=2, head_layers=1))
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}


def test_blocks_that_were_cut_by_cost_are_those_that_the_heads_were_saved_with(tmp_path):
    trainer, folder = trained("gpt2", tmp_path, BlockLocalConfig(num_blocks=2, balance="cost", head_layers=1))
    assert open_trained(folder).assembly.cut.spans == trainer.assembly.cut.spans


# ---- Configs that list their layers ----


def picks(model_type, auto_class, options, num_blocks, kept, field):
    model = build_tiny(model_type, auto_class, options)
    small = truncate(model, kept, config=BlockLocalConfig(num_blocks=num_blocks, head_layers=1))
    return getattr(small.config, field)


SLIDING, FULL = "sliding_attention", "full_attention"


def test_kinds_of_layers_are_picked_by_index(borrow):
    model = borrow("gemma3")
    assert model.config.layer_types == [SLIDING, FULL, SLIDING, FULL]
    small = truncate(model, 2, config=BlockLocalConfig(num_blocks=4, head_layers=1))
    assert small.config.layer_types == [SLIDING, FULL, FULL]


def test_qwen2_knows_which_of_its_layers_look_through_a_window():
    options = LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    assert picks("qwen2", AutoModelForCausalLM, options, 4, 1, "layer_types") == [FULL, SLIDING]
    assert picks("qwen2", AutoModelForCausalLM, options, 4, 1, "max_window_layers") == 1


def test_gpt_neo_says_it_in_the_one_field_that_is_read_back():
    sizes = {"vocab_size": 96, "hidden_size": 16, "num_layers": 4, "num_heads": 2, "window_size": 4}
    options = sizes | PLACES | {"attention_types": [[["global", "local"], 2]], "bos_token_id": 1, "eos_token_id": 2}
    assert picks("gpt_neo", AutoModelForCausalLM, options, 4, 2, "attention_layers") == ["global", "local", "local"]


def test_modernbert_lists_what_its_pattern_could_not_say():
    tokens = {"cls_token_id": 1, "sep_token_id": 2}
    options = BERT | tokens | {"local_attention": 4, "layer_types": [FULL, SLIDING, SLIDING, FULL]}
    assert picks("modernbert", AutoModelForMaskedLM, options, 4, 1, "layer_types") == [FULL, FULL]


def test_layers_that_depend_on_their_place_are_refused():
    model = build_tiny("gpt2", AutoModelForCausalLM, GPT2 | {"scale_attn_by_inverse_layer_idx": True})
    with pytest.raises(TruncationError, match=r"transformer\.h\.1 would differ from layer 3 .* attn\.scaling"):
        truncate(model, 1, config=BlockLocalConfig(num_blocks=4, head_layers=1))


def test_stages_of_different_widths_are_refused():
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    model = build_tiny("swin", AutoModelForImageClassification, sizes | {"window_size": 4, "num_labels": CLASSES})
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    assembly = assemble(model, BlockLocalConfig(num_blocks=2, head_layers=0), batch)
    with pytest.raises(
        TruncationError, match=r"SwinForImageClassification with layers \[0\] of swin\.encoder\.layers"
    ):
        truncate(assembly, 1, calibration=[batch])


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_an_encoder_decoder_keeps_layers_of_both(name, borrow):
    model, batch = borrow(name), SPECIMENS[name].batch(0)
    small = truncate(model, 1, config=BlockLocalConfig(num_blocks=4, head_layers=1), inputs=batch)
    stacks = {
        path.rpartition(".")[0]
        for path in open_trained(
            small, config=BlockLocalConfig(num_blocks=2, head_layers=1), inputs=batch
        ).assembly.cut.layers
    }
    assert len(stacks) == 2


# ---- Heads of their own ----


@pytest.mark.parametrize("feedback", ["auto", "label"])
def test_a_readout_of_the_class_token_is_the_classifier_of_an_image_model(feedback, borrow):
    model, batch = borrow("vit"), SPECIMENS["vit"].batch(0)
    assembly = assemble(
        model, BlockLocalConfig(num_blocks=2, head_layers=0, feedback=feedback, pooling="first"), batch
    )
    shaken(assembly.heads)
    small = truncate(assembly, 1, inputs=batch)
    assert small.config.num_hidden_layers == 2
    expected = head_says(assembly, 0, inputs=batch)
    torch.testing.assert_close(logits_of(small, batch), expected, rtol=1e-4, atol=1e-4)


def test_a_readout_of_every_token_is_the_classifier_of_gpt2():
    model = build_tiny("gpt2", AutoModelForTokenClassification, GPT2 | {"num_labels": TOKEN_CLASSES})
    batch = tokens_batch(0)
    assembly = assemble(model, BlockLocalConfig.from_preset("pred", num_blocks=2), batch)
    shaken(assembly.heads)
    small = truncate(assembly, 1, inputs=batch)
    rows = logits_of(small, batch).flatten(0, 1)[assembly.read_targets(batch).positions_N]
    torch.testing.assert_close(rows, head_says(assembly, 0, inputs=batch), rtol=1e-5, atol=1e-5)


def shaken(heads):
    """Move every parameter from where it starts, so that nothing is 0 or 1 by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_a_head_without_counterpart_is_refused_by_name(borrow):
    batch = SPECIMENS["bert"].batch(0)
    assembly = assemble(borrow("bert"), BlockLocalConfig(num_blocks=2, head_layers=0), batch)
    with pytest.raises(TruncationError, match=r"DirectFeedback, LinearReadout.*BertForSequenceClassif.*calibration"):
        truncate(assembly, 1, inputs=batch)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", {"head_layers": 0}),
        ("bert", {"head_layers": 0, "head_lens": True}),
        ("distilbert", {"head_layers": 0}),
        ("vit", {"head_layers": 0, "readout": "mlp"}),
        ("gpt2", {"head_layers": 0}),
        ("llama", {"head_layers": 0, "feedback": "label"}),
    ],
)
def test_then_the_task_head_is_fitted_and_nothing_below_moves(name, options, tmp_path, borrow):
    model, batch = borrow(name), SPECIMENS[name].batch(0)
    assembly = assemble(model, BlockLocalConfig(num_blocks=2, **options), batch)
    before = truncate(assembly, 1, calibration=[batch], steps=1, learning_rate=1e-12, inputs=batch)
    small = truncate(assembly, 1, calibration=[batch], steps=30, learning_rate=1e-2, inputs=batch, output=tmp_path)
    assert small.config.num_hidden_layers == 2
    with torch.no_grad():
        assert small(**batch).loss < before(**batch).loss - 0.01
    whole, cut = model.state_dict(), assembly.cut
    for key, tensor in small.state_dict().items():
        if cut.layer_of_path(key) is not None or "embed" in key or "wte" in key:
            assert torch.equal(tensor, whole[key]), key
    loaded = type(small).from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, batch), logits_of(small, batch))


def test_without_what_its_head_borrows_a_model_is_smaller_still(borrow):
    model, batch = borrow("bert"), SPECIMENS["bert"].batch(0)
    config = BlockLocalConfig(num_blocks=2, head_layers=1)
    with pytest.raises(TruncationError, match="borrowed layers, which are not to be kept"):
        truncate(model, 1, config=config, keep_borrowed=False)
    small = truncate(model, 1, config=config, keep_borrowed=False, calibration=[batch], steps=3)
    assert small.config.num_hidden_layers == 2


def test_an_encoder_without_decoder_is_refused(borrow):
    batch = SPECIMENS["t5"].batch(0)
    assembly = assemble(borrow("t5"), BlockLocalConfig(num_blocks=4, head_layers=0), batch)
    with pytest.raises(TruncationError, match=r"Nothing would be left of decoder\.block"):
        truncate(assembly, 1, calibration=[batch], inputs=batch)


# ---- What cannot be ----


@pytest.mark.parametrize("num_blocks", [0, 5, -1, True, 1.0])
def test_there_are_one_to_k_blocks_to_keep(num_blocks, borrow):
    with pytest.raises(TruncationError, match="from 1 to 4"):
        truncate(borrow("bert"), num_blocks, config=BlockLocalConfig(num_blocks=4))


def test_all_blocks_are_the_model_itself(borrow, tmp_path):
    model = borrow("bert")
    assert truncate(model, 4, config=BlockLocalConfig(num_blocks=4), output=tmp_path) is model
    assert truncate(model, 1, config=BlockLocalConfig(num_blocks=1)) is model
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = SPECIMENS["bert"].batch(0)
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


def test_a_folder_that_is_no_run_is_named(tmp_path, borrow):
    borrow("bert").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no block_local_config\.json"):
        truncate(tmp_path, 1)


def test_the_folder_of_the_run_is_not_overwritten(tmp_path):
    _, folder = trained("bert", tmp_path, BlockLocalConfig(num_blocks=2, head_layers=1))
    with pytest.raises(TruncationError, match="is the folder of the whole model"):
        truncate(folder, 1, output=folder)
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 4


def test_how_a_model_was_cut_and_its_heads_have_to_be_known(borrow):
    model = borrow("bert")
    with pytest.raises(ConfigError, match="Pass config=BlockLocalConfig"):
        truncate(model, 1)
    with pytest.raises(HeadsMismatchError, match="Pass heads=folder"):
        truncate(model, 1, config=BlockLocalConfig(num_blocks=2, head_layers=0))
    with pytest.raises(UnsupportedSettingError, match="no transformers model"):
        truncate(torch.nn.Linear(2, 2), 1, config=BlockLocalConfig(num_blocks=2))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [([], "yields no batch"), ([{"input_ids": [1]}], r"not \['input_ids'\]"), ([3], "not a int")],
)
def test_calibration_needs_batches_with_labels(calibration, message, borrow):
    config = BlockLocalConfig(num_blocks=2, head_layers=1)
    with pytest.raises(TruncationError, match=message):
        truncate(borrow("bert"), 1, config=config, keep_borrowed=False, calibration=calibration)


@pytest.mark.parametrize("options", [{"steps": 0}, {"learning_rate": 0.0}])
def test_a_calibration_takes_steps(options, borrow):
    config = BlockLocalConfig(num_blocks=2, head_layers=1)
    with pytest.raises(TruncationError, match="must be above 0"):
        truncate(borrow("bert"), 1, config=config, keep_borrowed=False, calibration=[{}], **options)
