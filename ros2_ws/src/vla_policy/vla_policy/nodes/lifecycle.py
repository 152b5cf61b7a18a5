"""What rclpy's lifecycle node lacks."""

from typing import Any

from lifecycle_msgs.srv import ChangeState
from rclpy.lifecycle import LifecycleNode


def refuse_impossible_transitions(node: LifecycleNode) -> None:
    """A transition that the state does not allow is answered as refused; rclpy lets its error end the process."""
    (service,) = (service for service in node.services if service.srv_type is ChangeState)
    change_state = service.callback

    def answered(request: ChangeState.Request, response: ChangeState.Response) -> Any:
        try:
            return change_state(request, response)
        except RuntimeError as error:
            node.get_logger().warning(f"transition {request.transition.id} refused: {error}")
            response.success = False
            return response

    service.callback = answered
