"""Before anything imports torch: threads that wait must not spin, or two cores are worth a fifth of one."""

import os
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0", DS_ACCELERATOR="cpu")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
if not list(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
