"""Train specimens with one block per process, or all blocks in one, and leave what must be the same either way.

Usage: block_parallel.py OUTPUT_DIR CASES

CASES is JSON: for each case by name its `specimen`, `batch_size` per device, fields of `BlockLocalConfig` in `config`,
of `TrainingArguments` in `args`, and, as needed, `lora`, `dropout`, `resume` (a checkpoint), `odd` (a rank that reads
other batches), `raises`, `killed`, `stopped` and `silent` (rank and step, or batch of an evaluation if `evaluating`),
`generates` (a prompt), `frozen` (a part of the model), `normalised` (whether its classifier starts with a batch norm),
`noisy` (whether inputs are changed at random as they are read), `runs` (how often to train), `writes` (how to generate
in predictions, where evaluations are to generate too), `patience` (evaluations without a better one, then it ends),
`slow` (a rank, and seconds that each forward pass of an evaluation takes there), `unlabelled` (samples without label),
`scaled` (how losses are scaled), `overflows` (steps, and the part of the model where a gradient overflows in them),
`half` (whether to compute in fp16) and `drift` (steps from one look at it to the next).
CLOCK_AHEAD in the environment is by how many seconds the clock of this machine is ahead of others.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, Seq2SeqTrainingArguments, TrainerCallback, TrainingArguments


sys.path.insert(0, str(Path(__file__).parents[1]))
if "CLOCK_AHEAD" in os.environ:  # before anybody keeps it
    time.time = partial(lambda ahead, clock: ahead + clock(), float(os.environ["CLOCK_AHEAD"]), time.time)

from menagerie import MENAGERIE
from overflowing import HalvedTrainer, overflows, scaled
from zoo import SPECIMENS as ZOO

from hf_blocklocal import BlockLocalConfig, BlockLocalSeq2SeqTrainer, BlockLocalTrainer
from hf_blocklocal.callbacks import DriftCallback


SPECIMENS = {**MENAGERIE, **ZOO}
ARGUMENTS = {
    "max_steps": 6,
    "logging_steps": 2,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "max_grad_norm": 0.5,
    "warmup_steps": 2,
    "per_device_eval_batch_size": 3,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
}


class Mishap(TrainerCallback):
    """Something that happens to this process in the middle of a step, or of an evaluation."""

    def __init__(self, step, act, *, evaluating=False):
        self.step, self.act, self.evaluating = step, act, evaluating
        self.batches = 0

    def on_prediction_step(self, args, state, control, **kwargs):
        """Let it happen once the batch has come."""
        self.batches += 1
        if self.evaluating and self.batches == self.step:
            self.act()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Let it happen once the step has come."""
        if not self.evaluating and state.global_step + 1 == self.step:
            self.act()


def fail(trainer):
    """Fail as a user's callback might."""
    raise KeyError("no such column")


def fall_silent(trainer):
    """Hang, but not so deeply that the launcher has to wait half a minute before it is rid of this process."""
    trainer._chain.peers.stop()
    time.sleep(600)


