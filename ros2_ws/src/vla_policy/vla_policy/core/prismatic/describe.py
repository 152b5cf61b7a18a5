"""A policy's preprocessing and actions in words and numbers, for manifests that need nothing else to be read."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vla_policy.core.prismatic.config import PrismaticConfig


def describe(config: PrismaticConfig, preprocessing: Mapping[str, Any], actions: Mapping[str, Any]) -> dict[str, Any]:
    """The content; `preprocessing` and `actions` are what the family adds to either part."""
    return {
        "preprocessing": {
            "image": "uint8 RGB, any size, upright",
            "resize": f"antialiased bicubic to {config.image_size} x {config.image_size} pixels, aspect ratio ignored",
            "scale": "divided by 255, then (x - mean) / std per tower; channels of the towers one after the other",
            "towers": [{"kind": tower.kind, "mean": tower.mean, "std": tower.std} for tower in config.towers],
            "prompt": "In: What action should the robot take to {instruction, lower case}?\\nOut:",
            "state_in_prompt": config.state_in_prompt,
            **preprocessing,
        },
        "actions": {
            key: {
                **actions,
                "dimensions": stats.action.dim,
                "normalization": config.normalization,
                "steps_per_action": config.steps_per_action,
                "action": asdict(stats.action),
                "proprio": asdict(stats.proprio) if stats.proprio else None,
            }
            for key, stats in config.norm_stats.items()
        },
    }
