"""A run gets to the Hub whole, or stays whole where it is, with word of how to send it later."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants as client
import pytest
from sharing import QUICK, of_subprocess

from hf_blocklocal.commands import push as push_command
from hf_blocklocal.errors import NotPushableError, PushError
from hf_blocklocal.hub import Destination, Patience, push_run


ROOT = Path(__file__).parents[2]
MODEL = ["block_local_config.json", "block_local_heads.safetensors", "config.json", "model.safetensors"]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
NOTES = ["README.md", "history.jsonl", "plots/loss.png", "trainer_state.json"]
SHARED = sorted([*MODEL, *TOKENIZER, *NOTES, ".gitattributes"])


def push(run, repo="ann/run", *, patience=QUICK, **details):
    return push_run(run, Destination(repo, **details), patience=patience)


def refused(run, error=PushError, **details):
    """Assert that a push fails and takes nothing away, and return what is said about it."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(error) as caught:
        push(run, **details)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    return str(caught.value)


# ---- What arrives ----


def test_the_shared_part_of_a_run_arrives_in_one_commit(hub, run):
    commit = push(run, repo="run")
    files = hub.files("ann/run")
    assert sorted(files) == SHARED
    assert all(files[name] == (run / name).read_bytes() for name in files if name != ".gitattributes")
    assert hub.store.repositories["ann/run"].messages == ["initial commit", "End of training"]
    assert commit.oid == hub.store.repositories["ann/run"].branches["main"]


def test_no_pickle_no_checkpoint_and_no_other_run_arrives(hub, run):
    assert (run / "training_args.bin").exists()
    assert (run / "checkpoint-2").exists()
    push(run)
    assert not any(name.startswith(("checkpoint", "baseline", "_")) for name in hub.files("ann/run"))
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in hub.files("ann/run"))


def test_it_arrives_too_where_the_client_would_rather_use_xet(hub, run, monkeypatch):
    monkeypatch.setattr(client, "HF_HUB_DISABLE_XET", False)
    hub.takes_large_files = False
    push(run)
    assert sorted(hub.files("ann/run")) == SHARED


def test_a_branch_is_made_and_pushed_to(hub, run):
    push(run, revision="first-try")
    push(run, revision="first-try")
    assert sorted(hub.files("ann/run", "first-try")) == SHARED
    assert sorted(hub.files("ann/run")) == [".gitattributes"]


def test_a_repository_is_private_if_that_is_asked_for(hub, run):
    push(run, repo="ann/mine", private=True)
    push(run, repo="ann/everyones")
    assert hub.store.repositories["ann/mine"].private
    assert not hub.store.repositories["ann/everyones"].private


def test_a_slow_hub_is_waited_for(hub, run):
    hub.fail(".", wait=0.1)
    push(run)
    assert sorted(hub.files("ann/run")) == SHARED


def test_a_hub_that_knows_no_xet_is_told_of_with_the_way_out(hub, run, monkeypatch):
    monkeypatch.setattr(client, "HF_HUB_DISABLE_XET", False)
    assert "this Hub does not know xet; set HF_HUB_DISABLE_XET=1" in refused(run)


# ---- Failures that pass ----


@pytest.mark.parametrize(
    ("pattern", "status"),
    [
        ("create", 503),
        ("validate-yaml", 503),
        ("PUT /lfs", 503),
        ("/commit/", 500),
        ("/commit/", 409),
        ("/commit/", 0),
        ("create", 0),
        ("PUT /lfs", 0),
    ],
)
def test_what_fails_once_is_tried_again(hub, run, pattern, status):
    hub.fail(pattern, status, times=1)
    push(run)
    assert sorted(hub.files("ann/run")) == SHARED
    assert hub.count(pattern) >= 2


def test_the_time_that_the_hub_asks_for_is_waited(hub, run):
    hub.fail("/commit/", 429, times=1, headers={"Retry-After": "1"})
    push(run)
    first, second = (when for when, what in zip(hub.clock, hub.requests, strict=True) if "/commit/" in what)
    assert second - first >= 1


