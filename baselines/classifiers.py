"""Controls: ordinary classifiers in place of a router, trained on the prompts of the pool's tasks. Shapes: B rows, E experts, D features.

* ``knn``: an expert's weight is its share of the ``top_k`` training prompts that are nearest by cosine.
* ``logreg``: multinomial logistic regression (scikit-learn) on the same features; only the most likely expert.
* ``tfidf_linear``: TF-IDF of words and pairs of words, and a linear support vector machine, one class against the rest (scikit-learn);
  only the expert with the largest margin.

No paper. A learned router has to beat these controls. They learn from the same training prompts, with the task as label. The result is
stored as tensors, so a saved classifier needs no prompts and no training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlplora.errors import ConfigError, MethodError
from dlplora.methods.base import Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.scope import scores_of
from dlplora.types import PromptBatch

from ._encoders import LearnsFromEncodings, LearnsFromPrompts
from ._gates import kept_of

SKLEARN = {"sklearn": "pip install 'dlplora[controls]'"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierConfig:
    """What every control reads."""

    num_samples: int = 200
    """Training prompts per task."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError(f"'num_samples' must be at least 1, got {self.num_samples}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class NearestConfig(ClassifierConfig):
    """Neighbours of an encoded prompt."""

    encoder: str = "minilm"
    """``minilm``, ``features``, ``router``, or a sentence-transformers model (``_encoders.py``)."""
    top_k: int = 1
    """Neighbours that vote."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        if self.top_k < 1:
            raise ConfigError(f"'top_k' must be at least 1, got {self.top_k}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRegConfig(ClassifierConfig):
    """Logistic regression on encoded prompts."""

    encoder: str = "minilm"
    """As for ``knn``."""
    c: float = 1.0
    """Inverse of the penalty's strength; scikit-learn's default."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        _require_positive(self.c)


@dataclass(frozen=True, kw_only=True, slots=True)
class TfidfConfig(ClassifierConfig):
    """A linear classifier on words."""

    ngrams: int = 2
    """Longest run of words that is a feature."""
    c: float = 1.0
    """Inverse of the penalty's strength; scikit-learn's default."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        _require_positive(self.c)
        if self.ngrams < 1:
            raise ConfigError(f"'ngrams' must be at least 1, got {self.ngrams}.")


def _require_positive(c: float) -> None:
    if not c > 0:
        raise ConfigError(f"'c' must be positive, got {c}.")


class NearestPrompts(LearnsFromEncodings):
    """The nearest training prompts vote."""

    name = "knn"
    metadata = Metadata(title="k nearest prompts", granularity="prompt", needs=("inputs", "labels"))
    Config = NearestConfig
    learned = ("points", "owners")
    points: Tensor
    owners: Tensor

    @classmethod
    def upgrade_params(cls, params: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
        """Read ``k``, an earlier name of ``top_k``."""
        return {"top_k" if key == "k" else key: value for key, value in params.items()}

    @classmethod
    def hashed_params(cls, config: Any) -> dict[str, Any]:
        """Under the earlier name, so that old records still match."""
        return {"k" if name == "top_k" else name: value for name, value in super().hashed_params(config).items()}

    @property
    def max_kept(self) -> int:
        """No more experts than neighbours."""
        return int(self.config.top_k)

    def learn(self, prompts: Mapping[str, list[str]], context: MethodContext) -> dict[str, Tensor]:
        """Every training prompt (n, D), and the index of its expert (n,)."""
        points = [self._encoder.texts(texts) for texts in prompts.values()]
        owners = torch.cat([torch.full((len(rows),), index) for index, rows in enumerate(points)])
        return {"points": torch.cat(points), "owners": owners}

    def similarities(self, prompts: PromptBatch) -> Tensor:
        """Cosines of prompts and training prompts (B, n)."""
        encoded = self.encoded(prompts)
        return encoded @ self.points.mT

    def scope_scores(self, prompts: PromptBatch) -> dict[str, Tensor]:
        """``similarity`` to the nearest training prompt."""
        return {"similarity": self.similarities(prompts).amax(dim=-1)}

    def route(self, prompts: PromptBatch) -> Tensor:
        """Shares of the votes (B, E)."""
        similarities = self.similarities(prompts)
        voters = kept_of(self.config.top_k, len(self.points), self.name, "top_k")
        nearest = similarities.topk(voters, dim=-1).indices
        votes = F.one_hot(self.owners[nearest], len(self.expert_names)).sum(dim=1)
        return (votes.float() / voters).to(prompts.input_ids.device)


class _Linear(LearnsFromPrompts):
    """One hyperplane per expert, found by scikit-learn; the expert with the largest value alone."""

    weight: Tensor
    bias: Tensor
    max_kept = 1

    def values(self, prompts: PromptBatch) -> Tensor:
        """What the hyperplanes give for prompts (B, E)."""
        raise NotImplementedError

    def route(self, prompts: PromptBatch) -> Tensor:
        """One-hot rows (B, E)."""
        return self._one_hot(self.values(prompts), prompts)

    def _one_hot(self, values: Tensor, prompts: PromptBatch) -> Tensor:
        return F.one_hot(values.argmax(dim=-1), len(self.expert_names)).float().to(prompts.input_ids.device)

    def _hyperplanes(self, classifier: Any, features: Any, names: list[str]) -> dict[str, Tensor]:
        """``weight`` (E, D) and ``bias`` (E,) in the order of ``prepare``'s bank, not of the classifier."""
        experts = list(dict.fromkeys(names))
        if len(experts) == 1:  # nothing to separate
            return {"weight": torch.zeros(1, features.shape[1]), "bias": torch.zeros(1)}
        # Rows sorted by name: another order of the adapters finds the same hyperplanes.
        order = sorted(range(len(names)), key=lambda row: names[row])
        classifier.fit(features[order], [names[row] for row in order])
        weight, bias = torch.from_numpy(classifier.coef_).float(), torch.from_numpy(classifier.intercept_).float()
        if len(experts) == 2:  # scikit-learn has one hyperplane for two classes
            weight, bias = torch.cat([-weight, weight]), torch.cat([-bias, bias])
        columns = [list(classifier.classes_).index(name) for name in experts]
        return {"weight": weight[columns], "bias": bias[columns]}


