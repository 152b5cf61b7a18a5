"""The Ray executor against the local one, with a worker killed in the middle."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from choices import W2, W8
from deadly import DeadlySpec
from naive import ATTRIBUTION, MASS

from calibrator.sensitivity.executors import LocalExecutor, RayExecutor, Task
from calibrator.sensitivity.sweep import Sweep, SweepSpec
from vla_policy.core.errors import PolicyError, VlaError

ray = pytest.importorskip("ray", reason="Ray is an optional extra")

UNITS = (
    "language_model.model.layers.0.mlp.up_proj",
    "language_model.model.layers.1.self_attn.q_proj",
    "projector.fc1",
    "projector.fc2",
)
ALL = tuple(range(8))


@pytest.fixture(scope="module")
def cluster() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        # Workers are processes of their own: they find the tests' modules by this path only.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        yield ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        ray.shutdown()


def test_ray_gives_the_local_table_and_outlives_a_killed_worker(
    cluster: Any, spec: SweepSpec, sweep: Sweep, tmp_path: Path
) -> None:
    tasks = [Task(unit, (W2, W8), ALL) for unit in UNITS]
    marker = tmp_path / "killed"
    deadly = DeadlySpec.of(spec, marker, "projector.fc1")
    executor = RayExecutor(deadly, sweep.reference, "test", None, cpus_per_task=1)
    results = list(executor.run(tasks))
    assert int(marker.read_text()) > 0, "no worker was killed"
    # Each layer exactly once: the killed worker's own again, nobody else's lost or repeated.
    assert sorted(losses.unit for losses in results) == sorted(UNITS)
    by_unit = {losses.unit: losses for losses in results}
    for losses in LocalExecutor(sweep).run(tasks):
        np.testing.assert_allclose(by_unit[losses.unit].mass, losses.mass, **MASS)
        np.testing.assert_allclose(by_unit[losses.unit].attribution, losses.attribution, **ATTRIBUTION)
        # Distances of bins: equal to the last bit as long as no token changes, and rounding alone changes none.
        np.testing.assert_array_equal(by_unit[losses.unit].action_error, losses.action_error)


def test_an_error_on_a_worker_is_the_users_error(cluster: Any, spec: SweepSpec, sweep: Sweep) -> None:
    executor = RayExecutor(spec, sweep.reference, "error", None, cpus_per_task=1)
    with pytest.raises(PolicyError, match="has no layer"):
        list(executor.run([Task("action_head.fc1", (W2,), (0,))]))


def test_a_cluster_without_a_gpu_is_refused(cluster: Any, spec: SweepSpec, sweep: Sweep) -> None:
    with pytest.raises(VlaError, match="--device cuda: the Ray cluster has no GPU"):
        RayExecutor(replace(spec, device="cuda"), sweep.reference, "gpu", None, cpus_per_task=1)
