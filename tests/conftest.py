"""Before anything imports torch: threads that wait must not spin, or two cores are worth a fifth of one."""

import os

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0", DS_ACCELERATOR="cpu")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
