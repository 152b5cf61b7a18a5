"""A client of the policy node's action."""

from tests.ros.world import World

from builtin_interfaces.msg import Duration  # isort: skip  # after the importorskip in tests.ros.world
from rclpy.action import ActionClient  # isort: skip
from vla_policy_interfaces.action import RunPolicy  # isort: skip


class Runs:
    """Begins runs of the running node and waits for their ends."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._client = ActionClient(world.node, RunPolicy, "/policy/run_policy")
        self.feedback: list[RunPolicy.Feedback] = []
        world.wait(self._client.server_is_ready, "the action server")

    def begin(self, prompt: str = "pick up the soup", seconds: int = 60, client_timeout: int = 0):
        goal = RunPolicy.Goal(
            prompt=prompt, time_limit=Duration(sec=seconds), client_timeout=Duration(sec=client_timeout)
        )
        future = self._client.send_goal_async(goal, lambda message: self.feedback.append(message.feedback))
        self._world.wait(future.done, "the goal's acceptance")
        return future.result()

    def end(self, goal) -> RunPolicy.Result:
        result = goal.get_result_async()
        self._world.wait(result.done, "the run's end")
        return result.result().result

    def begin_moving(self):
        goal = self.begin()
        self._world.wait_moving()
        return goal

    def code(self, prompt: str = "pick up the soup", seconds: int = 1) -> int:
        return self.end(self.begin(prompt, seconds)).code
