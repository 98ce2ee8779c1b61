"""How far the clocks of processes on several machines are apart, so that moments of one can be told beside another's.

A process asks the first one for the time and takes the answer to have been given half-way between. That is off by at
most half of the time that the answer took, so the quickest of several answers is believed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist


_ANSWERS = 8


@dataclass(frozen=True)
class Answer:
    """What somebody else's clock showed.

    Attributes:
        asked: When it was asked for, by the clock here.
        shown: What it showed.
        came: When the answer was here, by the clock here.
    """

    asked: float
    shown: float
    came: float


def ahead_by(answers: Iterable[Answer]) -> float:
    """Return by how many seconds another clock is ahead of the one here.

    Clocks that cannot be told apart are taken to be one, as those of a machine's processes are.
    """
    best = min(answers, key=lambda answer: answer.came - answer.asked)
    ahead = best.shown - (best.asked + best.came) / 2
    return ahead if abs(ahead) > (best.came - best.asked) / 2 else 0.0


def tell_time(rank: int, group: dist.ProcessGroup) -> None:
    """Answer a process that calls `ask_time`."""
    question = torch.empty(1)
    for _ in range(_ANSWERS):
        dist.recv(question, rank, group=group)
        dist.send(torch.tensor([time.time()], dtype=torch.float64), rank, group=group)


def ask_time(rank: int, group: dist.ProcessGroup) -> list[Answer]:
    """Ask a process, which calls `tell_time`, what its clock shows."""
    answers, question, shown = [], torch.zeros(1), torch.empty(1, dtype=torch.float64)
    for _ in range(_ANSWERS):
        asked = time.time()
        dist.send(question, rank, group=group)
        dist.recv(shown, rank, group=group)
        answers.append(Answer(asked, shown.item(), time.time()))
    return answers
