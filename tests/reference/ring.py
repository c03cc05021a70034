"""Where things stand on the ring: every identity and every key hashes to a number below 10000."""
import bisect
import hashlib

COPIES = 3


def position(text):
    return int(hashlib.sha1(text.encode("utf-8")).hexdigest(), 16) % 10000


def replicas(servers, key):
    """The addresses that hold `key`, out of a view's [["IP:PORT", HASH], ...], sorted by hash.

    The first is the server with the highest hash not above the key's, or, with none such, the
    last of all (index -1: the ring wraps); the others are the next ones in ascending order.
    """
    first = bisect.bisect_right([place for _, place in servers], position(key)) - 1
    count = min(COPIES, len(servers))
    return [servers[(first + step) % len(servers)][0] for step in range(count)]
