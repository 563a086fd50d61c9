"""Per-sample gradients of every trainable parameter, recorded while one backward pass runs.

Each module that owns a trainable parameter gets a forward of its own, whose backward pass hands the layer's
inputs and output gradients to the engine and returns no weight gradient: the summed gradient that ordinary
autograd would compute, and that a private step must not use, is never computed.

Dimensions: ``B`` samples, ``T`` positions, ``P`` trainable parameters.
"""

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.choice import find_paths
from securetune.privacy.per_sample.gradients import (
    BatchGradients,
    TrainableParameter,
    Uses,
    as_3d,
    dense_rows,
    index_units,
    lookup_rows,
)
from securetune.privacy.per_sample.graph import Reached, reached_by, refuse_outside, refuse_used_up
from securetune.privacy.per_sample.isolation import IsolationProof
from securetune.privacy.per_sample.layout import (
    count_owners,
    flatten,
    lay_out_rows,
    refuse_changed,
    refuse_gradients,
    trainable_parameters,
)
from securetune.privacy.per_sample.paths import Path, refuse_plain_backward
from securetune.privacy.per_sample.row_watch import RowWatch, not_by_sample
from securetune.privacy.per_sample.self_check import check_against_autograd
from securetune.privacy.per_sample.two_passes import Measuring, Taker, TwoPassGradients
from securetune_kernels.numerics import without_autocast

_logger = logging.getLogger(__name__)


