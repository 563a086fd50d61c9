"""``transformers.Trainer`` with differential privacy.

The loop, callbacks, checkpoints, optimizers and schedulers are those of transformers. What is replaced is
everything that looks at private records: sampling, loss, gradient, and the statistics that would be logged.
"""

import copy
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from securetune.data.sft import IGNORED_LABEL
from securetune.errors import CheckpointError, ConfigError, PrivacyError
from securetune.privacy.clipping import Clipping
from securetune.privacy.noise import NoiseSource
from securetune.privacy.private import PrivateTraining, Records, make_private
from securetune.privacy.sampling import Sampler, refuse_other_records
from securetune.privacy.step import refuse_kind
from securetune.privacy.units import UserSampler
from securetune.training.coupling import refuse_coupled_losses
from securetune.training.trainer_options import FP16, refuse_options

__all__ = ["PrivateTrainer", "per_sequence_losses"]

_STATE = "privacy.json"
_UNNOISED = ("loss", "train_loss")
_PROOFS = 8  # micro-batches of records of one length, which tell nothing about padding, are compared
_logger = logging.getLogger(__name__)


def per_sequence_losses(
    logits: Tensor, labels: Tensor, *, is_shifted: bool, label_smoothing: float = 0.0
) -> Tensor:
    """Average each sequence's cross-entropy over its own labels.

    Guarantees:
        Row ``i`` depends on row ``i`` alone. A row without labels has loss zero.

    Args:
        logits: ``[B, T, V]`` or ``[B, K]``, a floating dtype.
        labels: ``[B, T]`` or ``[B]``, int64; -100 is left out.
        is_shifted: Whether position ``t`` predicts label ``t + 1``, as in causal language models.
        label_smoothing: Share of each target that is spread over all classes, in [0, 1).

    Returns:
        ``[B]``, float32 (float64 for float64 logits).
    """
    if labels.ndim == 1:
        logits, labels = logits[:, None], labels[:, None]
    elif is_shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    scores = logits if logits.dtype == torch.float64 else logits.float()
    losses = functional.cross_entropy(
        scores.transpose(1, 2),
        labels,
        ignore_index=IGNORED_LABEL,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.sum(dim=1) / (labels != IGNORED_LABEL).sum(dim=1).clamp(min=1)


class PrivateTrainer(Trainer):
    """A ``Trainer`` whose training is (epsilon, delta)-differentially private for each training record.

    What its arguments mean here:

    - ``per_device_train_batch_size * gradient_accumulation_steps``: the expected batch size, a public
      constant. Steps take Poisson samples, in passes of at most ``per_device_train_batch_size`` records.
    - ``max_steps``, else ``num_train_epochs``: an epoch is ``round(1 / sample_rate)`` steps, in which a
      record is taken once on average.
    - ``max_grad_norm``: the clipping threshold of **each record's** gradient. After the noise nothing is
      clipped; the ``grad_norm`` that is logged is that of the noised gradient.

    The loss is the mean over each sequence's own labels. A ``compute_loss_func(outputs, labels,
    num_items_in_batch=None)`` must return one loss per record, ``[B]``.

    Guarantees:
        No un-noised statistic of private records is logged, saved or returned: no training loss, no token
        counts, no number of records; ``epsilon`` is logged instead. A resumed run draws new keys, and a
        checkpoint that the ledger has not paid for is refused. A run that ends before its last step is
        charged in full, since data may have decided when. Options that would break the guarantee are
        refused by name.

    Args:
        model: As for ``Trainer``.
        args: As for ``Trainer``; not changed.
        train_dataset: The private records: one row is the privacy unit, unless ``sampler`` says otherwise.
        target_epsilon: Largest epsilon of the whole run, > 0.
        delta: Probability allowed for the guarantee to fail.
        sample_rate: Probability in (0, 1] of each record at each step, a public constant.
        sampler: In the place of ``sample_rate``: another way to sample.
        clipping: In the place of flat clipping to ``args.max_grad_norm``.
        ledger: File that counts the steps; ``ledger.jsonl`` in ``args.output_dir`` when None.
        noise: For tests, as in :func:`~securetune.privacy.private.make_private`.
        passes: Backward passes of each micro-batch: 2 trades time for memory in training in full under
            gradient checkpointing, see :class:`~securetune.privacy.per_sample.PerSampleGradients`.
        public_eval_dataset: What ``Trainer`` calls ``eval_dataset``. Its metrics are logged and may choose
            the best checkpoint or end the run, so it must hold public records only.
        **options: Further arguments of ``Trainer``.

    Raises:
        ConfigError: If an option cannot be combined with privacy; the message names all of them.

    Attributes:
        private: The run inside :meth:`train`; None before.
        private_loss: Mean loss of the last step's sample; None if it was empty. Un-noised: epsilon does not
            cover it. Look at it on this machine; never log, store or publish it.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        train_dataset: Records,
        target_epsilon: float,
        delta: float,
        sample_rate: float | None = None,
        sampler: Sampler | UserSampler | None = None,
        clipping: Clipping | None = None,
        ledger: str | os.PathLike[str] | None = None,
        noise: NoiseSource | None = None,
        passes: Literal[1, 2] = 1,
        public_eval_dataset: Any = None,
        **options: Any,
    ) -> None:
        refuse_other_records("train_dataset", train_dataset)
        refuse_options(args, options, first_row=train_dataset[0], has_clipping=clipping is not None)
        public = public_eval_dataset
        if any(part is train_dataset for part in (public.values() if isinstance(public, dict) else [public])):
            raise ConfigError(
                "public_eval_dataset is train_dataset: metrics on private records are un-noised, and epsilon "
                "does not cover what is chosen by them. Give public records."
            )
        if (sample_rate is None) == (sampler is None):
            raise ConfigError(f"give either sample_rate or sampler, got {sample_rate} and {sampler!r}.")
        if sample_rate is not None and not 0 < sample_rate <= 1:
            raise ConfigError(f"sample_rate must be in (0, 1], got {sample_rate}.")
        self.expected_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self._records = train_dataset
        self._sample_rate = sample_rate if sampler is None else sampler.sample_rate
        self._settings: dict[str, Any] = {
            "target_epsilon": target_epsilon,
            "delta": delta,
            "expected_batch_size": self.expected_batch_size,
            "max_grad_norm": args.max_grad_norm if clipping is None else clipping,
            "ledger": Path(args.output_dir or ".", "ledger.jsonl") if ledger is None else ledger,
            "sample_rate": sample_rate,
            "sampler": sampler,
            "noise": noise,
            "passes": passes,
        }
        self.private: PrivateTraining | None = None
        self.private_loss: float | None = None
        self._held: _HeldGradients | None = None
        self._proofs_left = _PROOFS
        own = copy.copy(args)
        own.gradient_accumulation_steps = 1  # a step of the loop is a whole step here, however many passes
        own.ignore_data_skip = True  # a resumed run draws new samples: none were drawn that could be skipped
        super().__init__(
            model,
            own,
            train_dataset=train_dataset,
            eval_dataset=public_eval_dataset,
            **options,  # pyright: ignore[reportArgumentType]
        )
        if self.accelerator.scaler is not None:
            raise ConfigError(FP16)
        if (
            self.args.n_gpu > 1
            or self.args.world_size > 1
            or self.is_deepspeed_enabled
            or self.is_fsdp_enabled
        ):
            raise ConfigError(
                "PrivateTrainer trains in one process on one device so far. Hide the others "
                "(CUDA_VISIBLE_DEVICES=0), and launch one process."
            )

    @property
    def epsilon(self) -> float | None:
        """Epsilon charged so far; None before :meth:`train`, or where a key is fixed for a test."""
        return None if self.private is None else self.private.epsilon

    def train(self, *args: Any, **options: Any) -> TrainOutput:
        """Train as ``Trainer.train`` does, but return NaN as ``training_loss``, which would be un-noised.

        Args:
            *args: As for ``Trainer.train``.
            **options: As for ``Trainer.train``, ``resume_from_checkpoint`` among them.

        Returns:
            The number of steps and public metrics.
        """
        try:
            output = super().train(*args, **options)
        finally:
            if self.private is not None:
                self.private.close()
        public = {name: value for name, value in output.metrics.items() if name not in _UNNOISED}
        return TrainOutput(output.global_step, math.nan, public)

    def hyperparameter_search(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse: each trial would spend the budget again.

        Args:
            *args: Unused.
            **options: Unused.

        Raises:
            PrivacyError: Always.
        """
        raise PrivacyError(
            "hyperparameter_search trains on the private records many times and keeps the best: the epsilon "
            "of one run does not cover that. Search on public records with a plain Trainer."
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the loader of public records to evaluate on.

        Args:
            eval_dataset: As for ``Trainer``; not the private records.

        Returns:
            The loader.
        """
        self._refuse_private_records(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the loader of public records to predict.

        Args:
            test_dataset: As for ``Trainer``; not the private records.

        Returns:
            The loader.
        """
        self._refuse_private_records(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _refuse_private_records(self, dataset: Any) -> None:
        if dataset is self._records:
            raise PrivacyError(
                "metrics and predictions on the private records are un-noised, and epsilon does not cover "
                "what is logged or chosen by them. Give public records."
            )

    # What the loop of transformers calls.

    def get_train_dataloader(self) -> Any:
        """Return the steps of an epoch, each with a sample of its own."""
        assert self._sample_rate is not None
        return _Steps(self, max(1, round(1 / self._sample_rate)))

    def num_examples(self, dataloader: Any) -> int:
        """Return the planned number of records, since the true one is private and this one is logged."""
        if not isinstance(dataloader, _Steps):
            return super().num_examples(dataloader)
        assert self._sample_rate is not None
        return round(self.expected_batch_size / self._sample_rate)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return the expected batch size."""
        return self.expected_batch_size

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Return the next step; tokens are not counted over its records."""
        return [next(epoch_iterator)], None

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Differentiate the micro-batches of a step, add noise, and leave the noised gradient in ``.grad``.

        Args:
            model: The model, wrapped or not.
            inputs: The step's micro-batches, each a list of rows.
            num_items_in_batch: Unused.

        Returns:
            Zero: the loss is private.
        """
        assert self.private is not None
        assert self._held is not None
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        collate = self._get_collator_with_removed_columns(self.data_collator)
        losses: list[Tensor] = []
        for rows in inputs:
            batch = self._prepare_inputs(collate(rows))
            if self._proofs_left and len(rows) > 1:
                self._refuse_coupled_losses(model, rows, batch)
            model.train()
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch)
            assert isinstance(loss, Tensor)
            self.private.backward(loss)
            losses.append(loss.detach())
        self.private_loss = float(torch.cat(losses).double().mean()) if losses else None
        assert isinstance(self.optimizer, torch.optim.Optimizer)
        self._held.param_groups = self.optimizer.param_groups  # some may have joined since
        self.private.step()
        self._held.give_back()
        return torch.zeros((), device=self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute one loss per record, ``[B]``.

        Args:
            model: The model.
            inputs: The batch.
            return_outputs: Whether to return the model's outputs too.
            num_items_in_batch: Unused: a divisor counted over the batch would couple its records.

        Returns:
            The losses, or losses and outputs.
        """
        inputs = dict(inputs)
        labels = inputs.get("labels")
        config = getattr(self.accelerator.unwrap_model(model), "config", None)
        if not getattr(config, "is_encoder_decoder", False):  # which makes its decoder's inputs of them
            inputs.pop("labels", None)
        outputs = model(**inputs)
        if self.compute_loss_func is not None:
            losses = self.compute_loss_func(outputs, labels, num_items_in_batch=None)
        elif not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim > 2:
            raise PrivacyError(
                "the loss of this task is not known here: labels must be class numbers, [B] or [B, T]. Give "
                "compute_loss_func=f, where f(outputs, labels, num_items_in_batch) returns one loss per "
                "record, [B]."
            )
        elif not isinstance(outputs, Mapping) or "logits" not in outputs:
            raise PrivacyError(
                f"the model's outputs ({type(outputs).__name__}) have no 'logits' to compute each record's "
                "loss from; labels are not given to the model. Let it return them by that name, or give "
                "compute_loss_func=f, where f(outputs, labels, num_items_in_batch) returns one loss per "
                "record, [B]."
            )
        else:
            losses = per_sequence_losses(
                outputs["logits"],
                labels,
                is_shifted=self._loss_shifts_labels,
                label_smoothing=self.args.label_smoothing_factor,
            )
        return (losses, outputs) if return_outputs else losses

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what is public: without the training loss, with epsilon.

        Args:
            logs: As for ``Trainer``.
            start_time: As for ``Trainer``.
        """
        public = {name: value for name, value in logs.items() if name not in _UNNOISED}
        if self.private is not None and self.private.ledger.state.header.reportable_epsilon:
            public["epsilon"] = self.private.plan.curve.at(self.private.ledger.steps_charged)
        super().log(public, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return zero: the count would follow from the sizes of private samples."""
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Clip nothing: ``max_grad_norm`` was applied to each record, before the noise."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Save none: who knows it could tell which records' dropout masks were drawn together."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load none: a resumed run draws new randomness."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        assert isinstance(self.optimizer, torch.optim.Optimizer)
        assert self.model is not None
        if self.private is not None:
            self.private.close()
        torch.seed()  # dropout's masks must not follow from a seed that is published with the recipe
        refuse_kind(getattr(self.optimizer, "optimizer", self.optimizer))  # accelerate wraps it
        self._held = _HeldGradients(self.optimizer.param_groups)
        self.private = make_private(self.model, self._held, self._records, steps=max_steps, **self._settings)
        if resume_from_checkpoint is not None:
            self.private.load_state_dict(_read_state(resume_from_checkpoint))
        lost = max_steps - self.state.global_step - self.private.remaining_steps
        if lost:
            _logger.warning("%d steps were charged but not saved: training is so much shorter.", lost)
            self.state.max_steps = max_steps - lost
        return prepared

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> TrainOutput:
        if self.private is not None:
            self.private.stop_early()  # before epsilon is logged for the last time
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        assert self.private is not None
        Path(output_dir, _STATE).write_text(json.dumps(self.private.state_dict()))

    def _refuse_coupled_losses(self, model: nn.Module, rows: list[Any], batch: Mapping[str, Any]) -> None:
        collate = self._get_collator_with_removed_columns(self.data_collator)

        def losses_of(inputs: Mapping[str, Any]) -> Tensor:
            with torch.no_grad(), self.compute_loss_context_manager():
                return self.compute_loss(model, inputs)

        model.eval()
        is_telling = refuse_coupled_losses(
            batch,
            len(rows),
            losses_of,
            lambda row: collate([rows[row]]),
            is_coarse=self.args.bf16 or any(p.dtype.itemsize < 4 for p in model.parameters()),
        )
        self._proofs_left = 0 if is_telling else self._proofs_left - 1


class _Steps:
    """Stands in for the data loader: an epoch's steps, each an iterator over micro-batches of rows."""

    def __init__(self, trainer: PrivateTrainer, length: int) -> None:
        self._trainer = trainer
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Iterator[list[Any]]]:
        private = self._trainer.private
        assert private is not None
        return private.steps(micro_batch_size=self._trainer.args.per_device_train_batch_size, collate_fn=list)


class _HeldGradients(torch.optim.Optimizer):
    """Takes the noised gradients in the place of an optimizer, for the loop that will call the real one."""

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        super().__init__([{"params": list(group["params"])} for group in param_groups], {})
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        owned = (parameter for group in self.param_groups for parameter in group["params"])
        # copied: they are views of the private step's sum, which is zeroed next
        self._gradients = [(owner, owner.grad.clone()) for owner in owned if owner.grad is not None]

    def give_back(self) -> None:
        """Put them where optimizers look for gradients."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients = []


def _read_state(checkpoint: str) -> dict[str, Any]:
    path = Path(checkpoint, _STATE)
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {_STATE}, so it is no whole checkpoint of a private run. Resume from one "
            "that was saved by PrivateTrainer with save_only_model=False."
        )
    return json.loads(path.read_text())
