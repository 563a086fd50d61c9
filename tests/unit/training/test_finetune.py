"""Early stopping in a whole training: what is charged, what is kept, what a killed run goes on from."""

import json

import pytest
import torch
from safetensors.torch import load

from securetune.config.loader import load_recipe
from securetune.errors import PrivacyError
from securetune.models.base import load_base
from securetune.privacy.accounting import epsilon_spent
from securetune.privacy.adaptive_clipping import AdaptiveClipping
from securetune.privacy.ledger import read_ledger
from securetune.training import finetune
from securetune.training.access import prepare_access
from securetune.training.folder import RunFolder
from securetune.training.plan import make_plan
from securetune.training.prepare import prepare_data
from tests.sample_run import RECIPE, STEPS, make_workshop, write_recipe
from tests.tiny import tiny_tokenizer

NOISY = {"method": "noisy_test", "epsilon": 2.0, "every": 1, "patience": 2, "num_texts": 30}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return make_workshop(tmp_path_factory.mktemp("workshop"))


class Run:
    """One run folder, trained in one or several goes with scores that the test decides."""

    def __init__(self, workshop, monkeypatch, name, *, stopping=NOISY, **changes):
        training = {"learning_rate": 0.01, "lora": {"rank": 2, "alpha": 4, "dropout": 0.1}}
        training |= {"label_smoothing": 0.1, "weight_decay": 0.01, "early_stopping": stopping}
        data = {"labels": ["negative", "positive"], "held_out_fraction": 0.3, "min_held_out": 90}
        data["private"] = {"path": str(workshop / "labelled.jsonl")}
        changes = {"training": training, "data": data, "publish": {"release_epsilon": 4.0}} | changes
        self.recipe = load_recipe(write_recipe(workshop, name, **changes))
        self.monkeypatch = monkeypatch
        self.kept: dict[int, torch.Tensor] = {}

    def go(self, scores=None, *, subject="hardened", kill_after=None):
        if scores is not None:
            remaining = iter(scores)
            self.monkeypatch.setattr(finetune, "make_score", lambda *_: lambda: next(remaining))

        def log(values):
            if values["step"] == kill_after:
                raise Killed

        with RunFolder.open(self.recipe, resume=True) as run:
            access = prepare_access(self.recipe, run)
            base = load_base(self.recipe.model)
            data = prepare_data(self.recipe, run, base.tokenizer)
            self.plan = make_plan(self.recipe, base=base, tokens_per_record=data.mean_tokens)
            noting = self._note(finetune.EarlyStopping.check)
            self.monkeypatch.setattr(finetune.EarlyStopping, "check", noting)
            try:
                finetune.fine_tune(subject, self.recipe, run, access, data, self.plan, log=log)
            finally:
                self.monkeypatch.undo()
            with access.open(finetune.checkpoint_of(run, subject)) as vault:
                kind, name = "adapter", "adapter_model.safetensors"
                if self.recipe.training.method == "full":
                    kind, name = "weights", "model.safetensors"
                files = load(vault.read(kind, name))
        self.run = run
        return torch.cat([files[name].flatten() for name in sorted(files)])

    def _note(self, check):
        def noting(stopping, step):
            score = check(stopping, step)
            self.kept[step] = torch.cat(list(stopping._params)).clone()
            return score

        return noting

    @property
    def steps(self):
        return [line["step"] for line in self.run.read_metrics() if line["stage"] == "hardened"]

    @property
    def ledger(self):
        return read_ledger(self.run.ledger)


def same_numbers(sealed, flat):
    """The same numbers, whatever the order of the matrices."""
    return torch.equal(sealed.sort().values, flat.sort().values)