class LogisticRegressionRouter(LearnsFromEncodings, _Linear):
    """Logistic regression on encoded prompts."""

    name = "logreg"
    metadata = Metadata(title="Logistic regression", granularity="prompt", needs=("inputs", "labels"))
    Config = LogRegConfig
    learned = ("weight", "bias")

    @property
    def optional_packages(self) -> Mapping[str, str]:
        """scikit-learn, and what the encoder needs."""
        return {**SKLEARN, **super().optional_packages}

    def learn(self, prompts: Mapping[str, list[str]], context: MethodContext) -> dict[str, Tensor]:
        """The hyperplanes."""
        from sklearn.linear_model import LogisticRegression

        features = self._encoder.texts([text for texts in prompts.values() for text in texts]).double().cpu().numpy()
        names = [name for name, texts in prompts.items() for _ in texts]
        return self._hyperplanes(LogisticRegression(C=self.config.c, max_iter=1000), features, names)

    def values(self, prompts: PromptBatch) -> Tensor:
        """Logits (B, E)."""
        return self.encoded(prompts) @ self.weight.mT + self.bias

    def scope_scores(self, prompts: PromptBatch) -> dict[str, Tensor]:
        """``max_probability`` and ``energy``, as of a router."""
        logits = self.values(prompts)
        return scores_of(logits.softmax(dim=-1), logits)


class TfidfLinear(_Linear):
    """TF-IDF and a linear support vector machine."""

    name = "tfidf_linear"
    metadata = Metadata(title="TF-IDF, linear SVM", granularity="prompt", needs=("inputs", "labels"))
    Config = TfidfConfig
    stand_in_params = {"num_samples": 20}
    learned = ("weight", "bias", "idf", "terms")
    idf: Tensor
    terms: Tensor
    """The terms in the order of the columns, one per line, as bytes."""

    @property
    def optional_packages(self) -> Mapping[str, str]:
        """scikit-learn."""
        return SKLEARN

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """The vectoriser is made from the terms when it is first needed."""
        self._vectorizer: Any = None
        return super().prepare(bank, context)

    def _new_vectorizer(self, vocabulary: list[str] | None) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        options = {"ngram_range": (1, self.config.ngrams), "sublinear_tf": True, "token_pattern": r"(?u)\b\w+\b"}
        return TfidfVectorizer(vocabulary=vocabulary, **options)

    def learn(self, prompts: Mapping[str, list[str]], context: MethodContext) -> dict[str, Tensor]:
        """Terms, their weights, and the hyperplanes."""
        from sklearn.svm import LinearSVC

        vectorizer = self._new_vectorizer(None)
        try:
            features = vectorizer.fit_transform([text for texts in prompts.values() for text in texts])
        except ValueError as error:  # prompts of nothing but punctuation
            raise MethodError(f"method '{self.name}' finds no word in the training prompts: {error}.") from error
        names = [name for name, texts in prompts.items() for _ in texts]
        terms = torch.tensor(list("\n".join(vectorizer.get_feature_names_out()).encode()), dtype=torch.uint8)
        found = self._hyperplanes(LinearSVC(C=self.config.c, random_state=0), features, names)
        return {**found, "idf": torch.from_numpy(vectorizer.idf_).float(), "terms": terms}

    def scope_scores(self, prompts: PromptBatch) -> dict[str, Tensor]:
        """``margin``: the largest value; below zero every hyperplane says no."""
        return {"margin": self.values(prompts).amax(dim=-1)}

    def values(self, prompts: PromptBatch) -> Tensor:
        """Margins (B, E), float64."""
        self.require_learned()
        if self._vectorizer is None:
            vectorizer = self._new_vectorizer(bytes(self.terms.tolist()).decode().split("\n"))
            vectorizer.idf_ = self.idf.double().cpu().numpy()
            self._vectorizer = vectorizer
        features = self._vectorizer.transform(list(prompts.texts))
        return torch.from_numpy(features @ self.weight.double().mT.cpu().numpy()) + self.bias.double().cpu()
