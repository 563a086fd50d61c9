"""The paths of the common layers, and what all paths share.

A path stands in for one module's ``forward``. It runs the layer with its weights detached, so that autograd
computes no summed weight gradient, and puts a recorder on the output: in the backward pass of the engine the
recorder sees the output's gradient and hands it, with the layer's input, to the engine.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.gradients import TrainableParameter
from securetune.privacy.per_sample.positions import Positions
from securetune_kernels import per_sample_sums, products

if TYPE_CHECKING:
    from securetune.privacy.per_sample.engine import PerSampleGradients

Record = Callable[[Tensor], None]
ROOT = "(root)"  # name of a model that is a layer itself
TRANSPOSES = (
    Tensor.T.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.mT.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.t,
    torch.t,
    Tensor.transpose,
    torch.transpose,
)
PRODUCTS = (Tensor.matmul, Tensor.__matmul__, torch.matmul)


class Path:
    """Stands in for a module's forward; a subclass knows one kind of layer.

    Args:
        engine: Who records.
        name: The module's name in the model; empty for the model itself.
        module: The module.
    """

    _tells_rows = True  # whether the first dimension of its output counts samples, or positions of samples

    def __init__(self, engine: "PerSampleGradients", name: str, module: Any) -> None:
        self.engine, self.name, self.module = engine, name or ROOT, module
        self._is_attached = False
        self._owned = [
            (part, key, place)
            for part in module.modules()
            for key, parameter in part._parameters.items()
            if parameter is not None and (place := engine.place_of(parameter)) is not None
        ]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters that this path records."""
        own = (p for p in self.module._parameters.values() if p is not None)
        return [parameter for parameter in own if parameter.requires_grad]

    def row_places(self) -> list[TrainableParameter]:
        """Places of the parameters whose gradients are written out."""
        return []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer and record in its backward pass."""
        raise NotImplementedError

    def place(self, parameter: nn.Parameter | None) -> TrainableParameter | None:
        """Return the parameter's place, None where there is none or it is frozen."""
        return None if parameter is None else self.engine.place_of(parameter)

    def attach(self) -> None:
        """Put this path in the place of the module's forward.

        Raises:
            PrivacyError: If another engine's path is there.
        """
        if not self._is_attached:
            if isinstance(getattr(self.module.forward, "__self__", None), Path):
                raise PrivacyError(
                    f"layer {self.name} already has per-sample gradients, of another "
                    "PerSampleGradients. Call its detach() first; copy a model before it gets any."
                )
            self._original = self.module.forward
            self.module.forward = self._call
            self._is_attached = True

    def detach(self) -> None:
        """Give the module its own forward back."""
        if self._is_attached:
            if getattr(self._original, "__func__", None) is type(self.module).forward:
                del self.module.forward
            else:
                self.module.forward = self._original
            self._is_attached = False

    def __reduce__(self) -> NoReturn:
        """Refuse copies: a copied model would record into nowhere.

        Raises:
            PrivacyError: Always.
        """
        raise no_copies()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _outside_of_the_graph(self._call, *args, **kwargs)
        if not torch.is_grad_enabled():
            self.engine.hidden_calls.add(self.name)
            return self._original(*args, **kwargs)
        if self.engine.are_exchanged:
            self.engine.meet(self._owned)
        else:
            self._refuse_replaced()
        y = self.run(*args, **kwargs)
        if self._owned and self._tells_rows:
            first = y[0] if isinstance(y, tuple) else y
            if isinstance(first, Tensor) and first.ndim:
                self.engine.watch.note_output(self.name, first.shape[0])
        return y

    def _refuse_replaced(self) -> None:
        """Refuse parameters in the place of those that the engine knows: they would get no gradient."""
        for part, key, place in self._owned:
            if key not in part._parameters or part._parameters[key] is not place.parameter:
                raise PrivacyError(
                    f"{place.name} is another tensor than when PerSampleGradients was made, and would get no "
                    "gradient (load_state_dict(assign=True), functional_call, a new parameter). Load weights "
                    "in place, or make PerSampleGradients after the change."
                )


