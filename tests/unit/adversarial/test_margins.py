"""Margins: the sign says whether the model is right, ties and broken scores are mistakes."""

import math

import pytest
import torch

from securetune.adversarial.margins import label_margins


def test_margin_is_the_lead_over_the_best_wrong_label():
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, -1.0, 4.0]])
    assert label_margins(scores, torch.tensor([0, 1])).tolist() == [1.0, -5.0]


def test_tie_is_not_a_lead():
    assert label_margins(torch.tensor([[1.0, 1.0]]), torch.tensor([0])).item() == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_score_that_is_not_finite_gives_nan_for_its_sample_alone(bad):
    margins = label_margins(torch.tensor([[1.0, bad], [1.0, 0.0]]), torch.tensor([0, 0]))
    assert margins.isnan().tolist() == [True, False]


def test_gradient_reaches_the_label_and_its_best_rival():
    scores = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    label_margins(scores, torch.tensor([0])).sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[1.0, 0.0, -1.0]]


def test_single_label_is_refused():
    with pytest.raises(ValueError, match=r"\[B, C >= 2\] and labels \[B\], got \(3, 1\) and \(3,\)"):
        label_margins(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))
