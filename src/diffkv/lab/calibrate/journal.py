"""What was measured, kept beside the output, so that a run that was stopped goes on."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffkv.lab.calibrate.search import Measure, Part, Setting
from diffkv.quant import ConfigError
from diffkv.use import CacheUse

__all__ = ["PARTIAL", "Journal"]

PARTIAL = ".partial"
"""What its name adds to that of the output."""


class Journal:
    """A file of JSON lines: what the run is, then one line for each thing that it has found.

    Args:
        path: the file; made if it is not there.
        identity: everything that the findings depend on.

    Raises:
        ConfigError: the file is of another run, or cannot be read or written.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            rows = [json.loads(line) for line in text.split("\n")[:-1]]
            if not text.endswith("\n"):  # it was stopped in the middle of a line
                lines = rows or [identity]
                path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot keep findings in {path}: {error}") from None
        if rows and rows[0] != identity:
            differ = [key for key in identity if rows[0].get(key) != identity[key]]
            raise ConfigError(
                f"{path} is of another run (other {', '.join(differ) or 'fields'}): delete it, or "
                f"choose another --out"
            )
        self._found: dict[str, Any] = {row["key"]: row["found"] for row in rows[1:]}
        self.num_found = len(self._found)

    def get(self, key: str, find: Callable[[], Any]) -> Any:
        """What was found under a key, by an earlier run or by `find`, as JSON has it."""
        if key not in self._found:
            found = json.loads(json.dumps(find()))
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "found": found}) + "\n")
            self._found[key] = found
        return self._found[key]

    def kept(self, measure: Measure) -> Measure:
        """The same measure, that looks here first."""

        def look(setting: Setting, samples: range) -> Part:
            key = f"{setting} {samples.start}:{samples.stop}"
            found = self.get(key, lambda: asdict(measure(setting, samples)))
            return Part(tuple(found["losses"]), CacheUse(**found["use"]))

        return look

    def remove(self) -> None:
        """The run is complete."""
        self._path.unlink()
