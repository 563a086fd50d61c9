import copy

import pytest
import torch
from torch import nn

from securetune.adversarial.embedding import attack_mode
from securetune.errors import ConfigError
from securetune.models.checkpointing import checkpoint_layers
from tests.tiny import tiny_llama

EMBEDS = torch.randn(3, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(model):
    """Output, gradient of the input, and bytes kept for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    embeds = EMBEDS.clone().requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
    (grad,) = torch.autograd.grad(hidden.square().sum(), embeds)
    return hidden, grad, sum(kept.values())


@pytest.mark.parametrize("is_attacked", [False, True])
def test_results_are_the_same_and_less_is_kept_in_evaluation_mode(is_attacked):
    model = tiny_llama(dtype=torch.float64, num_hidden_layers=4)
    checkpointed = copy.deepcopy(model)
    checkpoint_layers(checkpointed)
    if is_attacked:
        with attack_mode(model), attack_mode(checkpointed):
            expected, found = run(model), run(checkpointed)
    else:
        expected, found = run(model), run(checkpointed)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-12)
    assert found[2] < 0.5 * expected[2]
    assert not any(module.training for module in checkpointed.modules())


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ConfigError, match=r"training\.gradient_checkpointing: Sequential has no layers"):
        checkpoint_layers(nn.Sequential(nn.Linear(2, 2)))
