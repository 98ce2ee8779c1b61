"""Data that are drawn by rule, or come with scikit-learn: dates in words, pictures of digits, sounds of waves."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from datetime import date, timedelta
from hashlib import sha256
from typing import Any


FORMATS = ("%d %B %Y", "%B %d, %Y", "%a %d %b %Y", "%d/%m/%Y", "the %d of %B, %Y", "%A, %B %d %Y")
FIRST, DAYS = date(1950, 1, 1), 30_000
RATE, SECONDS = 2000, 0.2
SHAPES = {
    "sine": lambda turns: math.sin(2 * math.pi * turns),
    "square": lambda turns: 1.0 if turns % 1 < 0.5 else -1.0,
    "sawtooth": lambda turns: 2 * (turns % 1) - 1,
    "pulse": lambda turns: 1.0 if turns % 1 < 0.1 else -0.1,
}


def _is_test(key: bytes) -> bool:
    """Put one in five into the test split, by its hash."""
    return sha256(key).digest()[0] % 5 == 0


def dates() -> Iterator[tuple[bool, dict[str, Any]]]:
    """Dates as people write them, to be written as 2021-03-04; a day belongs to one split in all its forms."""
    draw = random.Random(0)
    for number in draw.sample(range(DAYS), DAYS // 3):
        day = FIRST + timedelta(days=number)
        written = day.strftime(draw.choice(FORMATS))
        yield _is_test(day.isoformat().encode()), {"text": written, "target": day.isoformat()}


def digits() -> Iterator[tuple[bool, dict[str, Any]]]:
    """Handwritten digits, 8 by 8, that come with scikit-learn."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    for image, label in zip(bundle.images, bundle.target, strict=True):
        grey = (image * (255 / 16)).astype("uint8")
        yield _is_test(grey.tobytes()), {"image": grey.tolist(), "label": str(label)}


def waves(count: int = 1500) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Tones of random pitch, length, loudness and noise, to be told apart by the shape of their wave."""
    draw = random.Random(0)
    for number in range(count):
        name = list(SHAPES)[number % len(SHAPES)]
        pitch, start, loudness = draw.uniform(40, 160), draw.random(), draw.uniform(0.2, 1.0)
        samples = int(RATE * SECONDS * draw.uniform(0.6, 1.0))
        sound = [
            loudness * SHAPES[name](start + pitch * place / RATE) + draw.gauss(0, 0.05) for place in range(samples)
        ]
        yield number % 5 == 4, {"audio": {"array": sound, "sampling_rate": RATE}, "label": name}
