"""A policy server with a clock in the test's hand, and a policy that answers when the test lets it."""

import threading
from pathlib import Path

import numpy as np
from fake_config import FakeConfig

from tests.core import ros_messages as msgs
from vla_policy.core.contract import Contract, load_contract
from vla_policy.core.errors import DataError
from vla_policy.core.observation import Decision, Observation
from vla_policy.core.policy_config import ActionStats, NormStats, PolicyConfig
from vla_policy.core.safety import HoldReason
from vla_policy.core.server import PolicyServer, ServedChunk, ServerSettings
from vla_policy.core.synchroniser import Dropped

CONTRACT = load_contract(Path(__file__).parents[2] / "ros2_ws/src/vla_policy/config/libero.yaml")
CAMERA, STATE, INSTRUCTION = CONTRACT.primary.topic, CONTRACT.states[0].topic, CONTRACT.instruction.topic
TIMEOUT_S = 20.0
LONGEST = 100
"""Of the fake policy's prompt; the contract allows more characters."""


class FakeActor:
    """Answers with the state's first value; waits for `gate` before each answer."""

    unnorm_key = "fake"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.error: Exception | None = None
        self.value: float | None = None
        self.rows: np.ndarray | None = None
        self.executed: int | None = None

    @property
    def config(self) -> PolicyConfig:
        stats = {"fake": NormStats(ActionStats((-1.0,) * 7, (1.0,) * 7, (True,) * 7), None)}
        rows = 1 if self.rows is None else len(np.atleast_2d(self.rows))
        told = {"norm_stats": stats, "num_images": 1, "image_size": 112, "takes_state": False, "raw": {}}
        return FakeConfig(**told, horizon=rows, steps_per_action=4, carried_out=self.executed or rows)

    def check_instruction(self, instruction: str) -> None:
        if len(instruction) > LONGEST:
            raise DataError(f"the prompt has {len(instruction)} ids, the policy takes {LONGEST}; shorten it")

    def act(self, observation: Observation) -> Decision:
        self.entered.release()
        assert self.gate.wait(TIMEOUT_S)
        if self.error is not None:
            raise self.error
        if self.rows is not None:
            return Decision(np.zeros(self.rows.size, np.int64), self.rows)
        assert observation.state is not None
        x = observation.state[0] if self.value is None else self.value
        return Decision(np.zeros(7, np.int64), np.asarray([x, 0, 0, 0, 0, 0, 1.0]))


class Bench:
    """A server with a clock in the test's hand."""

    def __init__(self, contract: Contract = CONTRACT, **settings: object) -> None:
        self.now_ns = 10**12
        self.actor = FakeActor()
        self.chunks: list[ServedChunk] = []
        self.drops: list[Dropped] = []
        self.server = PolicyServer(
            contract,
            self.actor,
            ServerSettings(**settings),  # type: ignore[arg-type]  # keywords of mixed types
            lambda: self.now_ns,
            self.chunks.append,
            self.drops.append,
        )
        self.server.activate()

    def instruct(self, text: str = "go") -> None:
        self.server.receive(INSTRUCTION, msgs.text(text))

    def see(self, x: float = 0.25, advance_ms: int = 50, picture: int | None = None) -> None:
        self.now_ns += advance_ms * 10**6
        self.server.receive(STATE, msgs.joints(self.now_ns, [x, 0, 0, 0.04]))
        image = msgs.picture(self.now_ns // 10**6 if picture is None else picture, 4)
        self.server.receive(CAMERA, msgs.compressed(self.now_ns, image))

    def answered(self) -> None:
        assert self.server.drain(TIMEOUT_S)

    def answered_late(self) -> None:
        """Sees something, and the answer comes after the deadline."""
        self.actor.gate.clear()
        self.see()
        self.now_ns += 550 * 10**6
        self.actor.gate.set()
        self.answered()

    def reasons(self) -> set[HoldReason]:
        return set(self.server.tick().reasons)

    def moving(self) -> "Bench":
        self.instruct()
        self.see()
        self.answered()
        self.server.enable(True)
        self.see()
        self.answered()
        assert self.server.tick().command is not None
        return self

    def start_again(self) -> None:
        """An operator's start, after which the next decision moves the robot."""
        assert self.server.start() is None
        self.see()
        self.answered()
        assert self.server.tick().command is not None
