"""What the trainer tells about a run beside the model: its history, its figures and its model card."""

from __future__ import annotations

import logging
from typing import Any

from transformers import Trainer, TrainerCallback

from hf_blocklocal.callbacks import HistoryCallback, ModelCardCallback
from hf_blocklocal.card import CardStatement
from hf_blocklocal.errors import CardError, MissingExtraError, NothingToDrawError
from hf_blocklocal.plots import draw_run


logger = logging.getLogger(__name__)
OBSERVERS = (HistoryCallback, ModelCardCallback)


class WritesCards(Trainer):
    """Keeps a history, and writes it with a card wherever the model of a finished run is saved."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for kind in OBSERVERS:
            self.add_callback(kind(self))

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Let another history or card take the place of the one that is there."""
        for kind in OBSERVERS:
            if isinstance(callback, kind) and (before := self.pop_callback(kind)) is not None:
                callback.take_over(before)
        super().add_callback(callback)

    def _observer(self, kind: type[TrainerCallback]) -> Any:
        return next((seen for seen in self.callback_handler.callbacks if isinstance(seen, kind)), None)

    @property
    def history(self) -> HistoryCallback | None:
        """What keeps the history; None if it has been removed."""
        return self._observer(HistoryCallback)

    @property
    def model_card(self) -> ModelCardCallback | None:
        """What writes the card; None if it has been removed."""
        return self._observer(ModelCardCallback)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write history and card beside the model of a finished run."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.is_world_process_zero():
            folder = self.args.output_dir if output_dir is None else output_dir
            self._save_history(folder)
            if self.model_card is not None and self.model_card.finished:
                try:
                    self.model_card.write(folder)
                except CardError as error:  # the model is saved, and the script may have more to do
                    logger.warning("%s is saved without a card of this run. %s", folder, error)

    def save_state(self) -> None:
        """Write the history beside the state."""
        super().save_state()
        if self.is_world_process_zero():
            self._save_history(self.args.output_dir)

    def _save_history(self, folder: str) -> None:
        if self.history is not None:
            self.history.save(folder)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,  # noqa: A002
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write figures and card into the output folder, in place of the parent's draft; arguments are the parent's.

        Figures are drawn if matplotlib is installed and the run has something to show.
        """
        stated = CardStatement(
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=dataset,
            dataset_args=dataset_args,
        )
        if self.model_card is None:
            super().create_model_card(**vars(stated))
        elif self.is_world_process_zero():
            self._save_history(self.args.output_dir)
            try:
                draw_run(self.args.output_dir)
            except (MissingExtraError, NothingToDrawError) as error:
                logger.info("The card goes without figures. %s", error)
            self.model_card.write(self.args.output_dir, stated.over(self.model_card.facts()))
