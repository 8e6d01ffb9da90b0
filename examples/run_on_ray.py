"""Run a script of this folder on a Ray cluster, with Ray Train, as the launchers of docs/scaling.md do elsewhere.

    pip install 'ray[train]'
    python examples/run_on_ray.py --workers 2 run_embedding_kd --teacher path/to/encoder --train_text sentences.txt \
        --max_steps 1000 --output_dir /shared/encoder --resume_from_checkpoint true

Every worker is one process of the training, on a GPU or, with --cpu, on a CPU core. All machines need this package,
this folder and what the script reads and writes, at the same paths. When a worker or its machine dies, Ray starts the
workers again, and they go on from the newest whole checkpoint in the output folder.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work(command: dict[str, list[str]]) -> None:
    """What each worker does: the script itself, in the process group that Ray has made."""
    sys.path.insert(0, str(Path(__file__).parent))
    ((name, options),) = command.items()
    importlib.import_module(name).main(options)


def main(argv: list[str] | None = None) -> None:
    """Start the workers, and wait for them."""
    parser = argparse.ArgumentParser(description="A script of examples/ on a Ray cluster.")
    parser.add_argument("--workers", type=int, required=True, help="processes of the training")
    parser.add_argument("--cpu", action="store_true", help="workers have CPU cores, not GPUs")
    parser.add_argument("--max_failures", type=int, default=3, help="starts after an accident (default: %(default)s)")
    parser.add_argument("--storage", help="folder or address of Ray's own records (default: ~/ray_results)")
    scripts = sorted(path.stem for path in Path(__file__).parent.glob("run_*_kd.py"))
    parser.add_argument("script", choices=scripts, help="its name: %(choices)s", metavar="script")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the script")
    given = parser.parse_args(argv)
    if given.workers < 1 or given.max_failures < 0:
        parser.error(f"--workers {given.workers} must be at least 1, --max_failures {given.max_failures} at least 0")
    options = [*given.options, *(["--use_cpu"] if given.cpu else [])]
    TorchTrainer(
        work,
        train_loop_config={given.script: options},
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=not given.cpu),
        run_config=RunConfig(storage_path=given.storage, failure_config=FailureConfig(max_failures=given.max_failures)),
    ).fit()


if __name__ == "__main__":
    main()
