"""A span has two ends, each a choice among the positions of its sample; every block learns from its own guess."""

# Shapes: B batch, S sequence, D hidden width, N targets.

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_planning import planned
from test_planning import trained as really_trained
from torch.utils.data import Dataset
from transformers import AutoModelForQuestionAnswering, Trainer, TrainingArguments
from zoo import BART, BERT, DISTILBERT, TEXT_LENGTHS, build_tiny, random_text, seeded

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer, assemble, early_exit, truncate
from hf_blocklocal.depth import Fit, measure_depths, open_trained
from hf_blocklocal.errors import TargetError, UnsupportedSettingError
from hf_blocklocal.planning.blueprint import Shape, build_inputs
from hf_blocklocal.targets.spans import answer_logits, read_spans


EDGES = ("start_positions", "end_positions")
MODELS = {"bert": BERT, "distilbert": DISTILBERT, "bart": BART}


def answering(name, **options):
    return build_tiny(name, AutoModelForQuestionAnswering, MODELS[name] | options)


def questions(seed=0):
    """Texts of several lengths, each with a start in its first half and an end in its second."""
    generator = seeded(seed)
    lengths = torch.tensor(TEXT_LENGTHS)
    start_B = (torch.rand(len(lengths), generator=generator) * (lengths // 2)).long()
    end_B = lengths // 2 + (torch.rand(len(lengths), generator=generator) * (lengths // 2)).long()
    return {**random_text(generator), "start_positions": start_B, "end_positions": end_B}


def taught(assembly, model, batch, send=lambda _block: True):
    """Run a step; return the loss of every block."""
    losses = []

    def backward(loss):
        if send(len(losses)):
            loss.backward()

    targets = assembly.read_targets(batch)
    lesson = assembly.step.teach(
        targets,
        scale=1 / targets.elements,
        backward=backward,
        learned=lambda *_: losses.append(None),
        inputs=batch,
    )
    with lesson as report:
        loss = model(**batch).loss
    if send(assembly.last):
        loss.backward()
    return [*report.losses, loss.detach()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{"head_layers": 0}, {"head_layers": 1}], ids=["own heads", "borrowed"])
def test_the_loss_of_one_block_reaches_no_other(name, options):
    model, batch = answering(name), questions()
    assembly = assemble(model, BlockLocalConfig(num_blocks=4, **options), batch)
    # The embedding that BART's two stacks share belongs to the later one, and every use of it has its gradient.
    tied = {id(model.get_input_embeddings().weight)} if name == "bart" else set()
    mine = [{id(parameter) for parameter in block} | tied for block in assembly.parameters]
    for block in range(4):
        taught(assembly, model, batch, send=lambda sending, block=block: sending == block)
        reached = {id(p) for p in assembly.module.parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assembly.module.zero_grad()
        assert reached, f"block {block} learned nothing"
        assert reached <= mine[block]


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_with_all_layers_borrowed_every_block_has_the_models_own_loss_and_gradient(name):
    model, batch = answering(name), questions()
    assembly = assemble(model, BlockLocalConfig(num_blocks=2, head_layers=4), batch)
    first, last = taught(assembly, model, batch)
    torch.testing.assert_close(first, last)
    local = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**batch).loss.backward()
    for key, parameter in model.named_parameters():
        # The embedding that both stacks of BART share is used by the borrowed decoder too.
        if parameter.grad is not None and key != "model.shared.weight":
            torch.testing.assert_close(local[key], parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_loss_of_a_head_is_the_surprise_at_both_ends_among_what_is_no_padding():
    model, batch = answering("bert"), questions()
    assembly = assemble(model, BlockLocalConfig(num_blocks=2, head_layers=0), batch)
    head, targets = assembly.heads[0], assembly.read_targets(batch)
    hidden = torch.randn(*batch["input_ids"].shape, 16, generator=seeded(1))
    read_BS2 = head.readout(hidden)
    expected = [
        F.cross_entropy(read_BS2[row : row + 1, :length, edge], batch[name][row : row + 1])
        for edge, name in enumerate(("start_positions", "end_positions"))
        for row, length in enumerate(TEXT_LENGTHS)
    ]
    torch.testing.assert_close(head(hidden, targets), torch.stack(expected))
    other = hidden.where(batch["attention_mask"].bool()[..., None], torch.tensor(7.0))
    torch.testing.assert_close(head(other, targets), torch.stack(expected))


def test_places_behind_the_end_do_not_count_and_places_before_it_are_the_first():
    inputs = {
        "input_ids": torch.ones(3, 5, dtype=torch.long),
        "start_positions": torch.tensor([[1], [5], [-1]]),
        "end_positions": torch.tensor([[4], [9], [2]]),
    }
    targets = read_spans(inputs)
    assert targets.values.tolist() == [1, 0, 4, 2]
    assert targets.samples_N.tolist() == [0, 2, 0, 2]
    assert targets.edges_N.tolist() == [0, 0, 1, 1]


class Questions(Dataset):
    def __init__(self):
        batch = questions()
        self.rows = [{key: value[row] for key, value in batch.items()} for row in range(len(TEXT_LENGTHS))]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def trained(folder, num_blocks, **options):
    arguments = TrainingArguments(
        str(folder), max_steps=25, learning_rate=1e-2, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    trainer = BlockLocalTrainer(
        answering("bert"),
        arguments,
        train_dataset=Questions(),
        eval_dataset=Questions(),
        block_local=BlockLocalConfig(num_blocks=num_blocks, **options),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("head_layers", [0, 1])
def test_every_block_learns_the_answers_and_is_scored_on_them(head_layers, tmp_path):
    metrics = trained(tmp_path, 2, head_layers=head_layers).evaluate()
    assert metrics["eval_block_0_accuracy"] == 1.0
    assert metrics["eval_block_0_loss"] < 0.5
    assert metrics["eval_loss"] < 0.5


def test_one_block_is_the_plain_trainer(tmp_path):
    ours = trained(tmp_path, 1)
    plain = Trainer(answering("bert"), ours.args, train_dataset=Questions())
    plain.train()
    for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_spans_cannot_be_taught_with_is_refused(tmp_path):
    model, batch = answering("bert"), questions()
    with pytest.raises(TargetError, match="no end_positions"):
        assemble(model, BlockLocalConfig(num_blocks=2), {k: v for k, v in batch.items() if k != "end_positions"})
    with pytest.raises(TargetError, match="cannot carry 'spans' targets"):
        assemble(model, BlockLocalConfig(num_blocks=2, feedback="direct"), batch)
    with pytest.raises(TargetError, match="sim="):
        assemble(model, BlockLocalConfig.from_preset("predsim", num_blocks=2), batch)
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    trainer = BlockLocalTrainer(
        model, arguments, train_dataset=Questions(), block_local=BlockLocalConfig(num_blocks=2)
    )
    with pytest.raises(UnsupportedSettingError, match="no meaning for spans"):
        trainer.train()


# ---- Smaller models, and plans ----


@pytest.mark.parametrize("given", [True, False], ids=["a batch given", "a batch made up"])
def test_the_smaller_model_answers_to_the_bit_as_the_head_does(given):
    model, batch = answering("bert"), questions() if given else None
    config = BlockLocalConfig(num_blocks=2, head_layers=1)
    opened = open_trained(model, config=config, inputs=batch)
    small = truncate(model, 1, config=config, inputs=batch)
    assert small.config.num_hidden_layers == 3
    with torch.no_grad():
        answers_BS2 = answer_logits(small.eval()(**opened.inputs))
    assert torch.equal(answers_BS2, opened.head_logits(0))


def test_a_head_of_its_own_is_fitted_and_depths_are_measured():
    model, batch = answering("bert"), questions()
    assembly = assemble(model, BlockLocalConfig(num_blocks=2, head_layers=0), batch)
    fit = Fit([batch], steps=40, learning_rate=1e-2)
    rows = measure_depths(open_trained(assembly, inputs=batch), [batch], fit=fit)
    assert [(row.layers, row.metric) for row in rows] == [(2, "accuracy"), (4, "accuracy")]
    with torch.no_grad():
        answers_BS2 = answer_logits(model.eval()(**batch))
    right = [(answers_BS2[..., end].argmax(1) == batch[name]).float() for end, name in enumerate(EDGES)]
    assert rows[-1].value == pytest.approx(torch.stack(right).mean().item())


def test_places_behind_the_end_of_the_text_are_not_measured():
    model, batch = answering("bert"), questions()
    behind = {**batch, "end_positions": torch.full_like(batch["end_positions"], 999)}
    with torch.no_grad():
        starts_BS = model.eval()(**batch).start_logits
    (row,) = measure_depths(open_trained(assemble(model, BlockLocalConfig(num_blocks=1), {})), [behind])
    assert row.value == pytest.approx((starts_BS.argmax(1) == batch["start_positions"]).float().mean().item())


@pytest.mark.parametrize("values", [{}, {"head_layers": 0}], ids=["borrowed", "own heads"])
def test_a_plan_counts_the_operations_of_a_step(values):
    model = answering("bert")
    batch = {name: value for name, value in questions().items() if name != "attention_mask"}
    block_local = BlockLocalConfig(boundaries=(1, 3), **values)
    assembly, operations, _ = really_trained(model, block_local, batch)
    costs = planned(model, block_local, batch)
    assert [costs.operations(span) for span in assembly.cut.spans] == operations
    inputs = build_inputs(model.config, "question-answering", Shape(2, 8))
    assert inputs.keys() == {"input_ids", *EDGES}


def test_early_exits_are_for_classes_and_say_so():
    with pytest.raises(UnsupportedSettingError, match="one class for each sample, and .* predicts 'spans'"):
        early_exit(answering("bert"), config=BlockLocalConfig(num_blocks=2, head_layers=1))
