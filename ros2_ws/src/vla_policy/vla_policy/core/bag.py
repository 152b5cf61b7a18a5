"""Recorded bags as frames: mcap or sqlite3, ours or anyone's that holds the contract's topics."""

import heapq
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from vla_policy.core.bag_files import MCAP, SQLITE, BagFile, Channel, Message, open_file, unpack_file
from vla_policy.core.contract import Contract
from vla_policy.core.errors import ContractError, DataError
from vla_policy.core.events import Event, to_events
from vla_policy.core.synchroniser import Dropped, DropReason, Frame, Synchroniser

_METADATA = "metadata.yaml"
_PACKED = (".zstd", ".zst")
# Between the files that one ros2idl text holds, each with a line that names it.
_IDL_SEPARATOR = "=" * 80 + "\n"


class Bag:
    """An open bag: what its files hold, whatever metadata.yaml says of them.

    channels: of all files. counted: messages by topic and type as metadata.yaml counts them; empty without a readable
    one. trouble: what is wrong with metadata.yaml, a line each.
    """

    def __init__(
        self, path: Path, files: list[BagFile], counted: Mapping[tuple[str, str], int], trouble: tuple[str, ...]
    ) -> None:
        self.path, self.counted, self.trouble = path, counted, trouble
        self.channels = tuple(channel for file in files for channel in file.channels)
        self._files = files
        self._stores: dict[tuple[str, str, str], Typestore] = {}

    def messages(self, channels: Collection[Channel]) -> Iterator[Message]:
        """Every message of `channels` in order of recorded time. Raises ContractError where a file is damaged."""
        wanted = [file.messages([item for item in file.channels if item in channels]) for file in self._files]
        return heapq.merge(*wanted, key=lambda message: message.time_ns)

    def decode(self, message: Message) -> Any:
        """The message as an object with the fields of its type.

        Raises DataError where it is damaged, ContractError for a type whose text cannot be parsed or tells of other
        fields than ROS 2 Jazzy's.
        """
        channel = message.channel
        try:
            return self._store(channel).deserialize_cdr(message.data, channel.type)
        except (SerdeError, IndexError, OverflowError, MemoryError) as error:
            raise DataError(f"{channel.topic}: a message of {len(message.data)} bytes is damaged ({error})") from error

    def _store(self, channel: Channel) -> Typestore:
        """The types of ROS 2 Jazzy, and the channel's as its file describes it."""
        key = (channel.type, channel.language, channel.definition)
        if key not in self._stores:
            store = get_typestore(Stores.ROS2_JAZZY)
            try:
                store.register(_described(channel))
                store.get_msgdef(channel.type)
            except Exception as error:  # the library compiles what the text says, which may be anything
                raise ContractError(
                    f"{self.path}: topic {channel.topic}: the bag's description of {channel.type} is not ROS 2 "
                    f"Jazzy's, or cannot be read ({error}); record it again"
                ) from error
            self._stores[key] = store
        return self._stores[key]


def _described(channel: Channel) -> dict[str, Any]:
    """The types in a channel's definition, by name."""
    if not channel.definition.strip():
        return {}
    if channel.language == "ros2msg":
        return dict(get_types_from_msg(channel.definition, channel.type))
    if channel.language not in ("ros2idl", "omgidl"):
        raise ValueError(f"it is described in {channel.language!r}")
    types: dict[str, Any] = {}
    for part in channel.definition.split(_IDL_SEPARATOR):
        # The library's parser knows no #include; what it would bring stands in a part of its own.
        lines = [line for line in part.splitlines() if not line.startswith(("IDL: ", "#include"))]
        if any(lines):
            types |= get_types_from_idl("\n".join(lines))
    return types


def carries(channel: Channel, kind: str) -> bool:
    """Whether the channel's messages are ROS 2 messages of type `kind`."""
    return channel.type == kind and channel.encoding == "cdr"


def is_bag(path: Path) -> bool:
    """Whether `path` is a bag by its name: a folder with a metadata.yaml, or one of its files."""
    return (path / _METADATA).is_file() or _plain(path).suffix in (MCAP, SQLITE)


def _plain(path: Path) -> Path:
    """The name without the ending that compression added."""
    return path.with_suffix("") if path.suffix in _PACKED else path


@contextmanager
def open_bag(path: Path | str) -> Iterator[Bag]:
    """The open bag in the folder `path` (or its one .mcap or .db3 file, compressed or not).

    Raises ContractError when it is missing, damaged or truncated, also while messages are being read.
    """
    path = Path(path)
    if not path.exists():
        raise ContractError(f"{path}: no such bag; expected a rosbag2 folder or an .mcap or .db3 file")
    names = [item for item in sorted(path.iterdir()) if item.name[0] != "."] if path.is_dir() else [path]
    # Of a file and its compressed copy the former, which sorts first.
    by_name = {_plain(item).name: item for item in reversed(names) if _plain(item).suffix in (MCAP, SQLITE)}
    paths = sorted(by_name.values())
    if not paths:
        what = "a ROS 1 bag: convert it with rosbags-convert" if path.suffix == ".bag" else "no .mcap or .db3 file"
        raise ContractError(f"{path}: not a readable ROS 2 bag ({what})")
    counted, trouble = _metadata(path / _METADATA, paths) if path.is_dir() else ({}, ())
    with ExitStack() as stack:
        files = [stack.enter_context(open_file(_unpacked(item, stack))) for item in paths]
        yield Bag(path, files, counted, trouble)


