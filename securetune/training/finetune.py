"""Train one model of a run and seal it: the plain fine-tune, or the private and hardened model."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from securetune.adversarial.validity import find_objective, require_private_training_allows
from securetune.checkpoints import Sealer
from securetune.config.loader import recipe_digest
from securetune.config.schema import Recipe
from securetune.errors import PrivacyError
from securetune.models.base import BaseModel
from securetune.privacy.ledger import Ledger
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.step import OrdinaryStep
from securetune.training.access import Access, forget
from securetune.training.drawing import make_unit_sampler
from securetune.training.dropout import AdapterDropout
from securetune.training.folder import RunFolder
from securetune.training.loop import (
    Adversary,
    Head,
    Trainer,
    activate_dropout,
    check_gradients,
    make_optimizer,
)
from securetune.training.mechanism import make_clipping, make_private_step
from securetune.training.plan import Plan
from securetune.training.prepare import PreparedData, probe_examples
from securetune.training.progress import TrainingProgress
from securetune.training.state import SavedState, has_state, load_state, save_state
from securetune.training.state_shards import StateShards, state_shards
from securetune.training.stopping import EarlyStopping, make_score
from securetune.training.strategy import Prepared, Strategy
from securetune.training.subjects import (
    Subject,
    checkpoint_of,
    load_recipe_base,
    make_head,
    make_trainable,
    sealed_files,
)

Log = Callable[[dict[str, Any]], None]

_logger = logging.getLogger(__name__)


def fine_tune(
    subject: Literal["plain", "hardened"],
    recipe: Recipe,
    run: RunFolder,
    access: Access,
    data: PreparedData,
    plan: Plan,
    *,
    log: Log | None = None,
    strategy: Strategy | None = None,
) -> None:
    """Train a model and seal it; go on where a killed run stopped.

    The plain fine-tune has the same number of steps, expected batch, optimizer, dropout and label smoothing,
    without privacy, adversarial training and early stopping.

    Guarantees:
        Every private step is in the ledger before its noise is released. A resumed run draws new keys for
        noise and sampling; steps that were charged but not saved are lost, so the run has fewer steps and
        never more epsilon. When a run stops depends on data, so one that stops early charges all its planned
        steps: its epsilon is the planned one. All noisy tests are charged before the first.

    Args:
        subject: Which model.
        recipe: The recipe.
        run: The run's folder.
        access: The run's keys.
        data: The private data.
        plan: The calibrated plan.
        log: Receives the numbers of each step, for trackers.
        strategy: How the processes of the run share the model; they all call this. One process when None.

    Raises:
        PrivacyError: If the model cannot be trained privately, or the whole budget was charged before
            anything was saved.
    """
    strategy = strategy or Strategy()
    if strategy.on_first(lambda: run.has(f"trained_{subject}")):
        return
    base = load_recipe_base(recipe)
    settings = recipe.training
    model = make_trainable(recipe, base)
    dropout = AdapterDropout(model, seed=recipe.seed)
    head = make_head(recipe, model, base)
    grads = PerSampleGradients(model, passes=settings.passes)
    probes = probe_examples(recipe, base.tokenizer)
    check = partial(check_gradients, head, grads, probes, label_smoothing=settings.label_smoothing)
    strategy.on_first(check)  # the model is the same everywhere
    if plan.privacy is not None:  # patterns that fit no parameter are refused before the plain fine-tune
        make_clipping(recipe, noise_multiplier=plan.privacy.noise_multiplier).assign(grads.parameter_names())
    adversary = _adversary(subject, recipe, head)  # its unit of length is that of the whole base embedding
    start = {place.name: _fingerprint(place.parameter) for place in grads.parameters}
    grads.detach()
    prepared = strategy.prepare(model, partial(make_optimizer, recipe), passes=settings.passes)
    grads, optimizer = prepared.grads, prepared.optimizer
    if adversary is not None:
        adversary.within = prepared.within
    state = _state_folder(run, subject)
    owner = {"subject": subject, "recipe": recipe_digest(recipe), "base": base.digest}
    saved = None
    shards = state_shards(grads, optimizer, prepared.reduction)
    stopping = _early_stopping(subject, recipe, head, data, strategy, prepared, shards)
    if strategy.on_first(partial(has_state, state)):
        saved = load_state(state, access, shards, owner=owner, stopping=stopping)
    sampler = make_unit_sampler(
        recipe,
        [example.user_id for example in data.train],
        steps_done=0 if saved is None else saved.steps_done,
        new_key=None if strategy.processes is None else strategy.processes.new_key,
    )
    with contextlib.ExitStack() as stack:
        ledger, clipping, step = (
            None,
            None,
            OrdinaryStep(
                grads,
                optimizer,
                expected_batch_size=recipe.privacy.expected_batch_size,
                reduction=prepared.reduction,
            ),
        )
        if subject == "hardened" and plan.privacy is not None:
            ledger, step = make_private_step(
                recipe,
                run,
                plan.privacy,
                grads,
                optimizer,
                sampler,
                steps_done=0 if saved is None else saved.steps_done,
                processes=strategy.processes,
                reduction=prepared.reduction,
            )
            stack.enter_context(ledger)
            _refuse_other_ledger(ledger, saved)
            clipping = step.clipping
            if saved is not None:
                clipping.load_state_dict(saved.clipping)
            _charge_releases(ledger, _test_epsilons(recipe))
        trainer = Trainer(
            head,
            step,
            sampler,
            data.train,
            micro_batch_tokens=settings.micro_batch_tokens,
            adversary=adversary,
            dropout=dropout,
            label_smoothing=settings.label_smoothing,
            strategy=strategy,
            within=prepared.within,
            filler=probes[0],
        )
        activate_dropout(model)
        save = None
        if access.passphrase is not None:
            sealer = stack.enter_context(_sealer(access, saved)) if strategy.is_first else None
            save = partial(
                save_state,
                state,
                sealer,
                shards,
                owner=owner,
                stopping=stopping,
                clipping=clipping,
                compartment="weights" if settings.lora is None else "adapter",
            )
        _run_steps(
            subject,
            recipe,
            run,
            plan,
            trainer,
            ledger=ledger,
            saved=saved,
            log=log,
            save=save,
            stopping=stopping,
        )
        model.eval()
        if stopping is not None:
            stopping.restore_best()
            shards.refresh()
        if ledger is not None and recipe.publish.release_epsilon is not None:
            _charge_releases(ledger, [*_test_epsilons(recipe), recipe.publish.release_epsilon])
    trained: dict[str, Tensor] = {}
    end: dict[str, int] = {}
    for place in grads.parameters:
        whole = strategy.whole(place)
        end[place.name] = _fingerprint(whole)
        if strategy.is_first:  # the only one to seal them
            trained[place.name] = whole
    if not _moved(start, end):
        raise PrivacyError(
            "what is trained did not move: nothing was learnt. Check the learning rate and the data."
        )

    def seal() -> None:
        _seal(subject, recipe, run, access, sealed_files(recipe, model, base, trained), base)

    strategy.on_first(seal)


def _seal(
    subject: Subject,
    recipe: Recipe,
    run: RunFolder,
    access: Access,
    files: Mapping[str, Mapping[str, bytes]],
    base: BaseModel,
) -> None:
    is_private = subject == "hardened" and recipe.privacy.enabled
    public_files = {"ledger.jsonl": run.ledger.read_bytes()} if is_private else {}
    with access.sealer() as final:
        manifest = final.seal(
            checkpoint_of(run, subject),
            files,
            public_files=public_files,
            metadata=_metadata(subject, recipe, base),
        )
    run.save(f"trained_{subject}", {"manifest": manifest.digest})
    forget(_state_folder(run, subject))


def _state_folder(run: RunFolder, subject: str) -> Path:
    return run.work / f"{subject}-state"


def _adversary(subject: str, recipe: Recipe, head: Head) -> Adversary | None:
    if subject == "plain" or recipe.adversarial.method == "none":
        return None
    if recipe.privacy.enabled:
        require_private_training_allows(find_objective(recipe.adversarial.method))
    return Adversary(head, recipe.adversarial, seed=recipe.seed)


def _early_stopping(
    subject: str,
    recipe: Recipe,
    head: Head,
    data: PreparedData,
    strategy: Strategy,
    prepared: Prepared,
    shards: StateShards,
) -> EarlyStopping | None:
    settings = recipe.training.early_stopping
    if subject == "plain" or settings.method == "none":
        return None
    score = partial(strategy.score, prepared, make_score(recipe, head, data.validation))
    params = [part for _, part in shards.held()]
    return EarlyStopping(settings, params, score, steps=recipe.privacy.steps)


def _test_epsilons(recipe: Recipe) -> list[float]:
    """What the noisy tests of early stopping cost held-out records: one charge for all of them, or none."""
    epsilon = recipe.training.early_stopping.epsilon
    return [] if epsilon is None else [epsilon]


def _charge_releases(ledger: Ledger, epsilons: Sequence[float]) -> None:
    """Charge the releases that the ledger does not hold yet: a resumed run charges each once."""
    for epsilon in epsilons[len(ledger.state.release_epsilons) :]:
        ledger.charge_release(epsilon)


def _charge_remaining_steps(ledger: Ledger) -> None:
    """Charge the steps that are not run: when to stop was learnt from the data, so all are paid for."""
    while ledger.remaining_steps:
        ledger.charge()


def _run_steps(
    subject: str,
    recipe: Recipe,
    run: RunFolder,
    plan: Plan,
    trainer: Trainer,
    *,
    ledger: Ledger | None,
    saved: SavedState | None,
    log: Log | None,
    save: Callable[..., None] | None,
    stopping: EarlyStopping | None,
) -> None:
    planned = recipe.privacy.steps
    steps_done = 0 if saved is None else saved.steps_done
    # noise that is correlated over the steps is charged as a whole: what is left follows from the saves
    is_whole = ledger is not None and recipe.privacy.noise == "matrix_factorization"
    remaining = planned - steps_done if ledger is None or is_whole else ledger.remaining_steps
    if is_whole and remaining and ledger is not None and ledger.remaining_steps == 0:
        raise PrivacyError(
            f"all {ledger.steps_charged} planned mechanisms are charged in {run.ledger}: a run with "
            "correlated noise that was killed goes on in a new mechanism, and privacy.planned_resumptions = "
            f"{recipe.privacy.planned_resumptions} of them are paid for. Start a new run in another folder "
            "with more of them (its epsilon adds to this one's)."
        )
    if remaining == 0 and steps_done == 0:
        raise PrivacyError(
            f"all {planned} planned steps are charged in {run.ledger}, but no training state was saved "
            "before the run was stopped, "
            "so nothing is left to train with. Start a new run in another folder (its epsilon adds to this "
            "one's)."
        )
    has_stopped = stopping is not None and stopping.has_stopped
    if has_stopped:  # the kill came between the last save and the end
        remaining = 0
        if ledger is not None and not is_whole:
            _charge_remaining_steps(ledger)
    with TrainingProgress(subject, total=planned, done=planned - remaining) as progress:
        for number in range(planned - remaining + 1, planned + 1):
            result = trainer.run_step(number)
            steps_done += 1
            score = None if stopping is None else stopping.check(number)
            has_stopped = stopping is not None and stopping.has_stopped
            is_last = has_stopped or number == planned
            if save is not None and (number % recipe.training.save_every == 0 or is_last):
                charged = {"steps_charged": 0} if ledger is None else _charged(ledger)
                save(steps_done=steps_done, **charged)
            if has_stopped and ledger is not None and not is_whole:
                _charge_remaining_steps(ledger)
            epsilon = None
            if ledger is not None and plan.privacy is not None:
                epsilon = plan.privacy.curve.at(ledger.steps_charged)
            progress.update(result, epsilon=epsilon)
            values = {
                "stage": subject,
                "step": number,
                "loss": result.loss,
                "num_samples": result.num_samples,
                "clipped_fraction": result.clipped_fraction,
                "tokens_per_second": result.num_tokens / result.seconds,
                "epsilon": epsilon,
                **({} if score is None else {"validation_score": score}),
            }
            run.log_metrics(values)
            if log is not None:
                log(values)
            if stopping is not None and has_stopped and number < planned:
                kept = f"the weights of step {stopping.best_step or number} are kept"
                paid = "" if ledger is None else "; its whole epsilon is charged, since data decided when"
                _logger.warning("training ends early, at step %d of %d; %s%s.", number, planned, kept, paid)
                break


def _charged(ledger: Ledger) -> dict[str, Any]:
    return {"steps_charged": ledger.steps_charged, "writers": ledger.state.writers}


def _refuse_other_ledger(ledger: Ledger, saved: SavedState | None) -> None:
    """A ledger without the steps that the saved training paid for was lost, cut or replaced."""
    if saved is not None and ledger.steps_charged < saved.steps_charged:
        raise PrivacyError(
            f"{ledger.path} holds {ledger.steps_charged} steps, but the saved training state had paid for "
            f"{saved.steps_charged}: the ledger was lost or shortened, so epsilon would be too low. Restore "
            "the ledger, or start a new run in another folder (its epsilon adds to this one's)."
        )
    if saved is not None and not ledger.state.writers.issuperset(saved.writers):
        raise PrivacyError(
            f"{ledger.path} is the ledger of another run: steps that the saved training state had paid for "
            "are not in it. Restore the ledger, or start a new run in another folder (its epsilon adds to "
            "this one's)."
        )


def _sealer(access: Access, saved: SavedState | None) -> Sealer:
    if saved is None:
        return access.sealer()
    return access.sealer(lineage=saved.lineage, generation=saved.next_generation)


def _fingerprint(parameter: Tensor) -> int:
    """Sum the bits of a parameter."""
    return int(parameter.detach().view(torch.int32).sum())


def _moved(start: Mapping[str, int], end: Mapping[str, int]) -> bool:
    """Say whether a parameter moved that cannot stay as it is; of adapters, those that start at zero."""
    starts_at_zero = [name for name in start if "lora_B" in name]
    return any(start[name] != end[name] for name in starts_at_zero or start)


def _metadata(subject: str, recipe: Recipe, base: BaseModel) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "subject": subject,
        "task": recipe.task,
        "method": recipe.training.method,
        "recipe_digest": recipe_digest(recipe),
        "base": {"name": base.name, "digest": base.digest, "dtype": str(base.dtype).removeprefix("torch.")},
    }
    if recipe.task == "classify":
        metadata |= {
            "prompt": recipe.data.prompt,
            "labels": list(recipe.data.labels),
            "label_words": recipe.data.words,
        }
    return metadata
