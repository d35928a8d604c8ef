import os

# On CUDA MLX multiplies float32 in TF32 unless told otherwise, which is 1e-3 from the oracle.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
