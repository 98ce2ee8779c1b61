"""Training arguments that cannot work block-locally (yet), each refused by name before anything is run."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.errors import ConfigError, UnsupportedSettingError
from hf_blocklocal.targets.batch import Task


_SHARDING = {
    "deepspeed": "DeepSpeed",
    "fsdp": "FSDP",
    "parallelism_config": "a ParallelismConfig (tensor, context or sequence parallelism)",
}


def check_arguments(args: TrainingArguments) -> None:
    """Refuse training arguments that do not go together with blocks.

    Raises:
        UnsupportedSettingError: For the first such argument.
    """
    for name, what in _SHARDING.items():
        if getattr(args, name, None):
            raise UnsupportedSettingError(
                f"{name} is set, but {what} is not supported: it runs one backward pass through the whole model, and "
                "block-local learning has one per block. Unset it; data parallelism with accelerate launch works."
            )
    optim = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optim or "layerwise" in optim:
        raise UnsupportedSettingError(
            f"optim={optim!r} steps inside the backward pass, which here runs once per block. Use another optimizer, "
            "with step_per_block=True to keep the gradients of only one block."
        )
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if (getattr(args, name, None) or {}).get("use_reentrant"):
            raise UnsupportedSettingError(
                f"{name}={{'use_reentrant': True}} needs an input that requires gradient, and a block's input has "
                "none. Use {'use_reentrant': False}, which is the default."
            )


# Adapters that no cut can take apart, by the name of their kind in PEFT.
_COUPLED = {
    "ADALORA": "its regulariser, in the model's own loss, reaches the adapters of all layers",
    "VBLORA": "its adapters share one bank of vectors",
    "XLORA": "its gate runs the model twice and mixes the adapters of all layers",
}


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters that belong to no single block.

    Raises:
        UnsupportedSettingError: If one of the model's adapters adds tokens in front, or couples layers.
    """
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        if getattr(adapter, "is_prompt_learning", False):
            raise UnsupportedSettingError(
                f"The adapter {name!r} is {kind}, which puts learned vectors in front of the input of every layer: "
                "they would be taught by all blocks, and targets would no longer meet their positions. Use adapters "
                "inside the layers, such as LoRA, DoRA or IA3, or num_blocks=1."
            )
        if kind in _COUPLED:
            raise UnsupportedSettingError(
                f"The adapter {name!r} is {kind}, and {_COUPLED[kind]}, so that no block could learn alone. Use LoRA, "
                "DoRA or IA3, or num_blocks=1."
            )


def check_quantisation(model: nn.Module, config: BlockLocalConfig) -> None:
    """Refuse quantised weights where gradients would be lost, or where blocks are to be moved.

    Raises:
        UnsupportedSettingError: If the model is quantised and cannot be trained so here.
    """
    method = getattr(model, "quantization_method", None)
    if method is None:
        return
    kind = str(getattr(method, "value", method))
    if getattr(model, "is_loaded_in_4bit", False) and next(model.parameters()).device.type == "cpu":
        raise UnsupportedSettingError(
            f"The model is quantised to 4 bits ({kind}) and on a CPU, where the first evaluation packs the weights so "
            "that no gradient passes them any more. Load it with load_in_8bit=True, or on a GPU."
        )
    if config.block_parallel_size > 1:
        raise UnsupportedSettingError(
            f"The model is quantised ({kind}), and block_parallel_size={config.block_parallel_size} lets go of "
            "weights and gathers them by name, which packed weights do not stand. Train it in one "
            "process, or load it without quantization_config."
        )


def check_launcher(distributed_type: str) -> None:
    """Refuse what an argument, `accelerate config` or the environment may ask for.

    Raises:
        UnsupportedSettingError: If accelerate was started with something other than data parallelism.
    """
    kind = str(getattr(distributed_type, "value", distributed_type)).upper()
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise UnsupportedSettingError(
            f"accelerate was launched with {kind}, which is not supported: block-local learning runs a backward pass "
            "per block. Launch with plain multi-GPU data parallelism."
        )


