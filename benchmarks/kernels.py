"""The 2- and 4-bit kernels on the GPU that is here: right against float64, and how fast beside bfloat16.

    python benchmarks/kernels.py [--sweep] [--out kernels.json]

Compiles what an engine carries, PTX for this GPU and for the A100, and lets the driver load it, as TensorRT does. Every
kernel is checked on every shape before any is timed. Times are of CUDA graphs, as a decode step runs, over as many
copies of the weights as the GPU's cache cannot hold; the bfloat16 product of the same shape is torch's, in the same
run. First come, without a GPU, the bounds of every shape on an A100 and an Orin by arithmetic, and, with nvcc, what
every kernel takes of a multiprocessor. The rest needs an NVIDIA GPU, its driver, nvcc, and PyTorch with CUDA; it ends
with the goals and whether they are reached.
"""

import argparse
import ctypes
import functools
import itertools
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine_build.backends.tensorrt.kernels import (
    CUTS,
    FAMILIES,
    GROUPS,
    ROUNDING,
    ROW,
    Cut,
    Family,
    Few,
    Kernel,
    Many,
    compile_ptx,
    grid_outputs,
    product_kernel,
)
from engine_build.backends.tensorrt.kernels.occupancy import table as occupancy
from engine_build.backends.tensorrt.kernels.roofline import DECODER, JOINED, PREFILL
from engine_build.backends.tensorrt.kernels.roofline import table as roofline
from engine_build.packing import RUN, pack_runs, pack_scales
from vla_policy.core.backends.tensorrt.cuda_graph import CudaGraph, load_driver
from vla_policy.core.cli import run
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import write_json
from vla_policy.core.outputs import check_file

_KIND = "kernel-benchmark"
A100 = (8, 0)
GOALS = {("w2a16", 1): 1 / 3.3, ("w4a8", 1): 1 / 3.3, ("w2a16", PREFILL): 1.0, ("w4a8", PREFILL): 0.7}
"""Of bfloat16's time, at most, by family and tokens."""
ROWS = (1, 8, 16, 32, 64, PREFILL)
"""Tokens at which both cuts are timed: where the one for many becomes the faster."""
_HALF_ULP = 2.0**-11
_ROTATION = 4  # times the GPU's cache
_LAUNCHES = 64  # in one graph, so that its own start is little of the time
_WARM_UP, _LAPS = 3, 15
_SWEPT: list[Cut] = [
    Few(warps, ahead, f"few_w{warps}_a{ahead}")
    for warps in (4, 8, 16)
    for ahead in (1, 2, 4)
    if (warps, ahead) != (16, 1)
]
_SWEPT += [
    Many(tokens, slabs, warps, stages, f"many_t{tokens}_s{slabs}_w{warps}_n{stages}")
    for tokens, slabs, warps, stages in (
        (64, 2, 4, 3),
        (64, 2, 8, 3),
        (64, 1, 8, 4),
        (64, 2, 2, 4),
        (96, 1, 4, 3),
        (96, 2, 4, 3),
        (128, 1, 4, 2),
        (32, 2, 4, 4),
    )
]


@dataclass(frozen=True)
class Case:
    """A launch's sizes. outputs: of every part. group: inputs per scale, None for one scale per row."""

    tokens: int
    outputs: int
    inputs: int
    group: int | None
    parts: int = 1

    def __str__(self) -> str:
        outputs = f"{self.parts}*{self.outputs}" if self.parts > 1 else f"{self.outputs}"
        return f"{self.tokens} x {outputs} x {self.inputs}" + (f" g{self.group}" if self.group else "")


CHECKED = [
    Case(tokens, outputs, inputs, group)
    for (outputs, inputs), tokens, group in itertools.product(DECODER, (1, PREFILL), (128, 64))
] + [
    Case(1, 16, 128, 128),
    Case(1, 40, 1288, None),
    Case(3, 17, 24, 32),
    Case(8, 33, 392, 64),
    Case(9, 130, 264, 32),
    Case(33, 1152, 4304, None),
    Case(7, 4100, 4096, 128),
    Case(300, 1000, 1000, 64),
    Case(PREFILL, 4096, 4096, 128, 3),
    Case(1, 11008, 4096, None, 2),
]
TIMED = [
    *(
        Case(tokens, outputs, inputs, group)
        for (outputs, inputs), tokens, group in itertools.product(DECODER, (1, PREFILL), (GROUPS[-1], None))
    ),
    *(
        Case(tokens, outputs, inputs, group, parts)
        for (outputs, inputs, parts), tokens, group in itertools.product(JOINED, (1, PREFILL), (GROUPS[-1], None))
    ),
    *(Case(tokens, *DECODER[0], GROUPS[-1]) for tokens in ROWS if tokens not in (1, PREFILL)),
]


