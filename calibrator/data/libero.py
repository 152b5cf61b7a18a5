"""The task in words as LIBERO's HDF5 files tell it: in `problem_info`, or in the file's name."""

import json
from typing import Any

from vla_policy.core.instruction import normalised

_DEMO = "_demo"


def written_instruction(problem_info: Any, stem: str) -> tuple[str, str] | None:
    """The instruction and what tells it, "problem_info" or "the file's name"; None where neither does.

    problem_info: attribute of the file's `data`, JSON with a `language_instruction`: a sentence, quoted or not, or a
    list of its words. stem: the file's name without its ending, which tells the task where it ends with "_demo".
    """
    sentence = _sentence(_language(problem_info))
    if sentence:
        return sentence, "problem_info"
    sentence = _of_name(stem)
    return (sentence, "the file's name") if sentence else None


def _language(problem_info: Any) -> Any:
    text = problem_info.decode(errors="replace") if isinstance(problem_info, bytes) else problem_info
    try:
        content = json.loads(text)
    except (TypeError, ValueError):
        return None
    return content.get("language_instruction") if isinstance(content, dict) else None


def _sentence(language: Any) -> str:
    """As one would say it; empty for what is no sentence."""
    if isinstance(language, list) and all(isinstance(word, str) for word in language):
        # LIBERO joins its list as it is: of letters; others wrote words.
        language = ("" if all(len(word) == 1 for word in language) else " ").join(language)
    if not isinstance(language, str):
        return ""
    text = normalised(language)
    while len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = normalised(text[1:-1])
    if " " not in text:
        text = normalised(text.replace("_", " "))
    # A null or a list that a converter wrote as its text.
    return "" if text.lower() in ("none", "null") or text.startswith(("[", "{")) else text


def _of_name(stem: str) -> str:
    """As OpenVLA's conversion reads names such as KITCHEN_SCENE3_turn_on_the_stove_demo: the words after the scene."""
    if not stem.endswith(_DEMO):
        return ""
    words = stem.removesuffix(_DEMO).split("_")
    scenes = [index for index, word in enumerate(words) if "SCENE" in word]
    return normalised(" ".join(words[scenes[-1] + 1 if scenes else 0 :]))