class DensePath(Path):
    """``nn.Linear`` and transformers' ``Conv1D``: weight by factors, bias by rows."""

    def row_places(self) -> list[TrainableParameter]:
        """Place of the bias."""
        bias = self.place(self.module.bias)
        return [] if bias is None else [bias]

    def run(self, x: Tensor) -> Tensor:
        """Run the layer; ``x``: ``[B, ..., d]``."""
        module = self.module
        weight, bias = self.place(module.weight), self.place(module.bias)
        is_transposed = not isinstance(module, nn.Linear)  # Conv1D holds [d, p]
        y = _Multiply.apply(x, module.weight, module.bias, is_transposed)
        kept = x.to(y.dtype)  # under autocast the layer computed with this

        def record(g: Tensor, x: Tensor) -> None:
            if weight is not None:
                a, b = (g, x) if is_transposed else (x, g)
                self.engine.record_dense(weight, a, b, self.name)
            if bias is not None:
                record_sums(self, bias, g)

        return recorded(self, y, record, kept)

    def multiply(self, x: Tensor, *, is_transposed: bool = True) -> Tensor:
        """Multiply with the weight, transposed as the layer does it or not; ``x``: ``[B, ..., d]``."""
        weight = self.place(self.module.weight)
        y = _Multiply.apply(x, self.module.weight, None, not is_transposed)
        if weight is None:
            return y

        def record(g: Tensor, x: Tensor) -> None:
            self.engine.record_dense(weight, *((x, g) if is_transposed else (g, x)), self.name)

        return recorded(self, y, record, x.to(y.dtype))

    def add_bias(self, y: Tensor) -> Tensor:
        """Add the bias alone; ``y``: ``[B, ..., p]``."""
        bias = self.place(self.module.bias)
        y = y + self.module.bias.detach()
        return y if bias is None else recorded(self, y, lambda g: record_sums(self, bias, g))


