"""The suite's results as Markdown, for docs/RESULTS.md."""

from typing import Any


def as_markdown(result: dict[str, Any]) -> str:
    """Tables of the pieces that are there."""
    pieces = result["pieces"]
    device = pieces.get("ceiling", {}).get("device", {})
    parts = []
    if "device" in device:
        matmul = ", ".join(f"{k} {v / 1e12:,.1f}" for k, v in device["matmul_flops_per_s"].items())
        parts.append(
            f"{device['device']}, jax {device['jax']}: matrix product of side {device['matmul_side']:,}: "
            f"{matmul} TFLOP/s; copy {device['copy_bytes_per_s'] / 1e12:.2f} TB/s."
        )
    ceiling = device.get("matmul_flops_per_s", {}).get("bfloat16")
    for piece, cases in pieces.items():
        rows = [
            row for name, case in cases.items() if case is not device for row in _rows(name, case, ceiling)
        ]
        if rows:
            names = list(dict.fromkeys(key for row in rows for key in row))
            lines = [" | ".join(["", *names, ""]), " | ".join(["", *["---"] * len(names), ""])]
            lines += [" | ".join(["", *(row.get(name, "") for name in names), ""]) for row in rows]
            parts.append(f"**{piece}**\n\n" + "\n".join(line.strip() for line in lines))
    return "\n\n".join(parts) + "\n"


def _rows(name: str, case: dict[str, Any], ceiling: float | None) -> list[dict[str, str]]:
    if "failed" in case:
        return [{"case": name, "failed": case["failed"]}]
    if "networks" in case:
        return [_parity_row(name, network, found) for network, found in case["networks"].items()]
    if "ratios" in case:
        return [
            {"case": f"{name}: {side}", **_speed(took, ceiling), **_ratios(case["ratios"].get(side, {}))}
            for side, took in case["sides"].items()
        ]
    return [{"case": name, **_speed(case, ceiling)}]


def _parity_row(precision: str, network: str, found: dict[str, Any]) -> dict[str, str]:
    row = {"case": f"{network}, {precision}", "failed": found.get("failed", "")}
    if "within" in found:
        row |= {key: f"{found[key]:.1e}" for key in ("outputs", "loss", "gradient")}
        row |= {"within bounds": "yes" if found["within"] else "NO"}
    return row | {"cuDNN attention calls": str(found.get("attention_calls", ""))}


def _speed(side: dict[str, Any], ceiling: float | None) -> dict[str, str]:
    row = {"images/s": f"{side['images_per_s']:,.1f}"}
    if ceiling and "flops_per_image" in side:
        row["of the matrix product"] = f"{side['images_per_s'] * side['flops_per_image'] / ceiling:.1%}"
    for key, title in (("program_bytes", "program, GB"), ("peak_bytes", "peak, GB")):
        if key in side:
            row[title] = f"{side[key] / 1e9:.2f}"
    if "compile_s" in side:
        row["compile, s"] = f"{side['compile_s']:.0f}"
    return row


def _ratios(ratios: dict[str, Any]) -> dict[str, str]:
    row = {}
    if "wall_s" in ratios:
        median, low, high = ratios["wall_s"]
        row["time, ratio (range)"] = f"{median:.2f} ({low:.2f} … {high:.2f})"
    if "flops_per_image" in ratios:
        row["FLOPs, ratio"] = f"{ratios['flops_per_image']:.2f}"
    return row
