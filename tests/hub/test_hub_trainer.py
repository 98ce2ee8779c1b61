"""The trainer pushes what it saves, and trains on whatever the Hub does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from sharing import SAVES, make, pushing, talk_to
from test_configs import script
from test_parity import equal
from transformers import TrainerCallback

from hf_blocklocal.errors import NotPushableError, PushError
from hf_blocklocal.hub import Patience


MODEL = {"block_local_config.json", "block_local_heads.safetensors", "config.json", "model.safetensors"}


def ours(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_blocklocal")]


def top(files):
    return {name.partition("/")[0] for name in files}


# ---- Beside training ----


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", set()),
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-1", "checkpoint-2", "checkpoint-3"}),
    ],
)
def test_what_a_run_leaves_on_the_hub(hub, tmp_path, strategy, folders):
    trainer = pushing(tmp_path / "run", strategy, hub_always_push=True)
    trainer.train()
    files = hub.files("ann/run")
    assert {name for name in top(files) if "checkpoint" in name} == folders
    if strategy == "end":
        assert top(files) == {".gitattributes"}
    else:
        assert top(files) >= MODEL
        assert files["model.safetensors"] == (tmp_path / "run" / "checkpoint-3" / "model.safetensors").read_bytes()
        assert hub.store.repositories["ann/run"].messages[1:] == [
            f"Training in progress, step {step}" for step in (1, 2, 3)
        ]
    for folder in folders:
        assert {f"{folder}/optimizer.pt", f"{folder}/trainer_state.json"} <= files.keys()
    trainer.push_to_hub()
    assert top(hub.files("ann/run")) >= MODEL | {"README.md"}
    assert not list((tmp_path / "run").glob("_push-*"))


def test_a_hub_that_fails_changes_no_weight_and_is_told_of_once(hub, tmp_path, caplog):
    plain = make(tmp_path / "plain", **SAVES)
    plain.train()
    trainer = pushing(tmp_path / "run", hub_always_push=True)
    hub.fail("/commit/", 500)
    trainer.train()
    assert equal(trainer.model.state_dict(), plain.model.state_dict())
    assert ours(caplog) == [
        "A push beside training failed: the Hub answered 500. Training goes on; the next push sends it again."
    ]
    assert hub.count("/commit/") == 3


def test_each_cause_is_told_of_and_again_after_a_push_that_went_well(hub, tmp_path, caplog):
    trainer = pushing(tmp_path / "run", hub_always_push=True, max_steps=5)
    hub.fail("/commit/", 500, times=1)
    hub.fail("/commit/", 409, times=1)
    hub.fail("/commit/", 500, times=1, after=1)
    trainer.train()
    told = [text.partition("failed: ")[2].partition(". Training")[0] for text in ours(caplog)]
    assert [text[:22] for text in told] == ["the Hub answered 500", "the Hub answered 409", "the Hub answered 500"]
    assert len(hub.store.repositories["ann/run"].messages) == 1 + 2


def test_checkpoints_that_did_not_arrive_are_sent_with_the_next_save(hub, tmp_path):
    trainer = pushing(tmp_path / "run", "all_checkpoints", hub_always_push=True)
    hub.fail("/commit/", 500, times=2)
    trainer.train()
    assert top(hub.files("ann/run")) >= {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert len(hub.store.repositories["ann/run"].messages) == 2


def test_a_save_during_a_push_is_left_to_the_next_one(hub, tmp_path):
    trainer = pushing(tmp_path / "run", "all_checkpoints", max_steps=4)
    hub.fail("/commit/", wait=1.0)
    trainer.train()
    messages = hub.store.repositories["ann/run"].messages
    assert 2 <= len(messages) < 5
    trainer.push_to_hub()


def test_a_checkpoint_that_is_deleted_while_it_is_sent_arrives_whole(hub, tmp_path):
    trainer = pushing(tmp_path / "run", "checkpoint", save_total_limit=1, hub_always_push=True)
    hub.fail("preupload", wait=0.02)
    trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert len(hub.store.repositories["ann/run"].messages) == 4


def test_a_hub_that_hangs_holds_training_up_no_longer_than_it_may(hub, tmp_path, caplog):
    trainer = pushing(tmp_path / "run")
    trainer.push_patience = Patience(silence=60, limit=1)
    hub.fail("/commit/", hangs=True)
    start = time.monotonic()
    trainer.train()
    assert time.monotonic() - start < 10
    assert "the Hub does not come to an end" in ours(caplog)[-1]


def test_files_that_cannot_be_put_aside_stop_no_training(hub, tmp_path, caplog):
    trainer = pushing(tmp_path / "run", hub_always_push=True)

    class Spoil(TrainerCallback):
        def on_push_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                (Path(args.output_dir) / "checkpoint-1" / "config.json").unlink()

    trainer.add_callback(Spoil())
    trainer.train()
    assert trainer.state.global_step == 3
    assert "it holds no config.json of a model" in ours(caplog)[0]
    assert len(hub.store.repositories["ann/run"].messages) == 1 + 2


# ---- Before training ----


def test_a_hub_that_is_down_is_told_of_and_tried_again_at_the_end(monkeypatch, tmp_path, caplog):
    with LoopbackHub() as hub:
        talk_to(monkeypatch, hub.url, tmp_path / "cache")
    trainer = make(tmp_path / "run", push_to_hub=True, hub_model_id="run")
    trainer.train()
    assert "run: the Hub cannot be reached" in ours(caplog)[0]
    assert "Training goes on; pushing is tried again later." in ours(caplog)[0]
    with LoopbackHub(port=hub.server_address[1]) as hub:
        trainer.push_to_hub()
        assert top(hub.files("ann/run")) >= MODEL


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_out_of_order_at_first_stops_no_training(hub, tmp_path, status):
    hub.fail("create", status, times=1)
    trainer = make(tmp_path / "run", push_to_hub=True, hub_model_id="run")
    trainer.train()
    trainer.push_to_hub()
    assert top(hub.files("ann/run")) >= MODEL


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hub_model_id": "ann/my run"}, "'ann/my run' cannot be the name of a repository."),
        (
            {"hub_model_id": "ann/run", "hub_token": "hf_wrong"},
            "ann/run cannot be pushed to: the token was not accepted",
        ),
        (
            {"hub_model_id": "ann/run", "hub_token": "hf_read"},
            "ann/run cannot be pushed to: this token may not do that",
        ),
        ({"hub_model_id": "bob/run"}, 'under the namespace "bob"'),
    ],
)
def test_what_can_never_work_is_said_before_anything_is_trained(hub, tmp_path, settings, said):
    with pytest.raises(NotPushableError) as caught:
        pushing(tmp_path / "run", **settings)
    assert said in str(caught.value)


def test_a_missing_token_is_said_before_anything_is_trained(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(NotPushableError, match="needs a token that may write, and there is none"):
        make(tmp_path / "run", push_to_hub=True)
    assert hub.requests == []


# ---- After training ----


def test_the_run_is_saved_and_said_to_be_before_the_first_request(hub, tmp_path, caplog):
    trainer = make(tmp_path / "run", hub_model_id="ann/run")
    caplog.set_level("INFO", "hf_blocklocal")
    seen = []

    class Watch(TrainerCallback):
        def on_push_begin(self, args, state, control, **kwargs):
            names = {path.name for path in Path(args.output_dir).iterdir()}
            seen.append((names >= MODEL, len(hub.requests), ours(caplog)[-1]))

    trainer.train()
    trainer.add_callback(Watch())
    trainer.push_to_hub()
    assert seen == [(True, 0, f"The run is saved in {tmp_path / 'run'}.")]
    assert top(hub.files("ann/run")) >= MODEL


@pytest.mark.parametrize("trouble", ["down", "refused", "no token", "bad name"])
def test_whatever_fails_at_the_end_the_run_is_on_disk(hub, tmp_path, monkeypatch, trouble):
    trainer = make(tmp_path / "run", hub_model_id="ann/my run" if trouble == "bad name" else "ann/run")
    trainer.train()
    if trouble == "down":
        hub.stop()
    if trouble == "refused":
        hub.fail("/commit/", 403)
    if trouble == "no token":
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(NotPushableError if trouble in ("no token", "bad name") else PushError) as caught:
        trainer.push_to_hub()
    if isinstance(caught.value, PushError):
        assert f"hf-blocklocal push {tmp_path / 'run'} ann/run" in str(caught.value)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= MODEL


def test_the_training_script_goes_on_to_its_table_and_tells_of_the_push_at_the_end(hub, tmp_path):
    trainer = make(tmp_path / "run", push_to_hub=True, hub_model_id="ann/run")
    fault = hub.fail("/commit/", 403)
    assert "hf-blocklocal push" in script("train").save(trainer)
    fault.times = 0
    assert script("train").save(trainer) is None


def test_a_name_without_namespace_is_completed_before_the_card_is_written(hub, tmp_path):
    trainer = make(tmp_path / "run")
    seen = []
    write = trainer.create_model_card
    trainer.create_model_card = lambda **kwargs: (seen.append(trainer.hub_model_id), write(**kwargs))
    hub.fail("/commit/", 403)
    with pytest.raises(PushError, match=r"not pushed to ann/run, .* hf-blocklocal push .*/run ann/run$"):
        trainer.push_to_hub()
    assert seen == ["ann/run"]


def test_saving_with_push_to_hub_pushes(hub, tmp_path):
    trainer = make(tmp_path / "run", push_to_hub=True, hub_model_id="ann/run", hub_private_repo=True)
    trainer.save_model()
    assert top(hub.files("ann/run")) >= MODEL - {"block_local_heads.safetensors"}
    assert hub.store.repositories["ann/run"].private
    assert hub.store.repositories["ann/run"].messages[-1] == "Model save"


def test_a_push_need_not_be_waited_for(hub, tmp_path):
    trainer = make(tmp_path / "run", hub_model_id="ann/run")
    hub.fail("create", wait=0.5)
    future = trainer.push_to_hub(blocking=False, revision="later")
    assert not future.done()
    future.result(timeout=20)
    assert top(hub.files("ann/run", "later")) >= {"model.safetensors"}


def test_the_card_goes_along_with_the_tags_of_the_model_and_those_asked_for(hub, tmp_path):
    trainer = make(tmp_path / "run", hub_model_id="ann/run")
    trainer.model.add_model_tags("of-the-model")
    trainer.train()
    trainer.push_to_hub(tags="asked-for")
    card = ModelCard(hub.files("ann/run")["README.md"].decode())
    assert {"of-the-model", "asked-for"} <= set(card.data.tags)
