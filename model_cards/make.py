"""Make the card of the demo's model, from the model that was made: `python model_cards/make.py`, after `make demo`."""

from __future__ import annotations

import sys
from pathlib import Path

from kronecker_transformers.checkpoint.files import write_text
from kronecker_transformers.hub.card import model_card
from kronecker_transformers.hub.files import RESULTS_FILE, without_local_paths

HERE = Path(__file__).parent
DEMO = HERE.parent / "demo_output" / "kronecker-minilm-7.7x"
TEACHER = "sentence-transformers/all-MiniLM-L6-v2"


def main() -> None:
    """Write the card and, beside it, the record that its figures come from."""
    if not DEMO.is_dir():
        sys.exit(f"{DEMO} does not exist; run make demo first")
    (HERE / "records").mkdir(exist_ok=True)
    record = without_local_paths(DEMO / RESULTS_FILE).decode()
    write_text(HERE / "records" / f"{DEMO.name}.json", record)
    write_text(HERE / f"{DEMO.name}.md", str(model_card(DEMO, f"your-name/{DEMO.name}", base_model=TEACHER)))


if __name__ == "__main__":
    main()
