"""Shared by the tests of training."""

import functools

import pytest

from securetune.privacy.accounting import plan_privacy


@pytest.fixture(scope="module")
def calibrated_once():
    """The same plan is asked for again and again; each takes about a second."""
    patch = pytest.MonkeyPatch()
    patch.setattr("securetune.privacy.private.plan_privacy", functools.cache(plan_privacy))
    yield
    patch.undo()
