"""How the trainer finds the checkpoint that a run goes on from, in a folder or on the Hub: one for all processes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from hf_blocklocal.config.block_local import CONFIG_NAME, BlockLocalConfig
from hf_blocklocal.config.defaults import borrowing_as, learning_as
from hf_blocklocal.errors import FetchError
from hf_blocklocal.hub import fetch_checkpoint
from hf_blocklocal.parallel.folders import check_checkpoint_everywhere, check_shared
from hf_blocklocal.trainer.stationed import TakesStation


logger = logging.getLogger(__name__)


class FindsCheckpoints(TakesStation):
    """Refuses what would go wrong on machines that do not see the folders of the first."""

    def _checkpoint_here(self, source: str | os.PathLike[str] | bool | None) -> str | bool | None:
        """Return what the parent is to resume from.

        Args:
            source: What a user has given: a folder, a repository on the Hub, or True for the last checkpoint.

        Raises:
            FetchError: If there is no such folder and no such repository.
            FolderNotSharedError: If processes would resume from different checkpoints.
        """
        if source is None or source is False:
            return source
        folder, refusal = None, None
        if source is True:
            output = self.args.output_dir
            folder = get_last_checkpoint(output) if Path(output).is_dir() else None
        else:
            try:
                folder = str(fetch_checkpoint(source, token=self.args.hub_token))
            except FetchError as error:
                refusal = error
        if self._chain is not None:
            check_checkpoint_everywhere(self._chain, None if folder is None else Path(folder) / TRAINER_STATE_NAME)
        if refusal is not None:
            raise refusal
        return True if source is True else folder

    def _borrow_as_in(self, checkpoint: str | bool | None) -> None:
        """Go on as the run that is gone on with, where nobody says how: how heads borrow copies, and at which rates.

        Args:
            checkpoint: What `_checkpoint_here` has returned.
        """
        if not checkpoint or (self.optimizer is not None and self._assembly is not None):
            return  # the optimizer may hold the heads that are there
        folder = get_last_checkpoint(self.args.output_dir) if checkpoint is True else checkpoint
        if folder is None or not (Path(folder) / CONFIG_NAME).is_file():
            return
        saved = BlockLocalConfig.from_pretrained(folder)
        config = borrowing_as(self.block_local, saved)
        if config != self.block_local:
            logger.warning("Heads borrow copies, as in the run of %s that is gone on with.", folder)
            self.block_local, self._assembly = config, None
        config = learning_as(self.block_local, saved)
        if config.block_lr_decay not in (None, self.assembly.config.block_lr_decay):
            logger.warning("Blocks learn at the rates of the run of %s that is gone on with.", folder)
            self.block_local, self._assembly = config, None

    def _check_best_can_be_loaded(self) -> None:
        """Refuse to load the best model from where some processes do not see it, before anything is trained."""
        if self._chain is not None and self.args.load_best_model_at_end:
            check_shared(self._chain, Path(self.args.output_dir), "load_best_model_at_end=True")
