"""mteb (Muennighoff et al. 2023, arXiv 2210.07316): its benchmarks on our models (`MtebModel`), our suites on any model (`benchmark`)."""

from __future__ import annotations

from vlm2vec.errors import EnvError

try:
    import mteb  # noqa: F401
except ImportError as error:
    raise EnvError(f"vlm2vec.integrations.mteb needs mteb ({error}); pip install 'vlm2vec[mteb]'") from error

from vlm2vec.integrations.mteb.model import MtebModel
from vlm2vec.integrations.mteb.tasks import SuiteTask, benchmark, means, suite_tasks

__all__ = ["MtebModel", "SuiteTask", "benchmark", "means", "suite_tasks"]
