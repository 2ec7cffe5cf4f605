"""What the experiments share: tables, settings by name.

An experiment imports this module before the others of this repository, whose folders it puts on the path.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import diffem  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict:
    """What a figure depends on besides the code."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else None
    device = dict(cpu=(names or [platform.processor()])[0], cores=os.cpu_count(), gpu=gpu)
    versions = dict(torch=torch.__version__, python=platform.python_version(), date=time.strftime("%Y-%m-%d"))
    return device | dict(threads=torch.get_num_threads()) | versions


def table(title: str, rows: list[dict], settings: dict) -> None:
    """Prints rows as Markdown, and appends them to results.jsonl with the settings and the machine."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = [[row.get(name, "") for name in names] for row in rows]
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in values]
    print(f"\n**{title}** ({', '.join(f'{key} {value}' for key, value in machine().items() if value)})\n")
    for line in [names, ["---"] * len(names), *cells]:
        print("| " + " | ".join(line) + " |")
    settings = {name: value for name, value in settings.items() if name != "data_dir"}
    with open("results.jsonl", "a") as file:
        file.write(json.dumps(dict(title=title, settings=settings, machine=machine(), rows=rows)) + "\n")


def show(row: dict) -> None:
    """Prints a row at once to standard error: a long experiment that is stopped then leaves something."""
    print(json.dumps(row), file=sys.stderr, flush=True)


def parse(doc: str, **flags) -> argparse.Namespace:
    """The command line: a flag for each default, of several values if it is a list; and --settings."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in flags.items():
        own = dict(default=default, help=f"default: {default}")
        if isinstance(default, list):
            own |= dict(nargs="*", type=type(default[0]))
        else:
            own |= dict(action="store_true") if default is False else dict(type=type(default))
        parser.add_argument("--" + name.replace("_", "-"), **own)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, on top of the preset's")
    return parser.parse_args()


def named_corruption(text: str) -> diffem.Corruption:
    """Of "mask 0.5": a name and its arguments."""
    kind, *numbers = text.split()
    return diffem.CORRUPTIONS[kind](*(float(n) if "." in n else int(n) for n in numbers))


def preset(dataset: str, corruption: str, **settings) -> diffem.Settings:
    """The small preset of a data set, as the command line takes it for a named corruption."""
    own = dict(dataset=dataset) | settings
    return diffem.Settings(**diffem.preset(dataset, "small", diffem.CORRUPTIONS[corruption.split()[0]], own))
