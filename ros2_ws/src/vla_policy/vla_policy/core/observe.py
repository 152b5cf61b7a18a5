"""Frames to observations, and the check that a contract fits a policy: shared by node, replay and calibration."""

import numpy as np

from vla_policy.core.contract import CameraTopic, Contract
from vla_policy.core.errors import ContractError, DataError
from vla_policy.core.image import centre_crop, rotate_180
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.ros_image import EncodedImage
from vla_policy.core.synchroniser import Frame


def observe(frame: Frame, contract: Contract) -> Observation:
    """The policy's view of a frame: each camera's image decoded, turned and cropped as the contract says.

    Raises DataError naming the camera whose image cannot be decoded.
    """
    image, *further = (_view(item, camera) for item, camera in zip(frame.images, contract.cameras, strict=True))
    return Observation(image, frame.instruction, frame.state, tuple(further))


def _view(encoded: EncodedImage, camera: CameraTopic) -> np.ndarray:
    try:
        image = encoded.decode()
    except DataError as error:
        raise DataError(f"{camera.topic}: {error}") from error
    if camera.rotate_180:
        image = rotate_180(image)
    return centre_crop(image, camera.crop_area) if camera.crop_area < 1 else image


def check_contract(contract: Contract, config: PolicyConfig, unnorm_key: str | None = None) -> None:
    """Raises ContractError unless cameras, states, action dimensions and rows are those of the policy, in its order.

    unnorm_key: of the statistics in use; may be left out if there is only one.
    """
    _check_cameras(contract, config)
    wanted = config.state_names(unnorm_key)
    if wanted and contract.state_names != wanted:
        got = ", ".join(contract.state_names) or "none"
        raise ContractError(
            f"{contract.path}: the policy takes the states {', '.join(wanted)}; the contract gives {got}"
        )
    dimensions = config.stats(unnorm_key).action.dim
    if len(contract.action.dimensions) != dimensions:
        raise ContractError(
            f"{contract.path}: the policy's actions have {dimensions} values; "
            f"the contract names {len(contract.action.dimensions)}"
        )
    if contract.action.chunk_rows > config.horizon:
        raise ContractError(
            f"{contract.path}: action: chunk_rows: the policy decides {config.horizon} actions at once, the contract "
            f"carries out {contract.action.chunk_rows}; 0 takes the policy's own {config.executed}"
        )


def _check_cameras(contract: Contract, config: PolicyConfig) -> None:
    """A camera that the policy does not see must not look as if it were used."""
    if len(contract.cameras) != config.num_images:
        named = ", ".join(camera.name for camera in contract.cameras)
        raise ContractError(
            f"{contract.path}: images per decision: the policy takes {config.num_images}, the contract gives "
            f"{len(contract.cameras)} ({named}); name the cameras that it was trained on, in its order"
        )
