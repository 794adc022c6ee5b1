"""What it means that a machine gave no answer: the words of ssh and of shells, told apart."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

SSH_FAILED = 255


@dataclass(frozen=True)
class Refusal:
    """Why a machine cannot be used, and what its user has to do."""

    cause: str
    fix: str


# In this order: ssh says of a changed key that the verification failed, too.
WORDS_OF_SSH = {
    r"IDENTIFICATION HAS CHANGED": Refusal(
        "its host key is not the one in known_hosts",
        "if it was installed anew: `ssh-keygen -R {name}`, then `ssh {name}` by hand; if not, "
        "somebody may be between you",
    ),
    r"Host key verification failed|host key is known": Refusal(
        "its host key is not known here",
        "`ssh {name}` once by hand, compare the key it shows, and say yes",
    ),
    r"Permission denied|Too many authentication failures": Refusal(
        "it refuses our key",
        "`ssh-copy-id {name}`; a key with a passphrase must be in ssh-agent (`ssh-add`)",
    ),
    r"Could not resolve hostname": Refusal(
        "nobody here knows its name",
        "correct it in the hostfile, or add it to DNS, /etc/hosts or ~/.ssh/config",
    ),
    r"Connection refused": Refusal(
        "it is up, and no ssh server listens there",
        "start sshd there, or set its Port in ~/.ssh/config",
    ),
    r"No route to host|unreachable|timed out|Connection reset|Connection closed": Refusal(
        "cannot be reached",
        "is it on, and in this network? `ping {name}`; a firewall must let port 22 through",
    ),
}
WORDS_OF_SHELLS = {
    r"cd: ": Refusal("has no folder {folder}", "check it out or mount it there at the same path"),
    r"No module named|ModuleNotFoundError": Refusal(
        "its {python} has no Shoal", "`make install` there, from the same checkout"
    ),
    r"not found|No such file|Permission denied": Refusal(
        "has no {python}", "install the same environment there, at the same path: `make install`"
    ),
}
ANYTHING = "`ssh -o BatchMode=yes {name} true` must work from here, and {folder} and {python} must "
ANYTHING += "be there too"


def explain_refusal(name: str, words: str, code: int | None) -> Refusal:
    """Return what the last words of a way to a machine mean.

    Args:
        name: The machine.
        words: What ssh, or the shell it led to, printed.
        code: Its exit code; 255 is ssh's own failure. None: it did not end in time.
    """
    known = WORDS_OF_SSH if code == SSH_FAILED else WORDS_OF_SHELLS if code else {}
    last = (words.strip().splitlines() or ["no answer"])[-1]
    found = Refusal(last if code is None else f"{last} (exit code {code})", ANYTHING)
    for pattern, refusal in known.items():
        if re.search(pattern, words):
            found = Refusal(f"{refusal.cause} ({last})", refusal.fix)
            break
    facts = {"name": name, "folder": Path.cwd(), "python": sys.executable}
    # Not by str.format: the last line of a shell may hold braces.
    cause, fix = found.cause, found.fix
    for key, value in facts.items():
        cause, fix = (text.replace(f"{{{key}}}", str(value)) for text in (cause, fix))
    return Refusal(cause, fix)
