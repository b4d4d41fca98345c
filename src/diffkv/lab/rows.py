"""One row for each thing that was measured, and one file format: a JSON object a line.

    {"kind": "attention", "case": {"ctx": 1024, ...}, "measured": {"ms": 0.12, ...}, "provenance": {...}}

`case` is what was asked, and tells a row from all others of its kind; `measured` is what was found.
A row whose case did not run has the reason in `error` instead.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffkv.lab.provenance import Provenance
from diffkv.quant import ConfigError

__all__ = ["Row", "Writer", "read"]


@dataclass(frozen=True)
class Row:
    """One measurement, which can be read on its own. `row[name]` finds a name in case or measured.

    Attributes:
        kind: what it is a measurement of: "attention", "throughput", ...
        case: settings.
        measured: figures; no name of `case` is among them.
        provenance: where the figures come from.
        error: why there are none.
    """

    kind: str
    case: dict[str, Any]
    measured: dict[str, Any]
    provenance: Provenance
    error: str | None = None

    def __post_init__(self) -> None:
        """Refuse a name that would have two values."""
        if twice := self.case.keys() & self.measured.keys():
            raise ValueError(f"{min(twice)} is both in case and in measured")

    def __getitem__(self, name: str) -> Any:
        """A setting or figure.

        Raises:
            ConfigError: the row, which a file may hold, has none of that name.
        """
        for values in (self.case, self.measured):
            if name in values:
                return values[name]
        raise ConfigError(f"a row of kind {self.kind} has no {name}")

    def get(self, name: str, default: Any = None) -> Any:
        """A setting or figure, or a default if the row has none of that name."""
        return self.case.get(name, self.measured.get(name, default))

    def to_json(self) -> str:
        """One line, without its end.

        Raises:
            ValueError: a figure is infinite or no number.
        """
        error = {} if self.error is None else {"error": self.error}
        values = {"kind": self.kind, "case": self.case, "measured": self.measured, **error}
        return json.dumps({**values, "provenance": self.provenance.to_json()}, allow_nan=False)

    @classmethod
    def parse(cls, line: str) -> "Row":
        """Read what `to_json` gave.

        Raises:
            ValueError: it is something else; says what.
        """
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError(f"a row must be an object, got {type(values).__name__}")
        kinds = {"kind": str, "case": dict, "measured": dict, "provenance": dict, "error": str}
        if unknown := values.keys() - kinds.keys():
            raise ValueError(f"a row has no field {min(unknown)}: there are {', '.join(kinds)}")
        for name, kind in kinds.items():
            if name not in values and name != "error":
                raise ValueError(f"a row lacks {name}")
            if name in values and not isinstance(values[name], kind):
                raise ValueError(f"{name} must be {kind.__name__}, got {values[name]!r}")
        return cls(**{**values, "provenance": Provenance.parse(values["provenance"])})


def read(path: Path) -> list[Row]:
    """All rows of a file.

    Raises:
        ConfigError: the file cannot be read, or a line is no row; names the line.
    """
    try:
        return _parse(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def _parse(text: str, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(Row.parse(line))
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
    return rows


class Writer:
    """Keeps rows, appends each to a file and prints it as it comes.

    Args:
        provenance: goes with every row.
        out: file; None for none. What it holds is lost unless `resume`.
        as_json: print rows as JSON lines; otherwise the text that comes with them.
        resume: go on with the rows of `out`; `find` then knows them. A last line that was cut off while
            it was written is removed.

    Attributes:
        rows: all so far, resumed ones first.

    Raises:
        ConfigError: the file cannot be written, or holds something else.
    """

    def __init__(
        self,
        provenance: Provenance,
        out: Path | None = None,
        as_json: bool = False,
        resume: bool = False,
    ) -> None:
        self.rows: list[Row] = []
        self._provenance = provenance
        self._out = out
        self._as_json = as_json
        if out is not None:
            try:
                text = out.read_text(encoding="utf-8") if resume and out.exists() else ""
                text = text[: text.rfind("\n") + 1]
                self.rows = _parse(text, out)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(text, encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"cannot write to {out}: {error}") from None
        self._found = {_key(row.kind, row.case): row for row in self.rows if row.error is None}

    def find(self, kind: str, case: dict[str, Any]) -> Row | None:
        """The row of a case, if there is one already; one that failed does not count."""
        return self._found.get(_key(kind, case))

    def add(
        self,
        kind: str,
        case: dict[str, Any],
        measured: dict[str, Any],
        text: str | Callable[[Row], str] | None = None,
        error: str | None = None,
    ) -> Row:
        """Keep a row.

        Args:
            kind: kind of the row.
            case: settings.
            measured: figures.
            text: what a reader is shown of it, or what says so of a row; nothing if None.
            error: why there are no figures.
        """
        row = Row(kind, case, measured, self._provenance, error)
        line = row.to_json()
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        self.rows.append(row)
        if error is None:
            self._found[_key(kind, case)] = row
        shown = line if self._as_json else text(row) if callable(text) else text
        if shown is not None:
            print(shown, flush=True)
        return row

    def note(self, text: str) -> None:
        """Say something that is no row, where it does not disturb JSON lines."""
        print(text, file=sys.stderr if self._as_json else sys.stdout, flush=True)


def _key(kind: str, case: dict[str, Any]) -> str:
    """A case as JSON has it, whatever its order."""
    return json.dumps([kind, case], sort_keys=True)
