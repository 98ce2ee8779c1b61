"""Measure what the first blocks of a language model are worth as the draft of transformers' assisted generation.

One process:  OMP_NUM_THREADS=1 python scripts/benchmarks/assisted_generation.py
Quickly:      OMP_NUM_THREADS=1 python scripts/benchmarks/assisted_generation.py --steps 40 --prompts 2 --rounds 1

The language model of the learning table is fine-tuned in four blocks. Its first blocks, with what their heads borrow,
are ordinary models that draft some tokens; the whole model accepts those that it would have chosen itself. So the text
is that of greedy decoding, which is checked. Beside them: the same model stopped after as many layers, as
`generate(assistant_early_exit=...)` has it. The table holds the time against greedy decoding in the same round.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import HERE, parse, parser, prepare, print_table, write_report


HEADER = ["draft", "layers", "tokens per pass of the whole model", "speed-up", "the same text"]


def main(argv: Sequence[str] | None = None) -> None:
    """Train, generate with each draft, print the table."""
    arguments = parser("What first blocks are worth as drafts of assisted generation.")
    arguments.add_argument("--steps", type=int, default=300, help="Steps of block-local training.")
    arguments.add_argument("--prompts", type=int, default=8, help="Texts to continue.")
    arguments.add_argument("--tokens", type=int, default=64, help="Tokens to add to each.")
    arguments.add_argument("--drafted", type=int, default=4, help="Tokens that are drafted at a time.")
    arguments.add_argument("--rounds", type=int, default=5, help="Paired rounds.")
    arguments.add_argument("--prepared", type=Path, help="Folder of the prepared task; made anew without.")
    options = parse(arguments, argv)
    device = prepare(options)
    model, assembly, prompts = trained(options, device)
    rows = measured(model, assembly, prompts, options)
    print_table(HEADER, [cells(row) for row in rows], left=1)
    results = {"results": rows, "layers": len(assembly.cut.layers)}
    print(f"\nWritten to {write_report('assisted_generation', device, options, results)}")


def trained(options: Any, device: str) -> tuple[Any, Any, list[Any]]:
    """Return the language model, trained in four blocks, with its cut; and the starts of texts it has not seen."""
    sys.path.insert(0, str(HERE))
    import torch
    from learning_tasks.base import load_data
    from learning_tasks.language_model import LanguageModel
    from learning_tasks.pretraining import silent_arguments
    from transformers import PrinterCallback

    from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer

    task = LanguageModel()
    folder = options.prepared or task.prepare(HERE.parents[1] / "runs" / "learning" / "cache")
    data, model = load_data(folder), task.model(folder, seed=0).to(device)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = silent_arguments(scratch, max_steps=options.steps, learning_rate=6e-3, warmup_steps=0.1, seed=0)
        trainer = BlockLocalTrainer(
            model,
            arguments,
            train_dataset=data.train,
            data_collator=task.collate,
            block_local=BlockLocalConfig(num_blocks=4, head_layers=1),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        assembly = trainer.assembly
    model.eval()
    model.config.use_cache = model.generation_config.use_cache = True
    starts = [torch.tensor([row["input_ids"][:32]], device=device) for row in data.validation[: options.prompts]]
    return model, assembly, starts


def measured(model: Any, assembly: Any, prompts: Sequence[Any], options: Any) -> list[dict[str, Any]]:
    """Time every draft against greedy decoding, round by round."""
    import torch

    from hf_blocklocal import truncate

    drafts: list[tuple[str, int, dict[str, Any]]] = []
    for blocks in (1, 2):
        small = truncate(assembly, blocks)
        small.config.use_cache = small.generation_config.use_cache = True
        small.generation_config.num_assistant_tokens = options.drafted
        small.generation_config.num_assistant_tokens_schedule = "constant"
        layers = small.config.num_hidden_layers
        drafts.append((f"first {blocks} of 4 blocks, 1 borrowed layer", layers, {"assistant_model": small}))
        drafts.append((f"assistant_early_exit={layers}", layers, {"assistant_early_exit": layers}))
    model.generation_config.num_assistant_tokens = options.drafted
    model.generation_config.num_assistant_tokens_schedule = "constant"
    rows = []
    for name, layers, how in drafts:
        ratios, same, passes = [], True, 0
        for number in range(options.rounds + 1):  # the first to warm up
            alone, seconds, _ = generated(model, prompts, options.tokens, {})
            drafted, seconds_drafted, passes = generated(model, prompts, options.tokens, how)
            same = same and all(torch.equal(a, b) for a, b in zip(alone, drafted, strict=True))
            if number > 0:
                ratios.append(seconds / seconds_drafted)
        per_pass = len(prompts) * options.tokens / passes
        rows.append({"draft": name, "layers": layers, "tokens_per_pass": per_pass, "speed_ups": ratios, "same": same})
    return rows


def generated(model: Any, prompts: Sequence[Any], tokens: int, how: dict[str, Any]) -> tuple[list[Any], float, int]:
    """Continue all prompts. Returns the texts, the seconds, and the forward passes through all layers of the model."""
    import torch

    passes = []
    handle = model.model.layers[-1].register_forward_hook(lambda *_: passes.append(1))
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    start = time.perf_counter()
    texts = [model.generate(prompt, attention_mask=torch.ones_like(prompt), **options, **how) for prompt in prompts]
    seconds = time.perf_counter() - start
    handle.remove()
    return texts, seconds, len(passes)


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as text."""
    ratios = row["speed_ups"]
    spread = f"{median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
    return [row["draft"], str(row["layers"]), f"{row['tokens_per_pass']:.2f}", spread, "yes" if row["same"] else "NO"]


if __name__ == "__main__":
    main()
