"""Two machines with a launcher each, which share the network and nothing else: the same weights as on one.

Here both are this machine, with folders of their own and clocks that are apart.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_block_parallel import CHAINS, FOUR, SAVED, SCRIPT, assert_same, logs_of, passed, run, settled, without_times
from test_data_parallel import free_port

from hf_blocklocal.errors import FolderNotSharedError
from hf_blocklocal.parallel import folders
from hf_blocklocal.parallel.clocks import Answer, ahead_by
from hf_blocklocal.parallel.machines import names_of
from hf_blocklocal.records.history import HISTORY_NAME, Timeline, read_history


CONFIG = Path(__file__).parents[1] / "configs" / "accelerate" / "nodes_2.yaml"
launched = [pytest.mark.launch, pytest.mark.timeout(900)]
# One chain over both machines, and a chain in each.
ACROSS = {**FOUR["bert in 4"], "args": SAVED}
EACH = {**CHAINS["bert in chains"], "args": SAVED}


class Machines:
    """Two launchers that have been started.

    Args:
        folder: Where each machine has a folder of its own.
        cases: For each machine the cases that it runs.
    """

    def __init__(self, folder, cases):
        self.folders = [folder / "first", folder / "second"]
        options = ["--config_file", str(CONFIG), "--num_processes", "4", "--mixed_precision", "no"]
        options += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
        self.launchers = []
        for number, place in enumerate(self.folders):
            place.mkdir(parents=True, exist_ok=True)
            environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--machine_rank", str(number)]
            with (place / "said").open("w") as said:
                launcher = subprocess.Popen(
                    [*command, str(SCRIPT), "out", json.dumps(cases)],
                    cwd=place,
                    env=environment | {"CLOCK_AHEAD": str(1000 * number)},
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.launchers.append(launcher)

    def said(self, number):
        """Return what has been said on a machine."""
        return (self.folders[number] / "said").read_text()

    def wait_until(self, what, seconds=240):
        """Wait for something to come true."""
        until = time.monotonic() + seconds
        while not what() and time.monotonic() < until:
            time.sleep(0.2)
        assert what(), self.said(0)[-3000:] + self.said(1)[-3000:]

    def end(self):
        """Return what the launchers return once they have ended."""
        return [launcher.wait(timeout=240) for launcher in self.launchers]


@pytest.fixture(scope="module")
def start():
    """Start two machines, and leave none of their processes behind."""
    started = []

    def run(folder, cases):
        started.append(Machines(folder, cases))
        return started[-1]

    yield run
    for machines in started:
        for launcher in machines.launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, start):
    """Run both cases on two machines, and as they are on one; return the folder of all."""
    folder = tmp_path_factory.mktemp("machines")
    machines = start(folder, {"across": settled(ACROSS, processes=4), "each": settled(EACH, processes=2)})
    assert machines.end() == [0, 0], machines.said(0)[-3000:] + machines.said(1)[-3000:]
    passed(run(folder / "one", {"across": settled(ACROSS, processes=1)}, processes=1))
    passed(run(folder / "two", {"each": settled(EACH, processes=1)}, processes=2))
    return folder


def logs_on_both(runs, name):
    return [logs_of(runs / machine / "out" / name) for machine in ("first", "second")]


@pytest.mark.parametrize(("name", "reference"), [("across", "one"), ("each", "two")])
class TestRuns:
    pytestmark = launched

    def test_weights_and_metrics_are_those_of_one_machine(self, runs, name, reference):
        assert_same(runs / reference / name, runs / "first" / "out" / name)
        expected = logs_of(runs / reference / name)[0]
        first, second = logs_on_both(runs, name)
        assert len(first) == len(second) == 2
        for log in first + second:
            assert without_times(log["metrics"]) == without_times(expected["metrics"])
            assert log["predictions"] == expected["predictions"]

    def test_the_second_machine_is_left_without_files_and_the_first_has_all(self, runs, name, reference):
        written = [path for path in (runs / "second" / "out" / name).rglob("*") if path.is_file()]
        assert all(path.name.startswith("log-") for path in written)
        expected, found = (
            {path.name for path in (folder / name / "checkpoint-3").iterdir()}
            for folder in (runs / reference, runs / "first" / "out")
        )
        assert found == expected


class TestPlaces:
    pytestmark = launched

    def test_a_chain_stays_within_a_machine_where_it_fits(self, runs):
        for number, logs in enumerate(logs_on_both(runs, "each")):
            assert [(log["machine"], log["chain"]) for log in logs] == [(number, number)] * 2
        for number, logs in enumerate(logs_on_both(runs, "across")):
            assert [(log["machine"], log["chain"]) for log in logs] == [(number, 0)] * 2

    def test_who_worked_when_is_told_by_one_clock(self, runs):
        history = read_history(runs / "first" / "out" / "across" / "final" / HISTORY_NAME)
        rows = [row for row in history if isinstance(row, Timeline)]
        assert {row.block for row in rows} == {0, 1, 2, 3}
        assert max(row.stop for row in rows) - min(row.start for row in rows) < 500
        # Of one step, no block can have begun before the one below it.
        starts = [min(row.start for row in rows if (row.step, row.block) == (6, block)) for block in range(4)]
        stops = [max(row.stop for row in rows if (row.step, row.block) == (6, block)) for block in range(4)]
        assert all(stop > start for start, stop in zip(starts[:-1], stops[1:], strict=True))


class TestMishaps:
    pytestmark = launched

    def test_a_run_goes_on_from_a_copy_of_the_checkpoint_and_is_refused_without(self, runs, start, tmp_path):
        for number, machine in enumerate(("first", "second")):
            for name in ("across", "each")[: 2 - number]:
                shutil.copytree(runs / "first" / "out" / name / "checkpoint-3", tmp_path / machine / name)
        cases = {"across": settled(ACROSS, processes=4), "each": settled(EACH, processes=2)}
        machines = start(tmp_path, {name: {**case, "resume": name} for name, case in cases.items()})
        assert 0 not in machines.end()
        assert_same(runs / "one" / "across" / "final", tmp_path / "first" / "out" / "across" / "final")
        assert not (tmp_path / "first" / "out" / "each" / "final").exists()
        for number in range(2):
            assert "FolderNotSharedError: Block 0 (rank 2 on machine 1, " in machines.said(number)

    def test_a_process_that_is_killed_is_named_with_its_machine(self, start, tmp_path):
        case = settled({**EACH, "config": {"head_layers": 0, "peer_timeout": 4.0}, "killed": [3, 5]}, processes=2)
        machines = start(tmp_path, {"case": case})
        assert 0 not in machines.end()
        assert "BlockPeerError: Block 1 (rank 3 on machine 1, " in machines.said(0) + machines.said(1)

    def test_told_to_end_on_one_machine_all_save_at_the_same_step(self, start, tmp_path):
        long = {"max_steps": 5000, "logging_steps": 20}
        case = {**FOUR["bert in 4"], "args": long, "config": {**FOUR["bert in 4"]["config"], "save_on_exit": True}}
        machines = start(tmp_path, {"case": settled(case, processes=4)})
        machines.wait_until(lambda: "'loss'" in machines.said(0))
        machines.launchers[1].send_signal(signal.SIGTERM)
        folder = machines.folders[0] / "out" / "case"
        machines.wait_until(lambda: list(folder.glob("checkpoint-*/trainer_state.json")))
        (checkpoint,) = folder.glob("checkpoint-*")
        steps = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        assert checkpoint.name == f"checkpoint-{steps}"
        assert 20 <= steps < 5000
        assert machines.launchers[1].wait(timeout=60) != 0
        assert not list((machines.folders[1] / "out").rglob("checkpoint-*"))


# ---- What is found out without a launcher ----


@pytest.mark.parametrize(
    ("answers", "ahead"),
    [
        ([(10.0, 110.0, 10.2)], 99.9),
        ([(10.0, 110.0, 14.0), (20.0, 120.05, 20.1), (30.0, 130.9, 31.0)], 100.0),
        ([(10.0, 9.0, 10.2)], -1.1),
        ([(10.0, 10.05, 10.2)], 0.0),
    ],
    ids=["ahead", "the quickest answer counts", "behind", "cannot be told apart"],
)
def test_clocks_are_compared(answers, ahead):
    assert ahead_by(Answer(*answer) for answer in answers) == pytest.approx(ahead)


def test_machines_are_named_where_there_are_several():
    assert names_of(["machine 0, a"] * 2, 2) == ["Block 0 (rank 0)", "Block 1 (rank 1)"]
    assert names_of(["a", "b"], 1) == ["Block 0 (rank 0 on a)", "Block 0 (rank 1 on b)"]


def chain_of(monkeypatch, others, *, writes=True):
    """Return the chain of a process where all others say the same thing of their own."""
    monkeypatch.setattr(folders.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(folders, "gather_from_processes", lambda mine, _world: [mine, others, mine])
    return SimpleNamespace(
        writes=writes,
        peers=SimpleNamespace(names=names_of(["a", "b", "a"], 3)),
        together=lambda function, *args: function(*args),
        meet=lambda: None,
    )


@pytest.mark.parametrize("other", [None, 7], ids=["lacks it", "has another one"])
def test_processes_that_would_resume_from_elsewhere_are_named(monkeypatch, tmp_path, other):
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text("{}")
    with pytest.raises(FolderNotSharedError, match=r"^Block 1 \(rank 1 on b\) would resume from another checkpoint"):
        folders.check_checkpoint_everywhere(chain_of(monkeypatch, other), state)
    folders.check_checkpoint_everywhere(chain_of(monkeypatch, None), None)  # nobody has one: the trainer says so


def test_a_folder_that_some_cannot_see_is_refused_by_what_needs_it(monkeypatch, tmp_path):
    with pytest.raises(FolderNotSharedError, match=r"^Block 1 \(rank 1 on b\) cannot see .* leave best out"):
        folders.check_shared(chain_of(monkeypatch, False), tmp_path / "out", "best")
    folders.check_shared(chain_of(monkeypatch, True), tmp_path / "out", "best")
    assert list((tmp_path / "out").iterdir()) == []
