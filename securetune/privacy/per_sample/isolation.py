"""The proof that no sample's loss depends on another sample, in extra passes over a first batch."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from securetune.errors import PrivacyError

_logger = logging.getLogger(__name__)

# whether the model trains, the rows that it gets for each sample, and the layers whose rows the data may
# choose, None of these where they do
State = tuple[bool, float, frozenset[tuple[str, int]] | None]
Differentiate = Callable[[Tensor], None]
_FIRST_SPLIT = 16  # later ones cost 2 passes each time that the number of batches has doubled


class IsolationProof:
    """Prove that no sample's loss reaches another's rows.

    Each pass differentiates the samples whose number has one bit set, or not set, so that every pair is told
    apart. It is done again for another state of the model, and for each batch where the data choose the
    rows of a layer; a batch without any finite gradient proves nothing. The batches 16, 32, 64 and so on
    after a proof are split at random: samples that the model sorts may have come sorted.
    """

    def __init__(self) -> None:
        self._differentiated: Tensor | None = None  # [B], bool: whose losses the running pass differentiates
        self._saw_gradient = False
        self._batches: dict[State, int] = {}  # since the proof of each state
        self._generator = torch.Generator()  # its own, since the training's must not move

    @property
    def is_running(self) -> bool:
        """Whether a pass of the proof is running."""
        return self._differentiated is not None

    def forget(self) -> None:
        """Prove anew at the next batch: another loss may follow."""
        self._batches.clear()

    def run(
        self,
        num_samples: int,
        state: State,
        differentiate: Differentiate,
        *,
        device: torch.device,
        agree_on_most: Callable[[int], int] | None = None,
    ) -> None:
        """Run the passes, unless this state was proven before.

        Args:
            num_samples: ``B``, at least 1.
            state: State of the model.
            differentiate: Runs a backward pass from the losses that a ``[B]`` bool tensor picks, and keeps
                the graph.
            device: Where the losses are.
            agree_on_most: The largest of a number over the processes that share the model, which must run the
                same number of passes; None for one process.

        Raises:
            PrivacyError: If a sample's loss reaches another's rows.
        """
        num_bits = (num_samples - 1).bit_length()
        if state in self._batches and num_bits:
            self._batches[state] += 1
            count = self._batches[state]
            num_bits = int(count >= _FIRST_SPLIT and count & (count - 1) == 0)
        if agree_on_most is not None:
            num_bits = agree_on_most(num_bits)
        if not num_bits:
            return
        self._saw_gradient = False
        numbers = torch.arange(num_samples, device=device)
        if state in self._batches:
            numbers = torch.randperm(num_samples, generator=self._generator).to(device)
        masks = [(numbers >> bit & 1).bool() for bit in range(num_bits)]
        try:
            for self._differentiated in (part for mask in masks for part in (mask, ~mask)):
                differentiate(self._differentiated)
        except RuntimeError as error:
            if "donated buffer" not in str(error):
                raise
            self._saw_gradient = True
            _logger.warning(
                "a compiled model keeps no second backward pass, so the proof that samples are not coupled "
                "did not run; check(losses_of, batch_size) does the same."
            )
        finally:
            self._differentiated = None
        if self._saw_gradient and state[2] is not None:
            self._batches.setdefault(state, 0)

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
        self._saw_gradient = self._saw_gradient or bool(reached[differentiated].any())
        if bool(reached[~differentiated].any()):
            raise PrivacyError(
                f"the samples of a batch are coupled: the loss of one depends on another's values in layer "
                f"{name}, so no sample's gradient is its own. Causes: batch statistics, in-batch negatives, "
                "a balance loss of experts, an input that is not batch-first, or rows of one record that lie "
                "apart, as chosen and rejected answers in two halves of a batch (interleave them, or call "
                "the model once for each half). Remove the coupling or freeze the layer."
            )
