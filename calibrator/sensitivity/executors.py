"""Where a sweep is carried out: in this process, or by the workers of a Ray cluster. Only there weights are loaded."""

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from calibrator.sensitivity.states import Reference
from calibrator.sensitivity.sweep import Sweep, SweepSpec, UnitLosses
from vla_policy.core.errors import PolicyError, VlaError
from vla_policy.core.formats import Choice

ATTEMPTS = 3
"""How often work whose worker died is given to another one before the sweep ends."""

Result = TypeVar("Result", covariant=True)


class Work(Protocol[Result]):
    """Something to be computed from a sweep, wherever that is; its text names it for people."""

    def __call__(self, sweep: Sweep) -> Result: ...


class Chore(Protocol[Result]):
    """Something that needs no sweep, whose policy would be in memory beside its own; its text names it for people."""

    def __call__(self) -> Result: ...


@dataclass(frozen=True)
class Task:
    """One layer in some choices on some states."""

    unit: str
    choices: tuple[Choice, ...]
    samples: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.unit} in {', '.join(map(str, self.choices))} on {len(self.samples)} states"

    def __call__(self, sweep: Sweep) -> UnitLosses:
        return sweep.evaluate(self.unit, self.choices, self.samples)


@dataclass(frozen=True)
class Usage:
    """Peak memory of a process; of a GPU what is allocated to tensors, None without one. device: by name."""

    device: str
    rss_bytes: int
    device_bytes: int | None

    @staticmethod
    def now(device: str) -> "Usage":
        here = torch.device(device)
        on_gpu = here.type == "cuda"
        return Usage(
            torch.cuda.get_device_name(here) if on_gpu else here.type,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            torch.cuda.max_memory_allocated(here) if on_gpu else None,
        )

    @property
    def shown(self) -> str:
        device = "" if self.device_bytes is None else f" and {self.device_bytes / 1e9:.1f} GB of the {self.device}"
        return f"{self.rss_bytes / 1e9:.1f} GB of memory{device}"


class Executor(Protocol):
    """Carries out work in any order and yields each result as soon as it is there. usage: of the hungriest process.
    workers: how many carry it out at the same time."""

    usage: Usage | None
    workers: int

    def prepare(self, chores: Sequence[Chore[Result]]) -> Iterator[Result]:
        """The results of what needs no sweep, in the order in which they come; before any sweep is opened."""
        ...

    def reference(self, done: Callable[[int], None]) -> Reference:
        """The full-precision reference; `done` hears of the states that are done."""
        ...

    def run(self, work: Sequence[Work[Result]], ref: Reference) -> Iterator[Result]:
        """The results of all work, in the order in which it ends."""
        ...


class LocalExecutor:
    """One after another, here; neighbouring tasks on the same states share the full-precision pass."""

    def __init__(self, spec: SweepSpec) -> None:
        self.spec = spec
        self._sweep: Sweep | None = None
        self.usage: Usage | None = None
        self.workers = 1

    def prepare(self, chores: Sequence[Chore[Result]]) -> Iterator[Result]:
        for chore in chores:
            yield chore()

    def reference(self, done: Callable[[int], None]) -> Reference:
        return self._open(None, done).reference

    def run(self, work: Sequence[Work[Result]], ref: Reference) -> Iterator[Result]:
        for one in work:
            with _device_memory(self.spec, one), self.spec.arithmetic():
                result = one(self._open(ref))
            self.usage = Usage.now(self.spec.device)
            yield result

    def _open(self, ref: Reference | None, done: Callable[[int], None] = lambda _: None) -> Sweep:
        if self._sweep is None:
            with _device_memory(self.spec, "the full-precision pass"), self.spec.arithmetic():
                self._sweep = self.spec.open(ref, done)
        return self._sweep


