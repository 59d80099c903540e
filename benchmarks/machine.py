"""What a figure was measured on, printed above it."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path


def describe(*packages: str) -> str:
    """Processor, cores, Python, package versions and the command, as Markdown lines."""
    model = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open() as cpuinfo:
            model = next(line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    command = " ".join(["python -m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]])
    return f"- machine: {model}, {os.cpu_count()} cores\n- Python {platform.python_version()}, {versions}\n- command: `{command}`\n"
