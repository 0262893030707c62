"""Runs with made-up numbers, of the two shapes that the demos measure, to try the report on."""

from __future__ import annotations

from gossamer.report import EngineRow, LayerRow, Run, Setting

SPARSE = (("4-row, 80 %", 0.20, 0.803, 2.1), ("4-row, 90 %", 0.10, 0.781, 3.2), ("2:4", 0.50, 0.809, 0.7))


def encoder_run() -> Run:
    """A sentence encoder: accuracy in per cent, three dense engines, one setting that loses."""
    dense = Setting(
        "dense", {"probe accuracy": 0.81, "TREC accuracy": 0.9}, "probe accuracy", 1.0, 90_900_000, 90_900_000, 1.0, 0.0
    )
    settings, engines, layers = [dense], [], []
    for threads in (1, 2):
        for engine, pace in (("torch", 40.0), ("onnxruntime", 52.0), ("openvino", 55.0)):
            engines.append(_row("dense", engine, threads, pace * threads**0.8))
    for name, density, accuracy, times in SPARSE:
        quality = {"probe accuracy": accuracy, "TREC accuracy": accuracy + 0.08}
        size = int(47e6 + 43e6 * density * 1.25)
        settings.append(
            Setting(name, quality, "probe accuracy", 0.9 + density / 10, size, size + 10_000, density, 42.0)
        )
        engines += [_row(name, "gossamer", threads, 55.0 * times * threads**0.8) for threads in (1, 2)]
        layers += [_layer(name, block, part, density, times) for block in range(6) for part in PARTS]
    return Run(
        title="all-MiniLM-L6-v2, sentence encoder: Rotten Tomatoes probe",
        hardware={"processor": "a processor <of 2 cores>", "memory": "8 GB"},
        versions={"gossamer": "0.1.0", "torch": "2.13.0"},
        settings=settings,
        engines=engines,
        layers=layers,
        notes=["Made-up numbers."],
        command="gossamer demo",
        saved_at="2026-01-02T03:04:05+00:00",
        load_lines=['model = gossamer.load("gossamer-demo/minilm-4row80")', "model(**tokenizer(texts))"],
    )


def llm_run() -> Run:
    """A language model: perplexity, lower is better, two units."""
    half = {"magnitude 50 %": 912.0, "wanda 50 %": 28.9, "sparsegpt 50 %": 25.1}
    figures = {"dense": (17.2, 1.0), **{name: (perplexity, 0.5) for name, perplexity in half.items()}}
    settings = [
        Setting(n, {"perplexity": p}, "perplexity", None, int(3e8 * (0.5 + d / 2)), int(3e8 * d), d, 60.0, False, "")
        for n, (p, d) in figures.items()
    ]
    engines = [
        _row("dense", "torch", 2, 30.0, "tokens/s (one at a time)"),
        _row("dense", "torch", 2, 300.0, "tokens/s (prompt)"),
    ]
    # As in the real demo, only the best of the methods is packed and timed.
    engines += [
        _row("sparsegpt 50 %", "gossamer", 2, 44.0, "tokens/s (one at a time)"),
        _row("sparsegpt 50 %", "gossamer", 2, 250.0, "tokens/s (prompt)"),
    ]
    layers = [_layer("sparsegpt 50 %", block, part, 0.5, 1.2) for block in range(30) for part in PARTS]
    return Run("SmolLM2-135M, WikiText-2", {"cores": "2"}, {"torch": "2.13.0"}, settings, engines, layers)


PARTS = (
    ("attention.self.query", (384, 384)),
    ("attention.self.key", (384, 384)),
    ("attention.self.value", (384, 384)),
    ("attention.output.dense", (384, 384)),
    ("intermediate.dense", (1536, 384)),
    ("output.dense", (384, 1536)),
)


def _row(setting: str, engine: str, threads: int, pace: float, unit: str = "sentences/s") -> EngineRow:
    ms = 1000.0 / pace
    return EngineRow(setting, engine, threads, ms, 0.09 * ms, pace, unit, "1.2.3")


def _layer(setting: str, block: int, part: tuple[str, tuple[int, int]], density: float, times: float) -> LayerRow:
    name, shape = f"encoder.layer.{block}.{part[0]}", part[1]
    ms = 0.4 * shape[0] * shape[1] / 384**2 * (1 + 0.03 * block)
    if "value" in name and block == 0:
        return LayerRow(setting, name, shape, 1.0, "dense", "torch", ms, 0.9 * ms, ms, "dense was faster on this shape")
    form = "csr" if block == 5 else "rowgrouped"
    return LayerRow(setting, name, shape, density, form, "cpu", ms, 0.9 * ms, 0.9 * ms / times, "fastest of 4 measured")
