"""A reader of pickles that can make lists, tuples, dictionaries, texts and numbers, and nothing else.

It never loads a name, calls or builds anything: an opcode that would is refused. A list of millions of elements
is handed on element by element, and what is remembered meanwhile is bounded.
"""

import io
import pickletools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Final

from crystallm_jax.data.reading.streams import DAMAGE, LARGEST_TEXT, one_line
from crystallm_jax.errors import DataError

MOST_WAITING = 512 * 2**20
"""Bytes, roughly, of values that wait to become an element; a writer joins a thousand elements at a time."""

MOST_SHARED = 1_000_000
"""Values that may be used more than once: the published files have hardly any."""

_OBJECT_BYTES = 64

_SCALARS: Final = frozenset(
    {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
)
_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: Final[dict[str, Callable[[], Any]]] = {
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS: Final = frozenset({"GET", "BINGET", "LONG_BINGET"})
_MARKED: Final = frozenset({"LIST", "TUPLE", "DICT", "APPENDS", "SETITEMS"})
_SILENT: Final = frozenset({"PROTO", "FRAME", "STOP"})
_KNOWN: Final = (
    _SCALARS
    | _CONSTANTS.keys()
    | _EMPTY.keys()
    | _TUPLES.keys()
    | _PUTS
    | _GETS
    | _MARKED
    | _SILENT
    | {"MARK", "MEMOIZE", "APPEND", "SETITEM"}
)
_OPCODES: Final[dict[bytes, Any]] = {op.code.encode("latin-1"): op for op in pickletools.opcodes}
# Of anything nested a hash would recurse.
_KEYS: Final = frozenset({str, int, float, bytes, bool, type(None)})


def iterate_list(open_stream: Callable[[], BinaryIO], place: object) -> Iterator[Any]:
    """Yield the elements of a pickled list as they are complete.

    The file is read twice: first to learn which values are used again, since a pickle numbers every one of
    them and only those few can be kept; then to make the elements.

    Args:
        open_stream: opens the pickle, unpacked, at its beginning.
        place: what errors call it.

    Raises:
        DataError: not a pickled list, cut short, or holding more than plain values; where the second reading
            is the first to see it, while elements are read.
    """
    with open_stream() as stream:
        shared = _shared_numbers(stream, place)
    return _elements(open_stream, shared, place=place)


def read_value(stream: BinaryIO, place: object, *, limit: int = 2**20) -> Any:
    """Read a whole small pickle of plain containers and scalars.

    Args:
        stream: the pickle, unpacked.
        place: what errors call it.
        limit: bytes that it may have.

    Raises:
        DataError: larger, damaged, or holding more than plain values.
    """
    data = read_whole(stream, place, limit=limit)
    machine = _Machine(_shared_numbers(io.BytesIO(data), place), place)
    for name, argument in _opcodes(io.BytesIO(data), place):
        machine.step(name, argument)
    return machine.result()


def read_whole(stream: BinaryIO, place: object, *, limit: int) -> bytes:
    """The bytes of a stream.

    Raises:
        DataError: broken, or more than `limit`.
    """
    try:
        data = stream.read(limit + 1)
    except DAMAGE as error:
        raise refusal(place, one_line(error)) from error
    if len(data) > limit:
        raise refusal(place, f"it is larger than {limit:,} bytes")
    return data


class _Bounded:
    """What the readers of `pickletools` use of a stream, with a bound on every length."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, count: int) -> bytes:
        if count > LARGEST_TEXT:
            raise ValueError(f"it claims a value of {count:,} bytes, at most {LARGEST_TEXT:,} are taken")
        return self._stream.read(count)

    def readline(self) -> bytes:
        line = self._stream.readline(LARGEST_TEXT + 1)
        if len(line) > LARGEST_TEXT:
            raise ValueError(f"it has a line of over {LARGEST_TEXT:,} bytes")
        return line


def _opcodes(stream: BinaryIO, place: object) -> Iterator[tuple[str, Any]]:
    """(name, argument) of each opcode up to the end of the file.

    Raises:
        DataError: an opcode that is not known here, a pickle that is damaged or not the last thing in its file.
    """
    source, texts = _Bounded(stream), ("", "")
    try:
        name = ""
        while name != "STOP":
            code = source.read(1)
            opcode = _OPCODES.get(code)
            name = _unknown(code) if opcode is None else opcode.name
            if opcode is None or name not in _KNOWN:
                raise refusal(place, _wish(name, source, texts))
            argument = None if opcode.arg is None else opcode.arg.reader(source)
            if isinstance(argument, str):
                texts = (texts[1], argument)
            yield name, argument
        # Reading on to the end lets a compressed file compare its checksum.
        if stream.read(1):
            raise refusal(place, "something follows the pickle")
    except (ValueError, *DAMAGE) as error:
        if isinstance(error, DataError):
            raise
        raise refusal(place, one_line(error)[:200]) from error


def _unknown(code: bytes) -> str:
    if not code:
        raise ValueError("it ends before its value does")
    return f"the unknown opcode {code[0]:#x}"


def _wish(opcode: str, source: "_Bounded", texts: tuple[str, str]) -> str:
    """What a refused opcode asks for, with the name where it has one."""
    wanted: tuple[str, ...] = texts if opcode == "STACK_GLOBAL" else ()
    if opcode in {"GLOBAL", "INST"}:
        wanted = tuple(source.readline().strip().decode("utf-8", "replace") for _ in range(2))
    named = f"{'.'.join(wanted)[:100]!r} ({opcode})" if wanted else opcode
    return f"it wants {named}, which plain lists and texts have no need of"


def refusal(place: object, reason: str) -> DataError:
    """The error for a pickle that is not taken."""
    return DataError(f"{place}: refused as a pickle ({reason}): get the file from where it was published")


def _shared_numbers(stream: BinaryIO, place: object) -> frozenset[int]:
    """The numbers of the values that are used again."""
    shared: set[int] = set()
    for name, argument in _opcodes(stream, place):
        if name in _GETS:
            shared.add(argument)
            if len(shared) > MOST_SHARED:
                raise refusal(place, f"it uses over {MOST_SHARED:,} values more than once")
    return frozenset(shared)


def _elements(open_stream: Callable[[], BinaryIO], shared: frozenset[int], *, place: object) -> Iterator[Any]:
    with open_stream() as stream:
        machine = _ListMachine(shared, place)
        for name, argument in _opcodes(stream, place):
            machine.step(name, argument)
            if machine.complete:
                yield from machine.take()
        machine.result()


class _Machine:
    """The stack on which a pickle builds its value."""

    def __init__(self, shared: frozenset[int], place: object) -> None:
        self._shared = shared
        self._place = place
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._memoized = self._numbered = 0
        self._waiting = 0
        self._kept = 0
        # Lists and dictionaries that are used again stay reachable with all that is put into them later.
        self._keeps_open = False

    def step(self, name: str, argument: Any) -> None:
        """Do what one opcode says.

        Raises:
            DataError: where the stack does not hold what it needs.
        """
        if name in _SCALARS:
            self._push(argument, len(argument) if isinstance(argument, (str, bytes)) else 0)
        elif name == "MEMOIZE":
            self._put(self._memoized)
            self._memoized += 1
        elif name in _TUPLES:
            self._push(tuple(self._pop(_TUPLES[name])))
        elif name in _PUTS:
            self._put(argument)
            self._numbered += 1
        elif name in _GETS:
            self._get(argument)
        elif name == "MARK":
            self._marks.append(len(self._stack))
            self._charge(0)
        elif name in _EMPTY:
            self._push(_EMPTY[name]())
        elif name in _CONSTANTS:
            self._push(_CONSTANTS[name])
        elif name not in _SILENT:
            self._join(
                name, self._pop_to_mark() if name in _MARKED else self._pop(2 if name == "SETITEM" else 1)
            )

    def _join(self, name: str, values: list[Any]) -> None:
        """Put values together, or into the container that lies under them."""
        if name == "LIST":
            self._push(values)
        elif name == "TUPLE":
            self._push(tuple(values))
        elif name == "DICT":
            self._push({})
            self._set_items(values)
        elif name in {"APPEND", "APPENDS"}:
            self._extend(values)
        else:
            self._set_items(values)

    def result(self) -> Any:
        """The value that was built.

        Raises:
            DataError: something is left beside it.
        """
        if len(self._stack) != 1 or self._marks:
            raise self._bad("it ends with an unfinished value")
        return self._stack[0]

    def _bad(self, reason: str) -> DataError:
        return refusal(self._place, reason)

    def _charge(self, size: int) -> None:
        self._waiting += size + _OBJECT_BYTES
        if self._waiting + self._kept > MOST_WAITING:
            raise self._bad(f"a value in it takes over {MOST_WAITING // 2**20} MiB")

    def _push(self, value: Any, size: int = 0) -> None:
        self._charge(size)
        self._stack.append(value)

    def _pop(self, count: int) -> list[Any]:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) - count < floor:
            raise self._bad("it takes more values than there are")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise self._bad("it has an end without a beginning (no MARK)")
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _top(self, kind: type) -> Any:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) <= floor or type(self._stack[-1]) is not kind:
            raise self._bad(f"it puts values into what is no {kind.__name__}")
        return self._stack[-1]

    def _extend(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target, keys = self._top(dict), values[::2]
        if len(values) % 2 or any(type(key) not in _KEYS for key in keys):
            raise self._bad("it has a dictionary with a key that is no text or number")
        target.update(zip(keys, values[1::2], strict=True))

    def _put(self, number: int) -> None:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) <= floor:
            raise self._bad("it numbers a value that is not there")
        if self._memoized and self._numbered:
            raise self._bad("it numbers its values in two ways")
        if number in self._shared:
            self._remember(number, self._stack[-1])

    def _remember(self, number: int, value: Any) -> None:
        parts = value if type(value) is tuple else (value,)
        self._keeps_open = self._keeps_open or any(type(part) in {list, tuple, dict} for part in parts)
        self._kept += (
            sum(len(part) if isinstance(part, (str, bytes)) else 0 for part in parts) + _OBJECT_BYTES
        )
        self._memo[number] = value

    def _get(self, number: int) -> None:
        if number not in self._memo:
            raise self._bad(f"it uses value {number}, which is not there")
        self._push(self._memo[number])


class _ListMachine(_Machine):
    """A machine that hands on the elements of the outermost list when they are complete."""

    def __init__(self, shared: frozenset[int], place: object) -> None:
        super().__init__(shared, place)
        self._outer: list[Any] | None = None
        self.complete: list[Any] = []

    def take(self) -> list[Any]:
        """The elements that are complete since the last call."""
        taken, self.complete = self.complete, []
        return taken

    def result(self) -> Any:
        """The outermost list, which is empty by now."""
        if super().result() is not self._outer:
            raise self._bad("it is no list")
        return self._outer

    def _push(self, value: Any, size: int = 0) -> None:
        if not self._stack and not self._marks:
            if type(value) is not list or self._outer is not None:
                raise self._bad(f"it is no list but {type(value).__name__}")
            self.complete, self._outer = value, []
            value = self._outer
        elif self._outer is not None and value is self._outer:
            raise self._bad("it is a list that holds itself")
        super()._push(value, size)

    def _extend(self, values: list[Any]) -> None:
        if self._top(list) is not self._outer:
            super()._extend(values)
            return
        self.complete.extend(values)
        if not self._keeps_open:
            self._waiting = 0
