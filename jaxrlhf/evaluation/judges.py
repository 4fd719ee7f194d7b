"""Judges of sentiment that no part of the loop is trained on: two lexicons and a ridge on bags of words.

Each judge is a function `texts -> [n] float64`, higher for the more positive text. A lexicon is loaded once a process.
None of them reads grammar, and VADER adds up word scores, so stuffing a text with praise saturates it: read them
together with each other and with distinct-2, never one alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

Judge = Callable[[Sequence[str]], np.ndarray]


def _absent(package: str) -> ImportError:
    return ImportError(f"this judge needs the package {package}: pip install 'jaxrlhf[loop]'")


@functools.cache
def _vader_analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise _absent("vaderSentiment") from error
    return SentimentIntensityAnalyzer()


def vader(texts: Sequence[str]) -> Float[np.ndarray, " n"]:
    """VADER's compound score of each text, in [-1, 1]; 0 where it knows no word.

    Source: Hutto and Gilbert, "VADER", ICWSM 2014.

    Raises:
        ImportError: the extra `loop` is not installed.
    """
    scores = _vader_analyzer().polarity_scores
    return np.array([scores(text)["compound"] for text in texts], np.float64)


def textblob(texts: Sequence[str]) -> Float[np.ndarray, " n"]:
    """TextBlob's polarity of each text (mean over the words of the pattern.en lexicon), in [-1, 1]; 0 without known words.

    Raises:
        ImportError: the extra `loop` is not installed.
    """
    try:
        from textblob.en import sentiment  # what TextBlob(text).sentiment calls, without building the blob
    except ImportError as error:
        raise _absent("textblob") from error
    return np.array([sentiment(text)[0] for text in texts], np.float64)


@dataclasses.dataclass(frozen=True)
class Ridge:
    """A fitted ridge regression on TF-IDF of words and word pairs."""

    vectorizer: Any
    regression: Any

    def predict(self, texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Predicted mean rating of each text, in the unit of the ratings it was fitted on."""
        if not len(texts):
            return np.zeros(0)
        return np.asarray(self.regression.predict(self.vectorizer.transform(texts)), np.float64)


def fit_ridge(texts: Sequence[str], means: Sequence[float] | np.ndarray, alpha: float = 1.0) -> Ridge:
    """Fit mean ratings on lower-cased TF-IDF 1-2-grams seen in two texts or more.

    Fitted on a reward model's own texts it is that model's baseline; fitted on held-out texts, a judge of its own.

    Raises:
        ImportError: the extra `loop` is not installed.
        ValueError: no text, or not one rating a text.
    """
    if not len(texts) or len(texts) != len(means):
        raise ValueError(
            f"{len(texts)} texts and {len(means)} mean ratings: the ridge needs one rating a text, and at least one text"
        )
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import Ridge as Regression
    except ImportError as error:
        raise _absent("scikit-learn") from error
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=min(2, len(texts)), sublinear_tf=True, dtype=np.float64)
    features = vectorizer.fit_transform(texts)
    return Ridge(vectorizer, Regression(alpha=alpha).fit(features, np.asarray(means, np.float64)))