def test_stopping_early_keeps_the_best_adapters_and_costs_the_planned_epsilon(workshop, monkeypatch, caplog):
    run = Run(workshop, monkeypatch, "stopped")
    sealed = run.go([0.5, 0.4, 0.3])
    assert run.steps == [1, 2, 3]
    assert same_numbers(sealed, run.kept[1])
    assert not same_numbers(sealed, run.kept[3])
    state, spec = run.ledger, run.plan.privacy.spec
    assert state.steps_charged == state.header.planned_steps == STEPS
    planned = epsilon_spent(run.plan.privacy.noise_multiplier, spec.sample_rate, STEPS, spec.delta)
    assert state.epsilon() == pytest.approx(planned) == pytest.approx(run.plan.privacy.epsilon)
    last = run.run.read_metrics()[-1]
    assert (last["step"], last["epsilon"]) == (3, pytest.approx(planned))
    assert "at step 3 of 5; the weights of step 1 are kept; its whole epsilon is charged" in caplog.text


def test_all_tests_are_charged_before_the_first_step_and_the_release_after(workshop, monkeypatch):
    run = Run(workshop, monkeypatch, "charged")
    run.go([0.1, 0.2, 0.3, 0.4, 0.5])
    assert run.steps == [1, 2, 3, 4, 5]
    lines = [json.loads(line) for line in run.run.ledger.read_text().splitlines()[1:]]
    assert lines[0] == {"release_epsilon": 2.0}
    assert lines[-1] == {"release_epsilon": 4.0}
    assert run.ledger.release_epsilons == (2.0, 4.0)
    assert run.ledger.total_epsilon() == max(run.ledger.epsilon(), 6.0)


def test_a_killed_run_goes_on_counting_from_what_it_saved(workshop, monkeypatch):
    run = Run(workshop, monkeypatch, "killed")
    with pytest.raises(Killed):
        run.go([0.5, 0.4], kill_after=2)
    best = run.kept[1]
    sealed = run.go([0.3])  # the second check without a gain: a third would raise StopIteration
    assert run.steps == [1, 2, 3]
    assert same_numbers(sealed, best)
    assert run.ledger.steps_charged == STEPS
    assert run.ledger.release_epsilons == (2.0, 4.0)


def test_a_run_killed_while_it_stops_trains_no_further_step(workshop, monkeypatch):
    run = Run(workshop, monkeypatch, "stopping")

    def die(_ledger):
        raise Killed

    monkeypatch.setattr(finetune, "_charge_remaining_steps", die)
    with pytest.raises(Killed):
        run.go([0.5, 0.4, 0.3])
    best = run.kept.pop(1)
    sealed = run.go([])
    assert run.kept.keys() == {2, 3}
    assert same_numbers(sealed, best)
    assert run.ledger.steps_charged == STEPS


def test_real_noisy_tests_and_the_plain_model_without_any(workshop, monkeypatch):
    run = Run(workshop, monkeypatch, "real")
    run.go()
    scores = [line["validation_score"] for line in run.run.read_metrics()]
    assert all(0 <= score <= 1 for score in scores)
    assert run.ledger.steps_charged == STEPS
    run.go(subject="plain")
    plain = [line for line in run.run.read_metrics() if line["stage"] == "plain"]
    assert [line["step"] for line in plain] == [1, 2, 3, 4, 5]
    assert not any("validation_score" in line for line in plain)
    assert run.ledger.release_epsilons == (2.0, 4.0)


def test_public_validation_charges_no_release(workshop, monkeypatch):
    public = workshop / "public.jsonl"
    rows = [{"text": f"a public text {i}", "label": ("negative", "positive")[i % 2]} for i in range(8)]
    public.write_text("\n".join(map(json.dumps, rows)))
    data = {"labels": ["negative", "positive"], "held_out_fraction": 0.3}
    data |= {
        "private": {"path": str(workshop / "labelled.jsonl")},
        "public_validation": {"path": str(public)},
    }
    stopping = {"method": "public_validation", "every": 2, "patience": 1}
    run = Run(workshop, monkeypatch, "public", stopping=stopping, data=data, publish={})
    run.go()
    assert run.ledger.release_epsilons == ()
    assert run.ledger.steps_charged == STEPS
    checked = [line["step"] for line in run.run.read_metrics() if "validation_score" in line]
    assert set(checked) <= {2, 4, 5}
    assert len(checked) >= 2


