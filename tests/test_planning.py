"""What is measured on tensors without memory is what a training step with real ones then does and keeps."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from menagerie import MENAGERIE
from packaging.version import Version
from zoo import CLASSES, IGNORED, SPECIMENS

from hf_blocklocal import BlockLocalConfig, assemble
from hf_blocklocal.cut.partition import Span
from hf_blocklocal.errors import NonFiniteLossError, UnsupportedSettingError
from hf_blocklocal.planning.blueprint import (
    Shape,
    build_inputs,
    build_model,
    loss_traits,
    read_config,
    task_of,
    without_memory,
)
from hf_blocklocal.planning.measuring import Setting, measure_costs
from hf_blocklocal.planning.watch import counter
from hf_blocklocal.records.memory import ActivationMeter


CASES = [
    *[(name, {}) for name in ("bert", "bert_mlm", "gpt2", "llama", "mixtral", "vit")],
    *[(name, {"head_layers": 0}) for name in ("bert", "gpt2", "llama", "t5", "bart", "whisper")],
    *[(name, {"head_copies": "trained"}) for name in ("bert", "deberta_v2", "llama", "mixtral", "vit")],
    *[(name, {"head_copies": "trained", "tied_weights": "freeze"}) for name in ("t5", "bart", "whisper")],
    ("gpt2", {"head_copies": "trained", "tied_weights": "untie"}),
    ("llama", {"head_layers": 1, "head_lens": True}),
    ("llama", {"head_layers": 0, "chunked_loss": 16}),
]
# Models whose layers are given more than a hidden state that learns: who asks for its gradient depends on the cut.
SHARING = ("bart", "whisper", "t5", "deberta_v2")
# Until transformers 5.23, these look at values on their way: a number drawn for LayerDrop, who goes to which expert.
LOOKING = ("bart", "whisper", "mixtral") if Version(transformers.__version__) < Version("5.23") else ()
NEGATIVES = 16


def full_length(batch):
    """Return a batch in which nothing is padding and every label counts."""
    labels = batch["labels"]
    if not labels.is_floating_point():
        labels = labels.where(labels != IGNORED, labels.max())
    return {name: value for name, value in batch.items() if name != "attention_mask"} | {"labels": labels}


def config_of(model):
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return config


def planned(model, block_local, batch, **options):
    """Measure a model as the plan does: from its configuration alone."""
    config = config_of(model)
    task = task_of(config)
    with without_memory():
        fake = build_model(config, task)
        shapes = {name: torch.empty_like(value) for name, value in batch.items()}
        return measure_costs(fake, block_local, Setting(shapes, loss_traits=loss_traits(task), **options))


def trained(model, block_local, batch):
    """Run two real steps. Returns the assembly, and operations and saved bytes of each block."""
    assembly = assemble(model, block_local, batch)
    model.train()
    # One after the other: the counter of operations keeps some tensors for a while.
    flops, saved, operations, kept = counter(), ActivationMeter(assembly.module), [], []
    with flops:
        _step(assembly, batch, lambda loss: loss.backward(), lambda: operations.append(flops.get_total_flops()))
    with saved:
        _step(assembly, batch, lambda loss: (kept.append(saved.live_bytes), loss.backward()), lambda: None)
    return assembly, [after - before for before, after in zip([0, *operations], operations, strict=False)], kept


def _step(assembly, batch, send, then):
    def backward(loss):
        send(loss)
        then()

    targets = assembly.read_targets(batch)
    with assembly.step.teach(targets, scale=1.0, backward=backward, learned=lambda *_: None, inputs=batch):
        backward(assembly.module.model(**batch).loss)


@pytest.mark.parametrize(("name", "values"), CASES, ids=str)
def test_a_plan_counts_the_operations_of_a_step_exactly_and_its_bytes_within_five_percent(name, values, borrow):
    model, batch = borrow(name), full_length(SPECIMENS[name].batch(0))
    block_local = BlockLocalConfig(boundaries=(1, 3), negatives=NEGATIVES, **values)
    assembly, operations, saved = trained(model, block_local, batch)
    distinct = None
    if assembly.task.target == "vocabulary":
        distinct = len(assembly.read_targets(batch).values.unique())
    if name in LOOKING:
        with pytest.raises(UnsupportedSettingError, match="--with-weights"):
            planned(model, block_local, batch, distinct=distinct)
        return
    costs = planned(model, block_local, batch, distinct=distinct)
    spans = assembly.cut.spans
    if name in SHARING:
        assert [costs.operations(span) for span in spans] == pytest.approx(operations, rel=0.03)
    else:
        assert [costs.operations(span) for span in spans] == operations
    assert [costs.trained(span)[0] + costs.trained_copies(span)[0] for span in spans] == [
        sum(parameter.numel() for parameter in block if parameter.requires_grad) for block in assembly.parameters
    ]
    for span, kept in zip(spans, saved, strict=True):
        assert costs.activations(span) + costs.head_activations(span) == pytest.approx(kept, rel=0.05)


def test_what_dropout_and_low_precision_save_is_planned():
    config = read_config("bert", {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
                                  "num_attention_heads": 2, "vocab_size": 50})  # fmt: skip
    inputs = build_inputs(config, "sequence-classification", Shape(4, 16))
    block_local = BlockLocalConfig(num_blocks=2, head_layers=0)
    sizes = []
    for autocast in (None, torch.bfloat16):
        model = build_model(config, "sequence-classification", with_weights=True)
        with without_memory():
            fake = build_model(config, "sequence-classification")
            setting = Setting(inputs, autocast=autocast, loss_traits=loss_traits("sequence-classification"))
            costs = measure_costs(fake, block_local, setting)
        assert costs == measure_costs(model, block_local, Setting(inputs, autocast=autocast))
        sizes.append(costs.activations(Span(0, 1)))
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    with without_memory():
        setting = Setting(inputs, loss_traits=loss_traits("sequence-classification"))
        costs = measure_costs(build_model(config, "sequence-classification"), block_local, setting)
    assert costs.activations(Span(0, 1)) < sizes[0]
    assert sizes[1] != sizes[0]


def test_a_model_that_fits_nowhere_is_planned_all_the_same():
    sizes = {"hidden_size": 2**16, "intermediate_size": 2**18, "num_hidden_layers": 4, "num_attention_heads": 512}
    config = read_config("llama", sizes)
    with without_memory():
        model = build_model(config, "causal-lm")
        inputs = build_inputs(config, "causal-lm", Shape(64, 4096))
        costs = measure_costs(
            model, BlockLocalConfig(num_blocks=2), Setting(inputs, loss_traits=loss_traits("causal-lm"))
        )
    assert sum(weight.weight_bytes for weight in costs.weights.values()) > 10**12
    assert costs.layers[0].saved_bytes > 10**12


def test_messages_hold_the_hidden_state_and_what_the_layers_above_need_beside_it(borrow):
    hidden = 4 * 12 * 16 * 4
    for name, sizes in {"gpt2": [hidden] * 3, "t5": None}.items():
        batch = full_length(SPECIMENS[name].batch(0))
        costs = planned(borrow(name), BlockLocalConfig(num_blocks=2), batch)
        messages = [layer.message_bytes for layer in costs.layers]
        assert messages[-1] == 0
        if sizes is not None:
            assert messages[:-1] == sizes
        else:  # the decoder needs its own state, its position biases and the encoder's states
            assert messages[2] > 4 * 8 * 16 * 4 + hidden


def test_a_tied_embedding_belongs_to_the_last_layer_and_is_borrowed(borrow):
    costs = planned(borrow("gpt2"), BlockLocalConfig(num_blocks=2), full_length(SPECIMENS["gpt2"].batch(0)))
    assert costs.weights["transformer.wte.weight"].used_by == (0, 3)
    assert "transformer.wte.weight" in costs.heads[1].borrows
    assert costs.heads[1].operations_in_first > costs.heads[1].operations
    assert costs.foreign_bytes(Span(0, 2)) == costs.weights["transformer.wte.weight"].weight_bytes


@pytest.mark.parametrize("tied_weights", ["untie", "freeze"])
def test_a_tied_embedding_that_is_untied_or_frozen_is_planned_like_that(tied_weights, borrow):
    block_local = BlockLocalConfig(num_blocks=2, head_layers=0, tied_weights=tied_weights)
    model, batch = borrow("gpt2"), full_length(SPECIMENS["gpt2"].batch(0))
    costs = planned(model, block_local, batch)
    assembly = assemble(model, block_local, batch)
    assert costs.weights["transformer.wte.weight"].trainable == (tied_weights == "untie")
    assert [costs.trained(span)[0] for span in assembly.cut.spans] == [
        sum(parameter.numel() for parameter in block if parameter.requires_grad) for block in assembly.parameters
    ]


def test_measuring_leaves_a_model_as_it_was(borrow):
    model = borrow("llama").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_costs(model, BlockLocalConfig(num_blocks=2), Setting(SPECIMENS["llama"].batch(0)))
    assert not model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_that_asks_for_values_is_refused_and_measured_with_weights():
    model, batch = MENAGERIE["longformer"].build(), MENAGERIE["longformer"].batch(0)
    with pytest.raises(UnsupportedSettingError, match="--with-weights"):
        planned(model, BlockLocalConfig(num_blocks=2), batch)
    costs = measure_costs(model, BlockLocalConfig(num_blocks=2), Setting(batch))
    assert all(layer.forward > 0 for layer in costs.layers)


@pytest.mark.parametrize("name", ["convnext", "swin"])
def test_stages_are_planned_though_they_are_made_with_numbers_that_they_compute(name):
    costs = planned(MENAGERIE[name].build(), BlockLocalConfig(num_blocks=2), MENAGERIE[name].batch(0))
    assert all(not head.borrows and head.parameters > 0 for head in costs.heads)
    assert all(layer.forward > 0 for layer in costs.layers)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_experts_are_planned_whatever_their_type(name):
    costs = planned(MENAGERIE[name].build(), BlockLocalConfig(num_blocks=2), full_length(MENAGERIE[name].batch(0)))
    assert all(layer.backward == pytest.approx(2 * layer.forward, rel=0.2) for layer in costs.layers)


def test_what_fails_on_fake_tensors_is_refused_and_not_what_has_a_message_of_its_own():
    refused = r"does not run on fake tensors \(no kernel\)\. .*--with-weights"
    with pytest.raises(UnsupportedSettingError, match=refused), without_memory():
        raise RuntimeError("no kernel\nand a long explanation")
    with pytest.raises(NonFiniteLossError, match="^block 0$"), without_memory():
        raise NonFiniteLossError("block 0")


def test_operations_of_experts_count_however_they_are_multiplied(borrow):
    counted = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = copy.deepcopy(borrow("mixtral"))
        model.set_experts_implementation(implementation)
        with counter() as flops:
            model(**SPECIMENS["mixtral"].batch(0)).loss.backward()
        counted.append(flops.get_total_flops())
    assert counted[0] == counted[1] == counted[2]


@pytest.mark.parametrize("values", [{"denoising": 1.0}, {"overlap": 1}, {"reconstruction": 0.5}])
def test_terms_that_are_not_measured_are_refused(values, borrow):
    with pytest.raises(UnsupportedSettingError, match=f"{next(iter(values))}="):
        measure_costs(borrow("bert"), BlockLocalConfig(head_layers=0, **values), Setting(SPECIMENS["bert"].batch(0)))


@pytest.mark.parametrize("name", ["bloom", "cohere", "granite"])
def test_a_loss_in_chunks_of_logits_that_are_at_most_scaled_is_planned(name):
    specimen, block_local = MENAGERIE[name], BlockLocalConfig(num_blocks=2, head_layers=0, chunked_loss=16)
    batch = full_length(specimen.batch(0))
    assert assemble(specimen.build(), block_local, batch).step.chunked is not None
    assert planned(specimen.build(), block_local, batch).layers


def test_a_loss_in_chunks_that_training_would_refuse_gets_no_plan():
    specimen, block_local = MENAGERIE["gemma2"], BlockLocalConfig(num_blocks=2, head_layers=0, chunked_loss=16)
    batch = full_length(specimen.batch(0))
    refused = "chunked_loss=16 does not work for Gemma2ForCausalLM: its loss is made of logits that are changed"
    with pytest.raises(UnsupportedSettingError, match=refused):
        assemble(specimen.build(), block_local, batch)
    with pytest.raises(UnsupportedSettingError, match=f"{refused} behind the head, by TanhBackward0"):
        planned(specimen.build(), block_local, batch)
    with pytest.raises(UnsupportedSettingError, match=f"{refused} behind the head, and would be another one"):
        measure_costs(specimen.build(), block_local, Setting(batch))


def test_the_attention_of_the_cpu_counts():
    query = torch.randn(1, 2, 8, 4, requires_grad=True)
    with counter() as flops:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    products = 2 * 2 * 8 * 8 * 4
    assert flops.get_total_flops() == 2 * products + 5 * products


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert", "sequence-classification"),
        ("gpt2", "causal-lm"),
        ("t5", "seq2seq-lm"),
        ("whisper", "speech-seq2seq"),
        ("vit", "image-classification"),
    ],
)
def test_a_configuration_tells_its_task(name, task, borrow):
    config = config_of(borrow(name))
    assert task_of(config) == task
    config.architectures = ["Unheard"]
    with pytest.raises(UnsupportedSettingError, match="tell no task"):
        task_of(config)


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("whisper", "input_features", (2, 80, 3000)),
        ("speech_to_text", "input_features", (2, 6000, 80)),
        ("moonshine", "input_values", (2, 8 * 5000)),
    ],
)
def test_a_sound_is_made_as_a_model_takes_it(kind, name, shape):
    inputs = build_inputs(read_config(kind, {}), "speech-seq2seq", Shape(2, 8))
    assert inputs.keys() == {name, "labels"}
    assert inputs[name].shape == shape
    assert inputs["labels"].shape == (2, 8)


def test_a_configuration_comes_from_a_folder_a_file_or_a_type(tmp_path, borrow):
    config = config_of(borrow("bert"))
    config.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        read = read_config(str(source), {"num_hidden_layers": 3})
        assert (read.num_hidden_layers, read.hidden_size, read.num_labels) == (3, 16, CLASSES)
    assert read_config("bert", {}).hidden_size == 768
    with pytest.raises(UnsupportedSettingError, match=r"have no \['hiden_size'\]"):
        read_config("bert", {"hiden_size": 3})
    with pytest.raises(UnsupportedSettingError, match="no type of model"):
        read_config("nothing", {})
