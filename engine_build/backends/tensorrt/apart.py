"""Work in a process of its own: TensorRT is native code that may crash, and gives its memory back there."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from vla_policy.core.errors import ArtefactError


def apart(what: str, remedy: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns. Raises its ArtefactError, or one that says how the process ended."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, work, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError as error:
        process.join()
        code = process.exitcode or 0
        how = signal.strsignal(-code) if code < 0 else f"exit status {code}"
        raise ArtefactError(f"{what} ({how}); {remedy}") from error
    finally:
        process.terminate()
        process.join()
    if isinstance(answer, ArtefactError):
        raise answer
    return answer


def _serve(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send(work(*arguments))
    except ArtefactError as error:
        pipe.send(error)
