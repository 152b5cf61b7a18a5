"""The 2-bit and W4A8 kernels on the GPU that is here: right against float64, and how fast beside bfloat16.

    python benchmarks/kernels.py [--sweep] [--out kernels.json]

Compiles what an engine carries, PTX for this GPU and for the A100, and lets the driver load it, as TensorRT does. Every
kernel is checked on every shape before any is timed. Times are of CUDA graphs, as a decode step runs, over as many
copies of the weights as the GPU's cache cannot hold; the bfloat16 product of the same shape is torch's, in the same
run. First come the bounds of every shape on an A100 and an Orin by arithmetic, which need no GPU; the rest needs an
NVIDIA GPU, its driver, nvcc, and PyTorch with CUDA.
"""

import argparse
import ctypes
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine_build.backends.tensorrt.kernels import CUTS, GROUPS, ROW, Few, Kernel, Many, compile_ptx, product_kernel
from engine_build.backends.tensorrt.kernels.roofline import DECODER, PREFILL
from engine_build.backends.tensorrt.kernels.roofline import table as roofline
from engine_build.packing import RUN, pack_runs, pack_scales
from vla_policy.core.backends.tensorrt.cuda_graph import CudaGraph, load_driver
from vla_policy.core.cli import run
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import write_json
from vla_policy.core.outputs import check_file

_KIND = "kernel-benchmark"
A100 = (8, 0)
FAMILIES = {"W2A16": 2, "W4A8": 4}
_HALF_ULP = 2.0**-11
_ROTATION = 4  # times the GPU's cache
_LAUNCHES = 64  # in one graph, so that its own start is little of the time
_WARM_UP, _LAPS = 3, 15
_SWEPT: list[Few | Many] = [
    Few(warps, ahead, f"few_w{warps}_a{ahead}")
    for warps in (4, 8, 16)
    for ahead in (1, 2, 4)
    if (warps, ahead) != (16, 1)
]
_SWEPT += [
    Many(tiles, slabs, warps, f"many_t{tiles}_s{slabs}_w{warps}")
    for tiles, slabs, warps in ((4, 1, 4), (4, 1, 8), (4, 2, 8), (8, 1, 4), (8, 1, 8), (4, 4, 4), (12, 1, 4))
]


