"""Somebody else who may move the gripper, as a process: a client of the action, until it is killed.

gripper_client.py NAME
"""

import sys

import rclpy
from control_msgs.action import GripperCommand
from rclpy.action import ActionClient

if __name__ == "__main__":
    rclpy.init()
    node = rclpy.create_node("teleoperation")
    client = ActionClient(node, GripperCommand, sys.argv[1])
    rclpy.spin(node)