class Gpu:
    """The first GPU, through torch for memory and the driver for kernels."""

    def __init__(self) -> None:
        self.driver = load_driver()
        if not torch.cuda.is_available():
            raise ArtefactError(f"torch {torch.__version__} sees no GPU; install PyTorch with CUDA and its driver")
        torch.backends.cuda.matmul.allow_tf32 = False
        properties = torch.cuda.get_device_properties(0)
        self.device, self.name, self.cache_bytes = torch.device("cuda", 0), properties.name, properties.L2_cache_size
        self.capability: tuple[int, int] = torch.cuda.get_device_capability(0)
        self.stream = torch.cuda.Stream()
        self._functions: dict[tuple[Kernel, tuple[int, int]], ctypes.c_void_p] = {}

    def load(self, kernels: Sequence[Kernel], capability: tuple[int, int]) -> None:
        """Compiles the kernels, several at a time, and hands their PTX to the driver."""
        with ThreadPoolExecutor() as pool:
            texts = list(pool.map(lambda kernel: compile_ptx(kernel, capability), kernels))
        for kernel, ptx in zip(kernels, texts, strict=True):
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), ptx.encode())
            self._call("cuModuleGetFunction", ctypes.byref(function), module, kernel.name.encode())
            self._functions[kernel, capability] = function

    def launch(
        self,
        kernel: Kernel,
        capability: tuple[int, int],
        grid: tuple[int, int],
        arguments: Sequence[torch.Tensor | int],
    ) -> None:
        """Enqueues a kernel; tensors are passed by address."""
        values = [
            ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else ctypes.c_int(value)
            for value in arguments
        ]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        function, stream = self._functions[kernel, capability], ctypes.c_void_p(self.stream.cuda_stream)
        self._call("cuLaunchKernel", function, *grid, 1, kernel.threads, 1, 1, 0, stream, places, None)

    def microseconds(self, enqueue: Callable[[int], None], copies: int) -> float:
        """Median time of one `enqueue(copy)`, called for all copies in turns in one CUDA graph."""
        launches = -(-_LAUNCHES // copies) * copies

        def all_copies() -> None:
            for index in range(launches):
                enqueue(index % copies)

        with torch.cuda.stream(self.stream):
            all_copies()
            self.stream.synchronize()
            graph = CudaGraph.capture(self.driver, self.stream.cuda_stream, all_copies)
            laps = []
            for lap in range(_WARM_UP + _LAPS):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record(self.stream)
                graph.launch(self.stream.cuda_stream)
                end.record(self.stream)
                end.synchronize()
                if lap >= _WARM_UP:
                    laps.append(begin.elapsed_time(end) * 1e3 / launches)
            graph.destroy()
        return float(np.median(laps))

    def synchronize(self) -> None:
        """Waits for everything."""
        torch.cuda.synchronize()

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.driver, name)(*arguments)
        if code != 0:
            raise ArtefactError(f"the CUDA driver refuses {name} (CUresult {code})")


