import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in what tests start: they run side by side, and are small