@dataclass(frozen=True)
class Case:
    """A product's sizes. group: inputs per scale, None for one scale per row."""

    tokens: int
    outputs: int
    inputs: int
    group: int | None

    def __str__(self) -> str:
        return f"{self.tokens} x {self.outputs} x {self.inputs}" + (f" g{self.group}" if self.group else "")


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
    """One product's operands on the GPU, its weights in several copies, and its launches."""

    def __init__(self, gpu: Gpu, case: Case, family: str, copies: int = 1) -> None:
        device, self.bits = gpu.device, FAMILIES[family]
        self.gpu, self.case, self.family, self.copies = gpu, case, family, copies
        self.codes, self.scales, words, packed = _weights(case.outputs, case.inputs, case.group, self.bits)
        self.words = [torch.tensor(words, device=device) for _ in range(copies)]
        self.packed = [torch.tensor(packed, device=device) for _ in range(copies)]
        generator = torch.Generator().manual_seed(case.tokens)
        self.x = torch.randn(case.tokens, case.inputs, generator=generator).half().to(device)
        self.y = torch.empty(case.tokens, len(words), dtype=torch.float16, device=device)
        self.x_codes = torch.zeros(case.tokens, -(-case.inputs // RUN) * RUN, dtype=torch.int8, device=device)
        self.x_scales = torch.zeros(case.tokens, dtype=torch.float32, device=device)

    def kernel(self, cut: Few | Many) -> Kernel:
        """The kernel that a layer of these shapes gets."""
        (rows, words), (_, groups) = self.words[0].shape, self.packed[0].shape
        return product_kernel(self.bits, cut, (rows, words), (rows, groups))

    @property
    def moved_bytes(self) -> int:
        """What one product has to read and write at least."""
        tensors = (self.words[0], self.packed[0], self.x if self.family == "W2A16" else self.x_codes, self.y)
        return sum(tensor.nbytes for tensor in tensors)

    def quantize(self, capability: tuple[int, int]) -> None:
        """Rounds the tokens to 8 bits, for 4-bit weights."""
        arguments: list[torch.Tensor | int] = [self.x, self.case.inputs, self.x_codes, self.x_scales]
        self.gpu.launch(Kernel("QUANTIZE_ROWS"), capability, (self.case.tokens, 1), arguments)

    def multiply(self, cut: Few | Many, capability: tuple[int, int], copy: int = 0) -> None:
        """The product itself."""
        x = [self.x] if self.bits == 2 else [self.x_codes, self.x_scales]
        (tokens, outputs), inputs, groups = self.y.shape, x[0].shape[1], self.packed[copy].shape[1]
        grid = (-(-outputs // cut.outputs), -(-tokens // cut.tokens))
        arguments: list[torch.Tensor | int] = [*x]
        arguments += [self.words[copy], self.packed[copy], tokens, outputs, inputs, groups, self.y]
        self.gpu.launch(self.kernel(cut), capability, grid, arguments)

    def worst(self, cut: Few | Many, capability: tuple[int, int]) -> float:
        """Largest error over what rounding allows, of the result against the sum in float64; 1 is the limit.

        Allowed: the rounding of the result, and 2^-20 of the sum of magnitudes for float32 sums.
        """
        self.y.fill_(float("nan"))
        self.gpu.synchronize()
        if self.bits == 4:
            self.quantize(capability)
        self.multiply(cut, capability)
        self.gpu.synchronize()
        weight = self.codes.to(self.gpu.device).double() * self._spread(self.scales.to(self.gpu.device).double())
        x = self.x.double() if self.bits == 2 else _rounded(self.x)
        expected, size = x @ weight.T, x.abs() @ weight.abs().T
        allowed = _HALF_ULP * expected.abs() + 2.0**-20 * size + 1e-7
        errors = (self.y[:, : self.case.outputs].double() - expected).abs() / allowed
        return float(errors.nan_to_num(torch.inf).max())

    def _spread(self, scales: torch.Tensor) -> torch.Tensor:
        """A scale per code, from one per group."""
        return scales.repeat_interleave(self.case.group or self.case.inputs, 1)[:, : self.case.inputs]


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Tokens as 8 bits hold them: float64 codes times scales."""
    scale = x.float().abs().amax(1, keepdim=True) / torch.tensor(127.0, device=x.device)
    return (x.float() / scale).round().clamp(-127, 127).double() * scale.double()


@dataclass(frozen=True)
class Row:
    """Times of one product in microseconds. bf16_us: torch's; quantize_us: rounding the tokens, once per input."""

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


def time_products(gpu: Gpu, capability: tuple[int, int], cuts: Sequence[Few | Many]) -> list[Row]:
    """All of OpenVLA's decoder shapes, one token and a prompt."""
    rows = []
    for (outputs, inputs), tokens, group in itertools.product(DECODER, (1, PREFILL), (GROUPS[-1], None)):
        case = Case(tokens, outputs, inputs, group)
        plain = _bf16_microseconds(gpu, case)
        for family, bits in FAMILIES.items():
            copies = _copies(gpu, outputs * inputs * bits // 8)
            product = Product(gpu, case, family, copies)
            quantize = None
            if bits == 4:
                quantize = gpu.microseconds(functools.partial(_quantize, product, capability), 32)
            for cut in cuts:
                us = gpu.microseconds(functools.partial(product.multiply, cut, capability), copies)
                bandwidth = product.moved_bytes / us / 1e3
                rows.append(Row(product.kernel(cut).name, str(case), us, plain, bandwidth, quantize))
    return rows


def _quantize(product: Product, capability: tuple[int, int], copy: int) -> None:
    """The tokens have one copy only."""
    product.quantize(capability)


def _copies(gpu: Gpu, weight_bytes: int) -> int:
    return max(4, -(-_ROTATION * gpu.cache_bytes // weight_bytes))


def _bf16_microseconds(gpu: Gpu, case: Case) -> float:
    """torch's product of the same shape."""
    copies = _copies(gpu, 2 * case.outputs * case.inputs)

    def random(rows: int) -> torch.Tensor:
        return torch.randn(rows, case.inputs, device=gpu.device, dtype=torch.bfloat16)

    x, weights = random(case.tokens), [random(case.outputs) for _ in range(copies)]
    y = torch.empty(case.tokens, case.outputs, device=gpu.device, dtype=torch.bfloat16)

    def multiply(copy: int) -> None:
        torch.matmul(x, weights[copy].T, out=y)

    gpu.synchronize()
    return gpu.microseconds(multiply, copies)


def table(rows: Sequence[Row]) -> str:
    """Times, ratios and bytes per second. The fastest cut of a shape, which TensorRT would choose, is marked."""
    titles = ("us", "bf16 us", "ratio", "GB/s", "rounding us")
    lines = [f"{'tokens x outputs x inputs':28}{'kernel':24}" + "".join(f"{title:>12}" for title in titles)]
    for row in rows:
        rivals = [other.us for other in rows if other.case == row.case and other.kernel[:4] == row.kernel[:4]]
        numbers = (row.us, row.bf16_us, row.ratio, row.gb_per_s, row.quantize_us or 0.0)
        mark = " *" if row.us == min(rivals) else ""
        lines.append(f"{row.case:28}{row.kernel:24}" + "".join(f"{number:12.2f}" for number in numbers) + mark)
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
    gpu = Gpu()
    print(f"{gpu.name}, {_sm(gpu.capability)}, torch {torch.__version__}")
    kernels = [Kernel(family, cut, group) for family in FAMILIES for cut in CUTS for group in GROUPS]
    capabilities = list(dict.fromkeys((A100, gpu.capability)))
    for capability in capabilities:
        gpu.load([*kernels, Kernel("QUANTIZE_ROWS")], capability)
    worst = check(gpu, capabilities, CHECKED)
    names = " and ".join(_sm(capability) for capability in capabilities)
    print(f"PTX for {names}: {len(CHECKED)} shapes right, errors up to {worst:.3f} of what rounding allows", flush=True)
    swept = _SWEPT if arguments.sweep else []
    timed = itertools.product(FAMILIES, swept, (GROUPS[-1], ROW))
    gpu.load([Kernel(family, cut, group) for family, cut, group in timed], gpu.capability)
    rows = time_products(gpu, gpu.capability, [*CUTS, *swept])
    print(table(rows))
    if arguments.out:
        content = {"gpu": gpu.name, "torch": torch.__version__, "error_over_allowed": worst}
        rows_json = [asdict(row) | {"ratio": row.ratio} for row in rows]
        write_json(arguments.out, {"schema_version": 1, "kind": _KIND, **content, "rows": rows_json})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
