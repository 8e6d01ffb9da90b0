"""A factored student that several processes hold parts of learns as a whole one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "sharded.py"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_fsdp2(model, optimizer):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(SCRIPT), model, optimizer], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["parts"] > 0.9 * found["parameters"]  # all that have two rows
    whole, sharded = found["losses"]
    assert sharded == pytest.approx(whole, rel=1e-9)
    assert whole[-1] < whole[0]
    assert found["apart"] < 1e-6
