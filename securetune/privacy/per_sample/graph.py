"""What a backward pass of losses would reach, as their graph tells.

Reentrant checkpointing hides what it runs again.

Dimensions: ``B`` samples.
"""

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.paths import path_of

# What reshape() leaves in a graph: which of these depends on strides and sizes alone.
_RESHAPES = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "CloneBackward0"}


class Reached(NamedTuple):
    """What a backward pass would reach.

    Attributes:
        leaves: Tensors that would get a gradient.
        layers: Names of the layers whose paths would record.
        operations: How often each kind of operation is in the graph.
    """

    leaves: list[Tensor]
    layers: set[str]
    operations: Counter[str]

    @property
    def graph(self) -> int:
        """A number that is the same for graphs of the same operations, however they are reshaped."""
        return hash(frozenset(item for item in self.operations.items() if item[0] not in _RESHAPES))


def reached_by(losses: Tensor) -> Reached:
    """Walk through a graph, about 0.5 microseconds for each of its nodes.

    Args:
        losses: ``[B]``, attached to their graph.

    Returns:
        What their backward pass would reach.
    """
    reached = Reached([], set(), Counter())
    waiting, seen = [losses.grad_fn], {losses.grad_fn, None}
    while waiting:
        node = waiting.pop()
        reached.operations[type(node).__name__] += 1
        path = path_of(node)
        if path is not None:
            reached.layers.add(path.name)
        children = () if node is None else node.next_functions
        if not children and isinstance(leaf := getattr(node, "variable", None), Tensor):
            reached.leaves.append(leaf)
        for child, _ in children:
            if child not in seen:
                seen.add(child)
                waiting.append(child)
    return reached


@contextlib.contextmanager
def refuse_used_up() -> Iterator[None]:
    """Explain a graph that a backward pass used up before.

    Raises:
        PrivacyError: If the backward pass inside meets one.
    """
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise PrivacyError(
                "the losses reach the graph of a micro-batch that was differentiated before: the same losses "
                "were given twice, or a state was carried over, so that records of several batches mix. "
                "Compute losses for each micro-batch, and start or detach() states in each."
            ) from error
        if "backward an extra time" in str(error):
            raise PrivacyError(
                "selective activation checkpointing allows one backward pass, and the proof that samples are "
                "not coupled needs several. Use checkpoint(...) without context_fn."
            ) from error
        raise


def refuse_outside(
    leaves: Collection[Tensor], num_samples: int, model: nn.Module, known: Collection[int]
) -> None:
    """Refuse losses whose backward pass would give others than the trainable parameters a gradient.

    Such a gradient is neither clipped nor noised, and another optimizer may use it. Inputs that require
    gradients are no parameters and have one row per sample, or many dimensions, as T5's attention biases
    under checkpointing.

    Args:
        leaves: What would get a gradient.
        num_samples: ``B``, at least 1.
        model: The private model.
        known: Ids of the parameters that the engine knows.

    Raises:
        PrivacyError: If there is one; the message names it.
    """
    for leaf in leaves:
        is_input = not isinstance(leaf, nn.Parameter) and (
            leaf.ndim > 2 or any(size % num_samples == 0 for size in leaf.shape)
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
