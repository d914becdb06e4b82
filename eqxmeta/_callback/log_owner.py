"""Whether a log that is found is of the run that goes on."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .._errors import explain, warn
from .run import Run

# In the state of a callback that writes a log: by what the log is known.
LOG = "log"
# All that such a state holds: also what must be in the log, for it to lack nothing.
LOG_TYPES = {
    LOG: str,
    "rows": int,
    "since": int,
    "every": int,
    "files": dict[str, dict[str, int]],
}


def is_foreign(
    run: Run, state: Mapping[str, Any] | None, found: Collection[str], *, log: Path, fate: str
) -> bool:
    """Whether a log is of another run than the one that goes on; then there is a warning.

    - `state`: what the run's checkpoint holds of the callback that asks; `None`: nothing, under the
      name that it has now.
    - `found`: by what the log that was found could be known.
    - `log`, `fate`: where it is, and what becomes of it.
    """
    if not _is_foreign(run, state, found):
        return False
    received = "other rows than that run has, or a checkpoint that was made without this log"
    expected = f"the log of the run that goes on from step {run.start}. {fate}"
    warn(explain(f"The log {log} is of another run.", received, expected))
    return True


def _is_foreign(run: Run, state: Mapping[str, Any] | None, found: Collection[str]) -> bool:
    if state is not None:
        known = state.get(LOG)
        return known is not None and bool(found) and known not in found
    if run.resumed_from is None:
        return True
    states = run.resumed_meta.get("callbacks", {}).values()
    return not any(state.get(LOG) in found for state in states)
