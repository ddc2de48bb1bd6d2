from __future__ import annotations
from dataclasses import dataclass
import numpy as np
from numpy.typing import NDArray
@dataclass(frozen=True, eq=False)
class Ranking:
    position_QR: list
    ties_Q: NDArray
    top_QK: list
    top_score_QK: list
def rank(query_QD, targets, candidates_QM, relevant_QR, grades_QR, ties="pessimistic", top=5):
    g=np.float32(2.0**26)
    T=np.rint(np.asarray(targets[:])*g).astype(np.float64)/2.0**26; Q=np.rint(query_QD*g).astype(np.float64)/2.0**26
    S=(Q@T.T).astype(np.float32)
    P,Ti,TK,TS=[],[],[],[]
    for q in range(len(Q)):
        m=np.arange(len(T)) if candidates_QM is None else candidates_QM[q]
        s=S[q][m]; gr=np.zeros(len(T)); gr[relevant_QR[q]]=grades_QR[q]; gm=gr[m]
        if ties=="pessimistic": o=np.lexsort((m,gm,-s))
        else: o=np.lexsort((np.arange(len(m)),-s))
        pos=np.empty(len(T),int); pos[m[o]]=np.arange(1,len(m)+1)
        P.append(pos[relevant_QR[q]]); b=s[gm>0].max(); Ti.append(int(((s==b)&(gm==0)).sum()))
        TK.append(m[o[:top]]); TS.append(s[o[:top]])
    return Ranking(P,np.array(Ti),TK,TS)
