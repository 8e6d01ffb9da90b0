"""Make the cards of this folder from the models that were made.

    python model_cards/make.py                              # the demo's, after `make demo`
    python model_cards/make.py FOLDER kronecker-mpnet-7.7x  # a student of benchmarks/base.py

Beside each card lies the record that its figures come from; pictures are left out.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from kronecker_transformers.checkpoint.files import write_text
from kronecker_transformers.hub.card import model_card
from kronecker_transformers.hub.files import RESULTS_FILE, without_local_paths

HERE = Path(__file__).parent
DEMO = HERE.parent / "demo_output" / "kronecker-minilm-7.7x"


def main() -> None:
    """Write the card and, beside it, the record."""
    parser = argparse.ArgumentParser(description="Make a card of this folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=DEMO, help="of the student (default: the demo's)")
    parser.add_argument("name", nargs="?", help="of the model (default: that of the folder)")
    options = parser.parse_args()
    name = options.name or options.folder.resolve().name
    if not options.folder.is_dir():
        parser.error(f"{str(options.folder)!r} does not exist; make the student first")
    (HERE / "records").mkdir(exist_ok=True)
    record = without_local_paths(options.folder / RESULTS_FILE).decode()
    write_text(HERE / "records" / f"{name}.json", record)
    card = str(model_card(options.folder, f"your-name/{name}"))
    write_text(HERE / f"{name}.md", re.sub(r"!\[.*\]\(.*\.png\)\n\n", "", card))


if __name__ == "__main__":
    main()
