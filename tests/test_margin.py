"""A target that a block predicts well enough stops teaching it; the others teach as before."""

from __future__ import annotations

import pytest
import torch
from test_parity import examples
from training import make, snapshot
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.errors import TargetError, UnsupportedSettingError
from hf_blocklocal.losses.margin import satisfied
from hf_blocklocal.targets.batch import Candidates, Targets, Task


def test_a_class_is_satisfied_above_its_probability():
    logits_NC = torch.tensor([[0.6, 0.4, 0.0], [0.2, 0.7, 0.1], [0.5, 0.5, 0.0]]).clamp(min=1e-9).log() + 3
    targets = Targets(Task("classes", 3), torch.tensor([0, 0, 1]), torch.arange(3))
    assert satisfied(logits_NC, targets, 0.55).tolist() == [True, False, False]
    assert satisfied(logits_NC, targets, 0.45).tolist() == [True, False, True]


def test_several_labels_are_satisfied_together():
    p_NC = torch.tensor([[0.9, 0.2], [0.9, 0.5]])
    targets = Targets(Task("multi_label", 2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.arange(2))
    assert satisfied(p_NC.logit(), targets, 0.7).tolist() == [True, False]  # 0.72 and 0.45


def test_a_drawn_negative_stands_for_the_tokens_that_were_not_drawn():
    values = torch.tensor([0])
    for tokens, expected in ((1, True), (9, False)):  # probability 1/2, then 1/10
        candidates = Candidates(torch.zeros(2, 4), torch.tensor([1.0, tokens]).log(), vocabulary=1 + tokens)
        targets = Targets(Task("vocabulary", 1 + tokens), values, values, candidates=candidates)
        assert satisfied(torch.zeros(1, 2), targets, 0.4).tolist() == [expected]


@pytest.mark.parametrize("head_layers", [0, 2])
@pytest.mark.parametrize("name", ["bert", "bert_mlm", "bert_multilabel", "gpt2"])
def test_the_others_teach_as_before(name, head_layers):
    """The gradient of the block is that of the targets that are left, at the same scale."""
    batch = SPECIMENS[name].batch(0)
    gradients = {}

    def learn(config, keep):
        model = SPECIMENS[name].build()
        assembly = assemble(model, config, batch)
        assembly.module.train()
        targets = assembly.read_targets(batch, whole_vocabulary=True)
        seen = {}

        def backward(loss):
            loss.backward()
            grads = (parameter.grad for parameter in model.parameters())
            seen["gradient"] = torch.cat([g.flatten() for g in grads if g is not None])

        head = assembly.heads[0]
        plain = type(head).forward

        def forward(hidden, targets, heard=None):
            seen["p"] = (-head.loss(head.messages(hidden, targets))).exp().detach()
            loss_N = plain(head, hidden, targets, heard)
            return loss_N if keep is None else loss_N * keep

        head.forward = forward
        lesson = assembly.step.teach(targets, scale=0.5, inputs=batch, backward=backward, learned=lambda *_: None)
        with lesson:
            model(**batch)
        return seen

    config = {"num_blocks": 2, "head_layers": head_layers, "negatives": None}
    p_N = learn(BlockLocalConfig(**config), None)["p"]
    margin = p_N.sort().values[len(p_N) // 2 - 1 : len(p_N) // 2 + 1].mean().item()
    gradients["ours"] = learn(BlockLocalConfig(**config, satisfied_at=margin), None)["gradient"]
    gradients["theirs"] = learn(BlockLocalConfig(**config), (p_N <= margin).float())["gradient"]
    gradients["all"] = learn(BlockLocalConfig(**config), None)["gradient"]
    torch.testing.assert_close(gradients["ours"], gradients["theirs"], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(gradients["ours"], gradients["all"], rtol=1e-2)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_block_that_is_satisfied_with_everything_stands_still(smoothing, tmp_path):
    config = BlockLocalConfig(num_blocks=2, satisfied_at=1e-6)
    settings = {"optim": "sgd", "learning_rate": 0.1, "label_smoothing_factor": smoothing}
    trainer = make("bert", tmp_path, config=config, eval_dataset=examples(SPECIMENS["bert"])[:4], **settings)
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    names = {parameter: key for key, parameter in trainer.assembly.module.named_parameters()}
    for block, stands in enumerate((True, False)):
        keys = [names[parameter] for parameter in trainer.assembly.parameters[block]]
        assert all(torch.equal(before[key], after[key]) for key in keys) == stands
    assert trainer.state.log_history[0]["block_0/loss"] == 0
    assert trainer.evaluate()["eval_block_0_loss"] > 0.1  # an evaluation counts every target


def test_a_regression_gives_no_probability(tmp_path):
    with pytest.raises(TargetError, match=r"satisfied_at=0\.9 is a probability, and the heads of regression"):
        make("bert_regression", tmp_path, config=BlockLocalConfig(satisfied_at=0.9)).train()


def test_a_custom_loss_cannot_be_masked(tmp_path):
    config = BlockLocalConfig(satisfied_at=0.9)
    with pytest.raises(UnsupportedSettingError, match=r"satisfied_at=0\.9 masks targets one by one"):
        make("bert", tmp_path, config=config, compute_loss_func=lambda *args, **kwargs: None).train()
