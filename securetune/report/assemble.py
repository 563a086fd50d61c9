"""Put a run's results together into its report."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from securetune.config.loader import recipe_digest
from securetune.config.schema import Recipe
from securetune.errors import PrivacyError
from securetune.evidence import GateResult
from securetune.privacy.accounting import max_true_positive_rate, max_true_positive_rate_of_run
from securetune.privacy.ledger import LedgerState, read_ledger
from securetune.privacy.statements import noise_statement, sampling_statement
from securetune.report.environment import describe_environment
from securetune.report.summary import (
    AdversarialStatement,
    BaseModelStatement,
    Costs,
    Curves,
    DataStatement,
    PrivacyStatement,
    RecipeStatement,
    Report,
    RocCurve,
    StageTime,
    TrainingCurve,
)
from securetune.training.evaluate import Measured
from securetune.training.folder import RunFolder
from securetune.training.plan import Plan
from securetune.training.prepare import PreparedData

if TYPE_CHECKING:
    from securetune.models.base import BaseModel

REPRODUCE = "accelerate launch recipes/harden.py recipe.yaml --set run_dir=runs/again"
"""With the resolved recipe of the run folder."""

TRAINING_STAGES = {"plain": "plain fine-tune", "hardened": "hardened training"}


def assemble_report(
    recipe: Recipe,
    run: RunFolder,
    plan: Plan,
    data: PreparedData,
    base: "BaseModel",
    measured: Measured,
    *,
    gate: GateResult,
) -> Report:
    """Build the report of a run from what its stages left.

    Args:
        recipe: The recipe.
        run: The run's folder, all stages but publishing done.
        plan: The plan.
        data: The private data.
        base: The base model.
        measured: Everything measured, epsilon included.
        gate: The gate's verdict.

    Returns:
        The report; it stays in the run folder.
    """
    privacy = (
        None if plan.privacy is None else _privacy(recipe, plan, read_ledger(run.checkpoint / "ledger.jsonl"))
    )
    times = run.stage_times()
    seconds = {
        subject: times[stage] for subject, stage in TRAINING_STAGES.items() if times.get(stage, 0.0) > 0
    }
    ratio = seconds["hardened"] / seconds["plain"] if len(seconds) == 2 else None
    return Report(
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        recipe=RecipeStatement(
            name=recipe.name,
            digest=recipe_digest(recipe),
            task=recipe.task,
            method=recipe.training.method,
            seed=recipe.seed,
        ),
        environment=describe_environment(_device_name(base), _arithmetic(base)),
        base_model=BaseModelStatement(name=_public_name(base.name), digest=base.digest),
        data=DataStatement(
            source=recipe.data.private.source or "local file",
            planned_records=recipe.privacy.expected_records,
            records=data.records,
            duplicates_removed=data.duplicates_removed,
            training_records=len(data.train),
            held_out_records=data.num_held_out,
            **_users(recipe, data),
        ),
        privacy=privacy,
        adversarial=_adversarial(recipe),
        evidence=measured.evidence,
        gate=gate,
        curves=Curves(training=_training_curves(run), roc=_roc_curves(measured)),
        costs=Costs(training_seconds=seconds, training_time_ratio=ratio),
        stages=[StageTime(name=name, seconds=value) for name, value in times.items()],
        peak_memory_bytes=_peak_memory_bytes(),
        reproduce=REPRODUCE,
    )


def _roc_curves(measured: Measured) -> list[RocCurve]:
    return [
        RocCurve(
            subject=subject,
            method=result.auc_attack,
            false_positive_rate=result.roc.false_positive_rates,
            true_positive_rate=result.roc.true_positive_rates,
            n_members=measured.num_members,
            n_non_members=measured.num_non_members,
        )
        for subject, result in measured.memberships.items()
    ]


def _privacy(recipe: Recipe, plan: Plan, state: LedgerState) -> PrivacyStatement:
    assert plan.privacy is not None
    header = state.header
    epsilon = state.epsilon()
    if epsilon is None:
        raise PrivacyError(
            "the ledger says that a key was fixed for a test, so there is no epsilon to report. Run again "
            "without it."
        )
    return PrivacyStatement(
        unit=header.unit_statement,
        neighbouring=f"{header.neighbouring_relation} {header.unit}",
        sampler=header.sampler,
        sampling=sampling_statement(header),
        accountant=header.accountant,
        epsilon_target=recipe.privacy.target_epsilon,
        epsilon_spent=epsilon,
        delta=header.delta,
        noise_multiplier=header.noise_multiplier,
        noise=noise_statement(header),
        sample_rate=header.sample_rate,
        expected_batch_size=header.expected_batch_size,
        steps_planned=header.planned_steps,
        steps_charged=state.steps_charged,
        max_grad_norm=header.max_grad_norm,
        clipping=header.clipping_statement,
        max_true_positive_rate_at_1pct_fpr=max_true_positive_rate(epsilon, header.delta, 0.01),
        max_true_positive_rate_at_1pct_fpr_pld=max_true_positive_rate_of_run([state.phase], 0.01),
        release_epsilon=sum(state.release_epsilons) or None,
    )


def _users(recipe: Recipe, data: PreparedData) -> dict[str, Any]:
    if recipe.privacy.unit == "record":
        return {}
    return {
        "unit": "user",
        "training_users": len({example.user_id for example in data.train}),
        "held_out_users": len(data.held_out),
        "split_rule": "keyed hash of each user, so a user's side depends on that user alone; one record of "
        "each held-out user is measured",
    }


def _adversarial(recipe: Recipe) -> AdversarialStatement | None:
    settings = recipe.adversarial
    if settings.method == "none":
        return None
    return AdversarialStatement(
        method=settings.method,
        norm=settings.norm,
        radius=settings.radius,
        step_size=settings.step_size,
        steps=settings.steps,
    )


def _training_curves(run: RunFolder) -> list[TrainingCurve]:
    """Read the curves from ``metrics.jsonl``; of a step that was run twice the later line counts."""
    curves = []
    for subject in TRAINING_STAGES:
        lines = {line["step"]: line for line in run.read_metrics() if line.get("stage") == subject}
        if not lines:
            continue
        ordered = [lines[step] for step in sorted(lines)]
        epsilon = [line["epsilon"] for line in ordered]
        curves.append(
            TrainingCurve(
                subject=subject,
                steps=[line["step"] for line in ordered],
                loss=[line["loss"] for line in ordered],
                epsilon=None if None in epsilon else epsilon,
            )
        )
    return curves


def _device_name(base: "BaseModel") -> str:
    if base.device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(base.device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def _arithmetic(base: "BaseModel") -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in (base.dtype, base.autocast) if dtype]
    return ", computed in ".join(names)


def _peak_memory_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _public_name(name: str) -> str:
    """Leave out where a local model folder lies: a report may be published."""
    return Path(name).name if Path(name).expanduser().is_dir() else name
