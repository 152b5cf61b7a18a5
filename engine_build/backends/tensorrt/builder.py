"""Graphs to engines with TensorRT (on the device that runs them) or TensorRT-RTX (ahead of time, without a GPU).

The two modules have one API; where they differ, TensorRT-RTX names the GPU and TensorRT keeps a timing cache. The
network is strongly typed: precision is what the graph says, and no builder flag changes it. A graph gets an
optimisation profile for each call that a decision makes of it, on one copy of the weights.

Each graph is built in a process of its own.
"""

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import onnx

from engine_build.backends.base import Written
from engine_build.backends.tensorrt import plugins
from engine_build.backends.tensorrt.apart import apart
from engine_build.backends.tensorrt.kernels import NAMESPACE
from engine_build.backends.tensorrt.library import build_library
from vla_policy.core.backends.tensorrt.plugin_library import LIBRARY, load_library
from vla_policy.core.errors import ArtefactError
from vla_policy.core.manifest import Manifest
from vla_policy.core.program import GraphSpec, Range, TensorSpec, profiles
from vla_policy.core.targets import Target

if TYPE_CHECKING:
    import tensorrt as trt

TIMING_CACHE = "timing.cache"
_LOGGED = 5

Shape = tuple[int, ...]
Bounds = dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class Module:
    """One of the two Python modules.

    remedy: how to install it. ahead: whether it builds for a GPU that is not here, which must then be named; otherwise
    it measures kernels on the GPU that is here, and keeps what it saw in a timing cache.
    """

    name: str
    remedy: str
    ahead: bool

    def load(self) -> Any:
        """The module itself. Raises ArtefactError saying how to install it."""
        try:
            module = importlib.import_module(self.name)
        except ImportError as error:
            raise ArtefactError(f"backend {self.name} is not installed ({error}); {self.remedy}") from error
        if not hasattr(module, "Builder"):  # the stubs alone make an empty package
            raise ArtefactError(f"backend {self.name} is not installed, only its type stubs are; {self.remedy}")
        return module


def build_engines(
    module: Module,
    target: Target,
    written: Written,
    replaced: Path,
    shown: Mapping[str, Collection[str]] | None = None,
) -> dict[str, GraphSpec]:
    """Builds `<graph>.engine` beside every graph. Raises ArtefactError with TensorRT's own words on failure.

    A timing cache found in the folder `replaced` is used, and the updated one written beside the engines.

    shown: names of values, by graph, that the engines shall show while they run. Nothing is fused across such a value,
    so this is no engine to serve with: each of its layers computes what the network says, by kernels of its own choice.
    """
    folder = written.folder
    if not module.ahead and (replaced / TIMING_CACHE).is_file():
        (folder / TIMING_CACHE).write_bytes(_former_timing_cache(replaced))
    capability, graphs = target.compute_capability, [folder / spec.file for spec in written.graphs.values()]
    if capability is not None and any(map(_has_plugins, graphs)) and not plugins.are_embedded():
        build_library(folder / LIBRARY, capability)
    built = {}
    for name, spec in written.graphs.items():
        engine = f"{name}.engine"
        shapes = tuple(
            input_shapes(spec, profile.sizes) for profile in profiles(name, written.graphs, written.program)
        )
        values = tuple((shown or {}).get(name, ()))
        _build_apart(_Job(module, target, folder / spec.file, folder / engine, shapes, values))
        built[name] = replace(spec, file=engine)
    return built


def _former_timing_cache(replaced: Path) -> bytes:
    """Of the engine that is to be replaced. Raises ArtefactError where it is not the one that was built there."""
    try:
        with Manifest.load(replaced).mapped_file(replaced, TIMING_CACHE) as content:
            return bytes(content)
    except ArtefactError as error:
        raise ArtefactError(f"{error}; or delete {TIMING_CACHE} there, to build without it") from error


def input_shapes(graph: GraphSpec, sizes: Mapping[str, Range]) -> Bounds:
    """Smallest, typical and largest shape of every input whose size varies, at these sizes."""

    def shape(spec: TensorSpec, bound: Callable[[Range], int]) -> Shape:
        return tuple(bound(sizes[size]) if isinstance(size, str) else size for size in spec.shape)

    bounds: tuple[Callable[[Range], int], ...] = (
        lambda size: size.smallest,
        lambda size: size.typical,
        lambda size: size.largest,
    )
    return {
        spec.name: (shape(spec, bounds[0]), shape(spec, bounds[1]), shape(spec, bounds[2]))
        for spec in graph.inputs
        if any(isinstance(size, str) for size in spec.shape)
    }


@dataclass(frozen=True)
class _Job:
    """One graph to build: from `graph`, an ONNX file, to `engine`."""

    module: Module
    target: Target
    graph: Path
    engine: Path
    profiles: tuple[Bounds, ...]
    shown: tuple[str, ...]


def _build_apart(job: _Job) -> None:
    """Builds in a new process. Raises ArtefactError with TensorRT's words, or saying how the process ended."""
    what = f"{job.graph.name}: {job.module.name} crashed while building"
    apart(what, "check free memory, or plan other formats", _build, job)


