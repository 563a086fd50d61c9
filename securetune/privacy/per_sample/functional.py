"""Per-sample gradients of any module, by differentiating it again for each sample (``torch.func``).

For parameters that a module uses in its own way: class tokens, position tables, scales, DoRA, IA3. The module
runs once as usual, with its parameters detached; in the backward pass it runs again for each sample, mapped
over the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.gradients import TrainableParameter
from securetune.privacy.per_sample.paths import Path, recorded

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients

# Largest relative difference between the module's output and that of its samples one by one, by the coarsest
# dtype that computes.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}


class FunctionalPath(Path):
    """A module whose trainable parameters, its children's included, are differentiated sample by sample."""

    def __init__(self, engine: "PerSampleGradients", name: str, module: Any) -> None:
        super().__init__(engine, name, module)
        self._compared: set[tuple[bool, ...]] = set()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the module and its children."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def row_places(self) -> list[TrainableParameter]:
        """All of them."""
        places = (self.engine.place_of(parameter) for parameter in self.parameters)
        return [place for place in places if place is not None]

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the module; tensors with one row per sample are split, all other arguments are shared."""
        self._refuse_randomness()
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        y = self._functional(_detach(named), args, kwargs)
        if not isinstance(y, Tensor):
            raise PrivacyError(
                f"layer {self.name} ({type(self.module).__name__}) returns a {type(y).__name__}; its "
                f"parameters {', '.join(named)} have an exact path only through a single tensor. Freeze them "
                "(requires_grad_(False)), or move them into a module of their own that returns a tensor."
            )
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        device = y.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

        def run_on(parameters: dict[str, Tensor], values: list[Tensor]) -> Tensor:
            given = iter(values)
            rebuilt = [next(given) if here else leaf for here, leaf in zip(is_tensor, others, strict=True)]
            new_args, new_kwargs = tree_unflatten(rebuilt, spec)
            return self._functional(parameters, new_args, new_kwargs)

        call = _Rerun(run_on, device, autocast)

        def record(g: Tensor, *saved: Tensor) -> None:
            self._record(g, [value.detach() for value in saved], named, call)

        return recorded(self, y, record, *tensors)

    def _record(
        self,
        g: Tensor,
        values: list[Tensor],
        named: dict[str, nn.Parameter],
        call: "_Rerun",
    ) -> None:
        """Differentiate each sample; ``g``: ``[B, ...]``, or ``[B T, ...]`` for rows that are no samples."""
        engine, given = self.engine, g.shape[0]
        g = engine.by_sample(g, self.name)
        is_flat = given > g.shape[0]
        is_split = [bool(value.ndim) and value.shape[0] == given for value in values]
        split = [
            engine.by_sample(value, self.name) if here else value
            for value, here in zip(values, is_split, strict=True)
        ]
        parameters = _detach(named)

        def one_sample(g_row: Tensor, *rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            own = [
                row.unsqueeze(0) if here and not is_flat else row
                for row, here in zip(rows, is_split, strict=True)
            ]

            def run(params: dict[str, Tensor]) -> Tensor:
                y = call(params, own)
                return y if is_flat else y[0]

            y, pullback, *_ = vjp(run, parameters)
            return pullback(g_row)[0], y

        in_dims = (0, *(0 if here else None for here in is_split))
        try:
            with torch.enable_grad():
                grads, outputs = vmap(one_sample, in_dims=in_dims)(g, *split)
        except RuntimeError as error:
            if "randomness" in str(error):
                raise _random_layer(self, "a random operation") from error
            raise self._not_splittable(str(error).splitlines()[0]) from error
        self._compare_outputs(
            outputs.flatten(0, 1) if is_flat else outputs, is_split, call, values, parameters
        )
        for name, parameter in named.items():
            place = engine.place_of(parameter)
            assert place is not None
            engine.record_rows(place, grads[name].unsqueeze(-1), self.name)

    def _compare_outputs(
        self,
        outputs: Tensor,
        is_split: list[bool],
        call: "_Rerun",
        values: list[Tensor],
        parameters: dict[str, Tensor],
    ) -> None:
        """Refuse a wrong guess of which arguments have one row per sample: a shared one may look so.

        A single argument is compared the first time, several each time.
        """
        key = tuple(is_split)
        if key in self._compared and sum(is_split) <= 1:
            return
        with torch.no_grad():
            expected = call(parameters, values)
        if not sum(is_split):  # one output for all samples, or the same for each
            outputs = outputs[: expected.shape[0]]
        finite = expected.isfinite()
        difference = torch.where(finite, outputs - expected, 0.0).norm()
        dtypes = {call.autocast, *(part.dtype for part in (expected, *values, *self.module.parameters()))}
        tolerance = max(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes if dtype is not None)
        if not difference <= tolerance * torch.where(finite, expected, 0.0).norm():
            raise self._not_splittable("its output for one sample alone differs from that in the batch")
        self._compared.add(key)

    def _not_splittable(self, reason: str) -> PrivacyError:
        return PrivacyError(
            f"layer {self.name} ({type(self.module).__name__}) can't be run sample by sample: {reason}. "
            "Give it batch-first arguments, and those that all samples share with a first dimension of 1, or "
            "freeze it (requires_grad_(False))."
        )

    def _functional(self, parameters: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        """Run the module's own forward without its hooks, which already run around this path."""
        replaced = {f"module.{name}": parameter for name, parameter in parameters.items()}
        return functional_call(_Bare(self.module, self._original), replaced, args, kwargs)

    def _refuse_randomness(self) -> None:
        for name, module in self.module.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
                raise _random_layer(self, f"dropout in {name or 'itself'}")


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
        self._refuse_randomness()
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        tokens = self._tokens.to(self.parameters[0].device)

        def run_on(parameters: dict[str, Tensor], _: list[Tensor]) -> Tensor:
            return self._functional(parameters, (tokens,), {})

        call = _Rerun(run_on, tokens.device.type, None)
        prompts = call(_detach(named), []).expand(batch_size, -1, -1)
        return recorded(self, prompts, lambda g: self._record(g, [], named, call))


@dataclass(frozen=True)
class _Rerun:
    """A module on other parameters and tensors, under the autocast it ran with at first."""

    function: Callable[[dict[str, Tensor], list[Tensor]], Tensor]
    device: str
    autocast: torch.dtype | None

    def __call__(self, parameters: dict[str, Tensor], values: list[Tensor]) -> Tensor:
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


def _detach(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in named.items()}


def _random_layer(path: FunctionalPath, what: str) -> PrivacyError:
    return PrivacyError(
        f"layer {path.name} ({type(path.module).__name__}) has {what}, and its gradients are computed by "
        "running it again, with other random values. Set its dropouts to 0 or put it into evaluation mode."
    )
