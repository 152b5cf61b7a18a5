"""The calibrator on a GPU gives a CPU's numbers. Skipped where there is none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from choices import CHOICES, WITH_ACTIVATIONS, rtn

from calibrator.families import live_units
from calibrator.quantizers import quantize
from calibrator.sensitivity.measure import measure
from calibrator.sensitivity.proxy import first_order
from calibrator.sensitivity.run import RunOptions
from calibrator.sensitivity.scores import ScoreSettings
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec
from vla_policy.core.formats import Choice, Format

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# Their input is word embeddings of bfloat16 numbers: relative to the token's largest, some lie exactly between two
# codes, and the last bit of a device's normalisation decides which of them they get.
TIED = "language_model.model.layers.0.self_attn."


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_and_scales_are_equal(bits: int) -> None:
    weight = torch.randn(48, 200, generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = (quantize(weight.to(device), rtn(Format(bits, 16, 64))) for device in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu.codes.cpu(), on_cpu.codes, rtol=0, atol=0)
    torch.testing.assert_close(on_gpu.scales.cpu(), on_cpu.scales, rtol=0, atol=0)


@pytest.mark.parametrize("choices", [CHOICES, WITH_ACTIVATIONS])
def test_losses_and_first_order_scores_are_equal(spec: SweepSpec, sweep: Sweep, choices: tuple[Choice, ...]) -> None:
    settings = SweepSettings(choices)
    on_cpu = Sweep(sweep.policy, sweep.states, sweep.reference, settings)
    remote = replace(spec, settings=settings, device="cuda")
    with remote.arithmetic():
        on_gpu = remote.open(sweep.reference)
        units = [unit.name for unit in live_units(on_gpu.policy)]
        for unit in units:
            one, other = (place.evaluate(unit, choices[:2], (0, 1, 2)) for place in (on_cpu, on_gpu))
            if choices == WITH_ACTIVATIONS and unit.startswith(TIED):
                assert np.abs(other.mass - one.mass).mean() < 0.1 * one.mass.mean()
                assert np.abs(other.attribution - one.attribution).mean() < 0.05 * one.attribution.mean()
                continue
            np.testing.assert_allclose(other.mass, one.mass, rtol=0.02, atol=1e-4)
            np.testing.assert_allclose(other.attribution, one.attribution, rtol=0.02, atol=1e-5)
        found = (first_order(place, units, True) for place in (on_cpu, on_gpu))
        for unit, one, other in zip(units, *found, strict=True):
            if choices == CHOICES or not unit.startswith(TIED):
                np.testing.assert_allclose(other.mass, one.mass, rtol=0.02, atol=1e-4)


def test_a_whole_run_states_its_device_memory(spec: SweepSpec, tmp_path: Path) -> None:
    options = RunOptions(unit_globs=("projector.*",))
    remote = replace(spec, device="cuda", settings=replace(spec.settings, dtype="bfloat16"))
    cost = measure(remote, tmp_path / "sensitivity.json", ScoreSettings(), options).meta["cost"]
    assert cost["peak_device_bytes"] > cost["policy_bytes"] and cost["device"] == torch.cuda.get_device_name()
