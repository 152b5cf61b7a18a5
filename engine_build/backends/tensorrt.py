"""Graphs to engines with TensorRT (on the device that runs them) or TensorRT-RTX (ahead of time, without a GPU).

The two modules have one API; where they differ, TensorRT-RTX names the GPU and TensorRT keeps a timing cache. The
network is strongly typed: precision is what the graph says, and no builder flag changes it. The decoder gets two
optimisation profiles, prefill and decode step, on one copy of the weights.

Each graph is built in a process of its own: TensorRT is native code that may crash, and gives its memory back there.
"""

import importlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import onnx

from engine_build.kernels import NAMESPACE
from vla_policy.core.errors import ArtefactError
from vla_policy.core.files import sha256_file
from vla_policy.core.manifest import TIMING_CACHE, GraphSpec
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.targets import Backend, Target

if TYPE_CHECKING:
    import tensorrt as trt

PROMPT_LIMIT = 128
"""Longest prompt in ids; with the patches and the action tokens it bounds the key/value cache."""

_PACKAGES = {
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13==1.7.1.116",
    "tensorrt": "install TensorRT 10.x on the device (JetPack brings it)",
}
_TYPICAL_PROMPT = 30
_LOGGED = 5

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class BuiltEngines:
    """Files written, by graph; the version of the module that wrote them; and sha256 of the timing cache, if any."""

    files: dict[str, str]
    version: str
    timing_cache_sha256: str | None


def load_module(backend: Backend) -> Any:
    """The Python module of a backend. Raises ArtefactError saying how to install it."""
    try:
        module = importlib.import_module(backend)
    except ImportError as error:
        raise ArtefactError(f"backend {backend} is not installed ({error}); {_PACKAGES[backend]}") from error
    if not hasattr(module, "Builder"):  # the stubs alone make an empty package
        raise ArtefactError(f"backend {backend} is not installed, only its type stubs are; {_PACKAGES[backend]}")
    return module


def build_engines(
    backend: Backend, target: Target, folder: Path, graphs: dict[str, GraphSpec], config: PolicyConfig
) -> BuiltEngines:
    """Builds `<graph>.engine` in `folder` for every graph. Raises ArtefactError with TensorRT's own words on failure.

    With TensorRT a timing cache found as `folder/timing.cache` is used and the updated one written there.
    """
    files = {}
    for name, spec in graphs.items():
        files[name] = f"{name}.engine"
        profiles = decoder_profiles(spec, config) if name == "decoder" else []
        _build_apart(_Job(backend, target, folder / spec.file, folder / files[name], tuple(profiles)))
    cache = folder / TIMING_CACHE
    version = load_module(backend).__version__
    return BuiltEngines(files, version, sha256_file(cache) if cache.is_file() else None)


def decoder_profiles(spec: GraphSpec, config: PolicyConfig) -> list[Profile]:
    """Smallest, typical and largest shape of each input: first for the prefill, then for a decode step if there is one.

    A step has no patches, but its profile admits one: from 8 heads on, TensorRT-RTX 1.7 crashes where it knows ahead
    that a tensor is empty.
    """
    longest = config.num_patches + PROMPT_LIMIT + max(stats.action.dim for stats in config.norm_stats.values())
    prefill: Profile = {}
    step: Profile = {}
    for tensor in spec.inputs:
        if tensor.name == "input_ids":
            prefill[tensor.name] = ((1, 2), (1, _TYPICAL_PROMPT), (1, PROMPT_LIMIT))
            step[tensor.name] = _fixed((1, 1))
        elif tensor.name == "patches":
            hidden = config.text.hidden_size
            prefill[tensor.name] = _fixed((1, config.num_patches, hidden))
            step[tensor.name] = ((1, 0, hidden), (1, 0, hidden), (1, 1, hidden))
        elif tensor.name == "state":
            prefill[tensor.name] = _fixed((1, config.state_dim))
        else:
            heads, width = config.text.num_key_value_heads, config.text.head_dim
            typical = config.num_patches + _TYPICAL_PROMPT
            prefill[tensor.name] = _fixed((1, heads, 0, width))
            step[tensor.name] = ((1, heads, 1, width), (1, heads, typical, width), (1, heads, longest, width))
    return [prefill] if config.chunk is not None else [prefill, step]


def _fixed(shape: Shape) -> tuple[Shape, Shape, Shape]:
    return shape, shape, shape


@dataclass(frozen=True)
class _Job:
    """One graph to build: from `graph`, an ONNX file, to `engine`."""

    backend: Backend
    target: Target
    graph: Path
    engine: Path
    profiles: tuple[Profile, ...]


def _build_apart(job: _Job) -> None:
    """Builds in a new process. Raises ArtefactError with TensorRT's words, or saying how the process ended."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    try:
        failure = ours.recv()
    except EOFError as error:
        process.join()
        code = process.exitcode or 0
        how = signal.strsignal(-code) if code < 0 else f"exit status {code}"
        raise ArtefactError(
            f"{job.graph.name}: {job.backend} crashed while building ({how}); check free memory, or plan other formats"
        ) from error
    finally:
        process.terminate()
        process.join()
    if failure is not None:
        raise failure


def _serve(pipe: Connection, job: _Job) -> None:
    """Sends None when the engine is written, or the error."""
    try:
        _build(job)
        pipe.send(None)
    except ArtefactError as error:
        pipe.send(error)


def _build(job: _Job) -> None:
    if TYPE_CHECKING:
        import tensorrt as module
    else:
        module = load_module(job.backend)
    if any(node.domain == NAMESPACE for node in onnx.load(str(job.graph), load_external_data=False).graph.node):
        from engine_build.backends import plugins

        assert job.target.compute_capability is not None
        plugins.register(job.target.compute_capability)
    with _logged(job) as (logger, fail):
        builder = module.Builder(logger)
        network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = module.OnnxParser(network, logger)
        if not parser.parse_from_file(str(job.graph)):
            fail("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
        config = builder.create_builder_config()
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        for shapes in job.profiles:
            profile = builder.create_optimization_profile()
            for name, bounds in shapes.items():
                profile.set_shape(name, *bounds)
            config.add_optimization_profile(profile)
        if job.backend == "tensorrt_rtx":
            _name_gpu(module, config, job.target)
        cache_file = job.engine.parent / TIMING_CACHE
        cache = _timing_cache(config, cache_file) if job.backend == "tensorrt" else None
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            fail("build failed")
        if cache is not None:
            cache_file.write_bytes(cache.serialize())
        job.engine.write_bytes(plan)


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
def _logged(job: _Job) -> Iterator[tuple["trt.ILogger", Callable[[str], NoReturn]]]:
    """TensorRT reports through a logger; its errors become one line of ours."""
    if TYPE_CHECKING:
        import tensorrt as module
    else:
        module = load_module(job.backend)
    errors: list[str] = []

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: "trt.ILogger.Severity", msg: str) -> None:
            if severity <= module.ILogger.ERROR:
                errors.append(" ".join(msg.split()))

    def fail(what: str) -> NoReturn:
        where = f"{job.graph}: {job.backend} {module.__version__}"
        raise ArtefactError(f"{where}: {what}: {'; '.join(errors[:_LOGGED]) or 'no reason given'}")

    yield Logger(), fail
