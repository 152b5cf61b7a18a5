"""QVLA's widths per output channel: allocation against brute force and a plain loop, scores against differences."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calibrator.__main__ import main
from calibrator.allocation.channel_plan import ChannelRequest, ChannelSolver, plan_channels
from calibrator.allocation.channels import Channels, greedy, optimum
from calibrator.allocation.plan import Assignment, Plan
from calibrator.families import Policy, live_units, load_policy
from calibrator.quantizers import find_layer, parse_choices, quantize_policy
from calibrator.sensitivity import channels as measuring
from calibrator.sensitivity.channel_table import ChannelTable
from calibrator.sensitivity.channels import ChannelOptions, exact_errors, measure_channels
from calibrator.sensitivity.passes import Batch, Trunk, output
from calibrator.sensitivity.proxy import channel_errors
from calibrator.sensitivity.sweep import Sweep, SweepSettings, SweepSpec
from engine_build.__main__ import main as engine_build
from vla_policy.core.cli import run
from vla_policy.core.errors import ArtefactError, BudgetError
from vla_policy.core.files import sha256_policy
from vla_policy.core.formats import FULL
from vla_policy.core.manifest import Manifest

BITS = np.array([16, 8, 4, 2, 0])
WIDTHS = parse_choices(("w2a16", "w4a16", "w8a16"))
LAYERS = (
    "vision_backbone.featurizer.patch_embed.proj",
    "projector.fc1",
    "language_model.model.layers.0.self_attn.v_proj",
    "language_model.lm_head",
)


def random_channels(count: int, seed: int, sizes: tuple[int, ...]) -> Channels:
    """Losses that grow as bits fall, but not evenly: greedy steps then lead astray."""
    generator = np.random.default_rng(seed)
    losses = np.cumsum(generator.exponential(1.0, (count, 4)) * [8, 4, 2, 2], 1)
    scores = np.concatenate([np.zeros((count, 1)), losses], 1)
    return Channels(BITS, scores, generator.choice(sizes, count))


@pytest.mark.parametrize("sizes", [(1,), (3, 5, 8)])
def test_the_optimum_equals_brute_force(sizes: tuple[int, ...]) -> None:
    every, row = np.array(list(itertools.product(range(5), repeat=6))), np.arange(6)
    worse = 0
    for seed in range(6):
        channels = random_channels(6, seed, sizes)
        scores, used = channels.scores[row, every].sum(1), (channels.sizes * BITS[every]).sum(1)
        for average in (0.5, 2.0, 3.3, 4.0, 7.0, 16.0):
            limit = average * channels.sizes.sum()
            best = scores[used <= limit].min()
            picks, bound = optimum(channels, average)
            assert channels.used(picks) <= limit
            # The bound says how far from the best this may be: a millionth.
            assert channels.total(picks) <= best * (1 + 1e-6) + 1e-12 and bound <= best + 1e-12
            worse += channels.total(greedy(channels, average)) > best * (1 + 1e-6)
    assert worse > 10, "greedy demotion finds the optimum: these tables tell nothing"


def test_a_channel_that_must_stay_stays() -> None:
    """Against brute force over what is left; the least budget is two bits of each such channel."""
    every, row = np.array(list(itertools.product(range(5), repeat=6))), np.arange(6)
    for seed in range(4):
        free = random_channels(6, seed, (3, 5, 8))
        scores = free.scores.copy()
        scores[[0, 3], 4] = np.inf
        channels = replace(free, scores=scores)
        least = 2 * (channels.sizes[0] + channels.sizes[3]) / channels.sizes.sum()
        for average in (least, 2.0, 4.0):
            allowed = (channels.sizes * BITS[every]).sum(1) <= average * channels.sizes.sum() + 1e-9
            best = channels.scores[row, every].sum(1)[allowed].min()
            for picks in (optimum(channels, average)[0], greedy(channels, average)):
                assert channels.used(picks) <= average * channels.sizes.sum() + 1e-9
                assert best - 1e-12 <= channels.total(picks) < np.inf
            assert channels.total(optimum(channels, average)[0]) <= best * (1 + 1e-6) + 1e-12
        for solver in (optimum, greedy):
            with pytest.raises(BudgetError, match=f"below the least; feasible: {least:.4g} to 16"):
                solver(channels, least - 0.01)


@pytest.mark.parametrize("average", [2.5, 4.0])
def test_many_channels_are_certified_to_a_millionth(average: float) -> None:
    channels = random_channels(5000, 0, (192, 576, 768))
    picks, bound = optimum(channels, average)
    assert channels.used(picks) <= average * channels.sizes.sum()
    assert 0 <= channels.total(picks) - bound <= 1e-6 * bound
    assert channels.total(picks) < channels.total(greedy(channels, average))


def algorithm_1(scores: np.ndarray, average: float) -> list[int]:
    """The published pseudo-code line by line, with a list for its heap; every channel counts once."""
    bits = [16] * len(scores)
    column = {16: 0, 8: 1, 4: 2, 2: 3, 0: 4}
    below = {16: 8, 8: 4, 4: 2, 2: 0}

    def ratio(channel: int, high: int) -> float:
        low = below[high]
        return float((scores[channel, column[low]] - scores[channel, column[high]]) / (high - low))

    left = 16 * len(scores) - average * len(scores)
    heap = [(ratio(channel, 16), channel, 16) for channel in range(len(scores))]
    while left > 0 and heap:
        _, channel, high = heap.pop(heap.index(min(heap)))
        if bits[channel] == high:
            bits[channel] = below[high]
            left -= high - below[high]
            if below[high] in below:
                heap.append((ratio(channel, below[high]), channel, below[high]))
    return bits


@pytest.mark.parametrize("seed", range(4))
def test_greedy_demotion_is_algorithm_1(seed: int) -> None:
    channels = random_channels(40, seed, (1,))
    for average in (0.0, 2.5, 4.0, 8.0, 15.9, 16.0):
        assert BITS[greedy(channels, average)].tolist() == algorithm_1(channels.scores, average)


@pytest.fixture(scope="module")
def widths(spec: SweepSpec) -> Sweep:
    return replace(spec, settings=SweepSettings(WIDTHS)).open()


def test_first_order_scores_equal_finite_differences(widths: Sweep) -> None:
    """Eq. (6): the squared norms of the action's gradient and of the channel's change, both over tokens."""
    estimates = channel_errors(widths, LAYERS, lambda _: None)
    states = tuple(range(len(widths.states)))
    for name in LAYERS[1:3]:
        unit, row = widths.units[name], 3
        sums = np.zeros(1 + len(WIDTHS))
        for batch in widths.states.split(states):
            trunk = Trunk(widths.chain, widths.states.batch(widths.policy, batch, widths.reference.decided), False)
            seen: list[torch.Tensor] = []
            handle = unit.module.register_forward_hook(lambda module, args, result, seen=seen: seen.append(args[0]))
            output(trunk, unit.segment)
            handle.remove()
            x = seen[0].double()
            gains = np.zeros(len(batch))
            for token in range(x.shape[1]):
                sides = []
                for step in (1e-2, -1e-2):
                    handle = unit.module.register_forward_hook(_moved(token, row, step))
                    sides.append(trunk.batch.decisions.expected(output(trunk, unit.segment)).double())
                    handle.remove()
                gains += ((sides[0] - sides[1]) / 2e-2).square().sum(-1).numpy()
            weight = unit.module.weight.detach().double()
            for column, values in enumerate(measuring._coded(widths, name)):
                change = (x @ (values.double() - weight)[row]).square().sum(1).numpy()
                sums[column] += (gains * change).sum()
        # Differences of float32 numbers of size 1 over 0.02, squared.
        np.testing.assert_allclose(estimates[name][:, row], sums / len(states), rtol=0.02)


def _moved(token: int, row: int, step: float) -> Callable[..., torch.Tensor]:
    """A hook that moves one value of a layer's output."""

    def moved(module: object, arguments: object, result: torch.Tensor) -> torch.Tensor:
        result = result.clone()
        result[:, token, row] += step
        return result

    return moved


