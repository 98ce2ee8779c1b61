"""Fine-tune a model block by block on one of several tasks, as a YAML file says, beside the plain Trainer if asked.

One process:   python scripts/train.py configs/train/quickstart.yaml
Other tasks:   python scripts/train.py configs/train/question_answering.yaml      (table in configs/README.md)
Two GPUs:      accelerate launch --num_processes 2 scripts/train.py configs/train/quickstart.yaml
Other values:  python scripts/train.py configs/train/quickstart.yaml block_local.num_blocks=2 training.seed=1
With a look at gradients, probes and drift of every block each 10 steps, for hf-blocklocal plot:
               python scripts/train.py configs/train/quickstart.yaml diagnostics=10
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes import Outcome, Run, Source, read_run


if TYPE_CHECKING:
    from tasks import Kit, Prepared
    from transformers import Trainer

    from hf_blocklocal import BlockLocalConfig
    from hf_blocklocal.card import CardFacts


def train(run: Run, block_local: BlockLocalConfig | None, source: Source | None = None) -> tuple[Outcome, Trainer]:
    """Train once from the same weights: block by block, or plainly where `block_local` is None.

    Args:
        run: What to train on what.
        block_local: How to cut and teach the model.
        source: Where that was written, for the model card.
    """
    from sizes import measure_sizes
    from tasks import kit_of
    from transformers import set_seed

    kit = kit_of(run.task, run.options)
    arguments = make_arguments(run, kit, baseline=block_local is None)
    set_seed(arguments.seed)
    trainer = make_trainer(kit, kit.prepare(run), arguments, block_local)
    if block_local is not None:
        add_card(trainer, run, source)
        if run.diagnostics is not None:
            add_diagnostics(trainer, every=run.diagnostics)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = evaluate(trainer, kit)
    trainer.save_state()
    unpushed = save(trainer)
    name = "plain Trainer" if block_local is None else f"block-local, {block_local.num_blocks} blocks"
    if block_local is not None and block_local.head_layers:
        name += f", head_layers={block_local.head_layers}"
    measured = run.task == "text-classification" and kit.metric == "accuracy" and trainer.is_world_process_zero()
    sizes = measure_sizes(trainer, run.threshold) if measured else []
    return Outcome(name, metrics, seconds, peak_activation_bytes(trainer), unpushed, sizes, kit.metric), trainer


def make_arguments(run: Run, kit: Kit, *, baseline: bool) -> Any:
    """Return the training arguments of a run; the plain Trainer's run lies in a folder inside, and is not pushed."""
    from transformers import Seq2SeqTrainingArguments, TrainingArguments

    settings = dict(run.training)
    if baseline:
        settings |= {"output_dir": str(Path(settings["output_dir"]) / "baseline"), "push_to_hub": False}
    return (Seq2SeqTrainingArguments if kit.generates else TrainingArguments)(**settings)


def make_trainer(kit: Kit, prepared: Prepared, arguments: Any, block_local: BlockLocalConfig | None) -> Trainer:
    """Return the trainer of a task: one of ours, or that of transformers where `block_local` is None."""
    from transformers import Seq2SeqTrainer, Trainer

    from hf_blocklocal import BlockLocalSeq2SeqTrainer, BlockLocalTrainer

    plain, ours = (Seq2SeqTrainer, BlockLocalSeq2SeqTrainer) if kit.generates else (Trainer, BlockLocalTrainer)
    common = {
        "model": prepared.model,
        "args": arguments,
        "train_dataset": prepared.train,
        "eval_dataset": prepared.test,
        "processing_class": prepared.processor,
        "data_collator": prepared.collator,
        "compute_metrics": prepared.compute_metrics,
        **prepared.options,
    }
    return plain(**common) if block_local is None else ours(**common, block_local=block_local)


def evaluate(trainer: Trainer, kit: Kit) -> dict[str, float]:
    """Return the metrics of the test examples; of a language model, with the perplexity."""
    from hf_blocklocal.metrics import with_perplexity

    metrics = trainer.evaluate()
    return with_perplexity(metrics) if kit.metric == "perplexity" else metrics


def save(trainer: Trainer) -> str | None:
    """Save the model, and with `push_to_hub` push it; returns why that failed, for the end."""
    from hf_blocklocal.errors import PushError

    try:
        trainer.save_model()
    except PushError as error:
        return str(error)
    return None


def add_card(trainer: Trainer, run: Run, source: Source | None) -> None:
    """Tell the model card what the run cannot know."""
    from hf_blocklocal.callbacks import ModelCardCallback

    example = run.examples[0] if run.examples else None
    origin = {} if source is None else asdict(source)
    trainer.add_callback(ModelCardCallback(trainer, example=example, **(origin | run.card)))


def add_diagnostics(trainer: Trainer, *, every: int) -> None:
    """Look at every block as training goes on; the numbers go to the logs and to `trainer_state.json`.

    With a block per process only drift is to be seen: the other looks run the whole model, which no process has.
    """
    from hf_blocklocal.callbacks import DriftCallback, GradientAlignmentCallback, LinearProbeCallback

    apart = trainer.block_local.block_parallel_size > 1
    for kind in (DriftCallback,) if apart else (GradientAlignmentCallback, LinearProbeCallback, DriftCallback):
        trainer.add_callback(kind(trainer, every=every))


