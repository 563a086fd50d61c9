"""The evaluation of one model on the texts of a run, stage by stage."""

import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from securetune.adversarial.embedding import Norm, mean_embedding_norm
from securetune.config.schema import EvaluationConfig
from securetune.data.encode import Example
from securetune.evaluation.accuracy import score_labels
from securetune.evaluation.batches import Progress
from securetune.evaluation.heldout_loss import score_texts
from securetune.evaluation.membership import blind_baseline
from securetune.evaluation.results import AttackRecord, ModelEvaluation, Params
from securetune.evaluation.robustness import add_noise, attack_characters, attack_embeddings, text_predictor
from securetune.evaluation.statistics import Estimate
from securetune.files import canonical_json
from securetune.models.task import ClassifyHead, GenerateHead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)
_MIN_BLIND = 50  # below, the blind baseline's interval holds one half whatever the split


@dataclass(frozen=True)
class EvaluationTexts:
    """The texts that every model is evaluated on.

    Attributes:
        scored: Held-out examples for accuracy or held-out loss. The attacked texts and the non-members are
            the first of them, so that one pass over the texts serves all three.
        raw: The text of each scored example; None for a generating task.
        members: Examples that were trained on.
        num_non_members: How many of ``scored``, the first ones, stand against the members.
        left_out: Positions among those that do not, since their text was trained on as another user's.
        num_attacked: How many of ``scored`` are attacked.
    """

    scored: list[Example]
    raw: list[str] | None
    members: list[Example]
    num_non_members: int
    num_attacked: int
    left_out: tuple[int, ...] = ()

    @classmethod
    def draw(
        cls,
        held_out: Sequence[Example],
        members: Sequence[Example],
        config: EvaluationConfig,
        *,
        raw: Sequence[str] | None = None,
        shared: Collection[str] = (),
    ) -> Self:
        """Take the first texts of each list, as many as the recipe asks for and as there are.

        Args:
            held_out: Examples kept out of training, in an order that does not depend on their content.
            members: Examples that were trained on, in such an order.
            config: The recipe's numbers.
            raw: The text of each held-out example, for the character attack; None for a generating task.
            shared: Ids of held-out examples whose text was trained on as another user's.

        Returns:
            The texts.

        Raises:
            ValueError: If ``raw`` does not fit ``held_out``.
        """
        if raw is not None and len(raw) != len(held_out):
            raise ValueError(
                f"raw must hold one text per held-out example ({len(held_out)}), got {len(raw)}."
            )
        half = config.num_membership // 2
        num_scored = max(config.num_texts, half, config.num_attacked)
        return cls(
            scored=list(held_out[:num_scored]),
            raw=None if raw is None else list(raw[:num_scored]),
            members=list(members[:half]),
            num_non_members=min(half, len(held_out)),
            left_out=tuple(row for row, example in enumerate(held_out[:half]) if example.unit_id in shared),
            num_attacked=min(config.num_attacked, len(held_out)),
        )

    @property
    def non_members(self) -> list[Example]:
        """What stands against the members."""
        stands = enumerate(self.scored[: self.num_non_members])
        return [example for row, example in stands if row not in self.left_out]

    def check_split(self, *, seed: int) -> Estimate | None:
        """Run the blind baseline on members and non-members; None where there are too few for it.

        Args:
            seed: Seed of its folds.

        Returns:
            The area under its ROC curve. Membership numbers are invalid where the interval lies above one
            half.
        """
        non_members = self.non_members
        if min(len(self.members), len(non_members)) < _MIN_BLIND:
            return None
        return blind_baseline(self.members, non_members, seed=seed)


def evaluate_model(
    head: ClassifyHead | GenerateHead,
    tokenizer: "PreTrainedTokenizerBase",
    texts: EvaluationTexts,
    config: EvaluationConfig,
    *,
    subject: str,
    artefact: str,
    prompt: str = "{text}\nLabel:",
    max_length: int = 128,
    norm: Norm = "l2_token",
    previous: ModelEvaluation | None = None,
    save: Callable[[ModelEvaluation], None] | None = None,
    progress: Progress | None = None,
) -> ModelEvaluation:
    """Measure one model on the texts, stage by stage.

    A classifier: accuracy, membership losses, the embedding attack with its noise control, the character
    attack. A generating model: held-out loss and membership losses.

    Guarantees:
        A stage that ``previous`` holds is not run again, unless the model, the texts or the settings
        differ: then all stages run. Texts, seeds and budgets are the same for every model. The model is
        left as it was.

    Args:
        head: The model under test.
        tokenizer: Its tokenizer.
        texts: The texts.
        config: Budgets and seed of the attacks.
        subject: What the model is called in the evidence.
        artefact: SHA-256 hex digest of the model.
        prompt: The prompt of a classification task.
        max_length: The recipe's token limit.
        norm: The ball of the embedding attack.
        previous: Results of an interrupted evaluation.
        save: Called with all results so far after each stage.
        progress: See ``Progress``.

    Returns:
        The results of all stages.
    """
    fingerprint = _fingerprint(texts, config, [prompt, max_length, norm, type(head).__name__])
    result = ModelEvaluation(
        subject=subject,
        artefact=artefact,
        fingerprint=fingerprint,
        num_non_members=texts.num_non_members,
        left_out=list(texts.left_out),
    )
    if previous is not None:
        if (previous.artefact, previous.fingerprint) == (artefact, fingerprint):
            result = dataclasses.replace(previous, subject=subject)
        else:
            _logger.warning("The model, texts or settings of %s changed: it is evaluated anew.", subject)
    if isinstance(head, ClassifyHead):
        stages = _ClassifierStages(head, tokenizer, texts, config, prompt, max_length, norm, progress).by_name
    else:
        stages = _GeneratorStages(head, texts, config, progress).by_name
    for stage, measure in stages.items():
        if stage not in result.seconds:
            start = time.perf_counter()
            result = measure(result)
            seconds = {**result.seconds, stage: time.perf_counter() - start}
            result = dataclasses.replace(result, seconds=seconds)
            if save is not None:
                save(result)
    return result


