"""Users as the privacy unit: one clip for all records of a user, whole users held out."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from securetune.config.loader import load_recipe
from securetune.data.collate import collate
from securetune.errors import DataError, PrivacyError
from securetune.models.base import load_base
from securetune.privacy.clipping import ROUNDING_EXCESS, FlatClipping
from securetune.privacy.ledger import Ledger, LedgerHeader, read_ledger
from securetune.privacy.matrix_factorization import MatrixMechanism
from securetune.privacy.noise import NoiseSource
from securetune.privacy.participation import EpochOrderSampler
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.sampling import PoissonSampler
from securetune.privacy.step import PrivateStep
from securetune.privacy.units import UserSampler
from securetune.training.access import prepare_access
from securetune.training.evaluate import _texts
from securetune.training.finetune import fine_tune
from securetune.training.folder import RunFolder
from securetune.training.loop import Trainer
from securetune.training.plan import make_plan
from securetune.training.prepare import prepare_data
from tests.sample_run import RECIPE, STEPS, make_workshop, write_recipe
from tests.tiny import tiny_tokenizer
from tests.unit.training.tiny_head import make_examples, make_head

PRIVACY = {
    **RECIPE["privacy"],
    "unit": "user",
    "max_records_per_user": 3,
    "expected_batch_size": 20,
    "sample_rate": 0.2,
}
SHARED = "everybody wrote this"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = make_workshop(tmp_path_factory.mktemp("workshop"))
    rng = random.Random(1)
    rows = [
        {"text": f"text {number} of {user}", "label": rng.choice(["negative", "positive"]), "author": user}
        for user in range(140)
        for number in range(1 + user % 5)
    ]
    rows += [{"text": SHARED, "label": "positive", "author": user} for user in range(140, 170)]
    (folder / "users.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe_of(workshop, name, *, privacy=PRIVACY, **changes):
    data = {"labels": ["negative", "positive"], "held_out_fraction": 0.3, "user_field": "author"}
    data |= {"private": {"path": str(workshop / "users.jsonl")}} | changes
    evaluation = {**RECIPE["evaluation"], "num_texts": 30, "num_attacked": 10, "num_membership": 100}
    return load_recipe(
        write_recipe(workshop, name, data=data, privacy=privacy, evaluation=evaluation, publish={})
    )


def prepare(recipe):
    with RunFolder.open(recipe, resume=True) as run:
        (run.keys / "split.key").write_text("0" * 64)  # of the tosses some leave no user on one of the sides
        return prepare_data(recipe, run, tiny_tokenizer())


def test_no_user_is_on_both_sides_and_one_record_of_each_is_measured(workshop):
    data = prepare(recipe_of(workshop, "sides"))
    trained = {example.user_id for example in data.train}
    held_out = [example.user_id for example in data.held_out]
    assert not trained & set(held_out)
    assert len(set(held_out)) == len(held_out) >= 20
    assert len(trained) + len(held_out) == 170
    assert len(data.train) + data.num_held_out == data.records > 170
    members = [example.user_id for example in data.members]
    assert len(set(members)) == len(members) == 50
    assert set(members) <= trained


def test_a_text_of_a_trained_and_a_held_out_user_is_neither_member_nor_non_member(workshop, caplog):
    recipe = recipe_of(workshop, "shared")
    data = prepare(recipe)
    assert data.shared
    assert "have a text that a training user has too" in caplog.text
    tokens = next(
        example.input_ids for example in data.held_out if example.unit_id in data.shared
    )  # all of them say the same
    assert all(example.input_ids != tokens for example in data.members)
    texts = _texts(recipe, data)
    assert any(example.input_ids == tokens for example in texts.scored)  # accuracy may still be measured
    assert all(example.input_ids != tokens for example in texts.non_members)
    assert len(texts.non_members) == texts.num_non_members - len(texts.left_out) < texts.num_non_members


def test_too_few_held_out_users_are_refused_though_there_are_records_enough(workshop):
    with pytest.raises(DataError, match=r"\d+ users are held out .* fewer than data\.min_held_out = 90"):
        prepare(recipe_of(workshop, "few", min_held_out=90))


def test_fewer_users_than_a_batch_are_refused(workshop):
    privacy = {**PRIVACY, "expected_batch_size": 160, "sample_rate": 0.9}
    with pytest.raises(DataError, match=r"training users, fewer than privacy\.expected_batch_size = 160"):
        prepare(recipe_of(workshop, "small", privacy=privacy))


THRESHOLD = 0.01


class Users:
    """Twelve examples of four users, with a private step that tells what it was given."""

    def __init__(self, folder, *, micro=64, cap=3, noise_multiplier=1.0, without=None, order=None):
        self.head = make_head()
        users = [f"user{index % 4}" for index in range(12)]
        self.examples = [
            replace(example, user_id=user)
            for user, example in zip(users, make_examples(12), strict=True)
            if user != without
        ]
        grads = PerSampleGradients(self.head.model)
        header = LedgerHeader(
            unit="user",
            max_records_per_unit=cap,
            noise_multiplier=noise_multiplier,
            sample_rate=1.0,
            max_grad_norm=THRESHOLD,
            delta=1e-3,
            expected_batch_size=4,
            planned_steps=20,
            reportable_epsilon=False,
        )
        self.step = PrivateStep(
            grads,
            torch.optim.SGD([grads.flat_params], lr=0.0),
            clipping=FlatClipping(THRESHOLD),
            noise_multiplier=noise_multiplier,
            expected_batch_size=4,
            noise=NoiseSource(key=bytes(32)),
            ledger=Ledger(folder / "ledger.jsonl", header),
        )
        self.sampler = UserSampler(
            [example.user_id or "" for example in self.examples],
            order or PoissonSampler(4, 1.0, key=bytes(32)),
            max_records_per_user=cap,
            key=bytes(32),
        )
        self.calls = []
        self.sums = []
        accumulate, finish = self.step.accumulate, self.step.finish
        self.step.accumulate = lambda losses, ids=None, **options: (
            self.calls.append(ids) or accumulate(losses, ids, **options)
        )
        self.step.finish = lambda *totals: self.sums.append(self.step.summed.clone()) or finish(*totals)
        self.trainer = Trainer(self.head, self.step, self.sampler, self.examples, micro_batch_tokens=micro)


def true_gradient(users, user):
    """By autograd, in float64: the sum over a user's records, clipped to the threshold."""
    head = make_head()
    parameters = dict(head.model.named_parameters())
    batch = collate([example for example in users.examples if example.user_id == f"user{user}"])
    loss = head.losses(head.embed(batch), batch).sum()
    names = [place.name for place in users.step.grads.parameters]
    grads = torch.autograd.grad(loss, [parameters[name] for name in names])
    flat = torch.cat([gradient.flatten() for gradient in grads])
    return flat * (THRESHOLD / flat.norm())