def peak_activation_bytes(trainer: Trainer) -> int:
    """Measure the bytes that autograd keeps for one training step on the longest examples, at their peak."""
    from hf_blocklocal.records.memory import ActivationMeter

    longest = next(name for name in ("input_ids", "input_values", "pixel_values") if name in trainer.train_dataset[0])
    rows = sorted(trainer.train_dataset, key=lambda row: len(row[longest]), reverse=True)
    batch = trainer.data_collator(rows[: trainer.args.per_device_train_batch_size])
    trainer.accelerator.gradient_state._set_sync_gradients(False)
    with ActivationMeter(trainer.model_wrapped) as meter:
        trainer.training_step(trainer.model_wrapped, batch)
    trainer.model_wrapped.zero_grad()
    return meter.peak_bytes


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, classify the examples, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, see configs/train")
    parser.add_argument("overrides", nargs="*", help="key=value or section.key=value")
    options = parser.parse_args(argv)
    run = read_run(options.config, options.overrides)

    from hf_blocklocal import BlockLocalConfig
    from hf_blocklocal.card import write_card

    command = " ".join(["python scripts/train.py", options.config, *options.overrides])
    outcome, trainer = train(
        run, BlockLocalConfig.from_dict(run.block_local), Source(config=options.config, command=command)
    )
    folder, cut, accelerator = trainer.args.output_dir, trainer.assembly.describe(), trainer.accelerator
    outcomes, facts = [outcome], trainer.model_card.facts()
    if run.baseline:
        accelerator.free_memory()
        del trainer
        gc.collect()
        outcomes.append(train(run, None)[0])
    unpushed = outcome.unpushed
    if accelerator.is_main_process:
        pictures = draw_pictures(folder)
        write_card(with_outcomes(facts, outcomes, folder), folder, template=run.card.get("template"))
        if run.baseline and unpushed is None and run.training.get("push_to_hub"):
            unpushed = push_again(run, folder, facts.location)
        show(run, cut, outcomes, folder)
        print(pictures)
    accelerator.end_training()
    if unpushed is not None:
        raise SystemExit(f"train.py: {unpushed}")


def push_again(run: Run, folder: str, repo: str) -> str | None:
    """Push the card that knows the baseline, and the figures; returns why that failed, for the end."""
    from hf_blocklocal.errors import PushError
    from hf_blocklocal.hub import Destination, push_run

    destination = Destination(repo, run.training.get("hub_token"), revision=run.training.get("hub_revision"))
    try:
        push_run(folder, destination, message="The baseline beside it")
    except PushError as error:
        return str(error)
    return None


def with_outcomes(facts: CardFacts, outcomes: Sequence[Outcome], folder: str) -> CardFacts:
    """Add to what a card says what was measured here: time, peak activations, and the plain Trainer's run."""
    from hf_blocklocal.card import baseline_of

    ours, *others = outcomes
    measured = replace(facts.result, seconds=ours.seconds, peak_bytes=ours.peak_bytes)
    baseline = None
    for other in others:
        found = baseline_of(Path(folder) / "baseline")
        baseline = replace(found, name=other.name, seconds=other.seconds, peak_bytes=other.peak_bytes)
    return replace(facts, result=measured, baseline=baseline)


def draw_pictures(folder: str) -> str:
    """Draw the curves of every block, and say where they are, or what it takes to have them."""
    from hf_blocklocal.errors import MissingExtraError
    from hf_blocklocal.plots import draw_run

    try:
        paths = draw_run(folder)
    except MissingExtraError as error:
        return f"No curves were drawn. {error}, then: hf-blocklocal plot {folder}"
    return "\n".join(["Curves of every block, from history.jsonl:", *(f"  {path.as_posix()}" for path in paths)])


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {"Python": platform.python_version()} | {name: metadata.version(name) for name in ("torch", "transformers")}


def show(run: Run, cut: str, outcomes: Sequence[Outcome], folder: str) -> None:
    """Print the table and what the saved model makes of the examples; leave the numbers in `result.json`."""
    from reporting import report

    result = {
        "run": asdict(run),
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "versions": versions(),
        "cores": os.cpu_count(),
    }
    (Path(folder) / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nThe cut\n{cut}\n\nThe result\n{report(outcomes)}\n")
    if run.examples:
        show_examples(run, folder)
    print(f"\nSaved in {folder}: an ordinary transformers checkpoint, its card in README.md, and the heads beside it.")
    if outcomes[0].sizes:
        print(f"Its first blocks as models of their own: python scripts/truncate.py {folder} --output {folder}/sizes")


def show_examples(run: Run, folder: str) -> None:
    """Print what the saved model makes of the examples, by the pipeline of its task."""
    from tasks import kit_of
    from transformers import pipeline

    kind = kit_of(run.task, run.options).pipeline
    if kind is None:
        raise SystemExit(f"train.py: transformers has no pipeline for the task {run.task!r}. Leave the examples out.")
    answer = pipeline(kind, model=folder)
    for example in run.examples:
        guess = answer(example)[0]
        label = guess.get("label") or guess.get("generated_text") or guess.get("token_str")
        print(f"{label} ({guess['score']:.2f}): {example}" if "score" in guess else label)


if __name__ == "__main__":
    main()
