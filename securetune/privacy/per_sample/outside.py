"""What else a loss would train: leaves of its graph that are no parameters of the private model.

Dimensions: ``B`` samples.
"""

from collections.abc import Collection, Iterator

from torch import Tensor, nn

from securetune.errors import PrivacyError


def refuse_outside(losses: Tensor, model: nn.Module, known: Collection[int]) -> None:
    """Refuse a loss whose backward pass would give others than the trainable parameters a gradient.

    Such a gradient is neither clipped nor noised, and another optimizer may use it. Inputs that require
    gradients have one row per sample and are no parameters. Reentrant checkpointing hides what it runs.

    Args:
        losses: ``[B]``, attached to their graph.
        model: The private model.
        known: Ids of the parameters that the engine knows.

    Raises:
        PrivacyError: If there is one; the message names it.
    """
    for leaf in _leaves(losses):
        is_input = not isinstance(leaf, nn.Parameter) and (
            not leaf.numel() or any(size and size % len(losses) == 0 for size in leaf.shape[:2])
        )
        if id(leaf) in known or is_input:
            continue
        names = [name for name, parameter in model.named_parameters() if parameter is leaf]
        if names:
            raise PrivacyError(
                f"{names[0]} joined the model after PerSampleGradients was made: its gradient is neither "
                "clipped nor noised. Add all layers first, or freeze it (requires_grad_(False))."
            )
        raise PrivacyError(
            f"the losses train a tensor of shape {list(leaf.shape)} that is outside of the model: its "
            "gradient is neither clipped nor noised. Make one model of all that trains, each tensor used by "
            "the module that owns it (nn.ModuleDict(...) before make_private), or freeze it "
            "(requires_grad_(False))."
        )


def _leaves(losses: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a backward pass would accumulate gradients for."""
    waiting, seen = [losses.grad_fn], {losses.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if not node.next_functions and isinstance(leaf := getattr(node, "variable", None), Tensor):
            yield leaf
        for child, _ in node.next_functions:
            if child not in seen:
                seen.add(child)
                waiting.append(child)
