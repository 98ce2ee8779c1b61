"""Every task's YAML file runs through scripts/train.py, on less data; what does not fit a task is refused."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from test_configs import ROOT, script
from transformers import EvalPrediction, LlamaConfig, LlamaForCausalLM

from hf_blocklocal import metrics
from hf_blocklocal.errors import TargetError


sys.path.insert(0, str(ROOT / "scripts"))
CONFIGS = ROOT / "configs" / "train"
ENCODER = {"train_samples": 16, "test_samples": 8, "max_length": 24}
SMALL = {
    "multi_label": ENCODER,
    "regression": ENCODER,
    "pairs": ENCODER,
    "token_classification": ENCODER,
    "question_answering": ENCODER | {"max_length": 64, "options.stride": 8},
    "masked_language_model": ENCODER,
    "causal_language_model": {"train_samples": 100, "test_samples": 40, "max_length": 64},
    "chat": {"train_samples": 48, "test_samples": 16},
    "seq2seq": {"train_samples": 64, "test_samples": 16},
    "image_classification": {"train_samples": 64, "test_samples": 32},
    "audio_classification": {"train_samples": 32, "test_samples": 16},
}
LOADED_BY = {
    "multi_label": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "pairs": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "masked_language_model": "AutoModelForMaskedLM",
    "causal_language_model": "AutoModelForCausalLM",
    "chat": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image_classification": "AutoModelForImageClassification",
    "audio_classification": "AutoModelForAudioClassification",
}


@pytest.fixture(scope="session")
def train():
    return script("train")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """The model of the quickstart, half as deep: its first three layers."""
    folder, source = tmp_path_factory.mktemp("encoder"), script("prepare_quickstart").find_model()
    transformers.AutoModel.from_pretrained(source, num_hidden_layers=3).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture
def data(train, monkeypatch):
    """Let a data set of a test stand for one of the Hub."""
    import datasets

    def stand_in(splits):
        monkeypatch.setattr(datasets, "load_dataset", lambda _name, _subset: splits)

    return stand_in


def test_every_task_has_a_configuration_and_every_configuration_a_test(train):
    from tasks import KITS

    runs = {path.stem: train.read_run(path) for path in CONFIGS.glob("*.yaml")}
    assert {run.task for run in runs.values()} == set(KITS)
    assert set(runs) - {"quickstart"} == set(SMALL) == set(LOADED_BY)


@pytest.mark.parametrize("name", SMALL)
def test_a_configuration_runs_from_end_to_end(name, train, pretrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "draw_pictures", lambda _folder: "")  # tests/test_quickstart.py looks at them
    run = train.read_run(CONFIGS / f"{name}.yaml")
    small = {"training.num_train_epochs": 1, "training.logging_steps": 1, "training.eval_strategy": "'no'"}
    small |= {"training.output_dir": tmp_path, "training.dataloader_pin_memory": "false"} | SMALL[name]
    if isinstance(run.model, str):
        small["model"] = pretrained
    train.main([str(CONFIGS / f"{name}.yaml"), *(f"{key}={value}" for key, value in small.items())])
    outcome = json.loads((tmp_path / "result.json").read_text())["outcomes"][0]
    measured = outcome["metrics"][f"eval_{outcome['metric']}"]
    assert math.isfinite(measured)
    assert any(key.startswith("eval_block_0_") for key in outcome["metrics"])
    printed = capsys.readouterr().out
    assert f"test {outcome['metric']}" in printed
    assert "head of block 0" in printed
    model = getattr(transformers, LOADED_BY[name]).from_pretrained(tmp_path)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    told = "loss" if outcome["metric"] == "perplexity" else outcome["metric"]
    assert told in (tmp_path / "README.md").read_text().lower()


# ---- What the data are made into ----


def options(name, **changes):
    """Return what a YAML file says, with other values."""
    from dataclasses import replace

    return lambda train: replace(train.read_run(CONFIGS / f"{name}.yaml"), **changes)


def prepared(train, name, **changes):
    from tasks import kit_of

    run = options(name, **changes)(train)
    return kit_of(run.task, run.options).prepare(run)


def test_texts_that_share_a_row_do_not_see_each_other(train):
    from tasks.language import pack

    rows = pack([[5, 6, 7, 1], [8, 9, 1], [4, 3, 2, 1]], length=8)
    assert rows == {
        "input_ids": [[5, 6, 7, 1, 8, 9, 1, 4]],
        "labels": [[-100, 6, 7, 1, -100, 9, 1, -100]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2, 0]],
    }
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, use_cache=False, **sizes)).eval()
    with torch.no_grad():
        packed = model(**{name: torch.tensor(row) for name, row in rows.items() if name != "labels"}).logits
        alone = model(input_ids=torch.tensor([[8, 9, 1]])).logits
    torch.testing.assert_close(packed[:, 4:7], alone, atol=1e-5, rtol=1e-4)


def test_a_row_that_begins_inside_a_text_counts_its_positions_from_there(train):
    from tasks.language import pack

    assert pack([[5, 6, 7, 8, 9, 1], [4, 1]], length=4)["position_ids"] == [[0, 1, 2, 3], [0, 1, 0, 1]]
    with pytest.raises(ValueError, match="too few for a row of max_length=9"):
        pack([[5, 6, 7, 1]], length=9)


def test_of_a_conversation_only_what_the_assistant_says_is_learned(train):
    from tasks.chat import conversation
    from tasks.vocabulary import train_tokenizer

    talk = [
        ("system", "Be kind."),
        ("user", "Hello?"),
        ("assistant", "Hi there."),
        ("user", "Bye."),
        ("assistant", "Bye!"),
    ]
    messages = [{"role": role, "content": content} for role, content in talk]
    tokenizer = train_tokenizer([content for _, content in talk] * 5, 300, ends=False)
    row = conversation(tokenizer, messages, 200)
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "Hi there.<end>Bye!<end>"
    assert [id for id, label in zip(row["input_ids"], row["labels"], strict=True) if label not in (-100, id)] == []
    assert tokenizer.decode(row["input_ids"]).startswith("<system> Be kind.<end><user> Hello?<end><assistant> Hi")


def test_the_tokens_of_an_answer_are_those_that_say_it_wherever_the_context_is_cut(train, pretrained):
    from tasks.questions import best_answers

    run = options("question_answering", model=str(pretrained), train_samples=4, test_samples=4, max_length=40)(train)
    from tasks import kit_of

    kit = kit_of(run.task, run.options)
    ready = kit.prepare(run)
    assert len(ready.test) > 4, "contexts are cut"
    starts, ends = (np.full((len(ready.test), 40), -1.0) for _ in range(2))
    for part, row in enumerate(ready.test):
        if row["start_positions"] > 0:
            starts[part, row["start_positions"]] = ends[part, row["end_positions"]] = 5.0
    found = ready.compute_metrics(EvalPrediction(predictions=(starts, ends), label_ids=None))
    whole = sum(row["start_positions"] > 0 for row in ready.test)
    assert whole >= 3
    assert found["exact_match"] >= 0.75
    assert found["f1"] >= found["exact_match"]
    assert (
        best_answers(np.zeros((0, 4)), np.zeros((0, 4)), Dataset.from_dict({"row": [], "first": [], "last": []}), [])
        == []
    )


def test_a_word_of_several_tokens_has_one_label(train, pretrained):
    row = prepared(train, "token_classification", model=str(pretrained), train_samples=1, test_samples=1).train[0]
    assert row["labels"][0] == row["labels"][-1] == -100
    assert sum(label != -100 for label in row["labels"]) <= len(row["labels"]) - 2


# ---- Metrics ----


def computed(metric, predictions, labels):
    return metric(EvalPrediction(predictions=np.array(predictions), label_ids=np.array(labels)))


def test_f1_of_labels_counts_all_labels_together():
    found = computed(metrics.f1_of_labels(), [[1.0, -1.0, 1.0], [-1.0, -1.0, 2.0]], [[1, 0, 0], [0, 1, 1]])
    assert found == {"f1": pytest.approx(2 / 3), "exact_match": 0.0, "accuracy": pytest.approx(4 / 6)}


def test_f1_of_classes_is_the_mean_over_classes_and_ignores_what_does_not_count():
    found = computed(metrics.f1_of_classes(), [[0, 1, 1, 7]], [[0, 0, 1, -100]])
    assert found == {"macro_f1": pytest.approx(2 / 3), "accuracy": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="no tokens"):
        computed(metrics.f1_of_classes(), [[1]], [[-100]])


def test_correlation_knows_perfect_opposite_and_constant():
    for said, expected in (([[1.0], [2.0], [3.0]], 1.0), ([[3.0], [2.0], [1.0]], -1.0), ([[2.0]] * 3, 0.0)):
        assert computed(metrics.correlation(), said, [1.0, 2.0, 3.0])["pearson"] == pytest.approx(expected, abs=1e-6)
    assert computed(metrics.correlation(), [[1.0], [2.0]], [2.0, 4.0])["rmse"] == pytest.approx(2.5**0.5)


def test_answers_are_compared_as_squad_does():
    metric = metrics.match_of_answers(lambda starts, ends: ["The  cat.", "", "red dog"], [["cat"], [""], ["big dog"]])
    found = metric(EvalPrediction(predictions=(None, None), label_ids=None))
    assert found == {"exact_match": pytest.approx(2 / 3), "f1": pytest.approx((1 + 1 + 0.5) / 3)}


def test_texts_are_compared_to_the_letter():
    found = computed(metrics.match_of_texts(lambda rows: ["".join(row) for row in rows]), [["a", "b"]], [["a", "c"]])
    assert found == {"exact_match": 0.0, "similarity": 0.5}


def test_perplexity_comes_from_every_loss():
    found = metrics.with_perplexity({"eval_loss": 0.0, "eval_block_0_loss": 1.0, "eval_runtime": 3.0})
    assert found["eval_perplexity"] == 1.0
    assert found["eval_block_0_perplexity"] == pytest.approx(math.e)
    assert "eval_runperplexity" not in found


# ---- What does not fit ----


def splits(features=None, **columns):
    rows = Dataset.from_dict(columns, features=features)
    return DatasetDict({"train": rows, "test": rows})


CLASSES = ClassLabel(names=["a", "b"])
TEXT = {"text": ["one", "two"]}
MISFITS = [
    ("quickstart", splits(**TEXT, kind=[0, 1]), r"has no \['label'\], only \['text', 'kind'\]"),
    ("quickstart", splits(**TEXT, label=[0.5, 1.0]), "is no class"),
    ("quickstart", splits(**TEXT, label=[[0], [1]]), "is no class"),
    ("quickstart", splits(Features(text=Value("string"), label=CLASSES), **TEXT, label=[0, -1]), "holds -1"),
    ("multi_label", splits(**TEXT, label=[0, 1]), "needs a list of named classes in each row"),
    ("regression", splits(Features(text=Value("string"), label=CLASSES), **TEXT, label=[0, 1]), "needs a number"),
    ("regression", splits(**TEXT, label=["low", "high"]), "needs a number in each row"),
    ("token_classification", splits(tokens=[["a"]], tags=[["b"]]), "needs a list of named classes"),
    (
        "token_classification",
        splits(Features(tokens=List(Value("string")), tags=List(CLASSES)), tokens=[["x", "y"]], tags=[[1]]),
        "2 words and 1 labels",
    ),
    (
        "question_answering",
        splits(question=["q"], context=["a cat"], answers=[{"text": ["dog"], "answer_start": [2]}]),
        "answers that are taken from the context",
    ),
    ("chat", splits(messages=[[{"role": "user", "content": "Hi"}]]), "end with the assistant"),
]


@pytest.mark.parametrize(("name", "rows", "message"), MISFITS, ids=range(len(MISFITS)))
def test_labels_that_do_not_match_the_task_are_refused(name, rows, message, train, data, pretrained):
    data(rows)
    model = {} if name == "chat" else {"model": str(pretrained)}
    with pytest.raises(TargetError, match=message):
        prepared(train, name, dataset="user/data", train_samples=None, test_samples=None, **model)


def test_a_class_that_training_never_sees_is_refused(train, data, pretrained):
    rows = splits(**TEXT, label=["a", "b"])
    data(DatasetDict(train=rows["train"], test=Dataset.from_dict({"text": ["three"], "label": ["c"]})))
    with pytest.raises(TargetError, match=r"has labels that 'train' has not: \['c'\]"):
        prepared(train, "quickstart", dataset="user/data", model=str(pretrained))


def test_sounds_of_another_rate_are_refused(train, data, tmp_path):
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(tmp_path)
    data(splits(audio=[{"array": [0.0, 0.1], "sampling_rate": 8000}], label=["a"]))
    with pytest.raises(TargetError, match="have 8000 samples a second and the model takes 16000"):
        prepared(train, "audio_classification", dataset="user/data", model=str(tmp_path))


def test_a_generation_that_the_model_does_not_support_is_refused_before_training(train, tmp_path):
    small = ["train_samples=8", "test_samples=4", f"training.output_dir={tmp_path}"]
    with pytest.raises(ValueError, match="generation_num_beams=0 must be at least 1"):
        train.main([str(CONFIGS / "seq2seq.yaml"), *small, "training.generation_num_beams=0"])


def test_tasks_options_and_made_data_that_are_not_known_are_named(train):
    from tasks import kit_of
    from tasks.made import make

    with pytest.raises(ValueError, match="'poetry' is not known. Choose one of"):
        kit_of("poetry", {})
    with pytest.raises(ValueError, match=r"no options \['strid'\]. It has \['stride'\]"):
        kit_of("question-answering", {"strid": 3})
    with pytest.raises(ValueError, match="problem: 'ranking' is not known"):
        prepared(train, "multi_label", options={"problem": "ranking"})
    with pytest.raises(ValueError, match="No data set made:poems"):
        make("poems")


@pytest.mark.parametrize("name", SMALL)
def test_a_configuration_is_listed_with_its_command_task_and_metric(name, train):
    from tasks import kit_of

    run = train.read_run(CONFIGS / f"{name}.yaml")
    rows = (ROOT / "configs" / "README.md").read_text().splitlines()
    row = next(row for row in rows if row.startswith(f"| `train/{name}.yaml` |"))
    _, _, command, task, metric, *_ = row.split("|")
    assert command.strip() == f"`python scripts/train.py configs/train/{name}.yaml`"
    assert task.strip().startswith(run.task)
    assert metric.strip().startswith(f"`{kit_of(run.task, run.options).metric}`: ")


def test_the_table_of_the_readme_is_made_from_the_configurations(train):
    readme = script("benchmarks/readme")
    assert readme.between(readme.page_of("tasks").read_text(encoding="utf-8"), "tasks") == readme.sections()["tasks"]
