"""The first line of a ledger: the public constants of a run, which its epsilon follows from."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from securetune.errors import PrivacyError
from securetune.privacy.accounting import (
    NEIGHBOURING_RELATION,
    PrivacyPlan,
    accountant_name,
    unit_statement,
)
from securetune.privacy.loss_distribution import (
    MAX_STEPS,
    MIN_NOISE_MULTIPLIER,
    Sampling,
    SamplingKind,
    check_sampling,
)
from securetune.privacy.statements import clipping_statement

if TYPE_CHECKING:
    from securetune.privacy.clipping import Clipping
    from securetune.privacy.sampling import Sampler
    from securetune.privacy.units import UserSampler

__all__ = ["FORMAT", "LedgerHeader"]

FORMAT = "securetune.ledger/1"

_NOT_SETTINGS = ("mode", "max_grad_norm", "thresholds", "sensitivity")  # of a clipping's description
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LedgerHeader(BaseModel):
    """The public constants of a run, from which epsilon follows.

    Attributes:
        format: Name and version of the file format.
        unit: Whose presence the guarantee hides; a person with several units is not covered as a whole.
        max_records_per_unit: Most records of one unit in one step.
        neighbouring_relation: How two neighbouring data sets differ; it follows from the sampler.
        sampler: How the units of a step are chosen.
        accountant: Name and version of what computes epsilon.
        noise_multiplier: Noise standard deviation over ``max_grad_norm``.
        sample_rate: Probability in (0, 1] of each unit at each step, before truncation.
        num_records: Number of units, where epsilon depends on it and it is public for that reason; ``None``
            for Poisson sampling, where it is private and never written.
        max_batch_size: Most units in one step; ``None`` for Poisson sampling.
        max_grad_norm: Clipping threshold ``C`` of the whole sum, in units of the gradient's L2 norm; where
            thresholds are adaptive, the first one.
        clipping: Mode of the clipping.
        clipping_settings: Its settings beside ``max_grad_norm``.
        noise: Kind and settings of the noise, where it is not independent over the steps.
        delta: Probability allowed for the guarantee to fail, in (0, 1).
        expected_batch_size: Public divisor of the noised sum, in units.
        planned_steps: Steps that the run may charge at most.
        reportable_epsilon: False when a key of the sampler or of the noise was fixed for a test: no epsilon
            holds then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["securetune.ledger/1"] = FORMAT
    unit: str = "record"
    max_records_per_unit: int = Field(default=1, ge=1)
    neighbouring_relation: str = NEIGHBOURING_RELATION
    sampler: SamplingKind = "Poisson"
    accountant: str = Field(default_factory=accountant_name)
    noise_multiplier: float = Field(ge=MIN_NOISE_MULTIPLIER, allow_inf_nan=False)
    sample_rate: float = Field(gt=0, le=1)
    num_records: int | None = None
    max_batch_size: int | None = None
    max_grad_norm: _Positive
    clipping: str = "flat"
    clipping_settings: dict[str, Any] = Field(default_factory=dict)
    noise: dict[str, Any] = Field(default_factory=dict)
    delta: float = Field(gt=0, lt=1)
    expected_batch_size: int = Field(ge=1)
    planned_steps: int = Field(ge=1, le=MAX_STEPS)
    reportable_epsilon: bool = True

    @model_validator(mode="after")
    def _check_sampler(self) -> Self:
        check_sampling(self.sampling, self.sample_rate)
        relation = self.sampling.neighbouring_relation
        if self.neighbouring_relation != relation:
            raise ValueError(
                f"neighbouring_relation must be {relation!r} under {self.sampler} sampling, got "
                f"{self.neighbouring_relation!r}"
            )
        return self

    @property
    def sampling(self) -> Sampling:
        """How the units of a step are chosen, as the accountant takes it."""
        return Sampling(self.sampler, self.num_records, self.max_batch_size)

    @property
    def unit_statement(self) -> str:
        """Whom epsilon protects, as a sentence."""
        return unit_statement(self.unit, max_records_per_unit=self.max_records_per_unit)

    @property
    def clipping_statement(self) -> str:
        """How each unit's gradient is bounded, as a sentence."""
        return clipping_statement(
            self.clipping, self.clipping_settings, unit=self.unit, sensitivity=self.max_grad_norm
        )

    @classmethod
    def from_plan(
        cls,
        plan: PrivacyPlan,
        *,
        reportable_epsilon: bool,
        unit: str = "record",
        sampler: "Sampler | UserSampler | None" = None,
        clipping: "Clipping | None" = None,
    ) -> Self:
        """Take the constants of a plan.

        Args:
            plan: What the run will do.
            reportable_epsilon: Whether both the sampler and the noise have secret keys.
            unit: Whose presence the guarantee hides.
            sampler: What will draw the units; it must sample as planned.
            clipping: What will bound each unit's gradient; None stands for flat clipping.

        Returns:
            The header of the run's ledger.

        Raises:
            PrivacyError: If the sampler does not sample as planned, samples other units, or has a fixed test
                key although an epsilon is to be reported.
        """
        if sampler is not None:
            _refuse_other_sampler(plan, unit, reportable_epsilon, sampler)
        described = {"mode": "flat"} if clipping is None else clipping.describe()
        settings = {name: value for name, value in described.items() if name not in _NOT_SETTINGS}
        return cls(
            unit=unit,
            max_records_per_unit=1 if sampler is None else sampler.describe().max_records_per_unit,
            neighbouring_relation=plan.spec.sampling.neighbouring_relation,
            sampler=plan.spec.sampler,
            num_records=plan.spec.num_records,
            max_batch_size=plan.spec.max_batch_size,
            accountant=plan.accountant,
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.spec.sample_rate,
            max_grad_norm=plan.spec.max_grad_norm,
            clipping=described["mode"],
            clipping_settings=settings,
            delta=plan.spec.delta,
            expected_batch_size=plan.spec.expected_batch_size,
            planned_steps=plan.spec.steps,
            reportable_epsilon=reportable_epsilon,
        )


def _refuse_other_sampler(
    plan: PrivacyPlan, unit: str, reportable_epsilon: bool, sampler: "Sampler | UserSampler"
) -> None:
    drawn = sampler.phase(plan.noise_multiplier, plan.spec.steps)
    statement = sampler.describe()
    if drawn != plan.phase or statement.unit != unit:
        raise PrivacyError(
            "the sampler draws otherwise than planned, so the plan's epsilon is not that of the run:\n"
            f"  sampler: {statement.unit}s, {drawn}\n"
            f"  plan: {unit}s, {plan.phase}\n"
            "Make the sampler from the plan's constants."
        )
    if reportable_epsilon and not sampler.reportable_epsilon:
        raise PrivacyError(
            "the sampler has a fixed key, for tests: its samples are not secret and no epsilon holds. Make "
            "it without a key, or set reportable_epsilon to false."
        )
