"""Global and shared memory of a block: bounds, alignment, races.

Every access must lie within a buffer. Between two barriers no byte may be touched by two warps of which one writes it;
in one launch no byte of global memory by two blocks of which one writes it (atomics apart).
"""

import ctypes

import numpy as np

from .formats import PTXError, i32, i64, u8, u64


def buffer_of(tensor):
    """(address, bytes) from a tensor's first element to past its last one."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.element_size() if tensor.numel() else 0
    return tensor.data_ptr(), np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.data_ptr()))


class Tracker:
    """Who touched which byte in which interval."""

    def __init__(self, size, message):
        self.message = message
        self.write_epoch, self.writer, self.read_epoch, self.reader = np.zeros((4, size), i32)

    def touch(self, ix, who, epoch, writing):
        """ix: bytes; who: numbers of the agents, broadcast against ix. Raises if another one is in the way."""
        who = np.broadcast_to(who, ix.shape)
        read_now = self.read_epoch[ix] == epoch
        race = (self.write_epoch[ix] == epoch) & (self.writer[ix] != who)
        if writing:
            race |= read_now & (self.reader[ix] != who)
        if race.any():
            raise PTXError(self.message)
        if writing:
            self.write_epoch[ix], self.writer[ix] = epoch, who
        else:
            self.reader[ix] = np.where(read_now & (self.reader[ix] != who), -1, who)  # -1: several
            self.read_epoch[ix] = epoch


class Buffer:
    """Bytes at an address, with what is known of who touched them."""

    def __init__(self, address, memory):
        self.address, self.memory = address, memory
        self.between_blocks = Tracker(len(memory), "race between blocks through global memory")

    def touched(self, writing):
        """Which bytes were accessed."""
        tracker = self.between_blocks
        return (tracker.write_epoch if writing else tracker.read_epoch) > 0

    def __len__(self):
        return len(self.memory)


class Memory:
    """Of a Block."""

    def regions(self, space, lanes, address, size):
        """Yield (buffer, its lanes, offsets) until all lanes are served; refuse one outside all buffers."""
        if space not in ("shared", "global"):
            raise PTXError(f"{space} memory is not supported")
        buffers = [self.shared] if space == "shared" else self.buffers
        for buffer in buffers:
            if not len(lanes):
                return
            begin = buffer.address
            inside = (address >= begin) & (address + u64(size) <= begin + len(buffer))
            if inside.any():
                yield buffer, lanes[inside], (address[inside] - u64(begin)).astype(i64)
                lanes, address = lanes[~inside], address[~inside]
        if len(lanes):
            nearest = min(buffers, key=lambda b: abs(int(address[0]) - b.address), default=Buffer(0, np.zeros(0, u8)))
            where = (
                f"{size} bytes at {int(address[0]) - nearest.address} of the nearest buffer, which has {len(nearest)}"
            )
            raise PTXError(f"out-of-bounds {space} access by thread {lanes[0]}: {where}")

    def aligned(self, address, m, size):
        if (address[m] % u64(size)).any():
            raise PTXError(f"misaligned access of {size} bytes")

    def touch(self, buffer, ix, lanes, writing):
        """Note an access by these threads; ix: [threads, bytes]."""
        if not self.check_races:
            return
        if buffer is not self.shared:
            buffer.between_blocks.touch(ix, self.number, 1, writing)
            return
        self.between_warps.touch(ix, self.warp[lanes][:, None], self.epoch, writing)
        if writing:
            self.asynchronous.written(ix)

    def load(self, space, address, dtype, m):
        size, lanes = np.dtype(dtype).itemsize, np.flatnonzero(m)
        out = np.zeros(self.T, dtype)
        for buffer, who, offset in self.regions(space, lanes, address[lanes], size):
            ix = offset[:, None] + np.arange(size)
            self.touch(buffer, ix, who, False)
            out[who] = buffer.memory[ix].reshape(-1).view(dtype)
        return out

    def store(self, space, address, v, m):
        size, lanes = v.dtype.itemsize, np.flatnonzero(m)
        for buffer, who, offset in self.regions(space, lanes, address[lanes], size):
            ix = offset[:, None] + np.arange(size)
            self.touch(buffer, ix, who, True)
            data = np.ascontiguousarray(v[who]).view(u8).reshape(-1, size)
            buffer.memory[ix] = data
            if (buffer.memory[ix] != data).any():
                raise PTXError("threads store different values to one address in one instruction")
