"""Many processes on one job: who takes part, sums over all of them, and what when one dies.

Started by ``torchrun`` (or anything that sets its environment variables), every process measures
its own batches. A death is noticed by the heartbeats, wherever the others are; only a collective
operation would hang, so none starts before all processes are known to have arrived.

torch's ``gather_object`` and ``broadcast_object_list`` are not used: they unpickle what they
receive, and wait for a dead process until they time out. Small things go through the store.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType

import click
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # documented all the same
from torch.distributed.rendezvous import rendezvous

from mergekit_arm.calibration import heartbeat
from mergekit_arm.calibration.heartbeat import FAILED, Heartbeat
from mergekit_arm.errors import Failure, InputError, first_line
from mergekit_arm.statistics.kinds.base import Operation

POLL = 0.1  # seconds between two looks at what the others have stored
_TIMEOUT = timedelta(minutes=10)  # of one collective, all processes being there


class PeerLost(Failure):
    """Another process of the job failed or died."""


class Job:
    """The processes that measure together; without a launcher, this one alone.

    Use as a context: entering waits for the others, and leaving by an exception tells them.
    """

    def __init__(self) -> None:
        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        self.process = int(os.environ.get("RANK", "0")) if self.processes > 1 else 0
        self._name = f"rank {self.process} on {socket.gethostname()}"
        self._heartbeat = Heartbeat(self.process, self.processes, self._name)

    @property
    def main(self) -> bool:
        """Whether this process writes, and talks to the user."""
        return self.process == 0

    @property
    def local_process(self) -> int:
        """Number of this process on its host."""
        return int(os.environ.get("LOCAL_RANK", "0")) if self.processes > 1 else 0

    @property
    def local_processes(self) -> int:
        """Processes of the job on this host."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.processes > 1 else 1

    def sharing(self, device: torch.device) -> int:
        """Return how many processes share the memory of ``device``, this one among them."""
        return self.local_processes if device.type == "cpu" else 1

    def __enter__(self) -> Job:
        if self.processes == 1:
            return self
        # A launcher that restarts the job keeps the store: an old failure must not be read again.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, _, _ = next(rendezvous("env://", timeout=_TIMEOUT))
        prefix = f"mergekit-arm/{attempt}"
        self._store = PrefixStore(prefix, store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend,
            store=PrefixStore("group", self._store),
            rank=self.process,
            world_size=self.processes,
            timeout=_TIMEOUT,
        )
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._heartbeat.start(address, port, prefix, _TIMEOUT)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self.processes == 1:
            return
        self._heartbeat.stop()
        if error is None:
            self._store.set(f"left/{self.process}", "")
            self._host_store("left", heartbeat.DEAD_AFTER)
            dist.destroy_process_group()
        else:
            self._report(error)

    def check(self) -> None:
        """Stop when another process has failed or died.

        Raises:
            PeerLost: naming it.
        """
        if self._heartbeat.lost is not None:
            raise PeerLost(self._heartbeat.lost)

    def wait(self, stage: str, meanwhile: Callable[[], None] | None = None) -> None:
        """Wait until every process has arrived at ``stage``, however long that takes.

        ``meanwhile`` is called again and again; without it, this stops when one never will.

        Raises:
            PeerLost: one never will.
        """
        if self.processes == 1:
            return
        with suppress(RuntimeError):  # the store is gone: seen below
            self._store.set(f"{stage}/{self.process}", "")
        while not self._stored(self._keys(stage)):
            (meanwhile or self.check)()
            time.sleep(POLL)

    def gather(self, name: str, value: str) -> list[str]:
        """Return every process's ``value``, in their order, on all of them.

        Every process must call this, once for each ``name``.

        Raises:
            PeerLost: another process died on the way.
        """
        if self.processes == 1:
            return [value]
        self._store.set(f"{name}/of/{self.process}", value)
        self.wait(name)
        keys = [f"{name}/of/{process}" for process in range(self.processes)]
        return [self._store.get(key).decode() for key in keys]

    def agree(self, facts: Mapping[str, str]) -> None:
        """Make sure that every process measures the same thing.

        Raises:
            InputError: one has another model, data set or setting; the first is named.
        """
        # Everybody compares all, and so refuses: nobody starts to measure.
        first, *others = map(json.loads, self.gather("facts", json.dumps(dict(facts))))
        for number, other in enumerate(others, 1):
            for name, fact in first.items():
                if other[name] != fact:
                    raise InputError(
                        f"{name} of rank {number} is {other[name]}, but that of rank 0 is {fact}: "
                        "all processes must measure the same model on the same data"
                    )

    @contextmanager
    def first_here(self, stage: str) -> Iterator[None]:
        """Run the block on the first process of each host, then on that host's others."""
        if self.local_processes == 1:
            yield
            return
        key = f"{stage}/{socket.gethostname()}"
        while self.local_process and not self._stored([key]):
            self.check()
            time.sleep(POLL)
        yield
        if not self.local_process:
            self._store.set(key, "")

    def device(self, chosen: torch.device) -> torch.device:
        """Return this process's own accelerator where ``chosen`` names none in particular.

        Raises:
            InputError: the host has more processes than accelerators.
        """
        if chosen.type != "cuda" or chosen.index is not None or self.processes == 1:
            return chosen
        if self.local_processes > torch.cuda.device_count():
            raise InputError(
                f"{self.local_processes} processes on a host with {torch.cuda.device_count()} "
                "GPUs: start one process for each GPU, or add --device cpu"
            )
        own = torch.device("cuda", self.local_process)
        torch.cuda.set_device(own)
        return own

    def total(self, tensor: Tensor, operation: Operation = Operation.SUM) -> Tensor:
        """Return every process's ``tensor``, joined into one of the same dtype and device.

        Every process must call this in the same order, after a common ``wait``.

        Raises:
            PeerLost: another process died on the way.
        """
        if self.processes == 1:
            return tensor
        # nccl adds on GPUs and gloo on the CPU; no backend does on other accelerators.
        where = tensor.device if tensor.is_cuda else torch.device("cpu")
        summed = tensor.to(where, copy=True).contiguous()
        with self._connected():
            dist.all_reduce(summed, getattr(dist.ReduceOp, operation.name))
        return summed.to(tensor.device)

    def collect(self, data: bytes) -> list[bytes]:
        """Return every process's ``data`` on the first, nothing on the others.

        Every process must call this as it must ``total``.

        Raises:
            PeerLost: another process died on the way.
        """
        if self.processes == 1:
            return [data]
        sizes = torch.zeros(self.processes, dtype=torch.int64, device="cpu")
        sizes[self.process] = len(data)
        sizes = self.total(sizes)
        with self._connected():
            if not self.main:
                dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0)
                return []
            found = [data]
            for other, size in enumerate(sizes.tolist()[1:], 1):
                received = torch.empty(size, dtype=torch.uint8, device="cpu")
                dist.recv(received, other)
                found.append(received.numpy().tobytes())
        return found

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Name the process whose death ends what the block asks of the others."""
        try:
            yield
        except RuntimeError as error:
            self._heartbeat.wait_for_news()
            self.check()
            raise PeerLost(
                f"the connection to another process broke ({first_line(error)})"
            ) from error

    def _stored(self, keys: list[str]) -> bool:
        """Say whether others have set ``keys``; note it when nobody can ask any more."""
        try:
            return self._store.check(keys)
        except RuntimeError:
            self._heartbeat.lost_store()
            return False

    def _keys(self, stage: str) -> list[str]:
        return [f"{stage}/{other}" for other in range(self.processes)]

    def _host_store(self, until: str, seconds: float) -> None:
        """On the first process, which may hold the store, stay until the others are through."""
        end = time.monotonic() + seconds
        while self.main and not self._store.check(self._keys(until)) and time.monotonic() < end:
            time.sleep(POLL)

    def _report(self, error: BaseException) -> None:
        """Tell the others of this process's failure, and name it in the message for the user."""
        text = error.message if isinstance(error, click.ClickException) else _describe(error)
        try:
            if not isinstance(error, PeerLost) and not self._store.check([FAILED]):
                self._store.set(FAILED, f"{self._name} failed: {text}")
            self._store.set(f"error/{self.process}", text)
            said = isinstance(error, InputError) and not self.main and self._said_by_main(text)
            self._store.set(f"heard/{self.process}", "")
            self._host_store("heard", 3 * heartbeat.BEAT)
            if said:
                # A launcher stops everybody when the first has gone: let rank 0 speak.
                time.sleep(1)
                raise click.exceptions.Exit(InputError.exit_code) from error
        except RuntimeError as lost:
            if isinstance(lost, click.exceptions.Exit):
                raise
        if isinstance(error, Exception):
            kind = InputError if isinstance(error, InputError) else Failure
            raise kind(f"{self._name}: {text}") from error

    def _said_by_main(self, text: str) -> bool:
        """Say whether rank 0 ends with the same message: once is enough."""
        key, until = "error/0", time.monotonic() + 3
        while not self._store.check([key]) and time.monotonic() < until:
            time.sleep(POLL)
        return self._store.check([key]) and self._store.get(key).decode() == text


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
