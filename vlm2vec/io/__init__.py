"""Files: digests, safe paths, atomic writing and publication, the lock of a run folder. Nothing here knows what a file means.

A published folder either is not there or is complete: it is written aside, every file is flushed to disk and listed with its sha256 in
`manifest.json`, the last file written, and one rename puts it in place.
"""

from __future__ import annotations

from vlm2vec.io.faults import fault
from vlm2vec.io.files import (
    append_jsonl,
    digest,
    read_json,
    read_jsonl,
    rewrite_jsonl,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
)
from vlm2vec.io.folders import MANIFEST, publishing, unpublish, verify_manifest
from vlm2vec.io.lock import run_lock
from vlm2vec.io.paths import cache_folder, safe_join

__all__ = [
    "MANIFEST",
    "append_jsonl",
    "cache_folder",
    "digest",
    "fault",
    "publishing",
    "read_json",
    "read_jsonl",
    "rewrite_jsonl",
    "run_lock",
    "safe_join",
    "sha256_bytes",
    "sha256_file",
    "unpublish",
    "verify_manifest",
    "write_atomic",
    "write_json",
]