@functools.cache
def _weights(
    outputs: int, inputs: int, group: int | None, bits: int
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Random codes int8 [out, in] and scales float16 [out, groups], and both as the exporter packs them."""
    generator = torch.Generator().manual_seed(inputs * 31 + outputs)
    low, groups = -(1 << (bits - 1)), -(-inputs // (group or inputs))
    codes = torch.randint(low, -low, (outputs, inputs), dtype=torch.int8, generator=generator)
    scales = ((torch.rand(outputs, groups, generator=generator) + 0.5) / inputs**0.5).half()
    return codes, scales, pack_runs(codes.numpy(), bits), pack_scales(scales.numpy(), inputs, group)


class Product:
    """One launch's operands on the GPU, its weights in several copies."""

    def __init__(self, gpu: Gpu, case: Case, family: Family, copies: int = 1) -> None:
        device = gpu.device
        self.gpu, self.case, self.family, self.copies = gpu, case, family, copies
        self.codes, self.scales, words, packed = _weights(case.outputs, case.inputs, case.group, family.weight_bits)
        self.matrices = [
            [torch.tensor(one, device=device) for _ in range(case.parts) for one in (words, packed)]
            for _ in range(copies)
        ]
        generator = torch.Generator().manual_seed(case.tokens)
        self.x = torch.randn(case.tokens, case.inputs, generator=generator).half().to(device)
        self.y = [torch.empty(case.tokens, len(words), dtype=torch.float16, device=device) for _ in range(case.parts)]
        self.x_codes = torch.zeros(case.tokens, -(-case.inputs // RUN) * RUN, dtype=torch.int8, device=device)
        self.x_scales = torch.zeros(case.tokens, dtype=torch.float32, device=device)

    def kernel(self, cut: Cut) -> Kernel:
        """The kernel that layers of these shapes get."""
        (rows, words), (_, groups) = self.matrices[0][0].shape, self.matrices[0][1].shape
        return product_kernel(self.family, cut, (rows, words), (rows, groups), self.case.parts)

    @property
    def moved_bytes(self) -> int:
        """What one launch has to read and write at least."""
        tensors = (*self.matrices[0], self.x_codes if self.family.rounded else self.x, *self.y)
        return sum(tensor.nbytes for tensor in tensors)

    def quantize(self, capability: tuple[int, int]) -> None:
        """Rounds the tokens to 8 bits."""
        arguments: list[torch.Tensor | int] = [self.x, self.case.inputs, self.x_codes, self.x_scales]
        self.gpu.launch(ROUNDING, capability, (self.case.tokens, 1), arguments)

    def multiply(self, cut: Cut, capability: tuple[int, int], copy: int = 0) -> None:
        """The launch itself."""
        x = [self.x_codes, self.x_scales] if self.family.rounded else [self.x]
        matrices, rows = self.matrices[copy], [len(words) for words in self.matrices[copy][::2]]
        grid = (grid_outputs(cut, rows), -(-self.case.tokens // cut.tokens))
        numbers = [self.case.tokens, x[0].shape[1], matrices[1].shape[1], *rows]
        self.gpu.launch(self.kernel(cut), capability, grid, [*x, *matrices, *numbers, *self.y])

    def worst(self, cut: Cut, capability: tuple[int, int]) -> float:
        """Largest error over what rounding allows, of the results against the sum in float64; 1 is the limit.

        Allowed: the rounding of the result, and 2^-20 of the sum of magnitudes for float32 sums.
        """
        for y in self.y:
            y.fill_(float("nan"))
        self.gpu.synchronize()
        if self.family.rounded:
            self.quantize(capability)
        self.multiply(cut, capability)
        self.gpu.synchronize()
        weight = self.codes.to(self.gpu.device).double() * self._spread(self.scales.to(self.gpu.device).double())
        x = _rounded(self.x) if self.family.rounded else self.x.double()
        expected, size = x @ weight.T, x.abs() @ weight.abs().T
        allowed = _HALF_ULP * expected.abs() + 2.0**-20 * size + 1e-7
        errors = [(y[:, : self.case.outputs].double() - expected).abs() / allowed for y in self.y]
        return max(float(one.nan_to_num(torch.inf).max()) for one in errors)

    def _spread(self, scales: torch.Tensor) -> torch.Tensor:
        """A scale per code, from one per group."""
        return scales.repeat_interleave(self.case.group or self.case.inputs, 1)[:, : self.case.inputs]


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Tokens as 8 bits hold them: float64 codes times scales."""
    scale = x.float().abs().amax(1, keepdim=True) / torch.tensor(127.0, device=x.device)
    return (x.float() / scale).round().clamp(-127, 127).double() * scale.double()


@dataclass(frozen=True)
class Row:
    """Times of one launch in microseconds. bf16_us: torch's, of all parts as one matrix; quantize_us: rounding the
    tokens, once per input."""

    family: str
    tokens: int
    kernel: str
    case: str
    us: float
    bf16_us: float
    gb_per_s: float
    quantize_us: float | None

    @property
    def ratio(self) -> float:
        """How many times faster than bfloat16."""
        return self.bf16_us / self.us


def check(gpu: Gpu, capabilities: Sequence[tuple[int, int]], cases: Sequence[Case]) -> float:
    """The largest `worst` of all kernels and shapes. Raises ArtefactError for one that rounding does not explain."""
    largest = 0.0
    for family, case in itertools.product(FAMILIES, cases):
        product = Product(gpu, case, family)
        for cut, capability in itertools.product(CUTS, capabilities):
            worst = product.worst(cut, capability)
            if worst > 1:
                name = f"{product.kernel(cut).name}, PTX for {_sm(capability)}"
                raise ArtefactError(f"{name}, {case}: the error is {worst:.3g} times what rounding allows")
            largest = max(largest, worst)
    return largest


def _sm(capability: tuple[int, int]) -> str:
    return "sm_{}{}".format(*capability)


def time_products(gpu: Gpu, capability: tuple[int, int], cuts: Sequence[Cut]) -> list[Row]:
    """All of OpenVLA's decoder shapes, one token and a prompt, and the numbers of tokens in between on one of them."""
    rows = []
    for case in TIMED:
        plain = _bf16_microseconds(gpu, case)
        for family in FAMILIES:
            copies = _copies(gpu, case.parts * case.outputs * case.inputs * family.weight_bits // 8)
            product = Product(gpu, case, family, copies)
            quantize = None
            if family.rounded:
                quantize = gpu.microseconds(functools.partial(_quantize, product, capability), 32)
            for cut in cuts:
                us = gpu.microseconds(functools.partial(product.multiply, cut, capability), copies)
                bandwidth = product.moved_bytes / us / 1e3
                name = product.kernel(cut).name
                rows.append(Row(family.name, case.tokens, name, str(case), us, plain, bandwidth, quantize))
    return rows


def _quantize(product: Product, capability: tuple[int, int], copy: int) -> None:
    """The tokens have one copy only."""
    product.quantize(capability)


def _copies(gpu: Gpu, weight_bytes: int) -> int:
    return max(4, -(-_ROTATION * gpu.cache_bytes // weight_bytes))


def _bf16_microseconds(gpu: Gpu, case: Case) -> float:
    """torch's product of the same shape."""
    outputs = case.parts * case.outputs
    copies = _copies(gpu, 2 * outputs * case.inputs)

    def random(rows: int) -> torch.Tensor:
        return torch.randn(rows, case.inputs, device=gpu.device, dtype=torch.bfloat16)

    x, weights = random(case.tokens), [random(outputs) for _ in range(copies)]
    y = torch.empty(case.tokens, outputs, device=gpu.device, dtype=torch.bfloat16)

    def multiply(copy: int) -> None:
        torch.matmul(x, weights[copy].T, out=y)

    gpu.synchronize()
    return gpu.microseconds(multiply, copies)


def table(rows: Sequence[Row]) -> str:
    """Times, ratios and bytes per second. The fastest cut of a shape, which TensorRT would choose, is marked."""
    titles = ("us", "bf16 us", "ratio", "GB/s", "rounding us")
    lines = [f"{'tokens x outputs x inputs':28}{'kernel':24}" + "".join(f"{title:>12}" for title in titles)]
    for row in rows:
        rivals = [other.us for other in rows if (other.case, other.family) == (row.case, row.family)]
        numbers = (row.us, row.bf16_us, row.ratio, row.gb_per_s, row.quantize_us or 0.0)
        mark = " *" if row.us == min(rivals) else ""
        lines.append(f"{row.case:28}{row.kernel:24}" + "".join(f"{number:12.2f}" for number in numbers) + mark)
    return "\n".join(lines)


def goals(rows: Sequence[Row]) -> str:
    """By family and tokens, the slowest shape's time with the faster cut, over bfloat16's, beside what it shall be."""
    lines = [f"{'of bf16s time, the slowest shape':40}{'seen':>12}{'goal':>12}"]
    for (family, tokens), most in GOALS.items():
        fastest: dict[str, float] = {}
        for row in rows:
            if (row.family, row.tokens) == (family, tokens):
                fastest[row.case] = min(fastest.get(row.case, float("inf")), row.us / row.bf16_us)
        seen = max(fastest.values())
        lines.append(
            f"{family + ', ' + str(tokens) + ' rows':40}{seen:12.2f}{most:12.2f}{'' if seen <= most else '  missed'}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="also time other cuts of the products")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    if arguments.out:
        check_file(arguments.out, _KIND)
    print(roofline(), flush=True)
    kernels = [
        Kernel(family, cut, group, parts)
        for family, cut, group, parts in itertools.product(FAMILIES, CUTS, GROUPS, (1, 2, 3))
    ]
    shown = [kernel for kernel in kernels if kernel.parts == 1]
    print(
        occupancy(shown) if shutil.which("nvcc") else "nvcc is not on PATH: what kernels take is not told", flush=True
    )
    gpu = Gpu()
    print(f"{gpu.name}, {_sm(gpu.capability)}, torch {torch.__version__}")
    capabilities = list(dict.fromkeys((A100, gpu.capability)))
    for capability in capabilities:
        gpu.load([*kernels, ROUNDING], capability)
    worst = check(gpu, capabilities, CHECKED)
    names = " and ".join(_sm(capability) for capability in capabilities)
    print(f"PTX for {names}: {len(CHECKED)} shapes right, errors up to {worst:.3f} of what rounding allows", flush=True)
    swept = _SWEPT if arguments.sweep else []
    timed = itertools.product(FAMILIES, swept, (GROUPS[-1], ROW), (1, 2, 3))
    gpu.load([Kernel(*one) for one in timed], gpu.capability)
    rows = time_products(gpu, gpu.capability, [*CUTS, *swept])
    print(table(rows))
    print(goals(rows))
    if arguments.out:
        content = {"gpu": gpu.name, "torch": torch.__version__, "error_over_allowed": worst}
        rows_json = [asdict(row) | {"ratio": row.ratio} for row in rows]
        write_json(arguments.out, {"schema_version": 1, "kind": _KIND, **content, "rows": rows_json})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
