"""How the trainer trains one block while the others are trained elsewhere, and logs what one process would."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.anatomy.lending import taken_by
from hf_blocklocal.cut.blocks import EndOfBlock
from hf_blocklocal.errors import BlockPeerError
from hf_blocklocal.optim.collectives import sum_over_processes
from hf_blocklocal.parallel.pooling import sum_over_blocks
from hf_blocklocal.trainer.resuming import FindsCheckpoints


logger = logging.getLogger(__name__)


def ends_run(logs: Mapping[str, Any]) -> bool:
    """Tell whether these logs are of a whole run, and not of an evaluation whose prefix is `train`."""
    return "train_loss" in logs and "total_flos" in logs


class RunsApart(FindsCheckpoints):
    """Trains the block that is here, in step with the others."""

    _counting = False
    _left_at: int | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Tell the other processes why, if this one fails; a checkpoint may be in a repository on the Hub, too."""
        with nullcontext() if self._leaving is None else self._leaving.in_run(), self._session():
            self._check_best_can_be_loaded()
            checkpoint = self._checkpoint_here(resume_from_checkpoint)
            self._borrow_as_in(checkpoint)
            self._left_at = None
            return self._as_one_process_says(super().train(checkpoint, *args, **kwargs))

    def _as_one_process_says(self, output: Any) -> Any:
        """Return what a run has come to with the loss of the last block, as the logs have it."""
        if self._chain is None or not hasattr(output, "_replace"):
            return output
        return output._replace(training_loss=output.metrics["train_loss"])

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Exchange messages with the other processes inside the `with`, and tell them why if this one fails.

        A session within a session is part of it: what is on its way at its end may stay there.
        """
        if self._chain is None or self._chain.in_session:
            yield
            return
        try:
            with self._leaving, self._chain.session():
                yield
                if self.assembly.copies is not None:
                    self.assembly.copies.fetch()
        except BaseException as error:
            behind = self._cause_told_to_others(error)
            if behind is not error:
                raise behind from error
            raise

    def _cause_told_to_others(self, error: BaseException) -> BaseException:
        """Return what is behind an error that ends this process, told to the others."""
        try:
            self._chain.explain(error)
        except BlockPeerError as behind:
            error = behind
        self._chain.fail(error)
        if hasattr(error, "add_note"):
            error.add_note(f"In {self._chain.name}, at step {self.state.global_step + 1}.")
        return error

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count over the copies of this block alone: the other processes of the chain have read the same."""
        if self._chain is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        self._counting = True
        try:
            with self._counted_here() as average:
                count = super()._get_num_items_in_batch(batch_samples, device)
        finally:
            self._counting = False
        if average and self._chain.num_replicas > 1 and isinstance(count, Tensor):
            count = self._together(sum_over_processes, count, self._chain.replicas)
        return count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Make up for the averaging of gradients over the copies of a block, not over all processes."""
        if self._chain is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        with self._counted_here() as average:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        counts = getattr(self, "model_accepts_loss_kwargs", False) or self.compute_loss_func
        if not (average and counts and num_items_in_batch is not None and self._chain.num_replicas > 1):
            return result
        if not return_outputs:
            return result * self._chain.num_replicas
        return (result[0] * self._chain.num_replicas, *result[1:])

    @contextmanager
    def _counted_here(self) -> Iterator[bool]:
        """Keep the parent from counting over all processes inside the `with`; tell whether it would have."""
        average, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            yield average
        finally:
            self.args.average_tokens_across_devices = average

    def _teach_here(self, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor | None:
        """Run the forward pass, and the backward pass of the last block if it is here.

        Returns:
            The loss of the last block; nothing if it is elsewhere.
        """
        if self._chain is None or self._chain.is_last:
            return super().training_step(self._forward, inputs, num_items_in_batch)
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        with suppress(EndOfBlock), self.compute_loss_context_manager():
            self._forward(**taken_by(self.model, inputs))
        return None

    def store_flos(self) -> None:
        """Wait for all before the parent adds up over them."""
        self._meet()
        super().store_flos()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count the operations of a chain once: the parent counts those of the whole model, and adds up processes."""
        return super().floating_point_ops(inputs) if self._chain is None or self._chain.block == 0 else 0

    def _announce(self, inputs: Mapping[str, Any], *where: int | str) -> None:
        """Say what the messages of the micro-batch to come belong to."""
        if self._chain is not None:
            self._chain.peers.step = self.state.global_step
            self._stationing.announce(inputs, where)

    # Sum over optimizer steps of the last block's loss, as far as it has been logged.
    _logged_loss = 0.0

    def _of_all_blocks(self, logs: Mapping[str, float], last_loss: float) -> dict[str, float]:
        """Return what one process would have logged, in place of what this one knows by itself."""
        if self._chain is None:
            return {}
        said = {"loss": last_loss}
        if "grad_norm" in logs:
            square = torch.tensor([logs["grad_norm"]], dtype=torch.float64, device=self.args.device) ** 2
            said["grad_norm"] = sum_over_blocks(self._chain, square).sqrt().item()
        return said

    def _ends_run_apart(self, logs: Mapping[str, float]) -> bool:
        return self._chain is not None and ends_run(logs)

    def _of_run(self) -> dict[str, float]:
        """Return the mean loss of the last block over the steps of the run."""
        # transformers 5.17 does not note where a resumed run began, and divides by all steps.
        steps = self.state.global_step - getattr(self, "_initial_global_step", 0)
        return {"train_loss": self._logged_loss / max(steps, 1)}

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Save and stop, if this process has been told to end."""
        if self._sharded is not None:
            self._sharded.forget_gradients_()  # the parent has, of the parameters
        step = self.state.global_step
        if self._leaving is not None and self._left_at != step and self._leaving.due(step):
            self._left_at = step  # at the end of an epoch this is called again
            self.control.should_save = self.control.should_training_stop = True
            if self.is_world_process_zero():
                logger.warning(
                    "Told to end: training stops after step %d of %d and writes a checkpoint. Go on with "
                    "trainer.train(resume_from_checkpoint=True).",
                    step,
                    self.state.max_steps,
                )
        if self.control.should_log or self.control.should_save:
            self._meet()
        super()._maybe_log_save_evaluate(*args, **kwargs)
