"""The action server `~/run_policy`.

It lives in a node and an executor of its own: its callback waits as long as the run lasts, and the policy node's
single-threaded executor, which carries the cameras, must not wait.
"""

import contextlib
import threading
import time
from collections.abc import Callable

import rclpy
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.executors import ExternalShutdownException, MultiThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from std_msgs.msg import Empty
from vla_policy_interfaces.action import RunPolicy

from vla_policy.core.contract import Contract
from vla_policy.core.errors import DataError
from vla_policy.core.events import nanoseconds
from vla_policy.core.safety import HoldReason
from vla_policy.core.server import PolicyServer
from vla_policy.core.status import Status
from vla_policy.nodes.outputs import to_duration

_FEEDBACK_PERIOD_S = 0.1
# How long the robot may be held for one cause, and the client be unheard of, before the run is given up.
_PATIENCE_S = 2.0
# A run that moved for less of its time than this did not do what was asked.
_MOVING_SHARE = 0.5
_LATE = {HoldReason.NO_CHUNK, HoldReason.DEADLINE_MISSED}
_STALE = {HoldReason.STALE_CAMERA, HoldReason.STALE_STATE, HoldReason.FROZEN_CAMERA, HoldReason.FUTURE_STAMP}
Ending = tuple[int, str]


