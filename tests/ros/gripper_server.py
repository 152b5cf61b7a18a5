"""A gripper's driver as a process: an action server of control_msgs/action/GripperCommand that writes what it is asked.

gripper_server.py NAME [refuse]
"""

import sys

import rclpy
from control_msgs.action import GripperCommand
from rclpy.action import ActionServer, GoalResponse
from rclpy.action.server import ServerGoalHandle


def main() -> None:
    name, refuse = sys.argv[1], sys.argv[2:] == ["refuse"]
    rclpy.init()
    node = rclpy.create_node("gripper")

    def asked(goal: GripperCommand.Goal) -> GoalResponse:
        print(f"{'refused' if refuse else 'goal'} {goal.command.position:g} {goal.command.max_effort:g}", flush=True)
        return GoalResponse.REJECT if refuse else GoalResponse.ACCEPT

    def move(goal: ServerGoalHandle) -> GripperCommand.Result:
        goal.succeed()
        return GripperCommand.Result(position=goal.request.command.position, reached_goal=True)

    server = ActionServer(node, GripperCommand, name, execute_callback=move, goal_callback=asked)
    rclpy.spin(node)
    server.destroy()


if __name__ == "__main__":
    main()
