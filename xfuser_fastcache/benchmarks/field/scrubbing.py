"""Takes out of a report what is nobody's business: prompts, paths, names of hosts and users."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# An absolute path of two parts or more, also from a home or a drive; no part of a URL.
PATH = re.compile(r"(?<![\w/:.])(?:[A-Za-z]:|~\w*)?(?:[/\\]+[\w.@+%-]+){2,}[/\\]?")
ADDRESS = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")
# Longest string of a report, in characters.
LONGEST = 4000


class Scrubber:
    """Replaces in strings what must not be told.

    Args:
        secrets: texts, such as prompts, each with what stands in for it.

    Example:
        >>> Scrubber({"a red ring": "PROMPT"})({"reason": "no 'a red ring' in /home/me/x.png"})
        {'reason': "no 'PROMPT' in PATH"}
    """

    def __init__(self, secrets: dict[str, str]):
        # Longest first: one may hold another.
        self.secrets = sorted(secrets.items(), key=lambda pair: -len(pair[0]))

    @classmethod
    def of(cls, prompts: Iterable[str], paths: Iterable[str]) -> Scrubber:
        """Return one for prompts and paths, and for this machine's and user's names."""
        secrets = {**dict.fromkeys(paths, "PATH"), **dict.fromkeys(prompts, "PROMPT")}
        secrets[str(Path.home())] = "PATH"
        secrets[socket.gethostname()] = "HOST"
        try:
            secrets[getpass.getuser()] = "USER"
        except (KeyError, OSError):
            pass  # A container's user need not have a name.
        return cls({text: word for text, word in secrets.items() if len(text) > 2})

    def __call__(self, value: Any) -> Any:
        """Return a value of JSON with all its strings scrubbed; keys stay."""
        if isinstance(value, dict):
            return {key: self(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(entry) for entry in value]
        return self._text(value) if isinstance(value, str) else value

    def _text(self, text: str) -> str:
        for secret, word in self.secrets:
            # Whole words: a user called "dev" must not change "device".
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", word, text)
        text = ADDRESS.sub("ADDRESS", PATH.sub("PATH", text))
        return text if len(text) <= LONGEST else f"...{text[-LONGEST + 3 :]}"
