"""Every error this package raises on purpose, each with when it comes and what to do next.

They keep `ValueError` (bad input) or `RuntimeError` (something happened while training) as a base, so code that
already catches those keeps working.
"""

from __future__ import annotations


class BlockLocalError(Exception):
    """Base of every error of this package."""


class ConfigError(BlockLocalError, ValueError):
    """A `BlockLocalConfig` contradicts itself. Raised when it is made; change the named field."""


class CutError(BlockLocalError, ValueError):
    """The layers cannot be cut as asked. Raised before training; choose other `num_blocks` or `boundaries`."""


class PlacementError(BlockLocalError, ValueError):
    """Blocks do not fit on their devices. Raised before anything is loaded; the text says what would fit."""


class LayersNotFoundError(BlockLocalError, ValueError):
    """No stack of layers was found, or the named one is none. Raised before training; pass `layers` by hand."""


class SharedLayersError(BlockLocalError, ValueError):
    """A layer runs more than once in a forward pass, so it belongs to no single block. Such models are refused."""


class UnsupportedSettingError(BlockLocalError, ValueError):
    """An argument asks for something that cannot work block-locally (yet). Raised before training, by name."""


class SplitError(BlockLocalError, ValueError):
    """A block by itself gives something else than inside the whole model. Raised before training, nothing is lost."""


class TargetError(BlockLocalError, ValueError):
    """The batch holds no target, or one that no feedback head can teach. Raised before training."""


class HeadsMismatchError(BlockLocalError, ValueError):
    """A file of feedback heads does not belong to this model or this cut. Nothing has been loaded."""


class AnchorMismatchError(BlockLocalError, ValueError):
    """A checkpoint does not say where the weights of its run started, or not of these weights. Nothing was loaded."""


class CopiesMismatchError(BlockLocalError, ValueError):
    """A checkpoint does not hold the copies that heads borrow, or those of other weights. Nothing was loaded."""


class NonFiniteLossError(BlockLocalError, RuntimeError):
    """The loss of one block became NaN or infinite. The block was not updated; its weights are still finite."""


class InputsNeededError(BlockLocalError, ValueError):
    """The inputs of a forward pass are needed, for heads that borrow layers, for denoising, or to know a model."""


class LossNotSentBackError(BlockLocalError, RuntimeError):
    """The last block's loss was not sent back where blocks below it wait for it. Send it back inside the step."""


class BoundaryNotReachedError(BlockLocalError, RuntimeError):
    """A forward pass ended without running the last layer of a block, so the block could not learn."""


class NotPushableError(BlockLocalError, ValueError):
    """A push cannot work as asked: the folder is no run, or name or token will not do. Nothing was sent."""


class PushError(BlockLocalError, RuntimeError):
    """A run did not get to the Hub. It is whole on disk, and the message holds the command that sends it later."""


class FetchError(BlockLocalError, RuntimeError):
    """What was named is no folder and no repository that can be read. The message says why; nothing was loaded."""


class MissingExtraError(BlockLocalError, ImportError):
    """A library that only some users need is not installed. Run the command in the message."""


class NothingToDrawError(BlockLocalError, ValueError):
    """A folder holds no run, or one with nothing to draw. Name another folder, or train with logs or callbacks."""


class BlockPeerError(BlockLocalError, RuntimeError):
    """A process that holds another block is gone, stuck or has failed. Resume from the last checkpoint."""


class BatchMismatchError(BlockLocalError, RuntimeError):
    """Processes of one chain read different batches. Make data loading the same in all of them, then start again."""


class OutOfStepError(BlockLocalError, RuntimeError):
    """A process of a chain has ended where another goes on. Let callbacks and conditions come out the same in all."""


class FolderNotSharedError(BlockLocalError, ValueError):
    """Processes of several machines do not see the same folder, and have to. Share it, or copy what is missing."""


class HistoryError(BlockLocalError, ValueError):
    """A history file is missing or holds a line that is no row. The message names the line; mend or remove it."""


class CardError(BlockLocalError, ValueError):
    """A model card cannot be made as asked: from that template, or beside that baseline. The model itself is saved."""


class TruncationError(BlockLocalError, ValueError):
    """A trained model cannot be made smaller as asked. Nothing was written; the message says what can be."""
