"""Where a decision begins: noise from a bank that is part of the policy, chosen by what is seen.

The same observation begins with the same noise wherever it is decided, and no random generator runs on a robot.
"""

import hashlib
from pathlib import Path

import numpy as np

from vla_policy.core.errors import ArtefactError
from vla_policy.core.flow.config import FlowConfig
from vla_policy.core.observation import Observation

NOISE = "noise.npy"


def load_bank(folder: Path, config: FlowConfig) -> np.ndarray:
    """The policy folder's bank, float32 [entries, H, A]. Raises ArtefactError for one that is missing or of no use."""
    path = folder / NOISE
    try:
        bank: np.ndarray = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise ArtefactError(f"{path}: no such file; import the checkpoint again") from error
    except (OSError, ValueError, EOFError) as error:
        raise ArtefactError(f"{path}: damaged ({error}); copy it again") from error
    wanted = (config.horizon, config.width)
    if bank.dtype != np.float32 or bank.ndim != 3 or bank.shape[1:] != wanted or not len(bank):
        expected = f"float32 [entries, {wanted[0]}, {wanted[1]}]"
        raise ArtefactError(f"{path}: {bank.dtype} {list(bank.shape)}, expected {expected}")
    if not np.isfinite(bank).all():
        raise ArtefactError(f"{path}: not all of its numbers are finite; copy it again")
    return bank


def entry_of(observation: Observation, entries: int) -> int:
    """Which of the entries an observation begins with: a hash of its images, instruction and state."""
    state = np.zeros(0) if observation.state is None else observation.state
    digest = hashlib.blake2b(digest_size=8)
    for array in (*observation.images, np.asarray(state, np.float64)):
        digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    digest.update(observation.instruction.encode())
    return int.from_bytes(digest.digest(), "little") % entries
