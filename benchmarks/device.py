"""Models in ONNX Runtime: factored ones beside the dense model in int8, which is what users take otherwise.

    python benchmarks/device.py --work /tmp/device --data ../shared/data | tee benchmarks/logs/device.txt

Every model is there in fp32, int8 and int4, as this package's `export_onnx` writes it; the dense one also as
transformers and ONNX Runtime themselves export and quantize it ("stock"). All take turns in one process, one thread;
median of the rounds in milliseconds. Ratios are to the dense model in PyTorch in fp32, and in int8, stock and ours;
above 1 the factored model is faster. The limit is the ratio to ours if the products of linear layers took no time.
MiniLM and BERT-base have random weights, which take the same time; their plans are the papers', a low rank of the same
size for all layers, and for MiniLM those that `plans.py` has searched. --section runs one section.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from common import low_rank_plan, probe
from onnx import TensorProto
from onnxruntime.quantization import quantize_dynamic
from operators import operators
from plans import TEACHER as MINILM
from plans import preset_modules
from scipy.stats import spearmanr
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers.exporters import OnnxConfig, OnnxExporter

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.load import load_model
from kronecker_transformers.compression.activations import calibration_batches
from kronecker_transformers.compression.candidates import influences, measured_layers, noise_to_signal
from kronecker_transformers.compression.estimates import best_choice
from kronecker_transformers.compression.latency import Runtime, latency_table
from kronecker_transformers.evaluation.sessions import session_memory, session_pass, share_of_products
from kronecker_transformers.evaluation.timing import environment, forward_pass, in_turn, median_and_spread
from kronecker_transformers.export.onnx import export_onnx, quietly
from kronecker_transformers.export.parity import FORMS, run
from kronecker_transformers.export.runtimes import open_session
from kronecker_transformers.models.kronecker_matching import selected_modules
from kronecker_transformers.tasks.glue import load_glue
from kronecker_transformers.tasks.sentences import encode

SHAPES = ((1, 16), (1, 128), (8, 128))
SIZES: dict[str, dict[str, int]] = {
    "BERT-base": {},
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
}
PYTORCH = "dense, PyTorch, fp32, eager"
ERRORS = (0.90, 0.86)
"""Predicted, at most, of plans that are searched for time."""
CALIBRATION = 512
"""Sentences."""
SEARCHED = Path(__file__).parent / "logs" / "plans_searched.jsonl"


def low_rank(config: Any, attention: int, ffn: int, words: int) -> dict[str, tuple[int, int, int]]:
    """A plan with one rank for attention and one for FFN; a row of words numbers for each word."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "embeddings.word_embeddings": (config.vocab_size, 1, words),
        "encoder.layer.*.attention.self.*": (hidden, 1, attention),
        "encoder.layer.*.attention.output.dense": (hidden, 1, attention),
        "encoder.layer.*.intermediate.dense": (inner, 1, ffn),
        "encoder.layer.*[0-9].output.dense": (hidden, 1, ffn),
        "pooler.dense": (hidden, 1, attention),
    }


def plans(name: str, config: Any) -> dict[str, Any]:
    """Plans of a size of BERT, by their names in the table."""
    if name == "MiniLM":
        lines = [json.loads(line) for line in SEARCHED.read_text().splitlines()]
        searched = {f"searched {line['size']}": line["plan"] for line in lines}
        return {"7.7x": "7.7x", "low rank 7.7x": low_rank(config, 20, 28, 56), "21x": "21x", **searched}
    return {
        "7.7x": "7.7x", "low rank 7.7x": low_rank(config, 40, 84, 96),
        "21x": "21x", "low rank 21x": low_rank(config, 12, 28, 46),
    }  # fmt: skip


def stock(model: PreTrainedModel, folder: Path) -> Path:
    """The dense model as transformers' exporter and ONNX Runtime's quantizer make it, if it is not there yet."""
    if not (folder / FORMS["int8"]).exists():
        ids = torch.ones(2, 7, dtype=torch.long)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": ids, "token_type_ids": torch.zeros_like(ids)}
        (folder / "onnx").mkdir(parents=True)
        with quietly():
            program: Any = OnnxExporter().export(model, batch, OnnxConfig(dynamic=True, ort_fusions="cpu")).program
            onnx_ir.save(program, str(folder / FORMS["fp32"]))
            proto = onnx.load(folder / FORMS["fp32"])
            del proto.graph.value_info[:]
            quantize_dynamic(
                proto, folder / FORMS["int8"], per_channel=True, op_types_to_quantize=["MatMul", "Gather"],
                extra_options={"DefaultTensorType": TensorProto.FLOAT},
            )  # fmt: skip
    return folder