def test_private_validation_is_for_runs_without_privacy(workshop, monkeypatch):
    stopping = {**NOISY, "method": "private_validation", "epsilon": None}
    privacy = {**RECIPE["privacy"], "enabled": False}
    run = Run(workshop, monkeypatch, "open", stopping=stopping, privacy=privacy, publish={}, gate={})
    run.go([0.5, 0.4, 0.3])
    assert run.steps == [1, 2, 3]
    assert not run.run.ledger.exists()


def test_training_without_early_stopping_is_as_it_was(workshop, monkeypatch):
    run = Run(workshop, monkeypatch, "off", stopping={"method": "none"})
    run.go()
    assert run.steps == [1, 2, 3, 4, 5]
    assert run.ledger.release_epsilons == (4.0,)
    assert not any("validation_score" in line for line in run.run.read_metrics())


@pytest.mark.parametrize(
    ("sampling", "relation"),
    [
        ({"sampling": "truncated_poisson", "max_batch_size": 60}, "zero out one"),
        ({"sampling": "fixed_size", "sample_rate": 48 / 400}, "replace one"),
    ],
)
def test_samplers_with_a_public_number_of_places(workshop, monkeypatch, sampling, relation):
    privacy = {**RECIPE["privacy"], "num_units": 400, **sampling}
    name = sampling["sampling"]
    run = Run(workshop, monkeypatch, name, stopping={"method": "none"}, privacy=privacy, publish={})
    run.go()
    header = run.ledger.header
    assert (header.num_records, header.neighbouring_relation) == (400, relation)
    assert run.ledger.epsilon() <= 8.0
    drawn = [line["num_samples"] for line in run.run.read_metrics()]
    assert max(drawn) <= header.max_batch_size


def test_a_resumed_run_goes_on_with_the_thresholds_it_had_learned(workshop, monkeypatch):
    privacy = {**RECIPE["privacy"], "clipping": {"mode": "adaptive"}}
    run = Run(workshop, monkeypatch, "adaptive", stopping={"method": "none"}, privacy=privacy, publish={})
    loaded = []
    load_state = AdaptiveClipping.load_state_dict

    def noting(clipping, state):
        loaded.append(state["thresholds"])
        load_state(clipping, state)

    with pytest.raises(Killed):
        run.go(kill_after=2)
    monkeypatch.setattr(AdaptiveClipping, "load_state_dict", noting)
    run.go()
    (thresholds,) = loaded
    assert thresholds["all"] != 1.0
    assert run.steps == [1, 2, 3, 4, 5]
    assert run.ledger.header.clipping == "adaptive"
    assert run.ledger.epsilon() <= 8.0
    assert all(0 <= line["clipped_fraction"] <= 1 for line in run.run.read_metrics())


FACTORED = {
    **RECIPE["privacy"],
    "noise": "matrix_factorization",
    "sampling": "fixed_order",
    "sample_rate": 0.2,
    "noise_bands": 3,
}


def test_a_run_with_correlated_noise_is_charged_once(workshop, monkeypatch):
    run = Run(workshop, monkeypatch, "factored", stopping={"method": "none"}, privacy=FACTORED, publish={})
    run.go()
    run.go(subject="plain")
    assert run.steps == [1, 2, 3, 4, 5]
    header = run.ledger.header
    assert (run.ledger.steps_charged, header.planned_steps, header.sampler) == (1, 1, "fixed order")
    assert run.ledger.epsilon() == pytest.approx(run.plan.privacy.epsilon)
    assert run.ledger.epsilon() <= 8.0
    drawn = [line["num_samples"] for line in run.run.read_metrics() if line["stage"] == "hardened"]
    assert sum(drawn) == len(set(drawn_records(run)))  # in one epoch of five batches each record once
    said = run.plan.to_dict()["privacy"]
    assert (said["steps"], said["charges"]) == (STEPS, 1)
    assert "correlated over 3 of the 5 steps" in said["noise_statement"]


def drawn_records(run):
    with RunFolder.open(run.recipe, resume=True) as folder:
        return [example.unit_id for example in prepare_data(run.recipe, folder, tiny_tokenizer()).train]


