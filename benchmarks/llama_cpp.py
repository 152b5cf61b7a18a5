"""A decoder of OpenVLA-7B's shapes beside llama.cpp's Q4_0, which is what a user would take instead.

    pip install xllamacpp gguf
    python -m benchmarks.llama_cpp --out DIR

Random weights on both sides, one block unless `--blocks` says more, and a head of 256 rows, the action tokens'. Both
read the same number of positions, then as many single tokens, by turns in one process; medians. Prints the ratios of
the times and the bytes of the blocks and the head on disk, scales counted.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.engine import INSTRUCTION, build_at, config_of
from calibrator.quantizers import parse_choice
from engine_build.plan import Plan
from engine_build.weights import layers_of
from vla_policy.core.cli import run
from vla_policy.core.files import claim_folder
from vla_policy.core.observation import Observation
from vla_policy.core.outputs import FolderKind
from vla_policy.core.prismatic.config import PrismaticConfig, TextSpec
from vla_policy.core.runner import load_engine
from vla_policy.core.targets import find_target

_FOLDER = FolderKind("llama-benchmark", "llama.json")
_DECODER = "language_model."


def write_gguf(path: Path, text: TextSpec) -> int:
    """A random Llama in Q4_0, norms in float32; returns the bytes of its blocks and head."""
    import gguf

    four = gguf.GGMLQuantizationType.Q4_0
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_vocab_size(text.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>" for index in range(text.vocab_size)])
    writer.add_token_scores([0.0] * text.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * text.vocab_size)
    counted = 0

    def matrix(name: str, outputs: int, inputs: int) -> int:
        values = generator.standard_normal((outputs, inputs), np.float32) / np.float32(inputs**0.5)
        content = gguf.quants.quantize(values, four)
        writer.add_tensor(name, content, raw_dtype=four)
        return int(content.nbytes)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(text.hidden_size, np.float32))

    hidden, keys = text.hidden_size, text.num_key_value_heads * text.head_dim
    matrix("token_embd.weight", text.vocab_size, hidden)
    for block in range(text.num_hidden_layers):
        for name, outputs, inputs in (
            ("attn_q", hidden, hidden),
            ("attn_k", keys, hidden),
            ("attn_v", keys, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", text.intermediate_size, hidden),
            ("ffn_up", text.intermediate_size, hidden),
            ("ffn_down", hidden, text.intermediate_size),
        ):
            counted += matrix(f"blk.{block}.{name}.weight", outputs, inputs)
        norm(f"blk.{block}.attn_norm.weight")
        norm(f"blk.{block}.ffn_norm.weight")
    norm("output_norm.weight")
    counted += matrix("output.weight", text.vocab_size, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return counted


class LlamaCpp:
    """llama.cpp in this process."""

    def __init__(self, path: Path, threads: int) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch, parameters.n_parallel = 1024, 512, 512, 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.warmup = False
        self._server = xllamacpp.Server(parameters)

    def milliseconds(self, positions: int, tokens: int) -> tuple[float, float]:
        """Of reading so many positions, and of one token after them."""
        answer = self._server.handle_completions(
            {
                "prompt": [10 + index % 200 for index in range(positions)],
                "n_predict": tokens,
                "ignore_eos": True,
                "cache_prompt": False,
                "temperature": 0.0,
            }
        )
        timings = answer["timings"]
        assert timings["prompt_n"] == positions, timings
        return timings["prompt_ms"], timings["predicted_per_token_ms"]


def plan_of(config: PrismaticConfig, bits: int) -> Plan:
    """The decoder in `bits` with scales in groups of 128, all else at 8 bits."""
    decoder, rest = parse_choice(f"w{bits}a8_g128"), parse_choice("w8a8")
    return Plan({name: decoder if name.startswith(_DECODER) else rest for name in layers_of(config)})


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the engine and the GGUF file")
    parser.add_argument("--blocks", type=int, default=1, help="decoder blocks (default: 1)")
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), default=4, help="of our weights (default: 4)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--repeats", type=int, default=7, help="measured turns after two for warm-up (default: 7)")
    arguments = parser.parse_args(argv)
    try:
        import gguf  # noqa: F401
        import xllamacpp  # noqa: F401
    except ImportError as error:
        print(f"skipped: {error.name} is not installed; pip install xllamacpp gguf")
        return 0
    claim_folder(arguments.out, _FOLDER)
    config = config_of(arguments.blocks)
    manifest = build_at(arguments.blocks, plan_of(config, arguments.bits), find_target("cpu"), arguments.out / "engine")
    text = replace(config.text, vocab_size=config.n_action_bins)  # as many rows in both heads
    theirs = write_gguf(arguments.out / "q4_0.gguf", text)
    units = [unit for unit in manifest.units if unit.name.startswith(_DECODER)]
    ours = sum(unit.code_bytes + unit.scale_bytes for unit in units)
    engine = load_engine(arguments.out / "engine", threads=arguments.threads)
    llama = LlamaCpp(arguments.out / "q4_0.gguf", arguments.threads)
    observation = Observation(np.zeros((224, 224, 3), np.uint8), INSTRUCTION)
    positions = config.num_patches + engine.policy.inputs(observation)["input_ids"].shape[1]
    laps: list[tuple[float, float, float, float]] = []
    for turn in range(2 + arguments.repeats):
        timings = engine.decide(observation)[1]
        steps = [milliseconds for call, milliseconds in timings.calls if call == "step"]
        prefill = next(milliseconds for call, milliseconds in timings.calls if call == "prefill")
        lap = (prefill, statistics.median(steps), *llama.milliseconds(positions, len(steps) + 1))
        if turn >= 2:
            laps.append(lap)
    mine, my_step, its, its_step = (statistics.median(column) for column in zip(*laps, strict=True))
    print(
        f"{manifest.backend}, {units[0].planned}, {arguments.blocks} blocks and the head, {arguments.threads} threads"
    )
    print(f"prefill of {positions} positions: {mine:.1f} ms, llama.cpp Q4_0 {its:.1f} ms, ratio {mine / its:.2f}")
    print(f"step: {my_step:.2f} ms, llama.cpp Q4_0 {its_step:.2f} ms, ratio {my_step / its_step:.2f}")
    print(f"bytes of blocks and head: {ours:,}, llama.cpp Q4_0 {theirs:,}, ratio {ours / theirs:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
