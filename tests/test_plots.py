"""A history becomes figures that show its numbers, and nothing outside the figures changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
from test_parity import arguments, examples
from zoo import SPECIMENS

from hf_blocklocal import BlockLocalConfig, BlockLocalTrainer
from hf_blocklocal.callbacks import DriftCallback, GradientAlignmentCallback, LinearProbeCallback
from hf_blocklocal.commands import plot
from hf_blocklocal.errors import MissingExtraError, NothingToDrawError
from hf_blocklocal.extras import optional
from hf_blocklocal.plots import draw, draw_run, find_source, spread
from hf_blocklocal.records.history import HISTORY_NAME, BlockOfCut, CutRow, Memory, Timeline, logged, write_history


ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"
HISTORY = [
    {
        "alignment/block_0": 0.2,
        "norm_ratio/block_0": 3.0,
        "alignment/block_1": 1.0,
        "norm_ratio/block_1": 1,
        "step": 0,
    },
    {"probe/block_0": 0.4, "probe/block_1": 0.5, "probe_layer/block_0": 1, "probe_layer/block_1": 3, "step": 0},
    {"drift/block_0": 0.0, "drift/block_1": 0.0, "step": 0},
    {"loss": 2.0, "block_0/loss": 2.5, "block_1/loss": 2.0, "step": 10},
    {"eval_loss": 1.9, "eval_accuracy": 0.5, "eval_block_0_loss": 2.1, "eval_block_0_accuracy": 0.4, "step": 10},
    {"probe/block_0": 0.6, "probe/block_1": 0.7, "step": 20},
    {"drift/block_0": 0.01, "drift/block_1": 0.02, "step": 20},
    {"loss": 1.0, "block_0/loss": 1.5, "block_1/loss": 1.0, "step": 20},
    {"eval_loss": 1.2, "eval_accuracy": 0.6, "eval_block_0_loss": 1.3, "eval_block_0_accuracy": 0.45, "step": 20},
    {"eval_loss": 1.1, "eval_accuracy": 0.8, "eval_block_0_loss": 1.3, "eval_block_0_accuracy": 0.55, "step": 20},
    {"train_runtime": 3.0, "train_loss": 1.5, "step": 20},
]
NAMES = {
    *("loss", "evaluation_loss", "accuracy", "accuracy_by_depth", "alignment"),
    *("norm_ratio", "probe", "probe_by_depth", "drift"),
}


def lines(figure):
    """Every drawn line as (xs, ys), but for the dashed ones to compare with."""
    drawn = [line for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn]


def words(figure):
    axes = figure.axes[0]
    return [text.get_text() for text in axes.texts]


@pytest.fixture
def run_folder(tmp_path):
    def make(history=HISTORY, folder="run"):
        path = tmp_path / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        return path

    return make


def test_every_kind_of_row_has_its_figure_and_no_other_has():
    assert draw(HISTORY).keys() == NAMES
    assert draw(HISTORY[:1]).keys() == {"alignment", "norm_ratio"}
    assert draw([{"train_loss": 1.0, "step": 5}, {"learning_rate": 0.1, "step": 5}]) == {}


def test_the_lines_are_the_numbers_of_the_history():
    figures = draw(HISTORY)
    assert lines(figures["loss"]) == [([10, 20], [2.5, 1.5]), ([10, 20], [2.0, 1.0])]
    assert lines(figures["drift"]) == [([0, 20], [0.0, 0.01]), ([0, 20], [0.0, 0.02])]
    assert lines(figures["alignment"]) == [([0], [0.2]), ([0], [1.0])]


def test_of_two_rows_of_a_step_the_later_counts_and_the_model_stands_after_its_heads():
    figures = draw(HISTORY)
    assert lines(figures["accuracy"]) == [([10, 20], [0.4, 0.55]), ([10, 20], [0.5, 0.8])]
    assert words(figures["accuracy"])[1:] == ["block 0", "whole model"]


def test_over_depth_there_is_a_line_for_each_time():
    figures = draw(HISTORY)
    assert lines(figures["probe_by_depth"]) == [([0, 1], [0.4, 0.5]), ([0, 1], [0.6, 0.7])]
    assert words(figures["probe_by_depth"])[1:] == ["step 0", "step 20"]
    ticks = [label.get_text() for label in figures["probe_by_depth"].axes[0].get_xticklabels()]
    assert ticks == ["block 0\nlayer 1", "block 1\nlayer 3"]


def test_many_times_are_thinned_to_a_few_with_the_first_and_the_last():
    history = [{"probe/block_0": 0.1, "probe/block_1": 0.2, "step": step} for step in range(0, 110, 10)]
    named = words(draw(history)["probe_by_depth"])[1:]
    assert (named[0], named[-1], len(named)) == ("step 0", "step 100", 5)


def test_every_figure_says_what_it_shows_how_to_read_it_and_in_what_unit():
    for name, figure in draw(HISTORY).items():
        axes = figure.axes[0]
        assert axes.get_title(loc="left"), name
        assert axes.get_ylabel(), name
        assert words(figure)[0].endswith("."), name
        if not name.endswith("by_depth"):
            assert axes.get_xlabel() == "optimizer step"


def test_blocks_keep_their_colour_from_figure_to_figure():
    figures = draw(HISTORY)
    colours = [
        [line.get_color() for line in figures[name].axes[0].lines[:2]] for name in ("loss", "drift", "accuracy")
    ]
    assert colours[0] == colours[1] == colours[2]
    assert colours[0][0] != colours[0][1]


@pytest.mark.parametrize("ratio", [1.3, 4.0, 30.0, 0.01])
def test_a_ratio_has_several_numbers_at_its_axis(ratio):
    axes = draw([{"norm_ratio/block_0": ratio, "norm_ratio/block_1": 1.0, "step": 0}])["norm_ratio"].axes[0]
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


def test_a_run_of_a_single_block_shows_the_loss_of_the_model():
    figures = draw([{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 2}, {"drift/block_0": 0.1, "step": 2}])
    assert figures.keys() == {"loss", "drift"}
    assert lines(figures["loss"]) == [([1, 2], [2.0, 1.0])]


def test_several_evaluation_sets_have_a_figure_each():
    history = [
        {"eval_new_block_0_accuracy": 0.1, "eval_new_accuracy": 0.2, "step": 1},
        {"eval_old_block_0_accuracy": 0.3, "eval_old_accuracy": 0.4, "step": 1},
    ]
    figures = draw(history)
    assert figures.keys() == {f"accuracy{depth}_{name}" for depth in ("", "_by_depth") for name in ("new", "old")}
    assert lines(figures["accuracy_old"]) == [([1], [0.3]), ([1], [0.4])]


@pytest.mark.parametrize(
    "heights", [[0.5, 0.5, 0.5], [0.1, 0.9, 0.12], [0.3], [0.2, 0.15, 0.2, 0.9], [float("nan"), 0.2]]
)
def test_names_of_lines_do_not_cover_each_other(heights):
    placed = spread(heights, gap=0.1)
    assert all(second - first >= 0.1 - 1e-9 for first, second in zip(sorted(placed), sorted(placed)[1:], strict=False))
    order = [sorted(range(len(heights)), key=values.__getitem__) for values in (heights, placed)]
    if heights == sorted(set(heights)):
        assert order[0] == order[1]


def test_names_that_are_far_apart_stay_where_their_lines_end():
    assert spread([0.9, 0.1, 0.5], gap=0.1) == pytest.approx([0.9, 0.1, 0.5])


def test_each_figure_is_written_as_a_png_where_it_is_asked_for(run_folder, tmp_path):
    folder = run_folder()
    assert {path.relative_to(folder).as_posix() for path in draw_run(folder)} == {
        f"plots/{name}.png" for name in NAMES
    }
    paths = draw_run(folder, tmp_path / "else" / "where")
    assert {path.parent for path in paths} == {tmp_path / "else" / "where"}
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_nothing_global_changes(run_folder):
    before = dict(mpl.rcParams), mpl.get_backend(auto_select=False)
    draw_run(run_folder())
    assert (dict(mpl.rcParams), mpl.get_backend(auto_select=False)) == before
    code = f"import sys; from hf_blocklocal.plots import draw_run; draw_run({str(run_folder())!r})\n"
    code += "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_matplotlib_is_asked_for_by_the_command_that_installs_it(run_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hf-blocklocal\[plots\]'"):
        draw_run(run_folder())


def test_a_library_that_is_there_but_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("import not_a_library_at_all")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="not_a_library_at_all"):
        optional("broken_library", extra="plots")


def test_the_newest_state_of_a_run_is_drawn(run_folder):
    folder, checkpoint = run_folder(), run_folder(folder="run/checkpoint-20")
    for path, second in ((folder, 1), (checkpoint, 2)):
        os.utime(path / "trainer_state.json", (second, second))
    assert find_source(folder) == checkpoint / "trainer_state.json"
    os.utime(folder / "trainer_state.json", (3, 3))
    assert find_source(folder) == folder / "trainer_state.json"
    assert find_source(checkpoint) == checkpoint / "trainer_state.json"


def test_a_folder_without_anything_to_draw_is_refused_with_what_to_do(run_folder, tmp_path):
    with pytest.raises(NothingToDrawError, match="There is no folder"):
        draw_run(tmp_path / "nowhere")
    with pytest.raises(
        NothingToDrawError, match=r"holds no history.jsonl and no trainer_state.json.*trainer.save_state\(\)"
    ):
        draw_run(tmp_path)
    with pytest.raises(NothingToDrawError, match="holds 1 rows and nothing to draw.*logging_steps"):
        draw_run(run_folder([{"train_loss": 1.0, "step": 3}]))
    assert not (tmp_path / "run" / "plots").exists()


def test_the_script_prints_the_files_and_explains_in_one_line_what_is_wrong(run_folder, tmp_path, capsys):
    plot.main([str(run_folder()), "--output", str(tmp_path / "figures")])
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {path.stem for path in printed} == NAMES
    assert all(path.is_file() for path in printed)
    with pytest.raises(SystemExit, match=r"^hf-blocklocal plot: There is no folder"):
        plot.main([str(tmp_path / "nowhere")])


def test_a_history_shows_what_its_logs_show_and_the_cut_memory_and_timeline(tmp_path):
    blocks = (BlockOfCut(0, 1, 10, 2, 0.5, "x", "cpu"), BlockOfCut(2, 3, 2500, 0, None, "the model's own loss", "cpu"))
    rows = [
        CutRow(0, "BertModel", blocks),
        *(logged(values, values["step"]) for values in HISTORY),
        *(Memory(20, device, peak << 30, "allocated", 0) for device, peak in (("cuda:0", 1), ("cuda:1", 3))),
        *(Timeline(step, block, step + block, step + block + 0.5) for step in range(9) for block in (0, 1)),
    ]
    figures = draw(rows)
    assert figures.keys() == NAMES | {"cut", "memory", "timeline"}
    assert lines(figures["loss"]) == lines(draw(HISTORY)["loss"])
    assert [bar.get_width() for bar in figures["memory"].axes[0].patches] == [1, 3]
    told = " ".join(text.get_text().replace("\n", " ") for text in figures["cut"].axes[0].texts)
    for words in ("block 0 layers 0 to 1 10 parameters cpu", "2.5 k parameters", "2 parameters, cost 50 %"):
        assert words in told
    stops = [line for line in figures["cut"].axes[0].lines if list(line.get_xdata()) == [2, 2]]
    assert len(stops) == 1
    stretches = [place for bars in figures["timeline"].axes[0].collections for place in bars.get_paths()]
    assert len(stretches) == 2 * 4  # the last four steps
    assert {path.get_extents().x0 for path in stretches} == {0, 1, 2, 3, 4}
    write_history(tmp_path / HISTORY_NAME, rows)
    (tmp_path / "trainer_state.json").write_text("never read")
    assert {path.stem for path in draw_run(tmp_path)} == figures.keys()


@pytest.mark.parametrize("blocks", [1, 2, 12])
def test_any_number_of_blocks_is_drawn(blocks):
    cut = tuple(BlockOfCut(n, n, 10**n, 0, None, "a, b through layers 1", "cpu") for n in range(blocks))
    told = draw([CutRow(0, "X", cut)])["cut"].axes[0].texts
    assert len(told) == 1 + 3 * blocks  # how to read it, and for each block its name, arrow and head
    whole = CutRow(0, "X", (BlockOfCut(None, None, 5, 0, None, "the model's own loss", "cpu"),))
    assert "all layers" in " ".join(text.get_text() for text in draw([whole])["cut"].axes[0].texts)


def test_a_corrupt_history_is_named_in_one_line(tmp_path):
    (tmp_path / HISTORY_NAME).write_text("nonsense\n")
    with pytest.raises(SystemExit, match=r"^hf-blocklocal plot: Line 1 of .*history.jsonl is no JSON"):
        plot.main([str(tmp_path)])


def test_a_real_run_with_all_callbacks_is_drawn_whole(tmp_path):
    rows = examples(SPECIMENS["bert"])
    trainer = BlockLocalTrainer(
        SPECIMENS["bert"].build(),
        arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda output: {
            "accuracy": (output.predictions.argmax(-1) == output.label_ids.ravel()).mean()
        },
        block_local=BlockLocalConfig(num_blocks=3),
    )
    for kind in (GradientAlignmentCallback, LinearProbeCallback, DriftCallback):
        trainer.add_callback(kind(trainer, every=2))
    trainer.train()
    trainer.save_state()
    assert {path.stem for path in draw_run(tmp_path)} == NAMES | {"cut", "memory"}
