"""The node's services: `~/enable`, `~/start`, `~/stop`, `~/reset` and `~/set_instruction`."""

from collections.abc import Callable
from typing import Any

from rclpy.node import Node
from std_srvs.srv import SetBool, Trigger
from vla_policy_interfaces.srv import SetInstruction

from vla_policy.core.errors import DataError
from vla_policy.core.server import PolicyServer
from vla_policy.core.status import Latch


class Services:
    """Each answers with its success and, where it refuses, why."""

    def __init__(
        self,
        node: Node,
        server: Callable[[], PolicyServer | None],
        enable: Callable[[PolicyServer, bool], None],
        control: Callable[[], None],
        unheard: Callable[[], list[str]],
        told: Callable[[], None],
    ) -> None:
        """server: the one that serves now. enable: sets it so while no command is being sent. control: one control
        step now. unheard: command topics that nobody subscribes to. told: called after each answer."""
        self._server, self._enable, self._control, self._unheard, self._told = server, enable, control, unheard, told
        node.create_service(SetBool, "~/enable", self._on_enable)
        node.create_service(Trigger, "~/start", self._on_start)
        node.create_service(Trigger, "~/stop", self._on_stop)
        node.create_service(Trigger, "~/reset", self._on_reset)
        node.create_service(SetInstruction, "~/set_instruction", self._on_set_instruction)

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        def act(server: PolicyServer) -> None:
            self._enable(server, request.data)
            if not request.data:
                self._control()  # the first hold, not a control period later
            obstacle = server.obstacle() if request.data else None
            response.message = "disabled: dry run" if not request.data else "enabled"
            if obstacle is not None:
                response.message = f"enabled, but {obstacle}, then start"
            elif request.data and (unheard := self._unheard()):
                response.message = f"enabled, but nobody subscribes to {', '.join(unheard)}"

        return self._answer(response, act, None)

    def _on_start(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return self._answer(response, lambda server: server.start(), "started")

    def _on_stop(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        def act(server: PolicyServer) -> None:
            server.stop(Latch("stop service"))
            self._control()

        return self._answer(response, act, "stopped until reset")

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return self._answer(response, lambda server: server.reset(), "latch reset; start to move again")

    def _on_set_instruction(
        self, request: SetInstruction.Request, response: SetInstruction.Response
    ) -> SetInstruction.Response:
        def act(server: PolicyServer) -> str | None:
            try:
                response.message = server.instruct(request.instruction)
            except DataError as error:
                return str(error)
            return None

        return self._answer(response, act, None)

    def _answer(self, response: Any, act: Callable[[PolicyServer], str | None], done: str | None) -> Any:
        server = self._server()
        refused = "the node is not active" if server is None else act(server)
        self._told()
        response.success = refused is None
        if refused is not None or done is not None:
            response.message = refused or done
        return response
