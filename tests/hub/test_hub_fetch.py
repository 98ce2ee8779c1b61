"""What is on the Hub comes back: heads for a plain model, and the model itself without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants as client
import pytest
import torch
from safetensors.torch import load_file
from sharing import make, of_subprocess, tokenizer
from test_data_parallel import free_port
from transformers import AutoModelForSequenceClassification
from zoo import SPECIMENS, build_tiny

from hf_blocklocal import BlockLocalConfig, load_heads
from hf_blocklocal.errors import FetchError, HeadsMismatchError
from hf_blocklocal.hub import Destination, fetch, push_run


LAUNCHED = Path(__file__).parents[1] / "launched"
SPECIMEN = SPECIMENS["bert"]


@pytest.fixture
def pushed(hub, run):
    """A hub where the run is, public, and the run's own folder."""
    push_run(run, Destination("ann/run"))
    return run


def heads_of(folder):
    return load_file(Path(folder) / "block_local_heads.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- Heads ----


@pytest.mark.parametrize("source", ["hub", "folder"])
def test_heads_are_put_back_on_a_plain_model(pushed, source):
    source = "ann/run" if source == "hub" else pushed
    model = AutoModelForSequenceClassification.from_pretrained(source)
    assembly = load_heads(source, model)
    assert assembly.module.model is model
    assert same(assembly.heads.state_dict(), heads_of(pushed))
    assert assembly.config == BlockLocalConfig.from_pretrained(pushed)


def test_nothing_but_config_and_heads_is_downloaded(hub, pushed):
    asked = len(hub.requests)
    folder = fetch("ann/run")
    assert {path.name for path in folder.iterdir()} == {"block_local_config.json", "block_local_heads.safetensors"}
    assert not any("resolve" in request and "model.safetensors" in request for request in hub.requests[asked:])


def test_the_revision_is_heeded(hub, pushed):
    changed = BlockLocalConfig(num_blocks=2, head_layers=0, latent_dim=7)
    changed.save_pretrained(pushed)
    push_run(pushed, Destination("ann/run", revision="other"))
    first, other = (BlockLocalConfig.from_pretrained(fetch("ann/run", revision=name)) for name in ("main", "other"))
    assert other.latent_dim == 7
    assert first.latent_dim != 7
    with pytest.raises(FetchError, match="it has no such revision"):
        fetch("ann/run", revision="nowhere")


def test_where_a_balance_put_the_cut_is_read_from_the_heads(hub, tmp_path):
    # A last block with a head over many tokens is given fewer layers.
    trainer = make(tmp_path / "run", blocks=BlockLocalConfig(num_blocks=2, head_layers=0, balance="cost"))
    trainer.train()
    trainer.save_model()
    batch = {key: value[:1, :1] if value.dim() > 1 else value[:1] for key, value in SPECIMEN.batch(0).items()}
    assembly = load_heads(tmp_path / "run", SPECIMEN.build(), batch)
    assert assembly.cut.spans == trainer.assembly.cut.spans
    assert assembly.config.boundaries == tuple(span.start for span in assembly.cut.spans[1:])


def test_heads_of_another_model_are_named_by_tensor_and_shapes(pushed):
    wide = build_tiny("bert", AutoModelForSequenceClassification, {**narrow(SPECIMEN.build()), "hidden_size": 24})
    with pytest.raises(HeadsMismatchError) as caught:
        load_heads("ann/run", wide, SPECIMEN.batch(0))
    assert "0.readout.linear.weight has shape (128, 16) in the file and (128, 24) here" in str(caught.value)


def narrow(model):
    names = ("vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    return {name: getattr(model.config, name) for name in names} | {"num_labels": 3}


# ---- What cannot be fetched ----


def test_a_private_repository_needs_a_token_that_may_see_it(hub, run, monkeypatch):
    push_run(run, Destination("ann/mine", private=True))
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, "hf_other"):
        with pytest.raises(FetchError, match="or it is private and the token, if any, may not see it; log in"):
            fetch("ann/mine", token=token)
    assert same(heads_of(fetch("ann/mine", token="hf_read")), heads_of(run))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("ann/nothing", "there is no such repository (and no such folder here)"),
        ("runs/a/b", "is no folder, and it cannot be a repository"),
        ("/no/such/folder", "is no folder, and it cannot be a repository"),
    ],
)
def test_a_source_that_is_nothing(hub, source, said):
    with pytest.raises(FetchError) as caught:
        fetch(source)
    assert said in str(caught.value)


def test_a_repository_without_heads(hub, pushed):
    for name in ("block_local_config.json", "block_local_heads.safetensors"):
        del hub.files("ann/run")[name]
    with pytest.raises(FetchError, match="on the Hub holds none of block_local_config.json"):
        fetch("ann/run")


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(FetchError, match="is a folder, which has no revision 'main'"):
        fetch(tmp_path, revision="main")


def test_what_was_fetched_once_is_there_without_network(hub, pushed):
    first = fetch("ann/run")
    hub.stop()
    assert fetch("ann/run") == first
    with pytest.raises(FetchError, match="the Hub cannot be reached, and it was never downloaded before"):
        fetch("ann/other")


def test_what_was_fetched_once_is_there_in_offline_mode(hub, pushed, monkeypatch):
    first = fetch("ann/run")
    monkeypatch.setattr(client, "HF_HUB_OFFLINE", True)
    assert fetch("ann/run") == first


# ---- In processes of their own ----


def test_a_fresh_process_without_this_package_computes_the_same_logits_to_the_bit(hub, tmp_path):
    trainer = make(tmp_path / "run", hub_model_id="ann/run")
    trainer.train()
    trainer.push_to_hub()
    batch = SPECIMEN.batch(0)
    torch.save({key: value for key, value in batch.items() if key != "labels"}, tmp_path / "batch.pt")
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
    command = [sys.executable, str(LAUNCHED / "without_package.py"), "ann/run", str(tmp_path)]
    environment = of_subprocess(hub, tmp_path)
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    answer = json.loads((tmp_path / "answer.json").read_text())
    words = tokenizer()("word7 word8", return_tensors="pt")
    with torch.no_grad():
        probabilities = trainer.model(**words).logits.softmax(-1)[0]
    assert answer["score"] == pytest.approx(probabilities.max().item(), abs=1e-6)
    assert answer["label"] == trainer.model.config.id2label[probabilities.argmax().item()]


@pytest.mark.launch
def test_of_two_processes_one_pushes_both_hear_of_a_refusal_and_none_waits_for_ever(hub, tmp_path):
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options]
    command += [str(LAUNCHED / "pushing.py"), str(tmp_path)]
    hub.fail("/ann/late/commit/", 500)
    environment = of_subprocess(hub, tmp_path) | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    refusals = [(tmp_path / f"refusal-{rank}.txt").read_text() for rank in (0, 1)]
    assert "cannot be pushed to: the token was not accepted" in refusals[0]
    assert refusals[0] == refusals[1]
    assert hub.store.repositories["ann/run"].messages == ["initial commit", "End of training"]
    assert [json.loads((tmp_path / f"pushed-{rank}.json").read_text()) for rank in (0, 1)] == [True, False]
    assert result.returncode != 0
    assert "PushError: The run was not pushed to ann/late, tried once: the Hub answered 500." in result.stderr
