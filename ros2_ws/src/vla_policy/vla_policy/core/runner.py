"""Runs a built engine: camera image, instruction and state in, action out. Needs the engine folder and nothing else."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vla_policy.core.actions import ActionCodec, ChunkCodec, finite
from vla_policy.core.errors import ArtefactError
from vla_policy.core.image import pixel_values
from vla_policy.core.manifest import Manifest
from vla_policy.core.observation import Decision, Observation
from vla_policy.core.policy_config import PolicyConfig
from vla_policy.core.prompt import PromptTokenizer
from vla_policy.core.targets import find_target


class Backend(Protocol):
    """What executes an engine's two graphs and keeps the key/value cache between decode steps."""

    def encode(self, pixel_values: np.ndarray) -> Any:
        """Patch embeddings of float32 [1, 6, S, S], in whatever form `prefill` takes them."""
        ...

    def prefill(self, input_ids: np.ndarray, patches: Any, state: np.ndarray | None = None) -> np.ndarray:
        """Forgets the cache, reads int64 [1, L], the patches and, where the policy embeds it, the state [1, S].

        Returns float32 logits [vocab] of the last position, or an OpenVLA-OFT policy's normalised actions [H, K].
        """
        ...

    def step(self, token: int) -> np.ndarray:
        """Appends one token; float32 logits [vocab] of what follows it."""
        ...


@dataclass(frozen=True)
class Timings:
    """Where the time of one decision went, in milliseconds; `decode_ms` has one entry per decode step."""

    preprocess_ms: float
    vision_ms: float
    prefill_ms: float
    decode_ms: tuple[float, ...]

    @property
    def total_ms(self) -> float:
        return self.preprocess_ms + self.vision_ms + self.prefill_ms + sum(self.decode_ms)


class _Clock:
    """Milliseconds since the last reading."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        lap, self._last = (now - self._last) * 1e3, now
        return lap


class Engine:
    """An Actor that decides with a built engine. One decision at a time: it owns one key/value cache."""

    def __init__(self, manifest: Manifest, backend: Backend, tokenizer: PromptTokenizer, unnorm_key: str) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self._backend = backend
        self.unnorm_key = unnorm_key
        self._config = manifest.config
        stats = self._config.stats(unnorm_key)
        self.codec = ActionCodec.of(self._config, unnorm_key)
        self._chunk = None if self._config.chunk is None else ChunkCodec(stats.action, self._config.chunk)
        self._proprio = stats.proprio if self._config.use_proprio else None

    @property
    def config(self) -> PolicyConfig:
        return self._config

    def act(self, observation: Observation) -> Decision:
        """The greedy decision among the action tokens.

        Raises DataError for an unusable observation, EngineError for an output that is not finite.
        """
        return self.decide(observation)[0]

    def decide(self, observation: Observation) -> tuple[Decision, Timings]:
        """`act`, and where its time went."""
        clock = _Clock()
        pixels, input_ids, state = self._inputs(observation)
        preprocess_ms = clock.lap()
        patches = self._backend.encode(pixels)
        vision_ms = clock.lap()
        first = self._backend.prefill(input_ids, patches, state)
        prefill_ms = clock.lap()
        if self._chunk is not None:
            timings = Timings(preprocess_ms, vision_ms, prefill_ms, ())
            return Decision(np.zeros(0, np.int64), self._chunk.to_actions(first)), timings
        tokens = [self.codec.choose(first)]
        decode_ms = []
        while len(tokens) < self.codec.dim:
            tokens.append(self.codec.choose(self._backend.step(tokens[-1])))
            decode_ms.append(clock.lap())
        chosen = np.asarray(tokens, np.int64)
        timings = Timings(preprocess_ms, vision_ms, prefill_ms, tuple(decode_ms))
        return Decision(chosen, self.codec.tokens_to_action(chosen)), timings

    def scores(self, observation: Observation, tokens: np.ndarray) -> np.ndarray:
        """float32 [K, bins]: the action tokens' logits along `tokens` [K]; of a policy without tokens its normalised
        actions [H, K]. Raises as `act`."""
        pixels, input_ids, state = self._inputs(observation)
        if self._chunk is not None:
            return finite(self._backend.prefill(input_ids, self._backend.encode(pixels), state), "normalised actions")
        return self.codec.scores(self.action_logits(pixels, input_ids, tokens))

    def action_logits(self, pixels: np.ndarray, input_ids: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Teacher-forced logits float32 [K, vocab] for one sample: [1, 6 N, S, S], [1, L] and action `tokens` [K]."""
        logits = [self._backend.prefill(input_ids, self._backend.encode(pixels))]
        logits += [self._backend.step(int(token)) for token in tokens[:-1]]
        return np.stack(logits)

    def _inputs(self, observation: Observation) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        pixels = pixel_values(observation.images, self._config)[None]
        input_ids = self.tokenizer.encode(observation.instruction, observation.state)[None]
        if self._proprio is None:
            return pixels, input_ids, None
        return pixels, input_ids, self._proprio.normalised(observation.state).astype(np.float32)[None]


def load_engine(folder: Path | str, unnorm_key: str | None = None, threads: int | None = None) -> Engine:
    """The engine in `folder`, every file checked against the manifest's hashes.

    unnorm_key: which of the policy's statistics to use; may be left out if there is only one.
    threads: CPU threads; None leaves the number to the backend.

    Raises ArtefactError for a damaged engine, one built for another backend version or another GPU, and PolicyError for
    an unknown `unnorm_key`.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    config = manifest.config
    key = config.unnorm_key(unnorm_key)
    target = find_target(manifest.target)
    if manifest.backend not in target.backends:
        raise ArtefactError(
            f"{folder}: target {target.name} runs on {' or '.join(target.backends)}, but the engine is for "
            f"{manifest.backend}; build it again"
        )
    manifest.check_files(folder)
    tokenizer = PromptTokenizer(folder, config, key)
    return Engine(manifest, _backend(folder, manifest, threads), tokenizer, key)


def _backend(folder: Path, manifest: Manifest, threads: int | None) -> Backend:
    if manifest.backend == "onnxruntime":
        from vla_policy.core.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(folder, manifest, threads)
    from vla_policy.core.backends.tensorrt import TensorRtBackend, load_modules

    return TensorRtBackend(folder, manifest, load_modules(manifest.backend))
