"""Which block lies on which device: after the device map, or over all accelerators; what cannot be is refused."""

from __future__ import annotations

import pytest
import torch
from several_devices import device
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig
from hf_blocklocal.devices import layout
from hf_blocklocal.devices.layout import find_layout
from hf_blocklocal.errors import ConfigError, CutError, UnsupportedSettingError


def bert(*devices_of_layers, **others):
    """Return a BERT of four layers with a device map."""
    model = SPECIMENS["bert"].build()
    layers = {f"bert.encoder.layer.{index}": place for index, place in enumerate(devices_of_layers)}
    if devices_of_layers:
        ends = {"bert.embeddings": devices_of_layers[0], "classifier": devices_of_layers[-1]}
        model.hf_device_map = ends | layers | others
    return model


def found(model, *, processes=1, **config):
    return find_layout(model, BlockLocalConfig(**config), processes=processes)


def devices(*numbers):
    return tuple(torch.device("cuda", number) for number in numbers)


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(layout, "accelerators", lambda: [device(0), device(1), device(2)])


@pytest.mark.parametrize(
    ("places", "config", "boundaries", "expected"),
    [
        ((0, 0, 1, 1), {}, (2,), (0, 1)),
        ((0, 1, 1, 1), {}, (1,), (0, 1)),
        ((1, 1, 0, 0), {}, (2,), (1, 0)),
        ((0, 1, 2, 3), {}, (1, 2, 3), (0, 1, 2, 3)),
        ((0, 1, 1, 1), {"num_blocks": 3}, (1, 2), (0, 1, 1)),
        ((0, 0, 1, 1), {"num_blocks": 4}, (1, 2, 3), (0, 0, 1, 1)),
        ((0, 0, 1, 1), {"boundaries": (1, 2)}, (1, 2), (0, 0, 1)),
        (("cuda:0", "cuda:0", "cuda:1", "cuda:1"), {"num_blocks": 2}, (2,), (0, 1)),
        ((*devices(0, 0, 0, 1),), {"placement": "devices"}, (3,), (0, 1)),
    ],
)
def test_blocks_follow_the_device_map(places, config, boundaries, expected):
    layout = found(bert(*places), **config)
    assert layout.config.boundaries == boundaries
    assert layout.config.num_blocks == len(boundaries) + 1
    assert layout.config.placement == "devices"
    assert layout.devices == devices(*expected)


def test_the_longest_name_of_a_device_map_counts():
    model = bert()
    model.hf_device_map = {"": 0, "bert.encoder": 1, "bert.encoder.layer.0": 0, "classifier": 1}
    assert found(model).config.boundaries == (1,)


@pytest.mark.parametrize("places", [(), (0, 0, 0, 0), ("cuda:1",) * 4])
def test_a_model_on_one_device_is_left_alone(places):
    assert found(bert(*places)) is None


def test_a_single_block_is_left_to_the_plain_trainer():
    assert found(bert(0, 0, 1, 1), num_blocks=1) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (0, 1, 2)),
        ({"num_blocks": 2}, (0, 1)),
        ({"num_blocks": 4}, (0, 0, 1, 2)),
        ({"boundaries": (1, 3)}, (0, 1, 2)),
        ({"num_blocks": 2, "balance": "cost"}, (0, 1)),
    ],
)
def test_blocks_are_spread_over_the_accelerators(three, config, expected):
    layout = found(bert(), placement="devices", **config)
    assert layout.devices == tuple(map(device, expected))
    assert layout.config.num_blocks == len(expected)


def test_there_are_no_more_blocks_than_layers(monkeypatch):
    monkeypatch.setattr(layout, "accelerators", lambda: [device(number) for number in range(8)])
    assert len(found(bert(), placement="devices").devices) == 4


REFUSED = {
    "no accelerator": ((), {"placement": "devices"}, "spreads a model over the accelerators of one process"),
    "several processes": ((0, 0, 1, 1), {"processes": 2}, "there are 2 processes"),
    "block parallel": ((0, 0, 1, 1), {"num_blocks": 2, "block_parallel_size": 2}, "block_parallel_size=2"),
    "back again": (
        (0, 1, 1, 0),
        {},
        "goes back to a device .*cuda:0: 0-0, cuda:1: 1-2, cuda:0: 3-3",
    ),
    "too few blocks": ((0, 1, 2, 2), {"num_blocks": 2}, "num_blocks=2 is fewer than the 3 devices"),
    "a boundary missing": ((0, 0, 1, 2), {"boundaries": (2,)}, r"boundaries=\[2\] leave out \[3\]"),
    "by cost": ((0, 0, 1, 1), {"balance": "cost"}, "balance='cost' and a device map"),
    "offloaded": ((0, 0, 1, "cpu"), {}, "keeps bert.encoder.layer.3, classifier in main memory or on disk"),
    "on disk": (("cpu", "cpu", "cpu", "disk"), {}, "in main memory or on disk"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_name(case, monkeypatch):
    monkeypatch.setattr(layout, "accelerators", lambda: [device(0)])
    places, config, message = REFUSED[case]
    with pytest.raises(UnsupportedSettingError, match=message):
        found(bert(*places), **config)


def test_a_layer_on_two_devices_is_refused():
    model = bert(0, 0, 1, 1, **{"bert.encoder.layer.1.output": 1})
    with pytest.raises(UnsupportedSettingError, match="puts bert.encoder.layer.1 on cuda:0, cuda:1"):
        found(model)


def test_more_blocks_than_layers_are_refused():
    with pytest.raises(CutError, match="Cannot cut 4 layers into 5 blocks"):
        found(bert(0, 0, 1, 1), num_blocks=5)


def test_quantised_weights_are_refused(three):
    model = bert()
    model.quantization_method = "bitsandbytes"
    with pytest.raises(UnsupportedSettingError, match="its weights are quantised"):
        found(model, placement="devices")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_blocks": 1}, "placement='devices' and num_blocks=1 exclude each other"),
        ({"num_blocks": 2, "block_parallel_size": 2}, "placement='devices' and block_parallel_size=2 exclude"),
        ({"overlap": 1}, "placement='devices' and overlap=1 exclude each other"),
        ({"polish": 0.1}, "placement='devices' and polish=0.1 exclude each other"),
        ({"global_every": 2}, "placement='devices' and global_every=2 exclude each other"),
        ({"feedback": "chained"}, "placement='devices' and feedback='chained' exclude each other"),
        ({"tied_weights": "add"}, "placement='devices' and tied_weights='add' exclude each other"),
        ({"denoising": 0.5}, "placement='devices' and denoising=0.5 exclude each other"),
    ],
)
def test_settings_that_would_let_blocks_wait_for_each_other_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        BlockLocalConfig(placement="devices", **config)


def test_a_device_map_makes_the_same_settings_impossible():
    with pytest.raises(ConfigError, match="overlap=1 exclude each other"):
        found(bert(0, 0, 1, 1), overlap=1)


def test_a_configuration_knows_whether_it_leaves_the_cut_open():
    assert BlockLocalConfig().leaves_cut_open
    assert BlockLocalConfig().num_blocks == 2
    assert not BlockLocalConfig(num_blocks=2).leaves_cut_open
    assert not BlockLocalConfig(boundaries=(1,)).leaves_cut_open
