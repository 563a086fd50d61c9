"""What ``report.json`` holds, and which part of it may leave the run folder."""

import os
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from securetune.errors import DataError, PrivacyError
from securetune.evidence import PUBLIC_PARAMS, Evidence, GateResult, describe_metric, public_params
from securetune.files import read_json
from securetune.privacy.accounting import UNIT_STATEMENT

__all__ = [
    "LIMITATIONS",
    "NOT_COVERED",
    "SCHEMA",
    "AdversarialStatement",
    "BaseModelStatement",
    "Costs",
    "Curves",
    "DataStatement",
    "Environment",
    "PrivacyStatement",
    "RecipeStatement",
    "Report",
    "RocCurve",
    "StageTime",
    "TrainingCurve",
    "load_report",
    "report_json",
    "shareable",
]

SCHEMA: Final = "securetune.report/1"

NOT_COVERED: Final = (
    "Choices that a person made after looking at private data, such as tuning a learning rate over several "
    "runs, are not counted in epsilon.",
    "The decision to publish, and which held-out figures are released, is taken on un-noised measurements of "
    "held-out private records and is not counted.",
    "Facts about many records, such as how a label correlates with a word, are what the model is meant to "
    "learn; differential privacy does not hide them.",
    "Figures marked \N{LEFT DOUBLE QUOTATION MARK}not covered by epsilon\N{RIGHT DOUBLE QUOTATION MARK} are "
    "un-noised statistics of private data and stay in the run folder.",
)
"""What the privacy guarantee does not say, true of every private run."""

LIMITATIONS: Final = (
    "Robustness is measured, not proved: a stronger or different attack may do better than the ones used "
    "here.",
    "Membership inference was tried with the attacks named in the evidence. A weak attack proves nothing "
    "about a stronger one; epsilon is the guarantee.",
    "Each 95 % interval stands alone: with many comparisons, about one in twenty misses by chance. Intervals "
    "cover the choice of held-out texts, not a second training run.",
    "Everything was measured on texts like the private ones. Other kinds of text may fare differently.",
)
"""What the measurements do not say, true of every run."""

_WITHHELD: Final = "met; the measured value is an un-noised statistic of private data and is withheld"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RecipeStatement(_Part):
    """Which recipe was run, and what it trained. ``digest`` is the SHA-256 of the resolved recipe."""

    name: str
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    task: Literal["classify", "generate"]
    method: Literal["lora", "full"] = "lora"
    seed: int


class Environment(_Part):
    """The software and the device that did the work."""

    securetune: str
    python: str
    libraries: dict[str, str]
    device: str
    dtype: str


class BaseModelStatement(_Part):
    """The public model the run started from."""

    name: str
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")


class DataStatement(_Part):
    """How much private data there was, and how it was split; never a text.

    Attributes:
        source: Where the records came from, without a path: a package name, or ``local file``.
        planned_records: ``expected_batch_size / sample_rate``: the units the recipe plans for. Public.
        unit: What is held out as a whole: "record" or "user".
        records: Records after exact duplicates were removed.
        duplicates_removed: Exact duplicates removed.
        training_records: Records the sampler could draw.
        held_out_records: Records kept out of training.
        training_users: Users the sampler could draw, where users are the unit.
        held_out_users: Users kept out of training, of whom one record each is measured.
        split_rule: How held-out records were chosen.
    """

    source: str
    planned_records: float = Field(gt=0)
    unit: Literal["record", "user"] = "record"
    records: int | None = Field(default=None, ge=0)
    duplicates_removed: int | None = Field(default=None, ge=0)
    training_records: int | None = Field(default=None, ge=0)
    held_out_records: int | None = Field(default=None, ge=0)
    training_users: int | None = Field(default=None, ge=0)
    held_out_users: int | None = Field(default=None, ge=0)
    split_rule: str = "keyed hash of each record, so a record's side depends on that record alone"


