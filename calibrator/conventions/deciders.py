"""Who decides the states: the policy on a workstation, or the engine where it runs, which needs no torch."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig

if TYPE_CHECKING:
    from calibrator.families import Policy
    from vla_policy.core.runner import Engine

_BATCH = 8


class Decider(Protocol):
    """A policy in whatever form."""

    @property
    def config(self) -> PolicyConfig: ...

    def first_actions(self, observations: Sequence[Observation], key: str) -> Iterable[tuple[int, np.ndarray]]:
        """The position and the first action [K] of every observation's decision, in any order.

        key: of the statistics. Raises EngineError for a decision that is not finite.
        """
        ...


class PolicyDecider:
    """Decides states whose inputs are alike together."""

    def __init__(self, policy: "Policy", folder: Path) -> None:
        self._policy, self._folder = policy, folder

    @property
    def config(self) -> PolicyConfig:
        return self._policy.config

    def first_actions(self, observations: Sequence[Observation], key: str) -> Iterable[tuple[int, np.ndarray]]:
        from calibrator.families import TorchActor

        actor = TorchActor.of(self._policy, self._folder, key)
        inputs = [actor.robot.inputs(one) for one in observations]
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, values in enumerate(inputs):
            alike.setdefault(tuple((name, value.shape) for name, value in sorted(values.items())), []).append(index)
        for same in alike.values():
            for batch in (same[at : at + _BATCH] for at in range(0, len(same), _BATCH)):
                together = self._policy.tensors([inputs[index] for index in batch])
                for index, row in zip(batch, self._policy.decide(together, actor.decisions.size), strict=True):
                    yield index, np.atleast_2d(actor.decisions.decision(row.cpu().numpy()).action)[0]


class EngineDecider:
    """Decides one state after the other, as the robot does. Raises as `load_engine`."""

    def __init__(self, folder: Path) -> None:
        from vla_policy.core.manifest import Manifest

        self._folder = folder
        self._config = Manifest.load(folder).config
        self._engines: dict[str, Engine] = {}

    @property
    def config(self) -> PolicyConfig:
        return self._config

    def first_actions(self, observations: Sequence[Observation], key: str) -> Iterable[tuple[int, np.ndarray]]:
        from vla_policy.core.runner import load_engine

        if key not in self._engines:
            self._engines[key] = load_engine(self._folder, key)
        for index, one in enumerate(observations):
            yield index, np.atleast_2d(self._engines[key].act(one).action)[0]
