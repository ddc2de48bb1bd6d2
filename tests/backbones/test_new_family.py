"""A family is one file: dropped beside the others, the registry finds it and the sweep holds it to every bar."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "data" / "one_file_family" / "vip_llava.py"
PLUGIN = "import vlm2vec.backbones\nvlm2vec.backbones.__path__.append({!r})\n"  # as if the file lay in vlm2vec/backbones


@pytest.mark.slow
def test_the_sweep_picks_a_family_up_from_one_file(tmp_path: Path) -> None:
    (tmp_path / "extra_family.py").write_text(PLUGIN.format(str(FILE.parent)), encoding="utf-8")
    sweep = [str(ROOT / "tests" / "backbones" / name) for name in ("test_sweep.py", "test_sweep_training.py")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "extra_family", "-k", "vipllava", *sweep]
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    (passed,) = re.findall(r"(\d+) passed", run.stdout)
    assert int(passed) >= 25
