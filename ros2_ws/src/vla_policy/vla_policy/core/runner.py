"""Runs a built engine: camera image, instruction and state in, action out. Needs the engine folder and nothing else."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_policy.core.backends import find_backend
from vla_policy.core.errors import ArtefactError
from vla_policy.core.families.base import Policy
from vla_policy.core.manifest import Manifest
from vla_policy.core.observation import Decision, Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.program import Program, Session
from vla_policy.core.targets import find_target


@dataclass(frozen=True)
class Timings:
    """Where the time of one decision went, in milliseconds. calls: name and time of every call of the program."""

    preprocess_ms: float
    calls: tuple[tuple[str, float], ...]
    total_ms: float


class Engine:
    """An Actor that decides with a built engine. One decision at a time: it owns what one leaves on the device."""

    def __init__(self, manifest: Manifest, session: Session, policy: Policy, unnorm_key: str) -> None:
        self.manifest = manifest
        self.config: PolicyConfig = manifest.config
        self.policy = policy
        self.unnorm_key = unnorm_key
        self._session = session

    @property
    def processor(self) -> str:
        """The CPU or GPU that decides, by its own name."""
        return self._session.processor

    def check_instruction(self, instruction: str) -> None:
        """Raises DataError for a task that the policy cannot take."""
        self.policy.check_instruction(instruction)

    def act(self, observation: Observation) -> Decision:
        """The greedy decision.

        Raises DataError for an unusable observation, EngineError for an output that is not finite.
        """
        return self.decide(observation)[0]

    def decide(self, observation: Observation) -> tuple[Decision, Timings]:
        """`act`, and where its time went."""
        begun = time.perf_counter()
        inputs = self.policy.inputs(observation)
        preprocess_ms = (time.perf_counter() - begun) * 1e3
        program = self.program()
        decision = self.policy.decide(program, inputs)
        return decision, Timings(preprocess_ms, tuple(program.laps), (time.perf_counter() - begun) * 1e3)

    def scores(self, observation: Observation, decided: Decision) -> np.ndarray:
        """float32 [positions, values]: what the policy decides by, along what was `decided`; raises as `act`."""
        return self.policy.scores(self.program(), self.policy.inputs(observation), decided)

    def program(self) -> Program:
        """The engine's calls, for one decision."""
        return Program(self.manifest.graphs, self.manifest.program, self._session)


def load_engine(folder: Path | str, unnorm_key: str | None = None, threads: int | None = None) -> Engine:
    """The engine in `folder`, every file checked against the manifest's hashes.

    unnorm_key: which of the policy's statistics to use; may be left out if there is only one.
    threads: CPU threads; None leaves the number to the backend.

    Raises ArtefactError for a damaged engine, one built for another backend version or another GPU, and PolicyError for
    an unknown `unnorm_key`.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    config = manifest.config
    key = config.unnorm_key(unnorm_key)
    target = find_target(manifest.target)
    if manifest.backend not in target.backends:
        raise ArtefactError(
            f"{folder}: target {target.name} runs on {' or '.join(target.backends)}, but the engine is for "
            f"{manifest.backend}; build it again"
        )
    if manifest.packed:
        raise ArtefactError(
            f"{folder}: packed for {target.title}, not compiled yet; run `python -m engine_build prove {folder}` there "
            "and load the engine that this makes"
        )
    manifest.check_files(folder)
    session = find_backend(manifest.backend).open_session(folder, manifest, threads)
    return Engine(manifest, session, config.family.policy(config, folder, key), key)
