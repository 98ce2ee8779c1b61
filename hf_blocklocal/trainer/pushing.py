"""What the trainer sends to the Hub.

A push never stops training, and nothing is sent before it is saved.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy

from hf_blocklocal.errors import NotPushableError
from hf_blocklocal.hub import (
    FAILURES,
    Destination,
    Patience,
    PushesBeside,
    announce,
    answers_within,
    cause_of,
    check_destination,
    push_run,
    run_files,
)
from hf_blocklocal.hub.files import notes


logger = logging.getLogger(__name__)

# Statuses that no waiting changes: worth an error before anything is trained.
_REFUSED = {"401", "403"}


class PushesRuns(Trainer):
    """Pushes runs.

    Attributes:
        push_patience: How long a push goes on trying; give a trainer one of its own to change it.
    """

    push_patience = Patience()
    _beside: PushesBeside | None = None

    # ---- Before training ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, or find out on all processes that this can never work; a Hub that is down can wait.

        Raises:
            NotPushableError: If name or token will not do.
        """
        destination = self._destination(token=token, private=private)
        outcome = [destination.repo, None]
        if self.is_world_process_zero():
            outcome = self._first_contact(destination)
        if self.args.world_size > 1:
            broadcast_object_list(outcome)
        self.hub_model_id, refusal = outcome
        if refusal is not None:
            raise NotPushableError(refusal)

    def _first_contact(self, destination: Destination) -> list[str | None]:
        """Return the full name of the repository as far as it is known, and why pushing can never work, if so."""
        try:
            check_destination(destination)
            return [announce(destination, silence=self.push_patience.silence), None]
        except NotPushableError as error:
            return [destination.repo, str(error)]
        except FAILURES as error:
            cause = cause_of(error)
            if cause.name in _REFUSED:
                return [destination.repo, f"{destination.repo} cannot be pushed to: {cause.text}."]
            logger.warning("%s: %s. Training goes on; pushing is tried again later.", destination.repo, cause.text)
            return [destination.repo, None]

    def _destination(
        self, *, token: str | None = None, private: bool | None = None, revision: str | None = None
    ) -> Destination:
        return Destination(
            self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            token=self.args.hub_token if token is None else token,
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision if revision is None else revision,
        )

    # ---- Beside training ----

    @property
    def _pushes(self) -> PushesBeside:
        """Pushes made beside training, by the first process alone."""
        if self._beside is None or self._beside.patience != self.push_patience:
            self._finish_current_push()
            self._beside = PushesBeside(self.push_patience)
        return self._beside

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the model of a checkpoint in the background, in place of the parent's jobs that nobody looks after."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        checkpoint, folder = Path(checkpoint_folder), Path(self.args.output_dir)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            self._pushes.keep(checkpoint, "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name)
        if self._pushes.is_busy and not self.args.hub_always_push:
            logger.info("The last push is still under way, so %s waits for the next.", checkpoint.name)
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        reached = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch)}"
        message = f"Training in progress, {reached}"
        self._pushes.push(checkpoint, notes(folder), self._destination(), message=message, folder=folder)

    def _finish_current_push(self) -> None:
        """Wait for pushes under way, but not for ever."""
        if self._beside is not None:
            self._beside.finish()

    # ---- After training ----

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the run, then push it, and go on trying for a while if the Hub fails.

        Args:
            commit_message: First line of the commit.
            blocking: Whether to wait; otherwise a future is returned, whose `result()` is to be waited for before the
                process ends.
            token: A token that may write; by default `hub_token`.
            revision: Branch to push to; by default `hub_revision`.
            private: Whether a new repository is private; by default `hub_private_repo`.
            **kwargs: For `create_model_card`.

        Returns:
            What the Hub says of the commit, or a future of that; None in other processes than the first, which do not
            wait.

        Raises:
            NotPushableError: If name or token will not do. The run is saved.
            PushError: If the Hub cannot be brought to take it. The run is saved.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = self.args.output_dir
        logger.info("The run is saved in %s.", folder)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        destination = self._destination(token=token, private=private, revision=revision)
        check_destination(destination)
        destination = self._with_namespace(destination)
        self._write_card(destination, **kwargs)
        push = partial(push_run, folder, destination, message=commit_message, patience=self.push_patience)
        if not blocking:
            return self._pushes.start(push, seconds=self.push_patience.limit_for(run_files(folder)))
        self._finish_current_push()
        return push()

    def _with_namespace(self, destination: Destination) -> Destination:
        """Ask whose repository it is, so that the card can name it; a Hub that fails is not asked twice."""
        if "/" not in destination.repo:
            try:
                self.hub_model_id = announce(destination, silence=self.push_patience.silence)
            except FAILURES as error:
                logger.info("The card goes without a namespace: %s.", cause_of(error).text)
                return destination
            return replace(destination, repo=self.hub_model_id)
        self.hub_model_id = destination.repo
        return destination

    def _write_card(self, destination: Destination, **kwargs: Any) -> None:
        """Write the card, with the tags of the model; that of the parent may ask the Hub for the licence of a base."""
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        tags += [tag for tag in getattr(self.model, "model_tags", None) or [] if tag not in tags]
        kwargs.setdefault("model_name", destination.repo.rpartition("/")[2])
        with answers_within(self.push_patience.silence):
            self.create_model_card(tags=tags or None, **kwargs)
