"""Build the page for semantic search as static files, and serve it on this machine.

    python examples/browser/build.py --serve

The model is a student of `make demo`, or any sentence encoder in a folder, exported for ONNX Runtime in int8. The
runtime and the tokenizer come from npm. The output can be put on any static web server.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mimetypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kronecker_transformers.checkpoint.files import check_new_folder, new_folder
from kronecker_transformers.checkpoint.load import load_model
from kronecker_transformers.checkpoint.pooling import Pooling
from kronecker_transformers.checkpoint.sentence_modules import encoder_settings
from kronecker_transformers.export.onnx import export_onnx
from kronecker_transformers.export.parity import FORMS
from kronecker_transformers.models.kronecker_family import heads_of, longest_sequence

SOURCE = Path(__file__).parent
PAGE = (
    "index.html", "style.css", "icon.svg", "app.js", "example.js", "sentences.js", "worker.js", "encoder.js", "sw.js",
)  # fmt: skip
PACKAGES = {
    "onnxruntime-web@1.30.0": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
    "@huggingface/tokenizers@0.2.0": ("tokenizers.min.mjs",),
}
MODEL = (FORMS["int8"], "config.json", "tokenizer.json", "tokenizer_config.json")
STUDENT = Path("demo_output") / "kronecker-minilm-7.7x"


def vendor(folder: Path) -> None:
    """Fetch the files of the packages, without running what they would run when they are installed.

    Raises:
        OSError: there is no npm, or it failed.
    """
    if (npm := shutil.which("npm")) is None:
        raise OSError("npm was not found; install Node.js")
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "install", "--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund", *PACKAGES]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"npm could not install {', '.join(PACKAGES)}: {done.stderr.strip()[-500:]}")
        folder.mkdir()
        for package, names in PACKAGES.items():
            for name in names:
                shutil.copy(Path(scratch) / "node_modules" / package.rpartition("@")[0] / "dist" / name, folder)


def load_encoder(student: str) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer, and how a text becomes a vector, for `encoder.js`.

    Raises:
        ValueError: it is no sentence encoder, or one that the page does not compute.
        OSError: it cannot be read.
    """
    model, tokenizer = load_model(student)
    if heads_of(model):
        raise ValueError(f"{student} is a {type(model).__name__}; the page needs a sentence encoder, without a head")
    if tokenizer is None:
        raise ValueError(f"{student} has no tokenizer; save that of the model in the same folder")
    settings = encoder_settings(model, tokenizer)
    if settings.pooling not in (Pooling(("mean",)), Pooling(("cls",))) or not settings.normalize:
        raise ValueError(
            f"{student} has {settings.pooling}, normalize={settings.normalize}; the page takes the mean of the tokens "
            "or the first of them, at length 1"
        )
    longest = longest_sequence(model)
    length = min(longest, settings.max_length or longest)
    return model, tokenizer, {"pooling": settings.pooling.modes[0], "prompt": settings.prompt, "max_length": length}


def export_model(model: Any, tokenizer: Any, settings: dict[str, Any], folder: Path) -> None:
    """What of the exported model the page reads."""
    with tempfile.TemporaryDirectory() as scratch:
        export_onnx(model, tokenizer, made := Path(scratch) / "model", also=["int8"])
        for name in MODEL:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made / name, folder / name)
    (folder / "encoder.json").write_text(json.dumps(settings), encoding="utf-8")


def build(student: str, output: Path) -> None:
    """Write all files, or none.

    Raises:
        ValueError, OSError: as `load_encoder` and `vendor`; or the output exists.
    """
    check_new_folder(output)
    encoder = load_encoder(student)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        vendor(made / "vendor")
        export_model(*encoder, made / "model")
        for name in PAGE:
            shutil.copy(SOURCE / name, made)
        files = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
        digest = hashlib.sha256(b"".join((made / name).read_bytes() for name in files)).hexdigest()
        assets = {"version": digest[:16], "files": ["./", *files]}
        (made / "assets.js").write_text(f"self.ASSETS = {json.dumps(assets, indent=1)};\n", encoding="utf-8")
        with new_folder(output) as draft:
            shutil.copytree(made, draft, dirs_exist_ok=True)


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server for this machine alone.

    Args:
        folder: of the files.
        port: 0 for any that is free.
    """
    for ending, kind in ((".mjs", "text/javascript"), (".js", "text/javascript"), (".wasm", "application/wasm")):
        mimetypes.add_type(kind, ending)
    return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing of each request."""


def main(argv: Sequence[str] | None = None) -> None:
    """Build what is missing, and serve it if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--student", default=str(STUDENT), help="a sentence encoder (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("browser_output"), help="folder (default: %(default)s)")
    parser.add_argument("--serve", action="store_true", help="serve it; it is built only if the folder is not there")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    options = parser.parse_args(argv)
    if not (options.serve and options.output.exists()):
        build(options.student, options.output)
        print(f"Built in {options.output}.")
    if options.serve:
        with server(options.output, options.port) as running:
            print(f"http://127.0.0.1:{running.server_port} (Ctrl+C ends it)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                running.serve_forever()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
