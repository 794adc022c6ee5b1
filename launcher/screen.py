"""The last screen of a command that failed: what, where, why, and what to do now."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from shoal.configs.errors import ShoalError, StoppedOnRequest, explain_machine_error


def guard(work: Callable[[], None]) -> int:
    """Do `work` and return the exit code, after one screen on stderr if it failed."""
    try:
        work()
    except ShoalError as error:
        show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped; nothing was left half-written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stderr.close()
        return 1
    except Exception as error:
        machine = explain_machine_error(error)
        if machine is None:
            show_bug(error)
            return 1
        show_error(machine)
        return machine.exit_code
    return 0


def show_error(error: ShoalError) -> None:
    """Print a deliberate error: its text, then its notes (rank, newest checkpoint)."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    stopped = isinstance(error, StoppedOnRequest)
    head = Text("stopped: " if stopped else "error: ", style="bold" if stopped else "bold red")
    if error.where:
        head.append(f"{error.where}: ", style="cyan")
    head.append(error.cause, style="not bold default")
    console.print(head)
    for note in getattr(error, "__notes__", ()):
        console.print(Text(f"  {note}", style="dim" if "\n" in note else ""))
    if error.fix:
        console.print(
            Text("  fix: ", style="bold green").append(error.fix, style="not bold default")
        )


def show_bug(error: BaseException) -> None:
    """Print an error nobody planned: the traceback first, its meaning last, where eyes end up."""
    traceback.print_exception(error, file=sys.stderr)
    print(
        f"error: {type(error).__name__}: {error}\n"
        "  this is a bug in Shoal or a library it uses; the traceback above says where",
        file=sys.stderr,
    )


def newest_checkpoint_note(run: Path) -> str:
    """Return a line that says where the newest checkpoint of a run is, judging by names alone."""
    found = newest_checkpoint(run)
    if not found:
        return f"newest checkpoint: none yet in {run}"
    return f"newest checkpoint: {found} (the same command continues from there)"


def newest_checkpoint(run: Path) -> str | None:
    """Return the folder or address of a run's newest checkpoint, judging by names alone."""
    found = sorted(run.glob(f"checkpoints/step-{8 * '[0-9]'}/manifest.json"))
    here = str(found[-1].parent) if found else ""
    note = run / "checkpoints" / ".elsewhere"  # in object storage
    there = note.read_text(encoding="utf-8") if note.is_file() else ""
    return max(here, there, key=lambda path: path.rpartition("/")[2]) or None
