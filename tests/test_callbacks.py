"""The callbacks see what is there and change nothing, to the bit."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_parity import arguments, equal, examples, with_dropout
from transformers import Trainer, TrainerCallback
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.callbacks import DriftCallback, GradientAlignmentCallback, LinearProbeCallback
from hf_blocklocal.callbacks.linear_probe import RidgeClassifier
from hf_blocklocal.errors import TargetError, UnsupportedSettingError


ALL = [GradientAlignmentCallback, LinearProbeCallback, DriftCallback]


def trainer_of(name, folder, *, config=None, model=None, rows=None, **settings):
    specimen = SPECIMENS[name]
    rows = examples(specimen, batches=6) if rows is None else rows
    return BlockLocalTrainer(
        specimen.build() if model is None else model,
        arguments(folder, **({"max_steps": 4} | settings)),
        train_dataset=rows,
        eval_dataset=rows,
        block_local=BlockLocalConfig(num_blocks=2, negatives=16) if config is None else config,
    )


def rows_of(trainer, name):
    """Step -> block -> value of every row of one kind."""
    found = {}
    for row in trainer.state.log_history:
        values = {int(key.split("block_")[1]): value for key, value in row.items() if key.startswith(f"{name}/block_")}
        if values:
            assert row["step"] not in found, "looked twice at one step"
            found[row["step"]] = values
    return found


class Disturb(TrainerCallback):
    """Notes what a callback could leave behind; added after those that are watched."""

    def __init__(self, module):
        self.module = module
        self.seen = []

    def look(self):
        parameters = list(self.module.parameters())
        return {
            "modes": [part.training for part in self.module.modules()],
            "requires_grad": [p.requires_grad for p in parameters],
            "grads": [None if p.grad is None else p.grad.clone() for p in parameters],
            "hooks": [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in self.module.modules()],
            "own": [sorted(vars(part)) for part in self.module.modules()],
            "torch": torch.get_rng_state().tolist(),
            "numpy": np.random.get_state()[1].tolist(),
            "python": random.getstate(),
        }

    def on_step_end(self, *args, **kwargs):
        self.seen.append(self.look())


@pytest.mark.parametrize("step_per_block", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "mixtral"])
def test_a_run_with_all_callbacks_is_the_run_without_to_the_bit(name, step_per_block, tmp_path):
    runs = []
    for watched in (False, True):
        config = BlockLocalConfig(num_blocks=2, negatives=16, step_per_block=step_per_block)
        trainer = trainer_of(
            name, tmp_path, model=with_dropout(name), config=config, gradient_accumulation_steps=2, logging_steps=2
        )
        for kind in ALL if watched else []:
            trainer.add_callback(kind(trainer, every=1))
        watch = Disturb(trainer.assembly.module)
        trainer.add_callback(watch)
        trainer.train()
        runs.append((trainer, watch.seen))
    (plain, before), (watched, after) = runs
    assert equal(watched.assembly.module.state_dict(), plain.assembly.module.state_dict())
    for left, found in zip(after, before, strict=True):
        for key in ("modes", "requires_grad", "hooks", "own", "torch", "numpy", "python"):
            assert left[key] == found[key], key
        assert [g is None for g in left["grads"]] == [g is None for g in found["grads"]]
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (plain, watched)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert list(rows_of(watched, "alignment")) == list(rows_of(watched, "drift")) == [0, 1, 2, 3, 4]


def test_a_look_in_the_middle_of_anything_leaves_gradients_and_modes_as_they_were(tmp_path):
    trainer = trainer_of("bert", tmp_path)
    callbacks = [kind(trainer) for kind in ALL]
    module = trainer.assembly.module
    module.train()
    module.model.bert.embeddings.eval()
    next(module.parameters()).requires_grad_(False)
    for number, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, float(number))
    watch = Disturb(module)
    before = watch.look()
    for callback in callbacks:
        assert callback.measure()
    after = watch.look()
    for old, new in zip(before.pop("grads"), after.pop("grads"), strict=True):
        assert torch.equal(old, new)
    assert before == after


@pytest.mark.parametrize("name", ["bert", "bert_mlm", "vit", "bart"])
def test_the_last_block_is_aligned_and_the_others_are_not(name, tmp_path):
    trainer = trainer_of(name, tmp_path, config=BlockLocalConfig(num_blocks=3, negatives=16, head_layers=0))
    trainer.add_callback(GradientAlignmentCallback(trainer, SPECIMENS[name].batch(0), every=2))
    trainer.train()
    cosines, ratios = rows_of(trainer, "alignment"), rows_of(trainer, "norm_ratio")
    assert list(cosines) == list(ratios) == [0, 2, 4]
    for step, blocks in cosines.items():
        assert blocks.keys() == ratios[step].keys() == {0, 1, 2}
        assert all(-1 <= blocks[block] < 0.999 for block in (0, 1))
        if name in ("bert", "vit"):  # where no weight of the last block is used below it
            assert blocks[2] == pytest.approx(1, abs=1e-6)
            assert ratios[step][2] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_all_blocks_are_aligned_where_heads_borrow_all_layers(name, smoothing, tmp_path):
    config = BlockLocalConfig(num_blocks=3, head_layers=SPECIMENS[name].layers, negatives=None)
    trainer = trainer_of(name, tmp_path, config=config, label_smoothing_factor=smoothing if name == "bert" else 0.0)
    trainer.add_callback(GradientAlignmentCallback(trainer, every=1))
    trainer.train()
    for kind in ("alignment", "norm_ratio"):
        for blocks in rows_of(trainer, kind).values():
            assert blocks == pytest.approx({0: 1, 1: 1, 2: 1}, abs=1e-4), kind


def test_alignment_follows_the_loss_that_the_user_wrote(tmp_path):
    specimen = SPECIMENS["bert"]

    def twice(outputs, labels, num_items_in_batch=None):
        return 2 * torch.nn.functional.cross_entropy(outputs["logits"], labels.flatten(), label_smoothing=0.3)

    trainer = BlockLocalTrainer(
        specimen.build(),
        arguments(tmp_path, max_steps=1),
        train_dataset=examples(specimen),
        compute_loss_func=twice,
        block_local=BlockLocalConfig(num_blocks=3, head_layers=specimen.layers),
    )
    seen = GradientAlignmentCallback(trainer, specimen.batch(0)).measure()
    assert seen == pytest.approx(dict.fromkeys(seen, 1), abs=1e-4)
    assert len(seen) == 6


def test_the_cosine_is_that_of_gradients_taken_by_hand(tmp_path):
    specimen, batch = SPECIMENS["bert"], SPECIMENS["bert"].batch(1)
    trainer = trainer_of("bert", tmp_path)
    seen = GradientAlignmentCallback(trainer, batch).measure()
    assembly = trainer.assembly
    assembly.module.eval()
    lesson = assembly.step.teach(
        targets := assembly.read_targets(batch),
        inputs=batch,
        scale=1 / len(targets),
        backward=torch.Tensor.backward,
        learned=lambda block, report: None,
    )
    with lesson:
        assembly.module.model(**batch).loss.backward()
    other = specimen.build().eval()
    other(**batch).loss.backward()
    true = {name: parameter.grad for name, parameter in other.named_parameters()}
    names = [f"bert.encoder.layer.{layer}." for layer in range(assembly.cut.spans[0].stop)] + ["bert.embeddings"]
    pairs = [
        (p.grad.flatten(), true[name].flatten())
        for name, p in assembly.module.model.named_parameters()
        if name.startswith(tuple(names)) and p.grad is not None
    ]
    local, theirs = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert seen["alignment/block_0"] == pytest.approx(torch.cosine_similarity(local, theirs, dim=0).item(), abs=1e-5)
    assert seen["norm_ratio/block_0"] == pytest.approx((local.norm() / theirs.norm()).item(), rel=1e-4)


def test_a_frozen_block_has_neither_alignment_nor_drift(tmp_path):
    trainer = trainer_of("bert", tmp_path)
    model = trainer.model
    for parameter in (*model.bert.embeddings.parameters(), *model.bert.encoder.layer[:2].parameters()):
        parameter.requires_grad_(False)
    for kind in (GradientAlignmentCallback, DriftCallback):
        trainer.add_callback(kind(trainer, every=2))
    trainer.train()
    assert [set(blocks) for blocks in rows_of(trainer, "alignment").values()] == [{1}] * 3
    assert [set(blocks) for blocks in rows_of(trainer, "drift").values()] == [{1}] * 3


def test_with_a_single_block_only_drift_has_something_to_say(tmp_path):
    trainer = trainer_of("bert", tmp_path, config=BlockLocalConfig.from_preset("backprop"))
    for kind in ALL:
        trainer.add_callback(kind(trainer, every=2))
    trainer.train()
    assert rows_of(trainer, "alignment") == rows_of(trainer, "probe") == {}
    assert rows_of(trainer, "drift")[4][0] > 0


def test_drift_is_the_relative_distance_from_the_start(tmp_path):
    trainer = trainer_of("bert", tmp_path)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.add_callback(DriftCallback(trainer, every=3))
    trainer.train()
    drift = rows_of(trainer, "drift")
    assert list(drift) == [0, 3, 4]
    assert drift[0] == {0: 0, 1: 0}
    blocks = [set(map(id, block)) for block in trainer.assembly.parameters]
    for block in (0, 1):
        mine = [(name, p) for name, p in trainer.model.named_parameters() if id(p) in blocks[block]]
        moved = torch.cat([(p.detach() - start[name]).flatten() for name, p in mine]).norm()
        length = torch.cat([start[name].flatten() for name, _ in mine]).norm()
        assert drift[4][block] == pytest.approx((moved / length).item(), rel=1e-5)


def test_a_second_run_drifts_from_its_own_start(tmp_path):
    trainer = trainer_of("bert", tmp_path)
    trainer.add_callback(DriftCallback(trainer, every=4))
    for _ in range(2):
        trainer.train()
        assert rows_of(trainer, "drift")[0] == {0: 0, 1: 0}
        assert min(rows_of(trainer, "drift")[4].values()) > 0


def test_a_resumed_run_writes_the_rows_of_the_whole_run(tmp_path):
    def run(folder, **options):
        trainer = trainer_of("bert", tmp_path / folder, save_strategy="steps", save_steps=2)
        for kind in ALL:
            trainer.add_callback(kind(trainer, every=1))
        trainer.train(**options)
        return trainer

    whole = run("whole")
    resumed = run("whole", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for kind in ("alignment", "norm_ratio", "probe", "drift"):
        assert rows_of(resumed, kind) == rows_of(whole, kind)
        assert len(rows_of(whole, kind)) == 5


def test_a_linear_probe_reads_what_is_linear_and_no_more():
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(600, 5, generator=generator) * 100 + 40
    linear_N = 7 + 3 * x_ND[:, :3].argmax(1)
    noise_N = torch.randint(0, 2, (600,), generator=generator)
    for values_N, least, most in ((linear_N, 0.85, 1), (noise_N, 0.35, 0.65)):
        probe = RidgeClassifier(values_N[:400].unique(), ridge=0.01)
        for part in (slice(0, 150), slice(150, 400)):
            probe.add(x_ND[part], values_N[part])
        accuracy = (probe.predict(x_ND[400:], probe.solve()) == values_N[400:]).float().mean()
        assert least <= accuracy <= most


def test_a_linear_probe_is_ridge_regression():
    from sklearn.linear_model import Ridge

    generator = torch.Generator().manual_seed(0)
    x_ND, y_N = torch.randn(50, 4, generator=generator), torch.randint(0, 3, (50,), generator=generator)
    probe = RidgeClassifier(torch.arange(3), ridge=0.2)
    probe.add(x_ND, y_N)
    weights_DC, bias_C = probe.solve()
    strength = 0.2 * 50 * x_ND.double().var(0, unbiased=False).mean().item()
    reference = Ridge(alpha=strength).fit(x_ND.double().numpy(), np.eye(3)[y_N.numpy()])
    np.testing.assert_allclose(weights_DC.T.numpy(), reference.coef_, atol=1e-8)
    np.testing.assert_allclose(bias_C.numpy(), reference.intercept_, atol=1e-8)


@pytest.mark.parametrize("name", ["bert", "bert_tokens", "gpt2", "t5", "vit", "wav2vec2"])
def test_every_block_is_probed_whatever_the_targets_are(name, tmp_path):
    trainer = trainer_of(name, tmp_path)
    trainer.add_callback(LinearProbeCallback(trainer, every=3, samples=12))
    trainer.train()
    probed = rows_of(trainer, "probe")
    assert list(probed) == [0, 3, 4]
    assert all(set(blocks) == {0, 1} and 0 <= min(blocks.values()) <= 1 for blocks in probed.values())
    ends = {block: span.last for block, span in enumerate(trainer.assembly.cut.spans)}
    assert rows_of(trainer, "probe_layer") == {0: ends}


def test_the_probe_of_a_block_sees_the_output_of_its_last_layer(tmp_path):
    trainer = trainer_of("bert", tmp_path)
    callback = LinearProbeCallback(trainer, samples=24)
    callback.measure()
    batch = callback._batches[0][0]
    (rows, values_N), *_ = callback._features([batch])
    trainer.model.eval()
    hidden = trainer.model(**batch, output_hidden_states=True).hidden_states
    mask_BS1 = batch["attention_mask"][..., None].float()
    for block, span in enumerate(trainer.assembly.cut.spans):
        pooled_BD = (hidden[span.last + 1] * mask_BS1).sum(1) / mask_BS1.sum(1)
        torch.testing.assert_close(rows[block], pooled_BD)
    assert torch.equal(values_N, batch["labels"].flatten())


def test_examples_are_taken_evenly_from_a_sorted_set(tmp_path):
    rows = sorted(examples(SPECIMENS["bert"], batches=6), key=lambda row: row["labels"].item())
    trainer = trainer_of("bert", tmp_path, rows=rows)
    callback = LinearProbeCallback(trainer, samples=8)
    callback.measure()
    for batches in callback._batches:
        labels = torch.cat([batch["labels"].flatten() for batch in batches])
        assert len(labels) == 8
        assert len(labels.unique()) == len({row["labels"].item() for row in rows}) > 1


def test_what_cannot_be_looked_at_is_refused_by_name(tmp_path):
    plain = Trainer(SPECIMENS["bert"].build(), arguments(tmp_path), train_dataset=examples(SPECIMENS["bert"]))
    with pytest.raises(UnsupportedSettingError, match="DriftCallback looks at blocks, and Trainer has none"):
        DriftCallback(plain)
    trainer = trainer_of("bert", tmp_path)
    for every in (0, 1.5, True):
        with pytest.raises(UnsupportedSettingError, match="every must be a whole number"):
            DriftCallback(trainer, every=every)
    apart = trainer_of("bert", tmp_path)
    apart.block_local = replace(apart.block_local, block_parallel_size=2, head_refresh_steps=2, head_refresh_lag=1)
    for kind in (GradientAlignmentCallback, LinearProbeCallback):
        with pytest.raises(UnsupportedSettingError, match=f"{kind.__name__} runs the whole model, .*DriftCallback"):
            kind(apart)
    ignored = SPECIMENS["bert"].batch(0)
    ignored["labels"] = torch.full_like(ignored["labels"], -100)
    with pytest.raises(TargetError, match="No label of the batch to look at counts"):
        GradientAlignmentCallback(trainer, ignored).measure()
    trainer.eval_dataset = None
    with pytest.raises(TargetError, match="the trainer has no such data set"):
        LinearProbeCallback(trainer).measure()
    with pytest.raises(TargetError, match="the data set is empty"):
        LinearProbeCallback(trainer, test_dataset=[]).measure()
    numbers = trainer_of("bert_regression", tmp_path)
    with pytest.raises(UnsupportedSettingError, match="targets are of kind 'regression'"):
        LinearProbeCallback(numbers).measure()
