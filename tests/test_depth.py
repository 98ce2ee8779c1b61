"""Measures of depth: what is reported is what was computed, and the picture shows it."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from training import make
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble, early_exit, truncate
from hf_blocklocal.anatomy.example import example_batch
from hf_blocklocal.depth import measure, open_trained, sweep, table
from hf_blocklocal.errors import InputsNeededError, TargetError
from hf_blocklocal.plots.depths import draw_depths


def batches_of(name, count=3):
    return [SPECIMENS[name].batch(seed) for seed in range(count)]


@pytest.mark.parametrize("name", ["bert", "vit", "bert_tokens"])
def test_accuracy_is_the_share_of_labels_that_are_right(name, borrow):
    model, batches = borrow(name).eval(), batches_of(name)
    with torch.no_grad():
        right = [(model(**batch).logits.argmax(-1) == batch["labels"])[batch["labels"] != -100] for batch in batches]
    row = measure(model, batches, name="whole", layers=4)
    assert (row.metric, row.value) == ("accuracy", pytest.approx(torch.cat(right).float().mean().item()))
    assert row.parameters == model.num_parameters()
    assert row.milliseconds > 0


@pytest.mark.parametrize(
    ("name", "metric"), [("gpt2", "perplexity"), ("t5", "perplexity"), ("bert_regression", "loss")]
)
def test_what_has_no_accuracy_has_a_loss(name, metric, borrow):
    model, batch = borrow(name).eval(), SPECIMENS[name].batch(0)
    with torch.no_grad():
        loss = model(**batch).loss.item()
    row = measure(model, [batch], name="whole", layers=4)
    assert row.metric == metric
    assert row.value == pytest.approx(math.exp(loss) if metric == "perplexity" else loss, rel=1e-5)


def test_a_truncated_model_computes_less(borrow):
    model, batches = borrow("bert"), batches_of("bert")
    small = truncate(model, 1, config=BlockLocalConfig(num_blocks=4, head_layers=1))
    shallow, whole = (measure(m, batches, name="", layers=n) for m, n in ((small, 2), (model, 4)))
    assert 0.45 < shallow.operations / whole.operations < 0.55


def test_a_sweep_goes_from_leaving_at_once_to_the_whole_model(borrow):
    model, batches = borrow("bert").eval(), batches_of("bert")
    assembly = assemble(model, BlockLocalConfig(num_blocks=4, head_layers=0), batches[0])
    exits = early_exit(assembly, threshold=0.7, inputs=batches[0])
    rows = sweep(exits, batches, [0.01, 0.4, 1.1])
    whole = measure(model, batches, name="", layers=4)
    assert exits.threshold == 0.7
    assert [row.threshold for row in rows] == [0.01, 0.4, 1.1]
    assert rows[0].exits == {0: 12}
    assert rows[2].exits == {3: 12}
    assert [rows[0].layers, rows[2].layers] == [1, 4]
    assert rows[0].operations < rows[1].operations < rows[2].operations
    assert rows[2].value == whole.value
    assert 1 <= rows[2].operations / whole.operations < 1.1  # the heads are light
    lines = table([*rows, whole]).splitlines()
    assert len(lines) == 5
    assert lines[-1].split()[-3] == "100%"


def test_there_must_be_something_to_measure_with(borrow):
    for batches in ([], [{"input_ids": torch.ones(1, 2, dtype=torch.long)}]):
        with pytest.raises(TargetError, match="batches with labels"):
            measure(borrow("bert"), batches, name="", layers=4)


def test_the_picture_is_drawn_from_plain_rows(borrow, tmp_path):
    row = measure(borrow("bert"), batches_of("bert", 1), name="whole", layers=4).to_dict()
    groups = {"truncated": [row | {"operations": row["operations"] / 2}, row], "early exits": [row]}
    words = {"title": "One model, several sizes", "whole": row["operations"]}
    path = draw_depths(groups, tmp_path / "new" / "depths.png", **words)
    with Image.open(path) as image:
        assert image.size[0] > 1000


@pytest.mark.parametrize("name", [name for name in SPECIMENS if name != "albert"])
def test_a_made_up_batch_is_one_that_the_model_can_be_cut_with(name, borrow):
    model = borrow(name)
    first, second = example_batch(model), example_batch(model)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert assemble(model, BlockLocalConfig(num_blocks=2), first).last == 1


def test_what_a_model_takes_may_have_to_be_said(borrow):
    model = borrow("vit")
    model.main_input_name = "smells"
    with pytest.raises(InputsNeededError, match=r"inputs=batch"):
        open_trained(model, config=BlockLocalConfig(num_blocks=2, head_layers=1))


# ---- The draft of assisted generation ----


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "opt"])
def test_generation_with_the_first_block_as_draft_says_what_greedy_decoding_says(name, tmp_path):
    trainer = make(name, tmp_path, config=BlockLocalConfig(num_blocks=2, head_layers=1), max_steps=3)
    trainer.train()
    model = trainer.model.eval()
    draft = truncate(trainer.assembly, 1)
    forwards = []
    draft.register_forward_hook(lambda *_: forwards.append(1))
    prompt = SPECIMENS[name].batch(0)["input_ids"][:1, :4]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    alone = model.generate(prompt, **options)
    together = model.generate(prompt, assistant_model=draft, **options)
    assert alone.shape == (1, 16)
    assert torch.equal(together, alone)
    assert forwards
