"""Measure the models of a run: the base, the plain fine-tune and the hardened one, on the same texts."""

from collections.abc import Callable
from dataclasses import dataclass

from securetune.checkpoints import Vault
from securetune.config.schema import Recipe
from securetune.evaluation.findings import compare, find_members, summarise
from securetune.evaluation.membership import MembershipResult
from securetune.evaluation.results import ModelEvaluation
from securetune.evaluation.statistics import Estimate
from securetune.evaluation.suite import EvaluationTexts, evaluate_model
from securetune.evidence import Evidence, Interval
from securetune.models.base import BaseModel, load_base
from securetune.privacy.ledger import LedgerState, read_ledger
from securetune.training.access import Access, forget
from securetune.training.export import require_same_base
from securetune.training.folder import RunFolder
from securetune.training.loop import Head
from securetune.training.prepare import PreparedData, prepare_data
from securetune.training.progress import StageProgress
from securetune.training.subjects import (
    SUBJECTS,
    Subject,
    checkpoint_of,
    holds_weights,
    make_head,
    open_model,
    restore,
)

COMPARISONS: tuple[tuple[Subject, Subject], ...] = (
    ("plain", "base"),
    ("hardened", "base"),
    ("hardened", "plain"),
)
_BLIND = "blind_baseline"


@dataclass(frozen=True)
class Measured:
    """Everything measured in a run: un-noised statistics of private data, which stay in the run folder.

    Attributes:
        evidence: All figures.
        memberships: The membership attack on each model, with its ROC curve; absent where it could not be
            run.
        num_members: Training texts in that attack.
        num_non_members: Held-out texts in that attack.
    """

    evidence: list[Evidence]
    memberships: dict[Subject, MembershipResult]
    num_members: int
    num_non_members: int


def evaluate_subject(
    subject: Subject, recipe: Recipe, run: RunFolder, access: Access, data: PreparedData
) -> None:
    """Measure one model as it was sealed; a stage that a killed run finished is not repeated.

    Args:
        subject: Which model.
        recipe: The recipe.
        run: The run's folder; keeps the results.
        access: The run's keys.
        data: The private data.
    """
    name = f"evaluation_{subject}"
    if run.has(f"{name}_done"):
        return
    head, base, artefact = open_model(subject, recipe, run, access)
    previous = ModelEvaluation.from_dict(run.load(name)) if run.has(name) else None
    texts = _texts(recipe, data)
    if not run.has(_BLIND):
        blind = texts.check_split(seed=recipe.evaluation.seed)
        saved = None if blind is None else {"value": blind.value, "interval": blind.interval.model_dump()}
        run.save(_BLIND, saved)

    def save(result: ModelEvaluation) -> None:
        run.save(name, result.to_dict())

    _evaluate(head, base, texts, recipe, subject, artefact, previous=previous, save=save)
    run.save(f"{name}_done", {"num_non_members": len(texts.non_members)})


def forget_plain_model(run: RunFolder) -> None:
    """Delete the plain fine-tune once it is measured: it saw private records without protection.

    Args:
        run: The run's folder.
    """
    forget(checkpoint_of(run, "plain"))


def collect_evidence(recipe: Recipe, run: RunFolder) -> Measured:
    """Turn the results of all models into evidence, comparisons and the ledger's epsilon.

    Args:
        recipe: The recipe.
        run: The run's folder, all models evaluated.

    Returns:
        The evidence and the ROC curves.
    """
    results: dict[Subject, ModelEvaluation] = {
        subject: ModelEvaluation.from_dict(run.load(f"evaluation_{subject}")) for subject in SUBJECTS
    }
    non_members = run.load("evaluation_base_done")["num_non_members"]
    saved = run.load(_BLIND)
    blind = None if saved is None else Estimate(saved["value"], Interval(**saved["interval"]))
    base = results["base"]
    evidence: list[Evidence] = []
    memberships: dict[Subject, MembershipResult] = {}
    if recipe.privacy.enabled:
        evidence.append(_epsilon(read_ledger(run.checkpoint / "ledger.jsonl"), results["hardened"].artefact))
    for subject, result in results.items():
        evidence += summarise(result, base=base, blind=blind)
        membership = find_members(result, base=base)
        if membership is not None:
            memberships[subject] = membership
    for first, second in COMPARISONS:
        evidence += compare(results[first], results[second])
    return Measured(evidence, memberships, len(base.member_losses or ()), non_members)


def evaluate_checkpoint(recipe: Recipe, vault: Vault) -> list[Evidence]:
    """Measure an open checkpoint on the held-out records of its run, outside the run.

    Args:
        recipe: The recipe; its run folder holds the split.
        vault: The open checkpoint.

    Returns:
        Un-noised evidence, not covered by epsilon.

    Raises:
        CheckpointError: If the checkpoint belongs to another base model.
    """
    run = RunFolder(recipe.run_folder)
    base = load_base(recipe.model, float32_weights=holds_weights(vault))
    require_same_base(vault, base.digest)
    data = prepare_data(recipe, run, base.tokenizer)
    head = make_head(recipe, restore(base, vault), base)
    texts = _texts(recipe, data)
    result = _evaluate(head, base, texts, recipe, "hardened", vault.manifest.digest)
    return summarise(result, blind=texts.check_split(seed=recipe.evaluation.seed))


def _texts(recipe: Recipe, data: PreparedData) -> EvaluationTexts:
    raw = [record.text or "" for record in data.held_out_records] if recipe.task == "classify" else None
    return EvaluationTexts.draw(data.held_out, data.members, recipe.evaluation, raw=raw, shared=data.shared)


def _evaluate(
    head: Head,
    base: BaseModel,
    texts: EvaluationTexts,
    recipe: Recipe,
    subject: Subject,
    artefact: str,
    *,
    previous: ModelEvaluation | None = None,
    save: Callable[[ModelEvaluation], None] | None = None,
) -> ModelEvaluation:
    with StageProgress(subject) as progress:
        return evaluate_model(
            head,
            base.tokenizer,
            texts,
            recipe.evaluation,
            subject=subject,
            artefact=artefact,
            prompt=recipe.data.prompt,
            max_length=recipe.data.max_length,
            norm=recipe.adversarial.norm,
            previous=previous,
            save=save,
            progress=progress.update,
        )


def _epsilon(state: LedgerState, artefact: str) -> Evidence:
    epsilon = state.epsilon()
    return Evidence(
        metric="epsilon",
        subject="hardened",
        value=epsilon,
        interval=None,
        n=state.steps_charged,
        method=(
            f"{state.header.accountant}: steps in the ledger, {state.header.sampler} sampling, "
            f"{state.header.neighbouring_relation} {state.header.unit}"
        ),
        status="not_run" if epsilon is None else "pass",
        artefact=artefact,
        private_statistic=False,
        params={"delta": state.header.delta, "noise_multiplier": state.header.noise_multiplier},
    )