@pytest.mark.parametrize("micro", [1, 40, 64, 1000])
def test_records_of_a_user_come_in_one_micro_batch_and_are_clipped_once(tmp_path, micro):
    users = Users(tmp_path, micro=micro)
    result = users.trainer.run_step(1)
    assert result.num_samples == 12
    assert result.clipped_fraction == 1.0
    seen = [user for ids in users.calls for user in set(ids)]
    assert sorted(seen) == ["user0", "user1", "user2", "user3"]  # each in one micro-batch only
    expected = torch.zeros_like(users.sums[0])
    for user in range(4):
        expected += true_gradient(users, user).to(expected)
    torch.testing.assert_close(users.sums[0], expected, rtol=1e-4, atol=1e-7)


def test_a_user_in_a_fixed_order_moves_the_whole_mechanism_by_its_sensitivity(tmp_path):
    """All steps' sums with and without the last user, times the matrix that the noise is calibrated for."""
    steps, batches = 10, 3
    both = []
    for name, without in (("with", None), ("without", "user3")):
        order = EpochOrderSampler(3 if without else 4, batches, steps=steps, key=bytes(32))
        (tmp_path / name).mkdir()
        users = Users(tmp_path / name, without=without, order=order)
        for number in range(1, steps + 1):
            users.trainer.run_step(number)
        both.append((torch.stack(users.sums).double(), users))
    (present, users), (absent, _) = both
    own = [step for step in range(steps) if (present[step] - absent[step]).any()]
    assert own == list(range(own[0], steps, batches))
    truth = true_gradient(users, 3)
    for step in own:
        torch.testing.assert_close(present[step] - absent[step], truth, rtol=1e-4, atol=1e-7)
    mechanism = MatrixMechanism(participation=users.sampler.participation, bands=4)
    lag = np.subtract.outer(np.arange(steps), np.arange(steps))
    matrix = torch.from_numpy(np.where(lag >= 0, mechanism.strategy_coefficients[abs(lag)], 0.0))
    moved = float((matrix @ (present - absent)).norm())
    assert moved == pytest.approx(float(matrix[:, own].sum(dim=1).norm()) * THRESHOLD, rel=1e-4)
    assert moved <= mechanism.sensitivity * THRESHOLD * (1 + ROUNDING_EXCESS)
    first = float(matrix[:, ::batches].sum(dim=1).norm()) * THRESHOLD  # of a user of the first batch
    assert mechanism.sensitivity * THRESHOLD == pytest.approx(first, rel=1e-9)