def test_a_killed_run_with_correlated_noise_goes_on_in_a_planned_mechanism(workshop, monkeypatch):
    privacy = {**FACTORED, "planned_resumptions": 1}
    run = Run(workshop, monkeypatch, "resumed", stopping={"method": "none"}, privacy=privacy, publish={})
    with pytest.raises(Killed):
        run.go(kill_after=2)
    one = read_ledger(run.recipe.run_folder / "ledger.jsonl").epsilon()
    run.go()
    assert run.steps == [1, 2, 3, 4, 5]
    assert run.ledger.steps_charged == 2
    assert run.ledger.epsilon() == pytest.approx(run.plan.privacy.epsilon)
    assert one < run.ledger.epsilon()


def test_a_killed_run_with_no_planned_resumption_is_refused_with_the_remedy(workshop, monkeypatch):
    run = Run(workshop, monkeypatch, "unplanned", stopping={"method": "none"}, privacy=FACTORED, publish={})
    with pytest.raises(Killed):
        run.go(kill_after=2)
    with pytest.raises(PrivacyError, match=r"privacy\.planned_resumptions = 0 of them are paid for"):
        run.go()


def test_correlated_noise_that_stops_early_charges_no_resumption(workshop, monkeypatch):
    privacy = {**FACTORED, "planned_resumptions": 1}
    run = Run(workshop, monkeypatch, "early", privacy=privacy)
    run.go([0.5, 0.4, 0.3])
    assert run.steps == [1, 2, 3]
    assert run.ledger.steps_charged == 1


FULL = {
    "method": "full",
    "learning_rate": 0.003,
    "label_smoothing": 0.1,
    "gradient_checkpointing": True,
    "passes": 2,
}


def test_a_killed_training_in_full_goes_on_and_keeps_the_best_weights(workshop, monkeypatch):
    run = Run(workshop, monkeypatch, "full", training={**FULL, "early_stopping": NOISY})
    with pytest.raises(Killed):
        run.go([0.5, 0.4], kill_after=2)
    best = run.kept[1]
    assert best.numel() == sum(p.numel() for p in load_base(run.recipe.model).model.parameters())
    seen = []
    load_state = finetune.load_state

    def noting(folder, access, shards, **options):
        saved = load_state(folder, access, shards, **options)
        ((_, arrays),) = shards.owned()
        seen.append((saved.steps_done, arrays["params"].clone()))
        return saved

    monkeypatch.setattr(finetune, "load_state", noting)
    sealed = run.go([0.3])
    ((steps_done, resumed),) = seen
    assert steps_done == 2
    assert torch.equal(resumed, run.kept[2])
    assert run.steps == [1, 2, 3]
    assert same_numbers(sealed, best)
    assert run.ledger.steps_charged == STEPS


def test_an_attack_after_a_resumption_is_as_long_as_before(workshop, monkeypatch):
    run = Run(workshop, monkeypatch, "unit", training=FULL, publish={})
    units = []
    make = finetune.Adversary

    def noting(*args, **options):
        units.append(make(*args, **options))
        return units[-1]

    monkeypatch.setattr(finetune, "Adversary", noting)
    with pytest.raises(Killed):
        run.go(kill_after=3)
    monkeypatch.setattr(finetune, "Adversary", noting)
    run.go()
    first, second = (adversary._unit for adversary in units)
    assert first == second


@pytest.mark.parametrize("training", [{"lora": {"rank": 2}}, {"method": "full"}])
def test_a_training_that_moves_nothing_is_refused(workshop, monkeypatch, training):
    privacy = {**RECIPE["privacy"], "enabled": False}
    still = {**training, "learning_rate": 1e-60}
    name = f"still-{len(training)}-{training.get('method', 'lora')}"
    run = Run(workshop, monkeypatch, name, training=still, privacy=privacy, publish={}, gate={})
    with pytest.raises(PrivacyError, match="what is trained did not move: nothing was learnt"):
        run.go()
