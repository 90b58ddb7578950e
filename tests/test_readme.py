"""The end-to-end tables of README and docs/speed.md are those of the committed results."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)


def test_readme_is_up_to_date():
    for path, write in readme.WRITTEN.items():
        text = path.read_text()
        assert text.count(readme.BEGIN) == text.count(readme.END) == 1
        assert readme.updated(text, write()) == text, "run: python benchmarks/readme.py"


def test_what_failed_and_what_fitted_is_shown(tmp_path, monkeypatch):
    about = {"shape": "s", "layers": 2, "device": "d", "versions": {"torch": "t"}, "date": "now", "command": "c"}
    case = {"batch": 1, "prompt": 1024}
    dense = {**case, "method": "dense", "per_token": 3.0, "first_token": 2.0, "decode_peak": 0, "cache_bytes": 8,
             "roofline": 0.5, "host": None, "capacity": 1024}  # fmt: skip
    rows = [dense, {**dense, "method": "ours", "per_token": 2.0, "cache_bytes": 2}, {**case, "method": "x", "failed": "no"}]
    (tmp_path / "end_to_end.json").write_text(json.dumps({**about, "results": rows}))
    fitted = {"method": "ours", "what": "batch", "prompt": 1024, "planned": 7, "fits": 6, "too_many": 7, "planned_bytes": 100,
              "peak_bytes": 98, "failed": ""}  # fmt: skip
    (tmp_path / "capacity.json").write_text(json.dumps({**about, "results": [fitted, {**fitted, "too_many": 0}]}))
    on_cpu = {"heads": 8, "kv_heads": 2, "dtype": "float32", "tokens": 1024, "of_dense": 1.0}
    steps = [
        {**on_cpu, "method": "sdpa", "per_token": 2.0, "cache_bytes": 8},
        {**on_cpu, "method": "ours", "per_token": 1.0, "of_dense": 0.5, "cache_bytes": 1},
    ]
    about_cpu = {**about, "threads": 1, "vectors": "AVX", "head_dim": 128, "layers": 4}
    (tmp_path / "cpu.json").write_text(json.dumps({**about_cpu, "results": steps}))
    monkeypatch.setattr(readme, "SUMMARY", (("end_to_end.json", (1, 1024), ("ours",)), ("missing.json", (1, 1), ())))
    text = readme.summary(tmp_path)
    assert "| 1×1K | `ours` | 2.00 | 1.50 | 1.00 | 25.0% | end_to_end |" in text
    assert "rows of 1K: `ours` 6, `ours` 6." in text
    text = readme.section(tmp_path)
    assert "| 1×1K | `ours` | 2.00 | 0.50 |  | 1.50 | 1.00 |  | 25.0% |" in text and "| 1×1K | `x` | no |" in text
    assert "| rows of 1K | `ours` | 7 | 6 | 7 | 98.0% |" in text and "| 7 | 6 | | 98.0% |" in text
    assert "over 1K tokens" in text and "| 8 / 2 | float32 | `ours` | 1.00 | 0.50 | 12.5% |" in text
