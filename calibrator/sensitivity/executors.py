"""Where layers are evaluated: in this process, or by the workers of a Ray cluster."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from calibrator.sensitivity.states import Reference
from calibrator.sensitivity.sweep import Sweep, SweepSpec, UnitLosses
from vla_policy.core.errors import VlaError
from vla_policy.core.formats import Choice


@dataclass(frozen=True)
class Task:
    """One layer in some choices on some states."""

    unit: str
    choices: tuple[Choice, ...]
    samples: tuple[int, ...]


class Executor(Protocol):
    """Runs tasks in any order and yields each result as soon as it is there."""

    def run(self, tasks: Sequence[Task]) -> Iterator[UnitLosses]:
        """The records of all tasks, in the order in which they finish."""
        ...


class LocalExecutor:
    """One after another, here; neighbouring tasks on the same states share the full-precision pass."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep

    def run(self, tasks: Sequence[Task]) -> Iterator[UnitLosses]:
        for task in tasks:
            yield self.sweep.evaluate(task.unit, task.choices, task.samples)


_worker_sweeps: dict[str, Sweep] = {}


def _evaluate_on_worker(spec: SweepSpec, ref: Reference, key: str, task: Task, threads: int) -> UnitLosses:
    """Runs in a Ray worker process, which loads the policy for its first task and keeps it."""
    import torch

    if key not in _worker_sweeps:
        torch.set_num_threads(threads)
        _worker_sweeps.clear()
        _worker_sweeps[key] = spec.open(ref)
    with spec.arithmetic():
        return _worker_sweeps[key].evaluate(task.unit, task.choices, task.samples)


class RayExecutor:
    """Layers as Ray tasks: a free worker takes the next one, and one whose worker died is run again elsewhere.

    Workers read policy and calibration set from the paths in `spec`, which must exist on every node.
    """

    def __init__(self, spec: SweepSpec, ref: Reference, key: str, address: str | None, cpus_per_task: int) -> None:
        """`key` identifies the sweep; `address` is the cluster's, None for a cluster of this machine."""
        self._ray = _import_ray()
        self._owned = not self._ray.is_initialized()
        if self._owned:
            try:
                self._ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
            except ConnectionError as error:
                raise VlaError(f"Ray cluster {address!r} cannot be reached ({error}); check --ray-address") from error
        self._cpus = cpus_per_task
        # A worker on a GPU has one to itself; Ray shows it only that one, under the name "cuda".
        self._gpus = 1 if spec.device.startswith("cuda") else 0
        if self._gpus > self._ray.cluster_resources().get("GPU", 0):
            self.close()
            raise VlaError(f"--device {spec.device}: the Ray cluster has no GPU; use --device cpu")
        self._inputs = tuple(self._ray.put(value) for value in (spec, ref))
        self._key = key

    def run(self, tasks: Sequence[Task]) -> Iterator[UnitLosses]:
        # Only a dead worker is retried, without limit; an error of the evaluation itself comes back and ends the sweep.
        remote = self._ray.remote(
            num_cpus=self._cpus, num_gpus=self._gpus, max_retries=-1, retry_exceptions=False
        )(_evaluate_on_worker)
        waiting = [remote.remote(*self._inputs, self._key, task, self._cpus) for task in tasks]
        try:
            while waiting:
                done, waiting = self._ray.wait(waiting, num_returns=1)
                yield self._result(done[0])
        finally:
            for pending in waiting:
                self._ray.cancel(pending, force=True)

    def _result(self, future: Any) -> UnitLosses:
        try:
            return self._ray.get(future)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, VlaError):
                raise error.cause from error
            raise

    def close(self) -> None:
        """Disconnects, and stops the cluster if this executor started it."""
        if self._owned:
            self._ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise VlaError("--executor ray needs Ray; install it with: pip install 'vla-deploy[ray]'") from error
    return ray
