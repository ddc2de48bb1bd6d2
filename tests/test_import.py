from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

import vlm2vec

ROOT = Path(__file__).parents[1]


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick() -> None:
    code = "import time; began = time.process_time(); import vlm2vec; print(time.process_time() - began)"
    assert min(float(in_new_process(code)) for _ in range(3)) < 0.3


@pytest.mark.parametrize("module", ["", ".errors", ".io", ".log", ".dist", ".config", ".data.images", ".cli"])
def test_no_torch_is_imported(module: str) -> None:
    loaded = in_new_process(f"import sys, vlm2vec{module}; print([name for name in ('torch', 'transformers') if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_rank_and_a_log_line_need_no_torch() -> None:
    code = "import sys; from vlm2vec import dist, log; log.setup('info'); log.get_logger('x').info('y')"
    assert in_new_process(f"{code}; print(dist.rank(), 'torch' in sys.modules)").split() == ["0", "False"]


def test_names_are_found_on_first_use() -> None:
    for name in vlm2vec._HOMES:
        assert getattr(vlm2vec, name).__name__ == name
        assert name in dir(vlm2vec)
    with pytest.raises(AttributeError, match="has no attribute 'Encodr'"):
        _ = vlm2vec.Encodr


def test_version_is_that_of_the_package() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    assert vlm2vec.__version__ == parser["metadata"]["version"]
