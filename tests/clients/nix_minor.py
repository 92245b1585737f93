"""Runs a server of Nix's worker protocol so that it and its client speak an older version: nix_minor.py MINOR PROGRAM ARGUMENT…"""

import subprocess
import sys
import threading

minor, command = int(sys.argv[1]), sys.argv[2:]
server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def pump(source, target):
    # Both sides begin with a magic number and then, in eight bytes, their version.
    target.write(source.read(8))
    target.flush()
    version = min(int.from_bytes(source.read(8), "little"), 1 << 8 | minor)
    target.write(version.to_bytes(8, "little"))
    target.flush()
    while more := source.read1(1 << 16):
        target.write(more)
        target.flush()
    target.close()


threading.Thread(target=pump, args=(sys.stdin.buffer, server.stdin), daemon=True).start()
pump(server.stdout, sys.stdout.buffer)
sys.exit(server.wait())
