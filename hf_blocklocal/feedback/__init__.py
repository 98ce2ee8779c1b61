"""Feedback heads: a readout, the network that carries the target, and the loss where their messages meet."""

from __future__ import annotations

from hf_blocklocal.feedback.base import FeedbackNetwork
from hf_blocklocal.feedback.building import FEEDBACK, build_head
from hf_blocklocal.feedback.chained import ChainedFeedback
from hf_blocklocal.feedback.direct import DirectFeedback
from hf_blocklocal.feedback.head import FeedbackHead
from hf_blocklocal.feedback.label import LabelFeedback
from hf_blocklocal.feedback.lens import Lens
from hf_blocklocal.feedback.prototype import PrototypeFeedback
from hf_blocklocal.feedback.readout import READOUTS, LinearReadout, MLPReadout


__all__ = [
    "FEEDBACK",
    "READOUTS",
    "ChainedFeedback",
    "DirectFeedback",
    "FeedbackHead",
    "FeedbackNetwork",
    "LabelFeedback",
    "Lens",
    "LinearReadout",
    "MLPReadout",
    "PrototypeFeedback",
    "build_head",
]
