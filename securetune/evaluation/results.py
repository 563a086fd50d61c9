"""What an evaluation measured, text by text: kept in the run folder so that a killed run can go on."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

from securetune.evaluation.robustness import AttackOutcome

Params = dict[str, float | int | str]


@dataclass(frozen=True)
class AttackRecord:
    """One attack on one model, per text.

    Attributes:
        params: Settings of the attack.
        seed: Its seed.
        is_robust: One flag per attacked text: right before and under the attack.
        errors: Texts whose scores were not finite.
        mean_queries: Forward passes per attacked text.
    """

    params: Params
    seed: int
    is_robust: list[bool]
    errors: int
    mean_queries: float

    @classmethod
    def of(cls, outcome: AttackOutcome, *, params: Params, seed: int) -> Self:
        """Keep an outcome together with the settings that led to it."""
        return cls(params, seed, outcome.is_robust, outcome.errors, outcome.mean_queries)


@dataclass(frozen=True)
class ModelEvaluation:
    """What was measured on one model so far, per text; None for a stage that has not run.

    It holds no text, but it is private all the same: results of single records.

    Attributes:
        subject: ``base``, ``plain``, ``hardened``, ...
        artefact: SHA-256 hex digest of the model.
        fingerprint: Digest of the texts and settings; results are comparable only where it is equal.
        num_non_members: How many of the scored texts stand against the members: the first ones.
        left_out: Positions among those that do not.
        is_correct: One flag per scored text (classification).
        losses: One loss per scored text, in nats; None where it is not finite.
        num_tokens: Supervised tokens per scored text (generation).
        member_losses: One loss per member.
        embedding: The embedding attack, one record per radius, rising.
        noise: Random noise of the largest radius.
        characters: The character attack.
        seconds: Wall time of each stage.
    """

    subject: str
    artefact: str
    fingerprint: str
    num_non_members: int
    left_out: list[int] = field(default_factory=list)
    is_correct: list[bool] | None = None
    losses: list[float | None] | None = None
    num_tokens: list[int] | None = None
    member_losses: list[float | None] | None = None
    embedding: list[AttackRecord] | None = None
    noise: AttackRecord | None = None
    characters: AttackRecord | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def non_member_losses(self) -> list[float | None]:
        """One loss per text that stands against the members."""
        stands = enumerate((self.losses or [])[: self.num_non_members])
        return [loss for row, loss in stands if row not in self.left_out]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without NaN."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read what ``to_dict`` wrote.

        Args:
            values: The JSON object.

        Returns:
            The evaluation.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        try:
            embedding = values["embedding"]
            attacks = {
                name: values[name] and AttackRecord(**values[name]) for name in ("noise", "characters")
            }
            if embedding is not None:
                attacks["embedding"] = [AttackRecord(**record) for record in embedding]
            return cls(**{**values, **attacks})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not a saved evaluation of this version: {error}. Delete the file to evaluate again."
            ) from error
