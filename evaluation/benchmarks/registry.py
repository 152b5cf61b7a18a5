"""Benchmarks by name, set up as a policy expects them."""

from dataclasses import replace
from importlib.util import find_spec

from evaluation.benchmarks.base import BenchmarkEnv
from evaluation.benchmarks.libero import DEMO_PROTOCOL, OPENVLA_PROTOCOL, SUITES, SWAPPED_SUITES, LiberoEnv
from evaluation.benchmarks.metaworld import MetaWorldEnv
from vla_policy.core.errors import DataError
from vla_policy.core.policy_config import PolicyConfig

BENCHMARKS = (*SUITES, *SWAPPED_SUITES, MetaWorldEnv.name)


def make_env(benchmark: str, config: PolicyConfig) -> BenchmarkEnv:
    """The benchmark for the policy with `config`; nothing is simulated before the first reset.

    On LIBERO a policy whose prompt has no state is one of the published kind and gets the official protocol,
    OpenVLA-OFT's with its state and wrist camera; one with the state in its prompt gets the demo's. Raises DataError
    for an unknown name or an extra that is not installed.
    """
    if benchmark not in BENCHMARKS:
        raise DataError(f"benchmark {benchmark!r} is unknown; choose from: {', '.join(BENCHMARKS)}")
    try:
        if benchmark == MetaWorldEnv.name:
            if find_spec("metaworld") is None:
                raise ModuleNotFoundError(name="metaworld")
            return MetaWorldEnv(config.steps_per_action)
        protocol = DEMO_PROTOCOL if config.state_in_prompt else OPENVLA_PROTOCOL
        state, wrist = "full" if config.use_proprio else protocol.state, config.num_images == 2
        protocol = replace(protocol, steps_per_action=config.steps_per_action, state=state, wrist=wrist)
        return LiberoEnv(benchmark, protocol)
    except ModuleNotFoundError as error:
        extra = benchmark.partition("_")[0]
        raise DataError(
            f"benchmark {benchmark}: Python module {error.name!r} is missing; pip install 'vla-deploy[{extra}]'"
        ) from error