def test_exact_scores_are_the_actions_of_policies_with_one_row_changed(widths: Sweep, spec: SweepSpec) -> None:
    channels = [(name, 5 if "head" not in name else widths.units[name].rows.start + 5) for name in LAYERS]
    found = exact_errors(widths, channels)
    policy, decided = load_policy(spec.policy), widths.reference.decided
    for name, row in channels:
        weight = find_layer(policy, name).weight.data
        before = weight[row].clone()
        sums = np.zeros(1 + len(WIDTHS))
        for state in range(len(widths.states)):
            batch = widths.states.batch(policy, (state,), decided)
            reference = batch.decisions.expected(_output(policy, batch))
            for column, values in enumerate(measuring._coded(widths, name)):
                weight[row] = values[row]
                now = batch.decisions.expected(_output(policy, batch))
                sums[column] += float((now - reference).double().square().sum())
                weight[row] = before
        # Sums of float32 products in another order, and small differences of the actions.
        np.testing.assert_allclose(found[name, row], sums / len(widths.states), rtol=2e-2, atol=1e-9)
        assert found[name, row][0] > 0


def _output(policy: Policy, batch: Batch) -> torch.Tensor:
    chain = policy.chain()
    with torch.no_grad():
        return chain.run(batch.values)[chain.output]


