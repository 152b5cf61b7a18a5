"""Everything that can be proven of an engine on the device that shall run it, in one command: neither torch nor policy.

On a workstation `build --pack --golden 4` wrote the graphs, packed, and what the policy decides of some states. Here
they are compiled if they need to be, every layer's format is read back, the golden states are decided and compared,
each layer's result is compared with what its stored codes and scales give, and both engines are timed in turns.

The proof folder holds `verification.json` and `bench.json` for the report, `proof.md` for people, and, where graphs
were compiled, `engine` and `engine16`, which the node serves.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from engine_build import exported
from engine_build.backends import find_backend
from engine_build.backends.base import Layer, Written
from engine_build.bench import bench, report
from engine_build.compiled import PACKED, check_realised, compile_graphs, describe_graphs, linked, unit_records
from engine_build.golden import GOLDEN, Golden, compare
from engine_build.inspect import summary
from engine_build.numbers import check_scores, reference_of
from engine_build.stored_layers import check_stored_layers
from vla_policy.core.backends.base import parse_version
from vla_policy.core.errors import ArtefactError, VlaError
from vla_policy.core.files import claim_folder, sha256_file
from vla_policy.core.manifest import ENGINE, MANIFEST, Manifest, file_records
from vla_policy.core.outputs import FolderKind, atomic_folder, atomic_path, page_kind
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import find_target
from vla_policy.core.verification import Layers, Reference, Verification

PROOF = FolderKind("proof", "proof.json", ("verification.json", "bench.json", "proof.md", "engine/*", "engine16/*"))
_T = TypeVar("_T")


@dataclass(frozen=True)
class Step:
    """One thing that was to be proven. said: what was seen, or why it failed; None for what was not tried."""

    name: str
    passed: bool | None
    said: str


class _Steps:
    """The steps so far, printed as they come."""

    def __init__(self) -> None:
        self.all: list[Step] = []

    def run(self, name: str, work: Callable[[], _T], say: Callable[[_T], str]) -> _T | None:
        """What `work` gives; None, and a failed step, where it raises what a user can mend."""
        try:
            result = work()
        except VlaError as error:
            self._add(Step(name, False, str(error)))
            return None
        self._add(Step(name, True, say(result)))
        return result

    def skip(self, name: str, why: str) -> None:
        self._add(Step(name, None, why))

    def _add(self, step: Step) -> None:
        self.all.append(step)
        print(f"{_mark(step)} {step.name}: {step.said}", flush=True)

    @property
    def passed(self) -> bool:
        return all(step.passed is not False for step in self.all)


def _mark(step: Step) -> str:
    return {True: "passed", False: "FAILED", None: "not tried"}[step.passed]


def prove(engine: Path, against: Path, out: Path, target: str | None, repeats: int, threads: int) -> bool:
    """Whether everything was proven; writes the folder `out` in any case.

    against: the 16-bit engine of the same policy and target. target: which the engines must be for.

    Raises ArtefactError where there is nothing to begin with: a folder that is no engine, of another target, or without
    golden states, or an `out` that holds something else.
    """
    ours, theirs = Manifest.load(engine), Manifest.load(against)
    for folder, manifest in ((engine, ours), (against, theirs)):
        if target is not None and manifest.target != target:
            raise ArtefactError(f"{folder}: for target {manifest.target}, not {target}; name the target's engine")
        manifest.check_files(folder)
    golden = Golden.load(engine)
    claim_folder(out, PROOF, inputs=[engine, against])
    steps = _Steps()
    ready = steps.run("engine", lambda: ready_to_run(engine, ours, out / "engine"), _became)
    sixteen = steps.run("16-bit engine", lambda: ready_to_run(against, theirs, out / "engine16"), _became)
    if ready is not None:
        layers = _layers(steps, engine, ours, golden)
        reference = steps.run("golden states", lambda: _decide(ready, golden, layers), lambda found: found.summary)
        _verification(engine, ours, ready, reference).save(out / "verification.json")
    if ready is not None and sixteen is not None:
        key = golden.unnorm_key
        timed = steps.run("times", lambda: bench(ready, [sixteen], repeats, threads, unnorm_key=key), report)
        if timed is not None:
            timed.save(out / "bench.json")
    with atomic_path(out / "proof.md", PROOF.name) as page:
        page.write_text(_page(engine, ours, steps.all), encoding="utf-8")
    return steps.passed


def ready_to_run(folder: Path, manifest: Manifest, out: Path) -> Path:
    """The engine folder itself, or the one at `out` that its packed graphs are compiled into."""
    if not manifest.packed:
        return folder
    backend, target = find_backend(manifest.backend), find_target(manifest.target).on(manifest.backend)
    version = backend.version()
    target = target.on(None, parse_version(version))
    places, _ = exported.load(folder)
    layers, planned = _layers_of(manifest), {unit.name: unit.choice for unit in manifest.units}
    formats = {name: choice.format for name, choice in planned.items()}
    with atomic_folder(out, ENGINE) as fresh:
        for name in (*manifest.config.family.files, *([GOLDEN] if GOLDEN in manifest.files else [])):
            shutil.copyfile(folder / name, fresh / name)
        with linked(Written(folder, manifest.graphs, manifest.program, places), fresh) as written:
            graphs, became = compile_graphs(written, target, out, layers, formats, backend)
            units = unit_records(written, became, layers, planned)
            check_realised(out, units, backend)
            exported.save(fresh, places, describe_graphs(written, became))
        files = file_records(fresh)
        replace(
            manifest,
            backend_version=version,
            graphs=graphs,
            units=units,
            files=files,
            other_bytes=sum(record.bytes for record in files.values())
            - sum(unit.code_bytes + unit.scale_bytes for unit in units),
            notes=(
                *(note for note in manifest.notes if note != PACKED),
                f"compiled from packed graphs, manifest {sha256_file(folder / MANIFEST)[:12]}",
            ),
        ).write(fresh)
    return out


def _became(folder: Path) -> str:
    return f"{folder}: every layer has its planned format\n{summary(Manifest.load(folder))}"


def _layers_of(manifest: Manifest) -> dict[str, Layer]:
    """The layers as far as a manifest tells them; groups are not needed to read a device's engine back."""
    return {
        unit.name: Layer(unit.name, unit.kind, unit.name, unit.outputs, unit.inputs, bias=False)
        for unit in manifest.units
    }


