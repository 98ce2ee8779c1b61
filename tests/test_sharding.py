"""Layers that the processes with the same block share out: the same weights and checkpoints as with a copy in each."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_block_parallel import BEST, SAVED, assert_same, logs_of, passed, run, weights, without_times
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.optim.clipping import clip_block_
from hf_blocklocal.parallel.sharding import check_can_be_sharded
from hf_blocklocal.parallel.shards import check_is_elementwise


# What older ones lack; the package says so.
needs_torch = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="needs torch 2.13"
)
FREE = {"max_grad_norm": 0}
# Two chains of two blocks, with a copy of each block in both and with one between them.
CASES = {
    "bert": {"dropout": 0.1, "drift": 3, "args": BEST | FREE, "config": {"anchor": 1.0}},
    "gpt2": {"args": FREE, "generates": [[5, 6, 7]], "config": {"head_layers": 0, "block_lr_decay": 0.5}},
    "llama": {
        "args": FREE | {"bf16": True, "gradient_checkpointing": True},
        "config": {"head_refresh_steps": 2, "head_refresh_lag": 1, "chunked_loss": 5},
    },
    "lora": {
        "specimen": "bert",
        "dropout": 0.1,
        "args": SAVED | FREE,
        "lora": {"task_type": "SEQ_CLS", "r": 4, "target_modules": ["query", "value"], "lora_dropout": 0.1},
        "config": {},
    },
    # Experts that one process uses and the other does not.
    "switch_transformers": {"args": FREE, "config": {"tied_weights": "freeze"}},
    # A gradient that overflows in one part, where others have theirs.
    "scaled": {
        "specimen": "bert",
        "scaled": {"growth_interval": 2},
        "overflows": [[2], "bert.encoder.layer.2.attention.self.query"],
        "args": FREE | {"save_strategy": "steps", "save_steps": 6},
        "config": {"head_layers": 0},
    },
    "without labels": {
        "specimen": "bert",
        "batch_size": 1,
        "unlabelled": [0, 3, 7, 8, 9, 14, 15, 20],
        "args": FREE | {"max_steps": 16},
        "config": {"head_layers": 0, "step_per_block": True},
    },
    "experts without labels": {
        "specimen": "switch_transformers",
        "batch_size": 1,
        "unlabelled": [0, 3, 7, 8, 9, 14, 15, 20],
        "args": FREE | {"max_steps": 16},
        "config": {"tied_weights": "freeze"},
    },
}
# What is added up in another order: the norm of a block from its parts, and backward passes after they are averaged.
ROUNDED = {
    "clipped": {
        "specimen": "bert",
        "dropout": 0.1,
        "args": {"optim": "sgd", "max_grad_norm": 0.5, "gradient_accumulation_steps": 2},
        "config": {"denoising": 0.5, "head_layers": 0},
    }
}
RESUMED = ("bert", "lora")


def settled(name, case, *, shared, **more):
    sharing = {"shard_replicas": True} if shared else {}
    config = {"num_blocks": 2, "block_parallel_size": 2, **case["config"], **sharing}
    return {"specimen": name, "batch_size": 2, **case, **more, "config": config}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run all cases with copies and shared out; return the folder, where a name tells which."""
    folder = tmp_path_factory.mktemp("runs")
    cases = {**CASES, **ROUNDED}
    both = {name: settled(name, case, shared=False) for name, case in cases.items()}
    both |= {f"{name}, shared": settled(name, case, shared=True) for name, case in cases.items()}
    passed(run(folder, both, processes=4))
    return folder