class Collectives(TrainerCallback):
    """Counts what all or some processes do together between one step and the next."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter_tensor")
    NAMES += ("broadcast", "broadcast_object_list", "barrier", "gather", "scatter", "all_to_all", "monitored_barrier")

    def __init__(self):
        self.per_step, self.now = [], []
        for name in self.NAMES:
            setattr(torch.distributed, name, self.counted(name, getattr(torch.distributed, name)))

    def counted(self, name, function):
        """Return a function that is counted."""

        def run(*args, **kwargs):
            self.now.append(name)
            return function(*args, **kwargs)

        return run

    def on_step_end(self, args, state, control, **kwargs):
        """Note what there was in this step."""
        self.per_step.append(self.now.copy())
        self.now.clear()


class Brought(TrainerCallback):
    """Counts the weights that other processes have lent to this one."""

    def __init__(self, trainer):
        self.trainer, self.in_evaluations = trainer, set()

    @property
    def now(self):
        """Return how many there are."""
        return 0 if self.trainer._stationing is None else len(self.trainer._stationing._brought)

    def on_prediction_step(self, args, state, control, **kwargs):
        """Note how many there are in an evaluation."""
        self.in_evaluations.add(self.now)


MISHAPS = {
    "raises": fail,
    "killed": lambda _trainer: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda _trainer: os.kill(os.getpid(), signal.SIGSTOP),
    "silent": fall_silent,
}


class Noisy(torch.utils.data.Dataset):
    """Rows whose images are never the same, as augmentation makes them."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        """Return how many there are."""
        return len(self.rows)

    def __getitem__(self, index):
        """Return one of them."""
        row = self.rows[index]
        return {**row, "pixel_values": row["pixel_values"] + torch.randn_like(row["pixel_values"])}


def rows_of(specimen, seeds, unlabelled=()):
    """Return single samples, some of them without label."""
    rows = [{key: value[i] for key, value in specimen.batch(seed).items()} for seed in seeds for i in range(4)]
    for index in unlabelled:
        rows[index]["labels"] = torch.full_like(rows[index]["labels"], -100)
    return rows


def bytes_of_tensors():
    """Return the bytes of all tensors that are alive in this process."""
    gc.collect()
    plain = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in plain if not tensor.is_meta]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def build(case):
    """Return the model of a case."""
    model = SPECIMENS[case["specimen"]].build()
    if case.get("frozen"):
        model.get_submodule(case["frozen"]).requires_grad_(False)
    if case.get("normalised"):
        model.classifier = torch.nn.Sequential(torch.nn.BatchNorm1d(model.config.hidden_size), model.classifier)
    if "lora" in case:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(**case["lora"]))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = case.get("dropout", 0.0)
    return model


def compare(prediction):
    """Return numbers that change with every token that is written or given, and how many texts there are."""
    written, given = prediction.predictions, prediction.label_ids
    return {"written": float(written.mean()), "given": float(given.mean()), "texts": len(written)}


def make(folder, case, config, rows, args):
    """Return the trainer of a case."""
    writes = "writes" in case
    kind = HalvedTrainer if case.get("half") else BlockLocalTrainer
    kind = partial(BlockLocalSeq2SeqTrainer, compute_metrics=compare) if writes else kind
    read = Noisy(rows) if case.get("noisy") else rows
    trainer = kind(build(case), args, train_dataset=read, eval_dataset=rows[:11], block_local=config)
    if "scaled" in case:
        scaled(trainer, **case["scaled"])
    if "overflows" in case:
        overflows(trainer, *case["overflows"])
    if "patience" in case:
        trainer.add_callback(EarlyStoppingCallback(case["patience"]))
    if "drift" in case:
        trainer.add_callback(DriftCallback(trainer, every=case["drift"]))
    return trainer


def run(folder, case):
    """Train, evaluate, predict, and leave `log-RANK.json` and an ordinary checkpoint."""
    before, specimen = bytes_of_tensors(), SPECIMENS[case["specimen"]]
    folder.mkdir(parents=True, exist_ok=True)  # the trainer makes it where it writes
    kind = partial(Seq2SeqTrainingArguments, predict_with_generate=True) if "writes" in case else TrainingArguments
    args = kind(
        str(folder), per_device_train_batch_size=case.get("batch_size", 4), **(ARGUMENTS | case.get("args", {}))
    )
    seeds = range(9, 17) if case.get("odd") == args.process_index else range(8)
    rows = rows_of(specimen, seeds, case.get("unlabelled", ()))
    trainer = make(folder, case, BlockLocalConfig(**case["config"]), rows, args)
    if "slow" in case and case["slow"][0] == args.process_index:
        trainer.model.register_forward_pre_hook(
            lambda model, _: None if model.training else time.sleep(case["slow"][1])
        )
    brought = Brought(trainer)
    trainer.add_callback(brought)
    for name, act in MISHAPS.items():
        if name in case and case[name][0] == args.process_index:
            trainer.add_callback(
                Mishap(case[name][1], partial(act, trainer), evaluating=case.get("evaluating", False))
            )
    counter = Collectives() if case.get("counted") else None
    if counter is not None:
        trainer.add_callback(counter)
    if case.get("told_to_end"):
        # As the launcher does when it is told so itself: it passes the signal on to every process.
        sign = signal.SIGINT if args.process_index == 0 else signal.SIGTERM
        trainer.add_callback(Mishap(case["told_to_end"], lambda: os.kill(os.getpid(), sign)))
    for _ in range(case.get("runs", 1)):
        outcome = trainer.train(resume_from_checkpoint=case.get("resume"))
    if case.get("told_to_end") and trainer.state.global_step < trainer.state.max_steps:
        return
    owned = bytes_of_tensors() - before
    predicted = trainer.predict(rows[:11], metric_key_prefix="test", **case.get("writes", {}))
    trainer.save_model(str(folder / "final"))
    predictions = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    generated = []
    if case.get("generates"):
        prompt = torch.tensor(case["generates"])
        generated = trainer.whole_model().eval().generate(prompt, do_sample=False, max_new_tokens=6).tolist()
    if "writes" in case:
        unlabelled = [{key: value for key, value in row.items() if key != "labels"} for row in rows[:5]]
        generated = [trainer.predict(unlabelled, **case["writes"]).predictions.tolist(), torch.rand(1).tolist()]
    parameters = list(trainer.assembly.module.parameters())
    chain = trainer._chain
    inside = [p for path in trainer.assembly.cut.layers for p in trainer.model.get_submodule(path).parameters()]
    log = {
        "machine": int(os.environ.get("GROUP_RANK", 0)),
        "chain": 0 if chain is None else chain.replica,
        "metrics": {**trainer.evaluate(), **predicted.metrics},
        "predictions": torch.as_tensor(predictions).flatten().tolist()[:256],
        "training_loss": outcome.training_loss,
        "parts": len(predicted.predictions) if isinstance(predicted.predictions, tuple) else 1,
        "history": trainer.state.log_history,
        "generated": generated,
        "brought": [max(brought.in_evaluations), brought.now],
        "owned": owned,
        "in_layers": sum(p.nbytes for p in inside if not p.is_meta),
        "collectives": counter.per_step if counter is not None else [],
        "held": sum(p.numel() for p in parameters if not p.is_meta) / sum(p.numel() for p in parameters),
    }
    (folder / f"log-{args.process_index}.json").write_text(json.dumps(log))


def main():
    """Run every case."""
    torch.set_num_threads(1)
    gc.freeze()  # every run collects garbage, and need not look for it in all that has been imported
    for name, case in json.loads(sys.argv[2]).items():
        run(Path(sys.argv[1]) / name, case)


if __name__ == "__main__":
    main()