def test_a_repository_that_is_deleted_meanwhile_is_made_anew(hub, run):
    push(run)
    hub.store.repositories.clear()
    push(run)
    assert sorted(hub.files("ann/run")) == SHARED


def test_failures_on_the_way_are_told_with_the_folder(hub, run, caplog):
    hub.fail("/commit/", 500, times=2)
    push(run)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("hf_blocklocal")]
    assert ours == [
        f"Pushing to ann/run failed: the Hub answered 500. The run is safe in {run}. Trying again in 0 s "
        f"(attempt {attempt} of 3)."
        for attempt in (2, 3)
    ]


# ---- Failures that stay ----


def test_the_last_word_names_folder_and_command(hub, run):
    hub.fail("/commit/", 500)
    text = refused(run, private=True, revision="first try")
    assert text == (
        f"The run was not pushed to ann/run, tried 3 times: the Hub answered 500. Nothing is lost: it is saved in "
        f"{run}. To finish the push later, run: hf-blocklocal push {run} ann/run --private --revision 'first try'"
    )
    assert hub.count("/commit/") == 3


def test_no_token_ends_up_in_the_last_word(hub, run):
    hub.fail("/commit/", 500)
    assert "hf_write" not in refused(run, token="hf_write")
    assert "hf_write" not in repr(Destination("ann/run", "hf_write"))


def test_the_next_push_goes_on_where_the_failed_one_stopped(hub, run):
    fault = hub.fail("/commit/", 500)
    refused(run)
    uploads = hub.count("PUT /lfs")
    assert uploads == 3
    fault.times = 0
    push(run)
    assert hub.count("PUT /lfs") == uploads
    assert sorted(hub.files("ann/run")) == SHARED


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        (
            "hf_wrong",
            "ann/run",
            "the token was not accepted (401: Invalid credentials in Authorization header). Log in",
        ),
        ("hf_read", "ann/run", "this token may not do that (403: You don't have the rights to create a model"),
        ("hf_write", "bob/run", 'under the namespace "bob"'),
    ],
)
def test_a_token_that_will_not_do_is_tried_once(hub, run, token, repo, said):
    assert said in (text := refused(run, token=token, repo=repo))
    assert "tried once" in text
    assert hub.count("create") == 1


def test_an_upload_that_the_storage_refuses_is_not_tried_again(hub, run):
    hub.fail("PUT /lfs", 400)
    assert "tried once: the Hub answered 400" in refused(run)


def test_a_conflict_that_stays_is_given_up(hub, run):
    hub.fail("/commit/", 409)
    assert "tried 3 times: the Hub answered 409" in refused(run)


def test_a_hub_that_wants_more_time_than_there_is_is_given_up_at_once(hub, run):
    hub.fail("/commit/", 429, headers={"Retry-After": "3600"})
    assert "tried once: the Hub answered 429, try again in 3600 s" in refused(run)


def test_a_hub_that_never_answers_is_given_up(hub, run):
    hub.fail("create", hangs=True)
    start = time.monotonic()
    text = refused(run, patience=Patience(attempts=2, first_wait=0.01, silence=0.3))
    assert "tried 2 times: the Hub does not answer" in text
    assert time.monotonic() - start < 5


def test_a_push_that_does_not_come_to_an_end_is_left_to_itself(hub, run):
    hub.fail("/commit/", hangs=True)
    start = time.monotonic()
    text = refused(run, patience=Patience(silence=60, limit=1))
    assert "tried once: the Hub does not come to an end" in text
    assert time.monotonic() - start < 10


def test_a_push_that_was_left_to_itself_commits_nothing_later(hub, run):
    hub.fail("PUT /lfs", wait=2, times=1)
    refused(run, patience=Patience(silence=60, limit=0.5))
    uploads = hub.count("PUT /lfs")
    wait_for(lambda: hub.count("PUT /lfs") > uploads)
    push_run(run, Destination("ann/run"), message="Later", patience=QUICK)
    time.sleep(0.5)
    assert hub.store.repositories["ann/run"].messages == ["initial commit", "Later"]


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_no_network(hub, run):
    hub.stop()
    assert "tried 3 times: the Hub cannot be reached" in refused(run)


