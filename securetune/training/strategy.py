"""How the processes of a run share a model: alone, replicated (DDP) or sharded (FSDP2, DeepSpeed's ZeRO)."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from securetune.config.launch import Launch, StrategyName, read_launch
from securetune.config.schema import Recipe
from securetune.errors import ConfigError, MachineError
from securetune.privacy.distributed import DataParallel, FullySharded, Processes, Zero
from securetune.privacy.distributed.collectives import DEFAULT_TIMEOUT
from securetune.privacy.per_sample import PerSampleGradients
from securetune.privacy.per_sample.gradients import TrainableParameter
from securetune.privacy.reduction import Reduction
from securetune.training.folder import RunFolder

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Root(nn.Module):
    """The outermost module of a sharded model: whatever uses the model's parameters runs in its forward.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function that uses the model."""
        return function(*args, **kwargs)


@dataclass
class Prepared:
    """A model ready to train.

    Attributes:
        grads: Its per-sample gradients.
        optimizer: Over its trainable parameters.
        reduction: How the processes add up; None for one process.
        within: Calls a function that uses the model's parameters, with all of them at hand.
    """

    grads: PerSampleGradients
    optimizer: torch.optim.Optimizer
    reduction: Reduction | None
    within: Callable[..., Any]


class Strategy:
    """What a run does with its processes.

    Args:
        name: How the model is shared.
        processes: Those of the run; None for one process.
        launch: What the launcher asked for; offloading and bf16 are read for ZeRO.

    Raises:
        ConfigError: If the name does not fit the processes.
    """

    def __init__(
        self,
        name: StrategyName = "single",
        processes: Processes | None = None,
        *,
        launch: Launch | None = None,
    ) -> None:
        if (processes is None) != (name == "single"):
            raise ConfigError(
                f"strategy {name!r} needs {'one process' if name == 'single' else 'processes'}."
            )
        self.name: StrategyName = name
        self.processes = processes
        self._launch = launch or Launch(name)

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.processes is None or self.processes.rank == 0

    @property
    def holds_whole(self) -> bool:
        """Whether the model on each process is whole, and the one that the optimizer updates."""
        return self.name in ("single", "ddp")

    @contextlib.contextmanager
    def open_run(self, recipe: Recipe, *, resume: bool) -> Iterator[RunFolder]:
        """Open the run folder on the first process, and let the others read it; see ``RunFolder.open``.

        The folder must lie on a file system that all processes see.

        Args:
            recipe: The recipe of the run.
            resume: Go on if the folder holds a run of the same recipe.

        Yields:
            The folder.
        """
        with contextlib.ExitStack() as stack:
            opened: list[RunFolder] = []

            def open_it() -> None:
                opened.append(stack.enter_context(RunFolder.open(recipe, resume=resume)))

            self.on_first(open_it)
            yield opened[0] if opened else RunFolder.follow(recipe)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Turn the loss of another process into an error that says what to do.

        Yields:
            Nothing.

        Raises:
            MachineError: If another process was killed, failed or hangs.
        """
        try:
            yield
        except RuntimeError as error:
            if self.processes is None or not _is_lost_contact(error):
                raise
            raise MachineError(
                f"process {self.processes.rank} of {self.processes.size} lost another one in training "
                f"({str(error).strip().splitlines()[0]}). It was killed, ran out of memory, failed or hangs: "
                "look for the first error in the output. What was charged stays charged; go on from the last "
                "save with --resume."
            ) from error

    def finish(self) -> None:
        """Part from the other processes, once all are done with training."""
        if self.processes is not None:
            self.processes.keep_pace("training ends")
            torch.distributed.destroy_process_group()

    def on_first(self, function: Callable[[], Any]) -> Any:
        """Run a function on the first process; see :meth:`Processes.on_first`."""
        return function() if self.processes is None else self.processes.on_first(function)

    def each(self, function: Callable[[], Any]) -> Any:
        """Run a function on every process, on the first one before the others: it may write what they read.

        Args:
            function: What to run.

        Returns:
            What it returned on this process.
        """
        results: list[Any] = []
        self.on_first(lambda: results.append(function()))
        return results[0] if results else function()

    def most(self, number: int) -> int:
        """Return the largest of a number over all processes."""
        return number if self.processes is None else self.processes.most(number)

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, *, passes: Literal[1, 2] = 1
    ) -> Prepared:
        """Share a model among the processes, and make its per-sample gradients and optimizer.

        Args:
            model: The same on every process, with what is trained of it, on its device; checked already.
            make_optimizer: Makes the optimizer over a list of parameters.
            passes: Backward passes per micro-batch; see :class:`PerSampleGradients`.

        Returns:
            What trains it.
        """
        if self.holds_whole:
            grads = PerSampleGradients(model, passes=passes)
            reduction = None if self.processes is None else DataParallel(self.processes)
            return Prepared(grads, make_optimizer([grads.flat_params]), reduction, call)
        prepare = self._prepare_fsdp2 if self.name == "fsdp2" else self._prepare_zero
        return prepare(model, make_optimizer, passes)

    def score(self, prepared: Prepared, function: Callable[[], float]) -> float:
        """Compute something of the model, without gradients, in which all processes take part.

        Args:
            prepared: The model.
            function: Computes it, the same on each process up to rounding, or up to noise.

        Returns:
            What the first process got, on all of them.
        """
        with torch.no_grad():
            # a tensor, since ZeRO-3 looks for tensors in whatever a module returns
            value = float(prepared.within(lambda: torch.tensor(function(), dtype=torch.float64)))
        if self.name == "fsdp2":  # which keeps what is outside of the blocks until a backward pass
            prepared.within.reshard()  # pyright: ignore[reportFunctionMemberAccess]
        return value if self.processes is None else self.processes.share(value)

    def _prepare_fsdp2(
        self, model: nn.Module, make_optimizer: MakeOptimizer, passes: Literal[1, 2]
    ) -> Prepared:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        assert self.processes is not None
        root = Root(model)
        mesh = init_device_mesh(next(model.parameters()).device.type, (self.processes.size,))
        offload = OffloadPolicy()
        if self._launch.offload_parameters:
            offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        for block in [*blocks_of(model), root]:
            fully_shard(block, mesh=mesh, offload_policy=offload)
        grads = PerSampleGradients(model, passes=passes)
        grads.agree_on_most = self.processes.most
        optimizer = make_optimizer([place.parameter for place in grads.parameters])
        return Prepared(grads, optimizer, FullySharded(self.processes, grads.parameters), root)

    def _prepare_zero(
        self, model: nn.Module, make_optimizer: MakeOptimizer, passes: Literal[1, 2]
    ) -> Prepared:
        assert self.processes is not None
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            import deepspeed
        except ImportError as error:
            raise MachineError(
                f"strategy {self.name} needs DeepSpeed, which is not installed. Install it after torch with "
                "pip install --no-build-isolation 'securetune[deepspeed]', or launch with ddp.yaml or "
                "fsdp2.yaml."
            ) from error
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        config = {
            "train_micro_batch_size_per_gpu": 1,  # unused: batches are made here
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # no step is skipped by data: what is released is finite
            "bf16": {"enabled": self._launch.mixed_precision == "bf16", "check_grad_overflow": False},
            "zero_optimization": {"stage": int(self.name[-1]), **_offloading(self._launch)},
        }
        engine: Any
        engine, *_ = deepspeed.initialize(
            model=Root(model),
            optimizer=make_optimizer(trainable),
            config=config,
            dist_init_required=False,
        )
        grads = PerSampleGradients(model, passes=passes)
        return Prepared(grads, engine.optimizer, Zero(self.processes, engine, grads), engine)

    def whole(self, place: TrainableParameter) -> Tensor:
        """Put a trainable parameter together; all processes call it.

        Args:
            place: The parameter.

        Returns:
            The whole parameter, on the CPU.
        """
        from torch.distributed.tensor import DTensor

        if self.name.startswith("zero"):
            from deepspeed.utils import safe_get_full_fp32_param

            found = safe_get_full_fp32_param(place.parameter)
            assert found is not None, f"DeepSpeed does not train {place.name}"
            return found.detach().cpu().view(place.shape)
        value = place.parameter.detach()
        if isinstance(value, DTensor):  # its part may wait on the CPU, where NCCL sends nothing
            on_device: Any = value.to(value.device_mesh.device_type)
            value = on_device.full_tensor()
        return value.cpu()


def start_strategy(recipe: Recipe) -> Strategy:
    """Join the other processes of this launch, if there are any.

    Args:
        recipe: The recipe.

    Returns:
        How they share the model.

    Raises:
        ConfigError: If a setting of the launcher would change privacy, or is not supported.
    """
    launch = read_launch(recipe=recipe)
    if launch.strategy == "single":
        return Strategy()
    on_gpu = recipe.model.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(launch.local_rank)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    return Strategy(launch.strategy, Processes(), launch=launch)


def _offloading(launch: Launch) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if launch.offload_optimizer:
        options["offload_optimizer"] = {"device": "cpu"}
    if launch.offload_parameters:
        options["offload_param"] = {"device": "cpu"}
    return options


def _is_lost_contact(error: RuntimeError) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("connection closed", "connection reset", "timed out", "broken pipe"))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Find the repeated blocks of a model: what a list holds whose members are of one class.

    Args:
        model: Any transformer.

    Returns:
        The blocks of the outermost lists, in order.
    """
    blocks: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if len({type(block) for block in module}) == 1:
            blocks.extend(module)
            inside.update(id(part) for block in module for part in block.modules())
    return blocks


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function: what :attr:`Prepared.within` does for a model that is whole."""
    return function(*args, **kwargs)
