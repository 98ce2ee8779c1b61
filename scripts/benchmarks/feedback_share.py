"""Count what feedback costs: the heads' share of the parameters and of a training step's operations.

Takes models of real size with random weights and heads of their own, cuts them into blocks, and counts the
floating-point operations of one step, forward and backward, with the heads and without them. Only shapes are computed,
so no accelerator and little time is needed. Matrix products and convolutions count, as `FlopCounterMode` has it;
element-wise operations do not. The target is at most 5 % of each at K = 3.

    OMP_NUM_THREADS=1 python scripts/benchmarks/feedback_share.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from common import draw_tokens, parse, parser, prepare, print_table, write_report


TARGET = 0.05
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


@dataclass(frozen=True)
class Case:
    """A model and the batch it is trained on.

    Attributes:
        name: What it is called in the table.
        model_type: Architecture, as `AutoConfig` spells it; what `options` leaves out is the base size.
        auto_class: The `AutoModelFor...` class that picks the head.
        options: Fields of the model's config.
        batch: Samples in a batch.
        sequence: Tokens in a sample, None for images.
    """

    name: str
    model_type: str
    auto_class: str
    options: dict[str, Any]
    batch: int
    sequence: int | None


CASES = (
    Case("MiniLM, 8 classes", "bert", "AutoModelForSequenceClassification", MINILM | {"num_labels": 8}, 32, 64),
    Case("BERT-base, 8 classes", "bert", "AutoModelForSequenceClassification", {"num_labels": 8}, 32, 128),
    Case("BERT-base, tokens", "bert", "AutoModelForMaskedLM", {}, 32, 128),
    Case("GPT-2 small, tokens", "gpt2", "AutoModelForCausalLM", {}, 8, 256),
    Case("ViT-base, 1000 classes", "vit", "AutoModelForImageClassification", {"num_labels": 1000}, 32, None),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Count for every case, print a table, write it as JSON."""
    arguments = parser("Share of feedback in parameters and operations.", cpu_only=True)
    arguments.add_argument("--blocks", type=int, default=3, help="Number of blocks K.")
    arguments.add_argument("--latent-dim", type=int, default=128, help="Units of the latent.")
    options = parse(arguments, argv)
    prepare(options)
    results = [count(case, num_blocks=options.blocks, latent_dim=options.latent_dim) for case in CASES]
    show(results)
    report = {"num_blocks": options.blocks, "latent_dim": options.latent_dim, "results": results}
    print(f"\nWritten to {write_report('feedback_share', 'cpu', options, report)}")


def count(case: Case, **config: Any) -> dict[str, Any]:
    """Count parameters and operations of one case."""
    import torch
    import transformers

    from hf_blocklocal import BlockLocalConfig, assemble

    torch.manual_seed(0)
    # Eager attention, because the counter does not know every fused kernel.
    model_config = transformers.AutoConfig.for_model(case.model_type, attn_implementation="eager", **case.options)
    model = getattr(transformers, case.auto_class).from_config(model_config)
    assembly = assemble(model, BlockLocalConfig(head_layers=0, **config), make_batch(case, model, batch=2, sequence=8))
    inputs = make_batch(case, model, batch=case.batch, sequence=case.sequence)
    targets = without_storage(assembly.read_targets(inputs))
    in_heads = sum(parameter.numel() for parameter in assembly.heads.parameters())
    in_all = sum(parameter.numel() for parameter in assembly.module.parameters())
    inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    assembly.module.to("meta")  # unties what is tied, so that parameters are counted above
    without_heads = operations(assembly, inputs, targets, with_heads=False)
    with_heads = operations(assembly, inputs, targets, with_heads=True)
    shares = {"parameter_share": in_heads / in_all, "operation_share": 1 - without_heads / with_heads}
    return {
        "case": asdict(case),
        "parameters_of_heads": in_heads,
        "parameters": in_all,
        "operations_without_heads": without_heads,
        "operations": with_heads,
        **shares,
        "target_met": max(shares.values()) <= TARGET,
    }


def make_batch(case: Case, model: Any, *, batch: int, sequence: int | None) -> dict[str, Any]:
    """Make a random batch: every token counts in a causal model, 15 % of them in a masked one."""
    import torch

    generator = torch.Generator().manual_seed(0)
    if case.sequence is None:
        side = model.config.image_size
        labels = torch.randint(model.config.num_labels, (batch,), generator=generator)
        return {"pixel_values": torch.randn(batch, 3, side, side, generator=generator), "labels": labels}
    ids = draw_tokens(model.config.vocab_size, (batch, sequence), generator)
    if case.auto_class == "AutoModelForSequenceClassification":
        return {"input_ids": ids, "labels": torch.randint(model.config.num_labels, (batch,), generator=generator)}
    if case.auto_class == "AutoModelForMaskedLM":
        hidden = torch.rand(ids.shape, generator=generator) < 0.15
        hidden[:, 0] = True
        return {"input_ids": ids, "labels": ids.where(hidden, -100)}
    return {"input_ids": ids, "labels": ids}


def without_storage(value: Any) -> Any:
    """Return targets, or candidates, with shapes in place of values."""
    import torch

    tensors = {name: field.to("meta") for name, field in vars(value).items() if isinstance(field, torch.Tensor)}
    if getattr(value, "candidates", None) is not None:
        tensors["candidates"] = without_storage(value.candidates)
    return replace(value, **tensors)


def operations(assembly: Any, inputs: dict[str, Any], targets: Any, *, with_heads: bool) -> int:
    """Count one step, forward and backward, with the heads or with a sum in place of each.

    Args:
        assembly: The cut model.
        inputs: A batch with labels.
        targets: What it is to be taught.
        with_heads: Whether the heads are to be counted.

    Returns:
        Floating-point operations.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def leave(block: int, hidden: Any, router_logits: tuple[Any, ...]) -> None:
        loss = assembly.heads[block](hidden, targets) if with_heads else hidden
        loss.sum().backward()

    with FlopCounterMode(display=False) as counter, assembly.step.boundaries.attached(leave):
        assembly.module.model(**inputs).loss.backward()
    return counter.get_total_flops()


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print the results: parameters in millions, operations in units of 10^9."""
    header = ["model", "batch", "parameters, M", "in heads", "share", "operations, G", "in heads", "share", "target"]
    rows = []
    for each in results:
        case, heads = each["case"], each["operations"] - each["operations_without_heads"]
        shape = f"{case['batch']}" + (f" x {case['sequence']}" if case["sequence"] else "")
        rows.append(
            [case["name"], shape]
            + [f"{each['parameters'] / 1e6:.2f}", f"{each['parameters_of_heads'] / 1e6:.2f}"]
            + [f"{each['parameter_share']:.2%}", f"{each['operations'] / 1e9:.1f}", f"{heads / 1e9:.2f}"]
            + [f"{each['operation_share']:.2%}", f"{'<=' if each['target_met'] else 'misses'} {TARGET:.0%}"]
        )
    print_table(header, rows, left=1)


if __name__ == "__main__":
    main()
