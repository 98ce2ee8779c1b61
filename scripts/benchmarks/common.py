"""What the benchmarks share: options, models with random weights, real trainers, one table and one JSON file.

Nothing here measures anything. Heavy imports are inside the functions that need them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
CLASSES = 8
# Below these come the special tokens.
FIRST_WORD = 5


@dataclass(frozen=True)
class Size:
    """How large a model and its batches are.

    Attributes:
        layers: Transformer layers.
        width: Hidden width; heads are 64 wide.
        vocabulary: Tokens to choose from.
        batch: Samples in a batch.
        sequence: Tokens in a sample.
    """

    layers: int = 12
    width: int = 256
    vocabulary: int = 8192
    batch: int = 8
    sequence: int = 128


def parser(description: str, *, cpu_only: bool = False, **defaults: Size) -> argparse.ArgumentParser:
    """Start a parser with the options of every benchmark.

    Args:
        description: Purpose of the script.
        cpu_only: Whether it measures nothing else.
        **defaults: Default size by device, for scripts whose sizes can be chosen.
    """
    result = argparse.ArgumentParser(description=description)
    result.set_defaults(device="cpu" if cpu_only else None)
    if not cpu_only:
        result.add_argument("--device", choices=["cpu", "cuda"], help="Default: cuda where there is one.")
    result.add_argument("--threads", type=int, default=1, help="Threads on the CPU.")
    result.add_argument("--output", type=Path, help="JSON file. Default: results/<name>-<cpu|gpu>.json.")
    for field in fields(Size) if defaults else ():
        sizes = ", ".join(f"{getattr(size, field.name)} on {device}" for device, size in defaults.items())
        result.add_argument(f"--{field.name}", type=int, help=f"Default: {sizes}.")
    return result


def prepare(options: argparse.Namespace) -> str:
    """Set threads and verbosity. Returns the device."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def chosen_size(options: argparse.Namespace, default: Size) -> Size:
    """Return the default with what the command line says in its place."""
    given = {field.name: getattr(options, field.name) for field in fields(Size)}
    return replace(default, **{name: value for name, value in given.items() if value is not None})