class RunPolicyServer:
    """Serves runs while it exists. `server` and `contract` give the node's, None unless it is active or configured."""

    def __init__(
        self,
        owner: LifecycleNode,
        server: Callable[[], PolicyServer | None],
        contract: Callable[[], Contract | None],
    ) -> None:
        self._server, self._contract = server, contract
        self._owner = owner
        self._running = threading.Lock()
        self._closing = threading.Event()
        self._node = rclpy.create_node(
            f"{owner.get_name()}_run_policy",
            namespace=owner.get_namespace(),
            context=owner.context,
            use_global_arguments=False,
            start_parameter_services=False,
        )
        self._action = ActionServer(
            self._node,
            RunPolicy,
            f"{owner.get_fully_qualified_name()}/run_policy",
            execute_callback=self._execute,
            goal_callback=lambda goal: GoalResponse.ACCEPT,  # a refusal has a numbered result, which needs a goal
            cancel_callback=lambda goal: CancelResponse.ACCEPT,
        )
        # One thread waits for the run's end, the others serve cancellation and refuse further goals.
        self._heard_s = 0.0
        self._node.create_subscription(Empty, f"{owner.get_fully_qualified_name()}/heartbeat", self._hear, 10)
        self._executor = MultiThreadedExecutor(3, context=owner.context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, name="run_policy", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends a run as not active, then the action server."""
        self._closing.set()
        with self._running:
            pass
        self._executor.shutdown(timeout_sec=2.0)
        self._thread.join(2.0)
        self._action.destroy()
        self._node.destroy_node()

    def _hear(self, message: Empty) -> None:
        self._heard_s = time.monotonic()

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self._executor.spin()

    def _execute(self, goal: ServerGoalHandle) -> RunPolicy.Result:
        if not self._running.acquire(blocking=False):
            return self._result(goal, (RunPolicy.Result.ALREADY_RUNNING, "another run is going on"), 0, 0, 0)
        try:
            return self._run(goal)
        finally:
            self._running.release()

    def _run(self, goal: ServerGoalHandle) -> RunPolicy.Result:
        server = self._server()
        limit_ns = nanoseconds(goal.request.time_limit)
        if server is None:
            return self._result(goal, (RunPolicy.Result.NOT_ACTIVE, "the node is not active"), 0, 0, 0)
        refusal = self._refusal(server.status(), limit_ns) or self._begin(server, goal.request.prompt)
        if refusal is not None:
            return self._result(goal, refusal, 0, 0, 0)
        clock = self._owner.get_clock()
        begun_ns, first = clock.now().nanoseconds, server.status()
        patience, client = _Patience(), self._client(goal)
        ending: Ending | None = None
        while ending is None:
            status = server.status()
            elapsed_ns = max(0, clock.now().nanoseconds - begun_ns)
            self._feedback(goal, status, first, elapsed_ns, limit_ns)
            ending = self._ending(goal, status, patience, client)
            if ending is None and elapsed_ns >= limit_ns:
                ending = self._full_time(status.commands - first.commands, elapsed_ns)
            if ending is None:
                self._closing.wait(_FEEDBACK_PERIOD_S)
        server.finish()
        last = server.status()
        elapsed_ns = max(0, clock.now().nanoseconds - begun_ns)
        return self._result(goal, ending, last.chunks - first.chunks, last.commands - first.commands, elapsed_ns)

    @staticmethod
    def _refusal(status: Status, limit_ns: int) -> Ending | None:
        codes = RunPolicy.Result
        if limit_ns <= 0:
            return codes.INVALID_GOAL, "time_limit must be above zero"
        if status.latch is not None:
            return codes.STOP_LATCHED, f"a stop is latched: {status.latch.reason}"
        if HoldReason.OTHER_PUBLISHER in status.faults.values():
            return codes.OTHER_PUBLISHER, "another node commands the robot; the diagnostics name it"
        if not status.enabled:
            return codes.DISABLED, "output is disabled (dry run); enable it first"
        return None

    @staticmethod
    def _begin(server: PolicyServer, prompt: str) -> Ending | None:
        """Claims the instruction and starts. Returns why not, or None."""
        if not prompt.strip():
            return RunPolicy.Result.INVALID_GOAL, "prompt is empty"
        try:
            server.claim(prompt)
        except DataError as error:
            return RunPolicy.Result.INVALID_GOAL, str(error)
        refused = server.start()
        if refused is None:
            return None
        server.finish()
        return RunPolicy.Result.STOP_LATCHED, refused

    def _client(self, goal: ServerGoalHandle) -> Callable[[], str | None]:
        """Says how the client of this run was lost, None while it is there."""
        feedback = f"{self._owner.get_fully_qualified_name()}/run_policy/_action/feedback"
        timeout = goal.request.client_timeout
        timeout_s = timeout.sec + timeout.nanosec / 1e9
        patience = _Patience()
        self._heard_s = time.monotonic()

        def lost() -> str | None:
            if timeout_s > 0 and time.monotonic() - self._heard_s > timeout_s:
                return f"no heartbeat from the client for {timeout_s:g} s"
            if patience.exhausted("client", self._node.count_subscribers(feedback) == 0):
                return "nobody listens to the run's feedback any more"
            return None

        return lost

    def _full_time(self, commands: int, elapsed_ns: int) -> Ending:
        contract = self._contract()
        period_ns = 0 if contract is None else contract.action.control_period_ns
        share = min(1.0, commands * period_ns / elapsed_ns)
        if share < _MOVING_SHARE:
            return RunPolicy.Result.MOSTLY_HELD, f"time limit reached, but the robot moved for {share:.0%} of it only"
        return RunPolicy.Result.TIME_LIMIT_REACHED, "time limit reached"

    def _ending(
        self, goal: ServerGoalHandle, status: Status, patience: "_Patience", client: Callable[[], str | None]
    ) -> Ending | None:
        codes = RunPolicy.Result
        if goal.is_cancel_requested:
            return codes.CANCELLED, "cancelled by the client"
        if self._closing.is_set() or not status.active:
            return codes.NOT_ACTIVE, "the node was deactivated"
        if status.latch is not None:
            code = codes.ENGINE_FAILED if status.latch.engine_failed else codes.STOP_LATCHED
            return code, status.latch.reason
        if not status.enabled:
            return codes.DISABLED, "output was disabled"
        if HoldReason.OTHER_PUBLISHER in status.faults.values():
            told = [what for what, reason in status.faults.items() if reason is HoldReason.OTHER_PUBLISHER]
            return codes.OTHER_PUBLISHER, f"another node commands the robot: {', '.join(told)}"
        if (lost := client()) is not None:
            return codes.CLIENT_LOST, lost
        if patience.exhausted("stale", bool(_STALE & set(status.holding))):
            return codes.STALE_INPUT, f"input stale for {_PATIENCE_S:g} s: {', '.join(r.value for r in status.holding)}"
        if patience.exhausted("late", bool(_LATE & set(status.holding))):
            return codes.DEADLINE_MISSED, f"no decision within its deadline for {_PATIENCE_S:g} s"
        return None

    def _feedback(self, goal: ServerGoalHandle, status: Status, first: Status, elapsed_ns: int, limit_ns: int) -> None:
        feedback = RunPolicy.Feedback(
            elapsed=to_duration(elapsed_ns),
            remaining=to_duration(max(0, limit_ns - elapsed_ns)),
            chunks=status.chunks - first.chunks,
            commands=status.commands - first.commands,
            observation_age_ms=status.age_ms.p50 if status.age_ms.count else 0.0,
            latency_ms=status.latency_ms.p50 if status.latency_ms.count else 0.0,
            holding=bool(status.holding),
        )
        goal.publish_feedback(feedback)

    def _result(
        self, goal: ServerGoalHandle, ending: Ending, chunks: int, commands: int, elapsed_ns: int
    ) -> RunPolicy.Result:
        code, message = ending
        if code == RunPolicy.Result.TIME_LIMIT_REACHED:
            goal.succeed()
        elif code == RunPolicy.Result.CANCELLED:
            goal.canceled()
        else:
            goal.abort()
        return RunPolicy.Result(
            code=code, message=message, chunks=chunks, commands=commands, elapsed=to_duration(elapsed_ns)
        )


class _Patience:
    """Since when each cause has held without a break, by the steady clock."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def exhausted(self, cause: str, holds: bool) -> bool:
        if not holds:
            self._since.pop(cause, None)
            return False
        return time.monotonic() - self._since.setdefault(cause, time.monotonic()) > _PATIENCE_S
