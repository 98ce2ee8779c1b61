"""The learning benchmark splits by content, goes on where it stopped, and hides neither failures nor lucky rates."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "scripts" / "benchmarks"


class Inline(Executor):
    """Runs everything at once, in this process, and counts."""

    def __init__(self):
        self.labels = []

    def submit(self, function, run, *args):
        self.labels.append(run.label)
        future = Future()
        try:
            future.set_result(function(run, *args))
        except (ValueError, ZeroDivisionError) as error:
            future.set_exception(error)
        return future


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("", "_cases", "_report", "_rows", "_runs", "_summary", "_tasks")
    return {f"learning{name}": importlib.import_module(f"learning{name}") for name in names}


@pytest.fixture
def tiny(scripts):
    """A few digits to turn around, for a model of three narrow layers."""
    return replace(
        scripts["learning_tasks"].SIZES["small"]["reversal"],
        blocks=(3,),
        rates=(1e-3, 1e-2, 1e-1),
        budget={"max_steps": 4, "per_device_train_batch_size": 4},
        layers=3,
        width=8,
        heads=2,
        shortest=2,
        longest=3,
        train_sequences=16,
        held_out_sequences=8,
    )


@pytest.fixture
def store(scripts, tmp_path, tiny):
    store = scripts["learning_runs"].Store(tmp_path)
    store.prepare(tiny)
    return store


def run_rows(scripts, store, task, rows, *, seeds=(0, 1), **settings):
    cases, skipped = scripts["learning_cases"].list_cases([task], rows, None)
    pool = Inline()
    scripts["learning"].run_all(cases, store, pool, seeds=seeds, jobs=2, **settings)
    return pool, scripts["learning_summary"].summarize(cases, store, seeds=seeds, skipped=skipped)


def base():
    return importlib.import_module("learning_tasks.base")


def some(scripts, *names):
    return {name: scripts["learning_rows"].ROWS[name] for name in names}


def test_a_sample_s_split_depends_on_nothing_but_its_content(scripts):
    split = base().split_by_share
    words = [f"word {number}" for number in range(1000)]
    parts = split(words, str.encode, train=0.5, validation=0.2)
    assert [set(part) for part in split(words[::-2], str.encode, train=0.5, validation=0.2)] == [
        set(part) & set(words[::-2]) for part in parts
    ]
    assert sorted(word for part in parts for word in part) == sorted(words)
    assert [len(part) / 1000 for part in parts] == pytest.approx([0.5, 0.2, 0.3], abs=0.05)


def test_every_process_makes_the_same_data(scripts, store, tiny):
    made = store.prepare(tiny)
    code = (
        "from dataclasses import asdict; import json, sys; from learning_tasks import SIZES; from learning_tasks.base"
        " import fingerprint; from pathlib import Path; task = SIZES['small']['reversal'];"
        " task = type(task)(**json.loads(sys.argv[1])); print(fingerprint(task.build(Path()), Path('none')))"
    )
    spec = {name: value for name, value in tiny.spec().items() if name != "task"}
    environment = {**os.environ, "PYTHONPATH": f"{BENCHMARKS}:{ROOT}", "PYTHONHASHSEED": "7"}
    words = [sys.executable, "-c", code, json.dumps(spec)]
    printed = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert printed == scripts["learning_tasks"].load_fingerprint(made)


def test_no_sequence_is_in_two_splits(scripts, store, tiny):
    data = scripts["learning_tasks"].load_data(store.prepare(tiny))
    splits = [{tuple(row["input_ids"]) for row in part} for part in (data.train, data.validation, data.test)]
    assert [len(split) for split in splits] == [16, 8, 8]
    assert len(set.union(*splits)) == 32


def test_the_topics_of_the_language_reference_do_not_repeat_themselves(scripts):
    corpora = importlib.import_module("learning_tasks.corpora")
    paragraphs = corpora.topic_paragraphs()
    parts = base().split_by_share(paragraphs, str.encode, train=0.5, validation=0.15)
    runs = [{run for text in part for run in corpora.runs_of_words(text, 8)} for part in parts]
    assert len(paragraphs) > 500
    assert len(runs[0] & runs[2]) < 0.02 * len(runs[2])


def test_every_row_knows_all_that_it_depends_on(scripts):
    rows = scripts["learning_rows"].ROWS
    for name, row in rows.items():
        if name == "kappel2023":
            continue
        settings = json.loads(json.dumps(row.settings(2 if row.depends_on_blocks else None)))
        assert settings["method"] == row.method
        if row.method == "local":
            assert settings["block_local"]["num_blocks"] == 2
            assert {"head_layers", "feedback"} & settings["block_local"].keys(), "what is settled is part of it"
            assert "latent_dim" not in settings["block_local"], "what is as it comes is not"
    assert rows["head_layers=0, one rate"].settings(3)["block_local"]["head_layers"] == 0
    assert rows["default, one rate"].settings(3)["block_local"]["head_layers"] == 2


def test_a_row_that_the_package_does_not_know_is_skipped_with_a_reason(scripts, tiny):
    rows = {"new": scripts["learning_rows"].Row("new", "local", {"preset": "of tomorrow"})}
    cases, skipped = scripts["learning_cases"].list_cases([tiny], rows, None)
    assert cases == []
    assert "of tomorrow" in skipped[0]["reason"]


def test_from_scratch_nothing_is_frozen_or_adapted(scripts, tiny):
    cases, _ = scripts["learning_cases"].list_cases([tiny], None, None)
    assert {"freeze lower", "LoRA", "not fine-tuned"}.isdisjoint(case.row.name for case in cases)


def test_the_rate_is_tuned_with_one_seed_and_the_best_is_repeated(scripts, store, tiny):
    pool, report = run_rows(scripts, store, tiny, some(scripts, "backpropagation", "pred"), seeds=(0, 1, 2))
    assert len(pool.labels) == 2 * (3 + 2)
    for case in report["tasks"]["reversal"]["cases"]:
        tuned = [run for run in case["runs"] if run["seed"] == 0]
        best = max(tuned, key=lambda run: (run["validation"], sum(score for _, score in run["curve"])))
        assert [run["rate"] for run in tuned] == [1e-3, 1e-2, 1e-1]
        assert {run["rate"] for run in case["runs"] if run["chosen"]} == {case["rate"]} == {best["rate"]}
        assert sorted(run["seed"] for run in case["runs"] if run["chosen"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("scores", "tried", "chosen", "at_edge"),
    [
        ({1e-3: 0.1, 2e-3: 0.3, 4e-3: 0.2}, [1e-3, 2e-3, 4e-3], 2e-3, False),
        ({1e-3: 0.1, 2e-3: 0.2, 4e-3: 0.3, 8e-3: 0.2}, [1e-3, 2e-3, 4e-3, 8e-3], 4e-3, False),
        ({1e-3: 0.1, 2e-3: 0.2, 4e-3: 0.3, 8e-3: 0.4, 1.6e-2: 0.5}, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], 1.6e-2, True),
        ({1e-3: 0.5, 2e-3: 0.2, 4e-3: 0.1, 5e-4: 0.4}, [5e-4, 1e-3, 2e-3, 4e-3], 1e-3, False),
        ({1e-3: 0.1, 2e-3: 0.2, 4e-3: 0.3}, [1e-3, 2e-3, 4e-3, 8e-3], 4e-3, False),  # the fourth fails
        ({1e-3: 0.0, 2e-3: 0.0, 4e-3: 0.0}, [1e-3, 2e-3, 4e-3], 1e-3, False),  # no rate is better than another
    ],
)
def test_a_grid_goes_on_beyond_an_edge_that_is_best(scripts, store, tiny, scores, tried, chosen, at_edge):
    cases = scripts["learning_cases"]
    row = scripts["learning_rows"].ROWS["backpropagation"]
    case = cases.Case(replace(tiny, rates=(1e-3, 2e-3, 4e-3)), row, None)
    while missing := cases.missing_runs(case, store, (0,), lambda run: False):
        for run in missing:
            score = scores.get(run.rate)
            store.save(run, {"error": "no"} if score is None else {"validation": score, "test": score})
    summary = scripts["learning_summary"].summary_of(case, store, (0,))
    assert [run["rate"] for run in summary["runs"]] == tried
    assert (summary["rate"], summary["at_edge"]) == (chosen, at_edge)


def test_what_has_been_run_is_not_run_again(scripts, store, tiny):
    first, report = run_rows(scripts, store, tiny, some(scripts, "backpropagation"))
    again, same = run_rows(scripts, store, tiny, some(scripts, "backpropagation"))
    assert (len(first.labels), again.labels) == (4, [])
    assert report == same
    more, _ = run_rows(scripts, store, tiny, some(scripts, "backpropagation"), seeds=(0, 1, 2))
    assert [label.rpartition("seed=")[2] for label in more.labels] == ["2"]


def test_a_changed_budget_is_a_new_run(scripts, store, tiny):
    run = scripts["learning_runs"].Run(tiny, scripts["learning_rows"].ROWS["pred"], 3, 1e-3, 0)
    longer = replace(run, task=replace(tiny, budget={**tiny.budget, "max_steps": 5}))
    other_grid = replace(run, task=replace(tiny, rates=(1e-3, 1.0)))
    keys = [store.key(one) for one in (run, longer, other_grid, replace(run, seed=1), replace(run, num_blocks=2))]
    assert keys[0] == keys[2]
    assert len({*keys}) == 4


def test_a_failed_run_is_recorded_and_shown(scripts, store, tiny):
    row = {"too deep": scripts["learning_rows"].Row("too deep", "local", {"boundaries": (1, 7)})}
    pool, report = run_rows(scripts, store, tiny, row)
    case = report["tasks"]["reversal"]["cases"][0]
    assert all("CutError" in run["error"] for run in case["runs"])
    assert len(pool.labels) == len(case["runs"]) == 3, "without a best rate there is nothing to repeat"
    assert "| too deep | failed |" in scripts["learning_report"].markdown(report)
    assert run_rows(scripts, store, tiny, row)[0].labels == []
    assert len(run_rows(scripts, store, tiny, row, again=True)[0].labels) == 3


def test_a_table_names_the_edge_of_the_grid_and_the_spread(scripts):
    case = {"rate": 1.0, "at_edge": True, "runs": [{"chosen": True, "test": score} for score in (0.5, 0.6, 0.7)]}
    case["runs"].append({"chosen": False, "test": 0.9})
    cell = scripts["learning_report"].cell
    assert cell(case, "test", ".3f", 3) == f"0.600 ± 0.100{scripts['learning_report'].EDGE}"
    assert cell(case, "test", ".3f", 4).endswith(scripts["learning_report"].FEWER)


def test_freezing_leaves_the_last_block_to_learn(scripts, store, tiny, tmp_path):
    data = scripts["learning_tasks"].load_data(store.prepare(tiny))
    model = tiny.model(store.prepare(tiny), seed=0)
    arguments = importlib.import_module("learning_tasks.pretraining").silent_arguments(str(tmp_path))
    common = {"args": arguments, "train_dataset": data.train, "data_collator": tiny.collate}
    scripts["learning_runs"].freeze_lower_(model, 3, common)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "classifier.weight" in trained
    assert {name.split("layer.")[1][0] for name in trained if "layer." in name} == {"2"}
    assert not any("embeddings" in name for name in trained)


def test_adapters_are_merged_into_a_plain_model(scripts, store, tiny):
    run = scripts["learning_runs"].Run(tiny, scripts["learning_rows"].ROWS["LoRA"], None, 1e-2, 0)
    data = scripts["learning_tasks"].load_data(store.prepare(tiny))
    before = tiny.model(store.prepare(tiny), seed=0)
    after = scripts["learning_runs"].train(run, tiny.model(store.prepare(tiny), seed=0), data, [])
    assert type(after) is type(before)
    changed = {
        name
        for name, parameter in after.named_parameters()
        if not parameter.equal(before.get_parameter(name)) and name.endswith("weight")
    }
    assert changed
    assert all("layer." in name for name in changed)


def test_a_margin_is_counted_from_freezing_to_backpropagation(scripts):
    def case(row, method, score, num_blocks=2):
        runs = [{"chosen": True, "test": score}]
        return {"row": row, "method": method, "num_blocks": num_blocks, "rate": 1.0, "at_edge": False, "runs": runs}

    cases = [
        case("all", "backpropagation", 10.0, None),
        case("frozen", "freeze", 40.0),
        case("half", "local", 20.0),
        case("worse", "local", 80.0),
    ]
    metric = {"name": "perplexity", "higher_is_better": False, "form": ".2f"}
    report = {"tasks": {"words": {"title": "Words", "metric": metric, "cases": cases}}}
    lines = scripts["learning_report"].margins(report)
    assert lines[-2:] == ["| half | 0.50 |", "| worse | -0.50 |"]
    cases[1]["runs"][0]["test"] = 9.0
    lines = scripts["learning_report"].margins(report)
    assert lines[-2:] == ["| half | no margin |", "| worse | no margin |"]


def test_every_kind_of_row_runs_and_everything_is_reported(scripts, store, tiny):
    known = scripts["learning_rows"].ROWS
    names = [name for name in known if name != "kappel2023"]
    pretrained = type("Pretrained", (type(tiny),), {"pretrained": True, "curve_every": 2, "name": "pretrained"})
    task = pretrained(**{name: value for name, value in replace(tiny, rates=(1e-2,)).spec().items() if name != "task"})
    store._prepared[task.name], store._fingerprints[task.name] = store.prepare(tiny), "the same"
    _, report = run_rows(scripts, store, task, some(scripts, *names), seeds=(0,))
    report = json.loads(json.dumps(report))
    cases = report["tasks"]["pretrained"]["cases"]
    assert [case["row"] for case in cases] == names
    assert all("error" not in run for case in cases for run in case["runs"])
    lines = scripts["learning_report"].markdown(report)
    for name in names:
        assert any(line.startswith(f"| {name} | ") for line in lines), name
    assert "| step | 4 |" in lines


def test_every_row_has_its_command_in_the_list(scripts):
    listed = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    references = [name for task in scripts["learning_tasks"].SIZES["small"].values() for name in task.references]
    for name in [*scripts["learning_rows"].ROWS, *references]:
        words = f'"{name}"' if " " in name else name
        assert f"| {name} | `python scripts/benchmarks/learning.py --rows {words}` |" in listed, name


def test_another_grid_does_not_make_the_data_anew(scripts, tiny, tmp_path):
    code_hash = base().code_hash
    (tmp_path / "one.py").write_text('"""Text."""\nclass A:\n    rates: tuple = (1,)\n    layers: int = 2\n')
    (tmp_path / "two.py").write_text("class A:\n    rates: tuple = (1, 2)  # more\n    layers: int = 2\n")
    (tmp_path / "three.py").write_text("class A:\n    rates: tuple = (1,)\n    layers: int = 3\n")
    one, two, three = (code_hash([tmp_path / f"{name}.py"]) for name in ("one", "two", "three"))
    assert one == two != three
    assert tiny.build_spec() == replace(tiny, rates=(1.0,), budget={}).build_spec()
    assert tiny.build_spec() != replace(tiny, width=16).build_spec()


def test_rows_with_the_same_settings_share_their_runs(scripts, store, tiny):
    pool, report = run_rows(scripts, store, tiny, some(scripts, "default", "default, one rate"), seeds=(0,))
    assert len(pool.labels) == 3  # from scratch, one rate is the default
    first, second = report["tasks"]["reversal"]["cases"]
    assert first["runs"] == second["runs"]


def test_a_case_is_complete_when_all_of_its_seeds_are_there(scripts, store, tiny):
    rows = some(scripts, "backpropagation")
    (case,), _ = scripts["learning_cases"].list_cases([tiny], rows, None)
    run_rows(scripts, store, tiny, rows, seeds=(0,))
    complete = scripts["learning_cases"].is_complete
    assert complete(case, store, (0,))
    assert not complete(case, store, (0, 1))


def case_of(row, num_blocks, *scores, method="local"):
    runs = [{"validation": score, "test": score} for score in scores]
    return {"row": row, "num_blocks": num_blocks, "method": method, "runs": runs}


def test_a_task_that_is_made_anew_replaces_its_part_of_the_report_alone(scripts, tmp_path):
    learning, path = scripts["learning"], tmp_path / "learning.json"
    old = {"seeds": [0], "command": "all", "tasks": {"a": {"cases": [1]}, "b": {"cases": [2]}}}
    path.write_text(json.dumps(old), encoding="utf-8")
    new = learning.put_into({"seeds": [0], "tasks": {"b": {"cases": [3]}}}, path, cells=False)
    assert new["tasks"] == {"a": {"cases": [1]}, "b": {"cases": [3]}}
    assert (list(new["tasks"]), new["command"]) == (["a", "b"], "all")
    with pytest.raises(SystemExit, match=r"is of seeds \[0\], not \[0, 1\]"):
        learning.put_into({"seeds": [0, 1], "tasks": {}}, path, cells=False)
    with pytest.raises(SystemExit, match="is none"):
        learning.put_into({"seeds": [0], "tasks": {}}, tmp_path / "nothing.json", cells=False)


def test_cells_are_put_beside_others_of_the_same_samples_alone(scripts, tmp_path):
    learning, path = scripts["learning"], tmp_path / "learning.json"
    start, other = case_of("not fine-tuned", None, 0.1, method="start"), case_of("freeze lower", 2, 0.5)
    task = {"title": "A", "cases": [start, case_of("default", 2, 0.6), other]}
    path.write_text(json.dumps({"seeds": [0], "command": "all", "tasks": {"a": task}}), encoding="utf-8")
    made = {"title": "A", "cases": [start, case_of("default", 2, 0.7), case_of("default", 4, 0.8)]}
    new = learning.put_into({"seeds": [0], "tasks": {"a": made}}, path, cells=True)
    assert new["tasks"]["a"]["cases"] == [start, other, case_of("default", 2, 0.7), case_of("default", 4, 0.8)]
    for cases in ([case_of("not fine-tuned", None, 0.2, method="start")], [case_of("default", 2, 0.7)]):
        with pytest.raises(SystemExit, match="same samples and starting"):
            learning.put_into({"seeds": [0], "tasks": {"a": {"cases": cases}}}, path, cells=True)
