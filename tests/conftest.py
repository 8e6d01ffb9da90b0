import os

# Before any import of transformers: the default tests never touch the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any import of triton: its kernels run as Python

torch.set_num_threads(1)  # the models are tiny: a second thread would only wait, for long where the machine is shared


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
