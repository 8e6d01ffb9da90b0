"""A process that has a checkpoint but not this package."""

import os
import subprocess
import sys
import textwrap

FAMILY_CODE = {
    "bert": {"configuration_kronecker_bert.py", "kronecker_blocks.py", "modeling_kronecker_bert.py"},
    "gpt2": {"configuration_kronecker_gpt2.py", "modeling_kronecker_gpt2.py"},
}
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
    return FAMILY_CODE[family] | SHARED_CODE


def run(code, *arguments, tmp_path, input=None):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", script, *map(str, arguments)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, input=input, check=False,
    )  # fmt: skip
