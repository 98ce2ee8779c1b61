"""Losses that are scaled as for fp16, in float32, and gradients that overflow when they are told to."""

from __future__ import annotations

import torch

from hf_blocklocal import BlockLocalTrainer


def scaled(trainer, **options):
    """Return a trainer whose losses are scaled, as accelerate has it with fp16 on a GPU."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", **options)
    return trainer


class HalvedTrainer(BlockLocalTrainer):
    """Computes in fp16, which accelerate does not ask of a CPU."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"
        scaled(self)


def overflows(trainer, steps, path):
    """Let a gradient overflow in some steps, at one place of the output of a part of the model that is here."""

    def spoil(module, args, output):
        if module.training and output.requires_grad and trainer.state.global_step + 1 in steps:
            output.register_hook(spoilt)

    trainer.model.get_submodule(path).register_forward_hook(spoil)
    return trainer


def spoilt(gradient):
    """Return a gradient of which one number is infinite."""
    gradient = gradient.clone()
    gradient.view(-1)[0] = torch.inf
    return gradient
