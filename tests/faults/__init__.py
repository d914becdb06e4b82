"""Faults, injected into real runs and real files, as often as is asked for.

python -m tests.faults kill --times 100     kill -9, SIGTERM and SIGINT at random moments; resumed
python -m tests.faults writes               every write, fsync and rename in turn fails
python -m tests.faults exchange --times 200 a folder is moved under a run; logs lose rows
python -m tests.faults distributed          two processes, of which one or both are ended
python -m tests.faults damage --times 1000  flipped bits, truncations, forged and swapped files

Each prints what was tried, survived and lost, and ends with 1 if anything was lost.
"""
