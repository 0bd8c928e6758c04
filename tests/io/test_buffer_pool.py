import jax
import numpy as np

from sdjax.io.buffer_pool import BufferPool
from sdjax.xla.alignment import ALIGNMENT, aligned_empty

F32 = np.dtype(np.float32)


def test_device_put_does_not_copy_aligned_arrays():
    array = aligned_empty((3, 5), F32)
    array[...] = 1
    taken = jax.device_put(array)
    assert array.ctypes.data % ALIGNMENT == 0
    assert taken.unsafe_buffer_pointer() == array.ctypes.data


def test_released_buffers_are_reused():
    pool = BufferPool()
    first, second = pool.acquire((100, 10), F32), pool.acquire((40, 10), F32)
    places = {array.ctypes.data for array in (first, second)}
    assert len(places) == 2
    pool.release([first, second])
    reused = pool.acquire((300,), F32)  # fits both buffers; the smaller is used
    assert reused.ctypes.data == second.ctypes.data
    assert pool.acquire((1,), F32).ctypes.data not in places  # too small for the remaining buffers
    assert pool.acquire((1000,), F32).ctypes.data == first.ctypes.data


def test_release_ignores_foreign_arrays():
    pool = BufferPool()
    pool.release([np.zeros(100, F32), np.zeros((10, 10), F32).T])
    assert (pool.acquire((4,), F32).shape, pool.acquire((0, 3), F32).shape) == ((4,), (0, 3))