def test_a_cap_takes_that_many_records_of_each_user(tmp_path):
    users = Users(tmp_path, cap=2)
    assert users.trainer.run_step(1).num_samples == 8
    assert users.sums[0].norm() <= 4 * THRESHOLD * (1 + ROUNDING_EXCESS)


def test_a_user_in_two_micro_batches_is_refused(tmp_path):
    users = Users(tmp_path)
    batch = collate(users.examples[:1])
    for expected in (None, "in two micro-batches of one step"):
        losses = users.head.losses(users.head.embed(batch), batch)
        if expected is None:
            users.step.accumulate(losses, ["user0"])
        else:
            with pytest.raises(PrivacyError, match=expected):
                users.step.accumulate(losses, ["user0"])


@pytest.mark.parametrize(
    ("sampling", "relation", "charges"),
    [
        ({}, "add or remove one", STEPS),
        ({"sampling": "truncated_poisson", "num_units": 170, "max_batch_size": 30}, "zero out one", STEPS),
        ({"sampling": "fixed_order", "noise": "matrix_factorization"}, "add or remove one", 1),
    ],
    ids=["poisson", "truncated", "fixed order"],
)
def test_a_whole_training_speaks_of_users(workshop, sampling, relation, charges):
    recipe = recipe_of(workshop, f"run{len(sampling)}", privacy={**PRIVACY, **sampling})
    with RunFolder.open(recipe, resume=False) as run:
        access = prepare_access(recipe, run)
        base = load_base(recipe.model)
        data = prepare_data(recipe, run, base.tokenizer)
        plan = make_plan(recipe, base=base, tokens_per_record=data.mean_tokens)
        for subject in ("plain", "hardened"):
            fine_tune(subject, recipe, run, access, data, plan)
        state = read_ledger(run.ledger)
        said = plan.to_dict()["privacy"]
    assert state.steps_charged == charges
    assert state.header.unit == "user"
    assert state.header.unit_statement == said["unit"]
    assert said["unit"].startswith("one user, with up to 3 records in a step, ")
    assert said["neighbouring_relation"] == f"{relation} user"
    assert "up to 3 records of each" in said["sampling_statement"]
    assert "each user's gradient" in said["clipping_statement"]
    assert state.epsilon() <= 8.0
