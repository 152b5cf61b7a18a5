"""Machines that engines are built for, and which number formats each can really run, per layer kind, and why.

What a format is worth is a backend's matter: a target is a machine with a release of its software, so it names its
backends and the lowest version of each, for which its formats are listed. `allocate --target` offers these formats;
`build` asks the rules of the installed version, which may be later.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vla_policy.core.backends import find_backend
from vla_policy.core.backends.base import MEMORY_ONLY, LayerKind, Rule, Version, Workload
from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Choice, Format, Rounding


@dataclass(frozen=True)
class Runtime:
    """A backend on a machine. version: the lowest that the machine's release of software has. baseline: whether its
    16 bits may be the fastest there, so that they are what other engines are measured against."""

    backend: str
    version: Version
    baseline: bool = False


@dataclass(frozen=True)
class Target:
    """A machine that engines are built for. Its formats are those of its first runtime; see `on` for another.

    runtimes: what can run there, the default first.
    compute_capability: of its GPU, (major, minor); None for a CPU.
    """

    name: str
    title: str
    runtimes: tuple[Runtime, ...]
    compute_capability: tuple[int, int] | None

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of what can run there, the default first."""
        return tuple(runtime.backend for runtime in self.runtimes)

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the backends whose 16-bit engines others are measured against, where there are several."""
        return tuple(runtime.backend for runtime in self.runtimes if runtime.baseline)

    @property
    def backend(self) -> str:
        """What runs its engines."""
        return self.backends[0]

    @property
    def fuses_groups(self) -> bool:
        """Whether layers of one input (q/k/v, gate/up) become one kernel and must share a format."""
        return find_backend(self.backend).fuses_groups

    @property
    def splits_layers(self) -> bool:
        """Whether output channels of one layer may have several widths."""
        return find_backend(self.backend).splits_layers

    def on(self, backend: str | None, version: Version | None = None) -> "Target":
        """This target with one of its backends, None for the default, in the `version` that is there, if known.

        Raises ArtefactError for a backend that it does not have, and for a version below its release's.
        """
        wanted = self.backend if backend is None else backend
        if wanted not in self.backends:
            choices = " or ".join(self.backends)
            raise ArtefactError(f"target {self.name} cannot run backend {wanted}; choose {choices}")
        chosen = self.runtimes[self.backends.index(wanted)]
        if version is not None and version < chosen.version:
            raise ArtefactError(
                f"target {self.name} has {wanted} {_text(chosen.version)} or later, installed is {_text(version)}; "
                f"install that, or choose another target: {', '.join(TARGETS)}"
            )
        others = tuple(runtime for runtime in self.runtimes if runtime is not chosen)
        return replace(self, runtimes=(replace(chosen, version=version or chosen.version), *others))

    def fastest_here(self, workload: Workload) -> tuple["Target", str]:
        """This target with the backend that `build` takes for a plan, and why: the first one that says it is the faster
        one on this machine, else the default."""
        for name in self.backends[1:]:
            backend = find_backend(name)
            why = backend.why_faster_here(workload)
            if why is not None and backend.splits_layers >= workload.splits_layers:
                return self.on(name), why
        return self, "the default"

    def legal(self, kind: LayerKind = "linear") -> tuple[Format, ...]:
        """Every format that a layer of this kind may have, most precise first."""
        formats = [fmt for rule in self._rules(kind) for fmt in rule.formats()]
        return tuple(sorted(formats, key=lambda fmt: fmt.precision, reverse=True))

    def rounding(self, fmt: Format) -> Rounding | None:
        """How its kernels round activations; None where they do not, or where no kernel runs the format."""
        found = self.rule(fmt)
        return None if found is None or fmt.activation_bits >= 16 else found.rounding

    def memory_only(self, fmt: Format) -> bool:
        """Whether layers of this format are smaller than 16-bit ones here, but no faster."""
        found = self.rule(fmt)
        return found is not None and found.kernel.endswith(MEMORY_ONLY)

    def rule(self, fmt: Format) -> Rule | None:
        """What multiplies layers of this format; None where nothing does."""
        return next((rule for rule in self._all_rules if fmt in rule.formats()), None)

    @property
    def _all_rules(self) -> tuple[Rule, ...]:
        return find_backend(self.backend).rules(self.runtimes[0].version)

    def _rules(self, kind: LayerKind) -> list[Rule]:
        return [rule for rule in self._all_rules if kind in rule.kinds]

    def why_not(self, fmt: Format, kind: LayerKind = "linear") -> str | None:
        """Why `fmt` cannot be had for a layer of this kind, or None if it can."""
        if fmt in self.legal(kind):
            return None
        bare = f"w{fmt.weight_bits}a{fmt.activation_bits}"
        version = self.runtimes[0].version
        reason = dict(find_backend(self.backend).refused(version)).get(bare)
        if reason is not None:
            return reason
        bits = fmt.weight_bits, fmt.activation_bits
        rules = [rule for rule in self._rules(kind) if (rule.weight_bits, rule.activation_bits) == bits]
        groups = [group for rule in rules for group in rule.groups]
        where = f"{self.backend} {_text(version)}"
        if groups:
            return f"{where} runs {bare} with {', '.join(_group(group) for group in groups)} only"
        for other in self.backends[1:]:
            if fmt in self.on(other).legal(kind):
                return f"{self.backend} has no kernel for {bare} and takes none of ours; build with --backend {other}"
        return f"no kernel runs {bare} on layers of kind {kind} with {where}"

    def nearest(self, fmt: Format, kind: LayerKind = "linear") -> Format:
        """The legal format that loses nothing against `fmt` and costs the least more."""
        at_least = [
            legal
            for legal in self.legal(kind)
            if legal.weight_bits >= fmt.weight_bits and legal.activation_bits >= fmt.activation_bits
        ]
        return min(at_least, key=lambda legal: (legal.weight_bits, legal.activation_bits, _group_distance(legal, fmt)))


def _text(version: Version) -> str:
    return ".".join(map(str, version))


def _group(group: int | None) -> str:
    return f"groups of {group}" if group else "one scale per row"


def _group_distance(legal: Format, wanted: Format) -> tuple[bool, float]:
    """Groups no coarser than wanted come first, the largest of them foremost."""
    have, want = legal.group_size or float("inf"), wanted.group_size or float("inf")
    return have > want, have if have > want else -have


_ONNX_RUNTIME = Runtime("onnxruntime", (1, 31), baseline=True)
_ONNX_RUNTIME_VNNI = Runtime("onnxruntime_vnni", (1, 31))
_OPENVINO = Runtime("openvino", (2026, 4))
_OPENVINO_BF16 = Runtime("openvino_bf16", (2026, 4), baseline=True)
_TENSORRT_RTX = Runtime("tensorrt_rtx", (1, 7))
_WORKSTATION, _JETPACK_6, _JETPACK_7 = (Runtime("tensorrt", version) for version in ((10, 13), (10, 3), (11, 4, 1)))
_ALL = (
    Target("cpu", "x86-64 or Arm processor", (_ONNX_RUNTIME, _ONNX_RUNTIME_VNNI, _OPENVINO, _OPENVINO_BF16), None),
    Target("a100", "NVIDIA A100; built anywhere, or on the device", (_TENSORRT_RTX, _WORKSTATION), (8, 0)),
    Target("h100", "NVIDIA H100 and H200; built on the device", (_WORKSTATION,), (9, 0)),
    Target("orin-jp6", "NVIDIA Jetson AGX Orin, JetPack 6; built on the device", (_JETPACK_6,), (8, 7)),
    Target("orin-jp7", "NVIDIA Jetson AGX Orin, JetPack 7.2.2 or later; built on the device", (_JETPACK_7,), (8, 7)),
    Target("thor-jp7", "NVIDIA Jetson AGX Thor, JetPack 7.2.2 or later; built on the device", (_JETPACK_7,), (11, 0)),
)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}


def find_target(name: str) -> Target:
    """The target called `name`. Raises ArtefactError naming the choices."""
    if name not in TARGETS:
        raise ArtefactError(f"target {name!r} is unknown; choose one of: {', '.join(TARGETS)}")
    return TARGETS[name]


def no_kernel(choices: Iterable[Choice], target: str | None) -> dict[str, str]:
    """By the text of a choice, why none of the linear layers can have it: on `target`, or for None on any machine."""
    machines = [find_target(target)] if target else list(TARGETS.values())
    reasons: dict[str, str] = {}
    for choice in choices:
        found = [machine.why_not(choice.format) for machine in machines]
        if all(found):
            reasons[str(choice)] = str(found[0]) if target else f"on no target; {machines[0].name}: {found[0]}"
    return reasons
