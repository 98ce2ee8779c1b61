"""What only GPUs can show of blocks on several devices: that the host really waits for none of them."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from stepping import stepped
from test_parity import arguments, examples
from transformers import TrainerCallback
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer, assemble
from hf_blocklocal.crossing import sent, set_out
from hf_blocklocal.devices.spreading import Spread


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NAMES = ["bert", "llama", "gpt2", "vit", "t5"]
# These make the host wait in their own forward pass, whoever trains them: they index by numbers of the CPU.
IMPATIENT = ["wav2vec2", "deberta_v2"]


@contextmanager
def no_waiting():
    """Fail where an operation makes the host wait for a device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses_of(name, devices, *, steps=4):
    """Return the losses of some steps. From the second one on, when memory and libraries are there, none may wait."""
    model, specimen = SPECIMENS[name].build(), SPECIMENS[name]
    model.config.use_cache = False
    options = {"head_layers": 0} if name == "wav2vec2" else {"head_refresh_steps": 2, "head_refresh_lag": 1}
    config = BlockLocalConfig(num_blocks=len(devices), placement="devices", **options)
    assembly = assemble(model, config, specimen.batch(0))
    assembly = Spread(assembly, devices, specimen.batch(0)).assembly
    optimizer = torch.optim.AdamW(assembly.module.parameters(), lr=1e-3)
    model.train()
    losses = []
    for step in range(steps):
        batch = specimen.batch(step + 1)
        targets = assembly.read_targets(batch, seed=(step,))
        with no_waiting() if step > 0 and name not in IMPATIENT else nullcontext():
            assembly.begin_step(step)
            losses.append(stepped(assembly, optimizer, batch, targets, step=step))
    return [[loss.item() for loss in step] for step in losses]


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_two_blocks_on_one_gpu_never_make_the_host_wait(name):
    losses = losses_of(name, [torch.device("cuda", 0)] * 2)
    assert torch.tensor(losses).isfinite().all()


@pytest.mark.two_gpus
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", [*NAMES, *IMPATIENT])
def test_blocks_learn_on_two_gpus_what_they_learn_on_one(name):
    one = losses_of(name, [torch.device("cuda", 0)] * 2)
    two = losses_of(name, [torch.device("cuda", 0), torch.device("cuda", 1)])
    assert torch.allclose(torch.tensor(one), torch.tensor(two), rtol=1e-4)


@pytest.mark.two_gpus
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_weights_that_have_set_out_arrive_as_they_were():
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    tensor = sent(torch.arange(1 << 20).float(), there)
    underway = set_out(tensor, here)
    tensor.zero_()
    arrived = underway.arrived()
    assert arrived.device == here
    assert torch.equal(arrived.cpu(), torch.arange(1 << 20).float())


@pytest.mark.two_gpus
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("precision", [{}, {"fp16": True}])
@pytest.mark.parametrize("placement", ["auto", "devices"])
def test_the_trainer_never_waits_between_two_logs(placement, precision, tmp_path):
    class NoWaiting(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if state.global_step > 1 else "default")

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("default")

    SPECIMENS["llama"].build().save_pretrained(tmp_path / "model")
    kind = type(SPECIMENS["llama"].build())
    device_map = "balanced" if placement == "auto" else None
    trainer = BlockLocalTrainer(
        kind.from_pretrained(tmp_path / "model", device_map=device_map),
        arguments(tmp_path, use_cpu=False, max_steps=6, logging_steps=6, **precision),
        train_dataset=examples(SPECIMENS["llama"]),
        eval_dataset=examples(SPECIMENS["llama"], 2),
        block_local=BlockLocalConfig(placement=placement),
        callbacks=[NoWaiting()],
    )
    trainer.train()
    assert len({parameter.device for parameter in trainer.model.parameters()}) > 1
    assert "eval_block_0_loss" in trainer.evaluate()
