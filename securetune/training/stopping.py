"""Early stopping: a score every few steps, the weights of the best check, and the decision to end.

What is released then depends on every score, so under privacy a score may only be computed from public
records (the model itself is already protected) or be noised and paid for. The second is the share of
held-out records that are labelled right, noised as in :mod:`securetune.privacy.release`. A record is
trained on or held out, never both: given the held-out records, a training record reaches the scores through
the protected weights alone; given the training records, a held-out record reaches the weights through the
noised scores alone. So the two budgets compose in parallel although the two mechanisms take turns.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from securetune.config.schema import EarlyStoppingConfig, Recipe
from securetune.data.encode import Example
from securetune.evaluation.accuracy import score_labels
from securetune.evaluation.heldout_loss import score_texts
from securetune.models.task import ClassifyHead
from securetune.privacy.release import release_counts
from securetune.training.loop import Head


class EarlyStopping:
    """Decides when training ends, and keeps the weights of the best check.

    Args:
        settings: The recipe's ``training.early_stopping`` section.
        params: 1-D views of the trained parameters that this process updates, which training changes in
            place.
        score: Scores the model as it is; higher is better. A score that is not finite is never the best.
        steps: Planned steps.
    """

    def __init__(
        self,
        settings: EarlyStoppingConfig,
        params: Sequence[Tensor],
        score: Callable[[], float],
        *,
        steps: int,
    ) -> None:
        self._settings = settings
        self._params = params
        self._score = score
        self._steps = steps
        self._checks_without_gain = 0
        self._best_score: float | None = None
        self.best_step: int | None = None
        self.best_params: list[Tensor] | None = None

    @property
    def has_stopped(self) -> bool:
        """Whether training has ended early."""
        return self._checks_without_gain >= self._settings.patience

    def check(self, step: int) -> float | None:
        """Score the model if a check is due after this step, and keep its weights if it is the best so far.

        Args:
            step: The step that was done, from 1.

        Returns:
            The score, or None if no check is due.
        """
        if step % self._settings.every and step != self._steps:
            return None
        score = self._score()
        best = -math.inf if self._best_score is None else self._best_score + self._settings.min_delta
        if math.isfinite(score) and score > best:
            self._best_score, self.best_step = score, step
            self.best_params = [part.detach().clone() for part in self._params]
            self._checks_without_gain = 0
        else:
            self._checks_without_gain += 1
        return score

    def restore_best(self) -> None:
        """Put the weights of the best check back; without a check with a finite score, keep the last."""
        if self.best_params is not None:
            with torch.no_grad():
                for part, best in zip(self._params, self.best_params, strict=True):
                    part.copy_(best)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs besides :attr:`best_params`, as JSON can hold it."""
        return {
            "best_score": self._best_score,
            "best_step": self.best_step,
            "checks_without_gain": self._checks_without_gain,
        }

    def load(self, state: dict[str, Any], best_params: list[Tensor] | None) -> None:
        """Go on where a saved training stood.

        Args:
            state: From :meth:`state`.
            best_params: This process' part of the weights of the best check; None if there is none.
        """
        score, step = state["best_score"], state["best_step"]
        self._best_score = None if score is None else float(score)
        self.best_step = None if step is None else int(step)
        self._checks_without_gain = int(state["checks_without_gain"])
        self.best_params = best_params


def num_checks(recipe: Recipe) -> int:
    """Count the checks of a run that is not stopped: one every few steps, and one after the last step.

    Args:
        recipe: The recipe.

    Returns:
        The number, which follows from the recipe alone.
    """
    return math.ceil(recipe.privacy.steps / recipe.training.early_stopping.every)


def make_score(recipe: Recipe, head: Head, examples: Sequence[Example]) -> Callable[[], float]:
    """Make the score of the recipe's early stopping, computed without dropout, attack and label smoothing.

    Guarantees:
        The score of ``noisy_test`` is differentially private for one held-out record, with an equal part of
        ``training.early_stopping.epsilon`` for each of ``num_checks``; all of it must be in the ledger before
        the first call. The divisor is the recipe's ``num_texts``, whatever the number of examples.

    Args:
        recipe: The recipe.
        head: The model that is trained.
        examples: Public records for ``public_validation``, else held-out ones, at most ``num_texts``.

    Returns:
        A function that scores the model as it then is: minus the mean loss in nats, or the noised share of
        right answers.
    """
    settings, batch_tokens = recipe.training.early_stopping, recipe.evaluation.batch_tokens
    if settings.method == "noisy_test":
        assert isinstance(head, ClassifyHead), "the recipe's rules allow noisy_test to classify only"
        assert settings.epsilon is not None, "the recipe's rules require it"
        epsilon = settings.epsilon / num_checks(recipe)

        def noisy_share() -> float:
            right = sum(score_labels(head, examples, batch_tokens=batch_tokens).is_correct)
            released = release_counts({"accuracy": right}, {"accuracy": settings.num_texts}, epsilon)
            return released["accuracy"].value

        return noisy_share

    def minus_mean_loss() -> float:
        if isinstance(head, ClassifyHead):
            return -float(score_labels(head, examples, batch_tokens=batch_tokens).losses.mean())
        return -float(score_texts(head, examples, batch_tokens=batch_tokens).losses.mean())

    return minus_mean_loss
