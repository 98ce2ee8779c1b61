"""Task (a): MiniLM learns which chapter of the Library Reference a docstring belongs to."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch

from learning_tasks.base import ACCURACY, START, Data, Metric, Row, Task, accuracy, split_by_share


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from docstring_corpus import CHAPTERS, build_corpus, text_hash  # noqa: E402
from prepare_quickstart import WEIGHTS, check_weights, find_model  # noqa: E402


@dataclass(frozen=True)
class TextClassification(Task):
    """Docstrings of the standard library, eight classes; all-MiniLM-L6-v2 with a new classifier.

    Forgetting is measured where the model has learned its trade: on the geometry of its sentence embeddings. Each of
    200 pairs of sentences from the Language Reference (half of them neighbours, half drawn at random) has a cosine
    between its mean-pooled embeddings; the score is Spearman's correlation of the cosines with those of the
    pretrained model.
    """

    name: ClassVar[str] = "text"
    title: ClassVar[str] = "MiniLM, docstrings to chapters"
    metric: ClassVar[Metric] = ACCURACY
    forgetting: ClassVar[Metric | None] = Metric("embedding geometry kept (Spearman)", higher_is_better=True)
    head_modules: ClassVar[tuple[str, ...]] = ("classifier", "pooler")
    references: ClassVar[tuple[str, ...]] = ("TF-IDF + logistic regression", "frozen features + logistic regression")
    seconds: ClassVar[float] = 30

    blocks: tuple[int, ...] = (2, 3, 6)
    rates: tuple[float, ...] = (1.2e-4, 3e-4, 7e-4)
    budget: dict[str, Any] = field(
        default_factory=lambda: {"num_train_epochs": 3, "per_device_train_batch_size": 16, "warmup_steps": 0.1}
    )
    train_share: float = 0.35
    validation_share: float = 0.15
    train_texts: int = 768
    validation_texts: int = 500
    test_texts: int = 1500
    max_tokens: int = 16

    @property
    def num_layers(self) -> int:
        """Layers of MiniLM."""
        return 6

    def build(self, folder: Path) -> Data:
        """Tokenize the docstrings, and the sentence pairs that measure forgetting."""
        from transformers import AutoTokenizer

        check_weights(find_model() / WEIGHTS)
        tokenizer = AutoTokenizer.from_pretrained(find_model())
        examples = build_corpus(Path(sysconfig.get_path("stdlib")))
        splits = split_by_share(
            examples, lambda e: text_hash(e.text), train=self.train_share, validation=self.validation_share
        )
        classes = list(CHAPTERS)

        def tokens(text: str) -> Row:
            return dict(tokenizer(text, truncation=True, max_length=self.max_tokens, return_token_type_ids=False))

        limits = (self.train_texts, self.validation_texts, self.test_texts)
        parts = [
            [{**tokens(e.text), "labels": classes.index(e.chapter)} for e in part[:limit]]
            for part, limit in zip(splits, limits, strict=True)
        ]
        texts = [[e.text for e in part[:limit]] for part, limit in zip(splits, limits, strict=True)]
        torch.save(texts, folder / "texts.pt")
        pairs = [tokens(sentence) for pair in sentence_pairs() for sentence in pair]
        save_trimmed_(find_model(), folder / START, [*chain.from_iterable(parts), *pairs])
        torch.save(self._cosines(_encoder(folder), pairs), folder / "cosines.pt")
        return Data(*parts, before=pairs)

    def model(self, folder: Path, seed: int) -> Any:
        """Load the pretrained weights under a new classifier."""
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(folder / START, num_labels=len(CHAPTERS))

    def score(self, model: Any, rows: Sequence[Row]) -> float:
        """Return the accuracy."""
        return accuracy(self.logits(model, rows))

    def remembered(self, model: Any, folder: Path, data: Data) -> float:
        """Correlate the cosines of sentence pairs with those of the pretrained model."""
        from scipy.stats import spearmanr

        before = torch.load(folder / "cosines.pt", weights_only=True)
        return float(spearmanr(before, self._cosines(model.base_model, data.before)).statistic)

    def reference(self, name: str, folder: Path, data: Data) -> dict[str, float]:
        """Fit a logistic regression; its C is chosen on validation."""
        if name not in self.references:
            return super().reference(name, folder, data)
        if name.startswith("TF-IDF"):
            from sklearn.feature_extraction.text import TfidfVectorizer

            texts = torch.load(folder / "texts.pt", weights_only=True)
            # What the network is shown: the same opening words.
            vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)).fit(texts[0])
            features = [vectorizer.transform(part) for part in texts]
        else:
            encoder = _encoder(folder)
            features = [self._embeddings(encoder, part).numpy() for part in (data.train, data.validation, data.test)]
        labels = [[row["labels"] for row in part] for part in (data.train, data.validation, data.test)]
        return best_logistic_regression(features, labels)

    def _embeddings(self, encoder: Any, rows: Sequence[Row], batch: int = 64) -> torch.Tensor:
        """Return mean-pooled embeddings of unit length, (N, D)."""
        pooled = []
        encoder.eval()
        with torch.inference_mode():
            for start in range(0, len(rows), batch):
                inputs = {k: v.to(encoder.device) for k, v in self.collate(rows[start : start + batch]).items()}
                inputs.pop("labels", None)
                hidden_BSD = encoder(**inputs).last_hidden_state.float()
                mask_BS1 = inputs["attention_mask"].unsqueeze(-1)
                pooled.append(((hidden_BSD * mask_BS1).sum(1) / mask_BS1.sum(1)).cpu())
        return torch.nn.functional.normalize(torch.cat(pooled), dim=-1)

    def _cosines(self, encoder: Any, pairs: Sequence[Row]) -> torch.Tensor:
        embeddings = self._embeddings(encoder, pairs)
        return (embeddings[0::2] * embeddings[1::2]).sum(-1)


def best_logistic_regression(features: Sequence[Any], labels: Sequence[list[int]]) -> dict[str, float]:
    """Fit on the first part for several C, choose on the second, and return both scores."""
    from sklearn.linear_model import LogisticRegression

    fitted = [LogisticRegression(C=c, max_iter=2000).fit(features[0], labels[0]) for c in (0.3, 1, 3, 10, 30, 100)]
    best = max(fitted, key=lambda model: model.score(features[1], labels[1]))
    return {"validation": best.score(features[1], labels[1]), "test": best.score(features[2], labels[2])}


def sentence_pairs(count: int = 200) -> list[tuple[str, str]]:
    """Return pairs of sentences of the Language Reference: neighbours, and as many drawn at random."""
    from learning_tasks.corpora import topic_paragraphs

    sentences = [
        f"{sentence.strip()}."
        for paragraph in topic_paragraphs()
        for sentence in " ".join(paragraph.split()).split(". ")
        if 8 <= len(sentence.split()) <= 30
    ]
    order = torch.randperm(len(sentences) - 1, generator=torch.Generator().manual_seed(0)).tolist()
    near = [(sentences[i], sentences[i + 1]) for i in order[: count // 2]]
    far = [(sentences[i], sentences[j]) for i, j in zip(order[: count // 2], order[-count // 2 :], strict=True)]
    return near + far


def save_trimmed_(source: Path, target: Path, rows: Sequence[Row]) -> None:
    """Save a model without the embeddings of tokens that no sample holds, and renumber the samples' tokens in place.

    Such an embedding never gets a gradient, so nothing changes but the time that an optimizer spends on it.
    """
    from transformers import AutoModel

    model = AutoModel.from_pretrained(source)
    used = sorted({model.config.pad_token_id}.union(*(row["input_ids"] for row in rows)))
    assert used[0] == model.config.pad_token_id == 0, "the padding keeps its number"
    kept = model.get_input_embeddings().weight.detach()[used].clone()
    model.resize_token_embeddings(len(used), mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(kept)
    model.save_pretrained(target)
    number = {token: place for place, token in enumerate(used)}
    for row in rows:
        row["input_ids"] = [number[token] for token in row["input_ids"]]


def _encoder(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder / START)
