"""A configuration survives being written down, explains itself and knows the presets."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import fields

import pytest
from transformers import HfArgumentParser

from hf_blocklocal.config.block_local import CONFIG_NAME, BlockLocalConfig
from hf_blocklocal.config.presets import PRESETS
from hf_blocklocal.errors import ConfigError


CONFIGS = {
    "defaults": BlockLocalConfig(),
    "cut by hand": BlockLocalConfig(boundaries=(1, 3), layers=("encoder.block", "decoder.block")),
    "similarities": BlockLocalConfig(sim=0.5),
    "nothing at its default": BlockLocalConfig(
        num_blocks=3,
        balance="cost",
        feedback="label",
        loss="agreement",
        family="categorical",
        latent_dim=7,
        readout="mlp",
        pooling="last",
        negatives=None,
        step_per_block=True,
        block_lr_decay=0.5,
        feedback_learning_rate=0.01,
        overlap=1,
        global_every=10,
        polish=0.1,
        anchor=0.1,
        satisfied_at=0.9,
        bootstrap_until=0.25,
        head_warmup_steps=3,
        evaluate_blocks=False,
    ),
}


configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@configs
def test_a_saved_config_is_read_back_equal(config, tmp_path):
    path = config.save_pretrained(tmp_path / "not" / "there yet")
    assert path == tmp_path / "not" / "there yet" / "block_local_config.json"
    assert BlockLocalConfig.from_pretrained(path.parent) == config


@configs
def test_a_config_survives_json(config):
    values = config.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert BlockLocalConfig.from_dict(values) == config


def test_the_file_is_for_reading(tmp_path):
    lines = BlockLocalConfig(num_blocks=3).save_pretrained(tmp_path).read_text(encoding="utf-8").splitlines()
    assert '  "num_blocks": 3,' in lines


def test_what_is_left_open_stays_open():
    again = BlockLocalConfig.from_dict(BlockLocalConfig(head_lens=True).to_dict())
    assert again.leaves_cut_open
    assert again.num_blocks == 2
    assert not BlockLocalConfig.from_dict(BlockLocalConfig(num_blocks=2).to_dict()).leaves_cut_open
    assert not BlockLocalConfig.from_dict(BlockLocalConfig(boundaries=[1]).to_dict()).leaves_cut_open


def test_the_parser_of_transformers_reads_every_field():
    line = "--boundaries 2 4 --layers a.layers b.layers --head_lens true --head_layers 0 --anchor 0.5"
    (config,) = HfArgumentParser(BlockLocalConfig).parse_args_into_dataclasses(line.split(" "))
    assert (config.boundaries, config.layers) == ((2, 4), ("a.layers", "b.layers"))
    assert (config.num_blocks, config.head_lens, config.head_layers, config.anchor) == (3, True, 0, 0.5)


def test_a_repository_is_no_folder_and_the_message_says_how_to_get_one():
    with pytest.raises(ConfigError, match=r"no folder user/run.*from_pretrained\(hf_blocklocal.fetch\('user/run'\)\)"):
        BlockLocalConfig.from_pretrained("user/run")


def test_a_folder_without_a_config_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path.name} holds no {CONFIG_NAME}: it was not saved by block-local"):
        BlockLocalConfig.from_pretrained(tmp_path)


def test_a_file_with_an_unknown_option_is_refused(tmp_path):
    (tmp_path / CONFIG_NAME).write_text('{"num_block": 3}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Unknown block-local options \['num_block'\]"):
        BlockLocalConfig.from_pretrained(tmp_path)


def test_unknown_options_are_named_beside_the_known_ones():
    with pytest.raises(ConfigError) as error:
        BlockLocalConfig.from_dict({"num_blocks": 2, "pool": "mean", "blocks": 2})
    known = [field.name for field in dataclasses.fields(BlockLocalConfig)]
    assert str(error.value) == f"Unknown block-local options ['blocks', 'pool']. Known are {known}."


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BlockLocalConfig().num_blocks = 3


def test_lists_become_tuples_so_that_configs_compare_and_hash():
    from_lists = BlockLocalConfig(boundaries=[1, 2], layers=["h"])
    from_tuples = BlockLocalConfig(boundaries=(1, 2), layers=("h",))
    assert from_lists == from_tuples
    assert hash(from_lists) == hash(from_tuples)


def test_two_blocks_are_the_default():
    assert BlockLocalConfig().num_blocks == 2


@pytest.mark.parametrize("boundaries", [(), (1,), (2, 5, 9)])
def test_boundaries_set_the_number_of_blocks(boundaries):
    assert BlockLocalConfig(boundaries=boundaries).num_blocks == len(boundaries) + 1


def test_boundaries_and_their_own_number_of_blocks_agree():
    assert BlockLocalConfig(num_blocks=3, boundaries=(1, 2)) == BlockLocalConfig(boundaries=(1, 2))


def test_a_bare_name_of_layers_is_not_read_letter_by_letter():
    assert BlockLocalConfig(layers="model.layers").layers == ("model.layers",)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_its_fields_and_leaves_the_others(name):
    config = BlockLocalConfig.from_preset(name)
    assert config.to_dict() == BlockLocalConfig().to_dict() | PRESETS[name]


def test_backpropagation_is_a_single_block_and_nothing_else():
    assert BlockLocalConfig.from_preset("backprop", num_blocks=1).num_blocks == 1
    assert BlockLocalConfig.from_preset("backprop", num_blocks=None).num_blocks == 1
    with pytest.raises(ConfigError, match="'backprop' is a single block, and num_blocks=3 is asked for"):
        BlockLocalConfig.from_preset("backprop", num_blocks=3)


def test_the_presets_are_what_their_papers_say():
    pred = BlockLocalConfig.from_preset("pred")
    assert (pred.feedback, pred.loss, pred.num_blocks) == ("label", "agreement", 2)
    assert BlockLocalConfig.from_preset("backprop").num_blocks == 1
    dgl = BlockLocalConfig.from_preset("dgl")
    assert (dgl.feedback, dgl.loss, dgl.readout) == ("label", "agreement", "mlp")
    sim, predsim = (BlockLocalConfig.from_preset(name) for name in ("sim", "predsim"))
    assert (sim.feedback, sim.loss, sim.sim) == ("label", "agreement", 1.0)
    assert (predsim.feedback, predsim.loss, predsim.sim) == ("label", "agreement", 0.99)
    kappel = BlockLocalConfig.from_preset("kappel2023")
    assert (kappel.feedback, kappel.loss, kappel.denoising) == ("prototype", "kappel2023", 1.0)
    interlocking = BlockLocalConfig.from_preset("interlocking")
    assert (interlocking.feedback, interlocking.loss, interlocking.overlap) == ("label", "agreement", 1)


def test_what_is_asked_for_wins_over_the_preset():
    config = BlockLocalConfig.from_preset("pred", num_blocks=4, pooling="first")
    assert (config.feedback, config.num_blocks, config.pooling) == ("label", 4, "first")


def test_a_preset_takes_no_unknown_option():
    with pytest.raises(ConfigError, match=r"Unknown block-local options \['depth'\]"):
        BlockLocalConfig.from_preset("pred", depth=2)


def test_an_unknown_preset_is_refused_beside_the_known_ones():
    with pytest.raises(ConfigError) as error:
        BlockLocalConfig.from_preset("hinton")
    assert str(error.value) == f"There is no preset 'hinton'. Choose one of {sorted(PRESETS)}."


def test_every_field_carries_its_help_once():
    texts = [field.metadata["help"] for field in dataclasses.fields(BlockLocalConfig)]
    assert len(set(texts)) == len(texts)
    # argparse takes a per cent sign for a format.
    assert not [text for text in texts if "%" in text or not text.endswith(".")]


def test_help_explains_every_field():
    for f in fields(BlockLocalConfig):
        assert f"{f.name} (default" in BlockLocalConfig.__doc__
        assert f.metadata["help"] in BlockLocalConfig.__doc__
