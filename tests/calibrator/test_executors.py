"""The Ray executor against the local one, with a worker killed in the middle."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrator.executors import LocalExecutor, RayExecutor, Task
from calibrator.sweep import Sweep, SweepSpec
from vla_policy.core.errors import PolicyError

ray = pytest.importorskip("ray", reason="Ray is an optional extra")


@pytest.fixture(scope="module")
def cluster() -> Any:
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield context
    ray.shutdown()


def _busy_workers() -> list[int]:
    """Descendants of this process that run a task: Ray names them after it."""
    parents: dict[int, int] = {}
    busy: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, title = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
        except OSError:
            continue  # ended between the listing and the reading
        parents[int(folder.name)] = int(status.rpartition(")")[2].split()[1])
        if b"_evaluate_on_worker" in title:
            busy.append(int(folder.name))
    return [pid for pid in busy if _descends(pid, os.getpid(), parents)]


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False


def test_ray_gives_the_local_table_and_outlives_a_killed_worker(cluster: Any, spec: SweepSpec, sweep: Sweep) -> None:
    names = [f"language_model.model.layers.{i}.{part}" for i in (0, 1) for part in ("mlp.up_proj", "self_attn.q_proj")]
    tasks = [Task(name, (2, 4, 8), tuple(range(8))) for name in (*names, "projector.fc1", "projector.fc2")]
    executor = RayExecutor(spec, sweep.reference, "test", None, cpus_per_task=1)
    killed = threading.Event()

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while not killed.is_set() and time.monotonic() < deadline:
            for pid in _busy_workers():
                os.kill(pid, signal.SIGKILL)
                killed.set()
                return

    killer = threading.Thread(target=kill_one)
    killer.start()
    results = {losses.unit: losses for losses in executor.run(tasks)}
    killer.join()
    executor.close()
    assert killed.is_set(), "no busy worker was found to kill"
    assert set(results) == {task.unit for task in tasks}
    for losses in LocalExecutor(sweep).run(tasks):
        np.testing.assert_allclose(results[losses.unit].mass, losses.mass, rtol=1e-3, atol=2e-5)
        np.testing.assert_allclose(results[losses.unit].attribution, losses.attribution, rtol=1e-3, atol=1e-7)
        np.testing.assert_array_equal(results[losses.unit].action_error, losses.action_error)


def test_an_error_on_a_worker_is_the_users_error(cluster: Any, spec: SweepSpec, sweep: Sweep) -> None:
    executor = RayExecutor(spec, sweep.reference, "test", None, cpus_per_task=1)
    with pytest.raises(PolicyError, match="not on the path"):
        list(executor.run([Task("action_head.fc1", (2,), (0,))]))
