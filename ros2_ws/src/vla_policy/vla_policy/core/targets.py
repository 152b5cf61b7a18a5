"""Which number formats each target can really run, per layer kind, and why: the one table that everything obeys.

A row names a kernel that exists, not a wish. `allocate --target` offers these formats, `build` refuses all others, and
the robot's runner takes the backend and the compute capability from here. Groups are counted in inputs; "row" means one
scale per output channel.
"""

from dataclasses import dataclass, replace
from typing import Literal

from vla_policy.core.errors import ArtefactError
from vla_policy.core.formats import Format

Backend = Literal["onnxruntime", "tensorrt_rtx", "tensorrt"]
BACKENDS: tuple[Backend, ...] = ("onnxruntime", "tensorrt_rtx", "tensorrt")
LayerKind = Literal["linear", "patch_embed", "head"]
_ALL_KINDS: tuple[LayerKind, ...] = ("linear", "patch_embed", "head")
ROW: None = None


@dataclass(frozen=True)
class Rule:
    """One format that a target runs: by which kernel, for which group sizes, layer kinds and backends."""

    weight_bits: int
    activation_bits: int
    groups: tuple[int | None, ...]
    kernel: str
    kinds: tuple[LayerKind, ...] = _ALL_KINDS
    backends: tuple[Backend, ...] = BACKENDS

    def formats(self) -> tuple[Format, ...]:
        return tuple(Format(self.weight_bits, self.activation_bits, group) for group in self.groups)


@dataclass(frozen=True)
class Target:
    """A machine that engines are built for. Its formats are those of its first backend; see `on` for another.

    backends: what can run there, the default first.
    compute_capability: of its GPU, (major, minor); None for a CPU.
    fuses_groups: whether layers of one input (q/k/v, gate/up) become one kernel and must share a format.
    refused: formats, without group, that people ask for and this target lacks, with the reason.
    """

    name: str
    title: str
    backends: tuple[Backend, ...]
    compute_capability: tuple[int, int] | None
    fuses_groups: bool
    rules: tuple[Rule, ...]
    refused: tuple[tuple[str, str], ...]

    @property
    def backend(self) -> Backend:
        """What runs its engines."""
        return self.backends[0]

    def on(self, backend: Backend | None) -> "Target":
        """This target with one of its backends, None for the default. Raises ArtefactError for one it does not have."""
        if backend is None:
            return self
        if backend not in self.backends:
            choices = " or ".join(self.backends)
            raise ArtefactError(f"target {self.name} cannot run backend {backend}; choose {choices}")
        return replace(self, backends=(backend, *(other for other in self.backends if other != backend)))

    def legal(self, kind: LayerKind = "linear") -> tuple[Format, ...]:
        """Every format that a layer of this kind may have, most precise first."""
        formats = [fmt for rule in self._rules(kind) for fmt in rule.formats()]
        return tuple(sorted(formats, key=lambda fmt: fmt.precision, reverse=True))

    def _rules(self, kind: LayerKind) -> list[Rule]:
        return [rule for rule in self.rules if kind in rule.kinds and self.backend in rule.backends]

    def why_not(self, fmt: Format, kind: LayerKind = "linear") -> str | None:
        """Why `fmt` cannot be had for a layer of this kind, or None if it can."""
        if fmt in self.legal(kind):
            return None
        bare = f"w{fmt.weight_bits}a{fmt.activation_bits}"
        reason = dict(self.refused).get(bare)
        if reason is not None:
            return reason
        bits = fmt.weight_bits, fmt.activation_bits
        groups = [rule.groups for rule in self._rules(kind) if (rule.weight_bits, rule.activation_bits) == bits]
        if groups:
            return f"{bare} has kernels for {', '.join(_group(group) for group in groups[0])} only"
        for other in self.backends[1:]:
            if fmt in self.on(other).legal(kind):
                return f"{self.backend} has no kernel for {bare} and takes none of ours; build with --backend {other}"
        return f"no kernel runs {bare} on a {kind} layer"

    def nearest(self, fmt: Format, kind: LayerKind = "linear") -> Format:
        """The legal format that loses nothing against `fmt` and costs the least more."""
        at_least = [
            legal
            for legal in self.legal(kind)
            if legal.weight_bits >= fmt.weight_bits and legal.activation_bits >= fmt.activation_bits
        ]
        return min(at_least, key=lambda legal: (legal.weight_bits, legal.activation_bits, _group_distance(legal, fmt)))


