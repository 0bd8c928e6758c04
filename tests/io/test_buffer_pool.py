import jax
import numpy as np

from sdjax.io.buffer_pool import ALIGNMENT, BufferPool, aligned_empty

F32 = np.dtype(np.float32)


def test_jax_takes_an_aligned_array_over_without_a_copy():
    array = aligned_empty((3, 5), F32)
    array[...] = 1
    taken = jax.device_put(array)
    assert array.ctypes.data % ALIGNMENT == 0
    assert taken.unsafe_buffer_pointer() == array.ctypes.data


def test_memory_that_is_given_back_is_lent_again():
    lender = BufferPool()
    first, second = lender.acquire((100, 10), F32), lender.acquire((40, 10), F32)
    places = {array.ctypes.data for array in (first, second)}
    assert len(places) == 2
    lender.release([first, second])
    again = lender.acquire((300,), F32)  # fits both, and gets the smaller
    assert again.ctypes.data == second.ctypes.data
    assert lender.acquire((1,), F32).ctypes.data not in places  # too small for what is left
    assert lender.acquire((1000,), F32).ctypes.data == first.ctypes.data


def test_what_was_not_lent_is_left_alone():
    lender = BufferPool()
    lender.release([np.zeros(100, F32), np.zeros((10, 10), F32).T])
    assert (lender.acquire((4,), F32).shape, lender.acquire((0, 3), F32).shape) == ((4,), (0, 3))