@needs_torch
@pytest.mark.launch
@pytest.mark.timeout(900)
class TestLaunched:
    @pytest.mark.parametrize("name", CASES)
    def test_the_same_weights_and_metrics_as_with_a_copy_in_each(self, runs, name):
        assert_same(runs / name, runs / f"{name}, shared")
        logs = logs_of(runs / f"{name}, shared")
        assert len(logs) == 4
        reference = logs_of(runs / name)[0]
        for log in logs:
            assert without_times(log["metrics"]) == without_times(reference["metrics"])
            assert log["predictions"] == reference["predictions"]
            assert log["generated"] == reference["generated"]
        for mine, theirs in zip(logs[0]["history"], reference["history"], strict=True):
            assert without_times(mine) == pytest.approx(without_times(theirs), rel=1e-5, nan_ok=True)

    def test_clipped_and_accumulated_they_are_the_same_up_to_rounding(self, runs):
        first, second = weights(runs / "clipped"), weights(runs / "clipped, shared")
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(second[name], first[name], rtol=1e-5, atol=1e-6)

    def test_a_process_has_its_part_of_weights_and_states_and_no_gradients_after_a_step(self, runs):
        """With Adam, three tensors like each weight are in two halves."""
        for copy, part in zip(logs_of(runs / "gpt2"), logs_of(runs / "gpt2, shared"), strict=True):
            assert copy["in_layers"] == part["in_layers"] > 0
            assert copy["owned"] - part["owned"] == pytest.approx(3 * copy["in_layers"] / 2, rel=0.02)

    def test_batches_without_labels_are_skipped_as_ever(self, runs):
        for case in ("without labels", "experts without labels"):
            told = [logs_of(runs / name) for name in (case, f"{case}, shared")]
            skipped = [[[row.get("skipped_batches") for row in log["history"]] for log in logs] for logs in told]
            assert skipped[0] == skipped[1]
            assert any(count for rows in skipped[0] for count in rows)

    def test_drift_is_that_of_copies_and_logged_by_the_first_process(self, runs):
        """Its rows are among those that are compared above."""
        for name in ("bert", "bert, shared"):
            rows = [[row for row in log["history"] if "drift/block_0" in row] for log in logs_of(runs / name)]
            assert [row["step"] for row in rows[0]] == [0, 3, 6]
            assert all(0 < row[f"drift/block_{block}"] < 10 for row in rows[0][1:] for block in (0, 1))
            assert not any(rows[1:])

    def test_what_overflows_in_one_part_leaves_out_the_block(self, runs):
        for name in ("scaled", "scaled, shared"):
            assert logs_of(runs / name)[0]["history"][1]["block_1/overflows"] == 1
            state = torch.load(runs / name / "checkpoint-6" / "scaler.pt")["blocks"]
            assert [state[block]["scale"] / 2**16 for block in ("0", "1")] == [8, 2]

    def test_a_checkpoint_does_not_tell_how_it_was_made(self, runs):
        for name in RESUMED:
            for file in ("optimizer.pt", "scheduler.pt", "rng_state_1.pth"):
                one, other = (runs / run / "checkpoint-6" / file for run in (name, f"{name}, shared"))
                assert one.read_bytes() == other.read_bytes()

    def test_a_checkpoint_is_resumed_on_any_layout(self, runs, tmp_path):
        """With copies and shared out, the other way round, and in two processes with all blocks each."""
        crossed = {}
        for name in RESUMED:
            there = str(runs / f"{name}, shared" / "checkpoint-3")
            here = str(runs / name / "checkpoint-3")
            crossed[name] = settled(name, CASES[name], shared=False, resume=there)
            crossed[f"{name}, shared"] = settled(name, CASES[name], shared=True, resume=here)
        passed(run(tmp_path / "four", crossed, processes=4))
        for name in crossed:
            assert_same(runs / name.removesuffix(", shared") / "final", tmp_path / "four" / name / "final")
        alone = settled("bert", CASES["bert"], shared=False, resume=str(runs / "bert, shared" / "checkpoint-3"))
        del alone["config"]["block_parallel_size"]
        alone["config"] |= {"head_refresh_steps": 10, "head_refresh_lag": 1}
        passed(run(tmp_path / "two", {"bert": alone}, processes=2))
        assert_same(runs / "bert" / "final", tmp_path / "two" / "bert" / "final")


def test_the_norm_of_parts_and_wholes_is_that_of_all():
    """Two processes have a half of one gradient each and another one whole."""
    gradients = torch.arange(8.0), torch.tensor([3.0, -4.0])
    whole = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(whole, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = clip_block_(whole, 1.0)
    halves = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))]
    halves[0].grad, halves[1].grad = gradients[0][4:].clone(), gradients[1].clone()
    other = gradients[0][:4].square().sum()
    parts_norm = clip_block_(halves, 1.0, parts={halves[0]}, add_up=lambda square: square + other)
    assert parts_norm.item() == pytest.approx(norm.item())
    torch.testing.assert_close(halves[0].grad, whole[0].grad[4:])
    torch.testing.assert_close(halves[1].grad, whole[1].grad)


def test_older_versions_of_torch_are_refused(monkeypatch):
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params", raising=False)
    with pytest.raises(UnsupportedSettingError, match=r"shard_replicas=True needs torch 2\.13 or later, and this is "):
        check_can_be_sharded({})


def test_optimizers_that_look_at_whole_weights_are_refused():
    weight = [nn.Parameter(torch.zeros(2, 2))]
    check_is_elementwise(torch.optim.AdamW(weight))
    with pytest.raises(UnsupportedSettingError, match=r"Adafactor may need them whole\. Choose one .* AdamW, "):
        check_is_elementwise(transformers.Adafactor(weight))


@needs_torch
def test_layers_that_share_a_weight_are_refused():
    layers = {"layer.0": nn.Linear(2, 2), "layer.1": nn.Linear(2, 2)}
    check_can_be_sharded(layers)
    layers["layer.1"].weight = layers["layer.0"].weight
    with pytest.raises(UnsupportedSettingError, match=r"layer\.0\.weight is in 2 layers"):
        check_can_be_sharded(layers)


@needs_torch
def test_layers_of_several_dtypes_are_refused():
    layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16))
    with pytest.raises(UnsupportedSettingError, match=r"trainable parameters of torch\.bfloat16 and torch\.float32"):
        check_can_be_sharded({"layer.0": layer})
    check_can_be_sharded({"layer.0": layer.requires_grad_(False)})
