"""What cannot work block-locally is refused by name before anything is run."""

from __future__ import annotations

import pytest
from accelerate.utils import DistributedType
from torch import nn
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from zoo import SPECIMENS

from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.config.refusals import (
    check_arguments,
    check_block_parallel,
    check_launcher,
    check_loss_settings,
    check_outputs_of_all_layers,
    check_placement,
    check_spread,
)
from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.targets.batch import Task


CONFIG = BlockLocalConfig()
STEP_PER_BLOCK = BlockLocalConfig(step_per_block=True)


def arguments(tmp_path, **options):
    """Make arguments, and set behind their back what they would not take on this machine."""
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    for name, value in options.items():
        assert hasattr(args, name), f"TrainingArguments has no {name}"
        setattr(args, name, value)
    return args


def refusal(args, config=CONFIG):
    with pytest.raises(UnsupportedSettingError) as error:
        check_arguments(args)
    return str(error.value)


@pytest.mark.parametrize("config", [CONFIG, STEP_PER_BLOCK])
def test_ordinary_arguments_are_welcome(tmp_path, config):
    check_arguments(arguments(tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("deepspeed", "zero2.json", "DeepSpeed"),
        ("fsdp", "full_shard", "FSDP"),
        ("parallelism_config", object(), "a ParallelismConfig (tensor, context or sequence parallelism)"),
    ],
)
def test_sharding_is_refused(tmp_path, name, value, what):
    assert refusal(arguments(tmp_path, **{name: value})) == (
        f"{name} is set, but {what} is not supported: it runs one backward pass through the whole model, and "
        "block-local learning has one per block. Unset it; data parallelism with accelerate launch works."
    )


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimizers_that_step_inside_the_backward_pass_are_refused(tmp_path, optim):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, optim=optim)
    assert refusal(args).startswith(f"optim='{optim}' steps inside the backward pass, which here runs once per block.")


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "galore_adamw"])
def test_optimizers_that_step_after_the_backward_pass_are_welcome(tmp_path, optim):
    check_arguments(TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, optim=optim))


@pytest.mark.parametrize("kwargs", [None, {}, {"use_reentrant": False}])
def test_checkpointing_that_is_not_reentrant_is_welcome(tmp_path, kwargs):
    check_arguments(arguments(tmp_path, gradient_checkpointing_kwargs=kwargs))


def test_reentrant_checkpointing_is_refused(tmp_path):
    assert refusal(arguments(tmp_path, gradient_checkpointing_kwargs={"use_reentrant": True})) == (
        "gradient_checkpointing_kwargs={'use_reentrant': True} needs an input that requires gradient, and a block's "
        "input has none. Use {'use_reentrant': False}, which is the default."
    )


def test_reentrant_checkpointing_is_refused_by_its_other_name(tmp_path):
    args = arguments(tmp_path)
    args.activation_checkpointing_kwargs = {"use_reentrant": True}
    assert refusal(args).startswith("activation_checkpointing_kwargs={'use_reentrant': True}")


def test_models_that_lie_where_nothing_can_follow_are_refused():
    model = nn.Linear(1, 1)
    check_placement(model, model_parallel=False)
    with pytest.raises(UnsupportedSettingError, match="Linear lies on another device than this process computes on"):
        check_placement(model, model_parallel=True)
    model.tp_size = 2
    with pytest.raises(UnsupportedSettingError, match="every layer on several"):
        check_placement(model, model_parallel=False)


@pytest.mark.parametrize("name", ["fp16_full_eval", "bf16_full_eval"])
def test_what_moves_the_model_is_refused_on_several(tmp_path, name):
    check_spread(arguments(tmp_path, bf16=True))
    with pytest.raises(UnsupportedSettingError, match=f"{name} and blocks on several devices exclude each other"):
        check_spread(arguments(tmp_path, **{name: True}))


@pytest.mark.parametrize(
    "kind", [DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM, "fsdp"]
)
def test_a_launcher_that_shards_is_refused(kind):
    name = str(getattr(kind, "value", kind)).upper()
    with pytest.raises(UnsupportedSettingError, match=f"accelerate was launched with {name}, which is not supported"):
        check_launcher(kind)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU])
