# SPDX-License-Identifier: Apache-2.0
"""What `feature_store.online.redis` has the server do in one piece, in Lua."""

import struct
from collections.abc import Iterator

TOGETHER = 64
"""Values that are read in one reply, which Redis allows 512 MiB."""

# Writes values, if their writer still has its turn: key, entity and value of each. First what is written to, so that whoever finds it left
# behind knows where.
WRITE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
for i = 4, #ARGV, 3 do
  redis.call('SADD', KEYS[2], ARGV[i])
  redis.call('SADD', KEYS[3], ARGV[i + 1])
  redis.call('HSET', ARGV[i], ARGV[2], ARGV[i + 2])
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""
# Makes an attempt the head, if its writer still has its turn and nobody else committed meanwhile.
COMMIT = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] or (redis.call('HGET', KEYS[2], 'attempt') or '0') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[2], 'attempt', ARGV[3], 'id', ARGV[4], 'states', ARGV[5], 'format', ARGV[6])
redis.call('ZADD', KEYS[3], redis.call('TIME')[1], ARGV[3])
redis.call('DEL', KEYS[1])
return 1
"""
# Reads the head, and of each value key the newest up to an attempt, the head's where none is given. The lengths (little-endian int32, -1
# where there is nothing) come as one string, the values as one for every so many.
READ = """
local last, lengths, values, parts = tonumber(ARGV[1]), {}, {}, {}
if not last then last = tonumber(redis.call('HGET', KEYS[1], 'attempt') or '0') end
for i = 2, #KEYS do
  local found, newest, value = redis.call('HGETALL', KEYS[i]), -1, nil
  for j = 1, #found, 2 do
    local attempt = tonumber(found[j])
    if attempt <= last and attempt > newest then newest, value = attempt, found[j + 1] end
  end
  lengths[i - 1] = struct.pack('<i4', value and #value or -1)
  values[#values + 1] = value or ''
  if #values == tonumber(ARGV[2]) or i == #KEYS then
    parts[#parts + 1] = table.concat(values)
    values = {}
  end
end
return {redis.call('HGETALL', KEYS[1]), table.concat(lengths), parts}
"""
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


def cut(lengths: bytes, values: bytes) -> Iterator[bytes | None]:
    """What `READ` put into one string, one by one."""
    start = 0
    for (length,) in struct.iter_unpack("<i", lengths):
        if length < 0:
            yield None
        else:
            yield values[start : start + length]
            start += length
