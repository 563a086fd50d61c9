"""The proof that no sample's loss depends on another sample, in extra passes over a batch now and then."""

import logging
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from securetune.errors import PrivacyError

_logger = logging.getLogger(__name__)

# whether the model trains, the rows that it gets for each sample, and the layers whose rows the data may
# choose, None of these where they do
State = tuple[bool, float, frozenset[tuple[str, int]] | None]
Layer = tuple[str, bool]  # its name, and whether reentrant checkpointing may hide it
Differentiate = Callable[[Tensor], None]
_MOST_GRAPHS = 16  # where no graph is like another, each would be proven
_FIRST_SPLIT = 16  # later ones cost 2 passes each time that the number of batches has doubled


class IsolationProof:
    """Prove that no sample's loss reaches another's rows.

    Each pass differentiates the samples whose number has one bit set, or not set, so that every pair is told
    apart. It is done again for another state of the model, for losses of other operations, and for each batch
    where the data choose the rows of a layer; a batch without any finite gradient proves nothing. Neither
    does a layer's gradient that is zero, as below weights that start at zero: such a layer is silent, and its
    first gradient asks for another proof. The batches 16, 32, 64 and so on after a proof are split at random:
    samples that the model sorts may have come sorted.
    """

    def __init__(self) -> None:
        self._differentiated: Tensor | None = None  # [B], bool: whose losses the running pass differentiates
        self._batches: dict[State, int] = {}  # since the proof of each state
        self._isolated: set[tuple[bool, float]] = set()  # what a batch was isolated in
        self._generator = torch.Generator()  # its own, since the training's must not move
        self._reached: set[str] = set()  # layers whose gradient in this proof was not zero
        self._called: set[str] = set()
        self._silent: dict[State, set[str]] = {}  # layers that the proof of a state told nothing about
        self._known: dict[State, set[Layer]] = {}  # what was reached when a state was proven
        self._graphs: dict[State, set[int]] = {}  # of the losses that were proven in a state
        self._state: State | None = None  # of the last batch
        self._is_asked_again = False

    @property
    def is_running(self) -> bool:
        """Whether a pass of the proof is running."""
        return self._differentiated is not None

    def was_isolated(self, state: State) -> bool:
        """Whether a batch of as many rows for each sample was found to be isolated."""
        return state[:2] in self._isolated

    @property
    def has_silent_layers(self) -> bool:
        """Whether the batch that is differentiated now may ask for another proof."""
        return self._state is not None and bool(self._silent.get(self._state))

    def forget(self) -> None:
        """Prove anew at the next batch: another loss may follow."""
        self._batches.clear()
        self._isolated.clear()
        self._silent.clear()
        self._known.clear()
        self._graphs.clear()

    def notice(self, g: Tensor, name: str) -> None:
        """Ask for another proof where a silent layer has a gradient now.

        Args:
            g: ``[B, ...]``: gradient of a layer's output.
            name: The layer's name.
        """
        if self._state is not None and name in self._silent.get(self._state, ()):
            self._is_asked_again |= bool((g.isfinite() & (g != 0)).any())

    def pop_asked_again(self) -> bool:
        """Whether a silent layer had a gradient since the last call; then this state is unproven again."""
        was_asked, self._is_asked_again = self._is_asked_again, False
        if was_asked and self._state is not None:
            self._batches.pop(self._state, None)
        return was_asked

    def run(
        self,
        num_samples: int,
        state: State,
        differentiate: Differentiate,
        *,
        layers: Collection[Layer],
        graph: int,
        device: torch.device,
        agree_on_most: Callable[[int], int] | None = None,
    ) -> None:
        """Run the passes, unless this state was proven before.

        Args:
            num_samples: ``B``, at least 1.
            state: State of the model.
            differentiate: Runs a backward pass from the losses that a ``[B]`` bool tensor picks, and keeps
                the graph.
            layers: Names of the layers that the losses reach, and whether the graph hides where they ran; one
                that is new asks for a proof.
            graph: Tells graphs of different operations apart; the first few that are new ask for a proof.
            device: Where the losses are.
            agree_on_most: The largest of a number over the processes that share the model, which must run the
                same number of passes; None for one process.

        Raises:
            PrivacyError: If a sample's loss reaches another's rows.
        """
        self._state = state
        graphs = self._graphs.setdefault(state, set())
        is_known = graph in graphs or len(graphs) >= _MOST_GRAPHS
        is_proven = is_known and state in self._batches and self._known[state].issuperset(layers)
        num_bits = (num_samples - 1).bit_length()
        if is_proven and num_bits:
            self._batches[state] += 1
            count = self._batches[state]
            num_bits = int(count >= _FIRST_SPLIT and count & (count - 1) == 0)
        if agree_on_most is not None:
            num_bits = agree_on_most(num_bits)
        if not num_bits:
            return
        self._reached, self._called = set(), set()
        numbers = torch.arange(num_samples, device=device)
        if is_proven:
            numbers = torch.randperm(num_samples, generator=self._generator).to(device)
        masks = [(numbers >> bit & 1).bool() for bit in range(num_bits)]
        try:
            for self._differentiated in (part for mask in masks for part in (mask, ~mask)):
                differentiate(self._differentiated)
        except RuntimeError as error:
            if "donated buffer" not in str(error):
                raise
            self._note_proof(state, set(), layers, graph)
            _logger.warning(
                "a compiled model keeps no second backward pass, so the proof that samples are not coupled "
                "did not run; check(losses_of, batch_size) does the same."
            )
            return
        finally:
            self._differentiated = None
        if self._reached:
            self._note_proof(state, self._called - self._reached, layers, graph)

    def _note_proof(self, state: State, silent: set[str], layers: Collection[Layer], graph: int) -> None:
        self._isolated.add(state[:2])
        if state[2] is not None:
            self._batches.setdefault(state, 0)
            self._silent[state] = (self._silent.get(state, set()) | silent) - self._reached
            self._known.setdefault(state, set()).update(layers)
            self._graphs.setdefault(state, set()).add(graph)

    def refuse_coupled(self, g: Tensor, name: str) -> None:
        """Raise if the running pass reaches the rows of a sample whose loss is left out.

        Args:
            g: ``[B, ...]``: gradient of a layer's output.
            name: The layer's name.

        Raises:
            PrivacyError: If it does; the message names the layer.
        """
        assert self._differentiated is not None
        reached = g.isfinite() & (g != 0)
        differentiated = self._differentiated.to(g.device)
        self._called.add(name)
        if bool(reached[differentiated].any()):
            self._reached.add(name)
        if bool(reached[~differentiated].any()):
            raise PrivacyError(
                f"the samples of a batch are coupled: the loss of one depends on another's values in layer "
                f"{name}, so no sample's gradient is its own. Causes: batch statistics, in-batch negatives, "
                "a balance loss of experts, an input that is not batch-first, positions looked up once for "
                "all samples (give the table ids of shape [1, T]), or rows of one record that lie apart, as "
                "chosen and rejected answers in two halves of a batch (interleave them, or call the model "
                "once for each half). Remove the coupling or freeze the layer."
            )