class _Multiply(torch.autograd.Function):
    """``x W^T + b``, whose backward computes the input's gradient only.

    It keeps the weight itself, not a detached alias: ZeRO-3 frees the parameter until its backward, and an
    alias would hold the gathered memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.is_transposed, ctx.dtype = is_transposed, x.dtype
        return products.linear(x, weight.t() if is_transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (weight,) = grad_outputs, ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            weight = weight.to(g.dtype)  # under autocast the layer computed with this
            dx = products.linear(g, weight if ctx.is_transposed else weight.t()).to(ctx.dtype)
        return dx, None, None, None


class EmbeddingPath(Path):
    """``nn.Embedding``: ids and output gradients; ids given once for all samples are looked up per sample."""

    _tells_rows = False

    def __init__(self, engine: "PerSampleGradients", name: str, module: Any) -> None:
        super().__init__(engine, name, module)
        self._uses: set[str] = set()  # what its positions met

    def run(self, ids: Tensor) -> Tensor:
        """Run the lookup; ``ids``: ``[B, ...]``, ``[1, ...]``, or ``[T]`` for all samples."""
        rows = self.engine.watch.rows_to_look_up(ids)
        if rows is None or rows == 1:
            return self._look_up(ids)
        if ids.ndim == 1:
            return Positions.make(
                self._look_up(ids), rows, lambda: self._look_up(ids.expand(rows, -1)), self._uses
            )
        return self._look_up(ids.expand(rows, *ids.shape[1:]) if ids.shape[:1] == (1,) else ids)

    def _look_up(self, ids: Tensor) -> Tensor:
        module = self.module
        place = self.engine.place_of(module.weight)
        assert place is not None
        y = functional.embedding(ids, module.weight.detach())

        def record(g: Tensor, ids: Tensor) -> None:
            if module.padding_idx is not None:
                g = g.masked_fill((ids == module.padding_idx).unsqueeze(-1), 0.0)
            self.engine.record_lookup(place, ids, g, self.name)

        return recorded(self, y, record, ids)


def recorded(path: Path, y: Tensor, record: Callable[..., None], *kept: Tensor) -> Tensor:
    """Return ``y``, with a node that gives its gradient and the ``kept`` tensors to ``record``.

    The kept tensors are saved as autograd saves its own, so gradient checkpointing recomputes them.

    Args:
        path: Whose parameters these are; the output requires a gradient because of them.
        y: The layer's output.
        record: Called as ``record(g, *kept)`` in the engine's backward pass.
        *kept: Tensors that ``record`` needs.

    Returns:
        A tensor equal to ``y``.
    """
    (y,) = recorded_all(path, [y], lambda g, *kept: record(g[0], *kept), *kept)
    return y


def recorded_all(
    path: Path, outputs: Sequence[Tensor], record: Callable[..., None], *kept: Tensor
) -> Sequence[Tensor]:
    """Do for several outputs what :func:`recorded` does for one.

    Args:
        path: As in :func:`recorded`.
        outputs: The layer's outputs.
        record: Called once as ``record(grads, *kept)``; the gradient of an output that was not used is None.
        *kept: As in :func:`recorded`.

    Returns:
        Tensors equal to ``outputs``.
    """
    return _Recorder.apply(path, record, len(outputs), len(kept), *outputs, *kept, *path.parameters)


class _Recorder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, path: Path, record: Any, num_outputs: int, num_kept: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.path, ctx.record = path, record
        ctx.save_for_backward(*tensors[num_outputs : num_outputs + num_kept])
        ctx.num_others = len(tensors) - num_outputs
        ctx.set_materialize_grads(False)
        # not views, which no operation in place may follow
        return tuple(y.detach() for y in tensors[:num_outputs])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        # always taken, since non-reentrant checkpointing holds what it recomputed until then
        kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise PrivacyError(
                f"layer {ctx.path.name} has no exact per-sample path through a second derivative "
                "(create_graph=True, as a gradient penalty uses). Leave it out of the loss, or freeze the "
                "layer."
            )
        if ctx.path.engine.wants(ctx.path, *grad_outputs):
            ctx.record(grad_outputs, *(tensor.detach() for tensor in kept))
        return None, None, None, None, *grad_outputs, *[None] * ctx.num_others


def path_of(node: Any) -> Path | None:
    """Find out whom a node of a graph gives its gradient to.

    Args:
        node: As in ``tensor.grad_fn``.

    Returns:
        The path that will record, None where the node is another's.
    """
    return node.path if isinstance(node, _Recorder._backward_cls) else None


def refuse_plain_backward(path: Path) -> None:
    """Refuse a pass that wants gradients of a path's parameters, and would get none.

    Args:
        path: Whose recorder the pass reached outside of the engine's backward.

    Raises:
        PrivacyError: If it does; passes that want other gradients only, as an attack's, go through.
    """
    for parameter in path.parameters:
        if not parameter.requires_grad:  # frozen meanwhile, by an attack
            continue
        node = torch.autograd.graph.get_gradient_edge(parameter).node
        try:
            is_wanted = torch._C._will_engine_execute_node(node)  # pyright: ignore[reportAttributeAccessIssue]
        except RuntimeError:  # torch.autograd.grad asks for it
            is_wanted = True
        if is_wanted:
            raise PrivacyError(
                f"a plain backward() or torch.autograd.grad() reached layer {path.name} with per-sample "
                "gradients, which computes no summed weight gradient, so nothing would be trained. Give the "
                "losses [B] to the private step's backward; for gradients of inputs use "
                "torch.autograd.grad(loss, inputs)."
            )


@torch.compiler.disable
def _outside_of_the_graph(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)


def no_copies() -> PrivacyError:
    """Explain why a model with paths can't be copied or pickled.

    Returns:
        The error to raise.
    """
    return PrivacyError(
        "a model with per-sample gradients can't be copied or pickled. Copy it before "
        "PerSampleGradients, or call detach() first; state_dict() works at any time."
    )


def detached(parameter: Tensor | None) -> Tensor | None:
    """Detach a parameter that a layer may lack."""
    return None if parameter is None else parameter.detach()


def record_sums(path: Path, place: TrainableParameter, products: Tensor) -> None:
    """Record a parameter whose gradient is a sum over positions: a bias, or the scale of a norm layer.

    Args:
        path: Whose parameter it is.
        place: The parameter's place.
        products: ``[B, ..., *shape]``, or ``[B * T, ..., *shape]``: what each position adds.
    """
    engine = path.engine
    products = engine.by_sample(products, path.name)
    (rows,), is_added = engine.rows_to_write(place)
    per_sample_sums(
        products.reshape(len(products), -1, math.prod(place.shape)), rows.flatten(1), accumulate=is_added
    )


def trains_now(name: str, what: str) -> PrivacyError:
    """Explain that something trains which the engine does not know.

    Args:
        name: The layer's name.
        what: What trains in it.

    Returns:
        The error to raise.
    """
    return PrivacyError(
        f"layer {name} trains {what} now, which it did not when PerSampleGradients was made, so it would get "
        "no gradient. Activate the adapter of then and freeze what is new, or make PerSampleGradients after "
        "the change."
    )


def without_frozen(places: Sequence[TrainableParameter | None]) -> list[TrainableParameter]:
    """Leave out the frozen ones."""
    return [place for place in places if place is not None]
