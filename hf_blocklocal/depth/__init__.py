"""What one run of block-local training yields in several depths: smaller models, and models that stop early."""

from hf_blocklocal.depth.exits import EarlyExit, early_exit
from hf_blocklocal.depth.measures import Depth, measure, measure_depths, sweep, table
from hf_blocklocal.depth.opening import open_trained
from hf_blocklocal.depth.truncation import Fit, truncate


__all__ = [
    "Depth",
    "EarlyExit",
    "Fit",
    "early_exit",
    "measure",
    "measure_depths",
    "open_trained",
    "sweep",
    "table",
    "truncate",
]
