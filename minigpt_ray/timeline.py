"""Who did what when: timeline.json, in the trace format of Chrome, which Perfetto (https://ui.perfetto.dev) opens.

A role is a process of the trace, a rank a thread of it, the driver with its phases a process too. The file is a whole
JSON array after every step. Clocks of several machines count as equal.
"""

import json
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GAP_SECONDS = 0.005
"""Calls of the same name that follow each other so closely are drawn as one."""


@dataclass(frozen=True)
class Span:
    """Something that took time."""

    rank: int
    name: str
    start: float
    """In seconds since the epoch, as `stop`."""
    stop: float


@dataclass(frozen=True)
class Mark:
    """Something that happened at a moment: a restart, a worker that joined or left, a publication."""

    name: str
    time: float
    """In seconds since the epoch."""


class Timeline:
    """The file of one stage."""

    def __init__(self, path: Path, resumed: bool) -> None:
        """Goes on with the file where the run is `resumed`, else begins anew."""
        self.path = path
        self._named: set[str] = set()
        if not resumed:
            path.unlink(missing_ok=True)
        elif path.exists():
            self._cut_back()

    def add(self, role: str, spans: Iterable[Span] = (), marks: Iterable[Mark] = (), step: int = 0) -> None:
        """Append what a role did in a step."""
        process = zlib.crc32(role.encode()) % 10**6  # the same whenever the job is started again
        events = [_event(role, process, span, step) for span in joined(spans)]
        events += [{"ph": "i", "s": "g", "name": mark.name, "pid": process, "tid": 0, "ts": round(mark.time * 1e6)} for mark in marks]
        if events and role not in self._named:
            self._named.add(role)
            events.insert(0, {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": role}})
        self._append(events)

    def _append(self, events: list[dict[str, Any]]) -> None:
        """Write over the closing bracket, so that the file is whole again."""
        if not events:
            return
        text = ",\n".join(map(json.dumps, events)) + "]"
        if not self.path.exists():
            self.path.write_text("[" + text, encoding="utf-8")
            return
        with self.path.open("r+b") as file:
            file.seek(-1, 2)
            file.write(f",\n{text}".encode())

    def _cut_back(self) -> None:
        """End with the last whole event: the driver may have died, or the disk been full, in the middle of one. Each has a line of its own."""
        content = self.path.read_bytes()
        stop = len(content)
        while stop > 0:
            start = content.rfind(b"\n", 0, stop) + 1
            event = content[start:stop].rstrip(b",]")
            if _is_whole(event.removeprefix(b"[")):
                os.truncate(self.path, start + len(event))
                with self.path.open("ab") as file:
                    file.write(b"]")
                return
            stop = start - 1
        self.path.unlink()


def _is_whole(event: bytes) -> bool:
    try:
        return isinstance(json.loads(event), dict)
    except ValueError:
        return False


def joined(spans: Iterable[Span]) -> Iterator[Span]:
    """Spans of each rank in their order, those of one name that follow closely as one."""
    of_rank: dict[int, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.start):
        of_rank[span.rank].append(span)
    for rank, ordered in of_rank.items():
        current = ordered[0]
        for span in ordered[1:]:
            if span.name == current.name and span.start - current.stop < GAP_SECONDS:
                current = Span(rank, span.name, current.start, max(current.stop, span.stop))
            else:
                yield current
                current = span
        yield current


def _event(role: str, process: int, span: Span, step: int) -> dict[str, Any]:
    start = round(span.start * 1e6)
    return {
        "ph": "X",
        "name": span.name,
        "cat": role,
        "pid": process,
        "tid": span.rank,
        "ts": start,
        "dur": round(span.stop * 1e6) - start,
        "args": {"step": step},
    }