@contextmanager
def _device_memory(spec: SweepSpec, what: object) -> Iterator[None]:
    """Inside, a device that is full is the user's error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PolicyError(
            f"{spec.device}: not enough memory for {what} with {spec.batch_size} states per pass; call the command "
            "again with a smaller --batch-size: what is finished is kept"
        ) from error


_worker_sweeps: dict[str, Sweep] = {}


def _on_worker(
    spec: SweepSpec, ref: Reference | None, key: str, work: Callable[[Sweep], Any], threads: int
) -> tuple[Any, Usage]:
    """Runs in a Ray worker process, which loads the policy for its first task and keeps it."""
    if key not in _worker_sweeps:
        torch.set_num_threads(threads)
        _worker_sweeps.clear()
        with spec.arithmetic():
            _worker_sweeps[key] = spec.open(ref)
    with spec.arithmetic():
        return work(_worker_sweeps[key]), Usage.now(spec.device)


def _alone(spec: SweepSpec, chore: Callable[[], Any], threads: int) -> tuple[Any, Usage]:
    """Runs in a Ray worker process."""
    torch.set_num_threads(threads)
    return chore(), Usage.now(spec.device)


def _reference_of(sweep: Sweep) -> Reference:
    return sweep.reference


class RayExecutor:
    """Layers as Ray tasks: a free worker takes the next one; one whose worker died goes to another, `ATTEMPTS` times.

    Workers read policy, calibration set and kept codes from the paths in `spec`, which must exist on every node; each
    checks that they hold what this process saw. This process loads no weights and needs no GPU.
    """

    def __init__(self, spec: SweepSpec, key: str, address: str | None, cpus_per_task: int) -> None:
        """`key` identifies the sweep; `address` is the cluster's, None for a cluster of this machine."""
        self._ray = _import_ray()
        self._owned = not self._ray.is_initialized()
        if self._owned:
            try:
                self._ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
            except ConnectionError as error:
                raise VlaError(f"Ray cluster {address!r} cannot be reached ({error}); check --ray-address") from error
        self._cpus = cpus_per_task
        self._gpus = 1 if spec.device.startswith("cuda") else 0
        there = self._ray.cluster_resources()
        if self._gpus > there.get("GPU", 0):
            self.close()
            raise VlaError(f"--device {spec.device}: the Ray cluster has no GPU; use --device cpu")
        # A worker on a GPU has one to itself; Ray shows it only that one, whatever its number here.
        spec = replace(spec, device="cuda") if self._gpus else spec
        self._spec, self._key = self._ray.put(spec), key
        self.usage: Usage | None = None
        self.workers = max(1, int(there.get("GPU", 0) if self._gpus else there.get("CPU", 1) // cpus_per_task))

    def prepare(self, chores: Sequence[Chore[Result]]) -> Iterator[Result]:
        remote = self._remote(_alone)
        return self._carry_out(chores, lambda chore: remote.remote(self._spec, chore, self._cpus))

    def reference(self, done: Callable[[int], None]) -> Reference:
        (ref,) = self._swept([_reference_of], None)
        done(len(ref.decided))
        return ref

    def run(self, work: Sequence[Work[Result]], ref: Reference) -> Iterator[Result]:
        return self._swept(work, ref)

    def _swept(self, work: Sequence[Callable[[Sweep], Any]], ref: Reference | None) -> Iterator[Any]:
        remote, given = self._remote(_on_worker), self._ray.put(ref)
        return self._carry_out(work, lambda one: remote.remote(self._spec, given, self._key, one, self._cpus))

    def _remote(self, function: Callable[..., tuple[Any, Usage]]) -> Any:
        # Ray's own retries are without limit where memory ran out, so they are counted by `_carry_out`.
        return self._ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=0)(function)

    def _carry_out(self, work: Sequence[Any], give: Callable[[Any], Any]) -> Iterator[Any]:
        """give: hands one piece to a worker. An error of the work itself comes back and ends the run."""
        waiting = {give(one): (one, 1) for one in work}
        try:
            while waiting:
                (future,), _ = self._ray.wait(list(waiting), num_returns=1)
                one, attempt = waiting.pop(future)
                try:
                    result, usage = self._ray.get(future)
                except self._ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, VlaError):
                        raise error.cause from error
                    raise
                except self._died as error:
                    if attempt == ATTEMPTS:
                        raise self._lost(one, error) from error
                    waiting[give(one)] = one, attempt + 1
                    continue
                if self.usage is None or usage.rss_bytes > self.usage.rss_bytes:
                    self.usage = usage
                yield result
        finally:
            for pending in waiting:
                self._ray.cancel(pending, force=True)

    @property
    def _died(self) -> tuple[type[Exception], ...]:
        errors = self._ray.exceptions
        return errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError

    def _lost(self, work: object, error: Exception) -> VlaError:
        memory = isinstance(error, self._ray.exceptions.OutOfMemoryError)
        why = "Ray ended it because the machine ran out of memory" if memory else (
            "it was killed, as a machine does that runs out of memory, or crashed"
        )
        return VlaError(
            f"{_named(work)}: its worker died {ATTEMPTS} times ({why}); call the command again with a smaller "
            "--batch-size, more --cpus-per-task (fewer workers per machine) or --dtype bfloat16: what is finished is "
            "kept"
        )

    def close(self) -> None:
        """Disconnects, and stops the cluster if this executor started it."""
        if self._owned:
            self._ray.shutdown()


def _named(work: object) -> str:
    return "the full-precision reference" if work is _reference_of else str(work)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise VlaError("--executor ray needs Ray; install it with: pip install 'vla-deploy[ray]'") from error
    return ray
