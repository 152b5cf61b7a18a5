"""The policy node's action: runs begin, are held, and end with the code that says why."""

import itertools
import sys
from pathlib import Path

from tests.ros.runs import Runs
from tests.ros.world import World, fake_engine, node_command, process

from lifecycle_msgs.msg import Transition  # isort: skip  # after the importorskip in tests.ros.world
from std_msgs.msg import Empty  # isort: skip
from vla_policy_interfaces.action import RunPolicy  # isort: skip
from vla_policy_interfaces.srv import SetInstruction  # isort: skip


def test_run_policy(world: World, tmp_path: Path) -> None:
    codes = RunPolicy.Result
    with process(node_command(fake_engine(tmp_path / "engine")), world.domain, tmp_path / "log"):
        runs = Runs(world)
        world.wait_active()
        assert runs.code() == codes.DISABLED
        world.enable()
        assert runs.code(seconds=0) == codes.INVALID_GOAL
        assert runs.code(" ") == codes.INVALID_GOAL
        assert runs.code("x" * 10_000) == codes.INVALID_GOAL
        done = runs.end(runs.begin(seconds=3))
        assert done.code == codes.TIME_LIMIT_REACHED and done.commands > 5 and done.chunks > 5
        assert done.elapsed.sec == 3 and runs.feedback[-1].chunks > 0
        world.wait_holding("not_started")
        goal = runs.begin_moving()
        assert runs.code("another") == codes.ALREADY_RUNNING
        goal.cancel_goal_async()
        assert runs.end(goal).code == codes.CANCELLED
        goal = runs.begin_moving()
        world.enable(False)
        assert runs.end(goal).code == codes.DISABLED
        world.enable()
        goal = runs.begin_moving()
        assert world.trigger("stop").success
        assert runs.end(goal).code == codes.STOP_LATCHED
        assert runs.code() == codes.STOP_LATCHED
        assert world.trigger("reset").success
        goal = runs.begin_moving()
        world.sensors.camera = False
        result = runs.end(goal)
        assert result.code == codes.STALE_INPUT and "stale_camera" in result.message


def test_run_policy_ends_with_what_ended_the_engine_or_the_node(world: World, tmp_path: Path) -> None:
    codes, engine = RunPolicy.Result, fake_engine(tmp_path / "engine")
    with process(node_command(engine, autostart=False), world.domain, tmp_path / "log"):
        runs = Runs(world)
        assert runs.code() == codes.NOT_ACTIVE
        assert world.change_state(Transition.TRANSITION_CONFIGURE)
        assert world.change_state(Transition.TRANSITION_ACTIVATE)
        world.enable()
        goal = runs.begin_moving()
        fake_engine(engine, latency_s=0.7)
        assert runs.end(goal).code == codes.DEADLINE_MISSED
        fake_engine(engine)
        goal = runs.begin_moving()
        assert world.change_state(Transition.TRANSITION_DEACTIVATE)
        assert runs.end(goal).code == codes.NOT_ACTIVE
        assert world.change_state(Transition.TRANSITION_ACTIVATE)
        world.enable()
        goal = runs.begin_moving()
        fake_engine(engine, fail_after=1)
        result = runs.end(goal)
        assert result.code == codes.ENGINE_FAILED and "the engine failed" in result.message


def test_a_run_owns_its_instruction_and_needs_its_client(world: World, tmp_path: Path) -> None:
    codes = RunPolicy.Result
    with process(node_command(fake_engine(tmp_path / "engine")), world.domain, tmp_path / "log"):
        runs = Runs(world)
        world.wait_active()
        world.enable()
        goal = runs.begin("sort the screws")
        world.wait_moving()
        world.instruct("something else")
        request = SetInstruction.Request(instruction="something else")
        refused = world.call(SetInstruction, "/policy/set_instruction", request)
        assert not refused.success and "a run has its own instruction" in refused.message
        world.wait_dropped("instruction_claimed", "until it ends")
        world.wait_chunks()
        assert world.chunks[-1].instruction == "sort the screws" and world.moving
        goal.cancel_goal_async()
        assert runs.end(goal).code == codes.CANCELLED
        world.wait(lambda: world.chunks[-1].instruction == "something else", "what the topic said meanwhile")

        goal = runs.begin(client_timeout=1)
        heartbeat = world.node.create_publisher(Empty, "/policy/heartbeat", 10)
        beating = world.node.create_timer(0.2, lambda: heartbeat.publish(Empty()))
        world.wait_moving()
        world.wait(lambda: runs.feedback[-1].elapsed.sec >= 2, "a run that outlasts the timeout")
        beating.cancel()
        result = runs.end(goal)
        assert result.code == codes.CLIENT_LOST and "no heartbeat" in result.message
        world.wait_holding("not_started")

        goal = runs.begin(seconds=4)
        world.wait_moving()
        world.instruct("")  # nothing comes of it: a run that was never redirected ends by its time
        assert runs.end(goal).code == codes.TIME_LIMIT_REACHED


def test_a_client_that_is_killed_stops_the_motion(world: World, tmp_path: Path) -> None:
    client = [sys.executable, "-c", KILLED_CLIENT]
    with process(node_command(fake_engine(tmp_path / "engine")), world.domain, tmp_path / "log"):
        world.wait_active()
        world.enable()
        with process(client, world.domain, tmp_path / "client") as child:
            world.wait_moving()
            child.kill()
            child.wait()
        world.wait_holding("not_started")


KILLED_CLIENT = """
import rclpy
from builtin_interfaces.msg import Duration
from rclpy.action import ActionClient
from std_msgs.msg import Empty
from vla_policy_interfaces.action import RunPolicy

rclpy.init()
node = rclpy.create_node("client")
client = ActionClient(node, RunPolicy, "/policy/run_policy")
heartbeat = node.create_publisher(Empty, "/policy/heartbeat", 10)
node.create_timer(0.2, lambda: heartbeat.publish(Empty()))
client.wait_for_server()
client.send_goal_async(
    RunPolicy.Goal(prompt="go", time_limit=Duration(sec=300), client_timeout=Duration(sec=2)), lambda message: None
)
rclpy.spin(node)
"""


def test_a_run_that_was_held_does_not_end_as_a_success(world: World, tmp_path: Path) -> None:
    """The camera stutters: each pause is shorter than the run's patience, together they are most of it."""
    with process(node_command(fake_engine(tmp_path / "engine"), source_timeout=0.3), world.domain, tmp_path / "log"):
        runs = Runs(world)
        world.wait_active()
        world.enable()
        goal = runs.begin(seconds=6)
        result = goal.get_result_async()
        stutter = itertools.cycle([False] * 6 + [True])

        def shake() -> None:
            world.sensors.camera = next(stutter)

        world.node.create_timer(0.2, shake)
        world.wait(result.done, "the run's end")
        ended = result.result().result
        assert ended.code == RunPolicy.Result.MOSTLY_HELD and "the robot moved for" in ended.message