class PrivacyStatement(_Part):
    """The differential privacy guarantee of the hardened model, and what it leaves out.

    Attributes:
        unit: The privacy unit, as a sentence.
        neighbouring: The neighbouring relation.
        sampler: How batches were drawn, in a word.
        sampling: The same as a sentence: rate, largest batch, neighbouring relation, and whether the number
            of units is public.
        accountant: Name and version of what computed epsilon, such as ``dp-accounting 0.6.0, PLD``.
        epsilon_target: The epsilon the recipe asked for.
        epsilon_spent: The epsilon of the steps in the ledger.
        delta: The delta of both.
        noise: What noise hides each unit, as a sentence.
        noise_multiplier: Noise standard deviation over ``max_grad_norm``.
        sample_rate: Probability that a record is in a batch.
        expected_batch_size: The divisor of the summed gradient.
        steps_planned: Steps the noise was calibrated for; mechanisms, where it is correlated over the steps.
        steps_charged: Steps in the ledger, repeated ones counted each time.
        max_grad_norm: Clipping threshold.
        clipping: How each unit's gradient is bounded, as a sentence, with the sensitivity.
        max_true_positive_rate_at_1pct_fpr: The highest true-positive rate at 1 % false positives that any
            membership attack can have under (epsilon, delta).
        max_true_positive_rate_at_1pct_fpr_pld: The same, from the whole privacy loss distribution: tighter.
        release_epsilon: Epsilon paid, on held-out records only, for the noised figures of the shareable
            report.
        not_covered: What the guarantee does not say.
    """

    unit: str = UNIT_STATEMENT
    neighbouring: str = "add or remove one record"
    sampler: str = "Poisson"
    sampling: str = ""
    accountant: str
    epsilon_target: float = Field(gt=0)
    epsilon_spent: float = Field(ge=0)
    delta: float = Field(gt=0, lt=1)
    noise_multiplier: float = Field(gt=0)
    noise: str = ""
    sample_rate: float = Field(gt=0, le=1)
    expected_batch_size: int = Field(gt=0)
    steps_planned: int = Field(gt=0)
    steps_charged: int = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    clipping: str = ""
    max_true_positive_rate_at_1pct_fpr: float = Field(ge=0, le=1)
    max_true_positive_rate_at_1pct_fpr_pld: float | None = Field(default=None, ge=0, le=1)
    release_epsilon: float | None = Field(default=None, gt=0)
    not_covered: list[str] = list(NOT_COVERED)


class AdversarialStatement(_Part):
    """How training examples were attacked. ``radius`` is in units of the mean embedding norm."""

    method: str
    norm: str
    radius: float = Field(gt=0)
    step_size: float | None = Field(default=None, gt=0)
    steps: int = Field(gt=0)


class StageTime(_Part):
    """Wall-clock time of one stage of the run."""

    name: str
    seconds: float = Field(ge=0)


class TrainingCurve(_Part):
    """Loss and epsilon over the steps of one training run.

    Attributes:
        subject: The model trained.
        steps: Step numbers, ascending.
        loss: Mean loss of the batch at each step: an un-noised statistic of private data.
        epsilon: Epsilon spent after each step. It follows from the plan alone, so it may be shared.
    """

    subject: str
    steps: list[int] = Field(min_length=1)
    loss: list[float | None] | None
    epsilon: list[float] | None

    @model_validator(mode="after")
    def _check_lengths(self) -> "TrainingCurve":
        for name, values in (("loss", self.loss), ("epsilon", self.epsilon)):
            if values is not None and len(values) != len(self.steps):
                raise ValueError(
                    f"training curve: {name} has {len(values)} values for {len(self.steps)} steps."
                )
        return self


class RocCurve(_Part):
    """True- against false-positive rate of one membership attack on one model."""

    subject: str
    method: str
    false_positive_rate: list[float] = Field(min_length=2)
    true_positive_rate: list[float] = Field(min_length=2)
    n_members: int = Field(gt=0)
    n_non_members: int = Field(gt=0)

    @model_validator(mode="after")
    def _check_points(self) -> "RocCurve":
        if len(self.false_positive_rate) != len(self.true_positive_rate):
            raise ValueError("ROC curve: false_positive_rate and true_positive_rate differ in length.")
        for rates in (self.false_positive_rate, self.true_positive_rate):
            if any(not 0 <= rate <= 1 for rate in rates) or sorted(rates) != rates:
                raise ValueError("ROC curve: rates must lie in 0..1 and never fall.")
        return self


