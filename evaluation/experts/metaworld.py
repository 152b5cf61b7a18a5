"""Meta-World's scripted policies as memoryless experts: the action depends on the present observation alone."""

import warnings

import numpy as np

from vla_policy.core.errors import DataError


class MetaWorldExpert:
    """The scripted policy of one task.

    Stock policies command targets without regard to the action limits; their answer is clipped to [-1, 1], as the
    simulator does, so that the label is what would be executed.
    """

    def __init__(self, task: str) -> None:
        import metaworld.policies

        name = "Sawyer" + "".join(word.capitalize() for word in task.split("-")) + "V3Policy"
        if not hasattr(metaworld.policies, name):
            raise DataError(f"Meta-World has no scripted policy for task {task!r} (looked for {name})")
        self._policy = getattr(metaworld.policies, name)()

    def act(self, vector: np.ndarray) -> np.ndarray:
        """float64 [4]: dx, dy, dz, gripper in [-1, 1] for Meta-World's observation `vector` [39]."""
        with warnings.catch_warnings():  # "Constant(s) may be too high": the clipping below is the answer to it
            warnings.simplefilter("ignore", UserWarning)
            command = np.asarray(self._policy.get_action(vector), np.float64)
        return np.clip(command, -1.0, 1.0)
