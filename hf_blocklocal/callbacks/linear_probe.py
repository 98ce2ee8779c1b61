"""What a linear classifier can read from the output of each block."""

# Shapes: N targets, D hidden width, C classes.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_blocklocal.anatomy.lending import taken_by
from hf_blocklocal.anatomy.signals import first_tensor
from hf_blocklocal.callbacks.base import BlockCallback, check_whole_model_here, collated, undisturbed
from hf_blocklocal.errors import TargetError, UnsupportedSettingError
from hf_blocklocal.targets.batch import Alignment, Targets, choose_alignment, read_targets


class RidgeClassifier:
    """Least squares from features to classes, with a bias and an L2 penalty, in closed form.

    Features come in batch by batch and are not kept. The penalty is `ridge` times the mean variance of a feature,
    per example, so it means the same at any scale, width and number of examples.

    Args:
        classes: The classes to tell apart, as sorted integers (C,).
        ridge: Strength of the penalty.
    """

    def __init__(self, classes: Tensor, *, ridge: float) -> None:
        self._classes_C = classes
        self._ridge = ridge
        self._count = 0
        self._sums: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def add(self, features_ND: Tensor, values_N: Tensor) -> None:
        """Learn from some examples, whose values must be among the classes."""
        # Float64, because variances come from differences of large sums.
        x_ND = features_ND.double()
        index_N, size = torch.searchsorted(self._classes_C, values_N), len(self._classes_C)
        xy_CD = x_ND.new_zeros(size, x_ND.shape[1]).index_add_(0, index_N, x_ND)
        new = (x_ND.sum(0), index_N.bincount(minlength=size).double(), x_ND.T @ x_ND, xy_CD.T)
        self._sums = new if self._sums is None else tuple(a + b for a, b in zip(self._sums, new, strict=True))
        self._count += len(values_N)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return weights (D, C) and bias (C,)."""
        assert self._sums is not None, "a classifier without examples"
        count, (x_D, y_C, xx_DD, xy_DC) = self._count, self._sums
        mean_D, mean_C = x_D / count, y_C / count
        covariance_DD = xx_DD / count - torch.outer(mean_D, mean_D)
        penalty = self._ridge * covariance_DD.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        identity_DD = torch.eye(len(mean_D), dtype=torch.float64)
        weights_DC = torch.linalg.solve(
            covariance_DD + penalty * identity_DD, xy_DC / count - torch.outer(mean_D, mean_C)
        )
        return weights_DC, mean_C - mean_D @ weights_DC

    def predict(self, features_ND: Tensor, solution: tuple[Tensor, Tensor]) -> Tensor:
        """Return the class of each row, (N,)."""
        weights_DC, bias_C = solution
        return self._classes_C[(features_ND.double() @ weights_DC + bias_C).argmax(1)]


class LinearProbeCallback(BlockCallback):
    """Logs `probe/block_k`: the test accuracy of a linear probe on what block k puts out, the last block included.

    The probe is a ridge classifier fitted anew at every look: on the mean over the sequence where a target belongs
    to a sample, on each position's own state where it belongs to a position. The output of a block is that of its
    last layer; `probe_layer/block_k` in the first row says which one, counted from 0 in the order of execution. A
    single block is not probed.

    Args:
        trainer: The `BlockLocalTrainer` to look at.
        train_dataset: Examples to fit the probes on. Default: the trainer's training set.
        test_dataset: Examples to score them on. Default: the trainer's evaluation set.
        every: Optimizer steps from one look to the next.
        samples: Examples taken from each, evenly spread. A look runs the model on all of them, without gradients.
        ridge: Penalty of the probes, relative to the variance of the features. On 256 to 512 short texts and a MiniLM
            of width 384, 1 and 3 score best; a hundredth of it costs 10 to 20 points of accuracy.

    Raises:
        TargetError: If there are no examples with a target; when training starts.
        UnsupportedSettingError: If every block has a process of its own. If the targets are not classes or tokens;
            when training starts.
    """

    def __init__(
        self,
        trainer: Trainer,
        train_dataset: Any = None,
        test_dataset: Any = None,
        *,
        every: int = 50,
        samples: int = 512,
        ridge: float = 1.0,
    ) -> None:
        super().__init__(trainer, every=every)
        check_whole_model_here(self)
        self.datasets = (train_dataset, test_dataset)
        self.samples = samples
        self.ridge = ridge
        self._batches: tuple[list[Mapping[str, Any]], ...] | None = None

    def measure(self) -> dict[str, float]:
        """Fit and score a probe on the output of each block."""
        assembly = self.trainer.assembly
        if assembly.last == 0:
            return {}
        if assembly.task.target not in ("classes", "vocabulary"):
            raise UnsupportedSettingError(
                f"LinearProbeCallback counts hits, and the targets are of kind {assembly.task.target!r}: it can probe "
                "for classes and tokens only. Leave it out."
            )
        first_look = self._batches is None
        if first_look:
            self._batches = self._collate()
        with undisturbed(assembly.module), torch.no_grad():
            accuracies = self._accuracies(*self._batches)
        seen = {f"probe/block_{block}": accuracy for block, accuracy in enumerate(accuracies)}
        if first_look:
            seen |= {f"probe_layer/block_{block}": span.last for block, span in enumerate(assembly.cut.spans)}
        return seen

    def _collate(self) -> tuple[list[Mapping[str, Any]], ...]:
        owned = (self.trainer.train_dataset, self.trainer.eval_dataset)
        size = self.trainer.args.per_device_eval_batch_size
        return tuple(
            collated(self.trainer, mine if given is None else given, samples=self.samples, batch_size=size)
            for given, mine in zip(self.datasets, owned, strict=True)
        )

    def _accuracies(self, train: list[Mapping[str, Any]], test: list[Mapping[str, Any]]) -> list[float]:
        assembly = self.trainer.assembly
        if not all(any(len(read_targets(assembly.task, batch)) for batch in batches) for batches in (train, test)):
            raise TargetError("No label of the examples to probe counts. Pass other data sets to the callback.")
        classes_C = torch.cat([read_targets(assembly.task, batch).values for batch in train]).unique().cpu()
        probes = [RidgeClassifier(classes_C, ridge=self.ridge) for _ in assembly.cut.spans]
        for rows, values_N in self._features(train):
            for probe, rows_ND in zip(probes, rows, strict=True):
                probe.add(rows_ND, values_N)
        solutions = [probe.solve() for probe in probes]
        hits, count = [0] * len(probes), 0
        for rows, values_N in self._features(test):
            count += len(values_N)
            for block, (probe, rows_ND) in enumerate(zip(probes, rows, strict=True)):
                hits[block] += (probe.predict(rows_ND, solutions[block]) == values_N).sum().item()
        return [hit / count for hit in hits]

    def _features(self, batches: list[Mapping[str, Any]]) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Yield for each batch the rows of every block, (N, D) each, and their targets (N,), on the CPU."""
        assembly = self.trainer.assembly
        layers = [self.trainer.model.get_submodule(assembly.cut.layers[span.last]) for span in assembly.cut.spans]
        for batch in batches:
            inputs = self.trainer._prepare_inputs(dict(batch))
            with _outputs_of(layers) as outputs:
                self.trainer.model(**taken_by(self.trainer.model, inputs))
            targets = read_targets(assembly.task, inputs)
            here = (assembly.step.bring(block, targets) for block in range(len(layers)))
            rows = [self._rows(block, outputs[block], inputs, mine) for block, mine in enumerate(here)]
            yield rows, targets.values.cpu()

    def _rows(self, block: int, hidden: Tensor, inputs: Mapping[str, Any], targets: Targets) -> Tensor:
        rows, index_N = targets.rows(hidden, self._alignment(block, hidden, inputs), "mean")
        return (rows if index_N is None else rows[index_N]).cpu()

    def _alignment(self, block: int, hidden: Tensor, inputs: Mapping[str, Any]) -> Alignment:
        assembly = self.trainer.assembly
        stacks = assembly.cut.stacks
        in_final_stack = stacks[assembly.cut.spans[block].last] == stacks[-1]
        shapes = tuple(hidden.shape), tuple(inputs["labels"].shape)
        return choose_alignment(assembly.task, *shapes, final_stack=in_final_stack)


@contextmanager
def _outputs_of(layers: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Collect, by number, what layers put out in the forward pass that runs inside the `with`."""
    outputs: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for number, layer in enumerate(layers):

            def keep(layer: nn.Module, args: Any, output: Any, number: int = number) -> None:
                outputs[number] = first_tensor(output)

            stack.callback(layer.register_forward_hook(keep).remove)
        yield outputs