def check_block_parallel(args: TrainingArguments, config: BlockLocalConfig) -> None:
    """Refuse what cannot work where every block has a process of its own.

    Raises:
        UnsupportedSettingError: For the first such argument.
    """
    size = f"block_parallel_size={config.block_parallel_size}"
    refused = {
        "auto_find_batch_size": (bool(args.auto_find_batch_size), "one process would try again while others wait"),
        "group_by_length": (
            bool(getattr(args, "group_by_length", False))
            or str(getattr(args, "train_sampling_strategy", "")).endswith(("group_by_length", "batch_rebalance")),
            "its sampler draws differently in every process",
        ),
        "include_num_input_tokens_seen": (
            str(args.include_num_input_tokens_seen).lower() not in ("false", "no"),
            "it counts over all processes at every step, which none could then run ahead of",
        ),
        "save_on_each_node": (bool(args.save_on_each_node), "only the first process is given what is to be saved"),
        "eval_use_gather_object": (bool(args.eval_use_gather_object), "predictions are gathered as tensors"),
        "fp16_full_eval": (bool(args.fp16_full_eval), "it moves the whole model, of which most is elsewhere"),
        "bf16_full_eval": (bool(args.bf16_full_eval), "it moves the whole model, of which most is elsewhere"),
    }
    for name, (given, reason) in refused.items():
        if given:
            raise UnsupportedSettingError(f"{name} and {size} exclude each other: {reason}. Leave one of the two out.")
    for name in ("torch_compile", "predict_with_generate"):
        if config.shard_replicas and getattr(args, name, False):
            raise UnsupportedSettingError(
                f"{name} and shard_replicas=True exclude each other: layers are brought together in forward passes as "
                "they are, of which all processes with a block run the same number. Leave one of the two out; "
                "trainer.whole_model() can generate."
            )
    if args.accelerator_config is not None and not args.accelerator_config.use_seedable_sampler:
        raise UnsupportedSettingError(
            f"accelerator_config={{'use_seedable_sampler': False}} and {size} exclude each other: processes of one "
            "chain would read different batches. Leave it at True."
        )


def check_outputs_of_all_layers(model: nn.Module, apart: str = "block_parallel_size above 1") -> None:
    """Refuse models whose loss or predictions are made of what all layers return, which is nowhere together.

    Args:
        model: The model.
        apart: What puts its blocks in different places.

    Raises:
        UnsupportedSettingError: If the model's config asks for it.
    """
    names = ("output_router_logits", "output_hidden_states", "output_attentions", "use_weighted_layer_sum")
    for name in names:
        if getattr(getattr(model, "config", None), name, False):
            raise UnsupportedSettingError(
                f"model.config.{name}=True and {apart} exclude each other: it takes what all layers return, which is "
                "nowhere together, where each block has a process or a device of its own. Set it to False, or train "
                "in one process on one device."
            )


def check_model_given(given: bool, apart: str = "block_parallel_size above 1") -> None:
    """Refuse a model that is made anew for every run, where its blocks have been put in different places.

    Args:
        given: Whether there is a model, and no `model_init`.
        apart: What puts its blocks there.

    Raises:
        UnsupportedSettingError: If there is a `model_init`, as hyperparameter search needs.
    """
    if not given:
        raise UnsupportedSettingError(
            f"model_init, and hyperparameter search with it, cannot be used with {apart}: the blocks of the model "
            "that is given are put in their places once. Pass model=..., and search in one process on one device."
        )


def check_optimizer_not_given(given: bool) -> None:
    """Refuse an optimizer that a user has made, where it would hold weights of other processes.

    Raises:
        UnsupportedSettingError: If there is one.
    """
    if given:
        raise UnsupportedSettingError(
            "With block_parallel_size above 1, an optimizer that holds all parameters cannot be given: this process "
            "has those of one block. Name it by optim, or pass optimizer_cls_and_kwargs."
        )


def check_can_be_told_to_end(processes: int) -> None:
    """Refuse to save at a signal where processes would stop at different steps.

    Raises:
        UnsupportedSettingError: If several processes have all blocks each.
    """
    if processes > 1:
        raise UnsupportedSettingError(
            f"save_on_exit=True and {processes} processes that have all blocks each exclude each other: told to end, "
            "each would stop at a step of its own. Leave it out, or give every block a process (block_parallel_size)."
        )


