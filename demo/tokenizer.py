"""A small tokenizer of Llama-2's form for the demo policies: byte-fallback BPE, "▁" for spaces, BOS first.

As in OpenVLA the last 256 ids of the vocabulary are the action bins; unlike Llama-2's rarely used words they are named.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

ACTION_BINS = 256
_SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def build_tokenizer(instructions: Iterable[str], words: int = 512) -> Tokenizer:
    """A tokenizer whose first `words` ids are learned from `instructions` in the prompt's sentence.

    Byte tokens make any text encodable, so an unknown instruction is a prompt like any other.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # "▁" is listed so that it exists whatever the corpus is: prompts end with it.
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=[*_SPECIAL, *_BYTES], initial_alphabet=["▁"], show_progress=False
    )
    # Merging inside words only, as Llama-2 does: each training item is one word.
    sentence = "In: What action should the robot take to {}?\nOut:"
    corpus = (word for text in instructions for word in sentence.format(text.lower()).replace("\n", " ").split())
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer = _with_ordinary_bytes(tokenizer)
    missing = words - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<unused_{index}>", normalized=False) for index in range(missing)])
    tokenizer.add_tokens([AddedToken(f"<action_{bin_}>", normalized=False) for bin_ in range(ACTION_BINS, 0, -1)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def _with_ordinary_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer makes byte tokens special, so that decoding would drop them; in Llama-2 they are ordinary."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in _SPECIAL]
    return Tokenizer.from_str(json.dumps(content))


def save_tokenizer(instructions: Iterable[str], path: Path) -> int:
    """Builds and writes `tokenizer.json`; returns its vocabulary size, action bins included."""
    tokenizer = build_tokenizer(sorted(set(instructions)))
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()
