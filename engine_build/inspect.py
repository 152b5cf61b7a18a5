"""An engine's manifest as text."""

from collections import Counter

from vla_policy.core.backends.base import MEMORY_ONLY
from vla_policy.core.manifest import Manifest

_COLUMNS = ("unit", "shape", "planned", "realised", "codes B", "scales B", "loaded B", "arithmetic")


def table(manifest: Manifest) -> str:
    """One line per unit: planned and realised format, bytes in the files and once loaded, what multiplies it."""
    rows = [_COLUMNS] + [
        (
            unit.name,
            f"{unit.outputs}x{unit.inputs}",
            unit.planned,
            unit.realised,
            f"{unit.code_bytes:,}",
            f"{unit.scale_bytes:,}",
            f"{unit.resident_bytes:,}" if unit.resident_bytes is not None else "-",
            unit.arithmetic,
        )
        for unit in manifest.units
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def summary(manifest: Manifest) -> str:
    """Sums and origin in a few lines."""
    totals = manifest.totals()
    formats = Counter(unit.realised for unit in manifest.units)
    parents = ", ".join(f"{name} {sha256[:12]}" for name, sha256 in sorted(manifest.parents.items()))
    lines = [
        f"target {manifest.target} ({manifest.backend} {manifest.backend_version}), {parents}",
        f"{totals['units']} units, {totals['weights']:,} weights, {totals['average_bits']} bits on average (codes)",
        "formats: " + ", ".join(f"{count} x {name}" for name, count in sorted(formats.items())),
        f"{totals['engine_bytes']:,} bytes on disk = codes {totals['code_bytes']:,} + scales {totals['scale_bytes']:,}"
        f" + embedding, norms, biases, graph, tokenizer {totals['other_bytes']:,}",
    ]
    unpacked = sorted({unit.realised for unit in manifest.units if unit.arithmetic.endswith(MEMORY_ONLY)})
    if unpacked:
        lines.append(f"note: {', '.join(unpacked)} {MEMORY_ONLY}, on this backend; w2a8, w4a8 and w8a8 save both")
    lines += [f"legalized: {change}" for change in manifest.legalized]
    lines += [f"note: {note}" for note in manifest.notes]
    return "\n".join(lines)
