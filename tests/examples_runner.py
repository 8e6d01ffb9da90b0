"""Runs an example end to end in this process, on tiny models and files."""

import importlib.util
import json
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_example(name, output, **options):
    """Run an example with `--key value` options; its results.json."""
    argv = ["--output_dir", str(output)]
    quiet = {"max_steps": 3, "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_steps": 2}
    for key, value in {**quiet, **options}.items():
        argv += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    load_example(name).main(argv)
    return json.loads((Path(output) / "results.json").read_text())
