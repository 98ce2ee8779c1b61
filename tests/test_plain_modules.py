"""Any module with a list of layers, a loss and logits is trained block by block: it need not be transformers' own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_parity import arguments, equal
from torch import nn

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer


VOCABULARY, WIDTH, CLASSES = 20, 16, 3


class Classifier(nn.Module):
    """Embeds, runs its layers and classifies the mean of what is no padding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids, attention_mask, labels=None):
        hidden_BSD = self.run(self.embedding(input_ids), attention_mask == 0)
        weights_BS1 = attention_mask.unsqueeze(-1).float()
        logits_BC = self.classifier((hidden_BSD * weights_BS1).sum(1) / weights_BS1.sum(1))
        return ({} if labels is None else {"loss": F.cross_entropy(logits_BC, labels)}) | {"logits": logits_BC}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_BSD):
        return hidden_BSD + F.gelu(self.linear(hidden_BSD))


class OfAList(Classifier):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(4))

    def run(self, hidden_BSD, padding_BS):
        for layer in self.layers:
            hidden_BSD = layer(hidden_BSD)
        return hidden_BSD


class OfTorch(Classifier):
    """Has torch's own encoder, which packs padded batches in evaluations if it can."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=2, dim_feedforward=32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=4)

    def run(self, hidden_BSD, padding_BS):
        return self.encoder(hidden_BSD, src_key_padding_mask=padding_BS)


def rows():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(VOCABULARY, (6,), generator=generator),
            "attention_mask": (torch.arange(6) < 4 + number % 3).long(),
            "labels": number % CLASSES,
        }
        for number in range(8)
    ]


@pytest.mark.parametrize("kind", [OfAList, OfTorch])
def test_a_module_of_ones_own_is_trained_scored_and_saved(kind, tmp_path):
    torch.manual_seed(0)
    trainer = BlockLocalTrainer(
        kind(),
        arguments(tmp_path, max_steps=2),
        train_dataset=rows(),
        eval_dataset=rows(),
        block_local=BlockLocalConfig(num_blocks=2),
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert not any(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    scores = trainer.evaluate()
    assert {"eval_loss", "eval_block_0_loss", "eval_block_0_accuracy"} <= scores.keys()
    assert torch.backends.mha.get_fastpath_enabled()
    trainer.save_model(str(tmp_path / "final"))
    assert equal(load_file(tmp_path / "final" / "model.safetensors"), trainer.model.state_dict())
    assert (tmp_path / "final" / "README.md").is_file()