def _group(group: int | None) -> str:
    return f"groups of {group}" if group else "one scale per row"


def _group_distance(legal: Format, wanted: Format) -> tuple[bool, float]:
    """Groups no coarser than wanted come first, the largest of them foremost."""
    have, want = legal.group_size or float("inf"), wanted.group_size or float("inf")
    return have > want, have if have > want else -have


_SIXTEEN = Rule(16, 16, (ROW,), "bf16 in the file, float32 arithmetic")
_NO_A4 = ("w4a4", "no kernel multiplies 4-bit activations here")

_CPU = Target(
    "cpu",
    "x86-64 or Arm processor, ONNX Runtime",
    ("onnxruntime",),
    None,
    False,
    (
        _SIXTEEN,
        Rule(8, 16, (ROW, 32, 64, 128), "DequantizeLinear at run time, then float32 MatMul"),
        Rule(4, 16, (16, 32, 64, 128, 256), "MatMulNBits at accuracy level 1: float32 activations"),
        Rule(4, 16, (ROW,), "DequantizeLinear at run time, then float32 MatMul"),
        Rule(2, 16, (ROW, 32, 64, 128), "DequantizeLinear at run time, then float32 MatMul"),
        Rule(8, 8, (ROW,), "MatMulInteger: 8-bit codes per token and per row, int32 sums"),
        Rule(4, 8, (32, 64, 128), "MatMulNBits at accuracy level 4: int8 activations per token and group"),
        Rule(2, 8, (32, 64, 128), "MatMulNBits at accuracy level 4: int8 activations per token and group"),
    ),
    (_NO_A4, ("w2a4", _NO_A4[1]), ("w3a16", "ONNX has no 3-bit type"), ("w3a8", "ONNX has no 3-bit type")),
)

_RTX: tuple[Backend, ...] = ("tensorrt_rtx",)
_PLUGIN: tuple[Backend, ...] = ("tensorrt",)  # TensorRT-RTX imports no Python plugins, nor a compiled kernel
_BLOCKS = (ROW, 32, 64, 128)

_TENSORRT_RULES = (
    Rule(16, 16, (ROW,), "float16"),
    Rule(8, 16, (ROW,), "INT8 weights, one scale per row, float16 MatMul"),
    Rule(8, 8, (ROW,), "INT8 both; activations with one fixed scale per tensor, from the calibration set"),
    Rule(4, 16, _BLOCKS, "INT4 weights in blocks, float16 MatMul"),
    Rule(2, 16, _BLOCKS, "two 2-bit codes to an INT4, split at run time, float16 MatMul", backends=_RTX),
    Rule(2, 16, _BLOCKS, "plugin of TensorRT 10.9: codes decoded in registers, float16 tensor cores", backends=_PLUGIN),
    Rule(4, 8, _BLOCKS, "plugin of TensorRT 10.9: activations per token, int8 tensor cores", backends=_PLUGIN),
)
_TENSORRT_REFUSED = (
    ("w4a4", "TensorRT multiplies no 4-bit integers"),
    ("w2a8", "TensorRT has no such kernel, nor is there a plugin"),
    ("w3a16", "TensorRT has no 3-bit type"),
)


def _nvidia(name: str, title: str, backends: tuple[Backend, ...], capability: tuple[int, int]) -> Target:
    return Target(name, title, backends, capability, True, _TENSORRT_RULES, _TENSORRT_REFUSED)


_ALL = (
    _CPU,
    _nvidia("a100", "NVIDIA A100; built anywhere, or on the device", ("tensorrt_rtx", "tensorrt"), (8, 0)),
    _nvidia("orin", "NVIDIA Jetson AGX Orin; built on the device", ("tensorrt",), (8, 7)),
    _nvidia("thor", "NVIDIA Jetson AGX Thor; built on the device", ("tensorrt",), (11, 0)),
    _nvidia("h100", "NVIDIA H100 and H200; built on the device", ("tensorrt",), (9, 0)),
)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}


def find_target(name: str) -> Target:
    """The target called `name`. Raises ArtefactError naming the choices."""
    if name not in TARGETS:
        raise ArtefactError(f"target {name!r} is unknown; choose one of: {', '.join(TARGETS)}")
    return TARGETS[name]