@pytest.fixture(scope="module")
def table(policy_folder: Path, calibration_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("channels") / "channels.json"
    arguments = ["--policy", str(policy_folder), "--calibration", str(calibration_folder), "--out", str(out)]
    assert main(["channels", "measure", *arguments, "--exact", "0.02"]) == 0
    return out


def test_the_largest_channels_are_exact_and_the_others_scaled(table: Path) -> None:
    found = ChannelTable.load(table)
    estimate = np.concatenate([layer.first_order for layer in found.layers], 1)
    exact = np.concatenate([layer.exact for layer in found.layers], 1)
    known = np.isfinite(exact[1])
    assert known.sum() == round(0.02 * known.size) == found.meta["exact_channels"]
    assert estimate[1][known].min() >= estimate[1][~known].max()
    scores = np.concatenate([found.scores(layer) for layer in found.layers], 1)
    np.testing.assert_array_equal(scores[:, known], exact[:, known])
    np.testing.assert_allclose(scores[:, ~known], estimate[:, ~known] * found.factors[:, None])
    # First order is an upper bound of the linear effect, and fewer bits are worse in the mean.
    assert (found.factors[1:] < 1.2).all()
    assert (np.diff(scores.mean(1)) < 0).all()


def test_a_killed_measurement_goes_on(
    spec: SweepSpec, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, options, out = SweepSettings(WIDTHS), ChannelOptions(0.02), tmp_path / "channels.json"
    calls = []

    def dying(*arguments: object) -> np.ndarray:
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments)  # type: ignore[arg-type]

    real = measuring._batch_errors
    monkeypatch.setattr(measuring, "_batch_errors", dying)
    with pytest.raises(KeyboardInterrupt):
        measure_channels(replace(spec, settings=settings), out, options)
    with open(tmp_path / "channels.unfinished.jsonl", "a") as stream:
        stream.write('["(0, 1')
    monkeypatch.setattr(measuring, "_batch_errors", lambda *arguments: calls.append(arguments) or real(*arguments))
    found = measure_channels(replace(spec, settings=settings), out, options)
    whole = found.meta["exact_channels"] * len(spec.open().states.split(range(8)))
    assert len(calls) == whole
    assert [*tmp_path.iterdir()] and not (tmp_path / "channels.unfinished.jsonl").exists()
    for mine, other in zip(found.layers, ChannelTable.load(table).layers, strict=True):
        # The other one ran with another batch size: sums in another order.
        np.testing.assert_allclose(mine.exact, other.exact, rtol=1e-2, atol=1e-8)


def test_a_plan_is_within_its_budget_and_becomes_an_engine(
    policy_folder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_path, engine = tmp_path / "plan.json", tmp_path / "engine"
    allocate = ["channels", "allocate", "--channels", str(table), "--out", str(plan_path)]
    assert main([*allocate, "--average-bits", "8"]) == 0
    assert "certified optimum" in capsys.readouterr().out
    plan = Plan.load(plan_path)
    units = {unit.name: unit for unit in live_units(load_policy(policy_folder))}
    choices = Assignment.load(plan_path, sha256_policy(policy_folder), list(units))
    bits = sum(
        int(choices.rows.bits[name].sum()) * unit.inputs
        if name in choices.rows.bits
        else choices.choices[name].format.weight_bits * unit.params
        for name, unit in units.items()
    )
    weights = sum(unit.params for unit in units.values())
    assert plan.average_bits == pytest.approx(bits / weights) and bits / weights <= 8
    assert bits / weights > 7.95
    assert all(choices.choices[name] == FULL for name, unit in units.items() if unit.stage in ("projector", "head"))
    assert plan.details["greedy"]["above_optimum"] >= 0
    assert engine_build(["build", "--policy", str(policy_folder), "--plan", str(plan_path), "--out", str(engine)]) == 0
    manifest = Manifest.load(engine)
    assert sum(unit.weights * unit.choice.format.weight_bits for unit in manifest.units) == bits
    policy = load_policy(policy_folder)
    quantize_policy(policy, choices.choices, rows=choices.rows)
    absent = {name: np.flatnonzero(widths == 0) for name, widths in choices.rows.bits.items()}
    assert sum(map(len, absent.values())) > 0
    assert not any(find_layer(policy, name).weight.data[rows].any() for name, rows in absent.items())


@pytest.mark.parametrize("solver", ["HIGHS", "GREEDY"])
def test_every_layer_keeps_the_channel_that_would_be_missed_most(table: Path, solver: ChannelSolver) -> None:
    """By the smallest budget there is: one channel of 2 bits in each layer, 0.01 bits less is refused."""
    found = ChannelTable.load(table)
    weights = sum(layer.shape.params for layer in found.layers)
    least = sum(2 * layer.shape.inputs for layer in found.layers) / weights
    plan = plan_channels(found, ChannelRequest(least, keep=(), solver=solver))
    for layer in found.layers:
        widths, scores = plan.rows.bits[layer.shape.name], found.scores(layer)
        lost = {channel: scores[0, channel] - scores[1, channel] for channel in range(layer.shape.outputs)}
        assert np.flatnonzero(widths).tolist() == [layer.first + max(lost, key=lambda channel: lost[channel])]
        assert widths.sum() == 2
    with pytest.raises(BudgetError, match=f"below the least, {least:.3f}"):
        plan_channels(found, ChannelRequest(least - 0.01, keep=(), solver=solver))


def test_published_averages_count_channels_that_may_be_chosen(table: Path, tmp_path: Path) -> None:
    allocate = ["channels", "allocate", "--channels", str(table), "--average-bits", "4", "--as-published"]
    assert main([*allocate, "--solver", "GREEDY", "--out", str(tmp_path / "plan.json")]) == 0
    plan, found = Plan.load(tmp_path / "plan.json"), ChannelTable.load(table)
    chosen = [layer for layer in found.layers if layer.shape.stage not in ("projector", "head")]
    scores = np.concatenate([found.scores(layer) for layer in chosen], 1).T[:, ::-1]
    expected = algorithm_1(np.concatenate([np.zeros((len(scores), 1)), scores], 1), 4.0)
    assert plan.details["channels_by_bits"] == {str(bits): expected.count(bits) for bits in BITS.tolist()}
    assert plan.gap == 1.0 and "greedy" not in plan.standing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["measure", "--choices", "w4a16", "w4a16_g32"], "expected one of each number of bits"),
        (["measure", "--choices", "w4a8"], "activations of 16 bits"),
        (["measure", "--choices", "w4a16:gptq"], "do not depend on the layer's input"),
        (["measure", "--exact", "1.5"], "expected a part between 0 and 1"),
        (["allocate", "--average-bits", "0.1"], "below the least with projector and head at 16 bits"),
        (["allocate", "--average-bits", "1.9", "--keep", "--no-prune"], "below the least, 2.000"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str],
    message: str,
    policy_folder: Path,
    calibration_folder: Path,
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inputs = ["--policy", str(policy_folder), "--calibration", str(calibration_folder)]
    if arguments[0] == "allocate":
        inputs = ["--channels", str(table)]
    assert run(lambda: main(["channels", *arguments, *inputs, "--out", str(tmp_path / "out.json")])) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_damaged_scores_and_rows_are_refused(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "channels.json").write_bytes(table.read_bytes())
    scores = bytearray(table.with_suffix(".safetensors").read_bytes())
    scores[-1] ^= 1
    (tmp_path / "channels.safetensors").write_bytes(scores)
    allocate = ["channels", "allocate", "--average-bits", "5", "--out", str(tmp_path / "plan.json")]
    assert run(lambda: main([*allocate, "--channels", str(tmp_path / "channels.json")])) == 2
    assert "not the file that" in capsys.readouterr().err
    assert main([*allocate, "--channels", str(table)]) == 0
    rows = tmp_path / "plan.rows.safetensors"
    assert json.loads((tmp_path / "plan.json").read_text())["rows"]["name"] == rows.name
    rows.write_bytes(rows.read_bytes()[:-1] + b"\7")
    with pytest.raises(ArtefactError, match="not the file that was written with what names it"):
        Plan.load(tmp_path / "plan.json")
