"""Sensors as a process of their own, until it is killed."""

import os
import threading

from tests.ros.world import World

if __name__ == "__main__":
    sensors = World(int(os.environ["ROS_DOMAIN_ID"]))
    threading.Event().wait()