def test_offline_mode(hub, run, monkeypatch):
    monkeypatch.setattr(client, "HF_HUB_OFFLINE", True)
    assert "tried once: offline mode is on; unset HF_HUB_OFFLINE" in refused(run)
    assert hub.requests == []


def test_the_client_is_given_back_with_its_own_patience(hub, run):
    from huggingface_hub.utils import get_session

    before = get_session().timeout
    push(run)
    assert get_session().timeout == before


# ---- Refused before anything is sent ----


@pytest.mark.parametrize("name", ["a/b/c", "ann/run--1", "ann/ru n", "ann/.run", "", "ann/run.git", "r" * 97])
def test_a_name_that_the_hub_would_refuse(hub, run, name):
    assert f"{name!r} cannot be the name of a repository." in refused(run, NotPushableError, repo=name)
    assert hub.requests == []


def test_no_token(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "Log in with `hf auth login`" in refused(run, NotPushableError, repo="ann/run", private=True)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("block_local_config.json", "it holds no block_local_config.json"),
        ("config.json", "it holds no config.json of a model"),
        ("model.safetensors", "it holds no weights in safetensors"),
    ],
)
def test_a_folder_that_is_not_a_run(hub, run, gone, said):
    (run / gone).unlink()
    text = refused(run, NotPushableError)
    assert said in text
    assert f"for example its newest checkpoint, {run / 'checkpoint-2'}" in text
    assert hub.requests == []


def test_a_folder_that_is_not_there(hub, tmp_path):
    with pytest.raises(NotPushableError, match="there is no such folder"):
        push(tmp_path / "nothing")
    assert hub.requests == []


def test_a_run_that_lacks_a_shard(hub, run):
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (run / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (run / "model.safetensors").rename(run / "model-1-of-2.safetensors")
    assert "names model-2-of-2.safetensors, which is not there" in refused(run, NotPushableError)


def test_a_card_that_the_hub_refuses_is_named(hub, run):
    (run / "README.md").write_text("no metadata", encoding="utf-8")
    assert "no metadata" in refused(run)


@pytest.mark.parametrize(
    "values", [{"attempts": 0}, {"first_wait": -1}, {"silence": 0}, {"limit": -5.0}, {"bytes_per_second": 0}]
)
def test_patience_without_sense(values):
    with pytest.raises(NotPushableError, match=f"{next(iter(values))} must be"):
        Patience(**values)


# ---- hf-blocklocal push ----


def test_the_command_of_the_last_word_finishes_the_push(hub, run, capsys):
    fault = hub.fail("/commit/", 500)
    command = refused(run).partition("To finish the push later, run: ")[2].split()
    assert command[:2] == ["hf-blocklocal", "push"]
    fault.times = 0
    push_command.main(command[2:])
    assert f"is on the Hub: {hub.url}/ann/run/commit/" in capsys.readouterr().out
    assert sorted(hub.files("ann/run")) == SHARED


def test_a_checkpoint_can_be_pushed_without_what_only_its_run_needs(hub, run):
    push_command.main([str(run / "checkpoint-2"), "ann/run", "--token", "hf_write", "--private"])
    assert sorted(hub.files("ann/run")) == sorted([".gitattributes", *MODEL, *TOKENIZER, "trainer_state.json"])


def test_a_push_that_fails_ends_its_process_with_an_error(hub, run, tmp_path):
    hub.fail("PUT /lfs", hangs=True)
    command = [sys.executable, "-m", "hf_blocklocal", "push", str(run), "ann/run", "--limit", "1"]
    environment = of_subprocess(hub, tmp_path)
    result = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while hub.count("PUT /lfs") == 0:
        assert result.poll() is None, result.stderr.read()
        time.sleep(0.05)
    start = time.monotonic()
    said = result.communicate(timeout=60)[1]
    assert result.returncode == 1
    assert (
        "hf-blocklocal push: The run was not pushed to ann/run, tried once: the Hub does not come to an end. Nothing"
        in said
    )
    assert "Traceback" not in said
    assert time.monotonic() - start < 15
