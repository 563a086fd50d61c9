"""Dropout on the adapters' inputs, with masks that belong to samples instead of batches.

torch's dropout draws one mask for the whole batch from a global generator, so a sample that comes or goes
changes the masks of all others. Here a sample's mask follows from the seed, the step, its unit id and the
layer: whatever the batch, the micro-batch size and the number of passes, a sample meets the same masked
network, and its gradient stays a function of that one sample. So clipping bounds what a sample changes
exactly as without dropout, for any seed, even a public one.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from securetune.adversarial.embedding import sample_seeds
from securetune.data.collate import Batch
from securetune.errors import PrivacyError


class AdapterDropout:
    """Gives every sample masks of its own in the LoRA layers of a model; torch's random state is not used.

    Guarantees:
        Inside :meth:`masks`, each entry of a sample's adapter inputs is zeroed with the adapter's dropout
        probability, independently, and the others are scaled up. The mask depends on ``seed``, the step, the
        sample's unit id and the layer: not on batch-mates or padding, and it is the same in every pass over
        the sample in that step. In evaluation mode, as in an attack, nothing is masked.

    Args:
        model: A peft model; its LoRA dropout modules are replaced, in evaluation mode.
        seed: The recipe's seed.
    """

    def __init__(self, model: nn.Module, *, seed: int) -> None:
        self._seed = seed
        self._samples: list[tuple[int, int]] | None = None  # seed and length of each row
        dropouts = [
            (holder, key, dropout)
            for name, holder in model.named_modules()
            if name.endswith("lora_dropout") and isinstance(holder, nn.ModuleDict)
            for key, dropout in holder.items()
            if isinstance(dropout, nn.Dropout)
        ]
        for layer, (holder, key, dropout) in enumerate(dropouts):
            holder[key] = _SampleDropout(dropout.p, self, layer).eval()

    @contextmanager
    def masks(self, batch: Batch, *, step: int) -> Iterator[None]:
        """Use the masks of these samples, for a forward pass and its backward pass.

        Args:
            batch: The samples.
            step: The training step: a sample drawn again meets other masks.

        Yields:
            Nothing.
        """
        seeds = sample_seeds(batch.unit_ids, seed=self._seed, step=step)
        self._samples = list(zip(seeds, batch.lengths.tolist(), strict=True))
        try:
            yield
        finally:
            self._samples = None

    def draw(self, x: Tensor, probability: float, layer: int) -> Tensor:
        """Draw the mask of one layer's input.

        Args:
            x: ``[B, T, d]``, a floating dtype: one row per sample, right-padded.
            probability: Chance of an entry to be zeroed, in (0, 1).
            layer: Number of the layer.

        Returns:
            ``[B, T, d]``, dtype of ``x``: 0 or ``1 / (1 - probability)``; 1 on padding.

        Raises:
            RuntimeError: If no samples are set.
            PrivacyError: If ``x`` has another shape than one row per sample.
        """
        if self._samples is None:
            raise RuntimeError("a model in training mode ran outside AdapterDropout.masks: no masks are set.")
        if x.ndim != 3 or x.shape[0] != len(self._samples):
            raise PrivacyError(
                f"an adapter's input has shape {tuple(x.shape)} where the batch has {len(self._samples)} "
                "samples, so dropout cannot mask sample by sample. Set training.lora.dropout to 0."
            )
        mask = torch.ones_like(x, requires_grad=False)
        generator = torch.Generator(x.device)
        for row, (seed, length) in enumerate(self._samples):
            address = hashlib.blake2b(f"{seed}:{layer}".encode(), digest_size=8, person=b"st.dropout")
            generator.manual_seed(int.from_bytes(address.digest(), "little"))
            mask[row, :length].bernoulli_(1 - probability, generator=generator).div_(1 - probability)
        return mask


class _SampleDropout(nn.Dropout):
    """Stands in for a LoRA layer's dropout."""

    def __init__(self, probability: float, owner: AdapterDropout, layer: int) -> None:
        super().__init__(probability)
        self._owner = owner
        self._layer = layer

    def forward(self, input: Tensor) -> Tensor:
        return input * self._owner.draw(input, self.p, self._layer) if self.training else input
