"""Plan which device gets which layers of a model, before anything is loaded: nothing but its configuration is read.

A folder or config.json:  hf-blocklocal plan path/to/model --num-blocks 4 --device-memory 24GiB
A type of model:          hf-blocklocal plan llama --task causal-lm --set num_hidden_layers=16 --num-blocks 4
Time of a step as well:   hf-blocklocal plan llama --task causal-lm --num-blocks 4 --device-speed 150
Two devices to a block:   hf-blocklocal plan llama --task causal-lm --num-blocks 4 --replicas 2 --block-local \
                              shard_replicas=true

The table has a row for each rank: its layers, the parameters that it trains, its share of all operations, how busy it
is while the slowest works, bytes of weights, gradients, optimizer state, saved activations of the block and of its
head, copies of borrowed layers and waiting boundary tensors; then what it sends up and down per step. Temporaries
and the waste of an allocator are not in it: --reserve keeps room for them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from typing import Any


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# Bytes of state per byte of weights, of those optimizers of the Trainer whose state has the type of the weights.
STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1, "lion_32bit": 1, "sgd": 0}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure on fake tensors, place, print the table and the line that launches it."""
    options = parse(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    from hf_blocklocal.errors import BlockLocalError

    transformers.logging.set_verbosity_error()
    try:
        print(plan(options))
    except BlockLocalError as error:
        raise SystemExit(f"hf-blocklocal plan: {error}") from None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "hf-blocklocal plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder with a config.json, such a file, or a model type such as llama")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the model's config")
    parser.add_argument("--num-blocks", type=int, required=True, help="blocks, one per device")
    parser.add_argument(
        "--replicas", type=int, default=1, help="chains of all blocks: with K blocks, K times as many devices"
    )
    parser.add_argument("--boundaries", type=int, nargs="+", help="first layer of every block but the first")
    parser.add_argument("--device-memory", type=size, nargs="+", help="such as 24GiB; one, or one for each device")
    parser.add_argument("--device-speed", type=float, nargs="+", help="TFLOP/s that it really does; one, or each")
    parser.add_argument("--reserve", type=float, default=0.1, help="share of the memory to keep free (default 0.1)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples on a device at a time (default 8)")
    parser.add_argument(
        "--sequence-length", type=int, help="tokens in a sample (default: 512, or as many as the model takes)"
    )
    parser.add_argument("--task", help="such as causal-lm; default: what the config's architectures say")
    parser.add_argument(
        "--precision",
        choices=["float32", "bf16", "bfloat16"],
        default="float32",
        help="bf16 is mixed, as Trainer(bf16=True); bfloat16 has weights and states in it too",
    )
    parser.add_argument("--optim", choices=sorted(STATES), default="adamw_torch", help="as in TrainingArguments")
    parser.add_argument("--in-flight", type=int, default=4, help="boundary tensors that wait on either side")
    parser.add_argument("--distinct-targets", type=int, help="distinct tokens in a batch (default: all of them)")
    parser.add_argument("--block-local", nargs="+", default=[], metavar="FIELD=VALUE", help="BlockLocalConfig fields")
    parser.add_argument("--with-weights", action="store_true", help="build the model for real, on the CPU")
    options = parser.parse_args(argv)
    for name in ("device_memory", "device_speed"):
        given = getattr(options, name) or [None]
        if len(given) not in (1, options.num_blocks):
            parser.error(f"--{name.replace('_', '-')} takes one value or {options.num_blocks}, got {len(given)}")
        setattr(options, name, given * options.num_blocks if len(given) == 1 else given)
    if options.boundaries and len(options.boundaries) != options.num_blocks - 1:
        parser.error(f"--boundaries takes {options.num_blocks - 1} for {options.num_blocks} blocks")
    if options.replicas < 1:
        parser.error("--replicas is a number of at least 1")
    if not 0 <= options.reserve < 1:
        parser.error("--reserve is a share of at least 0 and below 1")
    return options


def size(text: str) -> int:
    """Read a number of bytes with its unit."""
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write a number with one of {', '.join(UNITS)[2:]}")
    return int(float(match[1]) * UNITS[match[2]])


def values(words: Sequence[str]) -> dict[str, Any]:
    """Read `field=value` words; a value that is no JSON is a text."""
    read = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise SystemExit(f"hf-blocklocal plan: {word!r} is not FIELD=VALUE")
        try:
            read[name] = json.loads(value)
        except json.JSONDecodeError:
            read[name] = value
    return read


