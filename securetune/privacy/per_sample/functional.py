"""Per-sample gradients of any module, by differentiating it again for each sample (``torch.func``).

For parameters that a module uses in its own way: class tokens, position tables, scales, DoRA, IA3. The module
runs once as usual, with its parameters detached; in the backward pass it runs again for each sample, mapped
over the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.draws import Draws
from securetune.privacy.per_sample.gradients import TrainableParameter
from securetune.privacy.per_sample.model_layers import (
    CACHES,
    checkpointing_of,
    is_unused_cache,
    without_checkpointing,
)
from securetune.privacy.per_sample.paths import Path, recorded, recorded_all, trains_now

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients

# Largest relative difference between the module's output and that of its samples one by one, by the coarsest
# dtype that computes.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}


# what modules raise where one sample is not what they were written for
_CANNOT_RUN = (RuntimeError, IndexError, KeyError, TypeError, ValueError)
_KNOWN_KINDS = (Tensor, bool, int, float, str, type(None))
_POSITION_TABLE = "relative_attention_bias"
_POSITION_METHODS = ("compute_bias", "compute_position_bias")


class FunctionalPath(Path):
    """A module whose trainable parameters, its children's included, are differentiated sample by sample.

    Dropout masks and random numbers that the module draws are kept and used again.
    """

    def __init__(self, engine: "PerSampleGradients", name: str, module: Any) -> None:
        super().__init__(engine, name, module)
        self._compared: set[tuple[bool, ...]] = set()
        self._is_looped = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the module and its children."""
        return list(self._named().values())

    def row_places(self) -> list[TrainableParameter]:
        """All of them."""
        places = (self.engine.place_of(parameter) for parameter in self.parameters)
        return [place for place in places if place is not None]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; tensors with one row per sample are split, all other arguments are shared."""
        checkpoint = checkpointing_of(self.module)
        if checkpoint is None:
            return self._run(*args, **kwargs)
        # around this path, where its parameters are the same when the module runs again
        return checkpoint(
            partial(self._run, **kwargs | {key: None for key in CACHES if key in kwargs}), *args
        )

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # reentrant checkpointing does so at first
            with without_checkpointing(self.module):
                return self._original(*args, **kwargs)
        named = self._named()
        unknown = [key for key, parameter in named.items() if self.engine.place_of(parameter) is None]
        if unknown:
            raise trains_now(self.name, unknown[0])
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = [
            None if isinstance(leaf, Tensor) or is_unused_cache(leaf, self.module) else leaf
            for leaf in leaves
        ]
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        num_tensors = len(tensors)  # what outlives this call must not hold the tensors themselves
        draws = Draws()
        with draws:
            y = self._functional(detach_all(named), args, kwargs)
        outputs, output_spec = tree_flatten(y)
        watched = [i for i, leaf in enumerate(outputs) if _is_differentiable(leaf)]
        opaque = [leaf for leaf in outputs if not isinstance(leaf, _KNOWN_KINDS)]
        if not watched or opaque:  # a gradient could pass through what can't be seen into
            kind = type(opaque[0] if opaque else y).__name__
            hint = "; call the model with use_cache=False" if kind.endswith("Cache") else ""
            raise self._not_splittable(f"it returns a {kind}, not tensors that could be watched{hint}")
        device = outputs[watched[0]].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

        def run_on(parameters: dict[str, Tensor], values: list[Tensor]) -> list[Tensor]:
            given = iter(values[:num_tensors])
            rebuilt = [next(given) if here else leaf for here, leaf in zip(is_tensor, others, strict=True)]
            new_args, new_kwargs = tree_unflatten(rebuilt, spec)
            with Draws(values[num_tensors:]):
                again = tree_flatten(self._functional(parameters, new_args, new_kwargs))[0]
            return [again[i] for i in watched]

        kinds = {type(leaf).__name__ for leaf in others if not isinstance(leaf, _KNOWN_KINDS)}
        call = Rerun(run_on, device, autocast, ", ".join(sorted(kinds)))
        is_shared = self._is_shared(tensors)

        def record(g: Sequence[Tensor | None], *saved: Tensor) -> None:
            values = [value.detach() for value in saved]
            self._record(g, values, named, call, is_shared=is_shared, num_tensors=num_tensors)

        parts = [outputs[i] for i in watched]
        if is_shared:
            rows = self.engine.watch.nearest_rows
            assert rows is not None
            parts = [part.expand(rows, *part.shape[1:]) if part.shape[:1] == (1,) else part for part in parts]
        for i, part in zip(watched, recorded_all(self, parts, record, *tensors, *draws.drawn), strict=True):
            outputs[i] = part
        return tree_unflatten(outputs, output_spec)

    def _named(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def _is_shared(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the module runs once for all samples, as a table of relative positions does."""
        rows = self.engine.watch.nearest_rows
        return rows is not None and rows > 1 and not any(value.shape[:1] > (1,) for value in tensors)

    def _record(
        self,
        grads: Sequence[Tensor | None],
        values: list[Tensor],
        named: dict[str, nn.Parameter],
        call: "Rerun",
        *,
        is_shared: bool,
        num_tensors: int = 0,
    ) -> None:
        """Differentiate each sample; ``grads``: ``[B, ...]``, or ``[B T, ...]`` for rows that are no samples.

        An output that the losses do not depend on has no gradient. Of the values the first ``num_tensors``
        were given to the module, the others it drew: those may be ``[B H, ...]``, for each head of attention.
        """
        engine = self.engine
        used = [i for i, g in enumerate(grads) if g is not None]
        outputs = [g for g in grads if g is not None]
        by_sample = [engine.by_sample(g, self.name) for g in outputs]
        given = outputs[0].shape[0]
        if any(g.shape[0] != given for g in outputs):
            raise self._not_splittable("its outputs have different first dimensions")
        rows = by_sample[0].shape[0]
        is_flat = given > rows
        firsts = [value.shape[0] if value.ndim and rows > 1 and not is_shared else 0 for value in values]
        is_split = [
            first in (given, rows) or (i >= num_tensors and first > 0 and first % rows == 0)
            for i, first in enumerate(firsts)
        ]
        # a router may get [B, T, d] and return [B T, k]
        is_whole = [first == rows for first in firsts]  # else the sample's rows of [B T, ...]
        split = [
            engine.by_sample(value, self.name) if here else value
            for value, here in zip(values, is_split, strict=True)
        ]
        parameters = detach_all(named)
        if is_shared and is_flat:  # all of a sample's rows are the same output
            by_sample, is_flat = [g.sum(dim=1) for g in by_sample], False

        def pick(found: list[Tensor]) -> list[Tensor]:
            return [found[i] if is_flat else found[i][0] for i in used]

        def one_sample(
            g_rows: list[Tensor], value_rows: list[Tensor]
        ) -> tuple[dict[str, Tensor], list[Tensor]]:
            own = [
                row.unsqueeze(0) if whole else row for row, whole in zip(value_rows, is_whole, strict=True)
            ]
            found, pullback, *_ = vjp(lambda params: pick(call(params, own)), parameters)
            return pullback(g_rows)[0], found

        def one_alone(row: int) -> tuple[dict[str, Tensor], list[Tensor]]:
            own = [
                (value[row : row + 1] if whole else value[row]) if here else value
                for value, here, whole in zip(split, is_split, is_whole, strict=True)
            ]
            leaves = {name: parameter.detach().requires_grad_(True) for name, parameter in named.items()}
            found = pick(call(leaves, own))
            pairs = [(y, g[row]) for y, g in zip(found, by_sample, strict=True) if y.requires_grad]
            grads: Sequence[Tensor | None] = [None] * len(leaves)
            if pairs:
                ys, gs = zip(*pairs, strict=True)
                grads = torch.autograd.grad(ys, list(leaves.values()), gs, allow_unused=True)
            filled = [
                torch.zeros_like(p) if g is None else g for p, g in zip(leaves.values(), grads, strict=True)
            ]
            return dict(zip(leaves, filled, strict=True)), [y.detach() for y in found]

        in_dims = ([0] * len(by_sample), [0 if here else None for here in is_split])
        with torch.enable_grad():
            found, results = self._over_samples(
                lambda: vmap(one_sample, in_dims=in_dims)(by_sample, split), one_alone, rows
            )
        if is_flat:
            results = [result.flatten(0, 1) for result in results]
        self._compare_outputs(results, used, is_split, call, values, parameters)
        for name, parameter in named.items():
            place = engine.place_of(parameter)
            assert place is not None
            engine.record_rows(place, found[name].unsqueeze(-1), self.name)

    def _over_samples(self, at_once: Callable[[], Any], one_alone: Callable[[int], Any], rows: int) -> Any:
        """Run at once, or one sample after another where an operation inside can't be vectorised."""
        if not self._is_looped:
            try:
                return at_once()
            except torch.OutOfMemoryError:
                raise
            except _CANNOT_RUN as error:
                if "randomness" in str(error):
                    raise _random_layer(self) from error
                self._is_looped = True
                self.engine.warn_of_loop(self.name, self.module, str(error).splitlines()[0])
        before = _random_states()
        try:
            each = [one_alone(row) for row in range(rows)]
        except _CANNOT_RUN as error:
            self._is_looped = False
            raise self._not_splittable(str(error).splitlines()[0]) from error
        if any(not torch.equal(old, new) for old, new in zip(before, _random_states(), strict=True)):
            raise _random_layer(self)
        grads = {name: torch.stack([found[name] for found, _ in each]) for name in each[0][0]}
        return grads, [torch.stack(parts) for parts in zip(*(outputs for _, outputs in each), strict=True)]

    def _compare_outputs(
        self,
        results: list[Tensor],
        used: list[int],
        is_split: list[bool],
        call: "Rerun",
        values: list[Tensor],
        parameters: dict[str, Tensor],
    ) -> None:
        """Refuse a wrong guess of which arguments have one row per sample: a shared one may look so.

        A single argument is compared the first time; several, or samples that run one by one, each time.
        """
        key = tuple(is_split)
        if key in self._compared and sum(is_split) <= 1 and not self._is_looped:
            return
        with torch.no_grad():
            every = call(parameters, values)
        dtypes = {call.autocast, *(part.dtype for part in (*every, *values, *self.module.parameters()))}
        tolerance = max(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes if dtype is not None)
        for result, expected in zip(results, (every[i] for i in used), strict=True):
            if not sum(is_split):  # one output for all samples, or the same for each
                result = result[: expected.shape[0]]
                expected = expected[: result.shape[0]]
            finite = expected.isfinite()
            difference = torch.where(finite, result - expected, 0.0).norm()
            if not difference <= tolerance * torch.where(finite, expected, 0.0).norm():
                hint = f" (tensors in its {call.opaque} can't be split; give a dict)" if call.opaque else ""
                raise self._not_splittable(
                    f"its output for one sample alone differs from that in the batch{hint}"
                )
        self._compared.add(key)

    def _not_splittable(self, reason: str) -> PrivacyError:
        own = [name for name in self._named() if "." not in name]
        whose = f"; its own {', '.join(own)} can't be told apart by sample otherwise" if own else ""
        return PrivacyError(
            f"layer {self.name} ({type(self.module).__name__}) can't be run sample by sample: {reason}{whose}"
            ". Give it batch-first arguments, and those that all samples share with a first dimension of 1, "
            f"or freeze {', '.join(own) or 'it'} (requires_grad_(False))."
        )

    def _functional(self, parameters: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        """Run the module's own forward without its hooks, which already run around this path."""
        replaced = {f"module.{name}": parameter for name, parameter in parameters.items()}
        with without_checkpointing(self.module):
            return functional_call(_Bare(self.module, self._forward), replaced, args, kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._original(*args, **kwargs)


class SequencePath(FunctionalPath):
    """A layer of torch over sequences, which may have their positions first: ``[T, B, d]``."""

    _tells_rows = False

    def _swap(self, *parts: Tensor) -> list[Tensor]:
        """Put the samples of ``[T, B, d]`` first."""
        self.engine.watch.positions_first = parts[0].shape[:2]
        return [part.transpose(0, 1) for part in parts]

    def _is_shared(self, tensors: Sequence[Tensor]) -> bool:
        # the rows of a module around it may be positions, where the batch has one sample
        return super()._is_shared(tensors) and tensors[0].shape[1] != self.engine.watch.nearest_rows


class PromptPath(FunctionalPath):
    """Prompt tuning and p-tuning: peft makes one prompt and repeats it, so the output is watched instead.

    Args:
        engine: Who records.
        name: Name of the prompt encoder in the model.
        peft_model: The model whose ``get_prompt`` this path stands in for.
    """

    def __init__(self, engine: "PerSampleGradients", name: str, peft_model: Any) -> None:
        self._peft_model = peft_model
        super().__init__(engine, name, peft_model.prompt_encoder[peft_model.active_adapter])
        self._original = self.module.forward
        self._tokens = peft_model.prompt_tokens[peft_model.active_adapter][None]

    def attach(self) -> None:
        """Stand in for ``get_prompt``."""
        self._peft_model.get_prompt = self._prompt

    def detach(self) -> None:
        """Give ``get_prompt`` back."""
        self._peft_model.__dict__.pop("get_prompt", None)

    def _prompt(self, batch_size: int, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return type(self._peft_model).get_prompt(self._peft_model, batch_size, *args, **kwargs)
        named = self._named()
        tokens = self._tokens.to(self.parameters[0].device)

        def run_on(parameters: dict[str, Tensor], _: list[Tensor]) -> list[Tensor]:
            return [self._functional(parameters, (tokens,), {})]

        call = Rerun(run_on, tokens.device.type, None)
        prompts = call(detach_all(named), [])[0].expand(batch_size, -1, -1)
        return recorded(self, prompts, lambda g: self._record([g], [], named, call, is_shared=True))


class PositionBiasPath(FunctionalPath):
    """A table of relative positions that a method looks up once for all samples, as in T5 and MPNet.

    Every sample gets the method's result as rows of its own.

    Args:
        engine: Who records.
        name: Name of the table in the model.
        attention: The module with the table and the method.
        table: The table's name in it.
        method: Name of the method.
    """

    def __init__(
        self, engine: "PerSampleGradients", name: str, attention: Any, table: str, method: str
    ) -> None:
        super().__init__(engine, name, attention)
        self._table, self._method = table, method
        self._original = getattr(attention, method)

    def attach(self) -> None:
        """Stand in for the method."""
        setattr(self.module, self._method, self._call)

    def detach(self) -> None:
        """Give the method back."""
        self.module.__dict__.pop(self._method, None)

    def _named(self) -> dict[str, nn.Parameter]:
        return {f"{self._table}.weight": getattr(self.module, self._table).weight}

    def _is_shared(self, tensors: Sequence[Tensor]) -> bool:
        return self.engine.watch.nearest_rows is not None

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.engine.watch.nearest_rows
        if rows is None or torch.is_grad_enabled():
            return super()._call(*args, **kwargs)
        # reentrant checkpointing runs layers without gradients first, and compares the shapes
        bias = self._original(*args, **kwargs)
        return bias.expand(rows, *bias.shape[1:])


def position_bias_path(engine: "PerSampleGradients", name: str, module: nn.Module) -> PositionBiasPath | None:
    """Return the path of an attention's trainable table of relative positions, None where there is none.

    Args:
        engine: Who will record.
        name: The module's name.
        module: Any module.

    Returns:
        The path, not yet attached.
    """
    table = getattr(module, _POSITION_TABLE, None)
    method = next((known for known in _POSITION_METHODS if hasattr(module, known)), None)
    if not isinstance(table, nn.Embedding) or not table.weight.requires_grad or method is None:
        return None
    prefix = f"{name}." if name else ""
    return PositionBiasPath(engine, f"{prefix}{_POSITION_TABLE}", module, _POSITION_TABLE, method)


@dataclass(frozen=True)
class Rerun:
    """A module on other parameters and tensors, under the autocast it ran with at first."""

    function: Callable[[dict[str, Tensor], list[Tensor]], list[Tensor]]
    device: str
    autocast: torch.dtype | None
    opaque: str = ""  # kinds of arguments that may hide tensors

    def __call__(self, parameters: dict[str, Tensor], values: list[Tensor]) -> list[Tensor]:
        """Return the module's outputs."""
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            return self.function(parameters, values)


class _Bare(nn.Module):
    """A module's forward without the hooks of its ``__call__``."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self._forward = module, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self._forward(*args, **kwargs)


def detach_all(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Detach parameters, by their names."""
    return {name: parameter.detach() for name, parameter in named.items()}


def _random_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, *torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else states


def _is_differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _random_layer(path: FunctionalPath) -> PrivacyError:
    return PrivacyError(
        f"layer {path.name} ({type(path.module).__name__}) has a random operation that is no ordinary "
        "dropout, and its gradients are computed by running it again, with other random values. Set its "
        "dropouts to 0 or put it into evaluation mode."
    )
