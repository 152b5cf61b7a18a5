"""Writing bags: serialised messages with their types and quality of service, and never a half-written bag."""

import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from rosbags.interfaces import Connection, Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import ReaderError, StoragePlugin, Writer, WriterError
from rosbags.rosbag2.metadata import parse_qos
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from vla_policy.core.errors import ArtefactError, ContractError
from vla_policy.core.outputs import FolderKind, atomic_folder

STORAGES = ("mcap", "sqlite3")
BAG = FolderKind("rosbag2", "metadata.yaml", ("*.mcap", "*.db3"))
_FOREVER = QosTime(sec=9223372036, nsec=854775807)


def recorded_qos(reliable: bool, transient_local: bool, depth: int) -> Qos:
    """A publisher's quality of service as rosbag2 records it."""
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=depth,
        reliability=QosReliability.RELIABLE if reliable else QosReliability.BEST_EFFORT,
        durability=QosDurability.TRANSIENT_LOCAL if transient_local else QosDurability.VOLATILE,
        deadline=_FOREVER,
        lifespan=_FOREVER,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=_FOREVER,
        avoid_ros_namespace_conventions=False,
    )


def offered_qos(recorded: str) -> tuple[bool, bool]:
    """Whether the first of the profiles that a channel records is reliable, and whether it keeps its last messages.

    Reliable and volatile where none was recorded, or none that can be read.
    """
    try:
        profiles = parse_qos(recorded)
    except (ReaderError, KeyError, TypeError):
        profiles = []
    if not profiles:
        return True, False
    first = profiles[0]
    return first.reliability is not QosReliability.BEST_EFFORT, first.durability is QosDurability.TRANSIENT_LOCAL


class BagWriter:
    """A context manager that writes the bag `path`; on an error inside, nothing remains. Safe to use from threads.

    `definitions`: text of each message type that is not one of Jazzy's own.
    """

    def __init__(self, path: Path | str, storage: str = "mcap", definitions: dict[str, str] | None = None) -> None:
        if storage not in STORAGES:
            raise ContractError(f"bag storage: expected one of {', '.join(STORAGES)}, got {storage!r}")
        self._path = Path(path)
        if self._path.exists():
            raise ArtefactError(f"{self._path}: exists already; choose another name or remove it")
        self._storage = StoragePlugin[storage.upper()]
        self._typestore = get_typestore(Stores.ROS2_JAZZY)
        for kind, text in (definitions or {}).items():
            self._typestore.register(get_types_from_msg(text, kind))
        self._connections: dict[str, Connection] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "BagWriter":
        with ExitStack() as stack:
            folder = stack.enter_context(atomic_folder(self._path, BAG))
            folder.rmdir()  # the writer wants to make it
            self._writer = Writer(folder, version=9, storage_plugin=self._storage)
            self._writer.open()
            stack.callback(self._close)
            self._open = stack.pop_all()
        return self

    def _close(self) -> None:
        with self._lock:
            self._writer.close()

    def add_topic(self, topic: str, kind: str, qos: Qos) -> None:
        """Announces a topic by its absolute name. Raises ContractError for a type without a definition."""
        with self._lock:
            if topic in self._connections:
                return
            if kind not in self._typestore.fielddefs:
                raise ContractError(f"{topic}: no definition of {kind} is known; source its interface package")
            self._connections[topic] = self._writer.add_connection(
                topic, kind, typestore=self._typestore, offered_qos_profiles=[qos]
            )

    def write(self, topic: str, time_ns: int, data: bytes) -> None:
        """Appends a message in CDR. Raises ArtefactError when the disk refuses it."""
        with self._lock:
            try:
                self._writer.write(self._connections[topic], time_ns, data)
            except (OSError, WriterError) as error:
                raise ArtefactError(f"{self._path}: cannot be written ({error}); check free space") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
