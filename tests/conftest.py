import os
import sys

# Before any import of transformers: the default tests never touch the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples everywhere, and none refused because a machine was busy.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

torch.set_num_threads(1)  # the models are tiny: a second thread would only wait, for long where the machine is shared


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def full_precision(monkeypatch):
    """`distill` computes as on a machine without instructions for bfloat16, whatever this one has."""
    monkeypatch.setattr("kronecker_transformers.experiments.distill.multiplies_bfloat16", lambda: False)


@pytest.fixture
def waits(monkeypatch):
    """Seconds for which somebody would have slept."""
    found = []
    monkeypatch.setattr("time.sleep", found.append)
    return found


@pytest.fixture
def hub(monkeypatch, waits):
    """A hub on loopback, for this process."""
    from huggingface_hub import constants
    from loopback_hub import Hub

    with Hub(tokens=("hf_good",)) as hub:
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        # the Trainer switches progress bars on again after it has pushed
        monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # which would remember another hub
        yield hub
