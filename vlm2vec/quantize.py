from __future__ import annotations
from dataclasses import dataclass
import numpy as np
@dataclass(frozen=True)
class Variant:
    dims: int | None
    precision: str
    def apply(self, rows):
        r=np.asarray(rows[:])[:, :self.dims]; 
        return (r/np.linalg.norm(r,axis=1,keepdims=True)).astype(np.float32)
