"""A factored student that several processes hold parts of learns as a whole one does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "sharded.py"


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ZERO_3 = {
    "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}  # fmt: skip
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_fsdp2(model, optimizer):
    done = subprocess.run(
        [*TORCHRUN, str(SCRIPT), model, optimizer], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["parts"] > 0.9 * found["parameters"]  # all that have two rows
    whole, sharded = found["losses"]
    assert sharded == pytest.approx(whole, rel=1e-9)
    assert whole[-1] < whole[0]
    assert found["apart"] < 1e-6


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("model", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_zero_3(model, tmp_path):
    """DeepSpeed divides every parameter; without the constant, Adam makes steps out of gradients that are zero."""
    found = {}
    for name, changes in {"whole": {"ddp_backend": "gloo"}, "divided": {"deepspeed": ZERO_3}}.items():
        arguments = {"model": model, "max_steps": 4, "per_device_train_batch_size": 4, "adam_epsilon": 1e-3, **changes}
        command = [*TORCHRUN, str(SCRIPT.with_name("distilling.py")), str(tmp_path / name), json.dumps(arguments)]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = torch.load(tmp_path / name / "result.pt", weights_only=True)
    whole, divided = found.values()
    assert divided["processes"] == 2
    assert whole["weights"].keys() == divided["weights"].keys()
    for key, weight in whole["weights"].items():
        torch.testing.assert_close(divided["weights"][key], weight, rtol=0, atol=1e-6, msg=lambda m, n=key: f"{n}: {m}")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("more", "message"), [
    ([], "stage 3 of ZeRO divides teacher and student"),
    (["--muon", "--factor_learning_rates", "true"], "muon=True needs whole factors"),
])  # fmt: skip
def test_what_cannot_be_divided_is_refused_at_once(more, message, tmp_path):
    (tmp_path / "zero.json").write_text(json.dumps(ZERO_3))
    options = ["--teacher", "none", "--train_text", "none", "--output_dir", "out", "--deepspeed", "zero.json"]
    script = Path(__file__).parents[2] / "examples" / "run_mlm_kd.py"
    command = [sys.executable, str(script), *options, "--use_cpu", *more]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
