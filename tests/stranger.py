"""A process that has a checkpoint but not this package."""

import os
import subprocess
import sys
import textwrap

SHARED_CODE = {
    "configuration_kronecker.py",
    "factor_plan.py",
    "kronecker_contraction.py",
    "kronecker_embeddings.py",
    "kronecker_family.py",
    "kronecker_internals.py",
    "kronecker_layers.py",
    "kronecker_matching.py",
    "kronecker_nearest.py",
    "modeling_kronecker.py",
}


def code_of(family):
    """The Python files that lie beside the weights of a model of a family."""
    names = {f"modeling_kronecker_{family.replace('-', '_')}.py"}
    if family in ("bert", "gpt2"):
        names.add(f"configuration_kronecker_{family}.py")
    if family != "gpt2":
        names |= {"kronecker_blocks.py", "kronecker_presets.py"}
    return names | SHARED_CODE


def run(code, *arguments, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", script, *map(str, arguments)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
