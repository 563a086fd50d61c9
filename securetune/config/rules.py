"""Rules between options of a recipe. Each looks only at sections that are valid by themselves."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from securetune.config.privacy_rules import PRIVACY_RULES, Problem, Rule

if TYPE_CHECKING:
    from securetune.config.schema import (
        AdversarialConfig,
        CheckpointConfig,
        DataConfig,
        EvaluationConfig,
        GateConfig,
        PrivacyConfig,
        PrivateDataConfig,
        PublishConfig,
        TrainingConfig,
    )

# half of the texts are non-members, and a false-positive rate of 1 % needs 1,000 of those
_MIN_MEMBERSHIP_AT_1PCT = 2000


def broken_rules(sections: Mapping[str, Any]) -> list[Problem]:
    """Check every rule whose sections are there.

    Args:
        sections: The valid top-level values of a recipe by name, without those that have errors.

    Returns:
        The problems, in the order of the rules.
    """
    return [
        problem
        for needs, rule in _RULES
        if all(need in sections for need in needs)
        for problem in rule(*(sections[need] for need in needs))
    ]


def _private_data(data: "DataConfig") -> Iterator[Problem]:
    yield from _records("data.private", data.private)


def _records(path: str, records: "PrivateDataConfig") -> Iterator[Problem]:
    if records.source is None and records.path is None:
        yield path, f"needs a source or a path. Set {path}.path to your file."
    if records.source is not None and records.path is not None:
        yield path, "has both a source and a path. Keep exactly one of them."
    if records.source is not None and records.format != "auto":
        yield f"{path}.format", f"has no effect on a source. Remove it, or set {path}.path."


def _public_validation(data: "DataConfig") -> Iterator[Problem]:
    if (public := data.public_validation) is None:
        return
    yield from _records("data.public_validation", public)
    places = [
        records.path.expanduser().resolve() if records.path else records.source
        for records in (public, data.private)
    ]
    if places[0] is not None and places[0] == places[1]:
        yield (
            "data.public_validation",
            "must not be the private records themselves: epsilon would not cover what they decide. Give "
            "other records, which are public.",
        )


def _task(task: str, data: "DataConfig") -> Iterator[Problem]:
    if task == "classify":
        yield from _labels(data)
        if data.prompt.count("{text}") != 1:
            yield "data.prompt", f"must contain {{text}} exactly once, got {data.prompt!r}."
    else:
        if data.labels:
            yield (
                "data.labels",
                "has no effect with task = 'generate'. Remove it, or set task to 'classify'.",
            )
        if data.label_words is not None:
            yield "data.label_words", "has no effect with task = 'generate'. Remove it."
        if data.prompt != type(data).model_fields["prompt"].default:
            yield (
                "data.prompt",
                "has no effect with task = 'generate': prompts come from the records. Remove it.",
            )


def _labels(data: "DataConfig") -> Iterator[Problem]:
    if len(data.labels) < 2:
        yield "data.labels", f"must list at least 2 labels for task = 'classify', got {data.labels}."
    for option, values in (("labels", data.labels), ("label_words", data.label_words or [])):
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            yield f"data.{option}", f"must not repeat a value, got {repeated[0]!r} more than once."
        if any(not value.strip() for value in values):
            yield f"data.{option}", "must not hold an empty text."
    if data.label_words is not None and len(data.label_words) != len(data.labels):
        yield (
            "data.label_words",
            f"must have one word per label: got {len(data.label_words)} words for {len(data.labels)} labels.",
        )


def _privacy_of_data(data: "DataConfig", privacy: "PrivacyConfig") -> Iterator[Problem]:
    if not privacy.enabled:
        return
    reason = "compares private records with each other, so one record's effect is not bounded by epsilon"
    if data.deduplicate == "fuzzy":
        yield (
            "data.deduplicate",
            f"cannot be 'fuzzy' with privacy.enabled = true: it {reason}. Set it to 'exact'.",
        )
    if data.screen == "cross_record":
        yield (
            "data.screen",
            f"cannot be 'cross_record' with privacy.enabled = true: it {reason}. Set it to 'none'.",
        )


def _adversarial(adversarial: "AdversarialConfig") -> Iterator[Problem]:
    if adversarial.method == "fgsm" and adversarial.steps != 1:
        yield (
            "adversarial.steps",
            f"must be 1 for method = 'fgsm', got {adversarial.steps}. Set method to 'pgd'.",
        )
    if adversarial.method == "pgd" and adversarial.steps < 2:
        yield (
            "adversarial.steps",
            f"must be at least 2 for method = 'pgd', got {adversarial.steps}. Set method to 'fgsm'.",
        )


def _training(training: "TrainingConfig", data: "DataConfig") -> Iterator[Problem]:
    if not all(0 <= beta < 1 for beta in training.betas):
        yield "training.betas", f"must both be in [0, 1), got {list(training.betas)}."
    if training.micro_batch_tokens < data.max_length:
        yield (
            "training.micro_batch_tokens",
            f"must be at least data.max_length ({data.max_length}), got {training.micro_batch_tokens}.",
        )


def _training_method(training: "TrainingConfig") -> Iterator[Problem]:
    if training.method == "full" and training.lora is not None:
        yield (
            "training.lora",
            "has no effect with method = 'full', which trains all weights. Remove it (--set "
            "training.lora=null), or set method to 'lora'.",
        )
    if training.method == "lora" and training.lora is None:
        yield (
            "training.lora",
            "required for method = 'lora'. Leave it out for the default adapters, or set method to 'full'.",
        )
    if training.method == "lora" and training.passes != 1:
        yield (
            "training.passes",
            f"must be 1 with method = 'lora', got {training.passes}: the gradients of adapters are small, so "
            "a second pass would save no memory. Remove it, or set method to 'full'.",
        )


def _early_stopping(training: "TrainingConfig", data: "DataConfig") -> Iterator[Problem]:
    settings, path = training.early_stopping, "training.early_stopping"
    uses_public = settings.method == "public_validation"
    if uses_public and data.public_validation is None:
        yield (
            "data.public_validation",
            f"required for {path}.method = 'public_validation'. Set data.public_validation.path to a file of "
            "public records.",
        )
    if not uses_public and data.public_validation is not None:
        yield (
            "data.public_validation",
            f"has no effect with {path}.method = {settings.method!r}. Remove it, or set the method to "
            "'public_validation'.",
        )
    if settings.method == "noisy_test" and settings.epsilon is None:
        yield (
            f"{path}.epsilon",
            "required for method = 'noisy_test': the budget of all tests together. Set it, such as 1.0.",
        )
    if settings.method != "noisy_test" and settings.epsilon is not None:
        yield f"{path}.epsilon", f"has no effect with method = {settings.method!r}. Remove it."


def _early_stopping_under_privacy(
    training: "TrainingConfig", privacy: "PrivacyConfig", publish: "PublishConfig"
) -> Iterator[Problem]:
    settings, path = training.early_stopping, "training.early_stopping"
    if settings.method != "none" and settings.every >= privacy.steps:
        yield (
            f"{path}.every",
            f"must be below privacy.steps ({privacy.steps}), got {settings.every}: nothing could be stopped.",
        )
    if privacy.enabled and settings.method == "private_validation":
        yield (
            f"{path}.method",
            "cannot be 'private_validation' with privacy.enabled = true: what is released would depend on "
            "held-out records that no noise protects. Use 'public_validation' with public records in "
            "data.public_validation, or 'noisy_test', which the ledger counts.",
        )
    if not privacy.enabled and settings.method == "noisy_test":
        yield (
            f"{path}.method",
            "cannot be 'noisy_test' with privacy.enabled = false: there is no ledger to count it. Use "
            "'private_validation' or 'public_validation'.",
        )
    spent = (settings.epsilon or 0.0) + (publish.release_epsilon or 0.0)
    if privacy.enabled and settings.method == "noisy_test" and spent > privacy.target_epsilon:
        yield (
            f"{path}.epsilon",
            f"must be at most privacy.target_epsilon ({privacy.target_epsilon:g}) together with "
            f"publish.release_epsilon, got {spent:g}: held-out records pay for both. Lower one of the two.",
        )


def _early_stopping_of_task(training: "TrainingConfig", task: str) -> Iterator[Problem]:
    if training.early_stopping.method == "noisy_test" and task == "generate":
        yield (
            "training.early_stopping.method",
            "cannot be 'noisy_test' with task = 'generate': only right answers can be counted. Use "
            "'public_validation'.",
        )


def _early_stopping_texts(
    training: "TrainingConfig", data: "DataConfig", evaluation: "EvaluationConfig"
) -> Iterator[Problem]:
    settings = training.early_stopping
    scored = max(evaluation.num_texts, evaluation.num_membership // 2, evaluation.num_attacked)
    needed = settings.num_texts + scored
    if settings.method in ("noisy_test", "private_validation") and data.min_held_out < needed:
        yield (
            "data.min_held_out",
            f"must be at least {needed} with training.early_stopping.method = {settings.method!r}, got "
            f"{data.min_held_out}: training.early_stopping.num_texts ({settings.num_texts}) held-out records "
            f"decide when to stop, and {scored} others evaluate the model. Raise it, or lower those.",
        )


def _evaluation(evaluation: "EvaluationConfig", data: "DataConfig") -> Iterator[Problem]:
    if evaluation.num_attacked > evaluation.num_texts:
        yield (
            "evaluation.num_attacked",
            f"must be at most num_texts ({evaluation.num_texts}), got {evaluation.num_attacked}.",
        )
    if any(high <= low for low, high in zip(evaluation.pgd_radii, evaluation.pgd_radii[1:], strict=False)):
        yield "evaluation.pgd_radii", f"must rise from one to the next, got {evaluation.pgd_radii}."
    if evaluation.batch_tokens < data.max_length:
        yield (
            "evaluation.batch_tokens",
            f"must be at least data.max_length ({data.max_length}), got {evaluation.batch_tokens}.",
        )


def _keys(checkpoint: "CheckpointConfig") -> Iterator[Problem]:
    given = [name for name in ("recipients", "signing_key", "passphrase_file") if getattr(checkpoint, name)]
    if checkpoint.demo_keys:
        if given:
            yield (
                "checkpoint.demo_keys",
                f"cannot be true together with checkpoint.{given[0]}. Keep your own keys, or the demo keys.",
            )
        return
    remedy = (
        "Make it with 'securetune checkpoint keygen keys --passphrase', "
        "or set checkpoint.demo_keys to true for a first try."
    )
    if "signing_key" not in given:
        yield "checkpoint.signing_key", f"required: a checkpoint is always signed. {remedy}"
    if "passphrase_file" not in given:
        yield (
            "checkpoint.passphrase_file",
            f"required: with it the run measures its own sealed checkpoints, and resumes from them. {remedy}",
        )


def _gate(gate: "GateConfig", evaluation: "EvaluationConfig", task: str) -> Iterator[Problem]:
    for index, rule in enumerate(gate.rules):
        path = f"gate.rules.{index}"
        if rule.at_least is None and rule.at_most is None:
            yield path, f"needs at_least or at_most for {rule.metric!r}."
        elif rule.at_least is not None and rule.at_most is not None and rule.at_least > rule.at_most:
            yield path, f"can never hold: at_least = {rule.at_least:g} is above at_most = {rule.at_most:g}."
        if task == "generate" and rule.metric.startswith("accuracy"):
            yield (
                f"{path}.metric",
                f"{rule.metric!r} is not measured with task = 'generate'. Use 'heldout_loss'.",
            )
        if task == "classify" and rule.metric.startswith("heldout_loss"):
            yield (
                f"{path}.metric",
                f"{rule.metric!r} is not measured with task = 'classify'. Use 'accuracy'.",
            )
        if (
            rule.metric == "membership_tpr_at_1pct_fpr"
            and evaluation.num_membership < _MIN_MEMBERSHIP_AT_1PCT
        ):
            yield (
                f"{path}.metric",
                f"{rule.metric!r} is measured only on 1,000 non-members or more: evaluation.num_membership "
                f"must be at least {_MIN_MEMBERSHIP_AT_1PCT}, got {evaluation.num_membership}. Raise it, or "
                "use 'membership_auc'.",
            )
        is_pair = rule.metric.endswith("_difference")
        if rule.subject is not None and is_pair != (" - " in rule.subject):
            wanted = "a pair such as 'hardened - plain'" if is_pair else "one model such as 'hardened'"
            yield f"{path}.subject", f"must be {wanted} for {rule.metric!r}, got {rule.subject!r}."
        elif rule.metric == "epsilon" and rule.subject not in (None, "hardened"):
            yield (
                f"{path}.subject",
                f"must be 'hardened' for 'epsilon', got {rule.subject!r}: no other model has an epsilon. "
                "Remove it.",
            )
        if rule.radius is not None and not rule.metric.startswith("accuracy_pgd"):
            yield f"{path}.radius", f"has no effect on {rule.metric!r}. Remove it."
        elif rule.radius is not None and rule.radius not in evaluation.pgd_radii:
            yield (
                f"{path}.radius",
                f"must be one of evaluation.pgd_radii {evaluation.pgd_radii}, got {rule.radius}.",
            )


def _gate_of_privacy(gate: "GateConfig", privacy: "PrivacyConfig") -> Iterator[Problem]:
    for index, rule in enumerate(gate.rules):
        if rule.metric == "epsilon" and not privacy.enabled:
            yield (
                f"gate.rules.{index}.metric",
                "'epsilon' is not measured with privacy.enabled = false, so the rule could never hold. "
                "Remove the rule.",
            )


def _folders(run_dir: str, publish: "PublishConfig") -> Iterator[Problem]:
    here = Path.cwd()
    if "\0" in run_dir:
        yield "run_dir", "must not contain a NUL character."
        return
    run_folder = Path(run_dir).expanduser().resolve()
    if here.is_relative_to(run_folder) or Path.home().is_relative_to(run_folder):
        yield (
            "run_dir",
            f"must be a folder of its own, got {run_dir!r}, which holds other things. Try 'runs/{{name}}'.",
        )
    if publish.destination is not None:
        destination = publish.destination.expanduser().resolve()
        if run_folder.is_relative_to(destination):
            yield (
                "publish.destination",
                f"must not hold the run folder {run_dir!r}, which is private, got '{publish.destination}'.",
            )
        elif destination.is_relative_to(run_folder / "keys") or destination.is_relative_to(
            run_folder / "checkpoint"
        ):
            yield (
                "publish.destination",
                f"must not lie inside the run's keys or checkpoint, got '{publish.destination}'.",
            )


def _release(publish: "PublishConfig", privacy: "PrivacyConfig") -> Iterator[Problem]:
    if publish.release_epsilon is not None and not privacy.enabled:
        yield (
            "publish.release_epsilon",
            "has no meaning with privacy.enabled = false: the model itself is not private. Remove it.",
        )


def _release_of_task(publish: "PublishConfig", task: str) -> Iterator[Problem]:
    if publish.release_epsilon is not None and task == "generate":
        yield (
            "publish.release_epsilon",
            "has no effect with task = 'generate': only accuracies can be released. Remove it.",
        )


_RULES: list[Rule] = [
    (("run_dir", "publish"), _folders),
    (("data",), _private_data),
    (("data",), _public_validation),
    (("task", "data"), _task),
    (("data", "privacy"), _privacy_of_data),
    *PRIVACY_RULES,
    (("training",), _training_method),
    (("training", "data"), _training),
    (("training", "data"), _early_stopping),
    (("training", "privacy", "publish"), _early_stopping_under_privacy),
    (("training", "task"), _early_stopping_of_task),
    (("training", "data", "evaluation"), _early_stopping_texts),
    (("adversarial",), _adversarial),
    (("evaluation", "data"), _evaluation),
    (("checkpoint",), _keys),
    (("gate", "evaluation", "task"), _gate),
    (("gate", "privacy"), _gate_of_privacy),
    (("publish", "privacy"), _release),
    (("publish", "task"), _release_of_task),
]
