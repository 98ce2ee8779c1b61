"""`hf-blocklocal plan` prints a plan that can be launched, or says why there is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_blocklocal import BlockLocalConfig
from hf_blocklocal.commands import plan


SMALL = [
    *("llama", "--task", "causal-lm", "--batch-size", "2", "--sequence-length", "16", "--set"),
    *("hidden_size=32", "num_hidden_layers=6", "num_attention_heads=2", "intermediate_size=64", "vocab_size=100"),
]


def printed(capsys, *words):
    plan.main([*SMALL, *words])
    return capsys.readouterr().out


def test_the_plan_is_a_table_and_the_line_that_launches_it(capsys):
    text = printed(capsys, "--num-blocks", "3", "--device-memory", "1GiB", "--device-speed", "0.001")
    assert text.startswith("LlamaForCausalLM, 6 layers, ")
    rows = [line.split() for line in text.splitlines() if re.match(r" *\d ", line)]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    starts = [int(row[1].split("-")[0]) for row in rows[1:]]
    fields = re.search(r"BlockLocalConfig\((.*)\)", text)[1]
    assert f"num_blocks=3, block_parallel_size=3, boundaries={starts}" == fields
    assert BlockLocalConfig(boundaries=starts).num_blocks == 3
    assert "accelerate launch --num_processes 3 " in text
    assert re.search(r"A step takes [\d.]+ ms", text)
    assert "head_refresh_lag" not in text


@pytest.mark.parametrize(
    ("words", "batches"),
    [
        (("whisper", "--task", "speech-seq2seq"), "batches of 8 x 448,"),
        (("gpt2", "--task", "causal-lm"), "batches of 8 x 512,"),
        (("vit", "--task", "image-classification"), "batches of 8, float32"),
    ],
)
def test_samples_are_no_longer_than_a_model_takes(words, batches, capsys):
    plan.main([*words, "--num-blocks", "2"])
    assert batches in capsys.readouterr().out


def test_a_text_that_is_too_long_to_be_written_down_is_refused():
    with pytest.raises(SystemExit, match="whisper writes down at most 448 tokens, and --sequence-length is 600"):
        plan.main(["whisper", "--task", "speech-seq2seq", "--num-blocks", "2", "--sequence-length", "600"])


def test_heads_that_would_wait_for_layers_of_other_ranks_are_pointed_out(capsys):
    text = printed(capsys, "--num-blocks", "4", "--block-local", "head_layers=1", "head_refresh_lag=1")
    assert "copy them every S steps with a lag of at least 2" in text


def test_given_boundaries_and_fields_are_heeded(capsys):
    text = printed(
        capsys, "--num-blocks", "2", "--boundaries", "1", "--block-local", "head_layers=0", "negatives=null"
    )
    assert "boundaries=[1], head_layers=0, negatives=None)" in text
    assert "ms" not in text.split()


def test_chains_that_share_out_their_blocks_need_less_memory_each(capsys):
    words = ["--num-blocks", "2", "--replicas", "4", "--block-local", "head_layers=0"]
    copies, shared = printed(capsys, *words), printed(capsys, *words, "shard_replicas=true")
    assert all("accelerate launch --num_processes 8 " in text for text in (copies, shared))
    assert "shard_replicas=True" in shared
    states = [
        [float(line.split()[7]) for line in text.splitlines() if re.match(r" *\d ", line)] for text in (copies, shared)
    ]
    assert all(part < 0.8 * whole for whole, part in zip(*states, strict=True))


def test_a_model_that_writes_down_sounds_is_planned(capsys):
    words = ["whisper", "--task", "speech-seq2seq", "--batch-size", "1", "--sequence-length", "8", "--num-blocks", "2"]
    plan.main(
        [
            *words,
            *("--set", "d_model=32", "encoder_layers=2", "decoder_layers=2", "encoder_attention_heads=2"),
            *("decoder_attention_heads=2", "encoder_ffn_dim=64", "decoder_ffn_dim=64", "max_source_positions=20"),
        ]
    )
    text = capsys.readouterr().out
    assert text.startswith("WhisperForConditionalGeneration, 4 layers, ")
    assert "accelerate launch --num_processes 2 " in text


def test_what_does_not_fit_ends_in_one_line(capsys):
    with pytest.raises(SystemExit, match=r"hf-blocklocal plan: No 2 blocks fit: .* too little\."):
        printed(capsys, "--num-blocks", "2", "--device-memory", "100KiB")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-blocks", "3", "--device-memory", "1GiB", "2GiB"], "takes one value or 3"),
        (["--num-blocks", "2", "--device-memory", "1 lot"], "is no size"),
        (["--num-blocks", "2", "--boundaries", "1", "2"], "takes 1 for 2 blocks"),
        (["--num-blocks", "2", "--reserve", "1"], "share of at least 0"),
    ],
)
def test_a_wrong_command_line_is_explained(words, message, capsys):
    with pytest.raises(SystemExit):
        printed(capsys, *words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-blocks", "2", "--block-local", "head_layers"], "is not FIELD=VALUE"),
        (["--num-blocks", "2", "--task", "telepathy"], "There is no task 'telepathy'"),
        (["--num-blocks", "9"], "Cannot cut 6 layers into 9 blocks"),
    ],
)
def test_what_cannot_be_planned_is_explained(words, message, capsys):
    with pytest.raises(SystemExit, match=message):
        printed(capsys, *words)


def test_the_optimizer_decides_the_state(capsys):
    states = {}
    for optim in ("adamw_torch", "sgd"):
        text = printed(capsys, "--num-blocks", "2", "--optim", optim)
        header, *rows = text.splitlines()[2:5]
        column = header.split().index("optimizer")
        states[optim] = [float(row.split()[column]) for row in rows]
    assert states["sgd"] == [0, 0]
    assert min(states["adamw_torch"]) > 0


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("1.5 GB", 1500000000), ("7", 7), ("3KiB", 3072)])
def test_sizes_are_read_with_their_unit(text, size):
    assert plan.size(text) == size


def test_the_plan_in_the_readme_is_what_the_script_prints(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    block = next(block for block in readme.split("```") if block.startswith("\n$ hf-blocklocal plan "))
    command, text = block.removeprefix("\n$ hf-blocklocal plan ").replace("\\\n", " ").split("\n", 1)
    plan.main(command.split())
    assert [line.rstrip() for line in text.splitlines()] == capsys.readouterr().out.rstrip().splitlines()