class Curves(_Part):
    """What is drawn, beyond the evidence: accuracy over attack radius is drawn from the evidence itself."""

    training: list[TrainingCurve] = []
    roc: list[RocCurve] = []


class Costs(_Part):
    """What hardening cost in time. What it cost in accuracy is in the ``*_difference`` evidence.

    Attributes:
        training_seconds: Training time of each model.
        training_time_ratio: Training time of the hardened model over that of the plain fine-tune, both at the
            same number of steps.
    """

    training_seconds: dict[str, float] = {}
    training_time_ratio: float | None = Field(default=None, gt=0)


class Report(_Part):
    """Everything a run can say about itself, as one JSON document.

    Guarantees:
        A report whose ``audience`` is ``shareable`` holds no un-noised statistic of private data: not as
        evidence, curve, count of records, time, memory or gate value, and no param but ``PUBLIC_PARAMS``. It
        holds no released figure of a model that was trained without privacy. Anything else is refused.

    Attributes:
        schema_version: ``securetune.report/1``.
        audience: ``internal`` stays in the run folder, ``shareable`` may be published.
        created: UTC date and time, ISO 8601.
        limitations: What the measurements do not say. Must not quote a measurement: it is published.
        reproduce: The command that runs this recipe again.
        withheld: What a shareable report leaves out, by name only.
    """

    schema_version: Literal["securetune.report/1"] = SCHEMA
    audience: Literal["internal", "shareable"] = "internal"
    created: str
    recipe: RecipeStatement
    environment: Environment
    base_model: BaseModelStatement
    data: DataStatement
    privacy: PrivacyStatement | None
    adversarial: AdversarialStatement | None
    evidence: list[Evidence]
    gate: GateResult | None
    curves: Curves = Curves()
    costs: Costs = Costs()
    stages: list[StageTime] = []
    peak_memory_bytes: int | None = Field(default=None, gt=0)
    limitations: list[str] = list(LIMITATIONS)
    reproduce: str
    withheld: list[str] = []

    @model_validator(mode="after")
    def _check_audience(self) -> "Report":
        if self.audience == "shareable":
            problems = list(_private_parts(self))
            if problems:
                raise ValueError(
                    f"a shareable report must not hold {', '.join(problems)}. Use shareable(report)."
                )
        return self


def shareable(report: Report, released: Sequence[Evidence] = ()) -> Report:
    """Reduce a report to what may be published.

    Guarantees:
        No un-noised statistic of private data survives: private evidence, loss curves, ROC points, counts of
        records, times, memory, the measured values in the gate and all params but ``PUBLIC_PARAMS`` are left
        out. What remains is built from a list of fields that may be shared, so a field added later is left
        out until it is named here.

    Args:
        report: The report of the run.
        released: Held-out figures that were noised for release; each states its ``release_epsilon``.

    Returns:
        A report with ``audience`` set to ``shareable``; ``withheld`` names what was left out.

    Raises:
        PrivacyError: If an item of ``released`` is not marked as released, or is about a model that was
            trained on private records without privacy: noise on held-out counts does not protect those.
    """
    allowed = _releasable_subjects(report)
    for item in released:
        if item.release_epsilon is None or item.private_statistic:
            raise PrivacyError(
                f"{item.metric} of {item.subject} cannot be released: it is not marked with a "
                "release_epsilon. Release held-out counts through securetune.privacy.release first."
            )
        if item.subject not in allowed:
            raise PrivacyError(
                f"{item.metric} of {item.subject} cannot be released: that model saw private records without "
                "privacy, and noise on held-out counts does not protect them. Releasable here: "
                f"{', '.join(sorted(allowed))}."
            )
    kept = [
        _with_public_params(item)
        for item in report.evidence
        if not item.private_statistic and (item.release_epsilon is None or item.subject in allowed)
    ]
    added = [_with_public_params(item) for item in released]
    return Report(
        audience="shareable",
        created=report.created,
        recipe=report.recipe,
        environment=report.environment,
        base_model=report.base_model,
        data=DataStatement(
            source=report.data.source,
            planned_records=report.data.planned_records,
            unit=report.data.unit,
            split_rule=report.data.split_rule,
        ),
        privacy=report.privacy,
        adversarial=report.adversarial,
        evidence=kept + [item for item in added if item not in kept],
        gate=_shareable_gate(report.gate),
        curves=Curves(
            training=[
                TrainingCurve(subject=curve.subject, steps=curve.steps, loss=None, epsilon=curve.epsilon)
                for curve in report.curves.training
                if curve.epsilon is not None
            ]
        ),
        limitations=report.limitations,
        reproduce=report.reproduce,
        withheld=_withheld_names(report),
    )


