"""STAND-IN until the real one is merged."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from shoal.configs.corpus import CleanConfig
from shoal.data_pipeline.minhash import load_keys
from shoal.data_pipeline.stages import Stage
from shoal.data_pipeline.store import read_documents


def find_duplicates(
    pieces: list[Path],
    keys: list[Path],
    config: CleanConfig,
    folder: Path,
    run: Callable[[Stage], None],
) -> list[Path]:
    import json

    seen: dict[bytes, str] = {}
    out = []
    for n, (p, k) in enumerate(zip(pieces, keys, strict=True)):
        d = load_keys(k).digests
        mask, lines = [], []
        for row, doc in enumerate(read_documents(p)):
            b = d[row].tobytes()
            mask.append(b not in seen)
            if b in seen:
                lines.append(
                    json.dumps(
                        {
                            "id": doc.id,
                            "source": doc.source,
                            "domain": doc.domain,
                            "reason": "exact_duplicate",
                            "match": seen[b],
                            "similarity": None,
                        }
                    )
                    + "\n"
                )
            else:
                seen[b] = doc.id
        f = folder / f"{n:06d}.npy"
        np.save(f, np.array(mask, dtype=bool))
        f.with_suffix(".jsonl").write_text("".join(lines))
        out.append(f)
    return out
