"""Every shipped configuration can be read, by the code that reads it in earnest."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_blocklocal import BlockLocalConfig


ROOT = Path(__file__).parents[1]
TRAIN = sorted((ROOT / "configs" / "train").glob("*.yaml"))
LAUNCH = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def script(name):
    path = ROOT / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:  # a script finds the files beside it
        sys.path.insert(0, str(path.parent))
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def test_there_are_configurations():
    assert TRAIN
    assert {path.stem for path in LAUNCH} == {"cpu_2", "gpus_2", "gpus_4", "gpus_8", "nodes_2"}


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.stem)
def test_a_launch_configuration_is_read_by_accelerate(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type == "MULTI_GPU"
    assert config.num_processes == {"cpu_2": 2, "gpus_2": 2, "gpus_4": 4, "gpus_8": 8, "nodes_2": 8}[path.stem]
    assert config.num_machines == (2 if path.stem == "nodes_2" else 1)
    assert f"`accelerate/{path.name}`" in (ROOT / "configs" / "README.md").read_text()


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_a_training_configuration_is_read_whole(path, tmp_path):
    run = script("train").read_run(path)
    assert BlockLocalConfig.from_dict(run.block_local).num_blocks > 1
    arguments = Seq2SeqTrainingArguments if "predict_with_generate" in run.training else TrainingArguments
    assert arguments(**(run.training | {"output_dir": str(tmp_path)})).learning_rate > 0


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_every_configuration_is_listed_with_its_command(path):
    assert f"`train/{path.name}`" in (ROOT / "configs" / "README.md").read_text()


def test_unknown_and_missing_keys_are_named(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: a\ndataset: b\nmodle: c\n")
    with pytest.raises(ValueError, match=r"unknown keys \['modle'\]"):
        script("train").read_run(file)
    file.write_text("model: a\n")
    with pytest.raises(ValueError, match="lacks \\['dataset'\\]"):
        script("train").read_run(file)


def test_values_can_be_overridden_on_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: a\ndataset: b\n")
    run = script("train").read_run(file, ["block_local.num_blocks=5", "max_length=7", "training.learning_rate=1.0e-3"])
    assert (run.block_local["num_blocks"], run.max_length, run.training["learning_rate"]) == (5, 7, 1e-3)
    with pytest.raises(ValueError, match="is no override"):
        script("train").read_run(file, ["nonsense"])