@dataclass(frozen=True)
class _ClassifierStages:
    """The stages of a classifier; each adds its results to those before."""

    head: ClassifyHead
    tokenizer: "PreTrainedTokenizerBase"
    texts: EvaluationTexts
    config: EvaluationConfig
    prompt: str
    max_length: int
    norm: Norm
    progress: Progress | None

    @property
    def by_name(self) -> dict[str, Callable[[ModelEvaluation], ModelEvaluation]]:
        return {
            "accuracy": self.accuracy,
            "membership": self.membership,
            "embedding attack": self.embedding,
            "character attack": self.characters,
        }

    def accuracy(self, result: ModelEvaluation) -> ModelEvaluation:
        scores = score_labels(
            self.head, self.texts.scored, batch_tokens=self.config.batch_tokens, progress=self.progress
        )
        return dataclasses.replace(
            result, is_correct=scores.is_correct, losses=_finite_or_none(scores.losses)
        )

    def membership(self, result: ModelEvaluation) -> ModelEvaluation:
        scores = score_labels(
            self.head,
            self.texts.members,
            batch_tokens=self.config.batch_tokens,
            stage="membership",
            progress=self.progress,
        )
        return dataclasses.replace(result, member_losses=_finite_or_none(scores.losses))

    def embedding(self, result: ModelEvaluation) -> ModelEvaluation:
        config, radii = self.config, sorted(self.config.pgd_radii)
        unit = mean_embedding_norm(self.head.causal)
        attacked = self.texts.scored[: self.texts.num_attacked]
        is_correct = self._is_correct(result)
        outcomes = attack_embeddings(
            self.head,
            attacked,
            is_correct=is_correct,
            radii=[unit * radius for radius in radii],
            norm=self.norm,
            steps=config.pgd_steps,
            step_size=None if config.pgd_step_size is None else unit * config.pgd_step_size,
            seed=config.seed,
            batch_tokens=config.batch_tokens,
            progress=self.progress,
        )
        noise = add_noise(
            self.head,
            attacked,
            is_correct=is_correct,
            radius=unit * radii[-1],
            norm=self.norm,
            seed=config.seed,
            batch_tokens=config.batch_tokens,
        )
        common: Params = {"steps": config.pgd_steps, "norm": self.norm}
        records = [
            AttackRecord.of(outcome, params={"radius": radius, **common}, seed=config.seed)
            for radius, outcome in zip(radii, outcomes, strict=True)
        ]
        control = AttackRecord.of(noise, params={"radius": radii[-1], "norm": self.norm}, seed=config.seed)
        return dataclasses.replace(result, embedding=records, noise=control)

    def characters(self, result: ModelEvaluation) -> ModelEvaluation:
        config, attacked = self.config, self.texts.scored[: self.texts.num_attacked]
        if self.texts.raw is None:
            return result
        predict = text_predictor(
            self.head,
            self.tokenizer,
            prompt=self.prompt,
            max_length=self.max_length,
            batch_tokens=config.batch_tokens,
        )
        outcome = attack_characters(
            predict,
            self.texts.raw[: self.texts.num_attacked],
            [example.label or 0 for example in attacked],
            is_correct=self._is_correct(result),
            max_edits=config.character_edits,
            max_queries=config.character_queries,
            seed=config.seed,
            progress=self.progress,
        )
        params: Params = {"queries": config.character_queries, "edits": config.character_edits}
        record = AttackRecord.of(outcome, params=params, seed=config.seed)
        return dataclasses.replace(result, characters=record)

    def _is_correct(self, result: ModelEvaluation) -> list[bool]:
        assert result.is_correct is not None, "the accuracy stage runs first"
        return result.is_correct[: self.texts.num_attacked]


@dataclass(frozen=True)
class _GeneratorStages:
    """The stages of a generating model."""

    head: GenerateHead
    texts: EvaluationTexts
    config: EvaluationConfig
    progress: Progress | None

    @property
    def by_name(self) -> dict[str, Callable[[ModelEvaluation], ModelEvaluation]]:
        return {"held-out loss": self.heldout_loss, "membership": self.membership}

    def heldout_loss(self, result: ModelEvaluation) -> ModelEvaluation:
        scores = score_texts(
            self.head, self.texts.scored, batch_tokens=self.config.batch_tokens, progress=self.progress
        )
        losses, num_tokens = _finite_or_none(scores.losses), scores.num_tokens.tolist()
        return dataclasses.replace(result, losses=losses, num_tokens=num_tokens)

    def membership(self, result: ModelEvaluation) -> ModelEvaluation:
        scores = score_texts(
            self.head,
            self.texts.members,
            batch_tokens=self.config.batch_tokens,
            stage="membership",
            progress=self.progress,
        )
        return dataclasses.replace(result, member_losses=_finite_or_none(scores.losses))


def _fingerprint(texts: EvaluationTexts, config: EvaluationConfig, settings: list[str | int]) -> str:
    identity = {
        "scored": [example.unit_id for example in texts.scored],
        "members": [example.unit_id for example in texts.members],
        "num_non_members": texts.num_non_members,
        "num_attacked": texts.num_attacked,
        "left_out": list(texts.left_out),
        "has_raw": texts.raw is not None,
        "config": config.model_dump(mode="json"),
        "settings": settings,
    }
    return hashlib.sha256(canonical_json(identity)).hexdigest()


def _finite_or_none(values: NDArray[np.float64]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
