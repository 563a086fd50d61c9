"""What the processes of one run do together: sums of shards, agreement, secrets, and an end to waiting.

Gradients go over the group of the run's device. Everything small goes over a second group on the CPU (gloo):
a process that waits there for too long learns whom it waits for, which is what a hung job must say first.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from securetune import errors
from securetune.errors import MachineError
from securetune.privacy.noise import KEY_BYTES, SecretKey

DEFAULT_TIMEOUT = timedelta(minutes=10)
_LENGTH_BYTES = 8
_HEAD_BYTES = 1024  # what is shared is rarely longer, and is sent at once with its length
_BUSY = (1 << 8 * _LENGTH_BYTES) - 1  # as a length: the first process is still at work
_BEATS = 4  # signs of life within the longest wait
# Padding costs bytes, and each further collective a message from process to process, all around the ring.
_WORTH_A_MESSAGE = 1 << 16  # entries that are sent in the time of a message
_MOST_PADDED = 1 << 26  # entries of what is padded to more than twice its length: 256 MiB of float32


class Processes:
    """The processes of one run, each with the whole list of what they do together.

    Every method is a collective: all processes call it, in the same order.

    Args:
        group: Of the run's device; the default group when None.
        timeout: Longest wait for another process.

    Attributes:
        rank: This process' number.
        size: How many there are.
        sent: Bytes that this process gave to sums and gathers, by kind, for benchmarks.

    Raises:
        MachineError: If torch.distributed was not started.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, timeout: timedelta = DEFAULT_TIMEOUT
    ) -> None:
        if not dist.is_initialized():
            raise MachineError(
                "torch.distributed was not started. Run under 'accelerate launch' or 'torchrun', and create "
                "accelerate's PartialState (or call torch.distributed.init_process_group) first."
            )
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        members = dist.get_process_group_ranks(group) if group is not None else None
        side = dist.new_group(members, timeout=timeout, backend="gloo")
        assert isinstance(side, dist.ProcessGroup)
        self._side = side
        self._timeout = timeout
        self.sent: dict[str, int] = {}

    def keep_pace(self, what: str) -> None:
        """Wait until all processes are here.

        Args:
            what: What comes next, for the message.

        Raises:
            MachineError: If one of them is not here in time; the message names the slowest.
        """
        started = time.monotonic()
        try:
            dist.monitored_barrier(self._side, timeout=self._timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise MachineError(
                f"process {self.rank} of {self.size} waited {time.monotonic() - started:.0f} s before "
                f"{what}, and others did not come: {_missing_ranks(str(error))}. They failed, were killed or "
                "hang: look for the first error in their output, then start again with --resume."
            ) from error

    def sum_shards(self, whole: Tensor, sizes: Sequence[int]) -> Tensor:
        """Add up over all processes, and keep this process' part.

        Args:
            whole: ``[sum(sizes)]``, float32; may be overwritten.
            sizes: Length of each process' part, in order.

        Returns:
            ``[sizes[rank]]``, the sum.
        """
        self._count("reduce_scatter", whole)
        if self.size == 1:
            return whole
        if len(set(sizes)) == 1:
            out = whole.new_empty(sizes[self.rank])
            dist.reduce_scatter_tensor(out, whole, group=self._group)
            return out
        longest = max(sizes)
        if sums_part_by_part(sizes):
            parts = whole.split(list(sizes))
            for rank, part in enumerate(parts):
                if len(part):
                    dist.reduce(part, group=self._group, group_dst=rank)
            return parts[self.rank].clone()
        padded = whole.new_zeros(self.size * longest)
        for rank, part in enumerate(whole.split(list(sizes))):
            padded[rank * longest : rank * longest + len(part)] = part
        out = whole.new_empty(longest)
        dist.reduce_scatter_tensor(out, padded, group=self._group)
        return out[: sizes[self.rank]].clone()

    def gather_shards(self, part: Tensor, sizes: Sequence[int]) -> Tensor:
        """Put the processes' parts together, on all of them.

        Args:
            part: ``[sizes[rank]]``: this process'.
            sizes: Length of each process' part, in order.

        Returns:
            ``[sum(sizes)]``.
        """
        self._count("all_gather", part)
        if self.size == 1:
            return part
        longest = max(sizes)
        padded = part if len(part) == longest else torch.cat([part, part.new_zeros(longest - len(part))])
        out = part.new_empty(self.size * longest)
        dist.all_gather_into_tensor(out, padded.contiguous(), group=self._group)
        if len(set(sizes)) == 1:
            return out
        return torch.cat([out[rank * longest :][:size] for rank, size in enumerate(sizes)])

    def add(self, *numbers: Tensor) -> None:
        """Add up small tensors over all processes, in place and in one collective; integers below 2^53."""
        if self.size > 1:
            whole = torch.cat([part.detach().cpu().double().flatten() for part in numbers])
            with self._explained("adding up"):
                dist.all_reduce(whole, group=self._side)
            for part, summed in zip(numbers, whole.split([n.numel() for n in numbers]), strict=True):
                part.copy_(summed.view_as(part))

    def most(self, number: int) -> int:
        """Return the largest of a number over all processes."""
        whole = torch.tensor([number])
        if self.size > 1:
            with self._explained("comparing numbers"):
                dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=self._side)
        return int(whole)

    def share_secret(self, secret: bytes | None, size: int) -> bytes:
        """Give a secret of the first process to all of them, in memory only: over a tensor, never an object.

        Args:
            secret: On the first process; None elsewhere.
            size: Its length in bytes.

        Returns:
            The secret.
        """
        tensor = torch.zeros(size, dtype=torch.uint8)
        if self.rank == 0:
            assert secret is not None
            assert len(secret) == size
            tensor = torch.frombuffer(bytearray(secret), dtype=torch.uint8)
        if self.size > 1:
            with self._explained("sharing"):
                dist.broadcast(tensor, group=self._side, group_src=0)
        return tensor.numpy().tobytes()

    def new_key(self) -> SecretKey:
        """Make a key that all processes have, and nobody else."""
        return SecretKey(self.share_secret(os.urandom(KEY_BYTES) if self.rank == 0 else None, KEY_BYTES))

    def on_first(self, function: Callable[[], Any]) -> Any:
        """Run a function on the first process, and end all of them alike if it fails.

        The others wait for as long as the first process lives and its interpreter runs, however long the
        function takes; once it is gone, they end as after any other lost contact.

        Args:
            function: Returns something JSON-able; calls no collective.

        Returns:
            What it returned, on all processes.

        Raises:
            SecuretuneError: As the function raised it; elsewhere of the same kind and with the same message.
        """
        outcome: dict[str, Any] = {}
        caught: BaseException | None = None
        if self.rank == 0:
            with self._signs_of_life():
                try:
                    outcome = {"value": function()}
                except BaseException as error:
                    caught = error
                    outcome = {"error": type(error).__name__, "message": str(error)}
        outcome = self.share(outcome)
        if caught is not None:
            raise caught
        if "error" in outcome:
            kind = getattr(errors, outcome["error"], MachineError)
            raise kind(f"process 0: {outcome['message']}")
        return outcome["value"]

    @contextlib.contextmanager
    def _signs_of_life(self) -> Iterator[None]:
        """Tell the others, who wait in :meth:`share`, from time to time that this process is at work."""
        if self.size == 1:
            yield
            return
        done = threading.Event()
        interval = self._timeout.total_seconds() / _BEATS

        def beat() -> None:
            message = _BUSY.to_bytes(_LENGTH_BYTES, "big").ljust(_HEAD_BYTES)
            # a process that is lost fails what is shared at last too, which says so
            with contextlib.suppress(MachineError):
                while not done.wait(interval):
                    self.share_secret(message, _HEAD_BYTES)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def share(self, value: Any) -> Any:
        """Give a JSON-able value of the first process to all of them; no pickle travels.

        Args:
            value: On the first process; ignored elsewhere.

        Returns:
            The value.
        """
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.rank == 0 else b""
        message = len(text).to_bytes(_LENGTH_BYTES, "big") + text
        head, length = b"", _BUSY
        while length == _BUSY:
            head = self.share_secret(
                message[:_HEAD_BYTES].ljust(_HEAD_BYTES) if self.rank == 0 else None, _HEAD_BYTES
            )
            length = int.from_bytes(head[:_LENGTH_BYTES], "big")
        found, missing = head[_LENGTH_BYTES:][:length], _LENGTH_BYTES + length - _HEAD_BYTES
        if missing > 0:
            found += self.share_secret(message[_HEAD_BYTES:] if self.rank == 0 else None, missing)
        return json.loads(found)

    def collect(self, value: Any) -> list[Any]:
        """Give a JSON-able value of each process to the first one; no pickle travels.

        Args:
            value: This process'.

        Returns:
            All values in the order of the processes; an empty list on all but the first.
        """
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        size = self.most(len(text))
        padded = torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        with self._explained("collecting"):
            dist.gather(padded, found, group=self._side, group_dst=0)
        return [json.loads(text.numpy().tobytes()) for text in found or ()]

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Say in plain words that another process is gone."""
        try:
            yield
        except RuntimeError as error:
            raise MachineError(
                f"process {self.rank} of {self.size} lost another process while {what}: "
                f"{_missing_ranks(str(error))}. It failed, was killed or hangs: look for the first error in "
                "their output. What was saved before is whole; start again with --resume."
            ) from error

    def _count(self, kind: str, tensor: Tensor) -> None:
        self.sent[kind] = self.sent.get(kind, 0) + tensor.numel() * tensor.element_size()


def sums_part_by_part(sizes: Sequence[int]) -> bool:
    """Say whether parts of these lengths are added up one by one, since padding them would take longer.

    Args:
        sizes: Length of each process' part; equal ones need no padding.

    Returns:
        Whether they are; else all parts are padded to the longest and added up at once.
    """
    whole, padded = sum(sizes), len(sizes) * max(sizes)
    further_calls = sum(size > 0 for size in sizes) - 1
    if padded == whole:
        return False
    if padded > max(2 * whole, _MOST_PADDED):
        return True
    return padded - whole >= further_calls * len(sizes) * _WORTH_A_MESSAGE


def _missing_ranks(message: str) -> str:
    """Keep what torch says about who did not come."""
    message = message.partition(" This is typically caused")[0]
    for line in message.splitlines():
        if "rank" in line.lower():
            return line.strip().rstrip(".")
    return message.strip().splitlines()[0] if message.strip() else "unknown"