class PerSampleGradients:
    """Record every sample's gradient of every trainable parameter, in one backward pass or two.

    Guarantees:
        The gradient of sample ``i`` in :meth:`backward` is that of ``losses[i]`` alone, as ordinary autograd
        computes it for a batch of one, up to rounding. A trainable parameter without an exact path is refused
        by name: at construction where its module tells, else at the first :meth:`backward`. Passes outside
        :meth:`backward` (an attack's, an evaluation's) record nothing and leave every ``.grad`` untouched; a
        plain ``loss.backward()`` is refused, since it would train nothing.

    Args:
        model: The model, already on its device, its frozen parameters frozen. Trainable parameters must be on
            one device.
        passes: 1, or 2 to spend time for memory. One pass keeps every large layer's input and output gradient
            until the norms are known, which gives back what gradient checkpointing saved. Two passes keep
            none: the first takes norms, :meth:`BatchGradients.accumulate` runs the second, which takes as
            long as a backward (with checkpointing, a forward too). It pays for training in full under
            checkpointing, where one pass or a useful batch does not fit; adapters are small enough for one.

    Attributes:
        are_exchanged: Whether a wrapper puts other parameters in the place of these for each pass (FSDP2).
        agree_on_most: The largest of a number over the processes that share a sharded model, whose passes
            must keep pace; None where passes are each process' own.
        watch: How many rows the modules of the running forward pass had.
        before_pass: Called with the losses before each backward pass through their graph, for wrappers whose
            hooks expect one only (ZeRO-3); None for others.
        hidden_calls: Names of the paths that ran without gradients since the last pass, maybe to run again.

    Raises:
        ValueError: If ``passes`` is neither.
        PrivacyError: If a trainable parameter has no exact per-sample path, or a module couples samples; the
            message names it and the remedy.
    """

    def __init__(self, model: nn.Module, *, passes: Literal[1, 2] = 1) -> None:
        if passes not in (1, 2):
            raise ValueError(f"passes must be 1 or 2, got {passes}.")
        self.model = model
        self.passes = passes
        self.parameters = trainable_parameters(model)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.require_backward_grad_sync = False  # it would fill every .grad: clipped sums are reduced
        self._place = {id(place.parameter): place for place in self.parameters}
        self.are_exchanged = any(isinstance(place.parameter, DTensor) for place in self.parameters)
        self.agree_on_most: Callable[[int], int] | None = None
        self.before_pass: Callable[[Tensor], None] | None = None
        self._unsharded: list[nn.Parameter] = []  # kept alive, since they are known by id
        self._frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self.paths = find_paths(model, self)
        self.num_params = self.parameters[-1].stop
        first = self.parameters[0].parameter
        self.device = first.device
        if isinstance(first, DTensor):  # shards may wait on the CPU
            self.device = torch.empty(0, device=first.device_mesh.device_type).device
        self.compute_dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self._owners = count_owners(model, self.paths)
        self.lay_out_again()
        self._flat_params: nn.Parameter | None = None
        self._recording = False
        self._isolation = IsolationProof()
        self.hidden_calls: set[str] = set()
        self._looped_kinds: set[type[nn.Module]] = set()
        self._rows = 0
        self._is_count_told = False  # by the running backward's unit_ids
        self._written: set[int] = set()
        self._factored: dict[int, Uses] = {}
        self._number = 0  # of the running backward
        self._taker: Taker | None = None  # of the running pass
        self._is_second = False  # whether the rows are written, and factors are all that is wanted
        self._repeated = {place.index for place in self.parameters if self._owners[id(place.parameter)] > 1}
        self.watch = RowWatch(model, self.paths)
        for path in self.paths:
            path.attach()

    def lay_out_again(self) -> None:
        """Make room for the gradients that the paths write out, in a forward pass at the latest."""
        self._row_columns = lay_out_rows(self.parameters, self.paths)
        width = sum(stop - start for start, stop in self._row_columns.values())
        self._buffer = torch.empty(0, width, dtype=self.compute_dtype, device=self.device)

    def detach(self) -> None:
        """Give the modules their own forward back."""
        for path in self.paths:
            path.detach()
        self.watch.detach()

    def parameter_names(self) -> list[str]:
        """Return the names of the trainable parameters in canonical order."""
        return [place.name for place in self.parameters]

    @property
    def flat_params(self) -> nn.Parameter:
        """``[P]``: all trainable parameters as one; they become views of it, and an optimizer updates one.

        Raises:
            PrivacyError: If their dtypes differ.
        """
        if self._flat_params is None:
            self._flat_params = flatten(self.parameters)
        return self._flat_params

    @property
    def owned_by_optimizer(self) -> tuple[list[nn.Parameter], nn.Parameter | None]:
        """The trainable parameters, and the flat one where it exists: what an optimizer may own."""
        return [place.parameter for place in self.parameters], self._flat_params

    def backward(self, losses: Tensor, unit_ids: Sequence[Hashable] | None = None) -> BatchGradients:
        """Differentiate each sample's loss.

        Args:
            losses: ``[B]``, one loss per sample, still attached to its graph. Losses must not be coupled: row
                ``i`` may depend on sample ``i`` only.
            unit_ids: Privacy unit of each sample; every sample is a unit of its own when None. The gradients
                of one unit's samples count as one.

        Returns:
            The recorded gradients, valid until the next call. With two passes they hold the graph of
            ``losses``, and may be accumulated (or materialized) once.

        Raises:
            PrivacyError: If ``losses`` is not one value per sample, a layer saw another number of samples, or
                a parameter was used outside of its module.
        """
        if losses.ndim != 1:
            raise PrivacyError(
                f"losses must hold one value per sample, shape [B], got shape {tuple(losses.shape)}. A mean "
                "or sum over the batch mixes samples: use reduction='none' and reduce within each sample "
                "only."
            )
        if len(losses) and not losses.requires_grad:
            raise PrivacyError(
                "losses are not attached to a graph, so nothing would be trained: they were detached, or "
                "computed under torch.no_grad() or from frozen layers alone. Compute them with gradients."
            )
        if unit_ids is not None and len(unit_ids) != len(losses):
            raise PrivacyError(f"unit_ids has {len(unit_ids)} entries for {len(losses)} losses.")
        self._start(len(losses))
        self._is_count_told = unit_ids is not None
        units = None if unit_ids is None else index_units(unit_ids, self.device)
        if self._rows and self._takes_two_passes:
            return self._backward_twice(losses, units)
        if self._rows:
            self._run(losses, None)
        rows = self._finish_rows()
        factored, self._factored = self._factored, {}
        self.watch.forget()
        return BatchGradients(self.parameters, rows, self._row_columns, factored, units)

    @property
    def _takes_two_passes(self) -> bool:
        return self.passes == 2 and self._buffer.shape[1] < self.num_params

    def _run(self, losses: Tensor, taker: Taker | None, *, retain_graph: bool = False) -> None:
        """Run one backward pass that records, with a proof before the first of its kind."""
        refuse_changed(self.parameters, self._frozen)
        refuse_gradients(self.parameters, "before the pass")
        reached = reached_by(losses)
        refuse_outside(reached.leaves, self._rows, self.model, self._place)
        self._recording = True
        try:
            if not self._is_second:
                self._prove_isolation(losses, reached)
            self._taker = taker
            may_prove_again = self._isolation.has_silent_layers and self.agree_on_most is None
            self._differentiate(losses, None, retain_graph=retain_graph or may_prove_again)
            if self._isolation.pop_asked_again() and may_prove_again:  # else before the next batch
                self._prove_isolation(losses, reached)
        finally:
            self._recording, self._taker = False, None
        refuse_gradients(self.parameters, "by the pass")

    def _differentiate(self, losses: Tensor, rows: Tensor | None, *, retain_graph: bool) -> None:
        if self.before_pass is not None:
            self.before_pass(losses)
        with without_autocast(), refuse_used_up():  # autocast would reach the layers' own backward passes
            (losses if rows is None else losses[rows]).sum().backward(retain_graph=retain_graph)

    def _backward_twice(self, losses: Tensor, units: Tensor | None) -> BatchGradients:
        """Measure in a first pass, and hand out how to run the second."""
        number = self._number

        def run_again(taker: Taker | None) -> dict[int, Uses]:
            if number != self._number:
                raise PrivacyError(
                    "these gradients are of an earlier backward. With passes=2 accumulate them before the "
                    "next."
                )
            self._is_second = True
            try:
                self._run(losses, taker)
            finally:
                self._is_second = False
            factored, self._factored = self._factored, {}
            self.watch.forget()
            return factored

        while True:
            rows = self._buffer[: self._rows]
            batch = TwoPassGradients(self.parameters, rows, self._row_columns, units, run_again)
            measuring = Measuring(batch, self._repeated)
            try:
                self._run(losses, measuring, retain_graph=True)
            except RuntimeError as error:
                if "donated buffer" not in str(error):
                    raise
                raise PrivacyError(
                    "a compiled model keeps no second backward pass: use passes=1, or do not compile it."
                ) from error
            if not measuring.found:
                break
            self._repeated |= measuring.found
            self._start(self._rows)
            number = self._number
        measuring.finish(self._factored)
        self._finish_rows()
        return batch

    def _finish_rows(self) -> Tensor:
        rows = self._buffer[: self._rows]
        for index, (start, stop) in self._row_columns.items():
            if index not in self._written:
                rows[:, start:stop] = 0.0
        return rows

    def check(self, losses_of: Callable[[list[int]], Tensor], batch_size: int) -> float:
        """Compare a small batch with ordinary autograd, parameter by parameter, and with each sample alone.

        Run it on public examples of unequal length. Trainable parameters that are all zero hold random values
        meanwhile: a fresh adapter has some (``B`` of LoRA), and with them other gradients that are zero
        whether right or wrong.

        Args:
            losses_of: Called with a list of row indices, returns their losses ``[len(rows)]`` from a fresh
                forward pass without dropout.
            batch_size: Number of rows that ``losses_of`` accepts; at least 1.

        Returns:
            The largest relative difference of the whole gradient.

        Raises:
            PrivacyError: If the accumulated gradient differs from ordinary autograd's, if a sample's gradient
                depends on its batch-mates (a coupled loss), or if no gradient reaches the parameters.
        """
        try:
            return check_against_autograd(self, losses_of, batch_size)
        finally:
            self._isolation.forget()  # another loss may follow

    @contextlib.contextmanager
    def ordinary_autograd(self) -> Iterator[None]:
        """Run the modules' own forwards meanwhile, so that autograd computes every gradient itself."""
        for path in self.paths:
            path.detach()
        try:
            yield
        finally:
            for path in self.paths:
                path.attach()
            self.watch.forget()  # no backward() of ours follows, and the next pass may have other rows

    def place_of(self, parameter: nn.Parameter) -> TrainableParameter | None:
        """Return the place of a parameter, None for a frozen one."""
        return self._place.get(id(parameter))

    def meet(self, owned: Sequence[tuple[nn.Module, str, TrainableParameter]]) -> None:
        """Learn the parameters that a wrapper put in the place of its shards for the running pass (FSDP2).

        Args:
            owned: A module, the name of its parameter there, and the parameter's place.
        """
        for module, name, place in owned:
            parameter = module._parameters[name]
            if parameter is not None and id(parameter) not in self._place:
                self._unsharded.append(parameter)
                self._place[id(parameter)] = place

    def record_dense(self, place: TrainableParameter, a: Tensor, g: Tensor, name: str) -> None:
        """Record the gradient ``g_i^T a_i`` of a matrix; ``a``: ``[B, ..., d]``, ``g``: ``[B, ..., p]``."""
        a, g = as_3d(self.by_sample(a, name)), as_3d(self.by_sample(g, name))
        if place.index in self._row_columns:  # a layer of another kind has the same weight
            self.record_rows(place, dense_rows(a, g, self.compute_dtype), name)
            return
        must_keep = self._takes_two_passes or self._owners[id(place.parameter)] > 1
        self._uses(place, name).add_dense(a, g, self.compute_dtype, is_tied=must_keep)
        self._give(place)

    def record_lookup(self, place: TrainableParameter, ids: Tensor, g: Tensor, name: str) -> None:
        """Record the gradient of a table; ``ids``: ``[B, T]``, ``g``: ``[B, T, d]``."""
        ids, g = self.by_sample(ids, name), self.by_sample(g, name)
        ids, g = ids.reshape(self._rows, -1), g.reshape(self._rows, -1, g.shape[-1])
        if place.index in self._row_columns:
            self.record_rows(place, lookup_rows(ids, g, place.shape[0], self.compute_dtype), name)
            return
        self._uses(place, name).lookups.append((ids, g))
        self._give(place)

    def record_routed(
        self, place: TrainableParameter, a: Tensor, g: Tensor, expert: Tensor, name: str
    ) -> None:
        """Record the gradients ``g^T a`` of experts ``[E, p, d]``; ``a``: ``[S, d]``, ``g``: ``[S, p]``.

        ``expert``: ``[S]``, the expert of each slot, batch-major. Where ``k`` slots in a row are one token's,
        ``a`` or ``g`` may hold the token once: ``[S / k, ...]``.
        """
        a, g, expert = (self.by_sample(part, name) for part in (a, g, expert))
        self._uses(place, name).routed.append((as_3d(a), as_3d(g), expert.reshape(self._rows, -1)))
        self._give(place)

    def _give(self, place: TrainableParameter) -> None:
        if self._taker is not None:
            self._taker.take(place, self._factored)

    def record_rows(self, place: TrainableParameter, grads: Tensor, name: str) -> None:
        """Record written-out gradients ``[B, *shape]`` of a parameter."""
        if self._is_second:
            return
        if grads.shape[0] != self._rows:
            raise not_by_sample(name, grads.shape, self._rows)
        columns = self.row_slice(place).unflatten(1, grads.shape[1:] or (1,))
        grads = grads.view(columns.shape) if grads.ndim == 1 else grads
        if place.index in self._written:  # the module ran more than once in this forward
            columns += grads
        else:
            columns.copy_(grads)
            self._written.add(place.index)

    def _uses(self, place: TrainableParameter, name: str) -> Uses:
        if place.index in self._row_columns:
            raise PrivacyError(
                f"{place.name} is shared by layers of different kinds, and layer {name} has no path that "
                "covers both. Untie it, or freeze it (requires_grad_(False))."
            )
        return self._factored.setdefault(place.index, Uses())

    def wants(self, path: Path, *grads: Tensor | None) -> bool:
        """Tell a path whether to record in the running pass, and look at its gradients.

        Args:
            path: Whose outputs' gradients the pass reached.
            *grads: ``[B, ...]`` each; None for an output that was not used.

        Returns:
            Whether it shall. Not where nothing of it is wanted: the second pass, and it writes rows only.

        Raises:
            PrivacyError: If a proof fails, or a plain backward() would train nothing.
        """
        given = [g for g in grads if g is not None]
        if self._isolation.is_running:
            for g in given:
                self._isolation.refuse_coupled(self.by_sample(g, path.name), path.name)
            return False
        if not self._recording:
            refuse_plain_backward(path)
            return False
        for g in given:
            self._isolation.notice(g, path.name)
        places = (self.place_of(parameter) for parameter in path.parameters)
        has_all = self._is_second and all(p is None or p.index in self._row_columns for p in places)
        return bool(given) and not has_all

    def row_slice(self, place: TrainableParameter) -> Tensor:
        """Return the columns of a parameter in the buffer of the running pass: ``[B, numel]``."""
        start, stop = self._row_columns[place.index]
        return self._buffer[: self._rows, start:stop]

    def rows_to_write(self, *places: TrainableParameter) -> tuple[list[Tensor], bool]:
        """Hand a path the places that it writes itself in the running pass.

        Args:
            *places: Parameters whose gradients are written together.

        Returns:
            ``[B, *shape]`` of each parameter, and whether to add to what is there: the module ran before. In
            the second pass, which wants factors only, memory that nobody reads.
        """
        if self._is_second:
            return [self._buffer.new_empty(self._rows, *place.shape) for place in places], False
        is_added = any(place.index in self._written for place in places)
        rows = [self.row_slice(place).unflatten(1, place.shape) for place in places]
        for place, own in zip(places, rows, strict=True):
            if is_added and place.index not in self._written:
                own.zero_()
            self._written.add(place.index)
        return rows, is_added

    def warn_of_loop(self, name: str, module: nn.Module, reason: str) -> None:
        """Say once for each kind of layer that it is differentiated one sample after another."""
        kind = type(module)
        if kind not in self._looped_kinds:
            self._looped_kinds.add(kind)
            _logger.warning(
                "layer %s and others of its kind (%s) run once for each sample, which is slow, since they "
                "can't be vectorised: %s",
                name,
                kind.__name__,
                reason,
            )

    def _prove_isolation(self, losses: Tensor, reached: Reached) -> None:
        """Prove that samples are isolated, where this batch is the first of its kind."""
        given, seen = self.watch.given_samples, self.watch.batch_rows
        ratio = 1.0 if seen is None else seen / self._rows
        state = (self.model.training, ratio, self.watch.rows_unlike_the_arguments(self._rows))
        is_told = self._is_count_told or self._isolation.was_isolated(state)
        if self._rows == 1 and given is not None and given > 1 and not is_told:
            raise PrivacyError(
                f"the model got {given} rows and there is one loss. A mean or sum over the batch mixes "
                "samples: use reduction='none' and reduce within each sample only. If all rows are one "
                "sample, give them to the model as [1, rows, ...], or name its unit in unit_ids."
            )
        self._isolation.run(
            self._rows,
            state,
            lambda rows: self._differentiate(losses, rows, retain_graph=True),
            layers={(n, False) for n in reached.layers} | {(n, True) for n in self.hidden_calls},
            graph=reached.graph,
            device=losses.device,
            agree_on_most=self.agree_on_most,
        )
        self.hidden_calls.clear()

    def _start(self, rows: int) -> None:
        self._rows = rows
        self._number += 1
        if self._buffer.shape[0] < rows:
            self._buffer = self._buffer.new_empty(rows, self._buffer.shape[1])
        self._written.clear()
        self._factored = {}

    def by_sample(self, tensor: Tensor, name: str) -> Tensor:
        """View ``[B, ...]`` or ``[B * T, ...]`` with one row per sample; the first pass proves that it is so.

        Args:
            tensor: What a layer saw.
            name: The layer's name.

        Returns:
            ``[B, ...]``.

        Raises:
            PrivacyError: If the number of rows is not a multiple of the number of samples, or a sample's loss
                reaches another sample's rows.
        """
        if tensor.ndim == 0 or tensor.shape[0] == 0 or tensor.shape[0] % self._rows:
            raise not_by_sample(name, tensor.shape, self._rows)
        if tensor.shape[0] > self._rows:
            tensor = tensor.unflatten(0, (self._rows, -1))
        return tensor
