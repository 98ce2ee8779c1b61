"""Build the head of a block from what the config says and what the targets allow."""

from __future__ import annotations

from torch import nn

from hf_blocklocal.config.block_local import BlockLocalConfig
from hf_blocklocal.errors import TargetError
from hf_blocklocal.feedback.base import FeedbackNetwork
from hf_blocklocal.feedback.chained import ChainedFeedback
from hf_blocklocal.feedback.direct import DirectFeedback
from hf_blocklocal.feedback.head import FeedbackHead
from hf_blocklocal.feedback.label import LabelFeedback
from hf_blocklocal.feedback.lens import Lens
from hf_blocklocal.feedback.prototype import PrototypeFeedback
from hf_blocklocal.feedback.readout import READOUTS
from hf_blocklocal.losses import LOSSES, Reconstruction, SimilarityMatching
from hf_blocklocal.losses.families import get_family
from hf_blocklocal.targets.batch import Alignment, Task


# To add a feedback network: a subclass of `FeedbackNetwork`, a line here, a test.
FEEDBACK: dict[str, type[FeedbackNetwork]] = {
    "chained": ChainedFeedback,
    "direct": DirectFeedback,
    "label": LabelFeedback,
    "prototype": PrototypeFeedback,
}

_NATURAL_FAMILY = {
    "classes": "categorical",
    "vocabulary": "categorical",
    "multi_label": "bernoulli",
    "regression": "gaussian",
    "spans": "categorical",
}


def build_head(
    config: BlockLocalConfig,
    task: Task,
    *,
    hidden_width: int,
    alignment: Alignment,
    embedding_width: int | None = None,
    entering_width: int | None = None,
    label_smoothing: float = 0.0,
    above: FeedbackNetwork | None = None,
) -> FeedbackHead:
    """Build the head of one block.

    Args:
        config: How blocks are taught. `"auto"` becomes direct feedback with Gaussian messages for targets that can be
            counted, and the target itself in its natural family for the others.
        task: What is to be predicted.
        hidden_width: Width of the block's output.
        alignment: What the readout looks at.
        embedding_width: Width of the model's target embedding, for a vocabulary.
        entering_width: Width of the block's input, where that is reconstructed.
        label_smoothing: As in `TrainingArguments.label_smoothing_factor`.
        above: The feedback network of the next block that has one, which a chained network listens to.

    Raises:
        TargetError: If the chosen feedback or family cannot carry targets of this task, or gives no probability, no
            similarity or nothing to learn where `satisfied_at`, `sim`, `bootstrap` or `feedback_learning_rate` asks
            for it.
    """
    borrows = config.borrows
    name, network = _choose_network(config, task)
    family = _choose_family(config, task, name, network)
    if network is ChainedFeedback and above is not None:
        feedback: FeedbackNetwork = ChainedFeedback(task, latent_dim=config.latent_dim, above=above)
    else:
        network = DirectFeedback if network is ChainedFeedback else network  # a chain starts at the target itself
        feedback = network(
            task, latent_dim=config.latent_dim, embedding_width=embedding_width, hidden_width=hidden_width
        )
    _check_options(config, task, feedback)
    # A borrowed language-model head is asked for the candidates alone.
    loss_name = "contrast" if borrows and task.target == "vocabulary" else feedback.loss
    loss = LOSSES[loss_name](get_family(family), label_smoothing=label_smoothing)
    readout = nn.Identity() if borrows else READOUTS[config.readout](hidden_width, feedback.units)
    reconstruction = None
    if config.reconstruction > 0:
        assert entering_width is not None, "a reconstruction has a width"
        reconstruction = Reconstruction(hidden_width, entering_width, weight=config.reconstruction)
    return FeedbackHead(
        readout,
        feedback,
        loss,
        alignment=alignment,
        pooling=config.pooling,
        borrows=borrows,
        lens=Lens(hidden_width) if config.head_lens else None,
        satisfied_at=config.satisfied_at,
        similarity=SimilarityMatching(hidden_width) if config.sim > 0 else None,
        sim=config.sim,
        reconstruction=reconstruction,
    )


def _choose_network(config: BlockLocalConfig, task: Task) -> tuple[str, type[FeedbackNetwork]]:
    """Return the name of a feedback network that can carry the targets, and its class."""
    name = config.feedback
    if name == "auto":
        name = "direct" if DirectFeedback.fits(task) and not config.borrows else "label"
    network = FEEDBACK[name]
    if not network.fits(task):
        raise TargetError(
            f"feedback={config.feedback!r} cannot carry {task.target!r} targets: {network.needs}. Use "
            "feedback='auto' or 'label'."
        )
    if config.loss not in ("auto", network.loss):
        raise TargetError(
            f"loss={config.loss!r} does not go with feedback={name!r}: the messages of {network.__name__} are made "
            f"for {network.loss!r}. Use loss='auto'."
        )
    return name, network


def _choose_family(config: BlockLocalConfig, task: Task, name: str, network: type[FeedbackNetwork]) -> str:
    """Return the family of the messages: that of the target where the target is the message."""
    natural = _NATURAL_FAMILY[task.target]
    family = config.family
    if family == "auto":
        family = natural if network.observed else "gaussian"
    if network.observed and family != natural:
        raise TargetError(
            f"family={family!r} does not describe {task.target!r} targets, and with feedback={name!r} the latent is "
            f"the target. Use family='auto' or {natural!r}."
        )
    return family


def _check_options(config: BlockLocalConfig, task: Task, feedback: FeedbackNetwork) -> None:
    """Refuse options of a head that its targets, or the network that carries them, have nothing to give for."""
    if config.satisfied_at is not None and task.target == "regression":
        raise TargetError(
            f"satisfied_at={config.satisfied_at} is a probability, and the heads of regression targets give none. "
            "Leave it out."
        )
    if config.sim > 0 and (task.target in ("regression", "spans") or task.size == 1):
        raise TargetError(
            f"sim={config.sim} compares one-hot targets with each other, which {task.target!r} targets of size "
            f"{task.size} are not. Leave it out, or use the preset 'pred'."
        )
    if config.bootstrap > 0 and feedback.observed:
        raise TargetError(
            f"bootstrap={config.bootstrap} mixes in what a learned feedback network says, and {task.target!r} targets "
            f"are given as they are ({type(feedback).__name__}). Leave it out."
        )
    if config.feedback_learning_rate is not None and not list(feedback.parameters()):
        raise TargetError(
            f"feedback_learning_rate={config.feedback_learning_rate} is for feedback networks that learn, and "
            f"{type(feedback).__name__} (feedback={config.feedback!r}, {task.target!r} targets) has no parameters. "
            "Leave it out, or use a feedback network that has some."
        )
