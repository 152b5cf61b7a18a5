"""The Ray executor against the local one, with workers killed in the middle."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from choices import W2, W8
from deadly import DeadlyChore, DeadlySpec
from naive import ATTRIBUTION, MASS

from calibrator.families import TorchActor
from calibrator.quantizers import parse_choices
from calibrator.sensitivity.executors import ATTEMPTS, LocalExecutor, RayExecutor, Task
from calibrator.sensitivity.measure import measure
from calibrator.sensitivity.run import RunOptions
from calibrator.sensitivity.scores import ScoreSettings
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec
from vla_policy.core.errors import ArtefactError, PolicyError, VlaError
from vla_policy.core.files import sha256_policy

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
        # Ray's workers are nice, and starve beside anything else on two cores.
        patch.setenv("RAY_worker_niceness", "0")
        yield ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        ray.shutdown()


def test_ray_gives_the_local_table_and_outlives_a_killed_worker(
    cluster: Any, spec: SweepSpec, sweep: Sweep, tmp_path: Path
) -> None:
    tasks = [Task(unit, (W2, W8), ALL) for unit in UNITS]
    marker = tmp_path / "killed"
    executor = RayExecutor(DeadlySpec.of(spec, marker, "projector.fc1", 1), "test", None, cpus_per_task=1)
    ref = executor.reference(lambda _: None)
    np.testing.assert_array_equal(ref.decided, sweep.reference.decided)
    results = list(executor.run(tasks, ref))
    assert marker.read_text() == "x", "no worker was killed"
    # Each layer exactly once: the killed worker's own again, nobody else's lost or repeated.
    assert sorted(losses.unit for losses in results) == sorted(UNITS)
    assert executor.usage is not None and executor.usage.device == "cpu" and executor.usage.rss_bytes > 1e8
    by_unit = {losses.unit: losses for losses in results}
    for losses in LocalExecutor(spec).run(tasks, sweep.reference):
        np.testing.assert_allclose(by_unit[losses.unit].mass, losses.mass, **MASS)
        np.testing.assert_allclose(by_unit[losses.unit].attribution, losses.attribution, **ATTRIBUTION)
        # Distances of bins: equal to the last bit as long as no token changes, and rounding alone changes none.
        np.testing.assert_array_equal(by_unit[losses.unit].action_error, losses.action_error)


def test_a_worker_that_dies_again_and_again_ends_the_sweep_by_name(
    cluster: Any, spec: SweepSpec, sweep: Sweep, tmp_path: Path
) -> None:
    marker = tmp_path / "killed"
    executor = RayExecutor(DeadlySpec.of(spec, marker, "projector.fc1", 99), "deadly", None, cpus_per_task=1)
    wanted = rf"^projector\.fc1 in w2a16_g32:rtn on 8 states: its worker died {ATTEMPTS} times .*smaller --batch-size"
    with pytest.raises(VlaError, match=wanted):
        list(executor.run([Task("projector.fc1", (W2,), ALL)], sweep.reference))
    assert len(marker.read_text()) == ATTEMPTS


def test_an_error_on_a_worker_is_the_users_error(cluster: Any, spec: SweepSpec, sweep: Sweep) -> None:
    executor = RayExecutor(spec, "error", None, cpus_per_task=1)
    with pytest.raises(PolicyError, match="has no layer"):
        list(executor.run([Task("action_head.fc1", (W2,), (0,))], sweep.reference))


def test_a_worker_refuses_other_files_than_the_drivers(cluster: Any, spec: SweepSpec, sweep: Sweep) -> None:
    right = sha256_policy(spec.policy), sweep.states.calibration.sha256
    for place, path in enumerate((spec.policy, spec.calibration)):
        wrong = tuple("0" * 64 if place == other else value for other, value in enumerate(right))
        executor = RayExecutor(replace(spec, sha256=wrong), f"other {place}", None, cpus_per_task=1)
        with pytest.raises(ArtefactError, match=rf"^{path}: holds [0-9a-f]{{12}} on .*, the sweep is of 0{{12}}; copy"):
            list(executor.run([Task("projector.fc1", (W2,), (0,))], sweep.reference))


def test_a_driver_without_weights_measures_what_a_local_run_does(
    cluster: Any, spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same table, while this process never loads the policy."""
    said: list[str] = []
    options = RunOptions(unit_globs=("projector.*",), first_order=True, say=said.append)
    local = measure(spec, tmp_path / "local.json", ScoreSettings(bins=2), options)
    monkeypatch.setattr(SweepSpec, "load_policy", lambda self: pytest.fail("weights are read by the driver"))
    far = measure(spec, tmp_path / "far.json", ScoreSettings(bins=2), replace(options, executor="ray"))
    for choice, value in local.units[0].omega.items():
        assert far.units[0].omega[choice] == pytest.approx(value, rel=5e-3, abs=3e-5)
    assert far.units[0].action_proxy[W2] == pytest.approx(local.units[0].action_proxy[W2], rel=1e-3)
    here, there = (text for text in said if text.startswith("estimated from the first layer: "))
    assert "GB of memory (no layer needs more); less: --mode screened" in here and "--executor ray" in here
    assert "GB of memory in each worker" in there and "more machines" in there


def test_codes_that_look_at_inputs_are_written_by_the_workers(
    cluster: Any, spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte those of a local run, by both workers, from policy and states that each of them has checked."""
    spec = replace(spec, settings=SweepSettings(parse_choices(("w2a16_g32:gptq", "w4a16_g32:mse", "w8a16_g32:rtn"))))
    options = RunOptions(unit_globs=("projector.*", "*layers.1.self_attn.*"))

    def codes(name: str, executor: str) -> dict[Path, bytes]:
        folder = tmp_path / f"{name}.unfinished" / "codes"

        def stop(self: RunOptions, *_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            # All codes are there before the full-precision pass begins.
            patch.setattr(LocalExecutor if executor == "local" else RayExecutor, "reference", stop)
            measure(spec, tmp_path / f"{name}.json", ScoreSettings(bins=2), replace(options, executor=executor))
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    here = codes("here", "local")
    monkeypatch.setattr(TorchActor, "load", lambda *_: pytest.fail("the driver loads the policy"))
    assert codes("there", "ray") == here
    assert len(here) == 2 * (3 + 4)  # in two choices, three layers of the projector and q, k, v and o


def test_a_chore_whose_worker_dies_is_given_to_another(cluster: Any, spec: SweepSpec, tmp_path: Path) -> None:
    executor = RayExecutor(spec, "chores", None, cpus_per_task=1)
    marker = tmp_path / "killed"
    assert sorted(executor.prepare([DeadlyChore("a", marker, 1), DeadlyChore("b", marker, 0)])) == ["a", "b"]
    assert marker.read_text() == "x"
    with pytest.raises(VlaError, match=rf"^chore c: its worker died {ATTEMPTS} times"):
        list(executor.prepare([DeadlyChore("c", tmp_path / "again", 99)]))


def test_a_cluster_without_a_gpu_is_refused(cluster: Any, spec: SweepSpec) -> None:
    with pytest.raises(VlaError, match="--device cuda: the Ray cluster has no GPU"):
        RayExecutor(replace(spec, device="cuda"), "gpu", None, cpus_per_task=1)


def test_a_worker_on_a_gpu_has_it_under_the_name_that_ray_gives_it(
    cluster: Any, spec: SweepSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cuda:1` of the driver's machine is `cuda` where a worker sees one card only."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    executor = RayExecutor(replace(spec, device="cuda:1"), "gpu", None, cpus_per_task=1)
    assert ray.get(executor._spec).device == "cuda"
