"""Benchmarks by name, set up as a policy expects them."""

from dataclasses import replace
from importlib.util import find_spec

from evaluation.benchmarks.base import BenchmarkEnv
from evaluation.benchmarks.libero import PROTOCOLS, SUITES, SWAPPED_SUITES, LiberoEnv
from evaluation.benchmarks.metaworld import MetaWorldEnv
from vla_policy.core.errors import DataError
from vla_policy.core.policy_config import PolicyConfig

BENCHMARKS = (*SUITES, *SWAPPED_SUITES, MetaWorldEnv.name)


def make_env(benchmark: str, config: PolicyConfig) -> BenchmarkEnv:
    """The benchmark for the policy with `config`; nothing is simulated before the first reset.

    On LIBERO the state that a policy takes says which protocol it was trained for: none or the full one the official
    protocol, the hand's the demo's. Raises DataError for an unknown name, another state, or an extra that is not
    installed.
    """
    if benchmark not in BENCHMARKS:
        raise DataError(f"benchmark {benchmark!r} is unknown; choose from: {', '.join(BENCHMARKS)}")
    try:
        if benchmark == MetaWorldEnv.name:
            if find_spec("metaworld") is None:
                raise ModuleNotFoundError(name="metaworld")
            return MetaWorldEnv(config.steps_per_action)
        values = config.state_dim if config.takes_state else 0
        if values not in PROTOCOLS:
            known = ", ".join(map(str, PROTOCOLS))
            raise DataError(f"benchmark {benchmark}: the policy takes {values} values of state; LIBERO gives {known}")
        wrist = config.num_images == 2
        return LiberoEnv(benchmark, replace(PROTOCOLS[values], steps_per_action=config.steps_per_action, wrist=wrist))
    except ModuleNotFoundError as error:
        extra = benchmark.partition("_")[0]
        raise DataError(
            f"benchmark {benchmark}: Python module {error.name!r} is missing; pip install 'vla-deploy[{extra}]'"
        ) from error
