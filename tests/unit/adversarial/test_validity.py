"""Objectives that couple samples are refused under privacy, with the reason."""

import pytest

from securetune.adversarial.validity import (
    OBJECTIVES,
    Coupling,
    Objective,
    find_objective,
    require_private_training_allows,
)
from securetune.errors import PrivacyError


@pytest.mark.parametrize("name", ["none", "fgsm", "pgd"])
def test_per_sample_objectives_are_allowed(name):
    require_private_training_allows(find_objective(name))


@pytest.mark.parametrize(
    "objective", [o for o in OBJECTIVES.values() if o.coupling is not Coupling.NONE], ids=lambda o: o.name
)
def test_coupled_objective_is_refused_with_reason_and_remedy(objective):
    with pytest.raises(PrivacyError) as error:
        require_private_training_allows(objective)
    assert objective.reason
    for part in (objective.name, objective.reason, objective.coupling.value, "privacy.enabled"):
        assert part in str(error.value)


def test_objective_declared_elsewhere_is_judged_by_its_coupling():
    with pytest.raises(PrivacyError, match="all in one"):
        require_private_training_allows(Objective("mine", Coupling.BATCH_STATISTIC, "all in one"))


def test_unknown_objective_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"adversarial\.method must be one of .*fgsm.*got 'fgms'"):
        find_objective("fgms")
