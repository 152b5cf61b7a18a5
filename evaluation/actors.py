"""Who decides in a rollout: a torch policy, plain or with its layers rounded, or a built engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file, sha256_folder, sha256_policy
from vla_policy.core.formats import FULL, Choice
from vla_policy.core.observation import Actor
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.targets import find_target

if TYPE_CHECKING:
    from calibrator.quantizers import Codes, InputScales
    from calibrator.quantizers.rows import RowBits


@dataclass(frozen=True)
class Size:
    """What an actor's layers take. weights: how many they have. code_bits: of all codes, 16 for a weight that nothing
    rounds. stored_bytes: codes and what comes with them, scales first of all.
    """

    weights: int
    code_bits: int
    stored_bytes: int

    @property
    def average_bits(self) -> float:
        """Of codes, as plans count them."""
        return self.code_bits / self.weights


@dataclass(frozen=True)
class ActorSpec:
    """A recipe for an actor that can be sent to a worker process.

    Policies only, and at most one of the first three. uniform: what every layer is. plan: a file that says it layer by
    layer. weights: a store of codes, as `calibrator quantize` writes it. Without any, layers are left alone. dtype: of
    what the policy computes in.
    """

    kind: Literal["policy", "engine"]
    folder: Path
    unnorm_key: str | None = None
    uniform: Choice | None = None
    plan: Path | None = None
    weights: Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def settings(self) -> dict[str, Any]:
        """What identifies the actor in a result; the folder's name and content, wherever it lies."""
        if not self.folder.is_dir():
            raise ArtefactError(f"{self.folder}: no such folder; --{self.kind} expects a {self.kind} folder")
        sha256 = sha256_policy(self.folder) if self.kind == "policy" else sha256_folder(self.folder)
        rounded = {"plan": self.plan, "weights": self._index}
        return {
            "kind": self.kind,
            "name": self.folder.resolve().name,
            "sha256": sha256,
            "unnorm_key": self.unnorm_key,
            "uniform": self.uniform and self.uniform.to_json(),
            "dtype": self.dtype if self.kind == "policy" else None,
        } | {name: sha256_file(path) for name, path in rounded.items() if path is not None}

    @property
    def _index(self) -> Path | None:
        from calibrator.quantizers.store import WEIGHTS

        return self.weights / WEIGHTS.index if self.weights else None

    def config(self) -> PolicyConfig:
        """The policy's configuration, read without loading the weights. Raises PolicyError for unknown statistics."""
        if self.kind == "policy":
            config = PolicyConfig.load(self.folder)
        else:
            from vla_policy.core.manifest import Manifest

            config = Manifest.load(self.folder).config
        config.unnorm_key(self.unnorm_key)
        return config

    def size(self) -> Size:
        """Of its layers' weights, read without loading them."""
        if self.kind == "engine":
            from vla_policy.core.manifest import Manifest

            totals = Manifest.load(self.folder).totals()
            codes, scales = int(totals["code_bytes"]), int(totals["scale_bytes"])
            return Size(int(totals["weights"]), 8 * codes, codes + scales)
        from calibrator.allocation.options import PLACE_BITS, matrix_bits
        from calibrator.families import live_units
        from calibrator.families.loading import empty_policy

        units = live_units(empty_policy(self.config()))
        choices, _, _, rows = self._rounded([unit.name for unit in units])
        code_bits = stored_bits = 0
        for unit in units:
            if unit.name in rows.bits:
                matrices = [(len(part.rows), choices[part.name]) for part in rows.of(unit.name)]
                stored_bits += PLACE_BITS * unit.outputs
            else:
                matrices = [(unit.outputs, choices.get(unit.name, FULL))]
            code_bits += sum(outputs * unit.inputs * choice.format.weight_bits for outputs, choice in matrices)
            stored_bits += sum(matrix_bits(outputs, unit.inputs, choice) for outputs, choice in matrices)
        return Size(sum(unit.outputs * unit.inputs for unit in units), code_bits, stored_bits // 8)

    def load(self) -> Actor:
        """Builds the actor with one thread, so that workers do not fight over the cores.

        Raises ArtefactError for a plan or weights of another policy.
        """
        if self.kind == "engine":
            from vla_policy.core.runner import load_engine

            return load_engine(self.folder, self.unnorm_key, threads=1)
        import torch

        from calibrator.families import TorchActor, live_units
        from calibrator.quantizers import quantize_policy

        torch.set_num_threads(1)
        actor = TorchActor.load(self.folder, self.unnorm_key, getattr(torch, self.dtype))
        quantize_policy(actor.policy, *self._rounded([unit.name for unit in live_units(actor.policy)]))
        return actor

    def _rounded(
        self, layers: Sequence[str]
    ) -> tuple[Mapping[str, Choice], "Codes | None", "InputScales", "RowBits"]:
        """What the layers, or their parts, become, who has their codes, None where they are computed, how a plan's
        target rounds their inputs, and the parts' rows."""
        from calibrator.allocation.plan import Assignment
        from calibrator.quantizers import InputScales
        from calibrator.quantizers.rows import WHOLE
        from calibrator.quantizers.store import Store

        def scales(target: str | None, peaks: Mapping[str, float]) -> InputScales:
            return InputScales(find_target(target) if target else None, peaks)

        if self.weights is not None:
            store = Store.open(self.weights)
            held = store.identity
            inputs = scales(held.target, held.input_peaks)
            return store.choices_of(sha256_policy(self.folder), layers), store, inputs, held.rows
        if self.plan is not None:
            planned = Assignment.load(self.plan, sha256_policy(self.folder), layers)
            return planned.choices, None, scales(planned.target, planned.input_peaks), planned.rows
        return {} if self.uniform is None else dict.fromkeys(layers, self.uniform), None, InputScales(), WHOLE