def test_a_launcher_that_does_not_shard_is_welcome(kind):
    check_launcher(kind)


def test_smoothing_has_no_meaning_for_numbers():
    check_loss_settings(Task("regression", 1), CONFIG, label_smoothing=0.0, custom_loss=False)
    check_loss_settings(Task("classes", 3), CONFIG, label_smoothing=0.1, custom_loss=False)
    with pytest.raises(UnsupportedSettingError) as error:
        check_loss_settings(Task("regression", 1), CONFIG, label_smoothing=0.1, custom_loss=False)
    assert str(error.value) == "label_smoothing_factor=0.1 has no meaning for regression targets. Set it to 0."


def test_smoothing_has_no_meaning_for_float_labels():
    with pytest.raises(UnsupportedSettingError):
        check_loss_settings(Task("multi_label", 3), CONFIG, label_smoothing=0.1, custom_loss=False)


def test_a_custom_loss_cannot_teach_positions():
    check_loss_settings(Task("classes", 3), CONFIG, label_smoothing=0.0, custom_loss=True)
    check_loss_settings(Task("vocabulary", 9, per_position=True), CONFIG, label_smoothing=0.0, custom_loss=False)
    for task in (Task("vocabulary", 9, per_position=True), Task("classes", 3, per_position=True)):
        with pytest.raises(
            UnsupportedSettingError, match="compute_loss_func cannot teach the blocks of a model with a"
        ):
            check_loss_settings(task, CONFIG, label_smoothing=0.0, custom_loss=True)


def test_a_custom_loss_cannot_teach_prototypes():
    config = BlockLocalConfig.from_preset("kappel2023")
    check_loss_settings(Task("classes", 3), config, label_smoothing=0.0, custom_loss=False)
    with pytest.raises(UnsupportedSettingError, match="feedback='prototype' learns from the loss of a head"):
        check_loss_settings(Task("classes", 3), config, label_smoothing=0.0, custom_loss=True)


def test_a_custom_loss_cannot_stand_in_for_a_loss_of_the_whole_batch():
    with pytest.raises(UnsupportedSettingError) as error:
        check_loss_settings(Task("classes", 3), BlockLocalConfig(sim=0.5), label_smoothing=0.0, custom_loss=True)
    assert str(error.value) == (
        "sim=0.5 is a part of the loss of a head, and compute_loss_func replaces that loss. Leave one of the two out."
    )


def test_a_model_that_gathers_over_all_layers_is_refused_where_a_process_has_one_block():
    model = SPECIMENS["mixtral"].build()
    with pytest.raises(UnsupportedSettingError, match="output_router_logits=True and block_parallel_size above 1"):
        check_outputs_of_all_layers(model)
    model.config.output_router_logits = False
    check_outputs_of_all_layers(model)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("auto_find_batch_size", True),
        ("train_sampling_strategy", "group_by_length"),
        ("include_num_input_tokens_seen", "all"),
        ("bf16_full_eval", True),
        ("fp16_full_eval", True),
        ("save_on_each_node", True),
        ("eval_use_gather_object", True),
    ],
)
def test_what_a_process_with_one_block_cannot_do_is_refused(option, value, tmp_path):
    config = BlockLocalConfig(num_blocks=2, block_parallel_size=2)
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    args.predict_with_generate = True
    check_block_parallel(args, config)
    setattr(args, option, value)
    named = "group_by_length" if option == "train_sampling_strategy" else option
    with pytest.raises(UnsupportedSettingError, match=f"^{named} and block_parallel_size=2 exclude each other"):
        check_block_parallel(args, config)


@pytest.mark.parametrize("option", ["torch_compile", "predict_with_generate"])
def test_what_layers_that_are_shared_out_cannot_do_is_refused(option, tmp_path):
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    setattr(args, option, True)
    check_block_parallel(args, BlockLocalConfig(num_blocks=2, block_parallel_size=2))
    with pytest.raises(UnsupportedSettingError, match=f"^{option} and shard_replicas=True exclude each other"):
        check_block_parallel(args, BlockLocalConfig(num_blocks=2, block_parallel_size=2, shard_replicas=True))
