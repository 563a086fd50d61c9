"""Mixture-of-experts layers of transformers: every routed token keeps the number of its sample.

The experts' weights are ``[E, p, d]``, their tokens one flat list, batch-major, so the sample of a token
follows from its position. A sample's gradient of expert ``e`` is a dense layer's over those of its tokens
that were sent to ``e``.

Dimensions: ``B`` samples, ``N`` tokens of all samples, ``E`` experts, ``k`` experts of a token, ``S = N k``
    slots (token-major), ``d`` and ``p`` input and output features, ``r`` rank of an adapter.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.functional import FunctionalPath
from securetune.privacy.per_sample.gradients import TrainableParameter, as_3d, by_expert
from securetune.privacy.per_sample.lora import ActiveAdapter, active_adapters
from securetune.privacy.per_sample.paths import Path, detached, record_sums, recorded, without_frozen
from securetune_kernels.numerics import full_precision

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients

_CASTS = (Tensor.float, Tensor.to, Tensor.type)
_NUM_EXPERTS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
)  # in configurations


class _Adapter(ActiveAdapter):
    """A peft adapter of one of the experts' weights (``target_parameters``)."""

    def of_expert(self, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``[r, d]`` and ``[p, r]``: one expert's share, as peft lays it out."""
        count = self.layer.num_experts
        a = self.a.detach().unflatten(0, (count, -1))[expert]
        b = self.b.detach().unflatten(1, (-1, count))[:, :, expert]
        return a.to(dtype), b.to(dtype)


class ExpertsPath(Path):
    """The experts of a layer, whatever the configured experts implementation: weights, biases, adapters.

    Args:
        engine: Who records.
        name: Name of the experts in the model.
        module: Whose forward this path stands in for: the experts, or the outermost adapter around them.
        adapters: The adapters around them, by the name of the weight.
    """

    def __init__(
        self, engine: "PerSampleGradients", name: str, module: Any, adapters: dict[str, _Adapter]
    ) -> None:
        super().__init__(engine, name, module)
        self._experts: Any = module.get_base_layer() if adapters else module
        self._adapters = adapters

    @property
    def has_adapters(self) -> bool:
        """Whether this path stands in for adapters around the experts, and all below them is its own."""
        return bool(self._adapters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones of the experts, and the adapters' matrices."""
        own = [parameter for parameter in self._experts._parameters.values() if parameter is not None]
        adapters = [matrix for adapter in self._adapters.values() for matrix in (adapter.a, adapter.b)]
        return [parameter for parameter in (*own, *adapters) if parameter.requires_grad]

    def row_places(self) -> list[TrainableParameter]:
        """Biases and adapters."""
        biases = [p for name, p in self._experts._parameters.items() if name.endswith("_bias")]
        adapters = [matrix for adapter in self._adapters.values() for matrix in (adapter.a, adapter.b)]
        return without_frozen([self.place(parameter) for parameter in (*biases, *adapters)])

    def run(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the experts; ``x``: ``[N, d]``, ``top_k_index`` and ``top_k_weights``: ``[N, k]``."""
        if any(adapter.is_off(self.name) for adapter in self._adapters.values()):
            return self._original(x, top_k_index, top_k_weights)
        experts = self._experts
        routes = _Routes(top_k_index.reshape(-1), experts.num_experts)
        y = self._project("gate_up_proj" if experts.has_gate else "up_proj", x, routes)
        y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
        y = self._project("down_proj", y, routes)
        if getattr(experts, "has_post_expert_norm", False):  # transformers >= 5.20
            y = experts.post_expert_norm(y)
        weighted = y * top_k_weights.reshape(-1, 1)
        return weighted.unflatten(0, (len(x), -1)).sum(dim=1).to(x.dtype)

    def _project(self, name: str, x: Tensor, routes: "_Routes") -> Tensor:
        """Apply one of the experts' weights; ``x``: ``[N, d]`` or ``[S, d]``. Returns ``[S, p]``."""
        experts, adapter = self._experts, self._adapters.get(name)
        weight = getattr(experts, name)
        bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
        repeats = len(routes.expert) // len(x)
        parts: list[Tensor] = []
        sorted_x = x.index_select(0, routes.order // repeats)
        for expert, part in enumerate(sorted_x.split(routes.sizes)):
            if not len(part):
                continue
            matrix = weight[expert].detach()
            matrix = matrix.t() if experts.is_transposed else matrix
            y = functional.linear(part, matrix, None if bias is None else bias[expert].detach())
            if adapter is not None:
                a, b = adapter.of_expert(expert, matrix.dtype)
                low = functional.linear(functional.linear(part, a), b)
                y = y + adapter.scaling * low
            parts.append(y)
        y = torch.cat(parts).index_select(0, routes.back)  # token-major again, so that samples lie together
        places = (self.place(weight), self.place(bias))
        if places == (None, None) and adapter is None:
            return y

        def record(g: Tensor, x: Tensor, expert: Tensor) -> None:
            self._record(places, adapter, x, g, expert)

        return recorded(self, y, record, x.to(y.dtype), routes.expert)

    def _record(
        self,
        places: tuple[TrainableParameter | None, TrainableParameter | None],
        adapter: _Adapter | None,
        x: Tensor,
        g: Tensor,
        expert: Tensor,
    ) -> None:
        engine, (weight, bias) = self.engine, places
        if weight is not None:
            a, b = (g, x) if self._experts.is_transposed else (x, g)
            engine.record_routed(weight, a, b, expert, self.name)
        if bias is None and adapter is None:
            return
        dtype = engine.compute_dtype
        x, g = (
            as_3d(engine.by_sample(part, self.name)).to(dtype) for part in (x, g)
        )  # [B, ., d], [B, S / B, p]
        expert = engine.by_sample(expert, self.name).reshape(len(g), -1)  # [B, S / B]
        if bias is not None:
            # a product, which adds in a fixed order; scatter_add on a GPU does not
            is_sent = functional.one_hot(expert, self._experts.num_experts).to(dtype)  # [B, S / B, E]
            with full_precision():
                rows = torch.bmm(is_sent.transpose(1, 2), g)
            engine.record_rows(bias, rows, self.name)
        if adapter is not None:
            self._record_adapter(adapter, x, g, expert)

    def _record_adapter(self, adapter: _Adapter, x: Tensor, g: Tensor, expert: Tensor) -> None:
        """Write ``dA_e = s (g B_e)^T x`` and ``dB_e = s g^T (x A_e^T)`` for each sample and expert."""
        count, samples = adapter.layer.num_experts, len(g)
        grad_a = g.new_zeros(samples, *adapter.a.unflatten(0, (count, -1)).shape)  # [B, E, r, d]
        grad_b = g.new_zeros(samples, *adapter.b.unflatten(1, (-1, count)).shape)  # [B, p, r, E]
        for index, part_x, part_g in by_expert(x, g, expert):
            a, b = adapter.of_expert(index, g.dtype)
            grad_a[:, index] = torch.bmm((part_g @ b).transpose(1, 2), part_x)
            grad_b[..., index] = torch.bmm(part_g.transpose(1, 2), part_x @ a.t())
        for matrix, grad in ((adapter.a, grad_a), (adapter.b, grad_b)):
            place = self.place(matrix)
            if place is not None:
                self.engine.record_rows(place, grad.mul_(adapter.scaling), self.name)


class _Routes:
    """Which expert each slot goes to, and the slots in the order of their experts."""

    def __init__(self, expert: Tensor, num_experts: int) -> None:
        self.expert = expert  # [S]
        self.order = expert.argsort(stable=True)
        self.back = self.order.argsort()
        self.sizes = torch.bincount(expert, minlength=num_experts).tolist()


class RouterPath(Path):
    """A router that keeps its weight to itself: the ``functional.linear`` inside, at whatever dtype.

    A weight or bias that it uses in any other way gets an ordinary gradient, which the engine refuses.
    """

    @property
    def router(self) -> Any:
        """The module with the weight."""
        return self.module

    def row_places(self) -> list[TrainableParameter]:
        """The bias."""
        return without_frozen([self.place(self.module._parameters.get("bias"))])

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the router's own forward."""
        with _LinearOfRouter(self):
            return self._original(*args, **kwargs)

    def linear(self, x: Tensor, matrix: Tensor, given_bias: Tensor | None) -> Tensor:
        """Apply the weight, ``matrix`` being its detached copy; ``x``: ``[N, d]``."""
        weight, bias = self.place(self.module.weight), None
        if given_bias is self.module._parameters.get("bias"):
            bias, given_bias = self.place(self.module._parameters.get("bias")), detached(given_bias)
        y = functional.linear(x, matrix, given_bias)

        def record(g: Tensor, x: Tensor) -> None:
            if weight is not None:
                self.engine.record_dense(weight, x, g, self.name)
            if bias is not None:
                record_sums(self, bias, g)

        return recorded(self, y, record, x.to(y.dtype))


class AdaptedRouterPath(Path):
    """An adapter of a router's weight, which peft's ``all-linear`` brings: ``y = (W + s B A) x``.

    Args:
        engine: Who records.
        name: The wrapper's name.
        wrapper: The adapter around the router.
        adapter: Its matrices.
    """

    def __init__(self, engine: "PerSampleGradients", name: str, wrapper: Any, adapter: _Adapter) -> None:
        super().__init__(engine, name, wrapper)
        self._adapter = adapter
        self.router: Any = wrapper.get_base_layer()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """``A`` and ``B``, as far as they train."""
        return [matrix for matrix in (self._adapter.a, self._adapter.b) if matrix.requires_grad]

    def row_places(self) -> list[TrainableParameter]:
        """Both."""
        return without_frozen([self.place(self._adapter.a), self.place(self._adapter.b)])

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the router's own forward."""
        if self._adapter.is_off(self.name):
            return self._original(*args, **kwargs)
        with _LinearOfRouter(self, is_watched=True) as mode:
            y = self.router(*args, **kwargs)
        if not mode.was_used:
            raise self.other_use()
        return y

    def linear(self, x: Tensor, matrix: Tensor, given_bias: Tensor | None) -> Tensor:
        """Apply the adapted weight, ``matrix`` being the frozen one; ``x``: ``[N, d]`` or ``[B, T, d]``."""
        a, b = self._adapter.a.detach(), self._adapter.b.detach()
        delta = (b @ a).mul_(self._adapter.scaling).to(matrix.dtype)
        y = functional.linear(x, matrix + delta, given_bias)

        def record(g: Tensor, x: Tensor) -> None:
            dtype = self.engine.compute_dtype
            g, x = (as_3d(self.engine.by_sample(part, self.name)).to(dtype) for part in (g, x))
            products = torch.bmm(g.transpose(1, 2), x).mul_(self._adapter.scaling)  # [B, p, d]
            for matrix, grads in (
                (self._adapter.a, b.to(dtype).t() @ products),
                (self._adapter.b, products @ a.to(dtype).t()),
            ):
                place = self.place(matrix)
                if place is not None:
                    self.engine.record_rows(place, grads, self.name)

        return recorded(self, y, record, x.to(y.dtype))

    def other_use(self) -> PrivacyError:
        """Say that the adapter would be left out."""
        return PrivacyError(
            f"layer {self.name} ({type(self.router).__name__}) does not use its weight as a linear layer, "
            "so its adapter has no exact path. Leave it out of target_modules (exclude_modules)."
        )


class _LinearOfRouter(TorchFunctionMode):
    """Run ``functional.linear`` on a router's weight, or on a cast of it, through its path."""

    def __init__(self, path: RouterPath | AdaptedRouterPath, *, is_watched: bool = False) -> None:
        super().__init__()
        self.was_used = False
        self._path, self._is_watched = path, is_watched
        self._casts: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = self._path.router.weight
        if func in _CASTS and args and args[0] is weight:
            self._casts.append(func(*args, **kwargs))
            return self._casts[-1]
        if func is functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if any(given["weight"] is known for known in (weight, *self._casts)):
                self.was_used = True
                return self._path.linear(given["input"], given["weight"].detach(), given.get("bias"))
        is_property = getattr(func, "__name__", "") == "__get__"
        if self._is_watched and not is_property and isinstance(self._path, AdaptedRouterPath):
            given = (*args, *kwargs.values())
            if any(value is known for value in given for known in (weight, *self._casts)):
                raise self._path.other_use()
        return func(*args, **kwargs)


def routed_path(engine: "PerSampleGradients", name: str, module: nn.Module) -> Path | None:
    """Return the path of a router or of a layer's experts, None for any other module.

    Args:
        engine: Who will record.
        name: The module's name.
        module: Any module.

    Returns:
        The path, not yet attached.

    Raises:
        PrivacyError: If the module has trainable experts without an exact path.
    """
    from peft.tuners.lora.layer import ParamWrapper

    if not any(parameter.requires_grad for parameter in module.parameters()):
        return None
    base = module.get_base_layer() if isinstance(module, ParamWrapper) else module
    if _is_known_experts(base):
        if _is_spread_out(base):
            raise PrivacyError(
                f"the experts of layer {name} are spread over devices, so samples are not whole. "
                "Load the model without expert parallelism."
            )
        path = ExpertsPath(engine, name, module, _adapters(name, module))
        _refuse_unrecorded(path)
        return path
    if isinstance(module, ParamWrapper) and getattr(base, module.parameter_name).ndim == 2:
        return _adapted_matrix_path(engine, name, module)
    if isinstance(module, ParamWrapper):
        raise PrivacyError(
            f"layer {name} has an adapter of its parameter {module.parameter_name} (target_parameters), "
            "which has an exact path only on the experts of transformers. Use target_modules instead."
        )
    if _has_own_experts(module):
        return FunctionalPath(engine, name, module)
    return RouterPath(engine, name, module) if _is_router(module) else None


def _adapted_matrix_path(engine: "PerSampleGradients", name: str, wrapper: Any) -> Path:
    """Return the path of a matrix' adapter: a router's, where peft's ``all-linear`` brought it."""
    adapters = _adapters(name, wrapper)
    known = {id(matrix) for adapter in adapters.values() for matrix in (adapter.a, adapter.b)}
    is_alone = all(id(p) in known for p in wrapper.parameters() if p.requires_grad)
    if list(adapters) == ["weight"] and is_alone:
        return AdaptedRouterPath(engine, name, wrapper, adapters["weight"])
    return FunctionalPath(engine, name, wrapper)


def _is_known_experts(module: Any) -> bool:
    """Whether transformers may run this module by any of its experts implementations."""
    return (
        hasattr(type(module), "_apply_gate")
        and hasattr(module, "has_gate")
        and hasattr(module, "is_transposed")
    )


def _is_spread_out(experts: Any) -> bool:
    """Whether a device holds a part of the experts; before transformers 5.18 they only count their own."""
    flag = getattr(experts, "_is_expert_parallel", None)
    if flag is not None:
        return flag
    totals = [getattr(experts.config, name, None) for name in _NUM_EXPERTS]
    known = [total for total in totals if isinstance(total, int)]
    return bool(known) and experts.num_experts not in known


def _has_own_experts(module: nn.Module) -> bool:
    """Whether a module holds experts that see tokens in an order of their own, and so run as a whole.

    They are layers in a list that the module goes through, one layer for sorted tokens, or the module itself.
    """
    is_named_so = type(module).__name__.endswith("Experts") and not isinstance(module, nn.Linear)
    if is_named_so and type(module).forward is not nn.Module.forward:
        return True
    listed = getattr(module, "experts", None)
    is_list = isinstance(listed, nn.ModuleList | nn.ModuleDict) and type(listed).forward is nn.Module.forward
    is_sorted = any(type(child).__name__.endswith("ParallelExperts") for child in module.children())
    return (is_list or is_sorted) and any(parameter.requires_grad for parameter in module.parameters())


def _is_router(module: nn.Module) -> bool:
    own = {name: p for name, p in module._parameters.items() if p is not None}
    return (
        type(module).__name__.endswith(("Router", "Gate", "Gating"))
        and not isinstance(module, nn.Linear)
        and "weight" in own
        and own.keys() <= {"weight", "bias"}
        and own["weight"].ndim == 2
        and any(p.requires_grad for p in own.values())
    )


def _adapters(name: str, module: Any) -> dict[str, _Adapter]:
    from peft.tuners.lora.layer import ParamWrapper

    found: dict[str, _Adapter] = {}
    while isinstance(module, ParamWrapper):
        wrapper: Any = module
        active = active_adapters(wrapper)
        if len(active) != 1 or module.parameter_name in found:
            raise PrivacyError(
                f"layer {name} has {len(active)} active adapters of {wrapper.parameter_name}; activate one."
            )
        found[wrapper.parameter_name] = _Adapter(wrapper, active[0])
        module = module.base_layer
    return found


def _refuse_unrecorded(path: ExpertsPath) -> None:
    """Under an adapter's path nothing else has a path: name what would get no gradient."""
    known = {"gate_up_proj", "up_proj", "down_proj"} | {"gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}
    experts = path._experts
    own = [name for name, p in experts._parameters.items() if p is not None and p.requires_grad]
    unknown = [name for name in own if name not in known]
    unknown += [adapted for adapted in path._adapters if adapted not in known]
    if path._adapters:
        covered = {id(parameter) for parameter in path.parameters}
        unknown += [
            name for name, p in path.module.named_parameters() if p.requires_grad and id(p) not in covered
        ]
    if unknown:
        raise PrivacyError(
            f"the experts {path.name} ({type(experts).__name__}) have no exact path for "
            f"{', '.join(unknown)}. Freeze them (requires_grad_(False))."
        )
