"""A task in words: one form for the same words, wherever they come from."""


def normalised(text: str) -> str:
    """`text` with every run of white space, no-break spaces, tabs and line ends included, as one blank; none around."""
    return " ".join(text.split())
