"""Runs an example end to end, on tiny models and files."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_example(name, output, apart=False, **options):
    """Run an example with `--key value` options; its results.json.

    Apart is in a process of its own: where one forks, as for the workers of a data loader, no thread of the tests runs.
    """
    argv = ["--output_dir", str(output)]
    quiet = {"max_steps": 3, "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_steps": 2}
    for key, value in {**quiet, **options}.items():
        argv += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    if apart:
        subprocess.run([sys.executable, EXAMPLES / f"{name}.py", *argv], check=True)
    else:
        load_example(name).main(argv)
    return json.loads((Path(output) / "results.json").read_text())
