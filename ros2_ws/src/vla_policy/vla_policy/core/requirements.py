"""The Python packages that the robot side needs beside ROS, and what to do where one is missing."""

from vla_policy.core.errors import ArtefactError

# NumPy stays below 2: the message types of Humble and Jazzy are compiled for 1, and pip would replace it.
INSTALL = 'pip install "numpy<2" onnxruntime pillow pyyaml rosbags tokenizers'


def not_installed(error: ModuleNotFoundError) -> ArtefactError:
    """One line for the module that is missing."""
    return ArtefactError(f"the Python package {error.name} is not installed for this interpreter; {INSTALL}")
