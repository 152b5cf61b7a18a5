"""Who decides in a rollout: a torch policy, plain or with all layers rounded alike, or a built engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_folder, sha256_policy
from vla_policy.core.formats import Choice
from vla_policy.core.observation import Actor
from vla_policy.core.policy_config import PolicyConfig


@dataclass(frozen=True)
class ActorSpec:
    """A recipe for an actor that can be sent to a worker process.

    uniform: what every layer is; None leaves them alone. Policies only, as is dtype.
    """

    kind: Literal["policy", "engine"]
    folder: Path
    unnorm_key: str | None = None
    uniform: Choice | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def settings(self) -> dict[str, Any]:
        """What identifies the actor in a result; the folder's name and content, wherever it lies."""
        if not self.folder.is_dir():
            raise ArtefactError(f"{self.folder}: no such folder; --{self.kind} expects a {self.kind} folder")
        sha256 = sha256_policy(self.folder) if self.kind == "policy" else sha256_folder(self.folder)
        return {
            "kind": self.kind,
            "name": self.folder.resolve().name,
            "sha256": sha256,
            "unnorm_key": self.unnorm_key,
            "uniform": self.uniform and self.uniform.to_json(),
            "dtype": self.dtype if self.kind == "policy" else None,
        }

    def config(self) -> PolicyConfig:
        """The policy's configuration, read without loading the weights. Raises PolicyError for unknown statistics."""
        if self.kind == "policy":
            config = PolicyConfig.load(self.folder)
        else:
            from vla_policy.core.manifest import Manifest

            config = Manifest.load(self.folder).config
        config.unnorm_key(self.unnorm_key)
        return config

    def load(self) -> Actor:
        """Builds the actor with one thread, so that workers do not fight over the cores."""
        if self.kind == "engine":
            from vla_policy.core.runner import load_engine

            return load_engine(self.folder, self.unnorm_key, threads=1)
        import torch

        from calibrator.families import TorchActor, live_units
        from calibrator.quantizers import quantize_policy

        torch.set_num_threads(1)
        actor = TorchActor.load(self.folder, self.unnorm_key, getattr(torch, self.dtype))
        if self.uniform is not None:
            quantize_policy(actor.policy, {unit.name: self.uniform for unit in live_units(actor.policy)})
        return actor
