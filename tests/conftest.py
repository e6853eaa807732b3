"""One torch thread per test process, as in every process of the pipeline: `-n 2` shares the cores between processes."""

from __future__ import annotations

from pipeline.runtime import one_thread

one_thread()