def inspect(module: Module, engine: Path) -> str:
    """What TensorRT's engine inspector tells of an engine, as JSON; needs the engine's GPU, and raises as a build."""
    what = f"{engine.name}: {module.name} crashed while it was inspected"
    information: str = apart(what, "check free memory", _inspect, module, engine)
    return information


def _inspect(kind: Module, engine: Path) -> str:
    if TYPE_CHECKING:
        import tensorrt as module
    else:
        module = kind.load()
    if (library := engine.parent / LIBRARY).is_file():
        load_library(library, module)
    with _logged(kind, engine) as (logger, fail):
        built = module.Runtime(logger).deserialize_cuda_engine(engine.read_bytes())
        if built is None:
            fail("cannot load what it has built")
        return str(built.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON))


def _has_plugins(graph: Path) -> bool:
    return any(node.domain == NAMESPACE for node in onnx.load(str(graph), load_external_data=False).graph.node)


def _build(job: _Job) -> None:
    if TYPE_CHECKING:
        import tensorrt as module
    else:
        module = job.module.load()
    library = job.engine.parent / LIBRARY
    if library.is_file():
        load_library(library, module)
    elif _has_plugins(job.graph):
        assert job.target.compute_capability is not None
        plugins.register(job.target.compute_capability)
    with _logged(job.module, job.graph) as (logger, fail):
        builder = module.Builder(logger)
        network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = module.OnnxParser(network, logger)
        if not parser.parse_from_file(str(job.graph)):
            fail("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
        for name in _read_on_the_host(network):
            fail(f"takes {name} for a shape, which it would read on the host")
        for name in _mark(network, job.shown):
            fail(f"has no value {name} to show")
        config = builder.create_builder_config()
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        for shapes in job.profiles:
            profile = builder.create_optimization_profile()
            for name, bounds in shapes.items():
                profile.set_shape(name, *bounds)
            config.add_optimization_profile(profile)
        cache, cache_file = None, job.engine.parent / TIMING_CACHE
        if job.module.ahead:
            _name_gpu(module, config, job.target)
        else:
            cache = _timing_cache(config, cache_file)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            fail("build failed")
        if cache is not None:
            cache_file.write_bytes(cache.serialize())
        job.engine.write_bytes(plan)


def _read_on_the_host(network: "trt.INetworkDefinition") -> list[str]:
    """Inputs that shapes depend on. There must be none: sizes are fixed, and addresses are those of the device."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    return [tensor.name for tensor in inputs if tensor.is_shape_tensor]


def _mark(network: "trt.INetworkDefinition", names: Collection[str]) -> Iterator[str]:
    """Marks values as debug tensors; yields those that are not there. An input shows itself to whoever feeds it."""
    outputs: dict[str, trt.ITensor] = {}
    for index in range(network.num_layers if names else 0):
        layer = network.get_layer(index)
        outputs |= {layer.get_output(place).name: layer.get_output(place) for place in range(layer.num_outputs)}
    inputs = {network.get_input(index).name for index in range(network.num_inputs)}
    for name in names:
        if name not in inputs and not (name in outputs and network.mark_debug(outputs[name])):
            yield name


def _timing_cache(config: "trt.IBuilderConfig", path: Path) -> "trt.ITimingCache":
    """The kept cache, or an empty one: the same cache makes the same choice of kernels."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, False):
        raise ArtefactError(
            f"{path.name} of the engine that is to be replaced: from another GPU or TensorRT version; delete it there "
            "and build again"
        )
    return cache


def _name_gpu(module: Any, config: Any, target: Target) -> None:
    """TensorRT-RTX builds for a GPU that is not here; this part of its interface is not in TensorRT's stubs."""
    assert target.compute_capability is not None
    name = "SM{}{}".format(*target.compute_capability)
    capability = getattr(module.ComputeCapability, name, None)
    if capability is None:
        known = sorted(entry for entry in dir(module.ComputeCapability) if entry.startswith("SM"))
        raise ArtefactError(
            f"target {target.name} is {name}, TensorRT-RTX {module.__version__} builds for {', '.join(known)} only; "
            "build on the device with --backend tensorrt"
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)


@contextmanager
def _logged(kind: Module, path: Path) -> Iterator[tuple["trt.ILogger", Callable[[str], NoReturn]]]:
    """TensorRT reports through a logger; its errors become one line of ours."""
    if TYPE_CHECKING:
        import tensorrt as module
    else:
        module = kind.load()
    errors: list[str] = []

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: "trt.ILogger.Severity", msg: str) -> None:
            if severity <= module.ILogger.ERROR:
                errors.append(" ".join(msg.split()))

    def fail(what: str) -> NoReturn:
        where = f"{path}: {kind.name} {module.__version__}"
        raise ArtefactError(f"{where}: {what}: {'; '.join(errors[:_LOGGED]) or 'no reason given'}")

    yield Logger(), fail
