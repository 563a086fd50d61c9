"""Per-sample gradients of any module, by differentiating it again for each sample (``torch.func``).

For parameters that a module uses in its own way: class tokens, position tables, scales, DoRA, IA3. The module
runs once as usual, with its parameters detached; in the backward pass it runs again for each sample, mapped
over the batch.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.gradients import TrainableParameter
from securetune.privacy.per_sample.paths import Path, recorded

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients


class FunctionalPath(Path):
    """A module whose trainable parameters, its children's included, are differentiated sample by sample."""

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
        detached = {name: parameter.detach() for name, parameter in named.items()}
        y = self._functional(detached, args, kwargs)
        if not isinstance(y, Tensor):
            raise PrivacyError(
                f"layer {self.name} ({type(self.module).__name__}) returns a {type(y).__name__}; its "
                f"parameters {', '.join(named)} have an exact path only through a single tensor. Freeze them "
                "(requires_grad_(False)), or move them into a module of their own that returns a tensor."
            )
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]

        def record(g: Tensor, *saved: Tensor) -> None:
            self._record(g, list(saved), named, args, kwargs)

        return recorded(self, y, record, *tensors)

    def _record(
        self, g: Tensor, saved: list[Tensor], named: dict[str, nn.Parameter], args: Any, kwargs: Any
    ) -> None:
        g = self.engine.by_sample(g, self.name)
        rows = g.shape[0]
        in_dims = tuple(0 if value.ndim and value.shape[0] == rows else None for value in saved)
        shapes = [value is None for value in in_dims]

        def one_sample(g_row: Tensor, *values: Tensor) -> dict[str, Tensor]:
            with_batch = [
                value if is_shared else value.unsqueeze(0)
                for value, is_shared in zip(values, shapes, strict=True)
            ]
            replaced = iter(with_batch)
            new_args = [next(replaced) if isinstance(value, Tensor) else value for value in args]
            new_kwargs = {
                key: next(replaced) if isinstance(value, Tensor) else value for key, value in kwargs.items()
            }
            detached = {name: parameter.detach() for name, parameter in named.items()}
            found: Any = vjp(lambda params: self._functional(params, new_args, new_kwargs)[0], detached)
            return found[1](g_row)[0]

        values = [value.detach() for value in saved]
        try:
            with torch.enable_grad():
                grads = vmap(one_sample, in_dims=(0, *in_dims))(g, *values)
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise
            raise _random_layer(self, "a random operation") from error
        for name, parameter in named.items():
            place = self.engine.place_of(parameter)
            assert place is not None
            self.engine.record_rows(place, grads[name], self.name)

    def _functional(self, parameters: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        patched = self.module.forward
        self.module.forward = self._original
        try:
            return functional_call(self.module, parameters, tuple(args), dict(kwargs))
        finally:
            self.module.forward = patched

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
        detached = {name: parameter.detach() for name, parameter in named.items()}
        tokens = self._tokens.to(self.parameters[0].device)
        prompts = self._functional(detached, (tokens,), {}).expand(batch_size, -1, -1)
        return recorded(self, prompts, lambda g: self._record(g, [tokens], named, (tokens,), {}))


def _random_layer(path: FunctionalPath, what: str) -> PrivacyError:
    return PrivacyError(
        f"layer {path.name} ({type(path.module).__name__}) has {what}, and its gradients are computed by "
        "running it again, with other random values. Set its dropouts to 0 or put it into evaluation mode."
    )