def build_model(kind: str, size: Size, device: str = "cpu") -> Any:
    """Build a BERT-like classifier (`"encoder"`) or a Llama-like language model (`"decoder"`), always the same."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    shared = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 64,
        "max_position_embeddings": max(512, size.sequence),
    }
    torch.manual_seed(0)
    if kind == "encoder":
        config = AutoConfig.for_model("bert", **shared, intermediate_size=4 * size.width, num_labels=CLASSES)
        with torch.device(device):
            return AutoModelForSequenceClassification.from_config(config)
    # Three matrices in place of two: 8/3 of the width makes as many weights.
    inner = 8 * size.width // 3 // 64 * 64
    config = AutoConfig.for_model("llama", **shared, intermediate_size=inner, num_key_value_heads=size.width // 64)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


def draw_tokens(vocabulary: int, shape: tuple[int, ...], generator: Any) -> Any:
    """Draw random tokens about as frequent as words are (Zipf's law): a contrast has as many targets as in a text."""
    import torch

    weights = 1 / (torch.arange(vocabulary - FIRST_WORD) + 2.7)
    drawn = torch.multinomial(weights, math.prod(shape), replacement=True, generator=generator)
    return FIRST_WORD + drawn.reshape(shape)


def build_examples(kind: str, size: Size, count: int) -> list[dict[str, Any]]:
    """Make random samples of full length for a model of that kind."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        input_ids = draw_tokens(size.vocabulary, (size.sequence,), generator)
        labels = torch.tensor(index % CLASSES) if kind == "encoder" else input_ids
        rows.append({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels})
    return rows


def build_trainer(
    model: Any,
    examples: Sequence[Any],
    folder: str,
    *,
    device: str,
    block_local: Mapping[str, Any] | None,
    checkpointing: bool = False,
    **arguments: Any,
) -> Any:
    """Build a silent trainer; in bfloat16 on a GPU.

    Args:
        model: The model to train.
        examples: The data set.
        folder: Where a trainer may write.
        device: `"cpu"` or `"cuda"`.
        block_local: Fields of `BlockLocalConfig`, None for the plain `Trainer`.
        checkpointing: Whether layers recompute their activations in the backward pass.
        **arguments: Fields of `TrainingArguments`.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer

    names = ("activation_checkpointing", "gradient_checkpointing")
    known = next(name for name in names if hasattr(TrainingArguments, name))  # renamed within transformers 5
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    place = {"use_cpu": True} if device == "cpu" else {"bf16": True}
    settings = {**quiet, **place, known: checkpointing, **arguments}
    args = TrainingArguments(output_dir=folder, lr_scheduler_type="constant", **settings)
    if block_local is None:
        trainer = Trainer(model, args, train_dataset=examples)
    else:
        config = BlockLocalConfig(**block_local)
        trainer = BlockLocalTrainer(model, args, train_dataset=examples, block_local=config)
    trainer.remove_callback(PrinterCallback)
    return trainer


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> None:
    """Print rows of text under a header, the first `left` columns to the left and the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def report_path(name: str, device: str, options: argparse.Namespace) -> Path:
    """Return the file that the results of a script go to."""
    kind = "gpu" if device == "cuda" else "cpu"
    return options.output or HERE / "results" / f"{name}-{kind}.json"


def write_report(name: str, device: str, options: argparse.Namespace, results: Mapping[str, Any]) -> Path:
    """Write results with all that is needed to repeat them. Returns the file.

    Args:
        name: Name of the script.
        device: `"cpu"` or `"cuda"`.
        options: The parsed command line.
        results: What was measured.
    """
    path = report_path(name, device, options)
    report = {
        "benchmark": name,
        "command": " ".join(["python", f"scripts/benchmarks/{name}.py", *options.words]),
        "commit": _commit(),
        "machine": _machine(device, options.threads),
        "versions": _versions(),
        **results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, default=_plain) + "\n", encoding="utf-8")
    return path


def parse(arguments: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line, and keep its words for the report."""
    words = sys.argv[1:] if argv is None else list(argv)
    options = arguments.parse_args(words)
    options.words = words
    return options


def fitting_backend(device: str, processes: int) -> str | None:
    """Return by what processes can speak that may have to share a GPU; None for what accelerate takes."""
    import torch

    shared = device == "cuda" and torch.cuda.device_count() < processes
    return "gloo" if shared and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1" else None


def run_processes(
    script: str, words: Sequence[str], processes: int, environment: Mapping[str, str], *, device: str = "cpu"
) -> None:
    """Run a script in one process, or in several under `accelerate launch`.

    Args:
        script: The script.
        words: Its arguments.
        processes: How many processes.
        environment: What the environment holds beside that of this process.
        device: `"cpu"` or `"cuda"`.
    """
    command = [script, *words]
    if processes > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        launch = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no", "--main_process_port", str(port)]
        command = ["-m", "accelerate.commands.launch", *launch, *command]
    run_script(command, os.environ | ({"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}) | environment)


def run_script(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run Python with some arguments, and be silent about its warnings; if it fails, end with what it said last."""
    done = subprocess.run([sys.executable, *command], env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


def _plain(value: Any) -> Any:
    return asdict(value)


def _commit() -> str:
    """Return the commit that is checked out, marked if tracked files differ from it.

    Where only the files of a checkout are at hand, HF_BLOCKLOCAL_COMMIT in the environment says which one it is.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("HF_BLOCKLOCAL_COMMIT", "unknown, the files are no checkout")


def _machine(device: str, threads: int) -> dict[str, Any]:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "ram_gib": round(memory / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    return {"python": platform.python_version(), **packages}
