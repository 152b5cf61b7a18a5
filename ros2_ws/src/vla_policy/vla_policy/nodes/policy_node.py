"""The lifecycle node that serves a policy: configure loads and checks, activate answers, enable moves.

    ros2 run vla_policy policy_node --ros-args -p engine_path:=engine -p contract:=contract.yaml -p autostart:=true

It only wires `core.server.PolicyServer` to ROS. Relative topic names come from the contract; `action_chunk` carries
the decisions, the contract's command topics the motion. Nothing moves unless the node is active, enabled and started.
"""

import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.timer import Timer

from vla_policy.core.contract import Contract, load_contract
from vla_policy.core.errors import VlaError
from vla_policy.core.files import sha256_file
from vla_policy.core.observation import Actor
from vla_policy.core.observe import check_contract
from vla_policy.core.requirements import not_installed
from vla_policy.core.server import PolicyServer, ServedChunk
from vla_policy.core.status import Latch
from vla_policy.nodes import diagnostics, inputs, parameters
from vla_policy.nodes.bond import ManagerBond, status_class
from vla_policy.nodes.diagnostics import ERROR, OK, WARN, Diagnostics, Report
from vla_policy.nodes.emergency_stop import EmergencyStop
from vla_policy.nodes.exclusive import NameLock
from vla_policy.nodes.lifecycle import refuse_impossible_transitions
from vla_policy.nodes.outputs import Outputs
from vla_policy.nodes.process import run_node
from vla_policy.nodes.run_policy import RunPolicyServer
from vla_policy.nodes.services import Services
from vla_policy.nodes.source_check import Patience, SourceMissing, check_sources
from vla_policy.nodes.surroundings import Surroundings
from vla_policy.nodes.warm_up import pause, warm_up
from vla_policy.nodes.watchdog import OutputWatchdog

_WARM_UP_DECISIONS = 3
_EXPIRE_PERIOD_S = 0.05
_LOOK_PERIOD_S = 0.1
_LATE_SOURCE_PERIOD_NS = 500_000_000
_MANAGER = "unconfigured: autostart is false, so a lifecycle manager or `ros2 lifecycle set` has to configure"
LoadEngine = Callable[[Path, str | None, int | None], Actor]


def _load_engine(folder: Path, unnorm_key: str | None, threads: int | None) -> Actor:
    # Imported at configure, not at start: the runtime takes seconds to load and a refused parameter should not wait.
    from vla_policy.core.runner import load_engine

    return load_engine(folder, unnorm_key, threads)


def _notes(actor: Actor) -> tuple[str, ...]:
    """What runs the engine, and how, where that is not as it should be; and what its manifest tells its reader, such as
    whether the conventions of its states were checked."""
    from vla_policy.core.runner import Engine

    return (f"runs on {actor.processor}", *actor.manifest.notes) if isinstance(actor, Engine) else ()