def plan(options: argparse.Namespace) -> str:
    """Return the table and what stands below it."""
    from hf_blocklocal.config.block_local import BlockLocalConfig
    from hf_blocklocal.config.defaults import default_refresh_lag
    from hf_blocklocal.planning.placement import Device, Upkeep, place

    fields = {"num_blocks": options.num_blocks, "block_parallel_size": options.num_blocks}
    config = BlockLocalConfig.from_dict(fields | values(options.block_local))
    devices = [
        Device(None if memory is None else int(memory * (1 - options.reserve)), 1.0 if speed is None else speed * 1e12)
        for memory, speed in zip(options.device_memory, options.device_speed, strict=True)
    ]
    costs, config, what = measure(options, config)
    upkeep = Upkeep(
        STATES[options.optim],
        options.in_flight,
        1 if config.head_refresh_steps is None else config.head_refresh_steps,
        config.head_refresh_lag or 0,
        shared_by=options.replicas if config.shard_replicas else 1,
    )
    placement = place(costs, devices, upkeep, options.boundaries)
    timed = options.device_speed[0] is not None
    lines = [what, "", placement.describe(timed=timed), ""]
    lines += [
        f"Lost to imbalance: {1 - placement.efficiency:.1%} (mean over slowest rank: {placement.efficiency:.3f})."
    ]
    if timed:
        rate = 1 / placement.seconds
        lines += [
            f"A step takes {1e3 * placement.seconds:.1f} ms, {rate * options.batch_size:.1f} samples per second."
        ]
    lag = default_refresh_lag(options.num_blocks)
    if any(rank.bytes_down for rank in placement.ranks) and upkeep.refresh_lag < lag:
        lines += [
            "Heads use weights of other ranks. So that none waits for them, copy them every S steps with a lag of "
            f"at least {lag}: --block-local head_refresh_steps=S head_refresh_lag=..."
        ]
    fields |= {"boundaries": list(placement.boundaries)} | values(options.block_local)
    arguments = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    return "\n".join(
        [
            *lines,
            "",
            f"accelerate launch --num_processes {options.replicas * options.num_blocks} your_script.py",
            f"    block_local=BlockLocalConfig({arguments})",
        ]
    )


def measure(options: argparse.Namespace, config: Any) -> tuple[Any, Any, str]:
    """Return the costs of the parts of the model, the config with nothing left open, and what has been measured."""
    from contextlib import nullcontext

    import torch

    from hf_blocklocal.config.defaults import settled
    from hf_blocklocal.planning.blueprint import (
        Shape,
        build_inputs,
        build_model,
        loss_traits,
        read_config,
        task_of,
        without_memory,
    )
    from hf_blocklocal.planning.measuring import Setting, measure_costs

    model_config = read_config(options.model, values(options.set))
    task = options.task or task_of(model_config)
    config = settled(config, single_stack=not model_config.is_encoder_decoder)
    length = sequence_length(options, model_config, task)
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    with nullcontext() if options.with_weights else without_memory():
        model = build_model(model_config, task, dtype=dtype, with_weights=options.with_weights)
        setting = Setting(
            build_inputs(model_config, task, Shape(options.batch_size, length)),
            distinct=options.distinct_targets,
            autocast=torch.bfloat16 if options.precision == "bf16" else None,
            loss_traits=loss_traits(task),
        )
        costs = measure_costs(model, config, setting)
    parameters = sum(weight.parameters for weight in costs.weights.values())
    shape = "" if task == "image-classification" else f" x {length}"
    what = f"{type(model).__name__}, {len(costs.layers)} layers, {parameters:,} parameters; batches of "
    return (
        costs,
        config,
        what + f"{options.batch_size}{shape}, {options.precision}, {options.optim}.",
    )


def sequence_length(options: argparse.Namespace, model_config: Any, task: str) -> int:
    """Return the tokens of a sample, no more than a model of sounds can write down."""
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    limits = [limit for name in names if isinstance(limit := getattr(model_config, name, None), int)]
    if options.sequence_length is None:
        return min([512, *limits])
    if task == "speech-seq2seq" and options.sequence_length > min(limits, default=options.sequence_length):
        raise SystemExit(
            f"hf-blocklocal plan: {model_config.model_type} writes down at most {min(limits)} tokens, and "
            f"--sequence-length is {options.sequence_length}. Leave it out, or give fewer."
        )
    return options.sequence_length
