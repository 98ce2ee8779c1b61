"""How a model is cut into blocks and how each block is taught.

Plain values that go to JSON and back. Nothing here touches a model; what a value means is decided where it is used.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from hf_blocklocal.config.combinations import check_combinations
from hf_blocklocal.config.presets import PRESETS
from hf_blocklocal.config.values import check_types, check_values
from hf_blocklocal.errors import ConfigError


CONFIG_NAME = "block_local_config.json"
DEFAULT_BLOCKS = 2


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class BlockLocalConfig:
    """Configuration of block-local learning, saved beside the model as `block_local_config.json`.

    Changing one line, `Trainer(...)` to `BlockLocalTrainer(..., block_local=BlockLocalConfig(num_blocks=3))`, is the
    whole migration; every other field has a default.

    Raises:
        ConfigError: If a value is impossible by itself. What depends on the model or the data is checked before
            training starts.
    """

    num_blocks: int | None = _help(
        None,
        "Blocks to cut the layers into; 1 is ordinary backpropagation. Default: what boundaries make, or one for each "
        "device that a model is spread over, else 2.",
    )
    boundaries: list[int] | None = _help(
        None, "First layer of every block but the first, counted in the order of execution. Replaces num_blocks."
    )
    balance: Literal["layers", "cost"] = _help(
        "layers",
        "What the blocks are equal in: layers, or the floating-point operations of a traced batch, heads included.",
    )
    block_parallel_size: int = _help(
        1,
        "Processes that a model is spread over, one block each: 1, or num_blocks. With K of them, accelerate launch "
        "--num_processes D*K makes D chains of K blocks.",
    )
    shard_replicas: bool = _help(
        False,
        "Whether the D processes that hold the same block share out the weights, gradients and optimizer state of its "
        "layers (FSDP2, a layer at a time), in place of a copy in each. Needs block_parallel_size above 1.",
    )
    placement: Literal["auto", "devices"] = _help(
        "auto",
        "Where the blocks of one process lie: auto follows the device map that a model was loaded with, and without "
        "one takes one device; devices spreads a model that is on one device over all accelerators of the process.",
    )
    tied_weights: Literal["auto", "add", "untie", "freeze"] = _help(
        "auto",
        "What becomes of a weight that several blocks use, such as a tied embedding: add up the gradients, untie the "
        "language-model head from the input embedding, or freeze it. Auto adds up on one device, and where blocks "
        "are on several it unties, or freezes where that is not possible.",
    )
    peer_timeout: float = _help(
        25.0, "Seconds without a sign of life after which a process that holds another block counts as lost."
    )
    save_on_exit: bool = _help(
        False, "Whether training that is told to end, by Ctrl-C or SIGTERM, writes a checkpoint first."
    )
    layers: list[str] | None = _help(
        None, "Dotted names of the lists of layers to cut, for models whose structure does not show them."
    )
    feedback: Literal["auto", "direct", "chained", "label", "prototype"] = _help(
        "auto",
        "Network that carries the target to a block. direct: learned and linear; chained: the same, but from the "
        "message of the block above; label: the target itself; prototype: class prototypes. auto: label where heads "
        "borrow layers and for targets that are no classes or tokens, else direct.",
    )
    loss: Literal["auto", "contrast", "agreement", "kappel2023"] = _help(
        "auto", "Loss where a block's message and the target's message meet. Each feedback network has its own."
    )
    family: Literal["auto", "gaussian", "bernoulli", "categorical", "vmf"] = _help(
        "auto",
        "Exponential family of the messages. auto: that of the target where the message is the target itself, else "
        "gaussian.",
    )
    latent_dim: int = _help(128, "Units of the latent between a block and a learned feedback network.")
    readout: Literal["linear", "mlp"] = _help(
        "linear", "What reads a message from a block's output: one linear map, or two with a GELU between them."
    )
    head_layers: int | None = _help(
        None,
        "Layers above a block that its head borrows, evenly spread, live and read-only, with the model's own task "
        "head. 0 is a light readout; all of them give the very gradient of backpropagation. Default: 1 in two blocks "
        "and 2 in more, and of a decoder that is elsewhere; 0 where layers change the shape of what they are given, "
        "as in a Swin, and where a field asks for a head of another kind. docs/learning.md has what each learns.",
    )
    head_bypass: Literal["auto", "skip", "straight_through"] = _help(
        "auto",
        "How a head that borrows layers gets past the others above its block. skip: leaves them out. "
        "straight_through: runs them forward and sends gradients past them unchanged, so that its loss is the model's "
        "own; evaluations leave them out all the same. auto: straight_through in encoder-decoders "
        "whose blocks are in one process and on one device, with live layers; else skip.",
    )
    head_lens: bool = _help(
        False,
        "Whether a learned affine map, the identity at first, translates a block's output for what its head borrows. "
        "With head_layers=0 that is the model's own final norm and task head.",
    )
    head_copies: Literal["auto", "frozen", "trained"] = _help(
        "auto",
        "What becomes of copies of borrowed layers between two refreshes. trained: each head trains its own with its "
        "block; frozen: they stay as they are. auto: trained, wherever heads borrow copies, as they do in several "
        "processes and, with any of these fields set, in one.",
    )
    head_refresh_steps: int | None = _help(
        None,
        "Steps from one copy of the borrowed layers to the next; 0 never takes another after those that training "
        "begins with. Default: 10 where heads borrow copies, 0 for those that they train of a shortened decoder; "
        "where they do not, layers are live.",
    )
    head_refresh_lag: int | None = _help(
        None,
        "Steps that a copy of the borrowed layers is old when it is taken into use, so that no block has to wait. "
        "Default: 1 + (K - 1) // 3.",
    )
    head_refresh_decay: float | None = _help(
        None,
        "Share of the old copy that stays when a new one is taken: an exponential moving average. Default: 0.5 for "
        "copies that are trained, 0 for others.",
    )
    sim: float = _help(
        0.0,
        "Weight of similarity matching in a block's loss, 0 to 1; the loss of the head has the rest. At 1 the readout "
        "still learns, for evaluation, and teaches the block nothing.",
    )
    reconstruction: float = _help(
        0.0,
        "Weight, beside the loss of a block's head, of the mean squared error of a linear map that reads the block's "
        "normalised input from its output. Keeps in a block what its own head has no use for.",
    )
    denoising: float = _help(
        0.0,
        "Weight, beside the loss of a block's head, of the mean squared distance between the block's output and that "
        "for a slightly noisy input. Runs each block twice.",
    )
    overlap: int = _help(
        0,
        "Blocks below its own that the loss of a block teaches too. The activations of that many blocks more are kept "
        "until it has.",
    )
    pooling: Literal["mean", "first", "last"] = _help(
        "mean", "How a readout pools the sequence where the target belongs to the whole sample."
    )
    negatives: int | None = _help(
        1024, "Negatives that a contrast over a vocabulary draws, shared by all blocks. None is the whole vocabulary."
    )
    chunked_loss: int | None = _help(
        None,
        "Tokens whose logits the last block makes at a time for its loss over a vocabulary, and makes again in the "
        "backward pass; global steps excepted. Default: those of all tokens at once, as the model does.",
    )
    step_per_block: bool = _help(
        False, "Step each block right after its backward pass and free its gradients. The weights come out the same."
    )
    block_lr_decay: float | None = _help(
        None,
        "Factor of the learning rate of the model's weights from a block to the one below; the last block and heads "
        "have the run's, and copies that heads train that of their originals. Default: such that the lowest block of "
        "a pretrained model has 0.3 of the run's; 1 where the model is not pretrained, or has adapters.",
    )
    feedback_learning_rate: float | None = _help(
        None,
        "Learning rate of the feedback networks, in place of the run's and of block_lr_decay, scheduled as the run's. "
        "Default: they learn as their head.",
    )
    satisfied_at: float | None = _help(
        None, "Probability under a block's head from which on a target no longer teaches the block. Default: never."
    )
    anchor: float = _help(
        0.0,
        "Pull of the weights below the last block towards where they started: after each step the learning rate times "
        "this, times the distance, as AdamW decays weights. Keeps a copy of those weights.",
    )
    global_every: int | None = _help(
        None,
        "Every how many optimizer steps one is global: backpropagation through the whole model from its own loss. It "
        "takes the memory of ordinary training. Default: none is.",
    )
    polish: float = _help(0.0, "Share of the run's optimizer steps, at its end, that are global.")
    bootstrap: float = _help(
        0.0,
        "Weight, 0 to 1, of the target's message in what a block hands on at the first step, as a posterior. It falls "
        "to 0 during the run, and evaluation never has any. Needs learned feedback and a linear readout.",
    )
    bootstrap_until: float = _help(0.5, "Share of the run's optimizer steps at which bootstrap has fallen to 0.")
    head_warmup_steps: int = _help(
        0, "Optimizer steps at the start in which only the heads learn, and the last block, as it always does."
    )
    evaluate_blocks: bool = _help(True, "Report in every evaluation what each block's head would have predicted.")

    def __post_init__(self) -> None:
        # Lists by their types, for `HfArgumentParser`; tuples once they are here, so that nobody changes them.
        if isinstance(self.layers, str):
            object.__setattr__(self, "layers", (self.layers,))
        for name in ("boundaries", "layers"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self)
        object.__setattr__(self, "_cut_is_open", self.num_blocks is None and self.boundaries is None)
        if self.num_blocks is None:
            object.__setattr__(
                self, "num_blocks", DEFAULT_BLOCKS if self.boundaries is None else len(self.boundaries) + 1
            )
        check_values(self)
        check_combinations(self)
        self._check_cut()

    @property
    def leaves_cut_open(self) -> bool:
        """Whether nobody has said how many blocks there are to be. `dataclasses.replace` settles it."""
        return self._cut_is_open

    @property
    def blocks_apart(self) -> bool:
        """Whether blocks lie on several devices, in one process or in several, so that none may wait for another."""
        return self.block_parallel_size > 1 or self.placement == "devices"

    @property
    def apart_by(self) -> str:
        """The option that puts blocks in different places, for messages."""
        size = self.block_parallel_size
        return f"block_parallel_size={size}" if size > 1 else f"placement={self.placement!r}"

    @property
    def is_live(self) -> bool:
        """Whether heads are to borrow the layers themselves and no copies, as far as the fields say."""
        asked = {"head_copies": "auto", "head_refresh_steps": 1, "head_refresh_lag": 0, "head_refresh_decay": 0}
        return all(getattr(self, name) in (None, live) for name, live in asked.items())

    @property
    def borrows(self) -> bool:
        """Whether heads are known to borrow the model's own upper parts."""
        return bool(self.head_layers) or self.head_lens

    def _check_cut(self) -> None:
        if self.boundaries is None:
            return
        if self.num_blocks != len(self.boundaries) + 1:
            raise ConfigError(
                f"num_blocks={self.num_blocks} contradicts boundaries={list(self.boundaries)}, which make "
                f"{len(self.boundaries) + 1} blocks. Leave one of the two out."
            )
        if self.balance != "layers":
            raise ConfigError(f"balance={self.balance!r} and explicit boundaries exclude each other. Leave one out.")
        if list(self.boundaries) != sorted(set(self.boundaries)) or (self.boundaries and self.boundaries[0] < 1):
            raise ConfigError(
                f"boundaries={list(self.boundaries)} must ascend strictly from at least 1: each is the first layer of "
                "a block, and layer 0 always opens the first one."
            )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> BlockLocalConfig:
        """Make a configuration from a named one.

        Args:
            name: `"pred"`, a linear classifier on every block; `"dgl"`, one with a hidden layer; `"sim"`,
                similarity matching; `"predsim"`, both; `"kappel2023"`, prototypes;
                `"interlocking"`, linear classifiers with overlap; or `"backprop"`, a single block.
            **overrides: Fields to set on top of the preset.

        Raises:
            ConfigError: If there is no such preset.
        """
        if name not in PRESETS:
            raise ConfigError(f"There is no preset {name!r}. Choose one of {sorted(PRESETS)}.")
        if overrides.get("num_blocks", ...) is None:
            del overrides["num_blocks"]
        fixed = PRESETS[name].get("num_blocks")
        if fixed is not None and overrides.get("num_blocks", fixed) != fixed:
            raise ConfigError(
                f"The preset {name!r} is a single block, and num_blocks={overrides['num_blocks']} is asked for. Leave "
                "one of the two out. Heads that borrow all layers above have the gradient of backpropagation too."
            )
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BlockLocalConfig:
        """Make a configuration from plain values, as read from JSON or YAML.

        Raises:
            ConfigError: If a key is unknown.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"Unknown block-local options {unknown}. Known are {known}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-able values, from which `from_dict` makes the same configuration."""
        values = json.loads(json.dumps(asdict(self)))
        return values | {"num_blocks": None} if self.leaves_cut_open else values

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """Write `block_local_config.json` into a folder, which is made if need be.

        Returns:
            The file.
        """
        path = Path(save_directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, save_directory: str | os.PathLike[str]) -> BlockLocalConfig:
        """Read `block_local_config.json` from a folder; `hf_blocklocal.fetch` makes one of a repository.

        Raises:
            ConfigError: If there is no such folder, it holds no such file, or one with unknown options.
        """
        path = Path(save_directory) / CONFIG_NAME
        if not path.parent.is_dir():
            raise ConfigError(
                f"There is no folder {save_directory}. If it is a repository of the Hub: "
                f"BlockLocalConfig.from_pretrained(hf_blocklocal.fetch({str(save_directory)!r}))."
            )
        if not path.is_file():
            raise ConfigError(f"{save_directory} holds no {CONFIG_NAME}: it was not saved by block-local training.")
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))


# The text of every field stands once, at the field; `help()` shows it too.
BlockLocalConfig.__doc__ = f"{BlockLocalConfig.__doc__}\n    Attributes:\n" + "\n".join(
    f"        {f.name} (default {f.default!r}): {f.metadata['help']}" for f in fields(BlockLocalConfig)
)
