"""Where the program is in what a generator wrote."""

import re

# An opening fence with an optional language, the text, and a closing fence or the end of it all
# (a generation may stop at its token limit before it closes the fence).
_FENCED = re.compile(
    r"^[ \t]*(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[\w+-]*)[^\n]*\n"
    r"(?P<body>.*?)(?:^[ \t]*(?P=fence)[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
_START = re.compile(r"^(?:import\s|from\s+[\w.]+\s+import\b|def\s+\w+\s*\(|@\w)", re.MULTILINE)
_PYTHON = ("", "python", "py", "python3")


def extract_program(text: str) -> str | None:
    """The last fenced block, else the text from the first import, from, def or decorator line.

    Reasoning before the program is welcome in either form. A fenced block in another language
    than Python is passed over. None where there is neither, or nothing but blanks inside.
    """
    text = text.replace("\r\n", "\n")
    blocks = [
        match["body"] for match in _FENCED.finditer(text) if match["language"].lower() in _PYTHON
    ]
    if blocks:
        return _tidy(blocks[-1])
    start = _START.search(text)
    return _tidy(text[start.start() :]) if start else None


def _tidy(program: str) -> str | None:
    """Without blank ends and trailing blanks, so that equal programs are equal text."""
    lines = [line.rstrip() for line in program.strip("\n").split("\n")]
    program = "\n".join(lines).strip("\n")
    return program + "\n" if program.strip() else None
