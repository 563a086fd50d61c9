"""Task heads: per-sample losses of a causal model, computed only where they are needed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from securetune.data.collate import Batch
from securetune.data.encode import label_token_ids
from securetune.errors import ConfigError
from securetune.models.base import computing_in
from securetune.models.frozen_head import frozen_head_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# supervised positions per slice of the vocabulary-wide head; bounds the float32 logits to 512 * V numbers
_HEAD_ROWS = 512
_PROBE_TOKENS = 8


class CausalHead:
    """What both heads share: the embedding lookup, the decoder, and what the model does to its logits.

    Batches are right-padded and the decoder is causal, so real tokens never see padding and no attention mask
    is needed. This, and that the logits computed here are the model's own, is checked on construction.

    Embeddings, and an output layer that is trainable on construction, are called as modules, never read as
    weights: per-sample gradients, and engines that shard weights, see calls only.

    Attributes:
        model: The causal model as given, plain or with adapters.
        causal: The ``...ForCausalLM`` inside.
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None = None) -> None:
        """Prepare the head.

        Args:
            model: A causal model, plain or with adapters.
            autocast: What the decoder and logits over the whole vocabulary are computed in, where that is
                coarser than the weights; None where it is not.

        Raises:
            ConfigError: If the model's logits cannot be reproduced, or the model is not causal.
        """
        self.model = model
        self.causal: Any = plain_causal_model(model)
        self._decoder = self.causal.get_decoder()
        self._output = self.causal.get_output_embeddings()
        if type(self._output) is not nn.Linear:
            found = "none" if self._output is None else type(self._output).__name__
            raise ConfigError(
                f"{type(self.causal).__name__} has no plain linear output layer (found: {found}), so the"
                " logits of single words cannot be computed from it. Leave the output layer out of the"
                " adapters' target_modules, or use another model."
            )
        self._is_output_trained = any(parameter.requires_grad for parameter in self._output.parameters())
        self._transform = _logit_transform(self.causal.config)
        self._autocast: torch.dtype | None = None
        _check_against_model(self)
        self._autocast = autocast

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Compute in the dtype of the weights meanwhile."""
        autocast, self._autocast = self._autocast, None
        try:
            yield
        finally:
            self._autocast = autocast

    @property
    def device(self) -> torch.device:
        """Where the output layer is."""
        return self._output.weight.device

    def embed(self, batch: Batch) -> Tensor:
        """Look up the input embeddings, in the form that the decoder takes as ``inputs_embeds``.

        Args:
            batch: ``B`` rows of ``T`` tokens.

        Returns:
            ``[B, T, D]`` in the dtype of the weights, on the model's device.
        """
        table = self.causal.get_input_embeddings()
        return table(batch.input_ids.to(table.weight.device))

    def hidden_states(self, inputs_embeds: Tensor) -> Tensor:
        """Run the decoder.

        Args:
            inputs_embeds: ``[B, T, D]``, the model's dtype: embeddings, right-padded.

        Returns:
            ``[B, T, D]``: hidden states before the output layer.
        """
        with self._arithmetic():
            return self._decoder(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state

    def _arithmetic(self) -> AbstractContextManager[Any]:
        return computing_in(self._autocast, self._output.weight.device)

    def _logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Apply the output layer, or only some of its rows, in float32 (float64 stays float64)."""
        weight, bias = self._output.weight, self._output.bias
        if self._is_output_trained:  # rows of it are taken from what its call returns
            with self._arithmetic() if rows is None else nullcontext():
                logits = self._output(hidden.to(weight.dtype))
            logits = logits if rows is None else logits[..., rows]
        elif rows is None:
            with self._arithmetic():
                logits = F.linear(hidden.to(weight.dtype), weight, bias)
        else:
            dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
            chosen_bias = None if bias is None else bias[rows].to(dtype)
            logits = F.linear(hidden.to(dtype), weight[rows].to(dtype), chosen_bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self._transform is None else self._transform(logits)


class ClassifyHead(CausalHead):
    """Reads the label at the last token, from the logits of the label words alone.

    Guarantees:
        Row ``i`` of every result depends on sample ``i`` alone.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        label_words: Sequence[str],
        *,
        prompt: str = "{text}\nLabel:",
        autocast: torch.dtype | None = None,
    ) -> None:
        """Prepare the head.

        Args:
            model: A causal model, plain or with adapters.
            tokenizer: Its tokenizer.
            label_words: One word per label, each a single token after the prompt.
            prompt: The prompt the texts are put into.
            autocast: What the decoder computes in, as in :class:`CausalHead`; labels are scored in float32.

        Raises:
            ConfigError: If a word is not one token, or the model's logits cannot be reproduced.
        """
        super().__init__(model, autocast=autocast)
        self.label_words = tuple(label_words)
        self.label_ids = tuple(label_token_ids(tokenizer, label_words, prompt=prompt))
        self._rows = torch.tensor(self.label_ids, device=self._output.weight.device)

    def logits(self, inputs_embeds: Tensor, batch: Batch) -> Tensor:
        """Score the labels of each sample.

        Args:
            inputs_embeds: ``[B, T, D]``: from :meth:`embed`, possibly perturbed.
            batch: The batch they belong to.

        Returns:
            ``[B, num_labels]``, float32 (float64 for a float64 model).
        """
        hidden = self.hidden_states(inputs_embeds)
        last = (batch.lengths - 1).to(hidden.device)
        return self._logits(hidden[torch.arange(len(last), device=hidden.device), last], self._rows)

    def losses(self, inputs_embeds: Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of each sample's label among the label words.

        Args:
            inputs_embeds: ``[B, T, D]``: from :meth:`embed`, possibly perturbed.
            batch: The batch they belong to; must carry labels.
            label_smoothing: Share of the target spread over all labels, in [0, 1).

        Returns:
            ``[B]``, float32 (float64 for a float64 model).

        Raises:
            ValueError: If the batch has no labels.
        """
        if batch.labels is None:
            raise ValueError("batch.labels is None: losses need a labelled batch.")
        logits = self.logits(inputs_embeds, batch)
        labels = batch.labels.to(logits.device)
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


class GenerateHead(CausalHead):
    """Mean next-token loss of each sample over its own supervised tokens.

    Guarantees:
        Row ``i`` depends on sample ``i`` alone: the mean is over the sample's own tokens. A sample without
        supervised tokens has loss zero.
    """

    def losses(self, inputs_embeds: Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of the supervised tokens, averaged within each sample.

        The output layer is applied at the positions that predict a supervised token, nowhere else.

        Args:
            inputs_embeds: ``[B, T, D]``: from :meth:`embed`, possibly perturbed.
            batch: The batch they belong to.
            label_smoothing: Share of each token's target spread over the whole vocabulary, in [0, 1).

        Returns:
            ``[B]``, float32 (float64 for a float64 model).
        """
        losses = self.token_losses(inputs_embeds, batch, label_smoothing=label_smoothing)
        return losses.sum(dim=1) / self.num_supervised(batch).clamp(min=1)

    def num_supervised(self, batch: Batch) -> Tensor:
        """Count the tokens each sample's loss is averaged over.

        Args:
            batch: ``B`` rows of ``T`` tokens.

        Returns:
            ``[B]``, int64, on the model's device; the first token of a row never counts.
        """
        return batch.supervised[:, 1:].sum(dim=1).to(self._output.weight.device)

    def token_losses(self, inputs_embeds: Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of each supervised token.

        Args:
            inputs_embeds: ``[B, T, D]``: from :meth:`embed`, possibly perturbed.
            batch: The batch they belong to.
            label_smoothing: Share of each token's target spread over the whole vocabulary, in [0, 1).

        Returns:
            ``[B, T - 1]``, float32 (float64 for a float64 model): entry ``t`` is the loss of token ``t + 1``,
            zero where that is not supervised.
        """
        hidden = self.hidden_states(inputs_embeds)
        is_target = batch.supervised[:, 1:].to(hidden.device)
        targets = batch.input_ids[:, 1:].to(hidden.device)
        if self._is_output_trained or self._transform is not None:
            return self._losses_by_sample(hidden, is_target, targets, label_smoothing)
        weight, bias = self._output.weight, self._output.bias
        dtype = self._autocast or weight.dtype
        losses = frozen_head_losses(
            hidden[:, :-1][is_target].to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            targets[is_target],
            label_smoothing=label_smoothing,
        )
        return losses.new_zeros(is_target.shape).index_put((is_target,), losses)

    def _losses_by_sample(
        self, hidden: Tensor, is_target: Tensor, targets: Tensor, label_smoothing: float
    ) -> Tensor:
        """Cross-entropy with one row of positions for each sample: ``[B, T, D]`` to ``[B, T - 1]``.

        Supervised positions come first and the longest row sets the width, so the output layer sees
        ``[B, ...]``.
        """
        is_target, targets = F.pad(is_target, (0, 1)), F.pad(targets, (0, 1))  # the last token predicts none
        width = max(1, int(is_target.sum(dim=1).max()))
        places = is_target.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        rows = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[2]))
        wanted, counts = targets.gather(1, places), is_target.gather(1, places)

        def compute(rows: Tensor, wanted: Tensor) -> Tensor:
            logits = self._logits(rows).flatten(0, 1)
            losses = F.cross_entropy(
                logits, wanted.flatten(), reduction="none", label_smoothing=label_smoothing
            )
            return losses.view(wanted.shape)

        step = max(1, _HEAD_ROWS // len(rows))
        slices = list(zip(rows.split(step, dim=1), wanted.split(step, dim=1), strict=True))
        if len(slices) == 1 or not torch.is_grad_enabled():
            losses = torch.cat([compute(*pair) for pair in slices], dim=1)
        else:
            # recomputed in the backward pass: V logits per token cost more memory than the decoder's
            # activations
            losses = torch.cat([checkpoint(compute, *pair, use_reentrant=False) for pair in slices], dim=1)
        losses = losses.masked_fill(~counts, 0.0)
        return losses.new_zeros(is_target.shape).scatter(1, places, losses)[:, :-1]


def plain_causal_model(model: nn.Module) -> "PreTrainedModel":
    """Find the transformers model inside adapters.

    Args:
        model: A ``...ForCausalLM``, or a peft model around one.

    Returns:
        The ``...ForCausalLM`` with whatever adapter layers were put into it.
    """
    get_base_model: Callable[[], Any] | None = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model is not None else model  # pyright: ignore[reportReturnType]


def _logit_transform(config: Any) -> Callable[[Tensor], Tensor] | None:
    """Build what the model family does to its logits after the output layer; ``None`` if nothing."""
    text_config = config.get_text_config()
    softcap = getattr(text_config, "final_logit_softcapping", None)
    multiplier = getattr(text_config, "logit_scale", None)
    divisor = getattr(text_config, "logits_scaling", None)
    if multiplier is None and divisor is None and softcap is None:
        return None

    def transform(logits: Tensor) -> Tensor:
        if multiplier is not None:
            logits = logits * multiplier
        if divisor is not None:
            logits = logits / divisor
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return logits

    return transform


def _check_against_model(head: CausalHead) -> None:
    """Compare the head with the model's own logits on a few tokens, and check that the decoder is causal."""
    causal = head.causal
    table = causal.get_input_embeddings()
    num_words = table.weight.shape[0]
    # spread over the vocabulary; the last token differs between the rows
    ids = torch.arange(_PROBE_TOKENS).repeat(2, 1) * (num_words // (_PROBE_TOKENS + 2)) + 1
    ids[1, -1] = 0
    ids = ids.to(table.weight.device)
    with torch.no_grad(), _evaluating(head.model):
        own = head._logits(head.hidden_states(table(ids)))
        true = causal(input_ids=ids, use_cache=False).logits.to(own.dtype)
    scale = true.abs().max().clamp(min=1e-6)
    # both sides run the same decoder, so only rounding in the model's own dtype may differ
    tolerance = max(4 * torch.finfo(table.weight.dtype).eps, 1e-5)
    if not (own - true).abs().max() <= tolerance * scale:
        raise ConfigError(
            f"{type(causal).__name__} (model_type {causal.config.model_type!r}) computes its logits in a way"
            " that is not known here: those computed from its output layer differ from its own. Use another"
            " model."
        )
    if not (own[0, :-1] - own[1, :-1]).abs().max() <= tolerance * scale:
        raise ConfigError(
            f"{type(causal).__name__} (model_type {causal.config.model_type!r}) is not causal: an earlier"
            " token's output changes with a later token, so padding would leak into the result. Use a"
            " decoder-only causal model."
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and give every module its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
