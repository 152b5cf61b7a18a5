"""Frames to observations, and the check that a contract fits a policy: shared by node, replay and calibration."""

from vla_policy.core.contract import Contract
from vla_policy.core.errors import ContractError
from vla_policy.core.image import centre_crop, rotate_180
from vla_policy.core.observation import Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.synchroniser import Frame


def observe(frame: Frame, contract: Contract) -> Observation:
    """The policy's view of a frame: the camera's image decoded, turned and cropped as the contract says.

    Raises DataError when the image cannot be decoded, ContractError for a contract with several cameras.
    """
    _check_cameras(contract)
    image = frame.images[0].decode()
    if contract.primary.rotate_180:
        image = rotate_180(image)
    if contract.primary.crop_area < 1:
        image = centre_crop(image, contract.primary.crop_area)
    return Observation(image, frame.instruction, frame.state)


def check_contract(contract: Contract, config: PolicyConfig, unnorm_key: str | None = None) -> None:
    """Raises ContractError unless cameras, states and action dimensions are those of the policy, in its order."""
    _check_cameras(contract)
    stats = config.stats(unnorm_key)
    wanted = stats.proprio.names if config.state_in_prompt and stats.proprio else ()
    if wanted and contract.state_names != wanted:
        got = ", ".join(contract.state_names) or "none"
        raise ContractError(
            f"{contract.path}: the policy takes the states {', '.join(wanted)}; the contract gives {got}"
        )
    dimensions = len(stats.action.q01)
    if len(contract.action.dimensions) != dimensions:
        raise ContractError(
            f"{contract.path}: the policy's actions have {dimensions} values; "
            f"the contract names {len(contract.action.dimensions)}"
        )


def _check_cameras(contract: Contract) -> None:
    """A camera that no policy sees must not look as if it were used: OpenVLA's input is one image."""
    if len(contract.cameras) > 1:
        named = ", ".join(camera.name for camera in contract.cameras)
        raise ContractError(
            f"{contract.path}: the policy sees one image; the contract names {len(contract.cameras)} cameras "
            f"({named}); keep the one that it was trained on"
        )