def _unpacked(path: Path, stack: ExitStack) -> Path:
    """The file itself, or what a compressed one holds in a temporary folder that lasts as long as `stack`."""
    if path.suffix not in _PACKED:
        return path
    plain = Path(stack.enter_context(TemporaryDirectory(prefix="bag."))) / _plain(path).name
    unpack_file(path, plain)
    return plain


def _metadata(path: Path, found: list[Path]) -> tuple[dict[tuple[str, str], int], tuple[str, ...]]:
    """Messages by topic and type as metadata.yaml counts them, and what it says that the folder contradicts."""
    if not path.is_file():
        return {}, ()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))["rosbag2_bagfile_information"]
        counted: Counter[tuple[str, str]] = Counter()
        for item in content["topics_with_message_count"]:
            topic = item["topic_metadata"]
            counted[topic["name"], topic["type"]] += int(item["message_count"])
        named = {_plain(Path(name)).name for name in content["relative_file_paths"]}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        return {}, (f"{_METADATA} cannot be read ({' '.join(str(error).split())}): nobody knows what it counted",)
    missing = sorted(named - {_plain(item).name for item in found})
    return dict(counted), tuple(f"{_METADATA} names {name}, which is not there" for name in missing)


def resolve(topic: str, namespace: str = "") -> str:
    """The absolute name of a contract's topic under a namespace, as ROS resolves it."""
    return topic if topic.startswith("/") else f"/{namespace.strip('/')}/{topic}".replace("//", "/")


def contract_channels(bag: Bag, contract: Contract, namespace: str, instruction: str = "") -> dict[Channel, str]:
    """The bag's channels of the contract's topics, each with the contract's name of its topic.

    Other types on such a topic are no more read than the node receives them. With an `instruction` the bag need not
    hold one. Raises ContractError where the bag lacks a topic, or has it with another type only.
    """
    channels: dict[Channel, str] = {}
    missing, wrong = [], []
    for topic, kind in contract.input_types.items():
        name = resolve(topic, namespace)
        held = [channel for channel in bag.channels if channel.topic == name]
        fitting = [channel for channel in held if carries(channel, kind)]
        if held and not fitting:
            wrong.append(f"topic {name} is {held[0].type} ({held[0].encoding}), {contract.path} expects {kind} (cdr)")
        elif not held and not (instruction and topic == contract.instruction.topic):
            count = bag.counted.get((name, kind), 0)
            missing.append(f"{name} (although {_METADATA} counts {count} messages on it)" if count else name)
        channels |= dict.fromkeys(fitting, topic)
    if missing:
        others = ", ".join(sorted({channel.topic for channel in bag.channels})) or "nothing"
        what = "topics" if len(missing) > 1 else "topic"
        wrong.insert(0, f"no {what} {', '.join(missing)}, which {contract.path} asks for; the bag holds {others}")
    if wrong:
        hint = ""
        if resolve(contract.instruction.topic, namespace) in missing:
            hint = "; a bag that tells no task is read with an instruction given (--instruction)"
        raise ContractError(f"{bag.path}: {'; '.join(wrong)}{hint}")
    return channels


def count_messages(path: Path | str, contract: Contract, namespace: str = "") -> dict[str, int]:
    """Checks that the bag fits the contract, and counts the messages on each of its topics."""
    with open_bag(path) as bag:
        channels = contract_channels(bag, contract, namespace)
        counts = Counter(channels[message.channel] for message in bag.messages(channels))
        return {topic: counts[topic] for topic in channels.values()}


def read_events(
    path: Path | str, contract: Contract, namespace: str = "", instruction: str = ""
) -> Iterator[Event | Dropped]:
    """The bag's messages in recorded order; a message that must not be used comes as a `Dropped`.

    So does every message that metadata.yaml counts and no file holds, at the end. `instruction`: see `read_frames`.
    """
    with open_bag(path) as bag:
        channels = contract_channels(bag, contract, namespace, instruction)
        for detail in bag.trouble:
            yield Dropped(_METADATA, 0, DropReason.NOT_IN_THE_BAG, detail)
        read: Counter[str] = Counter()
        for message in bag.messages(channels):
            topic = channels[message.channel]
            read[topic] += 1
            try:
                yield from to_events(contract, topic, bag.decode(message), message.time_ns)
            except DataError as error:
                yield Dropped(topic, message.time_ns, DropReason.INVALID_MESSAGE, str(error))
        for topic, kind in contract.input_types.items():
            counted = bag.counted.get((resolve(topic, namespace), kind), 0)
            detail = f"{_METADATA} counts {counted} messages, the files hold {read[topic]}"
            for _ in range(counted - read[topic]):
                yield Dropped(topic, 0, DropReason.NOT_IN_THE_BAG, detail)


def read_frames(
    path: Path | str, contract: Contract, namespace: str = "", instruction: str = ""
) -> Iterator[Frame | Dropped]:
    """Every frame of the bag exactly once, and every message or frame that could not be used with its reason.

    instruction: the task of the frames before the first one that the bag holds.
    """
    synchroniser = Synchroniser(contract, instruction=instruction)
    for event in read_events(path, contract, namespace, instruction):
        yield from synchroniser.offer(event)
    yield from synchroniser.flush()