def _layers(steps: _Steps, folder: Path, manifest: Manifest, golden: Golden) -> Layers | None:
    """Every layer beside its stored codes and scales, where the graphs were compiled here."""
    if not manifest.packed:
        steps.skip("single layers", "the engine was not compiled here; `verify` compares them beside the policy")
        return None
    places, _ = exported.load(folder)
    written = Written(folder, manifest.graphs, manifest.program, places)
    return steps.run("single layers", lambda: check_stored_layers(written, manifest, golden), _worst)


def _worst(layers: Layers) -> str:
    found = [f"{name} {worst.error:.1e} (allowed {worst.allowed:g})" for name, worst in sorted(layers.formats.items())]
    return f"results differ from what the stored codes give by up to {', '.join(found)}"


def _decide(folder: Path, golden: Golden, layers: Layers | None) -> Reference:
    """The engine's decisions beside the kept ones. Raises ArtefactError for scores that leave the tolerance."""
    engine = load_engine(folder, golden.unnorm_key)
    full = compare(engine, golden.full, golden.states, "full precision")
    same = compare(engine, golden.same, golden.states, "the engine's formats")
    check_scores(folder, engine, same)
    return reference_of(engine, f"golden states ({golden.source})", len(golden.states), same, full, layers)


def _verification(packed: Path, manifest: Manifest, ready: Path, reference: Reference | None) -> Verification:
    """The record. What was compared byte for byte are the graphs, with the hashes that the workstation recorded."""
    not_compared, tensors, size = "bytes with the policy, which is not here: `verify` does that", 0, 0
    if manifest.packed:
        _, now = exported.load(ready)
        exported.check_exported(packed, exported.load(packed)[1], now)
        every = [tensor for graph in now.values() for tensor in graph.tensors.values()]
        tensors, size = len(every), sum(tensor.bytes for tensor in every)
        not_compared += f"; {exported.summary(now)}"
    return Verification(
        engine=ready.resolve().name,
        parents={"engine": sha256_file(ready / MANIFEST), "policy": manifest.parents["policy"]},
        tensors=tensors,
        bytes=size,
        not_compared=not_compared,
        reference=reference,
    )


def _page(folder: Path, manifest: Manifest, steps: list[Step]) -> str:
    """What was seen, for people."""
    lines = [page_kind(PROOF.name), f"# {folder.resolve().name} on {manifest.target}", ""]
    for step in steps:
        lines += [f"## {step.name}: {_mark(step)}", "", "```", step.said, "```", ""]
    return "\n".join(lines)
