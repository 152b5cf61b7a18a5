"""ament_python package: the robot core, the nodes, and their launch files and configuration."""

from glob import glob

from setuptools import find_packages, setup

PACKAGE = "vla_policy"

setup(
    name=PACKAGE,
    version="0.1.0",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={PACKAGE: ["py.typed", "core/backends/*/*.cpp", "core/backends/*/*.h"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (f"share/{PACKAGE}", ["package.xml"]),
        (f"share/{PACKAGE}/launch", glob("launch/*.launch.py")),
        (f"share/{PACKAGE}/config", glob("config/*")),
    ],
    install_requires=[
        "backports.zstd>=1.8; python_version < '3.14'",
        "lz4",
        "numpy",
        "onnxruntime",
        "pillow",
        "pyyaml",
        "rosbags",
        "setuptools",
        "tokenizers",
    ],
    zip_safe=True,
    maintainer="Seed 8b87a761 maintainers",
    maintainer_email="maintainers@users.noreply.b-seed-8b87a761.example",
    description="Serves actions of a vision-language-action policy from camera and state topics.",
    license="Apache-2.0",
    entry_points={
        "console_scripts": [
            "policy_node = vla_policy.nodes.start:policy_node",
            "record_node = vla_policy.nodes.start:record_node",
            "replay_node = vla_policy.nodes.start:replay_node",
        ],
    },
)
