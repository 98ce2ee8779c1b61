"""Stop at the first block whose head is sure enough: a drop-in classifier that computes less for easy samples.

The model's own forward runs, with hooks at the ends of blocks. Where all samples of a batch go on, it just goes on, so
with nobody sure the outputs are the model's, to the bit. Where some leave, it is left too, and starts again with the
others: layers that they have behind them hand on what they have made. Only embeddings and masks are made anew.
"""

# Shapes: B samples of the batch, A those that are still on their way, C classes.

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_blocklocal.anatomy.lending import replaced_forward
from hf_blocklocal.anatomy.modes import evaluation_mode
from hf_blocklocal.anatomy.signals import hands_on, map_tensors
from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.depth.opening import Opened, Source, logits_of_head, open_trained
from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.targets.batch import Targets


class EarlyExit(nn.Module):
    """A classifier that is called as the model is, and returns what the model returns.

    No sample leaves at a block whose head borrows all the layers above it, because it would save nothing.

    Attributes:
        exits_B: After a call, the block at which each sample has left; the last one for those that went all the way.

    Args:
        opened: A trained classifier.
        threshold: Probability of the likeliest class from which on a sample leaves. Above 1 none ever does.
    """

    def __init__(self, opened: Opened, threshold: float) -> None:
        super().__init__()
        self.assembly = opened.assembly
        self.model = opened.model
        self.heads = opened.assembly.heads
        self.threshold = threshold
        self.exits_B: Tensor | None = None
        self._exits = [block for block in range(self.assembly.last) if self._saves_layers(block)]
        self._layers = [self.model.get_submodule(path) for path in self.assembly.cut.layers]
        self._output_class = _class_of_output(opened)

    def _saves_layers(self, block: int) -> bool:
        """Tell whether leaving at a block saves anything: a head that borrows all layers above it is no shorter."""
        above = len(self.assembly.cut.layers) - self.assembly.cut.spans[block].stop
        return not self.heads[block].borrows or self.assembly.config.head_layers < above

    @property
    def threshold(self) -> float:
        """Probability of the likeliest class from which on a sample leaves."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UnsupportedSettingError(
                f"threshold={value!r} is no probability to compare with. Choose a number above 0; above 1, no sample "
                "ever leaves early."
            )
        self._threshold = float(value)

    def __getattr__(self, name: str) -> Any:
        """Pass what is asked of the model on to it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Classify a batch; takes what the model takes, and runs without gradients.

        Raises:
            UnsupportedSettingError: If hidden states or attentions are asked for, which samples that leave early lack.
        """
        inputs = inspect.signature(self.model.forward).bind_partial(*args, **kwargs).arguments
        inputs = {**{k: v for k, v in inputs.items() if k != "kwargs"}, **inputs.get("kwargs", {})}
        for name in ("output_hidden_states", "output_attentions"):
            if inputs.get(name):
                raise UnsupportedSettingError(
                    f"{name}=True asks for every layer, and samples that leave early do not run them all. Ask "
                    "the whole model instead: early_exit(...).model."
                )
        as_tuple = inputs.pop("return_dict", True) is False
        output = self._run(inputs)
        return output.to_tuple() if as_tuple else output

    def _run(self, inputs: dict[str, Any]) -> Any:
        batch = len(inputs[self.model.main_input_name])
        rows_A, start = torch.arange(batch, device=self.model.device), None
        self.exits_B = torch.full((batch,), self.assembly.last, device=self.model.device)
        logits_BC: Tensor | None = None
        remaining = inputs
        while len(rows_A) > 0:
            try:
                with self._watched(remaining, start):
                    output = self.model(**remaining)
            except _Left as left:
                if logits_BC is None:
                    logits_BC = left.logits_AC.new_zeros(batch, left.logits_AC.shape[1])
                logits_BC[rows_A[left.sure_A]] = left.logits_AC[left.sure_A]
                self.exits_B[rows_A[left.sure_A]] = left.block
                goes_on_A = ~left.sure_A
                rows_A, start = rows_A[goes_on_A], left.where(goes_on_A)
                remaining = {k: v for k, v in remaining.items() if k != "labels"}
                remaining = _rows_of(remaining, goes_on_A)
            else:
                if logits_BC is None:
                    return output
                logits_BC[rows_A] = output.logits.to(logits_BC.dtype)
                break
        return self._output(logits_BC, inputs.get("labels"))

    def _output(self, logits_BC: Tensor, labels: Tensor | None) -> Any:
        logits_BC = logits_BC.to(self.model.dtype)
        loss = None if labels is None else F.cross_entropy(logits_BC.float(), labels.view(-1))
        return self._output_class(loss=loss, logits=logits_BC)

    @contextmanager
    def _watched(self, inputs: Mapping[str, Any], start: _Start | None) -> Iterator[None]:
        """Let the forward pass inside the `with` begin where a block has ended, and end it where samples leave."""
        first = -1 if start is None else start.block

        def leave(block: int, hidden: Tensor, _router_logits: tuple[Tensor, ...]) -> None:
            if block <= first or block not in self._exits:
                return
            logits_AC = logits_of_head(self.assembly, block, hidden, inputs, self._asked(inputs, hidden))
            sure_A = logits_AC.float().softmax(-1).amax(-1) >= self._threshold
            if bool(sure_A.any()):
                trail = self.assembly.step.boundaries.trail.detached()
                raise _Left(block, logits_AC.float(), sure_A, _Start(block, hidden, trail.beside, trail.ends))

        with ExitStack() as stack:
            if start is not None:
                span = self.assembly.cut.spans[start.block]
                for index in range(span.stop):
                    given, form = start.given(index, span.last), self.assembly.forms[index]
                    forward = hands_on(form) if given is None else _returning(given, form)
                    stack.enter_context(replaced_forward(self._layers[index], forward))
            stack.enter_context(self.assembly.step.boundaries.attached(leave))
            yield

    def _asked(self, inputs: Mapping[str, Any], hidden: Tensor) -> Targets:
        """Return targets that ask one answer of every sample, whatever they are."""
        samples_A = torch.arange(len(hidden), device=hidden.device)
        mask = inputs.get("attention_mask")
        return Targets(
            self.assembly.task,
            torch.zeros_like(samples_A),
            samples_A,
            mask_BS=mask if mask is not None and mask.dim() == 2 else None,
            stretched="input_values" in inputs or "input_features" in inputs,
        )


def early_exit(
    source: Source,
    *,
    threshold: float = 0.9,
    config: BlockLocalConfig | None = None,
    heads: str | os.PathLike[str] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> EarlyExit:
    """Return a drop-in classifier that stops, sample by sample, at the first block whose head is sure enough.

    Args:
        source: A folder that a `BlockLocalTrainer` has saved; a model; or `trainer.assembly`. A model is used as it
            is, and put into evaluation mode.
        threshold: Probability of the likeliest class from which on a sample leaves. Above 1 none ever does.
        config: How a model in memory was cut and taught.
        heads: Folder with the heads of a model in memory, if they have parameters.
        inputs: A small batch with labels; made up where the model's config tells what it takes.

    Raises:
        UnsupportedSettingError: If the model does not choose one class for each sample, or there is a single block.
        BlockLocalError: If the trained model cannot be opened; the subclass and the text say how.
    """
    opened = open_trained(source, config=config, heads=heads, inputs=inputs)
    task, name = opened.assembly.task, type(opened.model).__name__
    if task is None:
        raise UnsupportedSettingError(f"This {name} is a single block: nothing ends before it does. Train more.")
    if task.target != "classes" or task.per_position:
        raise UnsupportedSettingError(
            f"early_exit chooses one class for each sample, and {name} predicts {task.target!r}"
            f"{' at every position' if task.per_position else ''}. To generate text faster, use truncate(...) as the "
            "assistant_model of generate()."
        )
    opened.warn_of_heads("Early exits", range(opened.assembly.last))
    return EarlyExit(opened, threshold).eval()


class _Start:
    """Where samples go on: behind a block, with what they have made up to there.

    Args:
        block: The block.
        hidden: Its output.
        beside: What its last layer has returned beside that.
        ends: What the last layers of earlier stacks have handed on, by index.
    """

    def __init__(self, block: int, hidden: Tensor, beside: tuple[Any, ...], ends: Mapping[int, Tensor]) -> None:
        self.block, self.hidden, self.beside, self.ends = block, hidden, beside, ends

    def given(self, index: int, last: int) -> tuple[Any, ...] | None:
        """Return what a layer is to return; nothing if it hands its input on."""
        if index == last:
            return (self.hidden, *self.beside)
        return (self.ends[index],) if index in self.ends else None


class _Left(BaseException):
    """Some samples have left: the way out of a forward pass. Not an error, so nothing that handles errors stops it."""

    def __init__(self, block: int, logits_AC: Tensor, sure_A: Tensor, start: _Start) -> None:
        super().__init__()
        self.block, self.logits_AC, self.sure_A, self.start = block, logits_AC, sure_A, start

    def where(self, goes_on_A: Tensor) -> _Start:
        """Return where those go on that have not left."""
        start = self.start
        parts = {"hidden": start.hidden, "beside": start.beside, "ends": start.ends}
        return _Start(start.block, **_rows_of(parts, goes_on_A))


def _rows_of(values: dict[str, Any], goes_on_A: Tensor) -> dict[str, Any]:
    """Pick samples from every tensor that has one row for each, in nested containers too."""

    def pick(tensor: Tensor) -> Tensor:
        return tensor[goes_on_A] if tensor.dim() > 0 and len(tensor) == len(goes_on_A) else tensor

    return map_tensors(
        {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}, pick
    )


def _returning(given: tuple[Any, ...], form: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return given[0] if form == 0 else (*given, *[None] * (form - len(given)))

    return forward


@torch.no_grad()
def _class_of_output(opened: Opened) -> type:
    """Return the class of what the model returns."""
    with evaluation_mode(opened.model):
        return type(opened.model(**opened.inputs, return_dict=True))