def report_json(report: Report) -> str:
    """Write a report as the text of ``report.json``.

    Args:
        report: The report.

    Returns:
        Indented JSON that ends in a line break.
    """
    return report.model_dump_json(indent=2) + "\n"


def load_report(path: str | os.PathLike[str]) -> Report:
    """Read ``report.json``.

    Args:
        path: The file.

    Returns:
        The report.

    Raises:
        DataError: If the file is not a report of a version this library knows.
    """
    try:
        return Report.model_validate(read_json(path, 64 << 20))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise DataError(
            f"{os.fspath(path)} is not a {SCHEMA} report: {where}: {first['msg']}. "
            "Read it with the version of securetune that wrote it."
        ) from error


def _releasable_subjects(report: Report) -> frozenset[str]:
    """Name the models whose held-out counts may be noised and released: private, or never trained."""
    return frozenset({"base"} if report.privacy is None else {"base", "hardened", "hardened - base"})


def _with_public_params(item: Evidence) -> Evidence:
    return item.model_copy(update={"params": public_params(item.params)})


def _shareable_gate(gate: GateResult | None) -> GateResult | None:
    if gate is None or not gate.passed:
        return None  # which rules failed would tell more than the decision to publish does
    rules = [
        rule.model_copy(
            update={"params": public_params(rule.params)}
            | (
                {"value": None, "interval": None, "n": 0, "reason": _WITHHELD, "private_statistic": False}
                if rule.private_statistic
                else {}
            )
        )
        for rule in gate.rules
    ]
    return GateResult(passed=True, rules=rules)


def _withheld_names(report: Report) -> list[str]:
    names = list(report.withheld)
    names += [
        f"{describe_metric(item.metric)} ({item.subject})"
        for item in report.evidence
        if item.private_statistic
    ]
    names += [
        f"loss over steps ({curve.subject})" for curve in report.curves.training if curve.loss is not None
    ]
    names += [f"ROC of the membership attack ({curve.subject})" for curve in report.curves.roc]
    names += ["numbers of records", "times and memory"]
    return list(dict.fromkeys(names))


def _private_parts(report: Report) -> Iterable[str]:
    if any(item.private_statistic for item in report.evidence):
        yield "private statistics among its evidence"
    allowed = _releasable_subjects(report)
    if any(item.release_epsilon is not None and item.subject not in allowed for item in report.evidence):
        yield "released figures of a model trained without privacy"
    if any(curve.loss is not None for curve in report.curves.training):
        yield "loss curves"
    if report.curves.roc:
        yield "ROC points"
    counts = (
        report.data.records,
        report.data.duplicates_removed,
        report.data.training_records,
        report.data.held_out_records,
        report.data.training_users,
        report.data.held_out_users,
    )
    if any(count is not None for count in counts):
        yield "numbers of records"
    if report.stages or report.costs != Costs() or report.peak_memory_bytes is not None:
        yield "times or memory"
    rules = [] if report.gate is None else report.gate.rules
    if any(
        not rule.passed
        or rule.private_statistic
        or rule.reason not in ("met", _WITHHELD)
        or (rule.value is None and rule.n != 0)
        for rule in rules
    ):
        yield "private values or a failure in its gate result"
    names = {name for part in (*report.evidence, *rules) for name in part.params} - PUBLIC_PARAMS
    if names:
        yield f"params that are no settings: {', '.join(sorted(names))}"
