"""The table and the plot of `kernel_times.py`."""

from __future__ import annotations


def table(rows: list[dict], bandwidth: float) -> str:
    """What was measured, one line a row."""
    lines = [f"device copy {bandwidth / 1e6:.2f} TB/s", f"{'':44}{'time':>10}{'of floor':>10}{'ratio':>8}"]
    for row in rows:
        share = f"{row['share']:.0%}" if "share" in row else ""
        ratio, note = "", ""
        if "faster" in row:
            ratio = f"{row['faster']:.2f}x"
            note = f"than {row['best']} {row['best_us']:.1f} us ({row['best_share']:.0%})"
        elif "ratio" in row:
            ratio = f"{row['ratio']:.2f}"
            note = f"of SDPA; last window {row['window_ratio']:.3f}" if "window_ratio" in row else "of SDPA"
        elif "of_attention" in row:
            ratio, note = f"{row['of_attention']:.1%}", "of the layer's attention"
        elif "per_step_us" in row:
            note = f"{row['per_step_us']:.2f} us a step; on the device {row['device_per_step_us']:.2f}"
        elif "error" in row:
            note = row["error"]
        time_us = row.get("time_us", row.get("attention_and_scores_us"))
        shown = "" if time_us is None else f"{time_us:.1f} us"
        lines.append(f"{row['section'] + ' ' + row['what']:44}{shown:>10}{share:>10}{ratio:>8}  {note}")
    return "\n".join(lines)


def plot(rows: list[dict], path: str, window: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    decode = [row for row in rows if "faster" in row and row["section"] != "linear"]
    prefill = [row for row in rows if "window_ratio" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.4 * max(len(decode), 6) + 1.5), width_ratios=(3, 2))
    names = [row["what"] for row in decode][::-1]
    left.barh(names, [row["faster"] for row in decode][::-1], color="tab:blue")
    for i, row in enumerate(decode[::-1]):
        left.text(row["faster"], i, f" {row['faster']:.2f}x, {row['share']:.0%} of floor", va="center", fontsize=8)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("times faster than the best bf16 SDPA on the same tokens")
    left.set_xlim(0, 1.4 * max([1.0, *[row["faster"] for row in decode]]))
    lengths = [int(row["what"].split()[0]) for row in prefill]
    right.plot(lengths, [row["ratio"] for row in prefill], "o-", label="with cumulative scores")
    window_ratios = [row["window_ratio"] for row in prefill]
    right.plot(lengths, window_ratios, "s-", label=f"with scores of the last {window} queries")
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xlabel="prompt tokens", ylabel="time over the best SDPA alone")
    if prefill:
        right.set_xscale("log", base=2)
        right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