class PolicyNode(LifecycleNode):
    """See the module's text.

    ending: set when the process is to end; a configure that waits for its inputs gives up.
    load_engine: makes the actor of the folder `engine_path`, with the statistics `unnorm_key`.
    """

    def __init__(self, ending: threading.Event, load_engine: LoadEngine = _load_engine) -> None:
        super().__init__("policy_node", automatically_declare_parameters_from_overrides=True)
        self._ending, self._load_engine = ending, load_engine
        parameters.declare(self)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._settings: parameters.NodeParameters | None = None
        self._contract: Contract | None = None
        self._actor: Actor | None = None
        self._identity: dict[str, str] = {}
        self._lock: NameLock | None = None
        self._outputs: Outputs | None = None
        self._server: PolicyServer | None = None
        self._watchdog: OutputWatchdog | None = None
        self._output_lock = threading.Lock()
        self._inputs: inputs.Inputs | None = None
        self._periodic: list[Timer] = []
        self._latch: Latch | None = None
        self._around: Surroundings | None = None
        self._bond: ManagerBond | None = None
        self._stalled = False
        self._awaited: tuple[str, ...] = ()
        autostart = self.get_parameter("autostart").value
        self._standing = Report(OK, "unconfigured") if autostart else Report(WARN, _MANAGER)
        self._diagnostics = Diagnostics(self, self._report, lambda: self._identity.get("engine", ""))
        self._runs = RunPolicyServer(self, lambda: self._server, lambda: self._contract)
        self._emergency_stop = EmergencyStop(self, self._on_emergency_stop)
        Services(self, lambda: self._server, self._enable, self._control, self._unheard, self._diagnostics.tell)
        refuse_impossible_transitions(self)
        self._diagnostics.start()
        if autostart:
            self._autostart_timer = self.create_timer(
                0.0, self._autostart, clock=Clock(clock_type=ClockType.STEADY_TIME)
            )

    # --- lifecycle ----------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Loads and checks everything; on a mistake stays unconfigured and says why."""
        self._stand(OK, "configuring")
        result = self._try("configure", self._configure)
        return super().on_configure(state) if result == TransitionCallbackReturn.SUCCESS else result

    def _try(self, transition: str, work: Callable[[ExitStack], None]) -> TransitionCallbackReturn:
        """A transition's work. What it has done is undone where it fails; the caller is told no reason, so all else is.

        A lifecycle manager hears of success or failure only: the reason is in the log and on /diagnostics.
        """
        self._awaited = ()
        try:
            with ExitStack() as undo:
                work(undo)
                undo.pop_all()
        except (VlaError, ModuleNotFoundError) as error:
            if isinstance(error, SourceMissing):
                self._awaited = error.topics
            reason = not_installed(error) if isinstance(error, ModuleNotFoundError) else error
            self._stand(ERROR, f"{transition} refused: {reason}")
            return TransitionCallbackReturn.FAILURE
        except Exception as error:
            # rclpy turns it into the state machine's error without a word.
            self.get_logger().error(traceback.format_exc())
            self._stand(ERROR, f"{transition} failed: {error!r}; see the log")
            return TransitionCallbackReturn.ERROR
        return TransitionCallbackReturn.SUCCESS

    def _configure(self, undo: ExitStack) -> None:
        settings = parameters.read(self)
        if settings.bond_heartbeat_period_s > 0:
            status_class()  # there before anything is loaded
        lock = NameLock(self.get_fully_qualified_name(), self.context.get_domain_id())
        undo.callback(lock.release)
        contract = load_contract(settings.contract)
        actor = self._load_engine(
            Path(settings.engine_path), settings.unnorm_key or None, settings.engine_threads or None
        )
        check_contract(contract, actor.config, actor.unnorm_key)
        warm_up_ms = warm_up(actor, contract, settings.server.inference_deadline_s, settings.instruction)
        patience = Patience(
            settings.source_wait_s, self._ending, lambda topics: self._stand(WARN, f"configuring: waiting for {topics}")
        )
        check_sources(self, contract, settings.check_sources, settings.server.lossless, patience)
        engine_id = sha256_file(Path(settings.engine_path) / "manifest.json")
        notes, slow = _notes(actor), pause(actor, contract, warm_up_ms)
        outputs = Outputs(self, contract, engine_id, settings.server.queue_size if settings.server.lossless else 10)
        undo.callback(outputs.destroy)
        if contract.action.gripper is not None and settings.check_sources != "none":
            name = self.resolve_topic_name(contract.action.gripper.topic)
            refusal = f"{name}: no action server {contract.action.gripper.type} within {settings.source_wait_s:g} s"
            status = [f"{name}/_action/status"]  # what an action server publishes
            refused = f"{refusal}; start the gripper's driver"
            patience.until(lambda: outputs.gripper_ready, lambda: refused, lambda: status)
        self._outputs = outputs
        self._lock, self._settings, self._contract, self._actor = lock, settings, contract, actor
        self._identity = {
            "engine": engine_id,
            "engine path": settings.engine_path,
            "engine notes": "; ".join([*notes, *([slow] if slow else [])]) or "none",
            "statistics": actor.unnorm_key,
            "contract": contract.sha256,
            "mode": "lossless" if settings.server.lossless else "newest frame",
            "chunk": f"{actor.config.horizon} rows, {contract.action.chunk_rows or actor.config.executed} carried out",
            "warm-up (ms)": f"{warm_up_ms:.2f}",
        }
        self._stand(
            OK,
            f"inactive; configured: engine {engine_id[:12]}, statistics {actor.unnorm_key}, "
            f"warm-up decision {warm_up_ms:.1f} ms",
        )
        for note in notes:
            self.get_logger().info(f"engine: {note}")
        if slow:
            self.get_logger().warning(f"engine: {slow}")

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribes and begins to answer; motion waits for enable (or the parameter `enabled`)."""
        super().on_activate(state)
        result = self._try("activate", self._activate)
        if result != TransitionCallbackReturn.SUCCESS:
            super().on_deactivate(state)
        return result

    def _activate(self, undo: ExitStack) -> None:
        settings, contract, actor, outputs = self._settings, self._contract, self._actor, self._outputs
        assert settings is not None and contract is not None and actor is not None and outputs is not None
        clock = self.get_clock()
        server = PolicyServer(
            contract, actor, settings.server, lambda: clock.now().nanoseconds, self._on_chunk, self._diagnostics.dropped
        )
        undo.callback(self._end_serving)
        self._server, self._around = server, Surroundings(self, contract, outputs, server)
        if self._latch is not None:
            server.stop(self._latch)
            self._latch = None
        if settings.instruction:
            server.instruct(settings.instruction)
        self._around.look()
        server.enable(settings.enabled)
        server.activate()
        self._watchdog = OutputWatchdog(settings.output_watchdog_timeout_s, self._watchdog_hold)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._periodic = [
            self.create_timer(contract.action.control_period_ns / 1e9, self._control),
            self.create_timer(_EXPIRE_PERIOD_S, server.expire, clock=steady),
            self.create_timer(_LOOK_PERIOD_S, self._around.look, clock=steady),
        ]
        self._inputs = inputs.Inputs(self, contract, settings.server, server)
        if settings.bond_heartbeat_period_s > 0:
            self._bond = ManagerBond(self, settings.bond_heartbeat_period_s)
        self.get_logger().info(f"active, {'enabled' if settings.enabled else 'disabled: dry run'}")

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Sends the declared hold while the publishers are still active, then ends inference."""
        self._end_serving()
        self._stand(OK, "inactive")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        result = super().on_cleanup(state)
        self._release()
        self._stand(OK, "unconfigured")
        return result

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._end_serving()
        result = super().on_shutdown(state)
        self._release()
        self._stand(OK, "finalized")
        return result

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Back to unconfigured with nothing left over, whichever transition failed."""
        self._end_serving()
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Orderly end from any state, called when no executor spins any more."""
        with suppress(RuntimeError):  # finalized already, or stuck in a transition whose callback raised
            self.trigger_shutdown()
        self._end_serving()
        self._diagnostics.close()
        self._runs.close()
        self._emergency_stop.close()
        self._release()

    def _autostart(self) -> None:
        """Configures and activates, again once a camera that comes late is published; any other refusal is final."""
        if any(self.count_publishers(topic) == 0 for topic in self._awaited):
            return
        if self._settings is None and self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()
        if self._settings is None and self._awaited:
            self._stand(WARN, f"waiting for {', '.join(self._awaited)}; configures once published")
            self._autostart_timer.timer_period_ns = _LATE_SOURCE_PERIOD_NS
        else:
            self.destroy_timer(self._autostart_timer)

    def _end_serving(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        if self._inputs is not None:
            self._inputs.close()
        for timer in self._periodic:
            self.destroy_timer(timer)
        self._inputs, self._periodic = None, []
        self._latch = self._latch or server.status().latch
        with self._output_lock:
            # Silenced first: a decision that arrives now must not command after the hold.
            server.silence()
            halt = server.last_halt()
            if halt is not None and self._outputs is not None:
                self._outputs.command(halt)
        if self._bond is not None:
            self._bond.close()
        if self._watchdog is not None:
            self._watchdog.close()
        self._bond = self._watchdog = self._around = None
        if not server.deactivate():
            self.get_logger().error("the engine did not return from its decision; its thread is abandoned")

    def _release(self) -> None:
        if self._outputs is not None:
            self._outputs.destroy()
        if self._lock is not None:
            self._lock.release()
        self._outputs = self._actor = self._contract = self._settings = self._lock = None

    def _on_set_parameters(self, values: list[Parameter]) -> SetParametersResult:
        fixed = [value.name for value in values if value.name in parameters.DECLARED]
        if fixed and self._settings is not None:
            reason = f"{', '.join(fixed)}: read at configure; deactivate, clean up, set, and configure again"
            return SetParametersResult(successful=False, reason=reason)
        return SetParametersResult(successful=True)

    # --- serving ------------------------------------------------------------------------------------------------

    def _on_chunk(self, chunk: ServedChunk) -> None:
        outputs = self._outputs
        if outputs is None or self._server is None:
            return
        outputs.chunk(chunk)

    def _enable(self, server: PolicyServer, enabled: bool) -> None:
        with self._output_lock:
            server.enable(enabled)

    def _unheard(self) -> list[str]:
        return [] if self._around is None else self._around.unheard()

    def _control(self) -> None:
        server, outputs, watchdog = self._server, self._outputs, self._watchdog
        if server is None or outputs is None or watchdog is None:
            return
        with self._output_lock:
            step = server.tick()
            if step.command is not None:
                outputs.command(step.command)
        watchdog.feed()
        if self._stalled:
            self._stalled = False
            self.get_logger().info("the control loop goes on")

    def _on_emergency_stop(self, reason: str) -> None:
        """From the e-stop's own thread. Kept while the node is not active, too: it begins with the latch."""
        latch, server = Latch(reason), self._server
        if server is None:
            self._latch = self._latch or latch
        else:
            server.stop(latch)
            self._control()
            self._diagnostics.tell()

    def _watchdog_hold(self) -> None:
        server, outputs = self._server, self._outputs
        halt = None if server is None else server.last_halt()
        if halt is not None and outputs is not None:
            outputs.command(halt)
            if not self._stalled:
                self._stalled = True
                self.get_logger().error("control loop stands still: holding")

    def _stand(self, level: bytes, state: str) -> None:
        """What there is to say while the node does not serve, from now on."""
        self._standing = Report(level, state)
        self._diagnostics.tell()

    def _report(self) -> Report:
        server, around, watchdog, standing = self._server, self._around, self._watchdog, self._standing
        if server is None or around is None or watchdog is None:
            if self._latch is None:
                return Report(standing.level, standing.state, self._identity)
            state = f"{standing.state}; stopped until reset: {self._latch.reason}"
            return Report(max(standing.level, WARN), state, self._identity | {"latch": self._latch.reason})
        return diagnostics.serving(self._identity | around.told, watchdog.holds, server.status(), around.unheard())


@contextmanager
def _open(load_engine: LoadEngine, ending: threading.Event) -> Iterator[PolicyNode]:
    node = PolicyNode(ending, load_engine)
    try:
        yield node
    finally:
        node.close()


def main(args: Sequence[str] | None = None, load_engine: LoadEngine = _load_engine) -> int:
    """Runs the node until SIGINT or SIGTERM."""
    return run_node(partial(_open, load_engine), args)


if __name__ == "__main__":
    sys.exit(main())