def checked_config(given: Any) -> BlockLocalConfig:
    """Return the configuration that a trainer was given, or the default one.

    Raises:
        ConfigError: If it is something else.
    """
    if given is None:
        return BlockLocalConfig()
    if not isinstance(given, BlockLocalConfig):
        raise ConfigError(
            f"block_local takes a BlockLocalConfig and was given a {type(given).__name__}: {given!r}. Write "
            "block_local=BlockLocalConfig(num_blocks=3); BlockLocalConfig.from_dict makes one of plain values."
        )
    return given


def check_placement(model: nn.Module, *, model_parallel: bool) -> None:
    """Refuse models that lie where nothing can follow.

    Args:
        model: The model.
        model_parallel: Whether it lies elsewhere than on the device of this process, and no layout says where.

    Raises:
        UnsupportedSettingError: If the model was loaded tensor parallel, or onto another device.
    """
    if model_parallel or (getattr(model, "tp_size", None) or 1) > 1:
        raise UnsupportedSettingError(
            f"{type(model).__name__} lies on another device than this process computes on, or every layer on several "
            "(tp_plan), which is not supported. Load it on one device, or layer by layer on several "
            "(device_map='balanced'); data parallelism with accelerate launch works."
        )


def check_has_values(model: nn.Module) -> None:
    """Refuse models whose weights are gone.

    Raises:
        UnsupportedSettingError: If a parameter holds no values.
    """
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise UnsupportedSettingError(
            f"{len(missing)} parameters of {type(model).__name__}, such as {missing[0]}, hold no values (device "
            "meta). A trainer with a block per process has let go of those of other blocks: load the model anew for "
            "another trainer, or go on with the first one."
        )


def check_spread(args: TrainingArguments) -> None:
    """Refuse what cannot work where the blocks of one process lie on several devices.

    Raises:
        UnsupportedSettingError: For the first such argument.
    """
    refused = {
        "fp16_full_eval": (args.fp16_full_eval, "it moves the model to one device"),
        "bf16_full_eval": (args.bf16_full_eval, "it moves the model to one device"),
    }
    for name, (given, reason) in refused.items():
        if given:
            raise UnsupportedSettingError(
                f"{name} and blocks on several devices exclude each other: {reason}. Leave it out, or use one device."
            )


def check_loss_settings(task: Task, config: BlockLocalConfig, *, label_smoothing: float, custom_loss: bool) -> None:
    """Refuse changes to the model's own loss that the heads cannot follow.

    Raises:
        UnsupportedSettingError: For label smoothing of targets that are not classes, and for a `compute_loss_func`
            with a target per position, a margin or a loss of the whole batch.
    """
    if custom_loss and config.sim > 0:
        raise UnsupportedSettingError(
            f"sim={config.sim} is a part of the loss of a head, and compute_loss_func replaces that loss. Leave one "
            "of the two out."
        )
    if custom_loss and config.feedback == "prototype":
        raise UnsupportedSettingError(
            "feedback='prototype' learns from the loss of a head, and compute_loss_func replaces that loss. Leave one "
            "of the two out."
        )
    if custom_loss and config.satisfied_at is not None:
        raise UnsupportedSettingError(
            f"satisfied_at={config.satisfied_at} masks targets one by one, and compute_loss_func gives one loss "
            "for all of them. Leave one of the two out."
        )
    if config.chunked_loss is not None and (label_smoothing or custom_loss):
        other = "label_smoothing_factor" if label_smoothing else "compute_loss_func"
        raise UnsupportedSettingError(
            f"chunked_loss={config.chunked_loss} and {other} exclude each other: the one never has all logits, which "
            "the other is given. Leave one of the two out."
        )
    if label_smoothing and task.target in ("regression", "multi_label", "spans"):
        raise UnsupportedSettingError(
            f"label_smoothing_factor={label_smoothing} has no meaning for {task.target} targets. Set it to 0."
        )
    if custom_loss and task.target == "spans":
        raise UnsupportedSettingError(
            "compute_loss_func cannot teach the blocks of a model that answers with a span: it is given no 'labels', "
            "and heads predict starts and ends one by one. Leave it out, or use num_blocks=1."
        )
    if custom_loss and task.per_position:
        raise UnsupportedSettingError(
            "compute_loss_func cannot teach the blocks of a model with a target per position: their heads predict "
            "only the positions that count, among sampled candidates. Leave it out, or use num_blocks=1."
        )
