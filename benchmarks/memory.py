"""What the cache takes in memory."""

import mlx.core as mx

from ._workload import DTYPE, HEAD_DIM, KV_HEADS, require_memory


class GrowByConcatenation:
    """Peak memory while a pool grows by a quarter through `mx.concatenate`, over the pool's size.

    Why `PagedKVCache` allocates its pools once: old and new pool are both alive.
    """

    version = "1"
    params = [[64, 256]]
    param_names = ["pool_MiB"]
    unit = "x pool"

    def setup(self, pool_mib):
        require_memory(3 * pool_mib * 2**20)

    def track_peak(self, pool_mib):
        mx.random.seed(0)
        num_blocks = pool_mib * 2**20 // (32 * KV_HEADS * HEAD_DIM * DTYPE.size)
        shape = (num_blocks, 32, KV_HEADS, HEAD_DIM)
        pool = mx.random.uniform(-1, 1, shape, dtype=DTYPE)
        slab = mx.zeros((num_blocks // 4, *shape[1:]), DTYPE)
        mx.eval(pool, slab)
        size = pool.nbytes
        mx.synchronize()
        mx.reset_peak_memory()
        pool = mx.concatenate([pool, slab])
        del slab
        mx.eval(pool)
        return mx.get_peak_memory() / size
