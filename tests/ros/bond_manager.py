"""A lifecycle manager's end of one bond as a process: writes `EVENT SECONDS` (steady clock) for what happens to it.

    python bond_manager.py NODE RULES    RULES: protocol or bondpy

As Nav2's manager: topic `bond`, the node's name as id, a heartbeat each 0.1 s, broken after 4 s of silence.
"protocol" is written after the state machine of bondcpp: the first heartbeat forms the bond, each further one starts
the timeout again, a farewell breaks it and is answered by one.
"""

import contextlib
import sys
import time
import uuid

import rclpy
from bond.msg import Status
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node

PERIOD_S, TIMEOUT_S = 0.1, 4.0


def say(event: str) -> None:
    print(event, time.monotonic(), flush=True)


class ProtocolEnd:
    def __init__(self, node: Node, name: str) -> None:
        self.name, self.own, self.sister = name, str(uuid.uuid4()), ""
        self.state, self.deadline_s = "waiting", float("inf")
        self.publisher = node.create_publisher(Status, "bond", 5)
        node.create_subscription(Status, "bond", self.heard, 100)
        node.create_timer(PERIOD_S, self.beat)

    def publish(self, active: bool) -> None:
        status = Status(id=self.name, instance_id=self.own, active=active)
        status.heartbeat_timeout, status.heartbeat_period = TIMEOUT_S, PERIOD_S
        self.publisher.publish(status)

    def beat(self) -> None:
        if self.state == "broken":
            return
        self.publish(True)
        if time.monotonic() > self.deadline_s:
            self.broken("silent")

    def broken(self, why: str) -> None:
        self.state = "broken"
        say(why)

    def heard(self, status: Status) -> None:
        if status.id != self.name or status.instance_id == self.own or self.state == "broken":
            return
        self.sister = self.sister or status.instance_id
        if status.instance_id != self.sister:
            say("stranger")
        elif not status.active:
            self.publish(False)
            self.broken("ended")
        elif self.state == "waiting":
            self.state = "formed"
            say("formed")
        else:
            if self.deadline_s == float("inf"):
                say("held")
            self.deadline_s = time.monotonic() + TIMEOUT_S


def bondpy_end(node: Node, name: str) -> object:
    from bondpy.bondpy import Bond

    bond = Bond(node, "bond", name, lambda: say("broken"), lambda: say("formed"))
    bond.set_heartbeat_timeout(TIMEOUT_S)
    bond.set_heartbeat_period(PERIOD_S)
    bond.start()
    beats = 0

    def heard(status: Status) -> None:
        nonlocal beats
        beats += status.id == name and status.instance_id != bond.instance_id
        if beats == 3:  # bondpy does not tell when its timeout begins to count
            say("held")

    node.create_subscription(Status, "bond", heard, 100)
    return bond


if __name__ == "__main__":
    rclpy.init()
    manager = rclpy.create_node("manager")
    end = {"protocol": ProtocolEnd, "bondpy": bondpy_end}[sys.argv[2]](manager, sys.argv[1])
    say("started")
    with contextlib.suppress(KeyboardInterrupt, ExternalShutdownException):
        rclpy.spin(manager)