def ours(model: PreTrainedModel, folder: Path) -> Path:
    """A model as this package exports it, if it is not there yet."""
    if not folder.exists():
        export_onnx(model, None, folder, also=("int8", "int4"))
    return folder


def exported(name: str, dense: PreTrainedModel, work: Path) -> dict[str, Path]:
    """Folders of the dense model of a size and of its students, exported if they are not there yet."""
    folders = {"dense": ours(dense, work / f"{name}-dense")}
    for plan, content in plans(name, dense.config).items():
        folder = work / f"{name}-{plan.replace(' ', '-')}"
        folders[plan] = folder if folder.exists() else ours(compress(dense, content).model, folder)
    return folders


def encoders(name: str, options: argparse.Namespace) -> None:
    """Encoders of one size."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES[name]
    dense = BertModel(BertConfig(**sizes)).eval()
    folders = {"dense, stock": stock(dense, options.work / f"{name}-stock"), **exported(name, dense, options.work)}
    paths = {f"{side}, {form}": folder / FORMS[form] for side, folder in folders.items()
             for form in FORMS if (folder / FORMS[form]).exists()}  # fmt: skip
    sessions = {side: open_session(path, 1) for side, path in paths.items()}
    times: dict[str, list[float]] = {side: [] for side in (*paths, PYTORCH)}
    spreads = []
    for batch, length in SHAPES:
        passes: dict[str, Callable[[], object]] = {PYTORCH: forward_pass(dense, batch, length)}
        passes |= {side: session_pass(session, batch, length) for side, session in sessions.items()}
        seconds = in_turn(passes, {16: 41, 128: 21}[length] if batch == 1 else 9)
        for side, found in seconds.items():
            middle, spread = median_and_spread(found)
            times[side].append(middle)
            spreads.append(spread)
    headings = "".join(f"{f'{b}x{n}':>10s}{'torch':>7s}{'stock':>7s}{'ours':>6s}{'limit':>7s}" for b, n in SHAPES)
    print(f"\n{name:26s}{'MB':>7s}{'memory':>8s}{headings}")
    print(f"{PYTORCH:41s}" + "".join(f"{time:10.2f}{'':28s}" for time in times[PYTORCH]))
    for side, path in paths.items():
        row = f"{side:26s}{path.stat().st_size / 1e6:7.1f}{(session_memory(path, 1, 128) or 0) / 1e6:8.0f}"
        for index, shape in enumerate(SHAPES):
            time = times[side][index]
            rest = time * (1 - share_of_products(path, *shape, threads=1))
            against = [times[f"dense{which}, int8"][index] for which in (", stock", "")]
            row += f"{time:10.2f}{times[PYTORCH][index] / time:6.2f}x{against[0] / time:6.2f}x"
            row += f"{against[1] / time:5.2f}x{against[1] / rest:6.2f}x"
        print(row, flush=True)
    print(f"Spread (half the distance between quartiles): median {statistics.median(spreads):.0%}")


def generation(options: argparse.Namespace) -> None:
    """GPT-2 small with past keys and values: a prompt of 128 tokens, and one token after 128."""
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config()).eval()
    ranks = {"wte": (50257, 1, 96), "h.*.attn.c_proj": (768, 1, 60), "h.*.attn.c_attn": (2304, 1, 90)}
    ranks |= {"h.*.mlp.c_fc": (3072, 1, 96), "h.*.mlp.c_proj": (768, 1, 96)}
    folders = {"dense": ours(dense, options.work / "gpt2-dense")}
    choices: dict[str, Any] = {"kngpt2": "kngpt2", "low rank 6.5x": ranks}
    for plan, content in choices.items():
        folder = options.work / f"gpt2-{plan.replace(' ', '-')}"
        folders[plan] = folder if folder.exists() else ours(compress(dense, content).model, folder)
    paths = {f"{side}, {form}": folder / FORMS[form] for side, folder in folders.items()
             for form in FORMS if (folder / FORMS[form]).exists()}  # fmt: skip
    sessions = {side: open_session(path, 1) for side, path in paths.items()}
    print(f"\n{'GPT-2 small':26s}{'MB':>7s}{'prompt':>10s}{'ratio':>7s}{'token':>10s}{'ratio':>7s}")
    columns = []
    for length, past in ((128, 0), (1, 128)):
        passes = {side: session_pass(session, 1, length, past) for side, session in sessions.items()}
        found = in_turn(passes, 21 if past else 9)
        columns.append({side: median_and_spread(seconds)[0] for side, seconds in found.items()})
    for side, path in paths.items():
        cells = "".join(f"{column[side]:10.2f}{column['dense, int8'] / column[side]:6.2f}x" for column in columns)
        print(f"{side:26s}{path.stat().st_size / 1e6:7.1f}{cells}", flush=True)


def searched(options: argparse.Namespace) -> None:
    """Plans of all-MiniLM that were searched for this runtime, beside others of the same size and predicted error.

    All have at most as many parameters as the preset. The plans for a runtime have at most the predicted error that is
    named, and the least time for that: by the times of layers in ONNX Runtime in int8, or in PyTorch in fp32, for 1 x
    128 tokens. The plan "for size" has the least error of this size. STS-B dev is that of calibrated students that were
    not distilled.
    """
    teacher: Any = AutoModel.from_pretrained(MINILM, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    splits = load_glue("stsb", options.data / "glue", ["train", "validation"])
    texts = splits["train"]["sentence1"][:CALIBRATION]
    presets = {"7.7x": preset_modules(teacher, "7.7x")}
    batches = calibration_batches(texts, tokenizer, teacher)
    layers = list(measured_layers(teacher, batches, presets, selected_modules(teacher, None)))
    weights = influences(teacher, layers, batches, progress=False)
    dense = teacher.num_parameters()
    fixed = dense - sum(layer.weight.numel() for layer in layers)
    runtimes = {"ONNX Runtime": Runtime(1, 128, "onnxruntime", int8=True), "PyTorch": Runtime(1, 128)}
    timed = {name: latency_table(teacher, runtime).timed(layers) for name, runtime in runtimes.items()}
    plans: dict[str, tuple[Any, float]] = {"dense": ({}, 0.0)}
    for name, entries in presets.items():
        taken = [next(c for c in layer.candidates if c.entry == entries.get(layer.name)) for layer in layers]
        limit = float(sum(c.parameters for c in taken))
        noise = sum(w * noise_to_signal(c.error) for w, c in zip(weights, taken, strict=True))
        plans[f"{name}, papers' shapes"] = entries, noise
        for runtime, candidates in timed.items():
            for error in ERRORS:
                chosen = _fastest(candidates, weights, limit, noise_to_signal(error))
                plans[f"{name}, for {runtime}, {error:.2f}"] = _plan(layers, chosen), _noise(weights, chosen)
        chosen = _fastest(timed["PyTorch"], weights, limit, 0)
        plans[f"{name}, for size"] = _plan(layers, chosen), _noise(weights, chosen)
        ranks = low_rank_plan(teacher, int(limit) + fixed)
        plans[f"{name}, low rank"] = ranks, math.nan
    torch.manual_seed(0)
    random_weights = BertModel(teacher.config, add_pooling_layer=False).eval()  # which take the same time
    passes: dict[str, Callable[[], object]] = {}
    rows = {}
    for name, (plan, noise) in plans.items():
        model: Any = compress(teacher, plan, calibration=texts, tokenizer=tokenizer).model if plan else teacher
        timed_model: Any = compress(random_weights, plan).model if plan else random_weights
        path = ours(timed_model, options.work / f"searched-{name.replace(' ', '-')}") / FORMS["int8"]
        for batch, length in SHAPES:
            passes[f"{name} {batch}x{length}"] = session_pass(open_session(path, 1), batch, length)
        table = splits["validation"]
        first, second = (encode(model, tokenizer, table[side][:]) for side in ("sentence1", "sentence2"))
        quality = 100 * spearmanr((first * second).sum(1), table["label"][:]).statistic
        rows[name] = model.num_parameters(), math.sqrt(noise / (1 + noise)), quality
    times = {name: 1e3 * statistics.median(seconds) for name, seconds in in_turn(passes, 15).items()}
    headings = "".join(f"{f'{b}x{n}':>9s}{'ratio':>7s}" for b, n in SHAPES)
    print(f"\n{'all-MiniLM, int8, searched':30s}{'parameters':>12s}{'error':>8s}{'STS-B':>8s}{headings}")
    for name, (parameters, error, quality) in rows.items():
        row = f"{name:30s}{parameters:12,d}{error:8.3f}{quality:8.2f}"
        for batch, length in SHAPES:
            time = times[f"{name} {batch}x{length}"]
            row += f"{time:9.2f}{times[f'dense {batch}x{length}'] / time:6.2f}x"
        print(row, flush=True)


def _fastest(candidates: Any, weights: list[float], limit: float, noise: float) -> list[Any]:
    """The candidates of least time within a limit of parameters and of noise; of least noise if both cannot be met."""
    costs = [[c.parameters for c in found] for found in candidates]

    def choice(price: float) -> list[Any]:
        values = [
            [w * noise_to_signal(c.error) + price * c.milliseconds for c in found]
            for w, found in zip(weights, candidates, strict=True)
        ]
        picked, _ = best_choice(costs, values, limit)
        return [found[index] for found, index in zip(candidates, picked, strict=True)]

    best = choice(0.0)
    low, high = -20.0, 5.0  # of the logarithm of a price for a millisecond
    for _ in range(16):
        middle = (low + high) / 2
        found = choice(math.exp(middle))
        if _noise(weights, found) <= noise:
            best, low = found, middle
        else:
            high = middle
    return best


def _noise(weights: list[float], chosen: list[Any]) -> float:
    return sum(w * noise_to_signal(c.error) for w, c in zip(weights, chosen, strict=True))


def _plan(layers: list[Any], chosen: list[Any]) -> dict[str, Any]:
    return {layer.name: c.entry for layer, c in zip(layers, chosen, strict=True) if c.entry is not None}


def quality(options: argparse.Namespace) -> None:
    """Real encoders in fp32, int8 and int4, by the mean of the tokens' last hidden states.

    STS-B dev: Spearman correlation. SST-2 dev: accuracy of a logistic regression on the embeddings of 4,000 sentences.
    """
    pairs = load_glue("stsb", options.data / "glue", ["validation"])["validation"]
    sentiment = load_glue("sst2", options.data / "glue", ["train", "validation"])
    print(f"\n{'':32s}{'form':>6s}{'MB':>7s}{'STS-B dev':>11s}{'SST-2 dev':>11s}")
    for source in options.models:
        model, tokenizer = load_model(source)
        folder = ours(model, options.work / f"quality-{Path(source).name}")
        for form in ("fp32", "int8", "int4"):
            encoded = partial(embeddings, open_session(folder / FORMS[form], 1), tokenizer)
            first, second = (encoded(pairs[name][:]) for name in ("sentence1", "sentence2"))
            score = 100 * spearmanr((first * second).sum(1), pairs["label"][:]).statistic
            accuracy = probe(encoded, sentiment)
            size = (folder / FORMS[form]).stat().st_size / 1e6
            print(f"{Path(source).name:32s}{form:>6s}{size:7.1f}{score:11.2f}{accuracy:11.2f}", flush=True)


def embeddings(session: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Means of the last hidden states, of length 1."""
    rows = []
    for text in texts:  # one by one, without padding
        hidden = run(session, dict(tokenizer(text, truncation=True, max_length=128, return_tensors="pt")))
        mean = hidden["last_hidden_state"][0].mean(0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)


def instructions() -> str:
    """What the processor has for products of 8 bits."""
    found = {"avx512_vnni", "avx_vnni", "amx_int8"} & set(Path("/proc/cpuinfo").read_text().split())
    return ", ".join(sorted(found)) or "no VNNI"


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "operators": lambda options: operators(),
    **{name: partial(encoders, name) for name in SIZES},
    "generation": generation,
    "searched": searched,
    "quality": quality,
}


def main() -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the graphs, which are made once")
    parser.add_argument("--data", type=Path, help="folder with glue, for the quality")
    parser.add_argument("--models", nargs="*", default=[], help="folders of encoders, for the quality")
    parser.add_argument("--section", choices=SECTIONS, help="one section")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    print(f"{environment()}, onnxruntime {onnxruntime.__version__}; {instructions()}")
    for name, section in SECTIONS.items():
        if options.section in (None, name):
            section(options)


if __name__ == "__main__":
    main()
