"""What every architecture has to pass to be called supported: four checks of a tiny model, cut in two.

The tests assert them one by one; `scripts/supported_models.py` writes down what comes of them.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import torch
from menagerie import MENAGERIE
from torch import Tensor
from transformers import PreTrainedModel
from zoo import SPECIMENS, Batch, Specimen

from hf_blocklocal import Assembly, BlockLocalConfig, BlockLocalError, assemble


# The zoo's models come several times where they have several tasks; once will do here.
_TASKS_OF_BERT = {"bert_tokens", "bert_mlm", "bert_multilabel", "bert_regression"}
ARCHITECTURES: dict[str, Specimen] = {
    **{name: specimen for name, specimen in SPECIMENS.items() if name not in _TASKS_OF_BERT},
    **MENAGERIE,
}
# Layers that the task's own loss does not reach, in plain training either.
IDLE = {"canine": {"canine.final_char_encoder.layer.0"}}


@dataclass(frozen=True)
class Patient:
    """A model that has been cut.

    Attributes:
        model: The model.
        batch: What it is run on.
        assembly: The model with its heads.
    """

    model: PreTrainedModel
    batch: Batch
    assembly: Assembly


def admit(specimen: Specimen, config: BlockLocalConfig) -> Patient:
    """Cut a model.

    Raises:
        BlockLocalError: If it cannot be cut.
    """
    model, batch = specimen.build(), specimen.batch(0)
    return Patient(model, batch, assemble(model, config, batch))


def taught(patient: Patient, *, only: int | None = None) -> tuple[Tensor, Tensor]:
    """Run a local step, and leave the gradients in place.

    Args:
        patient: Whom to teach.
        only: The one block that sends its loss back; all of them by default.

    Returns:
        Loss and logits of the model.
    """
    assembly, done = patient.assembly, []

    def backward(loss: Tensor) -> None:
        if only in (None, len(done)):
            loss.backward()

    patient.model.train()
    with assembly.step.teach(
        assembly.read_targets(patient.batch),
        scale=1.0,
        backward=backward,
        learned=lambda *what: done.append(what),
        inputs=patient.batch,
    ):
        outputs = patient.model(**patient.batch)
        if only in (None, assembly.last):
            outputs.loss.backward()
    return outputs.loss.detach(), outputs.logits.detach()


def leaks(patient: Patient) -> set[str]:
    """Return the parameters that the loss of another block than their own reaches, with the number of that block.

    An embedding tied to the language-model head is used at both ends, so both ends may teach it.
    """
    assembly = patient.assembly
    names = {parameter: name for name, parameter in assembly.module.named_parameters()}
    mine = [{names[parameter] for parameter in block} for block in assembly.parameters]
    output = getattr(patient.model, "get_output_embeddings", lambda: None)()
    tied = {names[output.weight]} if output is not None and output.weight in names else set()
    found = set()
    for block in range(assembly.cut.num_blocks):
        taught(patient, only=block)
        reached = {name for name, p in assembly.module.named_parameters() if p.grad is not None and p.grad.any()}
        found |= {f"{name} from block {block}" for name in reached - tied - mine[block]}
        found |= set() if reached else {f"nothing from block {block}"}
        assembly.module.zero_grad()
    return found


def difference(patient: Patient) -> float:
    """Return by how much cutting the model changes its logits in training; 0 means not by a bit."""
    patient.model.train()
    with torch.enable_grad():
        plain = patient.model(**patient.batch)
    loss, logits = taught(patient)
    patient.assembly.module.zero_grad()
    if torch.equal(loss, plain.loss.detach()) and torch.equal(logits, plain.logits.detach()):
        return 0.0
    return (logits - plain.logits.detach()).abs().max().item()


def untouched_by_a_step(patient: Patient) -> set[str]:
    """Train for one step; return the layers of which it has changed no weight."""
    before = {name: parameter.detach().clone() for name, parameter in patient.model.named_parameters()}
    optimizer = torch.optim.AdamW(patient.assembly.module.parameters(), lr=1e-2)
    taught(patient)
    optimizer.step()
    patient.assembly.module.zero_grad()
    moved = {name for name, parameter in patient.model.named_parameters() if not torch.equal(parameter, before[name])}
    return {path for path in patient.assembly.cut.layers if not any(name.startswith(f"{path}.") for name in moved)}


@torch.no_grad()
def comes_back(patient: Patient) -> bool:
    """Tell whether plain transformers loads what it saves, with the same logits to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        patient.model.save_pretrained(folder)
        loaded = type(patient.model).from_pretrained(folder).eval()
    patient.model.eval()
    return torch.equal(loaded(**patient.batch).logits, patient.model(**patient.batch).logits)


def refusal(specimen: Specimen, config: BlockLocalConfig) -> str | None:
    """Return why an architecture is refused; None if it is not."""
    try:
        admit(specimen, config)
    except BlockLocalError as error:
        return str(error)
    return None
